"""What the numbers of the concepts page say, in sentences that turn with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from xai_fast.concepts import TCAV

from ..models.efficientnet import CLASS_NAMES
from .figures import block_name

__all__ = [
    "blocks_named",
    "ceiling",
    "early",
    "false_alarms",
    "late",
    "listed",
    "magnitudes",
    "of_concept",
    "own_concept",
    "percent",
    "pooling",
    "red_thing",
    "survivors",
    "test_rows",
]

LEVEL = 0.05
CORRECTED = {None: "none", "fdr_bh": "Benjamini-Hochberg", "bonferroni": "Bonferroni"}
TESTS = {"exchangeable": "as one more random set", "welch": "Welch's t-test"}
# Scores this near are the same to the reader.
NEAR = 0.05


def significant(result: TCAV, target: int, concept: str, *, raised: bool = True) -> list[str]:
    """Layers in which a concept differs from random sets, above their mean score or below it."""
    one = result.of(target)
    means = dict(zip(one.layers, one.null_scores[0].mean(-1).tolist(), strict=True))
    return [
        layer
        for layer in one.layers
        if one.significant[layer][concept] and (one.score[layer][concept] > means[layer]) == raised
    ]


def own_concept(result: TCAV, target: int, concept: str) -> str:
    """Where a class is swayed by a concept.

    Examples
    --------
    >>> from xai_fast.concepts import tcav
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 341))
    >>> sets = [torch.rand(9, 4) for _ in range(5)]
    >>> own_concept(tcav(model, "0", torch.rand(6, 4), 340, {"a": torch.rand(9, 4)}, sets), 340, "a")
    'For zebra, a ...'
    """
    name, one = CLASS_NAMES[target], result.of(target)
    found = significant(result, target, concept)
    best = max(one.layers, key=lambda layer: one.score[layer][concept])
    top = f"The highest score is {one.score[best][concept]:.2f}, in {block_name(best)}"
    if not found:
        return f"For {name}, {concept} differs upwards from random sets in no layer. {top}."
    scores = listed([f"{block_name(layer)} ({one.score[layer][concept]:.2f})" for layer in found])
    text = f"For {name}, {concept} is above random sets in {scores}."
    return text if best in found else f"{text} {top}, where random sets spread too far to tell it from them."


def of_concept(result: TCAV, concept: str, targets: Sequence[int]) -> str:
    """Which of some classes a concept sways, up or down, in any layer.

    Examples
    --------
    >>> from xai_fast.concepts import tcav
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 341))
    >>> sets = [torch.rand(9, 4) for _ in range(5)]
    >>> of_concept(tcav(model, "0", torch.rand(6, 4), 340, {"a": torch.rand(9, 4)}, sets), "a", [340])
    'A ...zebra...'
    """
    up, down, nothing = [], [], []
    for target in targets:
        raised, lowered = (significant(result, target, concept, raised=way) for way in (True, False))
        if raised:
            up.append(f"{CLASS_NAMES[target]} ({blocks_named(raised)})")
        if lowered:
            down.append(f"{CLASS_NAMES[target]} ({blocks_named(lowered)})")
        if not raised and not lowered:
            nothing.append(CLASS_NAMES[target])
    parts = [f"is above random sets for {listed(up)}"] if up else []
    parts += [f"is below random sets for {listed(down)}"] if down else []
    parts += [f"cannot be told from random sets for {listed(nothing)}"] if nothing else []
    return f"{concept.capitalize()} {'; it '.join(parts)}."


def blocks_named(layers: Sequence[str]) -> str:
    """Layers as the page calls them.

    Examples
    --------
    >>> blocks_named(["_blocks.7", "_blocks.10"])
    'blocks 7 and 10'
    """
    numbers = [layer.rpartition(".")[2] for layer in layers]
    return f"block{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


def red_thing(result: TCAV, target: int, concept: str) -> str:
    """Whether a class that everybody would call by a concept is swayed by it.

    Examples
    --------
    >>> from xai_fast.concepts import tcav
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 950))
    >>> sets = [torch.rand(9, 4) for _ in range(5)]
    >>> red_thing(tcav(model, "0", torch.rand(6, 4), 949, {"red": torch.rand(9, 4)}, sets), 949, "red")
    'The strawberry is red...'
    """
    name = CLASS_NAMES[target]
    if found := significant(result, target, concept):
        return f"The {name} is {concept}, and more {concept} would make it more of one in {blocks_named(found)}."
    return f"The {name} is {concept}, but in no layer can it be shown that more {concept} would make it more of one."


def survivors(result: TCAV) -> str:
    """How many tests are significant, how many would be by chance, and what is left of them after corrections."""
    total = result.p_values.numel()
    counts = {name: int((result.with_test(result.test, correction=name).adjusted < LEVEL).sum()) for name in CORRECTED}
    kept = {name: str(count) if count else "none" for name, count in counts.items()}
    return (
        f"Stars are not corrected for the number of tests: of {total}, {LEVEL * total:.0f} would have one by chance, and "
        f"{kept[None]} {'has' if counts[None] == 1 else 'have'} one. Corrected by Benjamini-Hochberg {kept['fdr_bh']} would "
        f"be left, by Bonferroni {kept['bonferroni']}. A single star is a hint; stars of one concept in several layers are "
        "more."
    )


def test_rows(result: TCAV) -> list[tuple[str, str, str, str]]:
    """Test, correction, significant concepts, significant meaningless concepts."""
    rows = []
    for test, name in TESTS.items():
        for correction, title in CORRECTED.items():
            hits = int((result.with_test(test, correction=correction).adjusted < LEVEL).sum())
            alarms = "" if correction else percent(_alarms(result, test))
            rows.append((name, title, f"{hits} of {result.p_values.numel()}", alarms))
    return rows


def _alarms(result: TCAV, test: str) -> float:
    return float((result.random_p_values(test) < LEVEL).double().mean())


def false_alarms(result: TCAV) -> str:
    """Which test keeps its level on sets that mean nothing."""
    rates = {test: _alarms(result, test) for test in TESTS}
    count = result.null_scores.numel()
    text = (
        f"Each of the {len(result.random_sets)} random sets was taken as a concept in turn, with the others as random sets: "
        f"{count} tests over all layers and classes, of which {percent(LEVEL)} should be significant. Welch's test called "
        f"{percent(rates['welch'])} of them significant, the other test {percent(rates['exchangeable'])}."
    )
    if rates["welch"] > 2 * LEVEL >= rates["exchangeable"]:
        return f"{text} So this page uses the other one: a star by Welch's test would mean little here."
    if rates["welch"] <= 2 * LEVEL:
        return f"{text} Here Welch's test does about what it promises; the page uses the other one all the same."
    return f"{text} Neither keeps its level here, and stars mean little."


def ceiling(result: TCAV) -> str:
    """Layers in which no score at all could be told from random sets."""
    best = replace(result, scores=torch.ones_like(result.scores)).with_test("exchangeable", correction=None).p_values[..., 0]
    spread = result.null_scores.std(-1).mean(0)
    widest, narrowest = int(spread.argmax()), int(spread.argmin())
    layers = [block_name(layer) for layer in result.layers]
    hopeless = {layer: int((column >= LEVEL).sum()) for layer, column in zip(layers, best.unbind(1), strict=True)}
    named = [f"{layer} (for {count} of {len(result.targets)} classes)" for layer, count in hopeless.items() if count]
    text = (
        f"A score cannot be above 1, but those of random sets spread around 0.5 with a standard deviation of "
        f"{spread[narrowest]:.2f} ({layers[narrowest]}) to {spread[widest]:.2f} ({layers[widest]}), mean of the classes."
    )
    if not named:
        return f"{text} A score of 1 would be significant in every layer."
    return (
        f"{text} Even a score of 1 could not be told from random sets in {listed(named)}: the gradients of all pictures of "
        "a class point much the same way there, and many a direction scores near 0 or near 1."
    )


def early(result: TCAV, target: int, concept: str) -> str:
    """Layers before the first that shows the concept, though its CAVs are accurate."""
    found = significant(result, target, concept)
    before = result.layers[: result.layers.index(found[0])] if found else result.layers
    if not before:
        return "The concept shows in the first layer already."
    least = min(result.accuracy[layer][concept] for layer in before)
    return (
        f"{blocks_named(before).capitalize()} show{'' if len(before) > 1 else 's'} nothing of {concept} for "
        f"{CLASS_NAMES[target]}, though the CAVs tell its pictures from others there in at least {percent(least)} of the "
        "cases: that a layer knows a concept does not mean that the class uses it there."
    )


def late(result: TCAV, target: int, concept: str) -> str:
    """Whether the last layer still tells the concept from others for the class."""
    last, one = result.layers[-1], result.of(target)
    score = one.score[last][concept]
    same = [c for c in one.concepts if c != concept and abs(one.score[last][c] - score) < NEAR]
    where = block_name(last).capitalize()
    if not same:
        return f"{where} still tells {concept} ({score:.2f}) from the other concepts for {CLASS_NAMES[target]}."
    others = listed([f"{c} ({one.score[last][c]:.2f})" for c in same])
    return (
        f"{where} does not tell {concept} ({score:.2f}) from other concepts for {CLASS_NAMES[target]}: {others} "
        f"{'score' if len(same) > 1 else 'scores'} the same or nearly so there."
    )


def magnitudes(result: TCAV) -> str:
    """How the score by magnitude compares with the share of signs."""
    scores, sizes = result.scores.mean(-1), result.magnitudes.mean(-1)
    farther = float(((sizes - 0.5).abs() > (scores - 0.5).abs()).double().mean())
    opposite = int(((scores - 0.5) * (sizes - 0.5) < 0).sum())
    text = (
        f"It lies on the other side of 0.5 than the score in {opposite} of {scores.numel()} cases, and is farther from 0.5 "
        f"in {percent(farther)} of them."
    )
    return f"{text} Where most pictures agree, the others have small derivatives." if farther > 0.5 else text


def pooling(result: TCAV, flat: TCAV, target: int, concept: str) -> str:
    """Whether pooled and flattened CAVs agree on what is significant."""
    pooled, flattened = (set(significant(part, target, concept)) for part in (result, flat))
    both = [layer for layer in flat.layers if layer in pooled & flattened]
    changed = [layer for layer in flat.layers if layer in pooled ^ flattened]
    if not changed:
        where = listed([block_name(layer) for layer in both]) if both else "no layer"
        return f"Both find {concept} significant in the same layers: {where}."
    sides = [f"{block_name(layer)} ({'pooled' if layer in pooled else 'flattened'} only)" for layer in changed]
    agreed = f" They agree on {listed([block_name(layer) for layer in both])}." if both else ""
    return f"They differ on {listed(sides)}.{agreed} What counts as the output of a layer is a choice, and it matters."


def percent(share: float) -> str:
    """A share for the page.

    Examples
    --------
    >>> percent(0.054)
    '5\\xa0%'
    """
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def listed(words: Sequence[str]) -> str:
    """Words with commas and an and.

    Examples
    --------
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    if len(words) < 2:
        return words[0] if words else "none"
    return f"{', '.join(words[:-1])} and {words[-1]}"
