"""Relevance splitting in plain PyTorch: the definition of the family (see ``csrc/relevance.h`` for the kernels).

Every rule divides by ``stab(x) = x + eps sign(x)`` with sign(0) = +1; what a zero denominator (eps = 0) would pass on is 0.
Functions of ``gradient_form`` take and give modified gradients g instead of relevances R = x g: nothing is divided then.
Every function accepts any floating dtype. 16-bit inputs are computed in float32 and rounded once, at the end.
Arguments are taken as valid: ``xai_fast.ops.relevance`` checks them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from .rollout import REMOVED_BELOW, attention_probabilities, rollout_rows

__all__ = [
    "attention_relevance",
    "av_relevance",
    "identity_gradient",
    "linear_relevance",
    "norm_relevance",
    "skip_relevance",
    "softmax_relevance",
    "stabilized_gradient",
    "targeted_rows",
]


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def _ratio(relevance: Tensor, x: Tensor, eps: float) -> Tensor:
    """R / stab(x); 0 where that divides by 0."""
    stabilized = torch.where(x < 0, x - eps, x + eps)
    empty = stabilized == 0
    return torch.where(empty, 0.0, relevance / torch.where(empty, 1.0, stabilized))


def _damping(x: Tensor, eps: float) -> Tensor:
    """|x| / (|x| + eps), which is x / stab(x); 1 everywhere for eps = 0."""
    return x.abs() / (x.abs() + eps) if eps > 0 else torch.ones_like(x)


def _share(upstream: Tensor, out: Tensor, eps: float, gradient_form: bool) -> Tensor:
    """S = R / stab(O), from the relevance R or from the modified gradient R / O."""
    return upstream * _damping(out, eps) if gradient_form else _ratio(upstream, out, eps)


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """Sum over the query heads of each key head: (B,H,N,D) -> (B,Hkv,N,D)."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).sum(2)


def av_relevance(attention: Tensor, value: Tensor, relevance: Tensor, lam: float, eps: float) -> tuple[Tensor, Tensor]:
    """R_A = lam A o (S V^T), R_V = (1 - lam) V o (A^T S), with S = R / stab(A V)."""
    weights, v = _wide(attention), _wide(value)
    per_head = _per_head(v, weights.shape[1])
    share = _ratio(_wide(relevance), weights @ per_head, eps)
    to_attention = lam * weights * (share @ per_head.transpose(-1, -2))
    to_value = (1 - lam) * v * _per_group(weights.transpose(-1, -2) @ share, value.shape[1])
    return to_attention.to(attention.dtype), to_value.to(value.dtype)


def softmax_relevance(logits: Tensor, probs: Tensor, relevance: Tensor) -> Tensor:
    """R_x = x o (R - A sum_j R_j); removed entries get 0."""
    x, a, r = _wide(logits), _wide(probs), _wide(relevance)
    passed = r - a * r.sum(-1, keepdim=True)
    removed = x <= REMOVED_BELOW
    return torch.where(removed, 0.0, torch.where(removed, 0.0, x) * passed).to(logits.dtype)


def skip_relevance(x: Tensor, y: Tensor, relevance: Tensor, rule: str, eps: float) -> tuple[Tensor, Tensor]:
    """epsilon: R_X = X o R / stab(X + Y). ratio: these shares, rescaled per sample to |A| / (|A| + |B|) of sum R."""
    a, b, r = _wide(x), _wide(y), _wide(relevance)
    share = _ratio(r, a + b, eps)
    to_x, to_y = a * share, b * share
    if rule == "ratio":
        total_x, total_y, total = (_per_sample_sum(t) for t in (to_x, to_y, r))
        weight = _ratio(total, total_x.abs() + total_y.abs(), 0.0)
        # |T| / T of each branch; a branch whose shares add up to 0 has nothing to rescale.
        to_x, to_y = to_x * (weight * total_x.sign()), to_y * (weight * total_y.sign())
    return to_x.to(x.dtype), to_y.to(y.dtype)


def _per_sample_sum(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(1).sum(1).reshape(-1, *(1,) * (x.dim() - 1)) if x.dim() > 0 else x


def norm_relevance(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    upstream: Tensor,
    norm_eps: float,
    eps: float,
    rms: bool,
    detach_mean: bool,
    gradient_form: bool,
) -> Tensor:
    """LayerNorm or RMSNorm with the scale (and on request the mean) as constants, then the epsilon rule."""
    wide = _wide(x)
    mean = torch.zeros_like(wide[..., :1]) if rms else wide.mean(-1, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm_eps)
    w = 1.0 if weight is None else _wide(weight)
    out = centred * inverse * w
    if bias is not None:
        out = out + _wide(bias)
    passed = _share(_wide(upstream), out, eps, gradient_form) * w
    if not rms and not detach_mean:
        passed = passed - passed.mean(-1, keepdim=True)
    passed = passed * inverse
    return (passed if gradient_form else wide * passed).to(x.dtype)


def stabilized_gradient(grad: Tensor, y: Tensor, eps: float) -> Tensor:
    """The epsilon rule at an output y in gradient form: g |y| / (|y| + eps)."""
    return (_wide(grad) * _damping(_wide(y), eps)).to(grad.dtype)


def identity_gradient(grad: Tensor, x: Tensor, y: Tensor, at_zero: float) -> Tensor:
    """The identity rule R_x = R_y in gradient form: g y / x, where x = 0: g at_zero."""
    wide = _wide(x)
    empty = wide == 0
    slope = torch.where(empty, at_zero, _wide(y) / torch.where(empty, 1.0, wide))
    return (_wide(grad) * slope).to(grad.dtype)


# ---- linear layers -----------------------------------------------------------------------------------------------------


def _signed_products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the positive and of the negative products x_k w_ok: two tensors (rows, O)."""
    up, down = x.clamp(min=0), x.clamp(max=0)
    w_up, w_down = weight.clamp(min=0).T, weight.clamp(max=0).T
    return up @ w_up + down @ w_down, up @ w_down + down @ w_up


def _signed_return(x: Tensor, weight: Tensor, share_up: Tensor | None, share_down: Tensor | None) -> Tensor:
    """sum_o of max(x w, 0) share_up + min(x w, 0) share_down: (rows, K)."""
    up, down = x.clamp(min=0), x.clamp(max=0)
    w_up, w_down = weight.clamp(min=0), weight.clamp(max=0)
    total = torch.zeros_like(x)
    if share_up is not None:
        total = total + up * (share_up @ w_up) + down * (share_up @ w_down)
    if share_down is not None:
        total = total + up * (share_down @ w_down) + down * (share_down @ w_up)
    return total


def linear_relevance(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    rule: str,
    eps: float,
    gamma: float,
    alpha: float,
    beta: float,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """R_x of O = x W^T + b under one of the rules of ``ops.linear_relevance``. x (..., K), W (O, K), R (..., O)."""
    rows, w = _wide(x).reshape(-1, x.shape[-1]), _wide(weight)
    b = torch.zeros_like(w[:, 0]) if bias is None else _wide(bias)
    r = _wide(relevance).reshape(-1, weight.shape[0])
    if rule == "epsilon":
        out = rows * (_ratio(r, rows @ w.T + b, eps) @ w)
    elif rule == "zplus":
        up, _ = _signed_products(rows, w)
        out = _signed_return(rows, w, _ratio(r, up, eps), None)
    elif rule == "gamma":
        out = _gamma(rows, w, b, r, eps, gamma)
    elif rule == "alphabeta":
        up, down = _signed_products(rows, w)
        share_up = alpha * _ratio(r, up + b.clamp(min=0), eps)
        share_down = -beta * _ratio(r, down + b.clamp(max=0), eps)
        out = _signed_return(rows, w, share_up, share_down)
    elif rule == "flat":
        out = (r.sum(-1, keepdim=True) / rows.shape[-1]).repeat(1, rows.shape[-1])
    elif rule == "wsquare":
        squared = w.square()
        out = _ratio(r, squared.sum(-1), eps) @ squared
    else:
        out = _z_box(rows, w, r, eps, low, high, x.shape)
    return out.reshape(x.shape).to(x.dtype)


def _gamma(x: Tensor, w: Tensor, b: Tensor, r: Tensor, eps: float, gamma: float) -> Tensor:
    """Contributions x w + gamma max(x w, 0) at positive outputs, x w + gamma min(x w, 0) at negative ones."""
    out = x @ w.T + b
    up, down = _signed_products(x, w)
    favoured = torch.where(out > 0, up + b.clamp(min=0), down + b.clamp(max=0))
    share = torch.where(out == 0, 0.0, _ratio(r, out + gamma * favoured, eps))
    at_positive, at_negative = torch.where(out > 0, share, 0.0), torch.where(out < 0, share, 0.0)
    return x * (share @ w) + gamma * _signed_return(x, w, at_positive, at_negative)


def _z_box(
    x: Tensor, w: Tensor, r: Tensor, eps: float, low: Tensor | None, high: Tensor | None, shape: torch.Size
) -> Tensor:
    """Contributions x w - low max(w, 0) - high min(w, 0); the bias cancels."""
    assert low is not None
    assert high is not None
    lowest, highest = (t.to(x).expand(shape).reshape(x.shape) for t in (low, high))
    w_up, w_down = w.clamp(min=0), w.clamp(max=0)
    out = x @ w.T - lowest @ w_up.T - highest @ w_down.T
    share = _ratio(r, out, eps)
    return x * (share @ w) - lowest * (share @ w_up) - highest * (share @ w_down)


# ---- attention from q, k, v --------------------------------------------------------------------------------------------


def attention_relevance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
    output: Tensor | None,
    attn_mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    lam: float,
    eps: float,
    gradient_form: bool,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The AV rule, the Taylor rule of the softmax and the epsilon rule of (s q) k^T, one after the other.

    With lam = 0 nothing flows to q and k, and tensors without elements stand for their gradients in gradient form.
    """
    probs = attention_probabilities(query, key, attn_mask, lse, scale, is_causal)
    heads, groups = query.shape[1], key.shape[1]
    q, k, v = _wide(query), _wide(key), _wide(value)
    k_heads, v_heads = _per_head(k, heads), _per_head(v, heads)
    out = probs @ v_heads if output is None else _wide(output)
    share = _share(_wide(upstream), out, eps, gradient_form)
    g_v = (1 - lam) * _per_group(probs.transpose(-1, -2) @ share, groups)
    to_value = (g_v if gradient_form else v * g_v).to(value.dtype)
    if lam == 0:
        empty = (query.new_empty(0), key.new_empty(0)) if gradient_form else (torch.zeros_like(query), torch.zeros_like(key))
        return (*empty, to_value)

    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = factor * (q @ k_heads.transpose(-1, -2))
    g_probs = share @ v_heads.transpose(-1, -2)
    g_scores = probs * (g_probs - (share * out).sum(-1, keepdim=True)) * _damping(scores, eps)
    half = 0.5 * lam * factor
    g_q, g_k = half * (g_scores @ k_heads), half * _per_group(g_scores.transpose(-1, -2) @ q, groups)
    if gradient_form:
        return g_q.to(query.dtype), g_k.to(key.dtype), to_value
    return (q * g_q).to(query.dtype), (k * g_k).to(key.dtype), to_value


def targeted_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    rows: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    relevance_out: Tensor | None,
    output: Tensor | None,
    scale: float | None,
    is_causal: bool,
    head_fusion: str,
    clamp: bool,
    residual: float,
    normalize: bool,
    lam: float,
    eps: float,
) -> Tensor:
    """rows (B,R,N) times norm(w I + fuse_h max(0, dA o W)), W = A, or R^A = lam A o (S V^T) if R_O is given."""
    probs = attention_probabilities(query, key, attn_mask, lse, scale, is_causal)
    v = _per_head(_wide(value), query.shape[1])
    weights = probs
    if relevance_out is not None:
        out = probs @ v if output is None else _wide(output)
        weights = lam * probs * (_ratio(_wide(relevance_out), out, eps) @ v.transpose(-1, -2))
    targeted = weights * (_wide(grad_out) @ v.transpose(-1, -2))
    if clamp:
        targeted = targeted.clamp(min=0)
    return rollout_rows(targeted, rows, head_fusion, residual, normalize)
