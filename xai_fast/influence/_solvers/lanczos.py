"""A low-rank inverse from the Lanczos iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problems import Problem

__all__ = ["Lanczos", "LowRank", "lanczos", "largest_eigenvalue"]

# Products for an estimate of the largest eigenvalue, and how much may be missing after them.
PRODUCTS, MISSING = 12, 1.05


@dataclass(frozen=True)
class LowRank:
    """Eigenpairs of H from the Lanczos iteration: an approximate inverse that costs no pass over the data.

    Attributes
    ----------
    basis : Tensor, shape (size, rank)
        Orthonormal Ritz vectors.
    eigenvalues : Tensor, shape (rank,)
        Their Ritz values, ascending.
    ridge : float
        A lower bound of the eigenvalues outside the basis; 0 if there is none.

    Notes
    -----
    Source: Schioppa et al. (2022), "Scaling up influence functions".

    Examples
    --------
    >>> low_rank = LowRank(torch.eye(2)[:, :1], torch.tensor([4.0]), 0.5)
    >>> low_rank.inverse(torch.ones(1, 2))
    tensor([[0.2500, 2.0000]])
    """

    basis: Tensor
    eigenvalues: Tensor
    ridge: float

    @staticmethod
    def of(problem: Problem, rank: int, seed: int = 0) -> LowRank:
        """By `rank` products with H."""
        return LowRank(*_of_problem(problem, rank, seed), problem.ridge)

    def inverse(self, v: Tensor, *, complement: bool = True) -> Tensor:
        """The inverse on the basis; outside of it v / ridge if `complement` and there is a ridge, else 0. v: (M, size)."""
        v = v.to(self.basis.dtype)
        inside = v @ self.basis
        found = (inside / self.eigenvalues) @ self.basis.T
        if not complement or self.ridge == 0:
            return found
        return found + (v - inside @ self.basis.T) / self.ridge


class Lanczos:
    """The low-rank inverse in the form that refinement takes: one round.

    Two candidates: with the complement divided by the ridge, right where the rank reaches down to it, and without the
    complement.
    """

    def __init__(self, low_rank: LowRank) -> None:
        self._low_rank = low_rank
        self.steps = len(low_rank.eigenvalues)
        self.note = "" if bool((low_rank.eigenvalues > 0).all()) else "H is indefinite (a Ritz value is negative)"

    def correct(self, residual: Tensor, target: Tensor) -> Tensor:
        return torch.stack([self._low_rank.inverse(residual, complement=c) for c in (True, False)])

    def review(self, alone: Tensor, together: Tensor) -> bool:
        return False


def lanczos(
    product: Callable[[Tensor], Tensor], size: int, steps: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Ritz vectors (size, k) and Ritz values (k,) of a symmetric matrix, ascending, from a random start.

    Every vector is orthogonalised against all before it, twice. Where the Krylov space is exhausted a new random vector goes
    on, so that repeated eigenvalues are found. Ritz values at rounding level are left out: they have no inverse.
    ValueError for products that are not finite.
    """
    steps = min(steps, size)
    Q = torch.zeros(size, steps, dtype=dtype, device=device)
    T = torch.zeros(steps, steps, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(dtype).eps
    Q[:, 0] = _random_unit(Q[:, :0], generator)
    for k in range(steps):
        w = product(Q[:, k])
        T[k, k] = torch.dot(Q[:, k], w).item()
        w = _orthogonalise(w, Q[:, : k + 1])
        beta = w.norm().item()
        if k + 1 == steps:
            break
        if beta > 10 * eps * T.abs().max():
            Q[:, k + 1] = w / beta
            T[k, k + 1] = T[k + 1, k] = beta
        else:
            Q[:, k + 1] = _random_unit(Q[:, : k + 1], generator)
    if not bool(T.isfinite().all()):
        raise ValueError("H: expected finite products with vectors, got NaN or infinity")
    values, vectors = torch.linalg.eigh(T)
    kept = values.abs() > steps * eps * values.abs().max()
    return Q @ vectors[:, kept].to(Q), values[kept].to(Q)


def largest_eigenvalue(problem: Problem, seed: int) -> float:
    """An estimate of the largest eigenvalue of H, a little too high rather than too low; kept in the problem.

    The largest Ritz value of a few Lanczos steps: the power iteration, made the most of.
    """
    if problem.lambda_max is None:
        _, values = _of_problem(problem, PRODUCTS, seed)
        problem.lambda_max = MISSING * values.abs().max().item() if len(values) else 0.0
    return problem.lambda_max


def _of_problem(problem: Problem, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    return lanczos(lambda v: problem.hvp(v.unsqueeze(0))[0], problem.size, steps, problem.dtype, problem.device, seed)


def _orthogonalise(w: Tensor, Q: Tensor) -> Tensor:
    for _ in range(2):
        w = w - Q @ (Q.T @ w)
    return w


def _random_unit(Q: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the columns of Q, the same on every device."""
    w = torch.randn(Q.shape[0], generator=generator, dtype=torch.float64).to(Q)
    w = _orthogonalise(w / w.norm(), Q)
    return w / w.norm()
