"""The figures of the distillation page: terms as `xai_fast.viz.gam` draws them, with the names of ordered categories."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xai_fast._optional import optional_import
from xai_fast.distill import GAM, Term
from xai_fast.viz.gam import plot_terms
from xai_fast.viz.style import MARKERS, MUTED, PALETTE, new_figure, plain_axis

from .diamonds import LEVELS
from .issues import Explosion, Plane, Refits, Twin, middle
from .students import Distilled

__all__ = [
    "explosion_figure",
    "pair_figure",
    "plane_figure",
    "refits_figure",
    "save_distillation_picture",
    "screening_figure",
    "terms_figure",
    "triple_figure",
    "twin_figure",
]

DPI = 100
# Features whose shapes are drawn for all refits: four that say the same, and two that do not.
DRAWN = ("carat", "x", "y", "z", "color", "clarity")
ADDS = "adds to the log price"


def terms_figure(gam: GAM, order: int, count: int, *, target: int | None = None, columns: int = 3, title: str = "") -> Any:
    """The strongest main effects or pairs, over the density of the data."""
    only = replace(gam, terms=tuple(t for t in gam.terms if t.order == order))
    return _named(plot_terms(only, count=count, target=target, columns=columns, panel=(3.3, 2.5), title=title))


def pair_figure(gam: GAM, pair: Sequence[int], title: str) -> Any:
    """One pair."""
    return _named(gam.plot(tuple(pair), title=title, size=(5.0, 3.6)))


def triple_figure(gam: GAM, triple: Sequence[int]) -> Any:
    """One triple, as slices."""
    return _named(gam.plot(tuple(triple)))


def screening_figure(distilled: Distilled) -> Any:
    """What the screening said of every pair, as a triangle; the chosen pairs are framed."""
    figure = new_figure((5.4, 4.5))
    axis = figure.subplots()
    names, gains = distilled.features, distilled.gains.clamp_min(0).numpy()
    count = len(names)
    hidden = np.triu(np.ones((count, count), dtype=bool))
    drawn = axis.imshow(np.ma.masked_array(100 * gains, hidden), cmap="Blues", vmin=0)
    for i, j in distilled.chosen(2):
        axis.add_patch(
            optional_import("matplotlib.patches", "demo").Rectangle(
                (i - 0.46, j - 0.46), 0.92, 0.92, fill=False, edgecolor=PALETTE[1], linewidth=1.8
            )
        )
    axis.set_xticks(range(count - 1), names[:-1], rotation=45, ha="right")
    axis.set_yticks(range(1, count), names[1:])
    axis.set(xlim=(-0.5, count - 1.5), ylim=(count - 0.5, 0.5))
    plain_axis(axis, "", "", "")
    bar = figure.colorbar(drawn, ax=axis, pad=0.02, fraction=0.05)
    bar.set_label("% of what main effects leave", fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8, color=MUTED, labelcolor=MUTED)
    bar.outline.set_visible(False)
    return figure


def twin_figure(twin: Twin) -> Any:
    """The main effects of the pair's features: pure, moved into the pair, purified again."""
    figure = new_figure((9.0, 3.2))
    students = (
        ("pure", twin.before, "-", 4.5),
        ("the same function", twin.after, "-", 1.8),
        ("purified", twin.back, ":", 1.8),
    )
    for axis, feature in zip(figure.subplots(1, 2, sharey=True), twin.pair, strict=True):
        for number, (name, gam, line, width) in enumerate(students):
            term = gam.term((feature,))
            color = ("#9ec9e6", PALETTE[1], "black")[number]
            axis.plot(*_line(term), line, color=color, linewidth=width, label=name)
        if twin.before.feature_names[feature] not in LEVELS:
            axis.set_xlim(*twin.shown[feature])
        plain_axis(axis, "", twin.before.feature_names[feature], ADDS if feature == twin.pair[0] else "")
    _named(figure)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def explosion_figure(found: dict[str, Explosion], size: tuple[float, float] = (6.2, 3.8)) -> Any:
    """What is left by the number of pairs."""
    ticker = optional_import("matplotlib.ticker", "demo")
    figure = new_figure(size)
    axis = figure.subplots()
    for number, (name, explosion) in enumerate(found.items()):
        left = [100 * (1 - r2) for r2 in explosion.r2.values()]
        look = {"color": PALETTE[number], "marker": MARKERS[number], "markeredgecolor": "white", "linewidth": 1.6}
        axis.plot(list(explosion.r2), left, label=name, **look)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.set_xticks(list(next(iter(found.values())).r2))
    plain_axis(axis, "Not explained", "pairs in the student", "% of the teacher's variance")
    axis.legend(frameon=False, fontsize=9)
    return figure


def plane_figure(plane: Plane) -> Any:
    """Teacher, student and their difference for every carat with every x, and where the data are."""
    figure = new_figure((11.4, 3.7))
    gap = (plane.student - plane.teacher).numpy()
    low, high = float(plane.teacher.min()), float(plane.teacher.max())
    most = float(np.quantile(np.abs(gap), 0.99))
    cells = (
        ("Teacher, log price", plane.teacher.numpy(), "viridis", (low, high)),
        ("Student, log price", plane.student.numpy(), "viridis", (low, high)),
        ("Student less teacher", gap, "RdBu_r", (-most, most)),
    )
    for axis, (title, values, colors, limits) in zip(figure.subplots(1, 3, sharey=True), cells, strict=True):
        drawn = axis.pcolormesh(
            plane.carat.numpy(), plane.x.numpy(), values.T, cmap=colors, vmin=limits[0], vmax=limits[1], rasterized=True
        )
        axis.scatter(*plane.data.T.numpy(), s=1.5, color="black", alpha=0.35, linewidths=0)
        axis.set(xlim=plane.carat[[0, -1]].tolist(), ylim=plane.x[[0, -1]].tolist())
        plain_axis(axis, title, "carat", "x (mm), with y and z" if axis is figure.axes[0] else "")
        bar = figure.colorbar(drawn, ax=axis, pad=0.02, fraction=0.06)
        bar.ax.tick_params(labelsize=8, color=MUTED, labelcolor=MUTED)
        bar.outline.set_visible(False)
    return figure


def refits_figure(distilled: Distilled, refits: Refits, *, title: str = "", columns: int = 3) -> Any:
    """Shapes of all refits in one panel a feature, on one scale."""
    rows = -(-len(DRAWN) // columns)
    figure = new_figure((2.15 * columns + 0.4, 1.95 * rows + (0.3 if title else 0)))
    axes = np.asarray(figure.subplots(rows, columns, sharey=True)).ravel()
    for axis, name in zip(axes, DRAWN, strict=True):
        place = distilled.features.index(name)
        color = PALETTE[1] if DRAWN.index(name) < 4 else PALETTE[0]
        for gam in refits.students:
            term = gam.term((place,))
            axis.plot(*_line(term), color=color, linewidth=1.1, alpha=0.75)
        if name not in LEVELS:
            axis.set_xlim(*middle(distilled.X[:, place]))
        axis.axhline(0, color=MUTED, linewidth=0.6)
        plain_axis(axis, "", name, ADDS if axis in axes[::columns] else "")
    # What lies beyond the range that is shown must not set the scale.
    shown = [v for axis in axes for line in axis.lines[:-1] for v in _inside(line, axis.get_xlim())]
    room = 0.06 * (max(shown) - min(shown))
    axes[0].set_ylim(min(shown) - room, max(shown) + room)
    _named(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _line(term: Term) -> tuple[np.ndarray, np.ndarray]:
    """Knots and values of a main effect."""
    return term.edges[0].cpu().numpy(), term.values.cpu().numpy()


def _inside(line: Any, limits: tuple[float, float]) -> list[float]:
    x, y = (np.asarray(part, dtype=float) for part in line.get_data())
    at_borders = np.interp(limits, x, y)
    found: list[float] = [*y[(x >= limits[0]) & (x <= limits[1])].tolist(), *at_borders.tolist()]
    return found


def _named(figure: Any) -> Any:
    """Names at the ticks of axes whose label is a feature of ordered categories."""
    for axis in figure.axes:
        for label, ticks, limits, tilt in (
            (axis.get_xlabel(), axis.set_xticks, axis.get_xlim(), 40),
            (axis.get_ylabel(), axis.set_yticks, axis.get_ylim(), 0),
        ):
            if label in LEVELS:
                names = LEVELS[label]
                is_short = max(map(len, names)) == 1
                look = {"rotation": tilt, "ha": "right"} if tilt and not is_short else {}
                ticks(range(len(names)), names, **look)
                (axis.set_xlim if tilt else axis.set_ylim)(limits)
    return figure


# ---- the main figures as one picture --------------------------------------------------------------------------------------


def save_distillation_picture(distilled: Distilled, again: Distilled, refits: Refits, path: str | os.PathLike[str]) -> None:
    """Save main effects and pairs of one student, and the refits of another, as one picture.

    Parameters
    ----------
    distilled : Distilled
    again : Distilled
        The one with the refits.
    refits : Refits
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    image_module = optional_import("PIL.Image", "demo")
    shares = [f"{order.name} {100 * order.r2:.2f} %" for order in distilled.fidelity.by_order]
    range_ = f"R2 {min(refits.r2):.4f} to {max(refits.r2):.4f}"
    halves = f"{again.name}: shapes of {len(refits.students)} students, each from a half of the rows, {range_}"
    parts = [
        terms_figure(distilled.gam, 1, 4, columns=4, title=f"{distilled.name}: R2 to the teacher with {', '.join(shares)}"),
        terms_figure(distilled.gam, 2, 4, columns=4, title="The strongest pairs; grey: no data"),
        refits_figure(again, refits, title=halves, columns=6),
    ]
    pictures = [_rendered(figure) for figure in parts]
    width = max(picture.shape[1] for picture in pictures)
    scaled = [image_module.fromarray(p).resize((width, round(p.shape[0] * width / p.shape[1]))) for p in pictures]
    canvas = image_module.new("RGB", (width, sum(p.height for p in scaled)), "white")
    top = 0
    for picture in scaled:
        canvas.paste(picture, (0, top))
        top += picture.height
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, **({"quality": 88} if Path(path).suffix.lower() in (".jpg", ".jpeg") else {}))


def _rendered(figure: Any) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return np.asarray(optional_import("PIL.Image", "demo").open(buffer).convert("RGB"))
