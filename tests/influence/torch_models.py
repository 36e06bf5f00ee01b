"""Small models in float64 with data, and what influence functions need of them, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor]


def mlp(dtype: torch.dtype = torch.float64, inputs: int = 4, hidden: int = 5, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)).to(dtype)


def classification(rows: int = 24, inputs: int = 4, classes: int = 3, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    return X, torch.randint(classes, (rows,), generator=generator)


def vector(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def as_function(model: nn.Module, loss_fn: Callable[..., Tensor], X: Any, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Parameters as one vector -> mean loss."""
    names, values = zip(*model.named_parameters(), strict=True)

    def mean_loss(theta: Tensor) -> Tensor:
        parts = theta.split([value.numel() for value in values])
        named = {n: part.view_as(v) for n, part, v in zip(names, parts, values, strict=True)}
        return loss_fn(torch.func.functional_call(model, named, (X,)), y)

    return mean_loss


def hessian(model: nn.Module, loss_fn: Callable[..., Tensor], X: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss, by torch.autograd.functional."""
    at = vector(model.parameters()).detach()
    return torch.autograd.functional.hessian(as_function(model, loss_fn, X, y), at)


def gauss_newton(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """J^T H_out J of the mean cross-entropy, with explicit J and H_out = diag(p) - p p^T."""
    at = vector(model.parameters()).detach()
    total = torch.zeros(len(at), len(at), dtype=at.dtype)
    for x in X:
        J = torch.autograd.functional.jacobian(as_function(model, lambda out, _: out[0], x[None], y), at)
        p = model(x[None])[0].detach().softmax(0)
        total += J.T @ (p.diag() - p[:, None] * p) @ J
    return total / len(X)


def gradients(model: nn.Module, X: Tensor, y: Tensor, loss_fn: Callable[..., Tensor] = F.cross_entropy) -> Tensor:
    """Of every row, in a loop."""
    rows = []
    for x, target in zip(X, y, strict=True):
        loss = loss_fn(model(x[None]), target[None])
        rows.append(vector(torch.autograd.grad(loss, list(model.parameters()))))
    return torch.stack(rows)
