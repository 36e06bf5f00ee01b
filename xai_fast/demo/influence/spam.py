"""The mails behind one decision of a spam filter, and whether the prediction of what they change comes true."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast import influence
from xai_fast._optional import optional_import

from ..datasets import Mail
from .two_models import Certificate

__all__ = ["Removal", "Spam", "embed", "explain_spam"]

TOKENS = 128
# Inverse strength of scikit-learn's penalty, on embeddings of length 1.
C = 10.0
# The decision to explain is the correct one with the probability of its class nearest to this: sure, but not beyond doubt.
SURE = 0.75
# Mails in a group that is removed together.
GROUP = 10


@dataclass(frozen=True)
class Removal:
    """Mails removed together: change of the loss, predicted and retrained; probability of the right class after."""

    what: str
    rows: list[int]
    predicted: float
    actual: float
    probability: float


@dataclass(frozen=True)
class Spam:
    """One decision.

    Attributes
    ----------
    train : list of Mail
    test : Mail
        The decision that is explained.
    test_accuracy : float
    tests : int
    probability : float
        Of spam, for `test`.
    scores : Tensor, shape (n,)
        I_up,loss of every training mail.
    helpful, harmful : list of int
        Training mails, the most extreme first.
    alone : list of Removal
        One mail each.
    groups : list of Removal
    correlation : float
        Between predicted and actual changes of `alone`.
    certificate : Certificate
    """

    train: list[Mail]
    test: Mail
    test_accuracy: float
    tests: int
    probability: float
    scores: Tensor
    helpful: list[int]
    harmful: list[int]
    alone: list[Removal]
    groups: list[Removal]
    correlation: float
    certificate: Certificate


@torch.no_grad()
def embed(
    backbone: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch: int = 32,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """Normalised mean embeddings of the first 128 tokens.

    Parameters
    ----------
    backbone, tokenizer
        From `xai_fast.demo.models.intents.load_minilm`.
    texts : sequence of str
    batch : int
    tick : callable
        Called after each batch.

    Returns
    -------
    Tensor, shape (len(texts), 384)

    Examples
    --------
    >>> embed(*load_minilm(), ["Hello"]).shape  # doctest: +SKIP
    torch.Size([1, 384])
    """
    device = next(backbone.parameters()).device
    found = []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        tokens = tokenizer(part, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt").to(device)
        states = backbone(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None].to(states.dtype)
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        tick()
    return torch.cat(found)


def explain_spam(
    mails: Sequence[Mail],
    features: Tensor,
    *,
    tests: int,
    alone: int,
    tick: Callable[[], object] = lambda: None,
) -> Spam:
    """Fit scikit-learn's logistic regression, explain one decision, and retrain without some mails.

    Parameters
    ----------
    mails : sequence of Mail
        The last `tests` are for testing.
    features : Tensor, shape (len(mails), D)
    tests : int
    alone : int
        Mails that are left out one at a time, a third each of the most helpful, the most harmful, and at random.
    tick : callable
        Called after each retraining, alone + 3 times.

    Examples
    --------
    >>> explain_spam(mails, features, tests=200, alone=30)  # doctest: +SKIP
    """
    X, y = features.double().numpy(), np.array([int(mail.is_spam) for mail in mails])
    n = len(mails) - tests
    model = _fitted(X[:n], y[:n])
    probabilities = model.predict_proba(X[n:])[:, 1]
    correct = (probabilities > 0.5) == y[n:]
    right = np.where(y[n:] == 1, probabilities, 1 - probabilities)
    test = n + int(np.where(correct, np.abs(right - SURE), np.inf).argmin())

    start = time.perf_counter()
    influences = influence.Influence(influence.Head.from_sklearn(model), X[:n], y[:n])
    scored = influences.scores(X[test : test + 1], y[test : test + 1])
    seconds = time.perf_counter() - start
    assert scored.solution is not None
    scores = scored.as_subclass(Tensor)[0]
    order = scores.argsort().tolist()
    leave_out = influences.loo(X[test : test + 1], y[test : test + 1]).as_subclass(Tensor)[0].tolist()

    def removal(what: str, rows: list[int]) -> Removal:
        found = _removed(what, rows, leave_out, X[:n], y[:n], X[test], y[test], float(right[test - n]))
        tick()
        return found

    third = alone // 3
    generator = torch.Generator().manual_seed(0)
    random = [i for i in torch.randperm(n, generator=generator).tolist() if i not in {*order[:third], *order[-third:]}]
    single = [*order[:third], *order[-third:], *random[: alone - 2 * third]]
    removals = [removal(mails[row].subject, [row]) for row in single]
    pairs = np.array([(item.predicted, item.actual) for item in removals])
    return Spam(
        train=list(mails[:n]),
        test=mails[test],
        test_accuracy=float(correct.mean()),
        tests=tests,
        probability=float(probabilities[test - n]),
        scores=scores,
        helpful=order[:GROUP],
        harmful=order[::-1][:GROUP],
        alone=removals,
        groups=[
            removal(f"the {GROUP} most helpful", order[:GROUP]),
            removal(f"the {GROUP} most harmful", order[-GROUP:]),
            removal(f"{GROUP} at random", random[:GROUP]),
        ],
        correlation=float(np.corrcoef(pairs.T)[0, 1]),
        certificate=Certificate.of("Spam: 1 test gradient", scored.solution, X.shape[1] + 1, seconds),
    )


def _fitted(X: np.ndarray, y: np.ndarray) -> Any:
    linear = optional_import("sklearn.linear_model", "demo")
    return linear.LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(X, y)


def _removed(
    what: str,
    rows: list[int],
    leave_out: Sequence[float],
    X: np.ndarray,
    y: np.ndarray,
    x_test: np.ndarray,
    y_test: int,
    right: float,
) -> Removal:
    """Retrain without some rows, with the same C: the sum of the others' losses against the same penalty."""
    kept = np.setdiff1d(np.arange(len(y)), rows)
    probability = float(_fitted(X[kept], y[kept]).predict_proba(x_test[None])[0, y_test])
    predicted = sum(leave_out[row] for row in rows)
    return Removal(what, rows, predicted, float(np.log(right) - np.log(probability)), probability)
