"""Arguments of the relevance ops: each check raises one line and gives what the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks as check

LINEAR_RULES = ("epsilon", "zplus", "gamma", "alphabeta", "flat", "wsquare", "zbox")
_LINEAR_ALIASES = {"z+": "zplus", "w2": "wsquare"}


def check_linear_rule(rule: Any) -> str:
    """The rule in the spelling of LINEAR_RULES."""
    plain = _LINEAR_ALIASES.get(str(rule).lower(), str(rule).lower())
    for mark in "-_^ ":
        plain = plain.replace(mark, "")
    plain = _LINEAR_ALIASES.get(plain, plain)
    if not isinstance(rule, str) or plain not in LINEAR_RULES:
        raise ValueError(f"rule: expected one of {', '.join(LINEAR_RULES)}, got {rule!r}")
    return plain


def check_alpha_beta(alpha: Any, beta: Any) -> tuple[float, float]:
    alpha, beta = check.check_number(alpha, "alpha"), check.check_at_least_zero(beta, "beta")
    if abs(alpha - beta - 1) > 1e-9 * max(1.0, abs(alpha)):
        raise ValueError(f"alpha, beta: expected alpha - beta = 1, got {alpha!r} and {beta!r}")
    return alpha, beta


def check_eps(eps: Any) -> float:
    return check.check_at_least_zero(eps, "eps")


def check_lam(lam: Any) -> float:
    value = check.check_number(lam, "lam")
    if not 0 <= value <= 1:
        raise ValueError(f"lam: expected a share in [0, 1], got {lam!r}")
    return value


def check_bound(bound: Any, name: str, x: Tensor) -> Tensor:
    if bound is None:
        raise ValueError(f"{name}: the z_box rule needs the bounds low and high of the input, got None")
    tensor = bound if isinstance(bound, Tensor) else torch.tensor(check.check_number(bound, name), dtype=torch.float64)
    tensor = tensor.to(x)
    try:
        tensor.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {check.shape_of(x)}, got {check.shape_of(tensor)}"
        ) from None
    return tensor


def check_bounds(low: Any, high: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds as tensors, finite and with low <= x <= high up to rounding. Values are not looked at while x is traced."""
    lowest, highest = check_bound(low, "low", x), check_bound(high, "high", x)
    if not check.may_look(x):
        return lowest, highest
    for name, bound in (("low", lowest), ("high", highest)):
        if not bool(bound.isfinite().all()):
            raise ValueError(f"{name}: expected finite bounds, got inf or NaN")
    if bool((lowest > highest).any()):
        raise ValueError("low: expected bounds of at most high, got larger ones")
    # Bounds and inputs that were normalised apart differ in their last digits.
    slack = 4 * torch.finfo(x.dtype).eps * torch.maximum(lowest.abs(), highest.abs())
    if bool((x < lowest - slack).any()):
        raise ValueError(f"low: expected bounds of at most x, got one {(lowest - x).max().item():.3g} above it")
    if bool((x > highest + slack).any()):
        raise ValueError(f"high: expected bounds of at least x, got one {(x - highest).max().item():.3g} below it")
    return lowest, highest


def check_value(value: Any, name: str, batch: int, heads: int, keys: int, like: Tensor) -> None:
    check.check_float_tensor(value, name)
    shape = value.shape
    if len(shape) != 4 or shape[0] != batch or shape[2] != keys or not shape[1] or heads % shape[1] or not shape[3]:
        wanted = f"({batch}, Hkv, {keys}, D) with Hkv a divisor of {heads}"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(shape)}")
    check.check_like(value, name, tuple(shape), like)


def check_attention_inputs(query: Any, key: Any, value: Any) -> None:
    check.check_query_key(query, key)
    if not key.shape[2]:
        raise ValueError(f"key: expected at least one key, got {check.shape_of(key)}")
    check_value(value, "value", query.shape[0], key.shape[1], key.shape[2], query)
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value: expected the {key.shape[1]} heads of key, got {value.shape[1]}")


def attention_options(
    query: Tensor,
    key: Tensor,
    output: Any,
    attn_mask: Any,
    scale: Any,
    is_causal: Any,
    lam: Any,
    eps: Any,
    shape: tuple[int, ...],
) -> tuple[Any, ...]:
    if output is not None:
        check.check_like(output, "output", shape, query)
    if attn_mask is not None:
        attn_mask = check.check_mask(attn_mask, query, key.shape[2])
    return output, attn_mask, check.check_scale(scale, query.dtype), bool(is_causal), check_lam(lam), check_eps(eps)
