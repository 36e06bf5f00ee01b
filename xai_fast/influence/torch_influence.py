"""Influence functions of any torch model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks as check
from ..ops._checks import check_count, check_seed
from ._torch_model import ModelLoss, Params
from ._torch_rows import as_rows, check_batch, count_of
from .results import Convention, Scores, Solution, TopK
from .solvers import SOLVERS, Prepared, check_options, check_tolerance, prepare, solve_quietly, warn_if_not_converged
from .torch_problem import TorchProblem

__all__ = ["TorchInfluence"]

# Right-hand sides that self_influence solves at once.
ROWS_AT_ONCE = 128


class TorchInfluence:
    """Which training rows are behind a prediction, for any torch model.

    .. math:: I_{up,loss}(i, test) = -\\nabla L_{test}^\\top H^{-1} \\nabla L_i

    the derivative of the loss of a test point by the weight of training row i in the mean objective: positive = harmful.
    H is the mean Hessian (or Gauss-Newton matrix) of the losses of single rows, plus l2 + damping.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(inputs)``, ``model(*inputs)`` for a tuple, ``model(**inputs)`` for a dict; runs in eval mode. The
        chosen parameters are copied now: training goes on without harm.
    loss_fn : callable
        ``loss_fn(outputs, targets)``: losses of the rows (B,), or their mean or sum. It is called with one row at a time
        (vmap), so that the loss of a row never depends on others.
    train_loader : DataLoader, Dataset, tuple (inputs, targets), or iterable of such batches
        Inputs: a tensor, or a tuple or dict of tensors. Row numbers are those of the dataset, in its order, also if the
        loader shuffles (which warns). Rows are read once and kept if they fit, so that random augmentation stays as it came
        out.
    params : None, str, list or callable
        None: all that require a gradient. Names of parameters or of modules, parameters, or ``(name, parameter) -> bool``.
    solver : {"auto", "exact", "cg", "lissa", "lanczos"}
        See :func:`xai_fast.influence.solvers.solve`.
    damping : float
        Added to every eigenvalue, in the units of H.
    l2 : float
        Weight of (l2 / 2) ||parameters||^2 in the mean objective, over the chosen parameters: the weight decay of SGD.
    curvature : {"hessian", "gauss-newton"}
        The Hessian of a network is often indefinite; the Gauss-Newton matrix of a convex loss never is.
    train_gradient : {"loss", "objective"}
        With "objective", that of the regulariser is in the training gradients.
    seed : int
    microbatch : int, optional
        Rows whose activations are held at once, by default 128.
    tolerance : float
        Relative residual of the solves; missing it warns.
    max_steps, batch_size, rank : int, optional
        As in :func:`xai_fast.influence.solvers.solve`.
    progress : bool
        Show a bar for every solve (needs tqdm).

    Attributes
    ----------
    problem : TorchProblem
    n : int
        Training rows.
    names : list of str
        The chosen parameters, in the order of the vectors.
    convention : Convention

    Raises
    ------
    TypeError, ValueError
        No parameters chosen, unknown names; data in another form; an iterable that gives its rows in another order each
        time; losses that are not finite (the first rows are named), depend on other rows, or not on the parameters;
        operations that torch does not differentiate twice; unknown options, or such that the solver does not have, negative
        l2 or damping.

    Notes
    -----
    Source: Koh & Liang (2017), "Understanding black-box predictions via influence functions", eq. 2. Test gradients never
    contain the regulariser. Influence functions describe a minimum of the objective; elsewhere, and for an indefinite H,
    they describe one Newton step.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(2.0)
    >>> X, y = torch.ones(2, 1), torch.tensor([[1.0], [3.0]])  # the mean is 2
    >>> influence = xf.influence.TorchInfluence(model, torch.nn.functional.mse_loss, (X, y))
    >>> influence.scores(X[:1], torch.tensor([[0.0]]))  # the second row pulls the prediction up, and harms
    Scores([[-4.,  4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        train_loader: Any,
        params: Params = None,
        *,
        solver: str = "auto",
        damping: float = 0.0,
        l2: float = 0.0,
        curvature: str = "hessian",
        train_gradient: str = "loss",
        seed: int = 0,
        microbatch: int | None = None,
        tolerance: float = 1e-5,
        max_steps: int | None = None,
        batch_size: int | None = None,
        rank: int | None = None,
        progress: bool = False,
    ) -> None:
        if solver not in (*SOLVERS, "arnoldi"):
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
        if train_gradient not in ("loss", "objective"):
            raise ValueError(f"train_gradient: expected 'loss' or 'objective', got {train_gradient!r}")
        if microbatch is not None:
            microbatch = check_count(microbatch, "microbatch")
        self._loss = ModelLoss(model, loss_fn, params, microbatch)
        self._rows = as_rows(train_loader, "train_loader")
        self._loss.check(self._rows, "train_loader")
        self._loss.check_losses(self._rows, "train_loader")
        self.problem = TorchProblem(self._loss, self._rows, curvature=curvature, l2=l2, damping=damping)
        solver = "lanczos" if solver == "arnoldi" else solver
        check_options(self.problem, solver, max_steps=max_steps, batch_size=batch_size, rank=rank)
        self.n, self.names = self.problem.rows, self._loss.names
        self._solver, self._curvature, self._train_gradient = solver, curvature, train_gradient
        self._rank = rank
        self._options: dict[str, Any] = {
            "tolerance": check_tolerance(tolerance),
            "seed": check_seed(seed),
            "max_steps": max_steps,
            "batch_size": batch_size,
            "progress": progress,
        }
        self._prepared: Prepared | None = None

    @property
    def convention(self) -> Convention:
        matrix = "Hessian" if self._curvature == "hessian" else "Gauss-Newton matrix"
        return Convention(
            quantity="I_up,loss",
            sign="positive = harmful",
            divided_by_n=False,
            hessian=f"mean loss {matrix} + l2 + damping",
            l2=self.problem.l2,
            damping=self.problem.damping,
            train_gradient=self._train_gradient,
            n=self.n,
        )

    # ---- inverse-Hessian-vector products ----------------------------------------------------------------------------------

    def gradients(self, inputs: Any, targets: Any) -> Tensor:
        """Gradients of the losses of rows, without the regulariser.

        Parameters
        ----------
        inputs, targets
            As in a batch of the training data, B rows.

        Returns
        -------
        Tensor, shape (B, size)
            Parameters in the order of `names`, each flattened.

        Raises
        ------
        TypeError, ValueError
            Not tensors, or of different numbers of rows.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> rows = torch.ones(1, 1), torch.zeros(1, 1)
        >>> xf.influence.TorchInfluence(model, torch.nn.functional.mse_loss, rows).gradients(*rows)
        tensor([[4.]])
        """
        inputs, targets = check_batch((inputs, targets), "inputs, targets")
        return self._loss.gradients(inputs, targets)

    def inverse_hvp(self, v: Tensor) -> Solution:
        """H^-1 v, with the residual that was reached.

        Parameters
        ----------
        v : Tensor, shape (size,) or (M, size)

        Returns
        -------
        Solution
            x in the shape and dtype of v; residual () or (M,).

        Raises
        ------
        TypeError, ValueError
            Wrong shape, not finite; from the exact solver: a Hessian that is singular or indefinite.

        Warns
        -----
        NotConverged
            A residual above the tolerance.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> rows = torch.ones(2, 1), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> influence = xf.influence.TorchInfluence(model, torch.nn.functional.mse_loss, rows)
        >>> influence.inverse_hvp(torch.ones(1)).x
        tensor([0.5000])
        """
        check.check_float_tensor(v, "v")
        if v.dim() not in (1, 2) or v.shape[-1] != self.problem.size:
            size = self.problem.size
            raise ValueError(f"v: expected shape ({size},) or (M, {size}), got {check.shape_of(v)}")
        if not bool(v.isfinite().all()):
            raise ValueError("v: expected finite numbers, got NaN or infinity")
        solution = self._solve(v.reshape(-1, self.problem.size))
        solution = replace(solution, x=solution.x.to(v.dtype))
        return solution.with_shape(tuple(v.shape)) if v.dim() == 1 else solution

    def _solve(self, gradients: Tensor) -> Solution:
        solution = self._solve_quietly(gradients, len(gradients))
        warn_if_not_converged(solution)
        return solution

    def _solve_quietly(self, gradients: Tensor, right_hand_sides: int) -> Solution:
        start = self.problem.passes
        if self._prepared is None or not self._prepared.is_final:
            seed = self._options["seed"]
            self._prepared = prepare(self.problem, self._solver, right_hand_sides, rank=self._rank, seed=seed)
        prepared = self._prepared
        solution = solve_quietly(
            self.problem, gradients, solver=prepared.solver, factor=prepared.factor, **self._options_of(prepared.solver)
        )
        why = "; ".join(filter(None, (prepared.why, solution.why)))
        return replace(solution, why=why, passes=self.problem.passes - start)

    def _options_of(self, solver: str) -> dict[str, Any]:
        """What the user gave, less what only CG has if "auto" chose the exact solver."""
        drops = ("max_steps",) if self._solver == "auto" and solver == "exact" else ()
        return {name: value for name, value in self._options.items() if name not in drops}

    # ---- influence --------------------------------------------------------------------------------------------------------

    def scores(self, X_test: Any, y_test: Any) -> Scores:
        """The influence of every training row on the loss of every test point.

        Parameters
        ----------
        X_test, y_test
            Inputs and targets as in the training data, n_test rows.

        Returns
        -------
        Scores, shape (n_test, n_train)
            I_up,loss, with the meaning in ``.convention`` and the solve in ``.solution``.

        Raises
        ------
        TypeError, ValueError
            Not tensors, an empty test set, another number of targets than rows, gradients that are not finite.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> rows = torch.ones(2, 1), torch.tensor([[-1.0], [1.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> influence = xf.influence.TorchInfluence(model, torch.nn.functional.mse_loss, rows)
        >>> print(influence.scores(*rows).convention)
        I_up,loss; positive = harmful; not divided by n = 2; H = mean loss Hessian + l2 + damping, l2 = 0, damping = 0; \
train gradient of the loss
        """
        solution = self._solve(self._test_gradients(X_test, y_test))
        S = self._in_model_dtype(solution)
        out = S.new_empty(len(S), self.n)
        for at, gradients in self._train_gradients():
            out[:, at] = -(S @ gradients.T)
        return Scores.wrap(out, self.convention, solution)

    def top_k(self, X_test: Any, y_test: Any, k: int, *, which: str = "helpful", per_class: bool = False) -> TopK:
        """The k most helpful or harmful training rows of every test point, without the matrix of scores.

        Parameters
        ----------
        X_test, y_test
            As in :meth:`scores`.
        k : int
            At most n.
        which : {"helpful", "harmful"}
        per_class : bool
            The k rows of each class of training targets, which must be whole numbers (n,); classes in ascending order. Those
            with fewer rows end in -1 and NaN.

        Returns
        -------
        TopK
            values, indices: (n_test, k), most extreme first; (n_test, classes, k) per class. Of equal scores the earlier row
            comes first.

        Raises
        ------
        TypeError, ValueError
            As :meth:`scores`; k out of range; targets that are no classes.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> rows = torch.ones(2, 1), torch.tensor([[-1.0], [1.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> influence = xf.influence.TorchInfluence(model, torch.nn.functional.mse_loss, rows)
        >>> values, indices = influence.top_k(*rows, 1, which="helpful")
        >>> indices
        tensor([[0],
                [1]])
        """
        k = check_count(k, "k", 1, self.n)
        if which not in ("helpful", "harmful"):
            raise ValueError(f"which: expected 'helpful' or 'harmful', got {which!r}")
        labels = self._classes() if per_class else torch.zeros(self.n, dtype=torch.int64)
        solution = self._solve(self._test_gradients(X_test, y_test))
        S = self._in_model_dtype(solution)
        best = _Extremes(S, k, int(labels.max()) + 1, is_largest=which == "harmful")
        for at, gradients in self._train_gradients():
            best.merge(-(S @ gradients.T), at.start, labels[at].to(S.device))
        values, indices = best.found()
        if not per_class:
            values, indices = values[:, 0], indices[:, 0]
        return TopK(values, indices, which, self.convention, solution)

    def self_influence(self) -> Scores:
        """The influence of every training row on its own loss: the diagonal of ``scores`` of the training data.

        Never positive for a positive definite H; the most negative rows are atypical or mislabelled. Every row is a
        right-hand side: take the exact solver, or lanczos, unless rows are few.

        Returns
        -------
        Scores, shape (n,)

        Raises
        ------
        ValueError
            From the exact solver: a Hessian that is singular or indefinite.

        Warns
        -----
        NotConverged
            A residual above the tolerance.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> rows = torch.ones(2, 1), torch.tensor([[-1.0], [2.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> xf.influence.TorchInfluence(model, torch.nn.functional.mse_loss, rows).self_influence()
        Scores([-2., -8.])
        """
        out = self._loss.state.theta.new_empty(self.n)
        solutions = []
        for at, (inputs, targets) in self._rows.batches(min(ROWS_AT_ONCE, self._loss.gradient_rows)):
            gradients = self._loss.gradients(inputs, targets, name="train_loader", first_row=at.start)
            solution = self._solve_quietly(gradients, self.n)
            out[at] = -(self._in_model_dtype(solution) * self._of_objective(gradients)).sum(1)
            solutions.append(replace(solution, x=solution.x.new_empty(0)))
        solution = _joined(solutions)
        warn_if_not_converged(solution)
        return Scores.wrap(out, replace(self.convention, quantity="I_up,loss of each row on itself"), solution)

    def loo(self, X_test: Any, y_test: Any) -> Scores:
        """By how much the loss of every test point would change if a row were left out: -I_up,loss / n, to first order.

        Parameters
        ----------
        X_test, y_test
            As in :meth:`scores`.

        Returns
        -------
        Scores, shape (n_test, n_train)
            Predicted L_test(without row i) - L_test: positive = the row helps. Without the leverage of the row, which closed
            forms have: see ``Influence.loo``.

        Raises
        ------
        TypeError, ValueError
            As :meth:`scores`.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> rows = torch.ones(2, 1), torch.tensor([[-1.0], [1.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> xf.influence.TorchInfluence(model, torch.nn.functional.mse_loss, rows).loo(*rows)
        Scores([[ 1., -1.],
                [-1.,  1.]])
        """
        scores = self.scores(X_test, y_test)
        convention = replace(
            self.convention,
            quantity="L_test(theta without row i) - L_test(theta)",
            sign="positive = the row helps",
            divided_by_n=True,
        )
        return Scores.wrap(-scores.as_subclass(Tensor) / self.n, convention, scores.solution)

    def _test_gradients(self, X_test: Any, y_test: Any) -> Tensor:
        batch = check_batch((X_test, y_test), "X_test, y_test")
        if not count_of(batch):
            raise ValueError("X_test: expected at least one row, got none")
        return self._loss.gradients(*batch, name="X_test")

    def _train_gradients(self) -> Any:
        for at, gradients in self._loss.train_gradients(self._rows):
            yield at, self._of_objective(gradients)

    def _of_objective(self, gradients: Tensor) -> Tensor:
        if self._train_gradient == "loss":
            return gradients
        return gradients + self.problem.l2 * self._loss.state.theta

    def _in_model_dtype(self, solution: Solution) -> Tensor:
        return solution.x.to(self.problem.dtype)

    def _classes(self) -> Tensor:
        """The number of the class of every training row among the classes in ascending order."""
        parts = [targets for _, (_, targets) in self._rows.batches(self._loss.microbatch)]
        if not isinstance(parts[0], Tensor) or parts[0].dim() != 1 or parts[0].is_floating_point():
            what = check.shape_of(parts[0]) if isinstance(parts[0], Tensor) else type(parts[0]).__name__
            raise ValueError(f"per_class: expected training targets that are whole numbers (n,), got {what}")
        return torch.cat(parts).cpu().unique(return_inverse=True)[1]


class _Extremes:
    """The k largest or smallest scores of each class, over blocks of rows that come one after the other."""

    def __init__(self, solutions: Tensor, k: int, classes: int, *, is_largest: bool) -> None:
        self._k, self._is_largest = k, is_largest
        self._values = solutions.new_full((len(solutions), classes, k), -torch.inf if is_largest else torch.inf)
        self._indices = torch.full_like(self._values, -1, dtype=torch.int64)

    def merge(self, scores: Tensor, first_row: int, classes: Tensor) -> None:
        """scores (n_test, b) of the rows from `first_row` on, which belong to `classes` (b,)."""
        for c in classes.unique().tolist():
            here = (classes == c).nonzero().squeeze(1)
            values = torch.cat([self._values[:, c], scores[:, here]], 1)
            indices = torch.cat([self._indices[:, c], (first_row + here).expand(len(scores), -1)], 1)
            # Stable: of equal scores the earlier row comes first.
            order = values.argsort(dim=1, descending=self._is_largest, stable=True)[:, : self._k]
            self._values[:, c], self._indices[:, c] = values.gather(1, order), indices.gather(1, order)

    def found(self) -> tuple[Tensor, Tensor]:
        return self._values.masked_fill(self._indices < 0, torch.nan), self._indices


def _joined(parts: list[Solution]) -> Solution:
    """The certificate of several solves as one."""
    return replace(
        parts[0],
        residual=torch.cat([part.residual for part in parts]),
        steps=max(part.steps for part in parts),
        converged=all(part.converged for part in parts),
        passes=sum(part.passes for part in parts),
    )
