"""The same small model each time that it is trained, and no threads that wait for each other on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xai_fast._seeding import seeded

__all__ = ["one_thread", "repeatable"]


@contextmanager
def one_thread() -> Iterator[None]:
    """For operations too small to share: on a busy machine, waiting threads cost ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """One thread and seeded generators; afterwards both are as they were."""
    with seeded(seed), one_thread():
        yield
