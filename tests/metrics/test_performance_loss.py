"""Relative performance loss against the loss of the pruned model, one set at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.metrics.models import classifier
from xai_fast.metrics import relative_loss, relative_performance_loss

N, F, C = 23, 6, 3
SETS = {"none": [], "first": [0], "two": [2, 4], "all": list(range(F))}


def data() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, F, dtype=torch.float64)
    model = classifier(F, C)
    return model, x, torch.where(torch.rand(N) < 0.8, model(x).argmax(1), torch.randint(C, (N,)))


def losses(model: Any, x: Tensor, y: Tensor) -> list[float]:
    found = []
    for chosen in SETS.values():
        pruned = x.clone()
        pruned[:, chosen] = 0
        found.append(float(functional.cross_entropy(model(pruned), y)))
    return found


@pytest.mark.parametrize("batch_size", [None, 5])
def test_is_the_formula(batch_size: int | None) -> None:
    model, x, y = data()
    found = relative_performance_loss(model, x, y, SETS, batch_size=batch_size)
    wanted = losses(model, x, y)
    assert found.loss == pytest.approx(wanted[0])
    assert found.pruned_loss.tolist() == pytest.approx(wanted)
    assert found.relative_loss.tolist() == pytest.approx([(w - wanted[0]) / wanted[0] for w in wanted])
    assert found.accuracy == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert found.pruned_accuracy[0] == found.accuracy
    assert found.size.tolist() == [0, 1, 2, F]
    assert found.evaluations == N * (len(SETS) + 1)
    assert found.table()[2]["features"] == "two"


def test_batches_of_uneven_size_count_by_sample() -> None:
    model, x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=9)
    whole, parts = (relative_performance_loss(model, *a, SETS) for a in ((x, y), (loader, None)))
    torch.testing.assert_close(parts.relative_loss, whole.relative_loss)
    assert parts.samples == N


def test_masks_images_and_probabilities() -> None:
    torch.manual_seed(0)
    images, y = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.randint(C, (5,))
    model = classifier(18, C)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 0] = True
    found = relative_performance_loss(lambda x: model(x).softmax(1), images, y, mask)
    pruned = images.masked_fill(mask, 0)
    assert float(found.pruned_loss) == pytest.approx(float(functional.cross_entropy(model(pruned), y)))
    assert found.size.tolist() == [6]


def test_a_loss_of_ones_own() -> None:
    _, x, _ = data()
    y = x.sum(1)
    found = relative_performance_loss(lambda x: x.sum(1) + 1, x, y, [[0], [1, 2]], loss=lambda out, y: (out - y) ** 2)
    wanted = [float(((1 - x[:, f].sum(1)) ** 2).mean()) for f in ([0], [1, 2])]
    assert found.loss == pytest.approx(1)
    assert found.pruned_loss.tolist() == pytest.approx(wanted)
    assert math.isnan(found.accuracy)


def test_the_bare_formula() -> None:
    assert relative_loss(0.3, 0.6) == pytest.approx(1.0)
    assert relative_loss(0.3, 0.6, literal=True) == pytest.approx(math.log(0.6 / 0.3) / math.log(0.3))
    assert relative_loss(2.0, 1.0) == pytest.approx(-0.5)
    assert math.isnan(relative_loss(1.0, 0.5, literal=True))
    assert math.isnan(relative_loss(0.0, 0.5))
    assert relative_loss(torch.tensor([0.5, 1.0]), 1.0).tolist() == [1.0, 0.0]


def test_literal_form_of_a_model() -> None:
    model, x, y = data()
    found = relative_performance_loss(model, x, y, [[0]], literal=True)
    wanted = losses(model, x, y)
    assert float(found.relative_loss) == pytest.approx(math.log(wanted[1] / wanted[0]) / math.log(wanted[0]))


def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")


def test_lists_of_labels_for_a_loss_of_ones_own() -> None:
    model, x, y = data()
    found = [relative_performance_loss(model, x, labels, [[0]], loss=own_loss) for labels in (y, y.tolist(), y.numpy())]
    assert found[0].loss == found[1].loss == found[2].loss


def test_nan_is_neither_right_nor_wrong() -> None:
    model, x, y = data()

    def broken(z: Tensor) -> Tensor:
        return model(z).masked_fill((z[:, 0] == 0)[:, None], math.nan)

    found = relative_performance_loss(broken, x, y, SETS)
    assert math.isfinite(found.accuracy)
    assert found.pruned_accuracy.isnan().tolist() == found.relative_loss.isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "features: expected at least one set"),
        ({"features": 3}, "features: expected a dict"),
        ({"features": [[F]]}, "features: expected indices from 0 to 5"),
        ({"features": [[0.5]]}, "features: expected whole numbers"),
        ({"features": [torch.ones(F + 1, dtype=torch.bool)]}, "features: expected a mask that broadcasts"),
        ({"labels": None}, "labels: expected the true classes"),
        ({"labels": torch.full((N,), C)}, "labels: expected classes"),
        ({"loss": "mse"}, "loss: expected 'log_loss' or a callable"),
        ({"loss": lambda out, y: out.sum()}, "loss: expected it to return one value a sample"),
        ({"inputs": [], "labels": None}, "inputs: expected at least one batch"),
        ({"inputs": np.zeros((N, F))}, r"inputs: expected a torch.Tensor or batches \(x, y\), got ndarray"),
        ({"inputs": None}, r"inputs: expected a torch.Tensor or batches \(x, y\), got NoneType"),
        ({"inputs": [torch.zeros(N, F)]}, r"inputs: expected batches \(x, y\), got Tensor"),
        ({"features": ["abc"]}, r"features\['0'\]: expected a torch.Tensor or numbers, got str"),
        ({"features": {"a": None}}, r"features\['a'\]: expected a torch.Tensor or numbers, got NoneType"),
        ({"labels": "ab"}, "labels: expected a torch.Tensor or numbers, got str"),
        ({"labels": torch.zeros(3), "loss": own_loss}, f"labels: expected one for each of the {N} samples"),
        ({"labels": torch.zeros(2 * N), "loss": own_loss}, f"labels: expected one for each of the {N} samples"),
        ({"labels": object(), "loss": own_loss}, "labels: expected a torch.Tensor or numbers, got object"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    model, x, y = data()
    arguments = {"forward": model, "inputs": x, "labels": y, "features": SETS, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        relative_performance_loss(**arguments)


def test_bad_losses() -> None:
    with pytest.raises(ValueError, match="pruned_loss: expected losses of at least 0"):
        relative_loss(0.5, -0.5)
    with pytest.raises(ValueError, match=r"pruned_loss: expected a shape that broadcasts with loss \(2,\), got \(3,\)"):
        relative_loss(torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match=r"loss: expected a number or a torch.Tensor, got bool"):
        relative_loss(True, 1.0)
    assert relative_loss(np.float32(0.5), np.int64(1)) == 1.0
