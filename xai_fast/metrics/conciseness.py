"""How concise a map is: how many features it uses, and how unevenly its magnitude is spread over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._dtypes import accumulate_dtype
from .._scaling import power_of_two
from ..ops import _checks as check

__all__ = ["Conciseness", "conciseness", "effective_complexity", "entropy", "gini", "size", "sparsity"]

Maps = Tensor | np.ndarray

# Maps of float64 with magnitudes beyond this, or all below one over it, are summed in other units.
LARGEST = 2.0**900


@dataclass(frozen=True)
class Conciseness:
    """Every measure of conciseness of a batch of maps.

    Attributes
    ----------
    size : Tensor, shape (B,)
        Features above the threshold.
    sparsity : Tensor, shape (B,)
        1 - size / n.
    entropy : Tensor, shape (B,)
        In nats.
    gini : Tensor, shape (B,)
        0 for a constant map, 1 - 1/n where one feature is all.
    features : int
        n, the features of a map.

    Examples
    --------
    >>> import torch
    >>> found = conciseness(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    >>> found.table()[0]
    {'sample': 0, 'size': 1.0, 'sparsity': 0.5, 'entropy': 0.0, 'gini': 0.5}
    >>> found.summary()["size"]
    1.5
    """

    size: Tensor
    sparsity: Tensor
    entropy: Tensor
    gini: Tensor
    features: int

    def table(self) -> list[dict[str, Any]]:
        """One row of plain Python values for each sample, ready for a DataFrame."""
        return sample_rows(self._measures())

    def summary(self) -> dict[str, float]:
        """The mean of every measure over the samples where it is a number."""
        return sample_means(self._measures())

    def _measures(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("size", "sparsity", "entropy", "gini")}


def conciseness(attributions: Maps, threshold: float = 0.0, *, relative: bool = False) -> Conciseness:
    """Size, sparsity, entropy and Gini index of maps together, for one read and one sort of them.

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
        Floating; signs do not count.
    threshold : float
        At least 0. A feature counts for the size if its magnitude is above it.
    relative : bool
        The threshold is a share of the largest magnitude of each map.

    Returns
    -------
    Conciseness

    Raises
    ------
    TypeError, ValueError
        Not floating maps with at least one feature, a negative threshold.

    Notes
    -----
    The formulas and their sources stand with :func:`size`, :func:`sparsity`, :func:`entropy` and :func:`gini`.

    Examples
    --------
    >>> import torch
    >>> found = conciseness(torch.tensor([[4.0, -4.0, 0.0, 0.0]]))
    >>> found.size, found.sparsity, found.entropy, found.gini
    (tensor([2.]), tensor([0.5000]), tensor([0.6931]), tensor([0.5000]))
    """
    maps = as_maps(attributions)
    measures = _measures(maps, threshold, relative, gini=True)
    n, out = math.prod(maps.shape[1:]), result_dtype(maps)
    count, nats, index = measures.unbind(1)
    return Conciseness(count.to(out), (1 - count / n).to(out), nats.to(out), index.to(out), n)


def size(attributions: Maps, threshold: float = 0.0, *, relative: bool = False) -> Tensor:
    """How many features of a map count.

    .. math:: size = \\#\\{i : |a_i| > t\\}

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
    threshold : float
        t, at least 0.
    relative : bool
        t is ``threshold`` times the largest magnitude of the map.

    Returns
    -------
    Tensor, shape (B,)
        From 0 (a map of zeros) to n. NaN for a map with an entry that is not finite. float64 for float64 maps, else float32,
        which is exact up to 2^24 features.

    Raises
    ------
    TypeError, ValueError
        Not floating maps with at least one feature, a negative threshold.

    Notes
    -----
    Source: Amara et al. (2022), GraphFramEx (arXiv 2206.09677).

    Examples
    --------
    >>> import torch
    >>> a = torch.tensor([[0.5, -0.1, 0.0, 0.01]])
    >>> size(a), size(a, 0.05), size(a, 0.3, relative=True)
    (tensor([3.]), tensor([2.]), tensor([1.]))
    """
    maps = as_maps(attributions)
    return _measures(maps, threshold, relative)[:, 0].to(result_dtype(maps))


def sparsity(attributions: Maps, threshold: float = 0.0, *, relative: bool = False) -> Tensor:
    """The share of the features of a map that do not count.

    .. math:: sparsity = 1 - \\frac{\\#\\{i : |a_i| > t\\}}{n}

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
    threshold : float
        t, at least 0.
    relative : bool
        t is ``threshold`` times the largest magnitude of the map.

    Returns
    -------
    Tensor, shape (B,)
        1 for a map of zeros, 0 where every feature counts. NaN for a map with an entry that is not finite. float64 for
        float64 maps, else float32.

    Raises
    ------
    TypeError, ValueError
        Not floating maps with at least one feature, a negative threshold.

    Notes
    -----
    Source: Amara et al. (2022), GraphFramEx (arXiv 2206.09677).

    Examples
    --------
    >>> import torch
    >>> sparsity(torch.tensor([[0.5, -0.1, 0.0, 0.0]]))
    tensor([0.5000])
    """
    maps = as_maps(attributions)
    return (1 - _measures(maps, threshold, relative)[:, 0] / math.prod(maps.shape[1:])).to(result_dtype(maps))


def entropy(attributions: Maps, base: float | None = None, normalize: bool = False) -> Tensor:
    """Entropy of the shares that the features have in the magnitude of a map: the complexity of Bhatt et al.

    .. math:: H = -\\sum_i p_i \\log p_i, \\qquad p_i = |a_i| / \\sum_j |a_j|, \\qquad 0 \\log 0 = 0

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
    base : float or None
        Of the logarithm, above 0 and not 1; None: e, nats.
    normalize : bool
        Divide by log n: 1 for a constant map, in any base. A map of one feature has 0.

    Returns
    -------
    Tensor, shape (B,)
        0 where one feature is all and for a map of zeros, log n for a constant map. NaN for a map with an entry that is not
        finite. float64 for float64 maps, else float32; computed in float64.

    Raises
    ------
    TypeError, ValueError
        Not floating maps with at least one feature, an impossible base.

    Notes
    -----
    Source: Bhatt, Weller & Moura (2020), "Evaluating and aggregating feature-based model explanations" (arXiv 2005.00631),
    section 2.3.

    Examples
    --------
    >>> import torch
    >>> a = torch.tensor([[2.0, -2.0, 0.0, 0.0]])
    >>> entropy(a), entropy(a, base=2), entropy(a, normalize=True)
    (tensor([0.6931]), tensor([1.]), tensor([0.5000]))
    """
    maps = as_maps(attributions)
    unit = math.log(_check_base(base))
    nats = _measures(maps)[:, 1]
    n = math.prod(maps.shape[1:])
    if normalize:
        # log 1 = 0: the entropy of one feature is 0 already.
        unit = math.log(n) if n > 1 else 1.0
    return (nats / unit).to(result_dtype(maps))


def gini(attributions: Maps) -> Tensor:
    """Gini index of the magnitudes of a map: the sparseness of Chalasani et al.

    .. math:: G = \\frac{\\sum_i \\sum_j \\bigl| |a_i| - |a_j| \\bigr|}{2 n \\sum_i |a_i|}

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)

    Returns
    -------
    Tensor, shape (B,)
        0 for a constant map, a map of zeros and a single feature; 1 - 1/n where one feature is all. NaN for a map with an
        entry that is not finite. float64 for float64 maps, else float32; computed in float64.

    Raises
    ------
    TypeError, ValueError
        Not floating maps with at least one feature.

    Notes
    -----
    Source: Chalasani et al. (2020), "Concise explanations of neural networks using adversarial training". Computed from the
    sorted magnitudes.

    Examples
    --------
    >>> import torch
    >>> gini(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -3.0, 0.0, 0.0]]))
    tensor([0.0000, 0.7500])
    """
    maps = as_maps(attributions)
    return _measures(maps, gini=True)[:, 2].to(result_dtype(maps))


def effective_complexity(attributions: Maps, eps: float = 1e-5, *, relative: bool = False) -> Tensor:
    """How many features have a magnitude above a small number: effective complexity as Quantus computes it.

    .. math:: \\#\\{i : |a_i| > \\epsilon\\}

    Parameters
    ----------
    attributions : Tensor or ndarray, shape (B, ...)
    eps : float
        At least 0.
    relative : bool
        eps is a share of the largest magnitude of the map. True gives what Quantus does by default, which divides maps by
        their largest magnitude first.

    Returns
    -------
    Tensor, shape (B,)
        As :func:`size` with this threshold.

    Raises
    ------
    TypeError, ValueError
        Not floating maps with at least one feature, a negative eps.

    Notes
    -----
    This is a size, named as in Quantus. The definition of Nguyen & Martinez (2020), "On quantitative aspects of model
    interpretability" (arXiv 2007.07584), is another: the smallest k for which the k features of largest magnitude keep the
    expected loss of the model below a tolerance, the other features being drawn from their distribution. It needs the model,
    a loss, that tolerance and samples of the other features, none of which a map holds.

    Examples
    --------
    >>> import torch
    >>> effective_complexity(torch.tensor([[0.3, -0.2, 1e-6, 0.0]]))
    tensor([2.])
    """
    return size(attributions, check.check_at_least_zero(eps, "eps"), relative=relative)


def _check_base(base: Any) -> float:
    if base is None:
        return math.e
    value = check.check_positive(base, "base")
    if value == 1:
        raise ValueError("base: expected a number other than 1, got 1")
    return value


def _measures(maps: Tensor, threshold: float = 0.0, relative: bool = False, gini: bool = False) -> Tensor:
    """(B, 3) in float64: size, entropy, Gini index; all NaN for a map that is not finite."""
    threshold = check.check_at_least_zero(threshold, "threshold")
    measures = ops.conciseness(maps, threshold=0.0 if relative else threshold, gini=gini)
    if maps.dtype == torch.float64:
        _rescale_extremes(measures, maps, gini)
    if relative:
        a = maps.detach().flatten(1).double().abs()
        measures[:, 0] = (a > threshold * a.amax(1, keepdim=True)).sum(1)
    # The entropy is the one measure that any entry that is not finite reaches.
    return measures.masked_fill(measures[:, 1:2].isnan(), math.nan)


def _rescale_extremes(measures: Tensor, maps: Tensor, gini: bool) -> None:
    """Entropy and Gini index, which no scale changes, of maps whose sums float64 cannot hold: in units of a power of two."""
    flat = maps.flatten(1)
    largest = torch.linalg.vector_norm(flat, torch.inf, dim=1)
    far = (largest > LARGEST) | ((largest > 0) & (largest < 1 / LARGEST))
    if bool(far.any()):
        near = flat[far] / power_of_two(largest[far])[:, None]
        measures[far, 1:] = ops.conciseness(near, gini=gini)[:, 1:]


def as_maps(x: Any, name: str = "attributions") -> Tensor:
    """Maps (B, ...) with at least one feature, as a tensor without a graph; a numpy array comes as one."""
    if isinstance(x, np.ndarray):
        x = check.from_numpy(x, name)
    check.check_float_tensor(x, name)
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected shape (B, ...) with at least one feature a map, got {check.shape_of(x)}")
    return x.detach()


def result_dtype(maps: Tensor) -> torch.dtype:
    """The dtype of a measure of these maps."""
    return accumulate_dtype(maps.dtype)


def sample_rows(measures: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row of plain Python values for each sample, of measures (B,)."""
    columns = [range(len(next(iter(measures.values())))), *(values.tolist() for values in measures.values())]
    return [dict(zip(("sample", *measures), row, strict=True)) for row in zip(*columns, strict=True)]


def sample_means(measures: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each measure (B,) over the samples where it is a number."""
    return {name: values.double().nanmean().item() for name, values in measures.items()}
