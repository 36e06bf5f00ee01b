"""What holds for every measure: inputs are left as they were, strides and gradients do not matter, half precision works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.metrics.models import classifier
from xai_fast import metrics
from xai_fast.metrics import _forwards

B, F, C = 4, 6, 3


def wide(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x.double())


MODEL = wide(classifier(F, C))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Name to a call on a model, inputs (B,F), attributions (B,F) and labels (B,).
CALLS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Any]] = {
    "fidelity": lambda f, x, a, y: metrics.fidelity(f, x, a, y, form="probability").fid_plus,
    "fidelity, phenomenon": lambda f, x, a, y: metrics.fidelity(f, x, a, y, kind="phenomenon").fid_minus,
    "fidelity, soft": lambda f, x, a, y: metrics.fidelity(f, x, a.sigmoid(), soft=True, form="probability").fid_plus,
    "fidelity, robust": lambda f, x, a, y: (
        metrics.fidelity(f, x, a, robust=True, form="probability", generator=seeded()).fid_plus
    ),
    "deletion_curve": lambda f, x, a, y: metrics.deletion_curve(f, x, a).area,
    "insertion_curve": lambda f, x, a, y: metrics.insertion_curve(f, x, a, y, baseline="mean").area,
    "faithfulness_correlation": lambda f, x, a, y: metrics.faithfulness_correlation(f, x, a, generator=seeded()),
    "feature_correlation": lambda f, x, a, y: metrics.feature_correlation(f, x, a, similarity="spearman"),
    "monotonicity": lambda f, x, a, y: metrics.monotonicity(f, x, a),
    "infidelity": lambda f, x, a, y: metrics.infidelity(f, x, a, generator=seeded()),
    "sensitivity": lambda f, x, a, y: (
        metrics.sensitivity(lambda z: z * z, f, x, radius=0.3, n_samples=5, generator=seeded()).mean
    ),
    "sensitivity_max": lambda f, x, a, y: metrics.sensitivity_max(lambda z: z * z, x, generator=seeded()),
    "relative_performance_loss": lambda f, x, a, y: metrics.relative_performance_loss(f, x, y, [[0], [1, 2]]).relative_loss,
}


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(B, F).to(dtype), torch.randn(B, F).to(dtype), torch.randint(C, (B,))


def result(name: str, *arguments: Tensor, model: Any = MODEL) -> Tensor:
    found = CALLS[name](model, *arguments)
    assert isinstance(found, Tensor)
    assert not found.requires_grad
    return found.double()


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_left_as_they_were(name: str) -> None:
    arguments = data()
    before = [t.clone() for t in arguments]
    versions = [t._version for t in arguments]
    result(name, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert [t._version for t in arguments] == versions


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_works_in_place_does_not_reach_the_inputs(name: str) -> None:
    x, a, y = data(torch.float64)
    before = x.clone()
    found = result(name, x, a, y, model=lambda z: MODEL(z.mul_(0.5)))
    assert torch.equal(x, before)
    torch.testing.assert_close(found, result(name, x, a, y, model=lambda z: MODEL(z * 0.5)), equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_returns_one_buffer_again_and_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As models in a CUDA graph do: the next chunk must not change the outputs that are kept."""
    monkeypatch.setattr(_forwards, "CPU_BYTES", 1)
    monkeypatch.setattr(_forwards, "CPU_LEAST", 1)
    arguments = data(torch.float64)
    sizes: set[int] = set()

    def buffered(model: Any) -> Callable[[Tensor], Tensor]:
        buffers: dict[torch.Size, Tensor] = {}

        def forward(z: Tensor) -> Tensor:
            sizes.add(len(z))
            found = model(z)
            return buffers.setdefault(found.shape, torch.empty_like(found)).copy_(found)

        return forward

    models = [MODEL]
    if name not in ("sensitivity", "relative_performance_loss", "insertion_curve") and "fidelity" not in name:
        models.append(lambda z: MODEL(z)[:, 0])  # one output a sample
    for model in models:
        found = result(name, *arguments, model=buffered(model))
        torch.testing.assert_close(found, result(name, *arguments, model=model), equal_nan=True)
    assert sizes <= {1}


@pytest.mark.parametrize("name", CALLS)
def test_strides_and_gradients_do_not_matter(name: str) -> None:
    x, a, y = data()
    wanted = result(name, x, a, y)
    sparse = torch.zeros(2 * B, 3 * F)
    sparse[::2, 1::3] = x
    strided = sparse[::2, 1::3].requires_grad_()
    transposed = a.t().contiguous().t().requires_grad_()
    torch.testing.assert_close(result(name, strided, transposed, y), wanted, equal_nan=True)
    torch.testing.assert_close(result(name, x, a, y), wanted, equal_nan=True)  # and again


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    x, a, y = data(dtype)
    found = result(name, x, a, y)
    wanted = result(name, x.double(), a.double(), y)
    # Inputs that are made, not chosen, are rounded to the dtype of the inputs.
    made = ("infidelity", "sensitivity", "sensitivity_max", "insertion_curve", "fidelity, soft")
    loose = dtype.itemsize == 2 and name in made
    torch.testing.assert_close(found, wanted, rtol=0.5 if loose else 1e-5, atol=0.05 if loose else 1e-5, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_one(name: str) -> None:
    x, a, y = data()
    found = result(name, x[:1], a[:1], y[:1])
    assert found.numel() >= 1
    if name in ("deletion_curve", "feature_correlation", "monotonicity"):
        torch.testing.assert_close(found, result(name, x, a, y)[:1])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
def test_constant_maps(name: str, value: float) -> None:
    x, a, y = data()
    found = result(name, x, torch.full_like(a, value), y)
    assert found.isnan().all() if "correlation" in name else found.isfinite().all()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "relative_performance_loss"])
def test_one_feature(name: str) -> None:
    x, y = torch.tensor([[0.5], [-2.0]], dtype=torch.float64), torch.tensor([0, 2])
    found = result(name, x, x, y, model=wide(classifier(1, C)))
    assert found.isnan().all() if "correlation" in name else found.isfinite().all()


# Name to a call with a memory budget.
BOUNDED: dict[str, Callable[[Any, Tensor, Tensor, Tensor, int], Any]] = {
    "fidelity": lambda f, x, a, y, m: metrics.fidelity(f, x, a, memory_budget=m),
    "deletion_curve": lambda f, x, a, y, m: metrics.deletion_curve(f, x, a, memory_budget=m),
    "faithfulness_correlation": lambda f, x, a, y, m: metrics.faithfulness_correlation(f, x, a, memory_budget=m),
    "infidelity": lambda f, x, a, y, m: metrics.infidelity(f, x, a, memory_budget=m),
    "sensitivity": lambda f, x, a, y, m: metrics.sensitivity(lambda z: z * z, f, x, radius=0.1, memory_budget=m),
    "relative_performance_loss": lambda f, x, a, y, m: metrics.relative_performance_loss(
        f, x, y, [[0], [1]], memory_budget=m
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_changed_inputs_stay_within_the_budget(name: str) -> None:
    x, a, y = data()
    budget = 10 * F * x.element_size()
    seen = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.numel() * z.element_size())
        return MODEL(z)

    BOUNDED[name](watched, x, a, y, budget)
    assert max(seen) <= budget
    assert len(seen) > 2
