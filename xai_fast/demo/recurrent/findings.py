"""Sentences of the page of recurrent networks that depend on what was measured: other numbers, other sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .additive_costs import AT_ONCE_TRAINING, TILED_TRAINING, AdditiveCosts
from .review_checks import PLAIN, RANDOM, SIGNED, WITHOUT, Agreement, NamedWords, mean_error, paired_difference
from .reviews import Negation, Reviews, Sentence
from .spelled_dates import Dates

__all__ = [
    "SAID",
    "accuracy_finding",
    "agreement_findings",
    "cost_finding",
    "date_findings",
    "example_finding",
    "named_findings",
    "negation_findings",
    "number",
    "percent",
    "points",
]

SAID = {1: "praise", 0: "blame"}
# Differences are called clear beyond this many standard errors.
CLEAR = 2
# Of the largest weight of a sentence: a word with less against the verdict is not worth naming.
FAINT = 0.05
# Shares of attention that differ by less are called alike.
ALIKE = 0.05


def accuracy_finding(reviews: Reviews, bag: Sequence[int]) -> str:
    """Whether the network is ahead of the bag of words on the held-out sentences."""
    difference, error = paired_difference(reviews.verdicts, bag, [review.label for review in reviews.held])
    told = f"{points(difference)} ± {points(error)} points, sentence by sentence"
    if _clear(difference, error):
        first, second = ("network", "bag of words") if difference > 0 else ("bag of words", "network")
        gain = (
            "reading the words in order gains"
            if difference > 0
            else "reading the words in order gains nothing here, it loses"
        )
        return f"The {first} is ahead of the {second}: {gain} {told}."
    side = "below" if difference < 0 else "above"
    return (
        "The network reads the words in their order, which the bag of words does not know. It gains nothing by it "
        f"that could be told from chance: its accuracy is {side} that of the bag of words ({told})."
    )


def example_finding(sentence: Sentence) -> str:
    """The verdict on a sentence, the word that speaks most for it and, if there is one, the word that does most against."""
    sure = sentence.probability if sentence.target else 1 - sentence.probability
    verdict = f"“{sentence.text}” is judged as {SAID[sentence.target]} ({percent(sure)})"
    if sentence.label is not None:
        meant = SAID[sentence.label]
        verdict += ", as it is meant" if sentence.label == sentence.target else f", but meant as {meant}: a wrong verdict"
    top, low = int(sentence.signed.argmax()), int(sentence.signed.argmin())
    most, least = float(sentence.signed[top]), float(sentence.signed[low])
    text = f"{verdict}. By signed attention “{sentence.tokens[top]}” speaks most for that ({number(most)})"
    if least < -FAINT * most:
        return f"{text}, “{sentence.tokens[low]}” most against it ({number(least)})."
    return f"{text}, and no word that counts speaks against it."


def negation_findings(negations: Sequence[Negation]) -> list[str]:
    """How often "not" is understood, and which side its signed attention is on."""
    plain = sum(item.plain.target == item.plain.label for item in negations)
    good, bad = ([item for item in negations if item.label == label] for label in (1, 0))
    lowered, raised = (sum(item.negated.target == item.negated.label for item in items) for items in (good, bad))
    blaming = sum(_blames(item.negated) for item in bad)
    found = [
        f"The network is right about {plain} of {len(negations)} sentences without “not”. With it, it is right about "
        f"{lowered} of {len(good)} words of praise and about {raised} of {len(bad)} words of blame.",
        f"Before words of blame, the signed attention of “not” is on the side of blame in {blaming} of {len(bad)} "
        "sentences.",
    ]
    if 2 * lowered > len(good) and 2 * raised <= len(bad) and 2 * blaming > len(bad):
        found.append("It has learnt “not” as a word of blame, not as one that turns the next word round.")
    elif 2 * lowered > len(good) and 2 * raised > len(bad):
        found.append("It mostly turns the next word round, as it should.")
    return found


def _blames(sentence: Sentence) -> bool:
    """Whether "not" speaks for blame, which is the verdict or what is against it."""
    weight = float(sentence.signed[sentence.tokens.index("not")])
    return weight < 0 if sentence.target else weight > 0


def agreement_findings(found: Mapping[str, Agreement]) -> list[str]:
    """Which of plain and signed attention agrees better with leaving words out, with and without signs."""
    signed, plain, random = found[SIGNED], found[PLAIN], found[RANDOM]
    with_signs = _versus("agrees better with leaving words out", signed.rank, plain.rank, number)
    by_size = _versus("agrees better", signed.size, plain.size, number)
    chance, error = mean_error(random.rank)
    return [
        f"With signs: {with_signs} Plain attention is never below zero and cannot say that a word speaks against the "
        "verdict.",
        f"By size alone, whatever side a word is on: {by_size}",
        f"Random weights have a mean rank correlation of {number(chance)} ± {error:.2f}.",
    ]


def named_findings(found: Mapping[str, NamedWords]) -> list[str]:
    """Whether the attention names words that people rated, and on the right side."""
    signed, plain, without = found[SIGNED], found[PLAIN], found[WITHOUT]
    rated = float(signed.rated.mean())
    tops = _versus("names one more often", signed.top_rated, plain.top_rated, percent)
    first = (
        f"How often is the largest weight on a rated word? {_capital(tops)} A token drawn at random is one in "
        f"{percent(rated)}, the token that is left out with most effect in {percent(float(without.top_rated.mean()))}."
    )
    second = (
        f"Where the largest weight is on a rated word, the rating speaks for the verdict in {_share(signed.top_for)} "
        f"(signed), {_share(plain.top_for)} (plain) and {_share(without.top_for)} (leaving out); of all rated words, "
        f"in {_share(signed.word_for)}."
    )
    gain, error = mean_error(signed.sign_right - signed.word_for)
    better = "is better than" if gain > 0 else "is worse than"
    told = better if _clear(gain, error) else "cannot be told from"
    third = (
        f"The sign of signed attention is that of the rating for {_share(signed.sign_right)} of the "
        f"{len(signed.word_for)} rated words. That {told} the rule that every word speaks for the verdict "
        f"({_share(signed.word_for)}); the sign of leaving out is right for {_share(without.sign_right)}."
    )
    return [first, second, third]


def date_findings(dates: Dates) -> list[str]:
    """How much of the attention is on the right part of the spelling."""
    share = dates.shares["all"]
    times = share.plain / share.uniform
    found = [
        f"Of the attention of a digit, {percent(share.plain)} lies on the part of the spelling that says its year, "
        f"month or day: {times:.1f} times what uniform attention would have there ({percent(share.uniform)}). Of the "
        f"signed attention above zero it is {percent(share.signed)}."
    ]
    less = {f: s for f, s in dates.shares.items() if f != "all" and s.signed < s.plain - ALIKE}
    more = {f: s for f, s in dates.shares.items() if f != "all" and s.signed > s.plain + ALIKE}
    for fields, word in ((less, "less"), (more, "more")):
        if fields:
            named = listed([f"the {f} ({percent(s.signed)} against {percent(s.plain)})" for f, s in fields.items()])
            found.append(f"Signed attention has {word} of its weight on the right part than plain attention for {named}.")
    if not less and not more:
        found.append("Signed attention and plain attention are alike in that, for every part.")
    digits = listed([f"{percent(dates.against[f])} of the digits of the {f}" for f in ("year", "month", "day")])
    found.append(
        f"The token with the most attention speaks against its own character, by signed attention, for {digits}, and "
        f"for {percent(dates.against['-'])} of the dashes. A dash hangs on no token: the decoder knows it from its "
        "place."
    )
    if dates.against["-"] > 0.5:
        found[-1] += " It looks somewhere all the same, and that makes it less sure. Plain attention does not show this."
    return found


def cost_finding(costs: AdditiveCosts) -> str:
    """Time and memory of the tiles against the plain composition, with the backward pass."""
    tiled, plain = costs.measured[TILED_TRAINING], costs.measured[AT_ONCE_TRAINING]
    ratio = plain.seconds / tiled.seconds
    text = f"With the backward pass the tiles take {_times(ratio, 'time')}"
    if tiled.peak_bytes and plain.peak_bytes:
        text += f" and {_times(plain.peak_bytes / tiled.peak_bytes, 'memory')}"
    return f"{text} of the plain composition. The largest difference of a weight is {costs.disagreement:.0e}."


def _times(ratio: float, what: str) -> str:
    return f"1/{ratio:.1f} of the {what}" if ratio >= 1 else f"{1 / ratio:.1f} times the {what}"


def _versus(what: str, signed: Tensor, plain: Tensor, show: Callable[[float], str]) -> str:
    """Which of the two has the larger mean, if that can be told."""
    (one, _), (other, _), (difference, error) = mean_error(signed), mean_error(plain), mean_error(signed - plain)
    values = f"signed {show(one)}, plain {show(other)}"
    if _clear(difference, error):
        return f"{'signed' if difference > 0 else 'plain'} attention {what} ({values})."
    return f"no difference between the two can be told from chance ({values})."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _clear(difference: float, error: float) -> bool:
    return math.isfinite(error) and abs(difference) > CLEAR * error


def _share(values: Tensor) -> str:
    return percent(float(values.double().mean())) if len(values) else "no case"


def percent(share: float) -> str:
    """A share in per cent.

    Examples
    --------
    >>> percent(0.126)
    '13\\xa0%'
    """
    return f"{100 * share:.0f}\u00a0%"


def points(share: float) -> str:
    """A difference of shares in points.

    Examples
    --------
    >>> points(0.0134)
    '1.3'
    """
    return number(100 * share, 1)


def number(value: float, digits: int = 2) -> str:
    """With a true minus sign, and none before zero.

    Examples
    --------
    >>> number(-0.004), number(0.25)
    ('0.00', '0.25')
    """
    text = f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text.replace("-", "")


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence.

    Examples
    --------
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
