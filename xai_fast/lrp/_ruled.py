"""Linear operations with a constant weight: the rule of each call, and batch norms merged into the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _functions as functions
from ._arguments import Arguments, Keywords, argument
from ._linear import LinearOperation, check_bounds, direct_relevance, linear_gradient
from ._linear import convolution as convolution_of
from .rules import Rule, is_gradient

if TYPE_CHECKING:
    from ._mode import RelevanceMode

__all__ = ["RuledLinear", "batch_norm", "convolution", "ruled_linear"]


@dataclass(frozen=True)
class RuledLinear:
    """Note on the output of a linear operation with a rule: a batch norm that reads it is merged into the weights."""

    operation: LinearOperation
    rule: Rule
    x: Tensor
    # Of x: it may be overwritten before the batch norm runs.
    version: int
    weight: Tensor
    bias: Tensor | None


def convolution(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, weight, bias = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
    operation = convolution_of(
        func, x, weight, args[3:], {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
    )
    return ruled_linear(mode, mode.rule("convolution", x), operation, x, weight, bias, func, args, kwargs)


def ruled_linear(
    mode: RelevanceMode,
    rule: Rule,
    operation: LinearOperation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    func: Callable[..., Any],
    args: Arguments,
    kwargs: Keywords,
) -> Any:
    if not mode.carries(x) or mode.carries(weight):
        return func(*args, **kwargs)
    if is_gradient(rule):
        return mode.native(func, args, kwargs)
    check_bounds(rule, x)
    y = mode.value(func, args, kwargs)
    call = RuledLinear(operation, rule, x, x._version, weight.detach(), None if bias is None else bias.detach())
    out = _with_rule(mode, call, y)
    mode.note(out, call)
    return out


def _with_rule(mode: RelevanceMode, call: RuledLinear, y: Tensor) -> Tensor:
    """y with the rule as its gradient."""
    operation, rule = call.operation, call.rule
    is_direct = rule.is_direct and mode.reads_input(call.x)

    def gradient(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> tuple[Tensor | None]:
        if not is_direct:
            return (linear_gradient(operation, rule, g, x, weight, bias, y),)
        mode.direct.append((call.x, direct_relevance(operation, rule, g, x, weight, bias, y)))
        return (None,)

    saved = (call.x, call.weight, call.bias, y.detach().clone())
    return functions.replace_gradient(y, mode.state, gradient, saved, call.x)


def batch_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """An affine map of each channel; merged into the linear operation before it if that one has a rule."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, variance, weight, bias, training, _, eps = (
        argument(args, kwargs, i, name, default=default)
        for i, (name, default) in enumerate(zip(names, (None,) * 5 + (False, 0.1, 1e-5), strict=True))
    )
    if mode.switchable and (training or mean is None):
        return func(*args, **kwargs)
    if mean is None:
        raise ValueError(
            "model: expected batch norm with running statistics, got one that takes those of the batch "
            "(track_running_stats=False)"
        )
    if training:
        raise ValueError("model: expected batch norm in evaluation mode, got training mode; call model.eval()")
    call = mode.note_on(x)
    if not isinstance(call, RuledLinear) or call.x._version != call.version or not call.operation.has_channels:
        return mode.native(func, args, kwargs)
    factor = torch.rsqrt(variance + eps) * (1.0 if weight is None else weight.detach())
    shape = [1] * call.weight.ndim
    shape[call.operation.output_dimension] = -1
    offset = (-mean if call.bias is None else call.bias - mean) * factor
    merged = RuledLinear(
        call.operation,
        call.rule,
        call.x,
        call.version,
        call.weight * factor.view(shape),
        offset if bias is None else offset + bias.detach(),
    )
    return _with_rule(mode, merged, mode.value(func, args, kwargs))
