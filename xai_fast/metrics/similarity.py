"""How alike two batches of maps are: shared top features, ranks, angle, centres of mass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from ..ops._checks import as_number, check_count, check_float_tensor, check_like, shape_of

__all__ = [
    "average_ranks",
    "centre_shift",
    "cosine_similarity",
    "mass_centre",
    "rank_correlation",
    "top_k_intersection",
]


def average_ranks(x: Tensor) -> Tensor:
    """The rank of every value in its row, from 1; equal values share the mean of their ranks.

    Parameters
    ----------
    x : Tensor, shape (B, n)

    Returns
    -------
    Tensor of float64, shape (B, n)
        A row with a NaN is NaN.

    Raises
    ------
    TypeError
        x is not a floating tensor.
    ValueError
        x does not have two dimensions or has no column.

    Notes
    -----
    One sort of all rows; a run of equal values that fills the sorted places i to j has rank (i + j) / 2.

    Examples
    --------
    >>> import torch
    >>> average_ranks(torch.tensor([[0.3, 0.1, 0.3, 0.9]]))
    tensor([[2.5000, 1.0000, 2.5000, 4.0000]], dtype=torch.float64)
    """
    check_float_tensor(x, "x")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected shape (B, n) with n of at least 1, got {shape_of(x)}")
    values, order = x.detach().sort(dim=1)
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    first = torch.where(starts, places, 0).cummax(dim=1).values
    last = torch.where(ends, places, len(places)).flip(1).cummin(dim=1).values.flip(1)
    ranks = torch.empty_like(values, dtype=torch.float64).scatter_(1, order, (first + last).double() / 2)
    return ranks.masked_fill_(x.isnan().any(dim=1, keepdim=True), math.nan)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two batches of maps, per sample; ties have average ranks.

    Parameters
    ----------
    a, b : Tensor, shape (B, ...)
        Maps, compared with their signs; pass ``a.abs(), b.abs()`` to compare strengths.

    Returns
    -------
    Tensor, shape (B,)
        From -1 to 1. NaN where a map is constant (so also for a single feature) or holds a NaN. float64 for float64 maps,
        float32 for shorter types; computed in float64.

    Raises
    ------
    TypeError, ValueError
        The maps are not floating tensors of one shape, dtype and device with at least one feature.

    Notes
    -----
    The Pearson correlation of the ranks (Spearman 1904); with ties the formula with squared differences is wrong.

    Examples
    --------
    >>> import torch
    >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 8.0, 4.0]]))
    tensor([0.5000])
    """
    flat_a, flat_b = _flat(a, b)
    middle = (flat_a.shape[1] + 1) / 2
    x, y = average_ranks(flat_a) - middle, average_ranks(flat_b) - middle
    # A constant map has a variance of exactly 0, as its ranks are the middle: 0 / 0 is the NaN promised.
    correlation = (x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt()
    return correlation.clamp(-1, 1).to(accumulate_dtype(a.dtype))


def top_k_intersection(a: Tensor, b: Tensor, k: int | float) -> Tensor:
    """The share of the k features of largest magnitude that two maps have in common, per sample.

    Parameters
    ----------
    a, b : Tensor, shape (B, ...)
        Maps of n features.
    k : int or float
        How many features, from 1 to n; a float is a share of n above 0 and up to 1, rounded, at least one feature.

    Returns
    -------
    Tensor, shape (B,)
        From 0 to 1; NaN where a map holds a NaN. Of equal magnitudes the first in memory order counts as larger, so that
        a constant map has the first k features. float64 for float64 maps, else float32.

    Raises
    ------
    TypeError, ValueError
        The maps are not floating tensors of one shape, dtype and device with at least one feature; k is out of range.

    Notes
    -----
    |top_k(|a|) and top_k(|b|)| / k: Ghorbani, Abid & Zou 2017 (arXiv 1710.10547), section 2.

    Examples
    --------
    >>> import torch
    >>> top_k_intersection(torch.tensor([[4.0, -3.0, 1.0, 0.0]]), torch.tensor([[4.0, 0.0, 1.0, 2.0]]), 2)
    tensor([0.5000])
    """
    flat_a, flat_b = _flat(a, b)
    count = feature_count(k, flat_a.shape[1])
    common = (top_features(flat_a, count) & top_features(flat_b, count)).sum(1).double() / count
    lost = flat_a.isnan().any(1) | flat_b.isnan().any(1)
    return common.masked_fill(lost, math.nan).to(accumulate_dtype(a.dtype))


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between two maps, per sample.

    Parameters
    ----------
    a, b : Tensor, shape (B, ...)

    Returns
    -------
    Tensor, shape (B,)
        From -1 to 1. NaN where a map is zero, which has no direction. float64 for float64 maps, float32 for shorter types;
        computed in float64.

    Raises
    ------
    TypeError, ValueError
        The maps are not floating tensors of one shape, dtype and device with at least one feature.

    Notes
    -----
    <a, b> / (||a|| ||b||).

    Examples
    --------
    >>> import torch
    >>> cosine_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    tensor([0.7071, 1.0000])
    """
    # In units of the largest value squares of extreme float64 values neither overflow nor vanish.
    x, y = (m.double() / m.double().abs().amax(1, keepdim=True) for m in _flat(a, b))
    cosine = (x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt()
    return cosine.clamp(-1, 1).to(accumulate_dtype(a.dtype))


def mass_centre(a: Tensor) -> Tensor:
    """The centre of mass of the magnitudes of image maps, per sample.

    Parameters
    ----------
    a : Tensor, shape (B, ..., H, W)
        |a| is summed over the dimensions between the first and the last two.

    Returns
    -------
    Tensor, shape (B, 2)
        Row and column in pixels from 0, not rounded; NaN for a zero map. float64 for float64 maps, float32 for shorter
        types; computed in float64. Differentiable.

    Raises
    ------
    TypeError, ValueError
        a is not a floating tensor of three or more dimensions with at least one pixel.

    Notes
    -----
    sum_p p |a_p| / sum_p |a_p| over pixels p: Ghorbani, Abid & Zou 2017 (arXiv 1710.10547), section 3.

    Examples
    --------
    >>> import torch
    >>> mass_centre(torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, -3.0]]]))
    tensor([[1.0000, 1.5000]])
    """
    _check_image_maps(a, "a")
    return exact_centre(a).to(accumulate_dtype(a.dtype))


def centre_shift(a: Tensor, b: Tensor, *, normalize: bool = False) -> Tensor:
    """How far apart the centres of mass of two image maps are, per sample.

    Parameters
    ----------
    a, b : Tensor, shape (B, ..., H, W)
    normalize : bool
        Divide by the diagonal sqrt(H^2 + W^2).

    Returns
    -------
    Tensor, shape (B,)
        Euclidean distance in pixels, or in diagonals; NaN where a map is zero. float64 for float64 maps, else float32.

    Raises
    ------
    TypeError, ValueError
        The maps are not floating tensors of one shape, dtype and device, of three or more dimensions.

    Notes
    -----
    The centres of :func:`mass_centre`: Ghorbani, Abid & Zou 2017 (arXiv 1710.10547), section 2.

    Examples
    --------
    >>> import torch
    >>> a, b = torch.zeros(2, 1, 5, 4).unbind()
    >>> a[0, 0, 0], b[0, 4, 3] = 1.0, 2.0
    >>> centre_shift(a, b)
    tensor([5.])
    """
    _check_image_maps(a, "a")
    check_like(b, "b", shape_of(a), a)
    distance = (exact_centre(a) - exact_centre(b)).norm(dim=1)
    if normalize:
        distance = distance / math.hypot(*a.shape[-2:])
    return distance.to(accumulate_dtype(a.dtype))


def exact_centre(a: Tensor) -> Tensor:
    """Centres (B, 2) in float64."""
    mass = a.double().abs().flatten(1, -3).sum(1) if a.ndim > 3 else a.double().abs()
    axes = [torch.arange(n, dtype=torch.float64, device=a.device) for n in mass.shape[1:]]
    centre = torch.stack((mass.sum(2) @ axes[0], mass.sum(1) @ axes[1]), dim=1)
    return centre / mass.sum((1, 2)).unsqueeze(1)


def feature_count(k: Any, features: int) -> int:
    """k as a number of features."""
    k = as_number(k)
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ValueError(f"k: expected a share above 0 and up to 1, or a whole number, got {k!r}")
        return max(1, round(k * features))
    return check_count(k, "k", 1, features)


def top_features(flat: Tensor, count: int) -> Tensor:
    """Which features (B, n) are among the `count` of largest magnitude; of equal ones the first."""
    # topk leaves open which of equal values it takes.
    order = flat.detach().abs().argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)


def _check_image_maps(x: Any, name: str) -> None:
    check_float_tensor(x, name)
    if x.ndim < 3 or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected maps (B, ..., H, W) with at least one pixel, got {shape_of(x)}")


def _flat(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two batches of maps as (B, n)."""
    check_float_tensor(a, "a")
    if a.ndim < 2 or 0 in a.shape[1:]:
        raise ValueError(f"a: expected maps (B, ...) with at least one feature, got {shape_of(a)}")
    check_like(b, "b", shape_of(a), a)
    return a.flatten(1), b.flatten(1)
