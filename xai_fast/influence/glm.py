"""The Hessian of a generalised linear model over training rows, as the solvers take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._dtypes import accumulate_dtype
from ..ops import _checks as check
from ._gram import WeightedGram
from ._kronecker import Preconditioner, diagonal_preconditioner, kronecker_preconditioner, whole_preconditioner
from ._labels import as_array, named_rows, real_numbers
from ._rows import Rows
from .heads import Head
from .problems import Problem

__all__ = ["GlmProblem", "Reduce"]

# (tensor, "sum" or "max") -> the same over all processes.
Reduce = Callable[[Tensor, str], Tensor]

# The largest P for which a preconditioner factors matrices (P, P).
LARGEST_FACTOR = 8192


def _alone(x: Tensor, operation: str) -> Tensor:
    return x


class GlmProblem(Problem):
    """H = (1/n) sum_i s_i (x_i x_i^T) (x) W_i + l2 + damping, with the curvature W_i of a head kept from one pass over X.

    Vectors (M, size) are parameters (P, C), the bias in the last row, written row after row.

    Parameters
    ----------
    X : Tensor, numpy array or numpy memmap, shape (n, D)
        A memmap is read in blocks of rows. With `reduce`, the rows of this process.
    y : array-like, shape (n,)
        Labels as the head takes them.
    head : Head
    sample_weight : array-like, shape (n,), optional
        s; the mean still divides by n.
    damping : float
        Added to every eigenvalue of H.
    reduce : callable, optional
        ``reduce(tensor, "sum" or "max")`` over the processes that hold the other rows.
    rows : int, optional
        n over all processes.
    first_row : int
        Number of the first row of this process among all.

    Attributes
    ----------
    l2, damping : float
    data : Rows
    labels : Tensor, shape (n,)
    weights : Tensor, shape (n, C)
        Curvatures, or probabilities (softmax).
    residual : Tensor, shape (n, C)
        d loss / d logits, without the sample weight.
    sample_weight : Tensor, shape (n,), or None

    Raises
    ------
    TypeError, ValueError
        Rows that are not finite and labels out of range (named), integer X, another number of features than the head has,
        of labels than there are rows; negative weights or damping.

    Examples
    --------
    >>> import xai_fast as xf
    >>> problem = GlmProblem(torch.eye(2), torch.zeros(2), xf.influence.LinearHead([1.0, 0.0], l2=0.5))
    >>> problem.hvp(torch.ones(1, 2))
    tensor([[1., 1.]])
    """

    def __init__(
        self,
        X: Any,
        y: Any,
        head: Head,
        *,
        sample_weight: Any = None,
        damping: float = 0.0,
        reduce: Reduce | None = None,
        rows: int | None = None,
        first_row: int = 0,
        name: str = "X_train",
    ) -> None:
        if not isinstance(head, Head):
            raise TypeError(f"head: expected a Head, got {type(head).__name__}")
        self.data, self.head = Rows(X, name), head
        if self.data.dim != head.dim:
            raise ValueError(f"{name}: expected {head.dim} features, as theta has, got {self.data.dim}")
        local = self.data.rows
        self.rows, self._first = local if rows is None else rows, first_row
        self._reduce, self._sharded = reduce or _alone, reduce is not None
        self.device, self.dtype, self.wide = self.data.device, accumulate_dtype(self.data.dtype), torch.float64
        self.params, self.outputs = head.parameters.shape
        self.size = self.params * self.outputs
        label_name = name.replace("X", "y", 1)
        self.labels = head.check_labels(y, local, name=label_name).to(self.device)
        self.sample_weight = None if sample_weight is None else _sample_weights(sample_weight, local).to(self.device)
        self.damping = check.check_at_least_zero(damping, "damping")
        self.l2 = head.penalty.l2(self.rows, self._mean_weight())
        self.ridge = self.damping if head.intercept else self.l2 + self.damping
        self._ridges = torch.full((self.params, 1), self.l2 + self.damping, dtype=self.wide, device=self.device)
        if head.intercept:
            self._ridges[-1] = self.damping
        self.weights, self.residual = self._curvature(name)
        self._options: dict[str, Any] = {"family": head.family, "intercept": head.intercept, "smoothing": head.smoothing}
        self._preconditioner: Preconditioner | None = None

    def _mean_weight(self) -> float:
        if self.sample_weight is None:
            return 1.0
        total = float(self._reduce(self.sample_weight.sum(), "sum"))
        if total <= 0:
            raise ValueError("sample_weight: expected at least one weight above 0, got none")
        return total / self.rows

    def _curvature(self, name: str) -> tuple[Tensor, Tensor]:
        """Curvatures and residuals of all rows, in one pass that also finds rows that are not finite."""
        weights = torch.empty(self.data.rows, self.outputs, dtype=self.dtype, device=self.device)
        residual = torch.empty_like(weights)
        for at, X in self.data.blocks(2 * self.data.dim * self.dtype.itemsize):
            logits = self.head.logits(X)
            weights[at], residual[at] = (
                self.head.weights(logits, self.labels[at]),
                self.head.residual(logits, self.labels[at]),
            )
            # NaN and infinity in a row always reach its logits.
            bad = ~(logits.isfinite() & weights[at].isfinite()).all(1)
            if bad.any():
                _refuse_rows(bad, X, self._first + at.start, name)
        return weights, residual

    # ---- products ---------------------------------------------------------------------------------------------------------

    def _matrices(self, vectors: Tensor) -> Tensor:
        return vectors.reshape(-1, self.params, self.outputs)

    def _with_ridge(self, total: Tensor, vectors: Tensor) -> Tensor:
        """(M, size) of the mean over all processes plus the ridge, for vectors (M,P,C)."""
        return (self._reduce(total, "sum") + self._ridges.to(vectors.dtype) * vectors).reshape(len(vectors), -1)

    def hvp(self, vectors: Tensor) -> Tensor:
        """H v for vectors (M, size), float64 or the dtype of the problem; one pass over the rows."""
        self.passes += 1
        v = self._matrices(vectors)
        total = torch.zeros_like(v)
        for at, X in self.data.spans():
            s = None if self.sample_weight is None else self.sample_weight[at]
            part = ops.glm_hvp(X, v, weights=self.weights[at], sample_weight=s, **self._options)
            total += part * (len(X) / self.rows)
        return self._with_ridge(total, v)

    def batch_hvp(self, vectors: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
        """H_B v; the batch is drawn from the rows of all processes, and each does its own."""
        v = self._matrices(vectors)
        batch = ops.sample_rows(self.rows, batch_size, seed=seed, step=step, device=self.device) - self._first
        mine = batch[(batch >= 0) & (batch < self.data.rows)]
        if not len(mine):
            return self._with_ridge(torch.zeros_like(v), v)
        s = None if self.sample_weight is None else self.sample_weight[mine]
        found = ops.glm_hvp(self.data.take(mine), v, weights=self.weights[mine], sample_weight=s, **self._options)
        return self._with_ridge(found * (len(mine) / batch_size), v)

    def lissa(
        self, gradient: Tensor, sigma: float, batch_size: int, first_step: int, steps: int, skip: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """The fused loop for rows in the memory of one process, the loop over :meth:`batch_hvp` otherwise."""
        if self._sharded or not self.data.in_memory:
            return super().lissa(gradient, sigma, batch_size, first_step, steps, skip, seed)
        _, X = next(self.data.spans())
        last, average = ops.lissa(
            X, self._matrices(gradient), weights=self.weights, sample_weight=self.sample_weight, l2=self.l2,
            damping=self.damping, sigma=sigma, batch_size=batch_size, first_step=first_step, steps=steps, skip=skip,
            seed=seed, **self._options,
        )  # fmt: skip
        return last.reshape(gradient.shape), average.reshape(gradient.shape)

    def row_curvature(self) -> float:
        """The largest s_i ||x_i||^2 times the bound of the head, plus the ridge."""
        bound = self.head.curvature_bound(self.weights).double()
        if self.sample_weight is not None:
            bound = bound * self.sample_weight
        largest = torch.zeros((), dtype=self.wide, device=self.device)
        for at, X in self.data.blocks(2 * self.data.dim * self.dtype.itemsize):
            squares = X.to(self.dtype).square().sum(1).double() + self.head.intercept
            largest = torch.maximum(largest, (squares * bound[at]).max())
        return float(self._reduce(largest, "max")) + self.l2 + self.damping

    # ---- the matrix itself ------------------------------------------------------------------------------------------------

    def design(self, matrices: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(positions, X, s / n) in float64, X with the 1 of the bias, in blocks for work on `matrices` copies of them."""
        for at, X in self.data.blocks(8 * self.params * (matrices + 1)):
            X = X.double()
            if self.head.intercept:
                X = torch.cat([X, X.new_ones(len(X), 1)], 1)
            s = X.new_ones(len(X)) if self.sample_weight is None else self.sample_weight[at]
            yield at, X, s / self.rows

    def dense(self) -> Tensor:
        """H (size, size) in float64, in one pass: a weighted Gram matrix for each pair of outputs.

        Softmax with a bias, l2 and no damping: plus l2 on the direction that adds the same to all biases. H is singular
        along it, but no gradient has a part in it: solutions do not change.
        """
        gram = WeightedGram(self.params, self.outputs, self.device)
        for at, X, s in self.design(self.outputs):
            gram.add(X, s, self.weights[at].double())
        self.passes += 1
        H = gram.matrix(self._reduce(gram.total, "sum"))
        H.diagonal().add_(self._ridges.expand(-1, self.outputs).flatten())
        if self.outputs > 1 and self.head.intercept and self.damping == 0:
            H[-self.outputs :, -self.outputs :] += self.l2 / self.outputs
        return H

    def dense_passes(self) -> float:
        """Floating-point operations of :meth:`dense` in those of one product with one vector."""
        C, P = self.outputs, self.params
        return P / 2 if C == 1 else P * (C + 3) / 4

    def root_preconditioner(self) -> Callable[[Tensor], Tensor]:
        """M^-1/2 for CG; made once.

        M is H itself for one output (one pass); else H in an eigenbasis of Kronecker factors, its diagonal there and a part
        exactly (two passes); beyond 8192 parameters an output the diagonal of H (one pass).
        """
        if self._preconditioner is None:
            if self.params > LARGEST_FACTOR:
                build = diagonal_preconditioner
            else:
                build = whole_preconditioner if self.outputs == 1 else kronecker_preconditioner
            # With a ridge on the bias too where H can be singular without.
            ridges = self._ridges if self.outputs == 1 else torch.full_like(self._ridges, self.l2 + self.damping)
            self._preconditioner = build(self, ridges, self._reduce)
        return self._preconditioner


def _sample_weights(sample_weight: Any, rows: int) -> Tensor:
    return real_numbers(as_array(sample_weight, "sample_weight", rows), "sample_weight", 0.0)


def _refuse_rows(bad: Tensor, X: Tensor, first_row: int, name: str) -> None:
    """ValueError that names the rows whose logits are not finite, and why."""
    broken = ~X.isfinite().all(1)
    if broken.any():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in {named_rows(broken, first_row)}")
    raise ValueError(f"{name}: expected logits within range, got an overflow in {named_rows(bad, first_row)}")
