"""The figures of the measures page. Colours, shapes and names of the methods as in `xai_fast.viz`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import
from xai_fast.viz import overlay, to_rgb
from xai_fast.viz.style import MARKERS, PALETTE

from .measuring import ATTNLRP, DELETION, GRADIENT_INPUT, INSERTION, Judged
from .photos import JudgedPhotos

__all__ = ["curves_figure", "drawn", "fidelity_figure", "save_measures_picture", "scene_curve_figure"]

MUTED = "#6b7280"
# Of the figures that stand side by side, in inches.
SIZE = (7.6, 5.0)
DPI = 100
AXES = {DELETION: "share of the features replaced", INSERTION: "share of the features shown"}
TITLES = {DELETION: "Deletion, best first ↓", INSERTION: "Insertion, best first ↑"}
# Signed maps: red for the class, blue against.
SIGNED = (ATTNLRP, GRADIENT_INPUT)


def drawn(picture: np.ndarray, heat: Tensor, method: str) -> np.ndarray:
    """A map (h, w) over its picture; the highest patches share one colour, or a single one would be all that is seen."""
    if method not in SIGNED:
        return overlay(picture, heat, percentile=(0.0, 98.0))
    limit = float(heat.abs().flatten().quantile(0.98))
    return overlay(picture, heat, cmap="RdBu_r", limits=(-limit, limit), alpha=0.8)


def fidelity_figure(judged: Judged, title: str, size: tuple[float, float] = SIZE) -> Any:
    """fid+ against fid- in probabilities, a line through the levels for each method."""
    return judged.study.plot_fidelity(title=title, size=size)


def curves_figure(judged: Judged) -> Any:
    """The mean deletion and insertion curves, one above the other, with bands of a standard error."""
    figure = _figure(*SIZE)
    for axis, kind in zip(figure.subplots(2, 1), (DELETION, INSERTION), strict=True):
        _draw_curves(axis, judged, kind)
        axis.set_ylabel("probability of the class", fontsize=9.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9.5)
    return figure


def scene_curve_figure(judged: Judged, kind: str, sample: int) -> Any:
    """The curve of one scene, for all methods."""
    figure = _figure(3.6, 2.5)
    axis = figure.subplots()
    for number, (method, values) in enumerate(judged.curves[kind].items()):
        _line(axis, judged.shares, values[sample], number, method)
    _plain(axis, "", AXES[kind])
    axis.set_ylabel("probability", fontsize=9)
    if kind == DELETION:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, columnspacing=1, handlelength=1.6)
    return figure


def _draw_curves(axis: Any, judged: Judged, kind: str) -> None:
    for number, (method, values) in enumerate(judged.curves[kind].items()):
        error = values.std(0) / max(len(values), 1) ** 0.5 if len(values) > 1 else torch.zeros(values.shape[1])
        mean = values.mean(0)
        axis.fill_between(
            judged.shares, mean - error, mean + error, color=PALETTE[number % len(PALETTE)], alpha=0.13, linewidth=0
        )
        _line(axis, judged.shares, mean, number, method)
    _plain(axis, TITLES[kind], AXES[kind])


def _line(axis: Any, x: Tensor, y: Tensor, number: int, name: str) -> None:
    color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    axis.plot(x, y, color=color, marker=marker, markersize=4.5, markeredgecolor="white", linewidth=1.6, label=name)


def _plain(axis: Any, title: str, x: str) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(x, fontsize=9.5)
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(labelsize=8.5, color=MUTED, labelcolor=MUTED)


def _figure(width: float, height: float) -> Any:
    return optional_import("matplotlib.figure", "demo").Figure(figsize=(width, height), layout="constrained")


# ---- the first part as one picture ----------------------------------------------------------------------------------------


def save_measures_picture(photos: JudgedPhotos, shown: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Save scenes with their maps, the plane of fidelities and the mean curves as one picture.

    Parameters
    ----------
    photos : JudgedPhotos
    shown : sequence of int
        Which scenes.
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    image_module = optional_import("PIL.Image", "demo")
    below = [_rendered(fidelity_figure(photos.judged, "Fidelity", (6.2, 4.4))), _rendered(_stacked_curves(photos.judged))]
    width = sum(part.shape[1] for part in below)
    above = _rendered(_maps_figure(photos, shown, width))
    canvas = image_module.new("RGB", (width, above.shape[0] + max(part.shape[0] for part in below)), "white")
    canvas.paste(image_module.fromarray(above), (0, 0))
    left = 0
    for part in below:
        canvas.paste(image_module.fromarray(part), (left, above.shape[0]))
        left += part.shape[1]
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, **({"quality": 90} if Path(path).suffix.lower() in (".jpg", ".jpeg") else {}))


def _stacked_curves(judged: Judged) -> Any:
    figure = _figure(6.6, 4.4)
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), (DELETION, INSERTION), strict=True):
        _draw_curves(axis, judged, kind)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _maps_figure(photos: JudgedPhotos, shown: Sequence[int], width: int) -> Any:
    columns = 1 + len(photos.maps)
    figure = _figure(width / DPI, 0.35 + 0.55 * width / DPI / columns * len(shown))
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for line, sample in zip(axes, shown, strict=True):
        picture = photos.scenes.pictures[sample]
        cells = [picture, *(drawn(picture, heat[sample], method) for method, heat in photos.maps.items())]
        for axis, cell in zip(line, cells, strict=True):
            axis.imshow(to_rgb(cell))
            axis.axis("off")
    for axis, title in zip(axes[0], ["Scene", *photos.maps], strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def _rendered(figure: Any) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return np.asarray(optional_import("PIL.Image", "demo").open(buffer).convert("RGB"))
