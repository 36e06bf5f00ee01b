"""Small ReLU networks and images whose explanations the tests attack."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from xai_fast.metrics.explainers import (
    gradient_explanation,
)
from xai_fast.metrics.robustness import AttackResult, attack_explanation

SIZE = 16
EPSILON = 0.05
METHODS = ("random", "top_k", "mass_centre", "target")


def cnn(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = (
        *(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 49, classes)),
    )
    return nn.Sequential(*layers).double().eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    sizes = 2 * SIZE * SIZE, 128, 128, 4
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1]).double().eval()


def images(batch: int = 4) -> Tensor:
    return torch.rand(batch, 2, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def corner() -> Tensor:
    region = torch.zeros(SIZE, SIZE)
    region[:5, :5] = 1.0
    return region


def mass_in_corner(maps: Tensor) -> Tensor:
    mass = maps.abs().reshape(len(maps), -1, SIZE, SIZE).sum(1)
    return (mass * corner()).sum((1, 2)) / mass.sum((1, 2))


def attack(model: nn.Module, x: Tensor, explanation: Any = None, **options: Any) -> AttackResult:
    if options.get("method") == "target" or options.get("measure") == "target":
        options.setdefault("target_map", corner())
    explanation = gradient_explanation(model, magnitude=True) if explanation is None else explanation
    options = {"epsilon": EPSILON, "steps": 20, "n_candidates": 20, "softplus_beta": 50.0, "k": 25, **options}
    return attack_explanation(explanation, model, x, **options)
