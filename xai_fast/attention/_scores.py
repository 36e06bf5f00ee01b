"""Recognise attention that a model writes out: softmax(scale * query @ key^T + mask), then @ value.

Each function of interest has one handler. A handler calls the function with unchanged arguments, and then
notes what the result is in terms of query and key: `Scores`, until the softmax commits them as a layer, then
`Probabilities`. Notes hang on live tensors by weak reference. Whatever is not understood is simply not noted;
if a softmax over such scores is later multiplied with a value, its probabilities are committed instead.
"""

from __future__ import annotations

import math
import string
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gradients import ProbabilityTap
from ._layers import CapturedLayer, Kept, ProbabilityLayer, QueryKeyLayer, Term, keep, keep_owned

__all__ = ["FOLLOWERS", "STARTERS", "Handler", "Probabilities", "ScoreTracker", "Scores"]

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
Handler = Callable[["ScoreTracker", Callable[..., Any], Arguments, Keywords], Any]

# Filling scores with a number below this removes the key: exp underflows next to any score that a model produces.
LARGE_NEGATIVE = -1e3


@dataclass(frozen=True)
class Scores:
    """scale * query @ key^T, then `terms` in order; query (..., Nq, d), key (..., Nk, d), both detached."""

    query: Kept
    key: Kept
    scale: float = 1.0
    terms: tuple[Term, ...] = ()


@dataclass
class Probabilities:
    """The result of a softmax: committed already, or kept in case it meets a value."""

    pending: Kept | None
    tap: ProbabilityTap | None = None


class ScoreTracker:
    """Notes on live tensors, and the way to commit a layer.

    Parameters
    ----------
    emit : callable
        Takes a function of the layer's name that builds the layer.
    num_heads : int or None
        Heads folded in the leading dimension of 3-D scores.
    """

    def __init__(
        self, emit: Callable[[Callable[[str], CapturedLayer]], CapturedLayer | None], num_heads: int | None
    ) -> None:
        self.emit = emit
        self.num_heads = num_heads
        # The capturing mode, and what makes a backward pass one for relevance while rules are woven into the forward pass.
        self.mode: Any = None
        self.relevance_pass: Any = None
        self.notes: dict[int, tuple[weakref.ref[Tensor], int, Scores | Probabilities]] = {}

    def clear(self) -> None:
        self.notes.clear()

    def find(self, tensor: object) -> Scores | Probabilities | None:
        """The note on a tensor; none if the tensor was written to by a function without a handler."""
        entry = self.notes.get(id(tensor))
        if entry is None:
            return None
        reference, version, note = entry
        if reference() is not tensor:
            return None
        if isinstance(note, Scores):
            unchanged = version == _version(tensor) and note.query.intact() and note.key.intact()
            return note if unchanged else None
        return note

    def note(self, tensor: Any, note: Scores | Probabilities) -> None:
        if not isinstance(tensor, Tensor):
            return
        key, notes = id(tensor), self.notes

        def remove(_: weakref.ref[Tensor]) -> None:
            # Runs before the id can be given to another object.
            notes.pop(key, None)

        notes[key] = (weakref.ref(tensor, remove), _version(tensor), note)

    def forget(self, tensor: object) -> None:
        self.notes.pop(id(tensor), None)

    def forget_aliases(self, written: Tensor) -> None:
        """Drop the notes on other tensors of the same storage: without a version they would not know."""
        storage = written.untyped_storage().data_ptr()
        for key, (reference, _, note) in list(self.notes.items()):
            tensor = reference()
            if tensor is None or tensor is written or not isinstance(note, Scores):
                continue
            if tensor.untyped_storage().data_ptr() == storage:
                self.notes.pop(key, None)

    def commit_scores(self, scores: Scores, probabilities: Tensor) -> None:
        query, key = scores.query.tensor, scores.key.tensor
        layer = self.emit(
            lambda name: QueryKeyLayer(
                name,
                "matmul",
                (keep_owned(query), keep_owned(key)),
                lead=tuple(probabilities.shape[:-2]),
                queries=query.shape[-2],
                keys=key.shape[-2],
                scale=scores.scale,
                terms=scores.terms,
                num_heads=self.num_heads,
            )
        )
        if layer is not None:
            layer.tap = self.tap(probabilities)

    def commit_probabilities(self, probabilities: Probabilities) -> None:
        kept = probabilities.pending
        if kept is not None:
            probabilities.pending = None
            layer = self.emit(lambda name: ProbabilityLayer(name, kept, self.num_heads))
            if layer is not None:
                layer.tap = probabilities.tap

    @contextmanager
    def folding(self, num_heads: int) -> Iterator[None]:
        """3-D scores inside have `num_heads` heads in their leading dimension."""
        before, self.num_heads = self.num_heads, num_heads
        try:
            yield
        finally:
            self.num_heads = before

    def tap(self, probabilities: Tensor) -> ProbabilityTap | None:
        return ProbabilityTap(probabilities, self.relevance_pass) if probabilities.requires_grad else None


def _version(tensor: Any) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _argument(args: Arguments, kwargs: Keywords, position: int, *names: str) -> Any:
    """An argument that may have been given by position or under one of several names."""
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _protect(note: Scores | Probabilities | None, func: Callable[..., Any], in_place: bool = False) -> None:
    """Copy probabilities that wait for a value before they are overwritten."""
    if isinstance(note, Probabilities) and note.pending is not None and (in_place or func in _IN_PLACE):
        note.pending = Kept(note.pending.tensor.clone())


# Products: where scores begin, and where probabilities meet a value.


def _matmul(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """matmul, @, bmm."""
    left = _argument(args, kwargs, 0, "input", "self")
    right = _argument(args, kwargs, 1, "other", "mat2", "tensor2")
    out = func(*args, **kwargs)
    _after_product(tracker, out, left, right)
    return out


def _baddbmm(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """beta * input + alpha * batch1 @ batch2."""
    bias = _argument(args, kwargs, 0, "input", "self")
    left, right = _argument(args, kwargs, 1, "batch1"), _argument(args, kwargs, 2, "batch2")
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    terms: tuple[Term, ...] = ()
    if beta != 0 and isinstance(bias, Tensor):
        # In place the bias is gone after the call.
        terms = (Term("add", keep(bias.clone() if func in _IN_PLACE else bias), float(beta)),)
    out = func(*args, **kwargs)
    _after_product(tracker, out, left, right, terms, float(alpha))
    return out


def _after_product(
    tracker: ScoreTracker,
    out: Tensor,
    left: Any,
    right: Any,
    terms: tuple[Term, ...] = (),
    alpha: float = 1.0,
) -> None:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return
    note = tracker.find(left)
    if isinstance(note, Probabilities):
        # A two-dimensional right side is a weight (soft token embeddings), not the values of a sequence.
        if right.ndim >= 3:
            tracker.commit_probabilities(note)
    elif left.ndim == right.ndim >= 3 and isinstance(out, Tensor):
        key = right.detach().transpose(-1, -2)
        tracker.note(out, Scores(keep(left), keep(key), alpha, terms))


def _einsum(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """Two operands contracted to (..., i, j), in any order of dimensions."""
    out = func(*args, **kwargs)
    if not (args and isinstance(args[0], str)):
        return out
    operands = args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not all(isinstance(operand, Tensor) for operand in operands):
        return out
    notes = [tracker.find(operand) for operand in operands]
    for note, other in zip(notes, operands[::-1], strict=True):
        if isinstance(note, Probabilities):
            if other.ndim >= 3:
                tracker.commit_probabilities(note)
            return out
    pair = _einsum_query_key(args[0], operands[0], operands[1])
    if pair is not None:
        tracker.note(out, Scores(keep(pair[0]), keep(pair[1])))
    return out


def _einsum_query_key(equation: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """The operands of an einsum as query (lead, i, d) and key (lead, j, d), if it computes query @ key^T."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if arrow and all(part.count("...") == 1 for part in (*labels, output)) and first.ndim == second.ndim:
        # Name the dimensions of the ellipsis, counted on the first operand.
        hidden = string.ascii_uppercase[: first.ndim - len(labels[0]) + 3]
        labels, output = [part.replace("...", hidden) for part in labels], output.replace("...", hidden)
    if not arrow or len(labels) != 2 or len(output) < 3 or "." in "".join((*labels, output)):
        return None
    if [len(part) for part in labels] != [first.ndim, second.ndim]:
        return None
    if any(len(set(part)) != len(part) for part in (*labels, output)):
        return None
    lead, i, j = output[:-2], output[-2], output[-1]
    if i in labels[1]:
        labels, first, second = labels[::-1], second, first
    summed = [label for label in labels[0] if label in labels[1] and label not in output]
    query_labels, key_labels = set(lead) | {i, *summed}, set(lead) | {j, *summed}
    if not summed or not set(labels[0]) <= query_labels or not set(labels[1]) <= key_labels:
        return None
    if i not in labels[0] or j not in labels[1]:
        return None
    return _arrange(first, labels[0], lead, i, summed), _arrange(second, labels[1], lead, j, summed)


def _arrange(operand: Tensor, labels: str, lead: str, row: str, summed: list[str]) -> Tensor:
    """Permute to (lead, row, summed flattened); a lead dimension that is missing becomes 1."""
    operand = operand.detach().permute([labels.index(label) for label in (*lead, row, *summed) if label in labels])
    for position, label in enumerate(lead):
        if label not in labels:
            operand = operand.unsqueeze(position)
    return operand.flatten(len(lead) + 1)


# What happens to scores between the product and the softmax.


def _scale(inverse: bool) -> Handler:
    """Multiplication, or division, by a number or by one number per head or row."""

    def handler(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        left, right = _argument(args, kwargs, 0, "input", "self"), _argument(args, kwargs, 1, "other")
        note, own, factor = tracker.find(left), left, right
        if note is None and not inverse and func not in _IN_PLACE:
            note, own, factor = tracker.find(right), right, left
        if note is None:
            return func(*args, **kwargs)
        _protect(note, func)
        shape = own.shape
        out = func(*args, **kwargs)
        if isinstance(note, Probabilities):
            # A head mask or a gate: like dropout, it comes after the probabilities.
            tracker.note(out, note)
            return out
        scaled = _scaled(note, factor, inverse) if kwargs.get("rounding_mode") is None else None
        if scaled is not None and out.shape == shape:
            tracker.note(out, scaled)
        else:
            tracker.forget(out)
        return out

    return handler


def _scaled(scores: Scores, factor: Any, inverse: bool) -> Scores | None:
    if isinstance(factor, Tensor) and factor.ndim == 0 and factor.device.type == "cpu":
        factor = factor.item()
    if isinstance(factor, Real):
        number = 1.0 / float(factor) if inverse and factor else float(factor)
        if inverse and not factor:
            return None
        if any(term.kind != "add" for term in scores.terms) and number <= 0:
            return None
        terms = tuple(t._replace(factor=t.factor * number) for t in scores.terms)
        return replace(scores, scale=scores.scale * number, terms=terms)
    if not isinstance(factor, Tensor) or scores.terms:
        return None
    query = scores.query.tensor
    # One factor per head or per query row can be moved into the query.
    if (factor.ndim and factor.shape[-1] != 1) or factor.ndim > query.ndim:
        return None
    factor = factor.detach()
    query = query / factor if inverse else query * factor
    return replace(scores, query=keep(query))


def _add(sign: float) -> Handler:
    """Addition, or subtraction, of a number or of a mask or bias that broadcasts to the scores."""

    def handler(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        left, right = _argument(args, kwargs, 0, "input", "self"), _argument(args, kwargs, 1, "other")
        alpha = kwargs.get("alpha", 1)
        note, own, other = tracker.find(left), left, right
        if note is None and sign * alpha == 1 and func not in _IN_PLACE:
            note, own, other = tracker.find(right), right, left
        if not isinstance(note, Scores):
            return func(*args, **kwargs)
        shape, factor = own.shape, sign * alpha
        out = func(*args, **kwargs)
        if out.shape != shape:
            tracker.forget(out)
        elif isinstance(other, Tensor) and other.ndim and (other.shape[-1] != 1 or shape[-1] == 1):
            tracker.note(out, replace(note, terms=(*note.terms, Term("add", keep(other), float(factor)))))
        else:
            # The same number for a whole row (such as its maximum) does not change a softmax.
            tracker.note(out, note)
        return out

    return handler


def _masked_fill(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    scores = _argument(args, kwargs, 0, "input", "self")
    note = tracker.find(scores)
    _protect(note, func)
    out = func(*args, **kwargs)
    if note is not None:
        mask, value = _argument(args, kwargs, 1, "mask"), _argument(args, kwargs, 2, "value")
        _note_fill(tracker, out, scores.shape, note, mask, "remove", value)
    return out


def _where(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """torch.where(condition, scores, number) or torch.where(condition, number, scores)."""
    condition = _argument(args, kwargs, 0, "condition")
    return _select(
        tracker,
        func,
        args,
        kwargs,
        condition,
        _argument(args, kwargs, 1, "input", "self"),
        _argument(args, kwargs, 2, "other"),
    )


def _tensor_where(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """scores.where(condition, number)."""
    chosen, condition = args[0], _argument(args, kwargs, 1, "condition")
    return _select(tracker, func, args, kwargs, condition, chosen, _argument(args, kwargs, 2, "other"))


def _select(
    tracker: ScoreTracker,
    func: Callable[..., Any],
    args: Arguments,
    kwargs: Keywords,
    condition: Any,
    chosen: Any,
    other: Any,
) -> Any:
    note, scores, kind, value = tracker.find(chosen), chosen, "keep", other
    if note is None:
        note, scores, kind, value = tracker.find(other), other, "remove", chosen
    _protect(note, func)
    out = func(*args, **kwargs)
    if note is not None:
        _note_fill(tracker, out, scores.shape, note, condition, kind, value)
    return out


def _note_fill(
    tracker: ScoreTracker,
    out: Tensor,
    shape: torch.Size,
    note: Scores | Probabilities,
    mask: Any,
    kind: str,
    value: Any,
) -> None:
    if isinstance(note, Probabilities):
        tracker.note(out, note)
        return
    tracker.forget(out)
    if out.shape != shape or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else math.nan
    if not value <= LARGE_NEGATIVE:
        return
    tracker.note(out, replace(note, terms=(*note.terms, Term(kind, keep(mask)))))


def _same(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """Conversions and copies."""
    note = tracker.find(args[0]) if args else None
    out = func(*args, **kwargs)
    if note is not None and isinstance(out, Tensor) and out is not args[0] and out.is_floating_point():
        tracker.note(out, note)
    return out


def _dropout(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    source = _argument(args, kwargs, 0, "input")
    note = tracker.find(source)
    if note is None:
        return func(*args, **kwargs)
    rate, training = _argument(args, kwargs, 1, "p"), _argument(args, kwargs, 2, "training", "train")
    active = (training is None or training) and rate != 0
    _protect(note, func, in_place=active and bool(_argument(args, kwargs, 3, "inplace")))
    out = func(*args, **kwargs)
    if isinstance(note, Probabilities) or not active:
        tracker.note(out, note)
    return out


def _reshape(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """view, reshape, flatten, unsqueeze...: heads folded into the batch, windows unfolded, and back."""
    note = tracker.find(args[0]) if args else None
    out = func(*args, **kwargs)
    if note is None or out is args[0] or out.dtype != args[0].dtype:
        return out
    if isinstance(note, Probabilities):
        tracker.note(out, note)
    elif out.ndim >= 3 and out.shape[-2:] == args[0].shape[-2:]:
        tracker.note(out, _with_lead(note, tuple(args[0].shape[:-2]), tuple(out.shape[:-2])))
    return out


def _with_lead(scores: Scores, old: tuple[int, ...], new: tuple[int, ...]) -> Scores:
    """Scores whose leading dimensions were reshaped."""

    def move(kept: Kept) -> Kept:
        tensor = kept.tensor
        if tensor.ndim < 2:
            return kept
        last, own = tuple(tensor.shape[-2:]), tuple(tensor.shape[:-2])
        if math.prod(own) == 1:
            return keep(tensor.reshape(last))
        return keep(tensor.expand(old + last).reshape(new + last))

    terms = tuple(term._replace(kept=move(term.kept)) for term in scores.terms)
    return replace(scores, query=move(scores.query), key=move(scores.key), terms=terms)


# The softmax, and changes that cannot be followed.


def _softmax(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    scores, dim = _argument(args, kwargs, 0, "input", "self"), _argument(args, kwargs, 1, "dim")
    note = tracker.find(scores)
    out = func(*args, **kwargs)
    if not isinstance(out, Tensor) or out.ndim < 3 or dim not in (-1, out.ndim - 1):
        return out
    if isinstance(note, Scores):
        tracker.commit_scores(note, out)
        tracker.note(out, Probabilities(None))
    else:
        tracker.note(out, Probabilities(keep(out), tracker.tap(out)))
    return out


def _overwrite(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """In-place functions that are not followed. Tensors of inference mode have no version that would tell."""
    note = tracker.find(args[0]) if args else None
    _protect(note, func, in_place=True)
    out = func(*args, **kwargs)
    if isinstance(note, Scores):
        tracker.forget(args[0])
    return out


def _writes(handler: Handler) -> Handler:
    """A handler for functions that write to their first argument."""

    def writing(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_inference():
            tracker.forget_aliases(args[0])
        return handler(tracker, func, args, kwargs)

    return writing


def _methods(*names: str) -> list[Callable[..., Any]]:
    """The functions of these names in torch and among the methods of Tensor, as a function mode sees them."""
    found = [getattr(place, name, None) for name in names for place in (Tensor, torch)]
    return [function for function in found if callable(function)]


def _in_place_methods() -> list[Callable[..., Any]]:
    names = [name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")]
    operators = (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
    return _methods(*names, *(f"__i{name}__" for name in operators), "__setitem__")


def _table(*groups: tuple[list[Callable[..., Any]], Handler]) -> dict[Callable[..., Any], Handler]:
    return {function: handler for functions, handler in groups for function in functions}


_IN_PLACE = frozenset(_in_place_methods()) | {torch.dropout_}

# Functions whose result may get the first note...
STARTERS = _table(
    (_methods("matmul", "__matmul__", "bmm"), _matmul),
    (_methods("baddbmm", "baddbmm_"), _baddbmm),
    ([torch.einsum], _einsum),
    ([F.softmax, *_methods("softmax"), torch.special.softmax], _softmax),
)

# ... and functions that only hand notes on, so that they need not be looked at while there are none.
_HANDED_ON = _table(
    (_in_place_methods(), _overwrite),
    (_methods("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"), _scale(False)),
    (_methods("div", "div_", "divide", "divide_", "true_divide", "true_divide_"), _scale(True)),
    (_methods("__truediv__", "__itruediv__"), _scale(True)),
    (_methods("add", "add_", "__add__", "__radd__", "__iadd__"), _add(1.0)),
    (_methods("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"), _add(-1.0)),
    (_methods("masked_fill", "masked_fill_"), _masked_fill),
    ([torch.where], _where),
    ([Tensor.where], _tensor_where),
    (_methods("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"), _same),
    ([F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.dropout_], _dropout),
    (_methods("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
)
FOLLOWERS = {function: _writes(handler) if function in _IN_PLACE else handler for function, handler in _HANDED_ON.items()}
