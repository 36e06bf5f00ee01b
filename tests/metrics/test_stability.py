"""Stability across seeds against scipy, numpy and pairs computed one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from xai_fast.metrics import similarity
from xai_fast.metrics.stability import SeedStability, seed_stability

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FIELDS = ("variance", "cosine", "spearman", "jaccard", "cosine_matrix", "spearman_matrix", "jaccard_matrix")


def expected_jaccard(a: np.ndarray, b: np.ndarray, k: int) -> float:
    top = [set(np.argsort(-np.abs(x), kind="stable")[:k].tolist()) for x in (a, b)]
    return len(top[0] & top[1]) / len(top[0] | top[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 3), (4, 3, 2, 5), (3, 2, 1, 4, 4)])
def test_every_pair(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # Few distinct values, so that ranks and magnitudes tie.
    a = (torch.randn(shape) * 3).round().div(3).to(dtype)
    a[..., 0], a[..., 1] = 1.0, -0.5
    found = seed_stability(a, top_k=2)
    wide = a.double().flatten(2).numpy()
    seeds, batch = shape[:2]
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    assert found.cosine.dtype == found.mean_map.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found.mean_map, a.double().mean(0), **tolerance)
    np.testing.assert_allclose(found.variance_map, a.double().var(0), **tolerance)
    np.testing.assert_allclose(found.variance, wide.var(0, ddof=1).mean(1), **tolerance)
    for b in range(batch):
        pairs: dict[str, list[float]] = {"cosine": [], "spearman": [], "jaccard": []}
        for s, t in itertools.combinations(range(seeds), 2):
            x, y = wide[s, b], wide[t, b]
            pairs["cosine"].append(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)))
            pairs["spearman"].append(float(stats.spearmanr(x, y).statistic))
            pairs["jaccard"].append(expected_jaccard(x, y, 2))
            for name, values in pairs.items():
                matrix = getattr(found, f"{name}_matrix")
                np.testing.assert_allclose([matrix[b, s, t], matrix[b, t, s]], [values[-1]] * 2, **tolerance)
        for name, values in pairs.items():
            np.testing.assert_allclose(getattr(found, name)[b], np.mean(values), **tolerance)
    for name in pairs:
        np.testing.assert_allclose(getattr(found, f"{name}_matrix").diagonal(dim1=1, dim2=2), 1, **tolerance)


def test_agrees_with_similarity() -> None:
    a = torch.randn(2, 5, 30)
    found = seed_stability(a, top_k=6)
    torch.testing.assert_close(found.cosine, similarity.cosine_similarity(*a))
    torch.testing.assert_close(found.spearman, similarity.rank_correlation(*a))
    share = similarity.top_k_intersection(*a, 6)
    torch.testing.assert_close(found.jaccard, share / (2 - share))


def test_hand_computed() -> None:
    found = seed_stability(torch.tensor([[[3.0, 4.0]], [[4.0, 3.0]], [[3.0, 4.0]]]), top_k=1)
    assert found.cosine.item() == pytest.approx((0.96 + 1 + 0.96) / 3)
    assert found.spearman.item() == pytest.approx((-1 + 1 - 1) / 3)
    assert found.jaccard.item() == pytest.approx(1 / 3)
    assert found.variance.item() == pytest.approx(1 / 3)
    assert found.mean_map.tolist() == [[pytest.approx(10 / 3), pytest.approx(11 / 3)]]


def test_runs_get_inputs_and_give_maps_of_their_own() -> None:
    """A callable may write to what it gets, and return the same buffer for every seed."""
    x, buffer = torch.rand(3, 4), torch.empty(3, 4)
    before = x.clone()

    def explain(inputs: Tensor, seed: int) -> Tensor:
        return buffer.copy_(inputs.mul_(seed + 1))

    found = seed_stability(explain, (0, 1, 2), x)
    assert torch.equal(x, before)
    torch.testing.assert_close(found.mean_map, 2 * x)
    found = seed_stability(lambda seed: buffer.fill_(seed).numpy(), (0, 1, 2))
    torch.testing.assert_close(found.variance, torch.ones(3))


def test_kinds_of_input_agree() -> None:
    a = torch.randn(3, 2, 4, 5)
    expected = seed_stability(a, top_k=3)
    assert expected.mean_map.shape == expected.variance_map.shape == (2, 4, 5)
    seen: list[object] = []

    def explain(seed: int) -> Tensor:
        seen.append(seed)
        return a[seed].clone().requires_grad_()

    def explain_inputs(inputs: Tensor, seed: int) -> Tensor:
        assert torch.equal(inputs, given)
        return a[seed]

    given = torch.zeros(2)
    strided = a.transpose(2, 3).contiguous().transpose(2, 3)
    ways = [
        seed_stability(list(a), top_k=3),
        seed_stability(a.numpy(), top_k=3),
        seed_stability(list(a.numpy()), top_k=0.15),
        seed_stability(strided, top_k=3),
        seed_stability(explain, seeds=range(3), top_k=3),
        seed_stability(explain_inputs, (0, 1, 2), given, top_k=3),
    ]
    for found in ways:
        for name in (*FIELDS, "mean_map", "variance_map"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert seen == [0, 1, 2]
    assert ways[4].seeds == (0, 1, 2)
    assert expected.seeds is None
    assert expected.top_k == ways[2].top_k == 3


def test_leaves_generators_and_inputs_alone() -> None:
    a = torch.randn(3, 2, 4)
    before, state = a.clone(), torch.get_rng_state()
    seed_stability(a)
    seed_stability(lambda seed: a[seed], seeds=range(3))
    assert a.equal(before)
    assert torch.get_rng_state().equal(state)


def test_chunks_do_not_matter() -> None:
    a = torch.randn(3, 7, 20)
    whole, cut = seed_stability(a), seed_stability(a, memory_budget=1)
    for name in (*FIELDS, "mean_map", "variance_map"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name))


def test_identical_runs() -> None:
    found = seed_stability(torch.randn(1, 2, 9).expand(4, -1, -1))
    assert found.variance.tolist() == [0, 0]
    for name in ("cosine", "spearman", "jaccard"):
        torch.testing.assert_close(getattr(found, name), torch.ones(2))


def test_zero_constant_one_feature_and_nan() -> None:
    row = torch.tensor([1.0, 2.0, 3.0])
    a = torch.stack([torch.stack([row, row, row]), torch.stack([torch.zeros(3), torch.ones(3), row])])
    a[1, 2, 1] = math.nan
    found = seed_stability(a, top_k=1)
    assert found.cosine.isnan().tolist() == [True, False, True]
    assert found.spearman.isnan().tolist() == [True, True, True]
    assert found.jaccard.isnan().tolist() == [False, False, True]
    assert found.variance.isnan().tolist() == [False, False, True]
    assert found.variance_map[2].isnan().tolist() == [False, True, False]
    assert not math.isnan(found.summary()["cosine"])
    one = seed_stability(torch.tensor([[[2.0]], [[-3.0]]]))
    assert one.cosine.item() == -1
    assert one.spearman.isnan().all()
    assert one.jaccard.item() == 1


def test_extreme_values_and_empty_batch() -> None:
    for scale in (1e-200, 1e200):
        a = torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]]], dtype=torch.float64) * scale
        assert seed_stability(a).cosine.item() == pytest.approx(0.8)
    empty = seed_stability(torch.zeros(2, 0, 3))
    assert empty.cosine.shape == (0,)
    assert empty.cosine_matrix.shape == (0, 2, 2)


def test_table_and_summary() -> None:
    found = seed_stability(torch.randn(3, 2, 9))
    assert isinstance(found, SeedStability)
    assert [list(row) for row in found.table()] == [["sample", "variance", "cosine", "spearman", "jaccard"]] * 2
    assert found.summary()["jaccard"] == pytest.approx(float(found.jaccard.mean()))


def test_errors() -> None:
    a = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        seed_stability(a[:1])
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        seed_stability(lambda seed: a[0], seeds=[0])
    with pytest.raises(TypeError, match="seeds: expected"):
        seed_stability(lambda seed: a[0])
    with pytest.raises(TypeError, match="seeds: expected one for each run, got int"):
        seed_stability(lambda seed: a[0], seeds=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inputs: expected None"):
        seed_stability(a, inputs=a)
    with pytest.raises(TypeError, match="attributions: expected a tensor"):
        seed_stability(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"attributions\[0\]: expected"):
        seed_stability(lambda seed: None, seeds=range(2))
    with pytest.raises(ValueError, match=r"attributions\[1\]: expected shape \(2, 4\)"):
        seed_stability([a[0], a[1][:1]])
    with pytest.raises(TypeError, match=r"attributions\[1\]: expected dtype"):
        seed_stability([a[0], a[1].double()])
    with pytest.raises(ValueError, match="seeds: expected one for each of the 3 runs"):
        seed_stability(a, seeds=[1, 2])
    with pytest.raises(ValueError, match="top_k: expected"):
        seed_stability(a, top_k=5)
    with pytest.raises(ValueError, match="top_k: expected"):
        seed_stability(a, top_k=1.5)
    with pytest.raises(TypeError, match="top_k: expected"):
        seed_stability(a, top_k="3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_budget"):
        seed_stability(a, memory_budget=0)
