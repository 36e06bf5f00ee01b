"""Relevance of every token of a text for a class or a next token, in all the ways that the demo shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from xai_fast import capture_attention, lrp
from xai_fast.attention.record import AttentionRecord

__all__ = ["ATTNLRP", "GRADIENT", "ROLLOUT", "SIGNED", "TARGETED_LRP", "text_maps"]

ROLLOUT, GRADIENT, TARGETED_LRP = "Rollout", "Targeted, gradient", "Targeted, LRP"
ATTNLRP, SIGNED = "AttnLRP", "Signed attention"


def text_maps(model: nn.Module, input_ids: Tensor, targets: Sequence[int], token: int | None) -> dict[str, list[Tensor]]:
    """Weights of every token for each target, from one captured forward pass and one AttnLRP pass per target.

    Parameters
    ----------
    model : nn.Module
        Takes token ids (1, N), returns logits (1, K).
    input_ids : Tensor, shape (1, N)
    targets : sequence of int
        Which logits.
    token : int or None
        The token that the logits are read from; None if they are read from the mean over all.

    Returns
    -------
    dict of str to list of Tensor
        One (N,) for each target. `ATTNLRP` and `SIGNED` have a sign, the others do not.

    Examples
    --------
    >>> from xai_fast.demo.models.intents import load_intents
    >>> model = load_intents().model  # doctest: +SKIP
    >>> list(text_maps(model, torch.tensor([[101, 7592, 102]]), [3, 4], token=None))  # doctest: +SKIP
    ['Rollout', 'Targeted, gradient', 'Targeted, LRP', 'AttnLRP', 'Signed attention']
    """
    with capture_attention(model) as record:
        logits = model(input_ids)
    scores = [logits[:, target] for target in targets]
    rollout = record.rollout(token)[0].detach()
    return {
        ROLLOUT: [rollout.mean(0) if token is None else rollout] * len(targets),
        GRADIENT: [_targeted(record, score, token, "gradient") for score in scores],
        TARGETED_LRP: [_targeted(record, score, token, "lrp") for score in scores],
        ATTNLRP: [lrp.attribute(model, input_ids, target)[0].sum(-1) for target in targets],
        SIGNED: [_signed(record, score) for score in scores],
    }


def _targeted(record: AttentionRecord, score: Tensor, token: int | None, method: Literal["gradient", "lrp"]) -> Tensor:
    """Targeted relevance without what every token has of itself through the skip connections, an identity matrix."""
    rows = record.relevance(score, token, method=method)[0].detach()
    identity = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    # Products of matrices that are the identity plus something positive: below zero there is rounding only.
    without = (rows - (identity if token is None else identity[token])).clamp_min(0)
    return without.mean(0) if token is None else without


def _signed(record: AttentionRecord, score: Tensor) -> Tensor:
    """Summed over blocks and heads; the loss is minus the score, so that positive speaks for the target."""
    return torch.stack([layer[0].sum(0) for layer in record.signed_attention(-score)]).sum(0).detach()
