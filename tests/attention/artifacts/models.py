"""Small encoders of every kind, with the inputs they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.attention import models

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}


def dinov2() -> tuple[nn.Module, torch.Tensor]:
    """17 tokens."""
    t = pytest.importorskip("transformers")
    return t.Dinov2Model(t.Dinov2Config(**SHAPE)).eval(), torch.randn(2, 3, 28, 28)


def with_registers() -> tuple[nn.Module, torch.Tensor]:
    """21 tokens: [CLS], 4 registers, 16 patches."""
    t = pytest.importorskip("transformers")
    config = t.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=4)
    return t.Dinov2WithRegistersModel(config).eval(), torch.randn(2, 3, 28, 28)


def vit() -> tuple[nn.Module, torch.Tensor]:
    t = pytest.importorskip("transformers")
    return t.ViTModel(t.ViTConfig(**SHAPE, intermediate_size=64)).eval(), torch.randn(2, 3, 28, 28)


def classifier() -> tuple[nn.Module, torch.Tensor]:
    t = pytest.importorskip("transformers")
    model = t.ViTForImageClassification(t.ViTConfig(**SHAPE, intermediate_size=64, num_labels=5))
    return model.eval(), torch.randn(2, 3, 28, 28)


def bert() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = models.bert("sdpa")
    return model.eval(), inputs


def encoder(batch_first: bool = True) -> nn.TransformerEncoder:
    """torch.nn's, 2 layers of width 16 and 24 neurons."""
    layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=24, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=batch_first).eval()


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
