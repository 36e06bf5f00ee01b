"""Every rule once more, slowly, in relevance form: autograd Functions whose backward maps R_y to R_x and divides by
activations, as the papers write them. In double precision; eps keeps denominators from 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xai_fast import lrp

EPS = 1e-14


def stab(z: Tensor, eps: float = EPS) -> Tensor:
    return torch.where(z >= 0, z + eps, z - eps)


class _Matmul(torch.autograd.Function):
    """O = A V: the part lam of R to A, the rest to V."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, v: Tensor, lam: float) -> Tensor:
        ctx.save_for_backward(a, v)
        ctx.lam = lam
        return a @ v

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        a, v = ctx.saved_tensors
        s = relevance / stab(a @ v)
        return ctx.lam * a * (s @ v.mT), (1 - ctx.lam) * v * (a.mT @ s), None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.softmax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return x * (relevance - y * relevance.sum(-1, keepdim=True))


class _Linear(torch.autograd.Function):
    """Term by term: z[..., o, i] = x_i w_oi."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, y)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        x, weight, y = ctx.saved_tensors
        z = x[..., None, :] * weight
        return (z / stab(y, ctx.eps)[..., None] * relevance[..., None]).sum(-2), None, None, None


class _LayerNorm(torch.autograd.Function):
    """y = M x with the constant matrix M_oi = (delta_oi - 1/n) w_o / std, term by term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        y = nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        ctx.save_for_backward(x, y)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        x, y = ctx.saved_tensors
        n = x.shape[-1]
        std = (x.var(-1, correction=0, keepdim=True) + ctx.norm.eps).sqrt()
        matrix = (torch.eye(n).double() - 1 / n) * ctx.norm.weight[:, None] / std[..., None]
        return (matrix * x[..., None, :] / stab(y)[..., None] * relevance[..., None]).sum(-2), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return a * relevance / stab(a + b), b * relevance / stab(a + b)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Tensor:
        return relevance


def operations(lam: float = 0.5, eps: float = EPS) -> dict[str, Any]:
    """The arguments of `Transformer.forward` that build it from these Functions."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A constant factor leaves a relevance as it is; autograd would multiply by it.
        scores = _Rescale.apply(_Matmul.apply(q, k.mT, 0.5), q.shape[-1] ** -0.5)
        return _Matmul.apply(_Softmax.apply(scores), v, lam)

    return {
        "linear": lambda h, m: _Linear.apply(h, m.weight, m.bias, eps),
        "attention": attention,
        "norm": lambda h, m: _LayerNorm.apply(h, m),
        "add": _Add.apply,
        "activation": _Identity.apply,
    }


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        return relevance, None


def linear_rule(rule: lrp.Rule, x: Tensor, weight: Tensor, bias: Tensor, relevance: Tensor) -> Tensor:
    """R_x of y = x W^T + b for one rule, from the table of contributions z[b, o, i] = x_i w_oi and the bias as one more."""
    z, b = x[:, None, :] * weight, bias[:, None].expand(len(x), -1, 1)
    y = (z.sum(-1, keepdim=True) + b).expand_as(z[..., :1])
    r = relevance[..., None]

    def shares(terms: Tensor, constant: Tensor | float = 0.0) -> Tensor:
        return terms / stab(terms.sum(-1, keepdim=True) + constant, rule.eps) * r

    if isinstance(rule, lrp.Epsilon):
        found = shares(z, b)
    elif isinstance(rule, lrp.ZPlus):
        found = shares(z.clamp(min=0))
    elif isinstance(rule, lrp.Gamma):
        up, down = (z + rule.gamma * z.clamp(min=0)), (z + rule.gamma * z.clamp(max=0))
        b_up, b_down = (b + rule.gamma * b.clamp(min=0)), (b + rule.gamma * b.clamp(max=0))
        found = torch.where(y > 0, shares(up, b_up), shares(down, b_down))
    elif isinstance(rule, lrp.AlphaBeta):
        found = rule.alpha * shares(z.clamp(min=0), b.clamp(min=0)) - rule.beta * shares(z.clamp(max=0), b.clamp(max=0))
    elif isinstance(rule, lrp.Flat):
        found = shares(torch.ones_like(z))
    elif isinstance(rule, lrp.WSquare):
        found = shares(weight.square().expand_as(z), b.square())
    else:
        assert isinstance(rule, lrp.ZBox)
        found = shares(z - rule.low * weight.clamp(min=0) - rule.high * weight.clamp(max=0))
    return found.sum(1)
