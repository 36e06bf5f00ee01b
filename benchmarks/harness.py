"""Times peers side by side in one process, alternating, and writes the table that is kept under results/.

Alternating matters: clocks and caches drift, and peers timed one after the other would be compared across that drift.
A figure is the median of the rounds. Roofline columns divide the bytes or floating-point operations that the method must
at least move or do by what this machine reaches in the same run.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(peers: dict[str, Callable[[], object]], rounds: int = 9, seconds: float = 12.0) -> dict[str, float]:
    """Median seconds a call of each peer; fewer rounds once ``seconds`` are spent, never below three."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for call in peers.values():
        call()
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, call in peers.items():
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass
class Table:
    """Rows of one results file; printed at the end of the run and written on request."""

    family: str
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, **cells: str) -> None:
        self.rows.append(cells)

    def markdown(self) -> str:
        blocks = []
        for case in dict.fromkeys(row["case"] for row in self.rows):
            rows = [{k: v for k, v in row.items() if k != "case"} for row in self.rows if row["case"] == case]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines = [f"### {case}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(row.get(c, "") for c in columns) + " |" for row in rows]
            blocks.append("\n".join(lines))
        return f"# {self.family}\n\n{machine()}\n\n" + "\n\n".join(blocks) + "\n"

    def write(self) -> Path:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.family}-{device_slug()}.md"
        path.write_text(self.markdown())
        return path


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_slug() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{cpu_name()}"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def machine() -> str:
    import xai_fast

    facts = xai_fast.show_config(mode="dict")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return (
        f"{datetime.date.today()}, commit {commit}, {cpu_name()} ({facts['CPU capability']}), "
        f"{torch.get_num_threads()} threads, CUDA device: {facts['CUDA device']}, torch {torch.__version__}. "
        "Medians of alternating runs in one process."
    )
