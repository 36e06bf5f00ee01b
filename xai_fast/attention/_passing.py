"""Functions that move, cut, mask, join or mix scores and probabilities between the product, the softmax and the value.

Attention sinks, talking heads, renormalised or masked probabilities: none of it is followed as scale and mask are. It is
noted where queries and keys are afterwards, so that the softmax is known, and later what multiplies the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import Place
from ._notes import Note, Probabilities, ScoreTracker, same_sizes
from ._scores import Arguments, Handler, Keywords, argument, methods, table

__all__ = ["PASSING"]

# Strides of a stand-in, whose views tell by them which dimension is which, whatever step a slice takes.
_STEP = 256
_MOST_DIMS = 6


def _view(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """Functions that give views: one, or several."""
    note = tracker.find(args[0]) if args else None
    out = func(*args, **kwargs)
    if note is None:
        return out
    places = _places_in_views(func, args, kwargs, note.place)
    outs = out if isinstance(out, (tuple, list)) else [out]
    for view, place in zip(outs, places or [None] * len(outs), strict=True):
        if not isinstance(view, Tensor) or view is args[0]:
            continue
        if place is not None and note.place is not None and _same_tokens(view, place, args[0], note.place):
            # Other heads or another order of them: what is known of the whole holds.
            tracker.hand_on(view, note, place, unchanged=args[0])
        else:
            tracker.hand_on(view, note, place)
    return out


def _same_tokens(view: Tensor, place: Place, tensor: Tensor, before: Place) -> bool:
    return all(view.shape[new] == tensor.shape[old] for new, old in zip(place, before, strict=True))


def _places_in_views(
    func: Callable[..., Any], args: Arguments, kwargs: Keywords, place: Place | None
) -> list[Place | None] | None:
    """Where queries and keys are in each view; None where that cannot be told."""
    shape = args[0].shape
    if place is None or len(shape) > _MOST_DIMS:
        return None
    if func is Tensor.__getitem__ and _picks(args[1]):
        return [place] if _picks_in_one_dimension(args[1]) else None
    strides = [_STEP**dim for dim in range(len(shape))]
    with torch._C.DisableTorchFunction():
        stand_in = torch.empty_strided(shape, strides, device="meta")
        views = func(stand_in, *args[1:], **kwargs)
    views = views if isinstance(views, (tuple, list)) else [views]
    return [_place_in_view(view.stride(), [strides[dim] for dim in place]) for view in views]


def _place_in_view(found: tuple[int, ...], wanted: list[int]) -> Place | None:
    dims = [
        next((dim - len(found) for dim, stride in enumerate(found) if first <= stride < first * _STEP), None)
        for first in wanted
    ]
    return None if dims[0] is None or dims[1] is None else (dims[0], dims[1])


def _picks(index: Any) -> bool:
    """Whether an index holds tensors or lists, which give no view."""
    return any(isinstance(part, (Tensor, list)) for part in (index if isinstance(index, tuple) else (index,)))


def _picks_in_one_dimension(index: Any) -> bool:
    """x[..., [0, 2]]: the dimensions stay where they are."""
    parts = index if isinstance(index, tuple) else (index,)
    picked = [part for part in parts if not (part is Ellipsis or isinstance(part, slice))]
    return len(picked) == 1 and isinstance(picked[0], (Tensor, list)) and torch.as_tensor(picked[0]).ndim == 1


def _in_place_dimensions(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """Functions that leave every dimension where it is, but change what is in it, or its size."""
    source = argument(args, kwargs, 0, "input", "self")
    note = tracker.find(source)
    out = func(*args, **kwargs)
    if note is not None and isinstance(out, Tensor):
        tracker.hand_on(out, note, note.place if out.ndim == source.ndim else None)
    return out


def _join(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """cat: a column for a sink, zeros, or other heads."""
    parts = argument(args, kwargs, 0, "tensors")
    out = func(*args, **kwargs)
    notes = [note for note in map(tracker.find, parts) if note is not None] if isinstance(parts, (tuple, list)) else []
    if not notes:
        return out
    found = [note for note in notes if isinstance(note, Probabilities)]
    note: Note = notes[0]
    if found:
        softmaxes = dict.fromkeys(softmax for part in found for softmax in part.softmaxes)
        note = replace(found[0], softmaxes=tuple(softmaxes))
    tracker.hand_on(out, note, note.place)
    return out


def _mix(normalised: bool) -> Handler:
    """Linear maps, convolutions and norms: over heads they hand on, over keys or queries they make something else."""

    def handler(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        source = argument(args, kwargs, 0, "input")
        note = tracker.find(source)
        out = func(*args, **kwargs)
        if note is None or note.place is None:
            return out
        last = len(argument(args, kwargs, 1, "normalized_shape")) if normalised else 1
        if func not in _OVER_CHANNELS and max(note.place) >= -last:
            return out
        if out.ndim == source.ndim and same_sizes(note.place, out.shape, source.shape):
            tracker.hand_on(out, note, note.place)
        return out

    return handler


_OVER_CHANNELS: frozenset[Callable[..., Any]] = frozenset({torch.conv1d, torch.conv2d, torch.conv3d, F.batch_norm})

_VIEWS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "narrow", "select", "chunk", "split")
_MORE_VIEWS = ("unbind", "tensor_split", "expand", "expand_as", "__getitem__")
_SAME_DIMENSIONS = ("index_select", "gather", "take_along_dim", "flip", "roll", "repeat_interleave", "tril", "triu")
_ELEMENTWISE = ("tanh", "relu", "clamp", "clamp_min", "clamp_max", "clip", "nan_to_num", "pow", "__pow__", "square")

PASSING = table(
    (methods(*_VIEWS, *_MORE_VIEWS), _view),
    ([Tensor.mT.__get__, Tensor.T.__get__], _view),  # type: ignore[attr-defined]
    (methods(*_SAME_DIMENSIONS, *_ELEMENTWISE), _in_place_dimensions),
    ([F.pad, F.normalize, F.relu], _in_place_dimensions),
    (methods("cat", "concat", "concatenate"), _join),
    ([F.linear, *_OVER_CHANNELS], _mix(normalised=False)),
    ([F.layer_norm], _mix(normalised=True)),
)
