"""capture_attention where scores or probabilities are mixed, cut or masked: the record has what multiplies the value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xai_fast as xf
from tests.attention.capture_checks import CLOSE, captured
from tests.attention.models import SHAPE

# Each function takes q, k, v (B, H, N, d) and a model with weights, and returns the probabilities that multiply v, and how
# they do. They are written so that the matrix before the product is at hand.

Way = Callable[["Changed", Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    WAYS[function.__name__] = function
    return function


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


@way
def sink_of_zeros(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    found = scores(q, k)
    weights = torch.cat([found, torch.zeros_like(found[..., :1])], -1).softmax(-1)[..., :-1]
    return weights, weights @ v


@way
def learned_sink(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As GPT-OSS does it."""
    sinks = model.gate.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    joined = torch.cat([scores(q, k), sinks], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = F.softmax(joined, dim=-1, dtype=joined.dtype).narrow(-1, 0, k.shape[2])
    return weights, F.dropout(weights, 0.0, training=False).to(v.dtype) @ v


@way
def talking_heads(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As CaiT does it."""
    mixed = model.before(scores(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weights = model.after(mixed.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return weights, weights @ v


@way
def talking_heads_by_convolution(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    kernel = model.before.weight[:, :, None, None]
    weights = F.conv2d(F.conv2d(scores(q, k), kernel).softmax(-1), kernel)
    return weights, weights @ v


@way
def talking_heads_by_einsum(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.einsum("bhij,gh->bgij", scores(q, k).softmax(-1), model.after.weight)
    return weights, torch.einsum("bhij,bhjd->bhid", weights, v)


@way
def re_attention(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepViT does it: heads mixed, then normalised over heads."""
    mixed = (scores(q, k).softmax(-1).permute(0, 2, 3, 1) @ model.after.weight.T).permute(0, 3, 1, 2)
    weights = F.layer_norm(mixed.transpose(1, 3), (q.shape[1],)).transpose(1, 3)
    return weights, weights @ v


@way
def queries_and_keys_elsewhere(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    mixed = model.after(scores(q, k).softmax(-1).permute(0, 2, 3, 1))
    return mixed.permute(0, 3, 1, 2), torch.einsum("bijh,bhjd->bhid", mixed, v)


@way
def value_on_the_left(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.tanh(scores(q, k)).softmax(-1)
    return weights, (v.mT @ weights.mT).mT


@way
def renormalised(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores(q, k).softmax(-1) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    return weights, weights @ v


@way
def masked_and_gated(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores(q, k).softmax(-1).masked_fill(torch.eye(q.shape[2], dtype=torch.bool), 0.0)
    weights = weights * model.gate.sigmoid().view(-1, 1, 1)
    return weights, weights @ v


@way
def gated_in_place(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores(q, k).softmax(-1)
    weights *= 0.5
    weights[..., 0] = 0.0
    return weights, weights @ v


@way
def two_softmaxes(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As ConViT and differential attention do it."""
    gate = model.gate.sigmoid().view(-1, 1, 1)
    weights = (1 - gate) * scores(q, k).softmax(-1) + gate * scores(k, q).softmax(-1)
    return weights, weights @ v


@way
def folded_after_mixing(model: Changed, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = model.after(scores(q, k).softmax(-1).movedim(1, -1)).movedim(-1, 1)
    out = torch.bmm(F.dropout(weights, 0.5, training=True).flatten(0, 1), v.flatten(0, 1))
    return weights, out.view_as(v)


class Changed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 2)
        self.gate = nn.Parameter(torch.randn(2))
        self.way, self.weights = WAYS[name], torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights, out = self.way(self, q, k, v)
        self.weights = weights
        return x + out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WAYS)
def test_the_record_has_what_multiplies_the_value(name: str, grad_mode: Any) -> None:
    model = nn.Sequential(Changed("sink_of_zeros"), Changed(name), Changed("learned_sink")).eval()
    with grad_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        record = captured(model, torch.randn(3, 5, 8))
    assert [layer.name for layer in record.layers] == ["0", "1", "2"]
    assert [layer.kind for layer in record.layers] == ["probabilities"] * 3
    assert [layer.index for layer in record.layers] == [0, 1, 2]
    wanted = [part.weights.detach() for part in model]
    for ours, theirs in zip(record.attentions(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    chain = xf.attention_rollout(wanted, check_nan=False)
    torch.testing.assert_close(record.rollout(check_nan=False), chain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(WAYS) - {"gated_in_place", "folded_after_mixing"}))
def test_gradients_are_those_of_what_multiplies_the_value(name: str) -> None:
    model, x = Changed(name).eval(), torch.randn(3, 5, 8)
    with xf.capture_attention(model) as record:
        score = model(x)[:, 0].pow(2).sum(1)
    if name == "value_on_the_left":  # its product has no other way to the matrix than a view of it
        assert record.weighted_attentions(score)[0].shape == (3, 2, 5, 5)
        return
    weights = model.weights
    (grad,) = torch.autograd.grad(score.sum(), weights, retain_graph=True, allow_unused=True)
    if grad is None:  # the way returns a view of it
        return
    torch.testing.assert_close(record.weighted_attentions(score)[0], (grad * weights).detach(), **CLOSE)


def test_other_heads_of_the_same_softmax_are_one_layer() -> None:
    class ByHead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.mT).softmax(-1)
            first, second = weights.chunk(2, dim=1)
            return torch.cat([first @ x[:, :1], second @ x[:, 1:]], dim=1)

    record = captured(ByHead(), torch.randn(3, 2, 5, 4))
    assert [(layer.kind, layer.shape) for layer in record.layers] == [("matmul", (3, 2, 5, 5))]


def test_a_part_of_what_met_a_value_as_a_whole_is_no_second_layer() -> None:
    class AndPooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.mT).softmax(-1)
            return weights @ x + weights[..., :1, :] @ x

    record = captured(AndPooled(), torch.randn(3, 2, 5, 4))
    assert [(layer.kind, layer.shape) for layer in record.layers] == [("matmul", (3, 2, 5, 5))]


@pytest.mark.parametrize("attention", ["gpt_oss"])
def test_hugging_face_with_sinks(attention: str) -> None:
    t = pytest.importorskip("transformers")
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "vocab_size": 50}
    config = t.GptOssConfig(**SHAPE, **sizes, num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager")
    model, ids = t.GptOssModel(config).eval(), torch.randint(0, 50, (2, 7))
    nn.init.normal_(model.layers[0].self_attn.sinks)
    with torch.no_grad(), xf.capture_attention(model) as record:
        wanted = model(ids, output_attentions=True).attentions
    for ours, theirs in zip(record.attentions(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


# What is missing is told


class Hidden(nn.Module):
    """Probabilities that go through what nothing is known of, before they meet the value."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.tanh(x @ x.mT).softmax(-1)
        return torch.sin(weights) @ x


def test_attention_that_is_missing_is_warned_of_once_a_pass() -> None:
    model, x = nn.Sequential(Changed("renormalised"), Hidden(), Hidden()), torch.randn(1, 5, 8)
    with warnings.catch_warnings(record=True) as seen, xf.capture_attention(model) as record:
        warnings.simplefilter("always")
        model(x)
        model(x)
    texts = [str(warning.message) for warning in seen]
    assert (
        texts
        == ["capture_attention: attention of '1', '2' is missing from the record: its product with a value was not seen"] * 2
    )
    assert [layer.name for layer in record.layers] == ["0"]


def test_parts_that_are_called_alone_are_warned_of_when_the_context_is_left() -> None:
    model = nn.Sequential(Hidden())
    context = xf.capture_attention(model)
    context.__enter__()
    model[0](torch.randn(1, 5, 8))
    with pytest.warns(UserWarning, match="attention of '0' is missing"):
        context.__exit__(None, None, None)


class NoAttention(nn.Module):
    """Softmaxes of no scores: a router, a classifier over tokens, masks from classes, a linear attention."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        routed = self.experts(x).softmax(-1)
        top = routed[..., :2] / routed[..., :2].sum(-1, keepdim=True)
        mixed = (top.unsqueeze(-1) * x.unsqueeze(2)).sum(2)
        masks = torch.einsum("bqc,bqn->bcn", routed[..., :-1], x)
        linear = x.softmax(1).mT @ x
        gated = self.experts(F.layer_norm(x @ linear, (8,)) + x).softmax(-1)
        return mixed, masks, gated, (x + self.experts(x).softmax(-1).sum(-1, keepdim=True)) @ x.mT


def test_softmaxes_of_something_else_are_neither_recorded_nor_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = captured(NoAttention(), torch.randn(2, 5, 8))
    assert record.layers == ()
