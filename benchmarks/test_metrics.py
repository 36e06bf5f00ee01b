"""Measures of explanations against captum, quantus and the bare forward passes, at equal numbers of model evaluations.

Run: make bench, or pytest benchmarks/test_metrics.py -s [--write-results] [--threads N]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xai_fast as xf
from benchmarks.harness import Table, alternate
from benchmarks.peers import metrics_libraries as libraries
from xai_fast.demo.measure import peak_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Peers = dict[str, Callable[[], Any]]
RADIUS = 0.02


def small_cnn(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*layers).eval().requires_grad_(False).to(DEVICE)


def lenet(classes: int = 10) -> nn.Module:
    """LeNet-5 on pictures of 28 x 28: what quantus' own getting-started page measures."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 120), nn.ReLU()]
    layers += [nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)]
    return nn.Sequential(*layers).eval().requires_grad_(False).to(DEVICE)


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the batch in which its bare passes are fastest."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


CASES = (Case("small CNN", small_cnn, (3, 64, 64), 8), Case("LeNet", lenet, (1, 28, 28), 128))
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def saliency(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        scores = model(x).gather(1, target[:, None]).sum()
        return torch.autograd.grad(scores, x)[0]


def inputs_of(measure: Callable[[Callable[[Tensor], Tensor]], Any], model: nn.Module) -> Tensor:
    """All that the measure hands to the model, for passes of the model alone."""
    seen: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return model(z)

    measure(watched)
    return torch.cat(seen)


def add(
    table: Table, case: str, times: dict[str, float], ours: str, bare: str, memory: Peers | None = None, **facts: str
) -> None:
    for name, seconds in times.items():
        peak = peak_memory(memory[name], DEVICE) if memory and name in memory else None
        table.add(
            case=case,
            method=name,
            ms=f"{seconds * 1e3:.1f}",
            **{"relative to ours": f"{seconds / times[ours]:.2f}", "over the bare passes": f"{seconds / times[bare]:.2f}"},
            **({} if peak is None else {"MB beyond what was held": f"{peak / 1e6:.0f}"}),
            **facts,
        )


@by_case
def test_sensitivity(table: Table, case: Case) -> None:
    model, batch, samples = case.model(), 16, 50
    x = torch.randn(batch, *case.shape, device=DEVICE)
    target = model(x).argmax(1)
    copies, targets = x.repeat(samples + 1, 1, 1, 1), target.repeat(samples + 1)  # as all do, with those of x itself

    def explain(z: Any, target: Tensor) -> Any:
        # Captum's first call hands over a tuple and expects one.
        return (saliency(model, z[0], target),) if isinstance(z, tuple) else saliency(model, z, target)

    def bare(size: int) -> None:
        for z, t in zip(copies.split(size), targets.split(size), strict=True):
            saliency(model, z, t)

    noise = torch.empty_like(copies[batch:]).uniform_(-RADIUS, RADIUS)
    peers: Peers = {
        "xai_fast.sensitivity_max": lambda: xf.metrics.sensitivity_max(
            explain, x, n_perturb_samples=samples, perturb_radius=RADIUS, target=target
        ),
        "xai_fast.sensitivity: rejects, max and mean": lambda: xf.metrics.sensitivity(
            explain, model, x, radius=RADIUS, n_samples=samples, norm_ord=float("inf"), relative=True, target=target
        ),
        "captum, all at once": lambda: libraries.captum_sensitivity_max(
            explain, x, n_perturb_samples=samples, perturb_radius=RADIUS, target=target
        ),
        "captum, 32 examples at a time": lambda: libraries.captum_sensitivity_max(
            explain, x, n_perturb_samples=samples, perturb_radius=RADIUS, target=target, max_examples_per_batch=32
        ),
        "quantus": lambda: libraries.quantus_sensitivity(model, x, target, explain, RADIUS, samples),
        f"the explanations alone, {case.batch} at a time": lambda: bare(case.batch),
        "the explanations alone, all at once": lambda: bare(len(copies)),
    }
    if DEVICE.type == "cuda":
        peers.pop("quantus")
    # On the same noise all are the same; on their own they draw from the same distribution.
    own = iter(noise.split(batch))
    ours = xf.metrics.sensitivity_max(
        explain, x, lambda z: z + next(own), n_perturb_samples=samples, target=target, max_examples_per_batch=batch
    )
    theirs = iter(noise.view(samples, batch, *x.shape[1:]).transpose(0, 1).reshape_as(noise).split(batch * samples))
    same = libraries.captum_sensitivity_max(explain, x, lambda z: z + next(theirs), n_perturb_samples=samples, target=target)
    torch.testing.assert_close(ours.float(), same, rtol=1e-3, atol=1e-5)
    for name in ("xai_fast.sensitivity_max", "captum, all at once"):
        assert float((peers[name]() / same).mean().log().abs()) < 0.2
    times = alternate(peers, rounds=11, seconds=90)
    what = f"max sensitivity of saliency, {case.name}, x {tuple(x.shape)}, {samples} samples, {len(copies)} explanations"
    add(table, what, times, "xai_fast.sensitivity_max", f"the explanations alone, {case.batch} at a time", peers)


@by_case
def test_deletion(table: Table, case: Case) -> None:
    model, batch = case.model(), 16
    x = torch.rand(batch, *case.shape, device=DEVICE)
    steps = 96 if x[0].numel() % 96 == 0 else x[0].numel()
    target = model(x).argmax(1)
    maps = saliency(model, x, target) * x
    lowest = x.flatten(1).amin(1).view(-1, 1, 1, 1)

    def ours(forward: Callable[[Tensor], Tensor]) -> Any:
        return xf.metrics.deletion_curve(forward, x, maps, target, steps=steps, baseline=lowest, outputs="logits")

    copies = inputs_of(ours, model)

    def bare() -> None:
        with torch.no_grad():
            for z in copies.split(case.batch):
                model(z).softmax(1)

    peers: Peers = {
        "xai_fast.deletion_curve": lambda: ours(model),
        "quantus PixelFlipping": lambda: libraries.quantus_pixel_flipping(model, x, target, maps, x[0].numel() // steps),
        f"the forward passes alone, {case.batch} at a time": bare,
    }
    if DEVICE.type == "cuda":
        peers.pop("quantus PixelFlipping")
    else:
        theirs = peers["quantus PixelFlipping"]()
        torch.testing.assert_close(ours(model).values[:, 1:].double(), theirs.double(), rtol=1e-3, atol=1e-4)
    times = alternate(peers, rounds=11, seconds=90)
    what = f"deletion curve, {case.name}, x {tuple(x.shape)}, {steps} steps, {len(copies)} forward passes"
    add(table, what, times, "xai_fast.deletion_curve", f"the forward passes alone, {case.batch} at a time", peers)


def test_fidelity(table: Table) -> None:
    model, batch = small_cnn(), 32
    x = torch.rand(batch, 3, 64, 64, device=DEVICE)
    maps = torch.rand(batch, 1, 64, 64, device=DEVICE)
    levels = [k / 10 for k in range(1, 10)]

    def ours(forward: Callable[[Tensor], Tensor]) -> Any:
        return xf.metrics.fidelity(forward, x, maps, sparsity=levels, outputs="logits")

    copies = inputs_of(ours, model)

    def bare() -> None:
        with torch.no_grad():
            for z in copies.split(8):
                model(z).softmax(1)

    def one_by_one() -> None:
        """As peers do: each level, with and without the explanation, in a pass of its own."""
        order = maps.flatten(1).argsort(1, descending=True)
        with torch.no_grad():
            whole = model(x).argmax(1)
            for level in levels:
                size = round((1 - level) * order.shape[1])
                mask = torch.zeros_like(maps).flatten(1).scatter_(1, order[:, :size], 1).view_as(maps)
                for m in (mask, 1 - mask):
                    (model(x * m).argmax(1) == whole).float().mean()

    peers: Peers = {
        "xai_fast.fidelity": lambda: ours(model),
        "torch, level by level": one_by_one,
        "the forward passes alone, 8 at a time": bare,
    }
    assert ours(model).evaluations == len(copies)
    times = alternate(peers, rounds=11, seconds=60)
    case = f"fid+ and fid-, small CNN, x {tuple(x.shape)}, {len(levels)} levels, {len(copies)} forward passes"
    add(table, case, times, "xai_fast.fidelity", "the forward passes alone, 8 at a time", peers)


def test_infidelity(table: Table) -> None:
    model, batch, samples = small_cnn(), 16, 50
    x = torch.rand(batch, 3, 64, 64, device=DEVICE)
    target = model(x).argmax(1)
    maps = saliency(model, x, target)

    def measure(forward: Callable[[Tensor], Tensor]) -> Tensor:
        return xf.metrics.infidelity(forward, x, maps, target=target, n_perturb_samples=samples)

    copies = inputs_of(measure, model)

    def bare() -> None:
        with torch.no_grad():
            for z in copies.split(8):
                model(z)

    def shift(z: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.empty_like(z).uniform_(-0.1, 0.1)
        return noise, z - noise

    peers: Peers = {
        "xai_fast.infidelity": lambda: measure(model),
        "captum, all at once": lambda: libraries.captum_infidelity(
            model, shift, x, maps, target=target, n_perturb_samples=samples
        ),
        "captum, 32 examples at a time": lambda: libraries.captum_infidelity(
            model, shift, x, maps, target=target, n_perturb_samples=samples, max_examples_per_batch=32
        ),
        "the forward passes alone, 8 at a time": bare,
    }
    ours, theirs = peers["xai_fast.infidelity"](), peers["captum, all at once"]()
    assert 0.5 < float(ours.mean() / theirs.mean()) < 2
    times = alternate(peers, rounds=11, seconds=60)
    case = f"infidelity, small CNN, x {tuple(x.shape)}, {samples} samples, {len(copies)} forward passes"
    add(table, case, times, "xai_fast.infidelity", "the forward passes alone, 8 at a time", peers)


@pytest.mark.parametrize("shape", [(256, 3, 224, 224), (16, 1, 224, 224)], ids=str)
def test_conciseness(table: Table, shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, device=DEVICE)
    entries = maps[0].numel()
    places = 2 * torch.arange(1, entries + 1, device=DEVICE, dtype=torch.float64) - entries - 1

    def by_hand() -> Tensor:
        out = []
        for part in maps.flatten(1).split(16):  # float64 copies of all would not fit a small machine
            a = part.abs().double()
            total = a.sum(1)
            entropy = total.log() - torch.special.xlogy(a, a).sum(1) / total
            gini = (a.sort(dim=1).values * places).sum(1) / (entries * total)
            out.append(torch.stack([(a > 0).sum(1).double(), entropy, gini], 1))
        return torch.cat(out)

    peers: Peers = {
        "xai_fast: size, entropy, Gini": lambda: xf.ops.conciseness(maps),
        "xai_fast: size, entropy": lambda: xf.ops.conciseness(maps, gini=False),
        "torch, by hand": by_hand,
        "torch.sort alone": lambda: maps.flatten(1).sort(dim=1).values,
        "read once (a.sum())": lambda: maps.sum(),
    }
    torch.testing.assert_close(peers["xai_fast: size, entropy, Gini"](), by_hand(), rtol=1e-5, atol=1e-7)
    if DEVICE.type == "cpu" and shape[0] <= 16:
        peers["quantus Complexity and Sparseness"] = lambda: libraries.quantus_complexity(
            maps.expand(-1, 3, -1, -1), maps, small_cnn()
        )
        found = peers["quantus Complexity and Sparseness"]()
        torch.testing.assert_close(found, xf.ops.conciseness(maps)[:, 1:], rtol=1e-3, atol=1e-3)
    times = alternate(peers, rounds=11, seconds=60)
    bare = "read once (a.sum())"
    for name, seconds in times.items():
        table.add(
            case=f"conciseness of {shape} fp32",
            method=name,
            ms=f"{seconds * 1e3:.1f}",
            **{"relative to ours": f"{seconds / times['xai_fast: size, entropy, Gini']:.2f}"},
            **{"reads of the data": f"{seconds / times[bare]:.2f}"},
        )


def test_small_steps(table: Table) -> None:
    """The single ops, each against the torch calls that it stands for."""
    x = torch.rand(16, 3, 224, 224, device=DEVICE)
    scores = torch.randn(16, 224 * 224, device=DEVICE)
    sample = torch.arange(16, device=DEVICE).repeat(4)
    draw = torch.arange(64, device=DEVICE) // 16
    ranks = xf.ops.rank_features(scores)
    image, low, high = x.flatten(2).unsqueeze(-1), torch.zeros(64, dtype=torch.int64, device=DEVICE), 1000 * draw
    zero = torch.zeros(1, 1, 1, 1, device=DEVICE)
    flat = x.flatten(1)
    maps = flat[sample] + 1

    def replaced() -> Tensor:
        chosen = ranks[sample]
        gone = (chosen >= low[:, None]) & (chosen < high[:, None])
        return torch.where(gone[:, None, :, None], zero, image[sample])

    def normal_ball() -> Tensor:
        noise = torch.randn(64, *x.shape[1:], device=DEVICE)
        return x[sample] + noise * (RADIUS / noise.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)

    cases: dict[str, Peers] = {
        "rank (16, 50176)": {
            "xai_fast": lambda: xf.ops.rank_features(scores),
            "torch: argsort twice": lambda: scores.argsort(dim=1, descending=True, stable=True).argsort(1),
        },
        "replace by rank, 64 copies (3, 224, 224)": {
            "xai_fast": lambda: xf.ops.replace_ranked(image, zero, ranks, sample=sample, first=low, last=high),
            "torch: gather, compare, where": replaced,
        },
        "uniform noise in a cube, 64 copies (3, 224, 224)": {
            "xai_fast": lambda: xf.ops.perturb(x, sample=sample, draw=draw, radius=RADIUS, ball="linf"),
            "torch: uniform_, add": lambda: x[sample] + torch.empty_like(x[sample]).uniform_(-RADIUS, RADIUS),
        },
        "uniform noise in a ball, 64 copies (3, 224, 224)": {
            "xai_fast": lambda: xf.ops.perturb(x, sample=sample, draw=draw, radius=RADIUS, ball="l2"),
            "torch: randn, norm, add": normal_ball,
        },
        "distances of 64 maps (3, 224, 224)": {
            "xai_fast": lambda: xf.ops.map_distances(maps, flat, sample=sample),
            "torch: gather, subtract, norm": lambda: torch.linalg.vector_norm(maps - flat[sample], dim=1),
        },
    }
    ours, theirs = (call() for call in cases["rank (16, 50176)"].values())
    assert torch.equal(ours.long(), theirs)
    for name in ("replace by rank, 64 copies (3, 224, 224)", "distances of 64 maps (3, 224, 224)"):
        found, wanted = (call() for call in cases[name].values())
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-5)
    for case, peers in cases.items():
        times = alternate(peers, rounds=7, seconds=20)
        for name, seconds in times.items():
            table.add(
                case=case,
                method=name,
                ms=f"{seconds * 1e3:.2f}",
                **{"relative to ours": f"{seconds / times['xai_fast']:.2f}"},
            )
