"""What a study found: the value of every measure for every method, seed and sample, and tables and pictures of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._optional import optional_import
from .characterization import characterization_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Study", "with_characterization"]

PLUS, MINUS, BOTH = "fid_plus_", "fid_minus_", "characterization_"
# Worst and best value of measures that have them, for the radar.
LIMITS = {
    "fid_plus": (0.0, 1.0),
    "fid_minus": (1.0, 0.0),
    "characterization": (0.0, 1.0),
    "faithfulness_correlation": (0.0, 1.0),
    "sparsity": (0.0, 1.0),
    "gini": (0.0, 1.0),
    "pointing_game": (0.0, 1.0),
    "relevance_mass": (0.0, 1.0),
    "relevance_rank": (0.0, 1.0),
    "stability_cosine": (0.0, 1.0),
    "stability_spearman": (0.0, 1.0),
    "stability_jaccard": (0.0, 1.0),
}
# What a picture shows where nothing is asked: one of each family.
FAVOURITES = (
    "characterization_model_probability",
    "deletion_area",
    "insertion_area",
    "faithfulness_correlation",
    "sensitivity_mean",
    "gini",
    "relevance_mass",
    "stability_spearman",
)
LEVELLED = (PLUS + "model_probability", MINUS + "model_probability", BOTH + "model_probability")


@dataclass(frozen=True, eq=False)
class Study:
    """What :func:`run_study` found.

    Attributes
    ----------
    methods, seeds : tuple
    samples : int
        B.
    levels : tuple of float
        Levels of sparsity, K.
    better : dict of str to "higher", "lower" or None
        Every measure, and the direction that is better; None: it is not ranked.
    values : dict of (method, seed, measure) to Tensor
        (B,), or (B, K) for measures by sparsity; float64 on the CPU. The seed is None for measures across seeds. The
        characterization score is of a whole batch and is made of fid+ and fid- where it is asked for.
    notes : tuple of str
        What could not be measured, and why; its values are NaN.
    seconds : dict of str to float
        Time of each method with all of its measures.
    evaluations, explanations : dict of str to int
        Examples that went through the model, and through the explainer, for each method.
    nan_samples : dict of str to int
        Samples with a NaN in the map, of the seed with the most, for the methods that have such; their scores are NaN.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.metrics.study import run_study
    >>> x = torch.eye(3)
    >>> methods = {"input": lambda inputs: inputs, "inverse": lambda inputs: -inputs}
    >>> study = run_study(methods, lambda x: x, x, measures=["deletion", "conciseness"])
    >>> study.ranking()["deletion_area"]
    ['input', 'inverse']
    >>> study.wide()[0]["size"], len(study.table())
    (1.0, 10)
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: int
    levels: tuple[float, ...]
    better: dict[str, str | None]
    values: dict[tuple[str, int | None, str], Tensor] = field(repr=False)
    notes: tuple[str, ...]
    seconds: dict[str, float]
    evaluations: dict[str, int]
    explanations: dict[str, int]
    nan_samples: dict[str, int] = field(default_factory=dict)

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of all measures."""
        return tuple(self.better)

    def per_sample(self, method: str, measure: str, seed: int | None = None) -> Tensor:
        """The values of the samples, (B,) or (B, K); the mean over the seeds unless one is named.

        Raises
        ------
        ValueError
            An unknown method, measure or seed; the characterization score, which a sample does not have.
        """
        self._check(method, measure)
        if self._is_characterization(measure):
            raise ValueError(f"measure: expected one that samples have, got {measure!r}, which is of a whole batch")
        return self._stacked(method, measure, seed).nanmean(0)

    def table(self, by_seed: bool = True) -> list[dict[str, Any]]:
        """One row for every method, seed, measure and level of sparsity, ready for a DataFrame.

        Parameters
        ----------
        by_seed : bool
            False: the seeds are averaged for every sample first, so that samples, not runs, are what the standard error
            counts.

        Returns
        -------
        list of dict
            method, seed (None: across seeds), measure, level of sparsity (None: without), value (the mean over the samples
            where it is a number), standard_error (by the jackknife for the characterization score; NaN below two samples), n
            (these samples).
        """
        return [row for method in self.methods for name in self.better for row in self._rows(method, name, by_seed)]

    def wide(self) -> list[dict[str, Any]]:
        """One row for every method: the mean of each measure over samples, seeds and levels; seconds and evaluations."""
        return [
            {
                "method": method,
                **{name: self._mean(method, name) for name in self.better},
                "seconds": self.seconds[method],
                "evaluations": self.evaluations[method],
            }
            for method in self.methods
        ]

    def ranking(self) -> dict[str, list[str]]:
        """For every measure with a direction: the methods, best first, by their mean; without those whose value is NaN.

        Methods with NaN in their maps come after all others: their means are over fewer samples.
        """
        found = {}
        for name, better in self.better.items():
            if better is None:
                continue
            means = {method: self._mean(method, name) for method in self.methods}
            ordered = [method for method in self.methods if not math.isnan(means[method])]
            sign = -1 if better == "higher" else 1
            found[name] = sorted(ordered, key=lambda m: (m in self.nan_samples, sign * means[m]))
        return found

    def to_dataframe(self, by_seed: bool = True) -> Any:
        """:meth:`table` as a pandas DataFrame (needs the extra ``xai_fast[study]``)."""
        return optional_import("pandas", "study").DataFrame(self.table(by_seed))

    def plot_fidelity(self, kind: str = "model", form: str = "probability", **options: Any) -> Figure:
        """fid+ against fid-, a line through the levels for each method: see :func:`xai_fast.viz.plot_fidelity`."""
        from ..viz import measures

        names = [f"{start}{kind}_{form}" for start in (MINUS, PLUS)]
        order = sorted(range(len(self.levels)), key=lambda k: self.levels[k])
        points = {}
        for method in self.methods:
            minus, plus = (self._by_level(method, name)[0] for name in names)
            points[method] = [(minus[k], plus[k]) for k in order]
        options = {"levels": [self.levels[k] for k in order], "title": f"Fidelity to the {kind}, by {form}", **options}
        return measures.plot_fidelity(points, **options)

    def plot_by_sparsity(self, measures: Sequence[str] | None = None, **options: Any) -> Figure:
        """Measures by sparsity, with bands of a standard error: see :func:`xai_fast.viz.plot_by_sparsity`."""
        from ..viz import measures as pictures

        names = self._chosen(measures, LEVELLED, by_level=True)
        curves = {name: {m: (self.levels, *self._by_level(m, name)) for m in self.methods} for name in names}
        return pictures.plot_by_sparsity(curves, **{"better": self.better, **options})

    def plot_bars(self, measures: Sequence[str] | None = None, **options: Any) -> Figure:
        """A group of bars with standard errors for each measure: see :func:`xai_fast.viz.plot_bars`."""
        from ..viz import measures as pictures

        names = self._chosen(measures, FAVOURITES)
        bars = {m: {name: self._estimate_all(m, name) for name in names} for m in self.methods}
        return pictures.plot_bars(bars, **{"better": self.better, **options})

    def plot_radar(self, measures: Sequence[str] | None = None, **options: Any) -> Figure:
        """All measures of a method as a polygon; outward is better: see :func:`xai_fast.viz.plot_radar`."""
        from ..viz import measures as pictures

        names = self._chosen(measures, FAVOURITES, least=3)
        values = {m: {name: self._mean(m, name) for name in names} for m in self.methods}
        limits = {name: LIMITS[start] for name in names if (start := _family(name)) in LIMITS}
        return pictures.plot_radar(values, **{"better": self.better, "limits": limits, **options})

    # ---- estimates ----------------------------------------------------------------------------------------------------

    def _check(self, method: str, measure: str) -> None:
        if method not in self.methods:
            raise ValueError(f"method: expected one of {', '.join(self.methods)}, got {method!r}")
        if measure not in self.better:
            raise ValueError(f"measure: expected one of {', '.join(self.better)}, got {measure!r}")

    def _is_characterization(self, measure: str) -> bool:
        return measure.startswith(BOTH) and PLUS + measure.removeprefix(BOTH) in self.better

    def _seeds_of(self, method: str, measure: str) -> tuple[int | None, ...]:
        name = PLUS + measure.removeprefix(BOTH) if self._is_characterization(measure) else measure
        return (None,) if (method, None, name) in self.values else self.seeds

    def _stacked(self, method: str, measure: str, seed: int | None = None) -> Tensor:
        """(S, B) or (S, B, K)."""
        seeds = self._seeds_of(method, measure)
        if seed is not None:
            if seed not in seeds:
                raise ValueError(f"seed: expected one of {seeds}, got {seed!r}")
            seeds = (seed,)
        return torch.stack([self.values[method, s, measure] for s in seeds])

    def _estimate(self, method: str, measure: str, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Value, standard error and number of samples, of shape () or (K,)."""
        if not self._is_characterization(measure):
            return _moments(self._stacked(method, measure, seed).nanmean(0))
        end = measure.removeprefix(BOTH)
        plus, minus = (self._stacked(method, start + end, seed) for start in (PLUS, MINUS))
        return _characterization(plus, minus)

    def _rows(self, method: str, measure: str, by_seed: bool) -> list[dict[str, Any]]:
        rows = []
        for seed in self._seeds_of(method, measure) if by_seed else (None,):
            value, error, n = self._estimate(method, measure, seed)
            levels: Sequence[float | None] = self.levels if value.dim() else (None,)
            parts = zip(levels, *(x.reshape(-1).tolist() for x in (value, error, n)), strict=True)
            start = {"method": method, "seed": seed, "measure": measure}
            rows += [{**start, "level": k, "value": v, "standard_error": e, "n": count} for k, v, e, count in parts]
        return rows

    def _mean(self, method: str, measure: str) -> float:
        return float(self._estimate(method, measure)[0].nanmean())

    def _estimate_all(self, method: str, measure: str) -> tuple[float, float]:
        """Value and standard error over levels as well: levels of one sample are averaged first."""
        if self._is_characterization(measure):
            end = measure.removeprefix(BOTH)
            plus, minus = (self._stacked(method, start + end) for start in (PLUS, MINUS))
            value, error, _ = _characterization(plus, minus, over_levels=True)
        else:
            each = self._stacked(method, measure).nanmean(0)
            value, error, _ = _moments(each.nanmean(1) if each.dim() == 2 else each)
        return float(value), float(error)

    def _by_level(self, method: str, measure: str) -> tuple[list[float], list[float]]:
        self._check(method, measure)
        value, error, _ = self._estimate(method, measure)
        return value.tolist(), error.tolist()

    def _chosen(self, measures: Any, favourites: Sequence[str], by_level: bool = False, least: int = 1) -> list[str]:
        if measures is None:
            names = [name for name in favourites if name in self.better]
            if len(names) < least:
                names = [name for name, better in self.better.items() if better or by_level] or list(self.better)
        else:
            names = [measures] if isinstance(measures, str) else list(measures)
        for name in names:
            self._check(self.methods[0], name)
        if by_level:
            flat = [n for n in names if self._estimate(self.methods[0], n)[0].dim() == 0]
            names = names if measures is not None else [n for n in names if n not in flat]
            if not names or (measures is not None and flat):
                raise ValueError(f"measures: expected measures by sparsity, got {flat[0] if flat else 'none'!r}")
        return names


def with_characterization(better: Mapping[str, str | None]) -> dict[str, str | None]:
    """The characterization score behind every pair of fid+ and fid-."""
    found: dict[str, str | None] = {}
    for name, direction in better.items():
        found[name] = direction
        if name.startswith(MINUS) and PLUS + name.removeprefix(MINUS) in better:
            found[BOTH + name.removeprefix(MINUS)] = "higher"
    return found


def _family(measure: str) -> str:
    """The name without the kind and the form of a fidelity."""
    for start in (PLUS, MINUS, BOTH):
        if measure.startswith(start):
            return start.removesuffix("_")
    return measure


def _moments(each: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard error and number of the values (B, ...) that are numbers."""
    n = (~each.isnan()).sum(0)
    mean = each.nanmean(0)
    squares = (each - mean).square().nansum(0)
    return mean, torch.where(n > 1, (squares / (n - 1) / n).sqrt(), math.nan), n


def _characterization(plus: Tensor, minus: Tensor, over_levels: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Of fid+ and fid- (S, B, K): the score of the means, averaged over seeds; its error by the jackknife over samples."""

    def score(p: Tensor, m: Tensor) -> Tensor:
        found = characterization_score(p.clamp(0, 1), m.clamp(0, 1)).nanmean(0)  # over seeds
        return found.nanmean(-1) if over_levels else found

    known = ~(plus.isnan() | minus.isnan())
    n = known.sum(1)  # (S, K)
    plus, minus = (x.masked_fill(~known, 0) for x in (plus, minus))
    totals = plus.sum(1), minus.sum(1)
    value = score(totals[0] / n, totals[1] / n)
    rest = (n[:, None] - known.long()).double()  # (S, B, K): samples without one
    without = score((totals[0][:, None] - plus) / rest, (totals[1][:, None] - minus) / rest)  # (B, K) or (B,)
    count = known.any(0).sum(0)
    if over_levels:
        count = count.amax(-1)
    error = ((count - 1) / count * (without - without.nanmean(0)).square().nansum(0)).sqrt()
    return value, torch.where(count > 1, error, math.nan), count
