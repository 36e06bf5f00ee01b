"""Self-tuning LiSSA: the stochastic recursion, run on residual equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..problems import Problem
from .lanczos import largest_eigenvalue

__all__ = ["Lissa", "default_steps"]

BATCH = 256
# The first rounds read the data at most so many times, about what it costs to measure the residuals after them. Many short
# rounds beat few long ones, because refinement combines them.
READS = 4
# What a round should leave of the residual where the contraction is known to be quick; and how little is too little.
AIM, POOR = 0.1, 0.9
# Restarts with a larger sigma before the solver gives up.
RESTARTS = 24
# Growth of a residual within a round that is divergence rather than noise.
GROWTH = 2.0


class Lissa:
    """v <- r + v - H_B v / sigma, for residuals r, in rounds.

    With sigma >= lambda_max + R / b, where R bounds the curvature of one row and b is the batch size, the recursion
    contracts in mean square, and its stationary error in the norm of H is at most sqrt(R / (b sigma)) < 1 times the
    solution. The noise is thus proportional to what is solved for: repeated on residuals it shrinks with them, and the
    rounds converge linearly to any tolerance.

    The average of the later half of a round has less noise, the last iterate less bias; refinement is given both and
    combines them. A round whose candidates more than double a residual doubles sigma; one that does little is followed by
    one twice as long.

    Notes
    -----
    Sources: Agarwal, Bullins & Hazan (2017), section 4; the rounds do for LiSSA what the snapshots of Johnson & Zhang
    (2013), "Accelerating stochastic gradient descent using predictive variance reduction" (SVRG), do for SGD.
    """

    def __init__(self, problem: Problem, *, batch_size: int | None, seed: int, max_steps: int | None) -> None:
        self._problem, self._seed = problem, seed
        self._batch = min(BATCH, problem.rows) if batch_size is None else batch_size
        self._max_steps = default_steps(problem.rows, self._batch) if max_steps is None else max_steps
        self.sigma = largest_eigenvalue(problem, seed) + problem.row_curvature() / self._batch
        self._is_zero = self.sigma == 0
        if self._is_zero:
            self.sigma = 1.0
        reads = math.ceil(READS * problem.rows / self._batch)
        depth = math.ceil(-math.log(AIM) * self.sigma / problem.ridge) if problem.ridge > 0 else reads
        self._length = max(20, min(depth, reads))
        self._restarts = 0
        self.steps = 0
        self.note = "H is zero" if self._is_zero else ""

    def correct(self, residual: Tensor, target: Tensor) -> Tensor:
        steps = min(self._length, self._max_steps - self.steps)
        r = residual.to(self._problem.dtype)
        found = self._problem.lissa(r, self.sigma, self._batch, self.steps, steps, steps // 2, self._seed)
        self._problem.passes += steps * self._batch / self._problem.rows
        self.steps += steps
        return torch.stack(found)

    def review(self, alone: Tensor, together: Tensor) -> bool:
        if self._is_zero:
            return False
        if alone.max().item() > GROWTH:
            self._restarts += 1
            self.sigma *= 2
        elif together.max().item() > POOR:
            self._length *= 2
        if self._restarts > RESTARTS:
            self.note = f"the recursion diverged up to sigma = {self.sigma / 2:.1e}, H may be indefinite or singular"
            return False
        return self.steps < self._max_steps


def default_steps(rows: int, batch_size: int) -> int:
    """Steps that read the data 200 times, and at least 2000."""
    return max(2000, math.ceil(200 * rows / batch_size))
