"""A Hessian with a chosen spectrum, made of rows: a stand-in for a model in the tests of the solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from xai_fast import ops
from xai_fast.influence.problems import Problem


class DenseProblem(Problem):
    """H = (1/n) sum_i s_i x_i x_i^T + ridge, with signs s_i = +-1."""

    def __init__(
        self, X: Tensor, ridge: float = 0.0, dtype: torch.dtype = torch.float64, signs: Tensor | None = None
    ) -> None:
        self.X = X.double()
        self.rows, self.size = X.shape
        self.signs = torch.ones(self.rows, dtype=torch.float64) if signs is None else signs
        self.dtype, self.wide, self.device, self.ridge = dtype, torch.float64, X.device, ridge

    @property
    def matrix(self) -> Tensor:
        """H itself."""
        return (self.X.T * self.signs) @ self.X / self.rows + self.ridge * torch.eye(self.size, dtype=torch.float64)

    def _mean(self, vectors: Tensor, rows: Tensor | slice) -> Tensor:
        X, signs = self.X[rows].to(vectors.dtype), self.signs[rows].to(vectors.dtype)
        return ((vectors @ X.T) * signs) @ X / len(X) + self.ridge * vectors

    def hvp(self, vectors: Tensor) -> Tensor:
        self.passes += 1
        return self._mean(vectors, slice(None))

    def batch_hvp(self, vectors: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
        return self._mean(vectors, ops.sample_rows(self.rows, batch_size, seed=seed, step=step))

    def row_curvature(self) -> float:
        return float(self.X.square().sum(1).max()) + self.ridge


def rows_with(eigenvalues: Tensor, rows: int = 200, seed: int = 0) -> Tensor:
    """X with X^T X / rows of these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return (left * (rows * eigenvalues).sqrt()) @ right.T


def spectrum(size: int, condition: float) -> Tensor:
    """From 1 down to 1 / condition, evenly on the log scale."""
    return torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)


def conditioned(size: int = 30, condition: float = 100.0, dtype: torch.dtype = torch.float64) -> DenseProblem:
    """Half of the smallest eigenvalue is ridge, and known to be."""
    smallest = 1 / condition
    return DenseProblem(rows_with(spectrum(size, condition) - smallest / 2), smallest / 2, dtype)


def vectors(count: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
