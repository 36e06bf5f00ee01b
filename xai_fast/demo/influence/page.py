"""The HTML page of influence functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xai_fast.viz import Report

from ..datasets import CLASSES
from ..pages import add_part, add_text, add_versions, new_page
from .figures import curve_figure, enlarged, pictures_figure, removal_figure, scatter_figure
from .mislabelled import FLIPPED, LOSS, RANDOM, SELF, Mislabelled
from .spam import GROUP, Removal, Spam
from .two_models import PAIR, SMOOTHING, Certificate, TwoModels

__all__ = ["build_influence_page"]

INSPECTED = (0.05, 0.1, 0.15, 0.2, 0.3)
# Rows that are shown as pictures, and mails in the table.
SHOWN_ROWS, SHOWN_MAILS = 16, 8

WHAT_IT_IS = (
    "Which training rows are behind a prediction? Give one training row a little more weight, train again, and see how "
    "the loss of a test point changes. Influence functions compute the derivative of that change without training again "
    "(Koh & Liang 2017, Understanding black-box predictions via influence functions). All models on this page are "
    "linear in features that are kept fixed; they were trained just now until the gradient of their objective vanished, "
    "to 1e-10 or less where the page trains them itself.",
)

CONVENTIONS = (
    "I(z, z_test) = -∇L(z_test)ᵀ H⁻¹ ∇L(z): the derivative of the loss of the test point by the weight of row z in the "
    "mean training objective. Positive is harmful: more weight on the row raises the test loss. Negative is helpful.",
    "H is the Hessian of the mean training loss plus l2, where the objective has l2 / 2 times the squared norm of the "
    "parameters; nothing else is added to it here (damping 0). ∇L(z) is the gradient of the loss alone, without the "
    "regulariser. The numbers are not divided by the number of rows n: removing a row changes the test loss by about -I "
    "/ n.",
    "Self-influence is I(z, z): never positive. A row with a large |I(z, z)| carries its own prediction; without it the "
    "model would say something else there.",
    "Leave-one-out predictions on this page take one Newton step on the objective without the row, which corrects -I / "
    "n for the curvature that goes with the row. For several rows together they are added up.",
    "Influence says what this model would do with other weights on the rows it has. It does not say that a row is "
    "wrong, and for deep networks it speaks of the last layer on fixed features only.",
)


def build_influence_page(
    two: TwoModels | str, found: Sequence[Mislabelled] | str, spam: Spam | str, links: Sequence[tuple[str, str]]
) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    two : TwoModels or str
        Part 1, or why it is left out; the other parts likewise.
    found : sequence of Mislabelled or str
    spam : Spam or str
    links : sequence of (str, str)
        See `Report`.

    Examples
    --------
    >>> build_influence_page("no data", "no data", "no data", []).html().count("Left out: no data.")
    3
    """
    report = new_page(
        "Influence functions",
        "Which training examples are behind a prediction, which of them did harm, and what if they had not been there?",
        links,
    )
    add_text(report, "The question", WHAT_IT_IS)
    report.section("Two models, the same pictures")
    add_part(report, two, _add_two)
    report.section("Mislabelled rows")
    add_part(report, found, _add_mislabelled)
    report.section("The mails behind a spam filter's decision")
    add_part(report, spam, _add_spam)
    add_text(report, "What the numbers mean", CONVENTIONS)
    _add_certificates(report, two, found, spam)
    add_versions(report)
    return report


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


# ---- two models -----------------------------------------------------------------------------------------------------------


def _add_two(report: Report, two: TwoModels) -> None:
    n, names = len(two.train_images), [CLASSES[c] for c in PAIR]
    report.paragraph(
        f"{n:,} pictures of Fashion-MNIST, {names[0]}s and {names[1]}s in equal parts, and three support vector machines "
        f"with the same smooth hinge loss (smoothing {SMOOTHING}): two with an RBF kernel on the pixels, one linear on "
        "the CLS token of DINOv2 ViT-S/14 after block 11, for pictures enlarged to 84 x 84. The penalties and the "
        "kernel width of the first were chosen by cross-validation; the second has a narrower kernel. After section 5.1 "
        "of Koh & Liang."
    )
    report.table(
        (
            "Model",
            "right, training",
            f"right, {len(two.test_images)} test pictures",
            "rank correlation",
            "top 20 among the nearest 5 %",
        ),
        [
            (m.name, _percent(m.train_accuracy, 1), _percent(m.test_accuracy, 1), f"{m.correlation:+.2f}", _percent(m.near))
            for m in two.models
        ],
    )
    counted = ", ".join(str(model.counted) for model in two.models)
    report.paragraph(
        "Rank correlation: Spearman's, between the size of the influence and the Euclidean distance of the pixels, over "
        "the training pictures. Last column: how many of the 20 most influential training pictures are among the "
        f"nearest 5 % (chance: 5 %). Both are means over the test pictures whose loss has a gradient ({counted}): far "
        "outside the margin nothing has influence."
    )
    report.paragraph(_what_is_seen(two))
    for number, test in enumerate(two.shown):
        _add_test_picture(report, two, test, number)
    if len(two.widths) > 2:
        _add_widths(report, two)


def _what_is_seen(two: TwoModels) -> str:
    wide, narrow, deep = two.models
    weakest = min(two.models, key=lambda model: abs(model.correlation))
    verdict = (
        "A model can be right as often, and what stands behind its decisions need not look alike pixel by pixel."
        if weakest is deep
        else f"On these pictures it is weakest for “{weakest.name}”."
    )
    return (
        f"With the narrow kernel the influence goes with the distance ({narrow.correlation:+.2f}): a training picture "
        f"matters if its pixels are alike. With the wider kernel the correlation is {wide.correlation:+.2f}, on the "
        f"features of the network {deep.correlation:+.2f}. {verdict}"
    )


def _add_test_picture(report: Report, two: TwoModels, test: int, number: int) -> None:
    label = float(two.test_labels[test])
    margins = ", ".join(f"{float(model.margins[test]):.2f}" for model in two.models)
    report.figures(
        [(enlarged(two.test_images[test]), f"Test picture {number + 1}: a {two.class_name(label)}", f"Margins: {margins}.")],
        cell=140,
    )
    report.figures([(scatter_figure(two, test), "", _scatter_caption(two, test))], cell=900)
    caption = (
        f"Most helpful and most harmful training pictures for test picture {number + 1}, with their influence. Frames: "
        f"solid blue {two.class_name(1.0)}, dashed orange {two.class_name(-1.0)}. {_same_class(two, test)}"
    )
    report.figures([(pictures_figure(two, test), "", caption)], cell=900)


def _scatter_caption(two: TwoModels, test: int) -> str:
    return (
        "Influence of every training picture on the loss of this test picture, against their distance. Positive is harmful. "
        "The scales differ: they depend on the size of the features."
    )


def _same_class(two: TwoModels, test: int) -> str:
    """How many of the most helpful and most harmful ones are of the test picture's class."""
    same = two.train_labels == two.test_labels[test]
    words = []
    for model in two.models:
        helpful, harmful = (model.scores[test].topk(20, largest=largest).indices for largest in (False, True))
        words.append(f"{model.name} {int(same[helpful].sum())} and {int(same[harmful].sum())}")
    return f"Of the 20 most helpful and the 20 most harmful, of the class of the test picture: {'; '.join(words)}."


def _add_widths(report: Report, two: TwoModels) -> None:
    report.paragraph("How much the contrast owes to the width of the kernel:")
    report.table(
        (
            "RBF kernel: gamma times the squared median distance",
            "right, test pictures",
            "rank correlation",
            "top 20 among the nearest 5 %",
        ),
        [(f"{w.width:g}", _percent(w.test_accuracy, 1), f"{w.correlation:+.2f}", _percent(w.near)) for w in two.widths],
    )


# ---- wrong labels ---------------------------------------------------------------------------------------------------------


def _add_mislabelled(report: Report, found: Sequence[Mislabelled]) -> None:
    first = found[0]
    report.paragraph(
        f"Rows of Fashion-MNIST, all ten classes; {_percent(FLIPPED)} of the labels were replaced by another one at "
        "random (seed 0), and a softmax regression was trained on the first 100 principal components of the pixels with "
        "these labels. Then all rows are ranked by the size of their self-influence, and inspected from the top."
    )
    report.figures(
        [(curve_figure(found), "", "How many of the wrong labels have been found.")], cell=900 if len(found) > 1 else 560
    )
    report.table(
        ("Found, after inspecting", *(_percent(share) for share in INSPECTED)),
        [
            (
                f"{len(item.flipped):,} rows, l2 = {item.setting.l2:g}: {name}",
                *(_percent(item.found(name, s), 1) for s in INSPECTED),
            )
            for item in found
            for name in (SELF, LOSS, RANDOM)
        ],
    )
    report.paragraph(" ".join(_how_it_went(item) for item in found))
    report.paragraph(
        "Self-influence is the gradient of a row measured by H⁻¹: loss and leverage in one. Correctly labelled but "
        "unusual rows have leverage too and stand among the wrong ones. Where a model is free enough to learn wrong "
        "labels by heart, their loss falls, and their leverage gives them away."
    )
    report.paragraph(f"The {SHOWN_ROWS} rows that self-influence would have inspected first ({len(first.flipped):,} rows):")
    report.figures(_suspects(first), cell=118)


def _how_it_went(item: Mislabelled) -> str:
    own, loss = (item.found(name, 0.1) for name in (SELF, LOSS))
    verdict = "more than" if own > loss else "as many as" if own == loss else "fewer than"
    return (
        f"{len(item.flipped):,} rows, l2 = {item.setting.l2:g}: the model is right on {_percent(item.test_accuracy, 1)} "
        f"of the test pictures and has learnt {_percent(item.learnt, 1)} of the wrong labels; after a tenth of the rows "
        f"self-influence has found {_percent(own, 1)} of them, {verdict} the loss ({_percent(loss, 1)})."
    )


def _suspects(item: Mislabelled) -> list[tuple[np.ndarray, str, str]]:
    figures = []
    for row in item.first(SELF, SHOWN_ROWS):
        given, true = CLASSES[int(item.given[row])], CLASSES[int(item.true[row])]
        caption = f"truly: {true}" if item.flipped[row] else "label as in the data"
        figures.append((enlarged(item.images[row], 4), given, caption))
    return figures


# ---- spam -----------------------------------------------------------------------------------------------------------------


def _add_spam(report: Report, spam: Spam) -> None:
    kind = "spam" if spam.test.is_spam else "ham"
    report.paragraph(
        f"{len(spam.train):,} mails of the SpamAssassin corpus (2002), half of them spam, without those in other scripts "
        "and those with adult words, as mean embeddings of all-MiniLM-L6-v2 (first 128 tokens of subject and text), and "
        "scikit-learn's logistic regression on top. It is right on "
        f"{_percent(spam.test_accuracy, 1)} of {spam.tests} further mails. The mail to explain is the one that it decides "
        "correctly with a probability nearest to 75\u00a0%."
    )
    report.note(
        f"“{spam.test.subject}” — {spam.test.body[:220]} … This is {kind}; p(spam) = {_percent(spam.probability, 1)}."
    )
    for name, rows in (("helped", spam.helpful), ("did harm", spam.harmful)):
        report.table(
            (f"Mails that {name} most", "kind", "influence on the loss", "-I / n"),
            [
                (
                    _short(spam.train[row].subject),
                    spam.train[row].kind.replace("-", " "),
                    f"{float(spam.scores[row]):+.2f}",
                    f"{-float(spam.scores[row]) / len(spam.train):+.4f}",
                )
                for row in rows[:SHOWN_MAILS]
            ],
        )
    report.paragraph(_spam_words(spam))
    report.paragraph("Does it come true? Some mails are left out and scikit-learn trains again.")
    caption = (
        f"{len(spam.alone)} mails left out one at a time: a third the most helpful, a third the most harmful, a third at "
        f"random. Correlation {spam.correlation:.4f}."
    )
    report.figures([(removal_figure(spam), "", caption)], cell=560)
    report.table(
        ("Left out together", "predicted change of the loss", "after retraining", "p(right class) after"),
        [_group_row(item) for item in spam.groups],
        caption="",
    )
    report.paragraph(
        f"Before: p(right class) = {_percent(_right(spam), 1)}. The prediction for {GROUP} mails together is the sum of "
        "the predictions for each. The sum is off when the mails are alike, because each "
        "prediction takes for granted that the others are still there, and because the loss is not linear."
    )


def _right(spam: Spam) -> float:
    return spam.probability if spam.test.is_spam else 1 - spam.probability


def _group_row(item: Removal) -> tuple[str, ...]:
    return (item.what, f"{item.predicted:+.3f}", f"{item.actual:+.3f}", _percent(item.probability, 1))


def _spam_words(spam: Spam) -> str:
    """What the extreme mails have in common, counted."""
    helpful = sum(spam.train[row].is_spam == spam.test.is_spam for row in spam.helpful)
    harmful = sum(spam.train[row].is_spam != spam.test.is_spam for row in spam.harmful)
    hard = sum(spam.train[row].kind == "hard-ham" for row in spam.harmful)
    return (
        f"Of the {GROUP} most helpful mails {helpful} are of the same class as the mail to explain; of the {GROUP} most "
        f"harmful {harmful} are of the other class, {hard} of them “hard ham”: wanted mail that looks like advertising."
    )


def _short(text: str, length: int = 70) -> str:
    return text if len(text) <= length else f"{text[: length - 2]} …"


# ---- certificates ---------------------------------------------------------------------------------------------------------


def _add_certificates(report: Report, two: TwoModels | str, found: Sequence[Mislabelled] | str, spam: Spam | str) -> None:
    certificates: list[Certificate] = []
    if not isinstance(two, str):
        certificates += [model.certificate for model in two.models]
    if not isinstance(found, str):
        certificates += [item.certificate for item in found]
    if not isinstance(spam, str):
        certificates.append(spam.certificate)
    if not certificates:
        return
    report.section("Certificates")
    report.paragraph(
        "Every solve with H is checked after the fact by a full pass over the data: the residual is ‖H x - v‖ / ‖v‖, "
        "the largest over the right-hand sides. The seconds are those of the library, scores included, on this machine."
    )
    report.table(
        ("Solve", "unknowns", "solver", "residual", "seconds"),
        [(c.what, f"{c.unknowns:,}", c.solver, _residual(c), f"{c.seconds:.2f}") for c in certificates],
    )
    reasons = dict.fromkeys(c.why for c in certificates if c.why)
    if reasons:
        report.paragraph("Why these solvers: " + "; ".join(reasons) + ".")


def _residual(item: Certificate) -> str:
    return f"{item.residual:.1e}" + ("" if item.converged else ", above the tolerance")
