"""Influence functions of generalised linear models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops._checks import check_count, check_seed
from ._functionals import Functional, check_functional, logit_gradient, quantity, rises_when_good
from ._labels import named_rows
from ._leverage import leverage_corrected
from ._row_gradients import RowGradients
from ._rows import as_features, native
from ._self_influence import exact_diagonal, low_rank_diagonal
from ._torch_rows import collect
from .glm import GlmProblem
from .heads import Head
from .results import Convention, Scores, Solution, TopK
from .solvers import SOLVERS, ExactFactor, LowRank, check_tolerance, choose, solve

if TYPE_CHECKING:
    from .store import ScoreStore

__all__ = ["Influence"]

# Most parameters for which the whole inverse is formed where a method needs it (2 GB).
EXACT_SIZE = 16384
# Rank of the inverse that takes its place in self_influence.
RANK = 256


class Influence:
    """Which training rows are behind a prediction: influence functions of a trained head.

    .. math:: I_{up,loss}(i, test) = -\\nabla L_{test}^\\top H^{-1} g_i

    is the derivative of the loss of a test point by the weight of training row i in the mean objective: positive = harmful,
    the row raises the loss. H is the mean Hessian of the losses plus l2 (not on the bias) plus damping. Removing the row
    changes the loss by about -I / n: see :meth:`loo`.

    Parameters
    ----------
    head : Head
        The trained model, at the minimum of its objective.
    X_train : Tensor, numpy array or numpy memmap, shape (n, D); or a loader or dataset of (features, label)
        A memmap is read in blocks. The rows of a loader are collected in the order of its dataset.
    y_train : array-like, shape (n,); None with a loader or dataset
    sample_weight : array-like, shape (n,), optional
        Weights s of the rows in the objective.
    solver : {"auto", "exact", "cg", "lissa", "lanczos"}
        See :func:`solve`.
    damping : float
        Added to every eigenvalue of H, in the units of H; apart from the l2 of the model.
    train_gradient : {"loss", "objective"}
        g_i: the gradient of the row's term s_i loss_i in the objective, alone ("loss") or with that of the regulariser, l2
        theta ("objective"). Both predict a retraining without the row: with the sum of the losses weighed against the same
        regulariser (scikit-learn's C), or with their mean over one row less (the same l2). That mean counts rows, whatever
        their weights: where it divides by the sum of the weights, as PoissonRegressor's, the regulariser's part of a row
        would be s_i / mean(s) times as large, and "objective" predicts the retraining for equal weights alone.
    seed : int
        Of stochastic solvers.
    tolerance : float
        Relative residual of the solves; missing it warns.
    batch_size : int, optional
        Of the solver lissa.
    progress : bool
        Progress bars of the solves (needs tqdm).
    memory_budget : int
        Bytes that intermediate results may take, about. It decides how many right-hand sides are solved together: with cg
        results change within the tolerance, with the others by rounding.

    Attributes
    ----------
    problem : GlmProblem
    n : int
        Training rows.
    convention : Convention
        What the scores mean.

    Raises
    ------
    TypeError, ValueError
        Rows that are not finite and labels out of range (the first are named); integer X; features or labels that do not
        match; options out of range.

    Notes
    -----
    Source: Koh & Liang (2017), "Understanding black-box predictions via influence functions", eq. 2. Test gradients never
    contain the regulariser. The same call gives the same bits; with another number of threads the matrix products of torch
    round differently, in float64 by some 1e-16 of a score.

    Examples
    --------
    >>> import xai_fast as xf
    >>> X, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 6.0])
    >>> theta = (X[:, 0] @ y / (X[:, 0] @ X[:, 0]))[None]  # least squares: 23 / 14
    >>> influence = xf.influence.Influence(xf.influence.LinearHead(theta), X, y)
    >>> influence.scores(torch.tensor([[1.0]]), torch.tensor([2.0])).round(decimals=2)  # the last row pulls up, and helps
    tensor([[ 0.0500,  0.2000, -0.2500]])
    """

    def __init__(
        self,
        head: Head,
        X_train: Any,
        y_train: Any = None,
        *,
        sample_weight: Any = None,
        solver: str = "auto",
        damping: float = 0.0,
        train_gradient: str = "loss",
        seed: int = 0,
        tolerance: float = 1e-5,
        batch_size: int | None = None,
        progress: bool = False,
        memory_budget: int = 1 << 30,
    ) -> None:
        if solver not in (*SOLVERS, "arnoldi"):
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
        if train_gradient not in ("loss", "objective"):
            raise ValueError(f"train_gradient: expected 'loss' or 'objective', got {train_gradient!r}")
        if y_train is None and isinstance(X_train, (Tensor, np.ndarray)):
            got = f"{type(X_train).__name__} {tuple(X_train.shape)} without y_train"
            raise TypeError(f"X_train: expected a DataLoader or Dataset, or y_train (the labels) beside it, got {got}")
        if y_train is None:
            X_train, y_train = collect(X_train, "X_train")
        self.problem = self._problem(X_train, y_train, head, sample_weight, damping)
        self.head, self.n, self.train_gradient = head, self.problem.rows, train_gradient
        if batch_size is not None:
            batch_size = check_count(batch_size, "batch_size", 1, self.n)
            if solver != "lissa":
                raise ValueError(f"batch_size: expected only with the solver lissa, got it with {solver}")
        self._solver, self._why = solver, ""
        self._options: dict[str, Any] = {
            "tolerance": check_tolerance(tolerance),
            "seed": check_seed(seed),
            "batch_size": batch_size,
            "progress": bool(progress),
        }
        self._budget = check_count(memory_budget, "memory_budget")
        self._factor: ExactFactor | None = None
        self._rows = RowGradients(self.problem, penalised=train_gradient == "objective")

    def _problem(self, X: Any, y: Any, head: Head, sample_weight: Any, damping: float) -> GlmProblem:
        return GlmProblem(X, y, head, sample_weight=sample_weight, damping=damping)

    @property
    def convention(self) -> Convention:
        return self._convention("loss")

    # ---- inverse-Hessian-vector products ----------------------------------------------------------------------------------

    def inverse_hvp(self, v: Any) -> Solution:
        """H^-1 v, with the residual that was reached.

        Parameters
        ----------
        v : Tensor or numpy array, shape (P,), (P, 1) or (P, C) as theta; or (M, P, C): M right-hand sides
            P is D, or D + 1 with a bias, whose entry comes last.

        Returns
        -------
        Solution
            x in the shape and dtype of v; float64 v lose nothing by rounding. residual (), or (M,) for M right-hand sides.

        Raises
        ------
        TypeError, ValueError
            Wrong shape, not finite; from the exact solver: a singular Hessian.

        Warns
        -----
        NotConverged
            A residual above the tolerance.

        Examples
        --------
        >>> import xai_fast as xf
        >>> head = xf.influence.LinearHead(torch.zeros(2), l2=0.5)
        >>> solution = xf.influence.Influence(head, torch.eye(2), torch.zeros(2)).inverse_hvp(torch.tensor([1.0, 2.0]))
        >>> solution.x, solution.converged, solution.solver
        (tensor([1., 2.]), True, 'exact')
        """
        gradients = self._parameters(v, "v")
        shape = tuple(np.shape(v))
        solution = self._solve(gradients.flatten(1))
        return replace(solution, x=solution.x.to(gradients.dtype)).with_shape(shape)

    def _parameters(self, v: Any, name: str) -> Tensor:
        """v as (M, P, C) on the device of the problem."""
        is_array = isinstance(v, np.ndarray) and v.dtype.kind == "f" and v.dtype.itemsize <= 8
        tensor = torch.from_numpy(np.ascontiguousarray(native(v))) if is_array else v
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating-point tensor or array, got {getattr(v, 'dtype', type(v).__name__)}"
            )
        P, C = self.problem.params, self.problem.outputs
        if tuple(tensor.shape) not in ({(P, C), (P,)} if C == 1 else {(P, C)}) and (
            tensor.dim() != 3 or tuple(tensor.shape[1:]) != (P, C) or not len(tensor)
        ):
            wanted = f"({P},), ({P}, 1) or (M, {P}, 1)" if C == 1 else f"({P}, {C}) or (M, {P}, {C})"
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        if isinstance(v, np.ndarray):
            tensor = tensor.to(self.problem.device)
        return tensor.detach().reshape(-1, P, C)

    def _solve(self, gradients: Tensor) -> Solution:
        """H^-1 of (M, size), in groups that fit the memory budget; x is (M, size) in float64."""
        start = self.problem.passes
        solver = self._pick(len(gradients))
        factor = self._factor if solver == "exact" else None
        group = max(1, self._budget // (6 * 8 * self.problem.size))
        parts = [
            solve(self.problem, part, solver=solver, factor=factor, **self._options)
            for part in gradients.to(self.problem.wide).split(group)
        ]
        why = "; ".join(filter(None, (self._why, parts[0].why)))
        return replace(_joined(parts), why=why, passes=self.problem.passes - start)

    def _pick(self, right_hand_sides: int) -> str:
        """The solver to use; the factor of the exact one is made once and kept."""
        solver = self._solver
        if solver == "auto":
            if self._factor is not None:
                return "exact"
            solver, self._why = choose(self.problem, right_hand_sides)
        if solver == "exact" and self._factor is None:
            try:
                self._factor = ExactFactor(self.problem.dense())
            except ValueError as error:
                if self._solver == "exact":
                    raise
                self._solver, self._why = "cg", f"auto: cg, because exact failed: {error}"
                return self._solver
        return solver

    # ---- influence --------------------------------------------------------------------------------------------------------

    def scores(self, X_test: Any, y_test: Any, *, of: Functional = "loss") -> Scores:
        """The influence of every training row on every test point.

        Parameters
        ----------
        X_test : Tensor or numpy array, shape (n_test, D)
        y_test : array-like, shape (n_test,)
            Labels as `y_train`; None where `of` does not look at them.
        of : {"loss", "logit", "margin"} or callable
            What is influenced: the loss; the logit of class y (with one output the log odds of y, for regression the logit
            itself); how far it is ahead of the next class; or any differentiable ``(logits (n_test, C), y) -> (n_test,)``.

        Returns
        -------
        Scores, shape (n_test, n_train)
            I_up, with the meaning in ``.convention`` and the solve in ``.solution``.

        Raises
        ------
        TypeError, ValueError
            An empty test set, another number of features, rows that are not finite, labels out of range.

        Examples
        --------
        >>> import xai_fast as xf
        >>> X, y = torch.tensor([[1.0], [-2.0]]), torch.tensor([1, 0])
        >>> influence = xf.influence.Influence(xf.influence.LogisticHead([1.0], l2=0.1), X, y)
        >>> scores = influence.scores(X[:1], y[:1])
        >>> print(scores.convention)
        I_up,loss; positive = harmful; not divided by n = 2; H = mean loss Hessian + l2 + damping, l2 = 0.1, damping = 0; \
train gradient of the loss
        """
        check_functional(of)
        solution = self._solve(self._test_gradients(X_test, y_test, of).flatten(1))
        return self._wrapped(solution, self._convention(of))

    def scores_of(self, v: Any) -> Scores:
        """-v^T H^-1 g_i for gradients v of anything by the parameters.

        Parameters
        ----------
        v : Tensor or numpy array, shape (P,), (P, 1) or (P, C) as theta; or (M, P, C)

        Returns
        -------
        Scores, shape (M, n_train); M is 1 for a single v

        Raises
        ------
        TypeError, ValueError
            As :meth:`inverse_hvp`.

        Examples
        --------
        >>> import xai_fast as xf
        >>> influence = xf.influence.Influence(xf.influence.LinearHead([0.0]), torch.ones(2, 1), torch.tensor([1.0, -1.0]))
        >>> influence.scores_of(torch.ones(1))
        Scores([[ 1., -1.]])
        """
        solution = self._solve(self._parameters(v, "v").flatten(1))
        return self._wrapped(solution, replace(self._convention("loss"), quantity="I_up,v", sign="positive = raises v"))

    def top_k(
        self, X_test: Any, y_test: Any, k: int, *, which: str = "helpful", per_class: bool = False, of: Functional = "loss"
    ) -> TopK:
        """The k most helpful or harmful training rows of every test point, without the matrix of scores.

        Parameters
        ----------
        X_test, y_test, of
            As in :meth:`scores`. A callable is taken as a loss: what raises it is harmful.
        k : int
            At most n.
        which : {"helpful", "harmful"}
            Helpful rows lower a loss, and raise a logit or margin.
        per_class : bool
            The k rows of each class of training labels; classes with fewer rows end in -1 and NaN.

        Returns
        -------
        TopK
            values, indices: (n_test, k), most extreme first; (n_test, classes, k) per class. Of equal scores the earlier row
            comes first.

        Raises
        ------
        TypeError, ValueError
            As :meth:`scores`; k out of range; classes of a regression.

        Examples
        --------
        >>> import xai_fast as xf
        >>> X, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 6.0])
        >>> influence = xf.influence.Influence(xf.influence.LinearHead([23 / 14]), X, y)
        >>> values, indices = influence.top_k(torch.tensor([[1.0]]), torch.tensor([2.0]), 2)
        >>> indices
        tensor([[2, 0]])
        """
        check_functional(of)
        k = check_count(k, "k", 1, self.n)
        if which not in ("helpful", "harmful"):
            raise ValueError(f"which: expected 'helpful' or 'harmful', got {which!r}")
        groups = self._class_rows() if per_class else [None]
        solution = self._solve(self._test_gradients(X_test, y_test, of).flatten(1))
        S = self._solutions(solution)
        # Influence is minus the product of gradients.
        largest = (which == "helpful") != rises_when_good(of)
        found = [self._extreme(S, k, largest, rows) for rows in groups]
        values, indices = (torch.stack(parts, 1) if per_class else parts[0] for parts in zip(*found, strict=True))
        solution = solution.with_shape(tuple(S.shape))
        return TopK(values, indices, which, self._convention(of), solution)

    def self_influence(self) -> Scores:
        """The influence of every training row on its own loss: the diagonal of ``scores(X_train, y_train)``.

        Never positive for the gradient of the loss; the most negative rows are atypical or mislabelled. H is factored up to
        16384 parameters; beyond that, and with the solver lanczos, a low-rank inverse takes its place: see the convention.

        Returns
        -------
        Scores, shape (n,)

        Raises
        ------
        ValueError
            A singular Hessian.

        Examples
        --------
        >>> import xai_fast as xf
        >>> influence = xf.influence.Influence(xf.influence.LinearHead([0.0]), torch.ones(2, 1), torch.tensor([1.0, -2.0]))
        >>> influence.self_influence()
        Scores([-1., -4.])
        """
        convention = replace(self.convention, quantity="I_up,loss of each row on itself")
        if self.problem.size <= EXACT_SIZE and self._solver not in ("lanczos", "arnoldi"):
            return Scores.wrap(
                exact_diagonal(self.problem, self._exact_factor(), self._rows.regulariser()), convention, None
            )
        rank = min(RANK, self.problem.size)
        low_rank = self._low_rank(rank)
        convention = replace(convention, hessian=f"{convention.hessian}, inverse of rank {rank} (Lanczos)")
        return Scores.wrap(low_rank_diagonal(self.problem, low_rank, self._rows.regulariser()), convention, None)

    def loo(self, X_test: Any, y_test: Any, *, leverage: bool = True) -> Scores:
        """By how much the loss of every test point would change if a row were left out: predicted L(without row i) - L.

        Parameters
        ----------
        X_test, y_test
            As in :meth:`scores`.
        leverage : bool
            One Newton step on the objective without the row, whose curvature goes with it: exact for least squares up to the
            linearisation of the test loss. Needs the whole inverse: up to 16384 parameters. False: -I_up,loss / n.

        Returns
        -------
        Scores, shape (n_test, n_train)
            Positive: the row helps, its removal raises the loss. With train_gradient="loss" the sum of the others' losses is
            weighed against the same regulariser (scikit-learn's C); with "objective" their mean is, with the same l2.

        Raises
        ------
        TypeError, ValueError
            As :meth:`scores`; more parameters than that; a Hessian that is singular, or becomes so without a row.

        Notes
        -----
        Source: Pregibon (1981), "Logistic regression diagnostics".

        Examples
        --------
        >>> import xai_fast as xf
        >>> X, y = torch.ones(2, 1), torch.tensor([1.0, 3.0])  # the mean is 2; without the first row 3
        >>> influence = xf.influence.Influence(xf.influence.LinearHead([2.0]), X, y)
        >>> influence.loo(X[:1], torch.tensor([0.0]))  # (z - y) dz = 2
        Scores([[ 2., -2.]])
        """
        gradients = self._test_gradients(X_test, y_test, "loss").flatten(1)
        convention = replace(
            self.convention,
            quantity=f"L_test(theta without row i) - L_test(theta), {'one Newton step' if leverage else '-I_up,loss / n'}",
            sign="positive = helpful",
            divided_by_n=True,
        )
        if not leverage:
            solution = self._solve(gradients)
            values = self._rows.products(self._solutions(solution)) / -self.n
            return Scores.wrap(values, convention, solution.with_shape((-1, *self.head.parameters.shape)))
        return Scores.wrap(self._newton(gradients), convention, None)

    def write_scores(self, path: str | Path, X_test: Any, y_test: Any, **options: Any) -> ScoreStore:
        """:meth:`scores` written to disk tile by tile, resumable: see :func:`xai_fast.influence.write_scores`.

        Parameters
        ----------
        path : str or Path
            Ends in .npy or .zarr.
        X_test, y_test
            As in :meth:`scores`.
        **options
            Of that function.

        Returns
        -------
        ScoreStore, shape (n_test, n_train)

        Raises
        ------
        TypeError, ValueError
            As that function.

        Examples
        --------
        >>> import tempfile, xai_fast as xf
        >>> influence = xf.influence.Influence(xf.influence.LinearHead([0.0]), torch.ones(2, 1), torch.tensor([1.0, -1.0]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     influence.write_scores(folder + "/scores.npy", torch.ones(1, 1), torch.tensor([1.0]))[0]
        array([-1.,  1.], dtype=float32)
        """
        from .store import write_scores  # which imports this module

        return write_scores(self, X_test, y_test, path, **options)

    # ---- parts ------------------------------------------------------------------------------------------------------------

    def _convention(self, of: Functional) -> Convention:
        sign = "positive = helpful" if rises_when_good(of) else "positive = harmful"
        weighted = "weighted " if self.problem.sample_weight is not None else ""
        hessian = f"{weighted}mean loss Hessian + l2{' (not on the bias)' if self.head.intercept else ''} + damping"
        damping, l2 = self.problem.damping, self.problem.l2
        return Convention(quantity(of), sign, False, hessian, l2, damping, self.train_gradient, self.n)

    def _test_gradients(self, X_test: Any, y_test: Any, of: Functional) -> Tensor:
        """Gradients of the functional by the parameters, (M, P, C); without the regulariser."""
        return self._gradients(*self._test_rows(X_test, y_test, of), of)

    def _test_rows(self, X_test: Any, y_test: Any, of: Functional) -> tuple[Tensor, Tensor | None]:
        """Test points and their labels, checked."""
        X = as_features(X_test, "X_test")
        if isinstance(X_test, np.ndarray):
            X = X.to(self.problem.device)
        if len(X) == 0:
            raise ValueError(f"X_test: expected at least one test point, got shape {tuple(X.shape)}")
        if X.shape[1] != self.head.dim:
            raise ValueError(f"X_test: expected {self.head.dim} features, as X_train has, got {X.shape[1]}")
        if X.device != self.problem.device:
            raise ValueError(f"X_test: expected a tensor on {self.problem.device}, got one on {X.device}")
        bad = ~X.isfinite().all(1)
        if bad.any():
            raise ValueError(f"X_test: expected finite numbers, got NaN or infinity in {named_rows(bad)}")
        y = None
        if y_test is not None or of in ("loss", "margin"):
            y = self.head.check_labels(y_test, len(X), name="y_test").to(X.device)
        return X, y

    def _gradients(self, X: Tensor, y: Tensor | None, of: Functional) -> Tensor:
        X = X.to(self.problem.dtype)
        outer = logit_gradient(self.head, self.head.logits(X), y, of)
        if self.head.intercept:
            X = torch.cat([X, X.new_ones(len(X), 1)], 1)
        gradients = X[:, :, None] * outer[:, None, :]
        if self.head.intercept and self.head.outputs > 1 and self.problem.damping == 0 and of != "loss":
            # The same added to all biases: H is singular along it, but for rounding, and the gradients of rows have no part.
            gradients[:, -1] -= gradients[:, -1].mean(1, keepdim=True)
        return gradients

    def _solutions(self, solution: Solution) -> Tensor:
        return solution.x.reshape(-1, *self.head.parameters.shape).to(self.problem.dtype)

    def _wrapped(self, solution: Solution, convention: Convention) -> Scores:
        S = self._solutions(solution)
        return Scores.wrap(self._rows.products(S), convention, solution.with_shape(tuple(S.shape)))

    def _extreme(self, S: Tensor, k: int, largest: bool, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._rows.extreme(S, k, largest, rows)

    def _class_rows(self) -> Iterator[Tensor]:
        labels = self.head.class_of(self.problem.labels)
        return (torch.where(labels == c)[0] for c in range(max(2, self.head.outputs)))

    def _exact_factor(self) -> ExactFactor:
        if self._factor is None:
            self._factor = ExactFactor(self.problem.dense())
        return self._factor

    def _low_rank(self, rank: int) -> LowRank:
        return LowRank.of(self.problem, rank, self._options["seed"])

    def _newton(self, gradients: Tensor) -> Tensor:
        """g_test^T d theta_i (M, n), with the steps of :mod:`._leverage`."""
        if self.problem.size > EXACT_SIZE:
            raise ValueError(
                f"leverage: expected at most {EXACT_SIZE} parameters, got {self.problem.size}; leverage=False has no limit"
            )
        r = self._rows.regulariser()
        if r is None:
            factor, scale = self._exact_factor(), self.n
        else:
            # The others' regulariser is that of n - 1 rows.
            A = self.problem.dense() * self.n
            penalised = torch.full_like(r, self.problem.l2)
            penalised[self.head.dim :] = 0
            A.diagonal().sub_(penalised.flatten())
            factor, scale = ExactFactor(A), 1
        solved = None if r is None else factor.solve(r.reshape(1, -1)).reshape(r.shape)
        delta = leverage_corrected(self.problem, factor.inverse().double() / scale, solved)
        S = (factor.solve(gradients) / scale).reshape(-1, *self.head.parameters.shape).to(self.problem.dtype)
        parts = [
            ops.influence_scores(X, delta[at].to(S.dtype), S, intercept=self.head.intercept)
            for at, X in self.problem.data.spans()
        ]
        return torch.cat(parts, 1) + self._rows.offset(S)


def _joined(parts: list[Solution]) -> Solution:
    if len(parts) == 1:
        return parts[0]
    x, residual = torch.cat([part.x for part in parts]), torch.cat([part.residual for part in parts])
    converged, steps = all(part.converged for part in parts), sum(part.steps for part in parts)
    return replace(parts[0], x=x, residual=residual, converged=converged, steps=steps)
