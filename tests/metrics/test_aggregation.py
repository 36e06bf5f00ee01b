"""Aggregates against definitions, the promise on complexity, and the sensitivity of smoothed explanations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from xai_fast.metrics.aggregation import Aggregate, _walks, aggregate, lower_sensitivity
from xai_fast.metrics.sensitivity import Sensitivity, sensitivity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OBJECTIVES = ["mean", "median", "walk", "complexity"]
DESCENTS = ["walk", "complexity"]


def related_maps(explainers: int, batch: int, features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Signed maps that agree on what is large and contradict each other on what is small."""
    shared = torch.randn(1, batch, features, dtype=torch.float64) ** 3
    return (shared + 0.3 * torch.randn(explainers, batch, features, dtype=torch.float64)).to(dtype)


def unit_maps(a: Tensor, order: float = 1.0) -> Tensor:
    return a.double() / torch.linalg.vector_norm(a.double(), ord=order, dim=2, keepdim=True)


# Centroids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("explainers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_mean_and_median(dtype: torch.dtype, explainers: int, norm: str) -> None:
    a = related_maps(explainers, 3, 7, dtype)
    unit = unit_maps(a, {"l1": 1, "l2": 2}[norm])
    rounding = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for objective, expected in (("mean", unit.mean(0)), ("median", torch.from_numpy(np.median(unit.numpy(), 0)))):
        found = aggregate(a, objective=objective, norm=norm)
        assert found.attributions.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.attributions.double(), expected, **rounding)
        np.testing.assert_allclose(found.complexity, stats.entropy(expected.abs().numpy(), axis=1), rtol=1e-6, atol=1e-6)
        assert found.steps == 0
    singles = stats.entropy(a.double().abs().numpy(), axis=2).T
    np.testing.assert_allclose(found.complexities, singles, rtol=1e-6, atol=1e-6)


def test_centroids_have_the_least_distance() -> None:
    a = related_maps(5, 2, 6)
    unit = unit_maps(a)
    mean, median = (aggregate(a, objective=o).attributions for o in ("mean", "median"))
    for _ in range(50):
        other = 0.02 * torch.randn(2, 6, dtype=torch.float64)
        assert (((unit - mean) ** 2).sum((0, 2)) <= ((unit - mean - other) ** 2).sum((0, 2))).all()
        assert ((unit - median).abs().sum((0, 2)) <= (unit - median - other).abs().sum((0, 2)) + 1e-12).all()


def test_weights() -> None:
    a = related_maps(2, 3, 5)
    unit = unit_maps(a)
    found = aggregate(a, weights=[3, 1])
    torch.testing.assert_close(found.attributions, 0.75 * unit[0] + 0.25 * unit[1])
    assert found.weights is not None
    assert found.weights.tolist() == [[0.75, 0.25]] * 3
    own = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = aggregate(a, weights=own)
    torch.testing.assert_close(found.attributions, torch.stack([unit[0, 0], unit[1, 1], unit[:, 2].mean(0)]))


# Lower complexity


@pytest.mark.parametrize("objective", DESCENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("explainers", "features"), [(1, 5), (2, 1), (2, 9), (3, 40), (6, 20)])
def test_never_above_a_single_map(objective: str, dtype: torch.dtype, norm: str, explainers: int, features: int) -> None:
    a = related_maps(explainers, 4, features, dtype)
    found = aggregate(a, objective=objective, norm=norm)
    assert (found.complexity[:, None] <= found.complexities).all()
    recomputed = stats.entropy(found.attributions.double().abs().numpy(), axis=1)
    np.testing.assert_allclose(found.complexity, recomputed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", DESCENTS)
def test_falls_below_every_single_map_and_the_mean(objective: str) -> None:
    a = related_maps(4, 8, 60)
    found, mean = aggregate(a, objective=objective), aggregate(a)
    assert (found.complexity < found.complexities.amin(1) - 0.01).all()
    assert (found.complexity <= mean.complexity).all()
    assert found.steps > 0


def test_weights_reproduce_the_aggregate() -> None:
    a = related_maps(3, 5, 12)
    found = aggregate(a, objective="complexity")
    assert found.weights is not None
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.attributions, torch.einsum("bm,mbn->bn", found.weights, unit_maps(a)))


def test_about_as_good_as_a_search_of_the_simplex() -> None:
    a = related_maps(3, 10, 30)
    unit, found = unit_maps(a), aggregate(a, objective="complexity")
    draws = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((3000,))
    mixed = torch.einsum("km,mbn->kbn", draws, unit).abs().numpy()
    searched = stats.entropy(mixed, axis=2).min(0)
    assert float(found.complexity.mean()) <= searched.mean() + 0.02


def test_maps_without_negative_values_give_the_least_complex_map() -> None:
    a = torch.rand(3, 6, 10, dtype=torch.float64)
    found = aggregate(a, objective="complexity")
    torch.testing.assert_close(found.complexity, found.complexities.amin(1))
    assert found.weights is not None
    torch.testing.assert_close(found.weights.amax(1), torch.ones(6, dtype=torch.float64))


def test_known_cancellation() -> None:
    maps = {"a": torch.tensor([[4.0, 1.0, -1.0]]), "b": torch.tensor([[4.0, -1.0, 1.0]])}
    found = aggregate(maps, objective="complexity")
    assert found.weights is not None
    assert found.weights.tolist() == [[0.5, 0.5]]
    assert found.complexity.item() == 0


def test_the_walk_of_two_features() -> None:
    # The mean is the most complex map there is; the walks stay at the corners.
    found = aggregate(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), objective="walk")
    assert found.complexity.item() == 0
    assert sorted(found.attributions[0].tolist()) == [0, 1]
    # The mean of the second feature is 0: a walk that moves it there leaves one feature.
    a = torch.tensor([[[0.9, 0.1]], [[0.9, -0.1]]], dtype=torch.float64)
    found = aggregate(a, objective="walk")
    assert found.complexity.item() == 0
    assert found.attributions[0, 1].item() == 0
    assert found.weights is None


def test_walks_stay_between_the_maps_and_their_mean() -> None:
    a = related_maps(3, 5, 12)
    unit, found = unit_maps(a), aggregate(a, objective="walk").attributions
    mean = unit.mean(0)
    inside = [((found >= torch.minimum(m, mean) - 1e-12) & (found <= torch.maximum(m, mean) + 1e-12)) for m in unit]
    assert torch.stack([i.all(1) for i in inside]).any(0).all()


@pytest.mark.parametrize(
    ("start", "goal", "floor", "end"),
    [
        ([1.0, 1.0], [0.5, 0.5], 0.0, [0.5, 1.0]),  # each alone lowers the entropy, both together do not
        ([1.0, 1.0], [0.0, 0.0], 0.0, [0.0, 1.0]),  # both together leave nothing, with an entropy of 0
        ([4.0, 2.0, 1.0], [4.0, 0.0, 0.0], 0.0, [4.0, 0.0, 0.0]),
        ([4.0, 2.0, 1.0], [4.0, 0.0, 0.0], 4.5, [4.0, 0.0, 1.0]),  # together too much is lost
        ([4.0, 2.0, 1.0], [4.0, 0.0, 0.0], 5.5, [4.0, 2.0, 0.0]),
        ([4.0, 2.0, 1.0], [4.0, 0.0, 0.0], 7.0, [4.0, 2.0, 1.0]),
        ([4.0, 2.0], [4.0, 3.0], 0.0, [4.0, 2.0]),
    ],
)
def test_a_single_step_of_a_walk(start: list[float], goal: list[float], floor: float, end: list[float]) -> None:
    at, to = (torch.tensor(v, dtype=torch.float64)[None, None] for v in (start, goal))
    assert _walks(at, to, 1, torch.full((1, 1), floor, dtype=torch.float64))[0].flatten().tolist() == end


def test_a_walk_ends_on_its_goal() -> None:
    at, to = torch.tensor([[[1.0, 0.1]]], dtype=torch.float64), torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    end, taken = _walks(at, to, 10, torch.zeros(1, 1, dtype=torch.float64))
    assert end.equal(to)  # ten strides of 0.01 leave a rounding error
    assert taken == 10


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_a_walk_does_not_start_from_a_mean_that_cancels(noise: float) -> None:
    a = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64)
    found = aggregate({"a": a, "b": -a + torch.tensor([noise, 0.0, 0.0])}, objective="walk", steps=1)
    assert float(found.attributions.abs().sum()) > 0.1


@pytest.mark.parametrize("objective", DESCENTS)
def test_opposite_maps_do_not_cancel_to_nothing(objective: str) -> None:
    a = torch.randn(1, 4, 6, dtype=torch.float64)
    noise = 1e-9 * torch.randn(1, 4, 6, dtype=torch.float64)
    for pair in (torch.cat([a, -a]), torch.cat([a, -a + noise])):
        found = aggregate(pair, objective=objective, least_mass=0.1)
        assert (found.attributions.abs().sum(1) >= 0.1 - 1e-12).all()
        assert (found.complexity[:, None] <= found.complexities).all()


@pytest.mark.parametrize("objective", DESCENTS)
def test_bounds_on_mass_and_steps(objective: str) -> None:
    a = related_maps(3, 6, 15)
    a[2, :, 1:] = 0  # of a small l1 norm among maps of l2 norm 1, and the least complex there is
    for norm in ("l1", "l2"):
        found = aggregate(a, objective=objective, least_mass=1.0, norm=norm)
        assert (found.complexity[:, None] <= found.complexities).all()
    short = aggregate(a, objective=objective, steps=1)
    assert short.steps == 1
    assert (short.complexity[:, None] <= short.complexities).all()


# What all objectives share


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_and_nan_maps(objective: str) -> None:
    a = related_maps(3, 4, 6, torch.float32)
    a[1, 0] = 0  # one explainer of one sample
    a[:, 1] = 0  # every explainer of a sample
    a[2, 2, 3] = math.nan
    found = aggregate(a, objective=objective)
    assert found.attributions.isnan().all(1).tolist() == [False, False, True, False]
    assert (found.attributions[1] == 0).all()
    assert found.complexity[1].item() == 0
    assert found.complexity.isnan().tolist() == [False, False, True, False]
    if found.weights is not None:
        assert found.weights.isnan().any(1).tolist() == [False, False, True, False]
    if objective in DESCENTS:
        assert (found.attributions[0] != 0).any()
        assert found.complexity[0] <= found.complexities[0, [0, 2]].min()
    a[0, 3, 0] = math.inf
    assert aggregate(a, objective=objective).attributions[3].isnan().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_inputs_kinds_chunks_and_scale(objective: str) -> None:
    a = related_maps(3, 5, 12).view(3, 5, 3, 4)
    before = a.clone()
    expected = aggregate(a, objective=objective)
    assert a.equal(before)
    assert expected.attributions.shape == (5, 3, 4)
    assert expected.names == ("0", "1", "2")
    strided = a.transpose(2, 3).contiguous().transpose(2, 3)
    named = {"x": a[0].numpy(), "y": a[1], "z": a[2].clone().requires_grad_()}
    scaled = a * torch.tensor([1e-3, 8.0, 1e5], dtype=torch.float64).view(3, 1, 1, 1)
    for given, budget in ((a.numpy(), 1 << 20), (a, 1), (strided, 1 << 20), (named, 1 << 20), (scaled, 1 << 20)):
        found = aggregate(given, objective=objective, memory_budget=budget)
        torch.testing.assert_close(found.attributions, expected.attributions)
        torch.testing.assert_close(found.complexity, expected.complexity)
        torch.testing.assert_close(found.complexities, expected.complexities)
        assert not found.attributions.requires_grad
    assert aggregate(named, objective=objective).names == ("x", "y", "z")
    one = aggregate(a[:, :1], objective=objective)
    torch.testing.assert_close(one.attributions, expected.attributions[:1])
    assert aggregate(a[:, :0], objective=objective).attributions.shape == (0, 3, 4)
    assert aggregate(a, objective=objective).attributions.equal(expected.attributions)


def test_table_and_summary() -> None:
    maps = {"a": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "b": torch.tensor([[0.5, 0.5], [1.0, 1.0]])}
    found = aggregate(maps)
    assert isinstance(found, Aggregate)
    rows = found.table()
    assert list(rows[0]) == ["sample", "complexity", "complexity of a", "complexity of b", "weight of a", "weight of b"]
    assert rows[0]["complexity of a"] == 0
    assert found.summary()["weight of b"] == 0.5
    assert "weight of a" not in aggregate(maps, objective="median").summary()


def test_errors() -> None:
    a = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="objective: expected one of"):
        aggregate(a, objective="best")
    with pytest.raises(ValueError, match="norm: expected one of"):
        aggregate(a, norm="l3")
    with pytest.raises(ValueError, match="steps"):
        aggregate(a, steps=0)
    with pytest.raises(ValueError, match="least_mass: expected"):
        aggregate(a, least_mass=1.5)
    with pytest.raises(ValueError, match="at least one explainer"):
        aggregate({})
    with pytest.raises(ValueError, match="at least one explainer"):
        aggregate(a[0])
    with pytest.raises(TypeError, match="attributions: expected a dict"):
        aggregate([a[0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attributions\[b\]: expected shape"):
        aggregate({"a": a[0], "b": a[1, :, :2]})
    with pytest.raises(TypeError, match=r"attributions\[b\]: expected dtype"):
        aggregate({"a": a[0], "b": a[1].double()})
    with pytest.raises(ValueError, match="weights: expected None"):
        aggregate(a, objective="median", weights=[1, 1])
    with pytest.raises(ValueError, match="weights: expected shape"):
        aggregate(a, weights=[1, 1, 1])
    for weights in ([-1, 2], [0, 0], [math.nan, 1]):
        with pytest.raises(ValueError, match="weights: expected finite"):
            aggregate(a, weights=weights)


# Lower sensitivity


def wavy_gradient(x: Tensor) -> Tensor:
    """The gradient of sum_i x_i + sin(30 x_i) / 3, whose waves are noise to an explanation."""
    return 1 + 10 * torch.cos(30 * x)


@pytest.mark.parametrize("weights", ["inverse", "uniform"])
def test_smoothed_explanations_are_less_sensitive(weights: str) -> None:
    reference, x = torch.rand(300, 2, dtype=torch.float64), torch.rand(20, 2, dtype=torch.float64)
    smoothed = lower_sensitivity(wavy_gradient, reference, k=25, weights=weights)

    def measured(explain: Callable[[Tensor], Tensor]) -> Sensitivity:
        generator = torch.Generator().manual_seed(0)
        return sensitivity(explain, lambda z: z, x, radius=0.05, n_samples=40, generator=generator)

    raw, calm = measured(wavy_gradient), measured(smoothed)
    assert float(calm.max.mean()) < 0.7 * float(raw.max.mean())
    assert float(calm.max.max()) < float(raw.max.max())
    assert float(calm.mean.mean()) < 0.7 * float(raw.mean.mean())
    # what is averaged away is the wave, not the slope
    assert (smoothed(x).mean() - 1).abs() < (wavy_gradient(x) - 1).abs().mean()


@pytest.mark.parametrize("weights", ["inverse", "uniform"])
@pytest.mark.parametrize("distance", ["l1", "l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_smoothed_values(weights: str, distance: str, dtype: torch.dtype) -> None:
    reference, maps = torch.randn(9, 2, 3).to(dtype), torch.randn(9, 4).to(dtype)
    x = torch.randn(5, 2, 3).to(dtype)
    found = lower_sensitivity(maps, reference, k=3, weights=weights, distance=distance)(x)
    assert found.dtype == dtype
    order = {"l1": 1, "l2": 2, "linf": math.inf}[distance]
    for b in range(5):
        far = torch.linalg.vector_norm((reference.double() - x[b].double()).flatten(1), ord=order, dim=1)
        near = far.argsort(stable=True)[:3]
        w = 1 / far[near] if weights == "inverse" else torch.ones(3, dtype=torch.float64)
        expected = (w[:, None] * maps.double()[near]).sum(0) / w.sum()
        torch.testing.assert_close(found[b].double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-12)


def test_points_of_the_reference_set() -> None:
    reference = torch.tensor([[0.0], [0.0], [1.0]])
    maps = torch.tensor([[1.0], [3.0], [math.nan]])
    explain = lower_sensitivity(maps, reference, k=3)
    # two points at distance 0 share the weight; what has none brings in no NaN
    assert explain(torch.tensor([[0.0]])).tolist() == [[2.0]]
    assert explain(torch.tensor([[0.5]])).isnan().all()
    assert explain(torch.tensor([[math.nan]])).isnan().all()
    near = lower_sensitivity(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]]), k=2)
    torch.testing.assert_close(near(torch.tensor([[1e-30]])), torch.tensor([[1.0]]))


def test_only_neighbours_of_the_same_class() -> None:
    reference = torch.tensor([[-1.0], [-0.1], [0.1], [2.0]])
    maps = torch.tensor([[1.0], [2.0], [10.0], [20.0]])
    for predict in (lambda x: (x[:, 0] > 0).long(), lambda x: torch.cat([-x, x], 1)):
        explain = lower_sensitivity(maps, reference, k=3, weights="uniform", predict=predict)
        assert explain(torch.tensor([[0.01], [-0.01]])).tolist() == [[15.0], [1.5]]
    lonely = lower_sensitivity(maps, reference, k=1, predict=lambda x: (x[:, 0] * 2).round().long())
    with pytest.raises(ValueError, match="got class 14"):
        lonely(torch.tensor([[7.0]]))


def test_callables_chunks_arrays_and_untouched_inputs() -> None:
    reference, x = torch.randn(11, 4), torch.randn(7, 4)
    before, calls = (reference.clone(), x.clone()), []

    def explain(inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        inputs = inputs.clone().requires_grad_()
        return torch.autograd.grad((inputs**3).sum(), inputs)[0]

    whole = lower_sensitivity(explain, reference, k=4)
    cut = lower_sensitivity(explain, reference.numpy(), k=4, batch_size=3)
    assert calls == [11, 3, 3, 3, 2]
    torch.testing.assert_close(cut(x), whole(x))
    torch.testing.assert_close(whole(x.numpy()), whole(x))
    torch.testing.assert_close(whole(x.repeat(1, 2)[:, ::2]), whole(x.repeat(1, 2)[:, ::2].contiguous()))
    assert len(calls) == 5
    assert reference.equal(before[0])
    assert x.equal(before[1])
    assert whole(x[:0]).shape == (0, 4)
    assert whole(x[:1]).shape == (1, 4)


def test_weights_that_are_no_numbers() -> None:
    with pytest.raises(TypeError, match=r"weights: expected a torch.Tensor or numbers, got str"):
        aggregate(torch.rand(2, 3, 4), weights="ab")  # type: ignore[arg-type]


def test_errors_of_the_smoothed_explainer() -> None:
    reference = torch.randn(5, 3)
    for k in (0, 6):
        with pytest.raises(ValueError, match="k: expected"):
            lower_sensitivity(wavy_gradient, reference, k=k)
    with pytest.raises(ValueError, match="weights: expected one of"):
        lower_sensitivity(wavy_gradient, reference, weights="gauss")
    with pytest.raises(ValueError, match="distance: expected one of"):
        lower_sensitivity(wavy_gradient, reference, distance="cosine")
    with pytest.raises(TypeError, match="predict: expected"):
        lower_sensitivity(wavy_gradient, reference, predict=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one map for each of the 5 neighbours, got 4"):
        lower_sensitivity(reference[:4], reference)
    with pytest.raises(TypeError, match="explanation: expected"):
        lower_sensitivity(lambda x: None, reference)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="neighbours: expected"):
        lower_sensitivity(wavy_gradient, [1.0])  # type: ignore[arg-type]
    explain = lower_sensitivity(wavy_gradient, reference)
    with pytest.raises(ValueError, match="inputs: expected shape"):
        explain(torch.randn(2, 4))
    with pytest.raises(TypeError, match="inputs: expected dtype"):
        explain(torch.randn(2, 3).double())
    with pytest.raises(ValueError, match="predict: expected classes"):
        lower_sensitivity(wavy_gradient, reference, predict=lambda x: x.mean(1))
