"""Assemble H and factor it."""

from __future__ import annotations

import torch
from torch import Tensor

from .lanczos import lanczos

__all__ = ["Exact", "ExactFactor"]

# Above this many parameters the factor is kept in float32, at half the time and memory; refinement restores the accuracy.
LARGE = 16384
# All eigenvalues up to this size, for an error message; Lanczos beyond.
ALL_EIGENVALUES = 4096


class ExactFactor:
    """The Cholesky factor of H, for many solves.

    Parameters
    ----------
    H : Tensor, shape (size, size)
        Symmetric.

    Raises
    ------
    ValueError
        If H is singular to working precision, or indefinite; not finite.

    Examples
    --------
    >>> factor = ExactFactor(torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)))
    >>> factor.solve(torch.ones(1, 2))
    tensor([[0.5000, 0.2500]], dtype=torch.float64)
    """

    def __init__(self, H: Tensor) -> None:
        if not bool(H.isfinite().all()):
            raise ValueError("H: expected finite numbers, got NaN or infinity")
        dtype = torch.float32 if len(H) > LARGE else H.dtype
        factor = _factor(H, dtype)
        if factor is None and dtype != H.dtype:
            factor = _factor(H, H.dtype)
        if factor is None:
            raise ValueError(
                f"damping: expected enough for a positive definite Hessian, got one whose smallest eigenvalue is about "
                f"{smallest_eigenvalue(H):.1e} (largest entry of the diagonal {H.diagonal().max().item():.1e})"
            )
        self._factor = factor

    @property
    def dtype(self) -> torch.dtype:
        return self._factor.dtype

    def solve(self, v: Tensor) -> Tensor:
        """H^-1 v for v (M, size), in the dtype of the factor."""
        return torch.cholesky_solve(v.to(self.dtype).T, self._factor).T

    def half(self, v: Tensor) -> Tensor:
        """L^-1 v for v (M, size), with H = L L^T: the squared norms of the rows are v^T H^-1 v."""
        return torch.linalg.solve_triangular(self._factor, v.to(self.dtype).T, upper=False).T

    def inverse(self) -> Tensor:
        """H^-1, (size, size)."""
        return torch.cholesky_inverse(self._factor)


class Exact:
    """The exact solver in the form that refinement takes."""

    steps = 0
    note = ""

    def __init__(self, factor: ExactFactor) -> None:
        self._factor = factor
        self._rounds = 0

    def correct(self, residual: Tensor, target: Tensor) -> Tensor:
        self._rounds += 1
        return self._factor.solve(residual).unsqueeze(0)

    def review(self, alone: Tensor, together: Tensor) -> bool:
        return self._rounds < 10 and bool((together < 0.5).any())


def smallest_eigenvalue(H: Tensor) -> float:
    """Smallest eigenvalue of a symmetric matrix; for a large one the smallest of 50 Lanczos steps, which is not below it."""
    if len(H) <= ALL_EIGENVALUES:
        return torch.linalg.eigvalsh(H)[0].item()
    return lanczos(lambda v: v @ H, len(H), 50, H.dtype, H.device, seed=0)[1].min().item()


def _factor(H: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The lower factor; None if H is not positive definite, or so nearly singular that the factor means nothing."""
    factor, info = torch.linalg.cholesky_ex(H.to(dtype))
    if info.item():
        return None
    pivots = factor.diagonal() ** 2
    is_regular = pivots.min() > len(H) * torch.finfo(dtype).eps * H.diagonal().max()
    return factor if bool(is_regular) else None
