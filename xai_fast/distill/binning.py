"""Grids of one feature: where the values of a shape function sit, and how a row falls between them.

The grid of a pair is a coarsening of that of the main effect, and the grid of a triple one of that of the pair, so that what
purification takes out of a coarse term is represented exactly by the finer one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BASES", "Grid", "coarsen", "make_grid"]

BASES = ("linear", "steps")


@dataclass(frozen=True, eq=False)
class Grid:
    """Points of one feature at which a term has values.

    Attributes
    ----------
    feature : int
    kind : {"linear", "steps", "categories"}
        Values at knots with straight lines between them, values of bins, values of categories.
    points : Tensor of float64
        linear: the knots (K,). steps: the edges (K + 1,), the outer ones the smallest and the largest value of the data.
        categories: the levels (L,), sorted.
    groups : Tensor of int64 or None
        categories: to which of the K values each level belongs, (L,).

    Examples
    --------
    >>> grid = make_grid(torch.tensor([0.0, 1.0, 2.0, 4.0]), 0, 4, "linear")
    >>> grid.points.tolist(), grid.size
    ([0.0, 1.0, 2.0, 4.0], 4)
    >>> index, share = grid.encode(torch.tensor([3.0, 9.0]))
    >>> index.tolist(), share.tolist()
    ([[2, 3], [2, 3]], [[0.5, 0.5], [0.0, 1.0]])
    """

    feature: int
    kind: str
    points: Tensor
    groups: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of values K."""
        if self.groups is not None:
            return int(self.groups.max()) + 1
        return len(self.points) - (self.kind == "steps")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the values that a row uses and their shares, both (n, 2) for linear and (n, 1) otherwise.

        Outside the data the function goes on as a constant; a level that was not in the data has the share 0.
        """
        x = x.to(torch.float64).contiguous()
        if self.kind == "linear":
            right = torch.bucketize(x, self.points[1:-1].contiguous(), right=True) + 1
            low, high = self.points[right - 1], self.points[right]
            t = ((x - low) / (high - low)).clamp(0, 1)
            return torch.stack([right - 1, right], 1), torch.stack([1 - t, t], 1)
        if self.kind == "steps":
            index = torch.bucketize(x, self.points[1:-1].contiguous(), right=True)
            return index[:, None], torch.ones_like(x)[:, None]
        assert self.groups is not None
        place = torch.searchsorted(self.points, x).clamp_max(len(self.points) - 1)
        return self.groups[place][:, None], (self.points[place] == x).to(torch.float64)[:, None]

    def is_inside(self, x: Tensor) -> Tensor:
        """Whether values lie in the range of the data, or are one of its levels, (n,)."""
        x = x.to(torch.float64)
        if self.kind == "categories":
            return torch.isin(x, self.points)
        return (x >= self.points[0]) & (x <= self.points[-1])

    def lift(self, coarse: Grid) -> Tensor:
        """R (size, coarse.size): the values here of the function that has values v on a coarsening are R v."""
        if self.kind == "linear":
            at = self.points
        elif self.kind == "steps":
            at = (self.points[:-1] + self.points[1:]) / 2
        else:
            assert self.groups is not None
            # One level of each of the groups: a coarsening merges whole groups.
            first = torch.full((self.size,), len(self.points), device=self.points.device)
            first.scatter_reduce_(0, self.groups, torch.arange(len(self.points), device=first.device), "amin")
            at = self.points[first]
        index, share = coarse.encode(at)
        R = torch.zeros(self.size, coarse.size, dtype=torch.float64, device=self.points.device)
        return R.scatter_add_(1, index, share)

    def penalty(self) -> Tensor:
        """(size, size): sum of squared second differences; for categories the squared distances from their mean.

        A small share of first differences keeps values without data from running away along a line.
        """
        unit = torch.eye(self.size, dtype=torch.float64, device=self.points.device)
        if self.kind == "categories":
            return unit - 1 / self.size
        D1 = unit.diff(dim=0)
        D2 = D1.diff(dim=0)
        return D2.T @ D2 + 1e-3 * D1.T @ D1


def make_grid(x: Tensor, feature: int, bins: int, basis: str, is_categorical: bool = False) -> Grid:
    """A grid of at most `bins` values (categories: one for each level) at quantiles of x (n,).

    Parameters
    ----------
    x : Tensor, shape (n,)
    feature : int
        For the grid to remember.
    bins : int
        At least 2. A feature of fewer distinct values has one point for each.
    basis : {"linear", "steps"}
    is_categorical : bool

    Returns
    -------
    Grid

    Examples
    --------
    >>> make_grid(torch.tensor([0.0, 1.0, 1.0, 3.0]), 0, 8, "steps").points.tolist()
    [0.0, 0.5, 2.0, 3.0]
    """
    ordered = x.to(torch.float64).sort().values
    is_new = torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered.diff() > 0])
    distinct = ordered[is_new]
    if is_categorical:
        return Grid(feature, "categories", distinct, torch.arange(len(distinct), device=x.device))
    if len(distinct) <= bins:
        if basis == "linear":
            return Grid(feature, "linear", distinct)
        return Grid(feature, "steps", torch.cat([distinct[:1], (distinct[:-1] + distinct[1:]) / 2, distinct[-1:]]))
    count = bins if basis == "linear" else bins + 1
    place = torch.linspace(0, len(ordered) - 1, count, dtype=torch.float64, device=x.device).round().long()
    points = torch.unique(ordered[place])
    if basis == "steps" and len(points) == 2:
        # Nearly all rows have one value: it is told apart from the rest.
        points = torch.stack([distinct[0], (distinct[0] + distinct[1]) / 2, distinct[-1]])
    return Grid(feature, basis, points)


def coarsen(grid: Grid, bins: int, weights: Tensor) -> Grid:
    """A grid of at most `bins` values whose functions the given one represents exactly.

    Parameters
    ----------
    grid : Grid
    bins : int
    weights : Tensor, shape (grid.size,)
        Data weights; of categories the heaviest are kept, the others share one value.

    Returns
    -------
    Grid

    Examples
    --------
    >>> grid = make_grid(torch.arange(9.0), 0, 9, "linear")
    >>> coarsen(grid, 3, torch.ones(9)).points.tolist()
    [0.0, 4.0, 8.0]
    """
    if grid.size <= bins:
        return grid
    if grid.groups is not None:
        rank = weights.argsort(descending=True, stable=True).argsort()
        return Grid(grid.feature, grid.kind, grid.points, rank.clamp_max(bins - 1)[grid.groups])
    count = bins if grid.kind == "linear" else bins + 1
    place = torch.linspace(0, len(grid.points) - 1, count, dtype=torch.float64, device=grid.points.device).round().long()
    return Grid(grid.feature, grid.kind, grid.points[place])
