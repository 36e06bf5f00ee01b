"""The k largest or smallest of numbers that come in parts; of equal ones the earlier first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["extremes", "merged"]


def extremes(values: Tensor, k: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The k most extreme of every row of (M, n) and their columns, both (M, k)."""
    k = min(k, values.shape[1])
    found, columns = values.topk(k, dim=1, largest=largest)
    # topk takes any of equal values: where the last one found has more equals, only a stable sort knows the earlier ones.
    last = found[:, -1:]
    unsure = ((values == last).sum(1) > (found == last).sum(1)).nonzero().squeeze(1)
    if len(unsure):
        columns[unsure] = values[unsure].argsort(dim=1, descending=largest, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    return merged(values.gather(1, columns), columns, k, largest=largest)


def merged(values: Tensor, indices: Tensor, k: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The first k of (M, m) in order; places that are missing (index -1, value NaN) come last."""
    key = torch.where(indices < 0, -torch.inf if largest else torch.inf, values)
    order = key.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)
