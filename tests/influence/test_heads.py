"""Heads: closed forms against autograd, penalties against the estimators they were read from, labels."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge, SGDClassifier
from torch import Tensor, nn

import xai_fast as xf
from tests.influence.problems import FAMILIES, labelled, random_head
from xai_fast.influence import Head, LinearHead, LogisticHead, PoissonHead, SmoothHingeHead, SoftmaxHead

N, D = 30, 4


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_and_weights_are_derivatives_of_the_loss(family: str) -> None:
    head, X = random_head(family, D), torch.randn(N, D, dtype=torch.float64)
    y = head.check_labels(labelled(family, N), N)
    logits = head.logits(X).requires_grad_(True)
    residual = torch.autograd.grad(head.loss(logits, y).sum(), logits)[0]
    torch.testing.assert_close(head.residual(logits.detach(), y), residual, rtol=1e-12, atol=1e-14)
    for i in range(3):
        hessian = torch.autograd.functional.hessian(lambda z, i=i: head.loss(z[None], y[i : i + 1])[0], logits[i].detach())
        w = head.weights(logits[i : i + 1].detach(), y[i : i + 1])
        W = torch.diag(w[0]) - torch.outer(w[0], w[0]) if family == "softmax" else w
        torch.testing.assert_close(W, hessian, rtol=1e-10, atol=1e-12)
        assert torch.linalg.eigvalsh(hessian)[-1] <= head.curvature_bound(w)[0] * (1 + 1e-12)
    ys = y if family == "smooth_hinge" else None
    options: dict[str, Any] = {"family": family, "y": ys, "intercept": True, "smoothing": head.smoothing}
    torch.testing.assert_close(head.weights(logits.detach(), y), xf.ops.glm_weights(X, head.parameters, **options))


def test_losses_are_those_of_the_books() -> None:
    z, one = torch.tensor([[0.3], [-2.0]], dtype=torch.float64), torch.tensor([1.0, 0.0])
    expected = nn.functional.binary_cross_entropy_with_logits(z[:, 0], one.double(), reduction="none")
    torch.testing.assert_close(LogisticHead([1.0]).loss(z, one), expected)
    torch.testing.assert_close(LinearHead([1.0]).loss(z, one), (z[:, 0] - one).square() / 2)
    expected = nn.functional.poisson_nll_loss(z[:, 0], one.double(), log_input=True, reduction="none")
    torch.testing.assert_close(PoissonHead([1.0]).loss(z, one), expected)
    s = torch.tensor([1.0, -1.0])
    hinge = (1 - s * z[:, 0]).clamp_min(0)
    torch.testing.assert_close(SmoothHingeHead([1.0], smoothing=1e-3).loss(z, s), hinge, atol=1e-8, rtol=0)
    z = torch.randn(2, 3, dtype=torch.float64)
    expected = nn.functional.cross_entropy(z, torch.tensor([2, 0]), reduction="none")
    torch.testing.assert_close(SoftmaxHead(torch.ones(1, 3)).loss(z, torch.tensor([2, 0])), expected)


def test_sure_predictions_keep_their_digits() -> None:
    """p - y would be 0 in float32."""
    z = torch.tensor([[20.0, 0.0]])
    p = 1 / (1 + np.exp(20.0))
    torch.testing.assert_close(SoftmaxHead(torch.ones(1, 2)).residual(z, torch.tensor([0])), torch.tensor([[-p, p]]).float())
    torch.testing.assert_close(LogisticHead([1.0]).residual(z[:, :1], torch.tensor([1.0])), torch.tensor([[-p]]).float())


# ---- scikit-learn ---------------------------------------------------------------------------------------------------------


def objective_gradient(head: Head, X: np.ndarray, y: Any, s: np.ndarray | None) -> Tensor:
    """The gradient of our objective at the parameters of the head, (P, C)."""
    rows, n = torch.from_numpy(X), len(X)
    weight = torch.ones(n, dtype=torch.float64) if s is None else torch.from_numpy(s)
    delta = head.residual(head.logits(rows), head.check_labels(y, n)) * weight[:, None]
    gradient = rows.T @ delta / n + head.penalty.l2(n, weight.mean().item()) * head.parameters[: head.dim]
    return torch.cat([gradient, delta.mean(0, keepdim=True)]) if head.intercept else gradient


TIGHT = {"tol": 1e-12, "max_iter": 5000}
ESTIMATORS = {
    "binary": (lambda b: LogisticRegression(C=0.7, fit_intercept=b, **TIGHT), "logistic"),
    "binary, no penalty": (lambda b: LogisticRegression(C=np.inf, fit_intercept=b, **TIGHT), "logistic"),
    "multinomial": (lambda b: LogisticRegression(C=0.3, fit_intercept=b, **TIGHT), "softmax"),
    "liblinear": (lambda b: LogisticRegression(C=0.7, solver="liblinear", fit_intercept=False, **TIGHT), "logistic"),
    "ridge": (lambda b: Ridge(alpha=3.0, fit_intercept=b), "linear"),
    "least squares": (lambda b: LinearRegression(fit_intercept=b), "linear"),
    "poisson": (lambda b: PoissonRegressor(alpha=0.2, fit_intercept=b, solver="newton-cholesky", tol=1e-12), "poisson"),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_fitted_estimators_are_at_the_minimum_of_our_objective(name: str, intercept: bool, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    build, family = ESTIMATORS[name]
    X, y = rng.normal(size=(60, 3)), labelled(family, 60).numpy()
    s = rng.uniform(0.2, 3.0, 60) if weighted else None
    estimator = build(intercept).fit(X, y, sample_weight=s)
    head = Head.from_sklearn(estimator)
    assert head.family == family
    assert head.intercept == estimator.fit_intercept
    # The gradient at 0 gives the scale.
    scale = (
        torch.from_numpy(X).T @ head.residual(head.logits(torch.zeros(60, 3)).double(), head.check_labels(y, 60))
    ).norm()
    assert objective_gradient(head, X, y, s).norm() < 1e-6 * scale / 60
    assert estimator.predict(X[:5]).shape == (5,)


def test_penalty_is_known_with_n() -> None:
    X, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2
    estimator = LogisticRegression(C=0.5).fit(X, y)
    assert LogisticHead.from_sklearn(estimator).l2 is None
    assert LogisticHead.from_sklearn(estimator, n=20).l2 == pytest.approx(0.1)
    influence = xf.influence.Influence(LogisticHead.from_sklearn(estimator), X, y)
    assert influence.problem.l2 == pytest.approx(0.1)
    assert LinearHead.from_sklearn(LinearRegression().fit(X, y)).l2 == 0.0
    assert Head.from_sklearn(SGDClassifier(loss="log_loss", alpha=0.3).fit(X, y)).l2 == 0.3


def test_labels_of_the_estimator_are_mapped() -> None:
    X, y = np.random.default_rng(0).normal(size=(30, 2)), np.array(["cat", "dog", "eel"] * 10)
    head = Head.from_sklearn(LogisticRegression().fit(X, y))
    assert head.classes == ["cat", "dog", "eel"]
    assert head.check_labels(["eel", "cat"], 2).tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"y_train: expected one of 'cat', 'dog', 'eel', got 'fox' in row 1"):
        head.check_labels(np.array(["cat", "fox"]), 2, name="y_train")
    two = Head.from_sklearn(LogisticRegression().fit(X, np.where(X[:, 0] > 0, 7, 3)))
    assert two.check_labels(np.array([3, 7, 7]), 3).tolist() == [0, 1, 1]


def test_estimators_that_are_something_else() -> None:
    X, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
    refused = [
        (LogisticRegression(), "fitted LogisticRegression, got one without coef_"),
        (LogisticRegression(l1_ratio=1.0, solver="liblinear", fit_intercept=False).fit(X, y), "l2 penalty or none"),
        (LogisticRegression(l1_ratio=0.5, solver="saga", max_iter=5000).fit(X, y), "l2 penalty or none"),
        (LogisticRegression(solver="liblinear").fit(X, y), "free intercept, got solver='liblinear'"),
        (LogisticRegression(class_weight="balanced").fit(X, y), "without class_weight"),
        (Ridge().fit(X, np.stack([y, y], 1)), "one target, got 2 targets"),
        (LinearRegression(positive=True).fit(X, y), "without constraints"),
        (SGDClassifier().fit(X, y), "loss='log_loss', got loss='hinge'"),
    ]
    for estimator, message in refused:
        with pytest.raises(ValueError, match=message):
            Head.from_sklearn(estimator)
    with pytest.raises(TypeError, match=r"expected one of LogisticRegression, .* got Linear"):
        Head.from_sklearn(nn.Linear(2, 1))
    with pytest.raises(TypeError, match="expected one for SoftmaxHead, got Ridge, a LinearHead"):
        SoftmaxHead.from_sklearn(Ridge().fit(X, y))


def test_old_penalty_argument_of_scikit_learn() -> None:
    X, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Head.from_sklearn(LogisticRegression(penalty=None).fit(X, y), n=30).l2 == 0
        assert Head.from_sklearn(LogisticRegression(penalty="l2", C=2.0).fit(X, y), n=30).l2 == pytest.approx(1 / 60)
        with pytest.raises(ValueError, match="l2 penalty or none"):
            Head.from_sklearn(LogisticRegression(penalty="l1", solver="saga", max_iter=5).fit(X, y))


# ---- construction and labels ----------------------------------------------------------------------------------------------


def test_shapes_and_dtypes() -> None:
    assert LinearHead(np.ones(3)).shape == (3,)
    assert LinearHead(np.ones((3, 1)), bias=1).shape == (4, 1)
    head = SoftmaxHead(np.ones((3, 2), dtype=np.float32), bias=[1.0, 2.0])
    assert head.parameters.dtype == torch.float32
    assert head.parameters[-1].tolist() == [1.0, 2.0]
    assert (head.outputs, head.intercept, head.family) == (2, True, "softmax")
    theta = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    assert LogisticHead(theta).parameters.dtype == torch.float32
    assert not LogisticHead(theta).parameters.requires_grad


def test_from_linear_copies_the_layer() -> None:
    layer = nn.Linear(3, 4)
    head, x = SoftmaxHead.from_linear(layer, l2=0.1), torch.randn(2, 3)
    before = layer(x)
    nn.init.zeros_(layer.weight)
    torch.testing.assert_close(head.logits(x), before)
    assert head.l2 == 0.1
    assert LogisticHead.from_linear(nn.Linear(3, 1, bias=False)).shape == (3,)
    with pytest.raises(ValueError, match=r"theta: expected shape \(D,\) or \(D, 1\) for LogisticHead, got \(3, 4\)"):
        LogisticHead.from_linear(layer)
    with pytest.raises(TypeError, match="Head: from_linear is called on the head of the loss"):
        Head.from_linear(layer)
    with pytest.raises(TypeError, match=r"module: expected an nn.Linear, got ReLU"):
        SoftmaxHead.from_linear(nn.ReLU())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SoftmaxHead(torch.ones(3)), ValueError, r"theta: expected shape \(D, C\) with C of at least 2"),
        (lambda: LinearHead(torch.ones(0)), ValueError, "theta: expected shape"),
        (lambda: LinearHead("abc"), TypeError, "theta: expected numbers, got str"),
        (lambda: LinearHead(np.ones(3, dtype=int)), TypeError, "theta: expected a float32"),
        (lambda: LinearHead([1.0, float("nan")]), ValueError, "theta: expected finite numbers"),
        (lambda: LinearHead([1.0], bias=[1.0, 2.0]), ValueError, r"bias: expected shape \(1,\), got \(2,\)"),
        (lambda: LinearHead([1.0], l2=-1.0), ValueError, "l2: expected a number of at least 0"),
        (lambda: SmoothHingeHead([1.0], smoothing=0.0), ValueError, "smoothing: expected a number above 0"),
    ],
)
def test_bad_arguments(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("head", "y", "message"),
    [
        (SoftmaxHead(torch.ones(1, 3)), [0, 3, 4], "y: expected one of 0, 1, 2, got 3 in row 1"),
        (SoftmaxHead(torch.ones(1, 3)), torch.tensor([0, 1, -1]), "got -1 in row 2"),
        (SoftmaxHead(torch.ones(1, 3)), [0.0, 0.5, 1.0], "got 0.5 in row 1"),
        (LogisticHead([1.0]), [1, 0, 2], "y: expected one of 0, 1, got 2 in row 2"),
        (LogisticHead([1.0]), [1, -1, 1], "got -1 in row 1"),
        (SmoothHingeHead([1.0]), [1, -1, 0], "y: expected one of 0, 1, got -1 in row 1"),
        (SmoothHingeHead([1.0]), [1, -1, 2], "y: expected one of -1, 1, got 2 in row 2"),
        (PoissonHead([1.0]), [1, 0, -2], "y: expected finite numbers of at least 0, got -2.0 in row 2"),
        (LinearHead([1.0]), [1, np.nan, 2], "y: expected finite numbers, got nan in row 1"),
        (LinearHead([1.0]), [1, 2], r"y: expected shape \(3,\), one label for every row, got \(2,\)"),
    ],
)
def test_bad_labels_are_named(head: Head, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head.check_labels(y, 3)


def test_good_labels() -> None:
    assert LogisticHead([1.0]).check_labels(torch.tensor([True, False]), 2).tolist() == [1.0, 0.0]
    assert SmoothHingeHead([1.0]).check_labels([0, 1], 2).tolist() == [-1.0, 1.0]
    assert SmoothHingeHead([1.0]).check_labels([[1], [-1]], 2).tolist() == [1.0, -1.0]
    assert SoftmaxHead(torch.ones(1, 2)).check_labels(torch.tensor([1.0, 0.0]), 2).tolist() == [1, 0]
    with pytest.raises(TypeError, match="y: expected numbers"):
        LinearHead([1.0]).check_labels(["a", "b"], 2)


# ---- features of a network ------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def test_collect_features() -> None:
    model, X, y = Network(), torch.randn(10, 5), torch.arange(10) % 3
    model.body.eval()
    model.train()
    model.body[1].eval()
    features, targets = xf.influence.collect_features(model, model.fc, list(zip(X.split(4), y.split(4), strict=True)))
    assert model.training
    assert model.body[2].training
    assert not model.body[1].training
    assert not model.fc._forward_pre_hooks
    model.eval()
    torch.testing.assert_close(features, model.body(X))
    assert targets is not None
    assert targets.tolist() == y.tolist()
    head = SoftmaxHead.from_linear(model.fc)
    torch.testing.assert_close(head.logits(features), model(X))
    model.double()
    features, targets = xf.influence.collect_features(model, model.fc, [X.double()])
    assert features.dtype == torch.float64
    assert targets is None


def test_collect_features_of_keyword_batches() -> None:
    model, X = Network(), torch.randn(4, 5)
    features, targets = xf.influence.collect_features(model, model.fc, [{"x": X, "labels": [0, 1, 2, 0]}])
    assert features.shape == (4, 4)
    assert targets is not None
    assert targets.tolist() == [0, 1, 2, 0]


def test_collect_features_errors_leave_no_hook() -> None:
    model, X = Network(), torch.randn(4, 5)
    collect = xf.influence.collect_features
    sequence = nn.Sequential(nn.Linear(5, 4))
    for call, error, message in [
        (lambda: collect(model, nn.Linear(4, 3), [X]), ValueError, "layer: expected a module of the model"),
        (lambda: collect(model, model.body, [X]), TypeError, "layer: expected an nn.Linear, got Sequential"),
        (lambda: collect(model, model.fc, []), ValueError, "loader: expected at least one batch"),
        (lambda: collect(model, model.fc, [(X, X, X)]), TypeError, "loader: expected batches of inputs"),
        (lambda: collect(model, model.fc, [X[:, :3]]), RuntimeError, "shapes"),
        (
            lambda: collect(sequence, sequence[0], [X[None]]),
            ValueError,
            r"layer: expected inputs of shape \(B, D\), got \(1,",
        ),
    ]:
        with pytest.raises(error, match=message):  # type: ignore[arg-type]
            call()
        assert not model.fc._forward_pre_hooks
        assert model.training
