"""The Hessian of any torch model over training rows, as the solvers take it."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..ops import _checks as check
from ..ops.ihvp import sample_rows
from ._torch_model import ModelLoss
from ._torch_rows import TorchRows
from .problems import Problem

__all__ = ["CURVATURES", "TorchProblem"]

CURVATURES = ("hessian", "gauss-newton")

# Rows whose largest curvature is found by power iteration, its steps, and how much larger that of other rows is taken to be.
SAMPLE, ITERATIONS, MARGIN = 32, 10, 2.0
# What outputs that are all zero are divided by.
TINY = 1e-300


class TorchProblem(Problem):
    """H = (1/n) sum_i (Hessian or Gauss-Newton matrix of the loss of row i) + l2 + damping.

    Parameters
    ----------
    loss : ModelLoss
    data : TorchRows
    curvature : {"hessian", "gauss-newton"}
        The Gauss-Newton matrix J^T H_out J leaves out the curvature of the model and is never indefinite for a convex loss.
    l2 : float
        Weight of (l2 / 2) ||parameters||^2 in the mean objective.
    damping : float

    Raises
    ------
    TypeError, ValueError
        An unknown curvature, negative l2 or damping.

    Notes
    -----
    Sources: Pearlmutter (1994), "Fast exact multiplication by the Hessian"; Schraudolph (2002), "Fast curvature
    matrix-vector products". Where the model cannot run in float64, `wide` is the dtype of the model.
    """

    def __init__(self, loss: ModelLoss, data: TorchRows, *, curvature: str, l2: float, damping: float) -> None:
        if curvature not in CURVATURES:
            raise ValueError(f"curvature: expected one of {', '.join(CURVATURES)}, got {curvature!r}")
        self.loss, self.data = loss, data
        self._is_gauss_newton = curvature == "gauss-newton"
        self.l2, self.damping = check.check_at_least_zero(l2, "l2"), check.check_at_least_zero(damping, "damping")
        self.ridge = self.l2 + self.damping
        self.size, self.rows, self.dtype, self.device = loss.size, len(data), loss.dtype, loss.device
        self._states = {loss.dtype: loss.state}
        self._probe(loss.dtype)
        self.wide = self._widest()

    def _probe(self, dtype: torch.dtype) -> None:
        """ValueError where an operation of the model has no second derivative in forward mode."""
        try:
            self._multiply(self.data.read(torch.arange(1)), torch.zeros(1, self.size, dtype=dtype, device=self.device))
        except NotImplementedError as error:
            found = re.search(r"forward AD with (\S+)|derivative for '(\S+)'", str(error))
            operation = (found[1] or found[2]) if found else str(error).splitlines()[0]
            wanted = "operations that torch differentiates twice, forward over reverse"
            raise ValueError(f"model: expected {wanted}, got {operation}") from error

    def _widest(self) -> torch.dtype:
        """float64, if device, model and loss run in it: some models cast to float32 on the way."""
        if self.dtype == torch.float64:
            return self.dtype
        try:
            self._states[torch.float64] = self.loss.state.to(torch.float64)
            self._probe(torch.float64)
        except (RuntimeError, TypeError, ValueError):
            self._states.pop(torch.float64, None)
            return self.dtype
        return torch.float64

    def first_outputs(self, rows: int) -> tuple[Tensor, ...]:
        """Outputs and losses of the first training rows, rounded far above what other machines make of them."""
        batch = self.data.read(torch.arange(min(rows, self.rows)))
        outputs, losses = self.loss.outputs_and_losses(self._states[self.wide], batch)
        digits = 1e6 if self.wide == torch.float64 else 1e2
        wide = (x.double() for x in (*outputs, losses) if x.numel())
        return tuple((digits * x / x.abs().max().clamp_min(TINY)).round() for x in wide)

    def _multiply(self, batch: object, vectors: Tensor) -> Tensor:
        return self.loss.product(self._states[vectors.dtype], batch, vectors, self._is_gauss_newton)

    def hvp(self, vectors: Tensor) -> Tensor:
        self.passes += 1
        total = torch.zeros_like(vectors)
        for _, batch in self.data.batches(self.loss.microbatch):
            total += self._multiply(batch, vectors)
        return total / self.rows + self.ridge * vectors

    def batch_hvp(self, vectors: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
        batch = self.data.read(sample_rows(self.rows, batch_size, seed=seed, step=step))
        return self._multiply(batch, vectors) / batch_size + self.ridge * vectors

    def row_curvature(self) -> float:
        """An estimate: twice the largest curvature of 32 rows, each by 10 steps of the power iteration."""
        rows = torch.arange(self.rows) if self.rows <= SAMPLE else sample_rows(self.rows, SAMPLE, seed=0)
        batch = self.data.read(rows)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(len(rows), self.size, generator=generator).to(self.device, self.dtype)
        length = v.new_zeros(1)
        for _ in range(ITERATIONS):
            v = self.loss.row_products(self._states[self.dtype], batch, v, self._is_gauss_newton)
            length = v.norm(dim=1, keepdim=True)
            v = v / length.clamp_min(torch.finfo(v.dtype).tiny)
        return MARGIN * float(length.max()) + self.ridge
