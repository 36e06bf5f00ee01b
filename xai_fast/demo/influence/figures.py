"""The figures of the influence page. Colours of Okabe and Ito, and a shape for each class: none depends on colour alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xai_fast._optional import optional_import

from .mislabelled import LOSS, RANDOM, SELF, Mislabelled
from .spam import Spam
from .two_models import TwoModels

__all__ = ["curve_figure", "enlarged", "pictures_figure", "removal_figure", "save_influence_picture", "scatter_figure"]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"
CLASS_STYLE = {1.0: (BLUE, "o"), -1.0: (ORANGE, "^")}
RANKING_STYLE = {SELF: (BLUE, "-"), LOSS: (ORANGE, "--"), RANDOM: (GREY, ":")}
# Pictures in a row, most extreme first.
IN_A_ROW = 8
# Width of the column that names the rows, in pictures.
LABELS = 1.8


def _figure(width: float, height: float) -> Any:
    return optional_import("matplotlib.figure", "demo").Figure(figsize=(width, height), layout="constrained")


def _plain(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.set_xlabel(x, fontsize=10)
    axis.set_ylabel(y, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def scatter_figure(two: TwoModels, test: int) -> Any:
    """Influence on one test picture against distance to it, one panel for each model."""
    figure = _figure(12, 4.3)
    for axis, model in zip(figure.subplots(1, len(two.models)), range(len(two.models)), strict=True):
        draw_scatter(axis, two, model, test)
    return figure


def draw_scatter(axis: Any, two: TwoModels, model: int, test: int) -> None:
    """One panel of `scatter_figure`."""
    view, distance = two.models[model], two.distances[test]
    for sign, (color, marker) in CLASS_STYLE.items():
        rows = two.train_labels == sign
        axis.scatter(
            distance[rows], view.scores[test, rows], s=14, c=color, marker=marker, alpha=0.55, linewidths=0,
            label=two.class_name(sign),
        )  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.6)
    _plain(axis, view.name, "Euclidean distance of the pixels", "influence on the test loss" if model == 0 else "")
    axis.legend(fontsize=9, frameon=False, loc="best", handletextpad=0.1)


def pictures_figure(two: TwoModels, test: int) -> Any:
    """The most helpful and most harmful training pictures of each model, framed in the colour of the class."""
    rows = [(view, helpful) for view in two.models for helpful in (True, False)]
    width, height = LABELS + IN_A_ROW, 1.22 * len(rows)
    figure = optional_import("matplotlib.figure", "demo").Figure(figsize=(width, height))
    # One drawing area in units of a picture: many small ones are slow.
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    for line, (view, helpful) in enumerate(rows):
        top, scores = 1.22 * line + 0.25, view.scores[test]
        axis.text(0.05, top + 0.45, view.name.replace(" on ", "\non ").replace(", ", ",\n"), fontsize=10, va="bottom")
        axis.text(0.05, top + 0.5, f"most {'helpful' if helpful else 'harmful'}", fontsize=10, va="top", fontweight="bold")
        chosen = scores.topk(IN_A_ROW, largest=not helpful).indices.tolist()
        for place, row in enumerate(chosen):
            left = LABELS + place
            _framed(axis, two.train_images[row], float(two.train_labels[row]), left, top)
            axis.text(left + 0.45, top - 0.05, f"{float(scores[row]):+.3g}", fontsize=9, ha="center", va="bottom")
    return figure


def _framed(axis: Any, image: Tensor, label: float, left: float, top: float, side: float = 0.9) -> None:
    """A picture in a frame: solid for +1, dashed for -1."""
    right, bottom = left + side, top + side
    axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255, extent=(left, right, bottom, top), aspect="auto")
    color, _ = CLASS_STYLE[label]
    corners = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axis.plot(*corners, color=color, linewidth=3, linestyle="-" if label > 0 else (0, (2.5, 0.8)))


def curve_figure(found: Sequence[Mislabelled]) -> Any:
    """Share of the wrong labels found against the share of rows inspected, one panel for each setting."""
    figure = _figure(6 * len(found), 4.2)
    for axis, item in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        draw_curve(axis, item)
    return figure


def draw_curve(axis: Any, item: Mislabelled) -> None:
    """One panel of `curve_figure`."""
    n = len(item.flipped)
    inspected = 100 * np.arange(1, n + 1) / n
    for ranking, (color, line) in RANKING_STYLE.items():
        axis.plot(inspected, 100 * item.curve(ranking), line, color=color, linewidth=2, label=ranking)
    axis.set(xlim=(0, 50), ylim=(0, 102))
    title = f"{n:,} rows, l2 = {item.setting.l2:g}"
    _plain(axis, title, "rows inspected (%)", "wrong labels found (%)")
    axis.legend(fontsize=9, frameon=False, loc="lower right")


def enlarged(image: Tensor, times: int = 5) -> np.ndarray:
    """A picture (h, w) of bytes with each pixel as a square."""
    grey = image.numpy().repeat(times, axis=0).repeat(times, axis=1)
    return np.stack([grey] * 3, axis=-1)


def removal_figure(spam: Spam) -> Any:
    """Predicted against actual change of the loss when a mail is removed."""
    figure = _figure(6, 4.6)
    draw_removals(figure.subplots(), spam)
    return figure


def draw_removals(axis: Any, spam: Spam) -> None:
    """The panel of `removal_figure`."""
    points = np.array([(item.predicted, item.actual) for item in spam.alone])
    low, high = points.min(), points.max()
    axis.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=":", label="predicted = retrained")
    for is_spam, (color, marker) in ((True, (ORANGE, "^")), (False, (BLUE, "o"))):
        rows = [i for i, item in enumerate(spam.alone) if spam.train[item.rows[0]].is_spam == is_spam]
        axis.scatter(*points[rows].T, s=30, c=color, marker=marker, label=f"a {'spam' if is_spam else 'ham'} mail left out")
    axis.locator_params(nbins=6)
    title = f"One mail left out, r = {spam.correlation:.4f}"
    _plain(axis, title, "predicted change of the test loss", "change after retraining")
    axis.legend(fontsize=9, frameon=False, loc="upper left")


def save_influence_picture(two: TwoModels, found: Sequence[Mislabelled], spam: Spam, path: str | os.PathLike[str]) -> None:
    """Save the scatter of the first test picture, the curves and the leave-one-out check as one picture.

    Parameters
    ----------
    two : TwoModels
    found : sequence of Mislabelled
    spam : Spam
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    figure = _figure(12, 7)
    above, below = figure.subplots(2, 3)
    for axis, model in zip(above, range(len(two.models)), strict=True):
        draw_scatter(axis, two, model, two.shown[0])
    for axis, item in zip(below, found, strict=False):
        draw_curve(axis, item)
    for axis in below[len(found) : 2]:
        axis.axis("off")
    draw_removals(below[2], spam)
    below[0].set_title("Wrong labels: " + below[0].get_title(loc="left"), fontsize=11, loc="left", fontweight="bold")
    below[2].set_title("Spam: " + below[2].get_title(loc="left").lower(), fontsize=11, loc="left", fontweight="bold")
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
