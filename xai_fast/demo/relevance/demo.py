"""The relevance demo: two objects in a picture, two intents of a sentence, two next words, on one HTML page."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xai_fast._optional import optional_import

from ..models.dinov2 import load_dinov2
from ..models.intents import load_intents
from ..models.tiny_llama import load_tiny_llama
from ..rollout.setups import quiet_transformers
from ..wheels import WeightsUnavailable, or_reason
from .page import Texts, TwoObjects, build_relevance_page, mean_shares, save_relevance_picture
from .text_maps import text_maps
from .two_objects import CLASSES, explain_scene, fit_classifier, make_scene

__all__ = ["write_relevance_page"]

SIDE = 224
# Single crops per class and rounds of pairs that the head is fitted on.
CROPS, FEWEST_CROPS = (16, 3), (8, 1)
SENTENCES = (
    "Book a table for two in Paris and a flight to get there",
    "I lost my credit card and need a new one",
    "How much money is in my account and when is the bill due?",
)
PROMPTS = ("Alice looked at the Queen, and the Queen looked at the King. “Very well,” said the",)


def write_relevance_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Explain, write the page beside ``options.out`` as relevance.html, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``smallest``, ``model`` and ``relevance_picture``.
    device : torch.device
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    pairs = list(itertools.combinations(CLASSES, 2))
    # Disjoint pairs first: those are shown as pictures.
    pairs.sort(key=lambda pair: pair not in (CLASSES[:2], CLASSES[2:]))
    pairs = pairs[:1] if options.smallest else pairs
    sentences, prompts = (SENTENCES[:1], PROMPTS[:1]) if options.smallest else (SENTENCES, PROMPTS)
    crops = FEWEST_CROPS if options.smallest else CROPS
    tqdm = optional_import("tqdm", "demo").tqdm
    steps = 1 + len(CLASSES) + crops[1] + len(pairs) + 1 + len(sentences) + 1 + len(prompts)
    with tqdm(total=steps, unit="step") as bar, quiet_transformers():
        two = or_reason(lambda: _two_objects(options.model, pairs, crops, device, bar), "two objects")
        found = or_reason(lambda: _sentences(sentences, device, bar), "sentences")
        continued = or_reason(lambda: _prompts(prompts, device, bar), "next words")
        bar.set_description("done")
    page = build_relevance_page(two, found, continued, links).write(Path(options.out).with_name("relevance.html"))
    if options.relevance_picture:
        if isinstance(two, str):
            raise WeightsUnavailable(f"relevance picture: left out, {two}")
        save_relevance_picture(two, options.relevance_picture)
    if isinstance(two, TwoObjects):
        _print_shares(two)
    return page


def _two_objects(
    model_name: str, pairs: Sequence[tuple[str, str]], crops: tuple[int, int], device: torch.device, bar: Any
) -> TwoObjects:
    if model_name == "digits":
        raise WeightsUnavailable("it needs DINOv2, and --model digits was asked for")
    bar.set_description("loading DINOv2")
    backbone = load_dinov2("sdpa").to(device)  # type: ignore[arg-type]
    bar.update()
    bar.set_description("fitting the head")
    model, accuracy = fit_classifier(backbone, SIDE, singles=crops[0], rounds=crops[1], device=device, tick=bar.update)
    scenes = []
    for left, right in pairs:
        bar.set_description(f"explaining {left} and {right}")
        scene = make_scene(left, right, SIDE)
        scenes.append((scene, explain_scene(model, scene)))
        bar.update()
    return TwoObjects(scenes, accuracy, *crops)


def _sentences(sentences: Sequence[str], device: torch.device, bar: Any) -> list[Texts]:
    bar.set_description("loading MiniLM")
    intents = load_intents()
    model = intents.model.to(device)
    bar.update()
    found = []
    for sentence in sentences:
        bar.set_description("explaining sentences")
        ids = intents.tokenizer(sentence, return_tensors="pt").input_ids
        tokens = intents.tokenizer.convert_ids_to_tokens(ids[0])
        found.append(_explained(sentence, tokens, model, ids.to(device), intents.names, token=None))
        bar.update()
    return found


def _prompts(prompts: Sequence[str], device: torch.device, bar: Any) -> list[Texts]:
    bar.set_description("loading the tiny Llama")
    llama = load_tiny_llama()
    model = llama.model.to(device)
    names = [f"“{token.replace('▁', '')}”" for token in llama.tokenizer.vocab]
    bar.update()
    found = []
    for prompt in prompts:
        bar.set_description("explaining the next word")
        ids = llama.tokenizer.encode(prompt)
        tokens = llama.tokenizer.tokens(ids)
        found.append(_explained(f"{prompt} …", tokens, model, torch.tensor([ids], device=device), names, token=-1))
        bar.update()
    return found


def _explained(
    title: str, tokens: list[str], model: torch.nn.Module, ids: torch.Tensor, names: Sequence[str], token: int | None
) -> Texts:
    """The maps for the two most likely classes."""
    with torch.no_grad():
        probabilities, top = model(ids)[0].softmax(-1).topk(2)
    targets = [(names[index], float(p)) for index, p in zip(top.tolist(), probabilities.tolist(), strict=True)]
    weights = text_maps(model, ids, top.tolist(), token)
    return Texts(title, tokens, targets, {name: [w.cpu() for w in cells] for name, cells in weights.items()})


def _print_shares(two: TwoObjects) -> None:
    table = optional_import("rich.table", "demo").Table(title="positive relevance on the half of the class")
    for column in ("picture", "class", *mean_shares(two)):
        table.add_column(column)
    for scene, found in two.scenes:
        for item in found:
            shares = (f"{share:.1%}" for share in item.shares().values())
            table.add_row(f"{scene.left} | {scene.right}", item.name, *shares)
    table.add_row("mean", "", *(f"{share:.1%}" for share in mean_shares(two).values()))
    optional_import("rich.console", "demo").Console().print(table)
