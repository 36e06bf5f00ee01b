"""Features: which entries of an input stand or fall together, and what each is worth to an explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from ..ops import _checks as check

__all__ = ["Features"]


@dataclass(frozen=True)
class Features:
    """Inputs (B, ...) seen as (B, C, P, D): position p is what an attribution speaks of; C and D entries share it.

    `groups` (1 or B, P) names the feature of a position; None: every position is a feature. A feature of the batch that has
    no position in a sample has score 0 there, and its removal changes nothing.
    """

    layout: tuple[int, int, int]  # C, P, D
    count: int  # features F
    scores: Tensor  # (B, F), at least float32
    groups: Tensor | None = None

    @classmethod
    def of(
        cls, inputs: Tensor, attributions: Any, feature_mask: Tensor | None = None, patch_size: int | None = None
    ) -> Features:
        """Attributions broadcast to the inputs: dimensions of 1, or missing at the end, are shared by their entries."""
        maps = _aligned(attributions, inputs)
        layout, maps = _layout(maps, inputs)
        if feature_mask is not None and patch_size is not None:
            raise ValueError("patch_size: expected None beside feature_mask, got both")
        flat = maps.to(torch.uint8 if maps.dtype == torch.bool else maps.dtype).flatten(1)
        flat = flat.float() if not flat.is_floating_point() else flat.to(accumulate_dtype(flat.dtype))
        if patch_size is not None:
            feature_mask = _patches(maps, patch_size)
        if feature_mask is None:
            return cls(layout, layout[1], flat)
        groups, count = _groups(feature_mask, maps)
        return cls(layout, count, _summed(flat, groups, count), groups)

    def unknown(self) -> Tensor:
        """(B,) whether the attribution of a sample holds a NaN, by which nothing can be ranked."""
        return self.scores.isnan().any(1)

    def view(self, x: Tensor) -> Tensor:
        """Inputs (B or 1, ...) as (B or 1, C, P, D)."""
        return x.reshape(x.shape[0], *self.layout)

    def at_positions(self, values: Tensor, sample: Tensor | None = None) -> Tensor:
        """Values (E, F) of features at their positions (E, P); row e is of sample[e], by default of sample e."""
        if self.groups is None:
            return values
        groups = self.groups if sample is None or self.groups.shape[0] == 1 else self.groups[sample]
        return values.gather(1, groups.expand(values.shape[0], -1))


def _aligned(attributions: Any, inputs: Tensor) -> Tensor:
    """The attributions with as many dimensions as the inputs, each of full length or 1."""
    if not isinstance(attributions, Tensor):
        raise TypeError(f"attributions: expected a torch.Tensor, got {type(attributions).__name__}")
    if attributions.dtype != torch.bool:
        check.check_float_tensor(attributions, "attributions (not boolean)")
    check.check_same_device(attributions, "attributions", inputs.device)
    maps, dims = attributions.detach(), inputs.dim()
    if maps.dim() == 3 and dims == 4 and maps.shape[1:] == inputs.shape[2:]:
        maps = maps[:, None]  # maps (B,H,W) of images (B,C,H,W)
    maps = maps.reshape(*maps.shape, *(1,) * (dims - maps.dim()))
    fits = maps.dim() == dims and all(m in (1, n) for m, n in zip(maps.shape[1:], inputs.shape[1:], strict=True))
    if not fits or maps.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"attributions: expected the shape of inputs {check.shape_of(inputs)}, with dimensions of 1 or missing at the "
            f"end where entries share a value, got {check.shape_of(attributions)}"
        )
    return maps


def _layout(maps: Tensor, inputs: Tensor) -> tuple[tuple[int, int, int], Tensor]:
    """(C, P, D) with the shared dimensions before and behind; shared ones in between are written out."""
    sizes = inputs.shape[1:]
    own = [i for i, n in enumerate(maps.shape[1:]) if n > 1]
    first, last = (own[0], own[-1]) if own else (0, 0)
    if any(maps.shape[1 + i] != sizes[i] for i in range(first, last + 1)) and own:
        maps = maps.expand(-1, *(sizes[i] if first <= i <= last else n for i, n in enumerate(maps.shape[1:])))
    if not own:  # one number for a whole sample
        return (1, 1, inputs[0].numel()), maps
    parts = (sizes[:first], sizes[first : last + 1], sizes[last + 1 :])
    channels, positions, depth = (int(torch.Size(p).numel()) for p in parts)
    return (channels, positions, depth), maps


def _patches(maps: Tensor, patch_size: int) -> Tensor:
    """Square patches over the last two dimensions; those at the border may be smaller."""
    patch_size = check.check_count(patch_size, "patch_size")
    if maps.dim() != 4 or maps.shape[1] != 1:
        raise ValueError(f"patch_size: expected maps of one channel (B, 1, H, W), got {check.shape_of(maps)}")
    rows, columns = (torch.arange(n, device=maps.device) // patch_size for n in maps.shape[2:])
    return (rows[:, None] * (int(columns[-1]) + 1) + columns)[None, None]


def _groups(feature_mask: Any, maps: Tensor) -> tuple[Tensor, int]:
    """(1 or B, P) group numbers and how many there are."""
    if not isinstance(feature_mask, Tensor) or feature_mask.is_floating_point() or feature_mask.dtype == torch.bool:
        found = feature_mask.dtype if isinstance(feature_mask, Tensor) else type(feature_mask).__name__
        raise TypeError(f"feature_mask: expected a tensor of whole numbers, got {found}")
    groups = feature_mask.detach().to(device=maps.device, dtype=torch.int64)
    shape = maps.shape
    if groups.dim() < len(shape):
        groups = groups.reshape((1,) * (len(shape) - groups.dim()) + tuple(groups.shape))
    try:
        groups = groups.expand(groups.shape[0], *shape[1:])
    except RuntimeError:
        groups = groups[:0]
    if groups.shape[0] not in (1, shape[0]):
        wanted, size = tuple(shape), check.shape_of(feature_mask)
        raise ValueError(f"feature_mask: expected a shape that broadcasts to the attributions {wanted}, got {size}")
    if int(groups.min()) < 0:
        raise ValueError(f"feature_mask: expected group numbers from 0 on, got {int(groups.min())}")
    return _renumbered(groups.flatten(1))


def _renumbered(groups: Tensor) -> tuple[Tensor, int]:
    """Group numbers from 0 without gaps, in the order of those given, and how many there are."""
    highest = int(groups.max())
    # Counting is cheap beside the sort of `unique`, which numbers without gaps do not need.
    if highest < groups.numel() and bool(groups.flatten().bincount().all()):
        return groups, highest + 1
    numbers, groups = groups.unique(return_inverse=True)
    return groups, len(numbers)


def _summed(flat: Tensor, groups: Tensor, count: int) -> Tensor:
    total = flat.new_zeros(flat.shape[0], count, dtype=torch.float64)
    return total.scatter_add_(1, groups.expand_as(flat), flat.double()).to(flat.dtype)
