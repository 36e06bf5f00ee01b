"""Two-class linear classifiers on many small problems at once, in float64: weighted ridge regression and what reduces to it.

A batch holds P pairs of example sets and F fits of each pair, which differ in the weights w (P, F, n) of the examples alone:
the fit on all examples, and one for each fold, whose examples weigh 0. Weights are balanced, 1/2 for each class, so that
class sizes do not move the boundary. y is +1 for the concept, -1 for the others.

`Dual` knows the Gram matrix of the examples only and returns coefficients a (P, F, n), v = sum_i a_i x_i with sum_i a_i = 0;
`Primal` knows the features and returns v (P, F, d) itself. Both return the decision values f = v.x + b of all n examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["METHODS", "Dual", "Primal", "Problem", "fit"]

METHODS = ("ridge", "lda", "logistic", "mean_difference")
DEFAULT_L2 = {"ridge": 0.01, "logistic": 0.001}
# Of the variance: keeps a system solvable that asked for no penalty; the answer is then that of least norm to 5 digits.
LEAST_L2 = 1e-10
NEWTON_STEPS = 100
# A last Newton step this small leaves an error of about its square.
STEP = 1e-6
HALVINGS = 40


class Problem(Protocol):
    """Examples of P pairs of sets."""

    @property
    def features(self) -> int:
        """d."""

    def ridge(self, w: Tensor, z: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
        """Minimise sum_i w_i (z_i - v.x_i - b)^2 + l2 ||v||^2: (coefficients, decision values)."""

    def moved(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """v = sum_i a_i x_i: (coefficients, v.x_i)."""

    def plain(self, coefficients: Tensor) -> Tensor:
        """v.x_i of all examples."""

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products (P, F) of two directions."""

    def variance(self, w: Tensor) -> Tensor:
        """sum_i w_i ||x_i - mean||^2, (P, F)."""

    def within(self, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of S = sum_i w_i u_i u_i^T, u_i the distance from the class mean: ||S||^2 and sum_i w_i^2 ||u_i||^4."""


@dataclass
class Dual:
    gram: Tensor  # (P, n, n)
    features: int

    def ridge(self, w: Tensor, z: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
        share, mean = w / w.sum(-1, keepdim=True), _mean(w, z)
        rows = self.plain(share)
        root = w.sqrt()
        system = self.gram[:, None] - rows[..., :, None]
        system.sub_(rows[..., None, :] - (share * rows).sum(-1)[..., None, None])
        system.mul_(root[..., :, None]).mul_(root[..., None, :])
        system.diagonal(dim1=-2, dim2=-1).add_(l2[..., None])
        beta = torch.cholesky_solve((root * (z - mean))[..., None], torch.linalg.cholesky(system))[..., 0]
        a = root * beta
        a = a - share * a.sum(-1, keepdim=True)
        values = self.plain(a)
        return a, values - _mean(w, values) + mean

    def moved(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return a, self.plain(a)

    def plain(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.gram

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * self.plain(right)).sum(-1)

    def variance(self, w: Tensor) -> Tensor:
        share = w / w.sum(-1, keepdim=True)
        whole = (share @ self.gram.diagonal(dim1=-2, dim2=-1)[..., None])[..., 0]
        return whole - self.inner(share, share)

    def within(self, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        share, label = _class_shares(w, y), (y < 0).long()
        means = self.plain(share.flatten(1, 2)).view_as(share)
        rows = means[..., label, :]
        both = (means @ share.mT)[..., label, :][..., label]
        gram = self.gram[:, None] - rows - rows.mT + both
        squares = gram.diagonal(dim1=-2, dim2=-1).square()
        return (w[..., :, None] * gram.square() * w[..., None, :]).sum((-2, -1)), (w.square() * squares).sum(-1)


@dataclass
class Primal:
    x: Tensor  # (P, n, d)

    @property
    def features(self) -> int:
        return self.x.shape[-1]

    def ridge(self, w: Tensor, z: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
        total, mean, centre = w.sum(-1), _mean(w, z), w @ self.x
        system = self._moments(w).sub_((centre / total[..., None])[..., :, None] * centre[..., None, :])
        system.diagonal(dim1=-2, dim2=-1).add_(l2[..., None])
        right = (w * (z - mean)) @ self.x
        v = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(system))[..., 0]
        values = self.plain(v)
        return v, values - _mean(w, values) + mean

    def moved(self, a: Tensor) -> tuple[Tensor, Tensor]:
        v = a @ self.x
        return v, self.plain(v)

    def plain(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.x.mT

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(-1)

    def variance(self, w: Tensor) -> Tensor:
        share = w / w.sum(-1, keepdim=True)
        whole = (share @ self.x.square().sum(-1, keepdim=True))[..., 0]
        return whole - (share @ self.x).square().sum(-1)

    def within(self, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        share, label = _class_shares(w, y), (y < 0).long()
        means = (share.flatten(1, 2) @ self.x).view(*share.shape[:3], self.features)
        weights = torch.stack([w[..., label == c].sum(-1) for c in (0, 1)], -1)
        covariance = self._moments(w) - (means * weights[..., None]).mT @ means
        cross = (means.flatten(1, 2) @ self.x.mT).view(share.shape)
        own = torch.where(label == 0, cross[..., 0, :], cross[..., 1, :])
        square = self.x.square().sum(-1)[:, None] - 2 * own + means.square().sum(-1)[..., label]
        return covariance.square().sum((-2, -1)), (w * square).square().sum(-1)

    def _moments(self, w: Tensor) -> Tensor:
        """(P, F, d, d): sum_i w_i x_i x_i^T, in one product for all fits of a pair."""
        weighted = self.x.mT[:, None] * w[:, :, None, :]
        return (weighted.flatten(1, 2) @ self.x).view(*w.shape[:2], self.features, self.features)


def fit(problem: Problem, w: Tensor, y: Tensor, method: str, l2: float | None) -> tuple[Tensor, Tensor]:
    """(coefficients, decision values (P, F, n)) of every fit; w (P, F, n) balanced, y (n,) of +-1.

    Notes
    -----
    Two-class LDA is a ridge regression: the total covariance is S_t = S_w + dm dm^T / 4 with dm the difference of the class
    means, so that (S_t + c I)^-1 dm is parallel to (S_w + c I)^-1 dm (Sherman and Morrison).
    """
    balance = w * y
    if method == "mean_difference":
        coefficients, values = problem.moved(2 * balance)
        return coefficients, values - (w * values).sum(-1, keepdim=True)
    variance = problem.variance(w)
    if method == "lda":
        penalty = _lda_penalty(problem, w, y, variance, l2)
    else:
        share = DEFAULT_L2[method] if l2 is None else l2
        penalty = share * variance
    penalty = torch.maximum(penalty, LEAST_L2 * variance)
    if method == "logistic":
        return _logistic(problem, w, y, penalty)
    return problem.ridge(w, y.expand_as(w), penalty)


def _mean(w: Tensor, values: Tensor) -> Tensor:
    return (w * values).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)


def _class_shares(w: Tensor, y: Tensor) -> Tensor:
    """(P, F, 2, n): weights that take the mean of each class."""
    members = torch.stack([y > 0, y < 0]).to(w.dtype) * w[..., None, :]
    return members / members.sum(-1, keepdim=True)


def _lda_penalty(problem: Problem, w: Tensor, y: Tensor, variance: Tensor, shrinkage: float | None) -> Tensor:
    """c of S_w + c I, for (1 - s) S_w + s tr(S_w)/d I; s by Ledoit and Wolf (2004) where it is not given."""
    half, _ = problem.moved(w * y)
    trace = (variance - problem.inner(half, half)).clamp_min(0)
    share: Tensor | float
    if shrinkage is None:
        size = problem.features
        norm, fourth = problem.within(w, y)
        spread = norm - trace.square() / size
        noise = (fourth - norm * w.square().sum(-1)).clamp_min(0)
        share = torch.where(noise < spread, noise / spread, torch.ones_like(noise))
    else:
        share = shrinkage
    share = torch.as_tensor(share, dtype=w.dtype, device=w.device).clamp_max(1 - 1e-9)
    return share / (1 - share) * trace / problem.features


def _logistic(problem: Problem, w: Tensor, y: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise sum_i w_i log(1 + exp(-y_i f_i)) + l2/2 ||v||^2 by Newton: each step is a weighted ridge regression."""

    def loss(values: Tensor, norm: Tensor) -> Tensor:
        return (w * F.softplus(-y * values)).sum(-1) + l2 / 2 * norm

    values = torch.zeros_like(w)
    coefficients, _ = problem.moved(values)
    for _ in range(NEWTON_STEPS):
        margin = (y * values).clamp(-30, 30)
        right = margin.sigmoid()
        curvature = w * right * (-margin).sigmoid()
        wanted, reached = problem.ridge(curvature, values + y / right, l2)
        step, move = wanted - coefficients, reached - values
        norms = [problem.inner(*pair) for pair in ((coefficients, coefficients), (coefficients, step), (step, step))]
        now, length = loss(values, norms[0]), torch.ones_like(l2)
        for _ in range(HALVINGS):
            norm = norms[0] + 2 * length * norms[1] + length.square() * norms[2]
            worse = loss(values + length[..., None] * move, norm) > now + 1e-12 * now.abs()
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        values = values + length[..., None] * move
        coefficients = coefficients + length[..., None] * step
        if bool((move.abs().amax(-1) <= STEP * (1 + values.abs().amax(-1))).all()):
            break
    return coefficients, values
