"""Rows of (inputs, targets) in a fixed order, from tensors, datasets and loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from ..ops import _checks as check
from ._solvers.choose import free_memory
from ._warn import warn_user

__all__ = ["TorchRows", "as_rows", "check_batch", "collect"]

Batch = tuple[Any, Any]


class TorchRows:
    """Rows that can be read by number, again and again.

    Parameters
    ----------
    count : int
    read : callable
        (int64 tensor of row numbers) -> (inputs, targets).
    """

    def __init__(self, count: int, read: Callable[[Tensor], Batch]) -> None:
        self._count, self.read = count, read

    def __len__(self) -> int:
        return self._count

    def batches(self, rows: int) -> Iterator[tuple[slice, Batch]]:
        """All rows in order, some at a time, with their positions."""
        for first in range(0, self._count, rows):
            at = slice(first, min(first + rows, self._count))
            yield at, self.read(torch.arange(at.start, at.stop))


def as_rows(data: Any, name: str) -> TorchRows:
    """Rows of a pair (inputs, targets), a dataset, a loader, or an iterable of batches.

    Row numbers are those of the pair or dataset, or the order in which an iterable gives its rows. What fits in half of the
    free memory is read once and kept; of what does not, rows are read from the dataset again each time.

    Raises
    ------
    TypeError, ValueError
        Not such data, or empty; a sampler that is neither sequential nor a permutation; an iterable whose order changes.
    """
    if isinstance(data, tuple):
        return _of_tensors(check_batch(data, name), name)
    is_stream = isinstance(getattr(data, "dataset", data), IterableDataset)
    if isinstance(data, DataLoader) and not is_stream and data.batch_sampler is not None:  # None: batched by the dataset
        return _of_loader(data, name)
    if isinstance(data, Dataset) and not is_stream:
        return _of_loader(DataLoader(data, batch_size=256), name)
    if isinstance(data, Iterable) and not isinstance(data, (Tensor, Mapping, str)):
        return _of_iterable(data, name)
    raise TypeError(f"{name}: expected a DataLoader, a Dataset or a tuple (inputs, targets), got {type(data).__name__}")


def collect(data: Any, name: str) -> Batch:
    """All rows of what :func:`as_rows` takes, in memory and in its order."""
    rows = as_rows(data, name)
    return rows.read(torch.arange(len(rows)))


def check_batch(batch: Any, name: str) -> Batch:
    """(inputs, targets) with tensors of the same number of rows; mappings become dicts."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(f"{name}: expected (inputs, targets), got {what}")
    inputs, targets = batch
    inputs = dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, list) else inputs
    counts = set()
    for leaf in tree_flatten((inputs, targets))[0]:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            raise TypeError(f"{name}: expected tensors with a first dimension of rows, got {_describe(leaf)}")
        counts.add(len(leaf))
    if len(counts) != 1:
        raise ValueError(f"{name}: expected as many targets as rows of every input, got {sorted(counts)}")
    return inputs, targets


def _describe(leaf: Any) -> str:
    return f"shape {check.shape_of(leaf)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def count_of(batch: Batch) -> int:
    return len(tree_flatten(batch)[0][0])


def _of_tensors(batch: Batch, name: str) -> TorchRows:
    count = count_of(batch)
    if not count:
        raise ValueError(f"{name}: expected at least one row, got none")
    kept = tree_map(lambda leaf: leaf.detach(), batch)
    return TorchRows(count, lambda rows: tree_map(lambda leaf: leaf[rows.to(leaf.device)], kept))


def _of_loader(loader: DataLoader[Any], name: str) -> TorchRows:
    dataset: Any = loader.dataset
    count = len(dataset)
    if not count:
        raise ValueError(f"{name}: expected at least one row, got an empty dataset")
    collate = loader.collate_fn
    _check_sampler(loader, count, name)

    def read(rows: Tensor) -> Batch:
        return check_batch(collate([dataset[row] for row in rows.tolist()]), name)

    first = read(torch.arange(min(2, count)))
    row_bytes = sum(leaf.nbytes for leaf in tree_flatten(first)[0]) / min(2, count)
    if row_bytes * count > free_memory(torch.device("cpu")) / 2:
        return TorchRows(count, read)
    in_order: DataLoader[Any] = DataLoader(
        dataset, batch_size=loader.batch_size or 256, num_workers=loader.num_workers, collate_fn=collate
    )
    collected = _join([check_batch(batch, name) for batch in in_order])
    return TorchRows(count, read) if collected is None else _of_tensors(collected, name)


def _check_sampler(loader: DataLoader[Any], count: int, name: str) -> None:
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, SequentialSampler):
        return
    if isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == count:
        return warn_user(f"{name}: the loader shuffles; row numbers are those of its dataset", UserWarning)
    raise ValueError(
        f"{name}: expected a sequential or shuffling sampler, got {type(sampler).__name__}; "
        "pass a torch.utils.data.Subset instead"
    )


def _of_iterable(batches: Iterable[Any], name: str) -> TorchRows:
    """All rows of an iterable, which must give them in the same order each time it is read."""
    found = [check_batch(batch, name) for batch in batches]
    if not found:
        raise ValueError(f"{name}: expected at least one batch, got none")
    if iter(batches) is not batches:
        again = [check_batch(batch, name) for batch in islice(batches, 1)]
        if not again or not _is_same(found[0], again[0]):
            raise ValueError(f"{name}: expected the same order in every iteration, got another first batch the second time")
    collected = _join(found)
    if collected is None:
        raise ValueError(f"{name}: expected batches of rows of the same shape, got different ones")
    return _of_tensors(collected, name)


def _join(batches: list[Batch]) -> Batch | None:
    """The batches one after the other; None where their rows have different shapes, as when texts are padded by batch."""
    leaves, structures = zip(*(tree_flatten(batch) for batch in batches), strict=True)
    columns = list(zip(*leaves, strict=True))
    if any(structure != structures[0] for structure in structures):
        return None
    if any(leaf.shape[1:] != column[0].shape[1:] for column in columns for leaf in column):
        return None
    joined: Batch = torch.utils._pytree.tree_unflatten([torch.cat(column) for column in columns], structures[0])
    return joined


def _is_same(one: Batch, other: Batch) -> bool:
    (a, a_structure), (b, b_structure) = tree_flatten(one), tree_flatten(other)
    return a_structure == b_structure and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
