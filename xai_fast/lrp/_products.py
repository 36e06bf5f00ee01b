"""Products: with a weight, of tensors that both carry relevance, and fused attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import _functions as functions
from . import _graph as graph
from . import _spellings as spell
from ._arguments import Arguments, Keywords, argument, with_arguments
from ._linear import LINEAR, product
from ._ruled import ruled_linear
from .rules import Attention, Gradient, is_gradient

if TYPE_CHECKING:
    from ._mode import RelevanceMode

__all__ = [
    "addmm",
    "attention_weights",
    "baddbmm",
    "denominator",
    "division",
    "einsum",
    "fused_attention",
    "inner",
    "linear",
    "matmul",
    "multiplication",
    "power",
    "tensordot",
]

# Products with a weight


def linear(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x, weight, bias = (argument(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
    if weight.ndim != 2:
        return func(*args, **kwargs) if bias is not None else _product(mode, func, args, kwargs, (0, "input"), (1, "weight"))
    return ruled_linear(mode, mode.rule("linear", x), LINEAR, x, weight, bias, func, args, kwargs)


def addmm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """bias + x @ weight, as in Hugging Face's Conv1D."""
    bias = argument(args, kwargs, 0, "input", "self")
    x, weight = argument(args, kwargs, 1, "mat1"), argument(args, kwargs, 2, "mat2")
    if mode.carries(bias) or bias.ndim != 1 or kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        return _shared_product(mode, func, args, kwargs, (1, "mat1"), (2, "mat2"))
    if mode.carries(x) and mode.carries(weight):
        return _shared_product(mode, func, args, kwargs, (1, "mat1"), (2, "mat2"))
    return ruled_linear(mode, mode.rule("linear", x), LINEAR, x, weight.mT, bias, func, args, kwargs)


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
        args, kwargs = with_arguments(
            args, kwargs, {left[0]: (left[1], first), right[0]: (right[1], mode.scale(b, share_b))}
        )
        return mode.native(func, args, kwargs)
    if func not in spell.MULTIPLICATION and is_gradient(mode.rule("linear", a if mode.carries(a) else b)):
        return mode.native(func, args, kwargs)
    return func(*args, **kwargs)


def matmul(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    name = next((name for name in ("other", "mat2", "tensor2") if name in kwargs), "other")
    x, weight = argument(args, kwargs, 0, "input", "self"), argument(args, kwargs, 1, name)
    if isinstance(weight, Tensor) and weight.ndim == 2 and func is not Tensor.__rmatmul__ and not mode.carries(weight):
        return ruled_linear(mode, mode.rule("linear", x), LINEAR, x, weight.mT, None, func, args, kwargs)
    return _product(mode, func, args, kwargs, (0, "input"), (1, name))


def inner(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _product(mode, func, args, kwargs, (0, "input"), (1, "vec" if "vec" in kwargs else "other"))


def tensordot(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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
        operands, named = with_arguments(args, kwargs, {left[0]: (left[1], a), right[0]: (right[1], b)})
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
    return ruled_linear(mode, mode.rule("linear", x), operation, x, constant, None, call, (a, b), {})


def _is_parameter(x: Tensor) -> bool:
    """Whether x is a parameter, or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def baddbmm(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    a, b = (argument(args, kwargs, i, name) for i, name in ((1, "batch1"), (2, "batch2")))
    if mode.carries(a) != mode.carries(b) and not _is_parameter(b if mode.carries(a) else a):
        return mode.native(func, args, kwargs)
    return _shared_product(mode, func, args, kwargs, (1, "batch1"), (2, "batch2"))


def einsum(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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


def multiplication(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _shared_product(mode, func, args, kwargs, (0, "input"), (1, "other"))


def power(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """x^p is a product of p factors; with p < 0 it is a denominator, and constant."""
    is_square = getattr(func, "__name__", "").startswith("square")
    base, exponent = argument(args, kwargs, 0, "input", "self"), 2 if is_square else argument(args, kwargs, 1, "exponent")
    if not mode.carries(base) or not isinstance(exponent, (int, float)):
        return func(*args, **kwargs)
    if isinstance(mode.rule("attention"), Gradient):
        return mode.native(func, args, kwargs)
    share = 1 / exponent if exponent > 0 else 0.0
    scaled = functions.scale_in_place(base, share, mode.state) if func in spell.IN_PLACE else mode.scale(base, share)
    return mode.native(func, *with_arguments(args, kwargs, {0: ("input", scaled)}))


def division(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """The denominator is a constant."""
    denominator = argument(args, kwargs, 1, "other")
    if mode.carries(denominator) and not isinstance(mode.rule("norm"), Gradient):
        args, kwargs = with_arguments(args, kwargs, {1: ("other", mode.stop(denominator))})
    return mode.native(func, args, kwargs) if isinstance(denominator, Tensor) else func(*args, **kwargs)


def denominator(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    x = argument(args, kwargs, 0, "input", "self")
    if mode.carries(x) and not isinstance(mode.rule("norm"), Gradient):
        stopped = functions.scale_in_place(x, 0.0, mode.state) if func in spell.IN_PLACE else mode.stop(x)
        args, kwargs = with_arguments(args, kwargs, {0: ("input", stopped)})
    return mode.native(func, args, kwargs)


# Attention


def fused_attention(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
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
    return mode.native(func, *with_arguments(args, kwargs, changes))


def _fits_fused_rule(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        return False
    return query.shape[0] == key.shape[0] and query.shape[1] % key.shape[1] == 0
