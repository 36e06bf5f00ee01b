"""Influence against dense float64 algebra, retraining, and itself."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from tests.influence.problems import FAMILIES, dense_hessian, design, labelled, random_head, row_gradients
from xai_fast.influence import Head, Influence, LinearHead, LogisticHead, NotConverged, Scores, SoftmaxHead, _rows
from xai_fast.influence._solvers import exact as exact_solver

N, D, TESTS, L2, DAMPING = 30, 4, 6, 0.1, 0.02
ARRAYS = tuple[Tensor, Tensor, Tensor, Tensor]


def data(family: str) -> ARRAYS:
    X = torch.randn(N + TESTS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = labelled(family, N + TESTS)
    return X[:N], y[:N], X[N:], y[N:]


def algebra(family: str, head: Head, s: Tensor | None = None, train_gradient: str = "loss") -> Tensor:
    """-G_test H^-1 G_train^T with autograd and a dense solve."""
    X, y, X_test, y_test = data(family)
    H = dense_hessian(X, y, head, s=s, l2=L2, damping=DAMPING)
    train, test = row_gradients(X, y, head), row_gradients(X_test, y_test, head)
    if s is not None:
        train = train * s[:, None]
    if train_gradient == "objective":
        r = L2 * head.parameters.clone()
        r[head.dim :] = 0
        train = train + r.flatten()
    return -test @ torch.linalg.solve(H, train.T)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("train_gradient", ["loss", "objective"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_against_dense_algebra(family: str, bias: bool, train_gradient: str, weighted: bool) -> None:
    X, y, X_test, y_test = data(family)
    head, s = random_head(family, D, l2=L2, bias=bias), torch.rand(N, dtype=torch.float64) if weighted else None
    influence = Influence(head, X, y, sample_weight=s, damping=DAMPING, train_gradient=train_gradient)
    scores = influence.scores(X_test, y_test)
    expected = algebra(family, head, s, train_gradient)
    torch.testing.assert_close(scores.as_subclass(Tensor), expected, rtol=1e-8, atol=1e-10)
    assert scores.solution is not None
    assert scores.solution.converged
    torch.testing.assert_close(influence.loo(X_test, y_test, leverage=False).as_subclass(Tensor), -expected / N)
    # The diagonal of the scores of the training rows.
    own = influence.self_influence().as_subclass(Tensor)
    torch.testing.assert_close(own, influence.scores(X, y).diagonal().as_subclass(Tensor), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", ["auto", "exact", "cg", "lissa", "lanczos", "arnoldi"])
def test_solvers_agree(solver: str) -> None:
    X, y, X_test, y_test = data("softmax")
    head = random_head("softmax", D, l2=L2)
    influence = Influence(head, X, y, damping=DAMPING, solver=solver, batch_size=8 if solver == "lissa" else None)
    scores = influence.scores(X_test, y_test)
    torch.testing.assert_close(scores.as_subclass(Tensor), algebra("softmax", head), rtol=1e-3, atol=1e-4)
    assert scores.solution is not None
    assert scores.solution.residual.max() <= 1e-5
    assert scores.solution.x.shape == (TESTS, D + 1, 3)


def test_numbers_of_any_kind() -> None:
    """numpy and torch, float32, 16 bits: torch tensors come out."""
    X, y, X_test, y_test = data("softmax")
    head, expected = random_head("softmax", D, l2=L2), algebra("softmax", random_head("softmax", D, l2=L2))
    scores = Influence(head, X.numpy(), y.numpy(), damping=DAMPING).scores(X_test.numpy(), y_test.numpy().tolist())
    torch.testing.assert_close(scores.as_subclass(Tensor), expected)
    single = Influence(head, X.float(), y, damping=DAMPING).scores(X_test, y_test)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.as_subclass(Tensor), expected.float(), rtol=1e-4, atol=1e-5)
    half = Influence(head, X.bfloat16(), y, damping=DAMPING).scores(X_test.half(), y_test)
    torch.testing.assert_close(half.as_subclass(Tensor), expected.float(), rtol=0.1, atol=0.05)


def test_inverse_hvp_keeps_shape_and_dtype() -> None:
    X, y, _, _ = data("logistic")
    head = random_head("logistic", D, l2=L2)
    influence = Influence(head, X, y, damping=DAMPING)
    H = dense_hessian(X, y, head, l2=L2, damping=DAMPING)
    for shape in [(D + 1,), (D + 1, 1), (3, D + 1, 1)]:
        v = torch.randn(shape, dtype=torch.float64)
        solution = influence.inverse_hvp(v)
        assert solution.x.shape == shape
        assert solution.residual.shape == ((3,) if len(shape) == 3 else ())
        assert solution.solver == "exact"
        torch.testing.assert_close(solution.x.reshape(-1, D + 1) @ H, v.reshape(-1, D + 1))
    assert influence.inverse_hvp(v.float().numpy()).x.dtype == torch.float32
    for bad in (torch.ones(D), torch.ones(D + 1, 2), torch.ones(0, D + 1, 1)):
        with pytest.raises(ValueError, match=r"v: expected shape \(5,\), \(5, 1\) or \(M, 5, 1\), got"):
            influence.inverse_hvp(bad)
    with pytest.raises(TypeError, match=r"v: expected a floating-point tensor or array, got torch.int64"):
        influence.inverse_hvp(torch.ones(D + 1).long())


# ---- what is influenced ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_functionals(family: str) -> None:
    X, y, X_test, y_test = data(family)
    head = random_head(family, D, l2=L2)
    influence = Influence(head, X, y, damping=DAMPING)
    labels = head.check_labels(y_test, TESTS)

    def logit(p: Tensor) -> Tensor:
        z = design(X_test, head) @ p
        if family == "softmax":
            return z[torch.arange(TESTS), labels]
        sign = {"logistic": 2 * labels - 1, "smooth_hinge": labels}.get(family, torch.ones(TESTS))
        return z[:, 0] * sign

    gradients = torch.autograd.functional.jacobian(logit, head.parameters)
    expected = influence.scores_of(gradients).as_subclass(Tensor)
    found = influence.scores(X_test, y_test, of="logit")
    torch.testing.assert_close(found.as_subclass(Tensor), expected)
    assert found.convention is not None
    assert (found.convention.quantity, found.convention.sign) == ("I_up,logit", "positive = helpful")
    loss = influence.scores(X_test, y_test, of=lambda z, y: head.loss(z, y))
    torch.testing.assert_close(loss.as_subclass(Tensor), influence.scores(X_test, y_test).as_subclass(Tensor))
    if family in ("linear", "poisson"):
        torch.testing.assert_close(influence.scores(X_test, None, of="logit").as_subclass(Tensor), expected)
        with pytest.raises(ValueError, match="of: expected 'loss' or 'logit' for"):
            influence.scores(X_test, y_test, of="margin")
    elif family == "softmax":
        margin = influence.scores(X_test, y_test, of="margin")
        ahead = influence.scores(X_test, y_test, of=lambda z, y: z.gather(1, y[:, None])[:, 0] - others(z, y))
        torch.testing.assert_close(margin.as_subclass(Tensor), ahead.as_subclass(Tensor))
    else:
        torch.testing.assert_close(influence.scores(X_test, y_test, of="margin").as_subclass(Tensor), expected)


def others(z: Tensor, y: Tensor) -> Tensor:
    return torch.stack([torch.cat([row[:c], row[c + 1 :]]).max() for row, c in zip(z, y.tolist(), strict=True)])


# ---- the extreme rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_gradient", ["loss", "objective"])
@pytest.mark.parametrize("of", ["loss", "margin"])
@pytest.mark.parametrize("which", ["helpful", "harmful"])
def test_top_k_is_the_end_of_the_scores(which: str, of: str, train_gradient: str) -> None:
    X, y, X_test, y_test = data("softmax")
    influence = Influence(random_head("softmax", D, l2=L2), X, y, damping=DAMPING, train_gradient=train_gradient)
    scores = influence.scores(X_test, y_test, of=of).as_subclass(Tensor)
    # Helpful rows lower the loss: the most negative I_up,loss first.
    order = scores.argsort(dim=1, descending=(which == "harmful") == (of == "loss"))
    top = influence.top_k(X_test, y_test, 5, which=which, of=of)
    values, indices = top
    assert indices.equal(order[:, :5])
    torch.testing.assert_close(values, scores.gather(1, indices))
    assert top.which == which
    per_class = influence.top_k(X_test, y_test, 12, which=which, of=of, per_class=True)
    assert per_class.values.shape == (TESTS, 3, 12)
    for c in range(3):
        inside = [[i for i in row if y[i] == c][:12] for row in order.tolist()]
        count = len(inside[0])
        assert count < 12  # some classes are too small
        assert per_class.indices[:, c, :count].tolist() == inside
        assert (per_class.indices[:, c, count:] == -1).all()
        assert per_class.values[:, c, count:].isnan().all()


def test_equal_rows_are_ranked_by_number() -> None:
    X, y = torch.ones(8, 1), torch.tensor([1.0, 2.0] * 4)
    influence = Influence(LinearHead([1.5], l2=L2), X, y)
    assert influence.top_k(X[:1], y[:1], 4, which="harmful").indices.tolist() == [[1, 3, 5, 7]]


def test_per_class_of_two_classes_and_of_none() -> None:
    X, y, X_test, y_test = data("smooth_hinge")
    top = Influence(random_head("smooth_hinge", D), X, y).top_k(X_test, y_test, 2, per_class=True)
    assert (y[top.indices[:, 0]] == -1).all()
    assert (y[top.indices[:, 1]] == 1).all()
    X, y, X_test, y_test = data("linear")
    with pytest.raises(ValueError, match="per_class: expected a classifier, got LinearHead"):
        Influence(random_head("linear", D), X, y).top_k(X_test, y_test, 2, per_class=True)


# ---- leave one out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("train_gradient", ["loss", "objective"])
@pytest.mark.parametrize("family", ["logistic", "softmax"])
def test_leverage_is_one_newton_step_without_the_row(family: str, train_gradient: str, weighted: bool) -> None:
    """Written out: the Hessian and the gradient of the objective without each row, from a minimum of the whole."""
    X, y, X_test, y_test = data(family)
    head, s = random_head(family, D, l2=L2), torch.rand(N, dtype=torch.float64) + 0.5 if weighted else torch.ones(N).double()
    r = L2 * head.parameters.clone()
    r[D:] = 0
    train, test = row_gradients(X, y, head) * s[:, None], row_gradients(X_test, y_test, head)
    expected = torch.empty(TESTS, N, dtype=torch.float64)
    for i in range(0, N, 7):
        keep = torch.arange(N) != i
        sums = dense_hessian(X[keep], y[keep], head, s=s[keep]) * (N - 1)
        penalised = torch.full((D + 1, head.outputs), L2 * (N if train_gradient == "loss" else N - 1), dtype=torch.float64)
        penalised[D:] = 0
        A = sums + torch.diag(penalised.flatten() + N * DAMPING)
        removed = train[i] + (r.flatten() if train_gradient == "objective" else 0)
        expected[:, i] = test @ torch.linalg.solve(A, removed)
    influence = Influence(head, X, y, sample_weight=s if weighted else None, damping=DAMPING, train_gradient=train_gradient)
    found = influence.loo(X_test, y_test)
    torch.testing.assert_close(found[:, ::7], expected[:, ::7], rtol=1e-8, atol=1e-12)
    assert found.convention is not None
    assert found.convention.divided_by_n


@pytest.mark.parametrize("train_gradient", ["loss", "objective"])
def test_leverage_is_exact_for_ridge_regression(train_gradient: str) -> None:
    """Retrained with scikit-learn: the prediction of a test point moves by exactly loo / (z - y)."""
    rng = np.random.default_rng(0)
    X, X_test, s = rng.normal(size=(25, 3)), rng.normal(size=(4, 3)), rng.uniform(0.5, 2, 25)
    y, y_test = X @ [1.0, -2.0, 0.5] + rng.normal(size=25), np.zeros(4)
    estimator = Ridge(alpha=2.0).fit(X, y, sample_weight=s)
    influence = Influence(Head.from_sklearn(estimator), X, y, sample_weight=s, train_gradient=train_gradient)
    z, found = estimator.predict(X_test), influence.loo(X_test, y_test).numpy()
    for i in range(25):
        # Mean objective with the same l2: alpha stays l2 times the number of rows.
        alpha = 2.0 if train_gradient == "loss" else 2.0 * 24 / 25
        without = Ridge(alpha=alpha).fit(np.delete(X, i, 0), np.delete(y, i), sample_weight=np.delete(s, i))
        np.testing.assert_allclose(found[:, i], (z - y_test) * (without.predict(X_test) - z), rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("train_gradient", ["loss", "objective"])
def test_leave_one_out_retraining_on_digits(train_gradient: str) -> None:
    X, y = load_digits(return_X_y=True)
    X = X.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 16  # 2 x 2 pixels each: 160 parameters
    n, count = 600, 20
    X_test, y_test = X[n : n + 30], y[n : n + 30]
    options: dict[str, Any] = {"solver": "newton-cholesky", "tol": 1e-10, "fit_intercept": False, "warm_start": True}
    estimator = LogisticRegression(C=1 / (0.01 * n), **options).fit(X[:n], y[:n])
    influence = Influence(Head.from_sklearn(estimator), X[:n], y[:n], train_gradient=train_gradient)
    strength = np.abs(influence.scores(X_test, y_test).numpy()).max(0)
    rows = sorted({*np.argsort(-strength)[:count].tolist(), *range(0, n, n // count)})
    base, true = log_loss(estimator, X_test, y_test), []
    for row in rows:
        C = estimator.C * (1 if train_gradient == "loss" else n / (n - 1))
        other = copy.deepcopy(estimator).set_params(C=C)
        true.append(log_loss(other.fit(np.delete(X[:n], row, 0), np.delete(y[:n], row)), X_test, y_test) - base)
    errors = []
    for leverage in (False, True):
        found = influence.loo(X_test, y_test, leverage=leverage)[:, rows].numpy()
        assert np.mean([spearmanr(a, b)[0] for a, b in zip(found, np.stack(true, 1), strict=True)]) > 0.99
        errors.append(np.linalg.norm(found - np.stack(true, 1)) / np.linalg.norm(true))
    assert errors[0] < 0.05
    assert errors[1] < 0.7 * errors[0]


def log_loss(estimator: Any, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -estimator.predict_log_proba(X)[np.arange(len(y)), y]


def test_a_row_that_nothing_replaces() -> None:
    X, y = torch.eye(2, dtype=torch.float64), torch.tensor([2.0, 3.0])
    influence = Influence(LinearHead(torch.tensor([1.0, 1.0]).double()), X, y)
    with pytest.raises(ValueError, match=r"damping: .* a singular one without rows 0, 1"):
        influence.loo(X, y)


def test_leverage_has_a_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from xai_fast.influence import influence as module

    X, y, X_test, y_test = data("softmax")
    monkeypatch.setattr(module, "EXACT_SIZE", 10)
    influence = Influence(random_head("softmax", D, l2=L2), X, y)
    with pytest.raises(ValueError, match=r"leverage: expected at most 10 parameters, got 15; leverage=False has no limit"):
        influence.loo(X_test, y_test)
    assert influence.loo(X_test, y_test, leverage=False).shape == (TESTS, N)


@pytest.mark.parametrize("train_gradient", ["loss", "objective"])
@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_self_influence_of_low_rank(train_gradient: str, damping: float) -> None:
    """With all eigenvectors it is the exact one."""
    X, y, _, _ = data("logistic")
    head = random_head("logistic", D, l2=L2)
    options: dict[str, Any] = {"damping": damping, "train_gradient": train_gradient}
    exact = Influence(head, X, y, **options).self_influence()
    low = Influence(head, X, y, solver="lanczos", **options).self_influence()
    torch.testing.assert_close(low.as_subclass(Tensor), exact.as_subclass(Tensor), rtol=1e-6, atol=1e-9)
    assert low.convention is not None
    assert "rank 5 (Lanczos)" in low.convention.hessian


# ---- properties -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> tuple[Head, Tensor, Tensor, Tensor]:
    """A softmax head at the minimum, with a bias (H is singular along it) and sample weights."""
    rng = np.random.default_rng(1)
    X, y, s = rng.normal(size=(60, 4)), rng.integers(0, 3, 60), rng.uniform(0.5, 2, 60)
    estimator = LogisticRegression(C=0.5, tol=1e-12, max_iter=1000).fit(X, y, sample_weight=s)
    return Head.from_sklearn(estimator), torch.from_numpy(X), torch.from_numpy(y), torch.from_numpy(s)


def test_influences_add_up(fitted: ARRAYS) -> None:
    """At the minimum, the gradients of the objective add up to 0, those of the losses to -n l2 theta."""
    head, X, y, s = fitted
    objective = Influence(head, X, y, sample_weight=s, train_gradient="objective").scores(X[:5], y[:5])
    scale = objective.abs().sum(1)
    assert (objective.sum(1).abs() < 1e-6 * scale).all()
    influence = Influence(head, X, y, sample_weight=s)
    r = head.parameters.clone() * influence.problem.l2
    r[-1] = 0
    losses = influence.scores(X[:5], y[:5])
    expected = 60 * (losses.solution.x * r).sum((1, 2))
    torch.testing.assert_close(losses.sum(1), expected, rtol=1e-5, atol=1e-8)


def test_singular_direction_of_the_biases_does_no_harm(fitted: ARRAYS) -> None:
    """All solvers give the same, certified against H itself."""
    head, X, y, s = fitted
    found = [Influence(head, X, y, sample_weight=s, solver=solver).scores(X[:5], y[:5]) for solver in ("exact", "cg")]
    torch.testing.assert_close(found[0].as_subclass(Tensor), found[1].as_subclass(Tensor), rtol=1e-4, atol=1e-6)
    assert all(part.solution.converged for part in found)
    damped = Influence(head, X, y, sample_weight=s, damping=1e-9).loo(X[:5], y[:5])
    loo = Influence(head, X, y, sample_weight=s).loo(X[:5], y[:5])
    torch.testing.assert_close(loo.as_subclass(Tensor), damped.as_subclass(Tensor), rtol=1e-5, atol=1e-7)


def test_linear_in_the_test_gradient() -> None:
    X, y, _, _ = data("softmax")
    influence = Influence(random_head("softmax", D, l2=L2), X, y, damping=DAMPING)
    u, v = torch.randn(2, 2, D + 1, 3, dtype=torch.float64)
    both = influence.scores_of(2 * u - 3 * v)
    torch.testing.assert_close(both.as_subclass(Tensor), 2 * influence.scores_of(u) - 3 * influence.scores_of(v))


def test_symmetric_in_test_and_train() -> None:
    X, y, _, _ = data("softmax")
    scores = Influence(random_head("softmax", D, l2=L2), X, y, damping=DAMPING).scores(X, y).as_subclass(Tensor)
    torch.testing.assert_close(scores, scores.T)


def test_order_of_rows_blocks_and_budget_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, X_test, y_test = data("softmax")
    head, order = random_head("softmax", D, l2=L2), torch.randperm(N)
    options: dict[str, Any] = {"damping": DAMPING}
    whole = Influence(head, X, y, **options)

    def results(influence: Influence) -> list[Tensor]:
        top = influence.top_k(X_test, y_test, 4, which="harmful")
        per_class = influence.top_k(X_test, y_test, 4, per_class=True)
        found = [influence.scores(X_test, y_test), influence.self_influence(), influence.loo(X_test, y_test)]
        return [x.as_subclass(Tensor) for x in found] + [top.values, top.indices, per_class.values, per_class.indices]

    expected = results(whole)
    shuffled = results(Influence(head, X[order], y[order], **options))
    for a, b in zip(expected[:3], shuffled[:3], strict=True):
        torch.testing.assert_close(b, a[..., order])
    assert order[shuffled[4]].equal(expected[4])
    X.numpy().tofile(tmp_path / "X")
    mapped = np.memmap(tmp_path / "X", dtype=np.float64, mode="r", shape=(N, D))
    monkeypatch.setattr(_rows, "BLOCK_BYTES", 320)
    for other in (Influence(head, mapped, y, **options), Influence(head, X, y, memory_budget=1, **options)):
        for a, b in zip(expected, results(other), strict=True):
            torch.testing.assert_close(b, a, equal_nan=True)


def test_results_say_what_they_mean() -> None:
    X, y, X_test, y_test = data("softmax")
    head = random_head("softmax", D, l2=L2)
    influence = Influence(head, X, y, damping=DAMPING, train_gradient="objective")
    scores = influence.scores(X_test, y_test)
    assert isinstance(scores, Scores)
    assert str(scores.convention) == str(influence.convention)
    assert str(influence.convention) == (
        "I_up,loss; positive = harmful; not divided by n = 30; H = mean loss Hessian + l2 (not on the bias) + damping, "
        "l2 = 0.1, damping = 0.02; train gradient of the objective"
    )
    assert type(scores + 1) is Tensor
    assert influence.top_k(X_test, y_test, 2).convention == influence.convention
    assert scores.solution is not None
    assert "auto: exact" in scores.solution.why


def test_the_factor_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, X_test, y_test = data("softmax")
    influence = Influence(random_head("softmax", D, l2=L2), X, y, damping=DAMPING)
    assembled, factored = Mock(wraps=influence.problem.dense), Mock(wraps=exact_solver._factor)
    monkeypatch.setattr(influence.problem, "dense", assembled)
    monkeypatch.setattr(exact_solver, "_factor", factored)
    influence.scores(X_test, y_test)
    influence.top_k(X_test, y_test, 3)
    influence.self_influence()
    influence.loo(X_test, y_test)
    assert assembled.call_count == 1
    assert factored.call_count == 1


# ---- bad input ------------------------------------------------------------------------------------------------------------


def test_singular_hessian_is_an_error_or_a_warning() -> None:
    """More parameters than rows, no l2, no damping."""
    X, y = torch.randn(5, 8, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0])
    head = LogisticHead(torch.randn(8, dtype=torch.float64))
    X_test = torch.randn(2, 8, dtype=torch.float64)
    for call in (lambda i: i.scores(X_test, [0, 1]), lambda i: i.self_influence(), lambda i: i.loo(X_test, [0, 1])):
        with pytest.raises(ValueError, match="damping: expected enough for a positive definite Hessian"):
            call(Influence(head, X, y, solver="exact"))
    for solver in ("auto", "cg", "lissa"):
        with pytest.warns(NotConverged, match="residual"):
            scores = Influence(head, X, y, solver=solver).scores(X_test, [0, 1])
        assert not scores.solution.converged
        assert scores.solution.residual.min() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Influence(head, X, y, damping=1e-3).scores(X_test, [0, 1]).solution.converged


def test_bad_arguments_are_named() -> None:
    X, y, X_test, y_test = data("softmax")
    head = random_head("softmax", D, l2=L2)
    influence = Influence(head, X, y)
    broken = X_test.clone()
    broken[2, 1] = torch.nan
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: Influence(head, X, y, solver="newton"), ValueError, "solver: expected one of auto, exact"),
        (lambda: Influence(head, X, y, train_gradient="both"), ValueError, "train_gradient: expected 'loss' or 'objective'"),
        (lambda: Influence(head, X, y, tolerance=0.0), ValueError, "tolerance: expected a number above 0"),
        (lambda: Influence(head, X, y, seed=-1), ValueError, "seed: expected"),
        (lambda: Influence(head, X, y, solver="lissa", batch_size=N + 1), ValueError, "batch_size: .* from 1 to 30, got 31"),
        (lambda: Influence(head, X, y, batch_size=4), ValueError, "batch_size: expected only with the solver lissa"),
        (lambda: Influence(head, X, y + 1), ValueError, "y_train: expected one of 0, 1, 2, got 3 in row"),
        (lambda: Influence(head, X[:, 1:], y), ValueError, "X_train: expected 4 features, as theta has, got 3"),
        (
            lambda: influence.scores(X_test[:0], y_test[:0]),
            ValueError,
            r"X_test: expected at least one test point, got .*\(0, 4",
        ),
        (lambda: influence.scores(X_test[:, 1:], y_test), ValueError, "X_test: expected 4 features, as X_train has, got 3"),
        (lambda: influence.scores(X_test[0], y_test), ValueError, r"X_test: expected shape \(n, D\)"),
        (
            lambda: influence.scores(broken, y_test),
            ValueError,
            "X_test: expected finite numbers, got NaN or infinity in row 2",
        ),
        (lambda: influence.scores(X_test, y_test[1:]), ValueError, r"y_test: expected shape \(6,\)"),
        (
            lambda: influence.scores(X_test, [0, 1, 2, 0, 9, 1]),
            ValueError,
            "y_test: expected one of 0, 1, 2, got 9 in row 4",
        ),
        (lambda: influence.scores(X_test, None), TypeError, "y_test: expected 6 labels, got None"),
        (lambda: influence.scores(X_test, None, of="logit"), TypeError, "y_test: expected the classes"),
        (
            lambda: influence.scores(X_test, y_test, of="risk"),
            ValueError,
            "of: expected 'loss', 'logit', 'margin' or a callable",
        ),
        (lambda: influence.scores(X_test, y_test, of=lambda z, y: z), ValueError, "of: expected one value for each of 6"),
        (
            lambda: influence.scores(X_test, y_test, of=lambda z, y: z[:, 0].detach()),
            ValueError,
            "of: expected a differentiable",
        ),
        (lambda: influence.top_k(X_test, y_test, N + 1), ValueError, "k: expected a whole number from 1 to 30, got 31"),
        (lambda: influence.top_k(X_test, y_test, 1, which="best"), ValueError, "which: expected 'helpful' or 'harmful'"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_training_rows_from_a_loader() -> None:
    """The rows of a loader are those of its dataset, in its order; a shuffling one says so."""
    X, y, head, test = torch.randn(30, 4), torch.randint(0, 3, (30,)), SoftmaxHead(torch.randn(4, 3), l2=0.1), 5
    data = torch.utils.data.TensorDataset(X, y)
    expected = Influence(head, X, y).scores(X[:test], y[:test])
    plain = Influence(head, torch.utils.data.DataLoader(data, batch_size=7))
    assert torch.equal(plain.scores(X[:test], y[:test]), expected)
    with pytest.warns(UserWarning, match="row numbers are those of its dataset"):
        shuffled = Influence(head, torch.utils.data.DataLoader(data, batch_size=7, shuffle=True))
    assert torch.equal(shuffled.scores(X[:test], y[:test]), expected)
    with pytest.raises(TypeError, match="X_train: expected a DataLoader"):
        Influence(head, X)


def test_scores_can_be_copied_and_stored() -> None:
    head = SoftmaxHead(torch.randn(4, 3), l2=0.1)
    scores = Influence(head, torch.randn(30, 4), torch.randint(0, 3, (30,))).scores(torch.randn(2, 4), [0, 1])
    for other in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert torch.equal(other, scores)
        assert other.convention == scores.convention
        assert torch.equal(other.solution.residual, scores.solution.residual)
    assert type(scores[0]) is Tensor
    assert np.asarray(scores).shape == (2, 30)
