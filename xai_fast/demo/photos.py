"""The demo's photos, all shipped inside scikit-image's wheel, as inputs for a vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import

__all__ = ["DEFAULT", "PHOTOS", "Subject", "load_photo"]

# Name to a function of skimage.data that needs no download.
PHOTOS: dict[str, Callable[[Any], Any]] = {
    "cat": lambda data: data.chelsea(),
    "astronaut": lambda data: data.astronaut(),
    "coffee": lambda data: data.coffee(),
    "rocket": lambda data: data.rocket(),
    "camera": lambda data: data.camera(),
    "motorcycle": lambda data: data.stereo_motorcycle()[0],
    "coins": lambda data: data.coins(),
    "retina": lambda data: data.retina(),
}
DEFAULT = ("cat", "astronaut", "coffee", "rocket", "camera", "motorcycle")

# Channel statistics of ImageNet, with which DINOv2 was trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Subject:
    """One input of the demo."""

    name: str
    picture: np.ndarray  # what is shown: (H, W, 3) bytes
    pixels: Tensor  # what the model gets: (1, C, H, W) floats


def load_photo(name: str, size: int = 448) -> Subject:
    """Crop the centre square of a photo, resize it, and normalise it as DINOv2 expects.

    Parameters
    ----------
    name : str
        A key of `PHOTOS`.
    size : int
        Side in pixels, a multiple of 14.

    Returns
    -------
    Subject
        With pixels of shape (1, 3, size, size).

    Examples
    --------
    >>> load_photo("cat", 224).pixels.shape
    torch.Size([1, 3, 224, 224])
    """
    if name not in PHOTOS:
        raise ValueError(f"photos: expected some of {', '.join(PHOTOS)}, got {name!r}")
    if size < 14 or size % 14:
        raise ValueError(f"size: expected a multiple of 14 (the patch), got {size}")
    photo = np.atleast_3d(PHOTOS[name](optional_import("skimage.data", "demo")))
    side = min(photo.shape[:2])
    top, left = ((length - side) // 2 for length in photo.shape[:2])
    square = np.broadcast_to(photo[top : top + side, left : left + side], (side, side, 3))
    image_module = optional_import("PIL.Image", "demo")
    image = image_module.fromarray(np.ascontiguousarray(square))
    picture = np.asarray(image.resize((size, size), image_module.Resampling.BICUBIC))
    normalised = torch.from_numpy((picture / 255 - MEAN) / STD).float()
    return Subject(name, picture, normalised.permute(2, 0, 1).unsqueeze(0).contiguous())
