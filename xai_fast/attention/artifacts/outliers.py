"""Which tokens have outlying norms, in which blocks, and at which positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..._dtypes import accumulate_dtype
from ...ops import _checks as check
from .norms import TokenNorms

__all__ = ["OutlierLayers", "Outliers", "find_outliers", "outlier_layers", "outlier_positions"]

METHODS = ("mad", "absolute", "quantile")
SCOPES = ("sample", "layer", "all")

# Of a normal distribution, the standard deviation over the median absolute deviation.
NORMAL_SPREAD = 1.4826
# Places for which a selection is faster than a sort.
MOST_SELECTED = 8


@dataclass(frozen=True)
class Outliers:
    """Tokens with outlying norms.

    Attributes
    ----------
    mask : Tensor of bool, shaped like the norms
        False at ignored tokens.
    threshold : Tensor
        What a norm had to exceed: one per sample, per layer, or a scalar, as the scope says.
    share : float
        Part of the tokens, without ignored ones, that are outliers.

    Examples
    --------
    >>> import torch
    >>> Outliers(torch.tensor([[False, True]]), torch.tensor([2.0]), 0.5).share
    0.5
    """

    mask: Tensor
    threshold: Tensor
    share: float


@dataclass(frozen=True)
class OutlierLayers:
    """Where in a model the outliers are.

    Attributes
    ----------
    share : Tensor of float64, shape (L,)
        Part of all tokens that are outliers after each block.
    peak : int
        The block with the largest share, the first of several.
    onset : int or None
        The block in which they appear: the first of the run of blocks up to the peak whose share is at least a given part
        of the peak's. None without outliers.

    Examples
    --------
    >>> import torch
    >>> OutlierLayers(torch.zeros(2, dtype=torch.float64), 0, None).onset is None
    True
    """

    share: Tensor
    peak: int
    onset: int | None


def find_outliers(
    norms: Tensor | np.ndarray | TokenNorms,
    method: Literal["mad", "absolute", "quantile"] = "mad",
    *,
    threshold: float | None = None,
    k: float = 5.0,
    quantile: float = 0.98,
    scope: Literal["sample", "layer", "all"] = "sample",
    ignore_tokens: int | Iterable[int] | Tensor = (),
) -> Outliers:
    """Tokens whose norm exceeds a threshold.

    .. math:: \\text{mad: } n > m + k \\cdot 1.4826 \\cdot \\mathrm{median} |n - m|, \\qquad m = \\mathrm{median}(n)

    Parameters
    ----------
    norms : Tensor or ndarray, shape (L, B, T), (B, T) or (T,); or TokenNorms
        From :func:`token_norms`.
    method : {"mad", "absolute", "quantile"}
        Median plus k times the robust spread; a given `threshold`; or a quantile of the norms, which by its nature calls the
        same share of tokens outliers in every model.
    threshold : float
        For "absolute". It depends on model and block: Darcet et al. use 150 for DINOv2-g.
    k : float
        For "mad": of normally distributed norms, 5 calls 3e-7 outliers. Norms of real tokens have longer tails, so look at
        how far the outliers lie from the median before believing in two kinds of tokens.
    quantile : float in [0, 1]
        For "quantile", with linear interpolation; 0.98 leaves the 2 % that Darcet et al. find.
    scope : {"sample", "layer", "all"}
        Over what median and quantile are taken: the tokens of one sample in one layer, all samples of a layer, everything.
        Norms grow from block to block, so "all" compares layers with each other. No part in "absolute".
    ignore_tokens : int, ints, or Tensor of bool that broadcasts to the norms
        Tokens that take no part, such as 0 for [CLS], ``range(5)`` with four registers, or padding.

    Returns
    -------
    Outliers
        The threshold has shape (L, B) or (B,) for "sample", (L,) or () for "layer", () for "all" and "absolute".

    Raises
    ------
    TypeError
        Norms that are no floating tensor; a wrong type of another argument.
    ValueError
        NaN norms; an unknown method or scope; "absolute" without a threshold; a token out of range; a number out of range.

    Notes
    -----
    The comparison is strict and on the upper side only. Medians of an even number are the mean of the middle two. Where more
    than half of the norms are equal the spread is 0: it is then taken as four rounding steps of the median, so that constant
    norms have no outliers and a token that stands out of them is one. Infinite norms are outliers unless half of the tokens
    have them. Tokens that are all ignored give a NaN threshold and no outliers.

    Source of the method: the modified z-score of Iglewicz & Hoaglin (1993), who cut at 3.5; of the absolute one: Darcet et
    al. (2024), "Vision Transformers Need Registers" (arXiv 2309.16588), section 2.1.

    Examples
    --------
    >>> import torch
    >>> found = find_outliers(torch.tensor([[1.0, 2.0, 3.0, 4.0, 50.0]]))
    >>> found.mask, found.threshold
    (tensor([[False, False, False, False,  True]]), tensor([10.4130]))
    """
    values = _as_norms(norms)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if threshold is not None and method != "absolute":
        raise ValueError(f"threshold: expected None with method {method!r}, it is for 'absolute', got {threshold!r}")
    ignored = _ignored(ignore_tokens, values)
    if bool((values.isnan() & ~ignored).any()):
        count = int((values.isnan() & ~ignored).sum())
        raise ValueError(f"norms: expected no NaN, got {count} (ignore_tokens leaves tokens out)")
    if method == "absolute":
        if threshold is None:
            raise ValueError("threshold: expected a number with method 'absolute', got None")
        limit = torch.tensor(check.check_number(threshold, "threshold"), dtype=values.dtype, device=values.device)
        above = values > limit
    else:
        rows = _rows(values.masked_fill(ignored, torch.nan), scope)
        limit = _mad_limit(rows, check.check_at_least_zero(k, "k")) if method == "mad" else _quantile(rows, _share(quantile))
        above = values > limit.view(limit.shape + (1,) * (values.dim() - limit.dim()))
    mask = above & ~ignored
    counted = int((~ignored).sum())
    return Outliers(mask, limit, int(mask.sum()) / counted if counted else 0.0)


def outlier_layers(outliers: Outliers | Tensor, *, fraction: float = 0.5) -> OutlierLayers:
    """How large a share of the tokens are outliers after each block, and in which block they appear.

    .. math:: s_l = \\mathrm{mean}_{b,t}\\, mask_{lbt}

    Parameters
    ----------
    outliers : Outliers, or Tensor of bool, shape (L, B, T)
    fraction : float in (0, 1]
        The onset is the first block from which on, up to the peak, the share stays at least this part of the peak's.

    Returns
    -------
    OutlierLayers

    Raises
    ------
    TypeError, ValueError
        No boolean (L, B, T) mask; a fraction out of range.

    Notes
    -----
    The share is of all tokens, ignored ones among them. Source of the figure: Darcet et al. (2024), "Vision Transformers
    Need Registers" (arXiv 2309.16588), figure 4.

    Examples
    --------
    >>> import torch
    >>> mask = torch.zeros(4, 1, 10, dtype=torch.bool)
    >>> mask[2:, 0, 3] = True
    >>> found = outlier_layers(mask)
    >>> found.onset, found.share.tolist()
    (2, [0.0, 0.0, 0.1, 0.1])
    """
    mask = as_mask(outliers)
    if mask.dim() != 3 or 0 in mask.shape:
        raise ValueError(f"outliers: expected a mask of shape (L, B, T), not empty, got {check.shape_of(mask)}")
    fraction = check.check_positive(fraction, "fraction")
    if fraction > 1:
        raise ValueError(f"fraction: expected a part of at most 1, got {fraction!r}")
    share = mask.double().mean((1, 2))
    values = share.tolist()
    peak = max(range(len(values)), key=values.__getitem__)
    if values[peak] == 0:
        return OutlierLayers(share, peak, None)
    onset = peak
    while onset > 0 and values[onset - 1] >= fraction * values[peak]:
        onset -= 1
    return OutlierLayers(share, peak, onset)


def outlier_positions(outliers: Outliers | Tensor) -> Tensor:
    """How often each position holds an outlier, over the samples of the batch: sinks sit at the same few positions.

    Parameters
    ----------
    outliers : Outliers, or Tensor of bool, shape (L, B, T) or (B, T)

    Returns
    -------
    Tensor of int64, shape (L, T) or (T,)

    Raises
    ------
    TypeError, ValueError
        No boolean mask of that shape.

    Examples
    --------
    >>> import torch
    >>> outlier_positions(torch.tensor([[True, False, True], [True, False, False]]))
    tensor([2, 0, 1])
    """
    mask = as_mask(outliers)
    if mask.dim() not in (2, 3):
        raise ValueError(f"outliers: expected a mask of shape (L, B, T) or (B, T), got {check.shape_of(mask)}")
    return mask.sum(-2)


def _as_norms(norms: Any) -> Tensor:
    """In float32 at least, (L, B, T), (B, T) or (T,)."""
    values = norms.norms if isinstance(norms, TokenNorms) else norms
    if isinstance(values, np.ndarray):
        values = check.from_array(values, "norms")
    check.check_float_tensor(values, "norms")
    if not 1 <= values.dim() <= 3:
        raise ValueError(f"norms: expected shape (L, B, T), (B, T) or (T,), got {check.shape_of(values)}")
    return values.detach().to(accumulate_dtype(values.dtype))


def as_mask(outliers: Any) -> Tensor:
    """The boolean mask of what a caller gave as outliers."""
    mask = outliers.mask if isinstance(outliers, Outliers) else outliers
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"outliers: expected Outliers or a boolean tensor, got {came}")
    return mask


def _ignored(ignore_tokens: Any, values: Tensor) -> Tensor:
    """A boolean mask shaped like the norms."""
    if isinstance(ignore_tokens, Tensor) and ignore_tokens.dtype == torch.bool:
        try:
            return ignore_tokens.to(values.device).expand(values.shape)
        except RuntimeError:
            shapes = f"{check.shape_of(values)}, got {check.shape_of(ignore_tokens)}"
            raise ValueError(f"ignore_tokens: expected a mask that broadcasts to {shapes}") from None
    entries = ignore_tokens.tolist() if isinstance(ignore_tokens, Tensor) else ignore_tokens
    mask = torch.zeros(values.shape[-1], dtype=torch.bool, device=values.device)
    tokens = len(mask)
    for token in entries if isinstance(entries, Iterable) else [entries]:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"ignore_tokens: expected indices or a boolean tensor, got an entry {token!r}")
        if not -tokens <= int(token) < tokens:
            raise ValueError(f"ignore_tokens: expected indices in [{-tokens}, {tokens}), got {int(token)}")
        mask[int(token)] = True
    return mask.expand(values.shape)


def _share(quantile: Any) -> float:
    value = check.check_number(quantile, "quantile")
    if not 0 <= value <= 1:
        raise ValueError(f"quantile: expected a share in [0, 1], got {quantile!r}")
    return value


def _rows(values: Tensor, scope: str) -> Tensor:
    """One row of norms for each threshold."""
    if scope == "sample":
        return values
    if scope == "all" or values.dim() < 3:
        return values.flatten()
    return values.flatten(1)


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Along the last dimension, NaN left out, interpolated linearly. torch.quantile refuses more than 2^24 entries."""
    if rows.shape[-1] == 0:
        return rows.new_full(rows.shape[:-1], torch.nan)
    place = (~rows.isnan()).sum(-1, keepdim=True).sub(1).clamp_min(0).double() * share
    low, high = place.floor().long(), place.ceil().long()
    ordered = _ordered(rows, torch.cat([low, high]).unique())
    below, above = ordered.gather(-1, low), ordered.gather(-1, high)
    # Between two infinities there is no difference to interpolate.
    between = torch.where(below == above, below, below + (above - below) * (place - low).to(rows.dtype))
    return between.squeeze(-1)


def _ordered(rows: Tensor, places: Tensor) -> Tensor:
    """Rows with those places as if sorted, NaN last. A selection on the CPU, where sorting takes as long as the norms."""
    if rows.device.type != "cpu" or len(places) > MOST_SELECTED:
        return rows.sort(-1).values
    return torch.from_numpy(np.partition(rows.numpy(), places.numpy(), -1))


def _mad_limit(rows: Tensor, k: float) -> Tensor:
    median = _quantile(rows, 0.5)
    spread = NORMAL_SPREAD * _quantile((rows - median.unsqueeze(-1)).abs(), 0.5)
    rounding = 4 * torch.finfo(rows.dtype).eps * median.abs()
    return median + k * torch.maximum(spread, rounding)
