"""Inverse-Hessian-vector products of generalised linear models in plain PyTorch: the definition of the family.

The formulas and their sources are in ``csrc/ihvp.h``. Vectors and solutions are (M, P, C): M right-hand sides, P parameters
an output (D, and one for the intercept, which comes last), C outputs. Arguments are taken as valid: ``xai_fast.ops.ihvp``
checks them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from .philox import sample_rows, signs

__all__ = ["apply_curvature", "glm_hvp", "glm_logits", "glm_weights", "influence_scores", "influence_top_k", "lissa",
           "random_projection", "sample_rows"]  # fmt: skip

# Rows that are looked at together where a whole intermediate would not fit.
CHUNK = 16384


def glm_logits(X: Tensor, parameters: Tensor, intercept: bool) -> Tensor:
    """X (n,D) times parameters (..., P, C): (..., n, C), in the dtype of the parameters."""
    X = X.to(parameters.dtype)
    if not intercept:
        return X @ parameters
    return X @ parameters[..., :-1, :] + parameters[..., -1:, :]


def glm_weights(logits: Tensor, y: Tensor | None, family: str, smoothing: float) -> Tensor:
    """Probabilities (n,C) for softmax, curvatures (n,1) for the one-output families. y is +1 or -1 (smooth hinge)."""
    if family == "softmax":
        return logits.softmax(-1)
    if family == "linear":
        return torch.ones_like(logits)
    if family == "poisson":
        return logits.exp()
    if family == "logistic":
        p = logits.sigmoid()
        return p * (1 - p)
    assert y is not None
    h = ((1 - y.to(logits.dtype).unsqueeze(-1) * logits) / smoothing).sigmoid()
    return h * (1 - h) / smoothing


def apply_curvature(z: Tensor, weights: Tensor, family: str) -> Tensor:
    """W(z): z (..., n, C), weights (n, C)."""
    if family == "softmax":
        return weights * (z - (weights * z).sum(-1, keepdim=True))
    return weights * z


def _ridge(vectors: Tensor, intercept: bool, l2: float, damping: float) -> Tensor:
    ridge = torch.full_like(vectors[0, :, :1], l2 + damping)
    if intercept:
        ridge[-1] = damping
    return ridge * vectors


def _multiply_back(X: Tensor, u: Tensor, intercept: bool) -> Tensor:
    """X^T u for u (M,n,C): (M,P,C)."""
    product = X.to(u.dtype).T @ u
    return torch.cat([product, u.sum(-2, keepdim=True)], -2) if intercept else product


def glm_hvp(
    X: Tensor,
    vectors: Tensor,
    theta: Tensor | None,
    weights: Tensor | None,
    y: Tensor | None,
    sample_weight: Tensor | None,
    batch: Tensor | None,
    family: str,
    intercept: bool,
    smoothing: float,
    l2: float,
    damping: float,
) -> Tensor:
    """H v for vectors (M,P,C), in their dtype (float32 or float64)."""
    if batch is not None:
        X = X[batch]
        weights, y, sample_weight = (None if t is None else t[batch] for t in (weights, y, sample_weight))
    total = torch.zeros_like(vectors)
    for at in range(0, X.shape[0], CHUNK):
        rows = slice(at, at + CHUNK)
        z = glm_logits(X[rows], vectors, intercept)
        if weights is not None:
            w = weights[rows].to(z.dtype)
        elif theta is not None:
            w = glm_weights(glm_logits(X[rows], theta, intercept), None if y is None else y[rows], family, smoothing)
        else:
            w = torch.ones_like(z[0])
        u = apply_curvature(z, w, family)
        if sample_weight is not None:
            u = u * sample_weight[rows].to(u.dtype).unsqueeze(-1)
        total += _multiply_back(X[rows], u, intercept)
    return total / X.shape[0] + _ridge(vectors, intercept, l2, damping)


def lissa(
    X: Tensor,
    gradient: Tensor,
    weights: Tensor,
    sample_weight: Tensor | None,
    start: Tensor,
    family: str,
    intercept: bool,
    l2: float,
    damping: float,
    sigma: float,
    batch_size: int,
    first_step: int,
    steps: int,
    skip: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The last iterate and the mean of the iterates after the first ``skip`` steps, both not yet divided by sigma."""
    v, total = start.clone(), torch.zeros_like(start)
    for step in range(steps):
        batch = sample_rows(X.shape[0], batch_size, seed, first_step + step, X.device)
        curved = glm_hvp(X, v, None, weights, None, sample_weight, batch, family, intercept, 1.0, l2, damping)
        v = gradient + v - curved / sigma
        if step >= skip:
            total += v
    return v, total / (steps - skip)


def influence_scores(X: Tensor, delta: Tensor, solutions: Tensor, rows: Tensor | None, intercept: bool) -> Tensor:
    """<gradient of row i, solution m> = sum_c delta[i,c] <x_i, s_mc>: (M, rows)."""
    if rows is not None:
        X, delta = X[rows], delta[rows]
    out = solutions.new_empty(solutions.shape[0], X.shape[0])
    for at in range(0, X.shape[0], CHUNK):
        part = slice(at, at + CHUNK)
        out[:, part] = (glm_logits(X[part], solutions, intercept) * delta[part].to(solutions.dtype)).sum(-1)
    return out


def influence_top_k(
    X: Tensor, delta: Tensor, solutions: Tensor, rows: Tensor | None, intercept: bool, k: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """The k extreme scores (M,k), in order, and their rows of X; of equal scores the earlier visited row first.

    NaN is no score: what is left of a list without k scores is NaN, with row -1.
    """
    scores = influence_scores(X, delta, solutions, rows, intercept)
    missing = scores.isnan()
    order = torch.argsort(scores.masked_fill(missing, 0), dim=1, descending=largest, stable=True)
    order = order.gather(1, torch.argsort(missing.gather(1, order), dim=1, stable=True))[:, :k]
    found = order if rows is None else rows[order]
    return scores.gather(1, order), found.masked_fill(missing.gather(1, order), -1)


def random_projection(x: Tensor, outputs: int, seed: int, offset: int) -> Tensor:
    """x (B,P) times a random matrix (P,K) of +-1/sqrt(K), in the accumulate type."""
    dtype = accumulate_dtype(x.dtype)
    out = torch.zeros(x.shape[0], outputs, dtype=dtype, device=x.device)
    piece = max(1, (1 << 22) // outputs)
    for at in range(0, x.shape[1], piece):
        part = x[:, at : at + piece].to(dtype)
        out += part @ signs(part.shape[1], outputs, seed, offset + at, x.device).to(dtype)
    return out / math.sqrt(outputs)
