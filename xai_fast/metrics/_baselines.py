"""What takes the place of a removed feature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._copies import unshared
from ..ops import _checks as check
from ._forwards import draw_seed

__all__ = ["BASELINES", "make_baseline"]

Baseline = str | float | Tensor | Callable[[Tensor], Tensor]

# Standard deviation of the blur as a share of the shorter side of an image, and the standard deviations it reaches.
BLUR_SHARE, BLUR_REACH = 0.05, 3


def make_baseline(baseline: Baseline, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """A tensor of the dtype of `inputs` (B, ...) that broadcasts to their shape."""
    if isinstance(baseline, str):
        if baseline not in BASELINES:
            raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}, a number or a tensor, got {baseline!r}")
        if baseline != "zero" and not inputs.is_floating_point():
            raise TypeError(f"baseline: expected a number or a tensor for inputs of {inputs.dtype}, got {baseline!r}")
        return BASELINES[baseline](inputs, generator)
    if callable(baseline):
        baseline = baseline(unshared(inputs))
    number = check.as_number(baseline)
    _check_finite(number)
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return _number(number, inputs)
    return _given(baseline, inputs)


def _number(number: float, inputs: Tensor) -> Tensor:
    """The number itself, or ValueError where the dtype of the inputs would make it another; floating inputs may round it."""
    try:
        filler = inputs.new_full((1,) * inputs.dim(), number)
        held = filler.item()
    except (RuntimeError, ValueError, OverflowError):  # out of range
        held = math.inf
    if not math.isfinite(held) or (held != number and not inputs.is_floating_point()):
        raise ValueError(f"baseline: expected a number that {inputs.dtype}, the dtype of inputs, can hold, got {number!r}")
    return filler


def _check_finite(baseline: Any) -> None:
    bad = ~baseline.isfinite() if isinstance(baseline, Tensor) else None
    if bad is not None and bool(bad.any()):
        raise ValueError(f"baseline: expected finite values, got {baseline[bad][0].item()}")
    if isinstance(baseline, float) and not math.isfinite(baseline):
        raise ValueError(f"baseline: expected a finite number, got {baseline}")


def _given(baseline: Any, inputs: Tensor) -> Tensor:
    if not isinstance(baseline, Tensor):
        raise TypeError(f"baseline: expected a name, a number, a tensor or a callable, got {type(baseline).__name__}")
    if torch.promote_types(baseline.dtype, inputs.dtype) != inputs.dtype:
        raise TypeError(f"baseline: expected dtype {inputs.dtype}, as inputs, got {baseline.dtype}")
    baseline = baseline.detach().to(device=inputs.device, dtype=inputs.dtype)
    try:
        baseline.expand(inputs.shape)
    except RuntimeError:
        wanted, got = check.shape_of(inputs), check.shape_of(baseline)
        raise ValueError(f"baseline: expected a shape that broadcasts to {wanted}, got {got}") from None
    return baseline.reshape((1,) * (inputs.dim() - baseline.dim()) + tuple(baseline.shape))


def _zero(inputs: Tensor, generator: torch.Generator | None) -> Tensor:
    return inputs.new_zeros((1,) * inputs.dim())


def _mean(inputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Images (B,C,H,W): the mean colour of each; all else: the mean sample of the batch."""
    wide = inputs.double()
    return (wide.mean((2, 3), keepdim=True) if inputs.dim() == 4 else wide.mean(0, keepdim=True)).to(inputs.dtype)


def _uniform(inputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise between the smallest and the largest value of each sample, the same on every device for a seed."""
    flat = inputs.flatten(1)
    low, high = (v.view(-1, *(1,) * (inputs.dim() - 1)) for v in (flat.amin(1), flat.amax(1)))
    number = torch.arange(len(inputs), device=inputs.device)
    still = torch.zeros_like(inputs)
    noise = ops.perturb(
        still, sample=number, draw=torch.zeros_like(number), radius=1, ball="linf", seed=draw_seed(generator)
    )
    return low + (high - low) * (noise + 1) / 2


def _blur(inputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gaussian blur of images, with mirrored borders."""
    if inputs.dim() != 4:
        raise ValueError(f"baseline: expected images (B, C, H, W) for 'blur', got {check.shape_of(inputs)}")
    height, width = inputs.shape[2:]
    sigma = max(BLUR_SHARE * min(height, width), 0.5)
    x = inputs.to(torch.float64 if inputs.dtype == torch.float64 else torch.float32)
    for side, dim in ((height, 2), (width, 3)):
        reach = min(int(BLUR_REACH * sigma + 0.5), side - 1)
        offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
        weights = (-0.5 * (offsets / sigma) ** 2).exp()
        kernel = (weights / weights.sum()).view(*((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)))
        padding = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        padded = F.pad(x, padding, mode="reflect") if reach else x
        x = F.conv2d(padded.flatten(0, 1)[:, None], kernel)[:, 0].view(x.shape)
    return x.to(inputs.dtype)


BASELINES: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "zero": _zero,
    "mean": _mean,
    "blur": _blur,
    "uniform": _uniform,
}
