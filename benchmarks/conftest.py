"""Two threads for every peer, one results table a family, the peers outside site-packages made importable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Table

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=2, help="torch threads of every peer")
    parser.addoption("--write-results", action="store_true", help="write the table under benchmarks/results/")


@pytest.fixture(autouse=True, scope="session")
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    result = Table(Path(request.module.__file__).stem.removeprefix("test_"))
    yield result
    sys.stdout.write("\n" + result.markdown())
    if request.config.getoption("--write-results"):
        sys.stdout.write(f"written to {result.write()}\n")
