"""Which solver for which problem."""

from __future__ import annotations

import os

import torch

from ..problems import Problem

__all__ = ["choose", "free_memory"]

# Iterations that CG is taken to need for each group of right-hand sides.
ITERATIONS, GROUP = 100, 32
# The factor of so few parameters takes less than a second.
SMALL = 2048


def choose(problem: Problem, right_hand_sides: int) -> tuple[str, str]:
    """The solver that "auto" picks, and why.

    Exact if H and its factor take at most half of the free memory, and assembling and factoring cost no more operations than
    CG with 100 iterations for each 32 right-hand sides; or if there are at most 2048 parameters. Else CG.
    """
    size = problem.size
    needed, free = 2 * 8 * size**2, free_memory(problem.device)
    matrix = f"{size} x {size} Hessian"
    if needed > free / 2:
        return "cg", f"auto: cg, the {matrix} and its factor would take {_gb(needed)} of {_gb(free)} free memory"
    one_pass = 4 * problem.rows * size * min(right_hand_sides, GROUP)
    exact = problem.dense_passes() * one_pass + size**3 / 3
    cg = ITERATIONS * -(-right_hand_sides // GROUP) * one_pass
    if size <= SMALL or exact <= cg:
        return "exact", f"auto: exact, the {matrix} and its factor take {_gb(needed)} of {_gb(free)} free memory"
    return "cg", f"auto: cg, about {exact / cg:.1f} times cheaper than factoring the {matrix} for {right_hand_sides} vectors"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2g} GB"


def free_memory(device: torch.device) -> float:
    """Bytes, of the device or of this machine."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, in torch's hands
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not known on this system
        return 4e9
