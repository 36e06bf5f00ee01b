"""The demo of attention in recurrent networks: reviews, dates and the cost of additive attention, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xai_fast._optional import optional_import

from ..rollout.page import show_size, show_time
from ..wheels import WeightsUnavailable, or_reason
from .additive_costs import AT_ONCE_TRAINING, TILED_TRAINING, AdditiveCosts, cost_additive
from .figures import save_recurrent_picture
from .page import JudgedReviews, build_recurrent_page
from .review_checks import METHODS, agreements, bag_of_words, lexicon_verdicts, mean_error, named_words
from .reviews import explain_reviews, load_lexicon, load_reviews
from .spelled_dates import Dates, explain_dates

__all__ = ["judge_reviews", "write_recurrent_page"]


class _Size:
    """How much is done: all, or as little as shows that it runs."""

    def __init__(self, smallest: bool) -> None:
        self.every = 3 if smallest else 1
        small = {"tests": 300, "epochs": 3, "dim": 32, "hidden": 32, "shown": 2, "compared": 40}
        self.reading: dict[str, int] = small if smallest else {"epochs": 4}
        dates = {"count": 900, "tests": 100, "epochs": 4, "dim": 16, "hidden": 32}
        self.dates: dict[str, int] = dates if smallest else {"epochs": 5}
        self.repeats, self.keys = (1, 128) if smallest else (3, 512)

    @property
    def steps(self) -> int:
        return 1 + self.reading["epochs"] + 1 + self.dates["epochs"] + 4 * (self.repeats + 2)


def write_recurrent_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Train, explain and check, write the page beside ``options.out`` as recurrent.html, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``smallest`` and ``recurrent_picture``.
    device : torch.device
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    size = _Size(options.smallest)
    tqdm = optional_import("tqdm", "demo").tqdm
    with tqdm(total=size.steps, unit="step") as bar:
        judged = or_reason(lambda: judge_reviews(size.every, device, bar, **size.reading), "reviews")
        bar.set_description("learning dates")
        dates = explain_dates(device=device, tick=bar.update, **size.dates)
        bar.set_description("measuring additive attention")
        costs = cost_additive(device, size.repeats, keys=size.keys, tick=bar.update)
        bar.set_description("done")
    page = build_recurrent_page(judged, dates, costs, links).write(Path(options.out).with_name("recurrent.html"))
    if options.recurrent_picture:
        if isinstance(judged, str):
            raise WeightsUnavailable(f"recurrent picture: left out, {judged}")
        save_recurrent_picture(judged.reviews.examples, dates.alignments[0], options.recurrent_picture)
    _print_summary(judged, dates, costs)
    return page


def judge_reviews(every: int, device: torch.device, bar: Any, **options: int) -> JudgedReviews:
    """Train and explain the classifier of reviews, and check it.

    Parameters
    ----------
    every : int
        1: all sentences are used; 2: every second; and so on. They come sorted by class.
    device : torch.device
    bar : tqdm
        Of the reading epochs and two steps more.
    **options : int
        Of `explain_reviews`.

    Raises
    ------
    DataUnavailable
        If the reviews cannot be had.
    """
    bar.set_description("loading reviews")
    data, lexicon = load_reviews()[::every], load_lexicon()
    bar.update()
    bar.set_description("learning reviews")
    reviews = explain_reviews(data, device=device, tick=bar.update, **options)
    bar.set_description("checking attention")
    commoner = int(2 * sum(review.label for review in reviews.train) >= len(reviews.train))
    found = JudgedReviews(
        reviews,
        bag_of_words(reviews.train, reviews.held),
        lexicon_verdicts(reviews.held, lexicon, commoner),
        agreements(reviews.compared),
        named_words(reviews.compared, lexicon),
    )
    bar.update()
    return found


def _print_summary(judged: JudgedReviews | str, dates: Dates, costs: AdditiveCosts) -> None:
    table = optional_import("rich.table", "demo").Table("recurrent networks", "figure", "value")
    if not isinstance(judged, str):
        table.add_row("reviews", "held-out sentences judged right", f"{judged.reviews.accuracy:.1%}")
        for method in METHODS:
            rank, error = mean_error(judged.agreements[method].rank)
            table.add_row(method, "rank correlation with leaving words out", f"{rank:+.2f} ± {error:.2f}")
    share = dates.shares["all"]
    table.add_row("dates", "attention on the right part, uniform", f"{share.plain:.0%}, {share.uniform:.0%}")
    for name in (TILED_TRAINING, AT_ONCE_TRAINING):
        cost = costs.measured[name]
        table.add_row("additive attention", name, f"{show_time(cost)}, {show_size(cost.peak_bytes)}")
    optional_import("rich.console", "demo").Console().print(table)
