"""Faithfulness: do attributions say what the model does when features change?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._copies import unshared
from ..ops import _checks as check
from ._baselines import Baseline
from ._features import Features
from ._forwards import DEFAULT_BUDGET, Forwards, Readout, draw_seed, target_classes
from ._removal import Removal, levels
from .similarity import average_ranks

__all__ = ["faithfulness_correlation", "feature_correlation", "infidelity", "monotonicity"]

SIMILARITIES = ("pearson", "spearman")
# Radius of the default perturbation of infidelity, in units of the inputs.
DEFAULT_RADIUS = 0.1
# A row of float64 whose deviations are below this share of it is constant.
CONSTANT = 1e-13
# Values that are multiplied at once by `_products`.
BLOCK = 2**17


def faithfulness_correlation(
    forward: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    subset_size: int | None = None,
    n_samples: int = 100,
    similarity: str = "pearson",
    baseline: Baseline = "zero",
    outputs: str = "raw",
    feature_mask: Tensor | None = None,
    patch_size: int | None = None,
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Correlation between the attribution of random subsets and what the output loses without them.

    .. math:: \\mu_F = \\mathrm{corr}_{S, |S| = k} \\big( \\sum_{i \\in S} g_i, \\, f(x) - f(x_{S \\leftarrow b}) \\big)

    Parameters
    ----------
    forward, inputs, attributions, baseline, feature_mask, patch_size, additional_forward_args, batch_size, memory_budget
        As for :func:`fidelity`.
    target : int or Tensor, shape (B,), optional
        Class to look at; by default the predicted one. None for a model with one output.
    subset_size : int, optional
        Features in a subset, by default a fifth of them, at least one.
    n_samples : int
        Subsets, at least two; the same for all samples of the batch.
    similarity : {"pearson", "spearman"}
    outputs : {"raw", "auto", "logits", "probabilities"}
        "raw": scores as they are. Else probabilities, as for :func:`deletion_curve`.
    generator : torch.Generator, optional
        Randomness of the subsets and of the uniform baseline.

    Returns
    -------
    Tensor, shape (B,)
        From -1 to 1; float32, or float64 for float64 inputs. NaN where one side does not vary (constant attributions, a
        constant model) or holds a NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`fidelity`; a subset size that is not from 1 to F.

    Notes
    -----
    Source: Bhatt, Weller & Moura (2020), "Evaluating and aggregating feature-based model explanations" (arXiv 2005.00631),
    the measure of faithfulness. 1 for x * w of a linear model with baseline 0.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x, w = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([1.0, -1.0, 2.0, 0.5])
    >>> xf.metrics.faithfulness_correlation(lambda x: x @ w, x, x * w, subset_size=2)
    tensor([1.])
    """
    count = check.check_count(n_samples, "n_samples", 2)
    _check_similarity(similarity)
    run = Forwards(forward, inputs, additional_forward_args, batch_size, memory_budget)
    features = Features.of(inputs, attributions, feature_mask, patch_size)
    size = max(1, features.count // 5) if subset_size is None else subset_size
    size = check.check_count(size, "subset_size", 1, features.count)
    removal = Removal(run, features, baseline, generator)
    inside = _random_subsets(features.count, count, size, draw_seed(generator), inputs.device)
    original, read = _original(run, target, outputs)
    sample = torch.arange(len(inputs), device=inputs.device).repeat_interleave(count)
    subset = torch.arange(count, device=inputs.device).repeat(len(inputs))
    changed = removal.by_subset(inside, subset, sample, read).view(-1, count)
    drop = original[:, None].double() - changed.double()
    given = features.scores.double() @ inside.double().T
    return _correlation(given, drop, similarity).to(features.scores.dtype)


def feature_correlation(
    forward: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    similarity: str = "pearson",
    absolute: bool = False,
    baseline: Baseline = "zero",
    outputs: str = "raw",
    feature_mask: Tensor | None = None,
    patch_size: int | None = None,
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Correlation between attributions and what the output loses without each feature alone.

    .. math:: \\mathrm{corr}_i ( g_i, \\; f(x) - f(x_{i \\leftarrow baseline}) )

    ``similarity="spearman", absolute=True`` is the monotonicity of Nguyen & Martinez (2020) with one baseline in the
    place of their expectation.

    Parameters
    ----------
    forward, inputs, attributions, target, similarity, baseline, outputs, feature_mask, patch_size
        As for :func:`faithfulness_correlation`.
    absolute : bool
        Compare magnitudes.
    additional_forward_args, generator, batch_size, memory_budget
        As for :func:`fidelity`.

    Returns
    -------
    Tensor, shape (B,)
        As :func:`faithfulness_correlation`; F forward passes a sample.

    Raises
    ------
    TypeError, ValueError
        As :func:`fidelity`.

    Notes
    -----
    Source: Alvarez-Melis & Jaakkola (2018), "Towards robust interpretability with self-explaining neural networks", the
    measure of faithfulness.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x, w = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1.0, -1.0, 2.0])
    >>> xf.metrics.feature_correlation(lambda x: x @ w, x, x * w)
    tensor([1.])
    """
    _check_similarity(similarity)
    run = Forwards(forward, inputs, additional_forward_args, batch_size, memory_budget)
    features = Features.of(inputs, attributions, feature_mask, patch_size)
    removal = Removal(run, features, baseline, generator)
    original, read = _original(run, target, outputs)
    ranks = ops.rank_features(features.scores)
    place = torch.arange(features.count, device=inputs.device).expand(len(inputs), -1)
    drop = original[:, None].double() - removal.by_rank(ranks, place, place + 1, read).double()
    drop = drop.gather(1, ranks.long())  # back in the order of the features
    given = features.scores.double()
    if absolute:
        given, drop = given.abs(), drop.abs()
    return _correlation(given, drop, similarity).to(features.scores.dtype)


def monotonicity(
    forward: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    steps: int | None = None,
    tolerance: float = 0.0,
    baseline: Baseline = "zero",
    outputs: str = "raw",
    feature_mask: Tensor | None = None,
    patch_size: int | None = None,
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """Does the output never fall while features come to the baseline in rising order of attribution?

    .. math:: f(baseline_{S_k \\leftarrow x}) \\le f(baseline_{S_{k+1} \\leftarrow x}) \\quad \\text{for all } k, \\qquad
              S_k = \\text{the } k \\text{ smallest attributions}

    Parameters
    ----------
    forward, inputs, attributions, target, baseline, outputs, feature_mask, patch_size
        As for :func:`faithfulness_correlation`.
    steps : int, optional
        Steps from nothing to all; by default one feature at a time.
    tolerance : float
        A fall of no more than this share of the range of the curve is rounding, not a fall.
    additional_forward_args, generator, batch_size, memory_budget
        As for :func:`fidelity`.

    Returns
    -------
    Tensor, shape (B,), bool

    Raises
    ------
    TypeError, ValueError
        As :func:`fidelity`. Attributions or outputs with a NaN, for which neither answer is right.

    Notes
    -----
    Source: Luss et al. (2019), "Generating contrastive explanations with monotonic attribute functions", as AIX360
    computes it. A statement about attributions that are at least 0: with negative ones first, the output of a faithful
    linear model falls.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> xf.metrics.monotonicity(lambda x: x[:, 1] - x[:, 0] + x[:, 2], x, torch.tensor([[0.0, 2.0, 3.0]]))
    tensor([False])
    """
    tolerance = check.check_at_least_zero(tolerance, "tolerance")
    run = Forwards(forward, inputs, additional_forward_args, batch_size, memory_budget)
    features = Features.of(inputs, attributions, feature_mask, patch_size)
    _check_known(features.unknown(), "attributions", "values")
    removal = Removal(run, features, baseline, generator)
    original, read = _original(run, target, outputs)
    steps = features.count if steps is None else check.check_count(steps, "steps")
    absent = levels(features.count, steps, inputs.device)[1:].flip(0).expand(len(inputs), -1)
    start = features.count - absent
    values = removal.by_rank(ops.rank_features(-features.scores), start, torch.full_like(start, features.count), read)
    values = torch.cat([values, original[:, None]], 1).double()
    _check_known(values.isnan().any(1), "forward", "outputs")
    allowed = tolerance * (values.amax(1) - values.amin(1))
    return (values.diff(dim=1) >= -allowed[:, None]).all(1)


def infidelity(
    forward: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    perturb_func: Any = None,
    baselines: Tensor | None = None,
    additional_forward_args: Any = None,
    target: int | Tensor | None = None,
    n_perturb_samples: int = 10,
    max_examples_per_batch: int | None = None,
    normalize: bool = False,
    *,
    radius: float = DEFAULT_RADIUS,
    outputs: str = "raw",
    generator: torch.Generator | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """How far the attributions are from predicting the change of the output under perturbations.

    .. math:: INFD = E_I \\big[ ( I^T g - (f(x) - f(x - I)) )^2 \\big]

    ``normalize=True`` puts beta g for g, with the beta that minimises the measure: the scale of the attributions then
    does not count.

    Parameters
    ----------
    forward, inputs, attributions
        As for :func:`fidelity`; attributions broadcast to the inputs. Captum's order ``(forward_func, perturb_func, inputs,
        attributions)`` is understood too.
    perturb_func : callable, optional
        ``perturb_func(x) -> (I, x - I)`` for copies x (E, ...) of the inputs; with ``baselines``, ``perturb_func(x,
        baselines)``. Default: I uniform in the cube of half-width ``radius``, seeded.
    baselines : Tensor, optional
        Handed to ``perturb_func``, one for every copy if its first dimension is B.
    additional_forward_args : tuple, optional
    target : int or Tensor, shape (B,), optional
        By default the predicted class.
    n_perturb_samples : int
    max_examples_per_batch : int, optional
        Examples in one forward pass. Default: what ``memory_budget`` holds.
    normalize : bool
    radius : float
    outputs : {"raw", "auto", "logits", "probabilities"}
    generator : torch.Generator, optional
    memory_budget : int

    Returns
    -------
    Tensor, shape (B,)
        At least 0; float32, or float64 for float64 attributions. Sums are in float64. NaN where attributions or outputs are.

    Raises
    ------
    TypeError, ValueError
        As :func:`fidelity`; a perturbation of another shape.

    Notes
    -----
    Source: Yeh et al. (2019), "On the (in)fidelity and sensitivity of explanations", definition 2.1; beta: section 3.
    f(x) is computed once.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x, w = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1.0, -1.0, 2.0])
    >>> bool(xf.metrics.infidelity(lambda x: x @ w, x, w.expand(1, 3)) < 1e-12)
    True
    """
    if callable(inputs) and not isinstance(inputs, Tensor):
        inputs, attributions, perturb_func = attributions, perturb_func, inputs
    count = check.check_count(n_perturb_samples, "n_perturb_samples")
    radius = check.check_positive(radius, "radius")
    if max_examples_per_batch is not None:
        check.check_count(max_examples_per_batch, "max_examples_per_batch")
    run = Forwards(forward, inputs, additional_forward_args, max_examples_per_batch, memory_budget)
    if not inputs.is_floating_point():
        raise TypeError(f"inputs: expected a floating tensor to perturb, got {inputs.dtype}")
    features = Features.of(inputs, attributions)
    spread = features.at_positions(features.scores)[:, None, :, None].expand(-1, *features.layout)
    given = spread.reshape(len(inputs), -1).double()
    original, read = _original(run, target, outputs)
    original = original.double()
    perturbed = _perturber(run.inputs, given, perturb_func, baselines, radius, draw_seed(generator))
    sums = torch.zeros(3 if normalize else 1, len(inputs), dtype=torch.float64, device=inputs.device)
    for part in run.chunks(len(inputs) * count):
        sample, draw = _examples(part, count, inputs.device)
        predicted, x = perturbed(sample, draw)
        drop = original[sample] - read(run(x, sample), sample).double()
        if normalize:
            sums.index_add_(1, sample, torch.stack([predicted**2, predicted * drop, drop**2]))
        else:
            sums[0].index_add_(0, sample, (predicted - drop) ** 2)
    if normalize:  # sum (beta p - d)^2 at its smallest
        own, cross, other = sums
        error = (other - torch.where(own == 0, 0.0, cross * cross / own)).clamp_min(0)
    else:
        error = sums[0]
    return (error / count).to(features.scores.dtype)


def _examples(part: slice, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sample and draw of the examples of a chunk."""
    example = torch.arange(part.start, part.stop, device=device)
    return example // count, example % count


def _perturber(inputs: Tensor, given: Tensor, perturb_func: Any, baselines: Any, radius: float, seed: int) -> Any:
    """A function of (sample, draw) that gives I^T g for the perturbations I, and the perturbed copies x - I."""
    if perturb_func is not None and not callable(perturb_func):
        raise TypeError(f"perturb_func: expected a callable or None, got {type(perturb_func).__name__}")
    if perturb_func is None:
        at_inputs = _products(inputs, given, torch.arange(len(inputs), device=inputs.device))

    def own(sample: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.perturb(inputs, sample=sample, draw=draw, radius=radius, ball="linf", seed=seed)
        return at_inputs[sample] - _products(x, given, sample), x

    def handed(sample: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        x = inputs[sample]
        if baselines is None:
            result = perturb_func(x)
        else:
            each = isinstance(baselines, Tensor) and baselines.dim() > 0 and baselines.shape[0] == len(inputs)
            result = perturb_func(x, baselines[sample] if each else unshared(baselines))
        if not isinstance(result, tuple) or len(result) != 2 or any(getattr(r, "shape", None) != x.shape for r in result):
            raise ValueError(
                f"perturb_func: expected it to return two tensors of shape {tuple(x.shape)}, got another result"
            )
        change, x = result
        return _products(change, given, sample), unshared(x)

    return own if perturb_func is None else handed


def _products(x: Tensor, given: Tensor, sample: Tensor) -> Tensor:
    """x_e . g of its sample, (E,), in float64: in blocks of columns, so that the wide copies stay in the cache."""
    rows = x.flatten(1)
    width = max(1, BLOCK // len(rows))
    total = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
    for first in range(0, rows.shape[1], width):
        block = slice(first, first + width)
        total += given[:, block].index_select(0, sample).mul_(rows[:, block]).sum(1)
    return total


def _original(run: Forwards, target: Any, outputs: str) -> tuple[Tensor, Readout]:
    """The target's value on the inputs as they are, (B,), and the function that reads it."""
    found = run.on_inputs()
    read = Readout.of(found, target_classes(target, found), outputs)
    return read(found, torch.arange(len(found), device=found.device)), read


def _random_subsets(features: int, count: int, size: int, seed: int, device: torch.device) -> Tensor:
    """(count, F) booleans with `size` true in each row."""
    number = torch.arange(count, device=device)
    still = torch.zeros(1, features, device=device)
    noise = ops.perturb(still, sample=torch.zeros_like(number), draw=number, radius=1, ball="linf", seed=seed)
    return ops.rank_features(noise) < size


def _check_known(unknown: Tensor, name: str, what: str) -> None:
    """ValueError if there is a NaN: a boolean result has no place for it."""
    if bool(unknown.any()):
        raise ValueError(f"{name}: expected {what} without NaN, got NaN in {int(unknown.sum())} of {len(unknown)} samples")


def _check_similarity(similarity: str) -> None:
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: expected one of {', '.join(SIMILARITIES)}, got {similarity!r}")


def _correlation(a: Tensor, b: Tensor, similarity: str) -> Tensor:
    """Row by row, in float64; NaN where a row does not vary."""
    if similarity == "spearman":
        a, b = average_ranks(a), average_ranks(b)
    (a, a_size), (b, b_size) = _centred(a), _centred(b)
    return ((a * b).sum(1) / (a_size * b_size)).clamp(-1, 1)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their mean, and their norms; NaN for a row that varies by rounding alone."""
    apart = x - x.mean(1, keepdim=True)
    size = apart.norm(dim=1)
    return apart, torch.where(size > CONSTANT * x.norm(dim=1), size, math.nan)
