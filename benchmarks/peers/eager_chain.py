"""Attention rollout the way it is usually written: the eager baseline of the benchmarks.

The chain of Abnar and Zuidema's ``attention_flow`` and of the ``vit-explain`` project: fuse the heads,
optionally drop the weakest entries, add the identity, normalise the rows, multiply full N x N matrices with
later layers on the left.

Two slips of ``vit-explain`` are mended, so that it can be compared with at all: rows are normalised instead
of columns, and the discard acts on every sample of the batch instead of the first. Its exception for entry
(0, 0) is left out as well. None of this changes the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["eager_rollout"]


def eager_rollout(attentions: Sequence[Tensor], head_fusion: str = "mean", discard_ratio: float = 0.0) -> Tensor:
    """Roll out all tokens through all layers.

    Parameters
    ----------
    attentions : sequence of L tensors (B, H, N, N)
        First layer first.
    head_fusion : {"mean", "sum", "max", "min"}
    discard_ratio : float
        Share of the smallest entries of each fused N x N matrix that is set to 0 before the identity is
        added.

    Returns
    -------
    Tensor, shape (B, N, N)
        Row i: how much each input token reaches token i; row 0 is the usual map of CLS.

    Examples
    --------
    >>> eager_rollout([torch.full((1, 2, 3, 3), 1 / 3)])[0, 0]
    tensor([0.6667, 0.1667, 0.1667])
    """
    fuse = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}[head_fusion]
    batch, _, tokens, _ = attentions[0].shape
    identity = torch.eye(tokens, dtype=attentions[0].dtype, device=attentions[0].device)
    result = identity.expand(batch, tokens, tokens)
    for attention in attentions:
        fused = fuse(attention, dim=1)
        if discard_ratio > 0:
            flat = fused.flatten(1)
            weakest = flat.topk(int(discard_ratio * flat.shape[1]), dim=1, largest=False).indices
            fused = flat.scatter(1, weakest, 0).view_as(fused)
        mixed = fused + identity
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        result = mixed @ result
    return result
