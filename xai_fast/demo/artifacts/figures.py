"""The figures of the artifacts page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xai_fast._optional import optional_import
from xai_fast.viz import overlay, patch_grid, to_rgb

from .dinov2 import Looked
from .pictures import GRID
from .study import MAD, Control, Real

__all__ = ["as_map", "map_over", "norms_figure", "outlier_mask", "received_figure", "save_artifacts_picture"]

BLUE, RED, CYAN, MUTED = "#0b6e99", "#c0392b", "#0aa5a5", "#6b7280"
DPI = 100


def as_map(values: Tensor) -> Tensor:
    """Values of patches (256,) as a map (16, 16)."""
    return patch_grid(values[None], num_prefix_tokens=0, grid=GRID)[0]


def map_over(picture: np.ndarray, values: Tensor) -> np.ndarray:
    """Values of patches over their picture; a single bright patch stays visible as it is."""
    return overlay(picture, as_map(values), mode="nearest")


def norms_figure(looked: Looked, title: str = "", size: tuple[float, float] = (7.6, 4.4)) -> Any:
    """Norms of the patches after each block: median, bands of quantiles and the largest; and the mean of CLS."""
    figure = _figure(*size)
    axis = figure.subplots()
    patches = looked.patches.flatten(1)
    blocks = np.arange(1, len(patches) + 1)

    def at(share: float) -> Tensor:
        return patches.quantile(share, dim=1)

    axis.fill_between(blocks, at(0.02), at(0.98), color=BLUE, alpha=0.15, linewidth=0, label="96 % of the patches")
    axis.fill_between(blocks, at(0.25), at(0.75), color=BLUE, alpha=0.3, linewidth=0, label="half of the patches")
    axis.plot(blocks, at(0.5), color=BLUE, linewidth=1.8, label="median")
    axis.plot(blocks, patches.amax(1), color=RED, marker="o", markersize=4, linewidth=1.2, label="largest patch")
    axis.plot(blocks, looked.norms[..., 0].mean(1), color=MUTED, linestyle="--", linewidth=1.2, label="CLS, mean")
    axis.set_yscale("log")
    _plain(axis, title, "block", "norm after the block")
    axis.set_xticks(blocks)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def received_figure(looked: Looked, outliers: Tensor, factor: float, size: tuple[float, float] = (11.0, 6.6)) -> Any:
    """Attention that patches receive against their norm, a panel for each block.

    Parameters
    ----------
    looked : Looked
    outliers : Tensor of bool, shape (L, n, P)
        Shown in red.
    factor : float
        The line above which a patch is a sink.
    """
    figure = _figure(*size)
    count = len(looked.patches)
    axes = figure.subplots(-(-count // 4), 4, sharey=True).flatten()
    for block, axis in enumerate(axes[:count]):
        ratio = (looked.patches[block] / looked.patches[block].median(1, keepdim=True).values).flatten()
        received, mask = looked.received[block].flatten(), outliers[block].flatten()
        axis.scatter(ratio[~mask], received[~mask], s=4, color=BLUE, alpha=0.3, linewidths=0, rasterized=True)
        axis.scatter(ratio[mask], received[mask], s=14, color=RED, linewidths=0, rasterized=True)
        axis.axhline(factor, color=CYAN, linewidth=1, linestyle="--")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        _plain(axis, f"Block {block + 1}", "norm / median" if block >= count - 4 else "", "")
    for axis in axes[:count:4]:
        axis.set_ylabel("attention / uniform", fontsize=9)
    return figure


def save_artifacts_picture(real: Real, control: Control, rows: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Save the norms, the rollouts of photos, and the control as one picture.

    Parameters
    ----------
    real, control : Real, Control
    rows : sequence of int
        Which photos.
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    (best,) = control.clearest(1)
    parts = [
        _maps_figure(
            [real.shown[row] for row in rows], [{n: m[row] for n, m in real.photo_maps.maps.items()} for row in rows]
        ),
        _maps_figure(
            [control.pictures.shown[best]], [{name: maps[best] for name, maps in control.maps.maps.items()}], columns=6
        ),
    ]
    beside = [norms_figure(real.looked, "DINOv2 ViT-S/14: no high norms", (5.6, 3.6))]
    beside.append(norms_figure(control.looked, "The same with four planted neurons", (5.6, 3.6)))
    drawn = [_rendered(figure) for figure in (*parts, *beside)]
    top = np.concatenate([_padded(part, max(p.shape[0] for p in drawn[2:]), part.shape[1]) for part in drawn[2:]], 1)
    stacked = [drawn[0], drawn[1], top]
    width = max(part.shape[1] for part in stacked)
    whole = np.concatenate([_padded(part, part.shape[0], width) for part in stacked])
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 88} if Path(path).suffix.lower() in (".jpg", ".jpeg") else {}
    optional_import("PIL.Image", "demo").fromarray(whole).save(path, **options)


def _maps_figure(pictures: Sequence[np.ndarray], maps: Sequence[dict[str, Tensor]], columns: int = 0) -> Any:
    columns = max(columns, 1 + len(maps[0]))
    figure = _figure(11.2, 0.25 + 11.2 / columns * len(pictures) + 0.1)
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for line, picture, row in zip(axes, pictures, maps, strict=True):
        cells = [picture, *(map_over(picture, values) for values in row.values())]
        for axis in line:
            axis.axis("off")
        for axis, cell in zip(line, cells, strict=False):
            axis.imshow(to_rgb(cell))
    for axis, title in zip(axes[0], ["Picture", *maps[0]], strict=False):
        axis.set_title(title, fontsize=10)
    return figure


def outlier_mask(real: Real) -> Tensor:
    """Norm outliers among the patches by median and MAD, (L, n, P)."""
    return real.outliers[MAD].mask[..., 1:]


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    below, right = height - picture.shape[0], width - picture.shape[1]
    return np.pad(picture, ((0, below), (0, right), (0, 0)), constant_values=255)


def _rendered(figure: Any) -> np.ndarray:
    figure.set_dpi(DPI)
    canvas = optional_import("matplotlib.backends.backend_agg", "demo").FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _plain(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5)


def _figure(width: float, height: float) -> Any:
    return optional_import("matplotlib.figure", "demo").Figure(figsize=(width, height), layout="constrained")
