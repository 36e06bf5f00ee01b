"""Which measures a study takes, with which options; a check of both before the work begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._study_measures import ATTRIBUTIONS, BUILT_IN, NEEDS, Measure, StudyContext, Values, fidelity_columns

__all__ = ["Planned", "WrongResult", "check_options", "plan_measures"]


@dataclass(frozen=True)
class Planned:
    """A measure with its options."""

    name: str
    function: Callable[[StudyContext], Mapping[str, Tensor] | Tensor]
    better: dict[str, str | None]
    own: Measure | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def across_seeds(self) -> bool:
        return self.name == "stability" and self.own is None

    @property
    def of_maps_alone(self) -> bool:
        """Whether the same maps give the same values: no explainer is asked again, no seed is read."""
        return self.own is None and self.name != "sensitivity"

    @property
    def by_level(self) -> bool:
        """Whether its values have levels of sparsity, where that is known beforehand."""
        return self.name == "fidelity" and self.own is None

    def __call__(self, context: StudyContext) -> Values:
        """Its values in float64 on the CPU, checked."""
        found = self.function(context if self.own is None else context.unshared())
        found = {self.name: found} if isinstance(found, Tensor) else found
        if not isinstance(found, Mapping):
            got = type(found).__name__
            raise WrongResult(TypeError(f"measures[{self.name!r}]: expected a dict of tensors, got {got}"))
        return {name: self._checked(name, value, context) for name, value in found.items()}

    def _checked(self, name: str, value: Any, c: StudyContext) -> Tensor:
        batch, levels = len(c.inputs), len(c.sparsity)
        if not isinstance(value, Tensor):
            got = type(value).__name__
            raise WrongResult(TypeError(f"measures[{self.name!r}]: expected tensors, got {got} for {name!r}"))
        if tuple(value.shape) not in ((batch,), (batch, levels)):
            wanted, shape = f"shape ({batch},) or ({batch}, {levels})", tuple(value.shape)
            raise WrongResult(ValueError(f"measures[{self.name!r}]: expected {wanted}, got {shape} for {name!r}"))
        return value.detach().to("cpu", torch.float64, copy=True)


class WrongResult(Exception):  # noqa: N818  the error is what it carries
    """A measure that ran, but did not give what it must: no method can do better, so the study ends."""


def plan_measures(measures: Any, context: StudyContext, seeds: int) -> list[Planned]:
    """The measures that were asked for; errors name a measure that is unknown or that this study cannot have."""
    has = {
        "classes": context.outputs.dim() == 2,
        "floating": context.inputs.is_floating_point(),
        "masks": context.masks is not None,
        "seeds": seeds > 1,
    }
    if measures is None:
        names = [name for name, m in BUILT_IN.items() if m.default and all(has[need] for need in m.needs)]
        return [_built_in(name, {}, context, has) for name in names]
    planned = [_planned(name, value, context, has) for name, value in _named(measures)]
    twice = [p.name for i, p in enumerate(planned) if p.name in {q.name for q in planned[:i]}]
    if twice or not planned:
        raise ValueError(f"measures: expected at least one, each once, got {repr(twice[0]) + ' twice' if twice else 'none'}")
    return planned


def _named(measures: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(measures, Mapping):
        return list(measures.items())
    if isinstance(measures, str) or not isinstance(measures, Iterable):
        raise TypeError(f"measures: expected names, a dict of name to options, or callables, got {measures!r}")
    return [(m, None) if isinstance(m, str) else (_name_of(m), m) for m in measures]


def _name_of(value: Any) -> str:
    function = value.function if isinstance(value, Measure) else value
    return getattr(function, "__name__", type(function).__name__)


def _planned(name: Any, value: Any, context: StudyContext, has: dict[str, bool]) -> Planned:
    if not isinstance(name, str):
        raise TypeError(f"measures: expected names, got {type(name).__name__}")
    if name == ATTRIBUTIONS:
        raise ValueError(f"measures: expected another name than {name!r}, which the maps have")
    if isinstance(value, Measure) or callable(value):
        own = value if isinstance(value, Measure) else Measure(value)
        better = dict(own.better) if isinstance(own.better, Mapping) else {}
        return Planned(name, own.function, better, own)
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"measures[{name!r}]: expected a dict of options or a callable, got {type(value).__name__}")
    return _built_in(name, dict(value or {}), context, has)


def _built_in(name: str, options: dict[str, Any], context: StudyContext, has: dict[str, bool]) -> Planned:
    if name not in BUILT_IN:
        raise ValueError(f"measures: expected one of {', '.join(BUILT_IN)} or a callable, got {name!r}")
    measure = BUILT_IN[name]
    for option in options:
        if option not in measure.options:
            wanted = ", ".join(measure.options)
            raise TypeError(f"measures[{name!r}]: expected options among {wanted}, got {option!r}")
    for need in measure.needs:
        if not has[need]:
            argument, wanted = NEEDS[need]
            raise ValueError(f"{argument}: expected {wanted} for the measure {name!r}, got none such")
    better = fidelity_columns(context) if name == "fidelity" else dict(measure.better)
    return Planned(name, partial(measure.run, **options), better, None, options)


# ---- options are tried before the work begins ---------------------------------------------------------------------


def check_options(planned: list[Planned], context: StudyContext) -> None:
    """Run the measures of this package on one sample with stand-ins for model and maps: bad options are refused now."""
    trial = _trial(context)
    for measure in planned:
        if measure.own is not None:
            continue
        function: Callable[..., Any] = measure.function
        c = trial
        if callable(measure.options.get("distance")):
            # A distance of one's own may count on the shape of real maps.
            function = partial(function, distance="l2", relative=False)
        if "baseline" in measure.options:
            function = partial(function, baseline=_of_sample(measure.options["baseline"], context))
        if measure.name == "localization":
            assert context.masks is not None
            c = replace(trial, attributions=_ramp(context.masks.shape, trial.attributions.dtype), masks=context.masks.cpu())
        try:
            function(c)
        except (TypeError, ValueError) as error:
            raise type(error)(f"measures[{measure.name!r}]: {error}") from None


def _trial(c: StudyContext) -> StudyContext:
    mask = c.feature_mask
    if isinstance(mask, Tensor) and mask.dim() and mask.shape[0] == len(c.inputs) > 1:
        # No sample needs to have all the groups: as many as there are go round in one.
        groups, one = mask.unique(), mask[:1]
        mask = groups[torch.arange(one.numel(), device=mask.device) % len(groups)].view(one.shape)
    inputs = c.inputs[:1].detach()
    shape = (1, 1, *inputs.shape[2:]) if c.patch_size is not None and inputs.dim() == 4 else inputs.shape
    maps = _ramp(shape, inputs.dtype if inputs.is_floating_point() else torch.float32).to(inputs.device)
    outputs = c.outputs[:1]
    return replace(
        c,
        attributions=maps,
        by_seed={0: maps, 1: maps + 1},
        explain=lambda x, target=None: maps.expand(len(x), *maps.shape[1:]),
        forward=lambda x, *_: outputs[:1].expand(len(x), *outputs.shape[1:]) * 1.0,
        inputs=inputs,
        labels=None if c.labels is None else c.labels[:1],
        target=None if c.target is None else c.target[:1],
        outputs=outputs,
        baseline=_of_sample(c.baseline, c),
        feature_mask=mask,
        additional_forward_args=(),
    )


def _of_sample(baseline: Any, c: StudyContext) -> Any:
    """The first sample's own baseline: tensors with one for each."""
    own = isinstance(baseline, Tensor) and baseline.dim() == c.inputs.dim() and baseline.shape[0] == len(c.inputs)
    return baseline[:1] if own else baseline


def _ramp(shape: Any, dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape)
    return torch.linspace(0, 1, size.numel(), dtype=torch.float64).view(size).to(dtype)
