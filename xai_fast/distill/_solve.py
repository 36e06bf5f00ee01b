"""Penalised least squares of all terms at once, and the choice of the penalty on rows that were held out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..influence.problems import Problem
from ..influence.results import Solution
from ..influence.solvers import solve_quietly
from ._design import Design, Grids

__all__ = ["FIRST", "Fitted", "Rows", "Stage", "by_block", "projector", "term_penalty"]

Rows = tuple[Tensor, Tensor, Tensor]

# Added to the penalty so that every value is determined, also those that terms share and those without data.
RIDGE = 1e-7
# Residuals of the normal equations: for the choice of the penalty, and of the result.
ROUGH, FINE = 1e-4, 1e-8
STEPS = 1000
# Values of all tables up to which the equations are written out and factored: correlated features cost CG many steps.
DIRECT = 4096
# Rows from which preconditioners are made.
PRECONDITIONER_ROWS = 40_000
# The first penalty tried, the factor between tries, how many at most, and the gain for which one more is worth it.
FIRST, FACTOR, TRIES, WORTH = 1e-2, 30.0, 6, 1e-3


def term_penalty(grids: Grids) -> Tensor:
    """(size, size): the penalties of the axes side by side, for a table on the product of the grids."""
    total = torch.zeros(1, 1, dtype=torch.float64, device=grids[0].points.device)
    for axis, grid in enumerate(grids):
        factors = [torch.eye(g.size, dtype=torch.float64, device=g.points.device) for g in grids]
        factors[axis] = grid.penalty()
        total = total + functools.reduce(torch.kron, factors)
    return total


class _NormalEquations(Problem):
    """H = Q (B^T diag(w) B + S) Q + (1 - Q) / size on the tables that hold no part of smaller terms.

    Q projects on them, term by term. Without it a pair could trade with its main effects: the solution would not be
    identifiable, and the equations would be nearly singular.
    """

    def __init__(self, stage: Stage, smoothing: list[float]) -> None:
        self._stage, self._smoothing = stage, smoothing
        self._S = [
            (level * S + RIDGE * torch.eye(len(S), dtype=S.dtype, device=S.device)) / len(S)
            for S, level in zip(stage.penalties, smoothing, strict=True)
        ]
        self.size, self.rows = stage.design.size, stage.design.rows
        self.dtype = self.wide = torch.float64
        self.device = stage.w.device
        self.ridge = RIDGE / max(stage.design.sizes)
        self._rest = [torch.eye(len(Q), dtype=Q.dtype, device=Q.device) - Q for Q in stage.projectors]

    def hvp(self, vectors: Tensor) -> Tensor:
        self.passes += 1
        stage, sizes = self._stage, self._stage.design.sizes
        inside = by_block(vectors, stage.projectors)
        product = stage.design.gram_product(inside, stage.w) + by_block(inside, self._S)
        outside = [v / size for v, size in zip((vectors - inside).split(sizes, dim=1), sizes, strict=True)]
        return by_block(product, stage.projectors) + torch.cat(outside, 1)

    def root_preconditioner(self) -> Callable[[Tensor], Tensor]:
        """Of every term alone: the inverse root of its block."""
        stage = self._stage
        known, roots = stage.roots, []
        for t, (G, S, Q, rest) in enumerate(zip(stage.blocks(), self._S, stage.projectors, self._rest, strict=True)):
            key = t, self._smoothing[t]
            if key not in known:
                known[key] = _inverse_root(Q @ (G + S) @ Q + rest / len(S))
            roots.append(known[key])
        return lambda vectors: by_block(vectors, roots)

    def dense(self) -> Tensor:
        added = [Q @ S @ Q + rest / len(S) for Q, S, rest in zip(self._stage.projectors, self._S, self._rest, strict=True)]
        return self._stage.gram() + torch.block_diag(*added)

    def row_curvature(self) -> float:
        return float(len(self._stage.design.terms)) + max(float(S.diagonal().sum()) for S in self._S)

    def batch_hvp(self, vectors: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
        raise NotImplementedError("terms are solved over all rows")


def by_block(vectors: Tensor, blocks: list[Tensor]) -> Tensor:
    """v A for vectors (M, size) and symmetric blocks A on the diagonal."""
    parts = vectors.split([len(A) for A in blocks], dim=1)
    return torch.cat([v @ A for v, A in zip(parts, blocks, strict=True)], 1)


def projector(weights: Tensor, margins: list[tuple[int, ...]]) -> Tensor:
    """(size, size): on the tables whose weighted sums over each cell of each margin (a set of axes) are 0."""
    shape, size = weights.shape, weights.numel()
    rows = []
    for axes in margins:
        kept = torch.zeros(shape, dtype=torch.int64, device=weights.device)
        for axis in axes:
            place = torch.arange(shape[axis], device=weights.device)
            kept = kept * shape[axis] + place.reshape([-1 if d == axis else 1 for d in range(len(shape))])
        cells = int(kept.max()) + 1
        A = torch.zeros(cells, size, dtype=torch.float64, device=weights.device)
        rows.append(A.scatter_(0, kept.reshape(1, -1), weights.reshape(1, -1)))
    A = torch.cat(rows)
    A = A / A.norm(dim=1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    values, vectors = torch.linalg.eigh(A @ A.T)
    kept_values = values > 1e-12 * len(values)
    half = (vectors[:, kept_values] * values[kept_values].rsqrt()).T @ A
    return torch.eye(size, dtype=A.dtype, device=A.device) - half.T @ half


@dataclass
class Fitted:
    """Solution of one stage.

    Attributes
    ----------
    values : Tensor, shape (C, size)
    smoothing : list of float
        One for each order up to that of the stage.
    solution : Solution
        Certificate of the last solve.
    error : float
        Squared error on the validation rows as a share of the variance.
    """

    values: Tensor
    smoothing: list[float]
    solution: Solution
    error: float


class Stage:
    """Terms up to some order, their rows and targets.

    Parameters
    ----------
    terms : list of tuples of Grid
        Main effects first.
    X : Tensor, shape (n, F)
    Y : Tensor, shape (C, n)
        Centred targets, float64.
    w : Tensor, shape (n,)
        Weights that add up to 1.
    validation : (X, Y, w) of the rows that choose the smoothing, or None
    """

    def __init__(self, terms: list[Grids], X: Tensor, Y: Tensor, w: Tensor, validation: Rows | None) -> None:
        self.design, self.X, self.Y, self.w = Design(X, terms), X, Y, w
        self.penalties = [term_penalty(t) for t in terms]
        self.orders = [len(t) for t in terms]
        self._validation: tuple[Design, Tensor, Tensor] | None = None
        if validation is not None:
            self._validation = Design(validation[0], terms), validation[1], validation[2]
        self._blocks: list[Tensor] | None = None
        self._gram: Tensor | None = None
        # Of terms and levels of smoothing: the search comes back to them.
        self.roots: dict[tuple[int, float], Tensor] = {}
        sums = self.design.apply_transposed(torch.stack([w, *(Y * w)]))
        self.weights = [t.squeeze(-1) for t in self.design.split(sums[:1])]
        known = {tuple(g.feature for g in t) for t in terms}
        self.projectors = [
            projector(table, _margins(tuple(g.feature for g in t), known))
            for t, table in zip(terms, self.weights, strict=True)
        ]
        self._g = by_block(sums[1:], self.projectors)

    def blocks(self) -> list[Tensor]:
        """B_t^T diag(w) B_t of every term."""
        if self._blocks is None:
            step = max(1, self.design.rows // PRECONDITIONER_ROWS)
            self._blocks = [self.design.gram_block(t, self.w, step) for t in range(len(self.design.terms))]
        return self._blocks

    def gram(self) -> Tensor:
        """Q B^T diag(w) B Q of all terms, kept while the stage is fitted."""
        if self._gram is None:
            half = by_block(self.design.gram(self.w), self.projectors).T
            whole = by_block(half, self.projectors)
            self._gram = (whole + whole.T) / 2
        return self._gram

    def fit(self, smoothing: list[float], is_free: list[bool], start: Tensor | None = None) -> Fitted:
        """Solve. smoothing: for each order; where it is free, the one with the smallest error on the validation rows.

        start (C, size) is a first guess.
        """
        values = torch.zeros_like(self._g) if start is None else start
        found = list(smoothing)
        if any(is_free):
            # The highest order is new; the lower ones were chosen while its share of the residual was noise.
            rounds = list(reversed(range(len(found))))
            for order in rounds + rounds[: len(found) > 1]:
                if is_free[order]:
                    values, found = self._search(found, order, values)
        values, solution = self._solve(found, values, FINE)
        self.roots.clear()
        self._gram = None
        return Fitted(values, found, solution, self._error(values))

    def _search(self, smoothing: list[float], order: int, values: Tensor) -> tuple[Tensor, list[float]]:
        """Walk in powers of FACTOR as long as the validation error falls."""
        tried: dict[int, tuple[float, Tensor, list[float]]] = {}

        def attempt(power: int, guess: Tensor) -> float:
            if power not in tried:
                levels = list(smoothing)
                levels[order] *= FACTOR**power
                x, _ = self._solve(levels, guess, ROUGH)
                tried[power] = self._error(x), x, levels
            return tried[power][0]

        best, direction = 0, -1
        attempt(0, values)
        if attempt(-1, tried[0][1]) >= tried[0][0]:
            direction = 1
        while len(tried) < TRIES:
            now = tried[best][0]
            if attempt(best + direction, tried[best][1]) >= now:
                break
            best += direction
            if tried[best][0] > (1 - WORTH) * now:
                break
        return tried[best][1], tried[best][2]

    def _solve(self, smoothing: list[float], guess: Tensor, tolerance: float) -> tuple[Tensor, Solution]:
        """The correction of a guess; the residual is told relative to the right-hand side."""
        problem = _NormalEquations(self, [smoothing[order - 1] for order in self.orders])
        scale = self._g.norm(dim=1)
        r = self._g - problem.hvp(guess)
        share = r.norm(dim=1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        worst = float(share.max())
        if worst <= tolerance:
            solver = "exact" if self.design.size <= DIRECT else "cg"
            return guess, Solution(guess, share, 0, True, solver, passes=1.0, tolerance=tolerance)
        found = self._correction(problem, r, min(0.5, tolerance / worst))
        x, residual = guess + by_block(found.x, self.projectors), found.residual * share
        is_done = bool((residual <= tolerance * (1 + 1e-9)).all())
        return x, Solution(x, residual, found.steps, is_done, found.solver, found.why, problem.passes, tolerance)

    def _correction(self, problem: _NormalEquations, r: Tensor, tolerance: float) -> Solution:
        if self.design.size <= DIRECT:
            # Equations too near to singular for a factor are left to CG.
            with contextlib.suppress(ValueError):
                return solve_quietly(problem, r, solver="exact", tolerance=tolerance)
        return solve_quietly(problem, r, solver="cg", tolerance=tolerance, max_steps=STEPS)

    def _error(self, values: Tensor) -> float:
        if self._validation is None:
            return math.nan
        design, Y, w = self._validation
        error = ((Y - design.apply(values)) ** 2 @ w).sum()
        return float(error / ((Y**2) @ w).sum().clamp_min(torch.finfo(torch.float64).tiny))


def _margins(features: tuple[int, ...], known: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Sets of axes whose effects belong to smaller terms: the mean, the main effects, the pairs that are fitted."""
    axes = range(len(features))
    if len(features) == 1:
        return [()]
    found: list[tuple[int, ...]] = [(a,) for a in axes]
    if len(features) == 3:
        found += [p for p in itertools.combinations(axes, 2) if tuple(features[a] for a in p) in known]
    return found


def _inverse_root(A: Tensor) -> Tensor:
    """A^-1/2 of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(A)
    floor = values[-1] * 1e-14
    return (vectors * values.clamp_min(floor).rsqrt()) @ vectors.T
