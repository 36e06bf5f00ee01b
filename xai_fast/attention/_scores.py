"""Recognise attention that a model writes out: softmax(scale * query @ key^T + mask), then @ value.

Each function of interest has one handler. A handler calls the function with unchanged arguments, and then
notes what the result is in terms of query and key: `Scores`, until the softmax commits them as a layer, then
`Probabilities`. Of scores that are not understood it is noted that they are `Derived`; when the softmax over them, or
probabilities that were changed, meet a value, what multiplies it is committed instead. See `_notes.py`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import LAST, Kept, Place, Term, keep
from ._notes import Derived, Note, Probabilities, Scores, ScoreTracker, Source, same_sizes, version_of

__all__ = ["FOLLOWERS", "STARTERS", "Arguments", "Handler", "Keywords", "argument", "methods", "table"]

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
Handler = Callable[["ScoreTracker", Callable[..., Any], Arguments, Keywords], Any]

# Filling scores with a number below this removes the key: exp underflows next to any score that a model produces.
LARGE_NEGATIVE = -1e3


def argument(args: Arguments, kwargs: Keywords, position: int, *names: str) -> Any:
    """An argument that may have been given by position or under one of several names."""
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


# Products: where scores begin, and where probabilities meet a value.


def _matmul(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """matmul, @, bmm."""
    left = argument(args, kwargs, 0, "input", "self")
    right = argument(args, kwargs, 1, "other", "mat2", "tensor2")
    out = func(*args, **kwargs)
    _after_product(tracker, out, left, right)
    return out


def _baddbmm(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """beta * input + alpha * batch1 @ batch2."""
    bias = argument(args, kwargs, 0, "input", "self")
    left, right = argument(args, kwargs, 1, "batch1"), argument(args, kwargs, 2, "batch2")
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
    if isinstance(note, (Probabilities, Derived)) and _mixes_heads(out, left, note):
        tracker.hand_on(out, note, note.place)
        return
    if isinstance(note, Probabilities):
        # A two-dimensional right side is a weight (soft token embeddings), not the values of a sequence.
        if right.ndim >= 3 and (note.place is None or note.place[1] == -1):
            tracker.meet_value(note, left)
        return
    note = tracker.find(right)
    if isinstance(note, Probabilities) and left.ndim >= 3 and note.place is not None and note.place[1] == -2:
        tracker.meet_value(note, right)
    elif left.ndim == right.ndim >= 3 and isinstance(out, Tensor):
        key = right.detach().transpose(-1, -2)
        tracker.note(out, Scores(keep(left), keep(key), alpha, terms))


def _mixes_heads(out: Any, left: Tensor, note: Derived | Probabilities) -> bool:
    """Whether a product runs over a dimension that is neither that of queries nor that of keys."""
    place = note.place
    return place is not None and -1 not in place and isinstance(out, Tensor) and same_sizes(place, out.shape, left.shape)


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
    for own, note in enumerate(notes):
        if isinstance(note, Probabilities):
            _einsum_with_note(tracker, out, note, args[0], operands, own)
            return out
    pair = _einsum_query_key(args[0], operands[0], operands[1])
    if pair is not None:
        tracker.note(out, Scores(keep(pair[0]), keep(pair[1])))
        return out
    for own, note in enumerate(notes):
        if note is not None:
            _einsum_with_note(tracker, out, note, args[0], operands, own)
    return out


def _einsum_with_note(tracker: ScoreTracker, out: Tensor, note: Note, equation: str, operands: Arguments, own: int) -> None:
    """Hand a note on if an einsum mixes heads; commit probabilities whose keys it sums over."""
    found = _einsum_labels(equation, operands[0], operands[1])
    tensor, other = operands[own], operands[1 - own]
    is_summed = True
    if found is not None and note.place is not None:
        labels, output = found
        row, key = (labels[own][dim] for dim in note.place)
        if row in output and key in output:
            tracker.hand_on(out, note, (output.index(row) - len(output), output.index(key) - len(output)))
        is_summed = key not in output and key in labels[1 - own]
    # A two-dimensional operand is a weight, not the values of a sequence.
    if is_summed and other.ndim >= 3 and isinstance(note, Probabilities):
        tracker.meet_value(note, tensor)


def _einsum_labels(equation: str, first: Tensor, second: Tensor) -> tuple[list[str], str] | None:
    """One label for each dimension of two operands and of the result."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if arrow and all(part.count("...") == 1 for part in (*labels, output)) and first.ndim == second.ndim:
        # Name the dimensions of the ellipsis, counted on the first operand.
        hidden = string.ascii_uppercase[: first.ndim - len(labels[0]) + 3]
        labels, output = [part.replace("...", hidden) for part in labels], output.replace("...", hidden)
    if not arrow or len(labels) != 2 or "." in "".join((*labels, output)):
        return None
    if [len(part) for part in labels] != [first.ndim, second.ndim]:
        return None
    if any(len(set(part)) != len(part) for part in (*labels, output)):
        return None
    return labels, output


def _einsum_query_key(equation: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """The operands of an einsum as query (lead, i, d) and key (lead, j, d), if it computes query @ key^T."""
    found = _einsum_labels(equation, first, second)
    if found is None or len(found[1]) < 3:
        return None
    labels, output = found
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
        left, right = argument(args, kwargs, 0, "input", "self"), argument(args, kwargs, 1, "other")
        note, own, factor = tracker.find(left), left, right
        if note is None and not inverse and func not in _IN_PLACE:
            note, own, factor = tracker.find(right), right, left
        if note is None:
            return func(*args, **kwargs)
        shape = own.shape
        out = func(*args, **kwargs)
        scaled = None
        if isinstance(note, Scores) and kwargs.get("rounding_mode") is None and out.shape == shape:
            scaled = _scaled(note, factor, inverse)
        if scaled is not None:
            tracker.note(out, scaled)
        else:
            _elementwise(tracker, out, note, shape, factor)
        return out

    return handler


def _elementwise(tracker: ScoreTracker, out: Tensor, note: Note, shape: torch.Size, other: Any = None) -> None:
    """Hand on the note of a tensor of this shape that was changed in place or combined with another one."""
    place = note.place if same_sizes(note.place, out.shape, shape) else None
    joined = tracker.find(other) if isinstance(note, Probabilities) else None
    if isinstance(note, Probabilities) and isinstance(joined, Probabilities):
        note = replace(note, softmaxes=tuple(dict.fromkeys(note.softmaxes + joined.softmaxes)))
    tracker.hand_on(out, note, place)


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
        left, right = argument(args, kwargs, 0, "input", "self"), argument(args, kwargs, 1, "other")
        alpha = kwargs.get("alpha", 1)
        note, own, other = tracker.find(left), left, right
        if note is None and sign * alpha == 1 and func not in _IN_PLACE:
            note, own, other = tracker.find(right), right, left
        if note is None:
            return func(*args, **kwargs)
        shape, factor = own.shape, sign * alpha
        out = func(*args, **kwargs)
        if not isinstance(note, Scores) or out.shape != shape:
            if _may_be_added(tracker, note, other):
                _elementwise(tracker, out, note, shape, other)
            else:
                tracker.forget(out)
        elif isinstance(other, Tensor) and other.ndim and (other.shape[-1] != 1 or shape[-1] == 1):
            tracker.note(out, replace(note, terms=(*note.terms, Term("add", keep(other), float(factor)))))
        else:
            # The same number for a whole row (such as its maximum) does not change a softmax.
            tracker.note(out, note)
        return out

    return handler


def _may_be_added(tracker: ScoreTracker, note: Note, other: Any) -> bool:
    """False for a residual connection around a softmax of something else: its sum is no longer about keys."""
    if not isinstance(note, Probabilities) or not isinstance(other, Tensor) or not other.ndim:
        return True
    return any(softmax.of_scores for softmax in note.softmaxes) or isinstance(tracker.find(other), Probabilities)


def _masked_fill(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    scores = argument(args, kwargs, 0, "input", "self")
    note = tracker.find(scores)
    out = func(*args, **kwargs)
    if note is not None:
        mask, value = argument(args, kwargs, 1, "mask"), argument(args, kwargs, 2, "value")
        _note_fill(tracker, out, scores.shape, note, mask, "remove", value)
    return out


def _where(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """torch.where(condition, scores, number) or torch.where(condition, number, scores)."""
    condition = argument(args, kwargs, 0, "condition")
    return _select(
        tracker,
        func,
        args,
        kwargs,
        condition,
        argument(args, kwargs, 1, "input", "self"),
        argument(args, kwargs, 2, "other"),
    )


def _tensor_where(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """scores.where(condition, number)."""
    chosen, condition = args[0], argument(args, kwargs, 1, "condition")
    return _select(tracker, func, args, kwargs, condition, chosen, argument(args, kwargs, 2, "other"))


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
    out = func(*args, **kwargs)
    if note is not None:
        _note_fill(tracker, out, scores.shape, note, condition, kind, value)
    return out


def _note_fill(
    tracker: ScoreTracker,
    out: Tensor,
    shape: torch.Size,
    note: Note,
    mask: Any,
    kind: str,
    value: Any,
) -> None:
    _elementwise(tracker, out, note, shape)
    if not isinstance(note, Scores) or out.shape != shape or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
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
        if isinstance(note, Scores):
            tracker.note(out, note)
        else:
            tracker.hand_on(out, note, note.place, unchanged=args[0])
    return out


def _dropout(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    source = argument(args, kwargs, 0, "input")
    note = tracker.find(source)
    if note is None:
        return func(*args, **kwargs)
    rate, training = argument(args, kwargs, 1, "p"), argument(args, kwargs, 2, "training", "train")
    active = (training is None or training) and rate != 0
    before = source
    if active and isinstance(note, Probabilities) and note.waits and note.source is None and note.place is not None:
        overwritten = func in _IN_PLACE or argument(args, kwargs, 3, "inplace")
        kept = keep(source.detach().clone() if overwritten else source)
        note = replace(note, source=Source(kept, tracker.tap(source), note.place))
    out = func(*args, **kwargs)
    if isinstance(note, Scores) and not active:
        tracker.note(out, note)
    elif out is not before or active:
        tracker.hand_on(out, note, note.place, unchanged=before)
    return out


def _reshape(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """view, reshape, flatten, unsqueeze...: heads folded into the batch, windows unfolded, and back."""
    note = tracker.find(args[0]) if args else None
    out = func(*args, **kwargs)
    if note is None or out is args[0] or out.dtype != args[0].dtype:
        return out
    shape = args[0].shape
    if isinstance(note, Scores) and out.ndim >= 3 and out.shape[-2:] == shape[-2:]:
        tracker.note(out, _with_lead(note, tuple(shape[:-2]), tuple(out.shape[:-2])))
    else:
        tracker.hand_on(out, note, _place_after_reshape(note, shape, out.shape), unchanged=args[0])
    return out


def _place_after_reshape(note: Note, before: torch.Size, after: torch.Size) -> Place | None:
    """Queries and keys are where they were if only dimensions in front of both were folded or split."""
    first = 0 if note.place is None else min(note.place)
    return note.place if first and after[first:] == before[first:] else None


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
    scores, dim = argument(args, kwargs, 0, "input", "self"), argument(args, kwargs, 1, "dim")
    note = tracker.find(scores)
    out = func(*args, **kwargs)
    if not isinstance(out, Tensor) or out.ndim < 3 or not isinstance(dim, int):
        return out
    keys = dim if dim < 0 else dim - out.ndim
    if isinstance(note, Scores) and keys == -1:
        tracker.commit_scores(note, out)
    elif isinstance(note, (Scores, Derived)):
        place = note.place or LAST
        if keys in place:
            tracker.await_value(out, (place[0] if keys == place[1] else place[1], keys), of_scores=True)
    elif keys == -1:
        tracker.await_value(out, LAST, of_scores=False)
    return out


def _overwrite(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """In-place functions that are not followed. Tensors of inference mode have no version that would tell."""
    note = tracker.find(args[0]) if args else None
    if note is None:
        return func(*args, **kwargs)
    version, shape = version_of(args[0]), args[0].shape
    out = func(*args, **kwargs)
    if version_of(args[0]) != version or version < 0:
        _elementwise(tracker, args[0], note, shape)
    return out


def _writes(handler: Handler) -> Handler:
    """A handler for functions that write to their first argument."""

    def writing(tracker: ScoreTracker, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_inference():
            tracker.forget_aliases(args[0])
        return handler(tracker, func, args, kwargs)

    return writing


def methods(*names: str) -> list[Callable[..., Any]]:
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
    return methods(*names, *(f"__i{name}__" for name in operators), "__setitem__")


def table(*groups: tuple[list[Callable[..., Any]], Handler]) -> dict[Callable[..., Any], Handler]:
    return {function: handler for functions, handler in groups for function in functions}


_IN_PLACE = frozenset(_in_place_methods()) | {torch.dropout_}

# Functions whose result may get the first note...
STARTERS = table(
    (methods("matmul", "__matmul__", "bmm"), _matmul),
    (methods("baddbmm", "baddbmm_"), _baddbmm),
    ([torch.einsum], _einsum),
    ([F.softmax, *methods("softmax"), torch.special.softmax], _softmax),
)

# ... and functions that only hand notes on, so that they need not be looked at while there are none.
_HANDED_ON = table(
    (_in_place_methods(), _overwrite),
    (methods("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"), _scale(False)),
    (methods("div", "div_", "divide", "divide_", "true_divide", "true_divide_"), _scale(True)),
    (methods("__truediv__", "__itruediv__"), _scale(True)),
    (methods("add", "add_", "__add__", "__radd__", "__iadd__"), _add(1.0)),
    (methods("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"), _add(-1.0)),
    (methods("masked_fill", "masked_fill_"), _masked_fill),
    ([torch.where], _where),
    ([Tensor.where], _tensor_where),
    (methods("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"), _same),
    ([F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.dropout_], _dropout),
    (methods("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
)
FOLLOWERS = {function: _writes(handler) if function in _IN_PLACE else handler for function, handler in _HANDED_ON.items()}
