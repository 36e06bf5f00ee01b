"""Student's t distribution, Welch's test and corrections for many tests, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CORRECTIONS", "adjusted", "incomplete_beta", "student_two_sided", "welch"]

CORRECTIONS = ("bonferroni", "holm", "fdr_bh", None)
CONTINUED = 2000
TINY = 1e-300


def incomplete_beta(a: Tensor, b: Tensor, x: Tensor, rest: Tensor | None = None) -> Tensor:
    """I_x(a, b), regularised, for a, b > 0 and 0 <= x <= 1; `rest` is 1 - x where that is known without cancellation.

    Notes
    -----
    The continued fraction of Press et al., Numerical Recipes, section 6.4, evaluated by Lentz's method where it converges
    fast, and I_x(a, b) = 1 - I_{1-x}(b, a) elsewhere.

    Examples
    --------
    >>> half = torch.tensor(0.5, dtype=torch.float64)
    >>> round(float(incomplete_beta(2 * half, 4 * half, half)), 12)
    0.75
    """
    a, b, x = torch.broadcast_tensors(*(torch.as_tensor(t, dtype=torch.float64) for t in (a, b, x)))
    rest = 1 - x if rest is None else rest.expand_as(x)
    swap = x > (a + 1) / (a + b + 2)
    left, right = torch.where(swap, b, a), torch.where(swap, a, b)
    at, other = torch.where(swap, rest, x), torch.where(swap, x, rest)
    log_beta = torch.lgamma(left) + torch.lgamma(right) - torch.lgamma(left + right)
    front = (torch.xlogy(left, at) + torch.xlogy(right, other) - log_beta).exp() / left
    part = front * _fraction(left, right, at)
    return torch.where(swap, 1 - part, part)


def _fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    def step(d: Tensor, c: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        d, c = 1 + term * d, 1 + term / c
        d = torch.where(d.abs() < TINY, TINY, d)
        return 1 / d, torch.where(c.abs() < TINY, TINY, c)

    c = torch.ones_like(x)
    d, _ = step(c, c, -(a + b) * x / (a + 1))
    value = d
    for m in range(1, CONTINUED):
        d, c = step(d, c, m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)))
        value = value * d * c
        d, c = step(d, c, -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)))
        value = value * d * c
        if bool(((d * c - 1).abs() < 1e-15).all()):
            break
    return value


def student_two_sided(t: Tensor, freedom: Tensor) -> Tensor:
    """P(|T| >= |t|) of Student's t with that many degrees of freedom: I_{f/(f+t^2)}(f/2, 1/2).

    Examples
    --------
    >>> round(float(student_two_sided(torch.tensor(2.776445), torch.tensor(4.0))), 6)
    0.05
    """
    t, freedom = (torch.as_tensor(v, dtype=torch.float64) for v in (t, freedom))
    square = t.square()
    never = square.isinf()
    square = torch.where(never, 0.0, square)
    p = incomplete_beta(
        freedom / 2, torch.full_like(freedom, 0.5), freedom / (freedom + square), square / (freedom + square)
    )
    return torch.where(never, 0.0, p)


def welch(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two-sided Welch test of the means over the last dimension: (t, degrees of freedom, p).

    Without any variance, p is 1 for equal means and 0 for others.

    Examples
    --------
    >>> t, freedom, p = welch(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
    >>> round(float(t), 4), round(float(freedom), 4), round(float(p), 4)
    (-1.2247, 4.0, 0.2879)
    """
    first, second = first.double(), second.double()
    n, m = first.shape[-1], second.shape[-1]
    gap = first.mean(-1) - second.mean(-1)
    a, b = first.var(-1) / n, second.var(-1) / m
    # Equal values can leave a variance of their rounding.
    noise = (torch.finfo(torch.float64).eps * torch.maximum(first.abs().amax(-1), second.abs().amax(-1))).square()
    total = torch.where(a + b > 16 * noise, a + b, torch.zeros_like(a + b))
    gap = torch.where(gap.square() > 16 * noise, gap, 0.0)
    t = torch.where(gap == 0, 0.0, gap / total.sqrt())
    freedom = torch.where(total > 0, total.square() / (a.square() / (n - 1) + b.square() / (m - 1)), float(n + m - 2))
    return t, freedom, student_two_sided(t, freedom)


def adjusted(p: Tensor, correction: str | None) -> Tensor:
    """p-values of many tests, corrected: compare them with alpha.

    "bonferroni" and "holm" bound the chance of any false discovery, "fdr_bh" (Benjamini and Hochberg 1995) the expected
    share of false ones.

    Examples
    --------
    >>> p = torch.tensor([0.01, 0.04, 0.03])
    >>> [adjusted(p, c).mul(1000).round().int().tolist() for c in ("bonferroni", "holm", "fdr_bh", None)]
    [[30, 120, 90], [30, 60, 60], [30, 40, 40], [10, 40, 30]]
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction: expected one of {', '.join(map(str, CORRECTIONS))}, got {correction!r}")
    flat = p.double().flatten()
    if correction is None:
        return p.double()
    if correction == "bonferroni":
        return (p.double() * len(flat)).clamp_max(1)
    order = flat.argsort()
    place = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=p.device)
    if correction == "holm":
        values = (flat[order] * (len(flat) - place + 1)).cummax(0).values
    else:
        values = (flat[order] * len(flat) / place).flip(0).cummin(0).values.flip(0)
    return torch.empty_like(flat).scatter(0, order, values.clamp_max(1)).view(p.shape)
