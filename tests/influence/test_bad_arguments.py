"""Arguments of Influence, heads and collect_features: named where they are wrong; unusual ones that are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.influence.problems import labelled, random_head
from xai_fast.influence import Head, Influence, LinearHead, LogisticHead, SmoothHingeHead, SoftmaxHead, collect_features

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["linear", "logistic", "poisson", "smooth_hinge", "softmax"])
def test_16_bit_labels_and_weights(family: str) -> None:
    head, y = random_head(family, 3), labelled(family, 12).bfloat16()
    weights = torch.arange(1.0, 13.0)
    found = Influence(head, X, y, sample_weight=weights.bfloat16()).scores(X, y)
    torch.testing.assert_close(found, Influence(head, X, y.double(), sample_weight=weights).scores(X, y.double()))


@pytest.mark.parametrize("kind", [LogisticHead, SmoothHingeHead])
@pytest.mark.parametrize(("bad", "shown"), [(None, "None"), ("a", "'a'"), ([1], r"\[1\]")])
def test_labels_of_other_kinds_are_named(kind: Any, bad: Any, shown: str) -> None:
    labels = np.array([0, 1] * 6, dtype=object)
    labels[4] = bad
    with pytest.raises(ValueError, match=f"^y_train: expected one of 0, 1, got {shown} in row 4$"):
        Influence(kind(torch.zeros(3)), X, labels)


def test_complex_labels_are_refused() -> None:
    with pytest.raises(TypeError, match="y_train: expected real numbers, got complex128"):
        Influence(LinearHead(torch.zeros(3)), X, np.ones(12) * (1 + 1j))


def test_labels_that_are_missing() -> None:
    for rows in (X, X.numpy()):
        with pytest.raises(TypeError, match=r"y_train \(the labels\) beside it, got \w+ \(12, 3\) without y_train"):
            Influence(LinearHead(torch.zeros(3)), rows)


# ---- numbers ------------------------------------------------------------------------------------------------------------


def test_v_is_named_where_it_is_not_finite() -> None:
    influence = Influence(LinearHead(torch.zeros(3)), X, torch.zeros(12))
    for call in (influence.inverse_hvp, influence.scores_of):
        with pytest.raises(ValueError, match=r"^v: expected finite numbers, got NaN or infinity"):
            call(torch.tensor([1.0, torch.nan, 1.0]))


def test_another_byte_order() -> None:
    theta, v = np.arange(3.0), np.arange(3.0, 6.0)
    swapped = Influence(LinearHead(theta.astype(">f8"), bias=np.ones(1, ">f4")), X, torch.zeros(12))
    native = Influence(LinearHead(theta, bias=np.ones(1)), X, torch.zeros(12))
    v = np.append(v, 1.0)
    torch.testing.assert_close(swapped.inverse_hvp(v.astype(">f8")).x, native.inverse_hvp(v).x)


def test_a_tolerance_that_everything_meets_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"tolerance: expected a number below 1, got 2\.0"):
        Influence(LinearHead(torch.zeros(3)), X, torch.zeros(12), tolerance=2.0)


# ---- scikit-learn -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("l1_ratios", [None, (0.0,)])
def test_cross_validated_logistic_regression(l1_ratios: Any) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    options = {} if l1_ratios is None else {"l1_ratios": l1_ratios, "solver": "saga"}
    y = labelled("softmax", 12)
    for labels, kind in ((y, SoftmaxHead), (y > 0, LogisticHead)):
        try:
            estimator = linear_model.LogisticRegressionCV(cv=2, Cs=[0.1], **options).fit(X.numpy(), labels.numpy())
        except (TypeError, ValueError) as error:  # options that this version does not have
            pytest.skip(str(error))
        head = Head.from_sklearn(estimator, n=12)
        assert isinstance(head, kind)
        assert head.l2 == pytest.approx(10 / 12)


@pytest.mark.parametrize(
    ("n", "kind", "got"), [(0, ValueError, "0"), (-1, ValueError, "-1"), (2.5, TypeError, "float"), ("a", TypeError, "str")]
)
def test_the_number_of_rows_of_an_estimator(n: Any, kind: Any, got: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    with pytest.raises(kind, match=f"^n: expected a whole number.* got {got}$"):
        Head.from_sklearn(linear_model.Ridge().fit(np.eye(3), np.ones(3)), n=n)


# ---- features -----------------------------------------------------------------------------------------------------------


def test_features_of_what_is_no_loader_or_model() -> None:
    layer = nn.Linear(3, 2)
    model, rows = nn.Sequential(layer), torch.ones(4, 3)
    for arguments, kind, message in (
        (("model", layer, [rows]), TypeError, "model: expected a torch.nn.Module, got str"),
        ((model, layer, None), TypeError, "loader: expected an iterable of batches, got NoneType"),
        ((model, layer, [(np.ones((4, 3)), torch.ones(4))]), TypeError, "loader: expected tensors as inputs, got ndarray"),
        (
            (model, layer, [(rows, torch.ones(3))]),
            ValueError,
            r"loader: expected one target for each of the 4 rows .* \(3,\)",
        ),
        ((model, layer, [(rows, 1)]), ValueError, r"loader: expected one target for each of the 4 rows .* \(\)"),
    ):
        with pytest.raises(kind, match=message):
            collect_features(*arguments)
