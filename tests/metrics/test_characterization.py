"""The characterization score and the area of a fidelity curve against PyTorch Geometric's published numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xai_fast.metrics import characterization_score, fidelity_curve_auc


def test_published_numbers() -> None:
    plus, minus = torch.tensor([1.0, 0.6, 0.5, 1.0]), torch.tensor([0.0, 0.2, 0.5, 1.0])
    torch.testing.assert_close(characterization_score(plus, minus, 0.2, 0.8), torch.tensor([1.0, 0.75, 0.5, 0.0]))
    plus, minus = torch.tensor([1.0, 1.0, 0.5, 1.0]), torch.tensor([0.0, 0.5, 0.5, 0.9])
    area = fidelity_curve_auc(plus, minus, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(area, torch.tensor(8.5))


def test_is_the_weighted_harmonic_mean() -> None:
    plus, minus = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    for weights in ((1.0, 1.0), (0.3, 0.7), (5.0, 2.0)):
        wanted = sum(weights) / (weights[0] / plus + weights[1] / (1 - minus))
        torch.testing.assert_close(characterization_score(plus, minus, *weights), wanted)
        scaled = [1000 * w for w in weights]
        torch.testing.assert_close(characterization_score(plus, minus, *scaled), wanted)


@pytest.mark.parametrize(("plus", "minus", "wanted"), [(0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0)])
def test_corners(plus: float, minus: float, wanted: float) -> None:
    found = characterization_score(plus, minus)
    assert isinstance(found, float)
    assert found == wanted
    assert characterization_score(torch.tensor([plus]), minus).tolist() == [wanted]


def test_nan_stays() -> None:
    assert characterization_score(torch.tensor([float("nan"), 0.5]), torch.tensor([0.5, 0.5])).isnan().tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.5, 0.0, 1.0), "pos_weight: expected a number above 0"),
        ((0.5, 0.5, 1.0, -1.0), "neg_weight: expected a number above 0"),
        ((1.5, 0.5), "pos_fidelity: expected values from 0 to 1"),
        ((0.5, torch.tensor([-0.5])), "neg_fidelity: expected values from 0 to 1"),
        (("0.5", 0.5), "pos_fidelity: expected a number or a torch.Tensor"),
        ((torch.rand(3), torch.rand(4)), r"neg_fidelity: expected a shape that broadcasts with pos_fidelity \(3,\)"),
    ],
)
def test_bad_scores(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        characterization_score(*arguments)


@pytest.mark.parametrize(
    ("minus", "x", "message"),
    [
        ([0.0, 1.0], [0.0, 1.0], "neg_fidelity: expected values below 1"),
        ([0.0, 0.5], [0.0, 0.0], "x: expected values that rise"),
        ([0.0, 0.5], [0.0, 1.0, 2.0], "x: expected pos_fidelity"),
    ],
)
def test_bad_curves(minus: list[float], x: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fidelity_curve_auc(torch.tensor([0.5, 0.5]), torch.tensor(minus), torch.tensor(x))


@pytest.mark.parametrize("weight", [1e308, 5e-324])
def test_only_the_ratio_of_the_weights_counts(weight: float) -> None:
    assert characterization_score(0.5, 0.2, weight, weight) == characterization_score(0.5, 0.2)
    assert characterization_score(0.5, 0.2, weight, 1.0) == pytest.approx(0.5 if weight > 1 else 0.8)


def test_a_number_of_numpy() -> None:
    assert characterization_score(np.float32(0.5), 0.25) == characterization_score(0.5, 0.25)
