"""Refinement where rounding rules: what is returned is the best that was measured, and stored effects of moves are true."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.influence.dense_problem import DenseProblem, conditioned, vectors
from xai_fast.influence import Influence, LogisticHead, NotConverged, SoftmaxHead, Solution, solve
from xai_fast.influence._solvers import cg, refine


def badly_scaled(seed: int) -> tuple[Influence, Tensor]:
    """Wine as it is: columns of very different scales that are far from centred, and a small ridge."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_wine(return_X_y=True)
    generator = np.random.default_rng(seed)
    head = SoftmaxHead(generator.normal(size=(13, 3)) * 1e-3, l2=1e-4)
    g = torch.from_numpy(generator.normal(size=(4, 13, 3)))
    return Influence(head, X, y, solver="lissa", seed=0), g


def quietly(call: Any) -> Solution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        found: Solution = call()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_nothing(seed: int) -> None:
    """A residual of 1 is that of x = 0."""
    influence, g = badly_scaled(seed)
    solution = quietly(lambda: influence.inverse_hvp(g))
    assert (solution.residual <= 1).all()
    left = g.flatten(1) - influence.problem.hvp(solution.x.flatten(1))
    torch.testing.assert_close(left.norm(dim=1) / g.flatten(1).norm(dim=1), solution.residual, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_stored_effects_of_moves_are_true(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    influence, g = badly_scaled(seed)
    errors: list[float] = []
    add = refine._Directions.add

    def checked(self: Any, rows: Tensor, *arguments: Tensor) -> Any:
        found = add(self, rows, *arguments)
        d, H_d = (part[rows] for part in getattr(self, "kept", getattr(self, "_kept", None))[-1])
        errors.append(float((influence.problem.hvp(d) - H_d).norm(dim=1).max()))
        return found

    monkeypatch.setattr(refine._Directions, "add", checked)
    quietly(lambda: influence.inverse_hvp(g))
    assert len(errors) > 4
    assert max(errors) < 1e-3


def record_products(problem: DenseProblem, g: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The relative residual of every single vector that is multiplied in the wide dtype."""
    seen: list[float] = []
    hvp = problem.hvp

    def recording(v: Tensor) -> Tensor:
        product = hvp(v)
        seen.extend(((g - product).norm(dim=1) / g.norm(dim=1)).tolist())
        return product

    monkeypatch.setattr(problem, "hvp", recording)
    return seen


def test_the_best_that_was_measured_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where combinations promise what they do not keep."""
    problem, g = conditioned(30, 1e4), vectors(1, 30)
    moves = iter([vectors(1, 30, seed) / 100 for seed in range(6)])
    monkeypatch.setattr(cg.ConjugateGradients, "correct", lambda self, r, target: next(moves)[None])
    rounds = iter([True] * 5 + [False])
    monkeypatch.setattr(cg.ConjugateGradients, "review", lambda self, alone, together: next(rounds))
    add = refine._Directions.add

    def lying(self: Any, rows: Tensor, d: Tensor, H_d: Tensor) -> Any:
        return add(self, rows, 30 * d, H_d)

    monkeypatch.setattr(refine._Directions, "add", lying)
    seen = record_products(problem, g, monkeypatch)
    solution = quietly(lambda: solve(problem, g, solver="cg"))
    assert float(solution.residual) == min(1.0, *seen)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_one_pass_measures_what_converges_at_once(solver: str) -> None:
    """Nothing is spent on directions that are not needed."""
    problem, g = conditioned(30, 10.0), vectors(1, 30)
    solution = solve(problem, g, solver=solver, tolerance=1e-4)
    assert solution.converged
    assert solution.passes == solution.steps + (2 if solver == "exact" else 1)


def test_no_curvature_at_all_warns() -> None:
    """A saturated head without ridge: H is zero."""
    influence = Influence(LogisticHead(torch.full((3,), 1e3)), torch.ones(20, 3) * 100, torch.ones(20), solver="lissa")
    with pytest.warns(NotConverged, match="H is zero"):
        solution = influence.inverse_hvp(torch.ones(3))
    assert solution.residual == 1
    assert solution.x.isfinite().all()
