"""Shared fixtures: the ways an op can run, and tensors that are hard on kernels."""

from __future__ import annotations

import os

import pytest
import torch

from tests.implementations import Implementation, available


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``implementation`` runs on every kernel set: CPU bodies, emulated CUDA, and CUDA where present."""
    if "implementation" in metafunc.fixturenames:
        found = available()
        metafunc.parametrize("implementation", found, ids=[i.name for i in found])


__all__ = ["Implementation"]
