"""Rows sharded over two and three gloo processes, against one process with all rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.influence.distributed_worker import (
    LIMIT,
    SHARDS,
    SOLVERS,
    TESTS,
    K,
    N,
    data,
    found,
    points,
    tied,
    trained,
)
from tests.influence.problems import random_head
from xai_fast.influence import Influence
from xai_fast.influence.distributed import DistributedInfluence

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
ROOT = Path(__file__).parents[2]
# Different solvers are right to different tolerances.
CLOSE = {"cg": 1e-4, "exact": 1e-9, "auto": 1e-9, "lissa": 1e-8, "lanczos": 1e-8}


def run(size: int, folder: Path) -> list[dict[Any, Any]]:
    """The results of every rank; all processes are gone when this returns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.influence.distributed_worker"]
    logs = [folder / f"{rank}.log" for rank in range(size)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as file:
            arguments = [*command, str(rank), str(size), str(folder)]
            processes.append(subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=file, stderr=file))
    end = time.monotonic() + LIMIT
    try:
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module", params=sorted(SHARDS))
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    def make(*, weighted: bool = False, is_tied: bool = False, **options: Any) -> Influence:
        X, y, s = data()
        if is_tied:
            return Influence(*tied(), **options)
        return Influence(trained(weighted), X, y, sample_weight=s if weighted else None, **options)

    return found(make, lambda _, scores: scores)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_as_in_one_process(ranks: list[dict[Any, Any]], alone: dict[Any, Any], solver: str) -> None:
    tolerance = {"rtol": CLOSE[solver], "atol": CLOSE[solver]}
    for here in ranks:
        assert here[solver, "solver"] == alone[solver, "solver"]
        assert here[solver, "passes"] == pytest.approx(alone[solver, "passes"], abs=3)
        for what in ("inverse_hvp", "scores", "self_influence"):
            torch.testing.assert_close(here[solver, what], alone[solver, what], **tolerance)
        assert here[solver, "residual"].shape == alone[solver, "residual"].shape
        if solver != "lanczos":
            assert here[solver, "residual"].max() <= SOLVERS[solver].get("tolerance", 1e-5)
        for what in ("helpful", "harmful", "per_class"):
            torch.testing.assert_close(here[solver, what][0], alone[solver, what][0], equal_nan=True, **tolerance)
            assert here[solver, what][1].equal(alone[solver, what][1])


def test_all_ranks_have_the_same_bits(ranks: list[dict[Any, Any]]) -> None:
    for here in ranks[1:]:
        for name, value in here.items():
            if name in ("rows", "errors") or not isinstance(value, torch.Tensor | tuple):
                continue
            first = ranks[0][name]
            for a, b in zip(first, value, strict=True) if isinstance(value, tuple) else [(first, value)]:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_leave_one_out_and_weights(ranks: list[dict[Any, Any]], alone: dict[Any, Any]) -> None:
    for here in ranks:
        for name in [name for name in alone if name[0] == "loo" or name == "weighted"]:
            torch.testing.assert_close(here[name], alone[name], rtol=1e-8, atol=1e-10)
    assert alone["weighted"].shape == (TESTS, N)


def test_ties_go_to_the_earlier_row_of_all(ranks: list[dict[Any, Any]], alone: dict[Any, Any]) -> None:
    assert len(alone["tied"][0].unique()) == 2
    for here in ranks:
        assert here["tied"][1].equal(alone["tied"][1])
        assert here["tied"][0].shape == (1, 25)
        assert here["cg", "helpful"][1].shape == (TESTS, K)


def test_rows_and_local_columns(ranks: list[dict[Any, Any]]) -> None:
    counts = SHARDS[len(ranks)]
    assert [len(here["rows"]) for here in ranks] == counts
    assert [row for here in ranks for row in here["rows"]] == list(range(N))
    assert all(here["local"] for here in ranks)
    assert {here["convention"].n for here in ranks} == {N}


MESSAGES = {
    "head": "^head: expected the same on all ranks, got '.*' on rank 0 and '.*' on rank 1$",
    "option": "^seed: expected the same on all ranks, got the default on rank 0 and 3 on rank 1$",
    "dtype": "^dtype: expected the same on all ranks, got 'torch.float64' on rank 0 and 'torch.float32' on rank 1$",
    "weights": "^sample_weight: expected the same on all ranks, got 'none' on rank 0 and 'given' on rank 1$",
    "broken row": "^(rank 1: )?X_train: expected finite numbers, got NaN or infinity in row {first}$",
    "bad label": "^(rank 1: )?y_train: expected one of 0, 1, 2, got",
    "no rows": r"^(rank 1: )?X_local: expected at least one row on every rank, got shape \(0, 4\)$",
    "solver": "^solver: expected one of auto, exact",
    "test points": "^X_test: expected the same on all ranks, got",
    "bad test point": "^(rank 1: )?X_test: expected finite numbers",
    "singular": "^damping: expected enough for a positive definite Hessian",
    "singular factor": "^damping: expected enough for a positive definite Hessian",
    "columns": r"^(rank 1: )?scores: expected \d+ columns, the rows of this rank, got \(2, 1000\)$",
    "store": "^influence: expected an Influence or TorchInfluence, got DistributedInfluence$",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_one_rank_in_error_is_an_error_on_all(ranks: list[dict[Any, Any]], what: str) -> None:
    first = SHARDS[len(ranks)][0]
    for rank, here in enumerate(ranks):
        message = here["errors"][what]
        with pytest.raises(ValueError, match=MESSAGES[what].replace("{first}", str(first))):
            raise ValueError(message)
        assert message.startswith("rank 1: ") == ("rank 1: " in MESSAGES[what] and rank != 1)


def test_in_step_after_errors(ranks: list[dict[Any, Any]], alone: dict[Any, Any]) -> None:
    for here in ranks:
        torch.testing.assert_close(here["after"], alone["auto", "scores"], rtol=1e-9, atol=1e-9)


def test_needs_a_process_group() -> None:
    X, y = points()
    with pytest.raises(ValueError, match=r"^group: expected an initialised process group .*, got none$"):
        DistributedInfluence(random_head("softmax", X.shape[1]), X, y)


def test_rows_on_the_cpu_under_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = points()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
        with pytest.raises(ValueError, match=r"^X_local: expected a tensor on the GPU of this rank under nccl"):
            DistributedInfluence(random_head("softmax", X.shape[1]), X, y)
    finally:
        dist.destroy_process_group()
