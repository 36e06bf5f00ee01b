"""Argument checks shared by the families. Each raises one line: the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _backend
from .._dtypes import SUPPORTED

# Larger weights and scales are infinite in float32, in which all but float64 is accumulated.
LARGEST_FLOAT32 = torch.finfo(torch.float32).max

HEAD_FUSIONS = ("mean", "sum", "max", "min")

# The streamed CUDA kernels keep whole rows of q, k and v on the chip (kMaxDim and kMaxDoubleDim in csrc/cuda); wider heads,
# which no common model has, run the reference.
CUDA_MOST_DIM = 256
CUDA_MOST_DOUBLE_DIM = 192


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_tensor(x: Any, name: str) -> None:
    """TypeError unless x is a tensor, and a dense one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    # Neither sparse, nor nested, nor in the layout of a library.
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_float_tensor(x: Any, name: str) -> None:
    """TypeError unless x is a dense tensor of a supported floating dtype."""
    check_tensor(x, name)
    if x.dtype not in SUPPORTED:
        raise TypeError(f"{name}: expected a float32, float64, float16 or bfloat16 tensor, got {x.dtype}")


def as_tensor(x: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Tensors as they are, or in that dtype; arrays, numbers and nested lists of numbers as tensors; else TypeError."""
    x = from_array(x, name)
    if isinstance(x, Tensor):
        check_tensor(x, name)
    try:
        return torch.as_tensor(x, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name}: expected a torch.Tensor or numbers, got {_told(x)}") from None


def _told(x: Any) -> str:
    """The type, and of a list what it holds."""
    inside = f" of {type(x[0]).__name__}" if isinstance(x, (list, tuple)) and x else ""
    return type(x).__name__ + inside


def from_array(x: Any, name: str) -> Any:
    """A NumPy array, or what gives one, as a tensor; anything else as it is."""
    return x if isinstance(x, Tensor) or not hasattr(x, "__array__") else from_numpy(np.asarray(x), name)


def from_numpy(x: np.ndarray, name: str) -> Tensor:
    """The array as a tensor; a copy only of memory that torch cannot share (reversed, byte-swapped, between its numbers)."""
    if x.dtype.kind not in "fiub" or x.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected an array of numbers, got dtype {x.dtype}")
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 or stride % x.itemsize for stride in x.strides):
        x = x.copy()
    # torch warns of what cannot be written to; nothing here writes to what callers own.
    return torch.from_numpy(x if x.flags.writeable else np.asarray(_Writeable(x)))


class _Writeable:
    """The memory of an array that is marked as read-only."""

    def __init__(self, array: np.ndarray) -> None:
        interface = array.__array_interface__
        self.array = array
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


def check_iterable(x: Any, name: str, what: str) -> None:
    """TypeError unless x can be iterated over; text cannot."""
    if isinstance(x, (str, bytes)) or not isinstance(x, Iterable):
        raise TypeError(f"{name}: expected {what}, got {type(x).__name__}")


def check_broadcasts(x: Tensor, name: str, like: Tensor, like_name: str) -> None:
    try:
        torch.broadcast_shapes(x.shape, like.shape)
    except RuntimeError:
        wanted = f"a shape that broadcasts with {like_name} {shape_of(like)}"
        raise ValueError(f"{name}: expected {wanted}, got {shape_of(x)}") from None


def may_look(x: Tensor) -> bool:
    """Whether the values of x can be read now: not while x is traced, nor while its CUDA stream is captured."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def holds_nan(x: Tensor) -> bool:
    """Whether any value is NaN. Most often the sum, which takes no memory, is finite and says no."""
    return not bool(x.sum().isfinite()) and bool(x.isnan().any())


def check_places(x: Tensor, name: str, below: int) -> None:
    """ValueError unless the whole numbers lie from 0 to below - 1. On a CPU the kernels look themselves, at less cost."""
    if not x.numel() or (x.device.type == "cpu" and _backend.C is not None) or not may_look(x):
        return
    low, high = torch.stack(x.aminmax()).tolist()  # one wait
    if low < 0 or high >= below:
        raise ValueError(f"{name}: expected numbers from 0 to {below - 1}, got {low} to {high}")


def too_wide_for_cuda(*heads: Tensor) -> bool:
    """Whether q, k or v (B, H, N, D) is on a GPU and wider than its streamed kernels take."""
    most = CUDA_MOST_DOUBLE_DIM if heads[0].dtype == torch.float64 else CUDA_MOST_DIM
    return heads[0].is_cuda and max(x.shape[3] for x in heads) > most


def check_same_device(x: Tensor, name: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_head_fusion(head_fusion: Any) -> None:
    if head_fusion not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion: expected one of {', '.join(HEAD_FUSIONS)}, got {head_fusion!r}")


def as_number(x: Any) -> Any:
    """Numpy's scalars and tensors without dimensions as Python numbers; all else as it is."""
    return x.item() if isinstance(x, (np.generic, np.ndarray, Tensor)) and x.ndim == 0 else x


def check_number(x: Any, name: str) -> float:
    """A finite number as a float."""
    if type(x) is not float:
        x = _as_float(x, name)
    if not abs(x) < math.inf:  # as the compiler can trace it
        raise ValueError(f"{name}: expected a finite number, got {x!r}")
    return x


def _as_float(x: Any, name: str) -> float:
    number = as_number(x)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number, got one beyond the range of a float") from None


def is_whole(x: Any) -> bool:
    """Whether x is an int of Python or NumPy, or an array or tensor without dimensions of one; no bool."""
    if type(x) is int:
        return True
    number = as_number(x)
    return isinstance(number, int) and not isinstance(number, bool)


def check_int(x: Any, name: str) -> int:
    if not is_whole(x):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
    return int(x)


def check_at_least_zero(x: Any, name: str, what: str = "a number") -> float:
    """A finite number that is not negative, as a float."""
    value = check_number(x, name)
    if value < 0:
        raise ValueError(f"{name}: expected {what} of at least 0, got {x!r}")
    return value


def check_positive(x: Any, name: str) -> float:
    """A finite number above 0, as a float."""
    value = check_number(x, name)
    if value <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {x!r}")
    return value


def number_or_tensor(x: Any, name: str) -> Tensor:
    """A number or a tensor as a tensor in float64."""
    number = x if isinstance(x, Tensor) else as_number(x)
    if isinstance(number, bool) or not isinstance(number, (int, float, Tensor)):
        raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(x).__name__}")
    return as_tensor(number, name, torch.float64)


def check_count(x: Any, name: str, least: int = 1, most: int | None = None) -> int:
    """A whole number of at least `least` and at most `most`, as an int."""
    if not is_whole(x):
        raise TypeError(f"{name}: expected a whole number, got {type(x).__name__}")
    x = int(x)
    if x < least or (most is not None and x > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {wanted}, got {x}")
    return x


def one_or_more(x: Any, name: str) -> tuple[list[Any], bool]:
    """The values of a number or of a sequence of numbers, not checked themselves, and whether it was a single one."""
    number = as_number(x)
    if isinstance(number, (int, float)):
        return [number], True
    check_iterable(x, name, "a number or a sequence of numbers")
    if not (values := list(x)):
        raise ValueError(f"{name}: expected at least one value, got none")
    return values, False


def check_seed(seed: Any) -> int:
    return check_count(seed, "seed", 0, 2**63 - 1)


def check_residual(residual: Any, dtype: torch.dtype | None = None) -> float:
    """The residual weight as a float: not negative, and finite in the type in which `dtype` is accumulated."""
    value = check_at_least_zero(residual, "residual", "a weight")
    return check_fits(value, "residual", dtype) if value > LARGEST_FLOAT32 else value


def check_fits(value: float, name: str, dtype: torch.dtype | None) -> float:
    """A number that is finite in the type in which `dtype` is accumulated; None: that type is not known yet."""
    if abs(value) > LARGEST_FLOAT32 and dtype is not None and dtype != torch.float64:
        raise ValueError(f"{name}: expected a number that float32 can hold, got {value!r}")
    return value


def check_like(x: Any, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """A tensor of that shape, with the dtype and the device of `like`."""
    check_float_tensor(x, name)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {shape_of(x)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, got {x.dtype}")
    check_same_device(x, name, like.device)


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


def check_query_key(query: Any, key: Any) -> None:
    check_float_tensor(query, "query")
    check_float_tensor(key, "key")
    shape, key_shape = query.shape, key.shape
    if len(shape) != 4 or 0 in shape[1:]:
        raise ValueError(f"query: expected shape (B, H, N, D) with H, N, D of at least 1, got {tuple(shape)}")
    batch, heads, _, dim = shape
    if len(key_shape) != 4 or key_shape[0] != batch or key_shape[3] != dim or not key_shape[1] or heads % key_shape[1]:
        wanted = f"({batch}, Hkv, N, {dim}) with Hkv a divisor of {heads}"
        raise ValueError(f"key: expected shape {wanted}, got {tuple(key_shape)}")
    if key.dtype != query.dtype:
        raise TypeError(f"key: expected dtype {query.dtype}, as query, got {key.dtype}")
    check_same_device(key, "key", query.device)


def check_mask(mask: Any, query: Tensor, keys: int) -> Tensor:
    """The mask with four dimensions, still broadcastable to (B, H, Nq, Nk)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor or None, got {type(mask).__name__}")
    check_tensor(mask, "attn_mask")
    if mask.dtype != torch.bool:
        check_float_tensor(mask, "attn_mask (not boolean)")
    check_same_device(mask, "attn_mask", query.device)
    batch, heads, queries, _ = query.shape
    wanted = (batch, heads, queries, keys)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(m not in (1, w) for m, w in zip(shape, wanted, strict=True)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {wanted}, got {shape_of(mask)}")
    return mask.reshape(shape) if mask.dim() != 4 else mask


def check_scale(scale: Any, dtype: torch.dtype | None = None) -> float | None:
    return None if scale is None else check_fits(check_number(scale, "scale"), "scale", dtype)


def check_lse(lse: Any, query: Tensor) -> None:
    check_float_tensor(lse, "lse")
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse: expected shape (B, H, N) = {shape_of(query)[:3]}, got {shape_of(lse)}")
    check_same_device(lse, "lse", query.device)
