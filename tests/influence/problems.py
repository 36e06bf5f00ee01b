"""Small problems of every family, and their algebra written out with autograd and dense matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xai_fast.influence import Head, LinearHead, LogisticHead, PoissonHead, SmoothHingeHead, SoftmaxHead

FAMILIES = ("linear", "logistic", "poisson", "smooth_hinge", "softmax")
HEADS: dict[str, Any] = {
    "linear": LinearHead, "logistic": LogisticHead, "poisson": PoissonHead, "smooth_hinge": SmoothHingeHead,
    "softmax": SoftmaxHead,
}  # fmt: skip
CLASSES = 3


def labelled(family: str, n: int, seed: int = 1) -> Tensor:
    """Labels that a head of the family takes."""
    generator = torch.Generator().manual_seed(seed)
    if family == "linear":
        return torch.randn(n, generator=generator, dtype=torch.float64)
    if family == "poisson":
        return torch.poisson(torch.full((n,), 1.5), generator=generator).double()
    classes = CLASSES if family == "softmax" else 2
    y = torch.randint(0, classes, (n,), generator=generator)
    return 2 * y - 1 if family == "smooth_hinge" else y


def random_head(family: str, dim: int, *, l2: float = 0.1, bias: bool = True, seed: int = 2) -> Head:
    generator = torch.Generator().manual_seed(seed)
    columns = CLASSES if family == "softmax" else 1
    theta = torch.randn(dim, columns, generator=generator, dtype=torch.float64) / 2
    options: dict[str, Any] = {"smoothing": 0.4} if family == "smooth_hinge" else {}
    offset = torch.randn(columns, generator=generator, dtype=torch.float64) / 2 if bias else None
    return HEADS[family](theta if columns > 1 else theta[:, 0], bias=offset, l2=l2, **options)


def design(X: Tensor, head: Head) -> Tensor:
    """X in float64 with the 1 of the bias."""
    X = X.double()
    return torch.cat([X, X.new_ones(len(X), 1)], 1) if head.intercept else X


def losses(parameters: Tensor, X: Tensor, y: Any, head: Head) -> Tensor:
    """The loss of every row as a function of the parameters (P, C), for autograd."""
    return head.loss(design(X, head) @ parameters, head.check_labels(y, len(X)))


def row_gradients(X: Tensor, y: Any, head: Head) -> Tensor:
    """(n, P C), by autograd."""
    found = torch.autograd.functional.jacobian(lambda p: losses(p, X, y, head), head.parameters.double())
    return found.flatten(1)


def dense_hessian(
    X: Tensor, y: Any, head: Head, *, s: Tensor | None = None, l2: float = 0.0, damping: float = 0.0
) -> Tensor:
    """(P C, P C), by autograd; l2 not on the bias."""
    weight = torch.ones(len(X), dtype=torch.float64) if s is None else s.double()

    def objective(p: Tensor) -> Tensor:
        ridge = l2 / 2 * p[: head.dim].square().sum() + damping / 2 * p.square().sum()
        return (losses(p, X, y, head) * weight).mean() + ridge

    size = head.parameters.numel()
    return torch.autograd.functional.hessian(objective, head.parameters.double()).reshape(size, size)
