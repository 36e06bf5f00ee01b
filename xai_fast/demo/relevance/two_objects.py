"""Two photos side by side, and which of them the relevance for a class falls on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xai_fast import capture_attention, lrp
from xai_fast.viz import patch_grid

from ..photos import load_photo

__all__ = [
    "ATTNLRP",
    "CLASSES",
    "GRADIENT",
    "ROLLOUT",
    "TARGETED_LRP",
    "ClassMaps",
    "PhotoClassifier",
    "Scene",
    "explain_scene",
    "fit_classifier",
    "make_scene",
    "share_on_half",
]

CLASSES = ("cat", "motorcycle", "coffee", "rocket")
ROLLOUT, GRADIENT, TARGETED_LRP, ATTNLRP = "Rollout", "Targeted, gradient", "Targeted, LRP", "AttnLRP"
PATCH = 14

# Strength of the ridge penalty, relative to the mean variance of the features.
PENALTY = 0.1


class PhotoClassifier(nn.Module):
    """A vision transformer and a linear head on its CLS token.

    Parameters
    ----------
    backbone : nn.Module
        Takes ``pixel_values`` (B, 3, H, W) and returns a ``last_hidden_state`` whose token 0 is CLS.
    weight, bias : Tensor, shapes (K, D) and (K,)

    Examples
    --------
    >>> from xai_fast.demo.models.dinov2 import load_dinov2
    >>> model = PhotoClassifier(load_dinov2(), torch.zeros(4, 384), torch.zeros(4))  # doctest: +SKIP
    >>> model(torch.zeros(1, 3, 28, 56)).shape  # doctest: +SKIP
    torch.Size([1, 4])
    """

    def __init__(self, backbone: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.head(self.backbone(pixel_values=pixel_values).last_hidden_state[:, 0])


@dataclass(frozen=True)
class Scene:
    """Two photos side by side; `left` and `right` are their classes."""

    left: str
    right: str
    picture: np.ndarray  # (H, 2 H, 3) bytes
    pixels: Tensor  # (1, 3, H, 2 H)


@dataclass(frozen=True)
class ClassMaps:
    """The maps (h, w) of a scene for one class, by name."""

    name: str
    is_left: bool
    logit: float
    maps: dict[str, Tensor]

    def shares(self) -> dict[str, float]:
        """Share of the positive part of each map on the half that shows the class."""
        return {title: share_on_half(heat, self.is_left) for title, heat in self.maps.items()}


def share_on_half(heat: Tensor, left: bool) -> float:
    """Share of the positive part of a map (h, w) on its left or right half.

    Examples
    --------
    >>> share_on_half(torch.tensor([[3.0, -5.0, 1.0, 0.0]]), left=True)
    0.75
    """
    positive = heat.clamp_min(0)
    middle = heat.shape[1] // 2
    half = positive[:, :middle] if left else positive[:, middle:]
    return float(half.sum() / positive.sum())


def make_scene(left: str, right: str, side: int) -> Scene:
    """Put two photos of scikit-image side by side.

    Parameters
    ----------
    left, right : str
        Of `xai_fast.demo.photos.PHOTOS`.
    side : int
        Height of the picture and half its width, a multiple of 14.

    Examples
    --------
    >>> make_scene("cat", "coffee", 56).pixels.shape
    torch.Size([1, 3, 56, 112])
    """
    photos = [load_photo(name, side) for name in (left, right)]
    picture = np.concatenate([photo.picture for photo in photos], axis=1)
    return Scene(left, right, picture, torch.cat([photo.pixels for photo in photos], dim=-1))


@torch.no_grad()
def fit_classifier(
    backbone: nn.Module,
    side: int,
    *,
    singles: int = 16,
    rounds: int = 3,
    device: torch.device | None = None,
    tick: Callable[[], object] = lambda: None,
) -> tuple[PhotoClassifier, float]:
    """Fit a linear head that tells which of the `CLASSES` a picture shows, by ridge regression on CLS features.

    It learns from random crops, half of them flipped, of the one photo of each class: alone (target 1 for its class) and
    in pairs side by side (target 1 for both), since the pictures to explain are pairs.

    Parameters
    ----------
    backbone : nn.Module
        As `PhotoClassifier` takes it.
    side : int
        Side of the photos, from which crops of at least half that side are taken.
    singles : int
        Single crops per class; half as many more are kept for testing.
    rounds : int
        How often every ordered pair of classes is drawn.
    device : torch.device, optional
    tick : callable
        Called after each class and each round, ``len(CLASSES) + rounds`` times.

    Returns
    -------
    model : PhotoClassifier
        In evaluation mode.
    accuracy : float
        Share of the single test crops named correctly.

    Examples
    --------
    >>> from xai_fast.demo.models.dinov2 import load_dinov2
    >>> model, accuracy = fit_classifier(load_dinov2(), 224)  # doctest: +SKIP
    """
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    photos = [load_photo(name, side).pixels[0] for name in CLASSES]

    def features(pixels: Sequence[Tensor]) -> Tensor:
        return backbone(pixel_values=torch.stack(list(pixels)).to(device)).last_hidden_state[:, 0].double().cpu()

    found, targets, tests = [], [], []
    for index, photo in enumerate(photos):
        crops = features([_crop(photo, generator) for _ in range(singles + singles // 2)])
        found.append(crops[:singles])
        tests.append(crops[singles:])
        targets.append(_targets([(index,)] * singles))
        tick()
    for _ in range(rounds):
        pairs = list(itertools.permutations(range(len(CLASSES)), 2))
        found.append(features([torch.cat([_crop(photos[i], generator) for i in pair], dim=-1) for pair in pairs]))
        targets.append(_targets(pairs))
        tick()
    weight, bias = _ridge(torch.cat(found), torch.cat(targets))
    named = torch.stack([(test @ weight.T + bias).argmax(-1) for test in tests])
    accuracy = float((named == torch.arange(len(CLASSES))[:, None]).double().mean())
    return PhotoClassifier(backbone, weight.float(), bias.float()).to(device).eval(), accuracy


def _crop(photo: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of at least half the photo's side, flipped or not, at half the side."""
    full = photo.shape[-1]
    size = full // 2 // PATCH * PATCH

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = draw(full // 2, full)
    top, left = draw(0, full - side), draw(0, full - side)
    square = photo[None, :, top : top + side, left : left + side]
    crop = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(-1) if draw(0, 1) else crop


def _targets(shown: Sequence[Sequence[int]]) -> Tensor:
    targets = torch.zeros(len(shown), len(CLASSES), dtype=torch.float64)
    for row, classes in zip(targets, shown, strict=True):
        row[list(classes)] = 1
    return targets


def _ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of a ridge regression with a free bias."""
    mean, offset = features.mean(0), targets.mean(0)
    centred = features - mean
    penalty = PENALTY * centred.square().sum() / features.shape[1]
    gram = centred.T @ centred + penalty * torch.eye(features.shape[1], dtype=features.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (targets - offset)).T
    return weight, offset - weight @ mean


def explain_scene(model: PhotoClassifier, scene: Scene) -> list[ClassMaps]:
    """All maps of a scene for its two classes: one captured forward pass, and AttnLRP for each class.

    Parameters
    ----------
    model : PhotoClassifier
    scene : Scene

    Returns
    -------
    list of ClassMaps
        For the class on the left, then for the one on the right. AttnLRP is summed over the channels and pixels of each
        patch and has a sign, the other maps have none.

    Examples
    --------
    >>> explain_scene(model, make_scene("cat", "coffee", 224))[0].name  # doctest: +SKIP
    'cat'
    """
    pixels = scene.pixels.to(model.head.weight.device)
    grid = (pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH)
    with capture_attention(model) as record:
        logits = model(pixels)
    rollout = record.rollout(token=0)
    found = []
    for name, is_left in ((scene.left, True), (scene.right, False)):
        target = CLASSES.index(name)
        tokens = {
            ROLLOUT: rollout,
            GRADIENT: record.relevance(logits[:, target], token=0, method="gradient"),
            TARGETED_LRP: record.relevance(logits[:, target], token=0, method="lrp"),
        }
        maps = {title: patch_grid(rows.detach().cpu(), grid=grid)[0] for title, rows in tokens.items()}
        maps[ATTNLRP] = _per_patch(lrp.attribute(model, pixels, target).cpu())
        found.append(ClassMaps(name, is_left, float(logits[0, target].detach()), maps))
    return found


def _per_patch(relevance: Tensor) -> Tensor:
    """Relevance of pixels (1, 3, H, W), summed over channels and over each patch."""
    return F.avg_pool2d(relevance.sum(1), PATCH, divisor_override=1)[0]
