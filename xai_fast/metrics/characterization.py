"""The characterization score: fid+ and fid- as one number, and as a curve with its area."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops import _checks as check

__all__ = ["characterization_score", "fidelity_curve_auc"]

T = TypeVar("T", float, Tensor)

# How far rounding may carry a fidelity out of its range.
ROUNDING = 1e-6


def characterization_score(pos_fidelity: T, neg_fidelity: T, pos_weight: float = 1.0, neg_weight: float = 1.0) -> T:
    """Weighted harmonic mean of fid+ and 1 - fid-: high where an explanation is both necessary and sufficient.

    .. math:: charact = \\frac{w_+ + w_-}{w_+ / fid_+ + w_- / (1 - fid_-)}
              = \\frac{(w_+ + w_-)\\, fid_+ (1 - fid_-)}{w_+ (1 - fid_-) + w_- fid_+}

    Computed in the second form, which divides by nothing that may be 0 alone: 0 where fid+ = 0 or fid- = 1.

    Parameters
    ----------
    pos_fidelity, neg_fidelity : float or Tensor
        fid+ and fid-, from 0 to 1. Tensors broadcast.
    pos_weight, neg_weight : float
        Above 0. Only their ratio counts.

    Returns
    -------
    float or Tensor
        As the fidelities: a Tensor in their dtype if one of them is a Tensor.

    Raises
    ------
    TypeError, ValueError
        Not numbers, a weight that is not above 0, a fidelity outside 0 to 1 (NaN stays NaN), shapes that do not broadcast.

    Notes
    -----
    Source: Amara et al. (2022), GraphFramEx (arXiv 2206.09677).

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.metrics.characterization_score(0.6, 0.2, 0.2, 0.8)
    0.75
    >>> xf.metrics.characterization_score(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor([1., 0.])
    """
    pos_weight, neg_weight = check.check_positive(pos_weight, "pos_weight"), check.check_positive(neg_weight, "neg_weight")
    # Their ratio counts: in units of the larger one their sum cannot overflow.
    exponent = math.frexp(max(pos_weight, neg_weight))[1]
    pos_weight, neg_weight = math.ldexp(pos_weight, -exponent), math.ldexp(neg_weight, -exponent)
    plus, minus = _fidelity(pos_fidelity, "pos_fidelity"), _fidelity(neg_fidelity, "neg_fidelity")
    check.check_broadcasts(minus, "neg_fidelity", plus, "pos_fidelity")
    rest = 1 - minus
    top = (pos_weight + neg_weight) * plus * rest
    score = torch.where(top == 0, 0.0, top / (pos_weight * rest + neg_weight * plus))
    return _as_given(score, pos_fidelity, neg_fidelity)


def fidelity_curve_auc(pos_fidelity: Tensor, neg_fidelity: Tensor, x: Tensor) -> Tensor:
    """Area under the curve of fid+ / (1 - fid-) over x, for example over sparsity.

    .. math:: AUC = \\int \\frac{fid_+(x)}{1 - fid_-(x)} \\, dx \\quad \\text{by trapezoids}

    Parameters
    ----------
    pos_fidelity, neg_fidelity, x : Tensor, shape (K,)
        x rises; fidelities from 0 to 1, fid- below 1.

    Returns
    -------
    Tensor, 0-dimensional

    Raises
    ------
    ValueError
        Shapes that differ, fewer than two points, x that does not rise, fid- of 1.

    Notes
    -----
    The definition of PyTorch Geometric's function of the same name, which the authors of GraphFramEx proposed.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> plus, minus = torch.tensor([1.0, 1.0, 0.5, 1.0]), torch.tensor([0.0, 0.5, 0.5, 0.9])
    >>> round(float(xf.metrics.fidelity_curve_auc(plus, minus, torch.arange(4.0))), 4)
    8.5
    """
    plus, minus = _fidelity(pos_fidelity, "pos_fidelity"), _fidelity(neg_fidelity, "neg_fidelity")
    places = check.as_tensor(x, "x", torch.float64)
    if plus.dim() != 1 or len(plus) < 2 or plus.shape != minus.shape or plus.shape != places.shape:
        shapes = ", ".join(str(check.shape_of(v)) for v in (plus, minus, places))
        raise ValueError(
            f"x: expected pos_fidelity, neg_fidelity and x of one shape (K,) with K of at least 2, got {shapes}"
        )
    if not bool((places.diff() > 0).all()):
        raise ValueError("x: expected values that rise, got some that do not")
    if bool((minus == 1).any()):
        raise ValueError("neg_fidelity: expected values below 1, got a 1, where the curve has a pole")
    return _as_given(torch.trapezoid(plus / (1 - minus), places), pos_fidelity, neg_fidelity)


def _fidelity(value: Any, name: str) -> Tensor:
    wide = check.number_or_tensor(value, name).detach()
    if bool(((wide < -ROUNDING) | (wide > 1 + ROUNDING)).any()):
        raise ValueError(f"{name}: expected values from 0 to 1, got {float(wide.min()):g} to {float(wide.max()):g}")
    return wide.clamp(0, 1)


def _as_given(result: Tensor, *given: Any) -> Any:
    tensors = [g for g in given if isinstance(g, Tensor)]
    if not tensors:
        return float(result)
    dtype = tensors[0].dtype if tensors[0].is_floating_point() else torch.get_default_dtype()
    return result.to(dtype)
