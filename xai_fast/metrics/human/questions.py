"""What people are asked about explanations, and what they are shown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from xai_fast.viz.text import colored_text

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SCALE", "AttentionCheck", "ClassQuestion", "ColoredText", "Picture", "Question", "TrustQuestion", "check_text"]

# The values grow toward robot B; the scorer turns them toward a named model.
SCALE = (
    (-2, "Robot A is clearly more reasonable"),
    (-1, "Robot A is slightly more reasonable"),
    (0, "Both are equally reasonable"),
    (1, "Robot B is slightly more reasonable"),
    (2, "Robot B is clearly more reasonable"),
)


@dataclass(frozen=True, eq=False)
class ColoredText:
    """A text as a picture of a question, its tokens coloured by their weights.

    Parameters
    ----------
    tokens : sequence of N str
    weights : N finite numbers, optional
        None shows the text without colours, for example as the original beside an explanation.
    signed, limit, legend
        See `xai_fast.viz.colored_text`. A common `limit` makes two texts of one question comparable.

    Examples
    --------
    >>> ColoredText(["not", " good"], [0.1, -0.8]).html()
    '<span class="colored-text"><span title="not: +0.1" ...'
    """

    tokens: Sequence[str]
    weights: Tensor | np.ndarray | Sequence[float] | None = None
    signed: bool = True
    limit: float | None = None
    legend: bool = False

    def html(self) -> str:
        """The text as HTML, escaped."""
        if self.weights is None:
            return colored_text(["".join(self.tokens)], [0.0], legend=False)
        return colored_text(self.tokens, self.weights, signed=self.signed, limit=self.limit, legend=self.legend)


Picture: TypeAlias = "Tensor | np.ndarray | ColoredText | Image | str | os.PathLike[str]"


@dataclass(frozen=True, eq=False)
class ClassQuestion:
    """Which of two classes does this explanation explain? People must tell classes apart by the explanation alone.

    Parameters
    ----------
    explanation : picture
        An array or tensor as `xai_fast.viz.to_rgb` takes them, a PIL image, a path, or `ColoredText`.
    options : (str, str)
        The two classes, best both present in the picture. The order on the page is drawn anew.
    answer : str
        The class explained, one of `options`.
    method : str
        Name of the explanation method; the scorer gives one accuracy for each.
    original : picture, optional
        Shown beside the explanation.
    prompt : str
    id : str, optional
        Name in the manifest, one of its kind. Default: the place among the questions, such as "class-1".

    Raises
    ------
    ValueError, TypeError
        Options that are not two different texts, an answer that is none of them.

    Notes
    -----
    The class discrimination study of Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via
    Gradient-based Localization", section 5.1: pictures with exactly two annotated classes, an explanation of one of them.

    Examples
    --------
    >>> ClassQuestion(ColoredText(["a", " cat"], [0, 1]), ("cat", "dog"), answer="cat", method="gradient").options
    ('cat', 'dog')
    """

    explanation: Picture
    options: tuple[str, str]
    answer: str
    method: str = ""
    original: Picture | None = None
    prompt: str = "Which of the two does this explanation show?"
    id: str | None = None

    def __post_init__(self) -> None:
        _check_options(self.options, self.answer, most=2)
        check_text(self.method, "method", empty=True)
        check_text(self.prompt, "prompt")
        _check_id(self.id)


@dataclass(frozen=True, eq=False)
class TrustQuestion:
    """Which of two models seems more reasonable, by their explanations of the same prediction for the same input?

    Parameters
    ----------
    image : picture or None
        The input both explain, as in `ClassQuestion`; None shows the explanations alone.
    explanations : (picture, picture)
        One for each model. They appear as "robot A" and "robot B"; which is which is drawn anew.
    models : (str, str)
        Names of the models, never shown. The score is positive toward the first.
    prediction : str
        What both predicted.
    method : str
        Name of the explanation method; the scorer gives one mean for each.
    prompt : str
    id : str, optional
        Default: the place among the questions, such as "trust-2".

    Raises
    ------
    ValueError, TypeError
        Not two explanations or not two different names.

    Notes
    -----
    The trust study of Selvaraju et al. 2017 (see `ClassQuestion`), section 5.2: only predictions on which both models agree,
    five answers from -2 to 2, the models exchanged between the two sides about equally often.

    Examples
    --------
    >>> words = ["a", " cat"]
    >>> explanations = ColoredText(words, [0, 1]), ColoredText(words, [1, 0])
    >>> TrustQuestion(None, explanations, ("large", "small"), prediction="cat").models
    ('large', 'small')
    """

    image: Picture | None
    explanations: tuple[Picture, Picture]
    models: tuple[str, str]
    prediction: str
    method: str = ""
    prompt: str = "Which robot seems more reasonable?"
    id: str | None = None

    def __post_init__(self) -> None:
        _check_pair(self.explanations, "explanations")
        _check_pair(self.models, "models")
        _check_distinct(self.models, "models")
        check_text(self.prediction, "prediction")
        check_text(self.method, "method", empty=True)
        check_text(self.prompt, "prompt")
        _check_id(self.id)


@dataclass(frozen=True, eq=False)
class AttentionCheck:
    """A question with an evident answer: who misses it did not read.

    Parameters
    ----------
    prompt : str
    options : sequence of at least two str
    answer : str
        One of `options`.
    picture : picture, optional
    id : str, optional
        Default: the place among the checks, such as "check-1".

    Raises
    ------
    ValueError, TypeError
        Options that are not different texts, an answer that is none of them.

    Examples
    --------
    >>> AttentionCheck("Please choose the colour of clean snow.", ("white", "green"), answer="white").answer
    'white'
    """

    prompt: str
    options: Sequence[str]
    answer: str
    picture: Picture | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt")
        _check_options(self.options, self.answer)
        _check_id(self.id)


Question: TypeAlias = ClassQuestion | TrustQuestion


def check_text(text: Any, name: str, *, empty: bool = False) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a text, got {type(text).__name__}")
    if not empty and not text.strip():
        raise ValueError(f"{name}: expected a text that is not empty, got {text!r}")


def _check_id(name: Any) -> None:
    if name is not None:
        check_text(name, "id")


def _check_pair(pair: Any, name: str) -> None:
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{name}: expected a pair, got {type(pair).__name__}")
    if len(pair) != 2:
        raise ValueError(f"{name}: expected 2, got {len(pair)}")


def _check_distinct(texts: Sequence[Any], name: str) -> None:
    for text in texts:
        check_text(text, name)
    if len(set(texts)) < len(texts):
        raise ValueError(f"{name}: expected different texts, got {list(texts)}")


def _check_options(options: Any, answer: Any, most: int | None = None) -> None:
    if isinstance(options, str) or not isinstance(options, Sequence):
        raise TypeError(f"options: expected a sequence of texts, got {type(options).__name__}")
    if len(options) < 2 or (most and len(options) > most):
        raise ValueError(f"options: expected {'2' if most else 'at least 2'}, got {len(options)}")
    _check_distinct(options, "options")
    if broken := [option for option in options if set(option) & set("\r\n")]:
        raise ValueError(f"options: expected single lines, got {broken[0]!r}")
    if answer not in options:
        raise ValueError(f"answer: expected one of {list(options)}, got {answer!r}")
