"""The demo's HTML page, and its maps as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from xai_fast.viz import Report, overlay, plot_heatmaps

from ..measure import Measured
from ..pages import add_text, add_versions, new_page
from .costs import EAGER, EAGER_WHOLE, Costs
from .maps import ASIDE, DISCARDED, MAX, ROLLOUT, Explained
from .setups import Setup
from .sinks import OUTLIER_SCORE, SINK_FACTOR

__all__ = ["build_page", "save_picture", "show_size", "show_time"]

BLACK, CYAN = (0, 0, 0), (0, 229, 255)


# Each paragraph is one line of text on the page; the reader's window breaks it.
WHAT_YOU_SEE = (
    "A vision transformer cuts the picture into patches and adds one token, CLS, that comes to stand for "
    "the whole. In each block every token becomes a weighted mix of all tokens; the weights are the "
    "attention. Raw attention shows what CLS looks at in the last block only, when every token is already a "
    "mix of many patches. Attention rollout follows the mixing back to the input: in each block it averages "
    "the heads, adds the skip connection as an identity matrix and normalises the rows; then it multiplies "
    "the blocks. The row of CLS in that product is the map.",
    "Bright means more; each map has its own colour scale over the greyed picture. Where the rollout is one "
    "bright dot on black, a single patch has taken it over: a sink. It is framed in the picture and named "
    "above the maps (rows and columns count from 1 at the top left), and the last maps show what remains "
    "without it.",
)

WHAT_A_SINK_IS = (
    f"A patch is called a sink here when it holds more than {SINK_FACTOR:.0f} times the uniform share of the "
    f"rollout and, in some block, receives more than {SINK_FACTOR:.0f} times the uniform attention averaged "
    "over all tokens: every token looks at it, whatever it shows. Rollout multiplies all blocks, so one "
    "such block is enough to outshine the rest. Two remedies are shown: setting the sink patches aside, and "
    "starting the rollout after the last block in which the strongest one is a sink.",
    "A token's norm is called a high-norm outlier when it exceeds the median over patches by more than "
    f"{OUTLIER_SCORE} robust standard deviations (1.4826 times the median absolute deviation). Large DINOv2 "
    "models are known for sinks of high norm in late blocks; the sinks of a small one need not have that.",
    "A rollout shows where information can flow, not why the model decides as it does.",
)

HOW_MEASURED = (
    "Times are medians of repeats that alternate between the rows of a table. Memory is the most that was "
    "held beyond what was held just before the call: the allocator's peak on CUDA; on Linux the high-water "
    "mark of the process's resident memory, which also counts buffers that libraries allocate beside torch. "
    "Weights and input are not counted."
)


def build_page(
    setup: Setup,
    explained: list[Explained],
    alone: Costs,
    whole: dict[str, Measured],
    device: torch.device,
    links: Sequence[tuple[str, str]] = (),
) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    setup : Setup
    explained : list of Explained
        One section each.
    alone, whole
        From `cost_alone` and `cost_whole`.
    device : torch.device
        Where it ran.
    links : sequence of (str, str)
        See `Report`.
    """
    report = new_page(
        f"Attention rollout of {setup.title}",
        "How much does each patch of the picture reach the token that sums it up, through all blocks?",
        links,
    )
    report.section("What you see")
    if setup.warning:
        report.note(setup.warning)
    for paragraph in (setup.about, *WHAT_YOU_SEE):
        report.paragraph(paragraph)
    for item in explained:
        report.section(item.subject.name.capitalize()).paragraph(item.note)
        # With a sink there are eight pictures, two rows of four; without it five, one row.
        report.figures(_figures(item), cell=200 if item.sink is None else 260, format="jpeg")
    add_text(report, "What a sink is", WHAT_A_SINK_IS)
    _add_costs(report, alone, whole, device)
    add_versions(report)
    return report


def _figures(item: Explained) -> list[tuple[np.ndarray, str, str]]:
    picture = item.subject.picture
    caption = "What the model gets."
    if item.sink is not None:
        caption = f"The sink patch is framed: row {item.sink.row + 1}, column {item.sink.column + 1}."
    figures = [(_framed(item), "Picture", caption)]
    for name, heat in item.maps.items():
        # A few large patches are clearer as they are; smoothing would blur one into its neighbours.
        mode = "nearest" if len(heat) <= 8 else "bicubic"
        figures.append((overlay(picture, heat, mode=mode), name, item.captions[name]))
    return figures


def _framed(item: Explained) -> np.ndarray:
    """The picture with a wide frame around the sink patch: cyan in black, to show on any ground."""
    picture = item.subject.picture.copy()
    if item.sink is None:
        return picture
    patch = len(picture) // item.maps[ROLLOUT].shape[0]
    row, column = item.sink.row * patch, item.sink.column * patch
    gap, line = patch // 2, max(2, len(picture) // 110)
    for outer, inner, color in ((gap + 2 * line, gap, BLACK), (gap + 1.5 * line, gap + 0.5 * line, CYAN)):
        frame = np.zeros(picture.shape[:2], dtype=bool)
        for margin, inside in ((int(outer), True), (int(inner), False)):
            rows = slice(max(0, row - margin), row + patch + margin)
            frame[rows, max(0, column - margin) : column + patch + margin] = inside
        picture[frame] = color
    return picture


def _add_costs(report: Report, alone: Costs, whole: dict[str, Measured], device: torch.device) -> None:
    report.section("Time and memory")
    report.paragraph(
        f"Measured on this machine ({device.type}) for one picture: {alone.size}. The eager chain is rollout "
        "as it is usually written: all attention matrices, head mean, identity, row normalisation, full N x "
        "N products. In the first table it is given the matrices; the streamed form is not, and rebuilds "
        "them tile by tile from queries and keys. Both give the same map: the largest relative difference "
        f"over all tokens is {alone.disagreement:.0e}."
    )
    eager, eager_whole = alone.measured[EAGER], whole[EAGER_WHOLE]
    report.table(
        ("The rollout alone", "time", "against eager", "input held", "extra at the peak"),
        [
            (name, show_time(cost), _ratio(cost, eager), show_size(held), show_size(cost.peak_bytes))
            for (name, cost), held in zip(alone.measured.items(), alone.held_bytes.values(), strict=True)
        ],
    )
    report.table(
        ("From pixels to the map", "time", "against eager", "memory at the peak"),
        [(name, show_time(cost), _ratio(cost, eager_whole), show_size(cost.peak_bytes)) for name, cost in whole.items()],
    )
    report.paragraph(HOW_MEASURED)


def show_time(cost: Measured) -> str:
    """Time for a table.

    Examples
    --------
    >>> show_time(Measured(0.0125, None))
    '12.5 ms'
    """
    return f"{1e3 * cost.seconds:.3g} ms" if cost.seconds < 1 else f"{cost.seconds:.2f} s"


def show_size(size: int | None) -> str:
    """Memory for a table.

    Examples
    --------
    >>> show_size(3 * 2**20)
    '3.0 MiB'
    """
    return "not measured" if size is None else f"{size / 2**20:.1f} MiB"


def _ratio(cost: Measured, eager: Measured) -> str:
    if cost is eager:
        return ""
    faster = eager.seconds / cost.seconds
    return f"{faster:.1f} x faster" if faster >= 1 else f"{1 / faster:.1f} x slower"


def save_picture(explained: list[Explained], path: str | os.PathLike[str]) -> None:
    """Save one row per picture: the picture and the maps that all have, without variants that look alike.

    Parameters
    ----------
    explained : list of Explained
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    shared = [name for name in explained[0].maps if all(name in item.maps for item in explained)]
    if ASIDE in shared:
        shared = [name for name in shared if name not in (MAX, DISCARDED, ASIDE)]
    figure = plot_heatmaps(
        [_framed(item) for item in explained],
        {name: [item.maps[name] for item in explained] for name in shared},
        image_title="Picture",
        backgrounds=[item.subject.picture for item in explained],
    )
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
