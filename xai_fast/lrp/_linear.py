"""Rules of linear operations in gradient form, each written once for F.linear and all convolutions.

With R_y = y g, a rule gives g_x with R_x = x g_x. Rules that treat positive and negative inputs apart need two
gradients, and pick one by the sign of x: nothing is ever divided by x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import _relevance_checks
from .rules import AlphaBeta, Epsilon, Flat, Gamma, Gradient, Rule, WSquare, ZBox, ZPlus

__all__ = [
    "LINEAR",
    "LinearOperation",
    "check_bounds",
    "convolution",
    "direct_relevance",
    "expected_losses",
    "linear_gradient",
    "product",
]


@dataclass(frozen=True)
class LinearOperation:
    """A map (x, weight, bias) -> y that is linear in x, and its transpose in x.

    `options` are those of a convolution, (stride, padding, dilation, transposed, output_padding, groups); None for
    F.linear, empty for other products. is_regular: they are numbers, and x has a batch dimension.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    options: tuple[Any, ...] | None = None
    is_regular: bool = True

    def transpose(self, s: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of ``(y * s).sum()`` with respect to x."""
        weight = weight.to(s.dtype)  # autocast leaves the gradient and the weight in different types
        if self.options is None:
            return s @ weight
        if self.is_regular:
            x = x.to(s.dtype)
            stride, padding, dilation, transposed, output_padding, groups = self.options
            return torch.ops.aten.convolution_backward(
                s, x, weight, None, stride, padding, dilation, transposed, output_padding, groups, (True, False, False)
            )[0]
        with torch.enable_grad():
            probe = torch.zeros_like(x).requires_grad_()
            y = self.forward(probe, weight, None)
        return torch.autograd.grad(y, probe, s)[0]

    def expand_bias(self, bias: Tensor) -> Tensor:
        """(O,) so that it broadcasts against the output."""
        return bias if self.options is None else bias.view(-1, *[1] * len(self.options[2]))

    @property
    def output_dimension(self) -> int:
        """The dimension of the weight that runs over the channels of the output."""
        return 1 if self.options is not None and self.options[3] else 0

    @property
    def has_channels(self) -> bool:
        """Whether there is one: a transposed convolution with groups has none, and of other products it is not known."""
        if self.options is None:
            return True
        return bool(self.options) and not (self.options[3] and self.options[5] != 1)


LINEAR = LinearOperation(F.linear)


def product(call: Callable[[Tensor, Tensor], Tensor]) -> LinearOperation:
    """A sum of products x_i w_j, in whatever way they are summed."""
    return LinearOperation(lambda x, weight, bias: call(x, weight), (), is_regular=False)


def convolution(
    func: Callable[..., Any], x: Tensor, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LinearOperation:
    """The operation of one call of a convolution; args and kwargs are what was given after the bias."""
    spatial, transposed = weight.ndim - 2, "transpose" in func.__name__
    order = (
        ("stride", "padding", "output_padding", "groups", "dilation")
        if transposed
        else ("stride", "padding", "dilation", "groups")
    )
    given = {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "output_padding": 0,
        "groups": 1,
        **dict(zip(order, args, strict=False)),
        **kwargs,
    }

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = func(x, weight, bias, *args, **kwargs)
        return y

    is_regular = not isinstance(given["padding"], str) and x.ndim == weight.ndim
    widths = [
        value if isinstance(value, str) else [value] * spatial if isinstance(value, int) else list(value)
        for value in (given[name] for name in ("stride", "padding", "dilation", "output_padding"))
    ]
    options = (widths[0], widths[1], widths[2], transposed, widths[3], given["groups"])
    return LinearOperation(forward, options, is_regular)


def _share(relevance: Tensor, z: Tensor, eps: float) -> Tensor:
    """relevance / stab(z); with eps = 0 nothing is shared out where z = 0."""
    if eps:
        return relevance / torch.where(z >= 0, z + eps, z - eps)
    return torch.where(z == 0, 0.0, relevance / z)


def linear_gradient(
    operation: LinearOperation, rule: Rule, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
) -> Tensor:
    """g_x of one rule; y is the output of the operation."""
    return _gradient(rule, operation, g, x, weight, bias, y)


@functools.singledispatch
def _gradient(rule: Rule, op: LinearOperation, g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    # Rules whose relevance is no multiple of x; where x is 0 this form loses it.
    return _share(direct_relevance(op, rule, g, x, w, b, y), x, rule.eps)  # type: ignore[attr-defined]


@_gradient.register
def _(rule: Gradient, op: LinearOperation, g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return op.transpose(g, x, w)


@_gradient.register
def _(rule: Epsilon, op: LinearOperation, g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return op.transpose(ops.relevance.stabilized_gradient(g, y, rule.eps) if rule.eps else g, x, w)


@_gradient.register
def _(rule: ZPlus, op: LinearOperation, g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    parts = _Parts.of(op, x, w)
    s = _share(g * y, parts.sum(parts.up, parts.down, None), rule.eps)
    return parts.collect([(s, parts.up, parts.down)])


@_gradient.register
def _(rule: Gamma, op: LinearOperation, g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    parts = _Parts.of(op, x, w)
    up, down = w + rule.gamma * parts.up, w + rule.gamma * parts.down
    bias_up, bias_down = (None, None) if b is None else (b + rule.gamma * b.clamp(min=0), b + rule.gamma * b.clamp(max=0))
    relevance = g * y
    s_up = torch.where(y > 0, _share(relevance, parts.sum(up, down, bias_up), rule.eps), 0.0)
    s_down = torch.where(y < 0, _share(relevance, parts.sum(down, up, bias_down), rule.eps), 0.0)
    return parts.collect([(s_up, up, down), (s_down, down, up)])


@_gradient.register
def _(rule: AlphaBeta, op: LinearOperation, g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    parts = _Parts.of(op, x, w)
    relevance = g * y
    bias_up, bias_down = (None, None) if b is None else (b.clamp(min=0), b.clamp(max=0))
    s_up = _share(rule.alpha * relevance, parts.sum(parts.up, parts.down, bias_up), rule.eps)
    terms = [(s_up, parts.up, parts.down)]
    if rule.beta:
        s_down = _share(-rule.beta * relevance, parts.sum(parts.down, parts.up, bias_down), rule.eps)
        terms.append((s_down, parts.down, parts.up))
    return parts.collect(terms)


@dataclass(frozen=True)
class _Parts:
    """x and the weight, each in its positive and its negative part."""

    op: LinearOperation
    x: Tensor
    up: Tensor
    down: Tensor
    # Behind a ReLU there is nothing negative, and half of the work falls away.
    any_negative: bool

    @classmethod
    def of(cls, op: LinearOperation, x: Tensor, weight: Tensor) -> _Parts:
        return cls(op, x, weight.clamp(min=0), weight.clamp(max=0), bool((x < 0).any()))

    def sum(self, for_positive: Tensor, for_negative: Tensor, bias: Tensor | None) -> Tensor:
        """The output when positive inputs meet one weight and negative inputs another."""
        z = self.op.forward(self.x.clamp(min=0), for_positive, bias)
        return z + self.op.forward(self.x.clamp(max=0), for_negative, None) if self.any_negative else z

    def collect(self, terms: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """The sum over terms (s, weight for positive inputs, weight for negative inputs) of the transposed operation."""
        positive = sum(self.op.transpose(s, self.x, weight) for s, weight, _ in terms)
        assert isinstance(positive, Tensor)
        if not self.any_negative:
            return positive
        negative = sum(self.op.transpose(s, self.x, weight) for s, _, weight in terms)
        return torch.where(self.x < 0, negative, positive)


def check_bounds(rule: Rule, x: Tensor) -> None:
    """ValueError if this is a ZBox whose bounds do not hold for x."""
    if isinstance(rule, ZBox):
        _relevance_checks.check_bounds(rule.low, rule.high, x.detach())


def direct_relevance(
    op: LinearOperation, rule: Rule, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
) -> Tensor:
    """R_x itself, for the rules that are no multiple of x."""
    relevance = g * y
    if isinstance(rule, ZBox):
        low, high = (torch.as_tensor(t, dtype=x.dtype, device=x.device).detach().expand_as(x) for t in (rule.low, rule.high))
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        # b - max(b, 0) - min(b, 0) = 0: the bias takes no part.
        z = op.forward(x, weight, None) - op.forward(low, up, None) - op.forward(high, down, None)
        s = _share(relevance, z, rule.eps)
        return x * op.transpose(s, x, weight) - low * op.transpose(s, x, up) - high * op.transpose(s, x, down)
    assert isinstance(rule, (Flat, WSquare))
    if isinstance(rule, Flat):
        shares, constant = torch.ones_like(weight), None
    else:
        shares, constant = weight.square(), None if bias is None else bias.square()
    z = op.forward(torch.ones_like(x), shares, constant)
    return op.transpose(_share(relevance, z, rule.eps), x, shares)


def expected_losses(rule: Rule, op: LinearOperation, g: Tensor, bias: Tensor | None, y: Tensor) -> dict[str, float] | None:
    """By how much the sums over R_y and R_x differ, by reason; None where no closed form is known.

    Epsilon rule: ``sum R_y eps / (|y| + eps) + sum_o b_o S_o`` with ``S = R_y / stab(y)``.
    """
    if not isinstance(rule, (Gradient, Epsilon)):
        return None
    g, y = g.double(), y.double()
    eps = rule.eps if isinstance(rule, Epsilon) else 0.0
    kept = g * y.abs() / (y.abs() + eps) if eps else g
    losses = {"eps": (y * (g - kept)).sum().item()} if eps else {}
    if bias is not None:
        losses["bias"] = (op.expand_bias(bias.double()) * kept).sum().item()
    return losses
