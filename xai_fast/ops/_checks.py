"""Argument checks shared by the families. Each raises one line: the argument, what was expected, what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._dtypes import SUPPORTED

HEAD_FUSIONS = ("mean", "sum", "max", "min")


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_float_tensor(x: Any, name: str) -> None:
    """TypeError unless x is a tensor of a supported floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in SUPPORTED:
        raise TypeError(f"{name}: expected a float32, float64, float16 or bfloat16 tensor, got {x.dtype}")


def check_same_device(x: Tensor, name: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_head_fusion(head_fusion: Any) -> None:
    if head_fusion not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion: expected one of {', '.join(HEAD_FUSIONS)}, got {head_fusion!r}")


def check_number(x: Any, name: str) -> float:
    """A finite number as a float."""
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
        x = float(x)
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number, got {x!r}")
    return x


def check_residual(residual: Any) -> float:
    """The residual weight as a float: finite and not negative."""
    value = check_number(residual, "residual")
    if value < 0:
        raise ValueError(f"residual: expected a weight of at least 0, got {residual!r}")
    return value


def check_attention(attention: Any, name: str = "attention") -> None:
    """A floating tensor (B, H, N, N) with at least one head and one token."""
    check_float_tensor(attention, name)
    shape = attention.shape
    if len(shape) != 4 or shape[2] != shape[3] or shape[1] < 1 or shape[2] < 1:
        raise ValueError(f"{name}: expected shape (B, H, N, N) with H and N of at least 1, got {shape_of(attention)}")


def check_rows(rows: Any, batch: int, tokens: int, like: Tensor) -> None:
    """rows (B, R, N) in the dtype of `like` or in float32 for a 16-bit `like`, on its device."""
    check_float_tensor(rows, "rows")
    shape = rows.shape
    if len(shape) != 3 or shape[0] != batch or shape[2] != tokens:
        raise ValueError(f"rows: expected shape (B, R, N) = ({batch}, R, {tokens}), got {shape_of(rows)}")
    if rows.dtype != like.dtype and not (rows.dtype == torch.float32 and like.dtype.itemsize == 2):
        wanted = f"{like.dtype}" + (" or torch.float32" if like.dtype.itemsize == 2 else "")
        raise TypeError(f"rows: expected dtype {wanted}, got {rows.dtype}")
    if rows.device != like.device:
        check_same_device(rows, "rows", like.device)
