"""Shared fixtures: the ways an op can run, and tensors that are hard on kernels."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.emulator.build import sanitized
from tests.implementations import Implementation, available

# Under sanitizers, cases of one test on one set of kernels: they are ten times slower, and other numbers seldom take other
# ways through memory.
MOST_SANITIZED = 4


def pytest_configure() -> None:
    """Workers that run side by side share the cores; the tests of thread invariance set their own numbers."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["allow_tf32", "fp32_precision"])
def tf32_allowed(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Call it to let float32 products use TF32, by torch's older or newer switch, until the test ends."""
    switches = torch.backends.cuda.matmul
    before = switches.fp32_precision
    yield lambda: setattr(switches, request.param, True if request.param == "allow_tf32" else "tf32")
    switches.fp32_precision = before


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``implementation`` runs on every kernel set: CPU bodies, emulated CUDA, and CUDA where present."""
    if "implementation" in metafunc.fixturenames:
        found = available()
        metafunc.parametrize("implementation", found, ids=[i.name for i in found])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under sanitizers, every test runs on every kernel set, but with evenly spread cases alone."""
    if not sanitized():
        return
    groups: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        case = getattr(item, "callspec", None)
        kernels = case.params.get("implementation") if case else None
        groups[item.nodeid.split("[")[0], getattr(kernels, "name", "")].append(item)
    kept = {id(item) for group in groups.values() for item in _spread(group)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _spread(group: list[pytest.Item]) -> list[pytest.Item]:
    """At most MOST_SANITIZED of a group, the first and the last among them."""
    if len(group) <= MOST_SANITIZED:
        return group
    return [group[round(k * (len(group) - 1) / (MOST_SANITIZED - 1))] for k in range(MOST_SANITIZED)]


__all__ = ["Implementation"]
