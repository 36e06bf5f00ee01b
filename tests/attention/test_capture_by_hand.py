"""capture_attention on attention that is written by hand, and on softmaxes that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xai_fast as xf
from tests.attention.capture_checks import (
    CLOSE,
    Grouped,
    assert_identical,
    assert_streams,
    captured,
    held_bytes,
    leaves_nothing,
)
from tests.attention.models import FOLDED, PROBABILITIES_ONLY, WRITTEN, Written

# Written by hand


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRITTEN)
def test_written_by_hand(name: str, grad_mode: Any) -> None:
    model, x = Written(name), torch.randn(2, 6, 32)
    keep = torch.rand(6, 6) > 0.4
    keep.fill_diagonal_(True)
    options = {"num_heads": 4} if name in FOLDED else {}
    with grad_mode():
        plain = model(x, keep)
        with leaves_nothing(model), xf.capture_attention(model, **options) as record:
            assert_identical(plain, model(x, keep))

    kind = "probabilities" if name in PROBABILITIES_ONLY else "sdpa" if "sdpa" in name else "matmul"
    assert [layer.kind for layer in record.layers] == [kind, kind]
    for ours, wanted in zip(record.attentions(), model.expected_attentions(x, keep), strict=True):
        torch.testing.assert_close(ours, wanted.float(), **CLOSE)
    assert_streams(record)


def test_folded_heads_count_as_batch_unless_told() -> None:
    model, x, keep = Written("bmm_folded_heads"), torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool)
    record = captured(model, x, keep)
    assert [layer.shape for layer in record.layers] == [(8, 1, 6, 6)] * 2
    with xf.capture_attention(model, num_heads=3) as record:
        model(x, keep)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the 8 matrices of layer 0, got 3"):
        record.rollout()
    with pytest.raises(ValueError, match="num_heads: "):
        record.attentions()


@pytest.mark.parametrize("way", ["enable_gqa", "five dimensions", "einsum", "repeated"])
def test_grouped_query_attention(way: str) -> None:
    q, k = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 5, 8)
    record = captured(Grouped(way), q, k)
    wanted = xf.ops.attention_probabilities(q.double(), k.double(), is_causal=True).float()
    torch.testing.assert_close(record.attentions()[0], wanted, **CLOSE)
    assert record.layers[0].query_key()[1].shape[1] == (4 if way == "repeated" else 2)
    mask = 0 if way == "enable_gqa" else 5 * 5
    assert held_bytes(record) == (q.numel() + k.numel() * (2 if way == "repeated" else 1)) * 4 + mask
    assert_streams(record)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 3, 2, 5, 8)])
def test_dimension_0_is_the_batch_and_the_rest_are_heads(shape: tuple[int, ...]) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(shape)
    record = captured(Plain(), x)
    batch = shape[0] if len(shape) > 2 else 1
    assert record.layers[0].shape == (batch, math.prod(shape[1:-2]), 5, 5)
    wanted = (x.double() @ x.double().mT / math.sqrt(8)).softmax(-1).float()
    torch.testing.assert_close(record.attentions()[0].reshape(wanted.shape), wanted, **CLOSE)
    assert_streams(record)


# What is not attention


class Softmaxes(nn.Module):
    """Every softmax here is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.experts = nn.Linear(8, 4)
        self.codes = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        pooled = x.mean(1)
        router = self.experts(x).softmax(-1)
        mixed = (router[..., None] * x.unsqueeze(2)).sum(2)
        codes = (x @ self.codes.T).softmax(-1) @ self.codes
        codes = codes + torch.einsum("bnc,cd->bnd", (x @ self.codes.T).softmax(-1), self.codes)
        contrastive = (pooled @ pooled.T).softmax(-1) @ pooled
        channels = x.softmax(1) @ torch.ones(2, 8, 8)
        return self.head(pooled).softmax(-1), mixed, codes, contrastive, channels, F.log_softmax(x, -1)


def test_other_softmaxes_are_not_recorded() -> None:
    model = Softmaxes()
    record = captured(model, torch.randn(2, 5, 8))
    assert record.layers == ()
    with pytest.raises(ValueError, match=r"no attention was captured: looked for .*flash_attention_2"):
        record.rollout()
    with pytest.raises(ValueError, match="no attention was captured"):
        record.attentions()


def test_no_forward_pass() -> None:
    with xf.capture_attention(nn.Linear(2, 2)) as record:
        pass
    assert record.passes == record.layers == ()
    with pytest.raises(ValueError, match="was the model run inside the context"):
        record.rollout()
