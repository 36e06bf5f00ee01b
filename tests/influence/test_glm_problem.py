"""The Hessian of a head over training rows: products, batches, bounds, preconditioners, data in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import xai_fast as xf
from tests.influence.problems import FAMILIES, dense_hessian, labelled, random_head
from xai_fast.influence import Head, SoftmaxHead, _kronecker, _rows, solve
from xai_fast.influence.glm import GlmProblem
from xai_fast.influence.problems import Problem

N, D, L2, DAMPING = 40, 5, 0.1, 0.03


def make(family: str = "softmax", *, bias: bool = True, weighted: bool = False, **options: Any) -> tuple[GlmProblem, Tensor]:
    """A problem in float64 and its Hessian by autograd."""
    X, y = torch.randn(N, D, dtype=torch.float64), labelled(family, N)
    head = random_head(family, D, l2=L2, bias=bias)
    s = torch.rand(N, dtype=torch.float64) * 2 if weighted else None
    problem = GlmProblem(X, y, head, sample_weight=s, damping=DAMPING, **options)
    return problem, dense_hessian(X, y, head, s=s, l2=L2, damping=DAMPING)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_and_matrix_against_autograd(family: str, bias: bool, weighted: bool) -> None:
    problem, H = make(family, bias=bias, weighted=weighted)
    v = torch.randn(3, problem.size, dtype=torch.float64)
    torch.testing.assert_close(problem.hvp(v), v @ H)
    torch.testing.assert_close(problem.dense(), H)
    torch.testing.assert_close(Problem.dense(problem), H)
    assert problem.passes == 3
    assert torch.linalg.eigvalsh(H)[0] >= problem.ridge - 1e-12


def test_singular_direction_of_the_biases_gets_a_ridge_in_the_matrix_alone() -> None:
    X, y, head = torch.randn(N, D, dtype=torch.float64), labelled("softmax", N), random_head("softmax", D, l2=L2)
    problem = GlmProblem(X, y, head)
    same = torch.zeros(D + 1, 3, dtype=torch.float64)
    same[-1] = 1.0
    H = dense_hessian(X, y, head, l2=L2)
    assert (H @ same.flatten()).norm() < 1e-12
    expected = H + L2 / 3 * torch.outer(same.flatten(), same.flatten())
    torch.testing.assert_close(problem.dense(), expected)
    torch.testing.assert_close(problem.hvp(torch.eye(problem.size, dtype=torch.float64)), H)


def test_single_precision_iterates_and_measures_in_double() -> None:
    X, y, head = torch.randn(N, D), labelled("softmax", N), random_head("softmax", D, l2=L2)
    problem = GlmProblem(X, y, head, damping=DAMPING)
    assert (problem.dtype, problem.wide, problem.weights.dtype) == (torch.float32, torch.float64, torch.float32)
    v = torch.randn(2, problem.size, dtype=torch.float64)
    H = dense_hessian(X, y, head, l2=L2, damping=DAMPING)
    torch.testing.assert_close(problem.hvp(v), v @ H, rtol=1e-5, atol=1e-6)
    # The operator that is solved and the one that is measured are the same.
    torch.testing.assert_close(problem.hvp(v), v @ problem.dense(), rtol=1e-12, atol=1e-12)
    assert problem.hvp(v.float()).dtype == torch.float32
    half = GlmProblem(X.bfloat16(), y, head)
    torch.testing.assert_close(half.dense(), GlmProblem(X.bfloat16().float(), y, head).dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_row_curvature_bounds_every_row(family: str) -> None:
    problem, _ = make(family, weighted=True)
    X, s = next(problem.data.spans())[1], problem.sample_weight
    assert s is not None
    largest = 0.0
    for i in range(N):
        one = dense_hessian(X[i : i + 1], problem.labels[i : i + 1], problem.head, s=s[i : i + 1], l2=L2, damping=DAMPING)
        largest = max(largest, torch.linalg.eigvalsh(one)[-1].item())
    assert largest <= problem.row_curvature() * (1 + 1e-12)
    assert problem.row_curvature() <= (4 if family == "softmax" else 1.05) * largest + L2


@pytest.mark.parametrize("batch_size", [7, 64])
def test_batches_are_those_of_the_op(batch_size: int) -> None:
    problem, _ = make(weighted=True)
    X, s = next(problem.data.spans())[1], problem.sample_weight
    assert s is not None
    rows = xf.ops.sample_rows(N, batch_size, seed=3, step=2)
    H = dense_hessian(X[rows], problem.labels[rows], problem.head, s=s[rows], l2=L2, damping=DAMPING)
    v = torch.randn(2, problem.size, dtype=torch.float64)
    torch.testing.assert_close(problem.batch_hvp(v, batch_size, 3, 2), v @ H)


def test_lissa_is_the_loop_over_batches() -> None:
    problem, _ = make(weighted=True)
    g = torch.randn(2, problem.size, dtype=torch.float64)
    options = {"sigma": 5.0, "batch_size": 8, "first_step": 4, "steps": 20, "skip": 5, "seed": 1}
    fused, looped = problem.lissa(g, **options), Problem.lissa(problem, g, **options)
    torch.testing.assert_close(fused[0], looped[0])
    torch.testing.assert_close(fused[1], looped[1])


# ---- preconditioners ------------------------------------------------------------------------------------------------------

BUILDERS = [_kronecker.kronecker_preconditioner, _kronecker.diagonal_preconditioner]


def preconditioned(problem: GlmProblem, build: Any) -> Tensor:
    """Eigenvalues of M^-1/2 H M^-1/2."""
    root = build(problem, problem._ridges, problem._reduce)
    R = root(torch.eye(problem.size, dtype=torch.float64))
    torch.testing.assert_close(R, R.T)
    return torch.linalg.eigvalsh(R @ problem.dense() @ R)


def test_preconditioner_of_one_output_is_the_inverse() -> None:
    problem, _ = make("logistic", weighted=True)
    found = preconditioned(problem, _kronecker.whole_preconditioner)
    torch.testing.assert_close(found, torch.ones(problem.size, dtype=torch.float64))


@pytest.mark.parametrize("build", BUILDERS, ids=lambda b: b.__name__)
def test_preconditioners_are_exact_on_the_diagonal_of_their_basis(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean eigenvalue is then 1, whatever the basis and the exact part."""
    problem, _ = make(weighted=True)
    for size in (1024, 6, 0):
        monkeypatch.setattr(_kronecker, "COARSE_SIZE", size)
        found = preconditioned(problem, build)
        torch.testing.assert_close(found.mean(), torch.ones((), dtype=torch.float64))
        assert found[0] > 0


def test_kronecker_preconditioner_with_all_directions_exact_is_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = make(weighted=True)
    monkeypatch.setattr(_kronecker, "COARSE_PASSES", 10**6)
    found = preconditioned(problem, _kronecker.kronecker_preconditioner)
    torch.testing.assert_close(found, torch.ones(problem.size, dtype=torch.float64))


def test_kronecker_preconditioner_is_exact_where_its_assumption_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows with the same probabilities: H = A (x) B + l2."""
    monkeypatch.setattr(_kronecker, "COARSE_SIZE", 0)
    X, y = torch.eye(D, dtype=torch.float64).repeat(4, 1), labelled("softmax", 4 * D)
    head = SoftmaxHead(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64).repeat(D, 1), l2=L2)
    problem = GlmProblem(X, y, head)
    found = preconditioned(problem, _kronecker.kronecker_preconditioner)
    torch.testing.assert_close(found, torch.ones(len(found), dtype=torch.float64), rtol=1e-8, atol=0)
    assert preconditioned(problem, _kronecker.diagonal_preconditioner)[-1] > 1.1


@pytest.fixture(scope="module")
def digits() -> GlmProblem:
    """Ill-conditioned: 640 parameters, l2 = 1e-4."""
    X, y = load_digits(return_X_y=True)
    estimator = LogisticRegression(C=1 / (1e-4 * len(X)), fit_intercept=False, max_iter=400)
    return GlmProblem(X / 16.0, y, Head.from_sklearn(estimator.fit(X / 16.0, y)))


def test_preconditioning_halves_the_passes_on_digits(digits: GlmProblem) -> None:
    """Set-up passes counted; to a relative residual of 1e-3, the gradient of one row."""
    X = next(digits.data.spans())[1]
    for row in (0, 3):
        v = (X[row, :, None] * digits.residual[row]).reshape(1, -1)
        digits._preconditioner = None
        plain = solve(digits, v, solver="cg", preconditioner=False, tolerance=1e-3)
        helped = solve(digits, v, solver="cg", tolerance=1e-3)
        assert plain.converged
        assert helped.converged
        assert helped.passes <= plain.passes / 2


def test_condition_number_on_digits(digits: GlmProblem) -> None:
    plain = torch.linalg.eigvalsh(digits.dense())
    assert plain[-1] / plain[0] > 1000
    found = preconditioned(digits, _kronecker.kronecker_preconditioner)
    assert found[-1] / found[0] < 15


def test_preconditioner_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from xai_fast.influence import glm

    chosen: list[str] = []
    for name in ("whole", "kronecker", "diagonal"):
        monkeypatch.setattr(glm, f"{name}_preconditioner", lambda *_, name=name: chosen.append(name))
    make("logistic")[0].root_preconditioner()
    make("softmax")[0].root_preconditioner()
    monkeypatch.setattr(glm, "LARGEST_FACTOR", 2)
    make("softmax")[0].root_preconditioner()
    assert chosen == ["whole", "kronecker", "diagonal"]


# ---- data -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "BLOCK_BYTES", 600)


@pytest.mark.usefixtures("small_blocks")
def test_memmap_is_read_in_blocks(tmp_path: Path) -> None:
    X, y, head = np.random.default_rng(0).normal(size=(N, D)), labelled("softmax", N), random_head("softmax", D)
    X.tofile(tmp_path / "X")
    mapped = np.memmap(tmp_path / "X", dtype=np.float64, mode="r", shape=(N, D))
    inside, outside = GlmProblem(X, y, head), GlmProblem(mapped, y, head)
    assert len(list(outside.data.spans())) == 3
    assert len(list(inside.data.spans())) == 1
    v = torch.randn(2, inside.size, dtype=torch.float64)
    torch.testing.assert_close(outside.hvp(v), inside.hvp(v))
    torch.testing.assert_close(outside.dense(), inside.dense())
    torch.testing.assert_close(outside.batch_hvp(v, 16, 0, 0), inside.batch_hvp(v, 16, 0, 0))
    torch.testing.assert_close(outside.root_preconditioner()(v), inside.root_preconditioner()(v))
    assert outside.row_curvature() == pytest.approx(inside.row_curvature())
    options = {"sigma": 5.0, "batch_size": 8, "first_step": 0, "steps": 5, "skip": 0, "seed": 1}
    torch.testing.assert_close(outside.lissa(v, **options)[0], inside.lissa(v, **options)[0])


class OtherProcess:
    """The reduction of two processes, one after the other: a first run records, a second adds what the other recorded."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.other: OtherProcess | None = None
        self.received = 0

    def __call__(self, x: Tensor, operation: str) -> Tensor:
        if self.other is None:
            self.sent.append(x.clone())
            return x
        y = self.other.sent[self.received]
        self.received += 1
        return x + y if operation == "sum" else torch.maximum(x, y)


@pytest.mark.parametrize("what", ["hvp", "batch_hvp", "dense", "row_curvature"])
def test_shards_add_up_to_the_whole(what: str) -> None:
    X, y, head = torch.randn(N, D, dtype=torch.float64), labelled("softmax", N), random_head("softmax", D, l2=L2)
    whole, v = GlmProblem(X, y, head), torch.randn(2, 18, dtype=torch.float64)
    calls: dict[str, Any] = {"hvp": (v,), "batch_hvp": (v, 6, 1, 1)}
    links, cuts = [OtherProcess(), OtherProcess()], [slice(0, 15), slice(15, N)]
    shards = [
        GlmProblem(X[at], y[at], head, rows=N, first_row=at.start, reduce=link) for at, link in zip(cuts, links, strict=True)
    ]
    for shard in shards:
        getattr(shard, what)(*calls.get(what, ()))
    links[0].other, links[1].other = links[1], links[0]
    expected = getattr(whole, what)(*calls.get(what, ()))
    for shard in shards:
        torch.testing.assert_close(getattr(shard, what)(*calls.get(what, ())), expected)


def test_inputs_of_all_kinds() -> None:
    X, y, head = torch.randn(N, D, dtype=torch.float64), labelled("softmax", N), random_head("softmax", D)
    expected = GlmProblem(X, y, head).dense()
    kinds: list[Any] = [
        X.clone().requires_grad_(True),
        X.T.contiguous().T,
        X.numpy()[::-1][::-1],
        np.asfortranarray(X.numpy()),
        torch.randn(2 * N, D, dtype=torch.float64).index_copy_(0, torch.arange(0, 2 * N, 2), X)[::2],
        X.numpy().astype(">f8"),
    ]
    for kind in kinds:
        torch.testing.assert_close(GlmProblem(kind, y, head).dense(), expected)
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    torch.testing.assert_close(GlmProblem(frozen, y.numpy(), head).dense(), expected)


def test_bad_data_is_named() -> None:
    X, y, head = torch.randn(N, D), labelled("softmax", N), random_head("softmax", D)
    broken = X.clone()
    broken[[3, 7, 9, 11, 13, 20], 0] = torch.tensor([np.nan, np.inf, -np.inf, np.nan, np.nan, np.nan], dtype=torch.float32)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: GlmProblem(broken, y, head), ValueError, "X_train: .* NaN or infinity in rows 3, 7, 9, 11, 13, ..."),
        (lambda: GlmProblem(X.long(), y, head), TypeError, "X_train: expected a float32, .* got torch.int64"),
        (lambda: GlmProblem(X.numpy().astype(np.uint8), y, head), TypeError, "X_train: expected a floating.* got uint8"),
        (lambda: GlmProblem(X[:, :4], y, head), ValueError, "X_train: expected 5 features, as theta has, got 4"),
        (lambda: GlmProblem(X[0], y, head), ValueError, r"X_train: expected shape \(n, D\), got \(5,\)"),
        (lambda: GlmProblem(X[:0], y[:0], head), ValueError, "X_train: expected at least one row"),
        (lambda: GlmProblem(X, y[:-1], head), ValueError, r"y_train: expected shape \(40,\)"),
        (lambda: GlmProblem(X, y + 1, head), ValueError, "y_train: expected one of 0, 1, 2, got 3 in row"),
        (lambda: GlmProblem(X, None, head), TypeError, "y_train: expected 40 labels, got None"),
        (lambda: GlmProblem(X, y, head, damping=-1.0), ValueError, "damping: expected"),
        (lambda: GlmProblem(X, y, head, sample_weight=-torch.ones(N)), ValueError, "sample_weight: .* got -1.0 in row 0"),
        (lambda: GlmProblem(X, y, head, sample_weight=torch.zeros(N)), ValueError, "sample_weight: expected at least one"),
        (lambda: GlmProblem(X, y, torch.ones(5)), TypeError, "head: expected a Head, got Tensor"),
        (lambda: GlmProblem(1e5 * X, labelled("poisson", N), random_head("poisson", D)), ValueError, "an overflow in rows"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
