"""Functional ANOVA of tables: what a table of two or three features holds that belongs to fewer of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import _checks as check

__all__ = ["lower_effects", "purify"]

# Rounds of the exact solve: the second takes out what rounding left of the first.
ROUNDS = 3


def purify(scores: Any, weights: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Split a pair table into row effects, column effects, an intercept and what is pure interaction.

    .. math:: s_{ij} = m + r_i + c_j + p_{ij}, \quad \sum_j w_{ij} p_{ij} = 0, \quad \sum_i w_{ij} p_{ij} = 0,
              \quad \sum_i w_{i\cdot} r_i = 0, \quad \sum_j w_{\cdot j} c_j = 0

    m + r_i + c_j is the weighted least-squares fit of an additive table, found by one direct solve.

    Parameters
    ----------
    scores : Tensor or array, shape (I, J) or (I, J, C)
        The table; C outputs are purified one by one with the same weights.
    weights : Tensor or array, shape (I, J)
        How much data each cell holds, at least 0.

    Returns
    -------
    pure : Tensor, shape of scores
    row_effects : Tensor, shape (I,) or (I, C)
    column_effects : Tensor, shape (J,) or (J, C)
    intercept : Tensor, shape () or (C,)
        In the dtype of scores (float64 unless that is floating), computed in float64. In every cell scores = pure +
        row effect + column effect + intercept.

    Raises
    ------
    TypeError, ValueError
        Wrong shapes, numbers that are not finite, negative weights or no weight above 0.

    Notes
    -----
    A cell without data (weight 0) takes part in no condition; what it keeps as pure is what the effects leave of its score.
    A row or column without data has the effect 0. Where the data fall into parts that share no row and no column, the
    effects of the parts are determined up to constants that cancel; the pure table is unique where there are data.
    Sources: Hooker (2007), "Generalized Functional ANOVA Diagnostics for High Dimensional Functions of Dependent Variables";
    Lengerich et al. (2020), "Purifying Interaction Effects with the Functional ANOVA", whose algorithm moves mass back and
    forth until it settles in the same place.

    Examples
    --------
    >>> scores = torch.tensor([[1.0, 2.0], [3.0, 8.0]])
    >>> pure, rows, columns, intercept = purify(scores, torch.ones(2, 2))
    >>> pure
    tensor([[ 1., -1.],
            [-1.,  1.]])
    >>> rows, columns, intercept
    (tensor([-2.,  2.]), tensor([-1.5000,  1.5000]), tensor(3.5000))
    """
    s, w = _check(scores, weights)
    table = s.to(torch.float64).reshape(*w.shape, -1)
    pure, (rows, columns) = lower_effects(table, w)
    intercept = torch.zeros_like(table[0, 0])
    effects = []
    for effect, mass in ((rows, w.sum(1)), (columns, w.sum(0))):
        mean = (mass @ effect) / mass.sum()
        # Nothing is known of a row without data: it takes the mean.
        effects.append((effect - mean) * (mass > 0)[:, None])
        intercept += mean
    pure = table - effects[0][:, None] - effects[1][None, :] - intercept
    shapes = (s.shape, (s.shape[0], *s.shape[2:]), (s.shape[1], *s.shape[2:]), s.shape[2:])
    found = [x.reshape(shape).to(s.dtype) for x, shape in zip((pure, *effects, intercept), shapes, strict=True)]
    return found[0], found[1], found[2], found[3]


def lower_effects(table: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What is left of a table (bins..., C) and its projections on all but one of its axes, first axis missing last.

    For two axes the effects are (I, C) and (J, C); for three (I, J, C), (I, K, C), (J, K, C). What is left sums to zero,
    with the weights (bins...), along every axis. The effects themselves are not purified.
    """
    shape, outputs = weights.shape, table.shape[-1]
    columns = _columns(shape, table.device)
    sizes = [int(c.max()) + 1 for c in columns]
    w = weights.reshape(-1)
    G = _gram(columns, sizes, w)
    scale = G.diagonal().clamp_min(torch.finfo(G.dtype).tiny).rsqrt() * (G.diagonal() > 0)
    values, vectors = torch.linalg.eigh(scale[:, None] * G * scale)
    kept = values > 1e-13 * max(1, len(values))
    half = scale[:, None] * vectors[:, kept] * values[kept].rsqrt()
    left, total = table.reshape(-1, outputs), table.new_zeros(sum(sizes), outputs)
    for _ in range(ROUNDS):
        target = torch.cat([_sum_by(c, size, w[:, None] * left) for c, size in zip(columns, sizes, strict=True)])
        step = half @ (half.T @ target)
        for effect, c in zip(step.split(sizes), columns, strict=True):
            left = left - effect[c]
        total = total + step
    shapes = [[b for d, b in enumerate(shape) if d != axis] for axis in reversed(range(len(shape)))]
    effects = [e.reshape(*s, outputs) for e, s in zip(total.split(sizes), shapes, strict=True)]
    return left.reshape(table.shape), effects


def _columns(shape: torch.Size, device: torch.device) -> list[Tensor]:
    """For each set of all axes but one: the flat index among its cells of every cell of the table."""
    index = torch.arange(shape.numel(), device=device).reshape(shape)
    found = []
    for axis in reversed(range(len(shape))):
        rest = [b for d, b in enumerate(shape) if d != axis]
        own = torch.arange(torch.Size(rest).numel(), device=device).reshape(rest).unsqueeze(axis)
        found.append(own.expand_as(index).reshape(-1))
    return found


def _gram(columns: list[Tensor], sizes: list[int], w: Tensor) -> Tensor:
    """Normal equations of the additive fit."""
    total = sum(sizes)
    start = torch.tensor([0, *sizes], device=w.device).cumsum(0)
    G = torch.zeros(total * total, dtype=torch.float64, device=w.device)
    for a, one in zip(start, columns, strict=False):
        for b, other in zip(start, columns, strict=False):
            G.index_add_(0, (one + a) * total + other + b, w)
    return G.reshape(total, total)


def _sum_by(index: Tensor, size: int, values: Tensor) -> Tensor:
    return values.new_zeros(size, values.shape[1]).index_add_(0, index, values)


def _check(scores: Any, weights: Any) -> tuple[Tensor, Tensor]:
    s, w = _tensor(scores, "scores"), _tensor(weights, "weights")
    if s.dim() not in (2, 3) or 0 in s.shape:
        raise ValueError(f"scores: expected shape (I, J) or (I, J, C) without empty sides, got {tuple(s.shape)}")
    if w.shape != s.shape[:2]:
        raise ValueError(f"weights: expected shape {tuple(s.shape[:2])}, got {tuple(w.shape)}")
    if w.device != s.device:
        raise ValueError(f"weights: expected a tensor on {s.device}, got one on {w.device}")
    w = w.to(torch.float64)
    if not bool(s.isfinite().all()):
        raise ValueError(f"scores: expected finite numbers, got {int((~s.isfinite()).sum())} that are not")
    if not bool((w.isfinite() & (w >= 0)).all()):
        raise ValueError(f"weights: expected finite numbers of at least 0, got a smallest of {w.min().item():g}")
    if not bool((w > 0).any()):
        raise ValueError("weights: expected at least one above 0, got none")
    return s, w


def _tensor(x: Any, name: str) -> Tensor:
    if isinstance(x, np.ndarray):
        x = check.from_numpy(x, name)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or a numpy array, got {type(x).__name__}")
    check.check_tensor(x, name)
    if x.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    return x if x.is_floating_point() else x.to(torch.float64)
