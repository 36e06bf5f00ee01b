"""Units in which sums and squares of extreme values stay in the range of float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["power_of_two"]


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or below each magnitude, 1 for 0. Divided by it, values of that magnitude lose no digit."""
    mantissa = torch.frexp(largest).mantissa
    # 2^exponent itself may be out of range.
    return torch.where(largest > 0, largest / (2 * mantissa), 1.0)
