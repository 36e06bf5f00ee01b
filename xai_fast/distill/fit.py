"""Distillation: the teacher's outputs, the grids, the interactions, the solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..influence._warn import warn_user
from ..influence.solvers import NotConverged
from ..ops import _checks as check
from ._design import Grids
from ._solve import FINE, FIRST, Fitted, Rows, Stage
from ._teacher import Teacher, read_rows
from .binning import BASES, Grid, coarsen, make_grid
from .fidelity import measure
from .gam import GAM, Record, Term, purify_terms
from .screening import PAIR_CELLS, TRIPLE_CELLS, coarse_cells, pair_gains, triple_candidates, triple_gains

__all__ = ["fit_gam"]

# Main effects of less than this share of the teacher's variance do not count for heredity.
HEREDITY = 1e-4
# A triple must gain this many times what chance alone makes it vary by.
CLEAR = 4.0
# Values of a main effect by default. Many rows also determine more of them.
USUAL_BINS, MANY_BINS, MANY_ROWS = 64, 256, 10_000
# Cells of one table: its penalty and its projection are dense matrices of this size.
CELLS = 4096


def fit_gam(
    teacher: Any,
    X: Any,
    *,
    interactions: int | Sequence[Sequence[int]] = 0,
    max_order: int = 2,
    bins: int | None = None,
    pair_bins: int = 16,
    triple_bins: int = 8,
    basis: str = "linear",
    outputs: str = "auto",
    target: int | None = None,
    categorical: Sequence[int] = (),
    sample_weight: Any = None,
    smoothing: float | Sequence[float] | str = "auto",
    heredity: bool = False,
    holdout: float = 0.2,
    feature_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> GAM:
    r"""Distil a teacher into a generalised additive model with interactions.

    .. math:: \min_h \frac{1}{\sum w} \sum_r w_r \left(y(x_r) - c - \sum_t h_t(x_r)\right)^2 + \sum_t \lambda_{|t|} P(h_t)

    with y the teacher's outputs, h_t a function of one, two or three features on a grid of quantiles, and P its squared
    second differences along every axis divided by the number of its values. All outputs are solved for at once, by a
    Cholesky factor up to 4096 values of all tables and by block conjugate gradients beyond; lambda is chosen for each order
    on held-out rows.

    Parameters
    ----------
    teacher : nn.Module, callable, estimator, Tensor or array
        Called on rows of X, gives (n,) or (n, C); a module runs in evaluation mode, in its own dtype and on its device. Of a
        scikit-learn estimator decision_function, predict_proba or predict. Or its outputs on X.
    X : Tensor or array, shape (n, F)
        Rows of the data that the student is to hold on. They decide what is a main effect and what an interaction.
    interactions : int, or sequence of tuples of 2 or 3 features
        A number: that many pairs, chosen by what they explain of the main effects' residual (fewer if there are fewer).
    max_order : {2, 3}
        3: with a number of interactions, also up to as many triples of which two pairs were chosen, where they clearly
        explain more than chance would.
    bins, pair_bins, triple_bins : int
        Values of a main effect (by default 64, and 256 from 10,000 rows on), and along each axis of a pair and a triple. The
        coarser grids are part of the finer.
    basis : {"linear", "steps"}
        Straight lines between knots at quantiles, or constants in bins.
    outputs : {"auto", "logits", "probabilities", "raw"}
        What the teacher gives; the student is fitted to logits (of C probabilities: to their logarithms less the mean over
        the classes) or to raw outputs. auto: logits for (n, C) with C > 1, raw for (n,); of an estimator what it has, in
        this order.
    target : int, optional
        Distil this one output only; of several logits it is raw then.
    categorical : sequence of int
        Features whose values are names: one value each, no order. In pairs and triples the rarest share one value.
    sample_weight : Tensor or array, shape (n,), optional
    smoothing : float, sequence of float, or "auto"
        lambda, of all orders or of each.
    heredity : bool
        Choose interactions only among features that have a main effect. A pure interaction, such as a product of two
        centred features, is then not found.
    holdout : float
        Share of the rows that do not fit: one half of them chooses the smoothing, the other measures fidelity (all of them
        where the smoothing is given).
    feature_names : sequence of str, optional
        Default: x0, x1, ...
    batch_size : int, optional
        Rows on which the teacher runs together, 8192 by default.
    seed : int
        For the held-out rows; or
    generator : torch.Generator, optional
    progress : bool
        Show a bar while the teacher runs (needs tqdm).

    Returns
    -------
    GAM
        Purified: its terms hold no part of smaller terms.

    Raises
    ------
    TypeError, ValueError
        NaN or infinity in X or in the teacher's outputs, with the number of rows; wrong shapes; interactions of features
        that do not exist or are constant; no feature that varies; tables of more than 4096 values in a pair or a triple.

    Warns
    -----
    NotConverged
        If the normal equations were not solved to a relative residual of 1e-6.

    Notes
    -----
    A feature with one value only is left out; the report names it. Grids lie at equal shares of the data, and penalties
    count in steps of the grid: up to interpolation a student does not change with monotone transformations of features.
    Pairs are chosen at once, from one residual: of correlated features the wrong one may be taken.
    Sources: Lou, Caruana, Gehrke & Hooker (2013), "Accurate Intelligible Models with Pairwise Interactions" (GA2M); Eilers &
    Marx (1996), "Flexible smoothing with B-splines and penalties"; Hooker (2007) and Lengerich et al. (2020) for what makes
    terms identifiable; Tan et al. (2018), "Distill-and-Compare", for additive students of black boxes.

    Examples
    --------
    >>> from xai_fast.distill import fit_gam
    >>> X = torch.rand(4000, 4) - 0.5
    >>> gam = fit_gam(lambda x: x[:, 0] ** 2 + 4 * x[:, 1] * x[:, 2], X, interactions=1)
    >>> [term.features for term in gam.terms if term.order == 2], gam.fidelity().r2 > 0.999
    ([(1, 2)], True)
    """
    rows = read_rows(X)
    seed = check.check_seed(seed)
    check.check_generator(generator)
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    if bins is None:
        bins = MANY_BINS if len(rows) >= MANY_ROWS else USUAL_BINS
    settings = _Settings(bins, pair_bins, triple_bins, basis, max_order, heredity, smoothing, holdout)
    names = _names(feature_names, rows.shape[1])
    reader = Teacher(teacher, outputs, target, batch_size, progress)
    y = reader(rows)
    data = _Data.split(rows, y, _weights(sample_weight, rows), settings, generator)
    axes = _Axes.of(data.fit[0], settings, _categorical(categorical, rows.shape[1]))
    wanted = _interactions(interactions, axes, names)
    stages, fits = _fit_orders(data, axes, settings, wanted)
    return _student(stages, fits, data, reader, axes, names)


@dataclass(frozen=True)
class _Settings:
    bins: int
    pair_bins: int
    triple_bins: int
    basis: str
    max_order: int
    heredity: bool
    smoothing: float | Sequence[float] | str
    holdout: float

    def __post_init__(self) -> None:
        for name in ("bins", "pair_bins", "triple_bins"):
            object.__setattr__(self, name, check.check_count(getattr(self, name), name, 2))
        if self.basis not in BASES:
            raise ValueError(f"basis: expected one of {', '.join(BASES)}, got {self.basis!r}")
        object.__setattr__(self, "max_order", check.check_count(self.max_order, "max_order", 2, 3))
        if check.check_at_least_zero(self.holdout, "holdout") >= 1:
            raise ValueError(f"holdout: expected a share below 1, got {self.holdout!r}")
        if self.is_auto and self.holdout == 0:
            raise ValueError("smoothing: expected numbers where nothing is held out (holdout=0), got 'auto'")
        self.levels(3)

    @property
    def is_auto(self) -> bool:
        return isinstance(self.smoothing, str)

    def levels(self, orders: int) -> list[float]:
        """Where the smoothing of each order starts, or what it is."""
        if isinstance(self.smoothing, str):
            if self.smoothing != "auto":
                raise ValueError(f"smoothing: expected numbers or 'auto', got {self.smoothing!r}")
            # At twice the knots, second differences of a smooth function are a quarter, and their squares a sixteenth.
            return [FIRST * max(1.0, self.bins / USUAL_BINS) ** 4, FIRST, FIRST][:orders]
        given = self.smoothing if isinstance(self.smoothing, Sequence) else [self.smoothing] * 3
        levels = [check.check_at_least_zero(s, "smoothing") for s in given]
        if not 1 <= len(levels) <= 3:
            raise ValueError(f"smoothing: expected one number for each order, got {len(levels)}")
        return (levels + levels[-1:] * 3)[:orders]


@dataclass(frozen=True)
class _Data:
    """Rows that fit, that choose the smoothing, that measure: (X, Y (C, n) centred, w summing to 1)."""

    fit: Rows
    validation: Rows | None
    held_out: Rows | None
    mean: Tensor

    @staticmethod
    def split(X: Tensor, y: Tensor, w: Tensor, settings: _Settings, generator: torch.Generator) -> _Data:
        order = torch.randperm(len(X), generator=generator, device=generator.device).to(X.device)
        order = order[w[order] > 0]
        out = round(len(order) * settings.holdout)
        chosen = out // 2 if settings.is_auto else 0
        needed = [len(order) - out, *([out - chosen] if settings.holdout else []), *([chosen] if settings.is_auto else [])]
        if min(needed) < 2:
            raise ValueError(f"X: expected enough rows for holdout={settings.holdout}, got {len(order)} with weight")
        held, validation, fit = order[: out - chosen], order[out - chosen : out], order[out:]
        mean = w[fit] @ y[fit] / w[fit].sum()

        def part(index: Tensor) -> Rows | None:
            return (X[index], (y[index] - mean).T.contiguous(), w[index] / w[index].sum()) if len(index) else None

        first = part(fit)
        assert first is not None
        return _Data(first, part(validation), part(held), mean)


@dataclass(frozen=True)
class _Axes:
    """The grids of every feature that varies, for terms of each order."""

    by_order: tuple[dict[int, Grid], ...]
    features: int

    @staticmethod
    def of(X: Tensor, settings: _Settings, categorical: set[int]) -> _Axes:
        fine = {}
        for f in range(X.shape[1]):
            grid = make_grid(X[:, f], f, settings.bins, settings.basis, f in categorical)
            if grid.size > 1 and bool((X[:, f] != X[0, f]).any()):
                fine[f] = grid
        if not fine:
            raise ValueError(f"X: expected a feature that varies, got {X.shape[1]} constant ones")
        pair, triple = {}, {}
        for f, grid in fine.items():
            mass = torch.bincount(grid.encode(X[:, f])[0][:, 0], minlength=grid.size)
            pair[f] = coarsen(grid, settings.pair_bins, mass)
            merged = torch.zeros(pair[f].size, dtype=torch.float64, device=X.device)
            merged.index_add_(0, pair[f].encode(X[:, f])[0][:, 0], torch.ones_like(X[:, f], dtype=torch.float64))
            triple[f] = coarsen(pair[f], settings.triple_bins, merged)
        return _Axes((fine, pair, triple), X.shape[1])

    def grids(self, features: tuple[int, ...]) -> Grids:
        found = tuple(self.by_order[len(features) - 1][f] for f in features)
        cells = math.prod(g.size for g in found)
        if len(found) > 1 and cells > CELLS:
            raise ValueError(f"interactions: expected tables of at most {CELLS} values, got {cells} for features {features}")
        return found


def _fit_orders(
    data: _Data, axes: _Axes, settings: _Settings, wanted: int | list[tuple[int, ...]]
) -> tuple[list[Stage], list[Fitted]]:
    """Main effects alone, then with pairs, then with triples: each stage starts from the one before."""
    terms: list[tuple[int, ...]] = [(f,) for f in axes.by_order[0]]
    stages: list[Stage] = []
    fits: list[Fitted] = []
    for order in (1, 2, 3):
        if order > 1:
            new = _new_terms(order, wanted, stages[-1], fits[-1], axes, settings)
            if not new:
                continue
            terms = terms + new
        stage = Stage([axes.grids(t) for t in terms], *data.fit, data.validation)
        levels, start = settings.levels(order), None
        if fits:
            known = fits[-1].values
            levels = [*fits[-1].smoothing, *levels[len(fits[-1].smoothing) :]]
            start = torch.cat([known, known.new_zeros(len(known), stage.design.size - known.shape[1])], 1)
        is_free = [settings.is_auto and o in stage.orders for o in range(1, order + 1)]
        fits.append(stage.fit(levels, is_free, start))
        stages.append(stage)
        residual = float(fits[-1].solution.residual.max())
        if residual > 100 * FINE:
            warn_user(f"fit_gam: residual {residual:.1e} of the normal equations at order {order}", NotConverged)
    return stages, fits


def _new_terms(
    order: int, wanted: int | list[tuple[int, ...]], stage: Stage, fitted: Fitted, axes: _Axes, settings: _Settings
) -> list[tuple[int, ...]]:
    if isinstance(wanted, list):
        return [t for t in wanted if len(t) == order]
    if not wanted or order > settings.max_order:
        return []
    X, Y, w = stage.X, stage.Y, stage.w
    residual = Y - stage.design.apply(fitted.values)
    usable = _with_effect(stage, fitted, settings)
    count = PAIR_CELLS if order == 2 else TRIPLE_CELLS
    cells = coarse_cells(X, [axes.by_order[0 if order == 2 else 2][f] for f in usable], count)
    if order == 2:
        gains = pair_gains(cells, residual, w, count)
        a, b = torch.triu_indices(len(usable), len(usable), 1).tolist()
        best = gains[a, b].argsort(descending=True, stable=True)[:wanted].tolist() if a else []
        return sorted((usable[a[k]], usable[b[k]]) for k in best)
    place = {f: k for k, f in enumerate(usable)}
    pairs = [tuple(g.feature for g in t) for t in stage.design.terms if len(t) == 2]
    triples = triple_candidates([(p[0], p[1]) for p in pairs], usable)
    if not triples:
        return []
    gains, noise = triple_gains(cells, residual, w, [(place[i], place[j], place[k]) for i, j, k in triples], count)
    best = gains.argsort(descending=True, stable=True)[:wanted].tolist()
    return sorted(triples[k] for k in best if gains[k] > CLEAR * noise[k])


def _with_effect(stage: Stage, fitted: Fitted, settings: _Settings) -> list[int]:
    """Features that may interact."""
    tables = stage.design.split(fitted.values)
    parts = zip(stage.design.terms, tables, stage.weights, strict=True)
    mains = [(t[0].feature, table, w) for t, table, w in parts if len(t) == 1]
    if not settings.heredity:
        return [f for f, _, _ in mains]
    total = float((stage.Y**2 @ stage.w).sum())
    left = float(((stage.Y - stage.design.apply(fitted.values)) ** 2 @ stage.w).sum())
    # What a main effect of nothing has as its variance by chance: at most the residual's, a row's share for each value.
    chance = left * float((stage.w**2).sum())
    return [f for f, table, w in mains if float((w @ table**2).sum()) > max(HEREDITY * total, chance * len(w))]


def _student(
    stages: list[Stage], fits: list[Fitted], data: _Data, reader: Teacher, axes: _Axes, names: tuple[str, ...]
) -> GAM:
    found = []
    mean = data.mean.reshape(()) if reader.is_flat else data.mean
    for stage, fitted in zip(stages, fits, strict=True):
        terms = []
        for grids, table, weights in zip(stage.design.terms, stage.design.split(fitted.values), stage.weights, strict=True):
            features = tuple(g.feature for g in grids)
            values = table.squeeze(-1) if reader.is_flat else table
            terms.append(Term(features, tuple(names[f] for f in features), grids, values, weights))
        found.append((tuple(terms), mean))
    last, Y, w = stages[-1], stages[-1].Y, stages[-1].w
    train = measure("", 0, Y.T, last.design.apply(fits[-1].values).T, w, "raw").r2
    held = data.held_out
    if held is not None:
        held = held[0], held[1].T + data.mean, held[2]
    used = len(axes.by_order[0])
    candidates = {order: math.comb(used, order) for order in (1, 2, 3)}
    constant = tuple(names[f] for f in range(axes.features) if f not in axes.by_order[0])
    record = Record(tuple(found), held, train, reader, constant, candidates)
    pure, intercept, moved = purify_terms(*found[-1], names)
    solutions = tuple(f.solution for f in fits)
    return GAM(pure, intercept, names, reader.kind, tuple(fits[-1].smoothing), solutions, record, moved)


# ---- what comes in ---------------------------------------------------------------------------------------------------


def _interactions(wanted: Any, axes: _Axes, names: tuple[str, ...]) -> int | list[tuple[int, ...]]:
    number = check.as_number(wanted)
    if isinstance(number, int) and not isinstance(number, bool):
        return check.check_count(number, "interactions", 0)
    if isinstance(wanted, (str, bool)) or not isinstance(wanted, Sequence):
        raise TypeError(f"interactions: expected a number or a list of tuples of features, got {wanted!r}")
    found = []
    for term in wanted:
        is_tuple = isinstance(term, Sequence) and not isinstance(term, str)
        if not is_tuple or len(term) not in (2, 3) or len(set(term)) != len(term):
            raise ValueError(f"interactions: expected tuples of 2 or 3 different features, got {term!r}")
        features = tuple(sorted(check.check_count(f, "interactions", 0, axes.features - 1) for f in term))
        for f in features:
            if f not in axes.by_order[0]:
                raise ValueError(f"interactions: expected features that vary, got {names[f]}, which is constant")
        found.append(features)
    return sorted(set(found))


def _categorical(categorical: Any, features: int) -> set[int]:
    return {check.check_count(f, "categorical", 0, features - 1) for f in categorical}


def _names(given: Sequence[str] | None, features: int) -> tuple[str, ...]:
    if given is None:
        return tuple(f"x{f}" for f in range(features))
    if len(given) != features:
        raise ValueError(f"feature_names: expected {features} names, got {len(given)}")
    return tuple(str(name) for name in given)


def _weights(given: Any, X: Tensor) -> Tensor:
    if given is None:
        return torch.ones(len(X), dtype=torch.float64, device=X.device)
    w = check.as_tensor(given, "sample_weight").to(X.device, torch.float64)
    if w.shape != (len(X),):
        raise ValueError(f"sample_weight: expected shape ({len(X)},), got {tuple(w.shape)}")
    if not bool((w.isfinite() & (w >= 0)).all()) or not bool((w > 0).any()):
        raise ValueError("sample_weight: expected finite numbers of at least 0, some above 0, got others")
    return w
