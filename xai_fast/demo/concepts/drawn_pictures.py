"""Pictures of concepts, drawn: stripes, dots, checks, red things; and pictures of nothing in particular to tell them from.

Colours, scale, angle, shading and grain are drawn at random, in the same way for all patterns, so that only the pattern
itself is what the examples of a concept have in common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from xai_fast._optional import optional_import

from ..models.efficientnet import SIDE

__all__ = [
    "CONCEPTS",
    "PHOTOS",
    "blotches",
    "checks",
    "cropped",
    "dots",
    "draw",
    "natural",
    "photo",
    "random_picture",
    "random_set",
    "red",
    "resized",
    "stripes",
]

Draw = Callable[[np.random.Generator], np.ndarray]

# Of skimage.data and scikit-learn, all shipped in the wheels; what they show is in no class of the page.
PHOTOS = (
    *("astronaut", "brick", "camera", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon"),
    *("motorcycle", "page", "retina", "rocket", "text", "china", "flower"),
)
LEARN = ("china", "flower")
# The least difference of the two colours of a pattern, of 255 a channel on average.
CONTRAST = 80


def draw(kind: Draw, count: int, seed: int) -> list[np.ndarray]:
    """A number of pictures (224, 224, 3) of bytes; the same for a seed.

    Examples
    --------
    >>> [picture.shape for picture in draw(stripes, 2, 0)]
    [(224, 224, 3), (224, 224, 3)]
    """
    rng = np.random.default_rng(seed)
    return [kind(rng) for _ in range(count)]


# ---- patterns -------------------------------------------------------------------------------------------------------------


def stripes(rng: np.random.Generator) -> np.ndarray:
    """Parallel stripes, straight or wavy."""
    u, _ = _turned(rng, 0.5)
    return _painted(rng, np.sin(2 * np.pi * u) - rng.uniform(-0.4, 0.4))


def dots(rng: np.random.Generator) -> np.ndarray:
    """Round dots on a lattice, every other row shifted or not."""
    u, v = _turned(rng, 0.15)
    u = u + rng.choice((0, 0.5)) * (np.floor(v) % 2)
    radius = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    return _painted(rng, 12 * (rng.uniform(0.22, 0.38) - radius))


def checks(rng: np.random.Generator) -> np.ndarray:
    """The squares of a chessboard."""
    u, v = _turned(rng, 0.15)
    return _painted(rng, 2 * np.sin(np.pi * u) * np.sin(np.pi * v))


def blotches(rng: np.random.Generator) -> np.ndarray:
    """Irregular spots without any order."""
    field = _noise(rng, int(rng.integers(4, 28)))
    return _painted(rng, 3 * (field - np.quantile(field, rng.uniform(0.3, 0.7))))


def red(rng: np.random.Generator) -> np.ndarray:
    """A picture of nothing in particular, from black over red to pink."""
    light = random_picture(rng).mean(2) / 255
    light = (light - light.min()) / max(float(np.ptp(light)), 1e-6)
    ends = np.array([[40, 0, 0], [225, 20, 30], [255, 150, 140]]) + rng.uniform(-20, 20, (3, 3))
    channels = [np.interp(light, (0, 0.7, 1), ends[:, channel]) for channel in range(3)]
    return _bytes(np.stack(channels, 2))


CONCEPTS: dict[str, Draw] = {"striped": stripes, "dotted": dots, "checked": checks, "red": red}


def _turned(rng: np.random.Generator, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Two coordinates of every pixel in periods of the pattern, turned, shifted and bent by up to `most` of them."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(10), np.log(48)))
    bend = rng.uniform(0, most)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period + bend * _noise(rng, 4) + rng.uniform()
    v = (y * np.cos(angle) - x * np.sin(angle)) / period + bend * _noise(rng, 4) + rng.uniform()
    return u, v


def _painted(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    """Two colours, where a field is above and below 0, with soft edges, shading and grain."""
    share = 0.5 + 0.5 * np.tanh(field * rng.uniform(2, 8))
    first, second = _colours(rng)
    mixed = share[..., None] * first + (1 - share[..., None]) * second
    shade = 1 + rng.uniform(0, 0.25) * _noise(rng, 3)
    return _bytes(mixed * shade[..., None] + rng.normal(0, rng.uniform(0, 12), (SIDE, SIDE, 3)))


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours that can be told apart; a third of the pairs are grey."""
    while True:
        pair = rng.uniform(0, 255, (2, 3))
        if rng.uniform() < 1 / 3:
            pair[:] = pair[:, :1]
        if abs(pair[0].mean() - pair[1].mean()) > CONTRAST:
            return pair[0], pair[1]


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise (224, 224) of about unit variance, with that many independent values along a side."""
    return resized(rng.normal(size=(cells + 2, cells + 2)), SIDE)


# ---- pictures without a concept -------------------------------------------------------------------------------------------


def random_picture(rng: np.random.Generator) -> np.ndarray:
    """A random crop of a photo, or blotches, with equal chances."""
    return blotches(rng) if rng.uniform() < 0.5 else natural(rng)


def random_set(count: int, seed: int) -> list[np.ndarray]:
    """Pictures of nothing in particular: one half blotches, the other crops of photos.

    With shares left to chance, sets would differ in them, and CAVs between sets would tell drawn pictures from photos.

    Examples
    --------
    >>> len(random_set(3, 0))
    3
    """
    rng = np.random.default_rng(seed)
    return [(blotches, natural)[place % 2](rng) for place in range(count)]


def natural(rng: np.random.Generator) -> np.ndarray:
    """A random crop of a random photo, flipped or not."""
    return cropped(photo(str(rng.choice(PHOTOS))), rng)


def cropped(picture: np.ndarray, rng: np.random.Generator, *, least: float = 0.3) -> np.ndarray:
    """A random square of a picture, flipped or not, at 224 x 224.

    Parameters
    ----------
    picture : ndarray of bytes, shape (H, W, 3)
    rng : Generator
    least : float
        The side of the square is at least this share of the shorter side.

    Examples
    --------
    >>> cropped(np.zeros((300, 400, 3), np.uint8), np.random.default_rng(0)).shape
    (224, 224, 3)
    """
    whole = min(picture.shape[:2])
    side = int(rng.uniform(least, 1) * whole)
    top, left = (int(rng.integers(0, length - side + 1)) for length in picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    return resized(square[:, ::-1] if rng.uniform() < 0.5 else square, SIDE)


@functools.cache
def photo(name: str) -> np.ndarray:
    """A photo of scikit-image or scikit-learn that needs no download, (H, W, 3) bytes.

    Examples
    --------
    >>> photo("chelsea").shape
    (300, 451, 3)
    """
    if name in LEARN:
        found = optional_import("sklearn.datasets", "demo").load_sample_image(f"{name}.jpg")
    else:
        data = optional_import("skimage.data", "demo")
        found = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    found = np.asarray(found)
    return np.ascontiguousarray(np.broadcast_to(np.atleast_3d(found), (*found.shape[:2], 3)))


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture (H, W, 3) of bytes, or a field (H, W) of floats, by bicubic interpolation.

    Examples
    --------
    >>> resized(np.zeros((5, 7)), 3).shape
    (3, 3)
    """
    module = optional_import("PIL.Image", "demo")
    floats = picture.ndim == 2
    image = module.fromarray(picture.astype(np.float32) if floats else np.ascontiguousarray(picture))
    return np.asarray(image.resize((side, side), module.Resampling.BICUBIC), dtype=float if floats else np.uint8)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
