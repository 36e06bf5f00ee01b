"""The inputs of a call of `attribute`: which of them are attributed, and what the model gets in their place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._mode import RelevanceMode

__all__ = ["Inputs", "order_of_ids"]


@dataclass
class _Entry:
    """One input. Its leaves: a float tensor itself, or the embeddings looked up for token ids."""

    name: str
    value: Any
    is_attributed: bool
    leaves: list[Tensor] = field(default_factory=list)
    direct: Tensor | None = None

    @property
    def is_ids(self) -> bool:
        return not self.value.is_floating_point()


class Inputs:
    """What the caller gave, in the form it came in: "tensor", "tuple" or "mapping"."""

    def __init__(self, entries: dict[Any, _Entry], form: str, more: tuple[Any, ...], more_named: Mapping[str, Any]) -> None:
        self.entries = entries
        self.form = form
        self.more = _constant(more)
        self.more_named = _constant(dict(more_named))
        self.batch = self._batch()

    @classmethod
    def of(cls, inputs: Any, additional: Any) -> Inputs:
        more_named = additional if isinstance(additional, Mapping) else {}
        more = () if additional is None or more_named is additional else additional
        more = more if isinstance(more, tuple) else (more,)
        if isinstance(inputs, Tensor):
            return cls({0: _Entry("inputs", inputs, True)}, "tensor", more, more_named)
        if isinstance(inputs, tuple):
            entries = {i: _Entry(f"inputs[{i}]", x, _is_attributable(x)) for i, x in enumerate(inputs)}
            return cls(entries, "tuple", more, more_named)
        if isinstance(inputs, Mapping):
            named = {k: _Entry(f"inputs[{k!r}]", x, _is_attributed_name(k, x)) for k, x in inputs.items()}
            return cls(named, "mapping", more, more_named)
        raise TypeError(f"inputs: expected a tensor, a tuple of tensors or a mapping, got {type(inputs).__name__}")

    def _batch(self) -> int:
        attributed = [entry for entry in self.entries.values() if entry.is_attributed]
        if not attributed:
            raise ValueError("inputs: expected a floating-point tensor or token ids, got nothing to attribute")
        for entry in attributed:
            value = entry.value
            if value.is_complex() or value.dtype == torch.bool:
                raise TypeError(f"{entry.name}: expected floating-point values or token ids, got {value.dtype}")
            if value.ndim == 0 or value.shape[0] == 0:
                raise ValueError(f"{entry.name}: expected at least one sample, got shape {tuple(value.shape)}")
        sizes = {entry.value.shape[0] for entry in attributed}
        if len(sizes) > 1:
            raise ValueError(f"inputs: expected one batch size, got {sorted(sizes)}")
        return int(sizes.pop())

    def prepare(self, mode: RelevanceMode) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the model, with fresh leaves behind what is attributed."""
        values = {key: self._value(entry, mode) for key, entry in self.entries.items()}
        if self.form == "mapping":
            return self.more, {**values, **self.more_named}
        return (*values.values(), *self.more), dict(self.more_named)

    def _value(self, entry: _Entry, mode: RelevanceMode) -> Any:
        if not entry.is_attributed:
            return _constant(entry.value)
        entry.leaves = []
        if entry.is_ids:
            mode.embedded.append((entry.value, entry.leaves))
            return entry.value
        value = entry.value.detach()
        leaf = (value.clone() if value.is_inference() else value).requires_grad_()
        entry.leaves.append(leaf)
        # A copy, which the model may overwrite.
        given = leaf.clone()
        mode.inputs.append(given)
        return given

    def check_embedded(self) -> None:
        for entry in self.entries.values():
            if entry.is_attributed and not entry.leaves:
                if self.form == "tuple":
                    entry.is_attributed = False
                    continue
                raise ValueError(
                    f"{entry.name}: expected token ids that the model looks up in an embedding, got ids that it never did; "
                    "give it embeddings instead"
                )

    def leaves(self) -> list[Tensor]:
        return [leaf for entry in self.entries.values() for leaf in entry.leaves]

    def add_direct(self, relevance: Iterable[Tensor | None]) -> None:
        """Relevance that came without a gradient, in the order of the leaves."""
        owners = [entry for entry in self.entries.values() for _ in entry.leaves]
        for entry, part in zip(owners, relevance, strict=True):
            if part is not None:
                entry.direct = part if entry.direct is None else entry.direct + part

    def relevance(self, gradients: Iterable[Tensor | None]) -> Any:
        """x g_x, in the form of the inputs; gradients in the order of the leaves."""
        remaining = iter(gradients)
        found = {key: self._relevance(entry, remaining) for key, entry in self.entries.items()}
        if self.form == "tensor":
            return found[0]
        if self.form == "tuple":
            return tuple(found.values())
        return {key: value for key, value in found.items() if value is not None}

    def _relevance(self, entry: _Entry, gradients: Any) -> Tensor | None:
        if not entry.is_attributed:
            return None
        total = entry.direct
        for leaf in entry.leaves:
            gradient = next(gradients)
            part = torch.zeros_like(leaf) if gradient is None else leaf.detach() * gradient
            total = part if total is None else total + part
        return total


def _constant(value: Any) -> Any:
    """The value with its tensors detached, so that no relevance goes to them."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(map(_constant, value))
    if type(value) is dict:
        return {name: _constant(part) for name, part in value.items()}
    return value


def _is_attributable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype != torch.bool


def _is_attributed_name(name: str, x: Any) -> bool:
    if not isinstance(x, Tensor) or "mask" in name:
        return False
    return x.is_floating_point() or name == "input_ids"


def order_of_ids(ids: Tensor, given: Tensor) -> tuple[int, ...] | None:
    """The dimensions of `ids` in the order in which they are the entries of `given`; None if they are others in memory."""
    if (ids.data_ptr(), ids.dtype, ids.numel()) != (given.data_ptr(), given.dtype, given.numel()):
        return None
    if _merged(_layout(ids)) == _merged(_layout(given)):
        return tuple(range(ids.ndim))
    orders = itertools.permutations(range(ids.ndim))
    return next((order for order in orders if _layout(ids.permute(order)) == _layout(given)), None)


def _layout(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions."""
    return [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]


def _merged(layout: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same with the dimensions as one that a reshape can make one."""
    merged: list[tuple[int, int]] = []
    for size, stride in layout:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        else:
            merged.append((size, stride))
    return merged
