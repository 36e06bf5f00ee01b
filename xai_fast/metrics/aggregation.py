"""One explanation out of several: of lower complexity than each, or steadier under small changes of the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._copies import unshared
from ..ops import _checks as check
from ._forwards import DEFAULT_BUDGET
from .conciseness import as_maps, result_dtype, sample_means, sample_rows

__all__ = ["Aggregate", "SmoothedExplainer", "aggregate", "lower_sensitivity"]

OBJECTIVES = ("mean", "median", "walk", "complexity")
NORMS = {"l1": 1.0, "l2": 2.0}
WEIGHTINGS = ("inverse", "uniform")
DISTANCES = {"l1": 1.0, "l2": 2.0, "linf": math.inf}

# Arrays (samples, starting points, features) in float64 that a descent holds at once.
COPIES = 10
# Factors of the step size of the exponentiated gradient after a step that was refused and one that was taken.
SHRINK, GROW = 0.25, 1.5
SMALLEST_STEP = 1e-6


@dataclass(frozen=True)
class Aggregate:
    """Explanations (B, ...) made of those of M explainers.

    Attributes
    ----------
    attributions : Tensor, shape (B, ...)
    weights : Tensor, shape (B, M), or None
        Of the normalised maps, each at least 0 and 1 together; None where the aggregate is no weighted mean of whole maps
        ("median", "walk").
    complexity : Tensor, shape (B,)
        Entropy of the aggregate in nats, as :func:`xai_fast.metrics.entropy`.
    complexities : Tensor, shape (B, M)
        Entropy of every single map.
    steps : int
        Most steps that a descent took; 0 for "mean" and "median".
    names : tuple of str
        Of the M explainers; "0", "1", ... if they came without.
    objective : str

    Examples
    --------
    >>> import torch
    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    >>> found = aggregate({"a": a, "b": b})
    >>> found.attributions, found.weights
    (tensor([[0.7500, 0.2500]]), tensor([[0.5000, 0.5000]]))
    >>> found.summary()["complexity"], found.summary()["complexity of b"]
    (0.5623..., 0.6931...)
    """

    attributions: Tensor
    weights: Tensor | None
    complexity: Tensor
    complexities: Tensor
    steps: int
    names: tuple[str, ...]
    objective: str

    def table(self) -> list[dict[str, Any]]:
        """One row of plain Python values for each sample, ready for a DataFrame."""
        return sample_rows(self._measures())

    def summary(self) -> dict[str, float]:
        """The mean of every column over the samples where it is a number."""
        return sample_means(self._measures())

    def _measures(self) -> dict[str, Tensor]:
        columns = {"complexity": self.complexity}
        columns |= {f"complexity of {name}": self.complexities[:, m] for m, name in enumerate(self.names)}
        if self.weights is not None:
            columns |= {f"weight of {name}": self.weights[:, m] for m, name in enumerate(self.names)}
        return columns


def aggregate(
    attributions: Mapping[str, Tensor | np.ndarray] | Tensor | np.ndarray,
    *,
    objective: str = "mean",
    weights: Any = None,
    norm: str = "l1",
    steps: int = 100,
    least_mass: float = 0.1,
    memory_budget: int = DEFAULT_BUDGET,
) -> Aggregate:
    """Combine the maps of several explainers for the same samples into one map for each sample.

    Every map is divided by its norm first, so that no explainer counts for more because of its units. With g_m the
    normalised maps of a sample and H the entropy of the shares of |a|:

    ============  =====================================================================================================
    "mean"        sum_m w_m g_m, with equal weights the point of least mean squared l2 distance to the maps
    "median"      the median of every feature, the point of least mean l1 distance (of two middle values, their mean)
    "walk"        of all points on walks from each g_m towards the mean, feature by feature, and from the mean towards each
                  g_m, that lower H with every step, the one of least H
    "complexity"  sum_m w_m g_m with weights that lower H
    ============  =====================================================================================================

    Parameters
    ----------
    attributions : dict of Tensor or ndarray (B, ...), or Tensor or ndarray (M, B, ...)
        Maps of one shape, dtype and device, with their signs.
    objective : {"mean", "median", "walk", "complexity"}
    weights : Tensor, ndarray or sequence, shape (M,) or (B, M), optional
        For "mean" alone: at least 0, with a sum above 0 that is divided out. Equal by default.
    norm : {"l1", "l2"}
        Of a map, over all its features.
    steps : int
        At most that many steps of a descent. A step of a walk is 1/steps of the way: a feature that moves in all of them
        arrives.
    least_mass : float
        From 0 to 1: the aggregate of "walk" and "complexity" keeps at least this share of the l1 norm of the maps, of their
        mean with the same weights. Maps that contradict each other cancel, and without this bound a remainder of rounding
        errors would count as concise.
    memory_budget : int
        Bytes that a chunk of samples takes in float64; a chunk has at least one sample.

    Returns
    -------
    Aggregate
        float64 for float64 maps, else float32; computed in float64. For "walk" and "complexity" the entropy is at most that
        of every single map that is not zero (in float64, before the result is rounded). Maps of zeros stay zeros in "mean"
        and "median" and are no starting points and have no weight in the descents; if all maps of a sample are zeros, so is
        the aggregate. A sample with an entry that is not finite in any map is NaN.

    Raises
    ------
    TypeError, ValueError
        Maps that are not floating or differ in shape, dtype or device; no map; weights that do not fit or come with another
        objective; an option out of range.

    Notes
    -----
    Bhatt, Weller & Moura (2020), "Evaluating and aggregating feature-based model explanations" (arXiv 2005.00631),
    section 3.

    - "mean" and "median" are its convex combination and its centroids argmin_g sum_m d(g, g_m)^p for the l2 distance with
      p = 2 and the l1 distance with p = 1.
    - "walk" follows its gradient-descent style method: 2M walks between every map and the mean, a feature moves if that
      lowers the complexity, the best end is the answer. Ours: the step size and the bound on the mass; that all features
      which would lower the entropy on their own move together, and only the best of them where together they would not; and
      that walks from maps of zeros are left out.
    - "complexity" is ours, in place of its region shrinking: exponentiated gradient on the simplex of the weights, from the
      uniform weights and from one point near each corner, with the corners themselves as candidates; deterministic. Entropy
      is concave in the shares, so that for maps without negative values no mixture is less complex than the least complex
      of its parts: there the answer is that one map. Only signed maps that partly cancel can do better. The problem is not
      convex; the weights are those of a local minimum.

    Normalisation is ours too: the entropy of a map does not depend on its scale, that of a mean of maps does.

    Examples
    --------
    >>> import torch
    >>> maps = {"a": torch.tensor([[4.0, 1.0, -1.0]]), "b": torch.tensor([[4.0, -1.0, 1.0]])}
    >>> found = aggregate(maps, objective="complexity")
    >>> found.attributions, found.weights
    (tensor([[0.6667, 0.0000, 0.0000]]), tensor([[0.5000, 0.5000]]))
    >>> found.complexities, found.complexity
    (tensor([[0.8676, 0.8676]]), tensor([0.]))
    """
    steps = check.check_count(steps, "steps")
    memory_budget = check.check_count(memory_budget, "memory_budget")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if check.check_at_least_zero(least_mass, "least_mass") > 1:
        raise ValueError(f"least_mass: expected a share from 0 to 1, got {least_mass!r}")
    names, maps = _collect(attributions)
    share = _weights(weights, maps, objective)
    shape, out = maps[0].shape, result_dtype(maps[0])
    step = max(1, memory_budget // (COPIES * 8 * (2 * len(maps) + 1) * math.prod(shape[1:])))
    parts = []
    for begin in range(0, max(1, shape[0]), step):
        unit = _normalised([m[begin : begin + step] for m in maps], NORMS[norm])
        part = _combine(unit, objective, share[begin : begin + step], steps, least_mass)
        parts.append(replace(part, attributions=part.attributions.to(out)))
    return _joined(parts, shape, out, names, objective)


def _collect(attributions: Any) -> tuple[tuple[str, ...], list[Tensor]]:
    """The names and the maps (B, ...) of the M explainers, checked to be alike."""
    if isinstance(attributions, Mapping):
        names, given = tuple(str(name) for name in attributions), list(attributions.values())
    elif isinstance(attributions, (Tensor, np.ndarray)):
        given = list(attributions) if attributions.ndim > 2 else []
        names = tuple(str(m) for m in range(len(given)))
    else:
        raise TypeError(f"attributions: expected a dict or a tensor (M, B, ...), got {type(attributions).__name__}")
    if not given:
        raise ValueError("attributions: expected maps (M, B, ...) of at least one explainer, got none")
    maps = [as_maps(m, f"attributions[{name}]") for name, m in zip(names, given, strict=True)]
    for name, other in zip(names[1:], maps[1:], strict=True):
        check.check_like(other, f"attributions[{name}]", check.shape_of(maps[0]), maps[0])
    return names, maps


def _weights(weights: Any, maps: list[Tensor], objective: str) -> Tensor:
    """(B, M) in float64, each row of sum 1."""
    batch, count, device = maps[0].shape[0], len(maps), maps[0].device
    if weights is None:
        return torch.full((batch, count), 1 / count, dtype=torch.float64, device=device)
    if objective != "mean":
        raise ValueError(f"weights: expected None for the objective {objective!r}, which has its own")
    share = check.as_tensor(weights, "weights", torch.float64).to(device).detach()
    if tuple(share.shape) not in ((count,), (batch, count)):
        raise ValueError(f"weights: expected shape ({count},) or ({batch}, {count}), got {check.shape_of(share)}")
    total = share.sum(-1, keepdim=True)
    if not bool(share.isfinite().all() and (share >= 0).all() and (total > 0).all()):
        raise ValueError("weights: expected finite numbers of at least 0 with a sum above 0")
    return (share / total).expand(batch, count)


def _normalised(maps: list[Tensor], order: float) -> Tensor:
    """(b, M, n) in float64 of norm 1; maps of zeros stay zeros, samples that are not finite are NaN."""
    stacked = torch.stack([m.flatten(1) for m in maps], 1).double()
    # In units of the largest magnitude the norm of extreme values neither overflows nor vanishes.
    largest = stacked.abs().amax(2, keepdim=True)
    stacked = stacked / torch.where(largest > 0, largest, 1.0)
    length = torch.linalg.vector_norm(stacked, ord=order, dim=2, keepdim=True)
    stacked = stacked / torch.where(length > 0, length, 1.0)
    return stacked.masked_fill(~stacked.isfinite().flatten(1).all(1)[:, None, None], math.nan)


@dataclass(frozen=True)
class _Part:
    """The aggregate of a chunk of samples: (b, n), (b, M) or None, (b,), (b, M)."""

    attributions: Tensor
    weights: Tensor | None
    complexity: Tensor
    complexities: Tensor
    steps: int


def _combine(maps: Tensor, objective: str, share: Tensor, steps: int, least_mass: float) -> _Part:
    weights: Tensor | None = None
    taken = 0
    if objective == "median":
        rising = maps.sort(1).values
        combined = (rising[:, (maps.shape[1] - 1) // 2] + rising[:, maps.shape[1] // 2]) / 2
    elif objective == "walk":
        combined, taken = _walk(maps, steps, least_mass)
    else:
        weights = share
        if objective == "complexity":
            weights, taken = _descend(maps, steps, least_mass)
        combined = _mix(weights[:, None], maps)[:, 0]
        weights = weights.masked_fill(combined.isnan().any(1, keepdim=True), math.nan)
    return _Part(combined, weights, _entropy(combined), _entropy(maps), taken)


def _joined(parts: list[_Part], shape: torch.Size, out: torch.dtype, names: tuple[str, ...], objective: str) -> Aggregate:
    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts]).to(out)

    return Aggregate(
        attributions=join("attributions").view(shape),
        weights=None if parts[0].weights is None else join("weights"),
        complexity=join("complexity"),
        complexities=join("complexities"),
        steps=max(part.steps for part in parts),
        names=names,
        objective=objective,
    )


def _entropy(maps: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; 0 for zeros."""
    a = maps.abs()
    return _entropy_of_sums(a.sum(-1), _powers(a).sum(-1))


def _powers(a: Tensor) -> Tensor:
    """a log a with 0 log 0 = 0; xlogy is not vectorised."""
    return a * a.clamp_min(torch.finfo(a.dtype).tiny).log()


def _entropy_of_sums(total: Tensor, powers: Tensor) -> Tensor:
    """H = log S - T / S of S = sum a and T = sum a log a; rounding must not make it negative."""
    return torch.where(total == 0, 0.0, total.log() - powers / total).clamp_min(0)


def _mix(weights: Tensor, maps: Tensor) -> Tensor:
    """Weights (b, K, M) of maps (b, M, n) -> (b, K, n)."""
    return torch.bmm(weights, maps)


# Weights of least complexity


def _descend(maps: Tensor, steps: int, least_mass: float) -> tuple[Tensor, int]:
    """Weights (b, M), from M + 1 starting points by exponentiated gradient, and the steps it took."""
    batch, count = maps.shape[:2]
    mass = maps.abs().sum(2)
    alive = mass > 0
    # A sample of zeros, or of NaN, keeps uniform weights.
    alive = alive | ~alive.any(1, keepdim=True)
    corners = torch.eye(count, dtype=maps.dtype, device=maps.device).expand(batch, -1, -1)
    even = alive.double() / alive.sum(1, keepdim=True)
    starts = torch.cat([even[:, None], (corners * alive[:, None] + even[:, None]) / 2], 1)
    starts = starts / starts.sum(2, keepdim=True)
    weights, taken = _exponentiated_gradient(starts, maps, mass, steps, least_mass)
    candidates = torch.cat([corners, weights], 1)
    height = _height(candidates, maps, mass, least_mass)
    # A corner is the map itself, whatever the bound on the mass; one of zeros is no candidate.
    height[:, :count] = torch.where(alive, _entropy(maps), math.inf)
    best = height.nan_to_num(nan=math.inf).argmin(1)
    chosen = candidates[torch.arange(batch, device=maps.device), best]
    return torch.where((mass > 0).any(1, keepdim=True), chosen, even), taken


def _height(weights: Tensor, maps: Tensor, mass: Tensor, least_mass: float) -> Tensor:
    """Entropy (b, K) of the mixtures; infinite where too little of the mass is left."""
    return _height_and_mix(weights, maps, mass, least_mass)[0]


def _height_and_mix(weights: Tensor, maps: Tensor, mass: Tensor, least_mass: float) -> tuple[Tensor, Tensor]:
    mixed = _mix(weights, maps)
    kept = mixed.abs().sum(2)
    enough = (kept > 0) & (kept >= least_mass * (weights * mass[:, None]).sum(2))
    return torch.where(enough, _entropy(mixed), math.inf), mixed


def _exponentiated_gradient(
    weights: Tensor, maps: Tensor, mass: Tensor, steps: int, least_mass: float
) -> tuple[Tensor, int]:
    """Steps w <- w exp(-eta grad) / sum that are taken only if they lower the entropy; eta adapts for each start alone."""
    height, mixed = _height_and_mix(weights, maps, mass, least_mass)
    eta = torch.ones_like(height)
    for taken in range(steps):
        active = (eta > SMALLEST_STEP) & height.isfinite()
        if not bool(active.any()):
            return weights, taken
        slope = _slope(mixed, maps)
        slope = slope - slope.amin(2, keepdim=True)
        unit = slope / slope.amax(2, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        trial = weights * (-eta[:, :, None] * unit).exp()
        trial = trial / trial.sum(2, keepdim=True)
        trial_height, trial_mixed = _height_and_mix(trial, maps, mass, least_mass)
        better = active & (trial_height < height)
        weights = torch.where(better[:, :, None], trial, weights)
        mixed = torch.where(better[:, :, None], trial_mixed, mixed)
        height = torch.where(better, trial_height, height)
        eta = torch.where(better, eta * GROW, eta * SHRINK)
    return weights, steps


def _slope(mixed: Tensor, maps: Tensor) -> Tensor:
    """Gradient (b, K, M) of the entropy by the weights; features at 0, where it has none, are left out."""
    a = mixed.abs()
    total = a.sum(2, keepdim=True)
    share = torch.where(total > 0, a / total, 0.0)
    logs = torch.where(share > 0, share.log(), 0.0)
    height = -(share * logs).sum(2, keepdim=True)
    by_feature = torch.where(share > 0, -(logs + height) * mixed.sign() / total, 0.0)
    return torch.bmm(by_feature, maps.transpose(1, 2))


# Walks between the maps and their mean


def _walk(maps: Tensor, steps: int, least_mass: float) -> tuple[Tensor, int]:
    """The least complex end (b, n) of 2M walks, and the steps it took."""
    mass = maps.abs().sum(2)
    alive = mass > 0
    count = alive.sum(1)[:, None].clamp_min(1)
    mean = (maps.sum(1, keepdim=True) / count[:, :, None]).expand_as(maps)
    floor = least_mass * mass.sum(1, keepdim=True) / count
    ends, taken = _walks(torch.cat([maps, mean], 1), torch.cat([mean, maps], 1), steps, floor)
    # A mean of maps that cancel is no place to start from; a map always is.
    whole = alive & (mean.abs().sum(2) >= floor) & (mean != 0).any(2)
    height = _entropy(ends).masked_fill(~torch.cat([alive, whole], 1), math.inf)
    return ends[torch.arange(len(maps), device=maps.device), height.argmin(1)], taken


def _walks(at: Tensor, goal: Tensor, steps: int, floor: Tensor) -> tuple[Tensor, int]:
    """Moves features of (b, K, n) by 1/steps of their way to the goal while the entropy falls and the mass is kept."""
    stride, left = (goal - at) / steps, torch.full(at.shape, steps, dtype=torch.int32, device=at.device)
    a, powers = at.abs(), _powers(at.abs())
    height = _entropy_of_sums(a.sum(2), powers.sum(2))
    for taken in range(steps):
        # The last stride ends on the goal itself, not a rounding error beside it.
        moved = torch.where(left == 1, goal, at + stride)
        new_a, new_powers = moved.abs(), _powers(moved.abs())
        rest, rest_powers = a.sum(2, keepdim=True) - a, powers.sum(2, keepdim=True) - powers
        after = _height_above(rest + new_a, rest_powers + new_powers, floor[:, :, None])
        lower = after < height[:, :, None]
        # The best single move, where all together overshoot.
        best = torch.zeros_like(lower).scatter_(2, after.argmin(2, keepdim=True), True) & lower
        tall, short = (
            _height_above(torch.where(c, new_a, a).sum(2), torch.where(c, new_powers, powers).sum(2), floor)
            for c in (lower, best)
        )
        use_all, use_one = tall < height, short < height
        chosen = torch.where(use_all[:, :, None], lower, best & use_one[:, :, None])
        if not bool(chosen.any()):
            return at, taken
        at, a, powers = (torch.where(chosen, new, old) for new, old in ((moved, at), (new_a, a), (new_powers, powers)))
        left = left - chosen.int()
        height = torch.where(use_all, tall, torch.where(use_one, short, height))
    return at, steps


def _height_above(mass: Tensor, powers: Tensor, floor: Tensor) -> Tensor:
    """Entropy from sums; infinite where less of the mass is left than the floor, or nothing."""
    height = _entropy_of_sums(mass.clamp_min(0), powers)
    return height.masked_fill((mass < floor) | (mass <= 0), math.inf)


# Steadier explanations


def lower_sensitivity(
    explanation: Callable[..., Tensor] | Tensor | np.ndarray,
    neighbours: Tensor | np.ndarray,
    *,
    k: int = 5,
    weights: str = "inverse",
    distance: str = "l2",
    predict: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
) -> SmoothedExplainer:
    """An explainer that explains a point by the explanations of its nearest neighbours in a reference set.

    .. math:: \\bar g(x) = \\frac{\\sum_{z \\in N_k(x)} w(\\rho(x, z))\\, g(z)}{\\sum_{z \\in N_k(x)} w(\\rho(x, z))},
              \\qquad w(\\rho) = 1 / \\rho \\text{ or } 1

    Parameters
    ----------
    explanation : callable, or Tensor or ndarray (R, ...)
        g: ``explanation(inputs) -> (B, ...)``, run once over the reference set here; or the maps of the reference set.
    neighbours : Tensor or ndarray, shape (R, ...)
        The reference set, usually training data.
    k : int
        From 1 to R.
    weights : {"inverse", "uniform"}
        w. A point that is in the reference set has under "inverse" the explanation it has there, which is the limit.
    distance : {"l2", "l1", "linf"}
        rho, over all entries of an input, in float64.
    predict : callable, optional
        ``predict(inputs)``: class numbers (B,) or scores (B, C). Only neighbours of the class of the point count, so that
        what is averaged explains the same prediction; there may be fewer than k.
    batch_size : int
        Inputs that are explained, predicted or compared with the reference set at once.

    Returns
    -------
    SmoothedExplainer
        A callable ``inputs -> maps (B, ...)`` in the dtype of the maps of the reference set.

    Raises
    ------
    TypeError, ValueError
        Inputs or maps that are not floating or do not fit each other; k out of range; an unknown weighting or distance.

    Notes
    -----
    Bhatt, Weller & Moura (2020, arXiv 2005.00631), section 3, and Bhatt, Ravikumar & Moura (2019), "Towards aggregating
    weighted feature attributions" (arXiv 1901.10040): AVA, the aggregate valuation of antecedents, adds the Shapley values
    of the nearest training points with weights 1/rho, which is the Shapley value of the weighted sum of their games. Ours:
    any explanation in place of the Shapley value; weights that add up to 1, so that the result has the scale of a single
    explanation and does not grow without bound near a training point; and the option to keep to one class. With weights
    that do not add up to 1 the Shapley value of the weighted game is this result times a number for each point.

    Where the neighbours stay the same the result is constant under uniform weights, and changes with the weights alone under
    inverse ones; it jumps where the set of neighbours changes. What is lower is thus the sensitivity over radii where many
    neighbours are shared. With few neighbours of very different explanations the jumps can make the maximum larger than that
    of g: measure it with :func:`xai_fast.metrics.sensitivity`, and raise k.

    Examples
    --------
    >>> import torch
    >>> z = torch.tensor([[0.0], [1.0], [9.0]])
    >>> explain = lower_sensitivity(lambda x: 10 * x, z, k=2)
    >>> explain(torch.tensor([[0.25]]))
    tensor([[2.5000]])
    """
    reference = as_maps(neighbours, "neighbours")
    if weights not in WEIGHTINGS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTINGS)}, got {weights!r}")
    if distance not in DISTANCES:
        raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")
    if predict is not None and not callable(predict):
        raise TypeError(f"predict: expected a callable or None, got {type(predict).__name__}")
    k = check.check_count(k, "k", 1, len(reference))
    batch_size = check.check_count(batch_size, "batch_size")
    maps = as_maps(_explained(explanation, reference, batch_size), "explanation")
    if len(maps) != len(reference):
        raise ValueError(f"explanation: expected one map for each of the {len(reference)} neighbours, got {len(maps)}")
    check.check_same_device(maps, "explanation", reference.device)
    classes = None if predict is None else _predicted(predict, reference, batch_size)
    return SmoothedExplainer(reference, maps, k, weights, distance, predict, classes, batch_size)


@dataclass(frozen=True)
class SmoothedExplainer:
    """What :func:`lower_sensitivity` returns.

    Attributes
    ----------
    reference : Tensor, shape (R, ...)
    maps : Tensor, shape (R, ...)
        The explanations of the reference set.
    k : int
    weights, distance : str
    predict : callable or None
    classes : Tensor of int64, shape (R,), or None
    batch_size : int

    Examples
    --------
    >>> import torch
    >>> explain = lower_sensitivity(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]]), k=2, weights="uniform")
    >>> explain(torch.tensor([[0.3], [0.8]]))
    tensor([[2.],
            [2.]])
    """

    reference: Tensor
    maps: Tensor
    k: int
    weights: str
    distance: str
    predict: Callable[[Tensor], Tensor] | None = None
    classes: Tensor | None = None
    batch_size: int = 256

    def __call__(self, inputs: Tensor | np.ndarray) -> Tensor:
        """Maps (B, ...) of inputs (B, ...)."""
        x = as_maps(inputs, "inputs")
        wanted = (len(x), *self.reference.shape[1:])
        check.check_like(x, "inputs", wanted, self.reference)
        parts = [self._explain(x[i : i + self.batch_size]) for i in range(0, max(1, len(x)), self.batch_size)]
        return torch.cat(parts)

    def _explain(self, x: Tensor) -> Tensor:
        order, near = self._neighbours(x)
        weight = torch.isfinite(near).double()
        if self.weights == "inverse":
            # Divided by the least distance, so that 1 / rho neither overflows nor is 0 / 0 in a point of the set.
            least = near[:, :1]
            weight = torch.where(near == least, 1.0, least / near) * weight
        weight = weight / weight.sum(1, keepdim=True)
        flat = self.maps.flatten(1)
        total = flat.new_zeros(len(x), flat.shape[1], dtype=torch.float64)
        for j in range(self.k):
            # What has no weight must not bring in a NaN either.
            part = weight[:, j, None] * flat[order[:, j]].double()
            total += torch.where(weight[:, j, None] == 0, 0.0, part)
        return total.to(self.maps.dtype).view(len(x), *self.maps.shape[1:])

    def _neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and distances (B, k) of the nearest, by rising distance; of equal ones the first."""
        # Through a matrix product near points would have no accurate distance.
        far = torch.cdist(
            x.flatten(1).double(),
            self.reference.flatten(1).double(),
            p=DISTANCES[self.distance],
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        if self.predict is not None and self.classes is not None:
            own = _predicted(self.predict, x, self.batch_size)
            far = far.masked_fill(own[:, None] != self.classes, math.inf)
            if bool(far.isinf().all(1).any()):
                lonely = int(own[far.isinf().all(1)][0])
                raise ValueError(f"inputs: expected classes that the neighbours have, got class {lonely}, which none has")
        near, order = far.sort(dim=1, stable=True)
        return order[:, : self.k], near[:, : self.k]


def _explained(explanation: Any, reference: Tensor, batch_size: int) -> Any:
    """The maps of the reference set: those given, or what the callable returns."""
    if not callable(explanation):
        return explanation
    # Copies on both ways: the callable may write to what it gets, and return the same buffer at every call.
    parts = [as_maps(explanation(unshared(part)), "explanation").clone() for part in reference.split(batch_size)]
    return torch.cat(parts)


def _predicted(predict: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
    """Class numbers (B,)."""
    with torch.no_grad():
        found = torch.cat([torch.as_tensor(predict(unshared(part))).clone() for part in x.split(batch_size)])
    found = found.argmax(1) if found.dim() == 2 else found
    if found.shape != x.shape[:1] or found.is_floating_point():
        raise ValueError(f"predict: expected classes ({len(x)},) or scores ({len(x)}, C), got {check.shape_of(found)}")
    return found.to(device=x.device, dtype=torch.int64)
