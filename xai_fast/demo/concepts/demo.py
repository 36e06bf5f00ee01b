"""The concepts demo: TCAV on a real image classifier, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xai_fast._optional import optional_import

from ..models.efficientnet import CLASS_NAMES, load_efficientnet
from ..wheels import WeightsUnavailable, or_reason
from .figures import block_name, save_concepts_picture
from .page import build_concepts_page
from .tested import STRIPED, Effort, Studied, passes, run_tests

__all__ = ["write_concepts_page"]

SMALLEST = Effort(
    classes=(340, 967),
    layers=("_blocks.7", "_blocks.10"),
    flat_layers=("_blocks.10",),
    inputs=6,
    examples=8,
    sets=5,
    flat_sets=3,
    gathered=8,
)


def write_concepts_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Test the concepts, write the page beside ``options.out`` as concepts.html, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``smallest`` and ``concepts_picture``.
    device : torch.device
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    effort = SMALLEST if options.smallest else Effort()
    tqdm = optional_import("tqdm", "demo").tqdm
    with tqdm(total=1 + passes(effort), unit="pass") as bar:
        tested = or_reason(lambda: _tested(effort, device, bar), "concepts")
        bar.set_description("done")
        bar.total = bar.n
    page = build_concepts_page(tested, links).write(Path(options.out).with_name("concepts.html"))
    if options.concepts_picture:
        if isinstance(tested, str):
            raise WeightsUnavailable(f"concepts picture: left out, {tested}")
        save_concepts_picture(tested, options.concepts_picture)
    _print_summary(tested)
    return page


def _tested(effort: Effort, device: torch.device, bar: Any) -> Studied:
    bar.set_description("loading EfficientNet")
    model = load_efficientnet().to(device)
    bar.update()
    bar.set_description("testing concepts")
    return run_tests(model, effort, device, tick=bar.update)


def _print_summary(tested: Studied | str) -> None:
    if isinstance(tested, str):
        return
    result = tested.result
    layers = map(block_name, result.layers)
    title = f"TCAV scores of {STRIPED}; * differs from random sets, not corrected"
    table = optional_import("rich.table", "demo").Table("class", *layers, title=title)
    for target in tested.inputs:
        one = result.of(target)
        cells = (f"{one.score[layer][STRIPED]:.2f}{'*' if one.significant[layer][STRIPED] else ' '}" for layer in one.layers)
        table.add_row(CLASS_NAMES[target], *cells)
    optional_import("rich.console", "demo").Console().print(table)
