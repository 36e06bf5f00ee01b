"""Pictures of the terms of a distilled additive model: shapes with the density of the data, heat maps of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import DASHES, INK, LARGE, MUTED, NORMAL, PALETTE, SMALL, new_figure, plain_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from xai_fast.distill import GAM, Grid, Term

__all__ = ["plot_term", "plot_terms"]

MAP = "RdBu_r"
EMPTY = "#e5e7eb"
# Panels of a triple: slices along its third feature.
SLICES = 4
# Along each side of a heat map.
PIXELS = 120
# Names of categories that fit under a panel.
NAMES = 12


def plot_term(
    term: Term, *, target: int | None = None, title: str | None = None, size: tuple[float, float] | None = None
) -> Figure:
    """One term: a line over a histogram of the data, a heat map, or slices of a triple.

    Parameters
    ----------
    term : Term
    target : int, optional
        One output of several. Default: all outputs of a main effect, the first of others.
    title : str, optional
    size : (float, float), optional
        In inches.

    Returns
    -------
    matplotlib.figure.Figure
        Not registered with pyplot. Grey cells of a heat map hold no data.

    Raises
    ------
    ValueError
        If there is no such output.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.distill import fit_gam
    >>> gam = fit_gam(lambda x: x[:, 0] * x[:, 1], torch.rand(500, 2), interactions=[(0, 1)])
    >>> plot_term(gam.terms[0]).axes[0].get_xlabel()
    'x0'
    """
    _check_target(term, target)
    panels = min(SLICES, term.grids[-1].size) if term.order == 3 else 1
    figure = new_figure(size or ((2.7 * panels + 1.0, 3.3) if panels > 1 else (5.0, 3.8)))
    axes = np.atleast_1d(figure.subplots(1, panels, sharey=term.order == 3))
    if term.order == 3:
        _triple(figure, axes, term, target or 0)
        figure.suptitle(title or " x ".join(term.names), x=0.01, ha="left", fontsize=LARGE + 1, color=INK)
    else:
        _panel(figure, axes[0], term, target, title)
    return figure


def plot_terms(
    gam: GAM,
    *,
    count: int = 12,
    target: int | None = None,
    columns: int = 4,
    panel: tuple[float, float] = (3.1, 2.7),
    title: str = "",
) -> Figure:
    """The most important main effects and pairs of a student, most important first; main effects share their scale.

    Parameters
    ----------
    gam : GAM
    count : int
    target : int, optional
    columns : int
    panel : (float, float)
        Size of a panel in inches.
    title : str

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> import torch
    >>> from xai_fast.distill import fit_gam
    >>> gam = fit_gam(lambda x: x[:, 0] + 2 * x[:, 1], torch.rand(500, 3))
    >>> [axis.get_xlabel() for axis in plot_terms(gam, count=2).axes[:2]]
    ['x1', 'x0']
    """
    shown = sorted((t for t in gam.terms if t.order < 3), key=lambda t: -t.importance)[:count]
    if not shown:
        raise ValueError("gam: expected main effects or pairs to show, got none")
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure((panel[0] * columns, panel[1] * rows + (0.35 if title else 0)))
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
    mains = [_seen(t, target) for t in shown if t.order == 1]
    low, high = (min(v.min() for v in mains), max(v.max() for v in mains)) if mains else (0.0, 1.0)
    room = 0.06 * (high - low) or 1.0
    for axis, term in zip(axes, shown, strict=False):
        _check_target(term, target)
        _panel(figure, axis, term, target, None, (low - room, high + room))
    for axis in axes[len(shown) :]:
        axis.axis("off")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE + 1, color=INK)
    return figure


def _panel(
    figure: Any, axis: Any, term: Term, target: int | None, title: str | None, limits: tuple[float, float] | None = None
) -> None:
    name = title if title is not None else f"importance {term.importance:.2g}"
    if term.order == 1:
        plain_axis(axis, name, term.names[0], "adds to the output")
        _main(axis, term, target, limits)
    else:
        plain_axis(axis, name, term.names[0], term.names[1])
        image = _image(term, _tables(term, target or 0)[..., 0], _array(term.weights))
        _bar(figure, _heat(axis, term, image, _largest(image)), axis)
    axis.title.set_fontsize(NORMAL)


def _main(axis: Any, term: Term, target: int | None, limits: tuple[float, float] | None) -> None:
    grid, values = term.grids[0], _tables(term, target)
    low, high = limits or (float(values.min()), float(values.max()))
    room = 0.0 if limits else (0.08 * (high - low) or 1.0)
    axis.set_ylim(low - room, high + room)
    axis.axhline(0, color=MUTED, linewidth=0.7, zorder=1)
    for c in range(values.shape[1]):
        look: dict[str, Any] = {"color": PALETTE[c % len(PALETTE)], "linewidth": 1.9, "zorder": 3}
        look["linestyle"] = DASHES[c // len(PALETTE) % len(DASHES)]
        label = f"output {c}" if target is None and values.shape[1] > 1 else None
        if grid.kind == "steps":
            axis.stairs(values[:, c], _array(grid.points), baseline=None, label=label, **look)
        elif grid.kind == "linear":
            axis.plot(_array(grid.points), values[:, c], label=label, **look)
        else:
            axis.plot(range(grid.size), values[:, c], label=label, marker="o", **{**look, "linewidth": 0.8})
    _density(axis, grid, _array(term.weights))
    if 1 < values.shape[1] <= 2 * len(PALETTE) and target is None:
        axis.legend(frameon=False, fontsize=SMALL, labelcolor=INK, ncols=1 + values.shape[1] // 5)
    if grid.kind == "categories":
        _category_ticks(axis.set_xticks, grid)
    elif limits is not None or grid.size > 8:
        _zoom(axis, grid, _array(term.weights))


def _density(axis: Any, grid: Grid, weights: np.ndarray) -> None:
    """How many data there are, as bars along the bottom."""
    points = _array(grid.points)
    if grid.kind == "categories":
        left, width = np.arange(grid.size) - 0.35, np.full(grid.size, 0.7)
        height = weights
    else:
        if grid.kind == "linear":
            middle = (points[:-1] + points[1:]) / 2
            points = np.concatenate([points[:1], middle, points[-1:]])
        left, width = points[:-1], np.diff(points)
        height = weights / np.maximum(width, 1e-300)
    scale = 0.2 / max(float(height.max()), 1e-300)
    axis.bar(
        left,
        height * scale,
        width,
        align="edge",
        color="#c7ccd4",
        linewidth=0,
        zorder=0,
        transform=axis.get_xaxis_transform(),
    )


def _seen(term: Term, target: int | None) -> np.ndarray:
    """Values of a main effect in the range that is shown: those outside must not set the scale."""
    grid, values = term.grids[0], _tables(term, target)
    if grid.kind == "categories":
        return values
    low, high = _range(grid, _array(term.weights))
    places = _array(grid.points)[: len(values)]
    return values[(places >= low) & (places <= high)]


def _zoom(axis: Any, grid: Grid, weights: np.ndarray) -> None:
    axis.set_xlim(*_range(grid, weights))


def _range(grid: Grid, weights: np.ndarray) -> tuple[float, float]:
    """A few far values must not push all others into a corner: the middle 99 % of the data, where that is much less."""
    points, share = _array(grid.points), np.cumsum(weights) / weights.sum()
    places = points[: len(share)]
    first, last = (int(np.searchsorted(share, level)) for level in (0.005, 0.995))
    low, high = places[first], places[min(last, len(places) - 1)]
    if high - low < 0.5 * (points[-1] - points[0]) and high > low:
        return float(low), float(high)
    return float(points[0]), float(points[-1])


def _sampling(grid: Grid, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Borders of pixels along an axis, and what share each value of the grid has in each, (pixels, size)."""
    if grid.kind == "categories":
        return np.arange(grid.size + 1) - 0.5, np.eye(grid.size)
    borders = np.linspace(*_range(grid, weights), PIXELS + 1)
    index, share = grid.encode(grid.points.new_tensor((borders[:-1] + borders[1:]) / 2))
    R = np.zeros((PIXELS, grid.size))
    np.add.at(R, (np.arange(PIXELS)[:, None], _array(index)), _array(share))
    return borders, R


def _image(term: Term, table: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The function of the first two features as pixels, NaN where a value without data has a share."""
    whole = _array(term.weights)
    masses = [whole.sum(axis=tuple(d for d in range(whole.ndim) if d != axis)) for axis in (0, 1)]
    (x, across), (y, up) = (_sampling(grid, mass) for grid, mass in zip(term.grids[:2], masses, strict=True))
    values = across @ table @ up.T
    values[across @ (weights == 0) @ up.T > 0] = np.nan
    return x, y, values


def _largest(*images: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    found = [np.abs(values[np.isfinite(values)]).max(initial=0.0) for _, _, values in images]
    return float(max(found)) or 1.0


def _heat(axis: Any, term: Term, image: tuple[np.ndarray, np.ndarray, np.ndarray], most: float) -> Any:
    x, y, values = image
    axis.set_facecolor(EMPTY)
    drawn = axis.pcolormesh(x, y, np.ma.masked_invalid(values.T), cmap=MAP, vmin=-most, vmax=most, rasterized=True)
    for grid, ticks in zip(term.grids, (axis.set_xticks, axis.set_yticks), strict=False):
        if grid.kind == "categories":
            _category_ticks(ticks, grid)
    return drawn


def _triple(figure: Any, axes: Any, term: Term, target: int) -> None:
    table, weights, third = _tables(term, target)[..., 0], _array(term.weights), term.grids[2]
    places = np.unique(np.linspace(0, third.size - 1, len(axes)).round().astype(int))
    images = [_image(term, table[:, :, place], weights[:, :, place]) for place in places]
    most, drawn = _largest(*images), None
    for axis, place, image in zip(axes, places, images, strict=False):
        plain_axis(axis, f"{term.names[2]} {_at(third, place)}", term.names[0], term.names[1] if axis is axes[0] else "")
        axis.title.set_fontsize(NORMAL)
        drawn = _heat(axis, term, image, most)
    _bar(figure, drawn, list(axes))


def _bar(figure: Any, drawn: Any, axes: Any) -> None:
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, fraction=0.06)
    bar.ax.tick_params(labelsize=SMALL, color=MUTED, labelcolor=MUTED)
    bar.outline.set_visible(False)


def _at(grid: Grid, place: Any) -> str:
    points = _array(grid.points)
    if grid.kind == "linear":
        return f"= {points[place]:.3g}"
    if grid.kind == "steps":
        return f"{points[place]:.3g} to {points[place + 1]:.3g}"
    return f"= {_category(grid, place)}"


def _category(grid: Grid, place: Any) -> str:
    assert grid.groups is not None
    levels = _array(grid.points)[_array(grid.groups) == place]
    return f"{levels[0]:g}" if len(levels) == 1 else f"{len(levels)} others"


def _category_ticks(ticks: Any, grid: Grid) -> None:
    step = -(-grid.size // NAMES)
    places = range(0, grid.size, step)
    ticks(list(places), [_category(grid, place) for place in places])


def _tables(term: Term, target: int | None) -> np.ndarray:
    table = _array(term.table)
    return table if target is None or table.shape[-1] == 1 else table[..., target : target + 1]


def _array(x: Any) -> np.ndarray:
    found: np.ndarray = x.detach().cpu().numpy()
    return found


def _check_target(term: Term, target: int | None) -> None:
    outputs = term.table.shape[-1]
    if target is not None and not 0 <= target < outputs:
        raise ValueError(f"target: expected an output below {outputs}, got {target}")
