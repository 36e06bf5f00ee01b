"""Answers of people: reading the tables that the forms make, and scores with intervals."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from xai_fast.ops._checks import check_count, check_iterable, check_number, check_seed

from .forms import COLUMNS, FORMAT
from .questions import SCALE

__all__ = ["Answer", "HumanScore", "HumanScores", "read_answers", "score"]

Source: TypeAlias = "str | os.PathLike[str] | io.TextIOBase"
Manifest: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"

PAGE_KIND = {"class": "choice", "check": "choice", "trust": "scale"}


@dataclass(frozen=True)
class Answer:
    """One answer of one person.

    Attributes
    ----------
    participant : str
    version : int
    question : str
        The question's id in the manifest.
    answer : str or int
        The option chosen, or -2 to 2 of a trust question: toward robot B, whoever stood there in this version.
    response_time_ms : int
    position : int
        Place in the form, from 1.

    Examples
    --------
    >>> Answer("p1", 1, "class-1", "cat", response_time_ms=1800, position=1).answer
    'cat'
    """

    participant: str
    version: int
    question: str
    answer: str | int
    response_time_ms: int
    position: int


@dataclass(frozen=True)
class HumanScore:
    """One row of the scores: a method's accuracy, or its mean trust for a pair of models.

    Attributes
    ----------
    kind : {"class", "trust"}
    method : str
    toward, against : str
        The models of a trust question: `value` is positive toward the first. Empty for accuracies.
    value : float
        Share of right answers, or mean trust from -2 to 2.
    low, high : float
        Interval, NaN where one answer alone leaves nothing to resample.
    p_value : float
        Two-sided, against guessing.
    n_answers, n_participants, n_questions : int
    median_response_ms : float

    Examples
    --------
    >>> HumanScore("class", "gradient", "", "", 0.75, 0.5, 1.0, 0.3, 8, 4, 2, 1500.0).value
    0.75
    """

    kind: str
    method: str
    toward: str
    against: str
    value: float
    low: float
    high: float
    p_value: float
    n_answers: int
    n_participants: int
    n_questions: int
    median_response_ms: float


@dataclass(frozen=True)
class HumanScores:
    """What `score` returns.

    Attributes
    ----------
    rows : tuple of HumanScore
        Accuracies first, in the manifest's order.
    kept : tuple of str
        Participants who count.
    dropped : dict of str to str
        Participants who do not, with the reason.
    resampled : {"participants", "questions"}
        What the bootstrap drew: questions where one participant is all there is. Such an interval says nothing about people.
    confidence : float
    n_bootstrap, seed : int

    Examples
    --------
    >>> HumanScores((), ("p1",), {"p2": "failed 1 of 1 attention checks"}, "questions", 0.95, 2000, 0).table()
    []
    """

    rows: tuple[HumanScore, ...]
    kept: tuple[str, ...]
    dropped: dict[str, str]
    resampled: str
    confidence: float
    n_bootstrap: int
    seed: int

    def table(self) -> list[dict[str, Any]]:
        """The rows as dictionaries with the same keys, as ``pandas.DataFrame`` takes them."""
        return [asdict(row) for row in self.rows]


def read_answers(sources: Source | Iterable[Source], manifest: Manifest, *, allow_missing: bool = False) -> list[Answer]:
    """Read and check the tables that participants handed in.

    Parameters
    ----------
    sources : path or text file, or several
        CSV files from the forms; several participants may stand in one file below a single header. A table that a crowd-work
        platform returns as text can be passed as ``io.StringIO(text)``.
    manifest : dict or path
        `Form.manifest`, or the ``manifest.json`` written beside the forms.
    allow_missing : bool
        Let participants pass who did not answer everything; `score` drops and names them.

    Returns
    -------
    list of Answer
        As they stand in the files.

    Raises
    ------
    ValueError
        In one line with file and row: a table of another study, unknown versions and questions, answers that the question
        does not have, positions that the version does not have, an answer given twice, a participant with two versions,
        missing answers.

    Examples
    --------
    >>> from xai_fast.metrics.human import ClassQuestion, ColoredText, build_form
    >>> question = ClassQuestion(ColoredText(["a", " cat"], [0, 1]), ("cat", "dog"), answer="cat")
    >>> manifest = build_form([question], title="Study", introduction="Welcome.").manifest
    >>> study, key = manifest["study"], manifest["questions"][0]["key"]
    >>> table = f"{','.join(COLUMNS)}\\n{study},p1,1,{key},choice,dog,1800,1\\n"
    >>> read_answers(io.StringIO(table), manifest)
    [Answer(participant='p1', version=1, question='class-1', answer='dog', response_time_ms=1800, position=1)]
    """
    reader = _Reader(_study(manifest))
    for number, source in enumerate(_listed(sources), 1):
        reader.read(*_opened(source, number))
    if not allow_missing:
        reader.check_complete()
    return list(reader.answers.values())


def score(
    answers: Sequence[Answer],
    manifest: Manifest,
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    max_failed_checks: int = 0,
) -> HumanScores:
    """Accuracy of each method and mean trust of each pair of models, with intervals.

    Parameters
    ----------
    answers : sequence of Answer
        From `read_answers`.
    manifest : dict or path
        As for `read_answers`.
    n_bootstrap : int
        Resamples of the percentile bootstrap.
    confidence : float
        Coverage of the intervals, between 0 and 1.
    seed : int
        Of the bootstrap. The same seed gives the same intervals.
    max_failed_checks : int
        Participants who miss more attention checks are dropped.

    Returns
    -------
    HumanScores

    Raises
    ------
    ValueError
        No participant is left, or an argument is out of range.

    Notes
    -----
    People differ, and answers of one person hang together; so the bootstrap draws whole participants (Field and Welsh 2007,
    "Bootstrapping clustered data"). A single participant's answers are drawn one by one, see `HumanScores.resampled`.

    `p_value` is the exact two-sided binomial test: of the right answers against 1/2, or, for trust, of the answers toward
    either model against 1/2 (a sign test, "equally" left out). It takes answers as independent, so with several from one
    person it is too small when people differ much: then trust the interval. Where every answer is "equally" it is 1.

    The questions and the scale from -2 to 2: Selvaraju et al. 2017 (Grad-CAM), section 5; see `build_form`.

    Examples
    --------
    >>> from xai_fast.metrics.human import Answer, ClassQuestion, ColoredText, build_form
    >>> picture = ColoredText(["a", " cat"], [0, 1])
    >>> questions = [ClassQuestion(picture, ("cat", "dog"), answer="cat", method=name) for name in ("ours", "noise")]
    >>> manifest = build_form(questions, title="Study", introduction="Welcome.").manifest
    >>> answers = [Answer(person, 1, "class-1", "cat", 900, 1) for person in "abcd"]
    >>> answers += [Answer(person, 1, "class-2", "dog", 900, 2) for person in "abcd"]
    >>> [(row["method"], row["value"], row["p_value"]) for row in score(answers, manifest).table()]
    [('ours', 1.0, 0.125), ('noise', 0.0, 0.125)]
    """
    study = _study(manifest)
    n_bootstrap = check_count(n_bootstrap, "n_bootstrap")
    max_failed_checks = check_count(max_failed_checks, "max_failed_checks", 0)
    seed = check_seed(seed)
    if not 0 < check_number(confidence, "confidence") < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    check_iterable(answers, "answers", "a sequence of Answer")
    answers = list(answers)
    _check_known(answers, study)
    kept, dropped = _select(answers, study, max_failed_checks)
    if not kept:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(dropped.items())[:3])
        raise ValueError(f"answers: expected at least one participant to keep, got none of {len(dropped)} ({reasons})")
    rows = [
        _row(group, kept, _Interval(n_bootstrap, confidence, seed), study)
        for group in _groups(study, [answer for answer in answers if answer.participant in kept])
    ]
    resampled = "participants" if len(kept) > 1 else "questions"
    return HumanScores(tuple(rows), tuple(kept), dropped, resampled, float(confidence), n_bootstrap, seed)


@dataclass(frozen=True)
class _Study:
    """The manifest by key and by version."""

    name: str
    questions: dict[str, dict[str, Any]]
    ids: dict[str, str]
    versions: dict[int, dict[str, dict[str, Any]]]


def _study(manifest: Manifest) -> _Study:
    if isinstance(manifest, (str, os.PathLike)):
        manifest = json.loads(Path(manifest).read_text(encoding="utf-8"))
    found = manifest.get("format") if isinstance(manifest, Mapping) else type(manifest).__name__
    if not isinstance(manifest, Mapping) or found != FORMAT:
        raise ValueError(f"manifest: expected one with format {FORMAT!r}, got {found!r}")
    return _Study(
        manifest["study"],
        {question["id"]: dict(question) for question in manifest["questions"]},
        {question["key"]: question["id"] for question in manifest["questions"]},
        {shown["version"]: {entry["question"]: entry for entry in shown["order"]} for shown in manifest["versions"]},
    )


class _Reader:
    """Checks row by row what a table says against the study."""

    def __init__(self, study: _Study) -> None:
        self.study = study
        self.answers: dict[tuple[str, str], Answer] = {}
        self._place: dict[tuple[str, str], str] = {}
        self._last: dict[str, tuple[int, str]] = {}

    def read(self, name: str, text: str) -> None:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        place = f"{name}, row 1"
        try:
            header = next(rows, [])
            if tuple(header) != COLUMNS:
                raise ValueError(f"expected the columns {','.join(COLUMNS)}, got {','.join(header) or 'none'}")
            place = f"{name}, row 2"
            for number, cells in enumerate(rows, 2):
                if cells:
                    self._take(cells, place)
                place = f"{name}, row {number + 1}"
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{place}: {error}") from None

    def check_complete(self) -> None:
        for participant, (version, place) in self._last.items():
            wanted = self.study.versions[version]
            if missing := [question for question in wanted if (participant, question) not in self.answers]:
                raise ValueError(
                    f"{place}: expected all {len(wanted)} answers of participant {participant!r}, "
                    f"got {len(wanted) - len(missing)}, {missing[0]!r} is missing"
                )

    def _take(self, cells: list[str], place: str) -> None:
        if len(cells) != len(COLUMNS):
            raise ValueError(f"expected {len(COLUMNS)} cells, got {len(cells)}")
        row = dict(zip(COLUMNS, cells, strict=True))
        answer = self._checked(row)
        before = self._last.get(answer.participant, (answer.version, ""))
        if before[0] != answer.version:
            wanted = f"{before[0]} of participant {answer.participant!r}, as at {before[1]}"
            raise ValueError(f"version: expected {wanted}, got {answer.version}")
        key = (answer.participant, answer.question)
        if key in self._place:
            raise ValueError(
                f"expected one answer to {key[1]!r} by participant {key[0]!r}, got another at {self._place[key]}"
            )
        self.answers[key] = answer
        self._place[key] = place
        self._last[answer.participant] = (answer.version, place)

    def _checked(self, row: Mapping[str, str]) -> Answer:
        if row["study"] != self.study.name:
            raise ValueError(f"study: expected {self.study.name!r}, got {row['study']!r}")
        if not row["participant"].strip():
            raise ValueError("participant: expected a name, got none")
        version = _whole(row, "version")
        if version not in self.study.versions:
            raise ValueError(f"version: expected 1 to {len(self.study.versions)}, got {version}")
        if row["question"] not in self.study.ids:
            raise ValueError(f"question: expected one of the manifest, got {row['question']!r}")
        question = self.study.questions[self.study.ids[row["question"]]]
        if row["kind"] != PAGE_KIND[question["kind"]]:
            raise ValueError(f"kind: expected {PAGE_KIND[question['kind']]!r}, got {row['kind']!r}")
        position, wanted = _whole(row, "position"), self.study.versions[version][question["id"]]["position"]
        if position != wanted:
            raise ValueError(f"position: expected {wanted} for {question['id']!r} in version {version}, got {position}")
        time = _whole(row, "response_time_ms")
        return Answer(row["participant"].strip(), version, question["id"], _given(row["answer"], question), time, position)


def _whole(row: Mapping[str, str], column: str) -> int:
    text = row[column].strip()
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{column}: expected a whole number, got {row[column]!r}")
    return int(text)


def _given(answer: str, question: Mapping[str, Any]) -> str | int:
    if question["kind"] != "trust":
        if answer not in question["options"]:
            raise ValueError(f"answer: expected one of {question['options']}, got {answer!r}")
        return answer
    values = {str(value): value for value, _ in SCALE}
    if answer.strip() not in values:
        raise ValueError(f"answer: expected one of {', '.join(values)}, got {answer!r}")
    return values[answer.strip()]


def _listed(sources: Any) -> list[Source]:
    if isinstance(sources, (str, os.PathLike)) or hasattr(sources, "read"):
        return [sources]
    check_iterable(sources, "sources", "a path, a text file or several")
    return list(sources)


def _opened(source: Any, number: int) -> tuple[str, str]:
    """Name and text of a table."""
    if hasattr(source, "read"):
        return str(getattr(source, "name", f"text {number}")), str(source.read())
    # Spreadsheets put a byte order mark in front.
    with open(source, encoding="utf-8-sig", newline="") as file:
        try:
            return Path(source).name, file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{Path(source).name}, row 1: expected UTF-8 text, got {error.reason}") from None


def _check_known(answers: Sequence[Answer], study: _Study) -> None:
    """Answers that were not read by `read_answers` may fit no study, or be there twice."""
    seen = set()
    for answer in answers:
        if not isinstance(answer, Answer):
            raise TypeError(f"answers: expected Answer, got {type(answer).__name__}")
        if answer.question not in study.versions.get(answer.version, {}):
            raise ValueError(
                f"answers: expected questions of the manifest, got {answer.question!r} in version {answer.version}"
            )
        if (key := (answer.participant, answer.question)) in seen:
            raise ValueError(f"answers: expected one answer to {key[1]!r} by participant {key[0]!r}, got two")
        seen.add(key)


def _select(answers: Sequence[Answer], study: _Study, max_failed: int) -> tuple[list[str], dict[str, str]]:
    """Participants to keep, and the others with the reason."""
    given: dict[str, list[Answer]] = {}
    for answer in answers:
        given.setdefault(answer.participant, []).append(answer)
    checks = [question for question in study.questions.values() if question["kind"] == "check"]
    kept, dropped = [], {}
    for name, own in given.items():
        missing = len(study.versions[own[0].version]) - len(own)
        chosen = {answer.question: answer.answer for answer in own}
        failed = sum(chosen.get(check["id"]) != check["answer"] for check in checks)
        if missing:
            dropped[name] = f"left {missing} of {missing + len(own)} questions unanswered"
        elif failed > max_failed:
            dropped[name] = f"failed {failed} of {len(checks)} attention checks"
        else:
            kept.append(name)
    return kept, dropped


@dataclass
class _Group:
    """Answers that make one row; `values` are 0 and 1 for a class question, -2 to 2 for trust."""

    kind: str
    method: str
    toward: str
    against: str
    answers: list[Answer]
    values: list[float]


def _groups(study: _Study, answers: Iterable[Answer]) -> list[_Group]:
    """Accuracies by method, then trust by method and pair of models, in the manifest's order."""
    groups: dict[tuple[Any, ...], _Group] = {}
    group_of: dict[str, tuple[_Group, bool]] = {}
    for question in sorted(study.questions.values(), key=lambda question: question["kind"] != "class"):
        if question["kind"] == "check":
            continue
        models = question.get("models", ["", ""])
        key = (question["kind"], question["method"], frozenset(models))
        group = groups.setdefault(key, _Group(question["kind"], question["method"], models[0], models[1], [], []))
        group_of[question["id"]] = group, question["kind"] == "trust"
    for answer in answers:
        if answer.question in group_of:
            group, trust = group_of[answer.question]
            group.answers.append(answer)
            group.values.append(_toward(answer, group, study) if trust else _right(answer, study))
    return [group for group in groups.values() if group.answers]


def _right(answer: Answer, study: _Study) -> float:
    return float(answer.answer == study.questions[answer.question]["answer"])


def _toward(answer: Answer, group: _Group, study: _Study) -> float:
    """Trust toward the group's first model: the page's value grows toward robot B."""
    sides = study.versions[answer.version][answer.question]["sides"]
    return float(answer.answer) if sides["B"] == group.toward else -float(answer.answer)


def _row(group: _Group, kept: Sequence[str], interval: _Interval, study: _Study) -> HumanScore:
    values = np.array(group.values)
    # An answer alone is its own cluster where there is one participant.
    owners = [answer.participant for answer in group.answers] if len(kept) > 1 else list(range(len(values)))
    low, high = interval.of_mean(values, owners)
    favour = int((values > 0).sum())
    decided = len(values) if group.kind == "class" else int((values != 0).sum())
    return HumanScore(
        group.kind,
        group.method,
        group.toward,
        group.against,
        float(values.mean()),
        low,
        high,
        binomial_p(favour, decided),
        len(values),
        len({answer.participant for answer in group.answers}),
        len({answer.question for answer in group.answers}),
        float(median(answer.response_time_ms for answer in group.answers)),
    )


@dataclass(frozen=True)
class _Interval:
    """Percentile bootstrap of a mean over clusters."""

    n_bootstrap: int
    confidence: float
    seed: int

    def of_mean(self, values: np.ndarray, owners: Sequence[Any]) -> tuple[float, float]:
        clusters = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
        if len(clusters) < 2:
            return math.nan, math.nan
        places = [clusters[owner] for owner in owners]
        sums, counts = np.bincount(places, weights=values), np.bincount(places)
        rng = np.random.default_rng(self.seed)
        drawn = rng.integers(0, len(clusters), (self.n_bootstrap, len(clusters)))
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        tail = 50 * (1 - self.confidence)
        low, high = np.percentile(means, [tail, 100 - tail])
        return float(low), float(high)


def binomial_p(successes: int, trials: int) -> float:
    """Exact two-sided binomial test against 1/2: twice the smaller tail, at most 1.

    Examples
    --------
    >>> binomial_p(9, 10)  # 2 * (1 + 10) / 1024
    0.021484375
    """
    tail, term = 0, 1
    for count in range(min(successes, trials - successes) + 1):
        tail += term
        term = term * (trials - count) // (count + 1)
    # Whole numbers as long as possible: 2 ** trials is more than a float holds.
    return min(1.0, 2 * tail / 2**trials)
