"""Influence against captum and statsmodels; prints differences as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from xai_fast.influence import Head, Influence
from xai_fast.influence.glm import GlmProblem


def relative(found: Any, expected: Any) -> float:
    a, b = (torch.as_tensor(x).as_subclass(Tensor).double() for x in (found, expected))
    return float((a - b).norm() / b.norm())


def fitted(classes: int) -> tuple[Head, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 3))
    y = (X @ rng.normal(size=(3, classes)) + 2 * rng.gumbel(size=(80, classes))).argmax(1)
    estimator = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(X, y)
    return Head.from_sklearn(estimator), X, y


def captum() -> dict[str, float]:
    """+g_test^T H^-1 g_train with the Hessian of the summed loss and no ridge: minus our scores, over n."""
    from captum.influence import NaiveInfluenceFunction

    found = {}
    for classes in (2, 4):
        head, X, y = fitted(classes)
        rows, labels = torch.from_numpy(X), torch.from_numpy(y)
        binary = classes == 2
        model = nn.Linear(3, head.outputs).double()
        with torch.no_grad():
            model.weight.copy_(head.parameters[:-1].T)
            model.bias.copy_(head.parameters[-1])
        loss = nn.BCEWithLogitsLoss(reduction="sum") if binary else nn.CrossEntropyLoss(reduction="sum")
        targets = labels.double()[:, None] if binary else labels
        data = torch.utils.data.TensorDataset(rows, targets)
        peer = NaiveInfluenceFunction(
            model, data, "unused", checkpoints_load_func=lambda *_: 0.0, loss_fn=loss, batch_size=20, projection_dim=None,
            sample_wise_grads_per_batch=True, hessian_reg=1e-9,
        )  # fmt: skip
        expected = peer.influence((rows[:7], targets[:7]))
        ours = Influence(head, X, y, damping=1e-9 / 80).scores(X[:7], y[:7])
        found[head.family] = relative(ours / -80, expected)
    return found


def statsmodels() -> dict[str, float]:
    """Hessians of Logit and MNLogit, and the influence of GLM: one-step changes of the coefficients without a row."""
    import statsmodels.api as sm

    found = {}
    head, X, y = fitted(2)
    exog = np.hstack([X, np.ones((80, 1))])
    params = head.parameters[:, 0].numpy()
    H = GlmProblem(X, y, head).dense()
    found["logit"] = relative(H, -sm.Logit(y, exog).hessian(params) / 80)
    result = sm.GLM(y, exog, family=sm.families.Binomial()).fit(tol=1e-14)
    change = result.params - result.get_influence(observed=False).params_one
    newton = Influence(head, X, y).loo(X[:9], y[:9])
    delta = exog[:9] * np.array(1 / (1 + np.exp(-exog[:9] @ params)) - y[:9])[:, None]
    # Their sign: fitted minus without the row.
    found["one-step change"] = relative(newton, -delta @ change.T)
    head, X, y = fitted(4)
    theta = head.parameters - head.parameters[:, :1]  # their first class is the reference
    H = GlmProblem(X, y, head).dense().view(4, 4, 4, 4)[:, 1:, :, 1:]  # (P,C,P,C)
    theirs = -sm.MNLogit(y, exog).hessian(theta[:, 1:].numpy()) / 80  # parameters class after class
    found["mnlogit"] = relative(H.permute(1, 0, 3, 2).reshape(12, 12), theirs)
    return found


if __name__ == "__main__":
    print(json.dumps({"captum": captum, "statsmodels": statsmodels}[sys.argv[1]]()))
