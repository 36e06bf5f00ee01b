"""A concept: a name and the examples that show it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import _checks as check

__all__ = ["Concept"]


class Concept:
    """A name and the examples that show it; iterating gives batches of inputs, again and again.

    Parameters
    ----------
    name : str
    images : Tensor, ndarray, list, or iterable
        - (n, ...): n examples.
        - A list or tuple of tensors or arrays of one shape: one example each.
        - Any other iterable, such as a DataLoader, or a list of pairs: batches (b, ...), or pairs of such a batch and
          something else (labels), which is left out. An iterator that can be read only once is read into a list.

    Raises
    ------
    TypeError
        `name` is no str; images or batches of another kind.
    ValueError
        No examples; examples of different shapes in a list.

    Notes
    -----
    Source: Kim et al. (2018), Interpretability Beyond Feature Attribution: TCAV (arXiv 1711.11279): a concept is what its
    examples have in common and random examples have not.

    Examples
    --------
    >>> striped = Concept("striped", torch.rand(50, 3, 8, 8))
    >>> [tuple(batch.shape) for batch in striped.batches(32)]
    [(32, 3, 8, 8), (18, 3, 8, 8)]
    >>> loader = torch.utils.data.DataLoader([(torch.rand(3, 8, 8), 0) for _ in range(6)], batch_size=4)
    >>> [tuple(batch.shape) for batch in Concept("dotted", loader)]
    [(4, 3, 8, 8), (2, 3, 8, 8)]
    """

    def __init__(self, name: str, images: Any) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {type(name).__name__}")
        self.name = name
        self.images = _readable(images, name)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Batches of at most that many examples; those of a loader are its own."""
        if isinstance(self.images, Tensor):
            yield from self.images.split(batch_size)
            return
        found = False
        for batch in self.images:
            inputs = _inputs(batch, self.name)
            if len(inputs):
                found = True
                yield inputs
        if not found:
            raise ValueError(f"images: expected at least one example of {self.name!r}, got none")

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches(64)

    def __repr__(self) -> str:
        return f"Concept({self.name!r})"


def _readable(images: Any, name: str) -> Any:
    """A tensor (n, ...), or an iterable of batches that can be read many times."""
    if isinstance(images, (list, tuple)) and images and all(isinstance(x, (Tensor, np.ndarray)) for x in images):
        shapes = {tuple(x.shape) for x in images}
        if len(shapes) > 1:
            raise ValueError(f"images: expected examples of one shape in the list of {name!r}, got {sorted(shapes)}")
        images = torch.stack([check.as_tensor(x, "images") for x in images])
    if isinstance(images, np.ndarray):
        images = check.as_tensor(images, "images")
    if isinstance(images, Tensor):
        if images.dim() < 2:
            raise ValueError(f"images: expected shape (n, ...) for {name!r}, got {tuple(images.shape)}")
        empty = images.numel() == 0
    elif isinstance(images, Iterable) and not isinstance(images, (str, bytes, dict)):
        images = list(images) if iter(images) is images else images
        empty = hasattr(images, "__len__") and len(images) == 0
    else:
        wanted = "a tensor, an array, a list of them or an iterable of batches"
        raise TypeError(f"images: expected {wanted} for {name!r}, got {type(images).__name__}")
    if empty:
        raise ValueError(f"images: expected at least one example of {name!r}, got none")
    return images


def _inputs(batch: Any, name: str) -> Tensor:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, (Tensor, np.ndarray)) or batch.ndim < 1:
        raise TypeError(f"images: expected batches of tensors or (tensor, label) from {name!r}, got {type(batch).__name__}")
    return check.as_tensor(batch, "images")
