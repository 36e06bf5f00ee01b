"""Inverse-Hessian-vector products of a softmax head the way they are usually written in PyTorch: the baselines of the ihvp
benchmark. Parameters and vectors are (D, C), probabilities (n, C).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["autograd_hvp", "autograd_lissa", "curved", "eager_lissa", "linear_hvp", "naive_hvp"]


def curved(z: Tensor, weights: Tensor) -> Tensor:
    """W(z) of softmax, or of a family with one output."""
    return weights * (z - (weights * z).sum(1, keepdim=True)) if weights.shape[1] > 1 else weights * z


def naive_hvp(X: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """X^T W(X v) / n as the formula stands."""
    return X.T @ curved(X @ v, weights) / len(X)


def linear_hvp(X: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """The fastest composition that we found: both products with the rows of X as they lie in memory."""
    z = F.linear(X, v.T.contiguous())
    return (curved(z, weights).T @ X).T / len(X)


def autograd_hvp(X: Tensor, y: Tensor, theta: Tensor, v: Tensor) -> Tensor:
    """Double backward through the loss, as torch-influence does it."""
    theta = theta.detach().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(X @ theta, y), theta, create_graph=True)[0]
    return torch.autograd.grad(gradient, theta, v)[0]


def _recursion(hvp: Callable[[Tensor, Tensor], Tensor], rows: int, g: Tensor, sigma: float, l2: float, batch: int,
               steps: int) -> Tensor:  # fmt: skip
    v = g.clone()
    for _ in range(steps):
        picked = torch.randint(rows, (batch,))
        v = g + v - (hvp(picked, v) + l2 * v) / sigma
    return v / sigma


def eager_lissa(X: Tensor, weights: Tensor, g: Tensor, sigma: float, l2: float, batch: int, steps: int) -> Tensor:
    """LiSSA with the closed form in eager PyTorch."""
    return _recursion(lambda i, v: linear_hvp(X[i], v, weights[i]), len(X), g, sigma, l2, batch, steps)


def autograd_lissa(
    X: Tensor, y: Tensor, theta: Tensor, g: Tensor, sigma: float, l2: float, batch: int, steps: int
) -> Tensor:
    """LiSSA with double backward, as torch-influence runs it."""
    return _recursion(lambda i, v: autograd_hvp(X[i], y[i], theta, v), len(X), g, sigma, l2, batch, steps)
