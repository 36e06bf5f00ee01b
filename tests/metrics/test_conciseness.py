"""Conciseness of maps against scipy, hand-computed numbers and the double sum of the Gini index."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from xai_fast.metrics.conciseness import conciseness, effective_complexity, entropy, gini, size, sparsity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "size": size,
    "sparsity": sparsity,
    "entropy": entropy,
    "gini": gini,
    "effective_complexity": effective_complexity,
    "relative": lambda a: size(a, 0.5, relative=True),
    "all": lambda a: conciseness(a).gini,
}


def double_sum_gini(a: np.ndarray) -> float:
    a = np.abs(a)
    return float(np.abs(a[:, None] - a[None, :]).sum() / (2 * len(a) ** 2 * a.mean()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (4, 3, 5, 6)])
def test_matches_the_definitions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a = torch.randn(shape).to(dtype)
    flat = a.double().abs().flatten(1).numpy()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for function, oracle in ((entropy, stats.entropy), (gini, double_sum_gini)):
        found = function(a)
        assert found.dtype == expected_dtype
        np.testing.assert_allclose(found.double(), [oracle(row) for row in flat], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(size(a, 0.5), (flat > 0.5).sum(1))
    np.testing.assert_allclose(sparsity(a, 0.5), (flat <= 0.5).mean(1), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(effective_complexity(a), (flat > 1e-5).sum(1))


def test_one_call_gives_what_the_functions_give() -> None:
    a = torch.randn(3, 4, 5)
    for relative in (False, True):
        found = conciseness(a, 0.3, relative=relative)
        assert found.size.equal(size(a, 0.3, relative=relative))
        assert found.sparsity.equal(sparsity(a, 0.3, relative=relative))
        assert found.entropy.equal(entropy(a))
        assert found.gini.equal(gini(a))
        assert found.features == 20


def test_hand_computed() -> None:
    a = torch.tensor([[1.0, -3.0, 0.0, 4.0]], dtype=torch.float64)
    assert size(a).item() == 3
    assert sparsity(a).item() == 0.25
    assert entropy(a).item() == pytest.approx(-(math.log(1 / 8) / 8 + 3 / 8 * math.log(3 / 8) + 0.5 * math.log(0.5)))
    # sum |a_i - a_j| over ordered pairs: 2 (2 + 1 + 3 + 3 + 1 + 4) = 28; 2 n sum a = 64
    assert gini(a).item() == pytest.approx(28 / 64)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], (0, 1, 0, 0)),
        ([2.0, 2.0, 2.0, 2.0], (4, 0, math.log(4), 0)),
        ([-2.0, -2.0, -2.0, -2.0], (4, 0, math.log(4), 0)),
        ([0.0, -5.0, 0.0, 0.0], (1, 0.75, 0, 0.75)),
        ([7.0], (1, 0, 0, 0)),
        ([0.0], (0, 1, 0, 0)),
        ([1.0, math.nan, 1.0], (math.nan,) * 4),
        ([1.0, math.inf, 1.0], (math.nan,) * 4),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_documented_values(row: list[float], expected: tuple[float, ...], dtype: torch.dtype) -> None:
    a = torch.tensor([row], dtype=dtype)
    for function, value in zip((size, sparsity, entropy, gini), expected, strict=True):
        assert function(a).item() == pytest.approx(value, abs=1e-6, nan_ok=True), function.__name__
    for value, name in zip(expected, ("size", "sparsity", "entropy", "gini"), strict=True):
        assert getattr(conciseness(a, relative=True), name).item() == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_base_and_normalize() -> None:
    a = torch.rand(3, 8, dtype=torch.float64)
    expected = stats.entropy(a.numpy(), base=2, axis=1)
    np.testing.assert_allclose(entropy(a, base=2), expected)
    np.testing.assert_allclose(entropy(a, normalize=True), expected / 3)
    np.testing.assert_allclose(entropy(a, base=10, normalize=True), expected / 3)
    assert entropy(torch.ones(1, 1), normalize=True).item() == 0
    assert entropy(torch.ones(1, 6), normalize=True).item() == pytest.approx(1)
    np.testing.assert_allclose(entropy(a, base=0.5), -expected)


def test_relative_threshold() -> None:
    a = torch.tensor([[1.0, 0.5, 0.4, -0.6], [100.0, 50.0, 40.0, -60.0]])
    assert size(a, 0.5, relative=True).tolist() == [2, 2]  # exactly at the threshold is not above it
    assert size(a, 0.5).tolist() == [2, 4]
    assert effective_complexity(a, 0.45, relative=True).tolist() == [3, 3]
    assert sparsity(a, 1.0, relative=True).tolist() == [1, 1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_strides_and_untouched_inputs(name: str) -> None:
    function = FUNCTIONS[name]
    a = torch.randn(3, 6, 5)
    a[1] = 0
    expected, before = function(a), a.clone()
    assert a.equal(before)
    strided = torch.randn(6, 5, 6)[:, :, ::2].permute(2, 0, 1)
    torch.testing.assert_close(function(strided), function(strided.contiguous()))
    for array in (a.numpy(), np.asfortranarray(a.numpy()), a.numpy().astype(">f4"), a.flip(2).numpy()[:, :, ::-1]):
        found = function(array)
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, expected)
    frozen = a.numpy().copy()
    frozen.flags.writeable = False
    torch.testing.assert_close(function(frozen), expected)
    assert not function(a.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_of_none(name: str) -> None:
    assert FUNCTIONS[name](torch.zeros(0, 4)).shape == (0,)


def test_extreme_values() -> None:
    tiny, huge = torch.full((1, 4), 1e-300, dtype=torch.float64), torch.full((1, 4), 1e300, dtype=torch.float64)
    for a in (tiny, huge):
        assert entropy(a).item() == pytest.approx(math.log(4))
        assert gini(a).item() == pytest.approx(0, abs=1e-12)


def test_table_and_summary() -> None:
    found = conciseness(torch.tensor([[1.0, 1.0], [0.0, 2.0], [math.nan, 0.0]]))
    rows = found.table()
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert rows[1] == {"sample": 1, "size": 1.0, "sparsity": 0.5, "entropy": 0.0, "gini": 0.5}
    assert math.isnan(rows[2]["gini"])
    assert found.summary()["size"] == 1.5
    with pytest.raises(AttributeError):
        found.size = found.gini  # type: ignore[misc]


def test_errors() -> None:
    a = torch.ones(2, 3)
    with pytest.raises(TypeError, match="attributions: expected a torch"):
        gini([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.int64"):
        size(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="array of numbers"):
        size(np.array([["a"]]))
    with pytest.raises(TypeError, match=r"attributions: expected a dense tensor, got torch\.sparse_coo"):
        gini(a.to_sparse())
    for bad in (torch.ones(3), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="attributions: expected shape"):
            entropy(bad)
    with pytest.raises(ValueError, match="threshold: expected"):
        size(a, -1.0)
    with pytest.raises(ValueError, match="eps: expected"):
        effective_complexity(a, -1e-3)
    with pytest.raises(ValueError, match="base: expected"):
        entropy(a, base=0)
    with pytest.raises(ValueError, match="base: expected a number other than 1"):
        entropy(a, base=1)


@pytest.mark.parametrize("value", [1e308, 1e306, 1e-310, 5e-324])
def test_the_ends_of_float64(value: float) -> None:
    """Beside an ordinary map, which keeps its bits."""
    ordinary = torch.tensor([1.0, 3.0, 0.0, 2.5], dtype=torch.float64)
    a = torch.stack([torch.full((4,), value, dtype=torch.float64), ordinary, ordinary * 0])
    found = conciseness(a)
    assert found.size.tolist() == [4, 3, 0]
    assert found.gini[0].item() == pytest.approx(0, abs=1e-15)
    assert found.entropy[0].item() == pytest.approx(math.log(4), rel=1e-15)
    assert torch.equal(entropy(a), found.entropy)
    alone = conciseness(a[1:])
    assert torch.equal(alone.gini, found.gini[1:])
    assert torch.equal(alone.entropy, found.entropy[1:])
