"""The pictures of a study, ready for a page."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import
from xai_fast.viz.report import image_data_uri

from .questions import ColoredText, Picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Gallery"]


class Gallery:
    """The pictures of a study, each stored once."""

    def __init__(self, image_format: str) -> None:
        self.pictures: list[dict[str, str]] = []
        self._format = image_format
        self._places: dict[str, int] = {}

    def add(self, picture: Picture, question: str) -> int:
        try:
            encoded = _encode(picture, self._format)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"question {question!r}: {error}") from None
        text = next(iter(encoded.values()))
        if text not in self._places:
            self._places[text] = len(self.pictures)
            self.pictures.append(encoded)
        return self._places[text]


def _encode(picture: Any, image_format: str) -> dict[str, str]:
    if isinstance(picture, ColoredText):
        return {"html": picture.html()}
    if isinstance(picture, (str, os.PathLike)):
        with optional_import("PIL.Image", "demo").open(picture) as opened:
            picture = _pil_pixels(optional_import("PIL.ImageOps", "demo").exif_transpose(opened))
    elif hasattr(picture, "getbands"):
        picture = _pil_pixels(picture)
    elif isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        picture = picture.float() if picture.dtype in (torch.bfloat16, torch.float16) else picture
    elif not isinstance(picture, np.ndarray):
        raise TypeError(
            f"picture: expected an array, a tensor, a PIL image, a path or ColoredText, got {type(picture).__name__}"
        )
    return {"src": image_data_uri(picture, format=image_format)}


def _pil_pixels(image: Image) -> np.ndarray:
    """A PIL image as bytes (H, W, 3), transparent parts on the page's white."""
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
