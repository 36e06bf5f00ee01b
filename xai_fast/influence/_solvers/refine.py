"""Refinement with a certificate: the loop around every solver.

x <- x + e with e an approximate solution of H e = g - H x. Residuals are measured over all rows in the wide dtype, and never
grow. Whatever the inner method does, the residual that is returned was measured for the x that is returned. Source:
iterative refinement in mixed precision, Higham (2002), "Accuracy and Stability of Numerical Algorithms", chapter 12.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..problems import Problem

__all__ = ["Inner", "Progress", "refine", "relative_residuals"]

# Right-hand sides that are measured together: the products of a block of rows with all of them are held at once.
GROUP = 128
# Moves that are remembered for every right-hand side, and the memory they may take.
DIRECTIONS, DIRECTION_BYTES = 8, 5e8
# A move whose effect lies within this share of the span of the others is one of rounding errors.
INDEPENDENT = 1e-8


class Inner(Protocol):
    """An approximate inverse that refinement applies to residuals."""

    steps: int
    note: str

    def correct(self, residual: Tensor, target: Tensor) -> Tensor:
        """Candidates (K, m, size) for H^-1 residual, for unit residuals (m, size) in the wide dtype.

        target (m,): the relative residual that is enough.
        """

    def review(self, alone: Tensor, together: Tensor) -> bool:
        """Whether another round may help.

        Told by what factor each residual changed (m,) by the better candidate alone, inf where not finite, and by
        refinement.
        """


class Progress(Protocol):
    """What refinement and the inner methods report to."""

    def step(self, steps: int, residual: float) -> None: ...


def relative_residuals(problem: Problem, gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """g - H x (M, size), and its norms relative to those of g (M,), in the wide dtype by a pass over all rows."""
    residual = torch.cat(
        [g - problem.hvp(part) for g, part in zip(gradient.split(GROUP), x.to(problem.wide).split(GROUP), strict=True)]
    )
    return residual, residual.norm(dim=1) / gradient.norm(dim=1)


def refine(problem: Problem, gradient: Tensor, inner: Inner, tolerance: float, progress: Progress) -> tuple[Tensor, Tensor]:
    """x (M, size) in the wide dtype and its relative residuals (M,), for gradient (M, size) in the wide dtype.

    A candidate that reaches the tolerance is taken as it is. Else x moves to the combination of the new candidates and of
    earlier ones that has the smallest residual, which takes no product with H. A right-hand side of zeros has the solution
    0, residual 0.
    """
    state = _State(problem, gradient)
    goes_on = True
    while True:
        rows = (state.relative > tolerance).nonzero().squeeze(1)
        if not goes_on or not len(rows):
            if bool(state.is_measured.all()):
                return state.x, state.relative
            state.measure()
            continue
        before = state.relative[rows]
        lengths = state.residual[rows].norm(dim=1, keepdim=True)
        corrections = inner.correct(state.residual[rows] / lengths, tolerance / before)
        alone = state.try_moves(rows, lengths * corrections.to(problem.wide), tolerance)
        progress.step(inner.steps, state.relative.max().item())
        goes_on = inner.review(alone / before, state.relative[rows] / before)


class _State:
    """Solutions, residuals, and which of the residuals were measured rather than combined of measured ones."""

    def __init__(self, problem: Problem, gradient: Tensor) -> None:
        self._problem, self._gradient = problem, gradient
        self._scale = gradient.norm(dim=1)
        self._directions = _Directions(gradient)
        self.x, self.residual = torch.zeros_like(gradient), gradient.clone()
        self.relative = (self._scale > 0).to(gradient.dtype)
        self.is_measured = torch.ones_like(self.relative, dtype=torch.bool)

    def measure(self) -> None:
        rows = (~self.is_measured).nonzero().squeeze(1)
        self.residual[rows], self.relative[rows] = relative_residuals(self._problem, self._gradient[rows], self.x[rows])
        self.is_measured[rows] = True

    def try_moves(self, rows: Tensor, moves: Tensor, tolerance: float) -> Tensor:
        """Improve x[rows] by moves (K, m, size); the smallest relative residual that a move taken alone leaves (m,)."""
        count, m, size = moves.shape
        candidates = self.x[rows] + moves
        g = self._gradient[rows].repeat(count, 1)
        measured = relative_residuals(self._problem, g, candidates.reshape(-1, size))
        found, norms = (t.unflatten(0, (count, m)) for t in measured)
        best, which = norms.nan_to_num(nan=torch.inf).min(dim=0)
        self._combine(rows, moves, found)
        enough = (best <= tolerance).nonzero().squeeze(1)
        taken, kept = (which[enough], enough), rows[enough]
        self.x[kept], self.residual[kept], self.relative[kept] = candidates[taken], found[taken], best[enough]
        self.is_measured[kept] = True
        return best

    def _combine(self, rows: Tensor, moves: Tensor, found: Tensor) -> None:
        for move, change in zip(moves, self.residual[rows] - found, strict=True):
            d, H_d = self._directions.add(rows, move, change)
            length = (self.residual[rows] * H_d).sum(1, keepdim=True)
            self.x[rows] += length * d
            self.residual[rows] -= length * H_d
        self.relative[rows] = self.residual[rows].norm(dim=1) / self._scale[rows]
        self.is_measured[rows] = False


class _Directions:
    """Moves d that were tried before, for each right-hand side, and the changes H d they made; these are kept orthonormal.

    Source: generalised conjugate residuals, Eisenstat, Elman & Schultz (1983), with the inner method for a preconditioner.
    """

    def __init__(self, gradient: Tensor) -> None:
        self._like = gradient
        self._limit = max(2, min(DIRECTIONS, int(DIRECTION_BYTES / (16 * max(1, gradient.numel())))))
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, d: Tensor, H_d: Tensor) -> tuple[Tensor, Tensor]:
        """A new d (m, size) and H d, with H d made orthonormal to the kept ones; 0 where it says nothing new."""
        length = H_d.norm(dim=1, keepdim=True)
        for _ in range(2):
            for old, H_old in self._kept:
                share = (H_d * H_old[rows]).sum(1, keepdim=True)
                d, H_d = d - share * old[rows], H_d - share * H_old[rows]
        left = H_d.norm(dim=1, keepdim=True)
        is_new = (left > INDEPENDENT * length) & left.isfinite()
        d, H_d = torch.where(is_new, d / left, 0.0), torch.where(is_new, H_d / left, 0.0)
        if len(self._kept) == self._limit:
            self._kept.pop(0)
        self._kept.append((torch.zeros_like(self._like), torch.zeros_like(self._like)))
        self._kept[-1][0][rows], self._kept[-1][1][rows] = d, H_d
        return d, H_d
