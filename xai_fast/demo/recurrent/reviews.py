"""Which words a review's verdict comes from: a BiLSTM with attention on film reviews that people rated, and its explanation.

The data are 10,605 sentences of film reviews with a mean rating from -4 to 4 (Hutto & Gilbert 2014, "VADER"; sentences of
Pang & Lee 2004), and ratings of some 7,500 words and signs by other people, in the source package of
``vaderSentiment==3.3.2``.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast.attention.rnn import PAD, BiLSTMClassifier

from ..datasets import ADULT
from ..fetch import obtain_sdist, tar_member
from ..repeatable import one_thread, repeatable

__all__ = [
    "EXAMPLES",
    "NEGATED",
    "Negation",
    "Review",
    "Reviews",
    "Sentence",
    "explain_reviews",
    "load_lexicon",
    "load_reviews",
    "tokenize",
]

SDIST = {"vaderSentiment-3.3.2.tar.gz": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"}
REQUIREMENT = "vaderSentiment==3.3.2"
# The sdist holds an archive, which holds the sentences.
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LEXICON = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"
# Sentences whose mean rating is nearer to zero are neither for nor against.
AMBIVALENT = 0.5

# With what is meant. The examples on which Jain & Wallace (2019), "Attention is not explanation", and Wiegreffe & Pinter
# (2019), "Attention is not not explanation", disagree; and ours: praise and blame in one sentence, twice, and a negation.
EXAMPLES: dict[str, int | None] = {
    "after 15 minutes watching the movie i was asking myself what to do leave the theater sleep or try to keep watching the "
    "movie to see if there was anything worth i finally watched the movie what a waste of time maybe i am not a 5 years old "
    "kid anymore": 0,
    "brilliant and moving performances by tom and peter finch": 1,
    "The film is funny and moving, but too long.": None,
    "The plot is dull, but the acting is wonderful.": None,
    "This is not a bad film.": 1,
}
# Words of praise (1) and of blame (0) that "not" turns into the opposite.
NEGATED = {"good": 1, "funny": 1, "interesting": 1, "original": 1, "clever": 1} | {
    "bad": 0,
    "boring": 0,
    "dull": 0,
    "stupid": 0,
    "slow": 0,
}

UNK = 1
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[!?.,;:]")
# Share of words hidden while training, so that the embedding of unknown words is learnt, too.
HIDDEN_WORDS = 0.25


@dataclass(frozen=True)
class Review:
    """A sentence of a film review and the mean of its ratings, from -4 to 4."""

    text: str
    rating: float

    @property
    def label(self) -> int:
        """1 praise, 0 blame."""
        return int(self.rating > 0)


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
        What people say, or what is meant; None if it is both.
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
class Negation:
    """A word in "The film is ..." and after "not": its label (1 praise, 0 blame), and the two sentences."""

    word: str
    label: int
    plain: Sentence
    negated: Sentence


@dataclass(frozen=True)
class Reviews:
    """The classifier of reviews.

    Attributes
    ----------
    train, held : list of Review
        Sentences to learn from, and to test on.
    verdicts : list of int
        Predicted labels of `held`.
    examples : list of Sentence
        Those of `EXAMPLES`.
    right, wrong : list of Sentence
        The first of `held` that are easy to read and judged right, and those judged wrong; praise and blame in turn.
    compared : list of Sentence
        The first of `held`, to compare the weights with what leaving words out does.
    negations : list of Negation
    seconds : float
        Of training.
    """

    train: list[Review]
    held: list[Review]
    verdicts: list[int]
    examples: list[Sentence]
    right: list[Sentence]
    wrong: list[Sentence]
    compared: list[Sentence]
    negations: list[Negation]
    seconds: float

    @property
    def accuracy(self) -> float:
        """On the held-out sentences."""
        return float(np.mean([verdict == review.label for verdict, review in zip(self.verdicts, self.held, strict=True)]))

    @property
    def majority(self) -> float:
        """Accuracy of naming always the class that is commoner in the held-out sentences."""
        praise = float(np.mean([review.label for review in self.held]))
        return max(praise, 1 - praise)


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
    lines = tar_member(tar_member(_sdist(cache), INNER), TABLE).decode().splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [Review(" ".join(row[2].replace("''", '"').split()), float(row[1])) for row in rows if len(row) == 3]


def load_lexicon(*, cache: Path | None = None) -> dict[str, float]:
    """The rated words, from -4 to 4: those that `tokenize` keeps in one piece. Arguments and errors as of `load_reviews`.

    Examples
    --------
    >>> load_lexicon()["wonderful"]  # doctest: +SKIP
    2.7
    """
    rows = [line.split("\t") for line in tar_member(_sdist(cache), LEXICON).decode().splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) > 1 and tokenize(row[0]) == [row[0]]}


def _sdist(cache: Path | None) -> Path:
    return obtain_sdist("the rated film reviews", "rated-reviews", REQUIREMENT, SDIST, cache=cache)


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
    compared: int = 400,
    seed: int = 0,
    device: torch.device | str = "cpu",
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
        The most of `Reviews.right` and of `Reviews.wrong`: of 8 to 16 tokens, without adult words.
    compared : int
        Held-out sentences on which tokens are left out.
    seed : int
    device : device
        Of the model.
    tick : callable
        Called after each epoch.

    Raises
    ------
    ValueError
        If `tests` leaves nothing to learn from.

    Examples
    --------
    >>> explain_reviews(load_reviews()).accuracy  # doctest: +SKIP
    0.785
    """
    kept = [review for review in reviews if abs(review.rating) >= AMBIVALENT and tokenize(review.text)]
    kept = [kept[i] for i in np.random.default_rng(seed).permutation(len(kept))]
    if not 0 < tests < len(kept):
        raise ValueError(f"tests: expected 1 to {len(kept) - 1}, got {tests}")
    held, train = kept[:tests], kept[tests:]
    start = time.perf_counter()
    with repeatable(seed):
        reader = _train(train, epochs, dim, hidden, torch.device(device), tick)
    seconds = time.perf_counter() - start
    with one_thread():
        verdicts = reader.verdicts([review.text for review in held])
        right, wrong = (
            [review for review, verdict in zip(held, verdicts, strict=True) if (verdict == review.label) == is_right]
            for is_right in (True, False)
        )
        return Reviews(
            train=train,
            held=held,
            verdicts=verdicts,
            examples=[reader.explain(text, label) for text, label in EXAMPLES.items()],
            right=[reader.explain(review.text, review.label) for review in _to_show(right, shown)],
            wrong=[reader.explain(review.text, review.label) for review in _to_show(wrong, shown)],
            compared=[reader.explain(review.text, review.label) for review in held[:compared]],
            negations=[_negation(reader, word, label) for word, label in NEGATED.items()],
            seconds=seconds,
        )


@dataclass(frozen=True)
class _Reader:
    """The model with its vocabulary."""

    model: BiLSTMClassifier
    vocabulary: dict[str, int]
    device: torch.device

    def ids(self, tokens: Sequence[str]) -> list[int]:
        return [self.vocabulary.get(token, UNK) for token in tokens]

    def padded(self, rows: Sequence[list[int]]) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD).to(self.device)

    @torch.no_grad()
    def verdicts(self, texts: Sequence[str]) -> list[int]:
        rows = [self.ids(tokenize(text)) for text in texts]
        parts = (self.model(self.padded(rows[i : i + 256]))[0].argmax(-1).tolist() for i in range(0, len(rows), 256))
        return list(itertools.chain.from_iterable(parts))

    def explain(self, text: str, label: int | None) -> Sentence:
        tokens = tokenize(text)
        ids = self.padded([self.ids(tokens)])
        found = self.model.explain(ids)
        target, probability = int(found.target[0]), float(found.probability[0])
        praise = probability if target == 1 else 1 - probability
        weights = (x.cpu() for x in (found.attention[0], found.signed[0], self._left_out(ids, target)))
        return Sentence(text, tokens, praise, target, label, *weights)

    @torch.no_grad()
    def _left_out(self, ids: Tensor, target: int) -> Tensor:
        """Log-odds of the target with all tokens minus those without each (N,): the shorter sentence is read each time."""
        count = ids.shape[1]
        if count == 1:
            return torch.zeros(1)
        others = ids.expand(count, -1)[~torch.eye(count, dtype=torch.bool, device=ids.device)].view(count, count - 1)
        odds = [logits[:, target] - logits[:, 1 - target] for logits in (self.model(ids)[0], self.model(others)[0])]
        return odds[0] - odds[1]


def _train(
    train: Sequence[Review], epochs: int, dim: int, hidden: int, device: torch.device, tick: Callable[[], object]
) -> _Reader:
    vocabulary = _vocabulary([tokenize(review.text) for review in train])
    reader = _Reader(BiLSTMClassifier(2 + len(vocabulary), dim, hidden, classes=2).to(device), vocabulary, device)
    rows = [reader.ids(tokenize(review.text)) for review in train]
    labels = torch.tensor([review.label for review in train], device=device)
    optimizer = torch.optim.Adam(reader.model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in _batches(rows, 64):
            tokens = reader.padded([rows[i] for i in chosen])
            hide = torch.rand(tokens.shape).to(device) < HIDDEN_WORDS
            tokens[(tokens != PAD) & hide] = UNK
            optimizer.zero_grad()
            F.cross_entropy(reader.model(tokens)[0], labels[chosen]).backward()
            optimizer.step()
        tick()
    reader.model.eval()
    return reader


def _vocabulary(texts: Sequence[list[str]]) -> dict[str, int]:
    """Ids, from 2 on, of the words that occur at least twice."""
    counts = Counter(itertools.chain.from_iterable(texts))
    return {word: 2 + i for i, word in enumerate(sorted(word for word, count in counts.items() if count > 1))}


def _batches(rows: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Indices of all rows once, in random order; those of one batch are of similar length, so that little is padded."""
    order = torch.randperm(len(rows)).tolist()
    pools = [sorted(order[i : i + 20 * size], key=lambda j: len(rows[j])) for i in range(0, len(order), 20 * size)]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    for i in torch.randperm(len(batches)).tolist():
        yield batches[i]


def _to_show(reviews: Sequence[Review], count: int) -> list[Review]:
    """Praise and blame in turn, of a length that can be read at a glance."""
    fit = [review for review in reviews if 8 <= len(tokenize(review.text)) <= 16 and not ADULT.search(review.text)]
    sides = ([review for review in fit if review.label == label] for label in (1, 0))
    return list(itertools.chain.from_iterable(zip(*sides, strict=False)))[:count]


def _negation(reader: _Reader, word: str, label: int) -> Negation:
    plain, negated = (
        reader.explain(f"The film is {given}.", side) for given, side in ((word, label), (f"not {word}", 1 - label))
    )
    return Negation(word, label, plain, negated)
