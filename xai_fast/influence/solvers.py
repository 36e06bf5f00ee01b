"""Inverse-Hessian-vector products with a certificate: one function for all solvers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec

import torch
from torch import Tensor

from .._optional import optional_import
from ..ops import _checks as check
from ..ops._checks import check_count, check_positive, check_seed
from ._solvers.cg import ConjugateGradients
from ._solvers.choose import choose
from ._solvers.exact import Exact, ExactFactor
from ._solvers.lanczos import Lanczos, LowRank
from ._solvers.lissa import Lissa
from ._solvers.refine import Inner, Progress, refine, relative_residuals
from ._warn import warn_user
from .problems import Problem
from .results import Solution

__all__ = ["SOLVERS", "ExactFactor", "LowRank", "NotConverged", "Prepared", "choose", "prepare", "solve"]

_P = ParamSpec("_P")

SOLVERS = ("auto", "exact", "cg", "lissa", "lanczos")

# Iterations of CG by default, over all rounds.
CG_STEPS = 1000
# Eigenpairs of the low-rank inverse by default.
RANK = 100


class NotConverged(RuntimeWarning):
    """A solve that ended above its tolerance; the message says at which residual.

    Examples
    --------
    >>> issubclass(NotConverged, RuntimeWarning)
    True
    """


def _with_warning(solve: Callable[_P, Solution]) -> Callable[_P, Solution]:
    @functools.wraps(solve)
    def warned(*args: _P.args, **options: _P.kwargs) -> Solution:
        solution = solve(*args, **options)
        warn_if_not_converged(solution)
        return solution

    return warned


@_with_warning
def solve(
    problem: Problem,
    gradient: Tensor,
    *,
    solver: str = "auto",
    tolerance: float = 1e-5,
    max_steps: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    repeats: int = 1,
    preconditioner: bool = True,
    rank: int | None = None,
    factor: ExactFactor | LowRank | None = None,
    progress: bool = False,
) -> Solution:
    """H^-1 v for every row of `gradient`, and how far it can be trusted.

    Every solver runs inside iterative refinement: what it finds is measured as ||v - H x|| / ||v|| over all rows of the data
    in the wide dtype (float64), kept only where that falls, and improved by solving for the residual until all right-hand
    sides are at the tolerance. x is the best that was measured, at worst 0 with the residual 1; the residual in the result
    is that measurement, for the x in the result.

    Parameters
    ----------
    problem : Problem
        H, symmetric; its damping and l2 are in it.
    gradient : Tensor, shape (M, size)
        Right-hand sides. One of zeros has the solution 0, residual 0.
    solver : {"auto", "exact", "cg", "lissa", "lanczos"}
        - exact: assemble H and factor it (Cholesky, float64; float32 with refinement above 16384 parameters).
        - cg: preconditioned block conjugate gradients, 32 right-hand sides together (Dubrulle 2001).
        - lissa: stochastic recursion that tunes itself, in rounds on residuals (Agarwal et al. 2017).
        - lanczos, also "arnoldi": inverse on the span of `rank` Lanczos vectors (Schioppa et al. 2022), not refined: the
          residual says what it is worth.
        - auto: exact where H and its factor fit and are cheaper than CG, and H is positive definite; else cg.
    tolerance : float
        Relative residual that is good enough, below 1.
    max_steps : int, optional
        cg: iterations, 1000 by default. lissa: steps, by default 200 reads of the data and at least 2000 steps.
    seed : int
        For batches and random starts. The same seed gives the same result.
    batch_size : int, optional
        lissa: rows of a batch, by default 256 or all.
    repeats : int
        lissa: independent runs; x is their mean, and its standard error is told.
    preconditioner : bool
        cg: use the one that the problem offers.
    rank : int, optional
        lanczos: Lanczos steps, by default 100 or as many as there are parameters.
    factor : ExactFactor or LowRank, optional
        exact, lanczos: what an earlier solve of the same problem can use again.
    progress : bool
        Show a bar (needs tqdm).

    Returns
    -------
    Solution
        x (M, size) in the wide dtype: rounding it could cost more than the tolerance. residual (M,).

    Raises
    ------
    TypeError, ValueError
        Wrong shape, dtype or device; a gradient that is not finite; options that the solver does not have; for the exact
        solver a Hessian that is singular or indefinite.

    Warns
    -----
    NotConverged
        If a right-hand side ended above the tolerance, with the worst residual. Never silent.

    Examples
    --------
    >>> class Diagonal(Problem):
    ...     size, rows, dtype, wide, ridge = 2, 1, torch.float32, torch.float64, 1.0
    ...     device = torch.device("cpu")
    ...     def hvp(self, vectors):
    ...         return vectors * torch.tensor([1.0, 4.0])
    ...     def row_curvature(self):
    ...         return 4.0
    ...     def batch_hvp(self, vectors, batch_size, seed, step):
    ...         return self.hvp(vectors)
    >>> solution = solve(Diagonal(), torch.ones(1, 2), solver="cg")
    >>> solution.x, solution.steps, solution.converged
    (tensor([[1.0000, 0.2500]], dtype=torch.float64), 2, True)
    """
    solver = "lanczos" if solver == "arnoldi" else solver
    g = _check(problem, gradient, solver, factor).to(problem.wide)
    tolerance = check_tolerance(tolerance)
    check_options(problem, solver, max_steps=max_steps, batch_size=batch_size, repeats=repeats, rank=rank)
    seed = check_seed(seed)
    start = problem.passes
    prepared = _given(factor) if factor else prepare(problem, solver, len(g), rank=rank, seed=seed)
    if not len(g):
        return Solution(g, g.new_zeros(0), 0, True, prepared.solver, prepared.why, problem.passes - start, tolerance)
    with _Bar(progress, prepared.solver) as bar:
        runs = []
        for repeat in range(repeats):
            inner = _inner(problem, prepared, bar, _stream(seed, repeat), max_steps, batch_size, preconditioner)
            runs.append((inner, *refine(problem, g, inner, tolerance, bar)))
    x, residual, error = _mean(problem, g, runs)
    notes = [prepared.why, *{inner.note for inner, _, _ in runs}]
    return Solution(
        x,
        residual,
        steps=sum(inner.steps for inner, _, _ in runs),
        converged=bool((residual <= tolerance).all()),
        solver=prepared.solver,
        why="; ".join(filter(None, notes)),
        passes=problem.passes - start,
        tolerance=tolerance,
        standard_error=error,
    )


def solve_quietly(problem: Problem, gradient: Tensor, **options: Any) -> Solution:
    """:func:`solve` for callers that solve in parts and warn once for all, with :func:`warn_if_not_converged`."""
    return inspect.unwrap(solve)(problem, gradient, **options)


@dataclass(frozen=True)
class Prepared:
    """A solver with what it can use again for other right-hand sides.

    Attributes
    ----------
    solver : str
        Not "auto".
    factor : ExactFactor, LowRank or None
    why : str
        For "auto": the reason.
    is_final : bool
        Whether "auto" would choose the same for any number of right-hand sides.

    Examples
    --------
    >>> Prepared("cg").factor is None
    True
    """

    solver: str
    factor: ExactFactor | LowRank | None = None
    why: str = ""
    is_final: bool = True


def prepare(problem: Problem, solver: str, right_hand_sides: int, *, rank: int | None = None, seed: int = 0) -> Prepared:
    """Choose a solver for "auto", and factor what it factors.

    Parameters
    ----------
    problem : Problem
    solver : str
        As in :func:`solve`.
    right_hand_sides : int
        For the choice.
    rank, seed : int
        For lanczos.

    Returns
    -------
    Prepared

    Raises
    ------
    ValueError
        For the exact solver a Hessian that is singular or indefinite; "auto" takes CG there.

    Examples
    --------
    >>> import xai_fast as xf
    >>> influence = xf.influence.Influence(xf.influence.LinearHead([1.0, 0.0], l2=0.5), torch.eye(2), torch.zeros(2))
    >>> prepare(influence.problem, "auto", 1).solver
    'exact'
    """
    solver = "lanczos" if solver == "arnoldi" else solver
    if solver == "exact":
        return Prepared("exact", ExactFactor(problem.dense()))
    if solver == "lanczos":
        return Prepared("lanczos", LowRank.of(problem, RANK if rank is None else rank, seed))
    if solver != "auto":
        return Prepared(solver)
    solver, why = choose(problem, right_hand_sides)
    if solver == "cg":
        return Prepared("cg", None, why, is_final=False)
    try:
        return Prepared("exact", ExactFactor(problem.dense()), why)
    except ValueError as error:
        return Prepared("cg", None, f"auto: cg, because the exact solver failed: {error}")


def check_tolerance(tolerance: Any) -> float:
    """A number between 0 and 1: with a relative residual of 1 the solution would be 0."""
    value = check_positive(tolerance, "tolerance")
    if value >= 1:
        raise ValueError(f"tolerance: expected a number below 1, got {tolerance!r}")
    return value


def _given(factor: ExactFactor | LowRank) -> Prepared:
    return Prepared("exact" if isinstance(factor, ExactFactor) else "lanczos", factor)


def _inner(
    problem: Problem,
    prepared: Prepared,
    bar: Progress,
    seed: int,
    max_steps: int | None,
    batch_size: int | None,
    preconditioner: bool,
) -> Inner:
    if isinstance(prepared.factor, ExactFactor):
        return Exact(prepared.factor)
    if isinstance(prepared.factor, LowRank):
        return Lanczos(prepared.factor)
    if prepared.solver == "cg":
        return ConjugateGradients(problem, CG_STEPS if max_steps is None else max_steps, preconditioner, bar)
    return Lissa(problem, batch_size=batch_size, seed=seed, max_steps=max_steps)


def _stream(seed: int, repeat: int) -> int:
    """The seed of a repeat: the given one for the first, mixed with the number by splitmix64 for the others."""
    if repeat == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + repeat * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def _mean(problem: Problem, g: Tensor, runs: list[tuple[Inner, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Solution, residual, and for several runs the standard error of the mean relative to its norm."""
    if len(runs) == 1:
        return runs[0][1], runs[0][2], None
    every = torch.stack([x for _, x, _ in runs])
    x = every.mean(0)
    _, residual = relative_residuals(problem, g, x)
    variance = ((every - x) ** 2).sum(dim=(0, 2)) / (len(runs) * (len(runs) - 1))
    zero = g.norm(dim=1) == 0
    return x, residual.masked_fill(zero, 0.0), (variance.sqrt() / x.norm(dim=1)).masked_fill(zero, 0.0)


def _check(problem: Any, gradient: Any, solver: Any, factor: Any) -> Tensor:
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: expected a Problem, got {type(problem).__name__}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    check.check_float_tensor(gradient, "gradient")
    if gradient.dim() != 2 or gradient.shape[1] != problem.size:
        raise ValueError(f"gradient: expected shape (M, {problem.size}), got {check.shape_of(gradient)}")
    check.check_same_device(gradient, "gradient", problem.device)
    bad = (~gradient.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(f"gradient: expected finite numbers, got NaN or infinity in row {bad[0].item()}")
    kind = LowRank if solver == "lanczos" else ExactFactor if solver in ("exact", "auto") else type(None)
    if factor is not None and not isinstance(factor, kind):
        raise ValueError(f"factor: expected none or that of the solver {solver}, got {type(factor).__name__}")
    return gradient.detach()


def check_options(
    problem: Problem,
    solver: str,
    *,
    max_steps: int | None = None,
    batch_size: int | None = None,
    repeats: int = 1,
    rank: int | None = None,
) -> None:
    """ValueError for options that the solver does not have, or out of range."""
    check_count(repeats, "repeats")
    given = {"batch_size": batch_size is not None, "repeats": repeats > 1}
    for name in (name for name, is_given in given.items() if is_given and solver != "lissa"):
        raise ValueError(f"{name}: expected only with the solver lissa, got it with {solver}")
    if rank is not None and solver != "lanczos":
        raise ValueError(f"rank: expected only with the solver lanczos, got it with {solver}")
    if max_steps is not None and solver in ("exact", "lanczos"):
        raise ValueError(f"max_steps: expected only with cg, lissa or auto, got it with {solver}")
    for name, value in (("max_steps", max_steps), ("rank", rank)):
        if value is not None:
            check_count(value, name)
    if batch_size is not None:
        check_count(batch_size, "batch_size", 1, problem.rows)


def warn_if_not_converged(solution: Solution) -> None:
    """The warning of :func:`solve`."""
    if solution.converged:
        return
    missed = int((~(solution.residual <= solution.tolerance)).sum())
    advice = {"lanczos": "rank or damping", "exact": "damping"}.get(solution.solver, "damping or max_steps")
    message = (
        f"{solution.solver}: residual {solution.residual.max().item():.1e} after {solution.steps} steps, above the "
        f"tolerance {solution.tolerance:.0e} for {missed} of {solution.residual.numel()} right-hand sides; raise {advice}"
    )
    warn_user(f"{message} ({solution.why})" if solution.why else message, NotConverged)


class _Bar:
    """A progress bar of steps with the worst residual, or nothing."""

    def __init__(self, is_shown: bool, solver: str) -> None:
        self._bar = optional_import("tqdm", "demo").tqdm(desc=solver, unit="step") if is_shown else None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, steps: int, residual: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
            self._bar.update(steps - self._bar.n)
