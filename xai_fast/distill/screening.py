"""Which interactions a residual asks for: coarse tables of all pairs by matrix products, of triples by sums over cells."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .binning import Grid

__all__ = ["coarse_cells", "pair_gains", "triple_candidates", "triple_gains"]

# Cells of one axis.
PAIR_CELLS, TRIPLE_CELLS = 8, 4
# Multiplications that screening may take; beyond it every k-th row is used.
BUDGET = 2e12
# Entries of the one-hot matrix that exist at once.
CHUNK = 1 << 23


def coarse_cells(X: Tensor, grids: list[Grid], count: int) -> Tensor:
    """Cells (n, F) from 0 to count - 1, of about equal mass; column f is that of grids[f]."""
    columns = []
    for grid in grids:
        index, share = grid.encode(X[:, grid.feature])
        cell = index[:, 0] + (share[:, -1] > 0.5) if grid.kind == "linear" else index[:, 0]
        columns.append(cell * count // grid.size if grid.size > count else cell)
    return torch.stack(columns, 1)


def pair_gains(cells: Tensor, residual: Tensor, weights: Tensor, count: int = PAIR_CELLS) -> Tensor:
    r"""Share of the residual's variance that an interaction of each pair would explain.

    .. math:: g_{ij} = Q_{ij} - Q_i - Q_j + Q_0 - (a_i - 1)(a_j - 1) \sigma^2 / n, \quad
              Q = \sum_{cells} (\sum w r)^2 / \sum w

    Parameters
    ----------
    cells : Tensor of int64, shape (n, F)
        From 0 to count - 1.
    residual : Tensor, shape (C, n)
        Of the main effects; the shares of several outputs are those of their summed variance.
    weights : Tensor, shape (n,)
    count : int

    Returns
    -------
    Tensor of float64, shape (F, F)
        Symmetric. About 0 for a pair that explains nothing; its diagonal means nothing.

    Notes
    -----
    The idea is the FAST screening of Lou et al. (2013), "Accurate Intelligible Models with Pairwise Interactions", with more
    than one cut for each feature, the additive part taken out, and what chance explains too. Exact for independent
    features; for others the main effects are already out of the residual.

    Examples
    --------
    >>> cells = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(50, 1)
    >>> r = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(50)
    >>> round(float(pair_gains(cells, r[None], torch.ones(200))[0, 1]), 3)
    0.995
    """
    outputs, features = len(residual), cells.shape[1]
    width = features * count
    step = max(1, int(cells.shape[0] * width**2 * (1 + outputs) / BUDGET))
    cells, r, w = cells[::step], residual[:, ::step], weights[::step]
    w = w / w.sum()
    r = r / _scale(r, w)
    N = torch.zeros(width, width, dtype=torch.float64, device=cells.device)
    S = N.new_zeros(outputs, width, width)
    offsets = torch.arange(features, device=cells.device) * count
    length = max(1, CHUNK // width)
    for start in range(0, len(cells), length):
        rows = slice(start, start + length)
        Z = torch.zeros(len(cells[rows]), width, device=cells.device).scatter_(1, cells[rows] + offsets, 1.0)
        N += (Z.T @ (Z * (w[rows] * len(w)).to(Z.dtype)[:, None])).double()
        for c in range(outputs):
            S[c] += (Z.T @ (Z * (w[rows] * len(w) * r[c, rows]).to(Z.dtype)[:, None])).double()
    N, S = N / len(w), S / len(w)
    blocks = (features, count, features, count)
    Q = _squares(S, N).reshape(blocks).sum((1, 3))
    own = _squares(S.diagonal(dim1=1, dim2=2), N.diagonal()).reshape(features, count).sum(1)
    used = (N.diagonal().reshape(features, count) > 0).sum(1) - 1
    whole = float(((r @ w) ** 2).sum())
    chance = (used[:, None] * used[None, :]) * float((w**2).sum())
    return Q - own[:, None] - own[None, :] + whole - chance


def triple_candidates(pairs: list[tuple[int, int]], features: list[int]) -> list[tuple[int, int, int]]:
    """Triples two of whose three pairs are among `pairs`."""
    known = set(pairs)
    found = set()
    for a, b in pairs:
        for c in features:
            if c in (a, b):
                continue
            i, j, k = sorted((a, b, c))
            if len(known & {(i, j), (i, k), (j, k)}) >= 2:
                found.add((i, j, k))
    return sorted(found)


def triple_gains(
    cells: Tensor, residual: Tensor, weights: Tensor, triples: list[tuple[int, int, int]], count: int = TRIPLE_CELLS
) -> tuple[Tensor, Tensor]:
    """As :func:`pair_gains` for triples of columns of cells, and by how much chance alone makes each gain vary.

    Parameters
    ----------
    cells : Tensor of int64, shape (n, F)
    residual : Tensor, shape (C, n)
        Of main effects and pairs.
    weights : Tensor, shape (n,)
    triples : list of (int, int, int)
    count : int

    Returns
    -------
    gain : Tensor of float64, shape (len(triples),)
    noise : Tensor of float64, shape (len(triples),)
        Standard deviation of a gain where there is nothing to gain.

    Examples
    --------
    >>> cells = torch.cartesian_prod(*3 * [torch.arange(2)]).repeat(50, 1)
    >>> r = (1.0 - 2 * cells).prod(1)
    >>> gain, noise = triple_gains(cells, r[None], torch.ones(400), [(0, 1, 2)])
    >>> round(float(gain), 2)
    1.0
    """
    step = max(1, int(20 * len(cells) * len(triples) * (1 + len(residual)) / BUDGET))
    cells, r, w = cells[::step], residual[:, ::step], weights[::step]
    w = w / w.sum()
    r = r / _scale(r, w)
    gains, noises = [], []
    for triple in triples:
        index = (cells[:, triple[0]] * count + cells[:, triple[1]]) * count + cells[:, triple[2]]
        cube = (count,) * 3
        # Weighted bincount has no deterministic form on a GPU.
        N = w.new_zeros(count**3).index_add_(0, index, w).reshape(cube)
        S = torch.stack([w.new_zeros(count**3).index_add_(0, index, w * one) for one in r]).reshape(len(r), *cube)
        gain, freedom = 0.0, 1.0
        for order in range(4):
            for gone in itertools.combinations(range(3), order):
                n, s = (N.sum(gone), S.sum([g + 1 for g in gone])) if gone else (N, S)
                gain += (-1) ** order * float(_squares(s, n).sum())
        for axis in range(3):
            freedom *= float((N.sum([d for d in range(3) if d != axis]) > 0).sum()) - 1
        each = float((w**2).sum())
        gains.append(gain - freedom * each)
        noises.append((2 * freedom) ** 0.5 * each)
    both = torch.tensor([gains, noises], dtype=torch.float64, device=cells.device)
    return both[0], both[1]


def _squares(S: Tensor, N: Tensor) -> Tensor:
    """Sum over outputs (dimension 0) of S^2 / N; 0 where there are no data."""
    return ((S**2).sum(0) / N.clamp_min(torch.finfo(N.dtype).tiny)) * (N > 0)


def _scale(r: Tensor, w: Tensor) -> Tensor:
    """Root of the summed variance; 1 for a residual of zeros."""
    total = ((r**2) @ w).sum().sqrt()
    return torch.where(total > 0, total, 1.0)
