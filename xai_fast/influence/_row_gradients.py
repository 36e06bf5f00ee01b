"""The gradients of training rows, which are never formed: their products with solutions, and the rows of extreme ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .glm import GlmProblem

__all__ = ["RowGradients"]


class RowGradients:
    """g_i of every row: the gradient of its term of the objective, and of the regulariser if that is asked for.

    Parameters
    ----------
    problem : GlmProblem
    penalised : bool
        g_i holds the gradient of l2 |theta|^2 / 2 as well.
    """

    def __init__(self, problem: GlmProblem, *, penalised: bool) -> None:
        self._problem, self._penalised = problem, penalised

    def delta(self, at: slice) -> Tensor:
        """d (s_i loss_i) / d logits, (b, C)."""
        delta, s = self._problem.residual[at], self._problem.sample_weight
        return delta if s is None else delta * s[at, None].to(delta.dtype)

    def regulariser(self) -> Tensor | None:
        """l2 theta with 0 for the bias (P, C), where it is part of the train gradient."""
        if not self._penalised or self._problem.l2 == 0:
            return None
        r = self._problem.l2 * self._problem.head.parameters.to(self._problem.device, self._problem.wide)
        if self._problem.head.intercept:
            r[-1] = 0
        return r

    def offset(self, S: Tensor) -> Tensor:
        """<S, l2 theta> of every solution, (M, 1): what the regulariser adds to all scores of a test point."""
        r = self.regulariser()
        return S.new_zeros(len(S), 1) if r is None else (S * r.to(S.dtype)).sum((1, 2))[:, None]

    def products(self, S: Tensor) -> Tensor:
        """-<S, g_i> for solutions (M, P, C): (M, n)."""
        parts = [
            ops.influence_scores(X, self.delta(at), S, intercept=self._problem.head.intercept)
            for at, X in self._problem.data.spans()
        ]
        products = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return products.add_(self.offset(S)).neg_()

    def extreme(self, S: Tensor, k: int, largest: bool, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """-<S, g_i> of the k rows with the largest or smallest <S, g_i>, and the rows; of all, or of `rows` (ascending)."""
        values, indices = S.new_empty(len(S), 0), torch.empty(len(S), 0, dtype=torch.int64, device=S.device)
        for at, X in self._problem.data.spans():
            here = None if rows is None else rows[(rows >= at.start) & (rows < at.stop)] - at.start
            count = min(k, len(X) if here is None else len(here))
            if count == 0:
                continue
            options: dict[str, Any] = {"largest": largest, "rows": here, "intercept": self._problem.head.intercept}
            found, places = ops.influence_top_k(X, self.delta(at), S, count, **options)
            values, indices = torch.cat([values, found], 1), torch.cat([indices, places + at.start], 1)
            # Stable: of equal scores the earlier row stays first.
            order = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
            values, indices = values.gather(1, order), indices.gather(1, order)
        missing = k - values.shape[1]
        values = torch.nn.functional.pad(-(values + self.offset(S)), (0, missing), value=torch.nan)
        return values, torch.nn.functional.pad(indices, (0, missing), value=-1)
