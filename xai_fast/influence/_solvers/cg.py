"""Conjugate gradients for many right-hand sides: block CG, and CG side by side where the block breaks down."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problems import Problem
from .refine import Progress

__all__ = ["ConjugateGradients"]

# A block of more right-hand sides gains few iterations and spends its time on QR factors.
GROUP = 32
# Share of the wanted residual at which a round stops: the recursion's residual is a little smaller than the true one.
MARGIN = 0.7
# Iterations without a residual lower by a hundredth: the system is singular and has no solution, or rounding rules.
PATIENCE = 100

Root = Callable[[Tensor], Tensor]


class ConjugateGradients:
    """Block CG on M^-1/2 H M^-1/2.

    Notes
    -----
    Source: Dubrulle (2001), "Retooling the method of block conjugate gradients", algorithm BCGrQ: the block of residuals is
    kept as Q C with orthonormal Q, so that dependent or equal right-hand sides, and those that converge first, do no harm.
    """

    def __init__(self, problem: Problem, max_steps: int, use_preconditioner: bool, progress: Progress) -> None:
        self._problem, self._max_steps, self._progress = problem, max_steps, progress
        self._root = problem.root_preconditioner() if use_preconditioner else None
        # What the recursion of one round can reach before rounding errors rule; refinement does the rest.
        self._floor = 1e-5 if problem.dtype == torch.float32 else 1e-12
        self.steps = 0
        self.note = ""

    def correct(self, residual: Tensor, target: Tensor) -> Tensor:
        r = residual.to(self._problem.dtype)
        wanted = (MARGIN * target.to(r.dtype)).clamp_min(self._floor)
        limit = self._max_steps - self.steps
        group = min(GROUP, self._problem.size)
        parts, most = [], 0
        for part, enough in zip(r.split(group), wanted.split(group), strict=True):
            found, steps = self._block(part, enough, limit)
            if found is None:
                found, more = self._side_by_side(part, enough, limit - steps)
                steps += more
            parts.append(found)
            most = max(most, steps)
        self.steps += most
        return torch.cat(parts).unsqueeze(0)

    def review(self, alone: Tensor, together: Tensor) -> bool:
        return self.steps < self._max_steps and not self.note and bool((together < 0.5).any())

    def _block(self, residual: Tensor, wanted: Tensor, limit: int) -> tuple[Tensor | None, int]:
        """The best iterates (m, size); None where P^T A P is not safely positive definite. And the iterations."""
        true = residual.T.clone()
        Q, C = torch.linalg.qr(self._apply_root(true))
        P, x = Q, torch.zeros_like(Q)
        best = _Best(residual)
        for step in range(limit):
            H_P = self._hvp(self._apply_root(P))
            A_P = self._apply_root(H_P)
            alpha = _inverse(P.T @ A_P)
            if alpha is None:
                return None, step + 1
            change = alpha @ C
            x = x + P @ change
            true -= H_P @ change
            Q, S = torch.linalg.qr(Q - A_P @ alpha)
            C = S @ C
            P = Q + P @ S.T
            best.keep(x, true.norm(dim=0))
            self._progress.step(self.steps + step + 1, best.norms.max().item())
            if best.is_done(wanted, step):
                return self._apply_root(best.x).T, step + 1
        return self._apply_root(best.x).T, limit

    def _side_by_side(self, residual: Tensor, wanted: Tensor, limit: int) -> tuple[Tensor, int]:
        """CG of every right-hand side for itself, with the products in common; columns that are done are dropped."""
        r = residual.T.clone()
        x = torch.zeros_like(r)
        best = _Best(residual)
        z = self._apply_root(self._apply_root(r))
        p, rho = z.clone(), (r * z).sum(0)
        open_ = torch.arange(r.shape[1], device=r.device)
        for step in range(limit):
            direction = p[:, open_]
            product = self._hvp(direction)
            curvature = (direction * product).sum(0)
            is_negative = curvature < 0
            if is_negative.any():
                self.note = "H is indefinite (a direction of negative curvature was met)"
            fine = curvature > 0
            open_, direction, product, curvature = open_[fine], direction[:, fine], product[:, fine], curvature[fine]
            alpha = rho[open_] / curvature
            x[:, open_] += alpha * direction
            r[:, open_] -= alpha * product
            best.keep(x, r.norm(dim=0))
            self._progress.step(self.steps + step + 1, best.norms.max().item())
            open_ = open_[best.norms[open_] > wanted[open_]]
            if not len(open_) or best.is_done(wanted, step):
                return best.x.T, step + 1
            z = self._apply_root(self._apply_root(r[:, open_]))
            new = (r[:, open_] * z).sum(0)
            p[:, open_] = z + (new / rho[open_]) * p[:, open_]
            rho[open_] = new
        return best.x.T, limit

    def _hvp(self, columns: Tensor) -> Tensor:
        return self._problem.hvp(columns.T.contiguous()).T

    def _apply_root(self, columns: Tensor) -> Tensor:
        return columns if self._root is None else self._root(columns.T.contiguous()).T


class _Best:
    """The iterate with the smallest residual of every column: the residuals of CG do not fall in every step."""

    def __init__(self, residual: Tensor) -> None:
        self.x = torch.zeros_like(residual.T)
        self.norms = residual.norm(dim=1)
        self._marks = self.norms.clone()
        self._last = 0
        self._seen = 0

    def keep(self, x: Tensor, norms: Tensor) -> None:
        better = norms < self.norms
        self.x = torch.where(better, x, self.x)
        self.norms = torch.where(better, norms, self.norms)

    def is_done(self, wanted: Tensor, step: int) -> bool:
        """Whether all columns are good enough, or none has moved for a while."""
        if bool((self.norms < 0.99 * self._marks).any()):
            self._marks, self._last = self.norms.clone(), step
        return bool((self.norms <= wanted).all()) or step - self._last >= PATIENCE


def _inverse(matrix: Tensor) -> Tensor | None:
    """The inverse of a small symmetric matrix, in double precision; None if it is not positive definite."""
    wide = (matrix.double() + matrix.T.double()) / 2
    factor, info = torch.linalg.cholesky_ex(wide)
    if info.item() or not bool(factor.isfinite().all()):
        return None
    inverse = torch.cholesky_inverse(factor).to(matrix.dtype)
    return inverse if bool(inverse.isfinite().all()) else None
