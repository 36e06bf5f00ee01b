"""Concept activation vectors and TCAV against Captum and scikit-learn; token norms against a read of the data.

Run: make bench, or pytest benchmarks/test_concepts.py -s [--write-results] [--threads N]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import xai_fast.concepts as concepts
from benchmarks.harness import Table, alternate
from benchmarks.peers import concepts_libraries as libraries
from xai_fast.attention import artifacts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METHODS = ("ridge", "lda", "logistic", "mean_difference")
Peers = dict[str, Callable[[], Any]]


def fresh_accuracy(vector: Tensor, positive: Tensor, negative: Tensor) -> float:
    """Of examples that no one has seen, by the sign at the best threshold there can be: halfway between the means."""
    plus, minus = positive @ vector, negative @ vector
    middle = (plus.mean() + minus.mean()) / 2
    return float(((plus > middle).float().mean() + (minus < middle).float().mean()) / 2)


def test_fit(table: Table) -> None:
    features, examples, repeats = 20_000, 50, 5
    cases, unseen = [], []
    for seed in range(repeats):
        g = torch.Generator().manual_seed(seed)
        direction = torch.nn.functional.normalize(torch.randn(features, generator=g), dim=0)
        for size, kept in ((examples, cases), (200, unseen)):
            noise = [torch.randn(size, features, generator=g) for _ in range(2)]
            kept.append(((noise[0] + 10 * direction).to(DEVICE), noise[1].to(DEVICE)))
    at_host = [tuple(x.cpu() for x in case) for case in cases]

    def fitted(method: str) -> list[Tensor]:
        return [concepts.fit_cav(*case, method=method).vector for case in cases]

    peers: Peers = {f"xai_fast.fit_cav, {method}": lambda method=method: fitted(method) for method in METHODS}
    peers["captum DefaultClassifier"] = lambda: [libraries.captum_classifier(*case)[0] for case in at_host]
    for name in libraries.SKLEARN:
        peers[f"sklearn {name}, nothing held out"] = lambda name=name: [libraries.sklearn_cav(name, *c) for c in at_host]
    accuracy = {
        name: sum(fresh_accuracy(v.to(DEVICE), *new) for v, new in zip(call(), unseen, strict=True)) / repeats
        for name, call in peers.items()
    }
    times = alternate(peers, rounds=3, seconds=60)
    ours = "xai_fast.fit_cav, ridge"
    for name, seconds in times.items():
        table.add(
            case=f"CAV of {examples} + {examples} examples of {features} features",
            method=name,
            **{"ms a CAV": f"{seconds / repeats * 1e3:.1f}", "relative to ours": f"{seconds / times[ours]:.2f}"},
            **{"accuracy on fresh examples": f"{accuracy[name]:.3f}"},
        )
    assert times["captum DefaultClassifier"] > 10 * times[ours]
    assert accuracy[ours] >= accuracy["captum DefaultClassifier"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).eval().requires_grad_(False).to(DEVICE)


def test_tcav(table: Table) -> None:
    model, layers = network(), ["2", "5", "7"]
    draw = [torch.rand(50, 3, 32, 32, device=DEVICE) for _ in range(50)]
    named, random = {f"c{i}": x for i, x in enumerate(draw[:20])}, draw[20:]
    inputs = torch.rand(64, 3, 32, 32, device=DEVICE)
    few = [draw[0]], random[:3]

    def bare() -> None:
        """The passes that any TCAV needs once."""
        with torch.no_grad():
            for x in draw:
                model(x)
        x = inputs.clone().requires_grad_()
        torch.autograd.grad(model(x)[:, 0].sum(), x)

    def ours(**options: Any) -> concepts.TCAV:
        return concepts.tcav(model, layers, inputs, 0, named, random, **options)

    cavs = {"all": 20 * 30 * len(layers), "few": 3 * len(layers)}
    flat = "xai_fast.tcav, flatten (8,192, 4,096 and 4,096 features)"
    peers: dict[str, tuple[str, Callable[[], Any]]] = {
        "xai_fast.tcav, mean over positions": ("all", ours),
        "xai_fast.tcav, mean over positions, logistic": ("all", lambda: ours(method="logistic")),
        flat: ("all", lambda: ours(pool="flatten")),
        "captum TCAV, flatten, 1 concept x 3 random sets": (
            "few",
            lambda: libraries.captum_tcav(model, layers, inputs, 0, *few),
        ),
        "the passes alone": ("all", bare),
    }
    if DEVICE.type == "cuda":
        peers.pop("captum TCAV, flatten, 1 concept x 3 random sets")
    found = ours()
    assert found.gradient_passes == 1
    assert found.forward_passes == 1 + 50
    times = alternate({name: call for name, (_, call) in peers.items()}, rounds=3, seconds=60)
    each = {name: times[name] / cavs[kind] for name, (kind, _) in peers.items()}
    for name, (kind, _) in peers.items():
        table.add(
            case="TCAV, small CNN, 3 layers, 20 concepts x 30 random sets of 50 images, 64 inputs, 435 null CAVs a layer",
            method=name,
            **{"CAVs": f"{cavs[kind]}", "s": f"{times[name]:.2f}"},
            **({} if name == "the passes alone" else {"ms a CAV": f"{each[name] * 1e3:.2f}"}),
            **({"gradient passes": f"{found.gradient_passes}"} if "xai_fast" in name else {}),
        )
    if DEVICE.type == "cpu":
        assert each["captum TCAV, flatten, 1 concept x 3 random sets"] > 10 * each[flat]


@pytest.mark.parametrize(
    "shape", [(12, 8, 1370, 384), (24, 2, 1370, 1024)], ids=["ViT-S/14 at 518 px", "ViT-L/14 at 518 px"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_norms(table: Table, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    states = [torch.randn(shape[1:], device=DEVICE).to(dtype) for _ in range(shape[0])]
    norms = artifacts.token_norms(states)
    peers: Peers = {
        "norms and outliers": lambda: artifacts.find_outliers(artifacts.token_norms(states), ignore_tokens=0),
        "xai_fast token_norms": lambda: artifacts.token_norms(states),
        "xai_fast find_outliers of the norms": lambda: artifacts.find_outliers(norms, ignore_tokens=0),
        "torch, x.norm(dim=-1) and a sort": lambda: torch.stack([x.norm(dim=-1) for x in states]).sort(-1),
        "read once (x.sum())": lambda: [x.sum() for x in states],
    }
    exact = torch.stack([x.double().norm(dim=-1) for x in states])
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
    patches = exact[..., 1:].cpu().numpy()
    middle = np.median(patches, -1, keepdims=True)
    spread = np.median(abs(patches - middle), -1, keepdims=True)
    limit = torch.from_numpy((middle + 5 * 1.4826 * spread)[..., 0])
    found = artifacts.find_outliers(norms, ignore_tokens=0)
    torch.testing.assert_close(found.threshold.cpu().double(), limit, rtol=1e-5, atol=0)
    times = alternate(peers, rounds=15, seconds=20)
    bare = times["read once (x.sum())"]
    for name, seconds in times.items():
        table.add(
            case=f"token norms of {shape} {str(dtype).removeprefix('torch.')}",
            method=name,
            ms=f"{seconds * 1e3:.1f}",
            **{"reads of the data": f"{seconds / bare:.2f}"},
        )
