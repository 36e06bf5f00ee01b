"""The HTML page of attention in recurrent networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from xai_fast.viz import Report, readable_tokens

from ..pages import add_part, add_text, add_versions, new_page
from ..rollout.page import HOW_MEASURED, show_size, show_time
from .additive_costs import AdditiveCosts
from .figures import alignment_figures
from .findings import (
    SAID,
    accuracy_finding,
    agreement_findings,
    cost_finding,
    date_findings,
    example_finding,
    named_findings,
    negation_findings,
    number,
    percent,
)
from .review_checks import METHODS, PLAIN, SIGNED, WITHOUT, Agreement, NamedWords, mean_error
from .reviews import AMBIVALENT, Negation, Reviews, Sentence
from .spelled_dates import Dates

__all__ = ["JudgedReviews", "build_recurrent_page"]

WHAT_IT_IS = (
    "A recurrent network reads a text word by word and keeps a state for each. Additive attention gives every state "
    "hᵢ a score, eᵢ = vᵀ tanh(W hᵢ + U q + b) for a query q; their softmax gives the weights αᵢ, and the network "
    "goes on with the sum of the states, each by its weight. It comes from translation, where the query is the "
    "state of the decoder and there is one row of weights for each word that is written (Bahdanau, Cho & Bengio "
    "2015, Neural machine translation by jointly learning to align and translate). Without a query it pools a "
    "sentence (Lin et al. 2017, A structured self-attentive sentence embedding). This page shows both, trained just "
    "now.",
    "Plain attention, the weights αᵢ, is at least zero and sums to 1, whatever the network decides: it says where "
    "the network looks, not what for. Signed attention asks the loss of the decision, Aᵢ = -αᵢ ∂L/∂αᵢ: above zero, "
    "more weight on this state would make the decision surer; below zero, less sure.",
)

DISPUTE = (
    "Jain & Wallace (2019), “Attention is not explanation”, give the first and say that quite other weights lead to the "
    "same verdict; Wiegreffe & Pinter (2019), “Attention is not not explanation”, answer with the second. Neither is in the "
    "data."
)

COLOURS = (
    "Plain attention has one colour, orange; signed attention has two, red for the verdict and blue against it. The "
    "last column leaves each word out in turn and reads the rest again: red is what the verdict loses in log-odds "
    "without the word, blue what it gains. Each text has its own scale."
)

READING = (
    "A weight belongs to a state, not to a word. State i of a bidirectional network has read the whole sentence, "
    "the word in its place best. The weight may lie beside the word that it is there for.",
    "Leaving words out is a check, not the truth. It makes sentences that nobody wrote, and of two words that say "
    "the same, neither seems to matter, as the other stays. Signed attention is a gradient: it tells what a little "
    "more or less weight would do.",
    "The derivative takes each weight as if it could grow alone, though all of them sum to 1. Where nearly all of "
    "it is on one token, the sign there says whether more of that state would help, not whether another one would "
    "do better.",
    "Signed attention has a factor 1 - p for a decision with two classes of probability p: it fades as the network "
    "becomes sure. That changes no order within a sentence, but its numbers cannot be compared between sentences.",
    "Jain & Wallace 2019 (Attention is not explanation) found that attention in such networks agrees little with "
    "gradients and with leaving words out; Serrano & Smith 2019 (Is attention interpretable?) that attention times "
    "its gradient names what matters better than attention; Wiegreffe & Pinter 2019 (Attention is not not "
    "explanation) that the answer depends on what one wants to know.",
    "The ratings of words were given without a sentence: “not”, irony and a plot about war are beyond them.",
)


@dataclass(frozen=True)
class JudgedReviews:
    """The classifier of reviews and what the checks say.

    Attributes
    ----------
    reviews : Reviews
    bag, lexicon : list of int
        Verdicts of the bag of words and of the rated words on the held-out sentences.
    agreements : dict of str to Agreement
    named : dict of str to NamedWords
    """

    reviews: Reviews
    bag: list[int]
    lexicon: list[int]
    agreements: dict[str, Agreement]
    named: dict[str, NamedWords]


def build_recurrent_page(
    judged: JudgedReviews | str, dates: Dates, costs: AdditiveCosts, links: Sequence[tuple[str, str]] = ()
) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    judged : JudgedReviews or str
        The reviews, or why they are left out.
    dates : Dates
    costs : AdditiveCosts
    links : sequence of (str, str)
        See `Report`.
    """
    report = new_page(
        "Attention in recurrent networks",
        "Which words speak for a verdict, and which against it? Which part of a date makes each digit? And is it so?",
        links,
    )
    add_text(report, "What it is", WHAT_IT_IS)
    report.section("Reviews of films")
    add_part(report, judged, _add_reviews)
    _add_dates(report, dates)
    _add_costs(report, costs)
    add_text(report, "How to read this", READING)
    add_versions(report)
    return report


# ---- reviews --------------------------------------------------------------------------------------------------------------


def _add_reviews(report: Report, judged: JudgedReviews) -> None:
    reviews = judged.reviews
    report.paragraph(
        "Sentences of film reviews (Pang & Lee 2004) that people rated from -4 to 4 (Hutto & Gilbert 2014, VADER; "
        "in the source package of vaderSentiment 3.3.2). The task is the sign of the mean rating, praise or blame; "
        f"ratings nearer to zero than {AMBIVALENT} are left out. A bidirectional LSTM with attention learnt from "
        f"{len(reviews.train):,} of them in {reviews.seconds:.0f} s and is tested on {len(reviews.held):,} others. "
        "The bag of words is scikit-learn's logistic regression, as it comes, on the same sentences: which words "
        "are there, in whatever order."
    )
    _add_accuracies(report, judged)
    report.paragraph(accuracy_finding(reviews, judged.bag))
    add_text(report, "Two sentences from the dispute about attention, and three made up for this page", (DISPUTE, COLOURS))
    _add_sentences(report, reviews.examples, "meant")
    for sentence in reviews.examples:
        report.paragraph(example_finding(sentence))
    report.section("Held-out reviews")
    report.paragraph(
        "The first held-out sentences of 8 to 16 words that the network judges right and, below, those that it "
        f"judges wrong, praise and blame in turn. It is wrong about {percent(1 - reviews.accuracy)} of all."
    )
    for title, sentences in (("Right", reviews.right), ("Wrong", reviews.wrong)):
        _add_sentences(report, sentences, "people", title)
    add_text(report, "Does it understand “not”?", negation_findings(reviews.negations))
    _add_negations(report, reviews.negations)
    add_text(report, "Does attention say what leaving a word out does?", agreement_findings(judged.agreements))
    _add_agreements(report, judged.agreements)
    add_text(report, "Does attention name the words that people rated?", named_findings(judged.named))
    _add_named(report, judged.named)


def _add_accuracies(report: Report, judged: JudgedReviews) -> None:
    reviews = judged.reviews
    labels = [review.label for review in reviews.held]
    rows = [
        ("BiLSTM with attention", reviews.accuracy),
        ("Bag of words, logistic regression", _accuracy(judged.bag, labels)),
        ("Sign of the sum of the words that people rated", _accuracy(judged.lexicon, labels)),
        ("Always the commoner class", reviews.majority),
    ]
    errors = [(share * (1 - share) / len(labels)) ** 0.5 for _, share in rows]
    cells = [
        (name, f"{100 * share:.1f} ± {100 * error:.1f}\u00a0%") for (name, share), error in zip(rows, errors, strict=True)
    ]
    report.table(("", "held-out sentences judged right"), cells)


def _accuracy(verdicts: Sequence[int], labels: Sequence[int]) -> float:
    return sum(verdict == label for verdict, label in zip(verdicts, labels, strict=True)) / len(labels)


def _add_sentences(report: Report, sentences: Sequence[Sentence], who: str, title: str = "") -> None:
    rows = [
        (
            f"{SAID[s.target].capitalize()}, {percent(s.probability if s.target else 1 - s.probability)}",
            f"{who}: {'both' if s.label is None else SAID[s.label]}",
            readable_tokens(s.tokens),
            [(s.attention, False), (s.signed, True), (s.without, True)],
        )
        for s in sentences
    ]
    report.sentences((title or "Verdict", PLAIN, SIGNED, WITHOUT), rows)


def _add_negations(report: Report, negations: Sequence[Negation]) -> None:
    rows = []
    for item in negations:
        place = item.negated.tokens.index("not")
        weights = item.negated.signed
        # By its largest, since the numbers of two sentences have no common scale.
        share = float(weights[place] / weights.abs().max())
        verdicts = (_told(sentence) for sentence in (item.plain, item.negated))
        rows.append((f"The film is (not) {item.word}.", SAID[item.label], *verdicts, number(share)))
    report.table(("", "the word says", "praise, without “not”", "praise, with “not”", "“not” by signed attention"), rows)
    report.paragraph(
        "Probabilities of praise; a cross marks a wrong verdict. The last column is for the verdict if it is above "
        "zero, and relative to the largest weight in the sentence."
    )


def _told(sentence: Sentence) -> str:
    return f"{percent(sentence.probability)}{'' if sentence.target == sentence.label else ' ✗'}"


def _add_agreements(report: Report, found: dict[str, Agreement]) -> None:
    rows = [
        (name, _value(found[name].rank), _value(found[name].size), percent(float(found[name].top.mean())))
        for name in METHODS
    ]
    report.table(("", "rank correlation, with signs", "rank correlation, by size", "same top word"), rows)
    count = len(found[PLAIN].rank)
    report.paragraph(
        "Spearman's rank correlation with the loss in log-odds within a sentence, mean and standard error over "
        f"{count} held-out sentences; and the share of sentences in which the largest weight is on the word that the "
        "verdict loses most without."
    )


def _value(values: Tensor) -> str:
    mean, error = mean_error(values)
    return f"{number(mean)} ± {error:.2f}"


def _add_named(report: Report, found: dict[str, NamedWords]) -> None:
    rows = []
    for name in (*METHODS, WITHOUT):
        item = found[name]
        sign = percent(float(item.sign_right.mean())) if name in (SIGNED, WITHOUT) else "no sign"
        agrees = percent(float(item.top_for.mean())) if len(item.top_for) else "no case"
        rows.append((name, percent(float(item.top_rated.mean())), agrees, sign))
    item = found[PLAIN]
    every = percent(float(item.word_for.mean()))
    rows.append(("By chance", percent(float(item.rated.mean())), every, f"{every} if all are for the verdict"))
    report.table(("", "top word is rated", "of these, for the verdict", "sign of all rated words"), rows)
    report.paragraph(
        f"In {len(item.top_rated)} held-out sentences with {len(item.word_for)} words of the VADER lexicon, whose "
        "ratings say praise or blame; a word is for the verdict if both say the same."
    )


# ---- dates and costs ------------------------------------------------------------------------------------------------------


def _add_dates(report: Report, dates: Dates) -> None:
    report.section("Dates in words")
    report.paragraph(
        "An encoder-decoder writes dates in digits, “Monday, 3 May 2021” as “2021-05-03”. The data are made up "
        f"here: days from 1900 to 2099 in eight spellings, {dates.train:,} to learn from ({dates.seconds:.0f} s) and "
        f"{dates.tests:,} others to test on. {percent(dates.accuracy)} of these are written without a fault. Where "
        "each digit comes from is known, which it is not for a translation: year, month and day can be looked up in "
        "the matrix."
    )
    for paragraph in date_findings(dates):
        report.paragraph(paragraph)
    names = {"year": "Digits of the year", "month": "Digits of the month", "day": "Digits of the day", "all": "All digits"}
    shares = ((names[field], share.plain, share.signed, share.uniform) for field, share in dates.shares.items())
    rows = [(name, *(percent(value) for value in values)) for name, *values in shares]
    header = ("Share on the right part of the spelling", "plain attention", "signed, above zero", "uniform attention")
    report.table(header, rows)
    report.paragraph("Rows are the characters that are written, columns what is read.")
    for alignment in dates.alignments:
        what = f"“{alignment.date.text}”"
        told = f"Written: {alignment.written}" + (
            "." if alignment.written == alignment.date.written else f", where {alignment.date.written} is right."
        )
        plain, signed = alignment_figures(alignment)
        report.figures([(plain, what, told), (signed, what, "Red is for the character, blue against it.")], cell=480)


def _add_costs(report: Report, costs: AdditiveCosts) -> None:
    report.section("Time and memory")
    report.paragraph(
        "Scores for T queries and S keys need tanh of T x S sums of H numbers each. Written as one expression, as "
        f"it usually is, that is a tensor (B, T, S, H): here ({costs.batch}, {costs.queries}, {costs.keys}, "
        f"{costs.hidden}), {show_size(costs.hidden_bytes)} in float32, which the backward pass keeps. "
        "AdditiveAttention computes it tile by tile, and once more in the backward pass."
    )
    rows = [(name.capitalize(), show_time(cost), show_size(cost.peak_bytes)) for name, cost in costs.measured.items()]
    report.table(("", "time", "memory at the peak"), rows)
    report.paragraph(cost_finding(costs))
    report.paragraph(f"On one thread, where it is a CPU. {HOW_MEASURED}")
