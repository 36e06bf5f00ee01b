"""The basis of all terms as a matrix with few entries a row, never stored as one: rows of values times shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .binning import Grid

__all__ = ["Design", "Encoder", "term_size"]

# Entries (index and share, 16 bytes) that are worked on together: they and what is gathered for them stay in a CPU's cache.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
# Entries are kept between products up to this many bytes, beyond it they are found anew for every chunk.
KEEP_BYTES = 2 << 30

Grids = tuple[Grid, ...]


def term_size(grids: Grids) -> int:
    return math.prod(g.size for g in grids)


class Encoder:
    """Encodes columns of X (n, F) on grids, each grid once."""

    def __init__(self, X: Tensor) -> None:
        self._X = X
        self._known: dict[Grid, tuple[Tensor, Tensor]] = {}

    def __call__(self, grids: Grids) -> tuple[Tensor, Tensor]:
        """Flat index (n, k) of the table's values that each row uses, and their shares (n, k)."""
        index, share = self._one(grids[0])
        for grid in grids[1:]:
            i, s = self._one(grid)
            index = (index[:, :, None] * grid.size + i[:, None, :]).flatten(1)
            share = (share[:, :, None] * s[:, None, :]).flatten(1)
        return index, share

    def _one(self, grid: Grid) -> tuple[Tensor, Tensor]:
        if grid not in self._known:
            self._known[grid] = grid.encode(self._X[:, grid.feature])
        return self._known[grid]


class Design:
    """Products with the basis matrix B (n, size) of terms over rows X (n, F): row r of B holds the shares of row r.

    Parameters
    ----------
    X : Tensor, shape (n, F)
    terms : sequence of tuples of Grid
    """

    def __init__(self, X: Tensor, terms: Sequence[Grids]) -> None:
        self._X, self.terms = X, list(terms)
        self.sizes = [term_size(t) for t in self.terms]
        self.size, self.rows = sum(self.sizes), len(X)
        self.starts = [sum(self.sizes[:t]) for t in range(len(self.sizes))]
        entries = sum(math.prod(1 + (g.kind == "linear") for g in t) for t in self.terms)
        self._length = max(64, CHUNK.get(X.device.type, CHUNK["cpu"]) // max(1, entries))
        self._kept: list[Any] | None = [] if 16 * entries * self.rows <= KEEP_BYTES else None

    def apply(self, V: Tensor) -> Tensor:
        """B v for V (M, size), as (M, n)."""
        out = V.new_empty(len(V), self.rows)
        for rows, index, share in self._chunks():
            for m, v in enumerate(V):
                out[m, rows] = _times(v, index, share)
        return out

    def apply_transposed(self, Y: Tensor) -> Tensor:
        """B^T y for Y (M, n), as (M, size)."""
        out = Y.new_zeros(len(Y), self.size)
        for rows, index, share in self._chunks():
            for m, y in enumerate(Y[:, rows]):
                out[m].scatter_add_(0, index.reshape(-1), (share * y[:, None]).reshape(-1))
        return out

    def gram_product(self, V: Tensor, w: Tensor) -> Tensor:
        """B^T diag(w) B v for V (M, size): one pass over the entries."""
        out = torch.zeros_like(V)
        for rows, index, share in self._chunks():
            flat, weighted = index.reshape(-1), share * w[rows, None]
            for m, v in enumerate(V):
                out[m].scatter_add_(0, flat, (weighted * _times(v, index, share)[:, None]).reshape(-1))
        return out

    def gram_block(self, term: int, w: Tensor, step: int = 1) -> Tensor:
        """B_t^T diag(w) B_t (size, size) of one term over every `step`-th row, scaled to all."""
        size = self.sizes[term]
        block = torch.zeros(size * size, dtype=torch.float64, device=self._X.device)
        X, v = self._X[::step], w[::step]
        for rows in _slices(len(X), 1 << 15):
            index, share = Encoder(X[rows])(self.terms[term])
            pairs = index[:, :, None] * size + index[:, None, :]
            weighted = share[:, :, None] * (share * v[rows, None])[:, None, :]
            block.scatter_add_(0, pairs.reshape(-1), weighted.reshape(-1))
        return block.reshape(size, size) * (w.sum() / v.sum())

    def gram(self, w: Tensor) -> Tensor:
        """B^T diag(w) B of all terms, (size, size)."""
        G = torch.zeros(self.size**2, dtype=torch.float64, device=self._X.device)
        for rows, index, share in self._chunks():
            weighted = share * w[rows, None]
            for part in _slices(len(index), max(1, self._length // index.shape[1])):
                pairs = index[part, :, None] * self.size + index[part, None, :]
                G.scatter_add_(0, pairs.reshape(-1), (weighted[part, :, None] * share[part, None, :]).reshape(-1))
        return G.reshape(self.size, self.size)

    def split(self, V: Tensor) -> list[Tensor]:
        """V (M, size) as tables (bins..., M), one for each term."""
        shapes = [[g.size for g in t] for t in self.terms]
        return [v.T.reshape(*shape, len(V)) for v, shape in zip(V.split(self.sizes, dim=1), shapes, strict=True)]

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        if self._kept:
            yield from self._kept
            return
        for rows in _slices(self.rows, self._length):
            encode = Encoder(self._X[rows])
            parts = [encode(t) for t in self.terms]
            index = torch.cat([i + start for (i, _), start in zip(parts, self.starts, strict=True)], 1)
            chunk = rows, index, torch.cat([s for _, s in parts], 1)
            if self._kept is not None:
                self._kept.append(chunk)
            yield chunk


def _times(v: Tensor, index: Tensor, share: Tensor) -> Tensor:
    return v.index_select(0, index.reshape(-1)).reshape(index.shape).mul_(share).sum(1)


def _slices(total: int, length: int) -> Iterator[slice]:
    for start in range(0, total, length):
        yield slice(start, min(start + length, total))
