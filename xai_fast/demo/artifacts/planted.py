"""High-norm tokens planted in a copy of a model: a few neurons that fire at some patches, as in models that have them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pictures import patch_pixels

__all__ = ["Planted", "fired", "plant"]

# The block, from 0, whose MLP gets the neurons; the neurons, and how many of the patches they shall fire at.
BLOCK, NEURONS, SHARE = 6, (10, 200, 777, 1400), 0.015
# Activation per standard deviation above the threshold, and what an activation of ACTIVATION adds to the norm.
ACTIVATION, NORM = 30.0, 30.0
# Of the direction that is written: how much of it is random, not chosen to draw attention.
RANDOM = 0.6
# Flattest patches of a picture, which the neurons learn to fire at.
FLATTEST = 4
# Of CLS, against a patch, in the fit.
CLS_WEIGHT = 30.0


@dataclass(frozen=True)
class Planted:
    """The changed copy, the block (from 0) and the neurons that were planted."""

    model: Any
    block: int
    neurons: tuple[int, ...]


@torch.no_grad()
def plant(model: Any, pixels: Tensor) -> Planted:
    """Overwrite four neurons of the MLP of a block so that they fire at few patches and write a large vector there.

    They read a direction that tells the flattest patches of a picture, the uninformative ones, from the others, by ridge
    regression on `pixels`. They write a direction that the keys of later blocks answer to while their values do not: such
    tokens draw attention and pass little on, like those that models learn.

    Parameters
    ----------
    model : nn.Module
        A Dinov2Model.
    pixels : Tensor, shape (n, 3, 224, 224)
        Pictures on which the neurons are fitted; others than those that are looked at.

    Examples
    --------
    >>> from xai_fast.demo.artifacts.pictures import crops_of_photos
    >>> from xai_fast.demo.models.dinov2 import load_dinov2
    >>> plant(load_dinov2(), crops_of_photos(16).pixels).neurons  # doctest: +SKIP
    (10, 200, 777, 1400)
    """
    changed = copy.deepcopy(model)
    block = changed.encoder.layer[BLOCK]
    tokens, queries = _read(model, pixels)
    reading, threshold = _flat_direction(tokens, patch_pixels(pixels))
    writing = _sink_direction(model, queries)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    for neuron in NEURONS:
        fc1.weight[neuron], fc1.bias[neuron] = ACTIVATION * reading, -ACTIVATION * threshold
        # The layer scale would change the direction.
        fc2.weight[:, neuron] = writing / block.layer_scale2.lambda1 * NORM / ACTIVATION / len(NEURONS)
    return Planted(changed, BLOCK, NEURONS)


@torch.no_grad()
def fired(planted: Planted, pixels: Tensor) -> Tensor:
    """At which patches the planted neurons are active, (n, 256).

    Examples
    --------
    >>> fired(planted, pixels).float().mean()  # doctest: +SKIP
    tensor(0.0161)
    """
    layers = planted.model.encoder.layer
    seen: list[Tensor] = []
    hook = layers[planted.block].mlp.fc1.register_forward_hook(
        lambda _, __, output: seen.append(output[:, 1:, planted.neurons[0]] > 0)
    )
    try:
        for part in pixels.split(8):
            planted.model(pixel_values=part)
    finally:
        hook.remove()
    return torch.cat(seen)


def _read(model: Any, pixels: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """What the MLP of the block reads (n, 1 + 256, D), and the mean query of every later block."""
    layers = model.encoder.layer
    tokens: list[Tensor] = []
    queries: dict[int, list[Tensor]] = {}
    hooks = [layers[BLOCK].norm2.register_forward_hook(lambda _, __, output: tokens.append(output))]
    for place in range(BLOCK + 1, len(layers)):
        queries[place] = []
        hooks.append(
            layers[place].attention.q_proj.register_forward_hook(
                lambda _, __, output, place=place: queries[place].append(output.mean((0, 1)))
            )
        )
    try:
        for part in pixels.split(8):
            model(pixel_values=part)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(tokens), {place: torch.stack(found).mean(0) for place, found in queries.items()}


def _flat_direction(tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Direction (D,) of unit spread that tells the flattest patches, and the threshold that a share of patches exceeds."""
    flattest = patches.std(2).argsort(1)[:, :FLATTEST]
    wanted = torch.zeros(patches.shape[:2], device=tokens.device).scatter_(1, flattest, 1.0).flatten().double()
    x = tokens[:, 1:].flatten(0, 1).double()
    centred = x - x.mean(0)
    # CLS is no patch, and shall be as far from the threshold as an average one.
    cls = CLS_WEIGHT * (tokens[:, 0].double() - x.mean(0))
    gram = centred.T @ centred + cls.T @ cls
    penalty = 0.01 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    direction = torch.linalg.solve(gram + penalty, centred.T @ (wanted - wanted.mean()))
    direction = direction / (x @ direction).std()
    return direction.float(), (x @ direction).quantile(1 - SHARE).float()


def _sink_direction(model: Any, queries: dict[int, Tensor]) -> Tensor:
    """Unit vector (D,) that the mean queries of later blocks attend to, and that their values hardly pass on."""
    layers = model.encoder.layer
    attended: Tensor | float = 0.0
    passed: Tensor | float = 0.0
    for place, query in queries.items():
        layer = layers[place]
        scale = layer.norm1.weight
        keys = (query @ layer.attention.k_proj.weight) * scale
        attended = attended + keys / keys.norm()
        values = layer.layer_scale1.lambda1[:, None] * (
            layer.attention.o_proj.weight @ (layer.attention.v_proj.weight * scale)
        )
        passed = passed + values.T @ values / values.square().sum()
    assert isinstance(attended, Tensor)
    assert isinstance(passed, Tensor)
    penalty = 0.01 * passed.trace() / len(passed) * torch.eye(len(passed), device=passed.device)
    direction = torch.linalg.solve(passed + penalty, attended)
    random = torch.randn(len(direction), generator=torch.Generator().manual_seed(1)).to(direction)
    mixed = (1 - RANDOM) * _unit(direction - direction.mean()) + RANDOM * _unit(random - random.mean())
    return _unit(mixed)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm()
