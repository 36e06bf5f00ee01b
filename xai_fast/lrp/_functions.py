"""The autograd Functions that change a backward pass and leave every forward value as it is.

A gradient g at y stands for the relevance R_y = y g. `Scale` and `scale_in_place` multiply it by a constant (0 stops
it); `replace_gradient` puts a rule in the place of an operation's own gradient. All three ask a `PassState`: one graph
can serve backward passes for true gradients and backward passes for relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops

__all__ = [
    "PassState",
    "RuleGradient",
    "attention_gradient",
    "group_norm_gradient",
    "identity_gradient",
    "identity_ratio",
    "norm_gradient",
    "replace_gradient",
    "scale",
    "scale_in_place",
]

# (g, *saved) -> one gradient for each input of the operation
RuleGradient = Callable[..., Sequence[Tensor | None]]


class PassState:
    """Which of the two kinds of backward pass is running.

    Examples
    --------
    >>> state = PassState()
    >>> with state.relevance_pass():
    ...     print(state.relevance)
    True
    >>> state.relevance
    False
    """

    def __init__(self) -> None:
        self.relevance = False

    @contextmanager
    def relevance_pass(self) -> Iterator[None]:
        """Backward passes inside give relevance instead of gradients."""
        before, self.relevance = self.relevance, True
        try:
            yield
        finally:
            self.relevance = before


class _Scale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, state: PassState) -> Tensor:
        ctx.factor, ctx.state = factor, state
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _scaled(ctx, g), None, None


class _ScaleInPlace(Function):
    """For operations that write to x: a view made in a Function must not be written to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, state: PassState) -> Tensor:
        ctx.factor, ctx.state = factor, state
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _scaled(ctx, g), None, None


def _scaled(ctx: Any, g: Tensor) -> Tensor | None:
    if not ctx.state.relevance:
        return g
    # None, not zeros: 0 times an infinite slope further back would be NaN.
    return g * ctx.factor if ctx.factor else None


def scale(x: Tensor, factor: float, state: PassState) -> Tensor:
    """x, whose relevance is multiplied by `factor`."""
    return x if factor == 1 else _Scale.apply(x, factor, state)


def scale_in_place(x: Tensor, factor: float, state: PassState) -> Tensor:
    """The same on x itself, before an operation that overwrites it."""
    return x if factor == 1 else _ScaleInPlace.apply(x, factor, state)


class _Replace(Function):
    """y, with a rule's gradient towards the inputs in a relevance pass, and y's own graph otherwise."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, state: PassState, gradient: RuleGradient, saved: tuple[Any, ...], *inputs: Tensor
    ) -> Tensor:
        ctx.state, ctx.gradient = state, gradient
        ctx.tensors = [i for i, value in enumerate(saved) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(saved[i] for i in ctx.tensors))
        ctx.saved = [None if isinstance(value, Tensor) else value for value in saved]
        ctx.count = len(inputs)
        # Another tensor on the same memory, not a view of y: the model may go on in place.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if not ctx.state.relevance:
            return g, None, None, None, *[None] * ctx.count
        saved = list(ctx.saved)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            saved[i] = tensor
        # The mode is active here, for gradient checkpointing, and is not meant for the rules themselves.
        with torch._C.DisableTorchFunction():
            return None, None, None, None, *ctx.gradient(g, *saved)


def replace_gradient(y: Tensor, state: PassState, gradient: RuleGradient, saved: tuple[Any, ...], *inputs: Tensor) -> Tensor:
    """y with ``gradient(g, *saved)`` as gradients of `inputs` in a relevance pass.

    Saved outputs of y must be copies: the model may overwrite y.
    """
    result: Tensor = _Replace.apply(y, state, gradient, saved, *inputs)
    return result


def identity_gradient(g: Tensor, ratio: Tensor) -> tuple[Tensor]:
    """R_x = R_y with ratio = y / x."""
    return (g * ratio,)


def norm_gradient(g: Tensor, weight: Tensor | None, inverse: Tensor, centred: tuple[int, ...]) -> tuple[Tensor]:
    """``y = (x - mean) inverse weight`` with the inverse standard deviation as a constant.

    `centred` are the dimensions of the mean that the relevance goes through, none if the mean is a constant or absent.
    """
    g = g * inverse if weight is None else g * weight * inverse
    return (g.sub_(g.mean(centred, keepdim=True)) if centred else g,)


def group_norm_gradient(g: Tensor, weight: Tensor | None, inverse: Tensor, detach_mean: bool) -> tuple[Tensor]:
    """The same for groups of channels: g (B,C,...), inverse (B,G,1)."""
    scaled = g if weight is None else g * weight.view(1, -1, *[1] * (g.ndim - 2))
    scaled = scaled.reshape(*inverse.shape[:2], -1) * inverse
    return ((scaled if detach_mean else scaled - scaled.mean(-1, keepdim=True)).view(g.shape),)


def attention_gradient(
    g: Tensor, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Sequence[Tensor | None]:
    """The rule of fused attention; query (B,H,N,d), key and value (B,Hkv,M,d)."""
    return ops.fused_attention.attention_gradients(query, key, value, g, **options)


def identity_ratio(y: Tensor, x: Tensor, at_zero: float, slope: float) -> Tensor:
    """y / x; its limit `slope` at x = 0 if f(0) = `at_zero` is 0, else with |x| kept away from 0."""
    if at_zero != 0:
        # The range of float16 ends at 65504: the ratio, and a gradient of some size times it, have to stay below.
        least = 1e-3 if x.dtype == torch.float16 else 1e-6
        return y / torch.where(x >= 0, x.clamp(min=least), x.clamp(max=-least))
    ratio = y / x
    # 0 / 0 is rare, and a sum finds it at a fraction of the cost; on a GPU looking at it would make the CPU wait.
    if x.device.type == "cpu" and not ratio.sum().isnan():
        return ratio
    return torch.where(x == 0, slope, ratio)
