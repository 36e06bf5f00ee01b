"""What the tests of capture_attention share: how a capture is checked, and models that several of them use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xai_fast as xf

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything a capture could leave behind on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (
            type(m),
            sorted(m.__dict__),
            [len(getattr(m, name)) for name in hooks],
            id(m.__dict__.get("forward")),
        )
        for m in model.modules()
    ] + [torch._C._len_torch_function_stack()]


@contextmanager
def leaves_nothing(model: nn.Module) -> Iterator[None]:
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]


def assert_identical(a: Any, b: Any) -> None:
    a, b = tensors_of(a), tensors_of(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert x.requires_grad == y.requires_grad
        assert x.stride() == y.stride()


def captured(model: nn.Module, *args: Any, seed: int = 3, **kwargs: Any) -> Any:
    """Run with and without capture, compare the outputs bit by bit, and return the record."""
    torch.manual_seed(seed)
    plain = model(*args, **kwargs)
    with leaves_nothing(model), xf.capture_attention(model) as record:
        torch.manual_seed(seed)
        assert_identical(plain, model(*args, **kwargs))
    return record


def assert_streams(record: Any, **options: Any) -> None:
    """The streamed rollout is the rollout of the materialised attention."""
    attentions = record.attentions()
    for token in (0, -1, [1, 0]):
        wanted = xf.attention_rollout(attentions, token=token, **options)
        torch.testing.assert_close(record.rollout(token, **options), wanted, rtol=1e-5, atol=1e-8)


def held_bytes(record: Any) -> int:
    """Bytes of all storages that the record keeps alive, each counted once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for p in record.passes for x in p for t in x.tensors()}
    return sum(storage.nbytes() for storage in held.values())


def valid_tokens(inputs: dict[str, Tensor], tokens: int) -> Tensor:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None else torch.ones(1, tokens, dtype=torch.bool)


def encoder_attentions(encoder: nn.TransformerEncoder, x: Tensor, **masks: Any) -> list[Tensor]:
    """Weights that torch.nn itself returns, layer by layer."""
    found = []
    for layer in encoder.layers:
        inner = layer.norm1(x) if layer.norm_first else x
        found.append(layer.self_attn(inner, inner, inner, need_weights=True, average_attn_weights=False, **masks)[1])
        x = layer(x, src_mask=masks.get("attn_mask"), src_key_padding_mask=masks.get("key_padding_mask"))
    return found


def build_encoder(norm_first: bool = False, batch_first: bool = True, nested: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, norm_first=norm_first, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


class Subclass(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src * 1.0, *args, **kwargs) * 1.0


class Grouped(nn.Module):
    """Four query heads on two key heads, in the ways that models write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if self.way == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        if self.way == "five dimensions":
            grouped, k = q.unflatten(1, (2, 2)), k.unsqueeze(2)
            return ((grouped @ k.mT * scale).masked_fill(~causal, -math.inf).softmax(-1) @ k).flatten(1, 2)
        if self.way == "einsum":
            scores = torch.einsum("bhgid,bhjd->bhgij", q.unflatten(1, (2, 2)), k) * scale
            return torch.einsum("bhgij,bhjd->bhgid", scores.where(causal, -math.inf).softmax(-1), k).flatten(1, 2)
        k = k.repeat_interleave(2, dim=1)
        return (q @ k.mT * scale).masked_fill(~causal, -math.inf).softmax(-1) @ k
