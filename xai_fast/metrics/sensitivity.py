"""Sensitivity: how far an explanation moves while the input moves a little and the prediction does not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._copies import unshared
from ..ops import _checks as check
from ._forwards import DEFAULT_BUDGET, Forwards, draw_seed, predicted_classes, target_classes
from .explainers import given_target

__all__ = ["Sensitivity", "sensitivity", "sensitivity_max"]

BALLS = {2: "l2", math.inf: "linf"}
NORMS: dict[Any, str] = {"fro": "l2", 1: "l1", **BALLS}
DISTANCES = ("l2", "l1", "linf")


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of every sample over the perturbations that keep its prediction.

    Attributes
    ----------
    max, mean : Tensor, shape (B,)
        Largest and mean distance D(g(x), g(z)); NaN for a sample none of whose perturbations kept the prediction.
    standard_error : Tensor, shape (B,)
        Of the mean: deviation of the accepted distances over the root of their number; NaN below two of them.
    accepted : Tensor, shape (B,), int64
        Perturbations that kept the prediction, of ``n_samples``. Outputs with a NaN predict nothing: none is accepted where
        the model gives NaN on the sample itself.
    n_samples : int
    evaluations, explanations : int
        Examples that went through the model and through the explanation.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> forward = lambda x: torch.stack([x.sum(1), -x.sum(1)], 1)
    >>> found = xf.metrics.sensitivity(lambda x: x, forward, torch.ones(1, 4), radius=0.1, n_samples=50)
    >>> found.accepted, bool(found.max <= 0.1), bool(found.mean < found.max)
    (tensor([50]), True, True)
    """

    max: Tensor
    mean: Tensor
    standard_error: Tensor
    accepted: Tensor
    n_samples: int
    evaluations: int
    explanations: int

    def table(self) -> list[dict[str, float]]:
        """One row for every sample, ready for a DataFrame."""
        columns = {"max": self.max, "mean": self.mean, "standard_error": self.standard_error, "accepted": self.accepted}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def sensitivity(
    explanation: Callable[..., Any],
    forward: Callable[..., Any],
    inputs: Tensor,
    *,
    radius: float,
    n_samples: int = 50,
    norm_ord: float = 2,
    distance: str | Callable[[Tensor, Tensor], Tensor] = "l2",
    relative: bool = False,
    target: int | Tensor | None = None,
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> Sensitivity:
    """Max and mean sensitivity of an explanation over the neighbours that the model sees as the same.

    .. math:: \\mu_{max} = \\max_{z \\in N_r} D(g(x), g(z)), \\qquad \\mu_{mean} = E_{z \\in N_r} D(g(x), g(z)), \\qquad
              N_r = \\{z : \\rho(x, z) \\le r, \\; f(x) = f(z)\\}

    z is uniform in the ball; a z whose predicted class differs is rejected before it is explained. The mean is the plain
    Monte-Carlo mean over accepted z: it weighs them as the ball does, not by the density of the data.

    Parameters
    ----------
    explanation : callable
        ``explanation(x)`` gives maps (E, ...) of any shape per sample for x (E, ...); with `target`, ``explanation(x,
        target=...)`` with one class for every example. Run with gradients on.
    forward : callable
        ``forward(x, *additional_forward_args)`` gives class scores (E, C).
    inputs : Tensor, shape (B, ...)
        Floating.
    radius : float
        Above 0, in units of the inputs.
    n_samples : int
        Perturbations drawn for every sample.
    norm_ord : {2, inf}
        Norm of rho over all entries of a sample.
    distance : {"l2", "l1", "linf"} or callable
        D over all entries of a map; ``distance(a, b)`` of maps (E, ...) gives (E,).
    relative : bool
        Divide by the norm of g(x) (not for a callable D); a norm of 0 counts as 1.
    target : int or Tensor, shape (B,), optional
        Class to explain. None: the explanation picks it; the classes that an :class:`.Explainer` has for the samples stay
        those of their perturbations.
    additional_forward_args : tuple
        Of `forward` alone; tensors whose first dimension is B follow their samples.
    generator : torch.Generator, optional
        Seeds the noise, which is the same on every device and for every ``batch_size``.
    batch_size : int, optional
        Examples in one forward and explanation pass. Default: what ``memory_budget`` holds.
    memory_budget : int
        Bytes of perturbed inputs that exist at once.
    progress : bool
        Show a progress bar (needs tqdm).

    Returns
    -------
    Sensitivity

    Raises
    ------
    TypeError, ValueError
        Inputs that are not floating, an unknown norm or distance, a radius or number that is not above 0, an explanation
        that does not return one map for every example, a distance of one's own that does not return one value.

    Notes
    -----
    Source: Bhatt, Weller & Moura (2020), arXiv 2005.00631, max and average sensitivity; max sensitivity, Yeh et al.
    (2019). Maps are compared as they come: none but those of the running chunk are kept.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> weight = torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    >>> x = torch.tensor([[0.05, 0.05], [2.0, 2.0]])
    >>> found = xf.metrics.sensitivity(lambda x: x * weight[:, 0], lambda x: x @ weight, x, radius=0.2, n_samples=200)
    >>> found.accepted[0] < 200, found.accepted[1] == 200
    (tensor(True), tensor(True))
    """
    count = check.check_count(n_samples, "n_samples")
    radius = check.check_positive(radius, "radius")
    ball = _norm(norm_ord, BALLS, "2 or inf")
    measure = _Distance.of(distance, relative)
    run = Forwards(forward, inputs, additional_forward_args, batch_size, memory_budget, "sensitivity" if progress else None)
    check.check_float_tensor(inputs, "inputs")
    explain = _Explainer(explanation)
    original = run.on_inputs()
    if original.dim() != 2:
        raise ValueError(f"forward: expected class scores (B, C) for sensitivity, got {check.shape_of(original)}")
    predicted = predicted_classes(original)
    target = given_target(explanation, target)
    classes = None if target is None else target_classes(target, original)
    batch, device = len(inputs), inputs.device
    of_chunk = [(run.inputs[part], None if classes is None else classes[part]) for part in run.chunks(batch)]
    # The maps are copied as well: an explanation may return the same buffer at every call.
    measure.centre = torch.cat([explain(*unshared(given)).clone() for given in of_chunk])
    running = _Running.of(batch, device)
    seed = draw_seed(generator)
    for part in run.chunks(batch * count):
        # Draw by draw: a chunk then holds few copies of a sample, and its sums by sample stay short.
        example = torch.arange(part.start, part.stop, device=device)
        sample, draw = example % batch, example // batch
        z = ops.perturb(run.inputs, sample=sample, draw=draw, radius=radius, ball=ball, seed=seed)
        found = predicted_classes(run(unshared(z), sample))
        same = (found == predicted[sample]) & (found >= 0)
        if not bool(same.all()):
            z, sample = z[same], sample[same]
        if len(z):
            running.add(sample, measure(explain(z, None if classes is None else classes[sample]), sample))
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return running.result(dtype, count, run.evaluations, explain.explained)


def sensitivity_max(
    explanation_func: Callable[..., Any],
    inputs: Any,
    perturb_func: Callable[..., Any] | None = None,
    perturb_radius: float = 0.02,
    n_perturb_samples: int = 10,
    norm_ord: str | float = "fro",
    max_examples_per_batch: int | None = None,
    *,
    generator: torch.Generator | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    **kwargs: Any,
) -> Tensor:
    """Relative max sensitivity with Captum's arguments and meaning, in chunks and seeded.

    .. math:: \\max_{z} \\lVert g(z) - g(x) \\rVert / \\lVert g(x) \\rVert

    z is uniform in the L-infinity ball, and a z that changes the prediction counts as well (use :func:`sensitivity` for the
    neighbourhood that keeps it).

    Parameters
    ----------
    explanation_func : callable
        ``explanation_func(inputs, **kwargs)`` gives maps, a Tensor or a tuple as the inputs: a Captum method's
        ``attribute``.
    inputs : Tensor or tuple of Tensors, dimension 0 the batch
    perturb_func : callable, optional
        ``perturb_func(inputs, perturb_radius)`` or ``perturb_func(inputs)`` on copies of the inputs.
    perturb_radius : float
    n_perturb_samples : int
    norm_ord : {"fro", 1, 2, inf}
        Over all entries of a sample's maps.
    max_examples_per_batch : int, optional
        Examples that are explained together. Default: what ``memory_budget`` holds.
    generator : torch.Generator, optional
        Seeds the default noise.
    memory_budget : int
        Bytes of perturbed inputs that exist at once.
    **kwargs
        For ``explanation_func``; tensors, and those in tuples, whose first dimension is the batch follow their samples. So
        do the classes that an :class:`.Explainer` has for them.

    Returns
    -------
    Tensor, shape (B,)
        float32, or float64 for float64 maps. A map whose norm is 0 is not divided.

    Raises
    ------
    TypeError, ValueError
        Inputs that are not floating, an unknown norm, maps of another shape for the perturbed inputs.

    Notes
    -----
    Source: Yeh et al. (2019), "On the (in)fidelity and sensitivity of explanations", definition 3.1.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> found = xf.metrics.sensitivity_max(lambda x: x, torch.ones(2, 4), perturb_radius=0.1)
    >>> bool((found <= 0.1).all())
    True
    """
    count = check.check_count(n_perturb_samples, "n_perturb_samples")
    radius = check.check_at_least_zero(perturb_radius, "perturb_radius")
    norm = _norm(norm_ord, NORMS, "'fro', 1, 2 or inf")
    if not callable(explanation_func):
        raise TypeError(f"explanation_func: expected a callable, got {type(explanation_func).__name__}")
    if max_examples_per_batch is not None:
        check.check_count(max_examples_per_batch, "max_examples_per_batch")
    whole = _tensors(inputs)
    runs = Forwards(lambda x: x, whole[0], (), max_examples_per_batch, memory_budget // len(whole))
    batch, device = len(whole[0]), whole[0].device
    seed = draw_seed(generator)
    if (target := given_target(explanation_func, kwargs.get("target"))) is not None:
        kwargs["target"] = target

    def explain(x: tuple[Tensor, ...], sample: Tensor) -> Tensor:
        chosen = {name: _followed(value, sample, batch) for name, value in kwargs.items()}
        maps = explanation_func(x if isinstance(inputs, tuple) else x[0], **chosen)
        return _joined(maps, len(sample))

    def noisy(sample: Tensor, draw: Tensor) -> tuple[Tensor, ...]:
        if perturb_func is not None:
            copies = tuple(x.detach()[sample] for x in whole)
            return unshared(_perturbed(perturb_func, copies if isinstance(inputs, tuple) else copies[0], radius))
        return tuple(
            ops.perturb(x, sample=sample, draw=draw, radius=radius, ball="linf", seed=seed + i) for i, x in enumerate(whole)
        )

    everything = torch.arange(batch, device=device)
    slices = [(tuple(x.detach()[part] for x in whole), everything[part]) for part in runs.chunks(batch)]
    measure = _Distance(norm, True, None, torch.cat([explain(*unshared(given)).clone() for given in slices]))
    largest = torch.full((batch,), -math.inf, dtype=torch.float64, device=device)
    for part in runs.chunks(batch * count):
        example = torch.arange(part.start, part.stop, device=device)
        sample, draw = example % batch, example // batch
        apart = measure(explain(noisy(sample, draw), sample), sample)
        largest.scatter_reduce_(0, sample, apart, "amax")
    return largest.to(torch.float64 if measure.centre.dtype == torch.float64 else torch.float32)


def _norm(norm_ord: Any, norms: Mapping[Any, str], wanted: str) -> str:
    value = check.as_number(norm_ord)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or value not in norms:
        raise ValueError(f"norm_ord: expected {wanted}, got {norm_ord!r}")
    return norms[value]


def _tensors(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs as a tuple of tensors of one batch size."""
    whole = inputs if isinstance(inputs, tuple) else (inputs,)
    if not whole:
        raise ValueError("inputs: expected at least one tensor, got an empty tuple")
    for x in whole:
        check.check_float_tensor(x, "inputs")
        if x.shape[:1] != whole[0].shape[:1]:
            shapes = f"{check.shape_of(whole[0])} and {check.shape_of(x)}"
            raise ValueError(f"inputs: expected tensors of one batch size, got shapes {shapes}")
    return whole


@dataclass
class _Distance:
    """D(g(z), g(x)) of maps and the samples that they belong to."""

    norm: str | None
    relative: bool
    function: Callable[[Tensor, Tensor], Tensor] | None
    centre: Tensor = field(default_factory=lambda: torch.empty(0))
    _scale: Tensor | None = None

    @classmethod
    def of(cls, distance: Any, relative: bool) -> _Distance:
        if callable(distance):
            if relative:
                raise ValueError("relative: expected False for a distance of one's own, got True")
            return cls(None, False, distance)
        if distance not in DISTANCES:
            raise ValueError(f"distance: expected one of {', '.join(DISTANCES)} or a callable, got {distance!r}")
        return cls(distance, relative, None)

    def __call__(self, maps: Tensor, sample: Tensor) -> Tensor:
        if maps.shape[1:] != self.centre.shape[1:]:
            wanted, got = (len(maps), *self.centre.shape[1:]), check.shape_of(maps)
            raise ValueError(f"explanation: expected maps of shape {wanted} for perturbed inputs, got {got}")
        if self.function is not None:
            return self._own(self.function, maps, sample)
        apart = ops.map_distances(maps.to(self.centre.dtype), self.centre, sample=sample, norm=self.norm or "l2")
        return apart / self.scale()[sample] if self.relative else apart

    def _own(self, function: Callable[[Tensor, Tensor], Tensor], maps: Tensor, sample: Tensor) -> Tensor:
        apart = function(maps, self.centre[sample])
        if not isinstance(apart, Tensor) or apart.shape != sample.shape:
            got = f"shape {check.shape_of(apart)}" if isinstance(apart, Tensor) else type(apart).__name__
            raise ValueError(f"distance: expected it to return one value a map, shape ({len(sample)},), got {got}")
        return apart.detach().double()

    def scale(self) -> Tensor:
        """|g(x)|, 1 where that is 0."""
        if self._scale is None:
            number = torch.arange(len(self.centre), device=self.centre.device)
            still = torch.zeros_like(self.centre)
            size = ops.map_distances(self.centre, still, sample=number, norm=self.norm or "l2")
            self._scale = torch.where(size == 0, 1.0, size)
        return self._scale


@dataclass
class _Explainer:
    """Calls the explanation, with one class for every example where classes are given, and counts the examples."""

    function: Callable[..., Any]
    explained: int = 0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"explanation: expected a callable, got {type(self.function).__name__}")

    def __call__(self, x: Tensor, target: Tensor | None) -> Tensor:
        self.explained += len(x)
        maps = self.function(x) if target is None else self.function(x, target=target)
        return _joined(maps, len(x))


def _joined(maps: Any, examples: int) -> Tensor:
    """Maps as one tensor, the entries of a tuple's parts side by side."""
    parts = maps if isinstance(maps, tuple) else (maps,)
    for part in parts:
        check.check_float_tensor(part, "explanation's maps")
        if part.dim() < 2 or part.shape[0] != examples:
            raise ValueError(f"explanation: expected maps of shape ({examples}, ...), got {check.shape_of(part)}")
    if len(parts) == 1:
        return parts[0].detach()
    return torch.cat([part.detach().flatten(1) for part in parts], 1)


def _followed(value: Any, sample: Tensor, batch: int) -> Any:
    """An argument for copies of the samples, itself a copy: tensors with one entry a sample are indexed, tuples searched."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
        return value[sample.to(value.device)]
    if isinstance(value, (tuple, list)):
        if len(value) == batch and all(isinstance(v, (int, tuple)) for v in value):  # Captum's list of targets
            return type(value)(value[i] for i in sample.tolist())
        return type(value)(_followed(v, sample, batch) for v in value)
    return unshared(value)


def _perturbed(perturb_func: Callable[..., Any], copies: Any, radius: float) -> tuple[Tensor, ...]:
    if not callable(perturb_func):
        raise TypeError(f"perturb_func: expected a callable or None, got {type(perturb_func).__name__}")
    two = len(signature(perturb_func).parameters) > 1
    found = perturb_func(copies, radius) if two else perturb_func(copies)
    return found if isinstance(found, tuple) else (found,)


@dataclass
class _Running:
    """Number, mean, squared deviations and maximum of the distances of every sample, chunk by chunk (Chan et al. 1979)."""

    count: Tensor
    mean: Tensor
    squares: Tensor
    largest: Tensor

    @classmethod
    def of(cls, batch: int, device: torch.device) -> _Running:
        zeros = torch.zeros(3, batch, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1], zeros[2], torch.full_like(zeros[0], -math.inf))

    def add(self, sample: Tensor, values: Tensor) -> None:
        new = torch.zeros_like(self.count).index_add_(0, sample, torch.ones_like(values))
        some = new.clamp_min(1)
        mean = torch.zeros_like(self.mean).index_add_(0, sample, values) / some
        squares = torch.zeros_like(self.mean).index_add_(0, sample, (values - mean[sample]) ** 2)
        total, step = self.count + new, mean - self.mean
        share = torch.where(new > 0, new / total.clamp_min(1), 0.0)
        self.squares += squares + torch.where(new > 0, step**2 * self.count * share, 0.0)
        self.mean += step * share
        self.count = total
        self.largest.scatter_reduce_(0, sample, values, "amax")

    def result(self, dtype: torch.dtype, n_samples: int, evaluations: int, explanations: int) -> Sensitivity:
        some = self.count > 0
        error = torch.where(self.count > 1, (self.squares / (self.count - 1) / self.count).sqrt(), math.nan)
        largest, mean, error = (torch.where(some, x, math.nan).to(dtype) for x in (self.largest, self.mean, error))
        return Sensitivity(largest, mean, error, self.count.long(), n_samples, evaluations, explanations)
