"""Copies and pickles of a record."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xai_fast as xf
from tests.attention.capture_checks import build_encoder
from tests.attention.models import Written, lengths_mask

COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["encoder", "sdpa_float_mask", "scale_on_scores", "soft_capped"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_gives_the_same_rollout(way: str, kind: str, grad_mode: Any) -> None:
    with grad_mode():
        x, model = torch.randn(2, 6, 16), build_encoder() if kind == "encoder" else Written(kind, 16, 2)
        options = {"src_key_padding_mask": ~lengths_mask(6, 4)} if kind == "encoder" else {}
        arguments = () if kind == "encoder" else (torch.ones(6, 6, dtype=torch.bool).tril(),)
        with xf.capture_attention(model) as record:
            out = model(x, *arguments, **options)
        # Before the first use, when q and k of torch.nn's modules are still to be computed.
        other = COPIES[way](record)
        assert torch.equal(other.rollout(), record.rollout())
        for ours, theirs in zip(other.attentions(), record.attentions(), strict=True):
            assert torch.equal(ours, theirs)
        assert repr(other) == repr(record)
    if grad_mode is torch.enable_grad:
        assert record.relevance(out[:, 0, 0]).shape == (2, 6)
        with pytest.raises(ValueError, match="captured without gradients"):
            other.relevance(out[:, 0, 0])


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_knows_of_changes_before_it_and_after_it(way: str) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x, model = torch.randn(1, 2, 4, 8), Plain()
    with xf.capture_attention(model) as record:
        model(x)
    wanted = record.rollout()
    early = COPIES[way](record)
    x += 1
    late = COPIES[way](record)
    assert torch.equal(early.rollout(), wanted)
    with pytest.raises(RuntimeError, match="was changed in place"):
        late.rollout()
    early.layers[0].tensors()[0].add_(1)
    with pytest.raises(RuntimeError, match="was changed in place"):
        early.rollout()
