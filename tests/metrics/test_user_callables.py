"""Models, explanations and other callables of the user's that write to what they get, or return one buffer at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xai_fast import metrics
from xai_fast._copies import unshared
from xai_fast.metrics.explainers import Explainer
from xai_fast.metrics.study import StudyContext, run_study

B, F, C = 5, 6, 3
EXPLAINERS = [metrics.gradient_explanation, metrics.gradient_times_input, metrics.integrated_gradients]


def models() -> tuple[nn.Module, nn.Module]:
    """One that begins in place, and its twin that does not."""
    torch.manual_seed(0)
    rest = nn.Sequential(nn.Linear(F, 8), nn.Tanh(), nn.Linear(8, C)).double()
    return nn.Sequential(nn.ReLU(inplace=True), rest).eval(), nn.Sequential(nn.ReLU(), rest).eval()


def data() -> Tensor:
    return torch.randn(B, F, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def squares(z: Tensor) -> Tensor:
    """An explanation that works in place."""
    return z.mul_(z) * 1


class OneBuffer:
    """A callable whose result is the same memory at every call."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.buffer = function, torch.empty(1000, F, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        found = self.function(x).detach()
        return self.buffer[: len(found), : found.shape[1]].copy_(found)


# ---- in place -----------------------------------------------------------------------------------------------------


def test_copies() -> None:
    leaf = torch.ones(2, requires_grad=True)
    shared = {"a": (leaf, [torch.ones(1).numpy()]), "b": "text"}
    copy = unshared(shared)
    assert copy["b"] == "text"
    assert copy["a"][0].requires_grad
    copy["a"][0].data.zero_()
    copy["a"][1][0][:] = 0
    assert leaf.tolist() == [1, 1]
    assert shared["a"][1][0] == 1


@pytest.mark.parametrize("explain", EXPLAINERS)
@pytest.mark.parametrize("target", [None, 1])
def test_explainers_of_a_model_that_begins_in_place(explain: Callable[..., Explainer], target: int | None) -> None:
    (rude, clean), x = models(), data()
    before = x.clone()
    torch.testing.assert_close(explain(rude, target)(x), explain(clean, target)(x))
    assert torch.equal(x, before)
    leaf = x.requires_grad_()
    slopes = [torch.autograd.grad(explain(model, target)(leaf).square().sum(), leaf)[0] for model in (rude, clean)]
    torch.testing.assert_close(slopes[0], slopes[1])
    assert torch.equal(x, before)
    Explainer(clean, lambda forward, x, target, create_graph: x.data.zero_(), 1)(x.detach())
    assert torch.equal(x, before)


@pytest.mark.parametrize("method", ["random", "top_k"])
@pytest.mark.parametrize("explain", EXPLAINERS)
def test_attacks_on_a_model_that_begins_in_place(explain: Callable[..., Explainer], method: str) -> None:
    x = data()
    before = x.clone()
    options: dict[str, Any] = {
        "method": method,
        "epsilon": 0.1,
        "steps": 5,
        "n_candidates": 5,
        "k": 2,
        "softplus_beta": 20.0,
    }
    found = [metrics.attack_explanation(explain(m), m, x, generator=seeded(), **options) for m in models()]
    assert torch.equal(x, before)
    torch.testing.assert_close(found[0].inputs, found[1].inputs)
    torch.testing.assert_close(found[0].perturbed_attributions, found[1].perturbed_attributions)


def test_attack_on_an_explanation_in_place() -> None:
    x, (_, model) = data(), models()
    before = x.clone()
    results = [
        metrics.attack_explanation(explain, model, x, method="random", epsilon=0.1, n_candidates=5, generator=seeded())
        for explain in (squares, torch.square)
    ]
    assert torch.equal(x, before)
    torch.testing.assert_close(results[0].inputs, results[1].inputs)


def test_smoothed_explanations() -> None:
    (rude, clean), x = models(), data()
    before = x.clone()
    found = metrics.lower_sensitivity(squares, x, k=2, predict=rude)(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(found, metrics.lower_sensitivity(torch.square, x, k=2, predict=clean)(x))


def test_sensitivity_explains_what_the_model_saw() -> None:
    (rude, clean), x, target = models(), data(), torch.arange(B) % C
    options: dict[str, Any] = {"radius": 0.3, "n_samples": 8, "target": target}

    def explain(z: Tensor, target: Tensor) -> Tensor:
        maps = z * (target[:, None] + 1)
        target.zero_()
        return maps

    found = [metrics.sensitivity(explain, m, x, generator=seeded(), **options) for m in (rude, clean)]
    torch.testing.assert_close(found[0].max, found[1].max)
    torch.testing.assert_close(found[0].mean, found[1].mean)
    assert target.tolist() == [0, 1, 2, 0, 1]


def test_what_goes_with_the_inputs_stays() -> None:
    x, shared, base = data(), torch.ones(F, dtype=torch.float64), torch.ones(1, F, dtype=torch.float64)
    (_, clean), before = models(), x.clone()

    def forward(z: Tensor, weight: Tensor) -> Tensor:
        return clean(z * weight.mul_(2))

    metrics.deletion_curve(forward, x, x, additional_forward_args=shared, batch_size=2)
    metrics.fidelity(clean, x, x, baseline=lambda z: z.zero_())
    metrics.infidelity(models()[0], x, x, lambda z, b: (z - b.mul_(2), x[:1].expand_as(z)), base, n_perturb_samples=1)
    metrics.sensitivity_max(lambda z, w: z * w.mul_(2), x, w=shared)
    metrics.sensitivity_max(squares, x, lambda z: x[torch.arange(len(z)) % B] if len(z) != B else x, n_perturb_samples=1)
    assert torch.equal(x, before)
    assert shared.tolist() == [1] * F
    assert base.tolist() == [[1] * F]


def test_explainers_of_a_study_may_write_to_the_classes() -> None:
    (_, clean), x, target = models(), data(), torch.arange(B) % C

    def rude(inputs: Tensor, target: Tensor, additional_forward_args: Any) -> Tensor:
        additional_forward_args[0].zero_()
        return inputs * target.zero_()[:, None]

    extra = torch.ones(B, 1, dtype=torch.float64)
    methods = {"rude": rude}
    run_study(methods, lambda z, e: clean(z) * e, x, target=target, measures=["conciseness"], additional_forward_args=extra)
    assert target.tolist() == [0, 1, 2, 0, 1]
    assert extra.unique().tolist() == [1]


def test_measures_of_ones_own_may_write_to_what_they_get() -> None:
    (_, clean), x, labels = models(), data(), torch.arange(B) % C
    before = x.clone(), labels.clone()

    def rude(context: StudyContext) -> dict[str, Tensor]:
        for given in (context.inputs, context.labels, context.target, context.attributions, *context.by_seed.values()):
            given.zero_()  # type: ignore[union-attr]
        return {"rude": context.attributions.sum(1)}

    found = run_study({"a": torch.square}, clean, x, labels, measures={"rude": rude, "deletion": {}})
    assert torch.equal(x, before[0])
    assert torch.equal(labels, before[1])
    wanted = metrics.deletion_curve(clean, x, x.square()).area
    torch.testing.assert_close(found.per_sample("a", "deletion_area"), wanted)


# ---- one buffer ---------------------------------------------------------------------------------------------------


def test_maps_in_one_buffer() -> None:
    x, (_, clean) = data(), models()
    model = OneBuffer(clean)
    attack: dict[str, Any] = {"method": "random", "epsilon": 0.1, "n_candidates": 5, "batch_size": 2}
    calls: dict[str, Callable[[Any, Any], Tensor]] = {
        "sensitivity": lambda f, g: metrics.sensitivity(g, f, x, radius=0.3, batch_size=2, generator=seeded()).mean,
        "sensitivity_max": lambda f, g: metrics.sensitivity_max(g, x, max_examples_per_batch=2, generator=seeded()),
        "lower_sensitivity": lambda f, g: metrics.lower_sensitivity(g, x, predict=f, k=2, batch_size=2)(x),
        "attack": lambda f, g: metrics.attack_explanation(g, f, x, generator=seeded(), **attack).inputs,
        "study": lambda f, g: run_study({"a": g}, f, x, measures=["deletion"], batch_size=2).per_sample(
            "a", "deletion_area"
        ),
    }
    for name, call in calls.items():
        wanted = call(clean, torch.square)
        torch.testing.assert_close(call(model, OneBuffer(torch.square)), wanted, msg=lambda m, name=name: f"{name}: {m}")
