"""What a rollout costs, next to the way it is usually written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_fast import attention_rollout, capture_attention
from xai_fast.attention.capture import AttentionRecord

from ..measure import Measured, compare
from .setups import Setup

__all__ = ["EAGER", "EAGER_WHOLE", "Costs", "cost_alone", "cost_whole", "eager_chain"]

EAGER, EAGER_WHOLE = "eager chain", "eager attention and eager chain"


@dataclass(frozen=True)
class Costs:
    """Measurements of the rollout alone, for one picture."""

    size: str
    measured: dict[str, Measured]
    held_bytes: dict[str, int]  # what each way needs in memory before it starts
    disagreement: float  # largest relative difference between the streamed rollout and the eager chain


def eager_chain(attentions: Sequence[Tensor]) -> Tensor:
    """Rollout as it is usually written: fuse heads, add the identity, normalise, multiply N x N matrices.

    Parameters
    ----------
    attentions : sequence of L tensors (B, H, N, N)

    Returns
    -------
    Tensor, shape (B, N, N)

    Examples
    --------
    >>> eager_chain([torch.full((1, 2, 3, 3), 1 / 3)])[0, 0]
    tensor([0.6667, 0.1667, 0.1667])
    """
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    product = identity.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        mixed = attention.mean(dim=1) + identity
        product = (mixed / mixed.sum(dim=-1, keepdim=True)) @ product
    return product


@torch.no_grad()
def cost_alone(setup: Setup, device: torch.device, repeats: int, tick: Callable[[], object]) -> Costs:
    """Measure the rollout without the model: queries and keys, or the attention matrices, are there already.

    Parameters
    ----------
    setup : Setup
        Its first subject is used.
    device : torch.device
    repeats : int
        Timed repeats.
    tick : callable
        Called after each of the ``3 * (repeats + 2)`` measured calls.

    Examples
    --------
    >>> from xai_fast.demo.rollout.setups import digits_setup
    >>> cpu = torch.device("cpu")
    >>> cost_alone(digits_setup(1, 1, cpu), cpu, 1, lambda: None).disagreement < 1e-4
    True
    """
    with capture_attention(setup.model) as record:
        setup.model(pixel_values=setup.subjects[0].pixels)
    attentions = record.attentions()
    calls = {
        "xai_fast, streamed from q and k": lambda: record.rollout(token=0),
        "xai_fast, attention matrices given": lambda: attention_rollout(attentions, token=0),
        EAGER: lambda: eager_chain(attentions)[:, 0],
    }
    streamed, _, chain = (call() for call in calls.values())
    _, heads, tokens, _ = attentions[0].shape
    matrices = sum(attention.numel() * attention.element_size() for attention in attentions)
    return Costs(
        size=f"{len(attentions)} blocks, {heads} heads, {tokens} tokens, {str(attentions[0].dtype)[6:]}",
        measured=compare(calls, repeats=repeats, device=device, tick=tick),
        held_bytes=dict(zip(calls, (_kept_bytes(record), matrices, matrices), strict=True)),
        disagreement=float(((streamed - chain).abs() / chain).max()),
    )


def _kept_bytes(record: AttentionRecord) -> int:
    """Bytes of the queries and keys that a capture keeps."""
    return sum(tensor.numel() * tensor.element_size() for layer in record.layers for tensor in layer.tensors())


@torch.no_grad()
def cost_whole(setup: Setup, device: torch.device, repeats: int, tick: Callable[[], object]) -> dict[str, Measured]:
    """Measure the way from pixels to the map, the model's forward pass included; arguments as `cost_alone`.

    Examples
    --------
    >>> from xai_fast.demo.rollout.setups import digits_setup
    >>> cpu = torch.device("cpu")
    >>> len(cost_whole(digits_setup(1, 1, cpu), cpu, 1, lambda: None))
    3
    """
    pixels = setup.subjects[0].pixels

    def captured() -> Tensor:
        with capture_attention(setup.model) as record:
            setup.model(pixel_values=pixels)
        return record.rollout(token=0)

    calls = {
        "the model alone, no explanation": lambda: setup.model(pixel_values=pixels),
        "xai_fast: fused attention, captured, streamed": captured,
        EAGER_WHOLE: lambda: eager_chain(setup.eager_model(pixels))[:, 0],
    }
    return compare(calls, repeats=repeats, device=device, tick=tick)
