"""Preconditioners of a generalised linear model: approximations of H whose inverse square root costs small matrix products.

H = E[s x x^T (x) W] + ridge. All are built in float64 and are symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._gram import WeightedGram

if TYPE_CHECKING:
    from .glm import GlmProblem, Reduce

__all__ = ["Preconditioner", "diagonal_preconditioner", "kronecker_preconditioner", "whole_preconditioner"]

# Eigenvalues below this share of the largest count as that: a singular H has no inverse square root.
SMALLEST = 1e-9
# The part of H that the Kronecker preconditioner takes as it is: its cost in products with H, and its largest size.
COARSE_PASSES, COARSE_SIZE = 16, 1024


class Preconditioner:
    """v -> M^-1/2 v for vectors (M, size), in their dtype."""

    def __init__(self, apply: Callable[..., Tensor], shape: tuple[int, int], *parts: Tensor) -> None:
        self._apply, self._shape = apply, shape
        self._parts = {torch.float64: parts}

    def __call__(self, vectors: Tensor) -> Tensor:
        parts = self._parts.get(vectors.dtype)
        if parts is None:
            parts = self._parts[vectors.dtype] = tuple(part.to(vectors.dtype) for part in self._parts[torch.float64])
        return self._apply(vectors.reshape(-1, *self._shape), *parts).reshape(vectors.shape)


def _inverse_root(eigenvalues: Tensor) -> Tensor:
    if not eigenvalues.numel():
        return eigenvalues
    return eigenvalues.clamp_min(SMALLEST * eigenvalues.max().clamp_min(torch.finfo(torch.float64).tiny)).rsqrt()


def _output_basis(problem: GlmProblem, reduce: Reduce) -> Tensor:
    """Eigenvectors (C, C), in columns, of the mean curvature B = E[s W]. Needs no pass over X."""
    w = problem.weights.double()
    s = w.new_ones(len(w)) if problem.sample_weight is None else problem.sample_weight
    if problem.outputs == 1:
        return w.new_ones(1, 1)
    B = reduce(torch.diag(s @ w) - (w * s[:, None]).T @ w, "sum") / problem.rows
    return torch.linalg.eigh(B)[1]


def _curvature_along(problem: GlmProblem, weights: Tensor, basis: Tensor) -> Tensor:
    """q_k^T W_i q_k for every row and every column of the basis: (b, C)."""
    w = weights.double()
    if problem.outputs == 1:
        return w
    return (w @ basis.square() - (w @ basis).square()).clamp_min(0)


def _gram(problem: GlmProblem, weight: Callable[[slice], Tensor], reduce: Reduce) -> Tensor:
    """E[s w x x^T] (P, P), in one pass."""
    total = torch.zeros(problem.params, problem.params, dtype=torch.float64, device=problem.device)
    for at, X, s in problem.design(1):
        total += (X * (weight(at) * s)[:, None]).T @ X
    problem.passes += 1
    return reduce(total, "sum")


def whole_preconditioner(problem: GlmProblem, ridges: Tensor, reduce: Reduce) -> Preconditioner:
    """H itself, for one output. One pass."""
    H = _gram(problem, lambda at: problem.weights[at, 0].double(), reduce) + torch.diag(ridges[:, 0])
    eigenvalues, vectors = torch.linalg.eigh(H)
    root = (vectors * _inverse_root(eigenvalues)) @ vectors.T
    return Preconditioner(_apply_whole, (problem.params, 1), root)


def _apply_whole(v: Tensor, root: Tensor) -> Tensor:
    return root @ v


def kronecker_preconditioner(problem: GlmProblem, ridges: Tensor, reduce: Reduce) -> Preconditioner:
    """H in the eigenbasis of A (x) B, A = E[s tr(W) x x^T] and B = E[s W]: exact on the leading eigenvectors of A with all
    outputs, its diagonal on the rest. Two passes.

    Source: George et al. (2018), "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis" (EK-FAC),
    with expectations over the labels in closed form; A is weighted by the curvature, which K-FAC takes as independent of x.
    The exact part is a coarse space as in deflation methods: few directions carry most of what is not diagonal.
    """
    basis = _output_basis(problem, reduce)

    def along(at: slice) -> Tensor:
        return _curvature_along(problem, problem.weights[at], basis)

    left = torch.linalg.eigh(_gram(problem, lambda at: along(at).sum(1), reduce))[1].flip(1)
    rank = coarse_rank(problem.params, problem.outputs)
    diagonal = torch.zeros(problem.params, problem.outputs, dtype=torch.float64, device=problem.device)
    coarse = WeightedGram(rank, problem.outputs, problem.device)
    for at, X, s in problem.design(2 + rank * problem.outputs // problem.params):
        turned = X @ left
        diagonal += turned.square().T @ (along(at) * s[:, None])
        coarse.add(turned[:, :rank], s, problem.weights[at].double())
    problem.passes += 1
    roots = _inverse_root(reduce(diagonal, "sum") + left.square().T @ ridges)
    eigenvalues, vectors = torch.linalg.eigh(_turned(reduce(coarse.total, "sum"), coarse, basis, left[:, :rank], ridges))
    inner = (vectors * _inverse_root(eigenvalues)) @ vectors.T
    return Preconditioner(_apply_kronecker, (problem.params, problem.outputs), left, basis, roots, inner)


def coarse_rank(params: int, outputs: int) -> int:
    """Eigenvectors of A on which H is taken as it is: as many as cost about COARSE_PASSES products to assemble."""
    return min(params, math.isqrt(4 * COARSE_PASSES * params // outputs), COARSE_SIZE // outputs)


def _turned(total: Tensor, coarse: WeightedGram, basis: Tensor, left: Tensor, ridges: Tensor) -> Tensor:
    """The exact part (rank C, rank C) with its outputs in the eigenbasis of B, and the ridge."""
    rank, C = left.shape[1], len(basis)
    turned = torch.einsum("pcqd,ck,dl->pkql", coarse.matrix(total).view(rank, C, rank, C), basis, basis)
    turned.diagonal(dim1=1, dim2=3).add_(((left * ridges).T @ left)[:, :, None])
    return turned.reshape(rank * C, rank * C)


def _apply_kronecker(v: Tensor, left: Tensor, basis: Tensor, roots: Tensor, inner: Tensor) -> Tensor:
    turned = left.T @ v @ basis
    rank = len(inner) // len(basis)
    exact = (turned[:, :rank].flatten(1) @ inner).view(len(v), rank, len(basis))
    return left @ torch.cat([exact, roots[rank:] * turned[:, rank:]], 1) @ basis.T


def diagonal_preconditioner(problem: GlmProblem, ridges: Tensor, reduce: Reduce) -> Preconditioner:
    """The diagonal of H (Jacobi). One pass."""
    identity = torch.eye(problem.outputs, dtype=torch.float64, device=problem.device)
    diagonal = torch.zeros(problem.params, problem.outputs, dtype=torch.float64, device=problem.device)
    for at, X, s in problem.design(1):
        diagonal += X.square().T @ (_curvature_along(problem, problem.weights[at], identity) * s[:, None])
    problem.passes += 1
    return Preconditioner(
        _apply_diagonal, (problem.params, problem.outputs), _inverse_root(reduce(diagonal, "sum") + ridges)
    )


def _apply_diagonal(v: Tensor, roots: Tensor) -> Tensor:
    return roots * v
