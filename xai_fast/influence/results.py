"""What the influence functions return: numbers together with what they mean."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Convention", "Scores", "Solution", "TopK"]


@dataclass(frozen=True)
class Convention:
    """What an influence number means.

    Attributes
    ----------
    quantity : str
        For example "I_up,loss": the derivative of a test loss by the weight of one training row in the mean objective.
    sign : str
        Which sign harms.
    divided_by_n : bool
        Whether the number is the change for one row of n (True), or for a weight of 1 in the mean (False).
    hessian : str
        The matrix that was inverted.
    l2, damping : float
        In the units of that matrix.
    train_gradient : str
        "loss": without the regulariser; "objective": with it.
    n : int
        Training rows.

    Examples
    --------
    >>> c = Convention("I_up,loss", "positive = harmful", False, "mean loss Hessian + l2 + damping", 0.01, 0.0, "loss", 100)
    >>> print(c)
    I_up,loss; positive = harmful; not divided by n = 100; H = mean loss Hessian + l2 + damping, l2 = 0.01, damping = 0; \
train gradient of the loss
    """

    quantity: str
    sign: str
    divided_by_n: bool
    hessian: str
    l2: float
    damping: float
    train_gradient: str
    n: int

    def __str__(self) -> str:
        divided = "divided" if self.divided_by_n else "not divided"
        return (
            f"{self.quantity}; {self.sign}; {divided} by n = {self.n}; H = {self.hessian}, l2 = {self.l2:g}, "
            f"damping = {self.damping:g}; train gradient of the {self.train_gradient}"
        )


@dataclass(frozen=True)
class Solution:
    """The answer of an inverse-Hessian-vector product, with the certificate of the solve.

    Attributes
    ----------
    x : Tensor, shape of the right-hand side
        H^-1 v.
    residual : Tensor, shape () for one right-hand side or (M,)
        ||v - H x|| / ||v||, measured with a full pass over the data after the solve, not estimated by the recursion.
    steps : int
        Iterations of the solver: of CG, of Lanczos, of LiSSA; 0 for the exact solver.
    converged : bool
        Whether every residual is at most the tolerance.
    solver : str
        Which solver ran.
    why : str
        For "auto": why it was picked; else what there is to know about the solve.
    passes : float
        Full reads of the training data, setting up included.
    tolerance : float
    standard_error : Tensor or None, shape of residual
        LiSSA with repeats: the standard error of the mean solution over the repeats, relative to its norm.

    Examples
    --------
    >>> s = Solution(torch.ones(2), torch.tensor(1e-7), 3, True, "cg", "", 4.0, 1e-5)
    >>> s.converged, s.solver
    (True, 'cg')
    """

    x: Tensor
    residual: Tensor
    steps: int
    converged: bool
    solver: str
    why: str = ""
    passes: float = 0.0
    tolerance: float = 0.0
    standard_error: Tensor | None = None

    def with_shape(self, shape: tuple[int, ...]) -> Solution:
        """The same with x in another shape; a single right-hand side has one residual, not a list of one."""
        single = len(shape) < 3
        residual = self.residual.reshape(()) if single else self.residual
        error = self.standard_error
        if error is not None and single:
            error = error.reshape(())
        return replace(self, x=self.x.reshape(shape), residual=residual, standard_error=error)


class Scores(Tensor):
    """A plain (n_test, n_train) tensor that also says what it means.

    Attributes
    ----------
    convention : Convention
    solution : Solution or None
        The solve behind it.

    Results of operations on it are ordinary tensors.

    Examples
    --------
    >>> scores = Scores.wrap(torch.zeros(1, 2), None, None)
    >>> type(scores + 1).__name__
    'Tensor'
    """

    convention: Convention | None
    solution: Solution | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def wrap(values: Tensor, convention: Convention | None, solution: Solution | None) -> Scores:
        """The tensor with its meaning attached."""
        scores = values.as_subclass(Scores)
        scores.convention, scores.solution = convention, solution
        return scores

    def __deepcopy__(self, memo: dict[int, Any]) -> Scores:
        return Scores.wrap(copy.deepcopy(self.detach(), memo), self.convention, self.solution)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Scores.wrap, (self.detach(), self.convention, self.solution)


@dataclass(frozen=True)
class TopK:
    """The k most helpful or harmful training rows of every test point; unpacks as ``values, indices``.

    Attributes
    ----------
    values : Tensor, shape (n_test, k); per class (n_test, classes, k)
        Most extreme first.
    indices : Tensor of int64, shape of values
        Training rows. Where fewer than k rows qualify, -1 with a value of NaN.
    which : str
        "helpful" or "harmful".
    convention : Convention or None
    solution : Solution or None

    Examples
    --------
    >>> values, indices = TopK(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), "helpful", None, None)
    """

    values: Tensor
    indices: Tensor
    which: str
    convention: Convention | None
    solution: Solution | None

    def __iter__(self) -> Iterator[Any]:
        yield self.values
        yield self.indices
