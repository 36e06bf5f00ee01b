"""Arguments of the ops on generalised linear models: each check raises one line and gives what the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from . import _checks as check

FAMILIES = ("linear", "logistic", "poisson", "smooth_hinge", "softmax")


def check_family(family: Any) -> None:
    """ValueError unless the family is known."""
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")


def check_design(X: Any) -> None:
    check.check_float_tensor(X, "X")
    if X.dim() != 2 or 0 in X.shape:
        raise ValueError(f"X: expected shape (n, D) with at least one row and one column, got {check.shape_of(X)}")


def vectors_of(v: Any, name: str, X: Tensor, family: str, intercept: bool) -> Tensor:
    """v as (M, P, C), in float32 or float64."""
    check.check_float_tensor(v, name)
    check.check_same_device(v, name, X.device)
    params = X.shape[1] + intercept
    shape = check.shape_of(v)
    single = family != "softmax"
    if v.dim() == 1 and single:
        v = v.reshape(1, -1, 1)
    elif v.dim() == 2:
        v = v.unsqueeze(0)
    if v.dim() != 3 or v.shape[1] != params or (single and v.shape[2] != 1) or 0 in v.shape:
        wanted = f"({params},), ({params}, 1) or (M, {params}, 1)" if single else f"({params}, C) or (M, {params}, C)"
        raise ValueError(f"{name}: expected shape {wanted} for family {family}, got {shape}")
    if v.dtype != torch.float64 and v.dtype != accumulate_dtype(X.dtype) and v.dtype != X.dtype:
        raise TypeError(f"{name}: expected {accumulate_dtype(X.dtype)} or torch.float64 for X of {X.dtype}, got {v.dtype}")
    return v.to(accumulate_dtype(v.dtype))


def per_row(x: Any, name: str, X: Tensor, columns: int | None, dtype: torch.dtype) -> Tensor:
    """A tensor with one entry (columns=None) or one row of `columns` entries for each row of X."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    check.check_same_device(x, name, X.device)
    rows = X.shape[0]
    shape = check.shape_of(x)
    if columns == 1 and x.dim() == 1:
        x = x.unsqueeze(1)
    wanted = (rows,) if columns is None else (rows, columns)
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name}: expected shape {wanted}, got {shape}")
    return x.to(dtype)


def row_indices(rows: Any, name: str, X: Tensor) -> Tensor:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(
            f"{name}: expected an int64 tensor, got {rows.dtype if isinstance(rows, Tensor) else type(rows).__name__}"
        )
    check.check_same_device(rows, name, X.device)
    if rows.dim() != 1 or rows.numel() == 0:
        raise ValueError(f"{name}: expected shape (rows,) with at least one row, got {check.shape_of(rows)}")
    check.check_places(rows, name, X.shape[0])
    return rows.contiguous()


def theta_of(theta: Any, X: Tensor, family: str, intercept: bool, columns: int, dtype: torch.dtype) -> Tensor:
    found = vectors_of(theta, "theta", X, family, intercept)
    if found.shape[0] != 1 or found.shape[2] != columns:
        raise ValueError(f"theta: expected one set of parameters with {columns} outputs, as v, got {check.shape_of(theta)}")
    return found[0].to(dtype)


def labels_of(y: Any, X: Tensor, dtype: torch.dtype) -> Tensor:
    labels = per_row(y, "y", X, None, dtype)
    if check.may_look(labels) and not bool((labels.abs() == 1).all()):
        raise ValueError("y: expected +1 and -1 for the smooth hinge, got other values")
    return labels
