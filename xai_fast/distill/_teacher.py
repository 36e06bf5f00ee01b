"""The teacher's outputs on rows, on the scale that the student is fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._copies import unshared
from .._optional import optional_import
from ..ops import _checks as check

__all__ = ["OUTPUTS", "Teacher", "read_rows"]

OUTPUTS = ("auto", "logits", "probabilities", "raw")
# Probabilities are kept this far from 0 and 1: a student of infinite logits would fit nothing else.
EDGE = 1e-6
BATCH = 8192


def read_rows(X: Any, features: int | None = None) -> Tensor:
    """X as a tensor (n, F) of finite numbers."""
    if isinstance(X, np.ndarray):
        X = torch.from_numpy(np.ascontiguousarray(X)) if X.dtype.kind in "fiub" else X
    if not isinstance(X, Tensor):
        raise TypeError(f"X: expected a torch.Tensor or a numeric numpy array, got {_kind(X)}")
    if X.dim() != 2 or 0 in X.shape or (features is not None and X.shape[1] != features):
        wanted = "F" if features is None else str(features)
        raise ValueError(f"X: expected shape (n, {wanted}) with rows and features, got {tuple(X.shape)}")
    bad = ~X.isfinite().all(1)
    if bool(bad.any()):
        raise ValueError(f"X: expected finite numbers, got NaN or infinity in {int(bad.sum())} of {len(X)} rows")
    return X.detach()


class Teacher:
    """Reads a module, a callable, a scikit-learn estimator or a tensor of outputs.

    Parameters
    ----------
    teacher : nn.Module, callable, estimator, Tensor or array
    outputs : str
    target : int or None
    batch_size : int or None
    progress : bool
    """

    def __init__(self, teacher: Any, outputs: str, target: int | None, batch_size: int | None, progress: bool) -> None:
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs: expected one of {', '.join(OUTPUTS)}, got {outputs!r}")
        is_estimator = hasattr(teacher, "fit") and hasattr(teacher, "predict") and not isinstance(teacher, nn.Module)
        self.is_given = isinstance(teacher, (Tensor, np.ndarray))
        if not (is_estimator or self.is_given or callable(teacher)):
            wanted = "a module, a callable, a scikit-learn estimator or a tensor of outputs"
            raise TypeError(f"teacher: expected {wanted}, got {type(teacher).__name__}")
        self._teacher, self._is_estimator, self._method = teacher, is_estimator, "predict"
        self._outputs, self._target, self._progress = outputs, target, progress
        self._batch = BATCH if batch_size is None else check.check_count(batch_size, "batch_size")
        if is_estimator:
            self._method, self._outputs = _estimator_method(teacher, outputs)
        self.kind, self.is_flat = "raw", True
        self._rows: Tensor | None = None

    def knows(self, X: Tensor) -> bool:
        """Whether the outputs on these rows can be had: not of a tensor of outputs, but for the rows it came with."""
        return not self.is_given or (self._rows is not None and torch.equal(self._rows, X))

    def __call__(self, X: Tensor, given: Any = None) -> Tensor:
        """(n, C) in float64 on the device of X: logits, or raw values; sets `kind` and `is_flat`."""
        y = self._evaluate(X) if given is None and not self.is_given else _as_tensor(self._given(given))
        if self.is_given and given is None:
            self._rows = X
        y = y.detach().to(X.device, torch.float64)
        if y.dim() not in (1, 2) or len(y) != len(X) or 0 in y.shape:
            raise ValueError(f"teacher: expected outputs of shape ({len(X)},) or ({len(X)}, C), got {tuple(y.shape)}")
        bad = ~y.reshape(len(y), -1).isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(f"teacher: expected finite outputs, got NaN or infinity in {int(bad.sum())} of {len(y)} rows")
        self.is_flat = y.dim() == 1 or y.shape[1] == 1
        y = y.reshape(len(y), -1)
        outputs = self._outputs if self._outputs != "auto" else "raw" if self.is_flat else "logits"
        self.kind = "raw" if outputs == "raw" else "logits"
        if outputs == "probabilities":
            y = _log_odds(y)
        if self._target is not None:
            self._target = check.check_count(self._target, "target", 0, y.shape[1] - 1)
            if y.shape[1] > 1:
                # One logit of several is no probability.
                y, self.kind, self.is_flat = y[:, self._target : self._target + 1], "raw", True
        return y

    def _given(self, given: Any) -> Any:
        return self._teacher if given is None else given

    def _evaluate(self, X: Tensor) -> Tensor:
        parts: Any = X.split(self._batch)
        if self._progress:
            parts = optional_import("tqdm", "demo").tqdm(parts, desc="teacher", unit="batch", leave=False)
        if self._is_estimator:
            call = getattr(self._teacher, self._method)
            return torch.cat([_as_tensor(call(unshared(x.cpu().numpy()))).clone() for x in parts])
        module = self._teacher if isinstance(self._teacher, nn.Module) else None
        like = next(module.parameters(), None) if module is not None else None
        was_training = [m for m in module.modules() if m.training] if module is not None else []
        try:
            for m in was_training:
                m.training = False
            with torch.no_grad():
                # Copies on both ways: a teacher may write to what it gets, and return the same buffer at every call.
                rows = (x.clone() if like is None else x.to(like, copy=True) for x in parts)
                return torch.cat([_as_tensor(self._teacher(x)).to(X.device, copy=True) for x in rows])
        finally:
            for m in was_training:
                m.training = True


def _estimator_method(estimator: Any, outputs: str) -> tuple[str, str]:
    """Which method is called, and what it returns."""
    methods = {"logits": "decision_function", "probabilities": "predict_proba", "raw": "predict"}
    if outputs == "auto":
        outputs = next((o for o in ("logits", "probabilities") if hasattr(estimator, methods[o])), "raw")
    if not hasattr(estimator, methods[outputs]):
        raise ValueError(f"outputs: expected something that {_kind(estimator)} has, got {outputs!r} ({methods[outputs]})")
    return methods[outputs], outputs


def _log_odds(p: Tensor) -> Tensor:
    """Logits of probabilities: of several classes those that add up to 0."""
    if bool((p < -1e-3).any()) or bool((p > 1 + 1e-3).any()):
        raise ValueError(f"teacher: expected probabilities, got outputs from {p.min().item():g} to {p.max().item():g}")
    p = p.clamp(EDGE, 1 - EDGE)
    if p.shape[1] == 1:
        return p.logit()
    return p.log() - p.log().mean(1, keepdim=True)


def _as_tensor(y: Any) -> Tensor:
    if hasattr(y, "logits") and not isinstance(y, Tensor):
        y = y.logits
    if isinstance(y, np.ndarray):
        y = check.from_numpy(y, "teacher")
    if not isinstance(y, Tensor):
        raise TypeError(f"teacher: expected outputs as a tensor or an array, got {_kind(y)}")
    return y


def _kind(x: Any) -> str:
    return type(x).__name__
