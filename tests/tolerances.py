"""How far a kernel may be from the float64 reference: one definition for every test.

A result is right if its error is at most twice the error of the same-precision PyTorch code plus a few rounding steps of
the output, both measured against float64 and relative to the largest entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A few units of rounding of each output dtype, relative to the largest entry of the result.
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def assert_close_to_reference(actual: Tensor, exact: Tensor, same_precision: Tensor | None = None) -> None:
    """``exact`` is the float64 reference; ``same_precision`` the reference run in the dtype under test."""
    assert actual.shape == exact.shape
    exact = exact.double()
    scale = exact.abs().max().clamp_min(1e-30) if exact.numel() else torch.tensor(1.0)
    allowed = ROUNDING[actual.dtype]
    if same_precision is not None and exact.numel():
        allowed += 2 * float((same_precision.double() - exact).abs().max() / scale)
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN in different places"
    error = float(((actual.double() - exact).abs().nan_to_num() / scale).max()) if exact.numel() else 0.0
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
