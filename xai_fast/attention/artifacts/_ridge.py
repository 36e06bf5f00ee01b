"""Ridge regression from sums over tokens: what is kept has the size of the features, not of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

__all__ = ["Moments", "choose_l2", "fit_ridge"]

# Rows that are converted to float64 at a time.
CHUNK = 4096


class Moments:
    """n, sum x, sum y, sum x x^T, sum x y^T and sum |y|^2 of the tokens that were added, in float64.

    Labels are one-hot targets, written out for a few rows at a time.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.square = 0.0
        self.x = torch.zeros(features, dtype=torch.float64, device=device)
        self.xx = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.y = torch.zeros(0, dtype=torch.float64, device=device)
        self.xy = torch.zeros(features, 0, dtype=torch.float64, device=device)

    def add(self, tokens: Tensor, targets: Tensor) -> None:
        """Tokens (n, D) with labels (n,) or values (n, P)."""
        if not len(tokens):
            return
        for x, y in zip(tokens.split(CHUNK), targets.split(CHUNK), strict=True):
            x = x.double()
            self.count += len(x)
            self.x += x.sum(0)
            self.xx.addmm_(x.T, x)
            if y.dim() == 1:
                self.widen(int(y.max()) + 1)
                y = one_hot(y, len(self.y))
            self.widen(y.shape[1])
            y = y.double()
            self.y += y.sum(0)
            self.xy.addmm_(x.T, y)
            self.square += float(y.square().sum())

    def widen(self, targets: int) -> None:
        """Room for that many targets: labels become known as they come."""
        if (missing := targets - len(self.y)) > 0:
            self.y = pad(self.y, (0, missing))
            self.xy = pad(self.xy, (0, missing))

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.x), self.x.device)
        total.widen(max(len(self.y), len(other.y)))
        for part in (self, other):
            part.widen(len(total.y))
            total.count += part.count
            total.square += part.square
            for name in ("x", "xx", "y", "xy"):
                getattr(total, name).add_(getattr(part, name))
        return total

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """sum |y - W^T x - b|^2 over the tokens, from their sums."""
        error = self.square - 2 * (weight * self.xy).sum() + (weight * (self.xx @ weight)).sum()
        error = error + 2 * bias @ (weight.T @ self.x) - 2 * bias @ self.y + self.count * bias @ bias
        return float(error)


def fit_ridge(moments: Moments, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """(W, b) for each penalty, from one factorisation; the intercept is not penalised.

    The penalty is a multiple of the mean eigenvalue of the centred X^T X.
    """
    mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
    scatter = moments.xx - torch.outer(moments.x, mean_x)
    values, vectors = torch.linalg.eigh(scatter)
    values = values.clamp_min(0)
    rotated = vectors.T @ (moments.xy - torch.outer(mean_x, moments.y))
    rounding = len(values) * torch.finfo(torch.float64).eps * float(values[-1])
    found = []
    for penalty in penalties:
        curvature = values + penalty * float(values.mean())
        # Directions in which the tokens do not differ carry nothing.
        inverse = torch.where(curvature > rounding, 1 / curvature.clamp_min(torch.finfo(torch.float64).tiny), 0)
        weight = vectors @ (rotated * inverse[:, None])
        found.append((weight, mean_y - weight.T @ mean_x))
    return found


def choose_l2(train: Moments, validation: Moments, penalties: Sequence[float]) -> float:
    """The penalty with the smallest squared error on the validation tokens."""
    width = max(len(train.y), len(validation.y))
    train.widen(width)
    validation.widen(width)
    errors = [validation.squared_error(weight, bias) for weight, bias in fit_ridge(train, penalties)]
    return penalties[min(range(len(errors)), key=errors.__getitem__)]
