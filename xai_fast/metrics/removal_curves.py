"""Deletion and insertion curves: the output as the most important features go, or come, one step after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks as check
from ._baselines import Baseline
from ._features import Features
from ._forwards import DEFAULT_BUDGET, Forwards, Readout, target_classes
from ._removal import Removal, levels

__all__ = ["RemovalCurve", "deletion_curve", "insertion_curve"]

ORDERS = ("most_first", "least_first")
DEFAULT_STEPS = 100


@dataclass(frozen=True)
class RemovalCurve:
    """A curve for every sample.

    Attributes
    ----------
    x : Tensor, shape (K,)
        Share of the features that is removed (deletion) or present (insertion), from 0 to 1.
    values : Tensor, shape (B, K)
        Probability or score of the target class. NaN for a sample whose attributions hold a NaN, or whose outputs do where
        the predicted class is looked at: it has none.
    area : Tensor, shape (B,)
        Area under the curve over x, by trapezoids, in float64; NaN where a value is.
    evaluations : int
        Examples that went through the model.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> curve = xf.metrics.deletion_curve(lambda x: x.sum(1), torch.ones(1, 4), torch.ones(1, 4))
    >>> curve.mean
    tensor([4., 3., 2., 1., 0.], dtype=torch.float64)
    """

    x: Tensor
    values: Tensor
    area: Tensor
    evaluations: int

    @property
    def mean(self) -> Tensor:
        """The mean curve of the batch, (K,); NaN where that of a sample is."""
        return self.values.double().mean(0)

    def table(self) -> list[dict[str, float]]:
        """One row for every step of the mean curve, ready for a DataFrame."""
        return [{"x": x, "value": value} for x, value in zip(self.x.tolist(), self.mean.tolist(), strict=True)]


def deletion_curve(
    forward: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    steps: int = DEFAULT_STEPS,
    baseline: Baseline = "zero",
    order: str = "most_first",
    outputs: str = "auto",
    feature_mask: Tensor | None = None,
    patch_size: int | None = None,
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> RemovalCurve:
    """The target's probability as features are replaced by a baseline, the most important first (pixel flipping).

    .. math:: v_k = f_{target}(x_{S_k \\leftarrow baseline}), \\qquad S_k = \\text{the } kF/K \\text{ largest}

    A small area speaks for the explanation.

    Parameters
    ----------
    forward, inputs, attributions, baseline, feature_mask, patch_size, additional_forward_args, batch_size, memory_budget
        As for :func:`fidelity`.
    target : int or Tensor, shape (B,), optional
        Class to look at; by default the predicted one. None for a model with one output.
    steps : int
        Steps from nothing to all; at most one for every feature.
    order : {"most_first", "least_first"}
        The area between both curves is the measure of symbolic relevance gain (Blucher et al. 2024).
    outputs : {"auto", "logits", "probabilities", "raw"}
        The curve is of probabilities: "logits" pass a softmax, and under "auto" they do so unless the rows are at least
        0 and add up to 1: the outputs on all inputs of the call, so that a sample may be read otherwise beside others than
        alone, see :func:`fidelity`. "raw" takes the scores as they are, as do models with one output.
    generator : torch.Generator, optional
        Randomness of the uniform baseline.
    progress : bool
        Show a progress bar (needs tqdm).

    Returns
    -------
    RemovalCurve

    Raises
    ------
    TypeError, ValueError
        As :func:`fidelity`.

    Notes
    -----
    Sources: Samek et al. (2017), "Evaluating the visualization of what a deep neural network has learned", section III;
    area, Petsiuk et al. (2018), "RISE". One forward stream of K examples a sample: the first point is the prediction
    itself.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x = torch.tensor([[3.0, 2.0, 1.0]])
    >>> curve = xf.metrics.deletion_curve(lambda x: x.sum(1), x, x)
    >>> curve.values, curve.area
    (tensor([[6., 3., 1., 0.]]), tensor([2.3333], dtype=torch.float64))
    """
    run = Forwards(forward, inputs, additional_forward_args, batch_size, memory_budget, "deletion" if progress else None)
    features = Features.of(inputs, attributions, feature_mask, patch_size)
    removal = Removal(run, features, baseline, generator)
    return _curve(removal, target, steps, order, outputs, insert=False)


def insertion_curve(
    forward: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    steps: int = DEFAULT_STEPS,
    baseline: Baseline = "zero",
    order: str = "most_first",
    outputs: str = "auto",
    feature_mask: Tensor | None = None,
    patch_size: int | None = None,
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> RemovalCurve:
    """The target's probability as features come to a baseline, the most important first.

    .. math:: v_k = f_{target}(baseline_{S_k \\leftarrow x})

    A large area speaks for the explanation.

    Parameters
    ----------
    forward, inputs, attributions, target, steps, baseline, order, outputs, feature_mask, patch_size, progress
        As for :func:`deletion_curve`. A blurred baseline is usual for images.
    additional_forward_args, generator, batch_size, memory_budget
        As for :func:`fidelity`.

    Returns
    -------
    RemovalCurve

    Raises
    ------
    TypeError, ValueError
        As :func:`fidelity`.

    Notes
    -----
    Source: Petsiuk et al. (2018), "RISE: randomized input sampling for explanation of black-box models".

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x = torch.tensor([[3.0, 2.0, 1.0]])
    >>> xf.metrics.insertion_curve(lambda x: x.sum(1), x, x).values
    tensor([[0., 3., 5., 6.]])
    """
    run = Forwards(forward, inputs, additional_forward_args, batch_size, memory_budget, "insertion" if progress else None)
    features = Features.of(inputs, attributions, feature_mask, patch_size)
    removal = Removal(run, features, baseline, generator)
    return _curve(removal, target, steps, order, outputs, insert=True)


def _curve(removal: Removal, target: Any, steps: int, order: str, outputs: str, insert: bool) -> RemovalCurve:
    steps = check.check_count(steps, "steps")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    run, features = removal.forwards, removal.features
    original = run.on_inputs()
    read = Readout.of(original, target_classes(target, original), outputs)
    everything = torch.arange(len(original), device=original.device)
    whole = read(original, everything)[:, None]
    scores = features.scores if order == "most_first" else -features.scores
    count = levels(features.count, steps, original.device)
    changed = (count[:-1] if insert else count[1:]).expand(len(original), -1)
    start, end = (changed, torch.full_like(changed, features.count)) if insert else (torch.zeros_like(changed), changed)
    values = removal.by_rank(ops.rank_features(scores), start, end, read)
    values = torch.cat([values, whole] if insert else [whole, values], 1)
    unknown = features.unknown()
    if target is None and original.dim() == 2:
        unknown = unknown | whole[:, 0].isnan()  # outputs that predict no class
    values = values.masked_fill(unknown[:, None], math.nan)
    x = count.double() / features.count
    return RemovalCurve(x, values, torch.trapezoid(values.double(), x, dim=1), run.evaluations)
