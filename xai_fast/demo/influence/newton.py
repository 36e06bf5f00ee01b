"""Training of linear heads to the very minimum, by Newton steps with the library's own inverse-Hessian-vector product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_fast import influence

from ..repeatable import one_thread

__all__ = ["Fitted", "fit", "fit_smooth_hinge", "fit_softmax", "rbf_features"]

# Smoothings on the way from an easy problem to the one that is wanted.
SOFTER = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
# Shares of a Newton step that are tried, until the objective falls.
SIZES = [0.5**i for i in range(20)]
# Below this share of the largest one, eigenvalues of a kernel matrix are rounding.
SMALLEST_EIGENVALUE = 1e-8


@dataclass(frozen=True)
class Fitted:
    """A trained head, the norm of the gradient of its objective, and how many Newton steps it took."""

    head: influence.Head
    gradient_norm: float
    steps: int


def fit(
    head_of: Callable[[Tensor], influence.Head],
    theta: Tensor,
    X: Tensor,
    y: Tensor,
    *,
    tolerance: float = 1e-10,
    max_steps: int = 100,
) -> Fitted:
    """Minimise the objective of a head without bias, by Newton steps that are halved until the objective falls.

    Influence functions take for granted that the gradient of the objective is zero: training that stops early is an error in
    them that no solver can mend.

    Parameters
    ----------
    head_of : callable
        The head for given parameters.
    theta : Tensor, shape (D,) or (D, C)
        Where to start.
    X : Tensor, shape (n, D)
        In float64.
    y : Tensor, shape (n,)
    tolerance : float
        Norm of the gradient at which to stop.
    max_steps : int

    Returns
    -------
    Fitted

    Raises
    ------
    ArithmeticError
        If the gradient is still above the tolerance after all steps.

    Examples
    --------
    >>> X, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([1.0, 2.0])
    >>> head = fit(influence.LinearHead, torch.zeros(1, dtype=torch.float64), X, y).head
    >>> round(float(head.parameters), 6)
    1.0
    """
    head = head_of(theta)
    value, gradient = _objective(head, X, y)
    for step in range(max_steps + 1):
        norm = float(gradient.norm())
        if norm <= tolerance:
            return Fitted(head, norm, step)
        direction = influence.Influence(head, X, y, solver="exact").inverse_hvp(gradient.reshape(theta.shape)).x
        slope = float(direction.flatten() @ gradient.flatten())
        for size in SIZES:
            head = head_of(theta - size * direction)
            lower, gradient = _objective(head, X, y)
            # The last steps change the objective by less than it can be computed to.
            if lower <= value - 1e-4 * size * slope + 1e-14 * abs(value):
                break
        theta, value = theta - size * direction, lower
    raise ArithmeticError(f"tolerance: expected a gradient of at most {tolerance:g} after {max_steps} steps, got {norm:g}")


def _objective(head: influence.Head, X: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """The objective and its gradient (D, C)."""
    labels = head.check_labels(y, len(X))
    logits, l2 = head.logits(X), head.l2 or 0.0
    value = head.loss(logits, labels).mean() + l2 / 2 * head.parameters.square().sum()
    return float(value), X.T @ head.residual(logits, labels) / len(X) + l2 * head.parameters


def fit_smooth_hinge(X: Tensor, y: Tensor, *, l2: float, smoothing: float) -> Fitted:
    """A support vector machine with a smooth hinge, trained from a very smooth one to the one that is wanted.

    Parameters
    ----------
    X : Tensor, shape (n, D)
        In float64.
    y : Tensor, shape (n,)
        +1 and -1.
    l2, smoothing : float
        As `xai_fast.influence.SmoothHingeHead` takes them.

    Examples
    --------
    >>> X = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> fit_smooth_hinge(X, X[:, 0].sign(), l2=0.1, smoothing=0.1).gradient_norm < 1e-10
    True
    """
    theta, steps = X.new_zeros(X.shape[1]), 0
    for value in (*(s for s in SOFTER if s > smoothing), smoothing):

        def head_of(theta: Tensor, value: float = value) -> influence.Head:
            return influence.SmoothHingeHead(theta, l2=l2, smoothing=value)

        fitted = fit(head_of, theta, X, y, tolerance=1e-10 if value == smoothing else 1e-3)
        theta, steps = fitted.head.parameters[:, 0], steps + fitted.steps
    return Fitted(fitted.head, fitted.gradient_norm, steps)


def fit_softmax(X: Tensor, y: Tensor, classes: int, *, l2: float) -> Fitted:
    """Multinomial logistic regression without intercept.

    Parameters
    ----------
    X : Tensor, shape (n, D)
        In float64.
    y : Tensor of int64, shape (n,)
    classes : int
    l2 : float

    Examples
    --------
    >>> X = torch.eye(3, dtype=torch.float64)
    >>> fit_softmax(X, torch.arange(3), 3, l2=0.1).gradient_norm < 1e-10
    True
    """
    return fit(lambda theta: influence.SoftmaxHead(theta, l2=l2), X.new_zeros(X.shape[1], classes), X, y)


def rbf_features(landmarks: Tensor, gamma: float) -> Callable[[Tensor], Tensor]:
    """The map into the feature space of exp(-gamma ||x - z||^2) that the landmarks span (Nystroem).

    With all training rows as landmarks a linear model on these features is the kernel machine itself.

    Parameters
    ----------
    landmarks : Tensor, shape (m, D)
    gamma : float

    Returns
    -------
    callable
        Rows (n, D) to features (n, m or fewer).

    Examples
    --------
    >>> points = torch.tensor([[0.0], [1.0]])
    >>> features = rbf_features(points, 1.0)(points)
    >>> features @ features.T
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """

    def kernel(X: Tensor) -> Tensor:
        return torch.exp(-gamma * torch.cdist(X, landmarks).square())

    with one_thread():
        values, vectors = torch.linalg.eigh(kernel(landmarks))
    kept = values > SMALLEST_EIGENVALUE * values[-1]
    basis = vectors[:, kept] / values[kept].sqrt()
    return lambda X: kernel(X) @ basis
