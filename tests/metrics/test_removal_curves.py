"""Deletion and insertion curves against a loop, and on models whose curves are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.metrics.models import classifier, removed
from xai_fast.metrics import deletion_curve, insertion_curve

B, F, C = 5, 7, 3


def data() -> tuple[Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return classifier(F, C), torch.randn(B, F, dtype=torch.float64), torch.randn(B, F, dtype=torch.float64)


@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("order", ["most_first", "least_first"])
def test_is_the_loop(insert: bool, batch_size: int | None, order: str) -> None:
    forward, x, maps = data()
    measure = insertion_curve if insert else deletion_curve
    found = measure(forward, x, maps, baseline=0.5, batch_size=batch_size, order=order)
    assert found.x.tolist() == pytest.approx([k / F for k in range(F + 1)])
    for i in range(B):
        target = int(forward(x[i : i + 1]).argmax())
        ranked = maps[i] if order == "most_first" else -maps[i]
        for k in range(F + 1):
            changed = removed(x[i], ranked, k, 0.5, keep=insert)
            assert float(found.values[i, k]) == pytest.approx(float(forward(changed[None]).softmax(1)[0, target]))
    torch.testing.assert_close(found.area, torch.trapezoid(found.values, dx=1 / F))
    assert found.evaluations == B * (F + 1)


def test_linear_model() -> None:
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    found = deletion_curve(lambda x: x.sum(1), x, x)
    assert found.values.tolist() == [[10, 6, 3, 1, 0]]
    assert float(found.area) == pytest.approx((10 / 2 + 6 + 3 + 1) / 4)
    assert insertion_curve(lambda x: x.sum(1), x, x).values.tolist() == [[0, 4, 7, 9, 10]]
    assert found.table()[1] == {"x": 0.25, "value": 6.0}


def test_steps() -> None:
    forward, x, maps = data()
    every = deletion_curve(forward, x, maps, steps=1000)
    some = deletion_curve(forward, x, maps, steps=3)
    assert some.x.tolist() == pytest.approx([0, 2 / 7, 5 / 7, 1])  # 7/3 and 14/3 rounded
    assert torch.equal(some.values, every.values[:, [0, 2, 5, 7]])


def test_outputs() -> None:
    forward, x, maps = data()
    raw = deletion_curve(forward, x, maps, outputs="raw", target=1)
    torch.testing.assert_close(raw.values[:, 0], forward(x)[:, 1])
    probabilities = deletion_curve(lambda x: forward(x).softmax(1), x, maps, target=1)
    logits = deletion_curve(forward, x, maps, target=torch.ones(B, dtype=torch.int64))
    torch.testing.assert_close(probabilities.values, logits.values)
    twice = deletion_curve(lambda x: forward(x).softmax(1), x, maps, target=1, outputs="logits")
    assert not torch.allclose(twice.values, logits.values)


@pytest.mark.parametrize("measure", [deletion_curve, insertion_curve])
@pytest.mark.parametrize("order", ["most_first", "least_first"])
def test_nan_stays_with_its_sample(measure: Any, order: str) -> None:
    forward, x, maps = data()
    maps[2, 4] = float("nan")
    found = measure(forward, x, maps, order=order)
    assert found.values.isnan().all(1).tolist() == found.values.isnan().any(1).tolist() == [False, False, True, False, False]
    assert found.area.isnan().tolist() == [False, False, True, False, False]
    assert found.mean.isnan().all()


@pytest.mark.parametrize("measure", [deletion_curve, insertion_curve])
def test_outputs_with_nan_have_no_class_to_follow(measure: Any) -> None:
    forward, x, maps = data()

    def broken(z: torch.Tensor) -> torch.Tensor:
        return forward(z).masked_fill((z == x[0]).all(1)[:, None], float("nan"))

    predicted, given = measure(broken, x, maps), measure(broken, x, maps, target=1)
    assert predicted.values[0].isnan().all()
    assert given.values[0].isnan().sum() == 1  # the point at the input itself
    assert predicted.area.isnan().tolist() == given.area.isnan().tolist() == [True, *[False] * (B - 1)]


def test_one_feature_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    found = deletion_curve(lambda x: x, torch.tensor([[2.0]]), torch.tensor([[1.0]]), outputs="raw", progress=True)
    assert found.values.tolist() == [[2, 0]]
    assert "deletion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number"),
        ({"order": "random"}, "order: expected one of"),
        ({"outputs": "odds"}, "outputs: expected one of"),
        ({"target": C}, "target: expected classes from 0 to 2"),
        ({"target": torch.zeros(B + 1, dtype=torch.int64)}, "target: expected shape"),
        ({"target": 0.5}, "target: expected whole class numbers"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    forward, x, maps = data()
    with pytest.raises((ValueError, TypeError), match=message):
        deletion_curve(forward, x, maps, **change)
