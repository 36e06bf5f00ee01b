"""Two models of the same pictures, an RBF support vector machine on pixels and a linear one on a deep network's features."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast import influence

from ..datasets import CLASSES, FashionMNIST
from ..photos import MEAN, STD
from .newton import Fitted, fit_smooth_hinge, rbf_features

__all__ = [
    "DINO",
    "NARROW",
    "RBF",
    "Certificate",
    "ModelView",
    "TwoModels",
    "Width",
    "compare_models",
    "dino_features",
    "nearest_share",
]

PAIR = (CLASSES.index("pullover"), CLASSES.index("coat"))
RBF, NARROW = "RBF SVM on pixels", "RBF SVM, narrow kernel"
DINO = "Linear SVM on DINOv2 features"

# Chosen by five-fold cross-validation on as many training pictures: accuracy 0.892 (RBF, `BEST`) and 0.881.
RBF_L2, DINO_L2, SMOOTHING = 3e-4, 1e-3, 0.1
# gamma times the squared median distance of two training pictures: five-fold accuracy 0.877, 0.892, 0.869, 0.845.
BEST, NARROWER, WIDTHS = 2.0, 6.0, (0.5, 2.0, 6.0, 12.0)

# 28 x 28 pictures enlarged three times, 6 x 6 patches; CLS after block 11: the wheel's last block was fine-tuned.
SIDE, BLOCKS = 84, 11
# Test gradients smaller than this part of the largest one are nothing: the picture is far outside the margin.
LEAST_GRADIENT = 1e-6


@dataclass(frozen=True)
class Certificate:
    """How a solve was done and how well."""

    what: str
    solver: str
    why: str
    unknowns: int
    residual: float
    converged: bool
    seconds: float

    @staticmethod
    def of(what: str, solution: influence.Solution, unknowns: int, seconds: float) -> Certificate:
        """From the solution that the library returns, with the largest residual of all right-hand sides."""
        residual = float(solution.residual.max())
        return Certificate(what, solution.solver, solution.why, unknowns, residual, solution.converged, seconds)


@dataclass(frozen=True)
class ModelView:
    """One model: its accuracy, the influence of training on test pictures, and how that goes with distance.

    Attributes
    ----------
    name : str
    train_accuracy, test_accuracy : float
    scores : Tensor, shape (tests, n)
    margins : Tensor, shape (tests,)
        y z of the test pictures: positive is right, 1 and more is outside the margin.
    correlation : float
        Mean over test pictures of the rank correlation between |influence| and distance.
    near : float
        Share of the 20 most influential training pictures that are among the nearest 5 %, mean over test pictures.
    counted : int
        Test pictures in these two means: those with a gradient.
    gradient_norm : float
        Of the objective at the end of training.
    certificate : Certificate
    """

    name: str
    train_accuracy: float
    test_accuracy: float
    scores: Tensor
    margins: Tensor
    correlation: float
    near: float
    counted: int
    gradient_norm: float
    certificate: Certificate


@dataclass(frozen=True)
class Width:
    """The RBF machine with one kernel width: gamma times the squared median distance, and what becomes of the numbers."""

    width: float
    test_accuracy: float
    correlation: float
    near: float


@dataclass(frozen=True)
class TwoModels:
    """Pictures (n, 28, 28), labels +1 and -1, pixel distances (tests, n), the two models, and the test pictures to show."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    distances: Tensor
    models: list[ModelView]
    widths: list[Width]
    shown: list[int]

    @staticmethod
    def class_name(label: float) -> str:
        """The class of +1 and of -1."""
        return CLASSES[PAIR[0] if label > 0 else PAIR[1]]


def compare_models(
    data: FashionMNIST,
    features: Callable[[Tensor, Callable[[], object]], Tensor],
    *,
    count: int,
    tests: int,
    show: int,
    widths: bool,
    tick: Callable[[], object] = lambda: None,
) -> TwoModels:
    """Train the models and compute the influence of every training picture on every test picture.

    Parameters
    ----------
    data : FashionMNIST
    features : callable
        Of a deep network: pictures (m, 28, 28) as bytes and a tick to (m, D).
    count, tests : int
        Training and test pictures of each class, drawn with seed 0.
    show : int
        Test pictures to show, of the classes in turn.
    widths : bool
        Whether to train the RBF machine with all of `WIDTHS`.
    tick : callable
        Called after each batch of features and each trained model.

    Examples
    --------
    >>> compare_models(data, features, count=600, tests=200, show=2, widths=True)  # doctest: +SKIP
    """
    train_images, y = _draw(data.train_images, data.train_labels, count)
    test_images, y_test = _draw(data.test_images, data.test_labels, tests)
    pixels, test_pixels = (_flat(images) for images in (train_images, test_images))
    distances = torch.cdist(test_pixels, pixels)
    scale = float(torch.cdist(pixels, pixels).median()) ** -2

    def view(name: str, X: Tensor, X_test: Tensor, l2: float) -> ModelView:
        found = _view(name, fit_smooth_hinge(X, y, l2=l2, smoothing=SMOOTHING), X, y, X_test, y_test, distances)
        tick()
        return found

    def rbf(width: float) -> ModelView:
        map_ = rbf_features(pixels, width * scale)
        return view(NARROW if width > BEST else RBF, map_(pixels), map_(test_pixels), RBF_L2)

    machines = {width: rbf(width) for width in (WIDTHS if widths else (BEST, NARROWER))}
    X, X_test = _standardised(features(train_images, tick), features(test_images, tick))
    models = [machines[BEST], machines[NARROWER], view(DINO, X, X_test, DINO_L2)]
    table = [Width(width, item.test_accuracy, item.correlation, item.near) for width, item in machines.items()]
    shown = _to_show(models, y_test, show)
    return TwoModels(train_images, y, test_images, y_test, distances, models, table, shown)


def _draw(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` pictures of each class of the pair, drawn at random, with labels +1 and -1."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for label in PAIR:
        found = torch.where(labels == label)[0]
        rows.append(found[torch.randperm(len(found), generator=generator)[:count]])
    y = torch.cat([torch.full((len(part),), sign) for part, sign in zip(rows, (1.0, -1.0), strict=True)])
    return images[torch.cat(rows)], y


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 255


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Features of mean 0 and of mean square 1 / D, and a constant 1 in place of a bias."""
    train, test = train.double(), test.double()
    mean, scale = train.mean(0), train.std(0) * train.shape[1] ** 0.5
    return tuple(F.pad((part - mean) / scale, (0, 1), value=1.0) for part in (train, test))  # type: ignore[return-value]


def _view(name: str, fitted: Fitted, X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor, distances: Tensor) -> ModelView:
    start = time.perf_counter()
    scores = influence.Influence(fitted.head, X, y).scores(X_test, y_test)
    seconds = time.perf_counter() - start
    assert scores.solution is not None
    margins = y_test * fitted.head.logits(X_test)[:, 0]
    steep = fitted.head.residual(fitted.head.logits(X_test), y_test)[:, 0].abs()
    counted = torch.where(steep > LEAST_GRADIENT * steep.max())[0]
    values = scores.as_subclass(Tensor)
    pairs = [(values[i].abs(), distances[i]) for i in counted.tolist()]
    what = f"{name}: {len(X_test)} test gradients"
    return ModelView(
        name=name,
        train_accuracy=float((y * fitted.head.logits(X)[:, 0] > 0).double().mean()),
        test_accuracy=float((margins > 0).double().mean()),
        scores=values,
        margins=margins,
        correlation=sum(rank_correlation(*pair) for pair in pairs) / len(pairs),
        near=sum(nearest_share(*pair) for pair in pairs) / len(pairs),
        counted=len(pairs),
        gradient_norm=fitted.gradient_norm,
        certificate=Certificate.of(what, scores.solution, X.shape[1], seconds),
    )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors without ties.

    Examples
    --------
    >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([5.0, 4.0, 3.0]))
    -1.0
    """
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return round(float(torch.corrcoef(ranks)[0, 1]), 12)


def nearest_share(strength: Tensor, distance: Tensor, top: int = 20, share: float = 0.05) -> float:
    """Share of the `top` strongest entries that are among the nearest `share` of all.

    Examples
    --------
    >>> nearest_share(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 9.0, 8.0, 7.0]), top=2, share=0.5)
    0.5
    """
    near = distance.argsort().argsort() < share * len(distance)
    return float(near[strength.topk(min(top, len(strength))).indices].double().mean())


def _to_show(models: list[ModelView], y_test: Tensor, show: int) -> list[int]:
    """Of each class in turn, the first test pictures that all models name correctly, but inside their margin."""
    margins = torch.stack([model.margins for model in models])
    fitting = ((margins > 0) & (margins < 1)).all(0)
    by_class = [torch.where(fitting & (y_test == sign))[0].tolist() for sign in (1.0, -1.0)]
    turns = [row for rows in zip(*by_class, strict=False) for row in rows]
    return turns[:show]


@torch.no_grad()
def dino_features(
    backbone: torch.nn.Module, images: Tensor, *, batch: int = 64, tick: Callable[[], object] = lambda: None
) -> Tensor:
    """The CLS token of a DINOv2 after 11 of its 12 blocks.

    Parameters
    ----------
    backbone : Dinov2Model
    images : Tensor, shape (m, 28, 28)
        Grey, as bytes.
    batch : int
    tick : callable
        Called after each batch.

    Returns
    -------
    Tensor, shape (m, 384)

    Examples
    --------
    >>> dino_features(load_dinov2(), torch.zeros(2, 28, 28, dtype=torch.uint8)).shape  # doctest: +SKIP
    torch.Size([2, 384])
    """
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    found = []
    for part in images.split(batch):
        large = F.interpolate(part[:, None].float() / 255, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
        pixels = ((large - mean) / std).to(device)
        states = backbone(pixel_values=pixels, output_hidden_states=True).hidden_states
        found.append(states[BLOCKS][:, 0].cpu())
        tick()
    return torch.cat(found)
