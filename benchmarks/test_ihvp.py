"""Inverse-Hessian-vector products and influence scores against their peers: products, LiSSA steps, passes, a million rows.

Run: make bench, or pytest benchmarks/test_ihvp.py -s [--write-results] [--threads N]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xai_fast as xf
from benchmarks.harness import Table, alternate
from benchmarks.peers import influence_chains as chains
from benchmarks.peers import influence_libraries as libraries
from xai_fast.demo.measure import peak_memory
from xai_fast.reference import ihvp as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Peers = dict[str, Callable[[], Any]]
Data = tuple[Tensor, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def probabilities(rows: int, classes: int) -> Tensor:
    return torch.randn(rows, classes, device=DEVICE).softmax(1) if classes > 1 else torch.rand(rows, 1, device=DEVICE) / 4


def add(table: Table, case: str, times: dict[str, float], base: str, **more: Callable[[float], str]) -> None:
    """One line a peer: milliseconds, and relative to `base`."""
    for name, seconds in times.items():
        extra = {column.replace("_", " "): of(seconds) for column, of in more.items()}
        cells = {"ms": f"{seconds * 1e3:.3g}", f"relative to {base}": f"{seconds / times[base]:.2f}"}
        table.add(case=case, method=name, **cells, **extra)


@pytest.mark.parametrize("classes", [1, 10])
def test_hvp(table: Table, classes: int) -> None:
    rows, dim = 200_000, 768
    X, v, weights = (
        torch.randn(rows, dim, device=DEVICE),
        torch.randn(dim, classes, device=DEVICE),
        probabilities(rows, classes),
    )
    theta, y = torch.randn(dim, classes, device=DEVICE) / dim, torch.randint(classes, (rows,), device=DEVICE)
    family = "softmax" if classes > 1 else "logistic"
    peers: Peers = {
        "read X once (X.sum())": X.sum,
        "xai_fast": lambda: xf.ops.glm_hvp(X, v, weights=weights, family=family),
        "xai_fast, weights from theta": lambda: xf.ops.glm_hvp(X, v, theta=theta, family=family),
        "torch: F.linear, Z^T X": lambda: chains.linear_hvp(X, v, weights),
        "torch: X^T (X V)": lambda: chains.naive_hvp(X, v, weights),
    }
    if classes > 1:
        peers["torch: double backward"] = lambda: chains.autograd_hvp(X, y, theta, v)
        curved = peers["xai_fast, weights from theta"]()
        torch.testing.assert_close(curved, peers["torch: double backward"](), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(peers["xai_fast"](), peers["torch: F.linear, Z^T X"](), rtol=1e-3, atol=1e-4)
    times = alternate(peers, rounds=9, seconds=40)
    rate = {"GFLOP_per_s": lambda seconds: f"{4 * rows * dim * classes / seconds / 1e9:.0f}"}
    add(table, f"glm_hvp, one right-hand side, n = {rows}, d = {dim}, C = {classes}, fp32", times, next(iter(peers)), **rate)


def test_lissa_step(table: Table) -> None:
    rows, dim, classes, batch, l2, sigma = 100_000, 768, 10, 256, 0.01, 100.0
    X, theta, g = normal(rows, dim), normal(dim, classes) / dim, normal(32, dim, classes)
    weights, y = probabilities(rows, classes), torch.randint(classes, (rows,), device=DEVICE)
    options: dict[str, Any] = {"weights": weights, "family": "softmax", "sigma": sigma, "batch_size": batch, "l2": l2}
    steps = {"xai_fast": 100, "xai_fast, 32 right-hand sides": 100, "torch, closed form": 20, "torch, double backward": 10}
    peers: Peers = {
        "xai_fast": lambda: xf.ops.lissa(X, g[0], steps=100, **options),
        "xai_fast, 32 right-hand sides": lambda: xf.ops.lissa(X, g, steps=100, **options),
        "torch, closed form": lambda: chains.eager_lissa(X, weights, g[0], sigma, l2, batch, 20),
        "torch, double backward": lambda: chains.autograd_lissa(X, y, theta, g[0], sigma, l2, batch, 10),
    }
    # The two in PyTorch draw batches of their own.
    fixed = ("softmax", False, l2, 0.0, sigma, batch, 0)
    for name, v in (("xai_fast", g[:1]), ("xai_fast, 32 right-hand sides", g)):
        wanted = reference.lissa(X, v, weights, None, v, *fixed, steps[name], 0, 0)
        for found, iterate in zip(peers[name](), wanted, strict=True):
            torch.testing.assert_close(found.reshape(v.shape), iterate / sigma, rtol=1e-3, atol=1e-4)
    assert all(peers[name]().isfinite().all() for name in steps if name.startswith("torch"))
    times = {name: seconds / steps[name] for name, seconds in alternate(peers, rounds=9, seconds=40).items()}
    add(table, f"one LiSSA step, b = {batch}, d = {dim}, C = {classes}, n = {rows}, fp32", times, "xai_fast")


def digits() -> tuple[Data, Data]:
    """1797 digits, 64 pixels in 0 .. 1; the first 20 serve as test points too."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    data = torch.from_numpy(X / 16).float(), torch.from_numpy(y)
    return data, (data[0][:20], data[1][:20])


def fitted(X: Tensor, y: Tensor, l2: float) -> Tensor:
    """The minimum of mean cross-entropy + l2 / 2 ||theta||^2, in float64."""
    theta = torch.zeros(X.shape[1], 10, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(X.double() @ theta, y) + l2 / 2 * theta.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return theta.detach()


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_passes_to_a_residual(table: Table, l2: float) -> None:
    """Reads of the data until the residual is 1e-3: what counts where reading is what costs."""
    (X, y), (X_test, y_test) = digits()
    head = xf.influence.SoftmaxHead(fitted(X, y, l2).float(), l2=l2)
    gradients = xf.influence.Influence(head, X, y)._test_gradients(X_test, y_test, "loss")
    for count in (1, 20):
        for name, options in {
            "cg": {"solver": "cg"},
            "cg without preconditioner": {"solver": "cg", "preconditioner": False},
            "lissa": {"solver": "lissa"},
            "lanczos, rank 300": {"solver": "lanczos", "rank": 300},
        }.items():
            problem = xf.influence.Influence(head, X, y).problem
            begin = time.perf_counter()
            found = _solve_quietly(problem, gradients[:count].flatten(1), tolerance=1e-3, **options)
            spent = time.perf_counter() - begin
            assert found.converged or name.startswith("lanczos")  # which is not refined
            assert float(found.residual.max()) < 0.1
            table.add(
                case=f"passes over the data to a residual of 1e-3, digits, l2 = {l2:g}, {count} right-hand sides",
                method=name,
                passes=f"{found.passes:.1f}",
                steps=str(found.steps),
                **{"worst residual": f"{float(found.residual.max()):.1e}", "ms": f"{spent * 1e3:.0f}"},
            )


def _solve_quietly(problem: Any, gradients: Tensor, **options: Any) -> xf.influence.Solution:
    from xai_fast.influence.solvers import solve_quietly

    return solve_quietly(problem, gradients, **options)


def pearson(found: Tensor, exact: Tensor) -> Tensor:
    """The correlation for every test point."""
    a, b = (t.double() - t.double().mean(1, keepdim=True) for t in (found, exact))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def spearman(found: Tensor, exact: Tensor) -> float:
    """Mean rank correlation over the test points."""
    return float(pearson(found.argsort(1).argsort(1), exact.argsort(1).argsort(1)).mean())


def test_libraries(table: Table) -> None:
    """Scores of 20 test points against 1797 rows, from the trained head to the matrix."""
    train, test = digits()
    l2 = 1e-2
    theta = fitted(*train, l2).float()
    head = xf.influence.SoftmaxHead(theta, l2=l2)

    def ours(**options: Any) -> Tensor:
        return -xf.influence.Influence(head, *train, **options).scores(*test)

    def matched() -> Tensor:
        return xf.influence.tracin(_net(theta), F.cross_entropy, train, test)

    exact = ours(solver="exact")
    peers: Peers = {
        "xai_fast, exact": lambda: ours(solver="exact"),
        "xai_fast, cg": lambda: ours(solver="cg", tolerance=1e-4),
        "xai_fast, lissa": lambda: ours(solver="lissa", tolerance=1e-2),
        "xai_fast, tracin": matched,
        "pyDVL Direct": lambda: libraries.pydvl_scores("DirectInfluence", theta, train, test, l2),
        "pyDVL block CG": lambda: libraries.pydvl_scores(
            "CgInfluence", theta, train, test, l2, rtol=1e-4, solve_simultaneously=True
        ),
        "pyDVL LiSSA, 200 steps": lambda: libraries.pydvl_scores(
            "LissaInfluence", theta, train, test, l2, maxiter=200, scale=2.0, warn_on_max_iteration=False
        ),
        "dattri CG, 30 iterations": lambda: libraries.dattri_cg(theta, train, test, l2, 30),
        "captum Arnoldi, rank 50": lambda: libraries.captum_arnoldi(theta, train, test, l2, 50),
        "captum TracInCPFast": lambda: libraries.captum_tracin(theta, train, test),
    }
    # The others approximate H^-1 coarsely or not at all.
    same = {"xai_fast, cg": exact, "xai_fast, lissa": exact, "pyDVL Direct": exact, "dattri CG, 30 iterations": exact}
    same["captum TracInCPFast"] = matched()
    agreement = {}
    for name, call in list(peers.items()):
        try:
            found = torch.as_tensor(call()).detach()
        except ImportError as error:
            peers.pop(name)
            table.add(case="left out", method=name, why=str(error))
            continue
        if name in same:
            assert float(pearson(found, same[name]).min()) > 0.99, name
        agreement[name] = spearman(found, exact)
    times = alternate(peers, rounds=5, seconds=60)
    for name, seconds in times.items():
        table.add(
            case="scores of 20 test points against 1797 digits, 64 x 10 parameters, l2 = 0.01",
            method=name,
            ms=f"{seconds * 1e3:.1f}",
            **{"relative to xai_fast, exact": f"{seconds / times['xai_fast, exact']:.1f}"},
            **{"rank correlation with exact": f"{agreement[name]:.4f}"},
        )


def _net(theta: Tensor) -> torch.nn.Linear:
    net = torch.nn.Linear(*theta.shape, bias=False)
    net.weight.data.copy_(theta.T)
    return net


def test_leave_one_out_against_retraining(table: Table) -> None:
    """The whole leave-one-out table against scikit-learn, which fits once for every row."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    (X, y), test = digits()
    l2 = 1e-3
    theta, row = fitted(X, y, l2), 7
    influence = xf.influence.Influence(xf.influence.SoftmaxHead(theta, l2=l2), X.double(), y)

    def retrain() -> Tensor:
        keep = torch.arange(len(X)) != row
        # With tol=1e-6 what is left of the gradient moves the losses as much as the row does.
        model = linear_model.LogisticRegression(C=1 / (l2 * len(X)), fit_intercept=False, tol=1e-8, max_iter=5000)
        return torch.from_numpy(model.fit(X[keep], y[keep]).coef_.T)

    def losses(at: Tensor) -> Tensor:
        return F.cross_entropy(test[0].double() @ at.double(), test[1], reduction="none")

    found, change = influence.loo(test[0].double(), test[1]), losses(retrain()) - losses(theta)
    assert found.shape == (len(test[0]), len(X))
    assert (found[:, row] - change).norm() < 0.02 * change.norm()
    assert found[:, row].sign().equal(change.sign())
    times = alternate({"loo": lambda: influence.loo(test[0].double(), test[1]), "retrain": retrain}, rounds=3, seconds=30)
    case = "leave-one-out of all 1797 digits on 20 test points"
    table.add(case=case, method="xai_fast, loo(leverage=True)", seconds=f"{times['loo']:.2f}")
    table.add(case=case, method="scikit-learn, 1797 fits (one measured)", seconds=f"{times['retrain'] * len(X):.0f}")


def test_a_million_rows(table: Table) -> None:
    rows, dim, classes, tests, k = 1_000_000, 256, 10, 100, 20
    X, delta = torch.randn(rows, dim, device=DEVICE), torch.randn(rows, classes, device=DEVICE)
    solutions = torch.randn(tests, dim, classes, device=DEVICE)
    matrix = solutions.permute(1, 0, 2).reshape(dim, tests * classes).contiguous()
    chunk = 8192
    buffer = torch.empty(chunk, tests * classes, device=DEVICE)

    def products() -> None:
        for part in X.split(chunk):
            torch.mm(part, matrix, out=buffer[: len(part)])

    def composition() -> Tensor:
        best: Tensor | None = None
        for part, d in zip(X.split(chunk), delta.split(chunk), strict=True):
            scores = ((part @ matrix).view(len(part), tests, classes) * d[:, None]).sum(2).T
            found = scores.topk(k, 1).values
            best = found if best is None else torch.cat([best, found], 1).topk(k, 1).values
        assert best is not None
        return best

    peers: Peers = {
        "bare products X S (8192 rows at a time)": products,
        "xai_fast, top 20": lambda: xf.ops.influence_top_k(X, delta, solutions, k)[0],
        "torch, chunked, top 20": composition,
    }
    torch.testing.assert_close(peers["xai_fast, top 20"](), peers["torch, chunked, top 20"](), rtol=1e-3, atol=1e-2)
    memory = {name: peak_memory(call, DEVICE) for name, call in peers.items()}
    times = alternate(peers, rounds=3, seconds=60)
    for name, seconds in times.items():
        extra = memory[name]
        table.add(
            case=f"n = {rows}, d = {dim}, C = {classes}, {tests} test points, top {k} of each",
            method=name,
            s=f"{seconds:.2f}",
            **{"relative to the products": f"{seconds / times[next(iter(peers))]:.2f}"},
            **{"extra MB": "" if extra is None else f"{extra / 2**20:.0f}"},
        )


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_gpu(table: Table) -> None:
    """5000 LiSSA steps in one launch, and a thousand test points against a million rows."""
    dim, classes = 768, 10
    X, weights = torch.randn(100_000, dim, device=DEVICE), probabilities(100_000, classes)
    g = torch.randn(dim, classes, device=DEVICE)
    options: dict[str, Any] = {"weights": weights, "family": "softmax", "sigma": 100.0, "batch_size": 256}

    def recursion(device: torch.device) -> tuple[Tensor, Tensor]:
        given = {**options, "weights": weights.to(device)}
        return xf.ops.lissa(X.to(device), g.to(device), steps=5000, **given)

    for found, on_cpu in zip(recursion(DEVICE), recursion(torch.device("cpu")), strict=True):
        assert (found.cpu() - on_cpu).norm() < 1e-3 * on_cpu.norm()
    times = alternate({"xai_fast": lambda: recursion(DEVICE)})
    add(table, "5000 LiSSA steps, b = 256, d = 768, C = 10 (bar 40 ms)", times, "xai_fast")
    X, delta = torch.randn(1_000_000, dim, device=DEVICE), torch.randn(1_000_000, classes, device=DEVICE)
    solutions = torch.randn(1000, dim, classes, device=DEVICE)
    matrix = solutions.permute(1, 0, 2).reshape(dim, -1).contiguous()
    peers: Peers = {
        "bare products": lambda: [part @ matrix for part in X.split(4096)] and None,
        "xai_fast, top 20": lambda: xf.ops.influence_top_k(X, delta, solutions, 20),
    }
    for values, solution in zip(peers["xai_fast, top 20"]()[0][:5], solutions, strict=False):
        wanted = ((X @ solution) * delta).sum(1).topk(20).values
        torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-2)
    add(table, "n = 1e6, d = 768, C = 10, 1000 test points, top 20", alternate(peers, rounds=3), "bare products")
