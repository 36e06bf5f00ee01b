"""The softplus twin: every spelling of ReLU, second derivatives, and a function mode that leaves nothing behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tests.metrics.attacked import attack, cnn, images, mlp
from xai_fast.metrics._softplus import softplus_relu


def _inplace(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """In-place forms must write: what counts is the argument afterwards."""

    def run(x: Tensor) -> Tensor:
        x = x.clone()
        returned = function(x)
        assert returned is x
        return x

    return run


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "nn.ReLU": nn.ReLU(),
    "clamp": lambda x: torch.clamp(x, min=0),
    "clamp positional": lambda x: torch.clamp(x, 0.0),
    "Tensor.clamp": lambda x: x.clamp(0, None),
    "clip": lambda x: torch.clip(x, min=0),
    "Tensor.clip": lambda x: x.clip(min=0.0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "Tensor.clamp_min": lambda x: x.clamp_min(0),
    "F.relu in place": _inplace(lambda x: F.relu(x, inplace=True)),
    "nn.ReLU in place": _inplace(nn.ReLU(inplace=True)),
    "F.relu_": _inplace(F.relu_),
    "torch.relu_": _inplace(torch.relu_),
    "Tensor.relu_": _inplace(lambda x: x.relu_()),
    "clamp_": _inplace(lambda x: x.clamp_(min=0)),
    "clip_": _inplace(lambda x: torch.clip_(x, min=0)),
    "clamp_min_": _inplace(lambda x: x.clamp_min_(0)),
}
RELATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "nn.LeakyReLU": nn.LeakyReLU(0.2),
    "leaky_relu_": _inplace(lambda x: F.leaky_relu_(x, 0.2)),
    "relu6": F.relu6,
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": _inplace(nn.ReLU6(inplace=True)),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "hardtanh_": _inplace(F.hardtanh_),
    "clamp to a range": lambda x: x.clamp(0, 6),
}


@pytest.mark.parametrize("name", [*RELUS, *RELATIVES])
def test_twin_of_every_spelling(name: str) -> None:
    function = {**RELUS, **RELATIVES}[name]
    x = torch.linspace(-9, 9, 361, dtype=torch.float64)
    plain = function(x)
    for beta in (0.5, 4.0, 64.0, 4096.0):
        with softplus_relu(beta):
            twin = function(x)
        gap = (twin - plain).abs().max()
        assert gap <= math.log(2) / beta * (1 + 1e-12)
        assert gap > 0.3 * math.log(2) / beta
        if name in RELUS:
            torch.testing.assert_close(twin, F.softplus(x, beta))
    assert function(x).equal(plain)
    x.requires_grad_()
    with softplus_relu(4.0):
        assert torch.autograd.gradcheck(function, x[::30].detach().requires_grad_())
        assert torch.autograd.gradgradcheck(function, x[::30].detach().requires_grad_())
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert second.abs().max() > 0.5
    assert twin.dtype == x.dtype


def test_what_the_twin_leaves_alone() -> None:
    x = torch.randn(2, 3, 8, 8)
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        *(lambda x: F.max_pool2d(x, 2), lambda x: x.clamp(min=1e-6), lambda x: x.clamp(min=torch.zeros(()))),
        *(lambda x: x.clamp(max=0), lambda x: (x * 9).long().clamp(min=0), lambda x: (x * 9).long().relu()),
        *(lambda x: torch.clamp(x, min=0, out=torch.empty_like(x)), F.gelu, lambda x: x.clamp(-1, 1)),
    )
    for function in functions:
        expected = function(x)
        with softplus_relu(1.0):
            assert function(x).equal(expected)


def test_twin_of_a_network_converges_and_has_second_derivatives() -> None:
    model, x = cnn(), images()
    with torch.no_grad():
        plain = model(x)
        gaps = []
        for beta in (10.0, 100.0, 1000.0, 10000.0):
            with softplus_relu(beta):
                gaps.append((model(x) - plain).abs().max())
    assert all(b < 0.2 * a for a, b in itertools.pairwise(gaps))

    def curvature() -> float:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        smooth = torch.autograd.grad(first.sum(), leaf)[0]
        (first,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), leaf)[0]
        assert smooth.abs().max() > 0
        return float(second.abs().max())

    assert curvature() == 0
    with softplus_relu(20.0):
        assert curvature() > 1e-6
    assert curvature() == 0


def test_in_place_twin_is_seen_by_a_residual_branch() -> None:
    """A branch that reads the tensor which an in-place ReLU has written gets the written values, as without the twin."""

    def block(x: Tensor) -> Tensor:
        h = 2 * x
        return nn.ReLU(inplace=True)(h) * 3 + h

    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    with softplus_relu(1e4):
        torch.testing.assert_close(block(x), block(x.detach()), rtol=0, atol=1e-3)
    torch.testing.assert_close(block(x), 8 * x.relu())
    with softplus_relu(3.0):
        torch.testing.assert_close(block(x), 4 * F.softplus(2 * x, 3.0))
        assert torch.autograd.gradgradcheck(block, x)


def test_nothing_stays_patched() -> None:
    x = torch.tensor([0.0], dtype=torch.float64)
    originals = (F.relu, torch.relu, Tensor.relu, Tensor.relu_)
    with pytest.raises(RuntimeError, match="stop"), softplus_relu(2.0):
        raise RuntimeError("stop")
    assert torch.relu(x).item() == 0
    assert (F.relu, torch.relu, Tensor.relu, Tensor.relu_) == originals
    assert not _get_current_function_mode_stack()

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        attack(mlp(), images(), broken)
    assert torch.relu(x).item() == 0


def test_nested_and_entered_again() -> None:
    x = torch.tensor([0.0], dtype=torch.float64)
    outer = softplus_relu(2.0)
    with outer:
        assert torch.relu(x).item() == pytest.approx(math.log(2) / 2)
        with softplus_relu(4.0):
            assert torch.relu(x).item() == pytest.approx(math.log(2) / 4)
            with outer:
                assert torch.relu(x).item() == pytest.approx(math.log(2) / 2)
        assert torch.relu(x).item() == pytest.approx(math.log(2) / 2)
    assert torch.relu(x).item() == 0
    with outer:
        assert torch.relu(x).item() > 0


def test_beside_another_mode() -> None:
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    x = torch.zeros(1)
    with Count(), softplus_relu(2.0):
        assert torch.relu(x).item() > 0
    assert Count.calls > 0


@pytest.mark.parametrize(
    ("beta", "error"), [(0.0, ValueError), (-1.0, ValueError), (math.inf, ValueError), ("1", TypeError)]
)
def test_beta_must_be_positive(beta: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^beta: expected .*, got"):
        softplus_relu(beta)
