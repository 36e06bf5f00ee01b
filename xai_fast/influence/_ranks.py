"""The processes that share a problem: collectives that end the same way on every rank, or raise on every rank."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """A process group of torch.distributed.

    Parameters
    ----------
    group : ProcessGroup, optional
        The default group if None.

    Attributes
    ----------
    rank, size : int
        Within the group.
    leads : bool
        Whether this rank is the first.

    Raises
    ------
    ValueError
        torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: expected an initialised process group (init_process_group, torchrun), got none")
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: expected one that this process belongs to, got another")
        self.leads = self.rank == 0

    def check_reaches(self, x: Any, name: str) -> None:
        """ValueError for rows on the CPU that the group cannot exchange."""
        if dist.get_backend(self._group) == "nccl" and not (isinstance(x, Tensor) and x.is_cuda):
            wanted = "a tensor on the GPU of this rank under nccl (init_process_group() without a backend takes both)"
            raise ValueError(f"{name}: expected {wanted}, got rows on the CPU")

    def reduce(self, x: Tensor, operation: str) -> Tensor:
        """The sum or the largest of x over all ranks; x may be written to."""
        x = x.contiguous()
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation], self._group)
        return x

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values

    def gather_columns(self, x: Tensor) -> Tensor:
        """The tensors of all ranks side by side along the last dimension, where they may differ in length."""
        counts = self.gather(x.shape[-1])
        padded = torch.nn.functional.pad(x, (0, max(counts) - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, self._group)
        return torch.cat([part[..., :count] for part, count in zip(parts, counts, strict=True)], -1)

    def broadcast(self, value: Any, device: torch.device | None = None) -> Any:
        """The value of the first rank, on every rank; its tensors on `device`."""
        content = [None]
        if self.leads:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            content = [buffer.getvalue()]  # type: ignore[list-item]
        dist.broadcast_object_list(content, group=self._group, group_src=0)
        if self.leads:
            return value
        return torch.load(io.BytesIO(content[0]), map_location=device, weights_only=False)  # type: ignore[arg-type]

    def agree(self, function: Callable[[], T]) -> T:
        """function() of this rank; raises on all ranks if it raises on one, so that none waits for another in vain.

        The function may contain collectives if it can raise only after them, or on all ranks.
        """
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = caught
        messages = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"rank {rank}: {message}")
        return value  # type: ignore[return-value]

    def check_same(self, **values: Any) -> None:
        """ValueError on all ranks that names the first value that is not the same on all."""
        everywhere = self.gather({name: repr(value) for name, value in values.items()})
        for rank, here in enumerate(everywhere):
            for name in {**everywhere[0], **here}:
                first, found = everywhere[0].get(name, "the default"), here.get(name, "the default")
                if found != first:
                    raise ValueError(
                        f"{name}: expected the same on all ranks, got {first} on rank 0 and {found} on rank {rank}"
                    )
