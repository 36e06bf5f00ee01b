"""Explanations of a photo classifier, judged: scenes of two photos, a head on DINOv2, five methods, all measures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xai_fast import capture_attention, lrp
from xai_fast.metrics.explainers import gradient_times_input
from xai_fast.viz import patch_grid

from ..photos import MEAN, STD, load_photo
from ..relevance.two_objects import CLASSES, PATCH, PhotoClassifier
from .measuring import ATTNLRP, GRADIENT, GRADIENT_INPUT, RANDOM, ROLLOUT, Effort, Explain, Judged, judge, random_like

__all__ = ["PENALTY", "SIDE", "JudgedPhotos", "Scenes", "draw_scenes", "fit_head", "judge_photos", "photo_explainers"]

# Side of a half of a scene, in pixels: 7 x 7 patches.
SIDE = 98
# Side of the photos that the crops are cut from.
PHOTO = 392
# Of the squared weights of the head, beside the mean cross-entropy.
PENALTY = 1e-3


@dataclass(frozen=True)
class Scenes:
    """Crops of two photos side by side; `shown` holds the classes on the left and on the right."""

    pixels: Tensor  # (B, 3, SIDE, 2 SIDE)
    pictures: list[np.ndarray]  # (H, 2 H, 3) bytes, finer than what the model gets
    shown: list[tuple[int, int]]


@dataclass(frozen=True)
class JudgedPhotos:
    """The judged scenes: maps (B, h, w) by method, predicted classes with their probabilities, and on how many the head was
    fitted."""

    scenes: Scenes
    targets: list[int]
    probabilities: list[float]
    maps: dict[str, Tensor]
    judged: Judged
    effort: Effort
    trained: int

    @property
    def right(self) -> int:
        """Scenes whose predicted class is one of the two that are shown."""
        return sum(target in pair for target, pair in zip(self.targets, self.scenes.shown, strict=True))


def draw_scenes(rounds: int, seed: int, side: int = SIDE) -> Scenes:
    """Draw scenes: every ordered pair of classes in every round, random crops, half of them flipped.

    Parameters
    ----------
    rounds : int
    seed : int
    side : int
        Side of a half in pixels.

    Examples
    --------
    >>> draw_scenes(1, 0).pixels.shape
    torch.Size([12, 3, 98, 196])
    """
    generator = torch.Generator().manual_seed(seed)
    photos = [load_photo(name, PHOTO).pixels for name in CLASSES]
    shown = list(itertools.permutations(range(len(CLASSES)), 2)) * rounds
    squares = [[_square(photos[index], generator) for index in pair] for pair in shown]
    pixels = [torch.cat([_resized(square, side) for square in pair], dim=-1) for pair in squares]
    fine = [torch.cat([_resized(square, PHOTO // 2) for square in pair], dim=-1)[0] for pair in squares]
    return Scenes(torch.cat(pixels), [_bytes(scene) for scene in fine], shown)


def _square(photo: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of at least half the photo's side, flipped or not."""

    def draw(high: int) -> int:
        return int(torch.randint(0, high + 1, (), generator=generator))

    side = PHOTO // 2 + draw(PHOTO // 2)
    top, left = draw(PHOTO - side), draw(PHOTO - side)
    square = photo[..., top : top + side, left : left + side]
    return square.flip(-1) if draw(1) else square


def _resized(square: Tensor, side: int) -> Tensor:
    return F.interpolate(square, size=(side, side), mode="bilinear", antialias=True)


def _bytes(pixels: Tensor) -> np.ndarray:
    """What the eye sees of normalised pixels (3, H, W)."""
    colours = pixels.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
    return (255 * colours.clamp(0, 1)).round().byte().numpy()


# ---- the head -------------------------------------------------------------------------------------------------------------


def fit_head(
    backbone: nn.Module, rounds: int, device: torch.device, tick: Callable[[], object] = lambda: None
) -> tuple[PhotoClassifier, int]:
    """Softmax regression on the CLS token, from scenes as they are and with parts of them greyed.

    The measures grey patches. A head that has seen grey does not take it for a class: both halves visible, or a random
    half of the patches, have the target 1/2 for either class; one half alone 1 for its class; grey alone 1/4 for each.

    Parameters
    ----------
    backbone : nn.Module
        As `PhotoClassifier` takes it.
    rounds : int
        How often every ordered pair of classes is drawn.
    device : torch.device
    tick : callable
        Called after each of the four kinds of pictures.

    Returns
    -------
    model : PhotoClassifier
        In evaluation mode.
    trained : int
        Pictures it was fitted on.

    Examples
    --------
    >>> from xai_fast.demo.models.dinov2 import load_dinov2
    >>> model, trained = fit_head(load_dinov2(), 3, torch.device("cpu"))  # doctest: +SKIP
    """
    scenes = draw_scenes(rounds, seed=0)
    grey = scenes.pixels.mean((2, 3), keepdim=True)
    patches = (len(scenes.shown), 1, SIDE // PATCH, 2 * SIDE // PATCH)
    left = torch.zeros(patches, dtype=torch.bool)
    left[..., : SIDE // PATCH] = True
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(patches, generator=generator) < 0.5
    classes = torch.eye(len(CLASSES))
    halves = [classes[[pair[side] for pair in scenes.shown]] for side in (0, 1)]
    both = (halves[0] + halves[1]) / 2
    kinds = [(torch.ones_like(left), both), (some, both), (left, halves[0]), (~left, halves[1])]
    features, targets = [], []
    for kept, target in kinds:
        pixels = torch.where(_enlarged(kept), scenes.pixels, grey)
        features.append(_cls(backbone, pixels.to(device)))
        targets.append(target)
        tick()
    features.append(_cls(backbone, grey.expand_as(scenes.pixels)[: len(CLASSES)].to(device)))
    targets.append(torch.full((len(CLASSES), len(CLASSES)), 1 / len(CLASSES)))
    weight, bias = _softmax_regression(torch.cat(features), torch.cat(targets).double())
    return PhotoClassifier(backbone, weight.float(), bias.float()).to(device).eval(), sum(map(len, features))


@torch.no_grad()
def _cls(backbone: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([backbone(pixel_values=part).last_hidden_state[:, 0].double().cpu() for part in pixels.split(36)])


def _softmax_regression(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) at the minimum of cross-entropy plus penalty."""
    weight = torch.zeros(targets.shape[1], features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, targets) + PENALTY * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach(), bias.detach()


def _enlarged(patches: Tensor) -> Tensor:
    """Values of patches (..., h, w) at their pixels."""
    return patches.repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)


# ---- the methods ----------------------------------------------------------------------------------------------------------


def photo_explainers(model: PhotoClassifier) -> dict[str, Explain]:
    """The methods as ``explain(pixels, target)``; maps (B, 1, H, W) that are constant on each patch.

    A patch has the sum of its pixels and channels, also where a method is finer: so all methods are judged on the same
    features.

    Parameters
    ----------
    model : PhotoClassifier

    Examples
    --------
    >>> list(photo_explainers(model))  # doctest: +SKIP
    ['Rollout', 'Targeted, gradient', 'AttnLRP', 'Gradient x input', 'Random']
    """

    def rollout(pixels: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad(), capture_attention(model) as record:
            model(pixels)
        return _of_tokens(record.rollout(token=0), pixels)

    def targeted(pixels: Tensor, target: Tensor) -> Tensor:
        with capture_attention(model) as record:
            logits = model(pixels)
        return _of_tokens(record.relevance(logits.gather(1, target[:, None])[:, 0], token=0).detach(), pixels)

    def attnlrp(pixels: Tensor, target: Tensor) -> Tensor:
        return _of_pixels(lrp.attribute(model, pixels, target))

    def gradient_input(pixels: Tensor, target: Tensor) -> Tensor:
        return _of_pixels(gradient_times_input(model).maps(pixels, target))

    def random(pixels: Tensor, target: Tensor) -> Tensor:
        rows, columns = (length // PATCH for length in pixels.shape[-2:])
        return _enlarged(random_like(pixels, (1, rows, columns)) / PATCH**2)

    return {ROLLOUT: rollout, GRADIENT: targeted, ATTNLRP: attnlrp, GRADIENT_INPUT: gradient_input, RANDOM: random}


def _of_tokens(rows: Tensor, pixels: Tensor) -> Tensor:
    grid = (pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH)
    return _enlarged(patch_grid(rows, grid=grid)[:, None] / PATCH**2)


def _of_pixels(relevance: Tensor) -> Tensor:
    return _enlarged(F.avg_pool2d(relevance.sum(1, keepdim=True), PATCH))


def _patches(maps: Tensor) -> Tensor:
    """One value per patch, (B, h, w), of maps (B, 1, H, W)."""
    return F.avg_pool2d(maps, PATCH, divisor_override=1)[:, 0]


# ---- judged ---------------------------------------------------------------------------------------------------------------


def judge_photos(
    backbone: nn.Module,
    effort: Effort,
    *,
    training: int,
    rounds: int,
    most: int | None = None,
    device: torch.device | None = None,
    tick: Callable[[], object] = lambda: None,
) -> JudgedPhotos:
    """Fit the head, draw new scenes, explain the class that it predicts, and measure.

    Parameters
    ----------
    backbone : nn.Module
        As `PhotoClassifier` takes it.
    effort : Effort
    training, rounds : int
        Rounds of scenes for the head, and for the measures.
    most : int, optional
        Only so many of the judged scenes.
    device : torch.device, optional
    tick : callable
        Called 4 times for the head, then as `judge` does.

    Examples
    --------
    >>> from xai_fast.demo.models.dinov2 import load_dinov2
    >>> effort = Effort((0.5, 0.8), 5, 10, 2)
    >>> judge_photos(load_dinov2(), effort, training=3, rounds=1).judged.study.ranking()  # doctest: +SKIP
    """
    device = device or torch.device("cpu")
    model, trained = fit_head(backbone, training, device, tick)
    # Seed 0 drew the pictures that the head was fitted on.
    scenes = _first(draw_scenes(rounds, seed=1), most)
    pixels = scenes.pixels.to(device)
    with torch.no_grad():
        probabilities, targets = model(pixels).softmax(1).max(1)
    explainers = photo_explainers(model)
    judged = judge(
        explainers, model, pixels, effort, baseline="mean", masks=_halves(scenes, targets.tolist()).to(device),
        patch_size=PATCH, features=_patches, tick=tick,
    )  # fmt: skip
    maps = {name: _patches(explain(pixels, targets)).cpu() for name, explain in explainers.items()}
    return JudgedPhotos(scenes, targets.tolist(), probabilities.tolist(), maps, judged, effort, trained)


def _first(scenes: Scenes, most: int | None) -> Scenes:
    return Scenes(scenes.pixels[:most], scenes.pictures[:most], scenes.shown[:most])


def _halves(scenes: Scenes, targets: Sequence[int]) -> Tensor:
    """True on the half that shows the predicted class; all false, hence no value, where neither does."""
    masks = torch.zeros(len(targets), SIDE, 2 * SIDE, dtype=torch.bool)
    for mask, target, pair in zip(masks, targets, scenes.shown, strict=True):
        if target in pair:
            start = pair.index(target) * SIDE
            mask[:, start : start + SIDE] = True
    return masks
