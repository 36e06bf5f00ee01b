"""The figures of the page of recurrent networks, and its main ones as one picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from xai_fast._optional import optional_import
from xai_fast.viz.alignment import plot_alignment
from xai_fast.viz.text import readable_tokens, text_color

from .review_checks import PLAIN, SIGNED
from .reviews import Sentence
from .spelled_dates import Alignment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["alignment_figures", "save_recurrent_picture"]

DPI = 100
# Of the picture, in inches.
WIDTH, LINE = 11.6, 0.42
COLUMNS = (0.25, 2.0, 6.9)
SIZE = 13
INK, MUTED = "#1c2430", "#5a6675"


def alignment_figures(alignment: Alignment) -> tuple[Figure, Figure]:
    """Plain and signed attention of a date as matrices.

    Parameters
    ----------
    alignment : Alignment

    Returns
    -------
    (Figure, Figure)
        See `xai_fast.viz.alignment.plot_alignment`.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.demo.recurrent.spelled_dates import SpelledDate
    >>> weights = torch.rand(2, 2)
    >>> date = SpelledDate("md", ["May", "3"], ["month", "day"], "0503")
    >>> plain, signed = alignment_figures(Alignment(date, "53", weights, weights))
    >>> plain.axes[0].get_title(), signed.axes[0].get_title()
    ('attention', 'signed attention, each row by its largest')
    """
    source, target = alignment.date.tokens, list(alignment.written)
    plain = plot_alignment(alignment.attention, source, target, limit=1.0, title="attention")
    # The gradient fades as a character becomes certain: side by side, all rows but the least certain would be white.
    signed = alignment.signed / alignment.signed.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    title = "signed attention, each row by its largest"
    return plain, plot_alignment(signed, source, target, signed=True, limit=1.0, title=title)


def save_recurrent_picture(sentences: Sequence[Sentence], alignment: Alignment, path: str | os.PathLike[str]) -> None:
    """Save sentences in plain and in signed attention, above both matrices of a date, as one picture.

    Parameters
    ----------
    sentences : sequence of Sentence
    alignment : Alignment
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    image_module = optional_import("PIL.Image", "demo")
    above = _rendered(_sentences_figure(sentences))
    below = [_rendered(figure) for figure in alignment_figures(alignment)]
    gap = (above.shape[1] - sum(part.shape[1] for part in below)) // 3
    height = above.shape[0] + max(part.shape[0] for part in below)
    canvas = image_module.new("RGB", (above.shape[1], height + 10), "white")
    canvas.paste(image_module.fromarray(above), (0, 0))
    left = max(0, gap)
    for part in below:
        canvas.paste(image_module.fromarray(part), (left, above.shape[0]))
        left += part.shape[1] + max(0, gap)
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, **({"quality": 90} if Path(path).suffix.lower() in (".jpg", ".jpeg") else {}))


def _sentences_figure(sentences: Sequence[Sentence]) -> Any:
    """A line for each sentence: the verdict, and the text in both colourings."""
    lines = len(sentences) + 1
    figure = _figure(WIDTH, LINE * (lines + 0.4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for left, name in zip(COLUMNS, ("Verdict", PLAIN, SIGNED), strict=True):
        axis.text(left, 0.5, name, fontsize=10.5, color=MUTED, va="center_baseline")
    axis.set(xlim=(0, WIDTH), ylim=(lines + 0.1, -0.3))
    for line, sentence in enumerate(sentences):
        sure = sentence.probability if sentence.target else 1 - sentence.probability
        verdict = f"{'praise' if sentence.target else 'blame'}, {sure:.0%}"
        axis.text(COLUMNS[0], line + 1.5, verdict, fontsize=SIZE, weight="bold", color=INK, va="center_baseline")
        for left, weights, signed in zip(COLUMNS[1:], (sentence.attention, sentence.signed), (False, True), strict=True):
            _draw_text(axis, left, line + 1.5, sentence.tokens, weights, signed)
    return figure


def _draw_text(axis: Any, left: float, line: float, tokens: Sequence[str], weights: Tensor, signed: bool) -> None:
    """Tokens one after the other, each on its ground: where the next one begins is known once a word is measured."""
    rectangle = optional_import("matplotlib.patches", "demo").Rectangle
    renderer = axis.figure.canvas.get_renderer()
    limit = float(weights.abs().max())
    space = _width(axis, renderer, "a a") - _width(axis, renderer, "aa")
    for piece, weight in zip(readable_tokens(tokens), weights.tolist(), strict=True):
        word = piece.lstrip(" ")
        left += space * (len(piece) - len(word))
        width = _width(axis, renderer, word)
        color = [channel / 255 for channel in text_color(weight, limit, signed=signed)]
        axis.add_patch(rectangle((left, line - 0.33), width, 0.66, color=color, linewidth=0))
        axis.text(left, line, word, fontsize=SIZE, color=INK, va="center_baseline")
        left += width


def _width(axis: Any, renderer: Any, text: str) -> float:
    """In the units of the axis, which are inches."""
    drawn = axis.text(0, 0, text, fontsize=SIZE)
    width = float(drawn.get_window_extent(renderer).width) / axis.figure.dpi
    drawn.remove()
    return width


def _figure(width: float, height: float) -> Any:
    figure = optional_import("matplotlib.figure", "demo").Figure(figsize=(width, height), dpi=DPI)
    optional_import("matplotlib.backends.backend_agg", "demo").FigureCanvasAgg(figure)
    return figure


def _rendered(figure: Any) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return np.asarray(optional_import("PIL.Image", "demo").open(buffer).convert("RGB"))
