"""The model under test: run on many changed copies of its inputs, in chunks that a memory budget bounds, and read out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._copies import unshared
from .._dtypes import accumulate_dtype
from .._optional import optional_import
from ..ops import _checks as check

__all__ = [
    "DEFAULT_BUDGET",
    "OUTPUTS",
    "Forwards",
    "Readout",
    "agreement",
    "check_classes",
    "check_whole",
    "class_scores",
    "draw_seed",
    "predicted_classes",
    "target_classes",
]

# Bytes of changed inputs that exist at once. The activations of the model are its own; `batch_size` bounds them.
DEFAULT_BUDGET = 256 << 20
# Copies of a changed input that exist together: itself, and what a model's first operation makes of it.
COPIES = 2
# On a CPU more examples at once are slower: activations leave the caches. Bytes of inputs that run together, and the
# fewest examples. Batches that are no power of two are slower as well.
CPU_BYTES, CPU_LEAST = 1 << 19, 4
# On a GPU more examples at once are no faster, and their activations no longer fit: token ids are small inputs.
GPU_MOST = 1024

OUTPUTS = ("auto", "logits", "probabilities", "raw")
# Rows of probabilities add up to 1 within the rounding of bfloat16.
SUM_TOLERANCE = 1e-2


@dataclass
class Forwards:
    """Calls ``forward(x, *additional_forward_args)`` without gradients and counts the examples that went through."""

    forward: Callable[..., Any]
    inputs: Tensor
    additional_forward_args: tuple[Any, ...] = ()
    batch_size: int | None = None
    memory_budget: int = DEFAULT_BUDGET
    progress: str | None = None
    evaluations: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not callable(self.forward):
            raise TypeError(f"forward: expected a callable, got {type(self.forward).__name__}")
        check.check_tensor(self.inputs, "inputs")
        if self.inputs.dim() < 2 or 0 in self.inputs.shape:
            raise ValueError(f"inputs: expected shape (B, ...) with samples and entries, got {check.shape_of(self.inputs)}")
        self.inputs = self.inputs.detach()
        if not isinstance(self.additional_forward_args, tuple):
            extra = self.additional_forward_args
            self.additional_forward_args = () if extra is None else (extra,)
        if self.batch_size is not None:
            self.batch_size = check.check_count(self.batch_size, "batch_size")
        self.memory_budget = check.check_count(self.memory_budget, "memory_budget")

    @property
    def chunk(self) -> int:
        """Examples that run together."""
        if self.batch_size is not None:
            return self.batch_size
        size = self.inputs[0].numel() * self.inputs.element_size()
        most = max(1, self.memory_budget // (COPIES * size))
        if self.inputs.is_cuda:
            return min(most, GPU_MOST)
        return min(most, 1 << (max(CPU_LEAST, CPU_BYTES // size).bit_length() - 1))

    def chunks(self, total: int) -> Iterator[slice]:
        """0 .. total in pieces of equal size but for the last, with a progress bar where one is wanted."""
        starts: Any = range(0, total, self.chunk)
        if self.progress:
            starts = optional_import("tqdm", "demo").tqdm(starts, desc=self.progress, unit="batch", leave=False)
        for start in starts:
            yield slice(start, min(start + self.chunk, total))

    def __call__(self, x: Tensor, sample: Tensor) -> Tensor:
        """Class scores (E, C), or values (E,), of examples x made of those samples; the model may overwrite x."""
        batch = self.inputs.shape[0]
        extra = [
            a[sample] if isinstance(a, Tensor) and a.dim() and a.shape[0] == batch else unshared(a)
            for a in self.additional_forward_args
        ]
        with torch.no_grad():
            outputs = class_scores(self.forward(x, *extra)).to(x.device)  # the model may live elsewhere
        if outputs.dim() not in (1, 2) or outputs.shape[0] != x.shape[0] or 0 in outputs.shape[1:]:
            raise ValueError(
                f"forward: expected outputs of shape ({x.shape[0]}, C) or ({x.shape[0]},), got {check.shape_of(outputs)}"
            )
        self.evaluations += x.shape[0]
        return outputs

    def on_inputs(self) -> Tensor:
        """The outputs on the inputs as they are."""
        everything = torch.arange(self.inputs.shape[0], device=self.inputs.device)
        parts = self.chunks(len(everything))
        # The outputs are copied as well: a model may return the same buffer for every chunk.
        return torch.cat([self(unshared(self.inputs[part]), everything[part]).clone() for part in parts])


def class_scores(outputs: Any) -> Tensor:
    """The tensor of class scores in what a model returns: itself, its `logits`, or the first of a tuple."""
    outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"forward: expected it to return a floating tensor, got {kind}")
    return outputs.to(accumulate_dtype(outputs.dtype))


def predicted_classes(outputs: Tensor) -> Tensor:
    """(E,) the class of the largest score of each row, -1 where a score is NaN."""
    best, place = outputs.max(1)  # NaN is larger than all
    return place.masked_fill(best.isnan(), -1)


def agreement(predicted: Tensor, truth: Tensor) -> Tensor:
    """Whether two classes are the same: 1 or 0, in float64; NaN where `predicted` is no class, but -1 or NaN."""
    return (predicted == truth).double().masked_fill(~(predicted >= 0), math.nan)


def target_classes(target: Any, outputs: Tensor, name: str = "target") -> Tensor:
    """(B,) class numbers: those given, one for all, or the predicted ones."""
    batch = outputs.shape[0]
    if outputs.dim() == 1:
        if target is not None:
            raise ValueError(f"{name}: expected None for a model with one output a sample, got {target!r}")
        return outputs.new_zeros(batch, dtype=torch.int64)
    if target is None:
        return outputs.argmax(1)
    target = check.as_number(target)
    if isinstance(target, int) and not isinstance(target, bool):
        target = torch.full((batch,), target)
    target = check.as_tensor(target, name)
    check_whole(target, name)
    if target.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), got {check.shape_of(target)}")
    target = target.to(device=outputs.device, dtype=torch.int64)
    check_classes(target, name, outputs.shape[1])
    return target


def check_whole(classes: Tensor, name: str) -> None:
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"{name}: expected whole class numbers, got {classes.dtype}")


def check_classes(classes: Tensor, name: str, count: int | None = None) -> None:
    """From 0 on, or from 0 to count - 1."""
    if not classes.numel():
        return
    low, high = (int(v) for v in classes.aminmax())
    if low < 0 or (count is not None and high >= count):
        wanted = "of at least 0" if count is None else f"from 0 to {count - 1}"
        raise ValueError(f"{name}: expected classes {wanted}, got {low} to {high}")


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for the kernels' own generator, drawn from a torch generator (torch's global one by default)."""
    check.check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


@dataclass(frozen=True)
class Readout:
    """Reads one number an example: the score or the probability of the target class of its sample."""

    target: Tensor  # (B,)
    softmax: bool

    @classmethod
    def of(cls, outputs: Tensor, target: Tensor, kind: str) -> Readout:
        """`outputs` are those of the unchanged inputs; under "auto" all of their rows tell whether they are probabilities.

        Row by row would not do: a row of logits that happens to add up to 1 would be read otherwise than its neighbours.
        """
        if kind not in OUTPUTS:
            raise ValueError(f"outputs: expected one of {', '.join(OUTPUTS)}, got {kind!r}")
        softmax = kind == "logits" or (kind == "auto" and not _are_probabilities(outputs))
        return cls(target, softmax and outputs.dim() == 2 and outputs.shape[1] > 1)

    def __call__(self, outputs: Tensor, sample: Tensor) -> Tensor:
        if outputs.dim() == 1:
            return outputs.clone()  # the model's own buffer, which its next call may overwrite
        return self.probabilities(outputs).gather(1, self.target[sample][:, None])[:, 0]

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1) if self.softmax else outputs


def _are_probabilities(outputs: Tensor) -> bool:
    if outputs.dim() != 2:
        return True
    # A row with a NaN tells nothing.
    like = (outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() <= SUM_TOLERANCE) | outputs.isnan().any(1)
    return bool(like.all())
