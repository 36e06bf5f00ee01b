"""From the output of a model to one score per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_tensor", "select_score"]


def first_tensor(output: Any) -> Tensor:
    """The tensor of an output that scores are taken from: logits, or the first tensor there is."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        for name in ("logits", "last_hidden_state"):
            if name in named:
                return named[name]
        values: Sequence[Any] = list(output.values())
    else:
        values = list(output) if isinstance(output, (tuple, list)) else []
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"model: expected an output that is or holds a tensor, got {type(output).__name__}")


def select_score(output: Any, target: Any, batch: int) -> Tensor:
    """(B,) scores by `target`, with their graph."""
    if callable(target):
        return _checked(_called(target, output), batch)
    logits = first_tensor(output)
    if logits.ndim == 0 or logits.shape[0] != batch:
        raise ValueError(f"model: expected an output with batch size {batch} first, got shape {tuple(logits.shape)}")
    if target is None:
        return _checked(_predicted(logits), batch)
    return _checked(_picked(logits, _indices(target, batch)), batch)


def _called(target: Callable[[Any], Any], output: Any) -> Tensor:
    score = target(output)
    if not isinstance(score, Tensor):
        raise TypeError(f"target: expected a function that returns a tensor, got {type(score).__name__}")
    if score.ndim == 2 and score.shape[1] == 1:
        score = score[:, 0]
    return score


def _checked(score: Tensor, batch: int) -> Tensor:
    if score.shape != (batch,) and not (score.ndim == 0 and batch == 1):
        raise ValueError(f"target: expected scores of shape ({batch},), got {tuple(score.shape)}")
    if not score.is_floating_point():
        raise TypeError(f"target: expected real floating-point scores, got {score.dtype}")
    if not score.requires_grad:
        raise ValueError("target: expected scores that depend on the inputs, got scores without a graph to them")
    return score.reshape(batch)


def _predicted(logits: Tensor) -> Tensor:
    if logits.ndim == 1:
        return logits
    if logits.ndim > 2:
        _too_many_dimensions(logits, "None")
    if logits.shape[1] == 0:
        raise ValueError(f"model: expected at least one class, got an output of shape {tuple(logits.shape)}")
    return logits.gather(1, logits.detach().argmax(1, keepdim=True))[:, 0]


def _too_many_dimensions(logits: Tensor, got: str) -> None:
    raise ValueError(
        f"target: expected a tuple of {logits.ndim - 1} indices or a callable for an output of shape "
        f"{tuple(logits.shape)}, got {got}"
    )


def _indices(target: Any, batch: int) -> list[tuple[int, ...]]:
    """One tuple of indices, behind the batch dimension, for each sample."""
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target: expected integers, got {target.dtype}")
        if target.ndim > 2:
            raise ValueError(f"target: expected shape (B,) or (B, dimensions), got {tuple(target.shape)}")
        values = target.tolist()
        target = values if isinstance(values, int) else [tuple(v) if isinstance(v, list) else v for v in values]
    if _is_int(target):
        return [(target,)] * batch
    if isinstance(target, tuple) and target and all(map(_is_int, target)):
        return [target] * batch
    if not isinstance(target, Sequence) or isinstance(target, str):
        raise TypeError(
            f"target: expected None, an int, a tuple, a sequence, a tensor or a callable, got {type(target).__name__}"
        )
    if len(target) == 1 and batch != 1:
        target = list(target) * batch
    if len(target) != batch:
        raise ValueError(f"target: expected {batch} targets, one for each sample, got {len(target)}")
    rows = [(row,) if _is_int(row) else row for row in target]
    for row in rows:
        if not isinstance(row, (tuple, list)) or not all(map(_is_int, row)):
            raise TypeError(f"target: expected ints or tuples of ints, got {row!r}")
    return [tuple(row) for row in rows]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _picked(logits: Tensor, rows: list[tuple[int, ...]]) -> Tensor:
    if logits.ndim == 1:
        logits = logits[:, None]
    for row in rows:
        if len(row) != logits.ndim - 1:
            _too_many_dimensions(logits, repr(row[0] if len(row) == 1 else row))
        for index, size in zip(row, logits.shape[1:], strict=True):
            if not -size <= index < size:
                raise ValueError(f"target: expected indices below {tuple(logits.shape[1:])}, got {row}")
    columns = torch.tensor(rows, device=logits.device).unbind(1)
    return logits[(torch.arange(len(rows), device=logits.device), *columns)]
