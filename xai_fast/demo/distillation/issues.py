"""What can be wrong with an additive student, each shown on one: the same function with other shapes, too many terms, rows
that the data do not hold, features that say the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xai_fast.distill import GAM, fit_gam

from .diamonds import FEATURES
from .students import Distilled, Effort, Split, answers, typical_gap, variance_share

__all__ = [
    "SIZE",
    "Exchange",
    "Explosion",
    "Plane",
    "Refits",
    "Twin",
    "explosion",
    "extrapolation",
    "middle",
    "plane",
    "refits",
    "twin",
]

# Features that all say how large a diamond is.
SIZE = ("carat", "x", "y", "z")
# What is exchanged between diamonds, one column or several at a time: title and columns.
EXCHANGES = (
    ("none", ()),
    ("color", ("color",)),
    ("carat", ("carat",)),
    ("x", ("x",)),
    ("every column for itself", FEATURES),
)
# Along each axis of the plane of carat and x.
POINTS = 60


# ---- identifiability ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twin:
    """A student and the same function with other shapes.

    Attributes
    ----------
    pair : tuple of int
        Whose table took over the main effects of both its features.
    before, after : GAM
        With pure terms; with the main effects inside the pair.
    back : GAM
        `after`, purified.
    predictions, shapes, restored : float
        Largest differences: of predictions on the test rows, of the main effects that were moved, and of those after
        purification, each over the data.
    shown : dict of int to (float, float)
        Where nearly all data of the features lie.
    """

    pair: tuple[int, int]
    before: GAM
    after: GAM
    back: GAM
    predictions: float
    shapes: float
    restored: float
    shown: dict[int, tuple[float, float]]

    def importances(self) -> dict[tuple[int, ...], tuple[float, float, float]]:
        """Of the main effects and the pair: before, after, purified again."""
        found: dict[tuple[int, ...], tuple[float, float, float]] = {}
        for features in ((self.pair[0],), (self.pair[1],), self.pair):
            first, second, third = (g.term(features).importance for g in (self.before, self.after, self.back))
            found[features] = first, second, third
        return found


def twin(distilled: Distilled) -> Twin:
    """Move what the grid of the strongest pair can say of its main effects into the pair, and back by `purify`."""
    gam = distilled.gam
    pair = max((t for t in gam.terms if t.order == 2), key=lambda t: t.importance)
    terms = {t.features: t for t in gam.terms}
    table = pair.values
    for axis, coarse in enumerate(pair.grids):
        main = terms[(coarse.feature,)]
        index, share = main.grids[0].encode(coarse.points)
        moved = (main.values[index] * share).sum(1)
        terms[main.features] = replace(main, values=main.values - main.grids[0].lift(coarse) @ moved)
        table = table + (moved[:, None] if axis == 0 else moved)
    terms[pair.features] = replace(pair, values=table)
    after = replace(gam, terms=tuple(terms[t.features] for t in gam.terms))
    back = after.purify()
    X = distilled.held
    parts = [[g.explain(X)[:, _places(g, pair.features)] for g in both] for both in ((after, gam), (back, gam))]
    shapes, restored = (float((one - other).abs().max()) for one, other in parts)
    predictions = float((after.predict(X) - gam.predict(X)).abs().max())
    i, j = pair.features
    shown = {f: middle(distilled.X[:, f]) for f in pair.features}
    return Twin((i, j), gam, after, back, predictions, shapes, restored, shown)


def _places(gam: GAM, features: Sequence[int]) -> list[int]:
    """Of main effects among the terms."""
    return [[t.features for t in gam.terms].index((f,)) for f in features]


# ---- explosion ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explosion:
    """What a budget of pairs buys: R2 on the test rows by number of pairs, and values of all tables."""

    r2: dict[int, float]
    values: dict[int, int]


def explosion(distilled: Distilled, effort: Effort, tick: Callable[[], object]) -> Explosion:
    """Distil with other budgets of pairs, without triples; a tick for each."""
    students = {0: distilled.additive}
    for count in effort.budgets:
        students[count] = fit_gam(
            distilled.teacher, distilled.X, interactions=count, feature_names=distilled.features, **effort.options
        )
        tick()
    said = answers(distilled.teacher, distilled.held)
    r2 = {count: variance_share(g.predict(distilled.held), said) for count, g in students.items()}
    return Explosion(r2, {count: sum(t.values.numel() for t in g.terms) for count, g in students.items()})


# ---- extrapolation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Rows that the data do not hold, and how far students and teacher part on them.

    Attributes
    ----------
    title : str
    rows : int
    r2 : dict of str to float
        Of "main effects" and "student", for the teacher's answers.
    gap, worst : dict of str to float
        See `typical_gap`; and the largest difference of log prices.
    supported : dict of str to float
        Share of the rows that `GAM.support` takes for rows of the data.
    """

    title: str
    rows: int
    r2: dict[str, float]
    gap: dict[str, float]
    worst: dict[str, float]
    supported: dict[str, float]


def extrapolation(distilled: Distilled, split: Split) -> list[Exchange]:
    """Test rows with columns exchanged between diamonds, then the wrong rows of the table."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for title, names in EXCHANGES:
        X = distilled.held.clone()
        for name in names:
            place = torch.randperm(len(X), generator=generator).to(X.device)
            X[:, FEATURES.index(name)] = X[place, FEATURES.index(name)]
        found.append(_exchange(title, distilled, X))
    diamonds = split.diamonds
    for title, rows in (("impossible", diamonds.impossible), ("contradictory", diamonds.contradictory)):
        found.append(_exchange(title, distilled, diamonds.X[rows].to(distilled.X.device)))
    return found


def _exchange(title: str, distilled: Distilled, X: Tensor) -> Exchange:
    said = answers(distilled.teacher, X)
    students = {"main effects": distilled.additive, "student": distilled.gam}
    found = {name: g.predict(X) for name, g in students.items()}
    return Exchange(
        title,
        len(X),
        {name: variance_share(f, said) for name, f in found.items()},
        {name: typical_gap(f, said) for name, f in found.items()},
        {name: float((f - said).abs().max()) for name, f in found.items()},
        {name: float(g.support(X).double().mean()) for name, g in students.items()},
    )


@dataclass(frozen=True)
class Plane:
    """Log prices of the median diamond with every carat and every size.

    Attributes
    ----------
    carat, x : Tensor, shape (P,)
        y and z go with x, in their median proportions.
    teacher, student : Tensor, shape (P, P)
        By carat, then x.
    data : Tensor, shape (m, 2)
        carat and x of test rows.
    near, far : float
        Typical gap of student and teacher where there are training rows of such carat and x, and where there are none.
    """

    carat: Tensor
    x: Tensor
    teacher: Tensor
    student: Tensor
    data: Tensor
    near: float
    far: float


def plane(distilled: Distilled) -> Plane:
    """Carat and size changed independently of each other, all else at its median."""
    X = distilled.held
    places = [FEATURES.index("carat"), FEATURES.index("x")]
    carat, x = (torch.linspace(*middle(distilled.X[:, p], 0.002), POINTS, dtype=X.dtype, device=X.device) for p in places)
    at = X.median(0).values.repeat(POINTS**2, 1)
    at[:, places] = torch.cartesian_prod(carat, x)
    for name in ("y", "z"):
        place = FEATURES.index(name)
        at[:, place] = at[:, places[1]] * (X[:, place] / X[:, places[1]]).median()
    said, found = answers(distilled.teacher, at), distilled.gam.predict(at)
    steps = torch.stack([carat[1] - carat[0], x[1] - x[0]])
    cells = ((distilled.X[:, places] - torch.stack([carat[0], x[0]])) / steps).round().long()
    cells = cells[((cells >= 0) & (cells < POINTS)).all(1)]
    is_near = torch.zeros(POINTS, POINTS, dtype=torch.bool, device=X.device)
    is_near[cells[:, 0], cells[:, 1]] = True
    inside = is_near.reshape(-1)
    return Plane(
        carat.cpu(),
        x.cpu(),
        said.reshape(POINTS, POINTS).cpu(),
        found.reshape(POINTS, POINTS).cpu(),
        X[:2000, places].cpu(),
        typical_gap(found[inside], said[inside]),
        typical_gap(found[~inside], said[~inside]),
    )


def middle(column: Tensor, share: float = 0.005) -> tuple[float, float]:
    """The range of a column (n,) without the outermost rows, a share on each side.

    Examples
    --------
    >>> middle(torch.arange(101.0), 0.01)
    (1.0, 99.0)
    """
    low, high = column.quantile(column.new_tensor([share, 1 - share])).tolist()
    return low, high


# ---- correlated features --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refits:
    """Students of one teacher, each from a half of the rows.

    Attributes
    ----------
    students : list of GAM
    r2 : list of float
        On the test rows.
    spread, importance : Tensor, shape (F,)
        Of every main effect: standard deviation over the refits, root mean square over the test rows; and the standard
        deviation over the rows of their mean.
    sum_spread, sum_importance : float
        Of the sum of the main effects of `SIZE`.
    picked : Counter of tuple of int
        How many of the students have a pair.
    """

    students: list[GAM]
    r2: list[float]
    spread: Tensor
    importance: Tensor
    sum_spread: float
    sum_importance: float
    picked: Counter[tuple[int, ...]]


def refits(distilled: Distilled, effort: Effort, tick: Callable[[], object]) -> Refits:
    """Halve the rows at random `effort.splits` times and distil from every half; a tick for each half."""
    students, parts, picked = [], [], Counter[tuple[int, ...]]()
    features = len(distilled.features)
    for split in range(effort.splits):
        order = torch.randperm(len(distilled.X), generator=torch.Generator().manual_seed(split)).to(distilled.X.device)
        for half in order.chunk(2):
            gam = fit_gam(
                distilled.teacher,
                distilled.X[half],
                interactions=effort.pairs,
                feature_names=distilled.features,
                seed=split,
                **effort.options,
            )
            students.append(gam)
            parts.append(gam.explain(distilled.held)[:, :features])
            picked.update(t.features for t in gam.terms if t.order == 2)
            tick()
    every = torch.stack(parts)
    size = every[:, :, [distilled.features.index(name) for name in SIZE]].sum(2)
    said = answers(distilled.teacher, distilled.held)
    return Refits(
        students,
        [variance_share(g.predict(distilled.held), said) for g in students],
        every.var(0).mean(0).sqrt().cpu(),
        every.mean(0).std(0).cpu(),
        float(size.var(0).mean().sqrt()),
        float(size.mean(0).std()),
        picked,
    )
