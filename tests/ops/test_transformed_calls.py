"""Ops inside autocast, which changes no result, and under a compiler that keeps numbers and sizes symbolic."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import xai_fast as xf
from xai_fast import ops
from xai_fast.ops import relevance, rollout

X, WEIGHT, BIAS, R = torch.randn(3, 64), torch.randn(5, 64), torch.randn(5), torch.randn(3, 5)
ATTENTION, ROWS = torch.randn(2, 3, 30, 30).softmax(-1), torch.rand(2, 30, 30)
QUERY, VALUE = torch.randn(2, 3, 30, 8), torch.randn(2, 3, 30, 4)
RULES = ["epsilon", "z+", "gamma", "alpha-beta", "flat", "w^2", "z_box"]


def linear(x: Tensor, rule: str, bias: Tensor | None = BIAS, eps: float = 1e-6) -> Tensor:
    bounds = {"low": -9.0, "high": 9.0} if rule == "z_box" else {}
    return ops.linear_relevance(x, WEIGHT, bias, R, rule=rule, eps=eps, **bounds)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    **{rule: lambda x, rule=rule: linear(x, rule) for rule in RULES},
    "many rows": lambda _: ops.rollout_rows(ATTENTION, ROWS),
    "whole product": lambda _: xf.attention_rollout([ATTENTION, ATTENTION], token=None),
    "smallest discarded": lambda _: xf.attention_rollout([ATTENTION, ATTENTION], discard_ratio=0.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    expected = CALLS[name](X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CALLS[name](X), expected)
        # Where a gradient is recorded, the call goes through torch.library.
        assert torch.equal(CALLS[name](X.clone().requires_grad_()), expected)


def test_autocast_changes_no_gradient() -> None:
    def gradient(autocast: bool) -> Tensor:
        attention = ATTENTION.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = xf.attention_rollout([attention, attention], token=None).square().sum()
        return torch.autograd.grad(total, attention)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


NUMBERS: dict[str, Callable[[float], Tensor]] = {
    "rollout_rows": lambda a: ops.rollout_rows(ATTENTION, ROWS[:, :2], residual=a),
    "fuse_heads": lambda a: ops.fuse_heads(ATTENTION, residual=a),
    "rollout_rows_qk": lambda a: ops.rollout_rows_qk(QUERY, QUERY, ROWS[:, :2], scale=a, residual=a),
    "targeted_rows": lambda a: ops.targeted_rows(QUERY, QUERY, VALUE, VALUE, ROWS[:, :2], scale=a),
    "av_relevance": lambda a: ops.av_relevance(ATTENTION, VALUE, VALUE, eps=a, lam=a)[0],
    "skip_relevance": lambda a: ops.skip_relevance(X, X, X, eps=a)[0],
    "attention_relevance": lambda a: ops.attention_relevance(QUERY, QUERY, VALUE, VALUE, eps=a, lam=a)[0],
    **{rule: lambda a, rule=rule: linear(X, rule, eps=a) for rule in RULES},
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_numbers_that_change(name: str, dynamic: bool | None) -> None:
    call = NUMBERS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for number in (0.1, 0.2, 0.3):
        assert torch.equal(compiled(number), call(number))


# The overload alone has no gradient: Op records it.
NO_GRADIENT = "ignore:.*an autograd kernel was not registered"


@pytest.mark.filterwarnings(NO_GRADIENT)
@pytest.mark.parametrize("rule", ["epsilon", "flat", "wsquare", "zbox"])
def test_opcheck_of_rules_with_gradients(rule: str) -> None:
    bounds = (torch.tensor(-9.0), torch.tensor(9.0))
    arguments = (X.clone().requires_grad_(), WEIGHT, BIAS, R, rule, 1e-6, 0.25, 2.0, 1.0, *bounds)
    torch.library.opcheck(relevance._linear_relevance.overload, arguments)


@pytest.mark.filterwarnings(NO_GRADIENT)
def test_opcheck_of_many_rows_with_gradients() -> None:
    torch.library.opcheck(rollout._rollout_rows.overload, (ATTENTION.clone().requires_grad_(), ROWS, "mean", 1.0, True))


def test_result_of_the_flat_rule_is_memory_of_its_own() -> None:
    out = linear(X, "flat")
    before = out.clone()
    assert torch.equal(out.add_(1), before + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"token": None}, {"token": range(30)}, {"token": 0}, {"token": 0, "discard_ratio": 0.3}]
)
def test_16_bit_attention_is_rounded_once(dtype: torch.dtype, options: dict[str, object]) -> None:
    layers = [torch.randn(1, 3, 30, 30).mul(3).softmax(-1).to(dtype) for _ in range(12)]
    exact = xf.attention_rollout([layer.double() for layer in layers], **options)
    found = xf.attention_rollout(layers, **options).double()
    assert ((found - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
