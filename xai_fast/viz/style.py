"""How all pictures of this package look. Colours of Okabe and Ito, never colour alone."""

from __future__ import annotations

import textwrap
from typing import Any

from xai_fast._optional import optional_import

__all__ = [
    "DASHES",
    "FAINT",
    "INK",
    "LARGE",
    "LEGEND",
    "MARKERS",
    "MUTED",
    "NORMAL",
    "PALETTE",
    "RULE",
    "SMALL",
    "new_figure",
    "plain_axis",
    "style_of",
    "wrapped",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B3A8C", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
INK, MUTED, RULE, FAINT = "#222222", "#6b7280", "#c4c8ce", "#d9dce1"
SMALL, NORMAL, LARGE = 8.5, 9.5, 11
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": NORMAL, "labelcolor": INK, "handlelength": 2.4}


def new_figure(size: tuple[float, float], layout: str = "constrained") -> Any:
    return optional_import("matplotlib.figure", "demo").Figure(figsize=size, layout=layout)


def style_of(number: int) -> dict[str, Any]:
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        # The second time round the colours, the dashes tell them apart.
        "linestyle": DASHES[number // len(PALETTE) % len(DASHES)],
    }


def wrapped(text: str, width: int) -> str:
    """Lines of about equal length, none longer than `width` where words allow."""
    rows = -(-len(text) // width)
    return "\n".join(textwrap.wrap(text, max(-(-len(text) // rows) + 4, 8))) if rows > 1 else text


def plain_axis(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=LARGE, loc="left", color=INK)
    axis.set_xlabel(x, fontsize=NORMAL, color=INK)
    axis.set_ylabel(y, fontsize=NORMAL, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(labelsize=SMALL, color=MUTED, labelcolor=MUTED)
