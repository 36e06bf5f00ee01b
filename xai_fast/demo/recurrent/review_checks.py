"""Is attention on reviews any good? A bag of words on the same split, leaving words out, and words that people rated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import
from xai_fast.metrics import rank_correlation

from .reviews import Review, Sentence, tokenize

__all__ = [
    "METHODS",
    "PLAIN",
    "RANDOM",
    "SIGNED",
    "WITHOUT",
    "Agreement",
    "NamedWords",
    "agreements",
    "bag_of_words",
    "lexicon_verdicts",
    "mean_error",
    "named_words",
    "paired_difference",
    "weights_of",
]

PLAIN, SIGNED, WITHOUT, RANDOM = "Plain attention", "Signed attention", "Leaving words out", "Random weights"
# Leaving words out is what the others are held against.
METHODS = (PLAIN, SIGNED, RANDOM)


@dataclass(frozen=True)
class Agreement:
    """How the weights of a method agree with what leaving each token out does, sentence by sentence.

    Attributes
    ----------
    rank : Tensor, shape (n,)
        Spearman's correlation of the weights with the fall of the log-odds; NaN where all weights are the same.
    size : Tensor, shape (n,)
        The same of the absolute values.
    top : Tensor, shape (n,)
        1 if the largest weight is on the token that the verdict loses most without, else 0.
    """

    rank: Tensor
    size: Tensor
    top: Tensor


@dataclass(frozen=True)
class NamedWords:
    """Whether large weights are on words that people rated, and with the right sign.

    A rating speaks for the verdict if it is on its side: above zero where the verdict is praise, below where it is blame.

    Attributes
    ----------
    top_rated : Tensor, shape (n,)
        For each sentence with rated words: 1 if the largest weight is on one of them, else 0.
    rated : Tensor, shape (n,)
        Share of its tokens that are rated: what a random choice would get.
    top_for : Tensor, shape (m,)
        For each of these largest weights on rated words: 1 if the rating speaks for the verdict, else 0.
    word_for : Tensor, shape (w,)
        The same for all rated words: what a random choice among them would get.
    sign_right : Tensor, shape (w,)
        1 if the weight is above zero where the rating speaks for the verdict, and not where it does not; else 0.
    """

    top_rated: Tensor
    rated: Tensor
    top_for: Tensor
    word_for: Tensor
    sign_right: Tensor


def bag_of_words(train: Sequence[Review], held: Sequence[Review]) -> list[int]:
    """Verdicts of scikit-learn's logistic regression, as it comes, on which of the words that occur twice are there.

    Parameters
    ----------
    train, held : sequence of Review

    Returns
    -------
    list of int
        1 praise, 0 blame, for each of `held`.

    Examples
    --------
    >>> train = [Review("good film", 2.0), Review("bad film", -2.0)] * 2
    >>> bag_of_words(train, [Review("a good one", 1.0), Review("a bad one", -1.0)])
    [1, 0]
    """
    text = optional_import("sklearn.feature_extraction.text", "demo")
    linear = optional_import("sklearn.linear_model", "demo")
    counts = Counter(token for review in train for token in set(tokenize(review.text)))
    # At least twice in the training sentences, as for the network; words that one sentence repeats hardly matter.
    vectorizer = text.CountVectorizer(
        analyzer=tokenize, vocabulary=sorted(w for w, n in counts.items() if n > 1), binary=True
    )
    model = linear.LogisticRegression(max_iter=1000)
    model.fit(vectorizer.transform([review.text for review in train]), [review.label for review in train])
    return [int(verdict) for verdict in model.predict(vectorizer.transform([review.text for review in held]))]


def lexicon_verdicts(held: Sequence[Review], lexicon: Mapping[str, float], otherwise: int) -> list[int]:
    """The sign of the sum of the rated words of each sentence; `otherwise` where it is 0.

    Examples
    --------
    >>> lexicon_verdicts([Review("A good film", 1.0), Review("A film", 1.0)], {"good": 1.9}, otherwise=0)
    [1, 0]
    """
    sums = [math.fsum(lexicon.get(token, 0.0) for token in tokenize(review.text)) for review in held]
    return [int(total > 0) if total else otherwise for total in sums]


def paired_difference(one: Sequence[int], other: Sequence[int], labels: Sequence[int]) -> tuple[float, float]:
    """Accuracy of one less that of the other on the same sentences, and its standard error.

    Examples
    --------
    >>> paired_difference([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0])
    (0.25, 0.25)
    """
    right = [np.asarray(verdicts) == np.asarray(labels) for verdicts in (one, other)]
    return mean_error(torch.from_numpy(right[0].astype(float) - right[1].astype(float)))


def weights_of(sentence: Sentence, method: str) -> Tensor:
    """The weights of a method for the tokens of a sentence, shape (N,)."""
    if method == RANDOM:
        # Of the text, and so the same in every table.
        generator = torch.Generator().manual_seed(sum(map(ord, sentence.text)))
        return torch.rand(len(sentence.tokens), generator=generator)
    return {PLAIN: sentence.attention, SIGNED: sentence.signed, WITHOUT: sentence.without}[method]


def agreements(sentences: Sequence[Sentence]) -> dict[str, Agreement]:
    """`Agreement` of each of `METHODS` with leaving words out.

    Parameters
    ----------
    sentences : sequence of Sentence
        Those of fewer than three tokens are left out.

    Examples
    --------
    >>> weights = torch.tensor([0.1, 0.7, 0.2])
    >>> agreements([Sentence("", ["not", "bad", "!"], 0.1, 0, 1, weights, weights, weights)])[PLAIN].rank
    tensor([1.])
    """
    long = [sentence for sentence in sentences if len(sentence.tokens) > 2]
    found = {}
    for method in METHODS:
        pairs = [(weights_of(sentence, method), sentence.without) for sentence in long]
        rank, size = (
            torch.tensor([float(rank_correlation(change(weights)[None], change(fall)[None])) for weights, fall in pairs])
            for change in (lambda x: x, torch.abs)
        )
        top = torch.tensor([float(weights.argmax() == fall.argmax()) for weights, fall in pairs])
        found[method] = Agreement(rank, size, top)
    return found


def named_words(sentences: Sequence[Sentence], lexicon: Mapping[str, float]) -> dict[str, NamedWords]:
    """`NamedWords` of each of `METHODS` and of leaving words out.

    Parameters
    ----------
    sentences : sequence of Sentence
        Those without a rated word are left out.
    lexicon : mapping of str to float
        Words to ratings, positive for praise.

    Examples
    --------
    >>> weights = torch.tensor([0.1, 0.9])
    >>> found = named_words([Sentence("", ["so", "good"], 0.9, 1, 1, weights, weights, weights)], {"good": 1.9})
    >>> found[PLAIN].top_rated, found[PLAIN].rated
    (tensor([1.]), tensor([0.5000]))
    """
    sides = [torch.tensor([(1 if s.target else -1) * lexicon.get(token, 0.0) for token in s.tokens]) for s in sentences]
    kept = [(sentence, side) for sentence, side in zip(sentences, sides, strict=True) if bool(side.any())]
    if not kept:
        raise ValueError("sentences: expected at least one with a rated word, got none")
    words = torch.cat([side[side != 0] for _, side in kept])
    found = {}
    for method in (*METHODS, WITHOUT):
        weights = [weights_of(sentence, method) for sentence, _ in kept]
        tops = torch.stack([side[w.argmax()] for w, (_, side) in zip(weights, kept, strict=True)])
        named = torch.cat([w[side != 0] for w, (_, side) in zip(weights, kept, strict=True)])
        found[method] = NamedWords(
            top_rated=(tops != 0).float(),
            rated=torch.stack([(side != 0).float().mean() for _, side in kept]),
            top_for=(tops[tops != 0] > 0).float(),
            word_for=(words > 0).float(),
            sign_right=((named > 0) == (words > 0)).float(),
        )
    return found


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean of the values that are numbers, and its standard error; NaN where there are too few.

    Examples
    --------
    >>> mean_error(torch.tensor([1.0, 3.0, float("nan")]))
    (2.0, 1.0)
    """
    known = values[values.isfinite()].double()
    error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return float(known.mean()) if len(known) else math.nan, error
