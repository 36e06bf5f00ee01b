"""The measures demo: what the measures say about explanations of photos and of sentences, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xai_fast._optional import optional_import

from ..models.dinov2 import load_dinov2
from ..models.intents import load_intents
from ..rollout.setups import quiet_transformers
from ..wheels import WeightsUnavailable, or_reason
from .figures import save_measures_picture
from .measuring import METHODS, TICKS, Effort, Judged
from .page import build_measures_page, shown_scenes
from .photos import JudgedPhotos, judge_photos
from .texts import SENTENCES, JudgedTexts, judge_texts

__all__ = ["write_measures_page"]

# Kinds of pictures that the head of the photos is fitted on.
KINDS = 4


class _Size:
    """How much is done: all, or as little as shows that it runs."""

    def __init__(self, smallest: bool) -> None:
        self.photos = Effort((0.5, 0.8), 4, 8, 1) if smallest else Effort((0.5, 0.7, 0.8, 0.9), 7, 16, 2)
        self.texts = Effort((0.5, 0.8), 5, 10, 2) if smallest else Effort((0.3, 0.5, 0.7, 0.8), 10, 30, 5, batch=64)
        self.training = 1 if smallest else 3
        self.scenes, self.sentences = (2, 4) if smallest else (12, len(SENTENCES))

    @property
    def steps(self) -> int:
        return 1 + KINDS + TICKS * len(METHODS) + 1 + self.sentences


def write_measures_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Measure, write the page beside ``options.out`` as measures.html, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``smallest``, ``model`` and ``measures_picture``.
    device : torch.device
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    size = _Size(options.smallest)
    tqdm = optional_import("tqdm", "demo").tqdm
    with tqdm(total=size.steps, unit="step") as bar, quiet_transformers():
        photos = or_reason(lambda: _photos(options.model, size, device, bar), "photos")
        texts = or_reason(lambda: _texts(size, device, bar), "sentences")
        bar.set_description("done")
    page = build_measures_page(photos, texts, links).write(Path(options.out).with_name("measures.html"))
    if options.measures_picture:
        if isinstance(photos, str):
            raise WeightsUnavailable(f"measures picture: left out, {photos}")
        save_measures_picture(photos, shown_scenes(photos), options.measures_picture)
    _print_summary(photos, texts)
    return page


def _photos(model_name: str, size: _Size, device: torch.device, bar: Any) -> JudgedPhotos:
    if model_name == "digits":
        raise WeightsUnavailable("it needs DINOv2, and --model digits was asked for")
    bar.set_description("loading DINOv2")
    backbone = load_dinov2("sdpa").to(device)  # type: ignore[arg-type]
    bar.update()
    bar.set_description("measuring photos")
    return judge_photos(
        backbone, size.photos, training=size.training, rounds=1, most=size.scenes, device=device, tick=bar.update
    )


def _texts(size: _Size, device: torch.device, bar: Any) -> JudgedTexts:
    bar.set_description("loading MiniLM")
    intents = load_intents()
    bar.update()
    bar.set_description("measuring sentences")
    return judge_texts(intents, size.texts, most=size.sentences, device=device, tick=bar.update)


def _print_summary(photos: JudgedPhotos | str, texts: JudgedTexts | str) -> None:
    table = optional_import("rich.table", "demo").Table("measure", *METHODS, title="means; all of them are on the page")
    for name, part in (("photos", photos), ("sentences", texts)):
        if isinstance(part, str):
            continue
        judged: Judged = part.judged
        for measure in ("characterization_model_probability", "deletion_area", "insertion_area"):
            means = judged.means(measure)
            label = f"{name}: {measure.removesuffix('_model_probability').replace('_', ' ')}"
            table.add_row(label, *(f"{means[method]:.3f}" for method in METHODS))
    if table.row_count:
        optional_import("rich.console", "demo").Console().print(table)
