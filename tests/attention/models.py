"""Small models for the tests of attention: tiny Hugging Face configurations, and attention written by hand in
many ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 32, 4
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
TEXT = {**SHAPE, "intermediate_size": 64, "vocab_size": 50}

Builder = Callable[[str], tuple[nn.Module, dict[str, Any]]]


def vit(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(**SHAPE, intermediate_size=64, image_size=28, patch_size=7, attn_implementation=attn_implementation)
    return t.ViTModel(config), {"pixel_values": torch.randn(2, 3, 28, 28)}


def dinov2(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    t = pytest.importorskip("transformers")
    config = t.Dinov2Config(**SHAPE, image_size=28, patch_size=7, attn_implementation=attn_implementation)
    return t.Dinov2Model(config), {"pixel_values": torch.randn(2, 3, 28, 28)}


def bert(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Three sentences of 9, 6 and 4 tokens, padded on the right."""
    t = pytest.importorskip("transformers")
    model = t.BertModel(t.BertConfig(**TEXT, attn_implementation=attn_implementation))
    return model, {"input_ids": torch.randint(0, 50, (3, 9)), "attention_mask": lengths_mask(9, 6, 4).long()}


def llama(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Causal, two query heads per key head."""
    t = pytest.importorskip("transformers")
    model = t.LlamaModel(t.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation=attn_implementation))
    return model, {"input_ids": torch.randint(0, 50, (3, 9))}


def gpt2(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Query, key and value are views of one packed projection."""
    t = pytest.importorskip("transformers")
    config = t.GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attn_implementation,
    )
    return t.GPT2Model(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def t5_encoder(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """A learned relative position bias on the scores, and no scale."""
    t = pytest.importorskip("transformers")
    config = t.T5Config(
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=HEADS,
        vocab_size=50,
        attn_implementation=attn_implementation,
    )
    ids = torch.randint(0, 50, (2, 7))
    return t.T5EncoderModel(config), {"input_ids": ids, "attention_mask": lengths_mask(7, 5).long()}


def bloom(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Scores by baddbmm on folded heads with an alibi bias, then reshaped."""
    t = pytest.importorskip("transformers")
    model = t.BloomModel(t.BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=HEADS, vocab_size=50))
    return model, {"input_ids": torch.randint(0, 50, (2, 7))}


def gemma2(attn_implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Scores under a tanh: only their probabilities can be kept."""
    t = pytest.importorskip("transformers")
    config = t.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_implementation="eager")
    return t.Gemma2Model(config), {"input_ids": torch.randint(0, 50, (2, 7))}


HUGGING_FACE: dict[str, Builder] = {
    builder.__name__: builder for builder in (vit, dinov2, bert, llama, gpt2, t5_encoder, bloom, gemma2)
}


def lengths_mask(*lengths: int) -> Tensor:
    """(B, N) boolean, True for the first `length` tokens of each sample."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# Attention written by hand. Each function takes q, k, v (B, H, N, d) and a boolean mask `keep` (N, N), and
# computes softmax(q k^T / sqrt(d), masked where keep is False) v in another way.

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WRITTEN: dict[str, Attend] = {}


def _written(function: Attend) -> Attend:
    WRITTEN[function.__name__] = function
    return function


def _bias(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, -math.inf)


@_written
def sdpa_positional(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, keep, 0.0)


@_written
def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=_bias(keep))


@_written
def sdpa_scale(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(3 * q, k, v, attn_mask=keep, scale=1 / (3 * math.sqrt(q.shape[-1])))


@_written
def sdpa_folded_windows(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Five dimensions, heads split in two."""
    q, k, v = (x.unflatten(1, (2, -1)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).flatten(1, 2)


@_written
def scale_on_query(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    return torch.matmul(F.softmax(scores.masked_fill(~keep, -math.inf), dim=-1), v)


@_written
def scale_on_scores(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5 + _bias(keep)
    return torch.softmax(scores, -1) @ v


@_written
def division_by_tensor(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q.matmul(k.mT) / torch.sqrt(torch.tensor(float(q.shape[-1])))
    scores = _bias(keep) + scores
    return nn.Dropout(0.0)(scores.softmax(dim=3)).matmul(v)


@_written
def in_place(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT
    scores /= math.sqrt(q.shape[-1])
    scores += 1.5
    scores.masked_fill_(~keep, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


@_written
def in_place_methods(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT).mul_(2.0).div_(2 * math.sqrt(q.shape[-1])).add_(_bias(keep))
    return scores.softmax(-1) @ v


@_written
def minus_maximum(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.where(keep, q @ k.mT / math.sqrt(q.shape[-1]), -math.inf)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


@_written
def scores_where(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT).div(math.sqrt(q.shape[-1])).where(keep, torch.tensor(-1e9))
    return scores.float().softmax(-1).to(v.dtype) @ v


@_written
def where_filled_first(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.where(~keep, torch.finfo(q.dtype).min, q @ k.mT / math.sqrt(q.shape[-1]))
    return F.dropout(scores.softmax(-1), p=0.1, training=False) @ v


@_written
def masked_then_scaled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT - 4.0 * (~keep).float() * 1e6) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


@_written
def bias_on_both_sides_of_the_scale(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A bias that is scaled with the scores, and taken off again afterwards."""
    bias = torch.arange(keep.numel(), dtype=q.dtype).view_as(keep) / 10
    scores = (q @ k.mT + bias) * q.shape[-1] ** -0.5 - bias * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


@_written
def bmm_folded_heads(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    batch = q.shape[0]
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5 + _bias(keep)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, -1))


@_written
def baddbmm_folded_heads(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    batch = q.shape[0]
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    scores = torch.baddbmm(2 * _bias(keep)[None], q, k.mT, beta=0.5, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(F.softmax(scores, -1), v).unflatten(0, (batch, -1))


@_written
def folded_then_viewed(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) + _bias(keep)
    scores = scores.view(batch, heads, tokens, tokens) / math.sqrt(q.shape[-1])
    weights = scores.softmax(-1).view(batch * heads, tokens, tokens)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (batch, -1))


@_written
def einsum(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]) + _bias(keep)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@_written
def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("b j h d, b i h d -> b h i j", k, q) / math.sqrt(q.shape[-1]) + _bias(keep)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).transpose(1, 2)


@_written
def einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.einsum("...id,...jd->...ij", q, k) / math.sqrt(q.shape[-1]) + _bias(keep)
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


@_written
def temperature_per_head(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    temperature = torch.arange(1.0, q.shape[1] + 1)[:, None, None]
    scores = (q * temperature) @ k.mT / temperature * q.shape[-1] ** -0.5
    return (scores + _bias(keep)).softmax(-1) @ v


# Ways that cannot be followed back to query and key: the probabilities themselves are kept.


@_written
def soft_capped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The cap is undone by atanh, so that the expected probabilities stay those of the others."""
    scores = torch.atanh(torch.tanh(q.double() @ k.double().mT / 20)).float() * (20 * q.shape[-1] ** -0.5)
    weights = F.dropout((scores + _bias(keep)).softmax(-1), 0.0, training=True)
    return weights.to(v.dtype) @ v


@_written
def overwritten_probabilities(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.atanh(torch.tanh(q.double() @ k.double().mT / 20)).float() * (20 * q.shape[-1] ** -0.5)
    weights = (scores + _bias(keep)).softmax(-1)
    weights *= 2.0
    weights[..., 0] += 0.0
    weights /= 2.0
    return weights @ v


@_written
def assigned_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores[..., ~keep] = -math.inf
    return scores.softmax(-1) @ v


@_written
def masked_through_a_view(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores.flatten(0, 1).masked_fill_(~keep, -math.inf)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


FOLDED = {"bmm_folded_heads", "baddbmm_folded_heads"}
PROBABILITIES_ONLY = {"soft_capped", "overwritten_probabilities", "assigned_mask", "masked_through_a_view"}


class Written(nn.Module):
    """Two layers of multi-head self-attention with residual, computed by one of the functions above."""

    def __init__(self, name: str, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.attend = WRITTEN[name]
        self.heads = heads

    def query_key_value(self, layer: int, x: Tensor) -> list[Tensor]:
        """(B, H, N, d) each, views of one projection."""
        packed: Tensor = self.projections[layer](x)
        return list(packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        for layer in range(len(self.projections)):
            q, k, v = self.query_key_value(layer, x)
            x = x + self.attend(q, k, v, keep).transpose(1, 2).flatten(2)
        return x

    @torch.no_grad()
    def expected_attentions(self, x: Tensor, keep: Tensor) -> list[Tensor]:
        """The probabilities by the textbook, in double precision."""
        found = []
        for layer in range(len(self.projections)):
            q, k, v = (part.double() for part in self.query_key_value(layer, x))
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~keep, -math.inf)
            found.append(scores.softmax(-1))
            x = x + (found[-1] @ v).float().transpose(1, 2).flatten(2)
        return found
