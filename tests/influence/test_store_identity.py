"""What a store of scores is made from: other functionals, losses and models are refused, edited records too."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.influence.problems import labelled, random_head
from tests.influence.test_store import Stop, manifest_of, snapshot, stop_at
from xai_fast.influence import Influence, TorchInfluence, _store_arrays, open_scores, write_scores

D = 4


def rows(count: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(0)), labelled("softmax", count)


def softmax() -> Influence:
    return Influence(random_head("softmax", D), *rows())


def half_done(monkeypatch: pytest.MonkeyPatch, path: Path, of: Any) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, _store_arrays.NpyArray, "write", 4)
        with pytest.raises(Stop):
            write_scores(softmax(), *rows(4), path, of=of, tile=(2, 7))


class Column:
    def __init__(self, column: int) -> None:
        self.column = column

    def __call__(self, z: Tensor, y: Tensor | None) -> Tensor:
        return z[:, self.column]

    def method(self, z: Tensor, y: Tensor | None) -> Tensor:
        return z[:, self.column]


def enclosing(value: Any) -> Callable[..., Tensor]:
    return lambda z, y: z[:, value] if isinstance(value, int) else z @ torch.as_tensor(value, dtype=z.dtype)


def with_default(column: int) -> Callable[..., Tensor]:
    return lambda z, y, column=column: z[:, column]


def column_of(z: Tensor, y: Tensor | None, *, column: int) -> Tensor:
    return z[:, column]


FUNCTIONALS: dict[str, Callable[[int], Any]] = {
    "cells": enclosing,
    "a tensor in a cell": lambda c: enclosing(torch.eye(3)[c]),
    "an array in a cell": lambda c: enclosing(torch.eye(3)[c].numpy()),
    "a function in a cell": lambda c: (lambda inner: lambda z, y: inner(z, y))(enclosing(c)),
    "defaults": with_default,
    "partial": lambda c: functools.partial(column_of, column=c),
    "callable objects": Column,
    "bound methods": lambda c: Column(c).method,
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONALS)
def test_another_functional_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, complete: bool) -> None:
    build, path = FUNCTIONALS[kind], tmp_path / "scores.npy"
    options: dict[str, Any] = {"tile": (2, 7)}
    if complete:
        write_scores(softmax(), *rows(4), path, of=build(0), **options)
    else:
        half_done(monkeypatch, path, build(0))
    before = snapshot(path)
    with pytest.raises(ValueError, match=r"^of: expected what the store .* was begun with, got of = .* instead of "):
        write_scores(softmax(), *rows(4), path, of=build(1), **options)
    assert snapshot(path) == before
    again = write_scores(softmax(), *rows(4), path, of=build(0), **options)
    np.testing.assert_allclose(again[:], softmax().scores(*rows(4), of=build(0)).numpy(), rtol=1e-4, atol=1e-4)


class Network(nn.Module):
    """The same parameters under the same names for every activation."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D, 3), nn.Linear(3, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.activation(self.first(x)))
        return hidden


def network(activation: Any = torch.tanh, loss: Any = F.cross_entropy) -> TorchInfluence:
    return TorchInfluence(Network(activation), loss, rows(), damping=1.0)


OTHERS: dict[str, tuple[Callable[[], TorchInfluence], Callable[[], TorchInfluence], str]] = {
    "layers": (lambda: network(nn.Tanh()), lambda: network(nn.ReLU()), "model: .*another model"),
    "what forward does": (network, lambda: network(torch.relu), "forward pass: "),
    "partial": (
        lambda: network(loss=functools.partial(F.cross_entropy, label_smoothing=0.0)),
        lambda: network(loss=functools.partial(F.cross_entropy, label_smoothing=0.5)),
        "loss_fn: ",
    ),
    "options of a loss": (
        lambda: network(loss=nn.CrossEntropyLoss()),
        lambda: network(loss=nn.CrossEntropyLoss(label_smoothing=0.5)),
        "loss_fn: ",
    ),
    "buffers of a loss": (
        lambda: network(loss=nn.CrossEntropyLoss(torch.ones(3))),
        lambda: network(loss=nn.CrossEntropyLoss(torch.arange(1.0, 4.0))),
        "loss_fn: ",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_torch_model_or_loss_is_refused(tmp_path: Path, what: str) -> None:
    one, other, message = OTHERS[what]
    path = tmp_path / "scores.npy"
    write_scores(one(), *rows(4), path)
    before = snapshot(path)
    with pytest.raises(ValueError, match=message):
        write_scores(other(), *rows(4), path)
    assert snapshot(path) == before
    write_scores(one(), *rows(4), path)


@pytest.mark.parametrize(
    "change",
    [
        {"tiles_done": 1000},
        {"tiles_done": -1},
        {"shape": [4]},
        {"shape": [4, 0]},
        {"tile": [0, 7]},
        {"tile": 3},
        {"complete": "no"},
        {"identity": []},
        {"convention": {"quantity": "I"}},
    ],
)
def test_an_edited_record_is_no_manifest(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "scores.npy"
    write_scores(softmax(), *rows(4), path)
    file = manifest_of(path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for call in (lambda: open_scores(path), lambda: write_scores(softmax(), *rows(4), path)):
        with pytest.raises(ValueError, match="path: expected a manifest of a store, got something else"):
            call()


def test_an_unfinished_part_is_not_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.npy"
    half_done(monkeypatch, path, "loss")
    file = manifest_of(path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "tiles_done": 100}))
    with pytest.raises(ValueError, match="path: expected a manifest of a store"):
        write_scores(softmax(), *rows(4), path, tile=(2, 7))
    assert not path.exists()
