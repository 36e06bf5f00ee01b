"""The three-line torch row chain: what a careful user writes without this package."""

from __future__ import annotations

import torch
from torch import Tensor


def row_chain(attentions: Tensor) -> Tensor:
    """First row of the rollout of attentions (L, B, H, N, N) whose rows sum to 1: (B, N)."""
    row = torch.zeros(attentions.shape[1], 1, attentions.shape[-1], dtype=attentions.dtype, device=attentions.device)
    row[:, :, 0] = 1
    for attention in attentions.unbind(0)[::-1]:
        row = (row + row @ attention.mean(1)) / 2
    return row[:, 0]
