"""Gram matrices weighted by the curvature of every row: E[s x x^T (x) W], a block for each pair of outputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WeightedGram"]


class WeightedGram:
    """Sums s_i (x_i x_i^T) (x) W_i over blocks of rows, in float64.

    Attributes
    ----------
    total : Tensor, shape (C, P, C, P)
        The sum so far, for pairs of outputs c <= c'.
    """

    def __init__(self, params: int, outputs: int, device: torch.device) -> None:
        self.total = torch.zeros(outputs, params, outputs, params, dtype=torch.float64, device=device)

    def add(self, X: Tensor, s: Tensor, w: Tensor) -> None:
        """Rows X (b, P) with s (b,) and the curvatures w (b, C): probabilities where C is above 1."""
        C, P = self.total.shape[:2]
        for c in range(C):
            left = X * (s * w[:, c])[:, None]
            self.total[c, :, c] += left.T @ X
            if C > 1:
                right = (X[:, None] * w[:, c:, None]).flatten(1)
                self.total[c, :, c:] -= (left.T @ right).view(P, C - c, P)

    @staticmethod
    def matrix(total: Tensor) -> Tensor:
        """A total, or the sum of several, as a matrix (P C, P C) over parameters (P, C) written row after row."""
        C, P = total.shape[:2]
        for c in range(C):
            for other in range(c):
                total[c, :, other] = total[other, :, c].T
        return total.permute(1, 0, 3, 2).reshape(P * C, P * C)
