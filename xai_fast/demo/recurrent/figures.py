"""The figures of the page of recurrent networks, and its main ones as one picture."""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Word:
    """A token of a wrapped text: its line from 0, and where it begins and how wide it is, in inches."""

    text: str
    line: int
    left: float
    width: float


def _sentences_figure(sentences: Sequence[Sentence]) -> Any:
    """For each sentence the verdict, and the text in both colourings."""
    room = min(COLUMNS[2] - COLUMNS[1], WIDTH - COLUMNS[2]) - COLUMNS[0]
    texts = [_wrapped(sentence.tokens, room) for sentence in sentences]
    tops = [0, *itertools.accumulate(text[-1].line + 1 for text in texts)]
    figure = _figure(WIDTH, LINE * (tops[-1] + 1.4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for left, name in zip(COLUMNS, ("Verdict", PLAIN, SIGNED), strict=True):
        axis.text(left, 0.5, name, fontsize=10.5, color=MUTED, va="center_baseline")
    axis.set(xlim=(0, WIDTH), ylim=(tops[-1] + 1.1, -0.3))
    for sentence, text, top in zip(sentences, texts, tops, strict=False):
        sure = sentence.probability if sentence.target else 1 - sentence.probability
        verdict = f"{'praise' if sentence.target else 'blame'}, {sure:.0%}"
        axis.text(COLUMNS[0], top + 1.5, verdict, fontsize=SIZE, weight="bold", color=INK, va="center_baseline")
        for left, weights, signed in zip(COLUMNS[1:], (sentence.attention, sentence.signed), (False, True), strict=True):
            _draw_text(axis, left, top + 1.5, text, weights, signed)
    return figure


def _wrapped(tokens: Sequence[str], room: float) -> list[_Word]:
    """Tokens one after the other, on as many lines as they take."""
    axis = _figure(1, 1).add_axes((0, 0, 1, 1))
    measure = functools.cache(lambda text: _width(axis, text))
    space = measure("a a") - measure("aa")
    words: list[_Word] = []
    line, left = 0, 0.0
    for piece in readable_tokens(tokens):
        word = piece.lstrip(" ")
        width, gap = measure(word), space * (len(piece) - len(word))
        if gap and left + gap + width > room:
            line, left, gap = line + 1, 0.0, 0.0
        words.append(_Word(word, line, left + gap, width))
        left += gap + width
    return words


def _draw_text(axis: Any, left: float, line: float, text: Sequence[_Word], weights: Tensor, signed: bool) -> None:
    """Each word on its ground."""
    rectangle = optional_import("matplotlib.patches", "demo").Rectangle
    limit = float(weights.abs().max())
    for word, weight in zip(text, weights.tolist(), strict=True):
        x, y = left + word.left, line + word.line
        color = [channel / 255 for channel in text_color(weight, limit, signed=signed)]
        axis.add_patch(rectangle((x, y - 0.33), word.width, 0.66, color=color, linewidth=0))
        axis.text(x, y, word.text, fontsize=SIZE, color=INK, va="center_baseline")


def _width(axis: Any, text: str) -> float:
    """In inches."""
    drawn = axis.text(0, 0, text, fontsize=SIZE)
    width = float(drawn.get_window_extent(axis.figure.canvas.get_renderer()).width) / axis.figure.dpi
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
