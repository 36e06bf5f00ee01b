"""The public API where the models and the data are on a GPU (and on the CPU, so that the tests themselves are tested)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import xai_fast as xf
from tests.implementations import DEVICES
from xai_fast.distill import fit_gam

on_devices = pytest.mark.parametrize("device", DEVICES)
AT = {"rtol": 1e-3, "atol": 1e-5}


class Attending(nn.Module):
    """Embedding of patches, one attention, a convolution and a linear head: what the rules of LRP meet."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((tokens + mixed).mean(1))


def pictures_and_model(device: str) -> tuple[Tensor, nn.Module]:
    torch.manual_seed(0)
    return torch.randn(6, 3, 16, 16).to(device), Attending().eval().to(device)


@on_devices
def test_rollout_and_relevance(device: str) -> None:
    x, model = pictures_and_model(device)
    with xf.capture_attention(model) as record:
        score = model(x)[:, 1].sum()
    rollout, relevance = record.rollout(token=0), record.relevance(score, token=0)
    assert rollout.device == relevance.device == x.device
    x, model = x.cpu(), model.cpu()
    with xf.capture_attention(model) as record:
        score = model(x)[:, 1].sum()
    torch.testing.assert_close(rollout.cpu(), record.rollout(token=0), **AT)
    torch.testing.assert_close(relevance.cpu(), record.relevance(score, token=0), **AT)


@on_devices
@pytest.mark.parametrize("rule", ["epsilon", "attnlrp", "zplus", "gamma"])
def test_lrp_under_autocast(device: str, rule: str) -> None:
    x, model = pictures_and_model(device)
    wanted = xf.lrp.attribute(model, x, target=1, rule=rule)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = xf.lrp.attribute(model, x, target=1, rule=rule)
    assert found.device == x.device
    assert nn.functional.cosine_similarity(found.float().flatten(), wanted.flatten(), dim=0) > 0.9


@on_devices
@pytest.mark.parametrize("rule", ["epsilon", "attnlrp"])
def test_relevance_outside_of_the_autocast_of_the_capture(device: str, rule: str) -> None:
    x, model = pictures_and_model(device)
    with torch.autocast(device, dtype=torch.bfloat16), xf.capture_attention(model, rule=rule) as record:
        score = model(x)[:, 1].sum()
    assert record.relevance(score, token=0, method="lrp").isfinite().all()


@on_devices
@pytest.mark.parametrize("test", ["welch", "exchangeable"])
def test_tcav(device: str, test: str) -> None:
    x, model = pictures_and_model(device)
    sets = [torch.randn(12, 3, 16, 16).to(device) for _ in range(5)]
    found = xf.concepts.tcav(model, ["patches"], x, 1, {"shifted": sets[0] + 1}, sets[1:], test=test)
    assert found.p_values.isfinite().all()


@on_devices
def test_measures_of_a_model_elsewhere(device: str) -> None:
    """Pictures on the CPU, and a forward that moves them, or moves what it returns."""
    x, model = pictures_and_model(device)
    maps, x = x.abs().cpu(), x.cpu()
    for forward in (lambda z: model(z.to(device)), lambda z: model(z.to(device)).cpu()):
        assert xf.metrics.fidelity(forward, x, maps, sparsity=[0.5], outputs="logits").fid_plus.isfinite().all()
        assert xf.metrics.deletion_curve(forward, x, maps, 1, steps=4, outputs="logits").values.isfinite().all()
        assert xf.metrics.infidelity(forward, x, maps, target=1).isfinite().all()
        assert xf.metrics.sensitivity(lambda z: z, forward, x, radius=0.1, n_samples=4).max.isfinite().all()


@on_devices
def test_gam_takes_arrays(device: str) -> None:
    X = torch.rand(400, 3, dtype=torch.float64)
    gam = fit_gam(lambda x: x[:, 0] + x[:, 1] ** 2, X.to(device))
    for read in (gam.predict, gam.explain, gam.support):
        read(X.numpy())
    torch.testing.assert_close(gam.predict(X.numpy()).cpu(), X[:, 0] + X[:, 1] ** 2, rtol=0, atol=0.02)
    if device != "cpu":
        with pytest.raises(ValueError, match="X: expected a tensor on cuda"):
            gam.predict(X)


@on_devices
def test_influence(device: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(60, 8, dtype=torch.float64), torch.randint(0, 3, (60,))
    head = xf.influence.SoftmaxHead(torch.randn(8, 3, dtype=torch.float64), l2=0.1)
    wanted = xf.influence.Influence(head, X, y).scores(X[:4], y[:4])
    found = xf.influence.Influence(head, X.to(device), y.to(device)).scores(X[:4].to(device), y[:4].to(device))
    assert found.device == torch.device(device, 0) if device == "cuda" else found.device.type == "cpu"
    torch.testing.assert_close(found.cpu().as_subclass(Tensor), wanted.as_subclass(Tensor), **AT)
