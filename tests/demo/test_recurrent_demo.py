"""The page of recurrent networks from the command line to the file, its checks, and its sentences."""

from __future__ import annotations

import dataclasses
import math
import re
from html import unescape
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.demo.real import built_with, needs
from xai_fast.demo import main
from xai_fast.demo.fetch import DataUnavailable
from xai_fast.demo.measure import Measured
from xai_fast.demo.recurrent import demo as recurrent_demo
from xai_fast.demo.recurrent import findings
from xai_fast.demo.recurrent.additive_costs import AT_ONCE_TRAINING, TILED_TRAINING, AdditiveCosts, cost_additive
from xai_fast.demo.recurrent.figures import _wrapped
from xai_fast.demo.recurrent.page import JudgedReviews, build_recurrent_page
from xai_fast.demo.recurrent.review_checks import (
    METHODS,
    PLAIN,
    RANDOM,
    SIGNED,
    WITHOUT,
    Agreement,
    NamedWords,
    agreements,
    bag_of_words,
    lexicon_verdicts,
    mean_error,
    named_words,
    paired_difference,
    weights_of,
)
from xai_fast.demo.recurrent.reviews import Negation, Review, Reviews, Sentence, load_reviews
from xai_fast.demo.recurrent.spelled_dates import Dates, Share, explain_dates

for package in ("sklearn", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/png;base64,[A-Za-z0-9+/]+=*"')
CPU = torch.device("cpu")


def _sentence(words: str, signed: list[float], *, praise: float = 0.9, label: int | None = 1, **weights: Any) -> Sentence:
    tokens = words.split()
    values = torch.tensor(signed)
    attention = torch.tensor(weights.get("attention", [1 / len(tokens)] * len(tokens)))
    without = torch.tensor(weights.get("without", signed))
    return Sentence(f"{words}.", tokens, praise, int(praise > 0.5), label, attention, values, without)


def _reviews(verdicts: list[int], labels: list[int]) -> Reviews:
    held = [Review(f"sentence {i}", 1.0 if label else -1.0) for i, label in enumerate(labels)]
    shown = [_sentence("a good film", [0.0, 0.4, -0.1], without=[0.1, 2.0, -0.3])]
    return Reviews(held, held, verdicts, shown, shown, shown, shown, [_negation("good", 1, 0.2)], 1.0)


def _negation(word: str, label: int, negated: float, weight: float = 0.5) -> Negation:
    plain = _sentence(f"film is {word}", [0.0, 0.0, 0.5], praise=0.9 if label else 0.1, label=label)
    return Negation(
        word, label, plain, _sentence(f"film is not {word}", [0, 0, weight, 0.2], praise=negated, label=1 - label)
    )


def _dates(**options: Any) -> Dates:
    shares = dict.fromkeys(("year", "month", "day", "all"), Share(0.9, 0.9, 0.3))
    dates = Dates(90, 10, 0.8, shares, {"year": 0.1, "month": 0.2, "day": 0.3, "-": 0.9}, [], 1.0)
    return dataclasses.replace(dates, **options)


def _costs(tiled: float = 0.1, plain: float = 0.4, peak: int | None = 2**20) -> AdditiveCosts:
    measured = {TILED_TRAINING: Measured(tiled, peak), AT_ONCE_TRAINING: Measured(plain, peak and 50 * peak)}
    return AdditiveCosts(2, 3, 5, 8, measured, 1e-9)


# ---- the page -------------------------------------------------------------------------------------------------------------


def test_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    needs(load_reviews)
    built = built_with(monkeypatch, recurrent_demo, "build_recurrent_page")
    out, picture = tmp_path / "deep" / "index.html", tmp_path / "recurrent.jpg"
    arguments = ["--smallest", "--pages", "recurrent", "--out", str(out), "--recurrent-picture", str(picture)]
    assert main(arguments) == 0

    ((judged, dates, costs, _),) = built
    reviews = judged.reviews
    assert len(reviews.held) == len(judged.bag) == len(judged.lexicon) == 300
    # A third of the data is enough to know some words.
    assert reviews.accuracy > 0.6
    assert judged.agreements[SIGNED].rank.nanmean() > judged.agreements[RANDOM].rank.nanmean() + 0.1
    assert dates.shares["all"].plain > dates.shares["all"].uniform
    assert costs.disagreement < 1e-6

    assert not out.exists()
    html = out.with_name("recurrent.html").read_text()
    assert len(IMAGE.findall(html)) == 2 * len(dates.alignments)
    text = unescape(re.sub(r'src="[^"]*"|<[^>]*>', "", html))
    assert f"{100 * reviews.accuracy:.1f} ± " in text
    assert findings.accuracy_finding(reviews, judged.bag) in text
    for line in findings.agreement_findings(judged.agreements) + findings.named_findings(judged.named):
        assert line in text
    for sentence in reviews.examples:
        assert findings.example_finding(sentence) in text
    assert "This is not a bad film." in text
    assert "nan" not in text.split()
    assert "Left out" not in text
    assert picture.read_bytes()[:2] == b"\xff\xd8"
    assert "100%" in capsys.readouterr().err


def test_missing_reviews_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def load() -> NoReturn:
        raise DataUnavailable("the rated film reviews cannot be had: no network")

    monkeypatch.setattr(recurrent_demo, "load_reviews", load)
    dates = explain_dates(count=40, tests=10, epochs=1, dim=4, hidden=4)
    monkeypatch.setattr(recurrent_demo, "explain_dates", lambda **_: dates)
    monkeypatch.setattr(recurrent_demo, "cost_additive", lambda *_, **__: _costs())
    arguments = ["--smallest", "--pages", "recurrent", "--out", str(tmp_path / "index.html")]
    assert main([*arguments, "--recurrent-picture", str(tmp_path / "a.png")]) == 1
    html = (tmp_path / "recurrent.html").read_text()
    assert "Left out: the rated film reviews cannot be had: no network." in html
    assert "Dates in words" in html
    error = capsys.readouterr().err
    assert "Left out, reviews: " in error
    assert "xai_fast demo: recurrent picture: left out, the rated film reviews" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "recurrent.html"], "out: expected another name than recurrent.html"),
        (["--pages", "rollout", "--recurrent-picture", "a.png"], "recurrent_picture: expected the page"),
    ],
)
def test_contradictions(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert f"xai_fast demo: {message}" in capsys.readouterr().err


def test_page_of_what_was_measured() -> None:
    """Numbers of the page are those of the results; wrong verdicts on negations are marked."""
    reviews = _reviews([1, 1, 0, 0], [1, 0, 0, 0])
    judged = JudgedReviews(
        reviews, [1, 0, 0, 0], [0, 0, 0, 0], agreements(reviews.compared), named_words(reviews.compared, {"good": 2.0})
    )
    dates = dataclasses.replace(explain_dates(count=40, tests=10, epochs=1, dim=4, hidden=4), accuracy=0.125)
    html = unescape(build_recurrent_page(judged, dates, _costs(), [("Other", "other.html")]).html())
    for share in (75, 100, 75, 75):
        error = 100 * math.sqrt(share / 100 * (1 - share / 100) / 4)
        assert f"{share:.1f} ± {error:.1f}\u00a0%" in html
    assert 'title="good: 2"' not in html
    assert 'title="good: +0.4"' in html
    assert 'title="good: +2"' in html
    assert "13\u00a0% of these are written without a fault" in html or "12\u00a0% of these" in html
    assert "where " + dates.alignments[0].date.written + " is right" in html
    assert "90\u00a0%</td><td>20\u00a0%</td>" in html.replace("\n", "")
    wrong = dataclasses.replace(reviews, negations=[_negation("good", 1, 0.8)])
    html = build_recurrent_page(dataclasses.replace(judged, reviews=wrong), dates, _costs()).html()
    assert "80\u00a0% ✗" in html


# ---- sentences that turn with the numbers ---------------------------------------------------------------------------------


def test_accuracy_finding() -> None:
    labels = [1] * 50 + [0] * 50
    ahead, behind = labels, [1 - label for label in labels[:20]] + labels[20:]
    assert findings.accuracy_finding(_reviews(ahead, labels), behind).startswith("The network is ahead of the bag of words")
    lost = findings.accuracy_finding(_reviews(behind, labels), ahead)
    assert lost.startswith("The bag of words is ahead of the network")
    assert "\N{MINUS SIGN}20.0 ± 4.0 points" in lost
    even = findings.accuracy_finding(_reviews([1 - labels[0], *labels[1:]], labels), [*labels[:-1], 1 - labels[-1]])
    assert "nothing by it that could be told from chance" in even


def test_example_finding() -> None:
    right = findings.example_finding(_sentence("dull but great", [-0.2, 0.0, 0.6], label=1))
    assert right == (
        "“dull but great.” is judged as praise (90\u00a0%), as it is meant. By signed attention “great” speaks most "
        "for that (0.60), “dull” most against it (\N{MINUS SIGN}0.20)."
    )
    wrong = findings.example_finding(_sentence("not bad", [-0.001, 0.3], praise=0.1, label=1))
    assert "judged as blame (90\u00a0%), but meant as praise: a wrong verdict" in wrong
    assert wrong.endswith("no word that counts speaks against it.")
    assert "meant" not in findings.example_finding(_sentence("a b", [0.1, 0.2], label=None))


def test_negation_findings() -> None:
    praise = [_negation("good", 1, 0.2)] * 3
    understood = findings.negation_findings([*praise, *[_negation("bad", 0, 0.9)] * 3])
    assert understood[-1].startswith("It mostly turns the next word round")
    blaming = findings.negation_findings([*praise, *[_negation("bad", 0, 0.1)] * 3])
    assert "right about 6 of 6 sentences without “not”" in blaming[0]
    assert "right about 3 of 3 words of praise and about 0 of 3 words of blame" in blaming[0]
    assert "in 3 of 3 sentences" in blaming[1]
    assert blaming[-1].startswith("It has learnt “not” as a word of blame")
    # "Not" against a verdict of blame is on the side of praise; against one of praise, on that of blame.
    assert "in 0 of 3 sentences" in findings.negation_findings([*praise, *[_negation("bad", 0, 0.1, -0.5)] * 3])[1]
    assert "in 3 of 3 sentences" in findings.negation_findings([*praise, *[_negation("bad", 0, 0.9, -0.5)] * 3])[1]


def test_agreement_findings() -> None:
    def found(signed: float, plain: float) -> dict[str, Agreement]:
        wave = torch.linspace(-0.01, 0.01, 20)
        values = {SIGNED: wave + signed, PLAIN: wave.flip(0) + plain, RANDOM: wave}
        return {name: Agreement(rank, rank.abs(), rank > 0) for name, rank in values.items()}

    better = findings.agreement_findings(found(0.6, 0.2))
    assert better[0].startswith(
        "With signs: signed attention agrees better with leaving words out (signed 0.60, plain 0.20)."
    )
    assert "plain attention agrees better" in findings.agreement_findings(found(0.2, 0.6))[1]
    assert "no difference between the two can be told from chance" in findings.agreement_findings(found(0.2, 0.2))[0]


def test_named_findings() -> None:
    ones, zeros = torch.ones(40), torch.zeros(40)
    half = torch.arange(40) % 2 * 1.0

    def found(signed: torch.Tensor, plain: torch.Tensor, sign: torch.Tensor) -> list[str]:
        values = {
            name: NamedWords(top, half / 2, top[top > 0], half, sign)
            for name, top in ((SIGNED, signed), (PLAIN, plain), (RANDOM, half), (WITHOUT, half))
        }
        return findings.named_findings(values)

    first, second, third = found(ones, half, ones)
    assert "Signed attention names one more often (signed 100\u00a0%, plain 50\u00a0%)" in first
    assert "in 25\u00a0%, the token that is left out" in first
    assert "in 100\u00a0% (signed), 100\u00a0% (plain)" in second
    assert "That is better than the rule" in third
    first, second, third = found(zeros, half, zeros)
    assert "Plain attention names one more often" in first
    assert "in no case (signed)" in second
    assert "That is worse than the rule" in third
    assert "That cannot be told from the rule" in found(half, half, half)[2]


def test_date_findings() -> None:
    alike = findings.date_findings(_dates())
    assert "3.0 times what uniform attention would have there (30\u00a0%)" in alike[0]
    assert "are alike" in alike[1]
    assert "for 90\u00a0% of the dashes" in alike[-1]
    assert "less sure" in alike[-1]
    shares = _dates().shares | {"month": Share(0.9, 0.5, 0.1), "day": Share(0.5, 0.9, 0.1)}
    turned = findings.date_findings(_dates(shares=shares, against={"year": 0, "month": 0, "day": 0, "-": 0.1}))
    assert (
        "less of its weight on the right part than plain attention for the month (50\u00a0% against 90\u00a0%)" in turned[1]
    )
    assert "more of its weight on the right part than plain attention for the day" in turned[2]
    assert "less sure" not in turned[-1]


def test_cost_finding() -> None:
    assert "take 1/4.0 of the time and 1/50.0 of the memory" in findings.cost_finding(_costs())
    assert "take 2.0 times the time of" in findings.cost_finding(_costs(0.8, 0.4, None))


# ---- the checks -----------------------------------------------------------------------------------------------------------


def test_agreement_with_leaving_out() -> None:
    """Plain attention has the order of the sizes, signed attention that of the signed effects."""
    effects = [-3.0, 0.5, 1.0, 2.0]
    sentence = _sentence("a b c d", effects, attention=[0.4, 0.1, 0.2, 0.3])
    found = agreements([sentence, _sentence("a b", [0.1, 0.2])])
    assert {len(found[name].rank) for name in METHODS} == {1}
    assert (found[SIGNED].rank.item(), found[SIGNED].size.item(), found[SIGNED].top.item()) == (1, 1, 1)
    assert (found[PLAIN].size.item(), found[PLAIN].top.item()) == (1, 0)
    assert found[PLAIN].rank.item() == pytest.approx(-0.2)
    assert torch.equal(weights_of(sentence, RANDOM), weights_of(sentence, RANDOM))


def test_named_words() -> None:
    lexicon = {"good": 2.0, "bad": -2.0}
    praise = _sentence("a good bad film", [0.0, 0.5, -0.1, 0.0], attention=[0.1, 0.2, 0.6, 0.1])
    blame = _sentence("so bad", [0.4, 0.3], praise=0.2)
    found = named_words([praise, blame, _sentence("no rated words", [0.1, 0.2, 0.3])], lexicon)
    assert found[SIGNED].top_rated.tolist() == [1, 0]
    assert found[SIGNED].top_for.tolist() == [1]
    assert found[PLAIN].top_for.tolist()[0] == 0
    assert found[SIGNED].rated.tolist() == [0.5, 0.5]
    # "bad" speaks against praise and for blame.
    assert found[SIGNED].word_for.tolist() == [1, 0, 1]
    assert found[SIGNED].sign_right.tolist() == [1, 1, 1]
    assert found[PLAIN].sign_right.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="sentences: expected at least one with a rated word, got none"):
        named_words([praise], {})


def test_baselines() -> None:
    train = [Review("a good film", 2.0), Review("a bad film", -2.0)] * 4
    held = [Review("so good, so bad", 1.0), Review("good", 1.0), Review("bad!", -1.0)]
    assert bag_of_words(train, held)[1:] == [1, 0]
    assert lexicon_verdicts(held, {"good": 1.0, "bad": -1.0}, otherwise=1) == [1, 1, 0]
    difference, error = paired_difference([1, 1, 0], [1, 0, 0], [1, 1, 0])
    assert (difference, error) == pytest.approx((1 / 3, 1 / 3))


def test_mean_error() -> None:
    assert mean_error(torch.tensor([1.0, math.nan])) == (1.0, pytest.approx(math.nan, nan_ok=True))
    assert math.isnan(mean_error(torch.tensor([math.nan]))[0])


def test_costs_are_of_the_same_weights() -> None:
    ticks: list[int] = []
    found = cost_additive(CPU, 1, batch=2, queries=3, keys=7, hidden=16, tick=lambda: ticks.append(1))
    assert len(ticks) == 4 * 3
    assert len(found.measured) == 4
    assert found.disagreement < 1e-6
    assert found.hidden_bytes == 4 * 2 * 3 * 7 * 16


def test_texts_of_the_picture_are_wrapped() -> None:
    tokens = ("one", "two", "three", "four", ",", "five")
    in_one = _wrapped(tokens, 100)
    assert [word.text for word in in_one] == list(tokens)
    assert {word.line for word in in_one} == {0}
    # The comma stays with its word.
    room = in_one[4].left + in_one[4].width - in_one[3].left
    lines = [(word.text, word.line, word.left) for word in _wrapped(tokens, room)]
    assert [line for _, line, _ in lines] == [0, 1, 2, 3, 3, 4]
    assert all(left == 0 for text, _, left in lines if text != ",")
