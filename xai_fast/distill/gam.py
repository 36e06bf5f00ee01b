"""The student: an additive model of tables, its terms, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..influence.results import Solution
from ..ops import _checks as check
from ._design import Encoder
from ._teacher import Teacher, read_rows
from .binning import Grid
from .fidelity import ORDERS, Fidelity, measure
from .purify import lower_effects
from .report import Report, make_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GAM", "Record", "Term", "contributions", "purify_terms"]

# Rows that are encoded together.
CHUNK = 1 << 15


@dataclass(frozen=True, eq=False)
class Term:
    """The part of a student that depends on one, two or three features.

    Attributes
    ----------
    features : tuple of int
    names : tuple of str
    grids : tuple of Grid
        Where the values sit, one for each feature.
    values : Tensor of float64, shape (bins...) or (bins..., C)
        C outputs where the teacher gives (n, C).
    weights : Tensor of float64, shape (bins...)
        Share of the data on each value; they add up to 1.

    Examples
    --------
    >>> from xai_fast.distill import fit_gam
    >>> X = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> term = fit_gam(lambda x: 3 * x[:, 0], X).terms[0]
    >>> term.names, term.order, tuple(term.values.shape), round(term.importance, 1)
    (('x0',), 1, (64,), 0.9)
    """

    features: tuple[int, ...]
    names: tuple[str, ...]
    grids: tuple[Grid, ...]
    values: Tensor
    weights: Tensor

    @property
    def order(self) -> int:
        """Number of features."""
        return len(self.features)

    @property
    def edges(self) -> tuple[Tensor, ...]:
        """For each feature its knots, its bin edges or its categories."""
        return tuple(g.points for g in self.grids)

    @property
    def table(self) -> Tensor:
        """values as (bins..., C), also for one output."""
        return self.values.reshape(*self.weights.shape, -1)

    @property
    def importance(self) -> float:
        """Weighted standard deviation of the values; of several outputs the root of their mean variance."""
        w, v = self.weights.reshape(-1), self.table.flatten(0, -2)
        w = w / w.sum()
        return float((w @ (v - w @ v) ** 2).mean().sqrt())

    def __repr__(self) -> str:
        size = " x ".join(str(g.size) for g in self.grids)
        return f"Term({' x '.join(self.names)}: {size} values, importance {self.importance:.3g})"


@dataclass(frozen=True)
class Record:
    """What a fit leaves for later questions.

    Attributes
    ----------
    stages : tuple of (terms, intercept)
        The students of lower orders and the whole one, as they were fitted.
    held_out : (X, Y, w) or None
        Rows that neither fitted nor chose anything.
    train_r2 : float
    teacher : Teacher
    constant : tuple of str
        Features with one value only, left out.
    candidates : dict of int to int
        How many terms of each order there could be.
    """

    stages: tuple[tuple[tuple[Term, ...], Tensor], ...]
    held_out: tuple[Tensor, Tensor, Tensor] | None
    train_r2: float
    teacher: Teacher
    constant: tuple[str, ...]
    candidates: dict[int, int]


@dataclass(frozen=True, eq=False)
class GAM:
    r"""A generalised additive model with interactions that was distilled from a teacher by :func:`fit_gam`.

    .. math:: f(x) = c + \sum_i h_i(x_i) + \sum_{ij} h_{ij}(x_i, x_j) + \sum_{ijk} h_{ijk}(x_i, x_j, x_k)

    Attributes
    ----------
    terms : tuple of Term
        Main effects, pairs, triples.
    intercept : Tensor of float64, shape () or (C,)
        The mean of f over the data.
    feature_names : tuple of str
    kind : {"logits", "raw"}
        What f is.
    smoothing : tuple of float
        Penalty of each order.
    solutions : tuple of Solution
        Certificates of the solves, one for each order: residual of the normal equations, steps.
    moved : dict of int to float
        What the last purification took out of the terms of each order, as a share of the variance of f.

    Examples
    --------
    >>> from xai_fast.distill import fit_gam
    >>> gam = fit_gam(lambda x: x[:, 0] * x[:, 1], torch.rand(2000, 3) - 0.5, interactions=1)
    >>> gam
    GAM(4 terms: 3 main effects, 1 pair; raw outputs)
    >>> gam.terms[-1].names, gam.fidelity().r2 > 0.999
    (('x0', 'x1'), True)
    """

    terms: tuple[Term, ...]
    intercept: Tensor
    feature_names: tuple[str, ...]
    kind: str
    smoothing: tuple[float, ...]
    solutions: tuple[Solution, ...]
    record: Record = field(repr=False)
    moved: dict[int, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = []
        for order, (one, many) in enumerate((("main effect", ORDERS[0]), ("pair", ORDERS[1]), ("triple", ORDERS[2])), 1):
            count = sum(t.order == order for t in self.terms)
            if count:
                counts.append(f"{count} {one if count == 1 else many}")
        return f"GAM({len(self.terms)} terms: {', '.join(counts)}; {self.kind} outputs)"

    def _rows(self, X: Any) -> Tensor:
        """X as a tensor where the functions are; an array is brought there."""
        rows = read_rows(X, len(self.feature_names))
        if isinstance(X, Tensor):
            check.check_same_device(rows, "X", self.intercept.device)
        return rows.to(self.intercept.device)

    def predict(self, X: Any) -> Tensor:
        """f(X) for X (n, F), a tensor or an array: (n,) or (n, C), in the dtype of X (float64 if that is not floating).

        Outside the data every function goes on as a constant (see :meth:`support`).
        """
        rows = self._rows(X)
        return self._out(predict_terms(self.terms, self.intercept, rows), rows)

    def predict_proba(self, X: Any) -> Tensor:
        """Probabilities in the shape of :meth:`predict`: of the positive class for (n,), of all classes for (n, C).

        Raises
        ------
        ValueError
            If the outputs are raw.
        """
        if self.kind != "logits":
            raise ValueError("predict_proba: expected a student of logits, got one of raw outputs (outputs= of fit_gam)")
        f = self.predict(X)
        return f.sigmoid() if f.dim() == 1 else f.softmax(1)

    def explain(self, X: Any) -> Tensor:
        """What each term adds, (n, terms) or (n, terms, C): with the intercept they add up to :meth:`predict`."""
        rows = self._rows(X)
        return self._out(contributions(self.terms, rows), rows)

    def purify(self) -> GAM:
        """The same model with terms that hold no part of smaller ones: functional ANOVA with the data's joint weights.

        What a triple holds that depends on two features moves to the pair (a new term if there is none), what a pair holds
        that depends on one to the main effect, the mean of a main effect to the intercept. :func:`fit_gam` returns
        students for which this was done.

        Returns
        -------
        GAM
            Its `moved` says how much moved. Predictions differ by rounding errors only, for all rows whose categories
            were in the data.

        Notes
        -----
        Source: see :func:`purify`.
        """
        terms, intercept, moved = purify_terms(self.terms, self.intercept, self.feature_names)
        return replace(self, terms=terms, intercept=intercept, moved=moved)

    def fidelity(self, X: Any = None, *, outputs: Any = None) -> Fidelity:
        """Agreement with the teacher for every order.

        Parameters
        ----------
        X : Tensor or array, shape (n, F), optional
            Default: rows that were held out of the fit and of the choice of the smoothing.
        outputs : Tensor or array, optional
            The teacher's outputs on X; needed where the teacher was a tensor, but for the rows of the fit.

        Returns
        -------
        Fidelity

        Raises
        ------
        ValueError
            No X and no held-out rows; X without outputs of a teacher that was a tensor.
        """
        if X is None:
            rows, y, w = self._held_out("fidelity")
        else:
            rows = self._rows(X)
            if outputs is None and not self.record.teacher.knows(rows):
                raise ValueError("outputs: expected the teacher's outputs on X, since the teacher was a tensor, got none")
            y = self.record.teacher(rows, outputs)
            w = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        found = []
        for order, (terms, intercept) in enumerate(self.record.stages):
            f = predict_terms(terms, intercept, rows)
            name = ORDERS[max(t.order for t in terms) - 1] if order else ORDERS[0]
            found.append(measure(name, len(terms), y, f, w, self.kind))
        share = 1 - found[-1].r2
        bounds = tuple(sorted((1 - self.record.train_r2, share)))
        on = "held-out rows" if X is None else "given rows"
        return Fidelity(tuple(found), len(rows), on, share, (bounds[0], bounds[1]))

    def support(self, X: Any) -> Tensor:
        """Whether the student saw data where these rows lie, a boolean (n,).

        False for a row with a feature outside the range (or the categories) of the data, or in a cell of a pair or a
        triple one of whose values no data determine: there the answer is the smoothness penalty's.
        """
        rows = self._rows(X)
        found = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        encode = Encoder(rows)
        for term in self.terms:
            if term.order == 1:
                found &= term.grids[0].is_inside(rows[:, term.features[0]])
            else:
                index, share = encode(term.grids)
                found &= ((term.weights.reshape(-1)[index] > 0) | (share == 0)).all(1)
        return found

    def report(self) -> Report:
        """What may be wrong with this student as an explanation: see :class:`Report`."""
        X, _, w = self._held_out("report")
        return make_report(self, X, contributions(self.terms, X), w)

    def plot(self, term: int | Sequence[int] | None = None, *, target: int | None = None, **options: Any) -> Figure:
        """Pictures of one term (its place in `terms`, or its features), or of the most important ones.

        Parameters
        ----------
        term : int, tuple of int, or None
        target : int, optional
            One output of several; default: lines for all outputs of a main effect, the first output of a pair.
        options
            Of :func:`xai_fast.viz.gam.plot_term` or :func:`xai_fast.viz.gam.plot_terms`.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from ..viz.gam import plot_term, plot_terms

        if term is None:
            return plot_terms(self, target=target, **options)
        return plot_term(self.term(term), target=target, **options)

    def term(self, which: int | Sequence[int]) -> Term:
        """A term by its place or by its features.

        Raises
        ------
        ValueError
            If there is no such term.
        """
        if isinstance(which, int):
            if -len(self.terms) <= which < len(self.terms):
                return self.terms[which]
            raise ValueError(f"term: expected a place below {len(self.terms)}, got {which}")
        wanted = tuple(sorted(which))
        for term in self.terms:
            if term.features == wanted:
                return term
        raise ValueError(f"term: expected the features of a term, got {tuple(which)}")

    def _out(self, values: Tensor, rows: Tensor) -> Tensor:
        values = values.squeeze(-1) if self.intercept.dim() == 0 else values
        return values.to(rows.dtype) if rows.dtype.is_floating_point else values

    def _held_out(self, asked: str) -> tuple[Tensor, Tensor, Tensor]:
        if self.record.held_out is None:
            what = "expected X" if asked == "fidelity" else "expected a student with held-out rows"
            raise ValueError(f"{asked}: {what}, since nothing was held out (holdout=0)")
        return self.record.held_out


def contributions(terms: Sequence[Term], X: Tensor) -> Tensor:
    """(n, terms, C) in float64."""
    parts = []
    for rows in X.split(CHUNK):
        encode = Encoder(rows)
        columns = []
        for term in terms:
            index, share = encode(term.grids)
            columns.append((term.table.flatten(0, -2)[index] * share[:, :, None]).sum(1))
        parts.append(torch.stack(columns, 1))
    return torch.cat(parts)


def predict_terms(terms: Sequence[Term], intercept: Tensor, X: Tensor) -> Tensor:
    """(n, C) in float64."""
    return torch.cat([contributions(terms, rows).sum(1) + intercept for rows in X.split(CHUNK)])


def purify_terms(
    terms: Sequence[Term], intercept: Tensor, names: tuple[str, ...]
) -> tuple[tuple[Term, ...], Tensor, dict[int, float]]:
    """Pure terms, the intercept, and by order what moved as a share of the variance of all terms."""
    pool = {t.features: t for t in terms}
    c = intercept.reshape(-1)
    moved: dict[int, float] = {}
    for order in (3, 2):
        for term in [t for t in pool.values() if t.order == order]:
            table, effects = lower_effects(term.table, term.weights)
            gone = ((term.table - table) ** 2).sum(-1)
            moved[order] = moved.get(order, 0.0) + float((gone * term.weights).sum() / term.weights.sum())
            pool[term.features] = replace(term, values=table.reshape(term.values.shape))
            for axis, effect in zip(reversed(range(order)), effects, strict=True):
                _add(pool, term, axis, effect, names)
    for term in [t for t in pool.values() if t.order == 1]:
        mean = term.weights @ term.table / term.weights.sum()
        moved[1] = moved.get(1, 0.0) + float((mean**2).sum())
        pool[term.features] = replace(term, values=(term.table - mean).reshape(term.values.shape))
        c = c + mean
    variance = sum(t.importance**2 * t.table.shape[-1] for t in pool.values())
    ordered = tuple(sorted(pool.values(), key=lambda t: (t.order, t.features)))
    return ordered, c.reshape(intercept.shape), {k: v / variance if variance else 0.0 for k, v in sorted(moved.items())}


def _add(pool: dict[tuple[int, ...], Term], source: Term, axis: int, effect: Tensor, names: tuple[str, ...]) -> None:
    """Add what a term holds of all axes but one to the term of those."""
    grids = tuple(g for a, g in enumerate(source.grids) if a != axis)
    features = tuple(g.feature for g in grids)
    if features not in pool:
        trailing = source.values.shape[source.order :]
        values = effect.reshape(*effect.shape[:-1], *trailing)
        pool[features] = Term(features, tuple(names[f] for f in features), grids, values, source.weights.sum(axis))
        return
    own = pool[features]
    for place, (fine, coarse) in enumerate(zip(own.grids, grids, strict=True)):
        effect = torch.tensordot(fine.lift(coarse), effect.movedim(place, 0), 1).movedim(0, place)
    pool[features] = replace(own, values=own.values + effect.reshape(own.values.shape))
