"""Attention rollout in plain PyTorch: the definition of the family (see ``csrc/rollout.h`` for the kernels).

Every function accepts any floating dtype. 16-bit inputs are computed in float32 and rounded once, at the end.
Arguments are taken as valid: ``xai_fast.ops.rollout`` checks them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype

# An additive mask value of at most this stands for -inf, for which models write the lowest finite float
# (kRemovedBelow in csrc/types.h).
REMOVED_BELOW = -1.7e38

__all__ = ["attention_probabilities", "fuse_heads", "rollout_rows", "rollout_rows_qk"]


def _fuse(attention: Tensor, head_fusion: str) -> Tensor:
    """(B,H,N,N) -> (B,N,N), one matrix for the heads of a layer."""
    if head_fusion == "mean":
        return attention.mean(1)
    if head_fusion == "sum":
        return attention.sum(1)
    if head_fusion == "max":
        return attention.amax(1)
    return attention.amin(1)


def _mixed(attention: Tensor, head_fusion: str, residual: float, normalize: bool) -> Tensor:
    """Abar = norm(w I + fuse_h A) in the accumulate type; a row whose sum is 0 becomes 0."""
    fused = _fuse(attention.to(accumulate_dtype(attention.dtype)), head_fusion)
    eye = torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
    mixed = fused + residual * eye
    if not normalize:
        return mixed
    total = mixed.sum(-1, keepdim=True)
    empty = total == 0
    return torch.where(empty, 0.0, mixed / torch.where(empty, 1.0, total))


def fuse_heads(attention: Tensor, head_fusion: str, residual: float, normalize: bool, wide: bool = False) -> Tensor:
    """Abar (B,N,N) of attention (B,H,N,N), in its dtype; in the accumulate type if ``wide``."""
    mixed = _mixed(attention, head_fusion, residual, normalize)
    return mixed if wide else mixed.to(attention.dtype)


def rollout_rows(attention: Tensor, rows: Tensor, head_fusion: str, residual: float, normalize: bool) -> Tensor:
    """rows (B,R,N) times Abar (B,N,N)."""
    mixed = _mixed(attention, head_fusion, residual, normalize)
    return (rows.to(mixed.dtype) @ mixed).to(rows.dtype)


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    """P = exp(scale q k^T + mask - LSE), shape (B,H,Nq,Nk), in the accumulate type; a fully masked row is 0."""
    dtype = accumulate_dtype(query.dtype)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = scale * (query.to(dtype) @ key.to(dtype).transpose(-1, -2))
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = (scores + attn_mask.to(dtype)).masked_fill(attn_mask <= REMOVED_BELOW, -math.inf)
    total = torch.logsumexp(scores, -1) if lse is None else lse.to(dtype)
    # exp(-inf - -inf) would be NaN: a row without keys gets any finite normaliser, its scores are -inf already.
    total = torch.where(total == -math.inf, 0.0, total)
    return torch.exp(scores - total.unsqueeze(-1))


def rollout_rows_qk(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    is_causal: bool,
    head_fusion: str,
    residual: float,
    normalize: bool,
) -> Tensor:
    """:func:`rollout_rows` with the attention built from query and key."""
    attention = attention_probabilities(query, key, attn_mask, lse, scale, is_causal)
    return rollout_rows(attention, rows, head_fusion, residual, normalize)
