"""The diagonal of the scores of the training rows on themselves, without the matrix."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from .glm import GlmProblem
from .solvers import ExactFactor, LowRank

__all__ = ["exact_diagonal", "low_rank_diagonal"]


def _row_weight(problem: GlmProblem, at: slice) -> Tensor | float:
    return 1.0 if problem.sample_weight is None else problem.sample_weight[at]


def exact_diagonal(problem: GlmProblem, factor: ExactFactor, regulariser: Tensor | None) -> Tensor:
    """-(L^-1 g) . (L^-1 g_train) of every row (n,), with H = L L^T; `regulariser` is what g_train has besides g, (P, C)."""
    half_r = None if regulariser is None else factor.half(regulariser.reshape(1, -1))[0]
    out = problem.residual.new_empty(problem.data.rows)
    for at, X, _ in problem.design(4 * problem.outputs):
        gradients = X[:, :, None] * problem.residual[at, None, :].double()
        half = factor.half(gradients.flatten(1))
        total = half.square().sum(1) * _row_weight(problem, at)
        out[at] = -(total if half_r is None else total + half @ half_r)
    return out


def low_rank_diagonal(problem: GlmProblem, inverse: LowRank, regulariser: Tensor | None) -> Tensor:
    """The same with V (1/lambda - 1/ridge) V^T + 1/ridge for H^-1, or V / lambda V^T where there is no ridge."""
    complement = 1 / inverse.ridge if inverse.ridge > 0 else 0.0
    basis = inverse.basis.T.reshape(-1, problem.params, problem.outputs).to(problem.dtype)
    gain = (1 / inverse.eigenvalues - complement).to(basis.dtype)
    solved = None
    if regulariser is not None:
        solved = inverse.inverse(regulariser.reshape(1, -1)).reshape(1, *regulariser.shape).to(basis.dtype)
    intercept = problem.head.intercept
    out = problem.residual.new_empty(problem.data.rows)
    for at, X in problem.data.blocks(4 * len(basis) + 4 * problem.data.dim):
        delta = problem.residual[at]
        inside = gain @ ops.influence_scores(X, delta, basis, intercept=intercept).square()
        norm = (X.to(delta.dtype).square().sum(1) + intercept) * delta.square().sum(1)
        total = (inside + complement * norm) * _row_weight(problem, at)
        if solved is not None:
            total = total + ops.influence_scores(X, delta, solved, intercept=intercept)[0]
        out[at] = -total
    return out
