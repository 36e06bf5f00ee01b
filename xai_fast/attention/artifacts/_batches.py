"""Batches of tokens for probes: one form for all inputs, and which images are held out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...ops import _checks as check
from .outliers import Outliers

__all__ = ["TEST", "TRAIN", "VALIDATION", "FlatBatch", "Split", "TokenBatch", "flatten", "read_batches"]

TRAIN, VALIDATION, TEST = 0, 1, 2

# Part of the images that are not held out, on which the penalty is chosen.
VALIDATION_SHARE = 0.2

# Images of a stream are split this many at a time: their number is not known.
STREAM_BLOCK = 20


class TokenBatch(NamedTuple):
    """A batch of a stream of tokens; see :func:`probe_tokens` for the shapes.

    Examples
    --------
    >>> import torch
    >>> TokenBatch(torch.zeros(2, 5, 8), groups=torch.zeros(2, 5, dtype=torch.bool)).targets is None
    True
    """

    tokens: Tensor | np.ndarray
    targets: Tensor | np.ndarray | None = None
    groups: Any = None
    images: Tensor | np.ndarray | None = None


class FlatBatch(NamedTuple):
    """Tokens (n, D), labels (n,) or values (n, P), group and image numbers (n,), and the groups' names if known."""

    tokens: Tensor
    targets: Tensor
    groups: Tensor
    images: Tensor
    names: tuple[str, ...]


class Split:
    """Train, validation or test for every image, decided when it is first seen, so that a second pass agrees.

    Within each block of images the shares are exact and the choice is random.
    """

    def __init__(self, holdout: float | Collection[int], validate: bool, images: int | None, seed: int) -> None:
        self._of: dict[int, int] = {}
        self._seed = seed
        self._block = images or STREAM_BLOCK
        self._held_out = None if isinstance(holdout, float) else frozenset(holdout)
        self._test = max(1, round(holdout * self._block)) if isinstance(holdout, float) else 0
        if self._held_out is not None and images:
            self._block -= len(self._held_out)
        left = self._block - self._test
        self._validation = max(1, round(VALIDATION_SHARE * left)) if validate else 0
        if left - self._validation < 1:
            raise ValueError(
                f"holdout: {images} images are too few to train{', validate' if validate else ''} and test on with "
                f"holdout={holdout!r}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """The parts of these images, (n,)."""
        numbers, inverse = images.unique(return_inverse=True)
        parts = [self._part(number) for number in numbers.tolist()]
        return torch.tensor(parts, device=images.device)[inverse]

    def _part(self, image: int) -> int:
        if image not in self._of:
            if self._held_out is not None and image in self._held_out:
                self._of[image] = TEST
                return TEST
            seen = len(self._of) if self._held_out is None else sum(part != TEST for part in self._of.values())
            block, place = divmod(seen, self._block)
            rank = int(np.random.default_rng((self._seed, block)).permutation(self._block)[place])
            after = rank - self._test
            self._of[image] = TEST if after < 0 else VALIDATION if after < self._validation else TRAIN
        return self._of[image]


def read_batches(tokens: Any, whole: TokenBatch | None) -> Callable[[], Iterator[TokenBatch]]:
    """A function that starts a pass over the batches: the whole of the data as one, or a stream that can be read again."""
    if whole is not None:
        return lambda: iter([whole])
    if callable(tokens):
        return lambda: (_as_batch(entry) for entry in tokens())
    if not isinstance(tokens, Iterable):
        raise TypeError(f"tokens: expected a tensor, batches, or a function that gives batches, got {type(tokens).__name__}")
    if iter(tokens) is tokens:
        raise TypeError(
            "tokens: expected batches that can be read twice (a list, a DataLoader, or a function that starts a new pass), "
            f"got an iterator ({type(tokens).__name__})"
        )
    return lambda: (_as_batch(entry) for entry in tokens)


def _as_batch(entry: Any) -> TokenBatch:
    if isinstance(entry, TokenBatch):
        return entry
    if isinstance(entry, Tensor):
        return TokenBatch(entry)
    if isinstance(entry, (tuple, list)) and 1 <= len(entry) <= 4:
        return TokenBatch(*entry)
    raise TypeError(f"tokens: expected batches (tokens, targets, groups, images), got {type(entry).__name__}")


def flatten(batch: TokenBatch, kind: str, grid: tuple[int, int] | None, first_image: int) -> FlatBatch:
    """Check a batch and write it one token a row. Images without numbers are counted from `first_image`."""
    tokens = _tensor(batch.tokens, "tokens")
    check.check_float_tensor(tokens, "tokens")
    if tokens.dim() not in (2, 3) or not tokens.shape[-1]:
        raise ValueError(f"tokens: expected shape (n, D) or (B, T, D), got {check.shape_of(tokens)}")
    lead = tuple(tokens.shape[:-1])
    targets = _targets(batch.targets, kind, grid, lead, tokens.device)
    groups, names = _groups(batch.groups)
    images = torch.arange(first_image, first_image + lead[0]) if batch.images is None else _tensor(batch.images, "images")
    if images.shape != lead[:1] or images.is_floating_point():
        raise ValueError(f"images: expected whole numbers of shape {lead[:1]}, got {images.dtype} {check.shape_of(images)}")
    images = images.view(-1, *([1] * (len(lead) - 1)))
    flat = [_expand(x, lead, name).reshape(-1).to(tokens.device) for x, name in ((groups, "groups"), (images, "images"))]
    return FlatBatch(tokens.detach().flatten(0, -2), targets, flat[0].long(), flat[1].long(), names)


def _targets(targets: Any, kind: str, grid: tuple[int, int] | None, lead: tuple[int, ...], device: torch.device) -> Tensor:
    if targets is None:
        if kind not in ("position", "coordinates") or len(lead) == 1:
            raise ValueError(f"targets: expected targets for kind {kind!r} and tokens of shape {(*lead, 'D')}, got None")
        targets = torch.arange(lead[1])
        if kind == "coordinates":
            if grid is None:
                raise ValueError("grid: expected (rows, columns) for kind 'coordinates' without targets, got None")
            targets = torch.stack([targets // grid[1], targets % grid[1]], dim=1).float()
    found = _tensor(targets, "targets").to(device)
    if kind in ("pixels", "coordinates"):
        check.check_float_tensor(found, "targets")
        if kind == "coordinates" and found.shape[-1:] != (2,):
            raise ValueError(f"targets: expected (row, column) in the last dimension, got shape {check.shape_of(found)}")
        if not bool(found.isfinite().all()):
            raise ValueError("targets: expected finite values, got NaN or infinity")
        return _expand(found, (*lead, found.shape[-1] if found.dim() else 1), "targets").flatten(0, -2)
    if found.is_floating_point() or found.is_complex():
        raise TypeError(f"targets: expected whole numbers for kind {kind!r}, got {found.dtype}")
    if kind == "class" and len(lead) == 2 and found.shape == lead[:1]:
        found = found[:, None]
    if found.numel() and int(found.min()) < 0:
        raise ValueError(f"targets: expected labels of at least 0, got {int(found.min())}")
    if kind == "position" and grid is not None and found.numel() and int(found.max()) >= grid[0] * grid[1]:
        raise ValueError(f"targets: expected positions in a grid of {grid[0]} x {grid[1]}, got {int(found.max())}")
    return _expand(found, lead, "targets").flatten().long()


def _groups(groups: Any) -> tuple[Tensor, tuple[str, ...]]:
    """The groups as they came, and their usual names."""
    if groups is None:
        return torch.zeros((), dtype=torch.long), ("all",)
    found = groups.mask if isinstance(groups, Outliers) else _tensor(groups, "groups")
    if found.is_floating_point() or found.is_complex():
        raise TypeError(f"groups: expected a boolean mask or whole numbers, got {found.dtype}")
    return found, ("normal", "outlier") if found.dtype == torch.bool else ()


def _tensor(x: Any, name: str) -> Tensor:
    if isinstance(x, (Tensor, np.ndarray)):
        return check.from_array(x, name)
    raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _expand(x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {check.shape_of(x)}") from None
