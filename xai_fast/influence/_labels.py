"""Labels and other per-row numbers: into tensors, mapped to class numbers, with the first bad row named."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_array", "class_indices", "named_rows", "real_numbers"]


def as_array(y: Any, name: str, rows: int) -> np.ndarray[Any, Any]:
    """y as a numpy array of `rows` labels; a column (rows, 1) is taken as (rows,)."""
    if y is None:
        raise TypeError(f"{name}: expected {rows} labels, got None")
    if isinstance(y, Tensor):
        # numpy has no bfloat16.
        y = (y.double() if y.is_floating_point() else y).detach().cpu().numpy()
    array = np.asarray(y)
    shape = array.shape
    if array.ndim == 2 and shape[1] == 1:
        array = array[:, 0]
    if array.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), one label for every row, got {tuple(shape)}")
    return array


def named_rows(bad: np.ndarray[Any, Any] | Tensor, first_row: int = 0) -> str:
    """ "row 3" or "rows 3, 7, 8, ..." for the positions where `bad` is true."""
    positions = bad.nonzero().flatten().tolist() if isinstance(bad, Tensor) else np.flatnonzero(bad).tolist()
    shown = ", ".join(str(first_row + position) for position in positions[:5])
    return f"row{'s' if len(positions) > 1 else ''} {shown}{', ...' if len(positions) > 5 else ''}"


def class_indices(y: np.ndarray[Any, Any], classes: list[Any], name: str) -> Tensor:
    """The position of every label among `classes`, int64; ValueError names the first row whose label is none of them."""
    # Labels of several kinds, None among them, have no order.
    found, inverse = (y, slice(None)) if y.dtype.hasobject else np.unique(y, return_inverse=True)
    place = {label: index for index, label in enumerate(classes)}
    codes = np.array([_place(place, label) for label in found.tolist()], dtype=np.int64)[inverse]
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        raise ValueError(f"{name}: expected one of {_listed(classes)}, got {y.tolist()[row]!r} in row {row}")
    return torch.from_numpy(codes)


def _place(place: dict[Any, int], label: Any) -> int:
    try:
        return place.get(label, -1)
    except TypeError:  # a list, which is no label
        return -1


def _listed(classes: list[Any]) -> str:
    shown = classes if len(classes) <= 6 else [*classes[:2], "...", classes[-1]]
    return ", ".join("..." if label == "..." else repr(label) for label in shown)


def real_numbers(y: np.ndarray[Any, Any], name: str, least: float | None = None) -> Tensor:
    """y as finite float64 numbers, not below `least`; ValueError names the first bad row."""
    if y.dtype.kind == "c":
        raise TypeError(f"{name}: expected real numbers, got {y.dtype}")
    try:
        numbers = y.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, got {y.dtype}") from None
    bad = ~np.isfinite(numbers)
    if least is not None:
        bad |= numbers < least
    if bad.any():
        row = int(np.argmax(bad))
        wanted = "finite numbers" if least is None else f"finite numbers of at least {least:g}"
        raise ValueError(f"{name}: expected {wanted}, got {numbers[row]} in row {row}")
    return torch.from_numpy(numbers)
