"""Captum's methods and Quantus' functions as explainers, and back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.peers.locate import run_with_peers
from xai_fast.integrations.captum import captum_explainer
from xai_fast.integrations.quantus import from_quantus, quantus_explain_func
from xai_fast.metrics.study import run_study


class Method:
    """As a Captum method: gives what it was made with."""

    def __init__(self, maps: Any) -> None:
        self.maps, self.called = maps, {}

    def attribute(self, inputs: Tensor, baselines: Any = None, target: Any = None, n_steps: int = 5) -> Any:
        self.called = {"inputs": inputs, "baselines": baselines, "target": target, "n_steps": n_steps}
        return self.maps(inputs) if callable(self.maps) else self.maps


def test_nothing_is_imported() -> None:
    code = (
        "import sys, xai_fast.integrations.captum, xai_fast.integrations.quantus; "
        "assert not {'captum', 'quantus'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- captum ----------------------------------------------------------------------------------------------------------


def test_captum_methods_give_the_same_inside_and_outside() -> None:
    found = run_with_peers("tests.peers.metrics_adapters", "captum")
    assert found.pop("unchanged")
    assert len(found["maps"]) == 11
    for family, cases in found.items():
        for name, difference in cases.items():
            assert difference < 1e-9, f"{family}, {name}: {difference}"


def test_captum_inputs_are_leaves_of_their_own() -> None:
    method = Method(lambda x: x * 2)
    x = torch.ones(2, 3)
    maps = captum_explainer(method, n_steps=7)(x, torch.tensor([1, 0]))
    assert not maps.requires_grad
    assert method.called["inputs"].requires_grad
    assert method.called["n_steps"] == 7
    assert method.called["target"].tolist() == [1, 0]
    assert not x.requires_grad
    captum_explainer(method)(torch.ones(2, 3, dtype=torch.int64))
    assert not method.called["inputs"].requires_grad  # token ids have no gradient
    captum_explainer(method, baselines=lambda x: x - 1)(x)
    assert torch.equal(method.called["baselines"], torch.zeros(2, 3))


def test_captum_methods_may_write_to_what_they_get() -> None:
    def rude(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            for given in (inputs, method.called["baselines"], method.called["target"]):
                given.mul_(2)
        return inputs

    method = Method(rude)
    x, baseline, target = torch.ones(2, 3), torch.ones(1, 3), torch.tensor([1, 2])
    assert torch.equal(captum_explainer(method, baselines=baseline)(x, target), 2 * torch.ones(2, 3))
    captum_explainer(method, baselines=lambda x: x.mul_(2))(x, target)
    assert x.unique().tolist() == baseline.unique().tolist() == [1]
    assert target.tolist() == [1, 2]


def test_captum_shapes() -> None:
    x, target = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    layer = torch.arange(2 * 5 * 4.0).view(2, 5, 2, 2)
    found = captum_explainer(Method((layer,)), reduce_channels="sum")(x, target)
    assert found.shape == (2, 1, 4, 4)
    nearest = captum_explainer(Method(layer), reduce_channels="sum", interpolate="nearest")(x, target)
    assert torch.equal(nearest[:, :, ::2, ::2], layer.sum(1, keepdim=True))
    assert torch.equal(captum_explainer(Method(layer), interpolate=None)(x, target), layer)
    tokens = torch.rand(2, 7, 5)
    assert torch.equal(captum_explainer(Method(tokens), reduce_channels="sum")(torch.zeros(2, 7), target), tokens.sum(2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, {}), TypeError, r"method: expected an object with attribute\(inputs, target=...\), got int"),
        (
            (Method(1), {"steps": 3}),
            TypeError,
            r"steps: expected one of the arguments of attribute \(baselines, target, n_steps",
        ),
        ((Method(1), {"internal_batch_size": 3}), TypeError, "internal_batch_size: expected one of the arguments"),
        ((Method(1), {"internal_batch_size": 0}), ValueError, "internal_batch_size: expected a whole number of at least 1"),
        ((Method(1), {"reduce_channels": "mean"}), ValueError, "reduce_channels: expected 'sum' or None, got 'mean'"),
        ((Method(1), {"interpolate": "cubic"}), ValueError, "interpolate: expected one of bilinear, nearest or None"),
    ],
)
def test_captum_refusals(arguments: Any, error: type[Exception], message: str) -> None:
    method, options = arguments
    with pytest.raises(error, match=message):
        captum_explainer(method, **options)


def test_captum_refuses_what_is_no_map() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="method: expected maps of one input or layer, got 2 results"):
        captum_explainer(Method((x, x)))(x)
    with pytest.raises(TypeError, match="method: expected a tensor of maps, got int"):
        captum_explainer(Method(3))(x)


# ---- quantus ---------------------------------------------------------------------------------------------------------


def as_quantus_calls(explain_func: Any, model: Any, inputs: np.ndarray, targets: np.ndarray, **options: Any) -> np.ndarray:
    """The call and the checks of the metrics of Quantus."""
    maps = explain_func(model=model, inputs=inputs, targets=targets, **options)
    assert isinstance(maps, np.ndarray)
    assert maps.shape[0] == inputs.shape[0]
    return maps


def test_our_explainers_for_quantus() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    inputs, targets = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), np.array([0, 1, 2, 0, 1])
    inputs = inputs[::-1]  # a view with a negative stride
    before = inputs.copy()

    def explain(x: Tensor, target: Tensor) -> Tensor:
        assert x.dtype == torch.float64  # of the model
        assert target.dtype == torch.int64
        return x.mul_(model.weight[target])  # in place, and with a graph

    found = as_quantus_calls(quantus_explain_func(explain), model, inputs, targets, device="cpu", nr_samples=3)
    assert np.allclose(found, before * model.weight.detach().numpy()[targets])
    assert np.array_equal(inputs, before)
    half = quantus_explain_func(lambda x: x.to(torch.bfloat16))
    assert as_quantus_calls(half, None, inputs, targets).dtype == np.float32
    assert half(None, inputs, None).shape == (5, 4)


def test_explainers_made_for_the_model_that_quantus_hands_over() -> None:
    def make(model: nn.Linear) -> Any:
        return lambda x, target: x * model.weight[target]

    explain_func = quantus_explain_func(make, per_model=True)
    inputs, targets = np.ones((2, 4), dtype=np.float32), np.array([0, 1])
    for _ in range(2):
        model = nn.Linear(4, 3)
        found = as_quantus_calls(explain_func, model, inputs, targets)
        assert np.allclose(found, model.weight.detach().numpy()[targets])


def test_quantus_functions_as_explainers() -> None:
    model = nn.Linear(4, 3)
    seen = {}

    def explain_func(model: Any, inputs: np.ndarray, targets: np.ndarray, **kwargs: Any) -> np.ndarray:
        seen.update(kwargs, model=model, types=(type(inputs), type(targets)))
        inputs *= model.weight.detach().numpy()[targets]  # in place
        return inputs.astype(np.float64)

    explain = from_quantus(explain_func, model, nr_samples=3)
    x, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    before = x.clone()
    found = explain(x, target)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, before * model.weight.detach()[target])
    assert torch.equal(x, before)
    assert seen == {"nr_samples": 3, "model": model, "types": (np.ndarray, np.ndarray)}
    study = run_study({"theirs": explain}, model, x, measures=["deletion", "sensitivity"])
    assert not study.notes
    # There and back.
    again = quantus_explain_func(explain)(model, before.numpy(), target.numpy())
    assert np.allclose(again, found)


def test_quantus_refusals() -> None:
    with pytest.raises(TypeError, match="explainer: expected a callable"):
        quantus_explain_func(3)
    with pytest.raises(TypeError, match="explainer: expected a function of the model, got int"):
        quantus_explain_func(3, per_model=True)
    with pytest.raises(TypeError, match=r"explainer: expected it to return a torch.Tensor, got ndarray"):
        quantus_explain_func(lambda x: x.numpy())(None, np.ones((1, 2)), np.array([0]))
    with pytest.raises(TypeError, match="explain_func: expected a callable, got int"):
        from_quantus(3, None)
    with pytest.raises(TypeError, match="explain_func: expected an array of numbers, got dtype object"):
        from_quantus(lambda model, inputs, targets: None, None)(torch.ones(1, 2))


def test_captum_takes_one_tensor() -> None:
    x = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"inputs: expected a torch.Tensor, got tuple"):
        captum_explainer(Method(lambda z: z))((x, x))  # type: ignore[arg-type]
