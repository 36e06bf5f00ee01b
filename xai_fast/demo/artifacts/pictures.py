"""Pictures for the artifacts page: cut-out objects on textures, whose class and place are known; or crops of photos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast._optional import optional_import

from ..cutouts import CLASSES, Cutout, load_cutouts
from ..photos import MEAN, PHOTOS, STD, load_photo

__all__ = ["GRID", "PATCH", "SIDE", "Pictures", "crops_of_photos", "objects_on_textures", "patch_pixels"]

SIDE, PATCH = 224, 14
GRID = (SIDE // PATCH, SIDE // PATCH)
TEXTURES = ("brick", "grass", "gravel")
# The longer side of an object, as a share of the picture's.
LEAST, MOST = 0.5, 0.85


@dataclass(frozen=True)
class Pictures:
    """Pictures with classes.

    Attributes
    ----------
    about : str
        What they are, to go on from "The pictures are".
    classes : tuple of str
    shown : ndarray of bytes, shape (n, 224, 224, 3)
    pixels : Tensor, shape (n, 3, 224, 224)
    labels : Tensor of int64, shape (n,)
    cover : Tensor, shape (n, 256), or None
        How much of each patch the object covers, from 0 to 1.
    """

    about: str
    classes: tuple[str, ...]
    shown: np.ndarray
    pixels: Tensor
    labels: Tensor
    cover: Tensor | None

    def first(self, count: int) -> Pictures:
        """The first ones; the order is random."""
        cover = None if self.cover is None else self.cover[:count]
        return Pictures(self.about, self.classes, self.shown[:count], self.pixels[:count], self.labels[:count], cover)


def objects_on_textures(seed: int = 0) -> Pictures:
    """Every cut-out once, at a random place and size on a crop of a texture of scikit-image, in random order.

    Raises
    ------
    DataUnavailable
        If the cut-outs cannot be had.

    Examples
    --------
    >>> objects_on_textures().classes[0]  # doctest: +SKIP
    'bird'
    """
    cutouts = load_cutouts()
    rng = np.random.default_rng(seed)
    cutouts = [cutouts[index] for index in rng.permutation(len(cutouts))]
    data = optional_import("skimage.data", "demo")
    textures = [np.asarray(getattr(data, name)()) for name in TEXTURES]
    placed = [_placed(cutout, textures[rng.integers(len(textures))], rng) for cutout in cutouts]
    opacity = torch.from_numpy(np.stack([mask for _, mask in placed])).float() / 255
    return _pictures(
        f"{len(cutouts)} cut-out photos of {len(CLASSES)} classes ({', '.join(CLASSES)}) from the Debian package "
        "tuxpaint-stamps-default, each once, at a random place and size on brick, grass or gravel",
        CLASSES,
        np.stack([picture for picture, _ in placed]),
        [cutout.label for cutout in cutouts],
        F.avg_pool2d(opacity[:, None], PATCH).flatten(1),
    )


def crops_of_photos(count: int = 120, seed: int = 0) -> Pictures:
    """Random squares of the photos of scikit-image, in turn; the class is the photo.

    Examples
    --------
    >>> crops_of_photos(8).pixels.shape
    torch.Size([8, 3, 224, 224])
    """
    rng = np.random.default_rng(seed)
    names = tuple(PHOTOS)
    photos = [load_photo(name, 2 * SIDE).picture for name in names]
    labels = [int(label) for label in rng.permutation(np.arange(count) % len(names))]
    crops = []
    for label in labels:
        side = int(rng.integers(SIDE * 2 // 3, 2 * SIDE))
        top, left = rng.integers(0, 2 * SIDE - side + 1, 2)
        crops.append(_resized(photos[label][top : top + side, left : left + side], SIDE, SIDE))
    about = f"{count} random crops of {len(names)} photos of scikit-image; their class is the photo that they are cut from"
    return _pictures(about, names, np.stack(crops), labels, None)


def patch_pixels(pixels: Tensor) -> Tensor:
    """The pixels of every patch, (n, 256, 588), of pictures (n, 3, 224, 224).

    Examples
    --------
    >>> patch_pixels(torch.zeros(2, 3, 28, 14)).shape
    torch.Size([2, 2, 588])
    """
    return F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)


def _placed(cutout: Cutout, texture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The picture (SIDE, SIDE, 3) and the opacity of the object in it (SIDE, SIDE), as bytes."""
    top, left = (int(rng.integers(0, length - SIDE + 1)) for length in texture.shape[:2])
    ground = np.repeat(texture[top : top + SIDE, left : left + SIDE, None], 3, axis=2)
    scale = rng.uniform(LEAST, MOST) * SIDE / max(cutout.picture.shape[:2])
    height, width = (max(1, round(scale * length)) for length in cutout.picture.shape[:2])
    top, left = int(rng.integers(0, SIDE - height + 1)), int(rng.integers(0, SIDE - width + 1))
    object_, mask = _resized(cutout.picture, width, height), np.zeros((SIDE, SIDE), np.uint8)
    mask[top : top + height, left : left + width] = object_[..., 3]
    share = object_[..., 3:] / 255
    under = ground[top : top + height, left : left + width]
    ground[top : top + height, left : left + width] = np.rint(share * object_[..., :3] + (1 - share) * under)
    return ground, mask


def _resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    module = optional_import("PIL.Image", "demo")
    return np.asarray(module.fromarray(np.ascontiguousarray(picture)).resize((width, height), module.Resampling.BICUBIC))


def _pictures(about: str, classes: tuple[str, ...], shown: np.ndarray, labels: list[int], cover: Tensor | None) -> Pictures:
    pixels = torch.from_numpy((shown / 255 - MEAN) / STD).float().permute(0, 3, 1, 2).contiguous()
    return Pictures(about, classes, shown, pixels, torch.tensor(labels), cover)
