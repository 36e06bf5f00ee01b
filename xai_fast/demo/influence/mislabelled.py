"""Wrong labels, put into a training set on purpose and found again by the influence of each row on its own loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast import influence

from ..datasets import CLASSES, FashionMNIST
from ..repeatable import one_thread
from .newton import fit_softmax
from .two_models import Certificate

__all__ = ["LOSS", "RANDOM", "SELF", "Mislabelled", "Setting", "find_mislabelled", "flip_labels", "found_curve"]

SELF, LOSS, RANDOM = "self-influence", "loss", "random order"
COMPONENTS = 100
FLIPPED = 0.1
# Rows whose gradients are solved for, to certify the factor that gives the self-influence.
CERTIFIED = 32


@dataclass(frozen=True)
class Setting:
    """A model to train: on how many rows, how much regularised."""

    rows: int
    l2: float


@dataclass(frozen=True)
class Mislabelled:
    """One setting: what each way of ranking finds.

    Attributes
    ----------
    setting : Setting
    flipped : Tensor of bool, shape (n,)
    given, true : Tensor of int64, shape (n,)
    images : Tensor, shape (n, 28, 28)
    strength : dict of str to Tensor, shape (n,)
        Ranking to the numbers by which it ranks; the largest are inspected first.
    train_accuracy : float
        On the given labels, wrong ones included.
    learnt : float
        Share of the flipped rows whose wrong label the model predicts.
    test_accuracy : float
    gradient_norm : float
    certificate : Certificate
    """

    setting: Setting
    flipped: Tensor
    given: Tensor
    true: Tensor
    images: Tensor
    strength: dict[str, Tensor]
    train_accuracy: float
    learnt: float
    test_accuracy: float
    gradient_norm: float
    certificate: Certificate

    def curve(self, ranking: str) -> Tensor:
        """Share of the flipped rows found, after 1, 2, ... n rows."""
        return found_curve(self.strength[ranking], self.flipped)

    def found(self, ranking: str, inspected: float) -> float:
        """Share found after a share of all rows was inspected."""
        return float(self.curve(ranking)[int(inspected * len(self.flipped)) - 1])

    def first(self, ranking: str, count: int) -> list[int]:
        """The rows that are inspected first."""
        return self.strength[ranking].topk(count).indices.tolist()


def flip_labels(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give a random share of the rows another label, any other with the same probability.

    Parameters
    ----------
    labels : Tensor of int64, shape (n,)
    classes : int
    share : float
    seed : int

    Returns
    -------
    labels, flipped : Tensor, shape (n,)

    Examples
    --------
    >>> labels, flipped = flip_labels(torch.zeros(10, dtype=torch.int64), 3, 0.2, seed=0)
    >>> int(flipped.sum()), bool((labels[flipped] > 0).all())
    (2, True)
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[rows] = True
    steps = torch.randint(1, classes, (len(rows),), generator=generator)
    given = labels.clone()
    given[rows] = (labels[rows] + steps) % classes
    return given, flipped


def found_curve(strength: Tensor, flipped: Tensor) -> Tensor:
    """Share of the flipped rows among the 1, 2, ... n strongest.

    Examples
    --------
    >>> found_curve(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, True, False]))
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    return flipped[strength.argsort(descending=True)].double().cumsum(0) / flipped.sum()


def find_mislabelled(
    data: FashionMNIST, settings: Sequence[Setting], *, tick: Callable[[], object] = lambda: None
) -> list[Mislabelled]:
    """Flip labels, train a softmax regression on principal components of the pixels, and rank the rows, for each setting.

    Parameters
    ----------
    data : FashionMNIST
    settings : sequence of Setting
        The rows are drawn with seed 0; those of a smaller setting are the first of a larger one.
    tick : callable
        Called after each setting.

    Examples
    --------
    >>> find_mislabelled(data, [Setting(6000, 1e-3)])  # doctest: +SKIP
    """
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    found = []
    for setting in settings:
        rows = order[: setting.rows]
        found.append(_find(setting, data.train_images[rows], data.train_labels[rows].long(), data))
        tick()
    return found


def _find(setting: Setting, images: Tensor, true: Tensor, data: FashionMNIST) -> Mislabelled:
    given, flipped = flip_labels(true, len(CLASSES), FLIPPED, seed=0)
    X, X_test = _components(images, data.test_images)
    fitted = fit_softmax(X, given, len(CLASSES), l2=setting.l2)
    logits = fitted.head.logits(X)
    start = time.perf_counter()
    influences = influence.Influence(fitted.head, X, given, solver="exact")
    own = influences.self_influence().as_subclass(Tensor)
    seconds = time.perf_counter() - start
    guess = logits.argmax(1)
    return Mislabelled(
        setting=setting,
        flipped=flipped,
        given=given,
        true=true,
        images=images,
        strength={
            SELF: -own,
            LOSS: fitted.head.loss(logits, given),
            RANDOM: torch.rand(len(true), generator=torch.Generator().manual_seed(0)),
        },
        train_accuracy=float((guess == given).double().mean()),
        learnt=float((guess == given)[flipped].double().mean()),
        test_accuracy=float((fitted.head.logits(X_test).argmax(1) == data.test_labels).double().mean()),
        gradient_norm=fitted.gradient_norm,
        certificate=_certified(influences, fitted.head, X, given, seconds),
    )


def _certified(influences: influence.Influence, head: influence.Head, X: Tensor, y: Tensor, seconds: float) -> Certificate:
    """The residual that the factor behind the self-influence gives for the gradients of a few rows."""
    residual = head.residual(head.logits(X[:CERTIFIED]), y[:CERTIFIED])
    solution = influences.inverse_hvp(X[:CERTIFIED, :, None] * residual[:, None, :])
    what = f"Self-influence of {len(X):,} rows; residual: of the first {CERTIFIED}"
    return Certificate.of(what, solution, head.parameters.numel(), seconds)


def _components(images: Tensor, test_images: Tensor) -> tuple[Tensor, Tensor]:
    """The first principal components of the pixels, of mean square length 9, and a constant 1 in place of a bias."""
    pixels, test_pixels = (part.flatten(1).double() / 255 for part in (images, test_images))
    mean = pixels.mean(0)
    scatter = (pixels - mean).T @ (pixels - mean)
    with one_thread():
        _, vectors = torch.linalg.eigh(scatter)
    basis = vectors[:, -COMPONENTS:]
    X, X_test = (pixels - mean) @ basis, (test_pixels - mean) @ basis
    scale = 3 / X.square().sum(1).mean().sqrt()
    return F.pad(X * scale, (0, 1), value=1.0), F.pad(X_test * scale, (0, 1), value=1.0)
