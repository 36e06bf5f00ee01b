"""What the tests of the relevance kernels share: the comparison with the float64 reference, and random tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.emulator.build import sanitized
from tests.implementations import Implementation
from tests.tolerances import assert_close_to_reference
from xai_fast.reference import relevance as reference

# Sanitizers look at memory, not at numbers, and are ten times slower: every code path, but not every combination.
DTYPES = [torch.float32, torch.bfloat16] if sanitized() else [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def exactly(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(implementation: Implementation, function: str, *args: Any) -> Any:
    """Calls a kernel, compares each result with the float64 reference and returns what the kernel gave."""
    actual = implementation(function, *args)
    of_reference = getattr(reference, function)
    exact, same = of_reference(*map(exactly, args)), of_reference(*args)
    single = isinstance(actual, Tensor)
    results = ((actual,), (exact,), (same,)) if single else (actual, exact, same)
    for a, e, s in zip(*results, strict=True):
        assert a.dtype == s.dtype
        assert a.is_contiguous()
        assert_close_to_reference(a, e, s)
    return actual


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def away_from_zero(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values that may be divided by without losing every digit."""
    x = torch.randn(*shape, dtype=torch.float64)
    return (x + 0.3 * x.sign()).to(dtype)
