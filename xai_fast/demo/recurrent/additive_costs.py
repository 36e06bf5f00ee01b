"""What additive attention costs, in tiles and as it is usually written, with a hidden layer for all pairs at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_fast._seeding import seeded
from xai_fast.attention import AdditiveAttention

from ..measure import Measured, compare
from ..repeatable import one_thread

__all__ = ["AT_ONCE", "AT_ONCE_TRAINING", "TILED", "TILED_TRAINING", "AdditiveCosts", "all_at_once", "cost_additive"]

TILED, AT_ONCE = "in tiles, the weights alone", "all pairs at once, the weights alone"
TILED_TRAINING, AT_ONCE_TRAINING = "in tiles, with the backward pass", "all pairs at once, with the backward pass"


@dataclass(frozen=True)
class AdditiveCosts:
    """Measurements of one size.

    Attributes
    ----------
    batch, queries, keys, hidden : int
        B, T, S and H.
    measured : dict of str to Measured
    disagreement : float
        Largest difference of a weight between the two ways.
    """

    batch: int
    queries: int
    keys: int
    hidden: int
    measured: dict[str, Measured]
    disagreement: float

    @property
    def hidden_bytes(self) -> int:
        """Of a hidden layer (B, T, S, H) in float32."""
        return 4 * self.batch * self.queries * self.keys * self.hidden


def all_at_once(attention: AdditiveAttention, memory: Tensor, query: Tensor) -> Tensor:
    """Weights of additive attention as it is usually written, with the hidden layer (B, T, S, H) in memory.

    Parameters
    ----------
    attention : AdditiveAttention
        With queries.
    memory : Tensor, shape (B, S, Dk)
    query : Tensor, shape (B, T, Dq)

    Returns
    -------
    Tensor, shape (B, T, S)

    Examples
    --------
    >>> attention, memory, query = AdditiveAttention(4, 3, 8), torch.randn(2, 5, 4), torch.randn(2, 6, 3)
    >>> torch.allclose(all_at_once(attention, memory, query), attention.weights(memory, query), atol=1e-6)
    True
    """
    if attention.query is None:
        raise ValueError("attention: expected one with queries, got query_dim None")
    hidden = (attention.key(memory).unsqueeze(1) + attention.query(query).unsqueeze(2)).tanh()
    return (hidden @ attention.score).softmax(-1)


def cost_additive(
    device: torch.device,
    repeats: int,
    *,
    batch: int = 4,
    queries: int = 128,
    keys: int = 512,
    hidden: int = 256,
    tick: Callable[[], object] = lambda: None,
) -> AdditiveCosts:
    """Measure both ways, with and without the backward pass, on random states and on one CPU thread.

    Parameters
    ----------
    device : torch.device
    repeats : int
        Timed repeats.
    batch, queries, keys, hidden : int
        B, T, S, and H, which is also the size of the states.
    tick : callable
        Called after each of the ``4 * (repeats + 2)`` measured calls.

    Examples
    --------
    >>> cost_additive(torch.device("cpu"), 1, queries=3, keys=5, hidden=8).disagreement < 1e-5
    True
    """
    generator = torch.Generator().manual_seed(0)
    with seeded(0):
        attention = AdditiveAttention(hidden, hidden, hidden).to(device)
    memory = torch.randn(batch, keys, hidden, generator=generator).to(device)
    query = torch.randn(batch, queries, hidden, generator=generator).to(device)
    ways: list[Callable[[], Tensor]] = [
        lambda: attention.weights(memory, query),
        lambda: all_at_once(attention, memory, query),
    ]

    def without_graph(way: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return way()

    def trained(way: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        # Squares, since the weights of a query always sum to 1.
        return torch.autograd.grad(way().square().sum(), tuple(attention.parameters()))

    tiled, plain = ways
    calls: dict[str, Callable[[], object]] = {
        TILED: lambda: without_graph(tiled),
        AT_ONCE: lambda: without_graph(plain),
        TILED_TRAINING: lambda: trained(tiled),
        AT_ONCE_TRAINING: lambda: trained(plain),
    }
    difference = float((without_graph(tiled) - without_graph(plain)).abs().max())
    with one_thread():
        measured = compare(calls, repeats=repeats, device=device, tick=tick)
    return AdditiveCosts(batch, queries, keys, hidden, measured, difference)
