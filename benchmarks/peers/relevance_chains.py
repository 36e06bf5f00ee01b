"""Relevance the way it is usually written in PyTorch: the baselines of the relevance benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chefer_step", "unfused_attention", "unfused_av", "unfused_layer_norm", "unfused_skip", "unfused_softmax"]


def stabilize(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x + eps * torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def unfused_av(attention: Tensor, value: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """R_A and R_V of O = A V, one operation after the other."""
    share = relevance / stabilize(attention @ value)
    return 0.5 * attention * (share @ value.transpose(-1, -2)), 0.5 * value * (attention.transpose(-1, -2) @ share)


def unfused_softmax(logits: Tensor, probs: Tensor, relevance: Tensor) -> Tensor:
    return logits * (relevance - probs * relevance.sum(-1, keepdim=True))


def unfused_skip(x: Tensor, y: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    share = relevance / stabilize(x + y)
    return x * share, y * share


def unfused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, relevance: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    share = relevance / stabilize(centred * inverse * weight + bias) * weight
    return x * (share - share.mean(-1, keepdim=True)) * inverse


def unfused_attention(query: Tensor, key: Tensor, value: Tensor, relevance: Tensor) -> tuple[Tensor, ...]:
    """AttnLRP through softmax(QK^T) V with the matrices built."""
    scale = query.shape[-1] ** -0.5
    scores = scale * (query @ key.transpose(-1, -2))
    probs = scores.softmax(-1)
    to_probs, to_value = unfused_av(probs, value, relevance)
    share = unfused_softmax(scores, probs, to_probs) / stabilize(scores)
    to_query, to_key = query * (share @ key), key * (share.transpose(-1, -2) @ query)
    return 0.5 * scale * to_query, 0.5 * scale * to_key, to_value


def chefer_step(attention: Tensor, value: Tensor, grad_out: Tensor, rows: Tensor) -> Tensor:
    """One step of the recursion of Chefer et al. (2021) with the attention at hand: rows (I + mean_h (A dA)+)."""
    weights = (attention * (grad_out @ value.transpose(-1, -2))).clamp(min=0).mean(1)
    return rows + rows @ weights
