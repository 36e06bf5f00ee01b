"""Concept activation vectors: the direction in which activations of a concept differ from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._dtypes import SUPPORTED
from ..ops import _checks as check
from ._linear import METHODS
from ._pairs import Sets, draw_ranks, fit_pairs

__all__ = ["CAV", "check_fit_options", "fit_cav"]

DEFAULT_HOLDOUT = 0.2


@dataclass(frozen=True)
class CAV:
    """A concept activation vector.

    Attributes
    ----------
    vector : Tensor, shape (d,)
        Unit length, orthogonal to the decision boundary, pointing to the concept.
    accuracy : float
        Balanced accuracy (mean of the shares of both classes that are told right) on held-out examples; NaN where none
        were held out. Around 0.5 the vector means nothing.
    bias : float
        An activation x counts as the concept where ``vector @ x + bias > 0``.
    method : str
        How it was fitted.
    positive, negative : str
        Names of the concept and of what it was told from.

    Examples
    --------
    >>> cav = fit_cav(torch.tensor([[2.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    >>> cav.vector.round(decimals=3), round(cav.bias, 3)
    (tensor([1., 0.]), -1.0)
    """

    vector: Tensor
    accuracy: float
    bias: float = float("nan")
    method: str = ""
    positive: str = ""
    negative: str = ""


def fit_cav(
    positive: Any,
    negative: Any,
    *,
    method: str = "ridge",
    generator: torch.Generator | None = None,
    holdout: float = DEFAULT_HOLDOUT,
    l2: float | None = None,
) -> CAV:
    """The direction that tells activations of a concept from others.

    Parameters
    ----------
    positive, negative : Tensor or ndarray, shape (n, d)
        Activations of the concept's examples and of others; their numbers may differ.
    method : {"ridge", "lda", "logistic", "mean_difference"}
        - "ridge": least squares to targets +1 and -1.
        - "lda": linear discriminant analysis with shrunken covariance.
        - "logistic": logistic regression, by Newton steps.
        - "mean_difference": the difference of the two means.
    generator : torch.Generator, optional
        Draws which examples are held out together. The vector does not depend on it.
    holdout : float
        Share of each class that is held out at a time, up to 0.5: round(1 / holdout) folds. 0: none, accuracy NaN.
    l2 : float, optional
        Strength of the penalty, free of scale. "ridge": of l2 * (total variance) * ||v||^2 beside the mean loss, default
        0.01; "logistic": of half that, default 0.001. "lda": the shrinkage, 0 to 1; default that of Ledoit and Wolf.

    Returns
    -------
    CAV
        Its vector in the dtype and on the device of `positive`.

    Raises
    ------
    TypeError
        Activations that are no floating tensors.
    ValueError
        No examples in a class, other shapes or dtypes, NaN or inf, class means that are the same (constant features), an
        unknown method, `l2` beside "mean_difference".

    Notes
    -----
    Minimises sum_i w_i (y_i - v.x_i - b)^2 + lambda ||v||^2, or with the logistic loss, where w_i = 1 / (2 n_class): both
    classes weigh the same. b is not penalised. v is then divided by its length. Systems have the size min(n, d): for n < d
    v = sum_i a_i x_i, and only the Gram matrix of the examples is needed. Sums are taken in float64.

    Accuracy is that of stratified cross-validation: each example is told by a fit without its fold, and the vector returned
    is fitted on all of them. A class with one example leaves nothing to hold out.

    "lda" is scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=l2, priors=[0.5, 0.5])``.

    Source: Kim et al. (2018), Interpretability Beyond Feature Attribution: TCAV (arXiv 1711.11279), section 3.2; shrinkage:
    Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance matrices.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> direction = torch.zeros(500)
    >>> direction[3] = 1.0
    >>> positive = torch.randn(40, 500, generator=g) + 20 * direction
    >>> cav = fit_cav(positive, torch.randn(60, 500, generator=g), generator=g)
    >>> cav.accuracy, bool(cav.vector @ direction > 0.9)
    (1.0, True)
    """
    folds = check_fit_options(method, holdout, l2)
    sets = [_activations(positive, "positive"), _activations(negative, "negative")]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"negative: expected {sets[0].shape[1]} features, as positive, got {sets[1].shape[1]}")
    if sets[0].dtype != sets[1].dtype:
        raise TypeError(f"negative: expected dtype {sets[0].dtype}, as positive, got {sets[1].dtype}")
    check.check_same_device(sets[1], "negative", sets[0].device)
    data = Sets(sets)
    names = ["positive", "negative"]
    for name, finite in zip(names, data.finite, strict=True):
        if not finite:
            raise ValueError(f"{name}: expected finite activations, got NaN or inf")
    ranks = draw_ranks([len(x) for x in sets], generator)
    fits = fit_pairs(data, [(0, 1)], names, ranks, method=method, l2=l2, folds=folds, held_out=1)
    vector = fits.vectors(1)[0]
    bias = (fits.offset[0] / fits.norm[0] - vector.double() @ data.centre) * data.unit
    return CAV(vector, float(fits.accuracy[0]), float(bias), method, *names)


def check_fit_options(method: str, holdout: float, l2: float | None) -> int:
    """The number of folds; 0 for none."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if l2 is not None:
        if method == "mean_difference":
            raise ValueError(f"l2: expected None for method 'mean_difference', which has no penalty, got {l2!r}")
        if check.check_at_least_zero(l2, "l2") > 1 and method == "lda":
            raise ValueError(f"l2: expected a shrinkage from 0 to 1 for method 'lda', got {l2!r}")
    if not 0 <= check.check_number(holdout, "holdout") <= 0.5:
        raise ValueError(f"holdout: expected a share from 0 to 0.5, got {holdout!r}")
    return round(1 / holdout) if holdout else 0


def _activations(x: Any, name: str) -> Tensor:
    x = check.from_numpy(x, name) if isinstance(x, np.ndarray) else x
    check.check_float_tensor(x, name)
    if x.dtype not in SUPPORTED or x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{name}: expected activations (n, d) of at least one example, got shape {check.shape_of(x)}")
    return x.detach()
