"""A small study that the tests of `run_study` share: its data, explainers and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.metrics.models import classifier
from xai_fast import metrics
from xai_fast.metrics.study import Seeded, Study, run_study

B, F, C = 6, 8, 3
LEVELS = (0.25, 0.75)


def data() -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, F, generator=generator, dtype=torch.float64)
    return classifier(F, C), x, torch.randint(C, (B,), generator=generator)


def gradient(inputs: Tensor, target: Tensor) -> Tensor:
    return metrics.gradient_times_input(classifier(F, C)).maps(inputs, target)


def noise(inputs: Tensor, target: Tensor) -> Tensor:
    return torch.randn_like(inputs)


def trained(seed: int) -> Callable[..., Tensor]:
    weight = torch.randn(F, dtype=torch.float64)
    return lambda inputs: inputs * weight


def explainers() -> dict[str, Any]:
    return {"gradient": gradient, "noise": noise, "trained": Seeded(trained)}


def study(**options: Any) -> Study:
    forward, x, labels = data()
    options = {"seeds": (0, 7), "sparsity": LEVELS, "masks": x > 0, "seed": 5, "batch_size": 4, **options}
    return run_study(options.pop("explainers", explainers()), forward, x, labels, **options)


def same(a: Study, b: Study) -> bool:
    return list(a.values) == list(b.values) and all(
        v.shape == b.values[k].shape and v.numpy().tobytes() == b.values[k].numpy().tobytes() for k, v in a.values.items()
    )
