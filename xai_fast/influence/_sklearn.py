"""Parameters and penalty of fitted scikit-learn estimators, read without importing scikit-learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._penalty import Penalty

__all__ = ["Fitted", "read_estimator"]


@dataclass(frozen=True)
class Fitted:
    """What a head needs: theta (D,) or (D,C), bias or None, the labels of the outputs or None."""

    family: str
    theta: np.ndarray[Any, Any]
    bias: Any
    penalty: Penalty
    classes: list[Any] | None = None


def read_estimator(estimator: Any) -> Fitted:
    """See :meth:`Head.from_sklearn`."""
    readers = {
        "LogisticRegression": _logistic, "LinearRegression": _least_squares, "Ridge": _least_squares,
        "PoissonRegressor": _poisson, "SGDClassifier": _stochastic,
    }  # fmt: skip
    bases = [base for base in type(estimator).__mro__ if base.__module__.startswith("sklearn.")]
    reader = next((readers[base.__name__] for base in bases if base.__name__ in readers), None)
    if reader is None:
        raise TypeError(f"estimator: expected one of {', '.join(readers)}, got {type(estimator).__name__}")
    if not hasattr(estimator, "coef_"):
        raise ValueError(f"estimator: expected a fitted {type(estimator).__name__}, got one without coef_")
    return reader(estimator)


def _refuse(estimator: Any, wanted: str, got: str) -> ValueError:
    return ValueError(f"estimator: expected {type(estimator).__name__} {wanted}, got {got}")


def _bias(estimator: Any) -> Any:
    return np.atleast_1d(estimator.intercept_) if estimator.fit_intercept else None


def _classifier(estimator: Any, penalty: Penalty) -> Fitted:
    if estimator.class_weight is not None:
        advice = "without class_weight (fit with sample_weight instead and give the same to Influence)"
        raise _refuse(estimator, advice, f"class_weight={estimator.class_weight!r}")
    coef = estimator.coef_
    family, theta = ("logistic", coef[0]) if coef.shape[0] == 1 else ("softmax", coef.T)
    return Fitted(family, theta, _bias(estimator), penalty, estimator.classes_.tolist())


def _logistic(estimator: Any) -> Fitted:
    if estimator.solver == "liblinear" and estimator.fit_intercept:
        raise _refuse(estimator, "with a free intercept", "solver='liblinear', which penalises it")
    if getattr(estimator, "multi_class", "auto") not in ("auto", "deprecated", "multinomial"):
        raise _refuse(estimator, "with one softmax over the classes", f"multi_class={estimator.multi_class!r}")
    if getattr(estimator, "multi_class", "") == "multinomial" and len(estimator.classes_) == 2:
        raise _refuse(estimator, "with one logistic output for two classes", "multi_class='multinomial'")
    C = np.unique(estimator.C_ if hasattr(estimator, "C_") else estimator.C)  # C_: chosen by LogisticRegressionCV
    if len(C) != 1:
        raise _refuse(estimator, "with one C for all classes", f"{C.tolist()}")
    return _classifier(estimator, _logistic_penalty(estimator, float(C[0])))


def _logistic_penalty(estimator: Any, C: float) -> Penalty:
    # `penalty` gives way to C = inf and l1_ratio in scikit-learn 1.8.
    kind = getattr(estimator, "penalty", "deprecated")
    if kind is None or math.isinf(C):
        return Penalty(0.0)
    ratio = getattr(estimator, "l1_ratio_", getattr(estimator, "l1_ratio", None))
    # LogisticRegressionCV keeps one for each class, [None] where none was asked for.
    ratios = (
        []
        if kind == "l2"
        else [float(found) for found in np.ravel(np.array(ratio, dtype=object)).tolist() if found is not None]
    )
    share = max(ratios, default=0.0)
    if kind not in ("l2", "deprecated") or share:
        raise _refuse(estimator, "with an l2 penalty or none", f"penalty={kind!r}, l1_ratio={share:g}")
    return Penalty(1.0 / C, "sum")


def _least_squares(estimator: Any) -> Fitted:
    coef = np.asarray(estimator.coef_)
    if coef.ndim == 2 and coef.shape[0] == 1:
        coef = coef[0]
    if coef.ndim != 1:
        raise _refuse(estimator, "with one target", f"{coef.shape[0]} targets")
    if estimator.positive:
        raise _refuse(estimator, "without constraints", "positive=True")
    alpha = np.unique(getattr(estimator, "alpha", 0.0))
    if len(alpha) != 1:
        raise _refuse(estimator, "with one alpha", f"{alpha.tolist()}")
    # ||y - X w||^2 + alpha ||w||^2, half of it in our terms.
    return Fitted("linear", coef, _bias(estimator), Penalty(float(alpha[0]), "sum"))


def _poisson(estimator: Any) -> Fitted:
    return Fitted("poisson", estimator.coef_, _bias(estimator), Penalty(float(estimator.alpha), "average"))


def _stochastic(estimator: Any) -> Fitted:
    if estimator.loss != "log_loss":
        raise _refuse(estimator, "with loss='log_loss'", f"loss={estimator.loss!r}")
    if estimator.penalty not in ("l2", None):
        raise _refuse(estimator, "with an l2 penalty or none", f"penalty={estimator.penalty!r}")
    if len(estimator.classes_) > 2:
        raise _refuse(estimator, "of two classes (more are separate models)", f"{len(estimator.classes_)} classes")
    return _classifier(estimator, Penalty(float(estimator.alpha) if estimator.penalty else 0.0))
