"""What the function modes of this package need of torch: uncompiled models, and functions that open up to a mode."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["opened", "uncompiled"]


@functools.cache
def opened(func: Any) -> Callable[..., Any]:
    """A Python function of torch that runs its body even if a function mode is active: the mode sees what it calls."""

    def nothing(*_: Any) -> bool:
        return False

    overrides = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(overrides, nothing)}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


class _Uncompiled:
    """Shared by all that are inside, in whatever order and threads they leave: the stance is one for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            # Nothing can be compiled where the compiler was never imported, which takes a second.
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                stance, self._stance = self._stance, None
                stance.__exit__(None, None, None)


_UNCOMPILED = _Uncompiled()


def uncompiled() -> AbstractContextManager[Any]:
    """Have compiled modules run as they were written: a compiler cannot trace through a function mode of ours."""
    return _UNCOMPILED
