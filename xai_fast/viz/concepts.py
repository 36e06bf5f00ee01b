"""Pictures of concepts: TCAV scores by layer with their tests, and the examples nearest to a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import

from .heatmap import to_rgb
from .style import FAINT, INK, LARGE, LEGEND, MUTED, NORMAL, PALETTE, SMALL, new_figure, plain_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from xai_fast.concepts import TCAV

__all__ = ["concept_grid", "plot_tcav"]

# Of a layer's group of bars, the rest is the gap to the next.
GROUP = 0.82
RANDOM = "random"
MARK: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": LARGE + 2, "color": INK, "annotation_clip": False}


def plot_tcav(
    result: TCAV, *, class_names: Sequence[str] | None = None, title: str = "TCAV", panel: tuple[float, float] | None = None
) -> Figure:
    """A group of bars for each layer, one for each concept and one for random sets; a row for each class.

    Bars show the mean score over the random sets with one standard deviation. A star marks a score that differs from that of
    random sets by the corrected test; bars without one are pale and hatched. 0.5 is where the sign says nothing.

    Parameters
    ----------
    result : TCAV
    class_names : sequence of str, optional
        Titles of the rows, one for each class of the result.
    title : str
    panel : (float, float), optional
        Size of a row in inches. Default: by the number of bars.

    Returns
    -------
    matplotlib.figure.Figure
        Not registered with pyplot: it needs no display and no closing.

    Raises
    ------
    ValueError
        Another number of names than of classes.

    Examples
    --------
    >>> from xai_fast.concepts import tcav
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
    >>> sets = [torch.rand(9, 4) for _ in range(5)]
    >>> figure = plot_tcav(tcav(model, "0", torch.rand(6, 4), 0, {"a": torch.rand(9, 4)}, sets))
    >>> len(figure.axes[0].patches)
    2
    """
    if class_names is not None and len(class_names) != len(result.targets):
        raise ValueError(f"class_names: expected {len(result.targets)}, one for each class, got {len(class_names)}")
    names = [f"class {target}" for target in result.targets] if class_names is None else list(class_names)
    bars = (len(result.concepts) + 1) * len(result.layers)
    width, height = panel or (min(3.2 + 0.34 * bars, 16), 2.7)
    drawing = new_figure((width, height * len(names) + (0.35 if title else 0)))
    axes = np.asarray(drawing.subplots(len(names), 1, squeeze=False, sharex=True)).ravel()
    for row, (axis, name) in enumerate(zip(axes, names, strict=True)):
        handles = _scores(axis, result, row)
        plain_axis(axis, name if len(names) > 1 or class_names else "", "", "TCAV score")
        axis.tick_params(axis="x", length=0, labelsize=NORMAL, labelcolor=INK)
    drawing.legend(handles, [*result.concepts, RANDOM], loc="outside right upper", **(LEGEND | {"handlelength": 1.2}))
    if title:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=LARGE + 1, color=INK)
    level = f"* differs from random: p < {result.alpha:g}, {_test_name(result)}"
    drawing.supxlabel(level, x=0.01, ha="left", fontsize=SMALL, color=MUTED)
    return drawing


def concept_grid(
    images: Sequence[Tensor | np.ndarray],
    cosine: Tensor | np.ndarray,
    k: int = 6,
    *,
    titles: tuple[str, str] = ("most similar", "least similar"),
    cell: float = 1.5,
) -> Figure:
    """The k images most similar to a concept, and the k least similar ones below, with their cosines.

    Parameters
    ----------
    images : sequence of arrays, or Tensor (n, C, H, W)
        As :func:`xai_fast.viz.to_rgb` takes them.
    cosine : array, shape (n,)
        Of each image, as :func:`xai_fast.concepts.sort_by_concept` gives them.
    k : int
        Images in a row; at most n.
    titles : (str, str)
    cell : float
        Size of an image in inches.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        Another number of cosines than of images, `k` out of range, cosines that are NaN.

    Examples
    --------
    >>> figure = concept_grid(torch.rand(5, 3, 8, 8), torch.tensor([0.1, 0.9, -0.2, 0.0, 0.5]), k=2)
    >>> [axis.get_xlabel() for axis in figure.axes]
    ['0.90', '0.50', '-0.20', '0.00']
    """
    values = torch.as_tensor(cosine).detach().cpu().double()
    if values.dim() != 1 or len(values) != len(images):
        raise ValueError(f"cosine: expected one for each of {len(images)} images, got shape {tuple(values.shape)}")
    if not 1 <= k <= len(images):
        raise ValueError(f"k: expected 1 to {len(images)}, the number of images, got {k}")
    if bool(values.isnan().any()):
        raise ValueError("cosine: expected numbers, got NaN")
    order = values.argsort(descending=True, stable=True).tolist()
    drawing = new_figure((cell * k + 0.4, (cell + 0.3) * 2))
    axes = np.asarray(drawing.subplots(2, k, squeeze=False))
    for row, chosen, title in zip(axes, (order[:k], order[::-1][:k]), titles, strict=True):
        for axis, place in zip(row, chosen, strict=True):
            axis.imshow(to_rgb(images[place]))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"{float(values[place]):z.2f}", fontsize=SMALL, color=MUTED)
            axis.spines[:].set_color(FAINT)
        row[0].set_ylabel(title, fontsize=NORMAL, color=INK)
    return drawing


def _test_name(result: TCAV) -> str:
    test = {"welch": "Welch's t-test", "exchangeable": "as one more random set"}[result.test]
    correction = {"bonferroni": "Bonferroni", "holm": "Holm", "fdr_bh": "Benjamini-Hochberg", None: "not corrected"}
    spread = f"bars: mean and standard deviation over {len(result.random_sets)} random sets"
    return f"{test}, {correction[result.correction]}; {spread}"


def _scores(axis: Any, result: TCAV, row: int) -> list[Any]:
    """Draws a class; returns a patch of each colour for the legend."""
    scores, null = result.scores[row].cpu(), result.null_scores[row].cpu()
    significant = (result.adjusted[row] < result.alpha).tolist()
    count = len(result.concepts) + 1
    width = GROUP / count
    patch: Any = optional_import("matplotlib.patches", "demo").Patch
    places = np.arange(len(result.layers)) - GROUP / 2 + width / 2
    axis.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    handles = []
    for c in range(count):
        values = null if c == count - 1 else scores[:, c]
        color = FAINT if c == count - 1 else PALETTE[c % len(PALETTE)]
        at = places + c * width
        mean, error = values.mean(-1).numpy(), values.std(-1).numpy()
        bars = axis.bar(at, mean, width * 0.92, color=color, edgecolor="white", linewidth=0)
        handles.append(patch(facecolor=color))
        axis.errorbar(at, mean, error, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        for layer, bar in enumerate(bars):
            if c == count - 1:
                continue
            if significant[layer][c]:
                top = float(mean[layer] + error[layer])
                axis.annotate("*", (at[layer], top), xytext=(0, -1), textcoords="offset points", **MARK)
            else:
                bar.set(alpha=0.4, hatch="////", edgecolor="white")
    axis.set(xticks=range(len(result.layers)), xticklabels=result.layers, xlim=(-0.5, len(result.layers) - 0.5))
    highest = max(1.0, float((scores.mean(-1) + scores.std(-1)).max()), float((null.mean(-1) + null.std(-1)).max()))
    axis.set(ylim=(0, highest + 0.09), yticks=[0, 0.25, 0.5, 0.75, 1.0])
    return handles
