"""Why a rollout collapses: patches that draw the attention of all others in some block, whatever they show.

Rollout multiplies all blocks, so one block in which every token looks at the same patch is enough for that
patch to outshine the whole map. This module names such patches and the blocks where it happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OUTLIER_SCORE", "SINK_FACTOR", "Sink", "find_sink", "outlier_scores", "sink_patches"]

# A patch is a sink if it holds this many times the uniform share of the rollout, and in some block receives
# this many times the uniform share of attention, averaged over all tokens. Both, because a salient object
# alone can have the first, and a sink that no later block builds on has the second.
SINK_FACTOR = 10.0

# The usual cut-off of the modified z-score (Iglewicz and Hoaglin, 1993).
OUTLIER_SCORE = 3.5


@dataclass(frozen=True)
class Sink:
    """The patch on which a rollout collapses.

    Attributes
    ----------
    patch : int
        Index among the patches, without prefix tokens.
    row, column : int
        Its place in the grid, from 0 at the top left.
    share, times_uniform : float
        Its part of the rollout mass that falls on patches; the same over 1 / number of patches.
    first_block, last_block : int
        First and last block (from 0) in which it is a sink of attention.
    received : float
        Attention it gets in its strongest block, averaged over all tokens, in multiples of 1 / N.
    input_norm, late_norm : (float, float, float)
        Norm of the token before the first and the last block: value, median over patches, outlier score.
    """

    patch: int
    row: int
    column: int
    share: float
    times_uniform: float
    first_block: int
    last_block: int
    received: float
    input_norm: tuple[float, float, float]
    late_norm: tuple[float, float, float]

    @property
    def blocks(self) -> str:
        """The blocks counted from 1: "1" or "1 to 3"."""
        first, last = self.first_block + 1, self.last_block + 1
        return f"{first}" if first == last else f"{first} to {last}"

    def describe(self) -> str:
        """What was found, for a reader, in plain sentences."""
        blocks = f"block{'s' if self.last_block > self.first_block else ''} {self.blocks}"
        return (
            f"Patch (row {self.row + 1}, column {self.column + 1}) takes {self.share:.1%} of the rollout "
            f"mass on patches, {self.times_uniform:.0f} times the uniform share. It is an attention sink in "
            f"{blocks}, where it receives {self.received:.0f} times the uniform attention, averaged over all "
            f"tokens. Its token norm: {_norm_text(self.input_norm)} entering the first block, "
            f"{_norm_text(self.late_norm)} entering the last."
        )


def _norm_text(norm: tuple[float, float, float]) -> str:
    value, median, score = norm
    kind = "a high-norm outlier" if score > OUTLIER_SCORE else "not an outlier"
    return f"{value / median:.2f} times the median (robust z = {score:.1f}, {kind})"


def received_attention(attentions: Sequence[Tensor], num_prefix_tokens: int = 1) -> Tensor:
    """Attention that each patch receives, averaged over heads and queries, in multiples of the uniform 1 / N.

    Parameters
    ----------
    attentions : sequence of L tensors (1, H, N, N)

    Returns
    -------
    Tensor, shape (L, N - num_prefix_tokens)

    Examples
    --------
    >>> received_attention([torch.full((1, 2, 3, 3), 1 / 3)])
    tensor([[1., 1.]])
    """
    per_block = [attention[0].mean((0, 1)) * attention.shape[-1] for attention in attentions]
    return torch.stack(per_block)[:, num_prefix_tokens:]


def sink_patches(rollout: Tensor, received: Tensor, factor: float = SINK_FACTOR) -> Tensor:
    """Patches that meet both conditions of a sink, see `SINK_FACTOR`.

    Parameters
    ----------
    rollout : Tensor, shape (P,)
        Rollout of the CLS token on the patches.
    received : Tensor, shape (L, P)
        From `received_attention`.
    factor : float

    Returns
    -------
    Tensor of bool, shape (P,)

    Examples
    --------
    >>> rollout = torch.full((100,), 0.01).index_fill(0, torch.tensor([7]), 0.5)
    >>> received = torch.ones(2, 100).index_fill(1, torch.tensor([7]), 30.0)
    >>> sink_patches(rollout, received).nonzero().tolist()
    [[7]]
    """
    times_uniform = rollout / rollout.sum() * len(rollout)
    return (times_uniform > factor) & (received.amax(0) > factor)


def find_sink(
    rollout: Tensor,
    attentions: Sequence[Tensor],
    hidden_states: Sequence[Tensor],
    grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 1,
    factor: float = SINK_FACTOR,
) -> tuple[Sink | None, Tensor]:
    """Name the patch on which a rollout collapsed, if it did.

    Parameters
    ----------
    rollout : Tensor, shape (1, N)
        Rollout of the CLS token.
    attentions : sequence of L tensors (1, H, N, N)
    hidden_states : sequence of L + 1 tensors (1, N, D)
        Before each block, and after the last.
    grid : (int, int)
        Rows and columns of patches.
    num_prefix_tokens : int
    factor : float
        See `SINK_FACTOR`.

    Returns
    -------
    sink : Sink or None
        The strongest patch of the rollout, if it is a sink.
    mask : Tensor of bool, shape grid
        All sink patches.

    Examples
    --------
    >>> flat = torch.full((1, 1, 5, 5), 0.2)
    >>> find_sink(torch.full((1, 5), 0.2), [flat], [torch.ones(1, 5, 8)] * 2, (2, 2))[0] is None
    True
    """
    patches = rollout[0, num_prefix_tokens:].double()
    received = received_attention(attentions, num_prefix_tokens)
    mask = sink_patches(patches, received.to(patches), factor)
    top = int(patches.argmax())
    if not mask[top]:
        return None, mask.view(grid)
    blocks = torch.nonzero(received[:, top] > factor).flatten().tolist()
    share = float(patches[top] / patches.sum())
    sink = Sink(
        patch=top,
        row=top // grid[1],
        column=top % grid[1],
        share=share,
        times_uniform=share * len(patches),
        first_block=blocks[0],
        last_block=blocks[-1],
        received=float(received[:, top].max()),
        input_norm=_norm_of(hidden_states[0], num_prefix_tokens, top),
        late_norm=_norm_of(hidden_states[-2], num_prefix_tokens, top),
    )
    return sink, mask.view(grid)


def outlier_scores(values: Tensor) -> Tensor:
    """Robust z-scores: distance from the median over 1.4826 times the median absolute deviation (MAD).

    Parameters
    ----------
    values : Tensor, shape (P,)

    Examples
    --------
    >>> outlier_scores(torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0])).round(decimals=1)[-1]
    tensor(31.7000)
    """
    distance = values - values.median()
    # A constant has no spread and no outliers.
    spread = (1.4826 * distance.abs().median()).clamp_min(torch.finfo(values.dtype).tiny)
    return distance / spread


def _norm_of(hidden: Tensor, num_prefix_tokens: int, patch: int) -> tuple[float, float, float]:
    norms = hidden[0, num_prefix_tokens:].norm(dim=-1).double()
    return float(norms[patch]), float(norms.median()), float(outlier_scores(norms)[patch])
