"""Localisation against masks: hand-computed maps, and loops over samples and places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from xai_fast.metrics.localization import pointing_game, relevance_mass, relevance_rank

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = [pointing_game, relevance_mass, relevance_rank]


def slow_pointing(a: np.ndarray, mask: np.ndarray, tolerance: float, distance: str) -> bool:
    peak = np.array(np.unravel_index(a.argmax(), a.shape))
    apart = [np.abs(np.array(p) - peak) for p in np.argwhere(mask)]
    length = (lambda v: v.max()) if distance == "chebyshev" else np.linalg.norm
    return any(length(v) <= tolerance for v in apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", ["euclidean", "chebyshev"])
@pytest.mark.parametrize("tolerance", [0, 1, math.sqrt(2), 2.5, 100])
@pytest.mark.parametrize("shape", [(40, 7), (40, 5, 6), (20, 3, 4, 3)])
def test_pointing_game(dtype: torch.dtype, distance: str, tolerance: float, shape: tuple[int, ...]) -> None:
    a, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.08
    found = pointing_game(a, mask, tolerance, distance=distance)
    assert found.dtype == torch.bool
    expected = [slow_pointing(x.double().numpy(), m.numpy(), tolerance, distance) for x, m in zip(a, mask, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_and_rank(dtype: torch.dtype) -> None:
    a, mask = torch.randn(6, 5, 4).to(dtype), torch.rand(6, 5, 4) < 0.3
    wide, inside = a.double().flatten(1).numpy(), mask.flatten(1).numpy()
    for b in range(6):
        top = set(np.argsort(-wide[b], kind="stable")[: inside[b].sum()].tolist())
        rank = len(top & set(np.flatnonzero(inside[b]).tolist())) / inside[b].sum()
        assert relevance_rank(a, mask)[b].item() == pytest.approx(rank)
        for positive in (True, False):
            relevance = wide[b].clip(0) if positive else np.abs(wide[b])
            mass = relevance[inside[b]].sum() / relevance.sum()
            assert relevance_mass(a, mask, positive)[b].item() == pytest.approx(mass, rel=1e-6)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert relevance_mass(a, mask).dtype == relevance_rank(a, mask).dtype == wanted


def test_hand_computed() -> None:
    a = torch.tensor([[[5.0, -9.0], [3.0, 2.0]]])
    mask = torch.tensor([[[0, 1], [1, 0]]])
    assert not pointing_game(a, mask).item()
    assert pointing_game(a, mask, 1).item()
    assert relevance_mass(a, mask).item() == pytest.approx(0.3)
    assert relevance_mass(a, mask, positive=False).item() == pytest.approx(12 / 19)
    assert relevance_rank(a, mask).item() == 0.5


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shapes_of_masks(function: object) -> None:
    measure = function
    assert callable(measure)
    a, mask = torch.randn(4, 3, 5, 6), torch.rand(4, 5, 6) < 0.3
    expected = measure(a.sum(1), mask)
    for given in (mask, mask[:, None], mask.long(), mask.float(), mask.numpy(), mask.to(torch.uint8).numpy()):
        torch.testing.assert_close(measure(a, given), expected)
    torch.testing.assert_close(measure(a.sum(1, keepdim=True), mask), expected)
    torch.testing.assert_close(measure(a.sum(1), mask[:, None]), expected)
    torch.testing.assert_close(measure(a, mask[:1]), measure(a, mask[:1].expand(4, -1, -1)))
    torch.testing.assert_close(measure(a, mask[:1, None]), measure(a, mask[:1].expand(4, -1, -1)))
    torch.testing.assert_close(measure(a.numpy(), mask), expected)
    torch.testing.assert_close(measure(a[:1], mask[:1]), expected[:1])
    full = mask[:, None].expand_as(a)
    torch.testing.assert_close(measure(a, full), measure(a.flatten(1), full.flatten(1)))
    strided = a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(measure(strided, mask), expected)
    assert measure(a[:0], mask[:0]).shape == (0,)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_stay_as_they_are(function: object) -> None:
    assert callable(function)
    a, mask = torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4) < 0.4
    before = a.clone(), mask.clone()
    function(a, mask)
    assert a.equal(before[0])
    assert mask.equal(before[1])
    assert not function(a.requires_grad_(), mask).requires_grad


def row(*values: float) -> Tensor:
    return torch.tensor([list(values)])


def test_documented_values() -> None:
    none, full = row(0, 0, 0), row(1, 1, 1)
    a = row(1.0, 2.0, -3.0)
    assert not pointing_game(a, none, 100).item()
    assert relevance_mass(a, none).isnan().all()
    assert relevance_rank(a, none).isnan().all()
    assert pointing_game(a, full).item()
    assert relevance_mass(a, full).item() == relevance_rank(a, full).item() == 1
    # constant maps point at the first place
    for constant in (row(0.0, 0.0, 0.0), row(2.0, 2.0, 2.0)):
        assert pointing_game(constant, row(1, 0, 0)).item()
        assert not pointing_game(constant, row(0, 1, 1)).item()
        assert relevance_rank(constant, row(0, 1, 1)).item() == 0.5
    assert relevance_mass(row(0.0, 0.0, 0.0), full, positive=False).isnan().all()
    assert relevance_mass(row(-1.0, -2.0, -3.0), full).isnan().all()
    assert relevance_mass(row(-1.0, -2.0, -1.0), row(0, 1, 0), positive=False).item() == 0.5
    assert pointing_game(row(-3.0, -1.0, -2.0), row(0, 1, 0)).item()
    assert pointing_game(row(5.0), row(1)).item()


def test_nan() -> None:
    a, mask = row(1.0, math.nan, 2.0), row(0, 1, 1)
    assert not pointing_game(a, mask, 5).item()
    assert relevance_mass(a, mask).isnan().all()
    assert relevance_rank(a, mask).isnan().all()
    # an infinite value outside of the mask must not pass as 0
    assert relevance_mass(row(1.0, math.inf, 2.0), row(1, 0, 0)).isnan().all()


def test_channels_are_added_in_float64() -> None:
    a = torch.tensor([[[2.0**24, 1.0]], [[1.0, 0.0]], [[-(2.0**24), 0.0]]]).transpose(0, 1)
    assert relevance_mass(a, row(1, 0)).item() == 0.5


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors(function: object) -> None:
    assert callable(function)
    a, mask = torch.randn(2, 3, 4, 5), torch.ones(2, 4, 5)
    with pytest.raises(TypeError, match="attributions: expected a torch"):
        function([1.0], mask)
    with pytest.raises(TypeError, match="mask: expected a torch"):
        function(a, [1])
    with pytest.raises(ValueError, match="only 0 and 1"):
        function(a, mask * 0.5)
    with pytest.raises(ValueError, match="only 0 and 1"):
        function(a, mask * math.nan)
    for wrong in (torch.ones(2, 5, 4), torch.ones(2, 2, 4, 5), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="mask: expected the shape of the maps"):
            function(a, wrong)
    for wrong in (torch.ones(3, 4, 5), torch.ones(5)):
        with pytest.raises(ValueError, match="mask: expected 2 masks or 1"):
            function(a, wrong)


def test_pointing_errors() -> None:
    a = torch.randn(2, 4)
    with pytest.raises(ValueError, match="tolerance"):
        pointing_game(a, a > 0, -1)
    with pytest.raises(ValueError, match="distance: expected one of"):
        pointing_game(a, a > 0, distance="l7")


@pytest.mark.parametrize("value", [1e308, 5e-324])
def test_shares_at_the_ends_of_float64(value: float) -> None:
    a = torch.full((1, 2), value, dtype=torch.float64)
    assert relevance_mass(a, row(1, 0)).item() == 0.5
    assert relevance_mass(-a, row(1, 0), positive=False).item() == 0.5
