"""Training rows in memory or in a file, read as they are needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import _checks as check

__all__ = ["Rows", "as_features", "native"]

# What is held of a file at a time, and what PyTorch code that makes copies works on at a time.
BLOCK_BYTES = 1 << 26


def as_features(X: Any, name: str) -> Tensor:
    """X (n, D) as a detached tensor with column stride 1; shares memory with X where it can."""
    if isinstance(X, np.ndarray):
        X = _from_numpy(X, name)
    check.check_float_tensor(X, name)
    if X.dim() != 2 or X.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (n, D), got {check.shape_of(X)}")
    X = X.detach()
    return X if X.stride(1) == 1 or X.shape[1] == 1 else X.contiguous()


def _from_numpy(X: np.ndarray[Any, Any], name: str) -> Tensor:
    if X.dtype.kind != "f" or X.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected a floating-point array of 16, 32 or 64 bits, got {X.dtype}")
    X = native(X)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
        return torch.from_numpy(np.asarray(X))


def native(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x as torch takes it: in the byte order of this machine, with no stride below 0."""
    if x.dtype.isnative and all(stride >= 0 for stride in x.strides):
        return x
    return np.array(x, dtype=x.dtype.newbyteorder("="))


class Rows:
    """The rows of X, a tensor or array in memory or a numpy memmap; a memmap is never held whole.

    Attributes
    ----------
    rows, dim : int
    dtype : torch.dtype
    device : torch.device
    in_memory : bool
    """

    def __init__(self, X: Any, name: str = "X") -> None:
        self.in_memory = not isinstance(X, np.memmap)
        # The pages of the file behind a mapped array are touched only where it is read.
        self._X = as_features(X, name)
        self.rows, self.dim = self._X.shape
        if self.rows == 0:
            raise ValueError(f"{name}: expected at least one row, got shape {check.shape_of(self._X)}")
        self.dtype, self.device = self._X.dtype, self._X.device

    def spans(self) -> Iterator[tuple[slice, Tensor]]:
        """(positions, rows) for the ops, which make no copies: everything at once in memory, block by block from a file."""
        if self.in_memory:
            yield slice(0, self.rows), self._X
        else:
            yield from self.blocks(self.dim * self.dtype.itemsize)

    def blocks(self, bytes_per_row: int) -> Iterator[tuple[slice, Tensor]]:
        """(positions, rows) in blocks for which `bytes_per_row` of work space stay within bounds."""
        step = max(1, BLOCK_BYTES // bytes_per_row)
        for first in range(0, self.rows, step):
            at = slice(first, min(first + step, self.rows))
            # A copy of the block: a mapped file would be read again by every product with it.
            yield at, self._X[at] if self.in_memory else self._X[at].clone()

    def take(self, positions: Tensor | slice) -> Tensor:
        return self._X[positions]
