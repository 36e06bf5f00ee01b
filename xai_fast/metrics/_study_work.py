"""The work of a study: maps of a method with a seed, then one measure after the other, each kept as it is finished."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._fingerprint import fingerprint
from .._optional import optional_import
from ._forwards import Forwards
from ._study_explainers import Explain
from ._study_measures import ATTRIBUTIONS, StudyContext
from ._study_plan import Planned, WrongResult
from ._study_result import Study, with_characterization
from ._study_store import Folder, Part

__all__ = ["Counted", "Work", "no_explainer"]


class Counted:
    """The model, with a count of the examples that went through it."""

    def __init__(self, forward: Any) -> None:
        if not callable(forward):
            raise TypeError(f"forward: expected a callable, got {type(forward).__name__}")
        self._forward, self.examples = forward, 0

    def __call__(self, x: Tensor, *more: Any) -> Any:
        self.examples += len(x)
        return self._forward(x, *more)


def no_explainer(x: Tensor, target: Tensor | None = None) -> Tensor:
    raise ValueError("explain: expected a measure of one seed, got one across seeds")


@dataclass
class Work:
    """Parts of the study: maps of a method with a seed, then one measure after the other."""

    methods: dict[str, Any]
    seeds: tuple[int, ...]
    planned: list[Planned]
    base: StudyContext
    forwards: Forwards
    counted: Counted
    folder: Folder | None
    parts: dict[tuple[str, int | None, str], Part] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, int] = field(default_factory=dict)
    explanations: dict[str, int] = field(default_factory=dict)
    nan_samples: dict[str, int] = field(default_factory=dict)
    # The measure that each column belongs to.
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.columns = {column: p.name for p in self.planned for column in p.better if p.own is None}

    @property
    def total(self) -> int:
        across = sum(p.across_seeds for p in self.planned)
        return len(self.methods) * (len(self.seeds) * (1 + len(self.planned) - across) + across)

    def run(self, progress: bool) -> None:
        bar: Any = nullcontext()
        if progress:
            bar = optional_import("tqdm", "study").tqdm(total=self.total, unit="part")
        with bar as shown:
            for method in self.methods:
                self._run_method(method, shown)

    def _run_method(self, method: str, bar: Any) -> None:
        maps = _Maps(self, method)
        across = [p for p in self.planned if p.across_seeds]
        for seed in self.seeds:
            with _step(bar, f"{method}, seed {seed}, {ATTRIBUTIONS}"):
                maps.fingerprint(seed)
            for measure in self.planned:
                if not measure.across_seeds:
                    with _step(bar, f"{method}, seed {seed}, {measure.name}"):
                        self._measure(measure, method, (seed,), maps)
            if not across:
                maps.forget(seed)
        for measure in across:
            with _step(bar, f"{method}, {measure.name}"):
                self._measure(measure, method, self.seeds, maps)

    def _measure(self, measure: Planned, method: str, seeds: tuple[int, ...], maps: _Maps) -> None:
        seed = None if measure.across_seeds else seeds[0]
        key = (method, list(seeds) if measure.across_seeds else seed, measure.name)
        prints = [maps.fingerprint(s) for s in seeds]
        part = None if self.folder is None else self.folder.read(*key)
        if part is None:
            part = self._known(measure, method, prints) or self._computed(measure, method, seed, seeds, maps)
            if part is None:
                return
            part.facts[ATTRIBUTIONS] = prints
            if self.folder is not None:
                self.folder.write(part, *key)
        elif part.facts[ATTRIBUTIONS] != prints:
            path = self.folder.path if self.folder else ""
            raise ValueError(
                f"explainers[{method!r}]: expected the attributions that {measure.name!r} in {str(path)!r} was computed "
                f"of, got others"
            )
        self._check_columns(measure, part)
        self.parts[method, seed, measure.name] = part
        self.add(method, part.facts)

    def _known(self, measure: Planned, method: str, prints: list[str]) -> Part | None:
        """What an earlier seed gave for the same maps: explainers that draw nothing are measured once."""
        if not measure.of_maps_alone:
            return None
        for (of, _, name), part in self.parts.items():
            if (of, name) == (method, measure.name) and part.facts[ATTRIBUTIONS] == prints:
                return Part(part.tensors, {**part.facts, "seconds": 0.0, "evaluations": 0, "explanations": 0})
        return None

    def _computed(self, measure: Planned, method: str, seed: int | None, seeds: tuple[int, ...], maps: _Maps) -> Part | None:
        """None, and a note, where the measure fails."""
        by_seed = {s: maps.of(s) for s in seeds}
        explain = maps.explainer(seeds[0]) if seed is not None else no_explainer
        context = replace(
            self.base, method=method, seed=seed, attributions=by_seed[seeds[0]], by_seed=by_seed, explain=explain
        )
        with _Meter(self.counted, explain, self.base.inputs.device) as meter:
            try:
                values = measure(context)
            except WrongResult as wrong:
                raise wrong.args[0] from None
            except (MemoryError, torch.OutOfMemoryError):
                raise  # less at once may do: nothing that is wrong with the method
            except Exception as error:
                self._note(method, seed, measure.name, error)
                return None
        return Part(values, meter.facts())

    def _note(self, method: str, seed: int | None, measure: str, error: Exception) -> None:
        where = "" if seed is None else f", seed {seed}"
        text = (str(error).splitlines() or [""])[0]
        note = f"{method}{where}: {measure} failed, {type(error).__name__}: {text}"
        self.notes.append(note)
        warnings.warn(note, stacklevel=7)

    def note_nan(self, method: str, seed: int, samples: int) -> None:
        """Say so where maps hold NaN: the measures give these samples NaN."""
        if samples:
            self.nan_samples[method] = max(samples, self.nan_samples.get(method, 0))
            total = len(self.base.inputs)
            note = f"{method}, seed {seed}: NaN in the maps of {samples} of {total} samples, whose scores are NaN"
            self.notes.append(note)
            warnings.warn(note, stacklevel=6)

    def _check_columns(self, measure: Planned, part: Part) -> None:
        for column in part.tensors:
            owner = self.columns.setdefault(column, measure.name)
            if owner != measure.name:
                raise ValueError(f"measures[{measure.name!r}]: expected names of its own, got {column!r} of {owner!r}")

    def add(self, method: str, facts: dict[str, Any]) -> None:
        """Add what a part took to the totals of its method."""
        for name in ("seconds", "evaluations", "explanations"):
            totals = getattr(self, name)
            totals[method] = totals.get(method, 0) + facts[name]

    # ---- the result ---------------------------------------------------------------------------------------------------

    def study(self) -> Study:
        better: dict[str, str | None] = {}
        values: dict[tuple[str, int | None, str], Tensor] = {}
        for measure in self.planned:
            own = {name: d for name, d in self._directions(measure).items() if name not in better}
            better |= own
            seeds: tuple[int | None, ...] = (None,) if measure.across_seeds else self.seeds
            for column in own:
                blank = self._blank(measure, column)
                for method in self.methods:
                    for seed in seeds:
                        part = self.parts.get((method, seed, measure.name))
                        values[method, seed, column] = blank if part is None else part.tensors.get(column, blank)
        return Study(
            tuple(self.methods),
            self.seeds,
            len(self.base.inputs),
            self.base.sparsity,
            with_characterization(better),
            values,
            tuple(self.notes),
            self.seconds,
            self.evaluations,
            self.explanations,
            self.nan_samples,
        )

    def _directions(self, measure: Planned) -> dict[str, str | None]:
        if measure.own is None:
            return measure.better
        found = [column for column, owner in self.columns.items() if owner == measure.name]
        return {column: measure.own.direction(column) for column in found}

    def _blank(self, measure: Planned, column: str) -> Tensor:
        """NaN in the shape of the column."""
        like = [p.tensors[column] for k, p in self.parts.items() if k[2] == measure.name and column in p.tensors]
        size = len(self.base.inputs)
        shape: tuple[int, ...] = (size, len(self.base.sparsity)) if measure.by_level else (size,)
        return torch.full(tuple(like[0].shape) if like else shape, torch.nan, dtype=torch.float64)


@contextmanager
def _step(bar: Any, what: str) -> Iterator[None]:
    if bar is not None:
        bar.set_description(what)
    yield
    if bar is not None:
        bar.update()


class _Meter:
    """Seconds, examples and explanations of a piece of work."""

    def __init__(self, counted: Counted, explain: Any, device: torch.device) -> None:
        self._counted, self._explain, self._device = counted, explain, device

    def _now(self) -> tuple[float, int, int]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), self._counted.examples, getattr(self._explain, "explained", 0)

    def __enter__(self) -> _Meter:
        self._start = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        end = self._now()
        self._used = [b - a for a, b in zip(self._start, end, strict=True)]

    def facts(self) -> dict[str, Any]:
        return dict(zip(("seconds", "evaluations", "explanations"), self._used, strict=True))


class _Maps:
    """The attributions of a method: made or read when they are needed, kept until they are not."""

    def __init__(self, work: Work, method: str) -> None:
        self._work, self._method = work, method
        self._maps: dict[int, Tensor] = {}
        self._prints: dict[int, str] = {}
        self._explainers: dict[int, Explain] = {}

    def explainer(self, seed: int) -> Explain:
        if seed not in self._explainers:
            base = self._work.base
            self._explainers[seed] = Explain(
                self._work.methods[self._method], self._method, seed, base.additional_forward_args, len(base.inputs)
            )
        return self._explainers[seed]

    def forget(self, seed: int) -> None:
        self._maps.pop(seed, None)
        self._explainers.pop(seed, None)

    def of(self, seed: int) -> Tensor:
        if seed not in self._maps:
            folder = self._work.folder
            part = None if folder is None else folder.read(self._method, seed, ATTRIBUTIONS)
            if part is None:
                part = self._made(seed)
            self._maps[seed] = part.tensors[ATTRIBUTIONS].to(self._work.base.inputs.device)
        return self._maps[seed]

    def fingerprint(self, seed: int) -> str:
        """Of the maps; read from the disk without them."""
        if seed not in self._prints:
            folder = self._work.folder
            facts = None if folder is None else folder.facts(self._method, seed, ATTRIBUTIONS)
            if facts is None:
                part = self._made(seed)
                self._maps[seed], facts = part.tensors[ATTRIBUTIONS], part.facts
            self._work.add(self._method, facts)
            self._work.note_nan(self._method, seed, facts.get("nan_samples", 0))
            self._prints[seed] = facts["fingerprint"]
        return self._prints[seed]

    def _made(self, seed: int) -> Part:
        work, base = self._work, self._work.base
        start = time.perf_counter()
        explain = self.explainer(seed)  # making it is part of its time
        with _Meter(work.counted, explain, base.inputs.device) as meter:
            chunks = work.forwards.chunks(len(base.inputs))
            targets = base.target
            rows = ((base.inputs[p], None if targets is None else targets[p], p) for p in chunks)
            # Copies: an explainer may return the same buffer at every call.
            maps = torch.cat([explain.of_samples(*row).clone() for row in rows])
        facts = {**meter.facts(), "seconds": time.perf_counter() - start, "fingerprint": fingerprint([maps])}
        facts["nan_samples"] = int(maps.flatten(1).isnan().any(1).sum())
        part = Part({ATTRIBUTIONS: maps}, facts)
        if work.folder is not None:
            work.folder.write(part, self._method, seed, ATTRIBUTIONS)
        return part
