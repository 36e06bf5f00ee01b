"""What the function mode does with each operation: one handler for all spellings of one kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._interception import opened
from . import _functions as functions
from . import _graph as graph
from . import _spellings as spell
from ._inputs import order_of_ids
from ._linear import LINEAR, LinearOperation, check_bounds, convolution, direct_relevance, linear_gradient, product
from .rules import Attention, Gradient, Identity, Norm, Rule, is_gradient

if TYPE_CHECKING:
    from ._mode import RelevanceMode
    from ._report import Observer
    from .composite import Composite

__all__ = ["Arguments", "Handler", "Keywords", "argument", "attention_weights", "build_table", "identity_of_module"]

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
Handler = Callable[["RelevanceMode", Callable[..., Any], Arguments, Keywords], Any]


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


def argument(args: Arguments, kwargs: Keywords, position: int, *names: str, default: Any = None) -> Any:
    """An argument that may have been given by position or under one of several names."""
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _with_arguments(
    args: Arguments, kwargs: Keywords, changes: Mapping[int, tuple[str, Any]]
) -> tuple[Arguments, dict[str, Any]]:
    """The arguments with some of them replaced, {position: (name, value)}, wherever they were given."""
    positional, keywords = list(args), dict(kwargs)
    for position, (name, value) in changes.items():
        if position < len(positional):
            positional[position] = value
        else:
            keywords[name] = value
    return tuple(positional), keywords


# Linear operations


def _linear(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, weight, bias = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
    if weight.ndim != 2:
        return func(*args, **kwargs) if bias is not None else _product(mode, func, args, kwargs, (0, "input"), (1, "weight"))
    return _ruled_linear(mode, mode.rule("linear", x), LINEAR, x, weight, bias, func, args, kwargs)


def _addmm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """bias + x @ weight, as in Hugging Face's Conv1D."""
    bias = argument(args, kwargs, 0, "input", "self")
    x, weight = argument(args, kwargs, 1, "mat1"), argument(args, kwargs, 2, "mat2")
    if mode.carries(bias) or bias.ndim != 1 or kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        return _shared_product(mode, func, args, kwargs, (1, "mat1"), (2, "mat2"))
    if mode.carries(x) and mode.carries(weight):
        return _shared_product(mode, func, args, kwargs, (1, "mat1"), (2, "mat2"))
    return _ruled_linear(mode, mode.rule("linear", x), LINEAR, x, weight.mT, bias, func, args, kwargs)


def _convolution(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, weight, bias = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
    operation = convolution(
        func, x, weight, args[3:], {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
    )
    return _ruled_linear(mode, mode.rule("convolution", x), operation, x, weight, bias, func, args, kwargs)


def _ruled_linear(
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


def _batch_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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


# Products of tensors that carry relevance: each operand gets its part (AttnLRP, eq. 13; equal parts unless one of them
# holds attention weights).

# Where an operand is given: position and name.
Place = tuple[int, str]


def _parts(mode: RelevanceMode, operands: list[Tensor], is_matrix: bool) -> list[float]:
    rule, count = mode.rule("attention"), len(operands)
    if isinstance(rule, Gradient):
        return [1.0] * count
    assert isinstance(rule, Attention)
    weights = None if rule.lam == 0.5 else attention_weights(operands, is_matrix)
    if weights is None:
        return [1 / count] * count
    return [rule.lam if i == weights else (1 - rule.lam) / (count - 1) for i in range(count)]


def attention_weights(operands: list[Tensor], is_matrix: bool) -> int | None:
    """Which of these operands holds attention weights: the first; in a matrix product else the only one mixed of them."""
    found = [i for i, x in enumerate(operands) if graph.is_attention_weights(x)]
    if not found and is_matrix:
        mixed = [i for i, x in enumerate(operands) if graph.is_attention_weights(x, may_be_mixed=True)]
        found = mixed if len(mixed) == 1 else []
    return found[0] if found else None


def _shared_product(
    mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords, left: Place, right: Place
) -> Any:
    """A product of two operands: shared out if both carry relevance."""
    a, b = argument(args, kwargs, *left), argument(args, kwargs, *right)
    if mode.carries(a) and mode.carries(b):
        share_a, share_b = _parts(mode, [a, b], func not in spell.MULTIPLICATION)
        # The first operand of an in-place operation is overwritten.
        in_place = func in spell.IN_PLACE
        first = functions.scale_in_place(a, share_a, mode.state) if in_place else mode.scale(a, share_a)
        args, kwargs = _with_arguments(
            args, kwargs, {left[0]: (left[1], first), right[0]: (right[1], mode.scale(b, share_b))}
        )
        return mode.native(func, args, kwargs)
    if func not in spell.MULTIPLICATION and is_gradient(mode.rule("linear", a if mode.carries(a) else b)):
        return mode.native(func, args, kwargs)
    return func(*args, **kwargs)


def _matmul(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    name = next((name for name in ("other", "mat2", "tensor2") if name in kwargs), "other")
    x, weight = argument(args, kwargs, 0, "input", "self"), argument(args, kwargs, 1, name)
    if isinstance(weight, Tensor) and weight.ndim == 2 and func is not Tensor.__rmatmul__ and not mode.carries(weight):
        return _ruled_linear(mode, mode.rule("linear", x), LINEAR, x, weight.mT, None, func, args, kwargs)
    return _product(mode, func, args, kwargs, (0, "input"), (1, name))


def _inner(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _product(mode, func, args, kwargs, (0, "input"), (1, "vec" if "vec" in kwargs else "other"))


def _tensordot(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _product(mode, func, args, kwargs, (0, "a"), (1, "b"), is_batched=False)


def _product(
    mode: RelevanceMode,
    func: Callable[..., Any],
    args: Arguments,
    kwargs: Keywords,
    left: Place,
    right: Place,
    is_batched: bool = True,
) -> Any:
    """A sum of products; is_batched: what comes before the last two dimensions of an operand is not summed over."""
    a, b = argument(args, kwargs, *left), argument(args, kwargs, *right)
    carrying = mode.carries(a), mode.carries(b)
    if all(carrying):
        return _shared_product(mode, func, args, kwargs, left, right)
    if not any(carrying) or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return func(*args, **kwargs)

    def call(a: Tensor, b: Tensor) -> Tensor:
        operands, named = _with_arguments(args, kwargs, {left[0]: (left[1], a), right[0]: (right[1], b)})
        y: Tensor = func(*operands, **named)
        return y

    constant = b if carrying[0] else a
    return _constant_product(mode, call, a, b, is_batched and constant.ndim > 2)


def _constant_product(
    mode: RelevanceMode, call: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, is_batched: bool
) -> Any:
    """A sum of products with one constant operand: a weight, if it is a parameter or a matrix without batch dimensions.

    Others are activations that happen to be constant, or the vector of a score; they keep their gradient.
    """
    x, constant = (a, b) if mode.carries(a) else (b, a)
    if (is_batched or constant.ndim < 2) and not _is_parameter(constant):
        return mode.native(call, (a, b), {})
    operation = product(call if x is a else lambda x, weight: call(weight, x))
    return _ruled_linear(mode, mode.rule("linear", x), operation, x, constant, None, call, (a, b), {})


def _is_parameter(x: Tensor) -> bool:
    """Whether x is a parameter, or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def _baddbmm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    a, b = (argument(args, kwargs, i, name) for i, name in ((1, "batch1"), (2, "batch2")))
    if mode.carries(a) != mode.carries(b) and not _is_parameter(b if mode.carries(a) else a):
        return mode.native(func, args, kwargs)
    return _shared_product(mode, func, args, kwargs, (1, "batch1"), (2, "batch2"))


def _einsum(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    if not args or not isinstance(args[0], str):
        return func(*args, **kwargs)
    equation = args[0]
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else list(args[1:])
    carrying = [i for i, operand in enumerate(operands) if mode.carries(operand)]
    if len(carrying) == 1 and (_sums_nothing(equation) or is_gradient(mode.rule("linear", operands[carrying[0]]))):
        return mode.native(func, args, kwargs)
    if len(carrying) == 1 and len(operands) == 2:
        first, second = operands
        return _constant_product(mode, lambda a, b: func(equation, a, b), first, second, _has_batch_index(equation))
    if len(carrying) < 2:
        return func(*args, **kwargs)
    for i, share in zip(carrying, _parts(mode, [operands[i] for i in carrying], True), strict=True):
        operands[i] = mode.scale(operands[i], share)
    return mode.native(func, (equation, *operands), kwargs)


def _sums_nothing(equation: str) -> bool:
    """Whether every entry of the result is one product."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = set(inputs) - {",", "."}
    return letters <= set(output) if arrow else all(inputs.count(letter) == 1 for letter in letters)


def _has_batch_index(equation: str) -> bool:
    """Whether the two operands have an index in common that is not summed over."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    first, second = (set(term) for term in inputs.split(","))
    return bool(first & second & set(output if arrow else "."))


def _multiplication(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _shared_product(mode, func, args, kwargs, (0, "input"), (1, "other"))


def _power(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """x^p is a product of p factors; with p < 0 it is a denominator, and constant."""
    is_square = getattr(func, "__name__", "").startswith("square")
    base, exponent = argument(args, kwargs, 0, "input", "self"), 2 if is_square else argument(args, kwargs, 1, "exponent")
    if not mode.carries(base) or not isinstance(exponent, (int, float)):
        return func(*args, **kwargs)
    if isinstance(mode.rule("attention"), Gradient):
        return mode.native(func, args, kwargs)
    share = 1 / exponent if exponent > 0 else 0.0
    scaled = functions.scale_in_place(base, share, mode.state) if func in spell.IN_PLACE else mode.scale(base, share)
    return mode.native(func, *_with_arguments(args, kwargs, {0: ("input", scaled)}))


def _division(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """The denominator is a constant."""
    denominator = argument(args, kwargs, 1, "other")
    if mode.carries(denominator) and not isinstance(mode.rule("norm"), Gradient):
        args, kwargs = _with_arguments(args, kwargs, {1: ("other", mode.stop(denominator))})
    return mode.native(func, args, kwargs) if isinstance(denominator, Tensor) else func(*args, **kwargs)


def _denominator(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x = argument(args, kwargs, 0, "input", "self")
    if mode.carries(x) and not isinstance(mode.rule("norm"), Gradient):
        stopped = functions.scale_in_place(x, 0.0, mode.state) if func in spell.IN_PLACE else mode.stop(x)
        args, kwargs = _with_arguments(args, kwargs, {0: ("input", stopped)})
    return mode.native(func, args, kwargs)


# Attention


def _fused_attention(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    query, key, value, mask, dropout, is_causal = (argument(args, kwargs, i, name) for i, name in enumerate(names))
    if dropout and not mode.switchable:
        raise ValueError(f"model: expected no dropout in attention, got dropout_p={dropout}; call model.eval()")
    rule = mode.rule("attention")
    query_key = [mode.carries(t) for t in (query, key)]
    if isinstance(rule, Gradient) or not (any(query_key) or mode.carries(value)):
        return mode.native(func, args, kwargs)
    assert isinstance(rule, Attention)
    # A constant operand gets nothing, and leaves its part to the other; lam = 0 says that A is constant.
    to_weights = rule.lam if mode.carries(value) else float(rule.lam > 0)
    to_value = 1 - rule.lam if any(query_key) else 1.0
    if rule.eps or (rule.lam == 0 and all(query_key) and _fits_fused_rule(query, key, value) and not mode.carries(mask)):
        if not _fits_fused_rule(query, key, value):
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise ValueError(f"rule: Attention with eps > 0 needs query (B,H,N,d), key and value (B,Hkv,M,d), got {shapes}")
        options = {
            "attn_mask": mask,
            "is_causal": bool(is_causal),
            "scale": kwargs.get("scale"),
            "lam": rule.lam,
            "eps": rule.eps,
        }
        y, saved = mode.value(func, args, kwargs), (query, key, value, options)
        return functions.replace_gradient(y, mode.state, functions.attention_gradient, saved, query, key, value)
    share = to_weights / max(1, sum(query_key))
    changes = {
        0: ("query", mode.scale(query, share)),
        1: ("key", mode.scale(key, share)),
        2: ("value", mode.scale(value, to_value)),
    }
    if mode.carries(mask):
        changes[3] = ("attn_mask", mode.scale(mask, to_weights))
    return mode.native(func, *_with_arguments(args, kwargs, changes))


def _fits_fused_rule(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        return False
    return query.shape[0] == key.shape[0] and query.shape[1] % key.shape[1] == 0


# Norms


def _layer_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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


def _rms_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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


def _group_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, groups, weight = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "num_groups", "weight")))
    eps = argument(args, kwargs, 4, "eps", default=1e-5)
    return _grouped(mode, x, groups, weight, eps, func, args, kwargs)


def _instance_norm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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


def _activation(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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


def _activation_in_place(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x = argument(args, kwargs, 0, "input", "self")
    if not mode.carries(x) or not isinstance(mode.rule("activation"), Identity):
        return mode.native(func, args, kwargs)
    # A copy as input: x is about to be overwritten.
    return x.copy_(_activation(mode, spell.ACTIVATION_IN_PLACE[func], (x.clone(), *args[1:]), kwargs))


@functools.lru_cache(maxsize=256)
def _near_zero(func: Callable[..., Any], rest: Arguments, named: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    """f(0) and f'(0)."""
    with torch.enable_grad():
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        y = func(zero, *rest, **dict(named))
    return y.item(), torch.autograd.grad(y, zero)[0].item()


# The rest


def _plain(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """The gradient is the rule already; of a softmax the Taylor rule R_x = x (R_y - y sum R_y) of AttnLRP (eq. 13)."""
    return func(*args, **kwargs)


def _dropout(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    p = argument(args, kwargs, 1, "p", default=0.5)
    if p and argument(args, kwargs, 2, "training", "train", default=True) and not mode.switchable:
        raise ValueError(f"model: expected no active dropout, got p={p} in training mode; call model.eval()")
    return func(*args, **kwargs)


def _embedding(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    out = func(*args, **kwargs)
    ids = argument(args, kwargs, 0, "input", "indices")
    if func is torch.embedding:
        ids = argument(args, kwargs, 1, "indices")
    for given, leaves in mode.embedded:
        order = order_of_ids(ids, given)
        if order is None:
            continue
        # Shaped like the given ids (B,N), whatever the model made of them.
        leaf = out.detach().permute(*order, -1).reshape(*given.shape, out.shape[-1]).requires_grad_()
        # Gradient checkpointing runs this again, for values only: the graph is the one of the first run.
        if torch._C._current_graph_task_id() == -1:
            leaves.append(leaf)
        permuted = leaf.clone().view(*(ids.shape[i] for i in order), out.shape[-1])
        out = permuted.permute(*(order.index(i) for i in range(ids.ndim)), -1)
        mode.inputs.append(out)
    return out


def _backward(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """With the mode active inside: gradient checkpointing runs parts of the forward pass again."""
    with mode:
        return opened(func)(*args, **kwargs)


def _open(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    with mode:
        return opened(func)(*args, **kwargs)


def build_table(composite: Composite, observer: Observer | None) -> dict[Callable[..., Any], Handler]:
    """Function -> handler, of the functions that this composite (or the observer) needs to see."""
    table: dict[Callable[..., Any], Handler] = {}

    def add(spellings: Any, handler: Handler, kind: str | None = None) -> None:
        if observer is not None and kind is not None:
            handler = observer.watching(handler, kind)
        table.update(dict.fromkeys(spellings, handler))

    if observer is not None or composite.ruled_kinds():
        add({F.linear}, _linear, "linear")
        add({torch.addmm, Tensor.addmm}, _addmm, "linear")
        add(spell.CONVOLUTION | spell.TRANSPOSED_CONVOLUTION, _convolution, "convolution")
    else:
        add({torch.addmm, Tensor.addmm}, _addmm)
    if observer is not None:
        add(spell.SOFTMAX, _plain, "softmax")
        add(spell.ADDITION, _plain, "addition")
    add(spell.PRODUCT, _matmul, "product")
    add(spell.INNER, _inner, "product")
    add(spell.TENSORDOT, _tensordot, "product")
    add({torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_}, _baddbmm, "product")
    add({torch.einsum, torch.functional.einsum}, _einsum, "product")
    add(spell.MULTIPLICATION, _multiplication, "product")
    add(spell.POWER, _power)
    add(spell.DIVISION, _division)
    add(spell.DENOMINATOR, _denominator)
    add({F.scaled_dot_product_attention}, _fused_attention, "attention")
    add({F.layer_norm, torch.layer_norm}, _layer_norm, "norm")
    add({F.rms_norm, torch.rms_norm}, _rms_norm, "norm")
    add({F.group_norm, torch.group_norm}, _group_norm, "norm")
    add({F.instance_norm}, _instance_norm, "norm")
    add({F.batch_norm}, _batch_norm, "batch norm")
    add(spell.ACTIVATION, _activation, "activation")
    add(spell.ACTIVATION_IN_PLACE, _activation_in_place)
    add(spell.DROPOUT, _dropout)
    add({F.embedding, torch.embedding}, _embedding)
    add(spell.OPENED, _open)
    add(spell.BACKWARD, _backward)
    return table
