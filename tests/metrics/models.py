"""Small models and slow, literal forms of the measures, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def classifier(inputs: int, classes: int, seed: int = 0) -> nn.Module:
    """Two layers with random weights in float64."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
    return model.eval().requires_grad_(False)


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.flatten(1).to(weight.dtype) @ weight


def removed(x: Tensor, attribution: Tensor, size: int, filler: float, keep: bool) -> Tensor:
    """One sample with its `size` largest features replaced, or all but these; ties by index."""
    order = sorted(range(attribution.numel()), key=lambda i: (-float(attribution.flatten()[i]), i))
    chosen = order[size:] if keep else order[:size]
    out = x.clone().flatten()
    for i in chosen:
        out[i] = filler
    return out.view(x.shape)
