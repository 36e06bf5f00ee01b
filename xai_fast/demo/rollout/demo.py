"""The rollout demo: explain a few pictures, measure what it costs, and write one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from xai_fast._optional import optional_import

from ..measure import Measured
from ..models.dinov2 import WeightsUnavailable
from .costs import Costs, cost_alone, cost_whole
from .maps import Explained, explain
from .page import build_page, save_picture, show_size, show_time
from .setups import Setup, digits_setup, dinov2_setup

__all__ = ["write_rollout_page"]


def write_rollout_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Explain, measure, write the page to ``options.out``, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``picture``, ``model``, ``photos``, ``size``, ``repeats``, ``epochs`` and ``smallest``.
    device : torch.device
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    setup = _prepare(options, device)
    explained, alone, whole = _work(setup, device, options.repeats)
    page = build_page(setup, explained, alone, whole, device, links).write(options.out)
    if options.picture:
        save_picture(explained, options.picture)
    _print_summary(explained, alone, whole)
    return page


def _prepare(options: argparse.Namespace, device: torch.device) -> Setup:
    """The model that was asked for; in automatic choice the digits where DINOv2 cannot be had."""
    warning = ""
    if options.model != "digits":
        try:
            return dinov2_setup(options.photos, options.size, device)
        except (ImportError, WeightsUnavailable) as error:
            if options.model == "dinov2":
                raise
            warning = f"No DINOv2: {error}. Instead: a small vision transformer on handwritten digits."
            print(warning, file=sys.stderr)
    return digits_setup(options.epochs, 1 if options.smallest else 6, device, warning)


def _work(setup: Setup, device: torch.device, repeats: int) -> tuple[list[Explained], Costs, dict[str, Measured]]:
    """Everything that takes time, under one progress bar."""
    tqdm = optional_import("tqdm", "demo").tqdm
    calls_per_table = 3 * (repeats + 2)
    with tqdm(total=len(setup.subjects) + 2 * calls_per_table, unit="step") as bar:
        explained = []
        for subject in setup.subjects:
            bar.set_description(f"explaining {subject.name}")
            explained.append(explain(setup.model, subject, setup.grid))
            bar.update()
        bar.set_description("measuring the rollout")
        alone = cost_alone(setup, device, repeats, bar.update)
        bar.set_description("measuring pixels to map")
        whole = cost_whole(setup, device, repeats, bar.update)
        bar.set_description("done")
    return explained, alone, whole


def _print_summary(explained: list[Explained], alone: Costs, whole: dict[str, Measured]) -> None:
    table_class = optional_import("rich.table", "demo").Table
    console = optional_import("rich.console", "demo").Console()
    maps = table_class("picture", "sink patch (row, column)", "share of the rollout", "sink in block")
    for item in explained:
        sink = item.sink
        if sink is None:
            maps.add_row(item.subject.name, "none", "", "")
        else:
            share = f"{sink.share:.1%} = {sink.times_uniform:.0f} x uniform"
            maps.add_row(item.subject.name, f"{sink.row + 1}, {sink.column + 1}", share, sink.blocks)
    costs = table_class(alone.size, "time", "memory at the peak")
    for name, cost in (alone.measured | whole).items():
        costs.add_row(name, show_time(cost), show_size(cost.peak_bytes))
    console.print(maps)
    console.print(costs)
