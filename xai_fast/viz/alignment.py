"""The weights of an encoder-decoder as a picture: outputs down, inputs across."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_alignment"]


def plot_alignment(
    weights: Tensor | np.ndarray,
    source: Sequence[str],
    target: Sequence[str],
    *,
    signed: bool = False,
    limit: float | None = None,
    title: str = "",
    cell: float = 0.36,
) -> Figure:
    """Plot which input tokens each output token attends to, or which of them spoke for it.

    Parameters
    ----------
    weights : array, shape (T, S)
        Row t: output token t.
    source : sequence of S str
        Written above the columns.
    target : sequence of T str
        Written beside the rows.
    signed : bool
        Red is for, blue against, white zero. Otherwise weights are at least 0, and orange is more: the colours of
        `colored_text`.
    limit : float, optional
        Weight of the full colour, larger ones look the same. Default: the largest absolute weight.
    title : str
    cell : float
        Size of a cell in inches.

    Returns
    -------
    matplotlib.figure.Figure
        Not registered with pyplot: it needs no display and no closing. Save it with ``figure.savefig(path)``.

    Raises
    ------
    ValueError
        Weights of another shape, not finite, or negative though not signed; a limit that is not a number above 0.

    Examples
    --------
    >>> figure = plot_alignment(torch.eye(2), ["deux", "mots"], ["two", "words"])
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['deux', 'mots']
    """
    values = _values(weights, (len(target), len(source)), signed)
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"limit: expected a finite number above 0, got {limit}")
    top = limit or float(np.abs(values).max(initial=0.0)) or 1.0
    figure_class: Any = optional_import("matplotlib.figure", "demo").Figure
    size = (cell * len(source) + 1.8, cell * len(target) + 1.3)
    figure: Figure = figure_class(figsize=size, layout="constrained")
    axis = figure.subplots()
    cmap, low = ("RdBu_r", -top) if signed else ("Oranges", 0.0)
    # pcolormesh keeps the cells sharp when a figure is saved as SVG or PDF.
    mesh = axis.pcolormesh(values, cmap=cmap, vmin=low, vmax=top, edgecolors="white", linewidth=0.5)
    axis.set_xticks(np.arange(len(source)) + 0.5, source, rotation=90 if max(map(len, source), default=0) > 2 else 0)
    axis.set_yticks(np.arange(len(target)) + 0.5, target)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10)
    figure.colorbar(mesh, ax=axis, shrink=0.8).outline.set_visible(False)
    return figure


def _values(weights: Tensor | np.ndarray, shape: tuple[int, int], signed: bool) -> np.ndarray:
    values = np.asarray(torch.as_tensor(weights).detach().double().cpu())
    if values.shape != shape:
        raise ValueError(f"weights: expected shape (T, S) = {shape}, one row for each target token, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("weights: expected finite values, got NaN or inf")
    if not signed and values.min(initial=0.0) < 0:
        raise ValueError(f"weights: expected at least 0 where signed is False, got {values.min():g}")
    return values
