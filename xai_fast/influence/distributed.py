"""Influence functions over several processes: training rows sharded, products with H summed, top-k merged.

One rank leads. Only it runs a solver; what the solver asks of the Hessian is announced to the other ranks, which compute
their part and wait for the next question. So all loops are counted, and all decisions taken, in one place: rounding that
differs between machines cannot make two ranks go different ways, which would hang them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._fingerprint import fingerprint, pieces
from ._extremes import merged
from ._functionals import Functional
from ._labels import as_array, real_numbers
from ._ranks import Ranks
from ._rows import as_features
from .glm import GlmProblem
from .heads import Head
from .influence import Influence
from .results import Scores, Solution
from .solvers import ExactFactor, LowRank

__all__ = ["DistributedInfluence", "ShardedProblem"]

T = TypeVar("T")


class ShardedProblem(GlmProblem):
    """The Hessian over the rows of all ranks.

    Every method is a collective: all ranks call it, or all but the first are in :meth:`led` and the first calls it there.

    Parameters
    ----------
    ranks : Ranks
    X, y, head, sample_weight, damping
        As :class:`GlmProblem`; rows of this rank.
    counts : list of int
        Rows of every rank.
    total_weight : float
        The sum of the sample weights of all ranks.

    Raises
    ------
    TypeError, ValueError
        As :class:`GlmProblem`, on this rank alone.

    Examples
    --------
    >>> import torch.distributed as dist, xai_fast as xf
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> head = xf.influence.LinearHead([1.0, 0.0], l2=0.5)
    >>> problem = ShardedProblem(Ranks(), torch.eye(2), torch.zeros(2), head, counts=[2])
    >>> problem.led(lambda: problem.hvp(torch.ones(1, 2)))
    tensor([[1., 1.]])
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        ranks: Ranks,
        X: Any,
        y: Any,
        head: Head,
        *,
        counts: list[int],
        sample_weight: Any = None,
        total_weight: float = 0.0,
        damping: float = 0.0,
    ) -> None:
        options: dict[str, Any] = {"sample_weight": sample_weight, "damping": damping}
        # No collective in here, where rows that are not finite raise on their rank alone: the one sum that is needed came.
        options["reduce"] = lambda *_: torch.tensor(total_weight, dtype=torch.float64)
        super().__init__(X, y, head, rows=sum(counts), first_row=sum(counts[: ranks.rank]), **options)
        self._ranks, self._reduce, self._announces = ranks, ranks.reduce, False

    def led(self, function: Callable[[], T]) -> T:
        """function(), run by the first rank alone with the help of the others; the result, or what it raised, everywhere."""
        ranks = self._ranks
        if ranks.leads:
            ending = ranks.broadcast(self._run(function))
        else:
            while (ending := ranks.broadcast(None, self.device))[0] not in ("return", "raise"):
                getattr(GlmProblem, ending[0])(self, *ending[1])
        if ending[0] == "raise":
            raise ending[1]
        value: T = ending[1]
        return value

    def _run(self, function: Callable[[], Any]) -> tuple[str, Any]:
        self._announces = True
        try:
            return "return", function()
        except Exception as error:
            return "raise", error
        finally:
            self._announces = False

    def _everywhere(self, name: str, *arguments: Any) -> Any:
        """The method of :class:`GlmProblem` on all ranks; the leader says so first. Calls within it are not announced."""
        announces, self._announces = self._announces, False
        try:
            if announces:
                self._ranks.broadcast((name, arguments))
            return getattr(GlmProblem, name)(self, *arguments)
        finally:
            self._announces = announces

    def hvp(self, vectors: Tensor) -> Tensor:
        found: Tensor = self._everywhere("hvp", vectors)
        return found

    def batch_hvp(self, vectors: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
        found: Tensor = self._everywhere("batch_hvp", vectors, batch_size, seed, step)
        return found

    def lissa(
        self, gradient: Tensor, sigma: float, batch_size: int, first_step: int, steps: int, skip: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Announced once: nothing in the loop depends on the numbers."""
        found: tuple[Tensor, Tensor] = self._everywhere("lissa", gradient, sigma, batch_size, first_step, steps, skip, seed)
        return found

    def row_curvature(self) -> float:
        return float(self._everywhere("row_curvature"))

    def dense(self) -> Tensor:
        found: Tensor = self._everywhere("dense")
        return found

    def root_preconditioner(self) -> Callable[[Tensor], Tensor]:
        found: Callable[[Tensor], Tensor] = self._everywhere("root_preconditioner")
        return found


class DistributedInfluence(Influence):
    """:class:`Influence` over the processes of torch.distributed, each with its own training rows.

    Rows are numbered over all ranks: those of rank 0 first. Every method is a collective: all ranks call it, in the same
    order, with the same head, options and test points. The result is that of one process with all rows, up to rounding.
    Scores, self-influence and leave-one-out come for the rows of this rank (:meth:`gather` puts them together), top-k for
    those of all.

    Parameters
    ----------
    head : Head
        The same on all ranks.
    X_local : Tensor, numpy array or numpy memmap, shape (n_local, D)
        Training rows of this rank, at least one; their number may differ. With the nccl backend on the GPU of the rank
        (``torch.cuda.set_device`` was called).
    y_local : array-like, shape (n_local,)
    group : ProcessGroup, optional
        By default all processes. gloo and nccl.
    sample_weight : array-like, shape (n_local,), optional
    **options
        As :class:`Influence`. "auto" looks at the free memory of the first rank, where factors are kept; progress bars and
        warnings come from there.

    Attributes
    ----------
    problem : ShardedProblem
    n : int
        Training rows of all ranks.
    rows : range
        Numbers of the rows of this rank.
    convention : Convention

    Raises
    ------
    TypeError, ValueError
        As :class:`Influence`, on all ranks if on one; torch.distributed not initialised; head, options, dtype, later test
        points, that are not the same on all ranks.

    Examples
    --------
    Under torchrun, with ``init_process_group()`` and the rows of ``dist.get_rank()``; here with one process:

    >>> import torch.distributed as dist, xai_fast as xf
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> X, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 6.0])
    >>> influence = DistributedInfluence(xf.influence.LinearHead([23 / 14]), X, y)
    >>> influence.top_k(torch.tensor([[1.0]]), torch.tensor([2.0]), 2).indices
    tensor([[2, 0]])
    >>> influence.rows
    range(0, 3)
    >>> dist.destroy_process_group()
    """

    problem: ShardedProblem

    def __init__(
        self, head: Head, X_local: Any, y_local: Any, *, group: Any = None, sample_weight: Any = None, **options: Any
    ) -> None:
        self._ranks = Ranks(group)
        self._ranks.check_same(sample_weight="none" if sample_weight is None else "given", **options)
        self._shared: ExactFactor | None = None
        super().__init__(head, X_local, y_local, sample_weight=sample_weight, **options)

    def _problem(self, X: Any, y: Any, head: Head, sample_weight: Any, damping: float) -> ShardedProblem:
        ranks = self._ranks

        def summary() -> tuple[int, float, str, str]:
            ranks.check_reaches(X, "X_local")
            return _summary(X, head, sample_weight)

        count, weight, dtype, name = ranks.agree(summary)
        ranks.check_same(head=name, dtype=dtype)
        counts, weights = ranks.gather(count), ranks.gather(weight)
        first = sum(counts[: ranks.rank])
        self.rows = range(first, first + count)
        return ranks.agree(
            lambda: ShardedProblem(
                ranks, X, y, head, counts=counts, sample_weight=sample_weight, total_weight=sum(weights), damping=damping
            )
        )

    # ---- results ----------------------------------------------------------------------------------------------------------

    def gather(self, scores: Tensor) -> Scores:
        """Columns of all ranks side by side, on every rank.

        Parameters
        ----------
        scores : Scores, shape (n_test, n_local) or (n_local,)
            Of this rank.

        Returns
        -------
        Scores, shape (n_test, n) or (n,)

        Raises
        ------
        ValueError
            Another number of columns than this rank has rows.

        Examples
        --------
        >>> import torch.distributed as dist, xai_fast as xf
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> influence = DistributedInfluence(xf.influence.LinearHead([0.0]), torch.ones(2, 1), torch.tensor([1.0, -2.0]))
        >>> influence.gather(influence.self_influence())
        Scores([-1., -4.])
        >>> dist.destroy_process_group()
        """
        self._ranks.agree(lambda: self._check_columns(scores))
        plain = scores.as_subclass(Tensor) if isinstance(scores, Scores) else scores
        whole = self._ranks.gather_columns(plain)
        return Scores.wrap(whole, getattr(scores, "convention", None), getattr(scores, "solution", None))

    def _check_columns(self, scores: Any) -> None:
        if not isinstance(scores, Tensor) or scores.dim() not in (1, 2) or scores.shape[-1] != len(self.rows):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"scores: expected {len(self.rows)} columns, the rows of this rank, got {got}")

    def scores(self, X_test: Any, y_test: Any, *, of: Functional = "loss", gather: bool = False) -> Scores:
        """The influence of the training rows of this rank, or with `gather` of all ranks, on every test point.

        Parameters
        ----------
        X_test, y_test, of
            As in :meth:`Influence.scores`; the same on all ranks.
        gather : bool

        Returns
        -------
        Scores, shape (n_test, n_local); (n_test, n) with `gather`

        Raises
        ------
        TypeError, ValueError
            As :meth:`Influence.scores`; test points that are not the same on all ranks.

        Examples
        --------
        >>> import torch.distributed as dist, xai_fast as xf
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> influence = DistributedInfluence(xf.influence.LinearHead([0.0]), torch.ones(2, 1), torch.tensor([1.0, -1.0]))
        >>> influence.scores(torch.ones(1, 1), torch.ones(1), gather=True)
        Scores([[-1.,  1.]])
        >>> dist.destroy_process_group()
        """
        local = super().scores(X_test, y_test, of=of)
        return self.gather(local) if gather else local

    # ---- what has to be decided together ----------------------------------------------------------------------------------

    def _parameters(self, v: Any, name: str) -> Tensor:
        parent = super()._parameters
        found = self._ranks.agree(lambda: parent(v, name))
        self._ranks.check_same(**{name: fingerprint(pieces(found))})
        return found

    def _test_rows(self, X_test: Any, y_test: Any, of: Functional) -> tuple[Tensor, Tensor | None]:
        parent = super()._test_rows
        X, y = self._ranks.agree(lambda: parent(X_test, y_test, of))
        self._ranks.check_same(X_test=fingerprint(pieces(X)), y_test=None if y is None else fingerprint(pieces(y)))
        return X, y

    def _solve(self, gradients: Tensor) -> Solution:
        parent = super()._solve
        return self.problem.led(lambda: parent(gradients))

    def _low_rank(self, rank: int) -> LowRank:
        parent = super()._low_rank
        return self.problem.led(lambda: parent(rank))

    def _exact_factor(self) -> ExactFactor:
        """On every rank, unlike the one that the leader keeps for its solves: all take part in assembling H, or none."""
        if self._shared is None:
            H = self.problem.dense()
            self._shared = self._factor = self._ranks.agree(lambda: ExactFactor(H))
        return self._shared

    def _newton(self, gradients: Tensor) -> Tensor:
        parent = super()._newton
        return self._ranks.agree(lambda: parent(gradients))

    def _extreme(self, S: Tensor, k: int, largest: bool, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        values, indices = super()._extreme(S, k, largest, rows)
        indices = torch.where(indices < 0, indices, indices + self.rows.start)
        # In the order of the ranks, that is, of the rows. Influence is minus the product of gradients.
        return merged(self._ranks.gather_columns(values), self._ranks.gather_columns(indices), k, largest=not largest)


def _summary(X: Any, head: Any, sample_weight: Any) -> tuple[int, float, str, str]:
    """Rows of this rank, their weight, their dtype, and a hash of the head."""
    if not isinstance(head, Head):
        raise TypeError(f"head: expected a Head, got {type(head).__name__}")
    features = as_features(X, "X_train")
    count = len(features)
    if count == 0:
        raise ValueError(f"X_local: expected at least one row on every rank, got shape {tuple(features.shape)}")
    weight = 0.0
    if sample_weight is not None:
        weight = float(real_numbers(as_array(sample_weight, "sample_weight", count), "sample_weight", 0.0).sum())
    name = fingerprint([(head.parameters, head.family, head.intercept, head.smoothing, head.penalty, head.classes)])
    return count, weight, str(features.dtype), name
