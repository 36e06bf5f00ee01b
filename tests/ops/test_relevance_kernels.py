"""The compiled relevance kernels (CPU bodies, emulated CUDA, CUDA) against the float64 reference: rows, elements,
linear layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulator.build import sanitized
from tests.implementations import Implementation, assert_order_of_threads_does_not_matter
from tests.ops.relevance_checks import DTYPES, away_from_zero, check, exactly, normal
from tests.tolerances import assert_close_to_reference
from xai_fast.reference import relevance as reference

# ---- rows and elements -----------------------------------------------------------------------------------------------

ROW_SHAPES = [(1,), (3, 1), (2, 5, 7), (4, 33), (9, 64), (2, 3, 200), (2, 1100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_softmax(implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = normal(*shape, dtype=dtype)
    logits[..., ::3] = -math.inf
    if dtype in (torch.float32, torch.float64):
        logits[..., 1::5] = torch.finfo(torch.float32).min
    probs = torch.rand(shape, dtype=torch.float64).to(dtype)
    check(implementation, "softmax_relevance", logits, probs, normal(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_norms(implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, upstream = away_from_zero(*shape, dtype=dtype) + 1, normal(*shape, dtype=dtype)
    weight, bias = away_from_zero(shape[-1], dtype=dtype), normal(shape[-1], dtype=dtype)
    for rms, detach_mean, gradient_form, w, b, eps in [
        (False, False, False, weight, bias, 0.1),
        (False, True, False, weight, None, 1e-6),
        (False, False, True, None, bias, 0.0),
        (True, False, False, weight, None, 0.0),
        (True, True, True, None, None, 0.1),
    ]:
        check(implementation, "norm_relevance", x, w, b, upstream, 1e-5, eps, rms, detach_mean, gradient_form)


@pytest.mark.parametrize("rms", [False, True])
def test_norm_of_a_large_mean(implementation: Implementation, rms: bool) -> None:
    """The variance is taken around the mean: a one-pass formula would lose every digit here."""
    x = normal(3, 300) + 1000
    check(implementation, "norm_relevance", x, None, None, normal(3, 300), 1e-5, 0.1, rms, False, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (2, 16385 if not sanitized() else 70)])
@pytest.mark.parametrize("rule", ["epsilon", "ratio"])
def test_skip(implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...], rule: str) -> None:
    # One sign: the sums of a sample do not cancel.
    x, y, relevance = (torch.rand(shape, dtype=torch.float64).add(0.1).to(dtype) for _ in range(3))
    for eps in (0.0, 1e-6, 0.1):
        check(implementation, "skip_relevance", x, y, relevance, rule, eps)
    check(implementation, "skip_relevance", x, -y / 2, -relevance, rule, 1e-6)


@pytest.mark.parametrize("rule", ["epsilon", "ratio"])
def test_skip_of_nothing(implementation: Implementation, rule: str) -> None:
    """Zero denominators pass nothing on; a branch whose shares add up to 0 gets nothing; samples are apart."""
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    y = torch.tensor([[-1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 3.0, 0.0]])
    relevance = torch.tensor([[5.0, 5.0, 5.0], [1.0, 2.0, 3.0], [2.0, 2.0, 0.0]])
    to_x, to_y = check(implementation, "skip_relevance", x, y, relevance, rule, 0.0)
    assert to_x[0, :2].eq(0).all()
    assert to_y[1].eq(0).all()
    relevance[0, 0] = math.nan
    to_x, _ = implementation("skip_relevance", x.add(3), y, relevance, rule, 0.1)
    assert to_x[0].isnan().any()
    assert not to_x[1:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 1000, 4099])
def test_gradient_factors(implementation: Implementation, dtype: torch.dtype, count: int) -> None:
    grad, x, y = normal(count, dtype=dtype), away_from_zero(count, dtype=dtype), normal(count, dtype=dtype)
    x[::4], y[::3] = 0, 0
    for number in (0.0, 1e-6, 0.1):
        check(implementation, "stabilized_gradient", grad, y, number)
        check(implementation, "identity_gradient", grad, x, y, number)


def test_shifted_and_transposed_elements(implementation: Implementation) -> None:
    """Addresses that 16-byte accesses cannot take, and inputs that are not contiguous."""
    flat = away_from_zero(4000, dtype=torch.float16)
    x, y, r = flat[1:1001].view(25, 40), flat[1003:2003].view(25, 40), flat[2000:3000].view(40, 25).T
    check(implementation, "softmax_relevance", x, y.abs(), r)
    check(implementation, "norm_relevance", x, flat[7:47], flat[9:49], r, 1e-5, 0.1, False, False, False)
    check(implementation, "skip_relevance", x, y, r, "epsilon", 0.1)
    check(implementation, "stabilized_gradient", x, r, 0.1)
    check(implementation, "norm_relevance", r, flat[8:48], None, x, 1e-5, 0.1, True, False, False)


def test_nan_in_a_row_stays_in_the_row(implementation: Implementation) -> None:
    x, r = normal(6, 50), normal(6, 50)
    x[2, 7], r[4, 3] = math.nan, math.nan
    probs = torch.rand(6, 50)
    for function, args in [
        ("softmax_relevance", (x, probs, r)),
        ("norm_relevance", (x, None, None, r, 1e-5, 0.1, False, False, False)),
    ]:
        out = implementation(function, *args)
        assert torch.equal(out.isnan(), getattr(reference, function)(*args).isnan())
        assert out.isnan().any(-1).tolist() == [False, False, True, False, True, False]


# ---- linear layers ---------------------------------------------------------------------------------------------------

LINEAR_RULES = ["epsilon", "zplus", "gamma", "alphabeta"]


def check_linear(implementation: Implementation, *args: Any) -> Tensor:
    """The kernel has no bounds of the input: the rules that need them stay in PyTorch."""
    actual = implementation("linear_relevance", *args)
    full = (*args, None, None)
    same = reference.linear_relevance(*full)
    assert actual.dtype == same.dtype
    assert_close_to_reference(actual, reference.linear_relevance(*map(exactly, full)), same)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", LINEAR_RULES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 64, 20), (5, 30, 1030)])
def test_linear(implementation: Implementation, dtype: torch.dtype, rule: str, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    x, weight = away_from_zero(rows, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype)
    relevance = normal(rows, outputs, dtype=dtype)
    for bias in (None, normal(outputs, dtype=dtype)):
        check_linear(implementation, x, weight, bias, relevance, rule, 0.1, 0.25, 2.0, 1.0)


@pytest.mark.parametrize("rule", LINEAR_RULES)
def test_linear_zero_outputs(implementation: Implementation, rule: str) -> None:
    """Outputs that are 0 pass nothing on when eps is 0."""
    x, weight = torch.zeros(2, 3), normal(4, 3)
    x[1, 0] = 1
    weight[2] = 0
    out = check_linear(implementation, x, weight, None, torch.ones(2, 4), rule, 0.0, 0.25, 2.0, 1.0)
    assert out[0].eq(0).all()


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_empty_batch(implementation: Implementation) -> None:
    x = torch.rand(0, 7)
    assert implementation("softmax_relevance", x, x, x).shape == (0, 7)
    assert implementation("norm_relevance", x, None, None, x, 1e-5, 0.1, False, False, False).shape == (0, 7)
    assert implementation("stabilized_gradient", x, x, 0.1).shape == (0, 7)
    for rule in ("epsilon", "ratio"):
        assert implementation("skip_relevance", x, x, x, rule, 0.1)[0].shape == (0, 7)
    out = implementation("linear_relevance", x, torch.rand(4, 7), None, torch.rand(0, 4), "gamma", 0.1, 0.25, 2.0, 1.0)
    assert out.shape == (0, 7)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_emulated_kernels_do_not_depend_on_the_order_of_threads(seed: int) -> None:
    x = normal(2, 1100)
    calls: list[tuple[Any, ...]] = [
        ("softmax_relevance", x, x.abs(), x),
        ("norm_relevance", x, None, None, x, 1e-5, 0.1, False, False, False),
        ("skip_relevance", x, x.flip(0), x, "ratio", 0.1),
    ]
    assert_order_of_threads_does_not_matter(seed, calls)
