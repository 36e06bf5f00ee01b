"""What both parts of the measures page share: the study with its curves, the clock of the explainers, random maps."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from xai_fast import metrics
from xai_fast.metrics.conciseness import conciseness
from xai_fast.metrics.study import Measure, Study, StudyContext, run_study

__all__ = [
    "ATTNLRP",
    "DELETION",
    "GRADIENT",
    "GRADIENT_INPUT",
    "INSERTION",
    "METHODS",
    "RANDOM",
    "ROLLOUT",
    "TICKS",
    "Effort",
    "Explain",
    "Judged",
    "ahead",
    "joined",
    "judge",
    "leads",
    "random_like",
]

ROLLOUT, GRADIENT, ATTNLRP = "Rollout", "Targeted, gradient", "AttnLRP"
GRADIENT_INPUT, RANDOM = "Gradient x input", "Random"
METHODS = (ROLLOUT, GRADIENT, ATTNLRP, GRADIENT_INPUT, RANDOM)
DELETION, INSERTION = "deletion", "insertion"
# Ticks of `judge` for each method.
TICKS = 3

Explain = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Effort:
    """How much the measures draw and how finely they step."""

    levels: tuple[float, ...]
    steps: int
    subsets: int
    neighbours: int
    batch: int = 32


@dataclass(frozen=True)
class Judged:
    """A study, the deletion and insertion curves behind its areas, and seconds per explanation.

    `curves[kind][method]` is (B, K) over `shares` (K,), from nothing to all.
    """

    study: Study
    curves: dict[str, dict[str, Tensor]]
    shares: Tensor
    seconds: dict[str, float]

    def row(self, measure: str, level: float | None = None) -> dict[str, tuple[float, float]]:
        """Value and standard error of every method.

        Examples
        --------
        >>> methods = {"input": lambda x, target: x, "inverse": lambda x, target: -x}
        >>> judged = judge(methods, lambda x: x, torch.eye(3) + 1, Effort((0.5,), 3, 4, 2), baseline=0.0)
        >>> judged.row("deletion_area")["input"][0] < judged.row("deletion_area")["inverse"][0]
        True
        """
        rows = (r for r in self._rows if r["measure"] == measure and (level is None or r["level"] == level))
        return {r["method"]: (r["value"], r["standard_error"]) for r in rows}

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return self.study.table(by_seed=False)

    @cached_property
    def _wide(self) -> list[dict[str, Any]]:
        return self.study.wide()

    def means(self, measure: str) -> dict[str, float]:
        """Mean over samples and levels, of every method."""
        return {row["method"]: row[measure] for row in self._wide}

    def standing(self, measure: str) -> dict[str, int]:
        """Place of every method by that measure, 1 for the best; equal values share a place."""
        sign = -1 if self.study.better[measure] == "higher" else 1
        values = {method: sign * value for method, value in self.means(measure).items()}
        return {method: 1 + sum(other < value for other in values.values()) for method, value in values.items()}


@dataclass
class _Timed:
    """An explainer with a clock."""

    explain: Explain
    seconds: float = 0.0
    examples: int = field(default=0)

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        start = time.perf_counter()
        maps = self.explain(inputs, target)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        self.seconds += time.perf_counter() - start
        self.examples += len(inputs)
        return maps


def judge(
    explainers: Mapping[str, Explain],
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    effort: Effort,
    *,
    baseline: Any,
    masks: Tensor | None = None,
    patch_size: int | None = None,
    features: Callable[[Tensor], Tensor] = lambda maps: maps,
    tick: Callable[[], object] = lambda: None,
) -> Judged:
    """All measures of the page for all methods, on the classes that the model predicts.

    Parameters
    ----------
    explainers : mapping of str to callable
        ``explain(inputs, target) -> maps``.
    forward, inputs, baseline, masks, patch_size
        As for :func:`xai_fast.metrics.study.run_study`.
    effort : Effort
    features : callable
        Maps to one value per feature, for the conciseness.
    tick : callable
        Called ``TICKS`` times for each method.

    Examples
    --------
    >>> methods = {"input": lambda x, target: x}
    >>> judged = judge(methods, lambda x: x, torch.eye(3) + 1, Effort((0.5,), 3, 4, 2), baseline=0.0)
    >>> judged.curves["deletion"]["input"].shape
    torch.Size([3, 4])
    """
    timed = {name: _Timed(explain) for name, explain in explainers.items()}
    curves: dict[str, dict[str, Tensor]] = {DELETION: {}, INSERTION: {}}
    grid = torch.linspace(0, 1, effort.steps + 1, dtype=torch.float64)

    def curve(kind: str, context: StudyContext) -> dict[str, Tensor]:
        function = metrics.deletion_curve if kind == DELETION else metrics.insertion_curve
        options = {**context.removal(), "steps": effort.steps}
        found = function(context.forward, context.inputs, context.attributions, context.target, **options)
        curves[kind][context.method] = _on_grid(found.x.cpu(), found.values.double().cpu(), grid)
        tick()
        return {f"{kind}_area": found.area}

    def concise(context: StudyContext) -> dict[str, Tensor]:
        found = conciseness(features(context.attributions))
        tick()
        return {"entropy": found.entropy, "gini": found.gini}

    measures: dict[str, Any] = {
        "fidelity": {},
        DELETION: Measure(partial(curve, DELETION), "lower"),
        INSERTION: Measure(partial(curve, INSERTION), "higher"),
        "faithfulness": {"n_samples": effort.subsets},
        **({} if masks is None else {"localization": {}}),
        "sensitivity": {"n_samples": effort.neighbours},
        "conciseness": Measure(concise, {"entropy": "lower", "gini": "higher"}),
    }
    study = run_study(
        timed, forward, inputs, measures=measures, baseline=baseline, sparsity=effort.levels, masks=masks,
        patch_size=patch_size, batch_size=effort.batch,
    )  # fmt: skip
    return Judged(study, curves, grid, {name: clock.seconds / clock.examples for name, clock in timed.items()})


def _on_grid(x: Tensor, values: Tensor, grid: Tensor) -> Tensor:
    """Curves (B, K) over x as (B, G) over the grid, by straight lines: short sentences have fewer steps."""
    right = torch.searchsorted(x, grid).clamp(1, len(x) - 1)
    weight = ((grid - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return torch.lerp(values[:, right - 1], values[:, right], weight)


def joined(parts: Sequence[Judged]) -> Judged:
    """Judgements of different samples by the same methods and measures, as one.

    Examples
    --------
    >>> methods = {"input": lambda x, target: x}
    >>> parts = [judge(methods, lambda x: x, torch.eye(n) + 1, Effort((0.5,), 2, 4, 2), baseline=0.0) for n in (3, 4)]
    >>> joined(parts).study.samples
    7
    """
    first = parts[0].study
    studies = [part.study for part in parts]
    values = {key: torch.cat([study.values[key] for study in studies]) for key in first.values}
    totals: dict[str, Any] = {
        name: {method: sum(getattr(study, name)[method] for study in studies) for method in first.methods}
        for name in ("seconds", "evaluations", "explanations")
    }
    notes = tuple(dict.fromkeys(note for study in studies for note in study.notes))
    study = replace(first, samples=sum(s.samples for s in studies), values=values, notes=notes, **totals)
    curves = {k: {m: torch.cat([p.curves[k][m] for p in parts]) for m in of} for k, of in parts[0].curves.items()}
    weights = {m: [s.explanations[m] for s in studies] for m in first.methods}
    seconds = {
        m: sum(w * part.seconds[m] for w, part in zip(weights[m], parts, strict=True)) / sum(weights[m]) for m in weights
    }
    return Judged(study, curves, parts[0].shares, seconds)


def ahead(judged: Judged, first: str, second: str, measure: str) -> bool:
    """Whether two methods are more than two standard errors of their difference apart, sample by sample.

    Examples
    --------
    >>> methods = {"input": lambda x, target: x, "twice": lambda x, target: 2 * x}
    >>> judged = judge(methods, lambda x: x, torch.eye(3) + 1, Effort((0.5,), 3, 4, 2), baseline=0.0)
    >>> ahead(judged, "input", "twice", "gini")
    False
    """
    apart = judged.study.per_sample(first, measure) - judged.study.per_sample(second, measure)
    apart = apart[apart.isfinite()]
    return len(apart) > 1 and bool(apart.mean().abs() > 2 * apart.std() / len(apart) ** 0.5)


def leads(judged: Judged, measure: str) -> bool:
    """Whether the best method by a measure is `ahead` of the second.

    Examples
    --------
    >>> methods = {"input": lambda x, target: x, "inverse": lambda x, target: -x}
    >>> judged = judge(methods, lambda x: x, torch.eye(3) + 1, Effort((0.5,), 3, 4, 2), baseline=0.0)
    >>> leads(judged, "deletion_area")
    True
    """
    first, second = judged.study.ranking()[measure][:2]
    return ahead(judged, first, second, measure)


def random_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform noise (B, *shape), drawn from the content of each sample: the same for the same sample, new for a neighbour.

    Examples
    --------
    >>> x = torch.tensor([[1.0], [1.0], [2.0]])
    >>> a, b, c = random_like(x, (4,))
    >>> torch.equal(a, b), torch.equal(a, c)
    (True, False)
    """
    seeds = [zlib.crc32(sample.detach().cpu().contiguous().numpy().tobytes()) for sample in x]
    return torch.stack([torch.rand(tuple(shape), generator=torch.Generator().manual_seed(s)) for s in seeds]).to(x.device)
