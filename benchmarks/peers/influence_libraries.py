"""Influence scores of a softmax head by other libraries, each (n_test, n_train) in its own sign and scale.

They are installed outside site-packages by `make bench`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .imports import importable

__all__ = ["captum_arnoldi", "captum_tracin", "dattri_cg", "pydvl_scores"]

Data = tuple[Tensor, Tensor]


def _model(theta: Tensor) -> nn.Linear:
    model = nn.Linear(*theta.shape, bias=False)
    model.weight.data.copy_(theta.T)
    return model


def pydvl_scores(name: str, theta: Tensor, train: Data, test: Data, l2: float, **options: Any) -> Tensor:
    """pyDVL's LissaInfluence, CgInfluence or DirectInfluence."""
    with importable():
        import pydvl.influence.torch as pydvl  # type: ignore[import-not-found]

        method = getattr(pydvl, name)(_model(theta), F.cross_entropy, regularization=l2, **options)
        fitted = method.fit(DataLoader(TensorDataset(*train), batch_size=256))
        return fitted.influences(*test, *train)


def dattri_cg(theta: Tensor, train: Data, test: Data, l2: float, iterations: int) -> Tensor:
    """dattri's conjugate gradients, by double backward, and the products with the training gradients."""
    with importable():
        from dattri.func.hessian import ihvp_at_x_cg  # type: ignore[import-not-found]

    X, y = train

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(X @ flat.view_as(theta), y)

    solve = ihvp_at_x_cg(loss, theta.flatten(), max_iter=iterations, regularization=l2)
    solved = solve(_gradients(theta, *test).flatten(1))
    return solved @ _gradients(theta, X, y).flatten(1).T


def _gradients(theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    def loss(t: Tensor, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy((x @ t)[None], label[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(theta, X, y)


@functools.cache
def _checkpoints() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _checkpoint(theta: Tensor) -> tuple[str, Callable[[nn.Module, str], float]]:
    path = str(Path(_checkpoints().name) / "head.pt")
    torch.save(_model(theta).state_dict(), path)

    def load(model: nn.Module, at: str) -> float:
        model.load_state_dict(torch.load(at))
        return 1.0

    return path, load


class _Net(nn.Module):
    """captum's fast method wants a named last layer."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def captum_arnoldi(theta: Tensor, train: Data, test: Data, l2: float, rank: int) -> Tensor:
    with importable():
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

        path, load = _checkpoint(theta)
        method = ArnoldiInfluenceFunction(
            _model(theta),
            TensorDataset(*train),
            path,
            load,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=len(train[0]),
            sample_wise_grads_per_batch=True,
            projection_dim=rank,
            arnoldi_dim=2 * rank,
            hessian_reg=l2 * len(train[0]),
        )
        return method.influence(test)


def captum_tracin(theta: Tensor, train: Data, test: Data) -> Tensor:
    with importable():
        from captum.influence import TracInCPFast

        path, load = _checkpoint(theta)
        net = _Net(_model(theta))
        method = TracInCPFast(
            net,
            net.head,
            TensorDataset(*train),
            [path],
            lambda model, at: load(net.head, at),
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=len(train[0]),
        )
        return method.influence(test)
