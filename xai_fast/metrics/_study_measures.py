"""The measures of a study: what each computes for a method, which way is better, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .._copies import unshared
from ._baselines import Baseline
from .conciseness import conciseness
from .faithfulness import faithfulness_correlation, infidelity
from .fidelity import FORMS, fidelity
from .localization import pointing_game, relevance_mass, relevance_rank
from .removal_curves import deletion_curve, insertion_curve
from .sensitivity import sensitivity
from .stability import MEASURES as STABILITY
from .stability import seed_stability

__all__ = ["ATTRIBUTIONS", "BUILT_IN", "NEEDS", "BuiltIn", "Measure", "StudyContext", "Values", "fidelity_columns"]

Better = Mapping[str, str | None]
Values = dict[str, Tensor]
# The part that the maps themselves are.
ATTRIBUTIONS = "attributions"
DIRECTIONS = ("higher", "lower", None)

# Neighbours of a sample: a full sensitivity of every method and seed would cost more than all else together.
NEIGHBOURS = 10
# The default radius of sensitivity as a share of the median norm of the inputs.
RADIUS_SHARE = 0.05


@dataclass(frozen=True)
class StudyContext:
    """What a measure of :func:`run_study` can work with: one method with one seed, on all samples.

    A measure of one's own gets copies of all tensors, which it may overwrite.

    Attributes
    ----------
    method : str
    seed : int or None
        None for measures across seeds.
    attributions : Tensor, shape (B, ...)
        Of that seed; of the first one for measures across seeds.
    by_seed : mapping of int to Tensor
        Of all seeds, for measures across seeds; else of that seed alone.
    explain : callable
        ``explain(x, target=None) -> maps`` for any examples; seeded anew at every call.
    forward : callable
        The model; examples that go through it are counted.
    inputs : Tensor, shape (B, ...)
    labels, target : Tensor, shape (B,), or None
        True classes; classes that are explained (None for a model with one output).
    outputs : Tensor
        Of the model on the inputs.
    masks : Tensor or None
    sparsity : tuple of float
    baseline, feature_mask, patch_size, additional_forward_args, batch_size, memory_budget
        As :func:`run_study` was given them.
    study_seed : int

    Examples
    --------
    >>> import torch
    >>> from xai_fast.metrics.study import StudyContext, run_study
    >>> def largest(context: StudyContext):
    ...     return {"largest": context.attributions.flatten(1).amax(1)}
    >>> x = torch.eye(3)
    >>> study = run_study({"input": lambda inputs: 2 * inputs}, lambda x: x, x, measures={"largest": largest})
    >>> study.per_sample("input", "largest")
    tensor([2., 2., 2.], dtype=torch.float64)
    """

    method: str
    seed: int | None
    attributions: Tensor
    by_seed: Mapping[int, Tensor]
    explain: Callable[..., Tensor]
    forward: Callable[..., Any]
    inputs: Tensor
    labels: Tensor | None
    target: Tensor | None
    outputs: Tensor
    masks: Tensor | None
    sparsity: tuple[float, ...]
    baseline: Baseline
    feature_mask: Tensor | None
    patch_size: int | None
    additional_forward_args: tuple[Any, ...]
    batch_size: int | None
    memory_budget: int
    study_seed: int

    def unshared(self) -> StudyContext:
        """The same with copies of its tensors."""
        return replace(self, **{f.name: unshared(getattr(self, f.name)) for f in fields(self)})

    def generator(self) -> torch.Generator:
        """The study's randomness from its start: the same for every method, seed and measure, so that methods are compared
        on the same subsets and perturbations."""
        return torch.Generator().manual_seed(self.study_seed)

    def removal(self) -> dict[str, Any]:
        """The arguments that all measures share that remove features."""
        return {
            "baseline": self.baseline,
            "feature_mask": self.feature_mask,
            "patch_size": self.patch_size,
            **self.model(),
        }

    def model(self) -> dict[str, Any]:
        """The arguments of measures that run the model."""
        return {
            "additional_forward_args": self.additional_forward_args,
            "batch_size": self.batch_size,
            "memory_budget": self.memory_budget,
            "generator": self.generator(),
        }


@dataclass(frozen=True)
class Measure:
    """A measure of one's own with the direction that is better, for :func:`run_study`.

    Attributes
    ----------
    function : callable
        ``function(context: StudyContext) -> {name: values}``, values of shape (B,), or (B, K) for the K levels of sparsity.
    better : {"higher", "lower", None} or mapping of str to these
        For all of its values, or by name. None: they are not ranked.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.metrics.study import Measure, run_study
    >>> norm = Measure(lambda context: {"norm": context.attributions.flatten(1).norm(dim=1)}, better="lower")
    >>> x = torch.eye(2)
    >>> methods = {"once": lambda inputs: inputs, "twice": lambda inputs: 2 * inputs}
    >>> run_study(methods, lambda x: x, x, measures={"norm": norm}).ranking()
    {'norm': ['once', 'twice']}
    """

    function: Callable[[StudyContext], Mapping[str, Tensor]]
    better: Better | str | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function: expected a callable, got {type(self.function).__name__}")
        each = self.better.values() if isinstance(self.better, Mapping) else [self.better]
        for direction in each:
            if direction not in DIRECTIONS:
                raise ValueError(f"better: expected 'higher', 'lower' or None, got {direction!r}")

    def direction(self, name: str) -> str | None:
        return self.better.get(name) if isinstance(self.better, Mapping) else self.better


# ---- what this package measures -----------------------------------------------------------------------------------


def _fidelity(c: StudyContext, **options: Any) -> Values:
    arguments = {**c.removal(), "sparsity": list(c.sparsity), **options}
    found = fidelity(c.forward, c.inputs, c.attributions, c.labels, **arguments)
    values: Values = {}
    for kind in _kinds(c):
        for form in FORMS:
            plus, minus = found.per_sample(kind, form)
            values |= {f"fid_plus_{kind}_{form}": plus, f"fid_minus_{kind}_{form}": minus}
    return values


def _kinds(c: StudyContext) -> tuple[str, ...]:
    return ("model",) if c.labels is None else ("model", "phenomenon")


def fidelity_columns(c: StudyContext) -> dict[str, str | None]:
    ends = [f"{kind}_{form}" for kind in _kinds(c) for form in FORMS]
    return {f"{name}_{end}": better for end in ends for name, better in (("fid_plus", "higher"), ("fid_minus", "lower"))}


def _deletion(c: StudyContext, **options: Any) -> Values:
    arguments = {**c.removal(), **options}
    return {"deletion_area": deletion_curve(c.forward, c.inputs, c.attributions, c.target, **arguments).area}


def _insertion(c: StudyContext, **options: Any) -> Values:
    arguments = {**c.removal(), **options}
    return {"insertion_area": insertion_curve(c.forward, c.inputs, c.attributions, c.target, **arguments).area}


def _faithfulness(c: StudyContext, **options: Any) -> Values:
    arguments = {**c.removal(), **options}
    found = faithfulness_correlation(c.forward, c.inputs, c.attributions, c.target, **arguments)
    return {"faithfulness_correlation": found}


def _infidelity(c: StudyContext, *, n_samples: int = NEIGHBOURS, **options: Any) -> Values:
    arguments = {**c.model(), "n_perturb_samples": n_samples, "target": c.target, **options}
    arguments["max_examples_per_batch"] = arguments.pop("batch_size")
    return {"infidelity": infidelity(c.forward, c.inputs, c.attributions, **arguments)}


def _sensitivity(c: StudyContext, *, radius: float | None = None, **options: Any) -> Values:
    if radius is None:
        radius = RADIUS_SHARE * float(c.inputs.detach().double().flatten(1).norm(dim=1).median()) or RADIUS_SHARE
    # Relative: absolute distances would favour maps of small numbers.
    arguments = {**c.model(), "n_samples": NEIGHBOURS, "relative": not callable(options.get("distance")), **options}
    with getattr(c.explain, "one_stream", nullcontext)():
        found = sensitivity(c.explain, c.forward, c.inputs, radius=radius, target=c.target, **arguments)
    return {"sensitivity_max": found.max, "sensitivity_mean": found.mean, "sensitivity_accepted": found.accepted}


def _conciseness(c: StudyContext, **options: Any) -> Values:
    found = conciseness(c.attributions, **options)
    return {"size": found.size, "sparsity": found.sparsity, "entropy": found.entropy, "gini": found.gini}


def _localization(c: StudyContext, *, tolerance: float = 0, distance: str = "euclidean", positive: bool = True) -> Values:
    assert c.masks is not None
    hit = pointing_game(c.attributions, c.masks, tolerance, distance=distance).double()
    rank = relevance_rank(c.attributions, c.masks)
    # An empty mask cannot be hit: a miss would not be the method's.
    hit = hit.masked_fill(rank.isnan(), torch.nan)
    return {
        "pointing_game": hit,
        "relevance_mass": relevance_mass(c.attributions, c.masks, positive),
        "relevance_rank": rank,
    }


def _stability(c: StudyContext, **options: Any) -> Values:
    found = seed_stability(list(c.by_seed.values()), memory_budget=c.memory_budget, **options)
    return {f"stability_{name}": getattr(found, name) for name in STABILITY}


@dataclass(frozen=True)
class BuiltIn:
    run: Callable[..., Values]
    better: Better
    options: tuple[str, ...]
    # What it takes for it to be computed: all of these, of what the study has.
    needs: tuple[str, ...] = ()
    default: bool = True


_CURVE = ("steps", "order", "outputs", "baseline")

BUILT_IN: dict[str, BuiltIn] = {
    "fidelity": BuiltIn(_fidelity, {}, ("robust", "n_samples", "outputs", "baseline"), ("classes",)),
    "deletion": BuiltIn(_deletion, {"deletion_area": "lower"}, _CURVE),
    "insertion": BuiltIn(_insertion, {"insertion_area": "higher"}, _CURVE),
    "faithfulness": BuiltIn(
        _faithfulness,
        {"faithfulness_correlation": "higher"},
        ("subset_size", "n_samples", "similarity", "outputs", "baseline"),
    ),
    "infidelity": BuiltIn(
        _infidelity,
        {"infidelity": "lower"},
        ("n_samples", "radius", "normalize", "perturb_func", "outputs"),
        ("floating",),
        False,
    ),
    "sensitivity": BuiltIn(
        _sensitivity,
        {"sensitivity_max": "lower", "sensitivity_mean": "lower", "sensitivity_accepted": None},
        ("radius", "n_samples", "norm_ord", "distance", "relative"),
        ("classes", "floating"),
    ),
    "conciseness": BuiltIn(
        _conciseness,
        {"size": "lower", "sparsity": "higher", "entropy": "lower", "gini": "higher"},
        ("threshold", "relative"),
    ),
    "localization": BuiltIn(
        _localization,
        {"pointing_game": "higher", "relevance_mass": "higher", "relevance_rank": "higher"},
        ("tolerance", "distance", "positive"),
        ("masks",),
    ),
    # The variance depends on the scale of the maps: it does not rank methods.
    "stability": BuiltIn(
        _stability,
        {f"stability_{name}": None if name == "variance" else "higher" for name in STABILITY},
        ("top_k",),
        ("seeds",),
    ),
}
NEEDS = {
    "classes": ("forward", "class scores (B, C)"),
    "floating": ("inputs", "a floating tensor"),
    "masks": ("masks", "ground-truth masks"),
    "seeds": ("seeds", "at least two"),
}
