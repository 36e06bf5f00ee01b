"""Every solver against dense algebra in float64, and what it certifies against what it did."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.influence.dense_problem import DenseProblem, conditioned, rows_with, spectrum, vectors
from xai_fast.influence import solvers
from xai_fast.influence._solvers import cg, refine
from xai_fast.influence._solvers.choose import choose
from xai_fast.influence._solvers.lanczos import lanczos, largest_eigenvalue
from xai_fast.influence.results import Solution
from xai_fast.influence.solvers import ExactFactor, LowRank, NotConverged, prepare, solve

SOLVERS = ["exact", "cg", "lissa", "lanczos", "auto"]
DTYPES = [torch.float32, torch.float64]


def truth(problem: DenseProblem, g: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.solve(problem.matrix.numpy(), g.numpy().T).T.copy())


def residuals(problem: DenseProblem, g: Tensor, x: Tensor) -> Tensor:
    return (g - x @ problem.matrix).norm(dim=1) / g.norm(dim=1)


def assert_certified(problem: DenseProblem, g: Tensor, solution: Solution) -> None:
    """The residual is that of x, and the error is what the residual and the condition allow."""
    torch.testing.assert_close(solution.residual, residuals(problem, g, solution.x), rtol=1e-3, atol=1e-10)
    assert solution.converged == bool((solution.residual <= solution.tolerance).all())
    error = (solution.x - truth(problem, g)).norm(dim=1)
    smallest = torch.linalg.eigvalsh(problem.matrix)[0]
    assert (error <= 1.001 * solution.residual * g.norm(dim=1) / smallest + 1e-9).all()


def quiet(problem: DenseProblem, g: Tensor, **options: Any) -> Solution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        return solve(problem, g, **options)


# ---- against dense algebra ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solves_to_its_tolerance(solver: str, dtype: torch.dtype) -> None:
    problem, g = conditioned(dtype=dtype), vectors(5, 30)
    solution = solve(problem, g, solver=solver, tolerance=1e-4)
    assert_certified(problem, g, solution)
    assert solution.converged
    assert solution.passes == problem.passes > 0


@pytest.mark.parametrize("solver", ["exact", "cg", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ill_conditioned(solver: str, dtype: torch.dtype) -> None:
    problem, g = conditioned(40, 1e6, dtype), vectors(3, 40)
    solution = solve(problem, g, solver=solver, tolerance=1e-6)
    assert_certified(problem, g, solution)
    assert solution.converged


def test_tight_tolerance_in_float32() -> None:
    """Refinement goes far beyond float32."""
    problem, g = conditioned(dtype=torch.float32), vectors(3, 30)
    assert solve(problem, g, solver="cg", tolerance=1e-12).converged
    assert solve(problem, g, solver="lissa", tolerance=1e-10).converged


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_right_hand_side(solver: str) -> None:
    problem, g = conditioned(), vectors(3, 30)
    g[1] = 0
    solution = solve(problem, g, solver=solver, tolerance=1e-3)
    assert solution.x[1].eq(0).all()
    assert solution.residual[1] == 0
    assert_certified(
        problem, g[[0, 2]], Solution(**{**vars(solution), "x": solution.x[[0, 2]], "residual": solution.residual[[0, 2]]})
    )
    only = solve(problem, torch.zeros(2, 30), solver=solver)
    assert only.converged
    assert only.x.eq(0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_right_hand_sides(solver: str) -> None:
    solution = solve(conditioned(), torch.zeros(0, 30), solver=solver)
    assert solution.x.shape == (0, 30)
    assert solution.residual.shape == (0,)
    assert solution.converged


@pytest.mark.parametrize("solver", SOLVERS)
def test_many_dependent_right_hand_sides(solver: str) -> None:
    """More than parameters, equal ones, multiples over many orders of magnitude."""
    problem, base = conditioned(12, 30.0), vectors(3, 12)
    g = torch.cat([base, base, base * torch.tensor([[1e-12], [1e9], [-3.0]]), base.sum(0, keepdim=True), vectors(40, 12, 2)])
    solution = solve(problem, g, solver=solver, tolerance=1e-6)
    assert solution.converged
    assert_certified(problem, g[:6], Solution(**{**vars(solution), "x": solution.x[:6], "residual": solution.residual[:6]}))
    torch.testing.assert_close(solution.x, truth(problem, g), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["exact", "cg", "lissa"])
def test_linear_and_symmetric(solver: str) -> None:
    problem, g = conditioned(20, 20.0), vectors(2, 20)
    both = torch.cat([g, 2 * g[:1] - 3 * g[1:]])
    x = solve(problem, both, solver=solver, tolerance=1e-8).x
    torch.testing.assert_close(x[2], 2 * x[0] - 3 * x[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g[0] @ x[1], g[1] @ x[0], rtol=1e-6, atol=1e-7)


def test_one_parameter() -> None:
    problem = DenseProblem(torch.ones(3, 1), 1.0)
    for solver in SOLVERS:
        torch.testing.assert_close(solve(problem, torch.tensor([[4.0]]), solver=solver).x, torch.tensor([[2.0]]).double())


# ---- certificates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "options"), [("cg", {"max_steps": 2}), ("lissa", {"max_steps": 10}), ("lanczos", {"rank": 3})]
)
def test_missing_the_tolerance_warns_with_the_residual(solver: str, options: dict[str, int]) -> None:
    problem, g = conditioned(30, 1e4), vectors(2, 30)
    with pytest.warns(NotConverged) as caught:
        solution = solve(problem, g, solver=solver, tolerance=1e-8, **options)
    (warning,) = caught
    assert warning.filename == __file__
    assert f"residual {solution.residual.max().item():.1e}" in str(warning.message)
    assert "2 of 2 right-hand sides" in str(warning.message)
    assert not solution.converged
    assert_certified(problem, g, solution)
    assert (solution.residual <= 1).all()


@pytest.mark.parametrize(
    ("solver", "tolerance"), [("cg", 1e-5), ("cg", 1e-30), ("lissa", 1e-4), ("lissa", 1e-30), ("exact", 0.5)]
)
def test_the_residual_is_measured_after_the_solve(solver: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last product with H is that of the solution, bit for bit."""
    problem, g = conditioned(dtype=torch.float32), vectors(1, 30)
    multiplied: list[Tensor] = []
    hvp = problem.hvp
    monkeypatch.setattr(problem, "hvp", lambda v: multiplied.append(v) or hvp(v))  # type: ignore[func-returns-value]
    options = {} if solver == "exact" else {"max_steps": 100}
    solution = quiet(problem, g, solver=solver, tolerance=tolerance, **options)
    assert multiplied[-1].dtype == torch.float64
    assert any(row.equal(solution.x[0]) for row in multiplied[-1])


def test_a_lying_method_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections that are wrong change the residual that is told, not the truth of it."""
    monkeypatch.setattr(cg.ConjugateGradients, "correct", lambda self, r, target: torch.full_like(r, 7.0).unsqueeze(0))
    problem, g = conditioned(), vectors(2, 30)
    solution = quiet(problem, g, solver="cg")
    assert_certified(problem, g, solution)
    assert not solution.converged


def test_nan_from_a_method_is_no_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cg.ConjugateGradients, "correct", lambda self, r, target: torch.full_like(r, torch.nan)[None])
    solution = quiet(conditioned(), vectors(2, 30), solver="cg")
    assert solution.x.eq(0).all()
    assert solution.residual.eq(1).all()


def test_refinement_combines_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two poor corrections whose combination is the solution."""
    problem, g = conditioned(), vectors(1, 30)
    x, aside = truth(problem, g), vectors(1, 30, 5)
    moves = torch.stack([x + aside, x - 3 * aside]) / g.norm()
    monkeypatch.setattr(cg.ConjugateGradients, "correct", lambda self, r, target: moves)
    solution = solve(problem, g, solver="cg", tolerance=1e-9)
    assert solution.converged
    torch.testing.assert_close(solution.x, x)


def test_directions_are_forgotten_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "DIRECTION_BYTES", 0.0)
    problem, g = conditioned(), vectors(4, 30)
    solution = solve(problem, g, solver="lissa", tolerance=1e-6)
    assert_certified(problem, g, solution)


# ---- conjugate gradients ------------------------------------------------------------------------------------------------


class Preconditioned(DenseProblem):
    def root_preconditioner(self) -> Any:
        values, basis = torch.linalg.eigh(self.matrix)
        rough = (values * torch.linspace(0.8, 1.2, len(values), dtype=torch.float64)).rsqrt()
        root = (basis * rough) @ basis.T
        return lambda v: v @ root.to(v.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_preconditioner(dtype: torch.dtype) -> None:
    problem, g = Preconditioned(rows_with(spectrum(60, 1e4)), 0.0, dtype), vectors(1, 60)
    plain = solve(problem, g, solver="cg", preconditioner=False, tolerance=1e-4)
    better = solve(problem, g, solver="cg", tolerance=1e-4)
    assert_certified(problem, g, better)
    assert better.converged
    assert better.steps <= 15 < 40 < plain.steps


def test_block_takes_fewer_iterations_than_single_vectors() -> None:
    problem, g = conditioned(60, 1e3), vectors(16, 60)
    together = solve(problem, g, solver="cg")
    alone = [solve(problem, one, solver="cg").steps for one in g.split(1)]
    assert together.steps < min(alone) / 2


@pytest.mark.parametrize("preconditioner", [True, False])
def test_side_by_side_where_the_block_breaks_down(preconditioner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, g = Preconditioned(rows_with(spectrum(40, 1e3))), vectors(5, 40)
    g[3] = g[2]
    monkeypatch.setattr(cg, "_inverse", lambda matrix: None)
    solution = solve(problem, g, solver="cg", preconditioner=preconditioner)
    assert_certified(problem, g, solution)
    assert solution.converged


def test_indefinite_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = torch.ones(200, dtype=torch.float64)
    signs[100:] = -1
    problem, g = DenseProblem(vectors(200, 20), 0.0, signs=signs), vectors(3, 20)
    assert torch.linalg.eigvalsh(problem.matrix)[0] < 0
    with pytest.warns(NotConverged, match="indefinite"):
        solution = solve(problem, g, solver="cg")
    assert (solution.residual <= 1).all()
    assert_same_residual(problem, g, solution)
    with pytest.raises(ValueError, match="smallest eigenvalue is about -"):
        solve(problem, g, solver="exact")
    with pytest.warns(NotConverged, match="indefinite"):
        solve(problem, g, solver="lanczos", rank=10)
    with pytest.warns(NotConverged, match="because the exact solver failed"):
        assert solve(problem, g).solver == "cg"


def assert_same_residual(problem: DenseProblem, g: Tensor, solution: Solution) -> None:
    torch.testing.assert_close(solution.residual, residuals(problem, g, solution.x), rtol=1e-3, atol=1e-10)


# ---- singular -----------------------------------------------------------------------------------------------------------


def singular() -> DenseProblem:
    return DenseProblem(rows_with(torch.cat([spectrum(20, 100.0), torch.zeros(10, dtype=torch.float64)])))


@pytest.mark.parametrize("solver", ["cg", "lissa", "lanczos", "auto"])
def test_singular_outside_the_range_warns(solver: str) -> None:
    problem, g = singular(), vectors(2, 30)
    with pytest.warns(NotConverged):
        solution = solve(problem, g, solver=solver)
    assert_same_residual(problem, g, solution)
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("solver", ["cg", "lissa", "auto", "lanczos"])
def test_singular_within_the_range_solves(solver: str) -> None:
    problem = singular()
    g = vectors(2, 30) @ problem.matrix
    solution = solve(problem, g, solver=solver, tolerance=1e-4)
    assert_same_residual(problem, g, solution)
    assert solution.converged


def test_singular_exact_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"^damping: expected enough .* smallest eigenvalue is about") as error:
        solve(singular(), vectors(1, 30), solver="exact")
    assert "\n" not in str(error.value)


# ---- lissa --------------------------------------------------------------------------------------------------------------


def test_lissa_is_deterministic_for_a_seed() -> None:
    problem, g = conditioned(dtype=torch.float32), vectors(2, 30)
    first = solve(problem, g, solver="lissa", seed=3, batch_size=8).x
    problem.lambda_max = None
    assert solve(problem, g, solver="lissa", seed=3, batch_size=8).x.equal(first)
    assert not solve(problem, g, solver="lissa", seed=4, batch_size=8).x.equal(first)


@pytest.mark.parametrize("lie", [1e-2, 1e-5])
def test_lissa_recovers_from_a_wrong_sigma(lie: float, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, g = conditioned(20, 20.0, torch.float32), vectors(2, 20)
    problem.lambda_max = lie
    monkeypatch.setattr(problem, "row_curvature", lambda: lie)
    solution = solve(problem, g, solver="lissa", tolerance=1e-4)
    assert solution.converged
    assert_certified(problem, g, solution)


def test_lissa_gives_up_on_an_indefinite_hessian() -> None:
    signs = torch.ones(200, dtype=torch.float64)
    signs[100:] = -1
    problem = DenseProblem(vectors(200, 20), 0.0, torch.float32, signs)
    with pytest.warns(NotConverged):
        solution = solve(problem, vectors(2, 20), solver="lissa")
    assert_same_residual(problem, vectors(2, 20), solution)


@pytest.mark.parametrize("batch_size", [1, 16, 200])
def test_lissa_batch_sizes(batch_size: int) -> None:
    problem, g = conditioned(10, 10.0), vectors(2, 10)
    solution = solve(problem, g, solver="lissa", batch_size=batch_size, tolerance=1e-3)
    assert solution.converged
    assert_certified(problem, g, solution)


def test_lissa_draws_no_batch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = conditioned(10, 10.0)
    drawn: list[tuple[int, int]] = []
    product = problem.batch_hvp

    def record(v: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
        drawn.append((seed, step))
        return product(v, batch_size, seed, step)

    monkeypatch.setattr(problem, "batch_hvp", record)
    solution = solve(problem, vectors(1, 10), solver="lissa", repeats=2, batch_size=50, tolerance=1e-4)
    assert len(set(drawn)) == len(drawn) == solution.steps


def test_lissa_counts_its_reads() -> None:
    problem, g = conditioned(10, 10.0), vectors(1, 10)
    solution = solve(problem, g, solver="lissa", batch_size=200, tolerance=1e-3)
    assert solution.passes == problem.passes
    assert solution.steps + 12 < solution.passes < solution.steps + 30


def test_repeats_tell_the_standard_error() -> None:
    problem, g = conditioned(10, 10.0), vectors(2, 10)
    g[1] = 0
    options: dict[str, Any] = {"solver": "lissa", "batch_size": 4, "max_steps": 40, "tolerance": 1e-9}
    solution = quiet(problem, g, repeats=6, **options)
    runs = [quiet(problem, g, seed=solvers._stream(0, number), **options).x[0] for number in range(6)]
    mean = torch.stack(runs).mean(0)
    torch.testing.assert_close(solution.x[0], mean)
    spread = torch.stack(runs).std(0, correction=1).norm() / 6**0.5 / mean.norm()
    assert solution.standard_error is not None
    torch.testing.assert_close(solution.standard_error, torch.stack([spread, spread * 0]))
    assert spread > 1e-4
    assert solution.residual[1] == 0
    assert_certified(problem, g[:1], Solution(mean[None], solution.residual[:1], 0, False, "lissa", tolerance=1e-9))


# ---- lanczos ------------------------------------------------------------------------------------------------------------


def test_lanczos_finds_the_eigenvalues_repeated_ones_too() -> None:
    values = torch.tensor([5.0, 5.0, 5.0, 2.0, 1.0, 1.0, 0.5]).double()
    problem = DenseProblem(rows_with(values))
    basis, found = lanczos(lambda v: problem.hvp(v[None])[0], 7, 7, torch.float64, problem.device, 0)
    torch.testing.assert_close(found.flip(0), values)
    torch.testing.assert_close(basis.T @ basis, torch.eye(7).double())
    torch.testing.assert_close(problem.matrix @ basis, basis * found)


def test_lanczos_goes_on_where_the_krylov_space_ends() -> None:
    basis, values = lanczos(lambda v: 2 * v, 6, 6, torch.float64, torch.device("cpu"), 0)
    torch.testing.assert_close(values, torch.full((6,), 2.0).double())
    torch.testing.assert_close(basis.T @ basis, torch.eye(6).double())


def test_low_rank_plus_ridge_is_exact() -> None:
    """Ten eigenvalues above a ridge: eleven Lanczos steps see all there is."""
    X = torch.cat([rows_with(spectrum(10, 10.0)), torch.zeros(200, 20, dtype=torch.float64)], 1)
    problem, g = DenseProblem(X, 0.1), vectors(3, 30)
    solution = solve(problem, g, solver="arnoldi", rank=11, tolerance=1e-6)
    assert (solution.solver, solution.steps) == ("lanczos", 11)
    assert_certified(problem, g, solution)


def test_largest_eigenvalue_is_not_too_low() -> None:
    for condition in (2.0, 1e4):
        problem = conditioned(200, condition)
        assert 1 < largest_eigenvalue(problem, 0) < 1.1
        assert problem.passes == 12


# ---- reuse and choice ---------------------------------------------------------------------------------------------------


def test_factors_are_used_again() -> None:
    problem, g = conditioned(), vectors(2, 30)
    for solver in ("exact", "lanczos", "auto"):
        prepared = prepare(problem, solver, 2)
        before = problem.passes
        solution = solve(problem, g, solver=prepared.solver, factor=prepared.factor)
        assert problem.passes == before + 1
        assert_certified(problem, g, solution)


def test_exact_factor() -> None:
    problem, g = conditioned(), vectors(2, 30)
    factor = ExactFactor(problem.matrix)
    torch.testing.assert_close(factor.half(g) @ factor.half(g).T, g @ truth(problem, g).T)
    torch.testing.assert_close(factor.inverse(), problem.matrix.inverse())


def test_large_exact_factors_in_float32_and_refines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xai_fast.influence._solvers.exact.LARGE", 10)
    problem, g = conditioned(30, 1e4), vectors(2, 30)
    assert ExactFactor(problem.matrix).dtype == torch.float32
    solution = solve(problem, g, solver="exact", tolerance=1e-10)
    assert_certified(problem, g, solution)
    assert solution.converged
    # Too ill-conditioned for a factor in float32.
    assert ExactFactor(conditioned(30, 1e8).matrix).dtype == torch.float64


def test_choice() -> None:
    problem = conditioned()
    assert choose(problem, 1) == ("exact", choose(problem, 1)[1])
    assert "30 x 30 Hessian" in choose(problem, 1)[1]
    problem.size = 10**6
    solver, why = choose(problem, 1)
    assert solver == "cg"
    assert "1.6e+04 GB" in why
    problem.size, problem.rows = 5000, 100
    assert choose(problem, 1)[0] == "cg"
    problem.rows = 10**6
    assert choose(problem, 1000)[0] == "exact"


# ---- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver: expected one of auto, exact, cg, lissa, lanczos, got 'newton'"),
        ({"tolerance": 0.0}, "tolerance: expected a number above 0"),
        ({"tolerance": 1.0}, "tolerance: expected a number below 1, got 1.0"),
        ({"repeats": 2}, "repeats: expected only with the solver lissa, got it with auto"),
        ({"solver": "cg", "batch_size": 4}, "batch_size: expected only with the solver lissa"),
        ({"solver": "lissa", "batch_size": 201}, "batch_size: expected a whole number from 1 to 200, got 201"),
        ({"solver": "cg", "rank": 4}, "rank: expected only with the solver lanczos"),
        ({"solver": "exact", "max_steps": 4}, "max_steps: expected only with"),
        ({"solver": "cg", "max_steps": 0}, "max_steps: expected a whole number"),
        ({"seed": -1}, "seed: expected"),
        ({"solver": "cg", "factor": ExactFactor(torch.eye(30))}, "factor: expected none or that of the solver cg"),
        ({"solver": "exact", "factor": LowRank(torch.eye(30), torch.ones(30), 0.0)}, "factor: expected none or that"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(conditioned(), vectors(1, 30), **options)


def test_bad_gradients() -> None:
    problem, g = conditioned(), vectors(3, 30)
    for bad in (torch.nan, torch.inf):
        g[1, 2] = bad
        with pytest.raises(ValueError, match="gradient: expected finite numbers, got NaN or infinity in row 1"):
            solve(problem, g)
    for wrong in (vectors(3, 29), vectors(3, 30)[0], vectors(3, 30)[None]):
        with pytest.raises(ValueError, match=r"gradient: expected shape \(M, 30\), got"):
            solve(problem, wrong)
    with pytest.raises(TypeError, match=r"gradient: expected a torch\.Tensor, got list"):
        solve(problem, [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="problem: expected a Problem, got Tensor"):
        solve(problem.matrix, vectors(1, 30))  # type: ignore[arg-type]


def test_inputs_are_not_changed() -> None:
    g = vectors(2, 30).requires_grad_()
    before = g.detach().clone()
    for solver in SOLVERS:
        solution = solve(conditioned(), g, solver=solver, tolerance=1e-3)
        assert not solution.x.requires_grad
    assert g.detach().equal(before)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    solve(conditioned(), vectors(1, 30), solver="cg", progress=True)
    assert "cg" in capsys.readouterr().err
    solve(conditioned(), vectors(1, 30), solver="cg")
    assert not capsys.readouterr().err


def test_tqdm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert solve(conditioned(), vectors(1, 30), solver="cg").converged
    with pytest.raises(ImportError, match="tqdm is not installed"):
        solve(conditioned(), vectors(1, 30), solver="cg", progress=True)


def test_interrupt_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = conditioned()

    def interrupt(vectors: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(problem, "hvp", interrupt)
    with pytest.raises(KeyboardInterrupt):
        solve(problem, vectors(1, 30), solver="cg", progress=True)
