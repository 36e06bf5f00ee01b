"""Interactions that are there are found, others are not, and the choice keeps its rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xai_fast.distill import fit_gam, screening
from xai_fast.distill.binning import make_grid
from xai_fast.distill.screening import coarse_cells, pair_gains, triple_candidates, triple_gains


def uniform(n: int, features: int) -> Tensor:
    return 2 * torch.rand(n, features, dtype=torch.float64) - 1


def cells_of(X: Tensor, count: int) -> Tensor:
    return coarse_cells(X, [make_grid(X[:, f], f, 64, "linear") for f in range(X.shape[1])], count)


def explained(cells: Tensor, r: Tensor, w: Tensor, i: int, j: int) -> float:
    """Weighted variance between the cells of a pair, less that between its rows and columns, by loops."""
    total = 0.0
    for columns, sign in (((i, j), 1), ((i,), -1), ((j,), -1)):
        for key in cells[:, columns].unique(dim=0):
            inside = (cells[:, columns] == key).all(1)
            total += sign * float((w[inside] * r[inside]).sum() ** 2 / w[inside].sum())
    return (total + float((w * r).sum() ** 2 / w.sum())) / float((w * r**2).sum())


def test_pair_gains_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    X, w = uniform(700, 4), torch.rand(700, dtype=torch.float64)
    w = w / w.sum()
    r = X[:, 0] * X[:, 1] + 0.3 * torch.randn(700)
    cells = cells_of(X, 5)
    monkeypatch.setattr(screening, "CHUNK", 20 * 100)
    found = pair_gains(cells, r[None], w, 5)
    chance = 16 * float((w**2).sum())
    for i, j in ((0, 1), (1, 2), (0, 3)):
        assert float(found[i, j]) == pytest.approx(explained(cells, r, w, i, j) - chance, abs=1e-5)
    torch.testing.assert_close(found, found.T)


def test_chance_gains_nothing() -> None:
    """49 degrees of freedom over 1000 rows would look like 5 % of the variance."""
    X = uniform(1000, 12)
    gains = pair_gains(cells_of(X, 8), torch.randn(3, 1000, dtype=torch.float64), torch.ones(1000).double())
    upper = gains[torch.triu_indices(12, 12, 1).unbind()]
    assert float(upper.mean().abs()) < 5e-3
    assert float(upper.abs().max()) < 0.03


def test_cells_have_equal_mass() -> None:
    X = torch.randn(10_000, 2, dtype=torch.float64) ** 3
    for count in (4, 8):
        mass = torch.bincount(cells_of(X, count)[:, 0], minlength=count) / 10_000
        assert float((mass - 1 / count).abs().max()) < 0.03


@pytest.mark.parametrize("heredity", [False, True])
def test_product_is_found(heredity: bool) -> None:
    X = uniform(4000, 10)
    gam = fit_gam(lambda x: x.sum(1) + 0.5 * x[:, 3] * x[:, 7], X, interactions=1, heredity=heredity)
    assert [t.features for t in gam.terms if t.order == 2] == [(3, 7)]
    assert gam.fidelity().r2 > 0.999


def test_pure_interaction_needs_no_main_effect() -> None:
    """x3 x7 of centred features: heredity hides it."""
    X = uniform(4000, 10)

    def teacher(x: Tensor) -> Tensor:
        return x[:, 0] + x[:, 1] + x[:, 3] * x[:, 7]

    pairs = [[t.features for t in fit_gam(teacher, X, interactions=1, heredity=h).terms[10:]] for h in (False, True)]
    assert pairs == [[(3, 7)], [(0, 1)]]


def test_several_pairs_and_classes() -> None:
    X = uniform(8000, 12)
    wanted = [(0, 5), (2, 3), (4, 11), (6, 7)]
    gam = fit_gam(lambda x: torch.stack([x[:, i] * x[:, j] for i, j in wanted], 1), X, interactions=4)
    assert [t.features for t in gam.terms if t.order == 2] == wanted
    assert gam.fidelity().agreement > 0.98


def test_more_pairs_than_there_are() -> None:
    gam = fit_gam(lambda x: x.prod(1), uniform(1000, 3), interactions=50)
    assert [t.features for t in gam.terms if t.order == 2] == [(0, 1), (0, 2), (1, 2)]
    assert len(fit_gam(lambda x: x[:, 0], uniform(1000, 1), interactions=2).terms) == 1


def test_triples() -> None:
    X = uniform(8000, 6)

    def teacher(x: Tensor) -> Tensor:
        return x[:, 0] * x[:, 1] + x[:, 1] * x[:, 2] + 2 * x[:, 0] * x[:, 1] * x[:, 2] + x[:, 4]

    gam = fit_gam(teacher, X, interactions=3, max_order=3)
    assert [t.features for t in gam.terms if t.order == 3] == [(0, 1, 2)]
    assert gam.fidelity().r2 > 0.99
    assert all(t.order < 3 for t in fit_gam(teacher, X, interactions=3).terms)
    nothing = fit_gam(lambda x: x[:, 0] * x[:, 1] + x[:, 1] * x[:, 2], X, interactions=3, max_order=3)
    assert sum(t.order == 3 for t in nothing.terms) == 0


def test_triple_candidates_and_gains() -> None:
    assert triple_candidates([(0, 1), (1, 2), (3, 4)], [0, 1, 2, 3, 4]) == [(0, 1, 2)]
    assert triple_candidates([(0, 1)], [0, 1, 2]) == []
    X = uniform(10_000, 4)
    cells, w = cells_of(X, 4), torch.full((10_000,), 1e-4, dtype=torch.float64)
    r = torch.stack([X[:, 0] * X[:, 1] * X[:, 2], torch.randn(10_000)])
    gain, noise = triple_gains(cells, r / r.std(1, keepdim=True), w, [(0, 1, 2), (1, 2, 3)], 4)
    assert 0.2 < float(gain[0]) < 0.5
    assert abs(float(gain[1])) < 5 * float(noise[1])
