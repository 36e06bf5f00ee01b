"""Sensitivity against its definition, drawn one perturbation at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metrics.models import classifier
from xai_fast.metrics import gradient_explanation, integrated_gradients, sensitivity, sensitivity_max
from xai_fast.metrics.study import StudyContext, run_study
from xai_fast.ops import perturb

B, F, C, RADIUS, ROUNDS = 6, 5, 3, 0.8, 40


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data() -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    model = classifier(F, C)

    def explain(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).amax(1).sum(), x)[0]

    return model, explain, torch.randn(B, F, dtype=torch.float64)


def distances(model: Any, explain: Any, x: Tensor, ball: str, seed: int) -> list[list[float]]:
    """For every sample: the distances of the perturbations that keep its class."""
    accepted: list[list[float]] = [[] for _ in range(B)]
    for i in range(B):
        for draw in range(ROUNDS):
            z = perturb(x, sample=torch.tensor([i]), draw=torch.tensor([draw]), radius=RADIUS, ball=ball, seed=seed)
            if model(z).argmax() == model(x[i : i + 1]).argmax():
                accepted[i].append(float((explain(z) - explain(x[i : i + 1])).norm()))
    return accepted


@pytest.mark.parametrize(("norm_ord", "ball"), [(2, "l2"), (math.inf, "linf")])
@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_is_the_definition(norm_ord: float, ball: str, batch_size: int | None) -> None:
    model, explain, x = data()
    found = sensitivity(
        explain, model, x, radius=RADIUS, n_samples=ROUNDS, norm_ord=norm_ord, generator=seeded(3), batch_size=batch_size
    )
    seed = int(torch.randint(2**62, (1,), generator=seeded(3)))
    wanted = distances(model, explain, x, ball, seed)
    assert found.accepted.tolist() == [len(w) for w in wanted]
    assert 0 < sum(len(w) for w in wanted) < B * ROUNDS  # some are rejected
    for i, values in enumerate(wanted):
        d = torch.tensor(values, dtype=torch.float64)
        assert float(found.max[i]) == pytest.approx(float(d.max()))
        assert float(found.mean[i]) == pytest.approx(float(d.mean()))
        assert float(found.standard_error[i]) == pytest.approx(float(d.std() / len(d) ** 0.5))
    assert found.explanations == B + sum(len(w) for w in wanted)
    assert found.evaluations == B * (ROUNDS + 1)


def test_nothing_accepted_is_nan() -> None:
    def forward(x: Tensor) -> Tensor:
        """The class is whether the sample is the one it was."""
        same = (x == 1).all(1, keepdim=True).double()
        return torch.cat([same, 1 - same], 1)

    found = sensitivity(lambda x: x, forward, torch.ones(2, 3), radius=0.1, n_samples=5)
    assert found.accepted.tolist() == [0, 0]
    assert all(values.isnan().all() for values in (found.max, found.mean, found.standard_error))
    assert found.explanations == 2


def test_distances_and_relative() -> None:
    model, _, x = data()
    options: dict[str, Any] = {"radius": 0.1, "n_samples": 20}
    found = {
        name: sensitivity(lambda x: 3 * x, model, x, generator=seeded(), distance=name, **options)
        for name in ("l2", "l1", "linf")
    }
    assert bool((found["l2"].max <= 0.3).all())
    assert bool((found["linf"].max < found["l2"].max).all())
    assert bool((found["l2"].max < found["l1"].max).all())
    own = sensitivity(lambda x: 3 * x, model, x, generator=seeded(), distance=lambda a, b: (a - b).norm(dim=1), **options)
    torch.testing.assert_close(own.max, found["l2"].max)
    relative = sensitivity(lambda x: 3 * x, model, x, generator=seeded(), relative=True, **options)
    torch.testing.assert_close(relative.mean, found["l2"].mean / (3 * x).norm(dim=1))
    zero = sensitivity(lambda x: 0 * x, model, x, generator=seeded(), relative=True, **options)
    assert zero.max.eq(0).all()


def test_maps_of_another_shape_and_targets() -> None:
    model, _, x = data()
    asked = []

    def explain(x: Tensor, target: Tensor) -> Tensor:
        asked.append(target)
        return model(x).gather(1, target[:, None])

    found = sensitivity(explain, model, x, radius=RADIUS, n_samples=10, target=torch.arange(B) % C, batch_size=4)
    assert found.max.shape == (B,)
    assert torch.cat(asked[:2]).tolist() == [i % C for i in range(B)]


def test_same_noise_on_the_same_seed() -> None:
    model, explain, x = data()
    runs = [sensitivity(explain, model, x, radius=RADIUS, n_samples=9, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0].max, runs[1].max)
    assert not torch.equal(runs[0].max, runs[2].max)
    assert [set(row) for row in runs[0].table()] == [{"max", "mean", "standard_error", "accepted"}] * B


def test_bfloat16_inputs_keep_their_dtype() -> None:
    model, _, x = data()
    seen = []

    def explain(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    found = sensitivity(explain, lambda x: model(x.double()), x.bfloat16(), radius=0.5, n_samples=3)
    assert set(seen) == {torch.bfloat16}
    assert found.max.dtype == torch.float32


# ---- Captum's measure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm_ord", "p"), [("fro", 2), (1, 1), (math.inf, math.inf)])
def test_sensitivity_max(norm_ord: Any, p: float) -> None:
    _, explain, x = data()
    noise = torch.randn(B * 4, F, dtype=torch.float64) * 0.1
    rows = iter(noise.split(B))

    def shift(x: Tensor, radius: float) -> Tensor:
        assert radius == 0.5
        return x + next(rows)

    found = sensitivity_max(explain, x, shift, 0.5, 4, norm_ord, max_examples_per_batch=B)
    whole = explain(x)
    size = torch.linalg.vector_norm(whole, ord=p, dim=1)
    apart = [torch.linalg.vector_norm(explain(x + n) - whole, ord=p, dim=1) / size for n in noise.split(B)]
    torch.testing.assert_close(found, torch.stack(apart).amax(0))


def test_sensitivity_max_of_tuples_and_arguments() -> None:
    x, y = torch.rand(B, 3), torch.rand(B, 2, 2)
    scale, seen = torch.arange(1.0, B + 1), []

    def explain(inputs: tuple[Tensor, Tensor], target: Any, scale: Tensor, name: str, more: Any) -> tuple[Tensor, Tensor]:
        seen.append(target)
        assert scale.shape[0] == inputs[0].shape[0] == more[0].shape[0]
        assert more[1] == 7
        return inputs[0] * scale[:, None], inputs[1]

    found = sensitivity_max(
        explain, (x, y), target=[i % 2 for i in range(B)], scale=scale, name="a", more=(scale, 7), max_examples_per_batch=4
    )
    assert found.shape == (B,)
    assert found.gt(0).all()
    assert seen[:2] == [[0, 1, 0, 1], [0, 1]]


def test_sensitivity_max_default_noise_is_in_the_cube() -> None:
    x = torch.zeros(3, 4)
    seen = []

    def explain(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    first = sensitivity_max(explain, x, perturb_radius=0.25, n_perturb_samples=200, generator=seeded())
    drawn = torch.cat(seen[1:])
    assert drawn.abs().max() <= 0.25
    assert drawn.abs().max() > 0.24
    assert first.max() <= 0.5  # the norm of 4 entries, and g(x) = 0 is not divided by
    assert torch.equal(first, sensitivity_max(explain, x, perturb_radius=0.25, n_perturb_samples=200, generator=seeded()))


def test_nan_is_no_prediction_that_could_be_kept() -> None:
    """Of the first sample and its neighbours, and of the neighbours of another one, of class 0 as the argmax of NaN is."""
    model, explain, x = data()
    other = int((model(x).argmax(1)[1:] == 0).nonzero()[0]) + 1

    def broken(z: Tensor) -> Tensor:
        apart, nearest = torch.cdist(z, x, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        return model(z).masked_fill(((nearest == 0) | (nearest == other) & (apart > 0))[:, None], math.nan)

    whole = sensitivity(explain, model, x, radius=RADIUS, n_samples=ROUNDS, generator=seeded())
    found = sensitivity(explain, broken, x, radius=RADIUS, n_samples=ROUNDS, generator=seeded())
    lost = [i in (0, other) for i in range(B)]
    assert found.max.isnan().tolist() == found.mean.isnan().tolist() == lost
    assert torch.equal(found.accepted, whole.accepted.masked_fill(torch.tensor(lost), 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius: expected a number above 0"),
        ({"n_samples": 0}, "n_samples: expected a whole number"),
        ({"norm_ord": 1}, "norm_ord: expected 2 or inf"),
        ({"distance": "cosine"}, "distance: expected one of"),
        ({"distance": lambda a, b: a, "relative": True}, "relative: expected False"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.int64)}, "inputs: expected a float32"),
        ({"explanation": lambda x: x[:1]}, "explanation: expected maps of shape"),
        ({"explanation": 3}, "explanation: expected a callable"),
        ({"forward": lambda x: x.sum(1)}, "forward: expected class scores"),
        ({"target": 9}, "target: expected classes"),
        ({"norm_ord": [2]}, r"norm_ord: expected 2 or inf, got \[2\]"),
        ({"distance": lambda a, b: (a - b).norm()}, r"distance: expected it to return one value a map, .* got shape \(\)"),
        ({"distance": lambda a, b: a - b}, "distance: expected it to return one value a map"),
        ({"distance": lambda a, b: 1.0}, "distance: .* got float"),
        ({"explanation": gradient_explanation(classifier(F, C), torch.zeros(2).long())}, r"target: expected shape \(6,\)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    model, explain, x = data()
    arguments = {"explanation": explain, "forward": model, "inputs": x, "radius": 1.0, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        sensitivity(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"explanation_func": None}, "explanation_func: expected a callable, got NoneType"),
        ({"inputs": ()}, "inputs: expected at least one tensor"),
        ({"inputs": (torch.ones(2, 3), torch.ones(3, 3))}, "inputs: expected tensors of one batch size"),
        ({"norm_ord": [1]}, r"norm_ord: expected 'fro', 1, 2 or inf, got \[1\]"),
        ({"norm_ord": True}, "norm_ord: expected 'fro', 1, 2 or inf, got True"),
        ({"max_examples_per_batch": 0}, "max_examples_per_batch: expected a whole number"),
    ],
)
def test_bad_input_of_sensitivity_max(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        sensitivity_max(**{"explanation_func": lambda x: x, "inputs": torch.ones(2, 3), **change})


# ---- the explainers of this package --------------------------------------------------------------------------------


@pytest.mark.parametrize("explainer", [gradient_explanation, integrated_gradients])
@pytest.mark.parametrize("target", [2, np.int64(2), torch.arange(B) % C, (torch.arange(B) % C).tolist()])
def test_explainers_keep_the_class(explainer: Any, target: Any) -> None:
    """Given here or when the explainer was made, for one class and for one of each sample, in any chunks."""
    model, _, x = data()
    classes = torch.as_tensor(target).expand(B)

    def wanted(z: Tensor, target: Tensor) -> Tensor:
        return explainer(model).maps(z, target)

    options: dict[str, Any] = {"radius": RADIUS, "n_samples": 5}
    expected = sensitivity(wanted, model, x, target=classes, generator=seeded(), **options)
    for batch_size in (None, 4):
        options["batch_size"] = batch_size
        handed = sensitivity(explainer(model), model, x, target=target, generator=seeded(), **options)
        made = sensitivity(explainer(model, target), model, x, generator=seeded(), **options)
        torch.testing.assert_close(handed.max, expected.max)
        torch.testing.assert_close(made.max, expected.max)
    as_captum: dict[str, Any] = {"generator": seeded(), "max_examples_per_batch": 4}
    expected_max = sensitivity_max(wanted, x, target=classes, **as_captum)
    for function, more in ((explainer(model), {"target": target}), (explainer(model, target), {})):
        as_captum["generator"] = seeded()
        torch.testing.assert_close(sensitivity_max(function, x, **as_captum, **more), expected_max)


def test_the_class_of_the_call_goes_first() -> None:
    model, _, x = data()
    assert torch.equal(gradient_explanation(model, 0)(x, 1), gradient_explanation(model, 1)(x))
    assert torch.equal(gradient_explanation(model, 0)(x, target=None), gradient_explanation(model, 0)(x))
    with pytest.raises(ValueError, match="target: expected classes from 0 to 2"):
        gradient_explanation(model)(x, C)


def own_maps(context: StudyContext) -> dict[str, Tensor]:
    return {"norm": context.attributions.norm(dim=1)}


def test_a_study_leaves_explainers_the_class_that_they_were_made_for() -> None:
    model, _, x = data()
    given = gradient_explanation(model, 0)
    study = run_study({"given": given, "free": gradient_explanation(model)}, model, x, target=1, measures={"maps": own_maps})
    norms = [given(x, target).norm(dim=1) for target in (0, 1)]
    assert not torch.equal(*norms)
    torch.testing.assert_close(study.per_sample("given", "norm"), norms[0])
    torch.testing.assert_close(study.per_sample("free", "norm"), norms[1])
