"""What the pictures of measures take: plain values, results of this package, or a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = [
    "ARROWS",
    "curve_of",
    "direction_of",
    "fidelity_pairs",
    "given",
    "methods_of",
    "number_methods",
    "refuse_options",
    "value_and_error",
]

ARROWS = {"higher": "↑", "lower": "↓", None: ""}


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def refuse_options(options: dict[str, Any]) -> None:
    """Options of a study are none of plain values."""
    if options:
        raise TypeError(f"{next(iter(options))}: expected only beside a study, got it beside plain values")


def methods_of(values: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a dict by name, or a study, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name}: expected at least one entry, got none")
    return values


def number_methods(groups: Any) -> dict[str, int]:
    """One style for a method in all panels."""
    names = dict.fromkeys(name for group in groups for name in group)
    return {name: number for number, name in enumerate(names)}


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double()
    return np.atleast_1d(np.asarray(value, dtype=np.float64))


def fidelity_pairs(value: Any, name: str) -> np.ndarray:
    if hasattr(value, "fid_plus") and hasattr(value, "fid_minus"):
        return np.stack([_array(value.fid_minus), _array(value.fid_plus)], 1)
    points = _array([tuple(map(float, pair)) for pair in value])
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points: expected (fid-, fid+) pairs for {name!r}, got shape {points.shape}")
    return points


def curve_of(value: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        raise TypeError(f"{name}: expected (levels, values, errors), got {type(value).__name__}")
    parts = [None if part is None else _array(part) for part in (*value, None)[:3]]
    x, y, error = parts
    if x is None or y is None or x.shape != y.shape or (error is not None and error.shape != x.shape):
        shapes = ", ".join("None" if part is None else str(part.shape) for part in parts)
        raise ValueError(f"{name}: expected levels, values and errors of one shape, got {shapes}")
    order = np.argsort(x)
    return x[order], y[order], None if error is None else error[order]


def value_and_error(value: Any, method: str, measure: str) -> tuple[float, float]:
    pair = value if isinstance(value, (tuple, list)) else (value, math.nan)
    try:
        number, error = (float(v) for v in pair)
    except (TypeError, ValueError):
        raise TypeError(f"values[{method!r}][{measure!r}]: expected a number or (value, error), got {value!r}") from None
    return number, error


def direction_of(name: str, better: Mapping[str, str | None] | None) -> str | None:
    direction = (better or {}).get(name)
    if direction not in ARROWS:
        raise ValueError(f"better: expected 'higher', 'lower' or None for {name!r}, got {direction!r}")
    return direction
