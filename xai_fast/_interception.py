"""What the function modes of this package need of torch: uncompiled models, and functions that open up to a mode."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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


def uncompiled() -> AbstractContextManager[Any]:
    """Have compiled modules run as they were written: a compiler cannot trace through a function mode of ours."""
    # Nothing can be compiled where the compiler was never imported, which takes a second.
    stance: AbstractContextManager[Any] = nullcontext()
    if "torch._dynamo" in sys.modules:
        stance = torch.compiler.set_stance("force_eager")
    return stance
