"""Attacks on explanations: small changes of the inputs that keep the prediction and change the map."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._copies import unshared
from .._dtypes import accumulate_dtype
from ..ops import _checks as check
from . import similarity
from ._forwards import class_scores, predicted_classes, target_classes
from ._softplus import softplus_relu
from .explainers import Explainer

__all__ = ["AttackResult", "attack_explanation"]

METHODS = ("random", "top_k", "mass_centre", "target")
MEASURES = METHODS[1:]
DEFAULT_SHARE = 0.1
# A distance has no gradient at 0, where the attack on the centre of mass begins: it is measured from a point this many
# pixels beside the original centre.
BESIDE = 1e-3


@dataclass(frozen=True)
class AttackResult:
    """Perturbed inputs with the original prediction, and how far their maps are from the original maps.

    Attributes
    ----------
    inputs : Tensor, shape of the inputs
        The perturbed inputs; the original ones where the attack did not succeed.
    attributions, perturbed_attributions : Tensor, shape (B, ...)
        Maps of the original and of the perturbed inputs, by the explanation as it was given (no softplus).
    top_k_intersection, rank_correlation : Tensor, shape (B,)
        Of the two maps, see :mod:`xai_fast.metrics.similarity`; signs count for the ranks.
    centre_shift : Tensor, shape (B,), or None
        In pixels; None for maps (B, n), which are no images.
    confidence_before, confidence_after : Tensor, shape (B,), or None
        Softmax probability of the predicted class; None if the model returns one number a sample.
    prediction : Tensor of int64, shape (B,)
        The class predicted before and after; for one number a sample whether it is above 0; -1 where the model gives NaN.
    succeeded : Tensor of bool, shape (B,)
        Whether an input was found that keeps the prediction and whose map is more dissimilar than the original itself; never
        where the model gives NaN, which predicts nothing.
    steps : int
        Gradient steps of a run; candidates of the random attack.
    method : str
    epsilon : float
    k : int
        Features in ``top_k_intersection``.

    Examples
    --------
    >>> one = torch.ones(1)
    >>> AttackResult(one, one, one, one, one, None, None, None, one.long(), one.bool(), 1, "random", 0.1, 1).table()
    [{'sample': 0, 'prediction': 1, 'succeeded': True, 'top_k_intersection': 1.0, 'rank_correlation': 1.0}]
    """

    inputs: Tensor
    attributions: Tensor
    perturbed_attributions: Tensor
    top_k_intersection: Tensor
    rank_correlation: Tensor
    centre_shift: Tensor | None
    confidence_before: Tensor | None
    confidence_after: Tensor | None
    prediction: Tensor
    succeeded: Tensor
    steps: int
    method: str
    epsilon: float
    k: int

    def table(self) -> list[dict[str, Any]]:
        """One row of plain Python values per sample; measures that do not apply are left out."""
        columns = {"prediction": self.prediction, "succeeded": self.succeeded, **self._measures()}
        values = {name: column.tolist() for name, column in columns.items()}
        return [{"sample": i, **{name: v[i] for name, v in values.items()}} for i in range(len(self.prediction))]

    def summary(self) -> dict[str, Any]:
        """The attack, the share of samples on which it succeeded, and means over all samples that leave out NaN."""
        about = {"method": self.method, "epsilon": self.epsilon, "k": self.k, "steps": self.steps}
        shares = {"samples": len(self.prediction), "succeeded": self.succeeded.double().mean().item()}
        return {**about, **shares, **{name: v.double().nanmean().item() for name, v in self._measures().items()}}

    def _measures(self) -> dict[str, Tensor]:
        names = ("top_k_intersection", "rank_correlation", "centre_shift", "confidence_before", "confidence_after")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def attack_explanation(
    explanation: Callable[[Tensor], Tensor],
    forward: Callable[..., Any],
    inputs: Tensor,
    *,
    method: str = "top_k",
    epsilon: float,
    steps: int = 100,
    step_size: float | None = None,
    restarts: int = 1,
    n_candidates: int = 100,
    measure: str | None = None,
    k: int | float | None = None,
    target_map: Tensor | None = None,
    softplus_beta: float | None = None,
    clamp: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> AttackResult:
    """Look for inputs within epsilon of the given ones with the same prediction and another explanation.

    Parameters
    ----------
    explanation : callable
        ``x -> maps`` (B, ...). For the methods with gradients its maps must be differentiable by x, as those of
        :func:`gradient_explanation`, :func:`gradient_times_input` and :func:`integrated_gradients` are; a callable of your
        own is then called with inputs that require grad and has to keep the graph (``create_graph=True``). The random
        attack takes any callable.
    forward : callable
        Model: inputs (B, ...) -> class scores (B, C) before the softmax, or one number a sample whose sign is the
        prediction. Rows must not depend on each other: put the model in evaluation mode.
    inputs : Tensor, shape (B, ...)
    method : {"top_k", "mass_centre", "target", "random"}
        What to raise. With p = |map| / sum |map|: "top_k": minus the sum of p over the originally k largest features;
        "mass_centre": the distance of the centre of mass from the original one (maps (B, ..., H, W)); "target": the sum of
        p * target_map. "random": x0 + epsilon * random signs, `n_candidates` times, as a baseline.
    epsilon : float
        Largest change of an entry of the input.
    steps : int
        Gradient steps of a run.
    step_size : float, optional
        Change of every entry in a step; by default 2.5 epsilon / steps, at most epsilon.
    restarts : int
        Runs; the first begins at the inputs, every further one at a random point of the ball.
    n_candidates : int
        Draws of the random attack.
    measure : {"top_k", "mass_centre", "target"}, optional
        Random attack: which of the above picks the best candidate; by default "top_k".
    k : int or float, optional
        Features of "top_k" and of the reported intersection; a float is a share of all. By default a tenth.
    target_map : Tensor, optional
        For "target": weights of at least 0, or a boolean region, that broadcast to the maps.
    softplus_beta : float, optional
        Take the gradients of the attack with softplus of this sharpness in place of ReLU. A gradient map of a ReLU network
        is piecewise constant and needs it. Maps, predictions and the choice of the best iterate are always those of the
        unchanged model. A small beta smooths over what the model does, a large one leaves few units with a gradient: try
        some, for example 10 to 100 for pre-activations around 1.
    clamp : (float, float), optional
        Range of valid inputs, which the inputs must lie in.
    generator : torch.Generator, optional
        For random signs and starts; torch's own by default.
    batch_size : int, optional
        Samples attacked together; all by default. The draws do not depend on it.

    Returns
    -------
    AttackResult
        Per sample the iterate with the largest dissimilarity among those with the original prediction. ``succeeded`` is
        False, and the result the input itself, where no such iterate is more dissimilar than the original map.

    Raises
    ------
    TypeError
        An argument of another type than above.
    ValueError
        An argument out of its range; or the maps have no derivative by the inputs, at no sample: a ReLU network without
        `softplus_beta`, a map without a graph, a linear model. A map that does not change cannot be attacked, and a
        result without any step would look like robustness. (The random attack on such a map gives ``succeeded`` False.)

    Notes
    -----
    x <- clip(x + step_size * sign(d D(x) / d x), x0 - epsilon, x0 + epsilon), of all samples at once; iterates that change
    the prediction do not count, but the run goes on from them: Ghorbani, Abid & Zou 2017 (arXiv 1710.10547), algorithm 1.
    At the original map the distance of the centres has no gradient; the first step moves the centre towards the farthest
    corner. Inputs of 16 bits move in float32 and are rounded inside the ball. Inputs are not modified, and ``.grad`` and
    the mode of the model stay as they are.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from xai_fast.metrics import gradient_explanation
    >>> seed = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    >>> x = torch.randn(8, 20)
    >>> result = attack_explanation(
    ...     gradient_explanation(model), model, x, method="top_k", epsilon=0.3, k=5, steps=20, softplus_beta=5.0
    ... )
    >>> bool((result.inputs - x).abs().max() <= 0.3), bool((model(result.inputs).argmax(1) == result.prediction).all())
    (True, True)
    >>> bool(result.top_k_intersection.mean() < 0.9)
    True
    """
    _check_callables(explanation, forward, inputs, generator)
    epsilon = check.check_positive(epsilon, "epsilon")
    kind = _measure_of(method, measure, target_map)
    counts = ((steps, "steps"), (restarts, "restarts"), (n_candidates, "n_candidates"))
    steps, restarts, n_candidates = (check.check_count(value, name) for value, name in counts)
    step_size = min(epsilon, 2.5 * epsilon / steps) if step_size is None else check.check_positive(step_size, "step_size")
    start = inputs.detach()
    size = len(start) if batch_size is None else check.check_count(batch_size, "batch_size")
    chunks = [slice(i, i + size) for i in range(0, len(start), size)]
    lower, upper = _ball(start, epsilon, clamp)
    subject = _Subject(explanation, forward, softplus_beta, has_graph=method != "random")
    scores = subject.scores(start, chunks)
    if isinstance(explanation, Explainer):
        subject.target = target_classes(None if scores.ndim == 1 else explanation.target, scores)
    # Copies of maps and scores: a callable may return the same buffer at every call.
    attributions = torch.cat([subject.maps(start[rows], rows).clone() for rows in chunks])
    count = _count_of(k, attributions, kind)
    region = _region(target_map, attributions)

    parts = []
    for rows in chunks:
        maps = attributions[rows]
        dissimilarity = _dissimilarity(kind, maps, count, None if region is None else region[rows])
        best = (start[rows], maps, dissimilarity.value(maps))
        parts.append(_Part(subject, rows, lower[rows], upper[rows], _prediction(scores[rows]), dissimilarity, *best))
    if method == "random":
        _draw_candidates(parts, start, epsilon, n_candidates, generator)
    else:
        _climb(parts, start, epsilon, steps, step_size, restarts, generator)
    found = [torch.cat(values) for values in zip(*((p.inputs, p.maps, p.succeeded) for p in parts), strict=True)]
    made = n_candidates if method == "random" else steps
    return _result(subject, chunks, scores, attributions, found, made, method, epsilon, count)


@dataclass
class _Subject:
    """The explanation under attack and its model, as they are and as smooth twins."""

    explanation: Callable[[Tensor], Tensor]
    forward: Callable[..., Any]
    softplus_beta: float | None
    has_graph: bool
    target: Tensor | None = None

    def __post_init__(self) -> None:
        if self.softplus_beta is not None:
            self.softplus_beta = check.check_positive(self.softplus_beta, "softplus_beta")

    def scores(self, x: Tensor, chunks: list[slice]) -> Tensor:
        """Class scores (B, C), or (B,)."""
        with torch.no_grad():
            scores = torch.cat([class_scores(self.forward(unshared(x[rows]))).clone() for rows in chunks]).to(x.device)
        if scores.ndim not in (1, 2) or len(scores) != len(x) or 0 in scores.shape:
            raise ValueError(f"forward: expected scores of shape ({len(x)}, C) or ({len(x)},), got {check.shape_of(scores)}")
        return scores[:, 0] if scores.ndim == 2 and scores.shape[1] == 1 else scores

    def explain(self, x: Tensor, rows: slice) -> Tensor:
        if isinstance(self.explanation, Explainer):
            assert self.target is not None
            maps = self.explanation.maps(x, self.target[rows])
        else:
            maps = self.explanation(x)
        check.check_float_tensor(maps, "explanation (its maps)")
        if maps.ndim < 2 or len(maps) != len(x) or 0 in maps.shape:
            raise ValueError(f"explanation: expected maps of shape ({len(x)}, ...), got {check.shape_of(maps)}")
        return maps

    def maps(self, x: Tensor, rows: slice) -> Tensor:
        """Maps of the unchanged model, without a graph."""
        if isinstance(self.explanation, Explainer):
            return self.explain(x, rows).detach()
        # A callable of the user may write to the tensor that it is given, and differentiate by it.
        own = unshared(x.detach()).requires_grad_(self.has_graph)
        with torch.enable_grad() if self.has_graph else nullcontext():
            return self.explain(own, rows).detach()

    def direction(self, x: Tensor, rows: slice, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """sign(d objective / d x), 0 where there is no derivative; and the maps at x if they are the unchanged model's."""
        x = unshared(x.detach()).requires_grad_()
        twin = nullcontext() if self.softplus_beta is None else softplus_relu(self.softplus_beta)
        with torch.enable_grad(), twin:
            maps = self.explain(x, rows)
            gradient = None
            if maps.requires_grad:
                (gradient,) = torch.autograd.grad(objective(maps).sum(), x, allow_unused=True)
        # A zero map has no centre of mass. The sign of its NaN is 0: the sample stays where it is.
        sign = torch.zeros_like(x) if gradient is None else gradient.sign()
        return sign.detach(), maps.detach() if self.softplus_beta is None else None


@dataclass(frozen=True)
class _Dissimilarity:
    """How far maps are from the original ones, (b,), and what to climb to get farther."""

    value: Callable[[Tensor], Tensor]
    objective: Callable[[Tensor], Tensor]


@dataclass
class _Part:
    """Samples attacked together, and the best iterate of each so far."""

    subject: _Subject
    rows: slice
    lower: Tensor
    upper: Tensor
    prediction: Tensor
    dissimilarity: _Dissimilarity
    inputs: Tensor
    maps: Tensor
    value: Tensor
    succeeded: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.succeeded = torch.zeros_like(self.prediction, dtype=torch.bool)

    def inside(self, x: Tensor) -> Tensor:
        """x in the ball, at least float32 as its bounds: 16-bit inputs would not move by steps below their rounding."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def offer(self, x: Tensor, maps: Tensor | None = None) -> None:
        """Keep the rows of x that have the original prediction and are better than what is kept."""
        x = x.to(self.inputs.dtype)
        found = _prediction(self.subject.scores(x, [slice(None)]))
        kept = (found == self.prediction) & (found >= 0)
        maps = self.subject.maps(x, self.rows) if maps is None else maps
        value = self.dissimilarity.value(maps)
        better = kept & (value > self.value)
        self.inputs, self.maps = _where(better, x, self.inputs), _where(better, maps, self.maps)
        self.value, self.succeeded = torch.where(better, value, self.value), self.succeeded | better

    def climb(self, x: Tensor, steps: int, step_size: float) -> bool:
        """A run from x; False if there is no way up at any sample."""
        x = self.inside(x)
        for step in range(steps):
            at = x.to(self.inputs.dtype)
            sign, maps = self.subject.direction(at, self.rows, self.dissimilarity.objective)
            if step > 0:
                self.offer(at, maps)
            elif not bool(sign.any()):
                return False
            x = self.inside(x + step_size * sign)
        self.offer(x)
        return True


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def _draw_candidates(
    parts: list[_Part], start: Tensor, epsilon: float, n_candidates: int, generator: torch.Generator | None
) -> None:
    for _ in range(n_candidates):
        x = start + epsilon * _uniform(start, generator).sign()
        for part in parts:
            part.offer(part.inside(x[part.rows]))


def _climb(
    parts: list[_Part],
    start: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    restarts: int,
    generator: torch.Generator | None,
) -> None:
    moved = False
    for run in range(restarts):
        x = start if run == 0 else start + epsilon * _uniform(start, generator)
        for part in parts:
            moved |= part.climb(x[part.rows], steps, step_size)
    if not moved:
        twin = "ReLU networks need a smooth twin: pass softplus_beta"
        if parts[0].subject.softplus_beta is not None:
            twin = "its maps must carry a graph to the inputs and change with them"
        raise ValueError(f"explanation: expected maps with a derivative by the inputs, got zero at every sample; {twin}")


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """From -1 to 1, in at least float32."""
    device = like.device if generator is None else generator.device
    draws = torch.rand(like.shape, generator=generator, device=device, dtype=accumulate_dtype(like.dtype))
    return (2 * draws - 1).to(like.device)


def _prediction(scores: Tensor) -> Tensor:
    """(b,) classes; -1 where the model gives NaN."""
    return predicted_classes(scores) if scores.ndim == 2 else (scores > 0).long().masked_fill(scores.isnan(), -1)


def _shares(maps: Tensor) -> Tensor:
    """|map| / sum |map| (b, n) in float64; zeros for a zero map."""
    mass = maps.flatten(1).double().abs()
    return mass / mass.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _dissimilarity(kind: str, original: Tensor, count: int, region: Tensor | None) -> _Dissimilarity:
    if kind == "mass_centre":
        return _centre_distance(original)
    weights = -similarity.top_features(original.flatten(1), count).double() if region is None else region.flatten(1)

    def value(maps: Tensor) -> Tensor:
        return (_shares(maps) * weights).sum(1)

    return _Dissimilarity(value, value)


def _centre_distance(original: Tensor) -> _Dissimilarity:
    centre = similarity.exact_centre(original)
    last = torch.tensor(original.shape[-2:], device=original.device, dtype=torch.float64) - 1
    way = torch.where(centre <= last / 2, last, 0.0) - centre
    beside = centre - BESIDE * way / way.norm(dim=1, keepdim=True).clamp_min(BESIDE)

    def distance(origin: Tensor, maps: Tensor) -> Tensor:
        return (similarity.exact_centre(maps) - origin).norm(dim=1)

    return _Dissimilarity(partial(distance, centre), partial(distance, beside))


def _result(
    subject: _Subject,
    chunks: list[slice],
    scores: Tensor,
    attributions: Tensor,
    found: list[Tensor],
    steps: int,
    method: str,
    epsilon: float,
    k: int,
) -> AttackResult:
    inputs, maps, succeeded = found
    prediction = _prediction(scores)

    def confidence(of: Tensor) -> Tensor | None:
        return of.softmax(1).gather(1, prediction[:, None].clamp_min(0))[:, 0] if of.ndim == 2 else None

    return AttackResult(
        inputs=inputs,
        attributions=attributions,
        perturbed_attributions=maps,
        top_k_intersection=similarity.top_k_intersection(attributions, maps, k),
        rank_correlation=similarity.rank_correlation(attributions, maps),
        centre_shift=similarity.centre_shift(attributions, maps) if maps.ndim > 2 else None,
        confidence_before=confidence(scores),
        confidence_after=confidence(subject.scores(inputs, chunks)),
        prediction=prediction,
        succeeded=succeeded,
        steps=steps,
        method=method,
        epsilon=epsilon,
        k=k,
    )


# Arguments


def _check_callables(explanation: Any, forward: Any, inputs: Any, generator: Any) -> None:
    for value, name in ((explanation, "explanation"), (forward, "forward")):
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
    check.check_float_tensor(inputs, "inputs")
    if inputs.ndim < 2 or 0 in inputs.shape:
        raise ValueError(f"inputs: expected shape (B, ...) with samples and entries, got {check.shape_of(inputs)}")
    check.check_generator(generator)


def _measure_of(method: Any, measure: Any, target_map: Any) -> str:
    """The dissimilarity that decides."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "random":
        measure = "top_k" if measure is None else measure
        if measure not in MEASURES:
            raise ValueError(f"measure: expected one of {', '.join(MEASURES)}, got {measure!r}")
    elif measure is not None:
        raise ValueError(f"measure: expected None, as method {method!r} has its own, got {measure!r}")
    kind = method if measure is None else measure
    if (kind == "target") != (target_map is not None):
        wanted = "a tensor for method or measure 'target'" if kind == "target" else f"None for {kind!r}"
        raise ValueError(f"target_map: expected {wanted}, got {type(target_map).__name__}")
    return str(kind)


def _ball(x: Tensor, epsilon: float, clamp: Any) -> tuple[Tensor, Tensor]:
    """The smallest and the largest values allowed, at least float32, rounded inwards to the dtype of x."""
    low, high = (-math.inf, math.inf) if clamp is None else _range(clamp, x)
    bounds = []
    for side in (-epsilon, epsilon):
        bound = (x.double() + side).clamp(low, high).to(x.dtype)
        exact = bound.double()
        outside = ((exact - x.double()).abs() > epsilon) | (exact < low) | (exact > high)
        bounds.append(torch.where(outside, torch.nextafter(bound, x), bound).to(accumulate_dtype(x.dtype)))
    return bounds[0], bounds[1]


def _range(clamp: Any, x: Tensor) -> tuple[float, float]:
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"clamp: expected (low, high), got {clamp!r}")
    low, high = (check.check_number(v, "clamp") for v in clamp)
    least, most = (v.item() for v in x.aminmax())
    if not low <= least <= most <= high:
        raise ValueError(f"clamp: expected a range that holds the inputs, {least:g} to {most:g}, got {low:g} to {high:g}")
    return low, high


def _count_of(k: Any, maps: Tensor, kind: str) -> int:
    features = math.prod(maps.shape[1:])
    count = similarity.feature_count(DEFAULT_SHARE if k is None else k, features)
    if kind == "top_k" and count == features:
        raise ValueError(f"k: expected fewer than the {features} features of a map, got {k!r}")
    if kind == "mass_centre" and maps.ndim < 3:
        raise ValueError(f"explanation: expected maps (B, ..., H, W) for 'mass_centre', got {check.shape_of(maps)}")
    return count


def _region(target_map: Any, maps: Tensor) -> Tensor | None:
    if target_map is None:
        return None
    if not isinstance(target_map, Tensor):
        raise TypeError(f"target_map: expected a torch.Tensor, got {type(target_map).__name__}")
    region = target_map.detach().to(maps.device, torch.float64)
    if not bool((region >= 0).all()) or not bool((region > 0).any()) or not bool(region.isfinite().all()):
        raise ValueError("target_map: expected finite weights of at least 0, some above 0, got others")
    try:
        return region.expand(maps.shape)
    except RuntimeError:
        wanted, got = check.shape_of(maps), check.shape_of(target_map)
        raise ValueError(f"target_map: expected a shape that broadcasts to the maps {wanted}, got {got}") from None
