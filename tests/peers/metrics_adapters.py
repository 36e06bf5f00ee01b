"""Run in a process of its own, with Captum importable: its methods in the measures, inside and outside the adapter; prints
differences as JSON."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.peers import torchvision_shim  # noqa: F401
from xai_fast import metrics
from xai_fast.integrations.captum import captum_explainer
from xai_fast.metrics.study import run_study

warnings.filterwarnings("error", message=".*required_grads has been set.*")


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max())


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(80, 4),
    )  # fmt: skip
    return layers.double().eval()


def maps(net: nn.Sequential, x: Tensor, target: Tensor) -> dict[str, float]:
    from captum import attr

    def own(method: Any, **options: Any) -> Tensor:
        return method.attribute(x.clone().requires_grad_(), target=target, **options)

    gradients, saliency = attr.IntegratedGradients(net), attr.Saliency(net)
    grad_cam = attr.LayerGradCam(net, net[3])
    layer = attr.LayerActivation(net, net[3])  # has no target
    found = {
        "integrated gradients": (captum_explainer(gradients, n_steps=20), own(gradients, n_steps=20)),
        "batches": (captum_explainer(gradients, n_steps=20, internal_batch_size=10), own(gradients, n_steps=20)),
        "baselines": (captum_explainer(gradients, baselines=0.5), own(gradients, baselines=0.5)),
        "baselines of the inputs": (
            captum_explainer(gradients, baselines=lambda x: x.mean(0, keepdim=True)),
            own(gradients, baselines=x.mean(0, keepdim=True)),
        ),
        "saliency": (captum_explainer(saliency), own(saliency)),
        "signed": (captum_explainer(saliency, abs=False), own(saliency, abs=False)),
        "channels": (captum_explainer(saliency, reduce_channels="sum"), own(saliency).sum(1, keepdim=True)),
        "occlusion": (
            captum_explainer(attr.Occlusion(net), sliding_window_shapes=(3, 4, 4)),
            own(attr.Occlusion(net), sliding_window_shapes=(3, 4, 4)),
        ),
        "layer": (
            captum_explainer(grad_cam),
            attr.LayerAttribution.interpolate(own(grad_cam), (8, 8), "bilinear"),
        ),
        "layer as it is": (captum_explainer(grad_cam, interpolate=None), own(grad_cam)),
        "nearest": (
            captum_explainer(layer, interpolate="nearest", reduce_channels="sum"),
            attr.LayerAttribution.interpolate(layer.attribute(x).sum(1, keepdim=True), (8, 8), "nearest"),
        ),
    }
    return {name: difference(explain(x, target), wanted) for name, (explain, wanted) in found.items()}


def measured(net: nn.Sequential, x: Tensor, target: Tensor) -> dict[str, float]:
    from captum.attr import IntegratedGradients, Saliency

    gradients, saliency = IntegratedGradients(net), Saliency(net)
    found = {}
    explain = captum_explainer(gradients)
    own = gradients.attribute(x.clone().requires_grad_(), target=target)
    ours = metrics.fidelity(net, x, explain(x, target), form="probability")
    theirs = metrics.fidelity(net, x, own, form="probability")
    found["fidelity"] = difference(ours.fid_plus, theirs.fid_plus)

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    options: dict[str, Any] = {"radius": 0.3, "n_samples": 5, "target": target}
    ours = metrics.sensitivity(captum_explainer(saliency), net, x, generator=seed(), **options)

    def one_by_one(z: Tensor, target: Tensor) -> Tensor:
        rows = [z[i : i + 1].clone().requires_grad_() for i in range(len(z))]
        return torch.cat([saliency.attribute(row, target=target[i]) for i, row in enumerate(rows)])

    slow = metrics.sensitivity(one_by_one, net, x, generator=seed(), **options)
    found["sensitivity"] = difference(ours.max, slow.max)
    methods = {"gradients": gradients, "saliency": captum_explainer(saliency, reduce_channels="sum")}
    study = run_study(methods, net, x, target=target, batch_size=4, sparsity=(0.5, 0.9))
    assert study.notes == ()
    table = study.to_dataframe()
    assert len(table) == len(study.table())
    assert set(table["method"]) == set(methods)
    curve = metrics.deletion_curve(net, x, own, target)
    found["study"] = difference(study.per_sample("gradients", "deletion_area"), curve.area)
    curve = metrics.deletion_curve(
        net, x, saliency.attribute(x.clone().requires_grad_(), target=target).sum(1, keepdim=True), target
    )
    found["study of pixels"] = difference(study.per_sample("saliency", "deletion_area"), curve.area)
    return found


def tokens() -> dict[str, float]:
    from captum.attr import LayerIntegratedGradients

    torch.manual_seed(1)
    net = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Linear(30, 3)).double()
    ids, target = torch.randint(10, (4, 5)), torch.tensor([0, 1, 2, 0])
    method = LayerIntegratedGradients(net, net[0])
    explain = captum_explainer(method, reduce_channels="sum", baselines=0)
    wanted = method.attribute(ids, target=target, baselines=0).sum(2)
    study = run_study({"layer": explain}, net, ids, target=target, measures=["deletion"])
    area = metrics.deletion_curve(net, ids, wanted.detach(), target).area
    return {
        "tokens": difference(explain(ids, target), wanted),
        "study": difference(study.values["layer", 0, "deletion_area"], area),
    }


def main() -> dict[str, Any]:
    net, x, target = model(), torch.randn(5, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3, 0])
    before = x.clone()
    found = {"maps": maps(net, x, target), "measures": measured(net, x, target), "tokens": tokens()}
    unchanged = torch.equal(x, before) and not x.requires_grad and x.grad is None
    return {**found, "unchanged": unchanged}


if __name__ == "__main__":
    print(json.dumps(main()))
