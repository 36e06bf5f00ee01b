"""Concepts tested on EfficientNet-Lite0: the pictures, the scores by layer and class, and other pictures to sort."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from xai_fast.concepts import TCAV, Concept, activations, sort_by_concept, tcav

from ..cutouts import load_cutouts
from ..models.efficientnet import SIDE, to_pixels
from ..wheels import or_reason
from .drawn_pictures import CONCEPTS, PHOTOS, cropped, draw, natural, photo, random_set, resized
from .found_pictures import load_textures, on_grey, pasted

__all__ = ["SORTED_AT", "STRIPED", "Collection", "Effort", "Studied", "cosines", "mean_cav", "passes", "run_tests"]

# The last block of each stage of the network but the first.
LAYERS = tuple(f"_blocks.{block}" for block in (2, 4, 7, 10, 14, 15))
# Those whose outputs have a length that can be kept for all pictures.
FLAT_LAYERS = ("_blocks.7", "_blocks.10", "_blocks.14", "_blocks.15")
SORTED_AT = "_blocks.10"
STRIPED = "striped"
# Class to the cut-out that shows it, and to the photo.
CUTOUTS = {340: "zebra", 339: "horse", 347: "bison", 949: "Strawberry2"}
PHOTOGRAPHED = {285: "chelsea", 967: "coffee"}
# Side of the crops, of the shorter side of the photo: less shows a part of the thing.
LEAST = 0.55
# What a CPU takes fastest, measured with 1 to 32.
BATCH = 8
SEED = 0


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    classes: tuple[int, ...] = (*CUTOUTS, *PHOTOGRAPHED)
    layers: tuple[str, ...] = LAYERS
    flat_layers: tuple[str, ...] = FLAT_LAYERS
    inputs: int = 24
    examples: int = 30
    sets: int = 24
    flat_sets: int = 12
    gathered: int = 1  # every n-th cut-out and texture is sorted


@dataclass(frozen=True)
class Collection:
    """Pictures, their names and kinds, and their activations (n, d)."""

    pictures: list[np.ndarray]
    names: list[str]
    kinds: list[str]
    activations: Tensor


@dataclass(frozen=True)
class Studied:
    """What was shown to the model, and what came out.

    Attributes
    ----------
    inputs : dict of int to list of ndarray
        Pictures of each class.
    named, probabilities : dict of int to float
        Share of them whose first choice is the class, and its mean probability.
    examples : dict of str to list of ndarray
        Pictures of each concept.
    random : list of list of ndarray
        The random sets.
    result, flat : TCAV
        With mean pooling, all classes; with flattened outputs, the first class and its stripes.
    collection : Collection
    missing : list of str
        Why pictures are missing.
    seconds, flat_seconds : float
    effort : Effort
    """

    inputs: dict[int, list[np.ndarray]]
    named: dict[int, float]
    probabilities: dict[int, float]
    examples: dict[str, list[np.ndarray]]
    random: list[list[np.ndarray]]
    result: TCAV
    flat: TCAV
    collection: Collection
    missing: list[str]
    seconds: float
    flat_seconds: float
    effort: Effort


def passes(effort: Effort) -> int:
    """Forward passes of `run_tests` at most, for the progress bar."""
    sets = (effort.sets + effort.flat_sets + len(CONCEPTS) + 1) * _batches(effort.examples)
    return sets + (2 * len(effort.classes) + 1) * _batches(effort.inputs) + _batches(24 + 180 // effort.gathered)


def run_tests(
    model: nn.Module, effort: Effort, device: torch.device, *, tick: Callable[[], object] = lambda: None
) -> Studied:
    """Draw the pictures, test the concepts, and sort pictures by them.

    Parameters
    ----------
    model : nn.Module
        Of `load_efficientnet`, on the device.
    effort : Effort
    device : torch.device
    tick : callable
        Called after each forward pass.

    Raises
    ------
    DataUnavailable
        Never for the cut-outs and textures: what they show is then left out, and `Studied.missing` says why.

    Examples
    --------
    >>> from xai_fast.demo.models.efficientnet import load_efficientnet
    >>> run_tests(load_efficientnet(), Effort(sets=3), torch.device("cpu")).result  # doctest: +SKIP
    TCAV(targets=(340, ...
    """
    cutouts = or_reason(lambda: {cutout.name: cutout.picture for cutout in load_cutouts()}, "cut-outs")
    textures = or_reason(load_textures, "textures")
    missing = [found for found in (cutouts, textures) if isinstance(found, str)]
    known: dict[str, np.ndarray] = {} if isinstance(cutouts, str) else cutouts
    inputs = _inputs(known, effort)
    examples = {name: draw(kind, effort.examples, 1 + place) for place, (name, kind) in enumerate(CONCEPTS.items())}
    random = [random_set(effort.examples, 1000 + place) for place in range(effort.sets)]
    with _ticking(model, tick):
        named, probabilities = _recognised(model, inputs, device)
        pixels = {target: to_pixels(pictures, device) for target, pictures in inputs.items()}
        concepts = [Concept(name, to_pixels(pictures)) for name, pictures in examples.items()]
        sets = [to_pixels(pictures) for pictures in random]
        result, seconds = _timed(lambda: _tested(model, effort.layers, pixels, concepts, sets))
        first = next(iter(pixels))
        flat, flat_seconds = _timed(
            lambda: _tested(
                model, effort.flat_layers, {first: pixels[first]}, concepts[:1], sets[: effort.flat_sets], pool="flatten"
            )
        )
        textured = {} if isinstance(textures, str) else textures
        collection = _collection(model, known, textured, effort, device)
    return Studied(
        inputs, named, probabilities, examples, random, result, flat, collection, missing, seconds, flat_seconds, effort
    )


def mean_cav(tested: Studied, concept: str) -> Tensor:
    """The mean of the CAVs of a concept at `SORTED_AT`, over the random sets."""
    return torch.stack([cav.vector for cav in tested.result.cavs[SORTED_AT][concept]]).mean(0)


def cosines(tested: Studied, concept: str) -> Tensor:
    """Of each picture of the collection."""
    return sort_by_concept(tested.collection.activations, mean_cav(tested, concept))[1]


def _inputs(cutouts: dict[str, np.ndarray], effort: Effort) -> dict[int, list[np.ndarray]]:
    found = {}
    for target in effort.classes:
        if target in PHOTOGRAPHED:
            whole = photo(PHOTOGRAPHED[target])
            found[target] = draw(partial(cropped, whole, least=LEAST), effort.inputs, target)
        elif cutouts:
            cutout = cutouts[CUTOUTS[target]]
            found[target] = draw(partial(_placed, cutout), effort.inputs, target)
    return found


def _placed(cutout: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return pasted(cutout, natural(rng), rng)


def _tested(
    model: nn.Module,
    layers: Sequence[str],
    inputs: dict[int, Tensor],
    concepts: list[Concept],
    sets: list[Tensor],
    pool: str = "mean",
) -> TCAV:
    generator = torch.Generator().manual_seed(SEED)
    options = {"pool": pool, "test": "exchangeable", "correction": None, "batch_size": BATCH, "generator": generator}
    return tcav(model, list(layers), inputs, list(inputs), concepts, sets, **options)  # type: ignore[arg-type]


@torch.no_grad()
def _recognised(
    model: nn.Module, inputs: dict[int, list[np.ndarray]], device: torch.device
) -> tuple[dict[int, float], dict[int, float]]:
    named, probabilities = {}, {}
    for target, pictures in inputs.items():
        parts = [model(part).softmax(1) for part in to_pixels(pictures, device).split(BATCH)]
        chances = torch.cat(parts)
        named[target] = float((chances.argmax(1) == target).double().mean())
        probabilities[target] = float(chances[:, target].mean())
    return named, probabilities


def _collection(
    model: nn.Module, cutouts: dict[str, np.ndarray], textures: dict[str, np.ndarray], effort: Effort, device: torch.device
) -> Collection:
    """Photos, cut-outs on grey, and textures; no picture of a concept among them."""
    groups = {
        "photo": {name: _middle(photo(name)) for name in (*PHOTOS, *PHOTOGRAPHED.values())},
        "cut-out": {name: on_grey(cutouts[name]) for name in _every(cutouts, effort.gathered)},
        "texture": {name: textures[name] for name in _every(textures, effort.gathered)},
    }
    pictures = [picture for group in groups.values() for picture in group.values()]
    names = [name for group in groups.values() for name in group]
    kinds = [kind for kind, group in groups.items() for _ in group]
    found = activations(model, SORTED_AT, to_pixels(pictures, device), batch_size=BATCH)
    return Collection(pictures, names, kinds, found)


def _every(named: dict[str, np.ndarray], step: int) -> list[str]:
    """Each n-th name, and those of the classes."""
    return [name for place, name in enumerate(named) if place % step == 0 or name in CUTOUTS.values()]


def _middle(picture: np.ndarray) -> np.ndarray:
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    return resized(picture[top : top + side, left : left + side], SIDE)


def _timed(work: Callable[[], TCAV]) -> tuple[TCAV, float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def _batches(count: int) -> int:
    return -(-count // BATCH)


@contextmanager
def _ticking(model: nn.Module, tick: Callable[[], object]) -> Iterator[None]:
    """Calls after every forward pass of the model."""
    hook = model.register_forward_hook(lambda *_: tick() and None)
    try:
        yield
    finally:
        hook.remove()
