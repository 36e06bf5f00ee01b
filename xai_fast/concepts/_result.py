"""What TCAV found: scores by class, layer and concept, with their tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import _checks as check
from ._statistics import CORRECTIONS, adjusted, student_two_sided, welch
from .cav import CAV

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TCAV", "check_test"]

TESTS = ("welch", "exchangeable")

Nested = dict[str, dict[str, Any]]


@dataclass(frozen=True, repr=False)
class TCAV:
    """Scores of :func:`tcav`. T classes, L layers, C concepts, R random sets.

    ``result.score[layer][concept]`` and the like are for one class; of several, ``result.of(target)`` gives each.

    Attributes
    ----------
    layers, concepts, random_sets : tuple of str
    targets : tuple of int or None
    scores : Tensor of float64, shape (T, L, C, R)
        Share of inputs with S > 0, by the random set that the concept is told from.
    negatives : Tensor, shape (T, L, C, R)
        Share with S < 0.
    magnitudes : Tensor, shape (T, L, C, R)
        Sum of positive S / sum |S|.
    sensitivities : Tensor, shape (T, L, C, R)
        Mean S.
    null_scores : Tensor, shape (T, L, R)
        Of each random set, tested as a concept: the mean over all other random sets.
    random_scores : Tensor, shape (T, L, R, R)
        Behind them: share of inputs with S > 0 for the CAV of one random set (row) told from another (column); NaN for one
        and the same.
    accuracies : Tensor, shape (L, C, R)
        Of the CAVs.
    p_values, adjusted : Tensor, shape (T, L, C)
        Two-sided, as they are and corrected for the number of layers x concepts x classes.
    cavs : dict of str to dict of str to list of CAV
        ``cavs[layer][concept]``: one for each random set.
    test, correction, alpha
        As given.
    gradient_passes, forward_passes : int
        What it cost.

    Examples
    --------
    >>> import xai_fast.concepts
    >>> sets = [torch.rand(9, 4) for _ in range(5)]
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
    >>> result = xai_fast.concepts.tcav(model, "0", torch.rand(6, 4), [0, 2], {"a": torch.rand(9, 4)}, sets)
    >>> result
    TCAV(targets=(0, 2), layers=('0',), concepts=('a',), random_sets=5, gradient_passes=2)
    >>> 0 <= result.of(2).score["0"]["a"] <= 1, len(result.table())
    (True, 2)
    """

    layers: tuple[str, ...]
    concepts: tuple[str, ...]
    random_sets: tuple[str, ...]
    targets: tuple[int | None, ...]
    scores: Tensor
    negatives: Tensor
    magnitudes: Tensor
    sensitivities: Tensor
    null_scores: Tensor
    random_scores: Tensor
    accuracies: Tensor
    p_values: Tensor
    adjusted: Tensor
    cavs: dict[str, dict[str, list[CAV]]]
    test: str
    correction: str | None
    alpha: float
    gradient_passes: int
    forward_passes: int

    @classmethod
    def build(
        cls,
        layers: tuple[str, ...],
        concepts: tuple[str, ...],
        random_sets: tuple[str, ...],
        targets: tuple[int | None, ...],
        parts: Sequence[tuple[Tensor, Tensor, dict[str, list[CAV]]]],
        *,
        test: str,
        correction: str | None,
        **facts: Any,
    ) -> TCAV:
        """From each layer's (shares (T, P, 4), accuracies (P,), CAVs), pairs of concepts before those of random sets."""
        count, repeats = len(concepts), len(random_sets)
        # Few numbers and many steps of a continued fraction: on the CPU from here on.
        shares = torch.stack([part[0] for part in parts], 1).cpu()
        own = shares[:, :, : count * repeats].unflatten(2, (count, repeats))
        matrix = _random_matrix(shares[:, :, count * repeats :], repeats)
        null = matrix.nanmean(-1)
        accuracies = torch.stack([part[1][: count * repeats].view(count, repeats) for part in parts]).cpu()
        scores = own[..., 0]
        p = _p_values(scores, null, test)
        kinds = dict(zip(("scores", "negatives", "magnitudes", "sensitivities"), own.unbind(-1), strict=True))
        return cls(
            layers,
            concepts,
            random_sets,
            targets,
            null_scores=null,
            random_scores=matrix,
            accuracies=accuracies,
            p_values=p,
            adjusted=adjusted(p, correction),
            cavs={layer: part[2] for layer, part in zip(layers, parts, strict=True)},
            test=test,
            correction=correction,
            **kinds,
            **facts,
        )

    def of(self, target: int | None) -> TCAV:
        """The same for one class. p-values stay corrected for all."""
        if target not in self.targets:
            raise ValueError(f"target: expected one of {list(self.targets)}, got {target!r}")
        at = self.targets.index(target)
        names = (
            "scores",
            "negatives",
            "magnitudes",
            "sensitivities",
            "null_scores",
            "random_scores",
            "p_values",
            "adjusted",
        )
        return replace(self, targets=(target,), **{name: getattr(self, name)[at : at + 1] for name in names})

    def with_test(self, test: str, *, correction: str | None = "bonferroni", alpha: float = 0.05) -> TCAV:
        """The same scores by another test, correction or level, as :func:`tcav` takes them; the model is not run.

        Examples
        --------
        >>> import xai_fast.concepts
        >>> sets = [torch.rand(9, 4) for _ in range(5)]
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
        >>> result = xai_fast.concepts.tcav(model, "0", torch.rand(6, 4), 0, {"a": torch.rand(9, 4)}, sets)
        >>> result.with_test("exchangeable", correction=None).test
        'exchangeable'
        """
        check_test(test, correction, alpha)
        p = _p_values(self.scores, self.null_scores, test)
        return replace(self, p_values=p, adjusted=adjusted(p, correction), test=test, correction=correction, alpha=alpha)

    def random_p_values(self, test: str) -> Tensor:
        """p-values (T, L, R) of the random sets, each tested in turn as a concept against the others, without correction.

        They mean nothing, so a test that keeps its level calls a share of alpha of them significant: a look at how far a
        test can be trusted on this model. The p-values of a layer are not independent of each other.

        Raises
        ------
        ValueError
            An unknown test; fewer than 3 random sets.

        Examples
        --------
        >>> import xai_fast.concepts
        >>> sets = [torch.rand(9, 4) for _ in range(5)]
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
        >>> result = xai_fast.concepts.tcav(model, "0", torch.rand(6, 4), 0, {"a": torch.rand(9, 4)}, sets)
        >>> result.random_p_values("exchangeable").shape
        torch.Size([1, 1, 5])
        """
        check_test(test, None, self.alpha)
        repeats = len(self.random_sets)
        if repeats < 3:
            raise ValueError(f"random_sets: expected at least 3, to test one against the others, got {repeats}")
        found = []
        for place in range(repeats):
            others = [other for other in range(repeats) if other != place]
            null = self.random_scores[:, :, others][..., others].nanmean(-1)
            found.append(_p_values(self.random_scores[:, :, place, others].unsqueeze(2), null, test))
        return torch.cat(found, -1)

    @property
    def score(self) -> Nested:
        """Mean score over the random sets."""
        return self._nested(self._one(self.scores).mean(-1))

    @property
    def std(self) -> Nested:
        """Standard deviation of the score over the random sets."""
        return self._nested(self._one(self.scores).std(-1))

    @property
    def magnitude(self) -> Nested:
        """Sum of positive S / sum |S|, mean over the random sets."""
        return self._nested(self._one(self.magnitudes).mean(-1))

    @property
    def sensitivity(self) -> Nested:
        """Mean S, over inputs and random sets."""
        return self._nested(self._one(self.sensitivities).mean(-1))

    @property
    def p_value(self) -> Nested:
        """Before the correction."""
        return self._nested(self._one(self.p_values))

    @property
    def p_adjusted(self) -> Nested:
        """After the correction."""
        return self._nested(self._one(self.adjusted))

    @property
    def significant(self) -> Nested:
        """Whether the corrected p-value is below alpha."""
        return self._nested(self._one(self.adjusted) < self.alpha)

    @property
    def accuracy(self) -> Nested:
        """Held-out accuracy of the CAVs, mean over the random sets."""
        return self._nested(self.accuracies.mean(-1))

    def table(self) -> list[dict[str, Any]]:
        """One row for each class, layer and concept."""
        rows = []
        for target in self.targets:
            one = self.of(target)
            nulls = one.null_scores[0].mean(-1).tolist()
            columns = {
                "score": one.score,
                "std": one.std,
                "magnitude": one.magnitude,
                "sensitivity": one.sensitivity,
                "p_value": one.p_value,
                "p_adjusted": one.p_adjusted,
                "significant": one.significant,
                "accuracy": one.accuracy,
            }
            for layer, null in zip(self.layers, nulls, strict=True):
                for concept in self.concepts:
                    row = {"target": target, "layer": layer, "concept": concept, "random_score": null}
                    rows.append(row | {name: values[layer][concept] for name, values in columns.items()})
        return rows

    def to_captum(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Captum's shape of result, each concept with each random set as an experimental set.

        ``{"0-1": {layer: {"sign_count": (2,), "magnitude": (2,)}}}``: concepts have the ids 0 .. C-1, random sets
        C .. C+R-1. The second entry is that of the random set, told from the concept by the opposite vector. As in Captum's
        code the magnitude is mean S; here for a vector of unit length.
        """
        counts = torch.stack([self._one(self.scores), self._one(self.negatives)], -1).float()
        mean = self._one(self.sensitivities)
        magnitude = torch.stack([mean, -mean], -1).float()
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for c in range(len(self.concepts)):
            for r in range(len(self.random_sets)):
                found[f"{c}-{len(self.concepts) + r}"] = {
                    layer: {"sign_count": counts[i, c, r], "magnitude": magnitude[i, c, r]}
                    for i, layer in enumerate(self.layers)
                }
        return found

    def plot(self, **options: Any) -> Figure:
        """Bars by layer; see :func:`xai_fast.viz.concepts.plot_tcav`."""
        from ..viz.concepts import plot_tcav

        return plot_tcav(self, **options)

    def __repr__(self) -> str:
        names = f"targets={self.targets}, layers={self.layers}, concepts={self.concepts}"
        return f"TCAV({names}, random_sets={len(self.random_sets)}, gradient_passes={self.gradient_passes})"

    def _one(self, values: Tensor) -> Tensor:
        if len(self.targets) > 1:
            raise ValueError(f"target: expected one of {list(self.targets)}, chosen with .of(target), got all of them")
        return values[0]

    def _nested(self, values: Tensor) -> Nested:
        rows = values.tolist()
        return {layer: dict(zip(self.concepts, row, strict=True)) for layer, row in zip(self.layers, rows, strict=True)}


def check_test(test: str, correction: str | None, alpha: float) -> None:
    """ValueError for what is no test, correction or level."""
    if test not in TESTS:
        raise ValueError(f"test: expected one of {', '.join(TESTS)}, got {test!r}")
    if correction not in CORRECTIONS:
        raise ValueError(f"correction: expected one of {', '.join(map(str, CORRECTIONS))}, got {correction!r}")
    if not 0 < check.check_number(alpha, "alpha") < 1:
        raise ValueError(f"alpha: expected a level between 0 and 1, got {alpha!r}")


def _random_matrix(pairs: Tensor, repeats: int) -> Tensor:
    """(T, L, R, R): the score of each random set against each other, from pairs (T, L, R (R-1) / 2, 4)."""
    matrix = pairs.new_full((*pairs.shape[:2], repeats, repeats), torch.nan)
    row, column = torch.triu_indices(repeats, repeats, 1, device=pairs.device)
    matrix[:, :, row, column] = pairs[..., 0]
    matrix[:, :, column, row] = pairs[..., 1]
    return matrix


def _p_values(scores: Tensor, null: Tensor, test: str) -> Tensor:
    """(T, L, C) from scores (T, L, C, R) and those of random sets (T, L, R)."""
    return welch(scores, null[:, :, None])[2] if test == "welch" else _one_more(scores.mean(-1), null)


def _one_more(mean: Tensor, null: Tensor) -> Tensor:
    """p that means (T, L, C) come from where those of R random sets (T, L, R) come from: Student's prediction interval."""
    repeats = null.shape[-1]
    gap = mean - null.mean(-1, keepdim=True)
    spread = null.std(-1, keepdim=True) * (1 + 1 / repeats) ** 0.5
    t = torch.where(gap.abs() <= 1e-12, 0.0, gap / spread)
    return student_two_sided(t, torch.tensor(repeats - 1.0, device=mean.device))
