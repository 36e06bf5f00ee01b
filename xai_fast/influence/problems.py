"""What a solver needs to know of a problem: its Hessian as an operator, and what helps to invert it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Problem"]


class Problem(ABC):
    """A symmetric Hessian H = (mean Hessian of the losses) + l2 + damping, over parameters laid out as one vector.

    Vectors are (M, size): M right-hand sides. `passes` counts full reads of the data.

    Attributes
    ----------
    size : int
        Parameters.
    rows : int
        Training rows, over all processes.
    dtype, wide : torch.dtype
        In which the solvers iterate, and in which residuals are measured: float32 and float64 for a model in float32.
    device : torch.device
    ridge : float
        What is known to be added to every eigenvalue at least: l2 + damping, or damping alone where l2 leaves parameters
        out.
    passes : float
    """

    size: int
    rows: int
    dtype: torch.dtype
    wide: torch.dtype
    device: torch.device
    ridge: float
    passes: float = 0.0
    lambda_max: float | None = None

    @abstractmethod
    def hvp(self, vectors: Tensor) -> Tensor:
        """H v for vectors (M, size), in their dtype; adds one to `passes`."""

    @abstractmethod
    def row_curvature(self) -> float:
        """R: a bound of the largest eigenvalue of the Hessian of any single row, ridge included."""

    def lissa(
        self, gradient: Tensor, sigma: float, batch_size: int, first_step: int, steps: int, skip: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Steps of v <- g + v - H_B v / sigma from v = g: the last and the average iterate (M, size), divided by sigma.

        Subclasses with a fused loop override this.
        """
        v, total = gradient.clone(), torch.zeros_like(gradient)
        for step in range(steps):
            v = gradient + v - self.batch_hvp(v, batch_size, seed, first_step + step) / sigma
            if step >= skip:
                total += v
        return v / sigma, total / ((steps - skip) * sigma)

    @abstractmethod
    def batch_hvp(self, vectors: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
        """H_B v with the batch that `ops.sample_rows` gives for (seed, step)."""

    def root_preconditioner(self) -> Callable[[Tensor], Tensor] | None:
        """v -> M^-1/2 v for vectors (M, size), M an approximation of H that is easy to invert; None if there is none.

        Symmetric: CG solves M^-1/2 H M^-1/2 y = M^-1/2 v.
        """
        return None

    def dense(self) -> Tensor:
        """H itself, (size, size), in `wide`: by products with the unit vectors unless a subclass knows better."""
        columns = [self.hvp(block) for block in torch.eye(self.size, dtype=self.wide, device=self.device).split(256)]
        H = torch.cat(columns)
        return (H + H.T) / 2

    def dense_passes(self) -> float:
        """What :meth:`dense` costs, in passes; for the choice of a solver."""
        return -(-self.size // 256)
