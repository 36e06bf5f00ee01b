"""Examples in the order of their likeness to a concept, and their picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xai_fast.concepts import fit_cav, sort_by_concept
from xai_fast.viz.concepts import concept_grid


def test_order_and_cosine() -> None:
    x = torch.tensor([[1.0, 1.0], [-3.0, 0.0], [0.0, 0.0], [5.0, 0.0]])
    order, cosine = sort_by_concept(x, torch.tensor([2.0, 0.0]))
    assert order.tolist() == [3, 0, 2, 1]
    torch.testing.assert_close(cosine, torch.tensor([0.5**0.5, -1.0, 0.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_agrees_with_torch(dtype: torch.dtype) -> None:
    x = (torch.randn(50, 300) * 1e4).to(dtype)
    v = torch.randn(300).to(dtype)
    order, cosine = sort_by_concept(x, v)
    expected = torch.nn.functional.cosine_similarity(x.double(), v.double()[None])
    torch.testing.assert_close(cosine, expected.to(dtype))
    assert torch.equal(order, expected.argsort(descending=True))
    assert cosine.dtype == dtype


def test_cav_puts_its_concept_first() -> None:
    direction = torch.nn.functional.normalize(torch.randn(100), dim=0)
    shift = 20 * direction
    cav = fit_cav(torch.randn(30, 100) + shift, torch.randn(30, 100))
    x = torch.randn(20, 100)
    x[::2] += shift
    order, cosine = sort_by_concept(x.numpy(), cav)
    assert set(order[:10].tolist()) == set(range(0, 20, 2))
    assert bool((cosine[order].diff() <= 0).all())


def test_ties_keep_their_order() -> None:
    order, _ = sort_by_concept(torch.ones(7, 2), torch.tensor([1.0, 0.0]))
    assert order.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("x", "v", "message"),
    [
        (torch.zeros(0, 2), torch.ones(2), "activations: expected shape"),
        (torch.ones(3, 2), torch.ones(3), r"cav: expected a vector of shape \(2,\)"),
        (torch.ones(3, 2), torch.zeros(2), "cav: expected a vector of finite length above 0"),
        (torch.full((3, 2), torch.inf), torch.ones(2), "activations: expected finite values"),
    ],
)
def test_refuses(x: torch.Tensor, v: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sort_by_concept(x, v)


def test_grid_shows_both_ends() -> None:
    images = torch.stack([torch.full((1, 4, 4), i / 10) for i in range(6)])
    cosine = torch.tensor([0.0, 0.5, -0.5, 0.9, 0.1, -0.9])
    figure = concept_grid(images, cosine, 3)
    shown = [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes]
    assert shown == pytest.approx([25.5 * i for i in (3, 1, 4, 5, 2, 0)], abs=0.6)
    assert [axis.get_xlabel() for axis in figure.axes] == ["0.90", "0.50", "0.10", "-0.90", "-0.50", "0.00"]
    assert [figure.axes[0].get_ylabel(), figure.axes[3].get_ylabel()] == ["most similar", "least similar"]


@pytest.mark.parametrize(
    ("cosine", "k", "message"),
    [(np.zeros(3), 1, "cosine: expected one for each"), (np.zeros(2), 3, "k: expected 1 to 2"), ([0, np.nan], 1, "got NaN")],
)
def test_grid_refuses(cosine: object, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        concept_grid(torch.zeros(2, 1, 4, 4), torch.as_tensor(cosine), k)


def test_grid_shows_no_negative_zero() -> None:
    figure = concept_grid(torch.rand(2, 3, 4, 4), torch.tensor([0.3, -0.001]), k=1)
    assert [axis.get_xlabel() for axis in figure.axes] == ["0.30", "0.00"]


@pytest.mark.parametrize("scale", [1e308, 1e200, 1e-200, 5e-324])
def test_cosine_at_the_ends_of_float64(scale: float) -> None:
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64) * scale
    for vector in (torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([scale, 0.0], dtype=torch.float64)):
        torch.testing.assert_close(sort_by_concept(x, vector)[1], torch.tensor([0.5**0.5, 0.0], dtype=torch.float64))


def test_arrays_as_numpy_has_them() -> None:
    x = np.array([[0.0, 2.0], [3.0, 1.0]])
    assert sort_by_concept(x.astype(">f8"), torch.tensor([1.0, 0.0]))[0].tolist() == [1, 0]
    with pytest.raises(TypeError, match="activations: expected an array of numbers"):
        sort_by_concept(np.array([["a"]]), torch.ones(1))
