"""The floating dtypes that the kernels take, and the type in which they add."""

from __future__ import annotations

import torch

SUPPORTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every shorter type."""
    return torch.float64 if dtype == torch.float64 else torch.float32
