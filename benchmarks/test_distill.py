"""Students of one teacher, ours and boosted ones of interpret, with the same pairs: time, and fidelity on the same rows.

Run: make bench, or pytest benchmarks/test_distill.py -s [--write-results] [--threads N] [-k 200000]. A boosted student of
200,000 rows takes ten minutes and more, and interpret's default is 14 of them: a single one is fitted, and stopped at LIMIT
times our time. Where XAI_FAST_BENCH_LONG is set it runs to its end.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import xai_fast.distill
from benchmarks.harness import Table
from benchmarks.peers import distill_libraries as libraries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONG = bool(os.environ.get("XAI_FAST_BENCH_LONG"))
FEATURES, PAIRS, TEST_ROWS = 30, 20, 20_000
LIMIT = 6
Peers = dict[str, tuple[Callable[[], Any], int]]


def rows(n: int) -> Tensor:
    """Correlated features, a third of them skewed."""
    shared = torch.randn(n, 1)
    X = 0.8 * torch.randn(n, FEATURES) + 0.6 * shared
    X[:, ::3] = X[:, ::3].exp()
    return X


def pairs_of(count: int) -> list[tuple[int, int]]:
    return [(i, (i + 1 + 7 * (i // 10)) % FEATURES) for i in range(count)]


def teacher(X: Tensor) -> Tensor:
    """Main effects, pairs, and a little of three features that no student here can say."""
    x = X.double()
    y = sum(torch.sin(1.5 * x[:, i] + i) for i in range(FEATURES))
    y = y + sum(1.5 * torch.tanh(x[:, i] * x[:, j]) for i, j in pairs_of(PAIRS))
    return y + 0.5 * torch.tanh(x[:, 1] * x[:, 2] * x[:, 4])


def seconds(call: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median time of a call, and what the last one gave. Long fits are timed once."""
    times, result = [], None
    for _ in range(rounds):
        begin = time.perf_counter()
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), result


@pytest.mark.parametrize("n", [20_000, 200_000])
def test_given_pairs(table: Table, n: int) -> None:
    torch.manual_seed(0)
    X, fresh = rows(n), rows(TEST_ROWS)
    y, wanted = teacher(X), teacher(fresh)
    pairs = sorted(tuple(sorted(p)) for p in pairs_of(PAIRS))
    there, y_there = X.to(DEVICE), y.to(DEVICE)
    arrays = X.numpy(), y.numpy()
    jobs = torch.get_num_threads()
    ours: tuple[float, float] | None = None

    def limit() -> float | None:
        return None if LONG or n <= 20_000 or ours is None else LIMIT * ours[0]

    peers: Peers = {
        "xai_fast.fit_gam": (lambda: xai_fast.distill.fit_gam(y_there, there, interactions=pairs), 3),
        "xai_fast.fit_gam, bins=64": (lambda: xai_fast.distill.fit_gam(y_there, there, interactions=pairs, bins=64), 3),
        "xai_fast.fit_gam, smoothing given": (
            lambda: xai_fast.distill.fit_gam(y_there, there, interactions=pairs, smoothing=1e-3),
            3,
        ),
        "xai_fast.fit_gam, pairs screened": (lambda: xai_fast.distill.fit_gam(y_there, there, interactions=PAIRS), 1),
        "interpret EBM, outer_bags=1": (lambda: libraries.ebm(*arrays, pairs, jobs, limit(), outer_bags=1), 1),
    }
    for name, (call, rounds) in peers.items():
        took, student = seconds(call, rounds)
        is_ours = isinstance(student, xai_fast.distill.GAM)
        found = student.predict(fresh.to(DEVICE)).cpu() if is_ours else torch.from_numpy(student.predict(fresh.numpy()))
        r2 = 1 - float(((found - wanted) ** 2).mean() / wanted.var(correction=0))
        ours = ours or (took, r2)
        facts = {"finished": "yes" if is_ours or limit() is None or took < limit() else "no, stopped"}
        if is_ours:
            facts["residual"] = f"{max(float(s.residual.max()) for s in student.solutions):.0e}"
            facts["pairs found"] = f"{len({t.features for t in student.terms} & set(pairs))} of {PAIRS}"
        table.add(
            case=f"{n} x {FEATURES} rows, {PAIRS} pairs, one output",
            method=name,
            s=f"{took:.1f}",
            **{"relative to ours": f"{took / ours[0]:.2f}", "1 - R2 on fresh rows": f"{1 - r2:.2e}", **facts},
        )
    assert ours is not None
    assert ours[1] > 0.95


def test_several_classes(table: Table) -> None:
    """Five logits are solved for together."""
    n = 20_000
    torch.manual_seed(0)
    X = rows(n).to(DEVICE)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5)).to(DEVICE)
    for classes in (1, 5):
        took, student = seconds(lambda c=classes: xai_fast.distill.fit_gam(model(X)[:, :c], X, interactions=PAIRS), 1)
        assert student.predict(X[:3]).reshape(3, -1).shape[1] == classes
        assert max(float(found.residual.max()) for found in student.solutions) < 1e-6
        table.add(
            case=f"{n} x {FEATURES} rows, {PAIRS} pairs screened, a network of {FEATURES}-64-5",
            method=f"xai_fast.fit_gam, outputs: {classes}",
            s=f"{took:.1f}",
            **{"R2": f"{student.fidelity().r2:.4f}"},
        )
