"""Names of callables: the same for the same, in every process, and others for what computes something else."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from xai_fast._fingerprint import callable_name

SCALE = 1.0


def holding(value: Any) -> Callable[..., Any]:
    return lambda z: (z, value)


def reading(z: Any) -> Any:
    return SCALE * z


class Holder:
    def __init__(self, value: Any) -> None:
        self.value, self.itself = value, self

    def __call__(self, z: Any) -> Any:
        return self.value

    def method(self, z: Any) -> Any:
        return self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, z: Any) -> Any:
        return self.value


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "numbers": (lambda: holding(1), lambda: holding(2)),
    "kinds of numbers": (lambda: holding(1), lambda: holding(1.0)),
    "tensors": (lambda: holding(torch.zeros(3)), lambda: holding(torch.ones(3))),
    "shapes": (lambda: holding(torch.zeros(3, 2)), lambda: holding(torch.zeros(2, 3))),
    "scalars": (lambda: holding(torch.tensor(1.0)), lambda: holding(torch.tensor(2.0))),
    "arrays": (lambda: holding(np.zeros(3)), lambda: holding(np.ones(3))),
    "arrays of objects": (lambda: holding(np.array([None, "a"])), lambda: holding(np.array([None, "b"]))),
    "containers": (lambda: holding([{"a": {1, 2}}]), lambda: holding([{"a": {1, 3}}])),
    "functions in functions": (lambda: holding(holding(1)), lambda: holding(holding(2))),
    "partials": (lambda: functools.partial(reading, z=1), lambda: functools.partial(reading, z=2)),
    "objects": (lambda: Holder(1), lambda: Holder(2)),
    "methods": (lambda: Holder(1).method, lambda: Holder(2).method),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "getters": (lambda: operator.itemgetter(1), lambda: operator.itemgetter(2)),
    "methods of tensors": (lambda: torch.zeros(2).mul, lambda: torch.ones(2).mul),
    "options of modules": (lambda: nn.CrossEntropyLoss(), lambda: nn.CrossEntropyLoss(label_smoothing=0.1)),
    "buffers": (lambda: nn.CrossEntropyLoss(torch.ones(2)), lambda: nn.CrossEntropyLoss(torch.zeros(2))),
    "code of inner functions": (lambda: lambda z: [(lambda: 1)() for _ in z], lambda: lambda z: [(lambda: 2)() for _ in z]),
}


@pytest.mark.parametrize("what", PAIRS)
def test_told_apart_by_what_they_hold(what: str) -> None:
    one, other = PAIRS[what]
    assert callable_name(one()) == callable_name(one())
    assert callable_name(one()).split()[-1] != callable_name(other()).split()[-1]


def test_globals_that_are_read_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = callable_name(reading)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    assert callable_name(reading) != before


def test_what_has_no_content_counts_by_its_type(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with open(tmp_path / "a") as one, open(tmp_path / "b") as other:
        assert callable_name(holding(one)) == callable_name(holding(other))
        assert callable_name(holding(holding(one))) == callable_name(holding(holding(other)))
        assert callable_name(holding(one)) != callable_name(holding(threading.Lock()))
    generator = torch.Generator()
    before = callable_name(holding(generator))
    torch.rand(1, generator=generator)
    assert callable_name(holding(generator)) == before


def test_a_string_stands_for_itself() -> None:
    assert callable_name("margin") == "margin"


def test_the_same_in_every_process() -> None:
    """Addresses and the order of sets are others there."""
    code = """
import torch
from torch import nn
from tests.test_fingerprint import Holder, callable_name, holding
model = nn.Linear(1, 1, bias=False)
model.weight.data.fill_(1)
functions = [holding({"a", "b", "c"}), lambda z: z in {"a", "b", "c"}, Holder({"a": print}), nn.functional.cross_entropy,
             nn.Sequential(model).eval, torch.compile(holding(1)), holding(object())]
print([callable_name(function) for function in functions])
"""
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        found.append(
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        )
    assert found[0].stdout == found[1].stdout
    assert len(set(found[0].stdout.split(","))) == 7
