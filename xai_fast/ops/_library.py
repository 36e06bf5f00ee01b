"""Registration of an op with torch.library, and its gradient by way of the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import _backend

P = ParamSpec("P")
T = TypeVar("T")

LIBRARY = torch.library.Library("xai_fast", "DEF")

# Device types that the compiled module has kernels for.
KERNEL_DEVICES = ("cpu", "cuda") if _backend.HAS_CUDA_KERNELS else ("cpu",)


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` of tensors, or sequences of them, outside of the caller's autocast, whose products would be 16-bit."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        device = next(device for device in map(_device_type, args) if device)
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call


def _device_type(argument: Any) -> str | None:
    first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
    return first.device.type if isinstance(first, Tensor) else None


class Op:
    """One op: its torch.library overload, its compiled kernel and its reference.

    Calling it takes the shortest way that is right: the kernel itself for plain tensors in eager mode (a call through
    torch.library costs several microseconds), the overload when something traces or transforms the call, and a recorded
    gradient where one is wanted.
    """

    def __init__(
        self, schema: str, reference: Callable[..., Any], kernel: Callable[..., Any] | None, fake: Callable[..., Any]
    ) -> None:
        """Define ``xai_fast::<schema>``. ``kernel`` serves CPU and CUDA tensors; None without the compiled module.

        Devices without a kernel run ``reference`` and say so once.
        """
        name = schema.split("(", 1)[0]
        self.reference = outside_autocast(reference)
        self.kernel = registered = kernel
        if isinstance(kernel, FunctionType):  # made of torch's ops, which below the overload would record a gradient
            self.kernel = outside_autocast(kernel)
            registered = torch.no_grad()(self.kernel)
        LIBRARY.define(schema)
        LIBRARY.impl(name, self._fallback, "CompositeExplicitAutograd")
        if registered is not None:
            for device in KERNEL_DEVICES:
                LIBRARY.impl(name, registered, device.upper())
        torch.library.register_fake(f"xai_fast::{name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.xai_fast, name).default

    def _fallback(self, *args: Any) -> Any:
        _backend.warn_fallback(args[0].device.type)
        with torch.no_grad():
            return self.reference(*args)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler differentiates the reference itself
            return self.reference(*args) if _wants_gradient(args) else self.overload(*args)
        if self.kernel is not None and _backend.C.callable_directly(args):
            return self.kernel(*args)
        if _wants_gradient(args):
            return _Recompute.apply(self.overload, self.reference, *args)
        return self.overload(*args)


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


class _Recompute(torch.autograd.Function):
    """Forward by the op, backward by differentiating the reference: nothing but the inputs is kept in between."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], reference: Callable[..., Any], *args: Any) -> Any:
        ctx.reference = reference
        ctx.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ctx.constants = [None if isinstance(a, Tensor) else a for a in args]
        ctx.save_for_backward(*(args[i] for i in ctx.places))
        return op(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Any, ...]:
        args = list(ctx.constants)
        wanted = []
        for i, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[i] = saved.detach()
            if ctx.needs_input_grad[2 + i]:
                args[i].requires_grad_()
                wanted.append(i)
        with torch.enable_grad():
            out = ctx.reference(*args)
        outs = out if isinstance(out, tuple) else (out,)
        pairs = [(o, g) for o, g in zip(outs, grad, strict=True) if o.requires_grad]
        differentiable, upstream = zip(*pairs, strict=True)
        grads = torch.autograd.grad(differentiable, [args[i] for i in wanted], upstream, allow_unused=True)
        result: list[Any] = [None] * (2 + len(args))
        for i, g in zip(wanted, grads, strict=True):
            result[2 + i] = g
        return tuple(result)
