"""purify against its definition, and against moving mass back and forth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from xai_fast.distill import fit_gam, purify
from xai_fast.distill.purify import lower_effects


def conditions(pure: Tensor, rows: Tensor, columns: Tensor, w: Tensor) -> float:
    """The largest of the sums that must be 0, relative to the weights."""
    sums = [(w * pure).sum(0), (w * pure).sum(1), (w.sum(1) * rows).sum(), (w.sum(0) * columns).sum()]
    return max(float(s.abs().max()) for s in sums) / float(w.max())


def by_moving_mass(scores: Tensor, w: Tensor, rounds: int = 20_000) -> Tensor:
    pure = scores.clone()
    for _ in range(rounds):
        pure = pure - (w * pure).sum(1, keepdim=True) / w.sum(1, keepdim=True)
        pure = pure - (w * pure).sum(0, keepdim=True) / w.sum(0, keepdim=True)
    return pure


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (7, 4), (40, 33)])
def test_definition(shape: tuple[int, int]) -> None:
    scores, w = torch.randn(shape).double(), torch.rand(shape).double() + 0.01
    pure, rows, columns, intercept = purify(scores, w)
    torch.testing.assert_close(pure + rows[:, None] + columns + intercept, scores, rtol=0, atol=1e-13)
    assert conditions(pure, rows, columns, w) < 1e-12
    torch.testing.assert_close(intercept, (w * scores).sum() / w.sum())


def test_mass_moved_back_and_forth_ends_here() -> None:
    scores, w = torch.randn(6, 5).double(), torch.rand(6, 5).double() ** 3
    torch.testing.assert_close(purify(scores, w)[0], by_moving_mass(scores, w), rtol=0, atol=1e-11)


def test_known_parts_are_found() -> None:
    """Under uniform weights the parts of a table that was made of centred parts."""
    x, y = torch.linspace(-1, 1, 9, dtype=torch.float64), torch.linspace(-1, 1, 7, dtype=torch.float64)
    pure, rows, columns, intercept = purify(3 + 2 * x[:, None] - y + x[:, None] * y, torch.ones(9, 7))
    torch.testing.assert_close(pure, x[:, None] * y, rtol=0, atol=1e-14)
    torch.testing.assert_close(rows, 2 * x, rtol=0, atol=1e-14)
    torch.testing.assert_close(columns, -y, rtol=0, atol=1e-14)
    assert float(intercept) == pytest.approx(3, abs=1e-14)


def test_cells_rows_and_columns_without_data() -> None:
    scores, w = torch.randn(8, 6).double(), torch.rand(8, 6).double()
    w[torch.rand(8, 6) < 0.4] = 0
    w[2], w[:, 3] = 0, 0
    pure, rows, columns, intercept = purify(scores, w)
    torch.testing.assert_close(pure + rows[:, None] + columns + intercept, scores, rtol=0, atol=1e-13)
    assert conditions(pure, rows, columns, w) < 1e-12
    assert rows[2] == 0
    assert columns[3] == 0


def test_parts_that_share_no_row_and_no_column() -> None:
    scores, w = torch.randn(6, 6).double(), torch.zeros(6, 6).double()
    w[:3, :2], w[3:, 2:] = torch.rand(3, 2).double(), torch.rand(3, 4).double()
    pure, rows, columns, _ = purify(scores, w)
    assert conditions(pure, rows, columns, w) < 1e-12
    first = purify(scores[:3, :2], w[:3, :2])[0]
    torch.testing.assert_close(pure[:3, :2], first, rtol=0, atol=1e-12)


def test_nearly_cut_weights_stay_exact() -> None:
    """Two blocks joined by one light cell: where moving mass takes about 1e9 rounds."""
    scores, w = torch.randn(6, 6).double(), torch.zeros(6, 6).double()
    w[:3, :3], w[3:, 3:], w[0, 5] = 1, 1, 1e-9
    pure, rows, columns, _ = purify(scores, w)
    assert conditions(pure, rows, columns, w) < 1e-12
    assert abs(float(pure[0, 5])) < 1e-6


def test_outputs_dtypes_and_arrays() -> None:
    scores, w = torch.randn(5, 4, 3), torch.rand(5, 4)
    pure, rows, columns, intercept = purify(scores, w)
    assert [tuple(t.shape) for t in (pure, rows, columns, intercept)] == [(5, 4, 3), (5, 3), (4, 3), (3,)]
    assert {t.dtype for t in (pure, rows, columns, intercept)} == {torch.float32}
    for c in range(3):
        torch.testing.assert_close(purify(scores[..., c], w)[0], pure[..., c])
    from_array = purify(scores.double().numpy(), w.numpy())
    torch.testing.assert_close(from_array[0], purify(scores.double(), w)[0])
    assert purify(np.arange(6).reshape(2, 3), np.ones((2, 3)))[0].dtype == torch.float64


def test_inputs_are_left_alone_and_twice_is_once() -> None:
    scores, w = torch.randn(5, 4).double(), torch.rand(5, 4).double()
    before = scores.clone(), w.clone()
    pure = purify(scores, w)[0]
    assert torch.equal(scores, before[0])
    assert torch.equal(w, before[1])
    again = purify(pure, w)
    torch.testing.assert_close(again[0], pure, rtol=0, atol=1e-14)
    assert max(float(t.abs().max()) for t in again[1:]) < 1e-14


@pytest.mark.parametrize(
    ("scores", "weights", "error", "words"),
    [
        (torch.ones(3), torch.ones(3), ValueError, "scores: expected shape"),
        (torch.ones(3, 2), torch.ones(2, 3), ValueError, "weights: expected shape"),
        (torch.ones(3, 2), -torch.ones(3, 2), ValueError, "weights: expected finite"),
        (torch.ones(3, 2), torch.zeros(3, 2), ValueError, "weights: expected at least one above 0"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), ValueError, "scores: expected finite"),
        ([[1.0]], torch.ones(1, 1), TypeError, "scores: expected a torch.Tensor"),
        (torch.ones(2, 2), "w", TypeError, "weights: expected a torch.Tensor"),
    ],
)
def test_errors(scores: object, weights: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        purify(scores, weights)
    assert "\n" not in str(caught.value)


def test_triples() -> None:
    table, w = torch.randn(4, 5, 3, 2).double(), torch.rand(4, 5, 3).double()
    w[torch.rand(4, 5, 3) < 0.3] = 0
    pure, effects = lower_effects(table, w)
    assert [tuple(e.shape) for e in effects] == [(4, 5, 2), (4, 3, 2), (5, 3, 2)]
    for axis in range(3):
        assert float((pure * w[..., None]).sum(axis).abs().max()) < 1e-12
    ij, ik, jk = effects
    torch.testing.assert_close(pure + ij[:, :, None] + ik[:, None] + jk[None], table, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", ["linear", "steps"])
def test_model_predicts_the_same_after_purification(basis: str) -> None:
    """Impure tables on purpose, one triple over a pair that has no term of its own."""
    X = torch.randn(3000, 4, dtype=torch.float64)
    X[:, 3] = torch.randint(0, 20, (3000,))
    triples = [(0, 1, 2), (1, 2, 3), (0, 1), (2, 3)]
    gam = fit_gam(X.sum(1), X, interactions=triples, basis=basis, categorical=[3], smoothing=0.1)
    kept = [t for t in gam.terms if t.order != 2 or t.features in triples]
    impure = replace(gam, terms=tuple(replace(t, values=torch.randn_like(t.values)) for t in kept))
    pure = impure.purify()
    assert float((pure.predict(X) - impure.predict(X)).abs().max()) < 1e-10
    outside = 5 * torch.randn(500, 4, dtype=torch.float64)
    outside[:, 3] = 3
    assert float((pure.predict(outside) - impure.predict(outside)).abs().max()) < 1e-10
    assert {t.features for t in pure.terms} > {t.features for t in impure.terms}
    for term in pure.terms:
        weighted = term.values * term.weights
        for axis in range(term.order):
            assert float(weighted.sum(axis).abs().max()) < 1e-12
    assert pure.moved[3] > 0.01
    assert pure.moved[2] > 0.01
    again = pure.purify()
    assert max(again.moved.values()) < 1e-25


def test_arrays_as_numpy_has_them() -> None:
    scores, weights = np.random.default_rng(0).random((3, 4)), np.ones((3, 4))
    wanted = purify(scores, weights)[0]
    assert torch.equal(purify(scores.astype(">f8"), weights.astype(">i4"))[0], wanted)
    assert torch.equal(purify(scores[::-1], weights[::-1])[0].flip(0), purify(scores[::-1].copy(), weights)[0].flip(0))
    with pytest.raises(TypeError, match="scores: expected an array of numbers, got dtype <U1"):
        purify(np.array([["a"]]), np.ones((1, 1)))
