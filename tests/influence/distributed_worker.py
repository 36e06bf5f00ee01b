"""One process of test_distributed.py: runs every scenario on its rows and writes down what it found."""

from __future__ import annotations

import faulthandler
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.influence.problems import labelled, random_head
from xai_fast.influence import Head, Influence, LinearHead
from xai_fast.influence._penalty import Penalty
from xai_fast.influence.distributed import DistributedInfluence
from xai_fast.influence.store import write_scores

N, D, TESTS, K = 40, 4, 3, 6
# Rows of each rank: uneven, and with three ranks one with a single row.
SHARDS = {2: [27, 13], 3: [1, 24, 15]}
LIMIT = 60.0

# (solver, options): every solver, and how near the answers of different ways to sum must be.
SOLVERS: dict[str, dict[str, Any]] = {
    "cg": {"solver": "cg"},
    "exact": {"solver": "exact"},
    "auto": {"solver": "auto"},
    "lissa": {"solver": "lissa", "batch_size": 16, "tolerance": 1e-3},
    "lanczos": {"solver": "lanczos"},
}
Make = Callable[..., Influence]


def data(family: str = "softmax") -> tuple[Tensor, Tensor, Tensor]:
    """All training rows, labels and weights, in float64."""
    generator = torch.Generator().manual_seed(7)
    X = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return X, labelled(family, N), torch.rand(N, generator=generator, dtype=torch.float64)


def points(family: str = "softmax") -> tuple[Tensor, Tensor]:
    X = torch.randn(TESTS, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return X, labelled(family, TESTS, seed=9)


def vectors(influence: Influence) -> Tensor:
    shape = (5, *influence.head.parameters.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(10), dtype=torch.float64)


def found(make: Make, columns: Callable[[Influence, Tensor], Tensor]) -> dict[Any, Any]:
    """What all methods say. `make` builds the influence of a process; `columns` takes scores to those of all rows."""
    results: dict[Any, Any] = {}
    for name, options in SOLVERS.items():
        influence = make(damping=0.05, **options)
        solution = influence.inverse_hvp(vectors(influence))
        results[name, "inverse_hvp"] = solution.x
        results[name, "solver"] = solution.solver
        results[name, "residual"] = solution.residual
        results[name, "passes"] = solution.passes
        results[name, "scores"] = columns(influence, influence.scores(*points()))
        for which in ("helpful", "harmful"):
            results[name, which] = tuple(influence.top_k(*points(), K, which=which))
        results[name, "per_class"] = tuple(influence.top_k(*points(), 12, per_class=True))
        results[name, "self_influence"] = columns(influence, influence.self_influence())
    for gradient in ("loss", "objective"):
        for leverage in (True, False):
            influence = make(damping=0.05, train_gradient=gradient)
            results["loo", gradient, leverage] = columns(influence, influence.loo(*points(), leverage=leverage))
    weighted = make(damping=0.05, weighted=True)
    results["weighted"] = columns(weighted, weighted.scores(*points(), of="margin"))
    results["tied"] = tuple(make(is_tied=True).top_k(torch.ones(1, 2, dtype=torch.float64), torch.zeros(1), 25))
    return results


def tied() -> tuple[LinearHead, Tensor, Tensor]:
    """Two kinds of rows: nearly all scores are equal."""
    y = torch.ones(N, dtype=torch.float64)
    y[::3] = -1.0
    return LinearHead([0.5, 0.5], l2=0.5), torch.ones(N, 2, dtype=torch.float64), y


def trained(weighted: bool) -> Head:
    """With weights, one whose l2 depends on the mean weight of all rows."""
    head = random_head("softmax", D)
    if weighted:
        head.penalty = Penalty(0.2, "average")
    return head


def errors(at: slice, rank: int, folder: Path) -> dict[str, str]:
    """What each rank raises where one of them, the last or the first, is told something else."""
    (X, y, s), (X_test, y_test) = data(), points()
    X, y, s = X[at], y[at], s[at]
    head, other = random_head("softmax", D), random_head("softmax", D, seed=6)
    is_odd = rank == 1
    broken = X.clone()
    broken[0, 0] = torch.nan
    fine = DistributedInfluence(head, X, y, damping=0.1)
    singular = DistributedInfluence(LinearHead([1.0, 1.0]), torch.ones(len(X), 2), torch.ones(len(X)), solver="exact")
    cases: dict[str, Callable[[], Any]] = {
        "head": lambda: DistributedInfluence(other if is_odd else head, X, y),
        "option": lambda: DistributedInfluence(head, X, y, **({"seed": 3} if is_odd else {})),
        "dtype": lambda: DistributedInfluence(head, X.float() if is_odd else X, y),
        "weights": lambda: DistributedInfluence(head, X, y, sample_weight=s if is_odd else None),
        "broken row": lambda: DistributedInfluence(head, broken if is_odd else X, y),
        "bad label": lambda: DistributedInfluence(head, X, y + 5 if is_odd else y),
        "no rows": lambda: DistributedInfluence(head, X[:0] if is_odd else X, y[:0] if is_odd else y),
        "solver": lambda: DistributedInfluence(head, X, y, solver="best"),
        "test points": lambda: fine.scores(X_test * 2 if is_odd else X_test, y_test),
        "bad test point": lambda: fine.top_k(X_test * torch.nan if is_odd else X_test, y_test, 2),
        "singular": lambda: singular.inverse_hvp(torch.ones(2)),
        "singular factor": lambda: singular.self_influence(),
        "columns": lambda: fine.gather(torch.zeros(2, 1000 if is_odd else len(X))),
        "store": lambda: write_scores(fine, X_test, y_test, folder / f"{rank}.npy"),
    }
    return {name: message_of(case) for name, case in cases.items()}


def message_of(case: Callable[[], Any]) -> str:
    try:
        case()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    warnings.simplefilter("ignore", RuntimeWarning)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
    counts = SHARDS[size]
    at = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

    def make(*, weighted: bool = False, is_tied: bool = False, **options: Any) -> Influence:
        X, y, s = data()
        if is_tied:
            head, X, y = tied()
            return DistributedInfluence(head, X[at], y[at], **options)
        return DistributedInfluence(trained(weighted), X[at], y[at], sample_weight=s[at] if weighted else None, **options)

    results = found(make, lambda influence, scores: influence.gather(scores))  # type: ignore[attr-defined]
    influence = make(damping=0.05)
    assert isinstance(influence, DistributedInfluence)
    local, whole = influence.scores(*points()), influence.scores(*points(), gather=True)
    results["rows"], results["convention"] = influence.rows, whole.convention
    results["local"] = bool(local.equal(whole[:, at]))
    results["errors"] = errors(at, rank, folder)
    # After all those errors the ranks are still in step.
    results["after"] = influence.gather(influence.scores(*points()))
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
