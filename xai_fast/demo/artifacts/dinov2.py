"""What the artifacts page measures on a vision transformer: norms, attention received, rollouts, probes, moved neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast import capture_attention, ops
from xai_fast.attention.artifacts import (
    Outliers,
    Probe,
    RegisterNeuron,
    clean_rollout,
    find_outliers,
    probe_tokens,
    test_time_registers,
    token_norms,
)

from .pictures import GRID, Pictures, patch_pixels

__all__ = [
    "KINDS",
    "PENALTIES",
    "RULES",
    "Concentration",
    "Looked",
    "Moved",
    "Probed",
    "concentration",
    "groups_of",
    "look",
    "moved",
    "outliers_by_rule",
    "probe_groups",
    "rollouts",
    "strongest",
    "tokens_after",
]

# Pictures that run through the model at once.
BATCH = 8
# Name to arguments of `find_outliers`; 150 is what Darcet et al. use for DINOv2-g.
RULES: dict[str, dict[str, Any]] = {
    "Absolute, norm > 150": {"method": "absolute", "threshold": 150.0},
    "Quantile, the largest 2 % of a picture": {"method": "quantile", "quantile": 0.98},
    "Median + 5 MAD of a picture": {"method": "mad", "k": 5.0},
}
PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)
KINDS = ("position", "coordinates", "pixels", "class")


@dataclass(frozen=True)
class Looked:
    """Norms of all tokens (L, n, 1 + P) after each block, and the attention that patches receive (L, n, P).

    Attention is averaged over heads and queries and given in multiples of the uniform share.
    """

    norms: Tensor
    received: Tensor

    @property
    def patches(self) -> Tensor:
        """Norms of the patches, (L, n, P)."""
        return self.norms[..., 1:]

    def largest(self) -> Tensor:
        """The largest norm of a patch over the median of its picture, (L, n)."""
        return self.patches.amax(2) / self.patches.median(2).values


@torch.no_grad()
def look(model: Any, pixels: Tensor, tick: Callable[[], object] = lambda: None) -> Looked:
    """Norms and received attention of pictures, a few at a time.

    Examples
    --------
    >>> look(load_dinov2(), load_photo("cat", 224).pixels).norms.shape  # doctest: +SKIP
    torch.Size([12, 1, 257])
    """
    norms, received = [], []
    for part in pixels.split(BATCH):
        with capture_attention(model) as record:
            norms.append(token_norms(model, {"pixel_values": part}).norms.cpu())
        attentions = record.attentions()
        received.append(torch.stack([a.mean((1, 2))[:, 1:] * a.shape[-1] for a in attentions]).cpu())
        tick()
    return Looked(torch.cat(norms, 1), torch.cat(received, 1))


def outliers_by_rule(norms: Tensor) -> dict[str, Outliers]:
    """The outliers among norms (..., 1 + P) by each of the `RULES`, CLS left out.

    Examples
    --------
    >>> [int(found.mask.sum()) for found in outliers_by_rule(torch.rand(1, 1, 257)).values()]
    [0, 6, 0]
    """
    return {rule: find_outliers(norms, ignore_tokens=0, **options) for rule, options in RULES.items()}


def strongest(values: Tensor, count: int) -> Tensor:
    """The largest `count` of each row (n, P), as a mask.

    Examples
    --------
    >>> strongest(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    tensor([[False,  True,  True]])
    """
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(count, 1).indices, True)


# ---- rollout --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollouts(
    model: Any,
    pixels: Tensor,
    *,
    start: int = 0,
    dropped: dict[str, Tensor] | None = None,
    neurons: Sequence[RegisterNeuron | tuple[int, int]] = (),
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Rollouts of CLS on the patches, (n, P) each.

    Parameters
    ----------
    model : Dinov2Model
    pixels : Tensor, shape (n, 3, H, W)
    start : int
        The first block that is multiplied, from 0.
    dropped : dict of str to Tensor of bool (n, P)
        Under each name, a rollout in which these patches receive nothing.
    neurons : sequence of (layer, neuron)
        "plain" is of the model with these moved to a register, if there are any.

    Returns
    -------
    dict of str to Tensor
        "plain", and one for each of `dropped`.

    Examples
    --------
    >>> rollouts(load_dinov2(), load_photo("cat", 224).pixels)["plain"].shape  # doctest: +SKIP
    torch.Size([1, 256])
    """
    dropped = dropped or {}
    count = GRID[0] * GRID[1]
    found: dict[str, list[Tensor]] = {name: [] for name in ("plain", *dropped)}
    for number, part in enumerate(pixels.split(BATCH)):
        with test_time_registers(model, neurons=neurons) if neurons else nullcontext(), capture_attention(model) as record:
            model(pixel_values=part)
        found["plain"].append(record.rollout(token=0, start_layer=start)[:, 1 : 1 + count].cpu())
        for name, mask in dropped.items():
            chosen = F.pad(mask[number * BATCH : number * BATCH + len(part)], (1, 0))
            matrices = record.attentions(layers=range(start, len(record.layers)))
            found[name].append(clean_rollout(matrices, chosen)[:, 1:].cpu())
        tick()
    return {name: torch.cat(rows) for name, rows in found.items()}


@dataclass(frozen=True)
class Concentration:
    """Of each map: its largest share, the exponential of its entropy (patches), its mass on the object or None; (n,)."""

    largest: Tensor
    spread: Tensor
    mass: Tensor | None


def concentration(maps: Tensor, cover: Tensor | None = None) -> Concentration:
    """How far maps (n, P) are concentrated, and where.

    Examples
    --------
    >>> even = concentration(torch.ones(1, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    >>> float(even.largest), float(even.mass), round(float(even.spread), 4)
    (0.25, 0.25, 4.0)
    """
    shares = maps.double() / maps.double().sum(1, keepdim=True)
    entropy = ops.conciseness(shares, gini=False)[:, 1]
    return Concentration(shares.amax(1), entropy.exp(), None if cover is None else (shares * cover).sum(1))


# ---- probes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probed:
    """Probes of one group of tokens by kind, one for each fold of pictures; and the group's tokens in all pictures."""

    probes: dict[str, list[Probe]]
    tokens: int

    def values(self, kind: str, field: str) -> Tensor:
        """A field of the probes, (folds,)."""
        return torch.tensor([float(getattr(probe, field)) for probe in self.probes[kind]])

    def mean(self, kind: str, field: str) -> tuple[float, float]:
        """Its mean over the folds, and their standard deviation."""
        values = self.values(kind, field)
        return float(values.mean()), float(values.std()) if len(values) > 1 else float("nan")


def groups_of(chosen: dict[str, Tensor], like: str, most: int = 50, seed: int = 0) -> tuple[Tensor, tuple[str, ...]]:
    """Number the tokens by group: many ordinary ones, as many ordinary ones as `like` has in each picture, and the chosen.

    Parameters
    ----------
    chosen : dict of str to Tensor of bool, shape (n, P)
        A token of several groups is in the first.
    like : str
        One of them.
    most : int
        Of the many, in each picture.
    seed : int

    Returns
    -------
    groups : Tensor of int64, shape (n, P)
        -1 for tokens that are in none.
    names : tuple of str

    Examples
    --------
    >>> groups, names = groups_of({"odd": torch.tensor([[True, False, False, False]])}, "odd", most=2)
    >>> groups.sort().values, names
    (tensor([[0, 0, 1, 2]]), ('Ordinary, many', 'Ordinary, as few', 'odd'))
    """
    names = ("Ordinary, many", "Ordinary, as few", *chosen)
    groups = torch.full(chosen[like].shape, -1)
    for number, mask in reversed(list(enumerate(chosen.values(), 2))):
        groups[mask] = number
    few = (groups == names.index(like)).sum(1)
    generator = torch.Generator().manual_seed(seed)
    for row, count in zip(groups, few.tolist(), strict=True):
        free = (row < 0).nonzero().flatten()
        order = free[torch.randperm(len(free), generator=generator)]
        row[order[:count]] = 1
        row[order[count : count + most]] = 0
    return groups, names


@torch.no_grad()
def tokens_after(
    model: Any, pixels: Tensor, block: int, tick: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches after a block (n, P, D), norms of all tokens (L, n, 1 + P), and attention that block 1 pays patches (n, P).

    Examples
    --------
    >>> tokens_after(load_dinov2(), load_photo("cat", 224).pixels, 10)[0].shape  # doctest: +SKIP
    torch.Size([1, 256, 384])
    """
    states, norms, received = [], [], []
    for part in pixels.split(BATCH):
        with capture_attention(model) as record:
            found = token_norms(model, {"pixel_values": part}, keep_hidden=True)
        assert found.hidden is not None
        states.append(found.hidden[block][:, 1:].cpu())
        norms.append(found.norms.cpu())
        first = record.attentions(layers=[0])[0]
        received.append((first.mean((1, 2))[:, 1:] * first.shape[-1]).cpu())
        tick()
    return torch.cat(states), torch.cat(norms, 1), torch.cat(received)


def probe_groups(
    states: Tensor, groups: Tensor, names: Sequence[str], pictures: Pictures, folds: int = 4, l2: Sequence[float] = PENALTIES
) -> dict[str, Probed]:
    """Probe every group for position, coordinates, pixels and class; each fold of the pictures is held out once.

    One probe for all groups tells the position, since a group has too few tokens of each place; the others are fitted to a
    group's own tokens.

    Parameters
    ----------
    states : Tensor, shape (n, P, D)
    groups : Tensor of int64, shape (n, P)
        Negative: in no group.
    names : sequence of str
    pictures : Pictures
    folds : int
        At least 2.
    l2 : sequence of float
        Penalties to choose from.

    Returns
    -------
    dict of str to Probed

    Examples
    --------
    >>> from xai_fast.demo.artifacts.pictures import crops_of_photos
    >>> groups = (torch.arange(256) % 2).expand(16, -1)
    >>> found = probe_groups(torch.randn(16, 256, 5), groups, ("even", "odd"), crops_of_photos(16))
    >>> found["odd"].tokens, len(found["odd"].probes["class"])
    (2048, 4)
    """
    count = len(states)
    numbers = torch.arange(count)
    place = torch.arange(states.shape[1])
    targets: dict[str, Tensor] = {
        "position": place.expand(count, -1),
        "coordinates": torch.stack([place // GRID[1], place % GRID[1]], 1).float().expand(count, -1, -1),
        "pixels": patch_pixels(pictures.pixels.cpu()),
        "class": pictures.labels[:, None].expand(count, states.shape[1]),
    }
    kept = groups >= 0
    image = numbers[:, None].expand_as(groups)[kept]
    found: dict[str, dict[str, list[Probe]]] = {name: {kind: [] for kind in KINDS} for name in names}
    for fold in range(folds):
        for kind in KINDS:
            options: dict[str, Any] = {"fit": "all", "grid": GRID} if kind == "position" else {}
            probes = probe_tokens(
                states[kept], targets[kind][kept], kind=kind, groups=groups[kept], images=image,  # type: ignore[arg-type]
                holdout=numbers[fold::folds].tolist(), group_names=names, l2=l2, **options,
            )  # fmt: skip
            for name, probe in probes.items():
                found[name][kind].append(probe)
    return {name: Probed(probes, int((groups == number).sum())) for number, (name, probes) in enumerate(found.items())}


# ---- test-time registers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """What moving neurons to registers did.

    Attributes
    ----------
    neurons : tuple of RegisterNeuron
    before, after : Tensor, shape (L,)
        The largest norm of a patch over the median of its picture, mean over pictures.
    register : Tensor, shape (L,)
        The same for the register.
    received : Tensor, shape (L,)
        Attention that the register receives, in multiples of the uniform share.
    similarity : float
        Cosine between the CLS tokens of the last block, with and without registers.
    """

    neurons: tuple[RegisterNeuron, ...]
    before: Tensor
    after: Tensor
    register: Tensor
    received: Tensor
    similarity: float


@torch.no_grad()
def moved(model: Any, pixels: Tensor, neurons: Sequence[RegisterNeuron | tuple[int, int]]) -> Moved:
    """Run pictures with and without the neurons moved to one register.

    Examples
    --------
    >>> moved(load_dinov2(), load_photo("cat", 224).pixels, [(3, 17)]).after.shape  # doctest: +SKIP
    torch.Size([12])
    """
    before, after, register, received, similar = [], [], [], [], []
    for part in pixels.split(BATCH):
        inputs = {"pixel_values": part}
        plain = token_norms(model, inputs, keep_hidden=True)
        with (
            test_time_registers(model, neurons=neurons, keep_registers=True),
            capture_attention(model) as record,
        ):
            changed = token_norms(model, inputs, keep_hidden=True)
        assert plain.hidden is not None
        assert changed.hidden is not None
        median = changed.norms[..., 1:-1].median(2).values
        before.append((plain.norms[..., 1:].amax(2) / plain.norms[..., 1:].median(2).values).cpu())
        after.append((changed.norms[..., 1:-1].amax(2) / median).cpu())
        register.append((changed.norms[..., -1] / median).cpu())
        received.append(torch.stack([a[..., -1].mean((1, 2)) * a.shape[-1] for a in record.attentions()]).cpu())
        similar.append(F.cosine_similarity(plain.hidden[-1][:, 0], changed.hidden[-1][:, 0], dim=-1).cpu())
    chosen = tuple(RegisterNeuron(*neuron) for neuron in neurons)
    means = [torch.cat(values, 1).mean(1) for values in (before, after, register, received)]
    return Moved(chosen, means[0], means[1], means[2], means[3], float(torch.cat(similar).mean()))
