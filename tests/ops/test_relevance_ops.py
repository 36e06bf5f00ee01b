"""The relevance ops as users call them: examples, conservation, composition, gradients, torch.compile, bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import xai_fast as xf
from tests.implementations import assert_number_of_threads_does_not_matter, with_threads
from tests.peers.locate import peers_directory
from xai_fast.ops import fused_attention
from xai_fast.ops import relevance as ops
from xai_fast.reference import relevance as reference
from xai_fast.reference import rollout as rollout_reference

RULES = ["epsilon", "z+", "gamma", "alpha-beta", "flat", "w^2", "z_box"]
BOUNDS = {"low": -4.0, "high": 4.0}


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads, 9, 8),
        torch.randn(2, groups, 7, 8),
        torch.randn(2, groups, 7, 6),
        torch.randn(2, heads, 9, 6),
    )


def defect(relevance: Tensor, out: Tensor, eps: float) -> Tensor:
    """What the epsilon rule keeps back: sum R eps / (|O| + eps)."""
    return (relevance * eps / (out.abs() + eps)).sum()


def test_worked_example() -> None:
    attention = torch.tensor([[[[0.2, 0.8]]]], dtype=torch.float64)
    value = torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float64)
    to_attention, to_value = xf.ops.av_relevance(attention, value, torch.ones(1, 1, 1, 1, dtype=torch.float64), eps=0.0)
    expected = torch.tensor([0.1, 1.2], dtype=torch.float64) / 2.6
    assert torch.allclose(to_attention.flatten(), expected, atol=1e-7)
    assert torch.allclose(to_value.flatten(), expected, atol=1e-7)
    single = xf.ops.av_relevance(attention.float(), value.float(), torch.ones(1, 1, 1, 1))
    for found in single:
        assert torch.allclose(found.flatten(), expected.float(), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    eps=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]),
    lam=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_products_conserve_up_to_the_predicted_defect(eps: float, lam: float, size: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    batch, queries, keys, dim = size
    attention, value, relevance = (
        double(batch, 4, queries, keys).softmax(-1),
        double(batch, 2, keys, dim),
        double(batch, 4, queries, dim),
    )
    to_attention, to_value = xf.ops.av_relevance(attention, value, relevance, lam=lam, eps=eps)
    out = attention @ value.repeat_interleave(2, 1)
    total = to_attention.sum() + to_value.sum() + defect(relevance, out, eps)
    scale = float((relevance.abs() * (1 + out.abs().amax() / out.abs().clamp_min(1e-9))).sum())
    assert abs(float(total - relevance.sum())) <= 1e-12 * scale


@settings(max_examples=25, deadline=None)
@given(eps=st.sampled_from([0.0, 1e-6, 0.5]), rule=st.sampled_from(["epsilon", "ratio"]), seed=st.integers(0, 1000))
def test_skip_conserves(eps: float, rule: str, seed: int) -> None:
    torch.manual_seed(seed)
    x, y, relevance = double(3, 4, 5), double(3, 4, 5), double(3, 4, 5)
    to_x, to_y = xf.ops.skip_relevance(x, y, relevance, rule=rule, eps=eps)
    if rule == "ratio":
        kept = (to_x + to_y).flatten(1).sum(1)
        torch.testing.assert_close(kept, relevance.flatten(1).sum(1))
        share_x, share_y = (
            (t * relevance / (x + y + eps * torch.where(x + y < 0, -1, 1))).flatten(1).sum(1) for t in (x, y)
        )
        portion = share_x.abs() / (share_x.abs() + share_y.abs())
        torch.testing.assert_close(to_x.flatten(1).sum(1), portion * relevance.flatten(1).sum(1))
    else:
        torch.testing.assert_close(to_x + to_y, relevance - relevance * eps / ((x + y).abs() + eps))


def test_skip_ratio_does_not_mix_samples() -> None:
    """The published code sums over the batch: X = (5, 0), Y = (-4, 1), R = (1, -2) then depends on its batch mates."""
    x, y, relevance = torch.tensor([[5.0, 0.0]]), torch.tensor([[-4.0, 1.0]]), torch.tensor([[1.0, -2.0]])
    alone = xf.ops.skip_relevance(x, y, relevance, rule="ratio", eps=0.0)
    mates = [torch.cat([t, torch.randn(3, 2)]) for t in (x, y, relevance)]
    together = xf.ops.skip_relevance(*mates, rule="ratio", eps=0.0)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[:1])
    assert torch.allclose(alone[0], torch.tensor([[-5 / 11, 0.0]]))


@pytest.mark.parametrize("rule", RULES)
def test_linear_rules_conserve_without_bias(rule: str) -> None:
    x, weight, relevance = double(2, 3, 7), double(5, 7), double(2, 3, 5)
    out = xf.ops.linear_relevance(x, weight, None, relevance, rule=rule, eps=0.0, **BOUNDS)
    torch.testing.assert_close(out.sum(), relevance.sum(), rtol=1e-9, atol=1e-9)


def slow_linear(x: Tensor, weight: Tensor, bias: Tensor, relevance: Tensor, rule: str, eps: float) -> Tensor:
    """Every contribution c(x_k, w_ok) written out, one output at a time."""
    result = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for o in range(weight.shape[0]):
            products, b, r = x[n] * weight[o], bias[o], relevance[n, o]
            up, down = products.clamp(min=0), products.clamp(max=0)
            z = products.sum() + b
            terms = {
                "epsilon": [(products, b, 1.0)],
                "z+": [(up, 0.0 * b, 1.0)],
                "gamma": [
                    (
                        products + 0.25 * (up if z > 0 else down),
                        b + 0.25 * (b.clamp(min=0) if z > 0 else b.clamp(max=0)),
                        1.0,
                    )
                ],
                "alpha-beta": [(up, b.clamp(min=0), 2.0), (down, b.clamp(max=0), -1.0)],
                "flat": [(torch.ones_like(products), 0.0 * b, 1.0)],
                "w^2": [(weight[o] ** 2, 0.0 * b, 1.0)],
                "z_box": [(products + 4 * weight[o].clamp(min=0) - 4 * weight[o].clamp(max=0), 0.0 * b, 1.0)],
            }[rule]
            for contribution, constant, factor in terms:
                total = contribution.sum() + constant
                denominator = total + (-eps if total < 0 else eps)
                if denominator != 0:
                    result[n] += factor * contribution * r / denominator
    return result


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_linear_rules_against_their_definition(rule: str, eps: float) -> None:
    x, weight, bias, relevance = double(4, 6), double(5, 6), double(5), double(4, 5)
    found = xf.ops.linear_relevance(x, weight, bias, relevance, rule=rule, eps=eps, **BOUNDS)
    expected = slow_linear(x, weight, bias, relevance, rule, 0.0 if rule == "flat" else eps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_fused_attention_equals_its_parts(eps: float, causal: bool, lam: float) -> None:
    """av, softmax and the epsilon rule of the two factors of QK^T, composed explicitly."""
    query, key, value, relevance = (t.double() for t in qkv())
    k = key.repeat_interleave(2, 1)
    scale = 8**-0.5
    probs = rollout_reference.attention_probabilities(query, key, None, None, None, causal)
    to_probs, to_value = xf.ops.av_relevance(probs, value, relevance, lam=lam, eps=eps)
    scores = scale * query @ k.transpose(-1, -2)
    masked = torch.where(probs == 0, -math.inf, scores)
    to_scores = xf.ops.softmax_relevance(masked, probs, to_probs)
    share = to_scores / torch.where(scores < 0, scores - eps, scores + eps)
    to_query = 0.5 * scale * query * (share @ k)
    to_key = 0.5 * scale * key * (share.transpose(-1, -2) @ query).unflatten(1, (2, 2)).sum(2)
    found = xf.ops.attention_relevance(query, key, value, relevance, is_causal=causal, lam=lam, eps=eps)
    for f, e in zip(found, (to_query, to_key, to_value), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9 * float(e.abs().max().clamp_min(1)))


def test_what_fused_attention_returns_is_taken() -> None:
    """O and the log sum exp of PyTorch's own kernel."""
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    relevance = torch.randn(2, 4, 9, 8)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=True)
    found = xf.ops.attention_relevance(query, key, value, relevance, is_causal=True, output=output, lse=lse)
    wanted = xf.ops.attention_relevance(query, key, value, relevance, is_causal=True)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-4 * float(w.abs().max()))
    with pytest.raises(ValueError, match=r"^lse: expected shape \(B, H, N\) = \(2, 4, 9\), got \(2, 4, 8\)$"):
        xf.ops.attention_relevance(query, key, value, relevance, lse=lse[..., 1:])


def test_gradient_form_is_relevance_over_input() -> None:
    query, key, value, relevance = (t.double() for t in qkv())
    out = rollout_reference.attention_probabilities(query, key, None, None, None, False) @ value.repeat_interleave(2, 1)
    wanted = xf.ops.attention_relevance(query, key, value, relevance, eps=1e-3)
    for output in (None, out):
        found = fused_attention.attention_gradients(query, key, value, relevance / out, output=output, eps=1e-3)
        for x, g, r in zip((query, key, value), found, wanted, strict=True):
            torch.testing.assert_close(x * g, r, rtol=1e-7, atol=1e-9)
    g_query, g_key, _ = fused_attention.attention_gradients(query, key, value, relevance, lam=0.0)
    assert g_query is None
    assert g_key is None


def test_true_gradients_are_a_special_case() -> None:
    """Without the factors lam / 2, lam / 2 and 1 - lam, eps = 0 is the backward pass of attention itself."""
    query, key, value, grad = (t.double().requires_grad_() for t in qkv(4, 4))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    wanted = torch.autograd.grad(out, (query, key, value), grad)
    found = fused_attention.attention_gradients(query, key, value, grad.detach())
    for f, w, factor in zip(found, wanted, (0.25, 0.25, 0.5), strict=True):
        torch.testing.assert_close(f, factor * w, rtol=1e-9, atol=1e-9)


def test_layer_norm_relevance_is_the_gradient_with_constant_scale() -> None:
    x, weight, bias, relevance = double(3, 7).requires_grad_(), double(7), double(7), double(3, 7)
    deviation = x.var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt().detach()
    y = (x - x.mean(-1, keepdim=True)) / deviation * weight + bias
    (expected,) = torch.autograd.grad(y, x, relevance / y)
    found = xf.ops.layer_norm_relevance(x.detach(), weight, bias, relevance, eps=0.0)
    torch.testing.assert_close(found, x.detach() * expected)
    (in_gradient_form,) = (ops.norm_gradient(relevance, x.detach(), weight, norm_eps=1e-5),)
    (expected,) = torch.autograd.grad((x - x.mean(-1, keepdim=True)) / deviation * weight, x, relevance)
    torch.testing.assert_close(in_gradient_form, expected)


CALLS: list[tuple[Any, Any]] = [
    (
        ops._av_relevance,
        lambda: (torch.randn(2, 4, 9, 7).softmax(-1), torch.randn(2, 2, 7, 6), torch.randn(2, 4, 9, 6), 0.5, 0.1),
    ),
    (ops._softmax_relevance, lambda: (torch.randn(3, 9), torch.rand(3, 9), torch.randn(3, 9))),
    (ops._skip_relevance, lambda: (torch.randn(3, 9), torch.randn(3, 9), torch.randn(3, 9), "epsilon", 0.1)),
    (ops._skip_relevance, lambda: (torch.randn(3, 9), torch.randn(3, 9), torch.randn(3, 9), "ratio", 0.1)),
    (
        ops._norm_relevance,
        lambda: (torch.randn(3, 9), torch.randn(9), None, torch.randn(3, 9), 1e-5, 0.1, False, False, False),
    ),
    (ops._stabilized_gradient, lambda: (torch.randn(3, 9), torch.randn(3, 9), 0.1)),
    (ops._identity_gradient, lambda: (torch.randn(3, 9), torch.randn(3, 9), torch.randn(3, 9), 0.5)),
    (ops._linear_relevance, lambda: (*linear_inputs(), "gamma", 0.1, 0.25, 2.0, 1.0, None, None)),
    (ops._linear_relevance, lambda: (*linear_inputs(), "zplus", 0.1, 0.25, 2.0, 1.0, None, None)),
    (
        fused_attention._attention_relevance,
        lambda: (*qkv(), None, torch.rand(2, 1, 9, 7) > 0.3, None, True, 0.5, 0.1, False),
    ),
    (fused_attention._attention_relevance, lambda: (*qkv(), None, None, None, False, 0.0, 0.1, True)),
    (
        fused_attention._attention_relevance,
        lambda: (*qkv(), torch.randn(2, 4, 9, 6), None, None, False, 0.5, 0.1, False, torch.rand(2, 4, 9) + 2),
    ),
    (
        fused_attention._targeted_rows,
        lambda: (*targeted_inputs(), None, None, None, None, None, True, "mean", True, 1.0, True, 0.5, 0.1),
    ),
]


def linear_inputs() -> tuple[Tensor, ...]:
    return torch.randn(4, 6), torch.randn(5, 6), torch.randn(5), torch.randn(4, 5)


def targeted_inputs() -> tuple[Tensor, ...]:
    return (
        torch.randn(2, 4, 9, 8),
        torch.randn(2, 2, 9, 8),
        torch.randn(2, 2, 9, 6),
        torch.randn(2, 4, 9, 6),
        torch.rand(2, 3, 9),
    )


@pytest.mark.parametrize(("op", "build"), CALLS)
def test_opcheck_and_compile(op: Any, build: Any) -> None:
    args = build()
    torch.library.opcheck(op.overload, args)
    tensors = [a for a in args if isinstance(a, Tensor)]

    def call(*given: Tensor) -> Any:
        left = list(given)
        return op(*(left.pop(0) if isinstance(a, Tensor) else a for a in args))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors), rtol=0, atol=0)
    with FakeTensorMode() as mode:
        fake = call(*(mode.from_tensor(t) for t in tensors))
    real = call(*tensors)
    for f, r in zip(fake if isinstance(fake, tuple) else (fake,), real if isinstance(real, tuple) else (real,), strict=True):
        assert (f.shape, f.dtype) == (r.shape, r.dtype)


@pytest.mark.parametrize(("op", "build"), CALLS)
def test_gradients_and_strides_and_threads(op: Any, build: Any) -> None:
    args = build()
    plain = op(*args)
    first = (plain[-1] if isinstance(plain, tuple) else plain).sum()
    wanting = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    out = op(*wanting)
    total = (out[-1] if isinstance(out, tuple) else out).sum()
    torch.testing.assert_close(total, first)
    doubled = [a.detach().double().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a for a in wanting]
    exact = op.reference(*doubled)
    tensors = [i for i, a in enumerate(wanting) if isinstance(a, Tensor) and a.requires_grad]
    found = torch.autograd.grad(total, [wanting[i] for i in tensors], allow_unused=True)
    wanted = torch.autograd.grad(
        (exact[-1] if isinstance(exact, tuple) else exact).sum(), [doubled[i] for i in tensors], allow_unused=True
    )
    for f, w in zip(found, wanted, strict=True):
        if f is not None and w is not None:
            torch.testing.assert_close(f.double(), w, rtol=1e-3, atol=1e-4 * float(w.abs().max().clamp_min(1)))

    spread = [torch.stack([a, a], -1)[..., 0] if isinstance(a, Tensor) else a for a in args]
    torch.testing.assert_close(op(*spread), plain, rtol=0, atol=0)
    other = with_threads(1 if torch.get_num_threads() > 1 else 2, lambda: op(*args))
    torch.testing.assert_close(other, plain, rtol=0, atol=0)


def test_results_do_not_depend_on_threads_when_queries_are_cut_into_slots() -> None:
    query, key, value, relevance = (torch.randn(1, 2, 500, 8) for _ in range(4))
    assert_number_of_threads_does_not_matter(lambda: xf.ops.attention_relevance(query, key, value, relevance))


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    query, key, value, relevance = qkv()
    together = xf.ops.attention_relevance(query, key, value, relevance)
    for b in range(2):
        alone = xf.ops.attention_relevance(*(t[b : b + 1] for t in (query, key, value, relevance)))
        for t, a in zip(together, alone, strict=True):
            torch.testing.assert_close(t[b : b + 1], a, rtol=1e-5, atol=1e-6)


def test_inputs_stay_as_they_are() -> None:
    for op, build in CALLS:
        args = build()
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        op(*args)
        for a, b in zip(args, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_empty_batch() -> None:
    query, key, value, relevance = (t[:0] for t in qkv())
    assert [t.shape[0] for t in xf.ops.attention_relevance(query, key, value, relevance)] == [0, 0, 0]
    assert xf.ops.softmax_relevance(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)
    assert xf.ops.linear_relevance(torch.empty(0, 4), torch.ones(3, 4), None, torch.empty(0, 3)).shape == (0, 4)
    assert xf.ops.skip_relevance(*(torch.empty(0, 4),) * 3, rule="ratio")[0].shape == (0, 4)


def test_memory_is_linear_in_the_sequence() -> None:
    """N = 16384 in 8 heads: the attention matrices would take 8.6 GB; one process may use far less."""
    code = (
        "import resource, torch, xai_fast as xf\n"
        "torch.set_num_threads(1)\n"
        "q, k, v, r = (torch.randn(1, 8, 16384, 8) for _ in range(4))\n"
        "r[:, :, 64:] = 0\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "xf.ops.attention_relevance(q, k, v, r)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 200 * 1024  # kilobytes: 17 MB of results, packed keys and values, 48 rows of scores


def test_lxt_functions_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """lxt.explicit.functional, whose unsigned stabiliser x + eps is no matter at eps = 1e-12."""
    monkeypatch.syspath_prepend(peers_directory("lxt"))
    from lxt.explicit import functional as lxt

    query, key, value, relevance = (t.double() for t in qkv(2, 2))
    # A constant scale passes relevance on as it is, so the scaled query takes the place of the query.
    operands = [t.requires_grad_() for t in (query * 8**-0.5, key, value)]
    scores = lxt.matmul(operands[0], operands[1].transpose(-1, -2), False, 1e-12)
    probs = lxt.softmax(scores, -1)
    out = lxt.matmul(probs, operands[2], False, 1e-12)
    wanted = torch.autograd.grad(out, operands, relevance)
    found = xf.ops.attention_relevance(query, key.detach(), value.detach(), relevance, eps=0.0)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-6, atol=1e-7 * float(w.abs().max()))
    x, y = double(3, 4).requires_grad_(), double(3, 4).requires_grad_()
    total = lxt.add2(x, y, False, 1e-12)
    for f, w in zip(
        xf.ops.skip_relevance(x.detach(), y.detach(), torch.ones_like(x).detach(), eps=0.0),
        torch.autograd.grad(total, (x, y), torch.ones_like(total)),
        strict=True,
    ):
        torch.testing.assert_close(f, w, rtol=1e-6, atol=1e-7 * float(w.abs().max()))


def bad_calls() -> list[tuple[str, type[Exception], Any]]:
    query, key, value, relevance = qkv()
    attention, av_value, av_relevance = torch.rand(2, 4, 9, 7), torch.rand(2, 2, 7, 6), torch.rand(2, 4, 9, 6)
    x, weight, bias, out = linear_inputs()
    tq, tk, tv, tg, rows = targeted_inputs()
    f = xf.ops
    return [
        (
            r"lam: expected a share in \[0, 1\], got 1.5",
            ValueError,
            lambda: f.av_relevance(attention, av_value, av_relevance, lam=1.5),
        ),
        (
            r"eps: expected a number of at least 0, got -1",
            ValueError,
            lambda: f.av_relevance(attention, av_value, av_relevance, eps=-1),
        ),
        (r"eps: expected a finite number, got nan", ValueError, lambda: f.skip_relevance(x, x, x, eps=math.nan)),
        (
            r"value: expected shape \(2, Hkv, 7, D\)",
            ValueError,
            lambda: f.av_relevance(attention, av_value[:, :, :5], av_relevance),
        ),
        (
            r"relevance: expected shape \(2, 4, 9, 6\)",
            ValueError,
            lambda: f.av_relevance(attention, av_value, av_relevance[:, :2]),
        ),
        (
            r"relevance: expected a float32, .*complex64",
            TypeError,
            lambda: f.av_relevance(attention, av_value, av_relevance.to(torch.complex64)),
        ),
        (r"relevance: expected a float32, .*int64", TypeError, lambda: f.skip_relevance(x, x, x.long())),
        (
            r"relevance: expected dtype torch.float32, got torch.float64",
            TypeError,
            lambda: f.softmax_relevance(x, x, x.double()),
        ),
        (r"rule: expected 'taylor' or 'identity', got 'lrp'", ValueError, lambda: f.softmax_relevance(x, x, x, rule="lrp")),
        (r"rule: expected 'epsilon' or 'ratio', got 'z'", ValueError, lambda: f.skip_relevance(x, x, x, rule="z")),
        (
            r"rule: expected one of epsilon, .*got 'delta'",
            ValueError,
            lambda: f.linear_relevance(x, weight, bias, out, rule="delta"),
        ),
        (
            r"alpha, beta: expected alpha - beta = 1, got 2.0 and 2.0",
            ValueError,
            lambda: f.linear_relevance(x, weight, bias, out, alpha=2.0, beta=2.0),
        ),
        (
            r"low: the z_box rule needs the bounds",
            ValueError,
            lambda: f.linear_relevance(x, weight, bias, out, rule="z_box"),
        ),
        (
            r"high: expected a shape that broadcasts to",
            ValueError,
            lambda: f.linear_relevance(x, weight, bias, out, rule="z_box", low=-1.0, high=torch.ones(5)),
        ),
        (r"x: expected shape \(\.\.\., 6\), got \(4, 5\)", ValueError, lambda: f.linear_relevance(out, weight, bias, out)),
        (r"bias: expected shape \(5,\), got \(6,\)", ValueError, lambda: f.linear_relevance(x, weight, torch.ones(6), out)),
        (
            r"gamma: expected a number of at least 0",
            ValueError,
            lambda: f.linear_relevance(x, weight, bias, out, gamma=-0.1),
        ),
        (r"key: expected shape", ValueError, lambda: f.attention_relevance(query, key[..., :3], value, relevance)),
        (
            r"value: expected the 2 heads of key, got 1",
            ValueError,
            lambda: f.attention_relevance(query, key, value[:, :1], relevance),
        ),
        (
            r"attn_mask: expected a shape that broadcasts",
            ValueError,
            lambda: f.attention_relevance(query, key, value, relevance, attn_mask=torch.ones(3, 3).bool()),
        ),
        (
            r"output: expected shape",
            ValueError,
            lambda: f.attention_relevance(query, key, value, relevance, output=relevance[:1]),
        ),
        (r"weight: expected shape \(6,\), got \(5,\)", ValueError, lambda: f.layer_norm_relevance(x, bias, None, x)),
        (
            r"key: expected as many keys as queries \(9\), got 7",
            ValueError,
            lambda: f.targeted_rows(query, key, value, relevance, rows),
        ),
        (
            r"head_fusion: expected 'mean' or 'sum', got 'max'",
            ValueError,
            lambda: f.targeted_rows(tq, tk, tv, tg, rows, head_fusion="max"),
        ),
        (r"rows: expected shape", ValueError, lambda: f.targeted_rows(tq, tk, tv, tg, rows[:, :, :5])),
        (r"grad_out: expected shape", ValueError, lambda: f.targeted_rows(tq, tk, tv, tg[:, :2], rows)),
        (r"query: expected a torch.Tensor, got ndarray", TypeError, lambda: f.targeted_rows(tq.numpy(), tk, tv, tg, rows)),
    ]


@pytest.mark.parametrize("number", range(len(bad_calls())))
def test_bad_input(number: int) -> None:
    message, kind, call = bad_calls()[number]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_reference_serves_without_kernels() -> None:
    """The definition itself at the corners: no denominator, no key, no relevance."""
    zero = torch.zeros(1, 1, 2, 3)
    to_attention, to_value = reference.av_relevance(torch.ones(1, 1, 2, 2), zero, torch.ones(1, 1, 2, 3), 0.5, 0.0)
    assert not bool(to_attention.any())
    assert not bool(to_value.any())
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    for found in xf.ops.attention_relevance(zero + 1, zero + 1, zero + 1, zero + 1, attn_mask=mask):
        assert not bool(found.any())
