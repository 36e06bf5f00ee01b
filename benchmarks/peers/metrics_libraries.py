"""Measures of explanations by other libraries. They are installed outside site-packages by `make bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .imports import importable

__all__ = [
    "captum_infidelity",
    "captum_sensitivity_max",
    "quantus_complexity",
    "quantus_pixel_flipping",
    "quantus_sensitivity",
]


def captum_sensitivity_max(*arguments: Any, **options: Any) -> Tensor:
    with importable(quiet=True):
        from captum.metrics import sensitivity_max

        return sensitivity_max(*arguments, **options)


def captum_infidelity(*arguments: Any, **options: Any) -> Tensor:
    with importable(quiet=True):
        from captum.metrics import infidelity

        return infidelity(*arguments, **options)


def quantus_sensitivity(
    model: nn.Module, x: Tensor, target: Tensor, explain: Callable[[Tensor, Tensor], Tensor], radius: float, samples: int
) -> Tensor:
    def explain_func(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> Any:
        return explain(torch.as_tensor(inputs), torch.as_tensor(targets)).numpy()

    with importable(quiet=True):
        import quantus

        metric = quantus.MaxSensitivity(
            nr_samples=samples, lower_bound=radius, disable_warnings=True, return_nan_when_prediction_changes=False
        )
        values = metric(model=model, x_batch=x.numpy(), y_batch=target.numpy(), explain_func=explain_func)
    return torch.tensor(np.asarray(values))


def quantus_pixel_flipping(model: nn.Module, x: Tensor, target: Tensor, maps: Tensor, step: int) -> Tensor:
    """(B, steps): the output after each step; a removed entry gets its sample's smallest value."""
    with importable(quiet=True):
        import quantus

        metric = quantus.PixelFlipping(features_in_step=step, disable_warnings=True, normalise=False)
        values = metric(model=model, x_batch=x.numpy(), y_batch=target.numpy(), a_batch=maps.numpy(), softmax=True)
    return torch.tensor(np.asarray(values))


def quantus_complexity(x: Tensor, maps: Tensor, model: nn.Module) -> Tensor:
    """(B, 2): entropy and Gini index."""
    target = np.zeros(len(x), dtype=int)
    with importable(quiet=True):
        import quantus

        metrics = [quantus.Complexity, quantus.Sparseness]
        values = [
            m(disable_warnings=True, abs=True, normalise=False)(
                model=model, x_batch=x.numpy(), y_batch=target, a_batch=maps.numpy()
            )
            for m in metrics
        ]
    return torch.tensor(np.asarray(values)).T
