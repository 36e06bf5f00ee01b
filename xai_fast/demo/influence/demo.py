"""The influence demo: two models of the same pictures, wrong labels, and a spam filter's decision, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xai_fast._optional import optional_import

from ..datasets import load_fashion_mnist, load_mails
from ..models.dinov2 import load_dinov2
from ..models.intents import load_minilm
from ..rollout.setups import quiet_transformers
from ..wheels import WeightsUnavailable, or_reason
from .figures import save_influence_picture
from .mislabelled import LOSS, SELF, Mislabelled, Setting, find_mislabelled
from .page import build_influence_page
from .spam import Spam, embed, explain_spam
from .two_models import WIDTHS, TwoModels, compare_models, dino_features

__all__ = ["write_influence_page"]

BATCH = 32


class _Size:
    """How much is done: all, or as little as shows that it runs."""

    def __init__(self, smallest: bool) -> None:
        self.count, self.tests, self.show = (60, 20, 1) if smallest else (600, 200, 2)
        self.widths = not smallest
        self.settings = [Setting(1500, 1e-4)] if smallest else [Setting(6000, 1e-3), Setting(1500, 1e-4)]
        self.mails, self.test_mails, self.alone = (90, 30, 6) if smallest else (800, 160, 30)

    @property
    def steps(self) -> tuple[int, int, int]:
        """Ticks of the three parts."""
        batches = sum(-(-2 * images // BATCH) for images in (self.count, self.tests))
        machines = len(WIDTHS) if self.widths else 2
        return 1 + batches + machines + 1, 1 + len(self.settings), 1 + -(-self.mails // BATCH) + self.alone + 3


def write_influence_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Compute, write the page beside ``options.out`` as influence.html, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``smallest``, ``model`` and ``influence_picture``.
    device : torch.device
        Of the deep networks.
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    size = _Size(options.smallest)
    tqdm = optional_import("tqdm", "demo").tqdm
    with tqdm(total=sum(size.steps), unit="step") as bar, quiet_transformers():
        two = or_reason(lambda: _two_models(options.model, size, device, bar), "two models")
        found = or_reason(lambda: _mislabelled(size, bar), "mislabelled rows")
        spam = or_reason(lambda: _spam(size, device, bar), "spam")
        bar.set_description("done")
    page = build_influence_page(two, found, spam, links).write(Path(options.out).with_name("influence.html"))
    if options.influence_picture:
        if isinstance(two, str) or isinstance(found, str) or isinstance(spam, str):
            missing = next(part for part in (two, found, spam) if isinstance(part, str))
            raise WeightsUnavailable(f"influence picture: left out, {missing}")
        save_influence_picture(two, found, spam, options.influence_picture)
    _print_summary(two, found, spam)
    return page


def _two_models(model_name: str, size: _Size, device: torch.device, bar: Any) -> TwoModels:
    if model_name == "digits":
        raise WeightsUnavailable("it needs DINOv2, and --model digits was asked for")
    bar.set_description("loading Fashion-MNIST and DINOv2")
    data = load_fashion_mnist()
    backbone = load_dinov2("sdpa").to(device)  # type: ignore[arg-type]
    bar.update()
    bar.set_description("two models, the same pictures")
    return compare_models(
        data,
        lambda images, tick: dino_features(backbone, images, batch=BATCH, tick=tick),
        count=size.count,
        tests=size.tests,
        show=size.show,
        widths=size.widths,
        tick=bar.update,
    )


def _mislabelled(size: _Size, bar: Any) -> list[Mislabelled]:
    bar.set_description("mislabelled rows")
    data = load_fashion_mnist()
    bar.update()
    return find_mislabelled(data, size.settings, tick=bar.update)


def _spam(size: _Size, device: torch.device, bar: Any) -> Spam:
    bar.set_description("loading mails and MiniLM")
    mails = load_mails(size.mails)
    backbone, tokenizer = load_minilm()
    bar.update()
    bar.set_description("embedding mails")
    texts = [f"{mail.subject}. {mail.body}" for mail in mails]
    features = embed(backbone.to(device), tokenizer, texts, batch=BATCH, tick=bar.update)
    bar.set_description("retraining without some mails")
    return explain_spam(mails, features, tests=size.test_mails, alone=size.alone, tick=bar.update)


def _print_summary(two: TwoModels | str, found: Sequence[Mislabelled] | str, spam: Spam | str) -> None:
    table = optional_import("rich.table", "demo").Table("influence", "figure", "value")
    if not isinstance(two, str):
        for model in two.models:
            table.add_row(model.name, "rank correlation of |influence| and pixel distance", f"{model.correlation:+.2f}")
    if not isinstance(found, str):
        for item in found:
            shares = ", ".join(f"{name} {item.found(name, 0.1):.1%}" for name in (SELF, LOSS))
            table.add_row(f"{len(item.flipped):,} rows", "wrong labels found in the first tenth", shares)
    if not isinstance(spam, str):
        table.add_row("spam", "predicted against retrained leave-one-out", f"r = {spam.correlation:.4f}")
    if table.row_count:
        optional_import("rich.console", "demo").Console().print(table)
