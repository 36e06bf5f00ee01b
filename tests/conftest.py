"""Shared fixtures: the ways an op can run, and tensors that are hard on kernels."""

from __future__ import annotations

import pytest
import torch

from tests.implementations import Implementation, available


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``implementation`` runs on every kernel set: CPU bodies, emulated CUDA, and CUDA where present."""
    if "implementation" in metafunc.fixturenames:
        found = available()
        metafunc.parametrize("implementation", found, ids=[i.name for i in found])


__all__ = ["Implementation"]
