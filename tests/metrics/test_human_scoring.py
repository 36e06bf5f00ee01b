"""Scores of people's answers: values worked out by hand, intervals, tables that are wrong."""

from __future__ import annotations

import io
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xai_fast.metrics.human import (
    Answer,
    AttentionCheck,
    ClassQuestion,
    ColoredText,
    Form,
    HumanScores,
    TrustQuestion,
    build_form,
    read_answers,
    score,
)
from xai_fast.metrics.human.scoring import COLUMNS, binomial_p

TEXT = ColoredText(["bad", " good"], [0.0, 1.0])
GIVEN = {"ours-1": "cat", "ours-2": "cat", "noise-1": "cat", "t-1": 2, "t-2": -1, "check-1": "yes", "check-2": "yes"}


def _form(n_versions: int = 4) -> Form:
    """Two questions on "ours", one on "noise" (the right answer is always "cat"), two on trust, two checks."""
    classes = [
        ClassQuestion(TEXT, ("cat", "dog"), answer="cat", method=method, id=name)
        for name, method in (("ours-1", "ours"), ("ours-2", "ours"), ("noise-1", "noise"))
    ]
    trust = [
        TrustQuestion(None, (TEXT, TEXT), ("vgg", "alexnet"), prediction="cat", method="ours", id="t-1"),
        # The same pair named the other way round: its score joins that of t-1 with the sign turned.
        TrustQuestion(None, (TEXT, TEXT), ("alexnet", "vgg"), prediction="dog", method="ours", id="t-2"),
    ]
    checks = [AttentionCheck("yes?", ("yes", "no"), answer="yes") for _ in range(2)]
    return build_form([*classes, *trust], title="Study", introduction="Welcome.", checks=checks, n_versions=n_versions)


FORM = _form()
MANIFEST = FORM.manifest
KEYS = {question["id"]: (question["key"], question["kind"]) for question in MANIFEST["questions"]}


def _rows(participant: str, version: int = 1, **given: Any) -> list[list[str]]:
    """A participant's rows as the page writes them; trust is given toward "vgg", the first model of t-1."""
    wanted = {**GIVEN, **{name.replace("_", "-"): value for name, value in given.items()}}
    rows = []
    for shown in MANIFEST["versions"][version - 1]["order"]:
        key, kind = KEYS[shown["question"]]
        value = wanted[shown["question"]]
        if kind == "trust" and shown["sides"]["A"] == "vgg":
            value = -value
        page_kind = "scale" if kind == "trust" else "choice"
        place = shown["position"]
        rows.append(
            [MANIFEST["study"], participant, str(version), key, page_kind, str(value), str(1000 * place), str(place)]
        )
    return rows


def _table(*rows: list[str]) -> io.StringIO:
    return io.StringIO("".join(",".join(row) + "\r\n" for row in (COLUMNS, *rows)))


def _answers(**people: dict[str, Any]) -> list[Answer]:
    tables = [_rows(name, 1 + place % 4, **given) for place, (name, given) in enumerate(people.items())]
    return read_answers([_table(*rows) for rows in tables], MANIFEST)


def test_scores_by_hand() -> None:
    scores = score(
        _answers(
            a={},  # ours 2 of 2, noise 1 of 1, trust 2 and -1
            b={"ours_2": "dog", "noise_1": "dog", "t_1": 1, "t_2": 0},
            c={"noise_1": "dog", "t_1": 2, "t_2": 2},
        ),
        MANIFEST,
    )
    ours, noise, trust = scores.rows
    assert (ours.kind, ours.method, ours.toward, ours.n_answers, ours.n_questions) == ("class", "ours", "", 6, 2)
    assert ours.value == 5 / 6
    assert ours.p_value == 14 / 64  # 2 * (1 + 6) / 2 ** 6
    assert (noise.value, noise.n_answers, noise.n_participants, noise.p_value) == (1 / 3, 3, 3, 1.0)
    assert (trust.kind, trust.method, trust.toward, trust.against) == ("trust", "ours", "vgg", "alexnet")
    assert trust.value == (2 - 1 + 1 + 0 + 2 + 2) / 6
    assert trust.p_value == 12 / 32  # 4 of 5 decided answers: 2 * (1 + 5) / 2 ** 5
    assert scores.kept == ("a", "b", "c")
    assert scores.dropped == {}
    assert scores.resampled == "participants"


def test_response_times_are_medians() -> None:
    answers = _answers(a={}, b={})
    times = sorted(answer.response_time_ms for answer in answers if answer.question == "noise-1")
    assert score(answers, MANIFEST).rows[1].median_response_ms == sum(times) / 2


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_trust_is_toward_the_model_wherever_it_stood(version: int) -> None:
    answers = read_answers(_table(*_rows("p", version, t_1=2, t_2=2)), MANIFEST)
    row = score(answers, MANIFEST).rows[2]
    assert (row.toward, row.value) == ("vgg", 2.0)


def test_sides_do_differ_between_versions() -> None:
    """Otherwise the test above would prove nothing."""
    sides = {
        shown["sides"]["A"] for version in MANIFEST["versions"] for shown in version["order"] if shown["question"] == "t-1"
    }
    assert sides == {"vgg", "alexnet"}


def test_failed_checks_drop_a_participant() -> None:
    answers = _answers(good={}, once={"check_1": "no", "noise_1": "dog"}, twice={"check_1": "no", "check_2": "no"})
    strict = score(answers, MANIFEST)
    assert strict.kept == ("good",)
    assert strict.dropped == {"once": "failed 1 of 2 attention checks", "twice": "failed 2 of 2 attention checks"}
    assert strict.rows[1].value == 1.0
    lenient = score(answers, MANIFEST, max_failed_checks=1)
    assert lenient.kept == ("good", "once")
    assert lenient.rows[1].value == 0.5
    with pytest.raises(
        ValueError, match=r"answers: expected at least one participant to keep, got none of 1 \(p failed 1 of 2"
    ):
        score(_answers(p={"check_2": "no"}), MANIFEST)


def test_the_bootstrap_draws_participants() -> None:
    """Two people, one always right, one always wrong: a resample has mean 0, 1/2 or 1, with shares 1/4, 1/2, 1/4."""
    wrong = {"ours_1": "dog", "ours_2": "dog"}
    answers = _answers(right={}, wrong=wrong)
    # Four answers drawn one by one would all be wrong in 1 of 16 resamples only.
    wide = score(answers, MANIFEST, confidence=0.8).rows[0]
    assert (wide.low, wide.value, wide.high) == (0.0, 0.5, 1.0)
    narrow = score(answers, MANIFEST, confidence=0.3).rows[0]
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.7
    people = {f"p{place}": {} if hit else {"noise_1": "dog"} for place, hit in enumerate(right)}
    row = score(_answers(**people), MANIFEST, n_bootstrap=4000).rows[1]
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 200)
    assert row.value == right.mean()
    assert row.low == pytest.approx(right.mean() - half, abs=0.006)
    assert row.high == pytest.approx(right.mean() + half, abs=0.006)


def test_the_interval_covers_the_truth() -> None:
    """Nominal 90 %: over 200 studies of 40 people, the share that covers lies within 3 standard errors of 90 %."""
    rng = np.random.default_rng(1)
    covered = 0
    for study in range(200):
        people = [
            Answer(f"p{place}", 1, "q", "cat" if hit else "dog", 1, 1) for place, hit in enumerate(rng.random(40) < 0.6)
        ]
        row = score(people, _one_question(), n_bootstrap=300, confidence=0.9, seed=study).rows[0]
        covered += row.low <= 0.6 <= row.high
    assert abs(covered / 200 - 0.9) <= 3 * math.sqrt(0.09 / 200)


def _one_question() -> dict[str, Any]:
    question = ClassQuestion(TEXT, ("cat", "dog"), answer="cat", id="q")
    return build_form([question], title="Study", introduction="Welcome.").manifest


def test_the_seed_decides_the_interval() -> None:
    people: dict[str, Any] = {f"p{place}": {"t_1": place % 5 - 2} for place in range(7)}
    answers = _answers(**people)
    runs: list[HumanScores] = [score(answers, MANIFEST, n_bootstrap=50, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].rows[2] != runs[2].rows[2]
    assert (runs[0].rows[2].low, runs[0].rows[2].high) != (runs[2].rows[2].low, runs[2].rows[2].high)


def test_one_participant_resamples_questions() -> None:
    scores = score(_answers(p={"ours_2": "dog"}), MANIFEST, confidence=0.9)
    assert scores.resampled == "questions"
    assert (scores.rows[0].low, scores.rows[0].high) == (0.0, 1.0)
    assert math.isnan(scores.rows[1].low)
    assert math.isnan(scores.rows[1].high)


def test_table_rows_share_their_keys() -> None:
    table = score(_answers(a={}, b={}), MANIFEST).table()
    assert [row["method"] for row in table] == ["ours", "noise", "ours"]
    assert len({tuple(row) for row in table}) == 1
    assert json.loads(json.dumps(table)) == table


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (0, 1), (5, 10), (9, 10), (10, 10), (27, 43), (3, 7), (80, 200)])
def test_binomial_p(successes: int, trials: int) -> None:
    """The sum of the probabilities of all outcomes that are no likelier than the one seen, in fractions."""
    chances = [Fraction(1)]
    for _ in range(trials):  # one coin after another
        chances = [(left + right) / 2 for left, right in zip([Fraction(0), *chances], [*chances, Fraction(0)], strict=True)]
    wanted = sum(chance for chance in chances if chance <= chances[successes])
    assert binomial_p(successes, trials) == pytest.approx(float(wanted), rel=1e-14)


def test_binomial_p_of_many_trials() -> None:
    assert binomial_p(5000, 10000) == 1.0
    assert 0 < binomial_p(4700, 10000) < 1e-8


def test_files_and_folders_of_spreadsheets(tmp_path: Path) -> None:
    """Two people in one file behind a byte order mark, another in its own file with plain line ends and an empty line."""
    both = _table(*_rows("a"), *_rows("b", 2)).getvalue()
    (tmp_path / "both.csv").write_bytes(b"\xef\xbb\xbf" + both.encode())
    (tmp_path / "c.csv").write_text(_table(*_rows("c", 3)).getvalue().replace("\r\n", "\n") + "\n", encoding="utf-8")
    FORM.write(tmp_path / "study")
    answers = read_answers(sorted(tmp_path.glob("*.csv")), tmp_path / "study" / "manifest.json")
    assert {answer.participant for answer in answers} == {"a", "b", "c"}
    assert len(answers) == 21
    assert answers == read_answers([str(tmp_path / "both.csv"), str(tmp_path / "c.csv")], MANIFEST)


def _spoiled(row: int, column: str, value: str) -> list[list[str]]:
    rows = _rows("p")
    rows[row - 2][COLUMNS.index(column)] = value
    return rows


FIRST = next(row for row in _rows("p") if row[4] == "choice")
SCALE_ROW = 2 + next(place for place, row in enumerate(_rows("p")) if row[4] == "scale")
CHOICE_ROW = 2 + _rows("p").index(FIRST)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (3, "study", "0", f"row 3: study: expected '{MANIFEST['study']}', got '0'"),
        (3, "participant", " ", "row 3: participant: expected a name, got none"),
        (3, "version", "5", "row 3: version: expected 1 to 4, got 5"),
        (3, "version", "one", "row 3: version: expected a whole number, got 'one'"),
        (4, "version", "2", "row 4: (version|position): expected"),
        (3, "question", "class-1", "row 3: question: expected one of the manifest, got 'class-1'"),
        (SCALE_ROW, "kind", "choice", f"row {SCALE_ROW}: kind: expected 'scale', got 'choice'"),
        (SCALE_ROW, "answer", "3", f"row {SCALE_ROW}: answer: expected one of -2, -1, 0, 1, 2, got '3'"),
        (CHOICE_ROW, "answer", "bird", rf"row {CHOICE_ROW}: answer: expected one of \[.*\], got 'bird'"),
        (3, "response_time_ms", "-5", "row 3: response_time_ms: expected a whole number, got '-5'"),
        (3, "response_time_ms", "²", "row 3: response_time_ms: expected a whole number, got '²'"),
        (3, "position", "7", "row 3: position: expected 2 for '.*' in version 1, got 7"),
    ],
)
def test_a_spoiled_cell_is_named(row: int, column: str, value: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(_table(*_spoiled(row, column, value)).getvalue(), encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=rf"^p\.csv, {message}") as caught:
        read_answers(path, MANIFEST)
    assert "\n" not in str(caught.value)


def test_a_participant_has_one_version() -> None:
    with pytest.raises(
        ValueError, match="text 1, row 9: version: expected 1 of participant 'p', as at text 1, row 8, got 2"
    ):
        read_answers(_table(*_rows("p"), *_rows("p", 2)), MANIFEST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text 1, row 1: expected the columns study,.*, got none"),
        ("a,b\r\n", "text 1, row 1: expected the columns study,.*, got a,b"),
        (_table(FIRST[:-1]).getvalue(), "text 1, row 2: expected 8 cells, got 7"),
        (_table(["x", '"y"z']).getvalue(), "text 1, row 2: "),
    ],
)
def test_other_tables_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_answers(io.StringIO(text), MANIFEST)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p\.csv, row 1: expected UTF-8 text"):
        read_answers(tmp_path / "p.csv", MANIFEST)


def test_an_answer_given_twice_is_refused() -> None:
    rows = _rows("p")
    with pytest.raises(
        ValueError, match=r"text 1, row 9: expected one answer to '.*' by participant 'p', got another at text 1, row 4"
    ):
        read_answers(_table(*rows, rows[2]), MANIFEST)
    with pytest.raises(ValueError, match=r"text 2, row 2: expected one answer .* got another at text 1, row 2"):
        read_answers([_table(*rows), _table(*rows)], MANIFEST)


def test_missing_answers() -> None:
    missing = MANIFEST["versions"][0]["order"][-1]["question"]
    message = f"text 1, row 7: expected all 7 answers of participant 'p', got 6, '{missing}' is missing"
    table = _table(*_rows("p")[:-1])
    with pytest.raises(ValueError, match=message):
        read_answers(table, MANIFEST)
    table.seek(0)
    answers = read_answers([table, _table(*_rows("q"))], MANIFEST, allow_missing=True)
    scores = score(answers, MANIFEST)
    assert scores.kept == ("q",)
    assert scores.dropped == {"p": "left 1 of 7 questions unanswered"}


def test_other_arguments_are_checked() -> None:
    answers = _answers(p={})
    with pytest.raises(ValueError, match=r"confidence: expected a number between 0 and 1, got 1.5"):
        score(answers, MANIFEST, confidence=1.5)
    with pytest.raises(ValueError, match="n_bootstrap: expected a whole number of at least 1, got 0"):
        score(answers, MANIFEST, n_bootstrap=0)
    with pytest.raises(ValueError, match="max_failed_checks: expected a whole number of at least 0, got -1"):
        score(answers, MANIFEST, max_failed_checks=-1)
    with pytest.raises(ValueError, match="manifest: expected one with format 'xai_fast human study 1', got None"):
        score(answers, {})
    with pytest.raises(ValueError, match="answers: expected at least one participant to keep, got none of 0"):
        score([], MANIFEST)
    with pytest.raises(ValueError, match="answers: expected questions of the manifest, got 'x' in version 1"):
        score([Answer("p", 1, "x", "cat", 1, 1)], MANIFEST)
    with pytest.raises(ValueError, match=r"answers: expected one answer to '.*' by participant 'p', got two"):
        score([*answers, answers[0]], MANIFEST)
    with pytest.raises(TypeError, match="answers: expected a sequence of Answer, got str"):
        score("abc", MANIFEST)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="answers: expected Answer, got str"):
        score(["abc"], MANIFEST)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="sources: expected a path, a text file or several, got int"):
        read_answers(3, MANIFEST)  # type: ignore[arg-type]
