"""Norms, and functions of one element."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _functions as functions
from . import _spellings as spell
from ._arguments import Arguments, Keywords, argument
from .rules import Identity, Norm, Rule

if TYPE_CHECKING:
    from ._mode import RelevanceMode

__all__ = [
    "activation",
    "activation_in_place",
    "group_norm",
    "identity_of_module",
    "instance_norm",
    "layer_norm",
    "rms_norm",
]

# Norms


def layer_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, shape, weight = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "normalized_shape", "weight")))
    rule = mode.rule("norm")
    if not mode.carries(x) or not isinstance(rule, Norm):
        return _other_norm(mode, rule, x, func, args, kwargs)
    eps = argument(args, kwargs, 4, "eps", default=1e-5)
    bias = argument(args, kwargs, 3, "bias")
    with torch.no_grad():
        # This is what F.layer_norm calls, and it tells the scale as well.
        y, _, inverse = torch.native_layer_norm(x, list(shape), weight, bias, eps)
    if mode.switchable:
        y = func(*args, **kwargs)
    centred = () if rule.detach_mean else tuple(range(-len(shape), 0))
    saved = (None if weight is None else weight.detach(), inverse, centred)
    return functions.replace_gradient(y, mode.state, functions.norm_gradient, saved, x)


def rms_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, shape, weight = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "normalized_shape", "weight")))
    rule = mode.rule("norm")
    if not mode.carries(x) or not isinstance(rule, Norm):
        return _other_norm(mode, rule, x, func, args, kwargs)
    eps = argument(args, kwargs, 3, "eps")
    with torch.no_grad():
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean_square = wide.square().mean(tuple(range(-len(shape), 0)), keepdim=True)
        inverse = torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps)).to(x.dtype)
    saved = (None if weight is None else weight.detach(), inverse, ())
    return functions.replace_gradient(mode.value(func, args, kwargs), mode.state, functions.norm_gradient, saved, x)


def group_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, groups, weight = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "num_groups", "weight")))
    eps = argument(args, kwargs, 4, "eps", default=1e-5)
    return _grouped(mode, x, groups, weight, eps, func, args, kwargs)


def instance_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    x, _, _, weight = (argument(args, kwargs, i, name) for i, name in enumerate(names[:4]))
    if not argument(args, kwargs, 5, names[5], default=True):
        return mode.native(func, args, kwargs)
    return _grouped(mode, x, x.shape[1], weight, argument(args, kwargs, 7, "eps", default=1e-5), func, args, kwargs)


def _grouped(
    mode: RelevanceMode,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    eps: float,
    func: Callable[..., Any],
    args: Arguments,
    kwargs: Keywords,
) -> Any:
    rule = mode.rule("norm")
    if not mode.carries(x) or not isinstance(rule, Norm):
        return _other_norm(mode, rule, x, func, args, kwargs)
    with torch.no_grad():
        variance = x.reshape(x.shape[0], groups, -1).var(-1, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + eps)
    saved = (None if weight is None else weight.detach(), inverse, rule.detach_mean)
    return functions.replace_gradient(mode.value(func, args, kwargs), mode.state, functions.group_norm_gradient, saved, x)


def _other_norm(
    mode: RelevanceMode, rule: Rule, x: Tensor, func: Callable[..., Any], args: Arguments, kwargs: Keywords
) -> Any:
    if isinstance(rule, Identity) and mode.carries(x):
        return _with_identity(mode, x, mode.value(func, args, kwargs), 0.0, 0.0)
    return mode.native(func, args, kwargs)


# Functions of one element


def activation(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x = argument(args, kwargs, 0, "input", "self")
    options = (*args[1:], *(value for name, value in kwargs.items() if name not in ("input", "self")))
    if not mode.carries(x) or any(isinstance(option, Tensor) for option in options):
        return func(*args, **kwargs)
    if not isinstance(mode.rule("activation"), Identity):
        return mode.native(func, args, kwargs)
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    _, *rest = args or (None,)
    named = tuple((name, value) for name, value in kwargs.items() if name not in ("input", "self"))
    at_zero, slope = _near_zero(func, tuple(rest), named)
    return _with_identity(mode, x, mode.value(func, (x, *rest), dict(named)), at_zero, slope)


def _with_identity(mode: RelevanceMode, x: Tensor, y: Tensor, at_zero: float, slope: float) -> Tensor:
    with torch.no_grad():
        ratio = functions.identity_ratio(y, x, at_zero, slope)
    return functions.replace_gradient(y, mode.state, functions.identity_gradient, (ratio,), x)


def identity_of_module(mode: RelevanceMode, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The output of a module that is one function of each element, whatever it is made of."""
    if y.shape != x.shape:
        raise ValueError(
            f"layers: expected a module that keeps the shape {tuple(x.shape)}, got {tuple(y.shape)} for Identity()"
        )
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        zero = x.new_zeros(x.shape[-1:]).requires_grad_()
        at_zero = module.forward(zero)
        slope = torch.autograd.grad(at_zero.sum(), zero)[0]
    return _with_identity(mode, x, y if mode.switchable else y.detach(), at_zero.detach()[0].item(), slope[0].item())


def activation_in_place(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x = argument(args, kwargs, 0, "input", "self")
    if not mode.carries(x) or not isinstance(mode.rule("activation"), Identity):
        return mode.native(func, args, kwargs)
    # A copy as input: x is about to be overwritten.
    return x.copy_(activation(mode, spell.ACTIVATION_IN_PLACE[func], (x.clone(), *args[1:]), kwargs))


@functools.lru_cache(maxsize=256)
def _near_zero(func: Callable[..., Any], rest: Arguments, named: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    """f(0) and f'(0)."""
    with torch.enable_grad():
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        y = func(zero, *rest, **dict(named))
    return y.item(), torch.autograd.grad(y, zero)[0].item()
