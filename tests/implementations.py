"""The compiled kernels behind one signature: on the CPU, emulated CUDA on the CPU, and CUDA where a GPU is present.

What the tests of every family ask of them: results that depend neither on the order of threads nor on their number.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulator.build import cuda_include, sanitized
from tests.emulator.extension import emulated_module
from xai_fast import _backend

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass(frozen=True)
class Implementation:
    """Calls a function of the compiled module on tensors of one device."""

    name: str
    device: str
    load: Callable[[], ModuleType]
    emulated: bool = False

    def __call__(self, function: str, *args: Any) -> Any:
        """A Tensor, or a tuple of them, on the CPU."""
        moved = [self._moved(a) if isinstance(a, Tensor) else a for a in args]
        result = getattr(self.load(), function)(*moved)
        return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

    def _moved(self, a: Tensor) -> Tensor:
        """On the device with its strides and its place in the storage, which ``Tensor.to`` would not keep."""
        if self.device == "cpu":
            return a
        storage = torch.empty(0, dtype=a.dtype).set_(a.untyped_storage())
        return storage.to(self.device).as_strided(a.shape, a.stride(), a.storage_offset())


def _emulated(cuda: bool) -> ModuleType:
    module = emulated_module()
    module.emulate_cuda(cuda)
    return module


@functools.cache
def available() -> list[Implementation]:
    """The CPU kernels first. Under sanitizers they are those of the module that is built with them."""
    if _backend.C is None:
        raise RuntimeError(f"the tests need the compiled module: {_backend.REASON}")
    cpu = Implementation("cpu", "cpu", (lambda: _emulated(False)) if sanitized() else (lambda: _backend.C))
    found = [cpu]
    if cuda_include() is not None:
        found.append(Implementation("emulated-cuda", "cpu", lambda: _emulated(True), emulated=True))
    elif os.environ.get("XAI_FAST_CUDA") == "1":
        raise RuntimeError("XAI_FAST_CUDA=1 but the CUDA headers that the emulator needs were not found; set CUDA_HOME")
    if torch.cuda.is_available() and _backend.HAS_CUDA_KERNELS:
        found.append(Implementation("cuda", "cuda", lambda: _backend.C))
    return found


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def assert_same_bits(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def assert_order_of_threads_does_not_matter(seed: int, calls: Iterable[tuple[Any, ...]]) -> None:
    """Each call is (function, *args). A missing barrier shows as a difference between the emulator's schedules."""
    emulated = next((i for i in available() if i.emulated), None)
    if emulated is None:
        pytest.skip("no CUDA headers for the emulator")
    calls = list(calls)

    def run(schedule: int) -> list[Tensor]:
        emulated.load().set_schedule_seed(schedule)
        return [t for call in calls for t in tensors_of(emulated(*call))]

    try:
        expected = run(0)
        assert_same_bits(run(seed), expected)
    finally:
        emulated.load().set_schedule_seed(0)


def with_threads(count: int, call: Callable[[], Any]) -> Any:
    """What `call` returns with `count` threads of torch."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return call()
    finally:
        torch.set_num_threads(before)


def assert_number_of_threads_does_not_matter(call: Callable[[], tuple[Tensor, ...]]) -> None:
    one, *others = (with_threads(count, call) for count in (1, 2, 3))
    for other in others:
        assert_same_bits(other, one)
