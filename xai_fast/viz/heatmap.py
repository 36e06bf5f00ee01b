"""Token relevance as pictures: fold tokens into a patch grid, enlarge it, lay it over the image, plot a
table.

Vision transformers put a few prefix tokens (CLS, registers) before the patches, which follow row by row.
Colours default to matplotlib's "inferno": perceptually uniform, readable with colour-deficient vision and in
grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast._optional import optional_import

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["color_limits", "colorize", "overlay", "patch_grid", "plot_heatmaps", "to_rgb", "upsample"]


def patch_grid(relevance: Tensor, *, num_prefix_tokens: int = 1, grid: tuple[int, int] | None = None) -> Tensor:
    """Drop the prefix tokens and fold the patches into their grid.

    Parameters
    ----------
    relevance : Tensor, shape (B, N) or (N,)
        One value per token; a single sample counts as a batch of one.
    num_prefix_tokens : int
        Tokens before the patches: 1 for CLS, 1 + R with R registers, 0 for none.
    grid : (int, int), optional
        Rows and columns of patches. Default: square.

    Returns
    -------
    Tensor, shape (B, h, w)

    Examples
    --------
    >>> patch_grid(torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0]))
    tensor([[[1., 2.],
             [3., 4.]]])
    """
    if relevance.ndim == 1:
        relevance = relevance.unsqueeze(0)
    if relevance.ndim != 2:
        raise ValueError(f"relevance: expected (B, N) or (N,), got shape {tuple(relevance.shape)}")
    if not 0 <= num_prefix_tokens <= relevance.shape[1]:
        raise ValueError(f"num_prefix_tokens: expected 0 to {relevance.shape[1]}, got {num_prefix_tokens}")
    patches = relevance[:, num_prefix_tokens:]
    count = patches.shape[1]
    rows, columns = grid if grid is not None else (math.isqrt(count), math.isqrt(count))
    if rows * columns != count:
        expected = f"{rows} x {columns} = {rows * columns} patches" if grid else "a square number of patches"
        raise ValueError(f"relevance: expected {expected}, got {count} tokens after {num_prefix_tokens} prefix tokens")
    return patches.reshape(len(patches), rows, columns)


def upsample(heat: Tensor, size: tuple[int, int], *, mode: str = "bicubic") -> Tensor:
    """Enlarge maps to `size`, without creating values outside the range of each map.

    Parameters
    ----------
    heat : Tensor, shape (B, h, w)
    size : (int, int)
        Height and width of the result.
    mode : {"bicubic", "bilinear", "nearest"}

    Returns
    -------
    Tensor, shape (B, *size)

    Examples
    --------
    >>> upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4), mode="nearest")
    tensor([[[0., 0., 1., 1.]]])
    """
    if heat.ndim != 3:
        raise ValueError(f"heat: expected (B, h, w), got shape {tuple(heat.shape)}")
    if mode not in ("bicubic", "bilinear", "nearest"):
        raise ValueError(f"mode: expected 'bicubic', 'bilinear' or 'nearest', got {mode!r}")
    align_corners = None if mode == "nearest" else False
    large = F.interpolate(heat.unsqueeze(1), size=size, mode=mode, align_corners=align_corners).squeeze(1)
    # A cubic overshoots at edges: it would show relevance below zero next to a peak.
    return large.clamp(heat.amin((1, 2)).view(-1, 1, 1), heat.amax((1, 2)).view(-1, 1, 1))


def color_limits(
    heat: Tensor | np.ndarray,
    *,
    percentile: tuple[float, float] = (0.0, 100.0),
    ignore: Tensor | np.ndarray | None = None,
) -> tuple[float, float]:
    """The two values that the ends of the colour scale stand for.

    Parameters
    ----------
    heat : array, shape (h, w)
    percentile : (float, float)
        Percentiles that the ends stand for; (0, 100) is the full range. Values beyond are clipped when drawn.
    ignore : bool array, shape (h, w), optional
        Patches that shall not stretch the scale.

    Returns
    -------
    (float, float)

    Examples
    --------
    >>> heat = torch.tensor([[0.0, 1.0], [2.0, 90.0]])
    >>> color_limits(heat, ignore=heat > 10)
    (0.0, 2.0)
    """
    values = np.asarray(torch.as_tensor(heat).detach().cpu().double())
    low, high = percentile
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentile: expected 0 <= low < high <= 100, got {percentile}")
    if ignore is not None:
        kept = values[~np.asarray(torch.as_tensor(ignore).cpu())]
        values = kept if kept.size else values
    if not np.isfinite(values).all():
        raise ValueError("heat: expected finite values, got NaN or inf")
    return float(np.percentile(values, low)), float(np.percentile(values, high))


def colorize(heat: Tensor | np.ndarray, *, cmap: str = "inferno", limits: tuple[float, float] | None = None) -> np.ndarray:
    """Colour a map.

    Parameters
    ----------
    heat : array, shape (H, W)
    cmap : str
        Name of a matplotlib colour map.
    limits : (float, float), optional
        Values of the two ends of the scale. Default: the full range of `heat`.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)

    Examples
    --------
    >>> colorize(torch.tensor([[0.0, 1.0]]), cmap="gray").tolist()
    [[[0, 0, 0], [255, 255, 255]]]
    """
    matplotlib = optional_import("matplotlib", "demo")
    return (255 * matplotlib.colormaps[cmap](_unit_range(heat, limits))[..., :3]).round().astype(np.uint8)


def overlay(
    image: Tensor | np.ndarray,
    heat: Tensor | np.ndarray,
    *,
    cmap: str = "inferno",
    alpha: float = 0.75,
    percentile: tuple[float, float] = (0.0, 100.0),
    limits: tuple[float, float] | None = None,
    mode: str = "bicubic",
) -> np.ndarray:
    """Lay a map over its image: the image in grey shows where, the colour shows how much.

    Parameters
    ----------
    image : array
        (H, W), (H, W, 3) or (3, H, W); bytes, or floats from 0 to 1.
    heat : array, shape (h, w)
        Enlarged to the image's size.
    cmap : str
        Name of a matplotlib colour map.
    alpha : float
        Weight of the map, from 0 (image only) to 1 (map only).
    percentile : (float, float)
        Percentiles of `heat` at the ends of the colour scale.
    limits : (float, float), optional
        Values at the ends of the colour scale, instead of `percentile`.
    mode : str
        How to enlarge, see `upsample`.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)

    Examples
    --------
    >>> overlay(torch.rand(3, 28, 28), torch.rand(2, 2)).shape
    (28, 28, 3)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    heat = torch.as_tensor(heat).detach().cpu().double()
    if heat.ndim != 2:
        raise ValueError(f"heat: expected (h, w), got shape {tuple(heat.shape)}")
    limits = limits or color_limits(heat, percentile=percentile)
    rgb = to_rgb(image)
    grey = rgb.astype(np.float64) @ (0.299, 0.587, 0.114)
    # Clipping before enlarging keeps one huge patch from blotting out its neighbours.
    large = upsample(heat.clamp(*limits).unsqueeze(0), rgb.shape[:2], mode=mode)[0]
    colors = colorize(large, cmap=cmap, limits=limits).astype(np.float64)
    return (alpha * colors + (1 - alpha) * grey[..., None]).round().astype(np.uint8)


def to_rgb(image: Tensor | np.ndarray) -> np.ndarray:
    """Any usual image as bytes, shape (H, W, 3).

    Parameters
    ----------
    image : array
        (H, W), (H, W, 1), (H, W, 3), (H, W, 4), (1, H, W) or (3, H, W); bool, bytes, or floats from 0 to 1.

    Examples
    --------
    >>> to_rgb(torch.ones(3, 4, 5)).shape
    (4, 5, 3)
    """
    pixels = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    # Ambiguous (3, H, 4) counts as channels first: it is likelier than an RGBA image of three rows.
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image: expected (H, W), (H, W, 3) or (3, H, W), got shape {pixels.shape}")
    if pixels.dtype != np.uint8:
        if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 1:
            raise ValueError(f"image: expected 0 to 1, got {pixels.dtype} values from {pixels.min():g} to {pixels.max():g}")
        pixels = (255 * pixels.astype(np.float64)).round().astype(np.uint8)
    return np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3)).copy()


def plot_heatmaps(
    images: Sequence[Tensor | np.ndarray],
    maps: Mapping[str, Sequence[Tensor | np.ndarray]],
    *,
    cmap: str = "inferno",
    alpha: float = 0.75,
    percentile: tuple[float, float] = (0.0, 100.0),
    titles: Sequence[str] | None = None,
    image_title: str = "image",
    backgrounds: Sequence[Tensor | np.ndarray] | None = None,
    cell: float = 2.2,
) -> Figure:
    """Plot one row per image: the image, then each map over it.

    Parameters
    ----------
    images : sequence of arrays
        B images, as `overlay` takes them.
    maps : mapping of str to sequence of arrays
        Column title to B maps of shape (h, w). A tensor (B, h, w) will do.
    cmap, alpha, percentile
        See `overlay`.
    titles : sequence of str, optional
        One label per row.
    image_title : str
        Title of the first column.
    backgrounds : sequence of arrays, optional
        Images under the maps, if not those of the first column (which may carry marks).
    cell : float
        Size of a cell in inches.

    Returns
    -------
    matplotlib.figure.Figure
        Not registered with pyplot: it needs no display and no closing. Save it with ``figure.savefig(path)``.

    Examples
    --------
    >>> figure = plot_heatmaps([torch.rand(3, 28, 28)], {"rollout": torch.rand(1, 2, 2)})
    >>> len(figure.axes)
    2
    """
    for title, column in maps.items():
        if len(column) != len(images):
            raise ValueError(f"maps: expected {len(images)}, one per image, got {len(column)} maps for {title!r}")
    figure_class: Any = optional_import("matplotlib.figure", "demo").Figure
    shape = (len(images), 1 + len(maps))
    figure: Figure = figure_class(figsize=(cell * shape[1], cell * shape[0] + 0.3), layout="constrained")
    axes = np.asarray(figure.subplots(*shape, squeeze=False))
    for row, image in enumerate(images):
        ground = image if backgrounds is None else backgrounds[row]
        look: dict[str, Any] = {"cmap": cmap, "alpha": alpha, "percentile": percentile}
        cells = [to_rgb(image), *(overlay(ground, column[row], **look) for column in maps.values())]
        for axis, picture in zip(axes[row], cells, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], [image_title, *maps], strict=True):
        axis.set_title(title, fontsize=10)
    for axis, label in zip(axes[:, 0], titles or (), strict=False):
        axis.set_ylabel(label, fontsize=10)
    return figure


def _unit_range(heat: Tensor | np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """Map the limits to 0 and 1 and clip; a constant map becomes 0."""
    values = np.asarray(torch.as_tensor(heat).detach().cpu().double())
    low, high = limits or color_limits(values)
    if high <= low:
        return np.zeros_like(values)
    return np.clip((values - low) / (high - low), 0.0, 1.0)
