"""Relative performance loss: what the whole model loses when a set of features is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _checks as check
from ._baselines import Baseline
from ._features import Features
from ._forwards import DEFAULT_BUDGET, Forwards, Readout, agreement, predicted_classes, target_classes
from ._removal import Removal

__all__ = ["PerformanceLoss", "relative_loss", "relative_performance_loss"]

Loss = Callable[[Tensor, Tensor], Tensor]

# A loss nearer to 0 than this cannot be a denominator.
SMALLEST_LOSS = 1e-12


@dataclass(frozen=True)
class PerformanceLoss:
    """What every feature set costs.

    Attributes
    ----------
    names : list of str
    relative_loss : Tensor, shape (K,), float64
        (loss(M without F) - loss(M)) / loss(M): above 0 where the features were of use.
    loss : float
        Mean loss of the whole model over the data.
    pruned_loss : Tensor, shape (K,), float64
    accuracy : float
        NaN where the loss is one's own, or an output is NaN.
    pruned_accuracy : Tensor, shape (K,), float64
    size : Tensor, shape (K,), int64
        Features in each set.
    samples, evaluations : int

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1] * 4)
    >>> found = xf.metrics.relative_performance_loss(lambda x: 3 * x, x, y, {"first": [0], "both": [0, 1]})
    >>> found.names, found.accuracy, found.pruned_accuracy
    (['first', 'both'], 1.0, tensor([1.0000, 0.5000], dtype=torch.float64))
    """

    names: list[str]
    relative_loss: Tensor
    loss: float
    pruned_loss: Tensor
    accuracy: float
    pruned_accuracy: Tensor
    size: Tensor
    samples: int
    evaluations: int

    def table(self) -> list[dict[str, Any]]:
        """One row for every feature set, ready for a DataFrame."""
        columns = {
            "size": self.size.tolist(),
            "relative_loss": self.relative_loss.tolist(),
            "pruned_loss": self.pruned_loss.tolist(),
            "pruned_accuracy": self.pruned_accuracy.tolist(),
        }
        whole = {"loss": self.loss, "accuracy": self.accuracy}
        return [
            {"features": name, **{column: values[i] for column, values in columns.items()}, **whole}
            for i, name in enumerate(self.names)
        ]


def relative_loss(loss: float | Tensor, pruned_loss: float | Tensor, *, literal: bool = False) -> Any:
    """The bare formula of relative performance loss.

    .. math:: RPF = \\frac{\\ell(M_{-F}) - \\ell(M)}{\\ell(M)}, \\qquad
              \\text{literal: } \\frac{\\log \\ell(M_{-F}) - \\log \\ell(M)}{\\log \\ell(M)}

    Parameters
    ----------
    loss, pruned_loss : float or Tensor
        Loss of the whole and of the pruned model, at least 0. Broadcast.
    literal : bool
        Take the logarithm of the losses, as the formula is sometimes printed. Its sign turns around where ``loss`` is
        below 1, and it has a pole at 1; the default reads "log loss" as the loss itself.

    Returns
    -------
    float or Tensor
        NaN where the denominator is 0.

    Raises
    ------
    TypeError, ValueError
        Not numbers, a loss below 0, shapes that do not broadcast.

    Notes
    -----
    The measure of the cost of pruning features in evaluations of feature sets; see :func:`relative_performance_loss`.

    Examples
    --------
    >>> import xai_fast as xf
    >>> xf.metrics.relative_loss(0.3, 0.6), round(xf.metrics.relative_loss(0.3, 0.6, literal=True), 4)
    (1.0, -0.5757)
    """
    values = []
    for name, value in (("loss", loss), ("pruned_loss", pruned_loss)):
        wide = check.number_or_tensor(value, name)
        if bool((wide < 0).any()):
            raise ValueError(f"{name}: expected losses of at least 0, got {float(wide.min()):g}")
        values.append(wide.log() if literal else wide)
    whole, pruned = values
    check.check_broadcasts(pruned, "pruned_loss", whole, "loss")
    result = torch.where(whole.abs() < SMALLEST_LOSS, math.nan, (pruned - whole) / whole)
    return result if isinstance(loss, Tensor) or isinstance(pruned_loss, Tensor) else float(result)


def relative_performance_loss(
    forward: Callable[..., Any],
    inputs: Tensor | Iterable[tuple[Tensor, Tensor]],
    labels: Tensor | None,
    features: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    baseline: Baseline = "zero",
    loss: str | Loss = "log_loss",
    literal: bool = False,
    outputs: str = "auto",
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> PerformanceLoss:
    """How much the loss over a whole test set grows, relative to what it was, when sets of features are pruned.

    .. math:: RPF(F) = \\frac{\\ell(M_{-F}) - \\ell(M)}{\\ell(M)}

    Parameters
    ----------
    forward : callable
        ``forward(x, *additional_forward_args)`` gives class scores (B, C).
    inputs : Tensor, shape (B, ...), or iterable of (x, y)
        The test set whole, or in batches (a DataLoader); then ``labels`` is None.
    labels : Tensor, shape (B,), or None
        True classes; whatever ``loss`` takes if it is one's own, one entry for each sample.
    features : dict of name to set, sequence of sets, or boolean Tensor (K, ...)
        A set is a list of indices into the flattened sample, or a boolean mask of a sample's shape (dimensions of 1
        broadcast: (1, H, W) prunes pixels of images).
    baseline : {"zero", "mean", "blur", "uniform"}, number, Tensor or callable
        What takes the place of a pruned feature. "mean" is that of each batch.
    loss : {"log_loss"} or callable
        Mean over the data of -log p(y), or of ``loss(outputs, labels)``, which gives one value a sample.
    literal : bool
        See :func:`relative_loss`.
    outputs : {"auto", "logits", "probabilities"}
        What `forward` returns (log_loss only). "auto" looks at the first batch.
    additional_forward_args, generator, batch_size, memory_budget
        As for :func:`fidelity`.
    progress : bool
        Show a progress bar (needs tqdm).

    Returns
    -------
    PerformanceLoss

    Raises
    ------
    TypeError, ValueError
        An empty set of data or of features, inputs that are neither a tensor nor batches (x, y), features that are no
        indices or masks, indices out of range, labels that do not fit.

    Notes
    -----
    The loss is the mean over all samples in float64, not over batches. K + 1 forward passes a sample, in one stream.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1] * 4)
    >>> xf.metrics.relative_performance_loss(lambda x: 3 * x, x, y, [[0], [1]]).relative_loss.round(decimals=2)
    tensor([6.6300, 6.6300], dtype=torch.float64)
    """
    if isinstance(loss, str) and loss != "log_loss":
        raise ValueError(f"loss: expected 'log_loss' or a callable, got {loss!r}")
    if isinstance(inputs, Tensor) and labels is None:
        raise ValueError("labels: expected the true classes beside a tensor of inputs, got None")
    if isinstance(inputs, np.ndarray):
        raise TypeError("inputs: expected a torch.Tensor or batches (x, y), got ndarray")
    check.check_iterable(inputs, "inputs", "a torch.Tensor or batches (x, y)")
    names, sets = _named(features)
    batches = [(inputs, labels)] if isinstance(inputs, Tensor) else inputs
    total: Tensor | None = None
    samples = evaluations = 0
    masks: Tensor | None = None
    read: _Losses | None = None
    for x, y in map(_pair, batches):
        run = Forwards(forward, x, additional_forward_args, batch_size, memory_budget, "pruning" if progress else None)
        if masks is None:
            masks = torch.stack([_mask(s, x, name) for name, s in zip(names, sets, strict=True)])
        original = run.on_inputs()
        read = _Losses.of(loss, original, y, outputs, read)
        found = _batch_losses(run, masks, read, original, baseline, generator)
        total = found if total is None else total + found
        samples, evaluations = samples + len(x), evaluations + run.evaluations
    if total is None or masks is None:
        raise ValueError("inputs: expected at least one batch, got none")
    means = total / samples
    size = masks.flatten(1).sum(1)
    whole, pruned = means[0], means[1:]
    return PerformanceLoss(
        names,
        relative_loss(whole[0], pruned[:, 0], literal=literal),
        float(whole[0]),
        pruned[:, 0],
        float(whole[1]),
        pruned[:, 1],
        size.cpu(),
        samples,
        evaluations,
    )


@dataclass(frozen=True)
class _Losses:
    """Reads loss and accuracy of examples, (E, 2) in float64."""

    loss: str | Loss
    labels: Tensor
    softmax: bool

    @classmethod
    def of(cls, loss: str | Loss, original: Tensor, labels: Any, outputs: str, before: _Losses | None) -> _Losses:
        if callable(loss):
            labels = check.as_tensor(labels, "labels").to(original.device)
            if labels.shape[:1] != original.shape[:1]:
                wanted = f"one for each of the {len(original)} samples"
                raise ValueError(f"labels: expected {wanted}, got shape {check.shape_of(labels)}")
            return cls(loss, labels, False)
        if original.dim() != 2:
            raise ValueError(f"forward: expected class scores (B, C) for log_loss, got {check.shape_of(original)}")
        truth = target_classes(labels, original, "labels")
        softmax = Readout.of(original, truth, outputs).softmax if before is None else before.softmax
        return cls(loss, truth, softmax)

    def __call__(self, outputs: Tensor, sample: Tensor) -> Tensor:
        labels = self.labels[sample]
        if callable(self.loss):
            values = self.loss(outputs, labels)
            if not isinstance(values, Tensor) or values.shape != (len(sample),):
                raise ValueError(
                    f"loss: expected it to return one value a sample, shape ({len(sample)},), got another result"
                )
            return torch.stack([values.double(), torch.full_like(values, math.nan, dtype=torch.float64)], 1)
        wide = outputs.double()
        logs = wide.log_softmax(1) if self.softmax else wide.log()
        return torch.stack([F.nll_loss(logs, labels, reduction="none"), agreement(predicted_classes(wide), labels)], 1)


def _batch_losses(
    run: Forwards, masks: Tensor, read: _Losses, original: Tensor, baseline: Baseline, generator: torch.Generator | None
) -> Tensor:
    """Sums of loss and accuracy over a batch: (1 + K, 2), the whole model first."""
    batch, sets, device = len(run.inputs), len(masks), run.inputs.device
    masks = masks.to(device)
    features = Features.of(run.inputs, masks[:1].expand(batch, *masks.shape[1:]))
    removal = Removal(run, features, baseline, generator)
    pruned = masks.flatten(1)
    sample = torch.arange(batch, device=device).repeat_interleave(sets)
    number = torch.arange(sets, device=device).repeat(batch)
    values = removal.by_subset(pruned, number, sample, read).view(batch, sets, 2).sum(0)
    whole = read(original, torch.arange(batch, device=device)).sum(0, keepdim=True)
    return torch.cat([whole, values])


def _pair(batch: Any) -> tuple[Tensor, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"inputs: expected batches (x, y), got {type(batch).__name__}")
    return batch[0], batch[1]


def _named(features: Any) -> tuple[list[str], list[Any]]:
    if isinstance(features, Mapping):
        names, sets = [str(name) for name in features], list(features.values())
    elif isinstance(features, (Sequence, Tensor)) and not isinstance(features, str):
        sets = list(features)
        names = [str(i) for i in range(len(sets))]
    else:
        raise TypeError(f"features: expected a dict, a sequence or a tensor of sets, got {type(features).__name__}")
    if not sets:
        raise ValueError("features: expected at least one set, got none")
    return names, sets


def _mask(chosen: Any, inputs: Tensor, name: str) -> Tensor:
    """A set as booleans of a sample's shape."""
    shape = inputs.shape[1:]
    if isinstance(chosen, Tensor) and chosen.dtype == torch.bool:
        fits = chosen.dim() == len(shape) and all(m in (1, n) for m, n in zip(chosen.shape, shape, strict=True))
        if not fits:
            wanted, got = tuple(shape), check.shape_of(chosen)
            raise ValueError(f"features: expected a mask that broadcasts to {wanted} for set {name!r}, got {got}")
        return chosen.to(inputs.device).expand(shape)
    index = check.as_tensor(chosen, f"features[{name!r}]")
    if index.numel() and (index.dtype == torch.bool or index.is_floating_point()):
        raise TypeError(f"features: expected whole numbers or a boolean tensor for set {name!r}, got {index.dtype}")
    index = index.to(device=inputs.device, dtype=torch.int64).flatten()
    entries = shape.numel()
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < entries):
        low, high = int(index.min()), int(index.max())
        raise ValueError(f"features: expected indices from 0 to {entries - 1} in set {name!r}, got {low} to {high}")
    mask = torch.zeros(entries, dtype=torch.bool, device=inputs.device)
    mask[index] = True
    return mask.view(shape)
