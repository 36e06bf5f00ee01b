"""Refinement with a certificate: the loop around every solver.

x <- x + e with e an approximate solution of H e = g - H x. Residuals are measured over all rows in the wide dtype; of every
x that was measured, x = 0 with the residual 1 among them, the best is returned, with its residual, whatever the inner method
does. Source: iterative refinement in mixed precision, Higham (2002), "Accuracy and Stability of Numerical Algorithms",
chapter 12.
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
# A move whose effect lies within this share of the span of the others is one of rounding errors; where it is not that much
# outside, its effect is measured by itself.
INDEPENDENT, SURE = 1e-8, 1e-2
# So many times the residual that was expected of a combination is a sign of directions whose effects are not what they were.
WRONG = 2.0


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
    earlier ones that has the smallest residual, which takes no product with H; it is measured in the next pass. A right-hand
    side of zeros has the solution 0, residual 0.
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
        self._directions = _Directions(problem, gradient)
        self.x, self.residual = torch.zeros_like(gradient), gradient.clone()
        self.relative = (self._scale > 0).to(gradient.dtype)
        self.is_measured = torch.ones_like(self.relative, dtype=torch.bool)
        self._best = self.x.clone(), self.residual.clone(), self.relative.clone()

    def measure(self) -> None:
        rows = (~self.is_measured).nonzero().squeeze(1)
        self._settle(rows, *relative_residuals(self._problem, self._gradient[rows], self.x[rows]))
        self._take_best(rows)

    def try_moves(self, rows: Tensor, moves: Tensor, tolerance: float) -> Tensor:
        """Improve x[rows] by moves (K, m, size); the smallest relative residual that a move taken alone leaves (m,)."""
        candidates = self.x[rows] + moves
        found, norms = self._measure_with(rows, candidates)
        changes = self.residual[rows] - found
        best, which = norms.nan_to_num(nan=torch.inf).min(dim=0)
        taken = which, torch.arange(len(rows), device=which.device)
        self._keep(rows, candidates[taken], found[taken], best)
        self._take_best(rows)
        rest = (best > tolerance).nonzero().squeeze(1)
        if len(rest):
            self._combine(rows[rest], moves[:, rest], changes[:, rest])
        return best

    def _measure_with(self, rows: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals of candidates (K, m, size) and, in the same pass, of every x[rows] that was not measured yet."""
        stale = rows[~self.is_measured[rows]]
        which = torch.cat([stale, rows.repeat(len(candidates))])
        points = torch.cat([self.x[stale], candidates.flatten(0, 1)])
        residual, norms = relative_residuals(self._problem, self._gradient[which], points)
        self._settle(stale, residual[: len(stale)], norms[: len(stale)])
        return residual[len(stale) :].view_as(candidates), norms[len(stale) :].view(candidates.shape[:2])

    def _settle(self, rows: Tensor, residual: Tensor, norms: Tensor) -> None:
        """Measured residuals of x[rows] in place of combined ones; directions that promised too much are forgotten."""
        self._directions.forget(rows[~(norms <= WRONG * self.relative[rows])])
        self.residual[rows], self.relative[rows], self.is_measured[rows] = residual, norms, True
        self._keep(rows, self.x[rows], residual, norms)

    def _keep(self, rows: Tensor, x: Tensor, residual: Tensor, norms: Tensor) -> None:
        better = norms < self._best[2][rows]
        for best, new in zip(self._best, (x, residual, norms), strict=True):
            best[rows[better]] = new[better]

    def _take_best(self, rows: Tensor) -> None:
        self.x[rows], self.residual[rows], self.relative[rows] = (best[rows] for best in self._best)
        self.is_measured[rows] = True

    def _combine(self, rows: Tensor, moves: Tensor, changes: Tensor) -> None:
        for move, change in zip(moves, changes, strict=True):
            self._directions.add(rows, move, change)
        for d, H_d in self._directions.kept:
            length = (self.residual[rows] * H_d[rows]).sum(1, keepdim=True)
            self.x[rows] += length * d[rows]
            self.residual[rows] -= length * H_d[rows]
        self.relative[rows] = self.residual[rows].norm(dim=1) / self._scale[rows]
        self.is_measured[rows] = False


class _Directions:
    """Moves d that were tried before, for each right-hand side, and the changes H d they made; these are kept orthonormal.

    Source: generalised conjugate residuals, Eisenstat, Elman & Schultz (1983), with the inner method for a preconditioner.
    """

    def __init__(self, problem: Problem, gradient: Tensor) -> None:
        self._problem, self._like = problem, gradient
        self._limit = max(2, min(DIRECTIONS, int(DIRECTION_BYTES / (16 * max(1, gradient.numel())))))
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, d: Tensor, H_d: Tensor) -> None:
        """A new d (m, size) and H d, with H d made orthonormal to the kept ones; 0 where it says nothing new."""
        length = H_d.norm(dim=1)
        d, H_d, left = self._orthonormal(rows, d, H_d)
        is_new = left > INDEPENDENT * length
        unsure = (is_new & (left < SURE * length)).nonzero().squeeze(1)
        if len(unsure):
            # What is left of a difference of residuals is largely rounding: the product itself is not.
            among = rows[unsure]
            H_d[unsure] = torch.cat([self._problem.hvp(part) for part in d[unsure].split(GROUP)])
            d[unsure], H_d[unsure], left = self._orthonormal(among, d[unsure], H_d[unsure])
            is_new[unsure] = left > 0.5
        self._keep(rows, torch.where(is_new[:, None], d, 0.0), torch.where(is_new[:, None], H_d, 0.0))

    def _orthonormal(self, rows: Tensor, d: Tensor, H_d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The part of H d that is orthogonal to the kept ones, of length 1, its d, and the length it had; NaN for none."""
        for _ in range(2):
            for old, H_old in self.kept:
                share = (H_d * H_old[rows]).sum(1, keepdim=True)
                d, H_d = d - share * old[rows], H_d - share * H_old[rows]
        left = H_d.norm(dim=1)
        left = torch.where(left.isfinite() & (left > 0), left, torch.nan)
        return d / left[:, None], H_d / left[:, None], left

    def _keep(self, rows: Tensor, d: Tensor, H_d: Tensor) -> None:
        if len(self.kept) == self._limit:
            self.kept.pop(0)
        self.kept.append((torch.zeros_like(self._like), torch.zeros_like(self._like)))
        self.kept[-1][0][rows], self.kept[-1][1][rows] = d, H_d

    def forget(self, rows: Tensor) -> None:
        for d, H_d in self.kept:
            d[rows], H_d[rows] = 0.0, 0.0
