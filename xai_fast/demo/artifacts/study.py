"""What the artifacts page shows of DINOv2, measured: the unchanged model, and the copy with planted neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast.attention.artifacts import (
    OutlierLayers,
    Outliers,
    RegisterNeuron,
    find_register_neurons,
    outlier_layers,
    test_time_registers,
)

from ..photos import load_photo
from ..rollout.sinks import SINK_FACTOR
from .dinov2 import (
    PENALTIES,
    Concentration,
    Looked,
    Moved,
    Probed,
    concentration,
    groups_of,
    look,
    moved,
    outliers_by_rule,
    probe_groups,
    rollouts,
    strongest,
    tokens_after,
)
from .pictures import SIDE, Pictures
from .planted import fired, plant

__all__ = ["DROPPED", "HIGH", "LATER", "MAD", "ORIGINAL", "PLAIN", "PLANTED", "REGISTER", "REMOVED", "SINK", "SINK_DROPPED"]
__all__ += ["UNPLANTED", "Control", "Effort", "Maps", "Real", "study_control", "study_real"]

MAD = "Median + 5 MAD of a picture"
PLAIN, DROPPED, SINK_DROPPED = "Rollout", "Norm outliers dropped", "Sink patches dropped"
REGISTER, LATER = "Test-time register", "From block 2"
ORIGINAL, PLANTED, REMOVED = "Before planting", "Planted", "Activity removed"
HIGH, SINK = "Highest norm", "Most attended in block 1"
UNPLANTED = "The same patches, before planting"
# Tokens of a picture in each of the groups: 2 % of them, the share of outliers that the paper finds.
FEW = 5
NEURONS = 10
# Pictures of the control: planted neurons do not fire on every one.
LEAST = 8


@dataclass(frozen=True)
class Effort:
    """How much is done: names of photos; pictures for probes, for rollout with masks, to fit the planted neurons on, and for
    the probes of the control; and into how many parts these are cut, each of which is held
    out once; penalties of the probes."""

    photos: tuple[str, ...]
    probed: int
    mapped: int
    fitted: int
    control: int
    folds: int = 4
    l2: tuple[float, ...] = PENALTIES


@dataclass(frozen=True)
class Maps:
    """Maps (n, P) by name, and how concentrated they are; `cover` as in `Pictures`."""

    maps: dict[str, Tensor]
    cover: Tensor | None

    def of(self, name: str) -> Concentration:
        """How one of them is concentrated."""
        return concentration(self.maps[name], self.cover)


@dataclass(frozen=True)
class Real:
    """What the unchanged model shows.

    Attributes
    ----------
    names, shown : photos
    looked : Looked
        At the photos.
    outliers : dict of str to Outliers
        By rule, among all tokens of the photos.
    sinks : Tensor of bool, shape (L, n, P)
        Patches that receive more than `SINK_FACTOR` times the uniform attention in a block.
    photo_maps, object_maps : Maps
    moved_sinks, moved_outliers : Moved
        With the neurons that are most active at the sink patches of block 1, and at norm outliers; None without those.
    pictures : Pictures
        Of the probes; the first ones are those of `object_maps`.
    largest : Tensor
        Of these pictures, the largest norm over the median in each block, (L, n).
    probed : dict of str to Probed
    both : int
        Tokens that are in both groups.
    """

    names: tuple[str, ...]
    shown: list[np.ndarray]
    looked: Looked
    outliers: dict[str, Outliers]
    sinks: Tensor
    photo_maps: Maps
    object_maps: Maps
    moved_sinks: Moved | None
    moved_outliers: Moved | None
    pictures: Pictures
    largest: Tensor
    probed: dict[str, Probed]
    both: int


@dataclass(frozen=True)
class Control:
    """What the copy with planted neurons shows.

    Attributes
    ----------
    block, neurons : int and tuple of int
        Where they were planted.
    fitted : int
        Pictures on which they were.
    fired, found : Tensor of bool, shape (n, P)
        Patches at which they are active; norm outliers after the block.
    layers : OutlierLayers
    looked : Looked
    top : list of RegisterNeuron
        Found by `find_register_neurons`, best first.
    moved : Moved
    maps : Maps
        From the block after it.
    pictures : Pictures
    similarity : dict of str to float
        Cosine between CLS and that of the original model, planted and with registers.
    probed : dict of str to Probed
    """

    block: int
    neurons: tuple[int, ...]
    fitted: int
    fired: Tensor
    found: Tensor
    layers: OutlierLayers
    looked: Looked
    top: list[RegisterNeuron]
    moved: Moved
    maps: Maps
    pictures: Pictures
    similarity: dict[str, float]
    probed: dict[str, Probed]

    def clearest(self, count: int) -> list[int]:
        """Places of the pictures on which planting concentrates the rollout most."""
        return self.maps.of(PLANTED).largest.topk(min(count, len(self.pictures.labels))).indices.tolist()

    @property
    def recovered(self) -> int:
        """How many of the planted neurons are among as many found ones."""
        planted = {(self.block, neuron) for neuron in self.neurons}
        return len(planted & {(found.layer, found.neuron) for found in self.top[: len(planted)]})


def study_real(model: Any, pictures: Pictures, effort: Effort, device: torch.device, tick: Callable[[], object]) -> Real:
    """Measure the unchanged model.

    Parameters
    ----------
    model : Dinov2Model
    pictures : Pictures
    effort : Effort
    device : torch.device
    tick : callable
        Called after each of 7 steps.
    """
    subjects = [load_photo(name, SIDE) for name in effort.photos]
    pixels = torch.cat([subject.pixels for subject in subjects]).to(device)
    looked = look(model, pixels)
    tick()
    outliers = outliers_by_rule(looked.norms)
    last = outliers[MAD].mask[-2]
    sinks = looked.received > SINK_FACTOR
    some = pictures.first(effort.mapped)
    objects = some.pixels.to(device)
    seen = look(model, objects)
    tick()
    at_sinks = _neurons(model, pixels, F.pad(sinks[0], (1, 0)))
    at_outliers = _neurons(model, pixels, last)
    photo_maps = Maps(_real_maps(model, pixels, looked, at_sinks), None)
    tick()
    object_maps = Maps(_real_maps(model, objects, seen, at_sinks), some.cover)
    tick()
    moves = [moved(model, pixels, neurons) if neurons else None for neurons in (at_sinks, at_outliers)]
    tick()
    wanted = pictures.first(effort.probed)
    states, norms, received = tokens_after(model, wanted.pixels.to(device), looked.norms.shape[0] - 2)
    tick()
    chosen = {HIGH: strongest(norms[-2, :, 1:], FEW), SINK: strongest(received, FEW)}
    groups, names = groups_of(chosen, HIGH)
    probed = probe_groups(states, groups, names, wanted, effort.folds, effort.l2)
    tick()
    return Real(
        names=effort.photos,
        shown=[subject.picture for subject in subjects],
        looked=looked,
        outliers=outliers,
        sinks=sinks,
        photo_maps=photo_maps,
        object_maps=object_maps,
        moved_sinks=moves[0],
        moved_outliers=moves[1],
        pictures=wanted,
        largest=norms[..., 1:].amax(2) / norms[..., 1:].median(2).values,
        probed=probed,
        both=int((chosen[HIGH] & chosen[SINK]).sum()),
    )


def _neurons(model: Any, pixels: Tensor, mask: Tensor) -> list[RegisterNeuron]:
    if not mask.any():
        return []
    return find_register_neurons(model, {"pixel_values": pixels}, mask.to(pixels.device), top=NEURONS)


def _real_maps(model: Any, pixels: Tensor, looked: Looked, neurons: list[RegisterNeuron]) -> dict[str, Tensor]:
    found = outliers_by_rule(looked.norms)[MAD].mask[-2, :, 1:]
    dropped = {DROPPED: found.to(pixels.device), SINK_DROPPED: (looked.received > SINK_FACTOR).any(0).to(pixels.device)}
    maps = rollouts(model, pixels, dropped=dropped)
    maps = {PLAIN: maps.pop("plain"), **maps}
    if neurons:
        maps[REGISTER] = rollouts(model, pixels, neurons=neurons)["plain"]
    return maps | {LATER: rollouts(model, pixels, start=1)["plain"]}


def study_control(
    model: Any, pictures: Pictures, effort: Effort, device: torch.device, tick: Callable[[], object]
) -> Control:
    """Plant neurons in a copy of the model and measure it; the pictures that they are fitted on are not looked at.

    Parameters are those of `study_real`; `tick` is called after each of 5 steps.
    """
    fitted = len(pictures.pixels) - effort.fitted
    planted = plant(model, pictures.pixels[fitted:].to(device))
    tick()
    some = pictures.first(min(max(effort.mapped, LEAST), fitted))
    pixels = some.pixels.to(device)
    looked = look(planted.model, pixels)
    mask = outliers_by_rule(looked.norms)[MAD].mask
    tick()
    at_outliers = mask[planted.block].to(device)
    top = _neurons(planted.model, pixels, at_outliers)
    own = [RegisterNeuron(planted.block, neuron) for neuron in planted.neurons]
    change = moved(planted.model, pixels, top[: len(own)] or own)
    start = planted.block + 1
    maps = {ORIGINAL: rollouts(model, pixels, start=start)["plain"]}
    found = rollouts(planted.model, pixels, start=start, dropped={DROPPED: at_outliers[:, 1:]})
    maps |= {PLANTED: found["plain"], DROPPED: found[DROPPED]}
    maps[REGISTER] = rollouts(planted.model, pixels, start=start, neurons=change.neurons)["plain"]
    tick()
    wanted = pictures.first(min(effort.control, fitted))
    block = looked.norms.shape[0] - 2
    states, norms, _ = tokens_after(planted.model, wanted.pixels.to(device), block)
    before, *_ = tokens_after(model, wanted.pixels.to(device), block)
    tick()
    chosen = {HIGH: outliers_by_rule(norms)[MAD].mask[planted.block, :, 1:]}
    groups, names = groups_of(chosen, HIGH)
    probed = probe_groups(states, groups, names, wanted, effort.folds, effort.l2)
    probed[UNPLANTED] = probe_groups(before, groups, names, wanted, effort.folds, effort.l2)[HIGH]
    tick()
    return Control(
        block=planted.block,
        neurons=planted.neurons,
        fitted=effort.fitted,
        fired=fired(planted, pixels).cpu(),
        found=mask[planted.block, :, 1:],
        layers=outlier_layers(mask),
        looked=looked,
        top=top,
        moved=change,
        maps=Maps(maps, some.cover),
        pictures=some,
        similarity=_similarity(model, planted.model, pixels, change.neurons),
        probed=probed,
    )


def _similarity(model: Any, planted: Any, pixels: Tensor, neurons: tuple[RegisterNeuron, ...]) -> dict[str, float]:
    """Mean cosine of CLS with that of the original: planted, with one register, and with the neurons' activity removed."""

    def cls(of: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([of(pixel_values=part).last_hidden_state[:, 0] for part in pixels.split(8)])

    original, found = cls(model), {PLANTED: cls(planted)}
    for name, count in ((REGISTER, 1), (REMOVED, 0)):
        with test_time_registers(planted, neurons=neurons, n_registers=count):
            found[name] = cls(planted)
    return {name: float(F.cosine_similarity(original, changed, dim=-1).mean()) for name, changed in found.items()}
