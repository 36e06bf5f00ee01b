"""What is known of the tensors between query and value, and how it becomes layers of a record.

A product of two activations gives `Scores`; what is made of them in a way that is not followed is `Derived`; a softmax
gives `Probabilities`, until their product with a value. Notes hang on live tensors by weak reference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._gradients import ProbabilityTap
from ._layers import LAST, CapturedLayer, Kept, Place, ProbabilityLayer, QueryKeyLayer, Term, keep, keep_owned

__all__ = ["Derived", "Note", "Probabilities", "ScoreTracker", "Scores", "Softmax", "Source", "same_sizes"]


@dataclass(frozen=True)
class Scores:
    """scale * query @ key^T, then `terms` in order; query (..., Nq, d), key (..., Nk, d), both detached."""

    query: Kept
    key: Kept
    scale: float = 1.0
    terms: tuple[Term, ...] = ()

    @property
    def place(self) -> Place:
        return LAST


@dataclass(frozen=True)
class Derived:
    """Made of scores; queries and keys are in the dimensions `place`, None if that is not known."""

    place: Place | None = LAST


@dataclass(eq=False)
class Softmax:
    """What the record has of one softmax.

    Attributes
    ----------
    of_scores : bool
        Its argument came from a product of two activations.
    layer : CapturedLayer or None
        The layer that the softmax itself has made.
    whole : bool
        Its result is in the record as it is.
    met : bool
        It was multiplied with a value.
    """

    of_scores: bool
    layer: CapturedLayer | None = None
    whole: bool = False
    met: bool = False


@dataclass(frozen=True)
class Source:
    """Probabilities that stand for a later tensor: before dropout, and before heads were folded or split."""

    kept: Kept
    tap: ProbabilityTap | None
    place: Place


@dataclass(frozen=True)
class Probabilities:
    """The result of one or several softmaxes, `changed` (mixed, masked, cut...) or as it was."""

    softmaxes: tuple[Softmax, ...]
    place: Place | None = LAST
    changed: bool = False
    source: Source | None = None

    @property
    def waits(self) -> bool:
        """Whether the product with a value has something to add to the record."""
        return self.changed or not self.softmaxes[0].whole


Note = Scores | Derived | Probabilities


class ScoreTracker:
    """Notes on live tensors, and the way to commit a layer.

    Parameters
    ----------
    emit : callable
        Takes a function of the layer's name that builds the layer; with `instead_of`, layers whose place it takes.
    num_heads : int or None
        Heads folded in the leading dimension of 3-D scores.
    """

    def __init__(self, emit: Callable[..., CapturedLayer | None], num_heads: int | None) -> None:
        self.emit = emit
        self.num_heads = num_heads
        # The capturing mode, and what makes a backward pass one for relevance while rules are woven into the forward pass.
        self.mode: Any = None
        self.relevance_pass: Any = None
        # The path of the module that runs; None if it is none of the model's.
        self.running: Callable[[], str | None] = lambda: None
        self.notes: dict[int, tuple[weakref.ref[Tensor], int, Note]] = {}
        self._waiting: list[tuple[str, Softmax]] = []

    def clear(self) -> None:
        self.notes.clear()

    def find(self, tensor: object) -> Note | None:
        """The note on a tensor. Scores that were written to by a function without a handler are merely derived."""
        entry = self.notes.get(id(tensor))
        if entry is None:
            return None
        reference, version, note = entry
        if reference() is not tensor:
            return None
        if isinstance(note, Scores):
            unchanged = version == version_of(tensor) and note.query.intact() and note.key.intact()
            return note if unchanged else Derived()
        return note

    def note(self, tensor: Any, note: Note) -> None:
        if not isinstance(tensor, Tensor):
            return
        key, notes = id(tensor), self.notes

        def remove(_: weakref.ref[Tensor]) -> None:
            # Runs before the id can be given to another object.
            notes.pop(key, None)

        notes[key] = (weakref.ref(tensor, remove), version_of(tensor), note)

    def forget(self, tensor: object) -> None:
        self.notes.pop(id(tensor), None)

    def forget_aliases(self, written: Tensor) -> None:
        """Scores in other tensors of the same storage no longer hold: without a version they would not know."""
        storage = written.untyped_storage().data_ptr()
        for reference, _, note in list(self.notes.values()):
            tensor = reference()
            if tensor is None or tensor is written or not isinstance(note, Scores):
                continue
            if tensor.untyped_storage().data_ptr() == storage:
                self.note(tensor, Derived())

    def hand_on(self, out: Any, note: Note, place: Place | None, *, unchanged: Tensor | None = None) -> None:
        """Note what was made of a tensor with a note.

        `unchanged` is that tensor, if its probabilities were only moved, converted or dropped out: it then stands for them.
        """
        if not isinstance(note, Probabilities):
            self.note(out, Derived(place))
        elif unchanged is not None:
            source = note.source
            if source is None and note.waits and note.place is not None:
                source = self.source(unchanged, note.place)
            self.note(out, replace(note, place=place, source=source))
        elif place is not None:
            self.note(out, replace(note, place=place, changed=True, source=None))
        else:
            self.forget(out)

    def source(self, tensor: Tensor, place: Place) -> Source:
        return Source(keep(tensor), self.tap(tensor), place)

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
        self.note(probabilities, Probabilities((Softmax(True, layer, whole=True),)))

    def await_value(self, probabilities: Tensor, place: Place, of_scores: bool) -> None:
        """Note the result of a softmax that is attention if it meets a value."""
        softmax = Softmax(of_scores)
        self.note(probabilities, Probabilities((softmax,), place))
        name = self.running() if of_scores else None
        if name is not None:
            self._waiting.append((name, softmax))

    def meet_value(self, note: Probabilities, tensor: Tensor) -> None:
        """Probabilities are multiplied with a value: the record gets what multiplies it."""
        softmaxes = note.softmaxes
        if note.changed:
            # Of what met a value as a whole, a part or a mixture is another use; the record has it already.
            if not all(softmax.whole and softmax.met for softmax in softmaxes):
                fresh = [softmax for softmax in softmaxes if softmax.layer is not None and not softmax.met]
                self._commit(note, tensor, [softmax.layer for softmax in fresh])
                for softmax in fresh:
                    softmax.layer, softmax.whole = None, False
        elif not softmaxes[0].whole:
            self._commit(note, tensor, [])
            softmaxes[0].whole = True
        for softmax in softmaxes:
            softmax.met = True

    def _commit(self, note: Probabilities, tensor: Tensor, instead_of: list[CapturedLayer | None]) -> None:
        source = note.source
        if note.place is not None and (source is None or not source.kept.intact()):
            source = self.source(tensor, note.place)
        if source is None:
            return
        kept, place = source.kept, source.place
        options = {"instead_of": instead_of} if instead_of else {}
        layer = self.emit(lambda name: ProbabilityLayer(name, kept, self.num_heads, place), **options)
        if layer is not None:
            layer.tap = source.tap

    def take_missing(self) -> list[str]:
        """The modules of attention softmaxes that met no value; they are asked for once."""
        missing = [name for name, softmax in self._waiting if not softmax.met]
        self._waiting.clear()
        return missing

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


def version_of(tensor: Any) -> int:
    return -1 if tensor.is_inference() else tensor._version


def same_sizes(place: Place | None, first: torch.Size, second: torch.Size) -> bool:
    """Whether the dimensions of queries and keys are of the same sizes in both shapes."""
    if place is None or -min(place) > min(len(first), len(second)):
        return False
    return all(first[dim] == second[dim] for dim in place)
