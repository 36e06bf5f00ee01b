"""What a store asks of an influence object: solutions of some test points, scores of some rows, and what identifies it."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import ops
from .._fingerprint import callable_name, fingerprint, pieces
from .._version import __version__
from ._functionals import Functional, check_functional
from ._torch_rows import check_batch, count_of
from .influence import Influence
from .results import Convention, Solution
from .solvers import prepare
from .torch_influence import TorchInfluence

__all__ = ["Source", "source_of"]

# Training rows that are read at once where only their bytes matter.
ROWS_AT_ONCE = 4096
# Training rows by whose outputs and losses a model is known.
FIRST_ROWS = 4


class Source(Protocol):
    """Scores of test points, a tile at a time.

    Attributes
    ----------
    shape : tuple of int
        (n_test, n_train).
    dtype : torch.dtype
        Of the scores.
    parameters : int
        Of the model.
    row_bytes : int
        Work space for one training row of a tile.
    convention : Convention
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    parameters: int
    row_bytes: int
    convention: Convention

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: hashes of data and model, options, versions."""

    def take_solver(self, solver: str | None) -> str:
        """Settle on the given solver, else on one for all test points; the name of the one that was taken."""

    def solve(self, at: slice) -> Solution:
        """Solutions (M, parameters) of some test points."""

    def scores(self, solutions: Tensor, rows: slice) -> Tensor:
        """(M, b) for solutions (M, parameters) of `dtype` on the CPU, and b training rows."""


def source_of(influence: Any, X_test: Any, y_test: Any, of: Functional) -> Source:
    """TypeError for what has no scores that can be taken in tiles."""
    if type(influence) is Influence:
        return _GlmSource(influence, X_test, y_test, of)
    if type(influence) is TorchInfluence:
        if of != "loss":
            raise ValueError(f"of: expected 'loss' for TorchInfluence, got {of!r}")
        return _TorchSource(influence, X_test, y_test)
    raise TypeError(f"influence: expected an Influence or TorchInfluence, got {type(influence).__name__}")


def _versions() -> dict[str, Any]:
    return {"xai_fast": __version__, "torch": torch.__version__}


class _GlmSource:
    def __init__(self, influence: Influence, X_test: Any, y_test: Any, of: Functional) -> None:
        check_functional(of)
        self._influence, self._of, self._problem = influence, of, influence.problem
        self._X, self._y = influence._test_rows(X_test, y_test, of)
        self.shape, self.dtype = (len(self._X), influence.n), self._problem.dtype
        self.parameters = self._problem.size
        self.row_bytes = (self._problem.data.dim + self._problem.outputs) * self.dtype.itemsize
        self.convention = influence._convention(of)

    def identity(self) -> dict[str, Any]:
        problem, head, options = self._problem, self._influence.head, self._influence._options
        rows = (block for _, block in problem.data.blocks(problem.data.dim * problem.data.dtype.itemsize))
        weights = "none" if problem.sample_weight is None else fingerprint(pieces(problem.sample_weight))
        return {
            **_versions(),
            "X_train": fingerprint(rows),
            "y_train": fingerprint(pieces(problem.labels)),
            "sample_weight": weights,
            "X_test": fingerprint(pieces(self._X)),
            "y_test": "none" if self._y is None else fingerprint(pieces(self._y)),
            "head": fingerprint([(head.parameters, head.family, head.intercept, head.smoothing)]),
            "l2": problem.l2,
            "damping": problem.damping,
            "train_gradient": self._influence.train_gradient,
            "of": callable_name(self._of),
            "solver": self._influence._solver,
            **{name: options[name] for name in ("tolerance", "seed", "batch_size")},
        }

    def take_solver(self, solver: str | None) -> str:
        solver = solver or self._influence._pick(self.shape[0])
        self._influence = copy.copy(self._influence)
        self._influence._solver = solver
        return solver

    def solve(self, at: slice) -> Solution:
        y = None if self._y is None else self._y[at]
        return self._influence._solve(self._influence._gradients(self._X[at], y, self._of).flatten(1))

    def scores(self, solutions: Tensor, rows: slice) -> Tensor:
        S = solutions.to(self._problem.device).reshape(-1, *self._influence.head.parameters.shape)
        X, intercept = self._problem.data.take(rows), self._influence.head.intercept
        products = ops.influence_scores(X, self._influence._rows.delta(rows), S, intercept=intercept)
        return products.add_(self._influence._rows.offset(S)).neg_().cpu()


class _TorchSource:
    def __init__(self, influence: TorchInfluence, X_test: Any, y_test: Any) -> None:
        self._influence, self._problem = influence, influence.problem
        self._test = check_batch((X_test, y_test), "X_test, y_test")
        if not count_of(self._test):
            raise ValueError("X_test: expected at least one row, got none")
        self.shape, self.dtype = (count_of(self._test), influence.n), self._problem.dtype
        self.parameters = self._problem.size
        self.row_bytes = self.parameters * self.dtype.itemsize
        self.convention = influence.convention

    def identity(self) -> dict[str, Any]:
        influence, loss = self._influence, self._influence._loss
        rows = (batch for _, batch in influence._rows.batches(ROWS_AT_ONCE))
        return {
            **_versions(),
            "train_loader": fingerprint(rows),
            "X_test, y_test": fingerprint([self._test]),
            "model": fingerprint([(loss.state.theta, loss.state.fixed, loss.description())]),
            "loss_fn": callable_name(loss.loss_fn),
            "forward pass": fingerprint([self._problem.first_outputs(FIRST_ROWS)]),
            "params": fingerprint([tuple(loss.names)]),
            "l2": self._problem.l2,
            "damping": self._problem.damping,
            "curvature": influence._curvature,
            "train_gradient": influence._train_gradient,
            "solver": influence._solver,
            **{name: influence._options[name] for name in ("tolerance", "seed", "max_steps", "batch_size")},
            "rank": influence._rank,
        }

    def take_solver(self, solver: str | None) -> str:
        influence = copy.copy(self._influence)
        seed, rank = influence._options["seed"], influence._rank
        prepared = prepare(self._problem, solver or influence._solver, self.shape[0], rank=rank, seed=seed)
        if prepared.solver == "exact":
            # "auto" may have been told a number of steps for CG.
            influence._options = {**influence._options, "max_steps": None}
        influence._solver, influence._prepared = prepared.solver, prepared
        self._influence = influence
        return prepared.solver

    def solve(self, at: slice) -> Solution:
        gradients = self._influence._loss.gradients(*tree_map(lambda leaf: leaf[at], self._test))
        return self._influence._solve(gradients)

    def scores(self, solutions: Tensor, rows: slice) -> Tensor:
        influence = self._influence
        batch = influence._rows.read(torch.arange(rows.start, rows.stop))
        gradients = influence._of_objective(influence._loss.gradients(*batch))
        return -(solutions.to(gradients.device) @ gradients.T).cpu()
