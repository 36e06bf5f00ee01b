"""Concept activation vectors by other libraries: Captum's classifier and its TCAV, scikit-learn's linear models."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .imports import importable

__all__ = ["captum_classifier", "captum_tcav", "sklearn_cav"]

SKLEARN = {
    "RidgeClassifier": lambda: RidgeClassifier(),
    "LogisticRegression": lambda: LogisticRegression(max_iter=1000),
    # The settings of Captum's default classifier.
    "SGDClassifier": lambda: SGDClassifier(alpha=0.01, max_iter=1000, tol=1e-3, random_state=0),
}


def captum_classifier(positive: Tensor, negative: Tensor) -> tuple[Tensor, float]:
    """(unit vector, held-out accuracy) of Captum's default classifier."""
    x, y = torch.cat([positive, negative]), torch.cat([torch.zeros(len(positive)), torch.ones(len(negative))]).long()
    with importable():
        from captum.concept._utils.classifier import DefaultClassifier

        random.seed(0)
        classifier = DefaultClassifier()
        stats: Any = classifier.train_and_eval(DataLoader(TensorDataset(x, y), batch_size=10))
        weights = classifier.weights()[list(classifier.classes()).index(0)]
    return weights / weights.norm(), float(stats["accs"])


def sklearn_cav(name: str, positive: Tensor, negative: Tensor) -> Tensor:
    """The unit vector of a linear model; nothing is held out."""
    x, y = torch.cat([positive, negative]).numpy(), np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    weights = torch.from_numpy(np.ravel(SKLEARN[name]().fit(x, y).coef_)).float()
    return weights / weights.norm()


def captum_tcav(
    model: nn.Module, layers: Sequence[str], inputs: Tensor, target: int, named: Sequence[Tensor], others: Sequence[Tensor]
) -> Any:
    """Captum's TCAV of each concept with each random set, nothing kept from an earlier call."""
    with importable(), tempfile.TemporaryDirectory() as folder:
        from captum.concept import TCAV, Concept

        (Path(folder) / "default_model_id").mkdir()
        sets = [Concept(i, f"set{i}", DataLoader(x, batch_size=64)) for i, x in enumerate([*named, *others])]
        pairs = [[sets[c], sets[len(named) + r]] for c in range(len(named)) for r in range(len(others))]
        return TCAV(model, list(layers), save_path=folder).interpret(inputs, pairs, target=target)
