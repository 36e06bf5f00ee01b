"""Relevance of words as coloured text: HTML without scripts, readable without colour by its titles."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["color_legend", "colored_text", "readable_tokens", "text_color"]

# Ends of the scale; white is zero. Dark ink on them keeps a contrast of at least 4.5 to 1 (WCAG AA).
FOR, AGAINST, MORE = (236, 112, 99), (101, 158, 230), (245, 166, 60)
# No space in the text before a word that begins with one of these, and none after an apostrophe.
APOSTROPHES = ("'", "\u2019")
CLOSING = (*".,;:!?)]}%”", *APOSTROPHES)


def colored_text(
    tokens: Sequence[str],
    weights: Tensor | np.ndarray | Sequence[float],
    *,
    signed: bool = True,
    limit: float | None = None,
    legend: bool = True,
) -> str:
    """Tokens on a ground coloured by their weights, each with its weight as a title.

    Parameters
    ----------
    tokens : sequence of N str
        Shown one after the other as they are, so with their spaces (see `readable_tokens`); escaped.
    weights : N finite numbers
    signed : bool
        Red is for, blue against, white zero. Otherwise weights are at least 0, and orange is more.
    limit : float, optional
        Weight of the full colour, larger ones look the same. Default: the largest absolute weight.
    legend : bool
        Add the scale.

    Returns
    -------
    str
        HTML, one ``<span>`` around all.

    Raises
    ------
    ValueError
        Lengths that differ; weights that are not finite, or negative though not signed; a negative limit.

    Examples
    --------
    >>> colored_text(["a", " b"], [0.0, 0.5], signed=False, legend=False)
    '<span class="colored-text"><span title="a: 0" ...>a</span> <span title="b: 0.5" ...>b</span></span>'
    """
    values = _values(weights)
    if len(tokens) != len(values):
        raise ValueError(f"weights: expected {len(tokens)}, one for each token, got {len(values)}")
    if not signed and min(values, default=0.0) < 0:
        raise ValueError(f"weights: expected at least 0 where signed is False, got {min(values):g}")
    limit = _checked_limit(limit, values)
    spans = [_span(token, value, signed, limit) for token, value in zip(tokens, values, strict=True)]
    tail = " " + color_legend(limit, signed=signed) if legend else ""
    return f'<span class="colored-text">{"".join(spans)}{tail}</span>'


def color_legend(limit: float, *, signed: bool = True) -> str:
    """The scale of `colored_text`: a bar with its end values.

    Parameters
    ----------
    limit : float
        Weight of the full colour.
    signed : bool

    Examples
    --------
    >>> "against &minus;2" in color_legend(2.0) and "for +2" in color_legend(2.0)
    True
    """
    stops = (AGAINST, (255, 255, 255), FOR) if signed else ((255, 255, 255), MORE)
    colors = ", ".join(map(_css, stops))
    bar = (
        f'<span style="display:inline-block;width:4em;height:.7em;margin:0 .4em;border-radius:2px;'
        f'outline:1px solid #dfe4ea;background:linear-gradient(to right, {colors})"></span>'
    )
    low, high = (f"against &minus;{limit:.2g}", f"for +{limit:.2g}") if signed else ("0", f"{limit:.2g}")
    return f'<span class="color-legend" style="white-space:nowrap;font-size:.78rem;color:#5a6675">{low}{bar}{high}</span>'


def text_color(weight: float, limit: float, *, signed: bool = True) -> tuple[int, int, int]:
    """Ground that `colored_text` gives to a weight, for text that is drawn elsewhere: red, green and blue from 0 to 255.

    Parameters
    ----------
    weight : float
    limit : float
        Weight of the full colour.
    signed : bool

    Examples
    --------
    >>> text_color(0.0, 1.0), text_color(-2.0, 1.0)
    ((255, 255, 255), (101, 158, 230))
    """
    share = 0.0 if limit == 0 else max(-1.0, min(1.0, weight / limit))
    end = MORE if not signed else FOR if share > 0 else AGAINST
    red, green, blue = (round(255 + (channel - 255) * abs(share)) for channel in end)
    return red, green, blue


def readable_tokens(tokens: Sequence[str]) -> list[str]:
    """Tokens of a tokenizer as pieces of a text that can be read when joined.

    Knows WordPiece ("##ing" continues a word, every other token begins one), SentencePiece ("▁" is a space) and byte-level
    tokens of Latin text ("Ġ" is a space). Line breaks are shown as "⏎".

    Parameters
    ----------
    tokens : sequence of str

    Examples
    --------
    >>> readable_tokens(["[CLS]", "lost", "lug", "##gage", "?"])
    ['[CLS]', ' lost', ' lug', 'gage', '?']
    >>> readable_tokens(["The", "▁C", "at"])
    ['The', ' C', 'at']
    """
    if any(token.startswith(("▁", "Ġ")) for token in tokens):
        return [token.replace("▁", " ").replace("Ġ", " ").replace("\n", "⏎") for token in tokens]
    pieces: list[str] = []
    for index, token in enumerate(tokens):
        glued = index == 0 or token.startswith(("##", *CLOSING)) or tokens[index - 1] in APOSTROPHES
        pieces.append(("" if glued else " ") + token.removeprefix("##").replace("\n", "⏎"))
    return pieces


def _span(token: str, value: float, signed: bool, limit: float) -> str:
    color = text_color(value, limit, signed=signed)
    shown = f"{value:+.3g}" if signed and value else f"{value:.3g}"
    title = html.escape(f"{token.strip()}: {shown}")
    # A space before a word stays outside: coloured, it would hang over the end of a line.
    word = token.lstrip(" ") or token
    space = " " * (len(token) - len(word))
    return f'{space}<span title="{title}" style="background:{_css(color)}">{html.escape(word)}</span>'


def _values(weights: Tensor | np.ndarray | Sequence[float]) -> list[float]:
    values = torch.as_tensor(weights).detach().double().cpu()
    if values.ndim != 1:
        raise ValueError(f"weights: expected one dimension, got shape {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError("weights: expected finite values, got NaN or inf")
    return [float(value) for value in values]


def _checked_limit(limit: float | None, values: Sequence[float]) -> float:
    if limit is None:
        return max(map(abs, values), default=0.0)
    if not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"limit: expected a finite number of at least 0, got {limit}")
    return float(limit)


def _css(color: tuple[int, ...]) -> str:
    return f"rgb({','.join(map(str, color))})"
