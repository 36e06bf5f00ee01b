"""Time and peak memory of a few callables, side by side in one process.

Time is the median over repeats that alternate between the callables, so that a slow moment of the machine
hits all of them. Memory is the most that the process (or the GPU's allocator) held beyond what it held before
the call:

- CUDA: ``torch.cuda.max_memory_allocated``.
- Linux: the high-water mark of resident memory, VmHWM, reset through ``/proc/self/clear_refs``. Unlike
  counting tensors it also sees what libraries allocate beside torch. Free heap memory is returned to the
  system first, and what our kernels keep; otherwise a call could live in pages that its predecessor left behind and look
  free of charge.
- Elsewhere: not measured, None. (``ru_maxrss`` cannot be reset.)
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _backend

__all__ = ["Measured", "compare", "peak_memory"]


@dataclass(frozen=True)
class Measured:
    """Median seconds of a call, and bytes at the peak beyond those held before it (None: not measured)."""

    seconds: float
    peak_bytes: int | None


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Measured]:
    """Measure callables side by side.

    Parameters
    ----------
    calls : mapping of str to callable
    repeats : int
        Timed rounds; each round calls every callable once. One untimed round comes before.
    device : torch.device
        Where they run.
    tick : callable
        Called after each call, for a progress bar; ``len(calls) * (repeats + 2)`` times in all.

    Returns
    -------
    dict of str to Measured

    Examples
    --------
    >>> compare({"sum": torch.ones(1000).sum}, repeats=3, device=torch.device("cpu"))["sum"].seconds > 0
    True
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            result = call()
            _synchronize(device)
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
            del result
            tick()
    measured = {}
    for name, call in calls.items():
        measured[name] = Measured(statistics.median(seconds[name]), peak_memory(call, device))
        tick()
    return measured


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of a call beyond those held before it; None where that cannot be measured.

    Examples
    --------
    >>> peak = peak_memory(lambda: torch.ones(2**22), torch.device("cpu"))
    >>> peak is None or peak > 2**23
    True
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if _backend.C is not None:
        _backend.C.release_workspace()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident = _memory_status("VmRSS")
        call()
        return max(0, _memory_status("VmHWM") - resident)
    except (OSError, AttributeError, TypeError):
        return None


def _memory_status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(match[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
