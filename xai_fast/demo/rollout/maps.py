"""All maps of one picture: raw attention, rollout in its variants, and what remains without the sink."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_fast import capture_attention
from xai_fast.attention.capture import AttentionRecord
from xai_fast.viz import patch_grid

from ..photos import Subject
from .sinks import Sink, find_sink

__all__ = ["ASIDE", "DISCARDED", "MAX", "RAW", "ROLLOUT", "Explained", "explain"]

DISCARD = 0.9
RAW, ROLLOUT, MAX = "Raw CLS attention", "Rollout, mean", "Rollout, max"
DISCARDED, ASIDE = f"Rollout, discard {DISCARD}", "Rollout, sink aside"


@dataclass(frozen=True)
class Explained:
    """The maps of one subject by name, each (h, w), in the order of the page, and what to say about them."""

    subject: Subject
    maps: dict[str, Tensor]
    captions: dict[str, str]
    sink: Sink | None
    note: str


@torch.no_grad()
def explain(model: torch.nn.Module, subject: Subject, grid: tuple[int, int]) -> Explained:
    """All maps of one picture from one forward pass.

    Parameters
    ----------
    model : torch.nn.Module
        Takes ``pixel_values`` and ``output_hidden_states``; token 0 is CLS, the patches follow.
    subject : Subject
    grid : (int, int)
        Rows and columns of patches.

    Returns
    -------
    Explained

    Examples
    --------
    >>> from xai_fast.demo.models.digits import DigitsViT
    >>> picture = Subject("noise", torch.zeros(8, 8, 3).byte().numpy(), torch.rand(1, 1, 8, 8))
    >>> explain(DigitsViT(), picture, (8, 8)).maps[ROLLOUT].shape
    torch.Size([8, 8])
    """
    with capture_attention(model) as record:
        output = model(pixel_values=subject.pixels, output_hidden_states=True)
    attentions = record.attentions()
    mean = record.rollout(token=0)
    sink, mask = find_sink(mean, attentions, output.hidden_states, grid)

    rows = {
        RAW: (attentions[-1].mean(1)[:, 0], "Last block, mean over heads."),
        ROLLOUT: (mean, "All blocks, mean over heads."),
        MAX: (record.rollout(token=0, head_fusion="max"), "All blocks, strongest head."),
        DISCARDED: (
            record.rollout(token=0, discard_ratio=DISCARD),
            f"Mean over heads; the weakest {DISCARD:.0%} of each block's attention dropped.",
        ),
    }
    if sink is not None:
        rows |= _without_sink(record, mean, sink, mask, blocks=len(attentions))
    note = "No sink: no patch takes the rollout over." if sink is None else sink.describe()
    return Explained(
        subject=subject,
        maps={name: patch_grid(row.cpu(), grid=grid)[0] for name, (row, _) in rows.items()},
        captions={name: caption for name, (_, caption) in rows.items()},
        sink=sink,
        note=note,
    )


def _without_sink(
    record: AttentionRecord, mean: Tensor, sink: Sink, mask: Tensor, blocks: int
) -> dict[str, tuple[Tensor, str]]:
    """The two remedies: set the sink patches aside, or start after the blocks that made them."""
    number = int(mask.sum())
    rows = {
        ASIDE: (
            _set_aside(mean, mask),
            f"The same as mean, {number} sink patch{'es' if number > 1 else ''} left out of the map and its scale.",
        )
    }
    start = sink.last_block + 1
    if start == blocks:
        return rows
    left_out = "block 1" if start == 1 else f"blocks 1 to {start}"
    rows[f"Rollout from block {start + 1}"] = (
        record.rollout(token=0, start_layer=start),
        f"Mean over heads, {left_out} left out, where the sink is.",
    )
    rows[f"From block {start + 1}, discard {DISCARD}"] = (
        record.rollout(token=0, start_layer=start, discard_ratio=DISCARD),
        "The same with the weakest attention dropped.",
    )
    return rows


def _set_aside(rollout: Tensor, mask: Tensor) -> Tensor:
    """The rollout (1, N) with the masked patches (h, w) at the median of the others, not bright, not dark."""
    patches = rollout[:, 1:].clone()
    flat = mask.flatten()
    patches[:, flat] = patches[:, ~flat].median()
    return torch.cat([rollout[:, :1], patches], dim=1)
