"""Whether a map points at what a person would point at: the object that a mask marks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._scaling import power_of_two
from ..ops import _checks as check
from .conciseness import Maps, as_maps, result_dtype

__all__ = ["pointing_game", "relevance_mass", "relevance_rank"]

DISTANCES = ("euclidean", "chebyshev")


def pointing_game(attributions: Maps, mask: Maps, tolerance: float = 0, *, distance: str = "euclidean") -> Tensor:
    """Whether the largest value of a map lies in its mask, or close to it.

    .. math:: hit_b = \\bigl[\\, \\min_{p : mask_{b,p} = 1} d(p, \\arg\\max_q a_{b,q}) \\le tolerance \\,\\bigr]

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
        Floating, with signs: a large negative value is no maximum. Summed over the channels where the mask has none: maps
        (B, C, H, W) with a mask (B, H, W) or (B, 1, H, W).
    mask : Tensor or ndarray
        Boolean, or numbers 0 and 1. A first dimension of 1 is shared by the samples. All its other dimensions are places.
    tolerance : float
        In pixels, at least 0. Zhang et al. use 15 on their images.
    distance : {"euclidean", "chebyshev"}
        A disc of that radius around the maximum, or a square of side 2 tolerance + 1.

    Returns
    -------
    Tensor of bool, shape (B,)
        The first of several maxima in memory order counts, so that a constant map points at its first place. False for an
        empty mask, which nothing can hit, and for a map with a NaN: leave both out before taking the mean.

    Raises
    ------
    TypeError, ValueError
        Not floating maps, a mask of another shape or with other values than 0 and 1, a negative tolerance, an unknown
        distance.

    Notes
    -----
    Source: Zhang et al. (2018), "Top-down neural attention by excitation backprop" (arXiv 1608.00507), section 4.1; they
    average the hits over the images of a class, then over the classes.

    Examples
    --------
    >>> import torch
    >>> a = torch.tensor([[[0.1, 0.9, 0.0], [0.2, 0.0, 0.0]]])
    >>> mask = torch.tensor([[[1, 0, 0], [0, 0, 0]]])
    >>> pointing_game(a, mask), pointing_game(a, mask, tolerance=1)
    (tensor([False]), tensor([True]))
    """
    values, inside = _pair(attributions, mask)
    tolerance = check.check_at_least_zero(tolerance, "tolerance")
    if distance not in DISTANCES:
        raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")
    flat = values.flatten(1)
    peak = flat.argmax(1)
    if tolerance == 0:
        hit = inside.flatten(1).gather(1, peak[:, None])[:, 0]
    else:
        hit = (inside & _near(peak, inside.shape[1:], tolerance, distance)).flatten(1).any(1)
    return hit & ~flat.isnan().any(1)


def relevance_mass(attributions: Maps, mask: Maps, positive: bool = True) -> Tensor:
    """The share of the relevance of a map that lies in its mask.

    .. math:: mass_b = \\frac{\\sum_{p : mask_{b,p} = 1} R_{b,p}}{\\sum_p R_{b,p}}, \\qquad
              R = \\max(0, a) \\text{ or } |a|

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
        Floating; summed over the channels where the mask has none, as in :func:`pointing_game`.
    mask : Tensor or ndarray
        Boolean, or numbers 0 and 1. A first dimension of 1 is shared by the samples.
    positive : bool
        R is the positive part of the (summed) map; False: its magnitude. Signed relevance has no share, as it cancels.

    Returns
    -------
    Tensor, shape (B,)
        From 0 to 1. NaN for an empty mask, for a map without relevance to share (no positive value; with ``positive=False``
        a map of zeros) and for a map with an entry that is not finite. float64 for float64 maps, else float32; computed in
        float64.

    Raises
    ------
    TypeError, ValueError
        Not floating maps, a mask of another shape or with other values than 0 and 1.

    Notes
    -----
    Source: relevance mass accuracy of Arras, Osman & Samek (2022), "CLEVR-XAI" (arXiv 2003.07258), section 3; of their
    poolings of the channels these are "sum,pos" and "sum,abs". Give maps of one channel for another.

    Examples
    --------
    >>> import torch
    >>> relevance_mass(torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[True, False, False]]))
    tensor([0.7500])
    """
    values, inside = _pair(attributions, mask)
    relevance = (values.clamp_min(0) if positive else values.abs()).flatten(1)
    within = inside.flatten(1)
    # Sums of the largest numbers would overflow.
    relevance = relevance / power_of_two(relevance.amax(1, keepdim=True))
    share = torch.where(within, relevance, 0).sum(1) / relevance.sum(1)
    undefined = ~within.any(1) | ~values.flatten(1).isfinite().all(1)
    return share.masked_fill(undefined, math.nan).to(_dtype(attributions))


def relevance_rank(attributions: Maps, mask: Maps) -> Tensor:
    """The share of the K largest values of a map that lie in its mask of K places.

    .. math:: rank_b = \\frac{|\\{p_1, \\dots, p_K\\} \\cap mask_b|}{K}, \\qquad K = |mask_b|, \\qquad
              a_{b,p_1} \\ge a_{b,p_2} \\ge \\dots

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
        Floating, ranked with their signs; summed over the channels where the mask has none, as in :func:`pointing_game`.
    mask : Tensor or ndarray
        Boolean, or numbers 0 and 1. A first dimension of 1 is shared by the samples.

    Returns
    -------
    Tensor, shape (B,)
        From 0 to 1; 1 for a full mask. Of equal values the first in memory order ranks higher. NaN for an empty mask and for
        a map with a NaN. float64 for float64 maps, else float32.

    Raises
    ------
    TypeError, ValueError
        Not floating maps, a mask of another shape or with other values than 0 and 1.

    Notes
    -----
    Source: relevance rank accuracy of Arras, Osman & Samek (2022), "CLEVR-XAI" (arXiv 2003.07258), section 3.

    Examples
    --------
    >>> import torch
    >>> relevance_rank(torch.tensor([[0.9, 0.5, 0.7, 0.1]]), torch.tensor([[True, True, False, False]]))
    tensor([0.5000])
    """
    values, inside = _pair(attributions, mask)
    flat, within = values.flatten(1), inside.flatten(1)
    places = within.sum(1)
    found = ((ops.rank_features(flat) < places[:, None]) & within).sum(1)
    # 0 / 0 is the NaN of an empty mask.
    return (found.double() / places).masked_fill(flat.isnan().any(1), math.nan).to(_dtype(attributions))


def _dtype(attributions: Any) -> torch.dtype:
    return result_dtype(as_maps(attributions))


def _pair(attributions: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Maps in float64 and boolean masks of one shape (B, places...)."""
    maps = as_maps(attributions)
    inside = _as_mask(mask, maps)
    shape = (inside.shape[0], *maps.shape[1:])
    squeezed = (shape[0], *maps.shape[2:])
    if inside.shape == shape:
        values = maps.double()
    elif maps.dim() > 2 and tuple(inside.shape) in (squeezed, (shape[0], 1, *maps.shape[2:])):
        values, inside = maps.sum(1, dtype=torch.float64), inside.reshape(squeezed)
    elif tuple(inside.shape) == (shape[0], 1, *maps.shape[1:]):
        values, inside = maps.double(), inside[:, 0]
    else:
        raise ValueError(
            f"mask: expected the shape of the maps {check.shape_of(maps)}, or that without channels, "
            f"got {check.shape_of(inside)}"
        )
    return values, inside.expand_as(values)


def _as_mask(mask: Any, maps: Tensor) -> Tensor:
    if isinstance(mask, np.ndarray):
        mask = check.from_numpy(mask, "mask")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a torch.Tensor, got {type(mask).__name__}")
    check.check_same_device(mask, "mask", maps.device)
    if mask.dim() < 2 or mask.shape[0] not in (1, maps.shape[0]):
        raise ValueError(f"mask: expected {maps.shape[0]} masks or 1, got shape {check.shape_of(mask)}")
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask: expected only 0 and 1, got other values")
    return mask != 0


def _near(peak: Tensor, places: torch.Size, tolerance: float, distance: str) -> Tensor:
    """Which places (B, places...) lie within the tolerance of the flat index `peak` (B,)."""
    apart = []
    for axis, centre in enumerate(torch.unravel_index(peak, places)):
        along = torch.arange(places[axis], device=peak.device) - centre[:, None]
        apart.append(along.abs().double().view(-1, *(n if i == axis else 1 for i, n in enumerate(places))))
    if distance == "chebyshev":
        return torch.stack(torch.broadcast_tensors(*apart)).amax(0) <= tolerance
    return torch.stack(torch.broadcast_tensors(*(a * a for a in apart))).sum(0) <= tolerance * tolerance
