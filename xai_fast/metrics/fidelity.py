"""Fidelity: what a prediction loses without its explanation (fid+), and what it loses with nothing else (fid-)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks as check
from ._baselines import Baseline
from ._features import Features
from ._forwards import (
    DEFAULT_BUDGET,
    Forwards,
    Readout,
    agreement,
    check_classes,
    check_whole,
    draw_seed,
    predicted_classes,
    target_classes,
)
from ._removal import Removal
from .characterization import characterization_score

__all__ = ["DEFAULT_SPARSITY", "Fidelity", "fidelity", "fidelity_scores"]

KINDS = ("model", "phenomenon")
FORMS = ("accuracy", "probability")
# Shares of the features that are left out of an explanation where nothing else is asked.
DEFAULT_SPARSITY = (0.5, 0.6, 0.7, 0.8, 0.9)
# alpha_1 and alpha_2 of Zheng et al. (2024), and the masks drawn for each sample and level.
ROBUST_SHARES, ROBUST_DRAWS = (0.1, 0.9), 20


@dataclass(frozen=True)
class _Outputs:
    """What is kept of the outputs on examples (B, K, M), the last over random subsets: [predicted class (-1: none, for a
    NaN), probability of the class that is predicted on the unchanged input, probability of the label]; all NaN for a sample
    whose attribution holds one."""

    original: Tensor  # (B, 1, 1, 3)
    removed: Tensor  # (B, K, M, 3)
    kept: Tensor  # (B, K, M, 3)
    labels: Tensor | None

    def terms(self, kind: str, form: str) -> tuple[Tensor, Tensor]:
        """The terms of fid+ and fid-, (B, K)."""
        if form == "probability":
            at = 1 if kind == "model" else 2
            drops = [(self.original - changed)[..., at].mean(2) for changed in (self.removed, self.kept)]
            return drops[0], drops[1]
        predicted = self.original[..., 0]
        truth = predicted if kind == "model" or self.labels is None else self.labels[:, None, None]
        right = agreement(predicted, truth)
        flips = [(agreement(changed[..., 0], truth) - right).abs().mean(2) for changed in (self.removed, self.kept)]
        return flips[0], flips[1]


@dataclass(frozen=True)
class Fidelity:
    """fid+ and fid- of a batch; unpacks into these two.

    Attributes
    ----------
    fid_plus, fid_minus : Tensor
        0-dimensional, or (K,) for K selections: means over the batch, in float64. A NaN in the attributions of a sample, or
        in what the model makes of it, makes its terms NaN and with them these means; :meth:`per_sample` has the others.
    size, sparsity : Tensor
        Features in the explanation, mean over the batch, and 1 - size / F; of the same shape. NaN for a threshold and
        attributions with a NaN.
    kind, form : str
        What was asked for; :meth:`scores` gives the other three from the same forward passes.
    evaluations : int
        Examples that went through the model.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x = torch.eye(3)
    >>> result = xf.metrics.fidelity(lambda x: x, x, x, sparsity=[2 / 3, 1.0])
    >>> result.necessity, result.sufficiency
    (tensor([0.6667, 0.0000], dtype=torch.float64), tensor([1.0000, 0.3333], dtype=torch.float64))
    """

    fid_plus: Tensor
    fid_minus: Tensor
    size: Tensor
    sparsity: Tensor
    kind: str
    form: str
    evaluations: int
    _outputs: _Outputs

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.fid_plus, self.fid_minus))

    @property
    def necessity(self) -> Tensor:
        """fid+: an explanation without which the prediction changes is necessary."""
        return self.fid_plus

    @property
    def sufficiency(self) -> Tensor:
        """1 - fid-: an explanation that alone keeps the prediction is sufficient."""
        return 1 - self.fid_minus

    def per_sample(self, kind: str | None = None, form: str | None = None) -> tuple[Tensor, Tensor]:
        """The terms of the two means, (B, K) in float64: changes of correctness from 0 to 1, or drops in probability."""
        kind, form = kind or self.kind, form or self.form
        _check_choice(kind, "kind", KINDS)
        _check_choice(form, "form", FORMS)
        if kind == "phenomenon" and self._outputs.labels is None:
            raise ValueError("kind: expected 'model' where no labels were given, got 'phenomenon'")
        return self._outputs.terms(kind, form)

    def scores(self, kind: str, form: str) -> tuple[Tensor, Tensor]:
        """(fid+, fid-) of another kind and form, without a forward pass."""
        plus, minus = self.per_sample(kind, form)
        return plus.mean(0).view(self.fid_plus.shape), minus.mean(0).view(self.fid_plus.shape)

    def characterization(self, pos_weight: float = 1.0, neg_weight: float = 1.0) -> Tensor:
        """The characterization score of every selection; a drop in probability below 0 counts as 0."""
        plus, minus = self.fid_plus.clamp(0, 1), self.fid_minus.clamp(0, 1)
        return characterization_score(plus, minus, pos_weight, neg_weight)

    def area(self) -> Tensor:
        """Area under the characterization score over sparsity, by trapezoids; ValueError for a single selection."""
        if self.sparsity.numel() < 2:
            raise ValueError("sparsity: expected several selections for the area below a curve, got one")
        order = self.sparsity.argsort()
        return torch.trapezoid(self.characterization()[order], self.sparsity[order])

    def table(self) -> list[dict[str, float | str]]:
        """One row for every selection, ready for a DataFrame."""
        columns = {
            "sparsity": self.sparsity,
            "size": self.size,
            "fid_plus": self.fid_plus,
            "fid_minus": self.fid_minus,
            "characterization": self.characterization(),
        }
        values = [column.reshape(-1).tolist() for column in columns.values()]
        facts = {"kind": self.kind, "form": self.form}
        return [{**dict(zip(columns, row, strict=True)), **facts} for row in zip(*values, strict=True)]


def _check_choice(value: Any, name: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def fidelity_scores(
    y: Tensor | None, y_hat: Tensor, y_hat_removed: Tensor, y_hat_kept: Tensor, *, kind: str = "model"
) -> tuple[Tensor, Tensor]:
    """The bare formulas of fid+ and fid- from predictions that are at hand.

    .. math:: fid_+ = \\frac1N \\sum_i |1(\\hat y_i = y_i) - 1(\\hat y_i^{C \\setminus S} = y_i)|, \\qquad
              fid_- = \\frac1N \\sum_i |1(\\hat y_i = y_i) - 1(\\hat y_i^{S} = y_i)|

    for the phenomenon; for the model, y is replaced by y_hat. With probabilities in place of classes, the mean drop of the
    probability of y (of the predicted class for the model): signed, as a removal may also raise it.

    Parameters
    ----------
    y : Tensor, shape (N,), or None
        True classes; not read for ``kind="model"``.
    y_hat : Tensor, shape (N,) or (N, C)
        Classes (whole numbers) predicted on the whole inputs, or probabilities (floating).
    y_hat_removed, y_hat_kept : Tensor, shape (..., N) or (..., N, C)
        The same without the explanation, and on the explanation alone. Leading dimensions, such as levels of sparsity, stay.
    kind : {"model", "phenomenon"}

    Returns
    -------
    (Tensor, Tensor)
        fid+ and fid-, of the shape of the leading dimensions, in the default dtype or that of the probabilities.

    Raises
    ------
    TypeError, ValueError
        Wrong shapes, classes that are below 0 or no whole numbers, classes beside probabilities, an unknown kind, labels
        missing for the phenomenon.

    Notes
    -----
    Source: Amara et al. (2022), "GraphFramEx: towards systematic evaluation of explainability methods for graph neural
    networks" (arXiv 2206.09677). Any number of classes.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> y, y_hat = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0])
    >>> removed, kept = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 1, 0, 1])
    >>> xf.metrics.fidelity_scores(y, y_hat, removed, kept, kind="phenomenon")
    (tensor(0.5000), tensor(0.2500))
    """
    _check_choice(kind, "kind", KINDS)
    for name, value in (("y_hat", y_hat), ("y_hat_removed", y_hat_removed), ("y_hat_kept", y_hat_kept)):
        check.check_tensor(value, name)
        if value.shape[value.dim() - y_hat.dim() :] != y_hat.shape:
            wanted = (..., *y_hat.shape)
            raise ValueError(f"{name}: expected shape {wanted}, as y_hat, got {check.shape_of(value)}")
    if y_hat.dim() != (2 if y_hat.is_floating_point() else 1) or 0 in y_hat.shape:
        raise ValueError(f"y_hat: expected classes (N,) or probabilities (N, C), got {check.shape_of(y_hat)}")
    if y is None and kind == "phenomenon":
        raise ValueError("y: expected the true classes for kind 'phenomenon', got None")
    if y_hat.is_floating_point():
        classes = target_classes(None if kind == "model" else y, y_hat, "y")
        drops = [_drop(y_hat, changed, classes).to(y_hat.dtype) for changed in (y_hat_removed, y_hat_kept)]
        return drops[0], drops[1]
    classes = y_hat if kind == "model" or y is None else check.as_tensor(y, "y").to(y_hat.device)
    if classes.shape != y_hat.shape:
        raise ValueError(f"y: expected shape {check.shape_of(y_hat)}, as y_hat, got {check.shape_of(classes)}")
    for name, value in (("y", classes), ("y_hat", y_hat), ("y_hat_removed", y_hat_removed), ("y_hat_kept", y_hat_kept)):
        if value.dtype != torch.bool:
            check_whole(value, name)
            check_classes(value, name)
    right = y_hat == classes
    shares = [((changed == classes) != right).double().mean(-1) for changed in (y_hat_removed, y_hat_kept)]
    return shares[0].to(torch.get_default_dtype()), shares[1].to(torch.get_default_dtype())


def _drop(y_hat: Tensor, changed: Tensor, classes: Tensor) -> Tensor:
    chosen = classes[:, None]
    after = changed.double().gather(-1, chosen.expand(*changed.shape[:-1], 1))[..., 0]
    return (y_hat.double().gather(1, chosen)[:, 0] - after).mean(-1)


def fidelity(
    forward: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str = "model",
    form: str = "accuracy",
    sparsity: float | Sequence[float] | None = None,
    top_k: int | Sequence[int] | None = None,
    threshold: float | Sequence[float] | None = None,
    soft: bool = False,
    baseline: Baseline = "zero",
    feature_mask: Tensor | None = None,
    patch_size: int | None = None,
    robust: bool | tuple[float, float] = False,
    n_samples: int = ROBUST_DRAWS,
    outputs: str = "auto",
    additional_forward_args: Any = (),
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Fidelity:
    """Fidelity of explanations: fid+ (without the explanation) and fid- (with nothing else), for one or many selections.

    .. math:: fid_+ = \\frac1N \\sum_i |1(\\hat y_i = y_i) - 1(\\hat y_i^{C \\setminus S} = y_i)|, \\qquad
              fid_- = \\frac1N \\sum_i |1(\\hat y_i = y_i) - 1(\\hat y_i^{S} = y_i)|

    A good explanation is necessary (fid+ near 1) and sufficient (fid- near 0). ``kind="model"`` puts the prediction on
    the whole input in the place of y. ``form="probability"`` is the mean drop of the probability of that class, which may
    be below 0.

    Parameters
    ----------
    forward : callable
        ``forward(x, *additional_forward_args)`` gives class scores (B, C); a module, or a model output with ``logits``.
    inputs : Tensor, shape (B, ...)
        Floating or whole numbers (token ids, with a number as baseline). Masks of a graph's edges, all ones, are inputs too:
        `forward` then applies them.
    attributions : Tensor
        Of the shape of ``inputs``; dimensions of 1, or missing at the end, are shared: (B, 1, H, W) explains pixels of
        images, (B, N) tokens of embeddings (B, N, D). Booleans are taken as the explanation itself.
    labels : Tensor, shape (B,), optional
        True classes, for ``kind="phenomenon"``.
    kind : {"model", "phenomenon"}
    form : {"accuracy", "probability"}
    sparsity, top_k, threshold : number or sequence of numbers, optional
        One of them selects the explanation S: the share of the features that is left out, the number that is taken, or the
        value above which they are. Largest first, ties by index. Default: sparsity 0.5, 0.6, 0.7, 0.8, 0.9.
    soft : bool
        Attributions from 0 to 1 are masks m: x m and x (1 - m), on the way to the baseline. Floating inputs.
    baseline : {"zero", "mean", "blur", "uniform"}, number, Tensor or callable
        What takes the place of a removed feature: 0; an image's mean colour (the batch's mean for other inputs); a blurred
        image; noise between a sample's extremes; or one's own, also as a function of the inputs. A number that the dtype of
        ``inputs`` can hold.
    feature_mask : Tensor of whole numbers, optional
        Group of every feature, broadcasting to the attributions; a group's attribution is the sum of its members'. Only the
        order of the numbers counts, not where they start or what they leave out. Where every sample has groups of its own,
        all the numbers of the batch are features of each, those that a sample does not have with an attribution of 0.
    patch_size : int, optional
        Square patches of images as groups; attributions of one channel.
    robust : bool or (float, float)
        Robust fidelity (Zheng et al. 2024): random subsets stay nearer to the data. alpha_1 of the explanation is removed
        for fid+, alpha_2 of all else for fid-; True means (0.1, 0.9). (1, 1) is plain fidelity.
    n_samples : int
        Subsets drawn for every sample and selection (robust only).
    outputs : {"auto", "logits", "probabilities"}
        What `forward` returns. "auto" takes it for probabilities if the rows for all inputs of this call are at least 0
        and add up to 1, else for logits. Logits that do so by chance, as those of a single sample may, are misread, and a
        sample's result can then depend on the others of the call; it never does with "logits" or "probabilities".
    additional_forward_args : tuple
        Further arguments; tensors whose first dimension is B follow their samples.
    generator : torch.Generator, optional
        Randomness of the uniform baseline and of robust fidelity.
    batch_size : int, optional
        Examples in one forward pass. Default: as many as ``memory_budget`` holds; on the CPU no more than stay in its
        caches: half a megabyte of inputs, at least four examples.
    memory_budget : int
        Bytes of changed inputs that exist at once.

    Returns
    -------
    Fidelity
        Unpacks into (fid+, fid-): 0-dimensional for one selection, (K,) for K.

    Raises
    ------
    TypeError, ValueError
        Attributions that do not fit, more than one way to select, classes out of range, an unknown name, a baseline that the
        dtype of the inputs cannot hold, soft masks on whole numbers.

    Notes
    -----
    Sources: Amara et al. (2022), GraphFramEx (arXiv 2206.09677); Zheng et al. (2024), "Towards robust fidelity for
    evaluating explainability of graph neural networks" (ICLR). All selections run through the model in one stream of
    2 K + 1 examples a sample. Removed inputs are not like the data (Hooker et al. 2019): compare baselines.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> x = torch.tensor([[1.0, 1.0, 1.0]])
    >>> result = xf.metrics.fidelity(lambda x: x @ weight, x, x * weight[:, 0], top_k=1)
    >>> result.fid_plus, result.fid_minus
    (tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    _check_choice(kind, "kind", KINDS)
    _check_choice(form, "form", FORMS)
    run = Forwards(forward, inputs, additional_forward_args, batch_size, memory_budget)
    features = Features.of(inputs, attributions, feature_mask, patch_size)
    selection = _Selection.of(features, attributions, sparsity, top_k, threshold, soft)
    if soft and not inputs.is_floating_point():
        raise TypeError(f"soft: expected False for inputs of {inputs.dtype}, which no baseline mixes with, got True")
    shares = _robust_shares(robust, soft)
    draws = check.check_count(n_samples, "n_samples")
    original = run.on_inputs()
    if original.dim() != 2:
        raise ValueError(f"forward: expected class scores (B, C) for fidelity, got {check.shape_of(original)}")
    if kind == "phenomenon" and labels is None:
        raise ValueError("labels: expected the true classes for kind 'phenomenon', got None")
    truth = None if labels is None else target_classes(labels, original, "labels")
    removal = Removal(run, features, baseline, generator)
    read = _reader(original, truth, outputs)
    if soft:
        pair = _soft(removal, read)
    elif shares is None:
        pair = _hard(removal, selection.counts, read)
    else:
        pair = _robust(removal, selection.counts, shares, draws, draw_seed(generator), read)
    everything = torch.arange(len(original), device=original.device)
    unknown = features.unknown()
    removed, kept = (part.masked_fill(unknown[:, None, None, None], math.nan) for part in pair)
    kept_outputs = _Outputs(read(original, everything)[:, None, None], removed, kept, truth)
    if threshold is not None:  # how many values are above it is unknown as well
        selection = replace(selection, counts=selection.counts.double().masked_fill(unknown[:, None], math.nan))
    return _result(kept_outputs, selection, features.count, kind, form, run.evaluations)


@dataclass(frozen=True)
class _Selection:
    """How many features, the largest first, make the explanation: (B, K)."""

    counts: Tensor
    single: bool

    @classmethod
    def of(
        cls, features: Features, attributions: Tensor, sparsity: Any, top_k: Any, threshold: Any, soft: bool
    ) -> _Selection:
        given = {"sparsity": sparsity, "top_k": top_k, "threshold": threshold}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) > 1 or (soft and chosen):
            raise ValueError(f"{chosen[-1]}: expected one way to select, got {', '.join([*chosen, *['soft'] * soft])}")
        scores = features.scores
        if soft:
            low, high = (float(v) for v in scores.aminmax())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"attributions: expected values from 0 to 1 for soft masks, got {low:g} to {high:g}")
            return cls(scores.double().sum(1, keepdim=True), True)
        if not chosen and attributions.dtype == torch.bool:
            return cls((scores > 0).sum(1, keepdim=True), True)
        name = chosen[0] if chosen else "sparsity"
        values, single = check.one_or_more(given[name] if chosen else DEFAULT_SPARSITY, name)
        return cls(torch.stack([_count(scores, name, v) for v in values], 1), single)


def _count(scores: Tensor, name: str, value: Any) -> Tensor:
    """(B,) features that one selection takes."""
    batch, features = scores.shape
    if name == "threshold":
        return (scores > check.check_number(value, name)).sum(1)
    if name == "top_k":
        count = check.check_count(value, name, 0, features)
    else:
        share = check.check_number(value, name)
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected shares from 0 to 1, got {value!r}")
        count = math.floor((1 - share) * features + 0.5)
    return torch.full((batch,), count, device=scores.device)


def _reader(original: Tensor, labels: Tensor | None, outputs: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Reads [predicted class, probability of the first prediction, probability of the label] of examples, (E, 3)."""
    first = original.argmax(1)
    of_prediction = Readout.of(original, first, outputs)
    truth = first if labels is None else labels

    def read(values: Tensor, sample: Tensor) -> Tensor:
        probabilities = of_prediction.probabilities(values.double())
        chosen = torch.stack([first[sample], truth[sample]], 1)
        return torch.cat([predicted_classes(values)[:, None].double(), probabilities.gather(1, chosen)], 1)

    return read


def _hard(removal: Removal, counts: Tensor, read: Any) -> tuple[Tensor, Tensor]:
    """The explanation replaced, and all but the explanation: intervals of ranks."""
    none, every = torch.zeros_like(counts), torch.full_like(counts, removal.features.count)
    first, last = torch.cat([none, counts], 1), torch.cat([counts, every], 1)
    ranks = ops.rank_features(removal.features.scores)
    found = removal.by_rank(ranks, first, last, read)[:, :, None]
    removed, kept = found.chunk(2, 1)
    return removed, kept


def _soft(removal: Removal, read: Any) -> tuple[Tensor, Tensor]:
    mask = removal.features.scores
    return removal.by_weight(1 - mask, read)[:, None, None], removal.by_weight(mask, read)[:, None, None]


def _robust_shares(robust: Any, soft: bool) -> tuple[float, float] | None:
    if robust is False:
        return None
    if soft:
        raise ValueError("robust: expected False beside soft masks, got both")
    shares = ROBUST_SHARES if robust is True else robust
    if not isinstance(shares, tuple) or len(shares) != 2:
        raise TypeError(f"robust: expected a bool or a pair of shares, got {robust!r}")
    for share in shares:
        if not 0 <= check.check_number(share, "robust") <= 1:
            raise ValueError(f"robust: expected shares from 0 to 1, got {robust!r}")
    return shares


def _robust(
    removal: Removal, counts: Tensor, shares: tuple[float, float], draws: int, seed: int, read: Any
) -> tuple[Tensor, Tensor]:
    """Random subsets: of the explanation for fid+, of all else for fid-; a feature goes with probability alpha."""
    batch, levels = counts.shape
    ranks = ops.rank_features(removal.features.scores)
    total = batch * levels * draws
    example = torch.arange(total, device=counts.device)
    sample, level, draw = example // (levels * draws), example // draws % levels, example % draws
    still = torch.zeros(batch, removal.features.count, device=counts.device)

    def gone(part: slice, explanation: bool, share: float) -> Tensor:
        of = sample[part]
        inside = ranks[of] < counts[of, level[part]][:, None]
        # The same uniform numbers at every level, so that levels are compared and not draws.
        uniform = ops.perturb(still, sample=of, draw=draw[part], radius=1, ball="linf", seed=seed)
        return ((uniform + 1) / 2 < share) & (inside if explanation else ~inside)

    removed = removal.by_mask(lambda part: gone(part, True, shares[0]), sample, read)
    kept = removal.by_mask(lambda part: gone(part, False, shares[1]), sample, read)
    return removed.view(batch, levels, draws, 3), kept.view(batch, levels, draws, 3)


def _result(outputs: _Outputs, selection: _Selection, features: int, kind: str, form: str, evaluations: int) -> Fidelity:
    plus, minus = outputs.terms(kind, form)
    size = selection.counts.double().mean(0)
    values = [plus.mean(0), minus.mean(0), size, 1 - size / features]
    fid_plus, fid_minus, size, sparsity = [value[0] for value in values] if selection.single else values
    return Fidelity(fid_plus, fid_minus, size, sparsity, kind, form, evaluations, outputs)
