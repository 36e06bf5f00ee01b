"""Similarity of maps against scipy, hand values and a loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from xai_fast.metrics.similarity import (
    average_ranks,
    centre_shift,
    cosine_similarity,
    mass_centre,
    rank_correlation,
    top_k_intersection,
)

PAIRS: tuple[Callable[..., Tensor], ...] = (
    rank_correlation,
    cosine_similarity,
    lambda a, b: top_k_intersection(a, b, 0.25),
    lambda a, b: centre_shift(a, b),
)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    rows = zip(a.flatten(1).double().numpy(), b.flatten(1).double().numpy(), strict=True)
    return torch.tensor([stats.spearmanr(x, y).statistic for x, y in rows], dtype=torch.float64)


@pytest.mark.parametrize("levels", [2, 3, 10, 10**6])
@pytest.mark.parametrize("shape", [(5, 2), (7, 40), (3, 2, 6, 5), (1, 1000)])
def test_ranks_and_correlation_are_those_of_scipy(levels: int, shape: tuple[int, ...]) -> None:
    a = torch.randint(-levels, levels, shape).double()
    b = torch.randint(-levels, levels, shape).double() + 0.5 * a
    expected = torch.from_numpy(stats.rankdata(a.flatten(1).numpy(), axis=1))
    assert average_ranks(a.flatten(1)).equal(expected)
    a[:, ..., 0] += 0.5  # no constant maps
    b[:, ..., -1] -= 0.25
    torch.testing.assert_close(rank_correlation(a, b), spearman(a, b), rtol=0, atol=1e-14)


def test_ranks_by_hand() -> None:
    x = torch.tensor([[0.0, -0.0, 5.0, math.inf, 5.0, -math.inf], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert average_ranks(x).tolist() == [[2.5, 2.5, 4.5, 6.0, 4.5, 1.0], [3.5] * 6]
    assert average_ranks(torch.ones(2, 1)).tolist() == [[1.0], [1.0]]
    lost = average_ranks(torch.tensor([[1.0, math.nan], [1.0, 2.0]]))
    assert lost[0].isnan().all()
    assert lost[1].tolist() == [1.0, 2.0]
    assert average_ranks(torch.zeros(0, 3)).shape == (0, 3)
    assert average_ranks(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)).dtype == torch.float64


def test_rank_correlation_extremes() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    b = torch.tensor([[2.0, 4.0, 9.0], [3.0, 2.0, -1.0], [7.0, 7.0, 7.0], [1.0, 2.0, 3.0]])
    rho = rank_correlation(a, b)
    assert rho[:2].tolist() == [1.0, -1.0]
    assert rho[2:].isnan().all()
    assert rank_correlation(torch.ones(1, 1), torch.ones(1, 1)).isnan().all()


def test_top_k_by_hand() -> None:
    a = torch.tensor([[9.0, -8.0, 7.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[-9.0, 0.0, 2.0, 8.0, 1.0], [0.0, 2.0, 0.0, 2.0, 0.0]])
    assert top_k_intersection(a, b, 1).tolist() == [1.0, 0.0]
    assert top_k_intersection(a, b, 2).tolist() == [0.5, 0.5]
    torch.testing.assert_close(top_k_intersection(a, b, 3), torch.tensor([2 / 3, 2 / 3]))
    assert top_k_intersection(a, b, 5).tolist() == top_k_intersection(a, b, 1.0).tolist() == [1.0, 1.0]
    assert top_k_intersection(a, b, 0.4).equal(top_k_intersection(a, b, 2))
    assert top_k_intersection(a, b, 0.001).equal(top_k_intersection(a, b, 1))
    b[0, 0] = math.nan
    assert top_k_intersection(a, b, 2).isnan().tolist() == [True, False]


def test_top_k_breaks_ties_by_place() -> None:
    zeros = torch.zeros(1, 4096)
    for k in (1, 7, 1000):
        first = torch.zeros(1, 4096)
        first[0, :k] = 1.0
        assert top_k_intersection(zeros, first, k).item() == 1.0
        assert top_k_intersection(zeros, first.flip(1), k).item() == 0.0


def test_cosine() -> None:
    a, b = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    expected = torch.nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1)).float()
    torch.testing.assert_close(cosine_similarity(a, b), expected)
    assert cosine_similarity(a, a).tolist() == [1.0] * 6
    assert cosine_similarity(a, -2 * a).tolist() == [-1.0] * 6
    assert cosine_similarity(a, torch.zeros_like(a)).isnan().all()
    huge, tiny = a.double() * 1e200, b.double() * 1e-200
    torch.testing.assert_close(cosine_similarity(huge, tiny), cosine_similarity(a.double(), b.double()))


def test_centres_by_hand() -> None:
    a = torch.zeros(3, 2, 4, 6)
    a[0, :, 1, 2] = torch.tensor([-3.0, 3.0])  # magnitudes: signs do not cancel
    a[1, 0, 0, 0], a[1, 1, 3, 4] = 1.0, -1.0  # channels are summed
    assert mass_centre(a)[:2].tolist() == [[1.0, 2.0], [1.5, 2.0]]
    assert mass_centre(a)[2].isnan().all()
    b = torch.zeros_like(a)
    b[:, 1, 3, 5] = 0.5
    torch.testing.assert_close(centre_shift(a, b)[:2], torch.tensor([math.hypot(2, 3), math.hypot(1.5, 3)]))
    assert centre_shift(a, b)[2].isnan()
    relative = centre_shift(a, b, normalize=True)[:2]
    torch.testing.assert_close(relative, torch.tensor([math.hypot(2, 3), math.hypot(1.5, 3)]) / math.hypot(4, 6))
    assert centre_shift(a[:2], a[:2]).tolist() == [0.0, 0.0]
    assert mass_centre(torch.ones(1, 4, 7)).tolist() == [[1.5, 3.0]]
    assert mass_centre(torch.ones(2, 1, 1)).tolist() == [[0.0, 0.0]] * 2


def test_centre_is_not_cut_to_whole_pixels_and_differentiable() -> None:
    a = (torch.rand(2, 3, 5, dtype=torch.float64) + 0.1).requires_grad_()
    rows = np.einsum("bhw,h->b", a.detach().numpy(), np.arange(3)) / a.detach().numpy().sum((1, 2))
    torch.testing.assert_close(mass_centre(a)[:, 0].detach(), torch.from_numpy(rows))
    assert torch.autograd.gradcheck(mass_centre, a)


@pytest.mark.parametrize("compare", PAIRS)
def test_dtypes_batches_and_strides(compare: Callable[..., Tensor]) -> None:
    a, b = torch.randn(5, 2, 6, 4), torch.randn(5, 2, 6, 4)
    for dtype, result in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        x, y = a.to(dtype), b.to(dtype)
        out = compare(x, y)
        assert out.dtype == result
        assert out.shape == (5,)
        torch.testing.assert_close(out.double(), compare(x.double(), y.double()), rtol=1e-6, atol=1e-7)
    before = a.clone()
    whole = compare(a, b)
    torch.testing.assert_close(torch.cat([compare(x[None], y[None]) for x, y in zip(a, b, strict=True)]), whole)
    strided = compare(a.transpose(1, 2).contiguous().transpose(1, 2), b.repeat(1, 1, 2, 2)[:, :, :6, :4])
    torch.testing.assert_close(strided, whole)
    assert compare(a[:0], b[:0]).shape == (0,)
    assert a.equal(before)


@pytest.mark.parametrize("compare", PAIRS)
@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (torch.ones(2, 3, 3), torch.ones(2, 3, 4), ValueError),
        (torch.ones(2, 3, 3), torch.ones(2, 3, 3).double(), TypeError),
        (torch.ones(2, 3, 3), [1.0], TypeError),
        (torch.ones(2, 3, 3).long(), torch.ones(2, 3, 3).long(), TypeError),
        (torch.ones(2, 3, 0), torch.ones(2, 3, 0), ValueError),
        (torch.ones(2), torch.ones(2), ValueError),
    ],
)
def test_errors(compare: Callable[..., Tensor], a: Any, b: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^[ab]: expected .*, got .*$"):
        compare(a, b)


def test_more_errors() -> None:
    maps = torch.ones(2, 10)
    for k in (0, 11, 0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"^k: expected .*, got"):
            top_k_intersection(maps, maps, k)
    for k in ("3", True, None):
        with pytest.raises(TypeError, match=r"^k: expected .*, got"):
            top_k_intersection(maps, maps, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^a: expected maps \(B, ..., H, W\)"):
        centre_shift(maps, maps)
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, n\)"):
        average_ranks(torch.ones(3))
