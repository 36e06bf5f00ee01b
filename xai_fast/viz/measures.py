"""Pictures of measures: methods side by side, with what is better marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xai_fast.metrics.characterization import characterization_score

from ._measure_values import (
    ARROWS,
    curve_of,
    direction_of,
    fidelity_pairs,
    given,
    methods_of,
    number_methods,
    refuse_options,
    value_and_error,
)
from .style import (
    FAINT,
    INK,
    LARGE,
    LEGEND,
    MUTED,
    NORMAL,
    PALETTE,
    RULE,
    SMALL,
    new_figure,
    plain_axis,
    style_of,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_bars", "plot_by_sparsity", "plot_fidelity", "plot_radar"]

FID_PLUS, FID_MINUS = "fid+", "fid\N{MINUS SIGN}"
CONTOURS = (0.2, 0.4, 0.6, 0.8)
# Room around the points of a plane of fidelities, and the shortest side that it shows.
MARGIN, SHORTEST = 0.06, 0.25
# What is seen beyond 0 and 1, so that points on the edge are whole.
EDGE = 0.03
# Of a line of names, in inches.
NAME_HEIGHT = 0.18
# Numbers nearer than this share of the picture would cover each other.
CLOSE = 0.06
# Letters of a title in a panel, and of a name around a radar.
WIDE, NARROW = 38, 20


def plot_fidelity(
    points: Any,
    *,
    levels: Sequence[float] | None = None,
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    title: str = "Fidelity",
    size: tuple[float, float] = (7.4, 4.8),
    **options: Any,
) -> Figure:
    """fid+ against fid-: a line through the levels of sparsity for each method, over contours of the characterization score.

    The best corner is the upper left one: what is removed matters (fid+ = 1), what is kept is enough (fid- = 0).

    Parameters
    ----------
    points : mapping of str to points, or Study
        For each method its (fid-, fid+) pairs (x, y), or a :class:`xai_fast.metrics.Fidelity`. A study takes the
        ``options`` of :meth:`Study.plot_fidelity`.
    levels : sequence of float, optional
        Sparsity of the points, written at the first and the last of every line.
    limits : ((float, float), (float, float)), optional
        Of fid- and fid+. Default: what holds the points, and the best corner where it is near.
    title : str
    size : (float, float)
        In inches.

    Returns
    -------
    matplotlib.figure.Figure
        Not registered with pyplot: it needs no display and no closing.

    Raises
    ------
    TypeError, ValueError
        No methods, points that are no pairs, another number of levels than of points.

    Notes
    -----
    Source of the plane: Amara et al. (2022), GraphFramEx (arXiv 2206.09677). Below 0, where probabilities may go, the score
    is taken at 0.

    Examples
    --------
    >>> figure = plot_fidelity({"a": [(0.1, 0.8), (0.3, 0.9)], "b": [(0.2, 0.4), (0.5, 0.6)]}, levels=[0.5, 0.9])
    >>> [line.get_label() for line in figure.axes[0].lines[:2]]
    ['a', 'b']
    """
    if hasattr(points, "plot_fidelity"):
        figure: Figure = points.plot_fidelity(**given(levels=levels, limits=limits), size=size, **options)
        return figure
    refuse_options(options)
    lines = {name: fidelity_pairs(value, name) for name, value in methods_of(points, "points").items()}
    for name, line in lines.items():
        if levels is not None and len(levels) != len(line):
            raise ValueError(f"levels: expected one for each of the {len(line)} points of {name!r}, got {len(levels)}")
    drawing = new_figure(size)
    axis = drawing.add_subplot()
    (left, right), (bottom, top) = limits or _frame(np.concatenate(list(lines.values())))
    axis.set(xlim=(left, right), ylim=(bottom, top))
    for number, (name, line) in enumerate(lines.items()):
        _line(axis, line[:, 0], line[:, 1], number, name)
    _contours(axis, (left, right), (bottom, top))
    if levels is not None:
        _level_labels(axis, list(lines.values()), levels)
    _best_corner(axis, (left, right), (bottom, top))
    plain_axis(axis, title, f"{FID_MINUS} ↓   the explanation alone", f"{FID_PLUS} ↑   all but the explanation")
    drawing.legend(*axis.get_legend_handles_labels(), loc="outside right upper", **LEGEND)
    return drawing


def plot_by_sparsity(
    curves: Any,
    *,
    better: Mapping[str, str | None] | None = None,
    title: str = "",
    panel: tuple[float, float] = (3.9, 3.2),
    **options: Any,
) -> Figure:
    """Measures by sparsity: a panel for each, a line with a band of a standard error for each method.

    Parameters
    ----------
    curves : mapping of str to mapping of str to (levels, values, errors), or Study
        ``{measure: {method: (levels, values, errors)}}``; errors may be None. A study takes the ``options`` of
        :meth:`Study.plot_by_sparsity`.
    better : mapping of str to {"higher", "lower", None}, optional
        Direction of each measure, marked by an arrow in its title.
    title : str
    panel : (float, float)
        Size of a panel in inches.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    TypeError, ValueError
        No curves, values or errors that are not one for each level.

    Examples
    --------
    >>> curve = ([0.5, 0.9], [0.8, 0.4], [0.05, 0.1])
    >>> figure = plot_by_sparsity({"fid_plus": {"a": curve}}, better={"fid_plus": "higher"})
    >>> figure.axes[0].get_title(loc="left")
    'fid+ ↑'
    """
    if hasattr(curves, "plot_by_sparsity"):
        figure: Figure = curves.plot_by_sparsity(**given(better=better), title=title, panel=panel, **options)
        return figure
    refuse_options(options)
    panels = {name: methods_of(value, f"curves[{name!r}]") for name, value in methods_of(curves, "curves").items()}
    styles = number_methods(panels.values())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawing = new_figure((panel[0] * columns + 0.5, panel[1] * rows + (0.3 if title else 0)))
    axes = np.asarray(drawing.subplots(rows, columns, squeeze=False)).ravel()
    for axis, (name, methods) in zip(axes, panels.items(), strict=False):
        ends = {}
        for method, curve in methods.items():
            x, y, error = curve_of(curve, f"curves[{name!r}][{method!r}]")
            _line(axis, x, y, styles[method], method, error)
            ends[method] = (x[-1], y[-1])
        plain_axis(axis, _titled(name, better), "sparsity (share left out)", "")
        _name_lines(axis, ends, styles)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=LARGE + 1, color=INK)
    return drawing


def plot_bars(
    values: Any,
    *,
    better: Mapping[str, str | None] | None = None,
    title: str = "",
    panel: tuple[float, float] | None = None,
    columns: int = 4,
    **options: Any,
) -> Figure:
    """A group of bars for each measure, one bar for each method, with error bars; the best one is named in bold.

    Measures have scales of their own: every group has an axis of its own.

    Parameters
    ----------
    values : mapping of str to mapping of str to value or (value, error), or Study
        ``{method: {measure: (value, error)}}``. A study takes the ``options`` of :meth:`Study.plot_bars`.
    better : mapping of str to {"higher", "lower", None}, optional
        Direction of each measure, marked by an arrow.
    title : str
    panel : (float, float), optional
        Size of a group in inches. Default: by the number of methods.
    columns : int
        Groups in a row.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    TypeError, ValueError
        No values, values that are not numbers.

    Examples
    --------
    >>> figure = plot_bars({"a": {"gini": (0.7, 0.1)}, "b": {"gini": 0.5}}, better={"gini": "higher"})
    >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
    [0.7, 0.5]
    """
    if hasattr(values, "plot_bars"):
        figure: Figure = values.plot_bars(**given(better=better, panel=panel), title=title, columns=columns, **options)
        return figure
    refuse_options(options)
    found = {
        m: {k: value_and_error(v, m, k) for k, v in methods_of(row, m).items()}
        for m, row in methods_of(values, "values").items()
    }
    measures = list(dict.fromkeys(name for row in found.values() for name in row))
    columns = min(columns, len(measures))
    rows = -(-len(measures) // columns)
    width, height = panel or (2.5, 0.65 + 0.3 * len(found))
    drawing = new_figure((width * columns + 0.9, height * rows + (0.35 if title else 0)))
    axes = np.asarray(drawing.subplots(rows, columns, squeeze=False, sharey=True)).ravel()
    for axis, name in zip(axes, measures, strict=False):
        pairs = [row.get(name, (math.nan, math.nan)) for row in found.values()]
        _bar_panel(axis, list(found), pairs, direction_of(name, better))
        plain_axis(axis, _titled(name, better, int(width * 10)), "", "")
        axis.grid(False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0, labelsize=NORMAL, labelcolor=INK)
    for axis in axes[len(measures) :]:
        axis.axis("off")
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=LARGE + 1, color=INK)
    return drawing


def plot_radar(
    values: Any,
    *,
    better: Mapping[str, str | None] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
    size: tuple[float, float] = (8.8, 5.0),
    **options: Any,
) -> Figure:
    """A polygon for each method over all measures; outward is better.

    Parameters
    ----------
    values : mapping of str to mapping of str to float, or Study
        ``{method: {measure: value}}``. A study takes the ``options`` of :meth:`Study.plot_radar`.
    better : mapping of str to {"higher", "lower"}, optional
        Direction of each measure, by default higher.
    limits : mapping of str to (worst, best), optional
        Values of the centre and of the outer ring. A measure without them is shown as a share of the best method: value /
        largest where higher is better, smallest / value where lower is; below 0 counts as 0.
    title : str
    size : (float, float)
        In inches.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    TypeError, ValueError
        Fewer than three measures that are a number for some method, limits whose ends are the same.

    Notes
    -----
    The area of a polygon depends on the order of the measures: compare spokes. A value that is not a number leaves a gap.

    Examples
    --------
    >>> rows = {"a": {"gini": 0.7, "size": 3.0, "mass": 0.9}, "b": {"gini": 0.5, "size": 6.0, "mass": 0.6}}
    >>> figure = plot_radar(rows, better={"size": "lower"}, limits={"gini": (0, 1), "mass": (0, 1)})
    >>> figure.axes[0].lines[1].get_ydata().round(2).tolist()
    [0.5, 0.5, 0.6, 0.5]
    """
    if hasattr(values, "plot_radar"):
        asked = given(better=better, limits=limits)
        figure: Figure = values.plot_radar(**asked, title=title, size=size, **options)
        return figure
    refuse_options(options)
    found = {
        m: {k: value_and_error(v, m, k)[0] for k, v in methods_of(r, m).items()}
        for m, r in methods_of(values, "values").items()
    }
    measures = list(dict.fromkeys(name for row in found.values() for name in row))
    shown = [name for name in measures if any(math.isfinite(row.get(name, math.nan)) for row in found.values())]
    if len(shown) < 3:
        raise ValueError(f"values: expected at least 3 measures with numbers for a radar, got {len(shown)}")
    bounds = limits or {}
    radii = {name: _outward(name, [r.get(name, math.nan) for r in found.values()], better, bounds) for name in shown}
    drawing = new_figure(size, layout="none")
    # Room for names all around, at the same place for every picture: radars are compared.
    side = min(size[1] - 1.5, size[0] - 5.2)
    axis = drawing.add_axes((1.75 / size[0], 0.7 / size[1], side / size[0], side / size[1]), projection="polar")
    angles = np.linspace(0, 2 * np.pi, len(shown), endpoint=False)
    for number, name in enumerate(found):
        _polygon(axis, angles, [radii[measure][number] for measure in shown], number, name)
    _spokes(axis, angles, [_label(name) + ("" if name in bounds else " *") for name in shown])
    drawing.legend(*axis.get_legend_handles_labels(), loc="upper right", **LEGEND)
    if title:
        drawing.suptitle(title, x=0.015, ha="left", fontsize=LARGE + 1, color=INK)
    note = "outward is better" + ("" if all(name in bounds for name in shown) else ";  * as a share of the best method")
    drawing.text(0.015, 0.02, note, fontsize=SMALL, color=MUTED)
    return drawing


def _label(name: str) -> str:
    """A name for people: "fid_plus_model_accuracy" is "fid+ model, accuracy"."""
    for start, short in (("fid_plus", FID_PLUS), ("fid_minus", FID_MINUS), ("characterization", "characterization")):
        if name.startswith(start):
            rest = name.removeprefix(start).strip("_").replace("_", ", ")
            return f"{short} {rest}".strip()
    return name.replace("_", " ")


def _titled(name: str, better: Mapping[str, str | None] | None, width: int = WIDE) -> str:
    return wrapped(f"{_label(name)} {ARROWS[direction_of(name, better)]}".strip(), width)


def _line(axis: Any, x: Any, y: Any, number: int, name: str, error: Any = None) -> None:
    style = style_of(number)
    if error is not None:
        axis.fill_between(x, y - error, y + error, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(x, y, label=name, markersize=5.5, linewidth=1.6, markeredgecolor="white", markeredgewidth=0.7, **style)


def _name_lines(axis: Any, ends: Mapping[str, Any], styles: Mapping[str, int]) -> None:
    """Names with their marks at the right of the lines, moved apart where they would cover each other."""
    low, high = axis.get_ylim()
    wanted = {name: (y - low) / (high - low) for name, (_, y) in ends.items() if math.isfinite(y)}
    gap = NAME_HEIGHT / (axis.get_window_extent().height / axis.figure.dpi)
    for name, place in _apart(wanted, gap).items():
        style = {**style_of(styles[name]), "linestyle": "none"}
        outside = {"transform": axis.transAxes, "clip_on": False}
        axis.plot([1.045], [place], markersize=5.5, markeredgecolor="white", markeredgewidth=0.7, **style, **outside)
        axis.text(1.08, place, name, color=INK, fontsize=NORMAL, va="center", **outside)


def _apart(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Places at least `gap` apart, in the same order, moved as little as a pass upward and a shift back allow."""
    order = sorted(places, key=lambda name: places[name])
    found: dict[str, float] = {}
    groups: list[list[str]] = []
    for name in order:
        groups.append([name])
        while len(groups) > 1 and _bottom(groups[-1], places, gap) < _top(groups[-2], places, gap) + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        start = _bottom(group, places, gap)
        found |= {name: start + gap * i for i, name in enumerate(group)}
    return found


def _bottom(group: list[str], places: Mapping[str, float], gap: float) -> float:
    """Where the lowest of a stack of names stands whose middle is that of the places they want."""
    return sum(places[name] for name in group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[str], places: Mapping[str, float], gap: float) -> float:
    return _bottom(group, places, gap) + gap * (len(group) - 1)


# ---- parts of the pictures -------------------------------------------------------------------------------------------


def _frame(points: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits that hold the points; up to an edge of the plane where that is near."""
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return (-EDGE, 1 + EDGE), (-EDGE, 1 + EDGE)
    frames = []
    for least, most in zip(points.min(0).tolist(), points.max(0).tolist(), strict=True):
        room = max(MARGIN, (SHORTEST - (most - least)) / 2)
        low = -EDGE if 0 <= least < SHORTEST else least - room
        high = 1 + EDGE if 1 - SHORTEST < most <= 1 else most + room
        frames.append((low, high))
    return frames[0], frames[1]


def _contours(axis: Any, x: tuple[float, float], y: tuple[float, float]) -> None:
    grid_x, grid_y = np.meshgrid(np.linspace(*x, 200), np.linspace(*y, 200))
    minus, plus = (torch.from_numpy(g).clamp(0, 1) for g in (grid_x, grid_y))
    score = characterization_score(plus, minus).numpy()
    fine = [round(0.1 * i, 1) for i in range(1, 10)]
    span = float(score.max() - score.min())
    levels = CONTOURS if span > 0.5 else fine
    drawn = axis.contour(grid_x, grid_y, score, levels=levels, colors=RULE, linewidths=0.9, zorder=0)
    axis.plot([], [], color=RULE, linewidth=0.9, label="characterization score")
    axis.clabel(drawn, fmt="%.1f", fontsize=SMALL - 1, colors=MUTED, inline_spacing=2)


def _best_corner(axis: Any, x: tuple[float, float], y: tuple[float, float]) -> None:
    """The corner itself where it is in the picture, else an arrow towards it."""
    if x[0] <= 0 <= x[1] and y[0] <= 1 <= y[1]:
        axis.plot([0], [1], marker="*", markersize=13, color=INK, clip_on=False, zorder=5, linestyle="none")
        text, at = "best", (0.0, 1.0)
        axis.annotate(text, at, xytext=(11, 0), textcoords="offset points", fontsize=SMALL, color=INK, va="center")
        return
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.0}
    axis.annotate("", (0.015, 0.985), (0.085, 0.915), xycoords="axes fraction", arrowprops=style)
    axis.text(0.092, 0.905, "better", transform=axis.transAxes, fontsize=SMALL, color=INK, va="center")


def _level_labels(axis: Any, lines: list[np.ndarray], levels: Sequence[float]) -> None:
    """Sparsity at the ends of the lines, where no other such number stands already."""
    number = {"marker": f"${levels[0]:g}$", "markersize": 15, "markeredgewidth": 0.0, "linestyle": "none"}
    axis.plot([], [], color=MUTED, label="sparsity", **number)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    taken: list[np.ndarray] = []
    for line in lines:
        for at in sorted({0, len(line) - 1}):
            place = (line[at] - (left, bottom)) / (right - left, top - bottom)
            if np.isfinite(place).all() and all(np.abs(place - other).max() > CLOSE for other in taken):
                taken.append(place)
                offset = {"xytext": (7, 3), "textcoords": "offset points", "ha": "left"}
                axis.annotate(f"{levels[at]:g}", line[at], fontsize=SMALL - 0.5, color=MUTED, **offset)


def _bar_panel(axis: Any, methods: list[str], pairs: list[tuple[float, float]], direction: str | None) -> None:
    """Bars lie: names of methods are read without turning the head."""
    known = [v for v, _ in pairs if math.isfinite(v)]
    best = {"higher": max, "lower": min}[direction](known) if known and direction else None
    for place, (value, error) in enumerate(pairs):
        color = PALETTE[place % len(PALETTE)]
        if not math.isfinite(value):
            axis.text(0, place, " no value", fontsize=SMALL, color=MUTED, va="center")
            continue
        axis.barh(place, value, height=0.68, color=color, alpha=0.85)
        bars = error if math.isfinite(error) else 0.0
        if bars:
            axis.errorbar(value, place, xerr=bars, color=INK, linewidth=1.0, capsize=2.5, capthick=1.0)
        end = value + bars if value >= 0 else 0.0
        axis.annotate(
            _number(value),
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=SMALL,
            va="center",
            color=INK,
            fontweight="bold" if value == best else "normal",
        )
    low = min([0.0, *(v - (e if math.isfinite(e) else 0) for v, e in pairs if math.isfinite(v))])
    high = max([0.0, *(v + (e if math.isfinite(e) else 0) for v, e in pairs if math.isfinite(v))])
    span = (high - low) or 1.0
    axis.set(yticks=range(len(methods)), yticklabels=methods, xlim=(low - 0.04 * span * (low < 0), high + 0.34 * span))
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.axvline(0, color=MUTED, linewidth=0.8)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _outward(
    name: str, values: list[float], better: Mapping[str, str | None] | None, limits: Mapping[str, tuple[float, float]]
) -> list[float]:
    """Radii from 0 to 1, NaN where there is no value."""
    x = np.asarray(values)
    if name in limits:
        worst, best = limits[name]
        if worst == best:
            raise ValueError(f"limits: expected two different values for {name!r}, got {limits[name]!r}")
        radii = (x - worst) / (best - worst)
    elif direction_of(name, better) == "lower":
        least = max(float(np.nanmin(x)), 0.0)
        radii = np.where(x <= least, 1.0, least / np.where(x > 0, x, 1.0))
    else:
        largest = float(np.nanmax(x))
        radii = x / largest if largest > 0 else np.zeros_like(x)
    clipped: list[float] = np.where(np.isnan(x), np.nan, radii.clip(0, 1)).tolist()
    return clipped


def _polygon(axis: Any, angles: np.ndarray, radii: list[float], number: int, name: str) -> None:
    closed = np.append(angles, angles[0]), np.append(radii, radii[0])
    style = style_of(number)
    look = {"linewidth": 1.7, "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.7, "clip_on": False}
    axis.plot(*closed, label=name, **look, **style)


def _spokes(axis: Any, angles: np.ndarray, labels: list[str]) -> None:
    axis.set_theta_offset(np.pi / 2)
    axis.set_theta_direction(-1)
    axis.set(ylim=(0, 1), yticks=[0.25, 0.5, 0.75, 1.0], yticklabels=["", "0.5", "", "1"], xticks=angles)
    axis.set_rlabel_position(np.degrees(angles[1]) / 2)
    axis.set_xticklabels([])
    for angle, label in zip(angles, labels, strict=True):
        side = np.sin(angle)
        place = "center" if abs(side) < 0.15 else ("left" if side > 0 else "right")
        axis.text(angle, 1.08, wrapped(label, NARROW), fontsize=NORMAL, color=INK, ha=place, va="center")
    axis.tick_params(axis="y", labelsize=SMALL - 1, labelcolor=MUTED)
    axis.grid(color=FAINT, linewidth=0.8)
    axis.spines["polar"].set_color(FAINT)
