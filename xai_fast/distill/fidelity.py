"""How well a student says what its teacher says, order by order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

__all__ = ["Fidelity", "OrderFidelity", "measure"]

ORDERS = ("main effects", "pairs", "triples")


@dataclass(frozen=True)
class OrderFidelity:
    """A student with terms up to one order, against its teacher.

    Attributes
    ----------
    name : str
        "main effects", "pairs" (with the main effects), "triples" (with both).
    terms : int
    r2 : float
        1 - squared error / variance, over all outputs on the scale that was fitted (logits of a classifier).
    r2_error : float
        Standard error of r2 from the number of rows.
    r2_by_output : Tensor, shape (C,)
    kl : float
        Mean Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats; NaN for raw outputs.
    agreement : float
        Share of the rows with the same most probable class; NaN for raw outputs.

    Examples
    --------
    >>> y = torch.tensor([[0.0], [1.0], [2.0]])
    >>> round(measure("pairs", 3, y, y + 0.1, torch.ones(3), "raw").r2, 3)
    0.985
    """

    name: str
    terms: int
    r2: float
    r2_error: float
    r2_by_output: Tensor
    kl: float
    agreement: float


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of all orders, and what no such student can say.

    Attributes
    ----------
    by_order : tuple of OrderFidelity
        Main effects alone, with pairs, with triples: each fitted for itself, as far as the student has them.
    rows : int
    on : str
        "held-out rows" or "given rows".
    residual_share : float
        1 - r2 of the last order: the share of the teacher's variance that these terms do not explain. It includes what the
        student lost by having few rows.
    residual_bounds : (float, float)
        The same on the rows of the fit, which is too small, and `residual_share`, which is too large.

    Examples
    --------
    >>> from xai_fast.distill import fit_gam
    >>> X = torch.rand(2000, 3)
    >>> fidelity = fit_gam(lambda x: x[:, 0] + x[:, 1] * x[:, 2], X, interactions=[(1, 2)]).fidelity()
    >>> [order.name for order in fidelity.by_order], fidelity.r2 > 0.999
    (['main effects', 'pairs'], True)
    """

    by_order: tuple[OrderFidelity, ...]
    rows: int
    on: str
    residual_share: float
    residual_bounds: tuple[float, float]

    @property
    def r2(self) -> float:
        """Of the whole student."""
        return self.by_order[-1].r2

    @property
    def kl(self) -> float:
        """Of the whole student."""
        return self.by_order[-1].kl

    @property
    def agreement(self) -> float:
        """Of the whole student."""
        return self.by_order[-1].agreement

    def __str__(self) -> str:
        lines = [f"fidelity on {self.rows} {self.on}"]
        for o in self.by_order:
            line = f"  {o.name:13} {o.terms:4d} terms   R2 {o.r2:.5f} (standard error {o.r2_error:.1g})"
            if not math.isnan(o.kl):
                line += f"   KL {o.kl:.3g}   same class {o.agreement:.4f}"
            lines.append(line)
        low, high = self.residual_bounds
        lines.append(
            f"  not explained: {self.residual_share:.3g} of the teacher's variance (between {low:.3g} and {high:.3g})"
        )
        return "\n".join(lines)


def measure(name: str, terms: int, y: Tensor, f: Tensor, w: Tensor, kind: str) -> OrderFidelity:
    """Compare a student's outputs f (n, C) with its teacher's y (n, C), rows weighted by w (n,)."""
    w = w / w.sum()
    variance = w @ (y - w @ y) ** 2
    error = w @ (y - f) ** 2
    tiny = torch.finfo(y.dtype).tiny
    total = variance.sum().clamp_min(tiny)
    share = float(error.sum() / total)
    # Of a ratio of two means over the same rows.
    change = ((y - f) ** 2).sum(1) - share * ((y - w @ y) ** 2).sum(1)
    spread = float(((w * change) ** 2).sum().sqrt() / total)
    kl, agreement = math.nan, math.nan
    if kind == "logits":
        log_p, log_q = _log_probabilities(y), _log_probabilities(f)
        kl = float(w @ (log_p.exp() * (log_p - log_q)).sum(1))
        agreement = float(w @ (log_p.argmax(1) == log_q.argmax(1)).to(w.dtype))
    by_output = 1 - error / variance.clamp_min(tiny)
    return OrderFidelity(name, terms, 1 - share, spread, by_output, kl, agreement)


def _log_probabilities(y: Tensor) -> Tensor:
    if y.shape[1] == 1:
        return torch.cat([logsigmoid(-y), logsigmoid(y)], 1)
    return log_softmax(y, dim=1)
