"""Faithfulness measures on linear models, where the answer is known, and against loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from tests.metrics.models import classifier, linear
from xai_fast.metrics import faithfulness, faithfulness_correlation, feature_correlation, infidelity, monotonicity
from xai_fast.ops import perturb

B, F, C = 6, 9, 3


def data() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(2)
    return classifier(F, C), torch.randn(B, F, dtype=torch.float64), torch.randn(B, F, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- linear models: the right attributions are known ---------------------------------------------------------------


@pytest.mark.parametrize("baseline", [0.0, 0.7])
@pytest.mark.parametrize("similarity", ["pearson", "spearman"])
def test_linear_models_have_faithfulness_one(baseline: float, similarity: str) -> None:
    _, x, _ = data()
    weight = torch.randn(F, C, dtype=torch.float64)
    right = (x - baseline) * weight[:, 1]
    options: dict[str, Any] = {"target": 1, "baseline": baseline, "similarity": similarity}
    ones = torch.ones(B, dtype=torch.float64)
    torch.testing.assert_close(faithfulness_correlation(linear(weight), x, right, **options), ones)
    torch.testing.assert_close(faithfulness_correlation(linear(weight), x, -right, **options), -ones)
    torch.testing.assert_close(feature_correlation(linear(weight), x, right, **options), ones)


def test_linear_models_have_infidelity_zero() -> None:
    _, x, _ = data()
    weight = torch.randn(F, C, dtype=torch.float64)
    gradient = weight[:, 2].expand(B, F)
    assert infidelity(linear(weight), x, gradient, target=2, n_perturb_samples=30).max() < 1e-25
    assert infidelity(linear(weight), x, 5 * gradient, target=2).min() > 1e-6
    assert infidelity(linear(weight), x, 5 * gradient, target=2, normalize=True).max() < 1e-15


def test_monotone_models() -> None:
    x = torch.rand(B, F, dtype=torch.float64) + 0.1
    assert monotonicity(lambda x: x.sum(1), x, x).all()
    assert monotonicity(lambda x: (x**3).sum(1), x, x).all()
    assert not monotonicity(lambda x: -x.sum(1), x, x).any()
    dip = lambda x: x.sum(1) - 3 * x.amax(1)  # noqa: E731
    assert not monotonicity(dip, x, x).any()
    assert monotonicity(lambda x: x.sum(1) - 1e-9 * x[:, 0], x, x, tolerance=1e-6, steps=3).all()


def test_monotonicity_adds_the_smallest_attribution_first() -> None:
    """x0 lowers the output alone and raises it beside x1."""
    x = torch.ones(2, 2, dtype=torch.float64)
    maps = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    assert monotonicity(lambda x: x[:, 1] + x[:, 0] * (x[:, 1] - 0.5), x, maps).tolist() == [False, True]


# ---- against loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["pearson", "spearman"])
def test_feature_correlation_is_the_loop(similarity: str) -> None:
    forward, x, maps = data()
    found = feature_correlation(forward, x, maps, baseline=0.2, similarity=similarity, batch_size=4)
    measure = scipy.stats.pearsonr if similarity == "pearson" else scipy.stats.spearmanr
    for i in range(B):
        target = int(forward(x[i : i + 1]).argmax())
        drops = []
        for j in range(F):
            other = x[i].clone()
            other[j] = 0.2
            drops.append(float((forward(x[i : i + 1]) - forward(other[None]))[0, target]))
        assert float(found[i]) == pytest.approx(measure(maps[i].numpy(), drops).statistic)
    magnitudes = feature_correlation(forward, x, maps, absolute=True)
    assert not torch.allclose(magnitudes, found)


def test_faithfulness_correlation_sees_subsets_of_the_right_size() -> None:
    forward, x, maps = data()
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return forward(x)

    found = faithfulness_correlation(watched, x, maps, subset_size=4, n_samples=50, generator=seeded())
    changed = seen[1].view(B, 50, F)
    gone = changed.eq(0)
    assert gone.sum(2).eq(4).all()
    assert gone[0].equal(gone[1])
    assert len({tuple(row) for row in gone[0].tolist()}) > 30
    for i in range(B):
        target = int(forward(x[i : i + 1]).argmax())
        given = (gone[i].double() @ maps[i]).numpy()
        drop = (forward(x[i : i + 1]) - forward(changed[i]))[:, target].numpy()
        assert float(found[i]) == pytest.approx(scipy.stats.pearsonr(given, drop).statistic)


def test_monotonicity_is_the_loop() -> None:
    forward, x, maps = data()
    found = monotonicity(forward, x, maps, outputs="auto")
    for i in range(B):
        target = int(forward(x[i : i + 1]).argmax())
        now, curve = torch.zeros(F, dtype=torch.float64), []
        for j in np.argsort(maps[i].numpy(), kind="stable"):
            curve.append(float(forward(now[None]).softmax(1)[0, target]))
            now[j] = x[i, j]
        curve.append(float(forward(now[None]).softmax(1)[0, target]))
        assert bool(found[i]) == bool((np.diff(curve) >= 0).all())


@pytest.mark.parametrize("block", [1, 17, faithfulness.BLOCK])
def test_infidelity_is_the_mean_over_the_perturbations(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness, "BLOCK", block)
    forward, x, maps = data()
    rounds, seed_of = 13, int(torch.randint(2**62, (1,), generator=seeded(4)))
    found = infidelity(forward, x, maps, n_perturb_samples=rounds, radius=0.3, generator=seeded(4), max_examples_per_batch=5)
    total = torch.zeros(B, dtype=torch.float64)
    number, target = torch.arange(B), forward(x).argmax(1, keepdim=True)
    for draw in range(rounds):
        z = perturb(x, sample=number, draw=torch.full((B,), draw), radius=0.3, ball="linf", seed=seed_of)
        drop = (forward(x) - forward(z)).gather(1, target)[:, 0]
        total += (((x - z) * maps).sum(1) - drop) ** 2
    torch.testing.assert_close(found, total / rounds)


def test_infidelity_takes_captums_order_and_functions() -> None:
    forward, x, maps = data()
    step = torch.full((F,), 0.1, dtype=torch.float64)

    def shift(x: Tensor) -> tuple[Tensor, Tensor]:
        return step.expand_as(x), x - step

    ours = infidelity(forward, x, maps, shift)
    torch.testing.assert_close(ours, infidelity(forward, shift, x, maps))
    target = forward(x).argmax(1, keepdim=True)
    drop = (forward(x) - forward(x - step)).gather(1, target)[:, 0]
    torch.testing.assert_close(ours, ((maps @ step) - drop) ** 2)
    with_baselines = infidelity(forward, x, maps, lambda x, b: (x - b, b), baselines=torch.zeros_like(x))
    drop = (forward(x) - forward(torch.zeros_like(x))).gather(1, target)[:, 0]
    torch.testing.assert_close(with_baselines, ((maps * x).sum(1) - drop) ** 2)


# ---- edges ---------------------------------------------------------------------------------------------------------


def test_constant_sides_have_no_correlation() -> None:
    forward, x, maps = data()
    assert faithfulness_correlation(forward, x, torch.full_like(maps, 0.1)).isnan().all()
    assert feature_correlation(forward, x, torch.zeros_like(maps)).isnan().all()
    assert feature_correlation(lambda x: x[:, :1] * 0 + 0.3, x, maps).isnan().all()


def test_groups_of_each_sample() -> None:
    """Groups that differ from sample to sample, and one grouping for all, on samples that make them the same."""
    forward, x, maps = data()
    one = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 3]])
    for measure in (faithfulness_correlation, feature_correlation):
        options: dict[str, Any] = {"generator": seeded()} if measure is faithfulness_correlation else {}
        shared = measure(forward, x, maps, feature_mask=one, **options)
        options = {"generator": seeded()} if options else {}
        torch.testing.assert_close(measure(forward, x, maps, feature_mask=one.expand(B, -1), **options), shared)
        turned = torch.cat([one, one.flip(1).expand(B - 1, -1)])
        options = {"generator": seeded()} if options else {}
        found = measure(forward, x, maps, feature_mask=turned, **options)
        torch.testing.assert_close(found[0], shared[0])
        assert not torch.allclose(found[1:], shared[1:])


def test_generator_decides() -> None:
    forward, x, maps = data()
    one, two = (faithfulness_correlation(forward, x, maps, generator=seeded(s), n_samples=20) for s in (1, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, faithfulness_correlation(forward, x, maps, generator=seeded(2), n_samples=20))


def test_images_with_patches() -> None:
    torch.manual_seed(0)
    images, model = torch.rand(2, 3, 4, 4), torch.nn.Flatten()
    maps = images.sum(1, keepdim=True)
    found = feature_correlation(lambda x: model(x).sum(1), images, maps, patch_size=2)
    torch.testing.assert_close(found, torch.ones(2))
    assert found.dtype == torch.float32
    assert math.isclose(float(faithfulness_correlation(lambda x: model(x).sum(1), images, maps)[0]), 1, abs_tol=1e-5)


@pytest.mark.parametrize("change", [{}, {"similarity": "spearman"}, {"normalize": True}])
@pytest.mark.parametrize("function", [faithfulness_correlation, feature_correlation, infidelity])
def test_a_map_with_nan_says_nothing(function: Any, change: dict[str, Any]) -> None:
    if ("normalize" in change) > (function is infidelity) or ("similarity" in change) > (function is not infidelity):
        return
    forward, x, maps = data()
    maps[2, 4] = math.nan
    assert function(forward, x, maps, **change).isnan().tolist() == [i == 2 for i in range(B)]


def test_monotonicity_has_no_answer_for_nan() -> None:
    forward, x, maps = data()
    with pytest.raises(ValueError, match=r"^forward: expected outputs without NaN, got NaN in 6 of 6 samples$"):
        monotonicity(lambda z: forward(z) * math.nan, x, maps)
    maps[2, 4] = math.nan
    with pytest.raises(ValueError, match=r"^attributions: expected values without NaN, got NaN in 1 of 6 samples$"):
        monotonicity(forward, x, maps)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (faithfulness_correlation, {"subset_size": F + 1}, "subset_size: expected a whole number from 1 to 9"),
        (faithfulness_correlation, {"n_samples": 1}, "n_samples: expected a whole number of at least 2"),
        (faithfulness_correlation, {"similarity": "kendall"}, "similarity: expected one of"),
        (feature_correlation, {"similarity": "kendall"}, "similarity: expected one of"),
        (monotonicity, {"steps": 0}, "steps: expected a whole number"),
        (monotonicity, {"tolerance": -1.0}, "tolerance"),
        (infidelity, {"perturb_func": lambda x: x}, "perturb_func: expected it to return two tensors"),
        (infidelity, {"perturb_func": 3}, "perturb_func: expected a callable"),
        (infidelity, {"radius": 0.0}, "radius: expected a number above 0"),
        (infidelity, {"n_perturb_samples": 0}, "n_perturb_samples: expected a whole number"),
        (infidelity, {"max_examples_per_batch": 0}, "max_examples_per_batch: expected a whole number"),
    ],
)
def test_bad_input(function: Any, change: dict[str, Any], message: str) -> None:
    forward, x, maps = data()
    with pytest.raises((ValueError, TypeError), match=message):
        function(forward, x, maps, **change)


@pytest.mark.parametrize("measure", [feature_correlation, monotonicity, faithfulness_correlation])
@pytest.mark.parametrize("own", [False, True])
def test_group_numbers_only_name_groups(measure: Any, own: bool) -> None:
    """Where they start and what they leave out changes nothing, for one mask and for one for each sample."""
    forward, x, maps = data()
    mask = torch.arange(F) // 2
    mask = torch.stack([mask.roll(i) for i in range(B)]) if own else mask
    options = {"generator": seeded(0)} if measure is faithfulness_correlation else {}
    wanted = measure(forward, x, maps, feature_mask=mask, **options)
    for renamed in (mask + 1, 3 * mask, mask * 10**12, (mask + 100).to(torch.uint8)):
        options = {"generator": seeded(0)} if options else {}
        assert torch.equal(measure(forward, x, maps, feature_mask=renamed, **options), wanted)


@pytest.mark.parametrize("value", [torch.arange(1.0, B + 1), 0.0])
def test_infidelity_takes_one_argument_that_is_no_tuple(value: Any) -> None:
    _, x, maps = data()

    def forward(z: Tensor, scale: Any) -> Tensor:
        return z.sum(1) * scale

    found = infidelity(forward, x, maps, additional_forward_args=value, generator=seeded(0))
    torch.testing.assert_close(found, infidelity(forward, x, maps, additional_forward_args=(value,), generator=seeded(0)))
