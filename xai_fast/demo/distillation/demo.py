"""The distillation demo: black boxes as sums of shape functions, and what can be wrong with that, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xai_fast._optional import optional_import

from ..wheels import WeightsUnavailable, or_reason
from .diamonds import load_diamonds
from .figures import save_distillation_picture
from .issues import explosion, extrapolation, plane, refits, twin
from .issues_page import IssueResults, percent
from .page import Results, build_distillation_page
from .students import CUT, NETWORK, TICKS, TREES, Effort, distil, split_diamonds

__all__ = ["FULL", "SMALLEST", "write_distillation_page"]

FULL = Effort(rows=43_893, tests=10_000, epochs=15, trees=200, pairs=8, bins=(32, 10, 5), splits=3, budgets=(1, 2, 4, 8, 16))
SMALLEST = Effort(rows=6_000, tests=2_000, epochs=5, trees=40, pairs=3, bins=(16, 6, 4), splits=1, budgets=(1, 3))
# Whose students the issues are shown on.
PRICES = (NETWORK, TREES)


def write_distillation_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Train, distil, write the page beside ``options.out`` as distillation.html, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``smallest`` and ``distillation_picture``.
    device : torch.device
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    effort = SMALLEST if options.smallest else FULL
    steps = 1 + TICKS * 3 + len(PRICES) * (len(effort.budgets) + 2 * effort.splits)
    with optional_import("tqdm", "demo").tqdm(total=steps, unit="step") as bar:
        results = or_reason(lambda: _results(effort, device, bar), "diamonds")
        bar.set_description("done")
    page = build_distillation_page(results, links).write(Path(options.out).with_name("distillation.html"))
    if options.distillation_picture:
        if isinstance(results, str):
            raise WeightsUnavailable(f"distillation picture: left out, {results}")
        shown = results.distilled[NETWORK], results.distilled[TREES], results.issues.refits[TREES]
        save_distillation_picture(*shown, options.distillation_picture)
    if not isinstance(results, str):
        _print_summary(results)
    return page


def _results(effort: Effort, device: torch.device, bar: Any) -> Results:
    bar.set_description("loading diamonds")
    split = split_diamonds(load_diamonds(), effort, device)
    bar.update()
    distilled = {}
    for name in (NETWORK, TREES, CUT):
        bar.set_description(f"distilling {name.lower()}")
        distilled[name] = distil(name, split, effort, bar.update)
    bar.set_description("trying budgets")
    budgets = {name: explosion(distilled[name], effort, bar.update) for name in PRICES}
    bar.set_description("fitting again")
    again = {name: refits(distilled[name], effort, bar.update) for name in PRICES}
    exchanges = {name: extrapolation(distilled[name], split) for name in PRICES}
    issues = IssueResults(twin(distilled[NETWORK]), budgets, exchanges, plane(distilled[NETWORK]), again)
    return Results(split, effort, distilled, issues)


def _print_summary(results: Results) -> None:
    table = optional_import("rich.table", "demo").Table("teacher", "student", "R2", "not explained", title="fidelity")
    for name, distilled in results.distilled.items():
        for order in distilled.fidelity.by_order:
            table.add_row(name, order.name, f"{order.r2:.4f}", percent(1 - order.r2, 2))
    optional_import("rich.console", "demo").Console().print(table)
