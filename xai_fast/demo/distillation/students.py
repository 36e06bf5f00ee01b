"""Three teachers on the diamonds, and the additive students that are distilled from them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xai_fast._optional import optional_import
from xai_fast.distill import GAM, Fidelity, fit_gam
from xai_fast.distill.screening import PAIR_CELLS, coarse_cells, pair_gains

from ..repeatable import repeatable
from .diamonds import FEATURES, LEVELS, Diamonds

__all__ = [
    "CUT",
    "NETWORK",
    "TICKS",
    "TREES",
    "Distilled",
    "Effort",
    "PriceNetwork",
    "Split",
    "answers",
    "distil",
    "same_share",
    "split_diamonds",
    "train_network",
    "typical_gap",
    "variance_share",
]

NETWORK, TREES, CUT = "Price, network", "Price, trees", "Cut, trees"
# Ticks of `distil`.
TICKS = 2
# Width of the hidden layers, rows of a step.
WIDTH, BATCH = 64, 256
RATE = 5e-3
CLASSES = LEVELS["cut"]


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes
    ----------
    rows, tests : int
        Diamonds that teachers and students learn from, and that neither sees.
    epochs, trees : int
        Training of the network; boosting rounds.
    pairs : int
        Budget of pairs, and of triples, of the students.
    bins : (int, int, int)
        Values along an axis of main effects, pairs and triples.
    splits : int
        How often the rows are halved for refits.
    budgets : tuple of int
        Other numbers of pairs that are tried.
    """

    rows: int
    tests: int
    epochs: int
    trees: int
    pairs: int
    bins: tuple[int, int, int]
    splits: int
    budgets: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        """For `fit_gam`."""
        return dict(zip(("bins", "pair_bins", "triple_bins"), self.bins, strict=True))


@dataclass(frozen=True)
class Split:
    """The diamonds that could be: rows X (n, 9) and log prices y (n,), for training and for testing; and the wrong ones."""

    X: Tensor
    y: Tensor
    held: Tensor
    truth: Tensor
    diamonds: Diamonds

    @property
    def twins(self) -> int:
        """Test rows that are among the training rows, too, with the same price: the table lists some diamonds twice."""
        both = ((self.X, self.y), (self.held, self.truth))
        known, tested = ([tuple(row) for row in torch.cat([X, y[:, None]], 1).tolist()] for X, y in both)
        seen = set(known)
        return sum(row in seen for row in tested)


@dataclass(frozen=True)
class Distilled:
    """A teacher with its students.

    Attributes
    ----------
    name : str
    teacher : nn.Module or estimator
    features : tuple of str
    X, held : Tensor, shapes (n, F) and (m, F)
    truth : Tensor, shape (m,)
        The truth: log prices or classes.
    additive, gam : GAM
        Main effects alone; with pairs and triples.
    fidelity : Fidelity
        Of `gam`, on the test rows.
    gaps : tuple of float
        By order: see `typical_gap`; NaN for classes.
    own : dict of str to float
        R2 of log prices or accuracy of classes on the test rows: "teacher", "main effects", "student", and of a linear
        model (price) or the commonest class (cut): "plain".
    gains : Tensor, shape (F, F)
        What the screening said of every pair: see `pair_gains`.
    teacher_seconds, seconds : float
        Training of the teacher; distillation of `gam`.
    """

    name: str
    teacher: Any
    features: tuple[str, ...]
    X: Tensor
    held: Tensor
    truth: Tensor
    additive: GAM
    gam: GAM
    fidelity: Fidelity
    gaps: tuple[float, ...]
    own: dict[str, float]
    gains: Tensor
    teacher_seconds: float
    seconds: float

    @property
    def is_classifier(self) -> bool:
        return self.gam.kind == "logits"

    def chosen(self, order: int) -> list[tuple[int, ...]]:
        """Features of the terms of an order that were fitted: purification adds pairs that a triple held a part of."""
        last = self.gam.record.stages[-1][0]
        return [term.features for term in last if term.order == order]


class PriceNetwork(nn.Module):
    """Log price (n,) of rows (n, F), standardised inside: two hidden layers.

    Parameters
    ----------
    X : Tensor, shape (n, F)
        For the means and the scales.

    Examples
    --------
    >>> PriceNetwork(torch.rand(10, 3))(torch.rand(4, 3)).shape
    torch.Size([4])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, X: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", X.mean(0).float())
        self.register_buffer("scale", X.std(0).float())
        widths = (X.shape[1], WIDTH, WIDTH)
        hidden = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers((x - self.mean) / self.scale).squeeze(-1)
        return out


def split_diamonds(diamonds: Diamonds, effort: Effort, device: torch.device) -> Split:
    """Draw training and test rows among the diamonds that could be."""
    kept = (~diamonds.wrong).nonzero().squeeze(1)
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    test, train = order[: effort.tests], order[effort.tests : effort.tests + effort.rows]
    X, y = diamonds.X.to(device), diamonds.price.log().to(device)
    return Split(X[train], y[train], X[test], y[test], diamonds)


def train_network(X: Tensor, y: Tensor, epochs: int, seed: int = 0) -> PriceNetwork:
    """Fit the network to rows X (n, F) and log prices y (n,) by AdamW with a one-cycle schedule."""
    with repeatable(seed):
        model = PriceNetwork(X).to(X.device)
        rows, wanted = X.float(), (y - y.mean()).float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        steps = epochs * -(-len(X) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(epochs):
            for index in torch.randperm(len(X)).to(X.device).split(BATCH):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(rows[index]), wanted[index]).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            model.layers[-1].bias += y.mean()  # type: ignore[operator]
    return model.eval()


def answers(teacher: Any, X: Tensor) -> Tensor:
    """What a teacher says of rows X (n, F): (n,) or (n, C) in float64, on the device of X."""
    if isinstance(teacher, nn.Module):
        with torch.no_grad():
            out: Tensor = teacher(X.float()).double()
        return out
    method = teacher.decision_function if hasattr(teacher, "decision_function") else teacher.predict
    return torch.as_tensor(method(X.cpu().numpy()), dtype=torch.float64, device=X.device)


def distil(name: str, split: Split, effort: Effort, tick: Callable[[], object]) -> Distilled:
    """Train a teacher and distil it.

    Parameters
    ----------
    name : {NETWORK, TREES, CUT}
    split : Split
    effort : Effort
    tick : callable
        Called `TICKS` times.
    """
    place = FEATURES.index("cut")
    used = [f for f in range(len(FEATURES)) if name != CUT or f != place]
    X, held = split.X[:, used], split.held[:, used]
    y, truth = (split.X[:, place], split.held[:, place]) if name == CUT else (split.y, split.truth)
    started = time.perf_counter()
    teacher = train_network(X, y, effort.epochs) if name == NETWORK else _boosted(name, X, y, effort)
    teacher_seconds = time.perf_counter() - started
    tick()
    features = tuple(FEATURES[f] for f in used)
    started = time.perf_counter()
    gam = fit_gam(teacher, X, interactions=effort.pairs, max_order=3, feature_names=features, **effort.options)
    seconds = time.perf_counter() - started
    additive = fit_gam(teacher, X, feature_names=features, **effort.options)
    said = answers(teacher, held)
    stages = (additive, _up_to_pairs(gam, teacher, X, effort), gam)[: 1 + len({t.order for t in gam.terms} - {1})]
    gaps = tuple(typical_gap(g.predict(held), said) if said.dim() == 1 else float("nan") for g in stages)
    own = {
        "teacher": _own(said, truth),
        "main effects": _own(additive.predict(held), truth),
        "student": _own(gam.predict(held), truth),
        "plain": _plain(X, y, held, truth, said.dim() == 2),
    }
    gains = _gains(teacher, additive, X)
    tick()
    return Distilled(
        name=name,
        teacher=teacher,
        features=features,
        X=X,
        held=held,
        truth=truth,
        additive=additive,
        gam=gam,
        fidelity=gam.fidelity(held),
        gaps=gaps,
        own=own,
        gains=gains,
        teacher_seconds=teacher_seconds,
        seconds=seconds,
    )


def _boosted(name: str, X: Tensor, y: Tensor, effort: Effort) -> Any:
    ensemble = optional_import("sklearn.ensemble", "demo")
    kind = ensemble.HistGradientBoostingClassifier if name == CUT else ensemble.HistGradientBoostingRegressor
    # A class has its own trees: five times as many.
    rounds = max(10, effort.trees // 3) if name == CUT else effort.trees
    return kind(max_iter=rounds, early_stopping=False, random_state=0).fit(X.cpu().numpy(), y.cpu().numpy())


def _up_to_pairs(gam: GAM, teacher: Any, X: Tensor, effort: Effort) -> GAM:
    """The student without its triples."""
    pairs = [term.features for term in gam.record.stages[-1][0] if term.order == 2]
    if len(gam.record.stages) < 3:
        return gam
    return fit_gam(teacher, X, interactions=pairs, feature_names=gam.feature_names, **effort.options)


def _gains(teacher: Any, additive: GAM, X: Tensor) -> Tensor:
    """The screening's measure for all pairs, from what main effects alone leave of the teacher."""
    residual = (answers(teacher, X) - additive.predict(X)).reshape(len(X), -1).T
    cells = coarse_cells(X, [additive.term((f,)).grids[0] for f in range(X.shape[1])], PAIR_CELLS)
    return pair_gains(cells, residual.contiguous(), torch.ones(len(X), dtype=torch.float64, device=X.device)).cpu()


# ---- measures -------------------------------------------------------------------------------------------------------------


def variance_share(found: Tensor, wanted: Tensor) -> float:
    """R2 of found (n,) for wanted (n,).

    Examples
    --------
    >>> variance_share(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
    1.0
    """
    return float(1 - ((found - wanted) ** 2).mean() / ((wanted - wanted.mean()) ** 2).mean())


def typical_gap(found: Tensor, wanted: Tensor) -> float:
    """Median difference of log prices (n,), as a share of the price.

    Examples
    --------
    >>> round(typical_gap(torch.log(torch.tensor([110.0])), torch.log(torch.tensor([100.0]))), 3)
    0.1
    """
    return float((found - wanted).abs().median().expm1())


def same_share(found: Tensor, classes: Tensor) -> float:
    """Share of the rows of scores found (n, C) whose highest is that of the class (n,).

    Examples
    --------
    >>> same_share(torch.eye(2), torch.tensor([0, 0]))
    0.5
    """
    return float((found.argmax(1) == classes.long()).double().mean())


def _own(found: Tensor, truth: Tensor) -> float:
    return same_share(found, truth) if found.dim() == 2 else variance_share(found, truth)


def _plain(X: Tensor, y: Tensor, held: Tensor, truth: Tensor, is_classifier: bool) -> float:
    """What the commonest class, or a linear model, gives on the test rows."""
    if is_classifier:
        return float((truth == y.mode().values).double().mean())
    A, B = (torch.cat([Z, torch.ones_like(Z[:, :1])], 1) for Z in (X, held))
    return variance_share(B @ torch.linalg.lstsq(A, y[:, None]).solution.squeeze(1), truth)
