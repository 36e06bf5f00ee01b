"""Attacks on explanations: constraints, effect, determinism; and explanations that can be attacked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.metrics.attacked import EPSILON, METHODS, SIZE, attack, cnn, corner, images, mass_in_corner, mlp
from xai_fast.metrics import robustness, similarity
from xai_fast.metrics._softplus import softplus_relu
from xai_fast.metrics.explainers import (
    Explainer,
    gradient_explanation,
    gradient_times_input,
    integrated_gradients,
)
from xai_fast.metrics.robustness import AttackResult, attack_explanation

# Constraints


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [cnn, mlp])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_result_keeps_the_constraints(build: Callable[[], nn.Module], method: str, dtype: torch.dtype) -> None:
    model, x = build().to(dtype), images().to(dtype)
    before, state = x.clone(), copy.deepcopy(model.state_dict())
    result = attack(model, x, method=method, clamp=(0, 1), steps=15)
    assert result.inputs.dtype == x.dtype
    assert (result.inputs.double() - x.double()).abs().max() <= EPSILON
    assert result.inputs.min() >= 0
    assert result.inputs.max() <= 1
    with torch.no_grad():
        scores, original = model(result.inputs), model(x)
    assert scores.argmax(1).equal(original.argmax(1))
    assert result.prediction.equal(original.argmax(1))
    assert result.succeeded.all()
    # What is reported is that of the unchanged network.
    explain = gradient_explanation(model, magnitude=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(result.attributions, explain(x), **tolerance)
    torch.testing.assert_close(result.perturbed_attributions, explain(result.inputs), **tolerance)
    pair = result.attributions, result.perturbed_attributions
    assert result.top_k_intersection.equal(similarity.top_k_intersection(*pair, 25))
    assert result.rank_correlation.equal(similarity.rank_correlation(*pair))
    assert result.centre_shift is not None
    assert result.centre_shift.equal(similarity.centre_shift(*pair))
    for confidence, of in ((result.confidence_before, original), (result.confidence_after, scores)):
        assert confidence is not None
        torch.testing.assert_close(confidence, of.softmax(1).gather(1, result.prediction[:, None])[:, 0])
    # And nothing else has changed.
    assert x.equal(before)
    assert all(p.grad is None for p in model.parameters())
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_the_prediction_is_a_constraint() -> None:
    """A model on the brink: most of the ball has another class, which the attack must not return."""
    model, x = cnn(), images(8)
    with torch.no_grad():
        scores = model(x)
    margin = scores.topk(2).values.diff(dim=1)
    brink = nn.Sequential(model, Shift(scores - scores.gather(1, scores.topk(2).indices)[:, 1:] - 1e-4 * margin.abs()))
    with torch.no_grad():
        kept = (brink(x + EPSILON * torch.randn_like(x).sign()).argmax(1) == brink(x).argmax(1)).double().mean()
    assert kept < 0.9
    for method in METHODS:
        result = attack(brink, x, method=method)
        with torch.no_grad():
            assert brink(result.inputs).argmax(1).equal(brink(x).argmax(1))
        lost = ~result.succeeded
        assert result.inputs[lost].equal(x[lost])
        assert result.top_k_intersection[lost].eq(1).all()
        assert result.perturbed_attributions[lost].equal(result.attributions[lost])


class Shift(nn.Module):
    """Scores whose two largest are almost equal at the inputs of the test."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift.clamp_min(0)

    def forward(self, scores: Tensor) -> Tensor:
        return scores - self.shift


def test_gradients_of_parameters_and_training_mode_are_left_alone() -> None:
    model, x = mlp().train(), images()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x.requires_grad_()
    with torch.no_grad():  # the attack needs gradients, whatever the caller's mode
        result = attack(model, x, steps=3)
        assert not torch.is_grad_enabled()
    assert result.succeeded.any()
    assert all(p.grad is not None and p.grad.eq(1).all() and p.requires_grad for p in model.parameters())
    assert x.grad is None
    assert model.training
    assert not result.inputs.requires_grad
    assert not result.perturbed_attributions.requires_grad


# Effect


@pytest.mark.parametrize(("build", "beta"), [(cnn, 100.0), (mlp, 20.0)])
def test_attacks_beat_random_noise(build: Callable[[], nn.Module], beta: float) -> None:
    """Each raises what it climbs on, far more than the best of as many random draws picked by the same measure."""
    model, x = build(), images(6)
    options = {"steps": 40, "n_candidates": 40, "softplus_beta": beta}
    top_k = attack(model, x, method="top_k", **options)
    noise = attack(model, x, method="random", **options)
    assert top_k.top_k_intersection.mean() < noise.top_k_intersection.mean() - 0.2
    assert top_k.top_k_intersection.mean() < 0.35

    centre = attack(model, x, method="mass_centre", **options)
    noise = attack(model, x, method="random", measure="mass_centre", **options)
    assert centre.centre_shift is not None
    assert noise.centre_shift is not None
    assert (centre.centre_shift > noise.centre_shift).all()
    assert centre.centre_shift.mean() > 1.5 * noise.centre_shift.mean()

    target = attack(model, x, method="target", **options)
    noise = attack(model, x, method="random", measure="target", **options)
    gain = (mass_in_corner(target.perturbed_attributions) - mass_in_corner(target.attributions)).mean()
    by_noise = (mass_in_corner(noise.perturbed_attributions) - mass_in_corner(noise.attributions)).mean()
    assert by_noise > 0
    assert gain > 2 * by_noise


@pytest.mark.parametrize("explain", [gradient_times_input, integrated_gradients])
def test_other_explanations_can_be_attacked(explain: Callable[..., Explainer]) -> None:
    model, x = mlp(), images(2)
    result = attack(model, x, explain(model), epsilon=0.1)
    assert result.succeeded.all()
    assert result.attributions.shape == x.shape
    noise = attack(model, x, explain(model), method="random", epsilon=0.1)
    assert result.top_k_intersection.mean() < noise.top_k_intersection.mean()


def test_restarts_and_steps_help() -> None:
    model, x = mlp(), images()

    def left(**options: Any) -> Tensor:
        result = attack(model, x, generator=torch.Generator().manual_seed(3), **options)
        mass = result.perturbed_attributions.flatten(1)
        top = result.attributions.flatten(1).topk(25).indices
        return mass.gather(1, top).sum(1) / mass.sum(1)

    assert (left(steps=30) < left(steps=1)).all()
    one, three = left(), left(restarts=3)
    assert (three <= one).all()
    assert (three < one).any()


@pytest.mark.parametrize("method", METHODS)
def test_one_step_and_one_sample(method: str) -> None:
    result = attack(mlp(), images(1), method=method, steps=1, n_candidates=1, step_size=0.01)
    assert result.inputs.shape == (1, 2, SIZE, SIZE)
    if method != "random":
        assert result.steps == 1
        assert result.succeeded.all()
        moves = (result.inputs - images(1)).abs()
        assert moves.max() <= 0.01 + 1e-12


def test_default_step_reaches_the_border_in_one_step() -> None:
    result = attack(mlp(), images(1), steps=1)
    torch.testing.assert_close((result.inputs - images(1)).abs().max().item(), EPSILON)


def test_tables_features_and_one_output() -> None:
    """Features (B, n) have no centre; a model with one number a sample has no softmax: its sign is the prediction."""
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1)).double()
    x = torch.randn(7, 12, dtype=torch.float64)
    for forward in (net, lambda x: net(x)[:, 0]):
        result = attack(forward, x, gradient_explanation(forward), epsilon=0.3, softplus_beta=5.0, k=3)
        assert result.centre_shift is None
        assert result.confidence_before is None
        assert result.confidence_after is None
        assert result.prediction.equal((net(x)[:, 0] > 0).long())
        assert result.prediction.equal((net(result.inputs)[:, 0] > 0).long())
        assert 0 < result.prediction.sum() < 7
        assert result.succeeded.all()


def test_target_of_the_explanation() -> None:
    """A target per sample is cut with the batch; None is the class of the original inputs, in the twin as well."""
    model, x = mlp(), images()
    targets = torch.tensor([0, 3, 1, 1])
    whole = attack(model, x, gradient_explanation(model, targets))
    parts = attack(model, x, gradient_explanation(model, targets), batch_size=3)
    torch.testing.assert_close(whole.inputs, parts.inputs)
    torch.testing.assert_close(whole.attributions, gradient_explanation(model, targets)(x))
    with torch.no_grad():
        predicted = model(x).argmax(1)
    given = attack(model, x, gradient_explanation(model, predicted))
    assert attack(model, x, gradient_explanation(model)).inputs.equal(given.inputs)
    with pytest.raises(ValueError, match=r"^target: expected shape \(4,\), got \(3,\)"):
        attack(model, x, gradient_explanation(model, targets[:3]))
    with pytest.raises(ValueError, match=r"^target: expected classes from 0 to 3, got 0 to 4"):
        attack(model, x, gradient_explanation(model, torch.tensor([0, 4, 0, 0])))


def test_target_map_shapes() -> None:
    model, x = mlp(), images(2)
    first = attack(model, x, method="target", target_map=corner().bool())
    assert attack(model, x, method="target", target_map=corner().expand(2, SIZE, SIZE)).inputs.equal(first.inputs)
    signed = gradient_explanation(model)
    one = attack(model, x, signed, method="target", target_map=corner())
    other = attack(model, x, signed, method="target", target_map=corner().expand(2, 2, SIZE, SIZE).double())
    assert one.inputs.equal(other.inputs)


# What cannot be attacked


def test_a_relu_network_needs_the_twin() -> None:
    with pytest.raises(ValueError, match=r"^explanation: expected maps with a derivative .* pass softplus_beta$"):
        attack(mlp(), images(), softplus_beta=None)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_smooth_network_needs_no_twin(method: str) -> None:
    """At the original map the distance of the centres has no gradient: the first step must find a way all the same."""
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIZE * SIZE, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    result = attack(smooth, images(), softplus_beta=None, method=method, epsilon=0.2)
    assert result.succeeded.all()
    noise = attack(smooth, images(), method="random", measure=method, epsilon=0.2)
    if method == "mass_centre":
        assert result.centre_shift is not None
        assert noise.centre_shift is not None
        assert (result.centre_shift > 2 * noise.centre_shift).all()


@pytest.mark.parametrize("beta", [None, 10.0])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_the_gradient_of_a_linear_model_cannot_be_attacked(beta: float | None, batch_size: int | None) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIZE * SIZE, 3)).double()
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        for method in METHODS[1:]:
            with pytest.raises(ValueError, match=r"^explanation: expected maps with a derivative by the inputs, got zero"):
                attack(model, images(), method=method, softplus_beta=beta, batch_size=batch_size)
    result = attack(model, images(), method="random")
    assert not result.succeeded.any()
    assert result.inputs.equal(images())
    x = images()
    attack(model, x, method="random").inputs.zero_()  # a copy also where it is the input itself
    assert x.equal(images())
    assert result.summary()["succeeded"] == 0


def test_a_map_without_a_graph_cannot_be_attacked_but_by_noise() -> None:
    model, x = mlp(), images()

    def plain(x: Tensor) -> Tensor:
        return gradient_explanation(model)(x.detach())

    with pytest.raises(ValueError, match=r"^explanation: expected maps with a derivative .* carry a graph"):
        attack(model, x, plain)
    assert attack(model, x, plain, method="random").succeeded.all()


def test_a_sample_with_a_zero_map_is_left_out() -> None:
    """Dead units: no derivative and no centre of mass at one sample, which must not disturb the others."""
    model, x = mlp(), images(3)
    alive = attack(model, x[1:])

    def forward(x: Tensor) -> Tensor:
        return model(x) * (x.flatten(1)[:, :1] < 5)  # a constant 0 where the first entry is large

    x[0, 0, 0, 0] = 9.0
    for method in METHODS:
        result = attack(forward, x, gradient_explanation(forward, magnitude=True), method=method)
        assert result.attributions[0].eq(0).all()
        assert result.succeeded.tolist() == [False, True, True]
        assert result.inputs[0].equal(x[0])
        assert result.inputs.isfinite().all()
        if method == "top_k":
            torch.testing.assert_close(result.inputs[1:], alive.inputs)
    assert math.isfinite(result.summary()["rank_correlation"])  # the mean leaves out NaN
    x[:, 0, 0, 0] = 9.0
    for method in METHODS[1:]:
        with pytest.raises(ValueError, match=r"^explanation: expected maps with a derivative"):
            attack(forward, x, gradient_explanation(forward, magnitude=True), method=method)


def test_a_callable_of_the_user() -> None:
    """It is called with inputs that require grad, so that torch.autograd.grad works in it."""
    model, x = mlp(), images()

    def explain(x: Tensor) -> Tensor:
        return torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)[0]

    with torch.no_grad():
        mine = attack(model, x, explain)
    theirs = attack(model, x, gradient_explanation(model, 0))
    torch.testing.assert_close(mine.inputs, theirs.inputs)


# Determinism


@pytest.mark.parametrize("method", METHODS)
def test_batch_size_and_seed(method: str) -> None:
    model, x = cnn(), images(5)

    def run(seed: int, batch_size: int | None = None) -> AttackResult:
        generator = torch.Generator().manual_seed(seed)
        return attack(model, x, method=method, batch_size=batch_size, generator=generator, restarts=2)

    whole = run(0)
    assert run(0).inputs.equal(whole.inputs)
    assert not run(1).inputs.equal(whole.inputs)
    for batch_size in (1, 2, 5, 9):
        parts = run(0, batch_size)
        torch.testing.assert_close(parts.inputs, whole.inputs, rtol=0, atol=1e-12)
        torch.testing.assert_close(parts.perturbed_attributions, whole.perturbed_attributions)
        assert parts.succeeded.equal(whole.succeeded)
        assert parts.summary() == pytest.approx(whole.summary())


def test_torch_seed_is_the_default() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(attack(mlp(), images(), method="random").inputs)
    assert results[0].equal(results[1])
    state = torch.get_rng_state()
    attack(mlp_of_now := mlp(), images(), method="random", generator=torch.Generator().manual_seed(0))
    torch.set_rng_state(state)
    attack(mlp_of_now, images(), method="random", generator=torch.Generator().manual_seed(0))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_inside(dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), images().to(dtype)
    for method in METHODS:
        result = attack(model, x, method=method, steps=50, epsilon=0.0123, clamp=(0.0, x.max().item()))
        assert result.inputs.dtype == dtype
        assert (result.inputs.double() - x.double()).abs().max() <= 0.0123
        assert result.inputs.max() <= x.max()
        assert result.succeeded.any()
        assert model(result.inputs).argmax(1).equal(result.prediction)


def test_ball_is_rounded_inwards() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.rand(10000).to(dtype)
        lower, upper = robustness._ball(x, 0.011, (0.0, 1.0 + 1e-9))
        assert lower.to(dtype).to(lower.dtype).equal(lower)
        assert (x.double() - lower.double()).max() <= 0.011
        assert (upper.double() - x.double()).max() <= 0.011
        assert (lower <= x).all()
        assert (x <= upper).all()
        assert lower.min() >= 0
        assert upper.max() <= 1.0 + 1e-9


# Result and arguments


def test_table_and_summary() -> None:
    result = attack(cnn(), images(3))
    rows = result.table()
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert rows[1]["top_k_intersection"] == result.top_k_intersection[1].item()
    assert all(type(value) in (int, float, bool) for row in rows for value in row.values())
    summary = result.summary()
    assert summary["method"] == "top_k"
    assert summary["samples"] == 3
    assert summary["steps"] == 20
    assert summary["k"] == 25
    assert summary["rank_correlation"] == pytest.approx(sum(row["rank_correlation"] for row in rows) / 3)
    assert set(summary) >= set(rows[0]) - {"sample", "prediction"}


def _bad_explanation(x: Tensor) -> Tensor:
    return x.sum()


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"explanation": 3}, TypeError, "explanation"),
        ({"explanation": _bad_explanation}, ValueError, "explanation"),
        ({"explanation": lambda x: x.flatten(1), "method": "mass_centre"}, ValueError, "explanation"),
        ({"forward": None}, TypeError, "forward"),
        ({"forward": lambda x: x}, ValueError, "forward"),
        ({"inputs": [1.0]}, TypeError, "inputs"),
        ({"inputs": torch.ones(2, 3).long()}, TypeError, "inputs"),
        ({"inputs": torch.ones(0, 2, SIZE, SIZE)}, ValueError, "inputs"),
        ({"method": "best"}, ValueError, "method"),
        ({"measure": "top_k"}, ValueError, "measure"),
        ({"method": "random", "measure": "random"}, ValueError, "measure"),
        ({"epsilon": 0.0}, ValueError, "epsilon"),
        ({"epsilon": "1"}, TypeError, "epsilon"),
        ({"steps": 0}, ValueError, "steps"),
        ({"restarts": 0}, ValueError, "restarts"),
        ({"n_candidates": 1.5}, TypeError, "n_candidates"),
        ({"step_size": -1.0}, ValueError, "step_size"),
        ({"k": 0}, ValueError, "k"),
        ({"k": 2 * SIZE * SIZE}, ValueError, "k"),
        ({"softplus_beta": 0.0}, ValueError, "softplus_beta"),
        ({"clamp": 1.0}, TypeError, "clamp"),
        ({"clamp": (0.5, 1.0)}, ValueError, "clamp"),
        ({"clamp": (1.0, 0.0)}, ValueError, "clamp"),
        ({"generator": 1}, TypeError, "generator"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"method": "target"}, ValueError, "target_map"),
        ({"target_map": torch.ones(SIZE, SIZE)}, ValueError, "target_map"),
        ({"method": "target", "target_map": 1.0}, TypeError, "target_map"),
        ({"method": "target", "target_map": torch.ones(3, 3)}, ValueError, "target_map"),
        ({"method": "target", "target_map": -torch.ones(SIZE, SIZE)}, ValueError, "target_map"),
        ({"method": "target", "target_map": torch.zeros(SIZE, SIZE)}, ValueError, "target_map"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], name: str) -> None:
    model = mlp()
    arguments = {"explanation": gradient_explanation(model), "forward": model, "inputs": images(2), "epsilon": 0.1}
    with pytest.raises(error, match=rf"^{name}\b.*: expected .*, got ") as raised:
        attack_explanation(**{**arguments, "softplus_beta": 5.0, "steps": 2, **change})
    assert "\n" not in str(raised.value)


def test_errors_of_the_explainers() -> None:
    with pytest.raises(TypeError, match=r"^forward: expected a callable, got int"):
        gradient_explanation(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^magnitude: expected a bool, got str"):
        gradient_times_input(mlp(), magnitude="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^baseline: expected a number, got str"):
        integrated_gradients(mlp(), baseline="black")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^n_steps: expected a whole number of at least 1, got 0"):
        integrated_gradients(mlp(), n_steps=0)
    with pytest.raises(ValueError, match=r"^baseline: expected shape \(2, 16, 16\), got \(3,\)"):
        integrated_gradients(mlp(), baseline=torch.zeros(3))(images())


@pytest.mark.parametrize("method", ["random", "top_k"])
def test_outputs_with_nan_are_no_prediction_to_keep(method: str) -> None:
    model, x = mlp(), images()

    def broken(z: Tensor) -> Tensor:
        first = (z[:, 0] - x[0, 0]).abs().flatten(1).amax(1) < 2 * EPSILON
        return model(z).masked_fill(first[:, None], math.nan)

    result = attack(model, x, method=method), attack_explanation(
        gradient_explanation(model, target=1, magnitude=True), broken, x, method=method, epsilon=EPSILON, steps=20,
        n_candidates=20, softplus_beta=50.0, k=25,
    )  # fmt: skip
    assert result[1].succeeded.tolist() == [False, True, True, True]
    assert result[1].prediction[0] == -1
    assert result[1].prediction[1:].tolist() == result[0].prediction[1:].tolist()
    assert result[1].confidence_before.isnan().tolist() == [True, False, False, False]
    single = attack_explanation(lambda z: z * z, lambda z: z.sum((1, 2, 3)) * math.nan, x, method="random", epsilon=EPSILON)
    assert not single.succeeded.any()
    assert single.prediction.tolist() == [-1] * 4


# Explainers


def test_explainers_by_definition() -> None:
    model, x = mlp(), images()
    with torch.no_grad():
        target = model(x).argmax(1)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)
    torch.testing.assert_close(gradient_explanation(model)(x), expected)
    torch.testing.assert_close(gradient_explanation(model, magnitude=True)(x), expected.abs().sum(1))
    torch.testing.assert_close(gradient_times_input(model)(x), expected * x)
    with torch.no_grad():
        assert not gradient_explanation(model)(leaf).requires_grad
        baseline = torch.rand(2, SIZE, SIZE, dtype=torch.float64)
        maps = integrated_gradients(model, 2, baseline=baseline, n_steps=400)(x)
        gap = (model(x) - model(baseline.expand_as(x)))[:, 2]
    torch.testing.assert_close(maps.flatten(1).sum(1), gap, rtol=0, atol=2e-4)
    flat = x.flatten(1)  # the midpoint rule is exact for a gradient linear in x
    torch.testing.assert_close(integrated_gradients(torch.square, 3, n_steps=1)(flat)[:, 3], flat[:, 3] ** 2)


@pytest.mark.parametrize("explain", [gradient_explanation, gradient_times_input, integrated_gradients])
def test_second_derivatives(explain: Callable[..., Explainer]) -> None:
    """A graph exactly where x requires grad; its derivative is right by finite differences."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert not explain(net, 1)(x).requires_grad
    x.requires_grad_()
    with softplus_relu(3.0):
        assert torch.autograd.gradcheck(explain(net, 1), x)
    assert all(p.grad is None for p in net.parameters())
