"""Whether an explanation survives another seed: variance, angle, ranks and top features of maps across runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._copies import unshared
from .._optional import optional_import
from ..ops import _checks as check
from ._forwards import DEFAULT_BUDGET
from .conciseness import as_maps, result_dtype, sample_means, sample_rows
from .similarity import average_ranks, feature_count, top_features

__all__ = ["SeedStability", "seed_stability"]

# Arrays of the size of a chunk of maps in float64 that exist at once: the maps, their ranks and what ranking takes.
COPIES = 8

MEASURES = ("variance", "cosine", "spearman", "jaccard")


@dataclass(frozen=True)
class SeedStability:
    """How much maps (S, B, ...) of S seeds differ, for every sample.

    Attributes
    ----------
    variance : Tensor, shape (B,)
        Mean over the features of the unbiased variance across the seeds.
    variance_map, mean_map : Tensor, shape (B, ...)
        Variance and mean of every feature across the seeds.
    cosine, spearman, jaccard : Tensor, shape (B,)
        Means over the S (S - 1) / 2 pairs of seeds: cosine of the maps, rank correlation of their signed values, and
        intersection over union of the k features of largest magnitude.
    cosine_matrix, spearman_matrix, jaccard_matrix : Tensor, shape (B, S, S)
        Every pair.
    top_k : int
        k.
    seeds : tuple or None
        As given.

    Examples
    --------
    >>> import torch
    >>> found = seed_stability(torch.tensor([[[2.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]]]), top_k=2)
    >>> {name: round(value, 3) for name, value in found.summary().items()}
    {'variance': 0.333, 'cosine': 0.8, 'spearman': 0.5, 'jaccard': 0.333}
    """

    variance: Tensor
    variance_map: Tensor
    mean_map: Tensor
    cosine: Tensor
    spearman: Tensor
    jaccard: Tensor
    cosine_matrix: Tensor
    spearman_matrix: Tensor
    jaccard_matrix: Tensor
    top_k: int
    seeds: tuple[Any, ...] | None = None

    def table(self) -> list[dict[str, Any]]:
        """One row of plain Python values for each sample, ready for a DataFrame."""
        return sample_rows(self._measures())

    def summary(self) -> dict[str, float]:
        """The mean of every measure over the samples where it is a number."""
        return sample_means(self._measures())

    def _measures(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in MEASURES}


def seed_stability(
    attributions: Tensor | np.ndarray | Sequence[Tensor] | Callable[..., Tensor],
    seeds: Iterable[Any] | None = None,
    inputs: Any = None,
    *,
    top_k: int | float = 0.1,
    progress: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
) -> SeedStability:
    """How much the explanations of the same samples differ between runs that differ in their seed alone.

    .. math:: var_{b,i} = \\frac{1}{S - 1} \\sum_s (a_{s,b,i} - \\bar a_{b,i})^2, \\qquad
              cos_{b,st} = \\frac{a_{s,b} \\cdot a_{t,b}}{\\lVert a_{s,b} \\rVert \\lVert a_{t,b} \\rVert}, \\qquad
              J_{b,st} = \\frac{|T_{s,b} \\cap T_{t,b}|}{|T_{s,b} \\cup T_{t,b}|}

    with T the k features of largest magnitude; Spearman's correlation is the Pearson correlation of the ranks.

    Parameters
    ----------
    attributions : Tensor or ndarray (S, B, ...), sequence of S of them (B, ...), or callable
        A callable is run as ``explain(seed)``, or as ``explain(inputs, seed)`` where ``inputs`` is given, one seed after the
        other, and returns maps (B, ...). What the seed seeds, for example training a model anew or drawing the noise of an
        explainer, is the callable's own affair: no global generator is touched here, before or after.
    seeds : iterable, optional
        For a callable, one for each run; for tensors, names of the runs that the result keeps.
    inputs : object, optional
        Handed to the callable; a tensor or an array as a copy, which it may overwrite.
    top_k : int or float
        k, from 1 to the number of features n; a float is a share of n above 0 and up to 1, rounded, at least one feature.
    progress : bool
        Show a bar over the runs of a callable.
    memory_budget : int
        Bytes that the float64 copies of a chunk of samples take; a chunk has at least one sample. The maps of a callable
        are all kept, as every pair is compared.

    Returns
    -------
    SeedStability
        float64 for float64 maps, else float32; computed in float64.

    Raises
    ------
    TypeError, ValueError
        Maps that are not floating or differ in shape, dtype or device; fewer than two seeds; a callable without seeds; top_k
        out of range.

    Notes
    -----
    Undefined similarities are NaN, as in :mod:`xai_fast.metrics.similarity`, in the pairs and hence in the mean of that
    sample: the cosine with a map of zeros, which has no direction; the rank correlation with a constant map (so also for
    one feature); everything with a map that has a NaN. Of equal magnitudes the first in memory order counts as larger for
    the top k; equal values share the mean of their ranks. The variance depends on the scale of the maps, the rest does not.

    For each chunk the similarities of all pairs of seeds are one batched product of the (S, n) maps with their transpose:
    of the unit maps, of the centred unit ranks, and of the indicators of the top k.

    Examples
    --------
    >>> import torch
    >>> def explain(seed):
    ...     noise = torch.randn(1, 100, generator=torch.Generator().manual_seed(seed))
    ...     return torch.linspace(0, 1, 100) + 0.1 * noise
    >>> found = seed_stability(explain, seeds=range(5), top_k=10)
    >>> found.cosine_matrix.shape, bool(found.cosine > 0.9)
    (torch.Size([1, 5, 5]), True)
    """
    memory_budget = check.check_count(memory_budget, "memory_budget")
    if seeds is not None:
        check.check_iterable(seeds, "seeds", "one for each run")
    names = None if seeds is None else tuple(seeds)
    runs = _collect(attributions, names, inputs, progress)
    batch, features = len(runs[0]), math.prod(runs[0].shape[1:])
    k = _top_k(top_k, features)
    step = max(1, memory_budget // (COPIES * 8 * len(runs) * features))
    chunks = [_compare([r[i : i + step] for r in runs], k) for i in range(0, max(1, batch), step)]
    variance, variance_map, mean_map, *matrices = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    cosine, spearman, jaccard = matrices
    return SeedStability(
        variance,
        variance_map,
        mean_map,
        _pair_mean(cosine),
        _pair_mean(spearman),
        _pair_mean(jaccard),
        cosine,
        spearman,
        jaccard,
        k,
        names,
    )


def _top_k(top_k: Any, features: int) -> int:
    try:
        return feature_count(top_k, features)
    except (TypeError, ValueError) as error:
        raise type(error)(f"top_{error}") from None


def _collect(attributions: Any, seeds: tuple[Any, ...] | None, inputs: Any, progress: bool) -> list[Tensor]:
    """The S maps (B, ...), checked to be alike."""
    if callable(attributions):
        runs = _run(attributions, seeds, inputs, progress)
    elif not isinstance(attributions, (Tensor, np.ndarray, list, tuple)):
        got = type(attributions).__name__
        raise TypeError(f"attributions: expected a tensor, a sequence of tensors or a callable, got {got}")
    elif inputs is not None:
        raise TypeError("inputs: expected None beside attributions that are not a callable")
    else:
        runs = list(attributions)
    if len(runs) < 2:
        raise ValueError(f"attributions: expected the maps of at least 2 seeds, got {len(runs)}")
    if seeds is not None and len(seeds) != len(runs):
        raise ValueError(f"seeds: expected one for each of the {len(runs)} runs, got {len(seeds)}")
    maps = [as_maps(run, f"attributions[{i}]") for i, run in enumerate(runs)]
    for i, other in enumerate(maps[1:], 1):
        check.check_like(other, f"attributions[{i}]", check.shape_of(maps[0]), maps[0])
    return maps


def _run(explain: Callable[..., Any], seeds: tuple[Any, ...] | None, inputs: Any, progress: bool) -> list[Any]:
    if seeds is None:
        raise TypeError("seeds: expected the seeds to run the callable with, got None")
    bar: Any = optional_import("tqdm", "demo").tqdm(seeds, desc="seeds", leave=False) if progress else seeds
    # Copies of the maps as well: a callable may return the same buffer at every call.
    return [unshared(explain(seed) if inputs is None else explain(unshared(inputs), seed)) for seed in bar]


def _compare(runs: list[Tensor], k: int) -> tuple[Tensor, ...]:
    """Variance (b,), its map and the mean map (b, ...), cosines, rank correlations and Jaccard indices (b, S, S)."""
    shape, out = runs[0].shape, result_dtype(runs[0])
    stacked = torch.stack([r.flatten(1) for r in runs], 1).double()
    mean = stacked.mean(1)
    variance = (stacked - mean[:, None]).square().sum(1) / (len(runs) - 1)
    maps = (variance.view(shape), mean.view(shape))
    matrices = (_cosines(_scaled(stacked)), _cosines(_centred_ranks(stacked)), _jaccard(stacked, k))
    return tuple(x.to(out) for x in (variance.mean(1), *maps, *matrices))


def _scaled(stacked: Tensor) -> Tensor:
    """In units of the largest magnitude, where squares of extreme values neither overflow nor vanish; maps of zeros: NaN."""
    return stacked / stacked.abs().amax(2, keepdim=True)


def _centred_ranks(stacked: Tensor) -> Tensor:
    """Exactly 0 for a constant map, whose ranks are all the middle."""
    features = stacked.shape[2]
    return average_ranks(stacked.flatten(0, 1)).view_as(stacked) - (features + 1) / 2


def _jaccard(stacked: Tensor, k: int) -> Tensor:
    common = _gram(top_features(stacked.flatten(0, 1), k).view_as(stacked).double())
    unknown = stacked.isnan().any(2)
    return (common / (2 * k - common)).masked_fill(unknown[:, :, None] | unknown[:, None, :], math.nan)


def _gram(rows: Tensor) -> Tensor:
    return torch.bmm(rows, rows.transpose(1, 2))


def _cosines(rows: Tensor) -> Tensor:
    """Cosines of all pairs of rows (b, S, n); NaN for a row of zeros."""
    gram = _gram(rows)
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    return (gram / (length[:, :, None] * length[:, None, :])).clamp(-1, 1)


def _pair_mean(matrix: Tensor) -> Tensor:
    """Mean of the entries above the diagonal of (B, S, S)."""
    seeds = matrix.shape[1]
    row, column = torch.triu_indices(seeds, seeds, 1, device=matrix.device)
    return matrix[:, row, column].double().mean(1).to(matrix.dtype)
