"""One Newton step on the objective without a row: leave-one-out with the leverage of the row taken into account.

With A = n H, U_i = x_i (x) I, delta_i and W_i gradient and curvature of row i's term in its logits, and r what leaves the
objective besides (l2 theta, or nothing), the minimum moves by

    d theta = (A - U_i W_i U_i^T)^-1 (U_i delta_i + r) = A^-1 (U_i e_i + r)                  (Woodbury)
    e_i = (I - W_i K_i)^-1 (delta_i + W_i U_i^T A^-1 r),    K_i = U_i^T A^-1 U_i  (C, C)

so that only delta_i changes. Source: Pregibon (1981), "Logistic regression diagnostics" (one-step approximations), for any
number of outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._labels import named_rows
from .glm import GlmProblem

__all__ = ["leverage_corrected"]

# A row that moves the minimum so much more than its gradient says is the only one that determines some direction.
LARGEST_GAIN = 1e9


def leverage_corrected(problem: GlmProblem, inverse: Tensor, regulariser: Tensor | None) -> Tensor:
    """e_i of every row, (n, C) in float64.

    `inverse` is A^-1 (size, size); `regulariser` A^-1 r (P, C), or None for r = 0.
    """
    blocks = inverse.reshape(problem.params, problem.outputs, problem.params, problem.outputs)
    out = torch.empty(problem.residual.shape, dtype=torch.float64, device=problem.device)
    for at, X, s in problem.design(3 + problem.outputs):
        s = s * problem.rows
        delta, W = problem.residual[at].double() * s[:, None], _curvatures(problem, at) * s[:, None, None]
        if regulariser is not None:
            delta = delta + (W @ (X @ regulariser)[:, :, None])[:, :, 0]
        left = torch.eye(problem.outputs, dtype=W.dtype, device=W.device) - W @ _leverages(X, blocks)
        found, singular = torch.linalg.solve_ex(left, delta[:, :, None])
        out[at] = found[:, :, 0]
        bad = (singular != 0) | ~(out[at].norm(dim=1) <= LARGEST_GAIN * delta.norm(dim=1))
        if bad.any():
            raise ValueError(
                f"damping: expected enough for a regular Hessian without any one row, got a singular one without "
                f"{named_rows(bad, at.start)}"
            )
    return out


def _curvatures(problem: GlmProblem, at: slice) -> Tensor:
    """W_i without the sample weight: (b, C, C)."""
    w = problem.weights[at].double()
    return w[:, :, None] if problem.outputs == 1 else torch.diag_embed(w) - w[:, :, None] * w[:, None, :]


def _leverages(X: Tensor, blocks: Tensor) -> Tensor:
    """K_i = x_i^T A^-1 x_i for every pair of outputs: (b, C, C)."""
    C = blocks.shape[1]
    K = X.new_empty(len(X), C, C)
    for c in range(C):
        for other in range(c, C):
            K[:, c, other] = K[:, other, c] = ((X @ blocks[:, c, :, other]) * X).sum(1)
    return K
