"""What is handed to a model or another callable of the user's, which may write to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["unshared"]


def unshared(value: Any) -> Any:
    """A copy of a tensor (with its graph) or an array, or of those in a tuple, list or dict; anything else as it is.

    Models may begin with an operation in place. What belongs to the caller, or is read again after the call, goes through
    here; what was made for the call alone need not.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (tuple, list):
        return type(value)(unshared(part) for part in value)
    if type(value) is dict:
        return {key: unshared(part) for key, part in value.items()}
    return value
