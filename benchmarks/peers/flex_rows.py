"""r A from q and k by FlexAttention with q and k swapped: what torch can do without an attention matrix.

With scores k_j q_i - LSE_i, a softmax over i gives weights e_ij / Z_j. One more key with score 0 and a value of its own
column returns 1 / Z_j, and the quotient of the two columns is sum_i r_i e_ij (FlexAttention returns no log-sum-exp on the
CPU). LSE comes from one pass of fused attention.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention


@functools.cache
def _compiled() -> object:
    return torch.compile(flex_attention, dynamic=False)


def _lse(query: Tensor, key: Tensor) -> Tensor:
    if query.is_cuda:
        # The flash form takes 16-bit inputs alone; this one pads the queries.
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, key, None, True)[1][..., : query.shape[2]]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key)[1]


def flex_rows(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """One rollout step of rows (1, 1, N), mean of heads, residual 1, normalised."""
    _, heads, tokens, _ = query.shape
    lse = F.pad(_lse(query, key), (0, 1))  # the extra key is a zero query: its score is 0

    def minus_lse(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
        return score - lse[b, h, i]

    values = torch.zeros(1, heads, tokens + 1, 16, dtype=query.dtype, device=query.device)
    values[..., :tokens, 0] = rows
    values[..., tokens, 1] = 1
    out = _compiled()(key, F.pad(query, (0, 0, 0, 1)), values, score_mod=minus_lse)
    return (rows + (out[..., 0] / out[..., 1]).mean(1, keepdim=True)) / 2
