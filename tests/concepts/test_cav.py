"""Concept activation vectors: direction, accuracy, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from xai_fast.concepts import CAV, Concept, fit_cav
from xai_fast.concepts._pairs import Sets

METHODS = ("ridge", "lda", "logistic", "mean_difference")
SIZES = [(50, 50, 300), (40, 80, 20), (30, 70, 400)]


def two_sets(n: int, m: int, d: int, shift: float = 0.3) -> tuple[Tensor, Tensor]:
    scale = torch.linspace(0.2, 2, d, dtype=torch.float64)
    return tuple(torch.randn(k, d, dtype=torch.float64) * scale + 5 + shift * (k == n) for k in (n, m))


def sklearn_fit(method: str, positive: Tensor, negative: Tensor, l2: float) -> tuple[np.ndarray, float]:
    n, m = len(positive), len(negative)
    X, y = torch.cat([positive, negative]).numpy(), np.r_[np.ones(n), -np.ones(m)]
    weights = np.r_[np.full(n, 0.5 / n), np.full(m, 0.5 / m)]
    variance = np.trace(np.cov(X.T, aweights=weights, bias=True))
    alpha = l2 * variance * (n + m)
    model = {
        "ridge": RidgeClassifier(alpha=alpha, class_weight="balanced"),
        "logistic": LogisticRegression(C=1 / alpha, class_weight="balanced", tol=1e-10, max_iter=10_000),
        "lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage=l2, priors=[0.5, 0.5]),
    }[method].fit(X, y)
    direction = np.ravel(model.coef_)
    return direction / np.linalg.norm(direction), float(np.ravel(model.intercept_)[0] / np.linalg.norm(direction))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("method", "l2"), [("ridge", 0.01), ("ridge", 0.3), ("logistic", 0.01), ("lda", 0.2), ("lda", 0.9)])
def test_agrees_with_sklearn(method: str, l2: float, size: tuple[int, int, int]) -> None:
    sets = two_sets(*size)
    cav = fit_cav(*sets, method=method, l2=l2)
    direction, bias = sklearn_fit(method, *sets, l2)
    assert float(cav.vector @ torch.from_numpy(direction)) > 1 - 1e-9
    assert cav.bias == pytest.approx(bias, abs=1e-4)


def test_lda_shrinks_as_ledoit_and_wolf() -> None:
    positive, negative = two_sets(50, 50, 300)
    centred = torch.cat([positive - positive.mean(0), negative - negative.mean(0)])
    shrinkage = ledoit_wolf(centred.numpy(), assume_centered=True)[1]
    assert 0 < shrinkage < 1
    for d in (300, 60):
        sets = positive[:, :d], negative[:, :d]
        shrinkage = ledoit_wolf(centred[:, :d].numpy(), assume_centered=True)[1]
        torch.testing.assert_close(
            fit_cav(*sets, method="lda").vector, fit_cav(*sets, method="lda", l2=shrinkage).vector, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("method", METHODS)
def test_dual_and_primal_agree(method: str) -> None:
    """More features than examples or fewer: the same formula. Features of zeros change nothing but the way."""
    positive, negative = two_sets(15, 25, 30)
    wide = [torch.cat([x, torch.zeros(len(x), 50, dtype=x.dtype)], 1) for x in (positive, negative)]
    # LDA shrinks to the mean variance, which features of zeros make smaller: 0.5 / 0.5 * 80 / 30 = share / (1 - share).
    narrow_l2, wide_l2 = {"lda": (0.5, 80 / 110), "mean_difference": (None, None)}.get(method, (0.02, 0.02))
    narrow = fit_cav(positive, negative, method=method, l2=narrow_l2, generator=torch.Generator().manual_seed(0))
    dual = fit_cav(*wide, method=method, l2=wide_l2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dual.vector[:30], narrow.vector, rtol=0, atol=1e-9)
    assert not dual.vector[30:].any()
    assert dual.accuracy == narrow.accuracy
    assert dual.bias == pytest.approx(narrow.bias, abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [20, 200])
def test_accuracy_is_that_of_refits_without_each_fold(method: str, d: int) -> None:
    positive, negative = two_sets(20, 35, d, shift=0.2)
    cav = fit_cav(positive, negative, method=method, generator=torch.Generator().manual_seed(3), holdout=0.25)
    draw = torch.Generator().manual_seed(3)
    ranks = [torch.randperm(len(x), generator=draw) for x in (positive, negative)]
    right = [0, 0]
    for fold in range(4):
        kept = [x[rank % 4 != fold] for x, rank in zip((positive, negative), ranks, strict=True)]
        refit = fit_cav(*kept, method=method, holdout=0)
        assert np.isnan(refit.accuracy)
        for side, (x, rank, sign) in enumerate(zip((positive, negative), ranks, (1, -1), strict=True)):
            right[side] += int((sign * (x[rank % 4 == fold] @ refit.vector + refit.bias) > 0).sum())
    assert cav.accuracy == pytest.approx((right[0] / 20 + right[1] / 35) / 2)
    assert 0.3 < cav.accuracy < 1


@pytest.mark.parametrize("method", METHODS)
def test_finds_a_planted_direction(method: str) -> None:
    direction = torch.randn(2000)
    direction /= direction.norm()
    positive = torch.randn(60, 2000) + 20 * direction
    cav = fit_cav(positive, torch.randn(200, 2000), method=method)
    assert isinstance(cav, CAV)
    assert cav.vector.shape == (2000,)
    assert float(cav.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert float(cav.vector @ direction) > 0.8
    assert cav.accuracy == 1


def test_noise_is_told_by_chance_and_imbalance_does_not_help() -> None:
    found = [fit_cav(torch.randn(20, 300), torch.randn(60, 300), holdout=0.25).accuracy for _ in range(40)]
    assert float(np.mean(found)) == pytest.approx(0.5, abs=0.04)


def test_swapping_the_sets_turns_the_vector_around() -> None:
    positive, negative = two_sets(20, 30, 50)
    for method in METHODS:
        there, back = fit_cav(positive, negative, method=method), fit_cav(negative, positive, method=method)
        torch.testing.assert_close(there.vector, -back.vector, rtol=0, atol=1e-9)
        assert there.bias == pytest.approx(-back.bias, abs=1e-8)


def test_is_free_of_scale_and_place() -> None:
    positive, negative = (x.float() for x in two_sets(20, 30, 500))
    plain = fit_cav(positive, negative, generator=torch.Generator().manual_seed(0))
    for scale, offset in ((1e-6, 0.0), (1e6, 0.0), (1.0, 1000.0)):
        other = fit_cav(positive * scale + offset, negative * scale + offset, generator=torch.Generator().manual_seed(0))
        assert float(other.vector @ plain.vector) > 1 - 1e-5
        assert other.accuracy == plain.accuracy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_inputs_left_alone(dtype: torch.dtype) -> None:
    positive, negative = (x.to(dtype).requires_grad_() for x in two_sets(20, 30, 64))
    before = positive.detach().clone()
    cav = fit_cav(positive, negative)
    assert cav.vector.dtype == dtype
    assert not cav.vector.requires_grad
    assert torch.equal(positive, before)
    assert float(cav.vector.double().norm()) == pytest.approx(1, abs=1e-2 if dtype.itemsize == 2 else 1e-6)
    exact = fit_cav(positive.detach().double(), negative.detach().double())
    assert float(cav.vector.double() @ exact.vector) > 1 - 1e-4


def test_deterministic_and_numpy() -> None:
    positive, negative = two_sets(20, 30, 64)
    results = [fit_cav(p, n, generator=torch.Generator().manual_seed(1)) for p, n in [(positive, negative)] * 2]
    results.append(fit_cav(positive.numpy(), negative.numpy(), generator=torch.Generator().manual_seed(1)))
    for other in results[1:]:
        assert torch.equal(other.vector, results[0].vector)
        assert other.accuracy == results[0].accuracy


def test_one_example_has_nothing_to_hold_out() -> None:
    cav = fit_cav(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert np.isnan(cav.accuracy)
    assert cav.vector[0] > 0.9


def test_no_penalty_separates_exactly() -> None:
    positive, negative = two_sets(10, 12, 100)
    cav = fit_cav(positive, negative, l2=0)
    values = torch.cat([positive, negative]) @ cav.vector + cav.bias
    # Least squares through all targets: two values, the same distance from the boundary.
    torch.testing.assert_close(values.abs(), values.abs().mean().expand(22), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": torch.zeros(0, 3)}, r"positive: expected activations \(n, d\)"),
        ({"negative": torch.zeros(5)}, r"negative: expected activations \(n, d\)"),
        ({"negative": torch.zeros(5, 4)}, "negative: expected 3 features"),
        ({"negative": torch.full((5, 3), torch.nan)}, "negative: expected finite activations"),
        ({"positive": torch.ones(4, 3), "negative": torch.ones(6, 3)}, "expected activations with different means"),
        ({"positive": torch.full((3, 3), 0.1), "negative": torch.full((7, 3), 0.1)}, "no direction"),
        ({"method": "svm"}, "method: expected one of ridge, lda, logistic, mean_difference, got 'svm'"),
        ({"l2": -1.0}, "l2: expected a number of at least 0"),
        ({"l2": 2.0, "method": "lda"}, "l2: expected a shrinkage from 0 to 1"),
        ({"l2": 0.1, "method": "mean_difference"}, "l2: expected None"),
        ({"holdout": 0.7}, "holdout: expected a share from 0 to 0.5"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {"positive": torch.randn(4, 3), "negative": torch.randn(5, 3)} | change
    with pytest.raises(ValueError, match=message):
        fit_cav(arguments.pop("positive"), arguments.pop("negative"), **arguments)


def test_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="positive: expected a torch"):
        fit_cav([[1.0]], torch.ones(2, 1))
    with pytest.raises(TypeError, match=r"negative: expected dtype torch\.float32"):
        fit_cav(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(TypeError, match="generator: expected"):
        fit_cav(torch.ones(2, 1), torch.zeros(2, 1), generator=0)


def test_the_same_set_twice_has_no_direction_in_any_method() -> None:
    x = torch.randn(12, 40) + 3
    for method in METHODS:
        with pytest.raises(ValueError, match="no direction"):
            fit_cav(x, x[torch.randperm(12)], method=method)


def test_concepts_are_read_again_and_again() -> None:
    images = torch.randn(10, 3, 4, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(10)), batch_size=4)
    forms = [images, images.numpy(), list(images), [x.numpy() for x in images], loader, [(images[:6], 1), (images[6:], 2)]]
    forms.append(part for part in images.split(3))
    for form in forms:
        concept = Concept("any", form)
        for _ in range(2):
            assert torch.equal(torch.cat(list(concept)), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3), "expected at least one example"),
        ([], "expected at least one example"),
        (torch.zeros(3), r"expected shape \(n, \.\.\.\)"),
        ([torch.zeros(3, 2), torch.zeros(4, 2)], "expected examples of one shape"),
    ],
)
def test_concept_refuses(images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Concept("any", images)
    with pytest.raises(ValueError, match="expected at least one example of 'late'"):
        list(Concept("late", torch.utils.data.DataLoader(torch.zeros(0, 3))))
    with pytest.raises(TypeError, match="images: expected a tensor"):
        Concept("any", 3)
    with pytest.raises(TypeError, match="name: expected a str"):
        Concept(0, torch.zeros(3, 2))


def test_gram_matrix_of_many_sets() -> None:
    """Computed in blocks on and above the diagonal, here more than one; kept, or by pair where it would be too large."""
    data = Sets([torch.randn(70, 900) + 2 for _ in range(9)])
    members = [(0, 8), (3, 4), (7, 1)]
    x = [torch.cat([data.sets[s] for s in group]).double() - data.centre for group in members]
    wanted = torch.stack([rows @ rows.T for rows in x])
    torch.testing.assert_close(data.gram(members), wanted, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(torch.stack([data._product([data.sets[s] for s in group]) for group in members]), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-1000, -700, 660, 1010])
@pytest.mark.parametrize("d", [4, 60])
def test_scales_at_the_ends_of_float64(method: str, exponent: int, d: int) -> None:
    positive, negative = (x.double() for x in two_sets(20, 20, d))
    wanted = fit_cav(positive, negative, method=method, generator=torch.Generator().manual_seed(0))
    scale = 2.0**exponent
    found = fit_cav(positive * scale, negative * scale, method=method, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.vector, wanted.vector, rtol=1e-12, atol=1e-12)
    assert found.accuracy == wanted.accuracy
    assert found.bias / scale == pytest.approx(wanted.bias, rel=1e-9)


def test_arrays_as_numpy_has_them() -> None:
    positive, negative = (x.numpy() for x in two_sets(20, 20, 4))
    wanted = fit_cav(positive, negative).vector
    swapped = [x.astype(x.dtype.newbyteorder(">")) for x in (positive, negative)]
    assert torch.equal(fit_cav(*swapped).vector, wanted)
    torch.testing.assert_close(fit_cav(positive[:, ::-1], negative[:, ::-1]).vector.flip(0), wanted)
    with pytest.raises(TypeError, match="positive: expected an array of numbers, got dtype <U1"):
        fit_cav(np.array([["a"]]), negative)
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator or None, got int"):
        fit_cav(positive, negative, generator=3)
