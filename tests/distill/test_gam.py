"""Students of teachers whose parts are known, fidelity, reports, pictures, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor, nn

from tests.implementations import DEVICES
from xai_fast.distill import GAM, fit_gam
from xai_fast.distill._solve import Stage, projector
from xai_fast.distill.binning import coarsen, make_grid
from xai_fast.influence.solvers import NotConverged

pytestmark = pytest.mark.filterwarnings("error::xai_fast.influence.solvers.NotConverged")


def uniform(n: int = 4000, features: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return (2 * torch.rand(n, features, dtype=dtype) - 1).to(device)


def additive(x: Tensor) -> Tensor:
    return 2 * x[:, 0] + torch.sin(3 * x[:, 1]) + x[:, 2] ** 2


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["linear", "steps"])
def test_coarse_functions_are_fine_functions(basis: str) -> None:
    x = torch.randn(1000, dtype=torch.float64) ** 3
    fine = make_grid(x, 0, 37, basis)
    coarse = coarsen(fine, 10, torch.ones(fine.size))
    v = torch.randn(coarse.size, dtype=torch.float64)
    at = torch.cat([x, 3 * x])
    (i, s), (j, t) = coarse.encode(at), fine.encode(at)
    torch.testing.assert_close((fine.lift(coarse) @ v)[j].mul(t).sum(1), v[i].mul(s).sum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(s.sum(1), torch.ones(len(at), dtype=torch.float64))


def test_categories_are_merged_by_mass() -> None:
    x = torch.tensor([5.0] * 50 + [1.0] * 3 + [9.0] * 40 + [2.0] * 2)
    grid = make_grid(x, 0, 2, "linear", is_categorical=True)
    assert grid.points.tolist() == [1, 2, 5, 9]
    coarse = coarsen(grid, 3, torch.tensor([3, 2, 50, 40]))
    index, share = coarse.encode(torch.tensor([1.0, 2.0, 5.0, 9.0, 7.0]))
    assert index[0] == index[1] == 2
    assert sorted(index[2:4, 0].tolist()) == [0, 1]
    assert share[:, 0].tolist() == [1, 1, 1, 1, 0]
    assert torch.equal(grid.lift(coarse).argmax(1), index[:4, 0])


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0] * 900 + [1.0], [0.0] * 900 + [1.0, 2.0, 3.0] * 20])
@pytest.mark.parametrize("basis", ["linear", "steps"])
def test_few_values_and_ties(values: list[float], basis: str) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    for bins in (2, 3, 64):
        grid = make_grid(x, 0, bins, basis)
        assert 2 <= grid.size <= bins
        assert bool((grid.points.diff() > 0).all())
        if bins == 64:
            index, share = grid.encode(x.unique())
            used = index.gather(1, share.argmax(1, keepdim=True))
            assert len(used.unique()) == len(x.unique())


# ---- known teachers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_additive_teacher(device: str) -> None:
    X = uniform(device=device)
    gam = fit_gam(additive, X)
    assert gam.fidelity().r2 > 0.9999
    fresh = uniform(device=device)
    assert 1 - float(((gam.predict(fresh) - additive(fresh)) ** 2).mean() / additive(fresh).var()) > 0.9999
    assert gam.term((3,)).importance < 0.01
    assert gam.solutions[0].converged
    assert float(gam.solutions[0].residual.max()) < 1e-6


def test_linear_teacher_is_exact() -> None:
    X = uniform()
    gam = fit_gam(X @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64), X, smoothing=1e-6)
    assert 1 - gam.fidelity(X, outputs=X @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)).r2 < 1e-9


def test_known_functional_anova() -> None:
    """On independent uniform features the parts of x0 x1 + x0^2 + 1 are known."""
    X = uniform(20_000, 3)
    gam = fit_gam(lambda x: 1 + x[:, 0] ** 2 + x[:, 0] * x[:, 1], X, interactions=[(0, 1)])
    assert float(gam.intercept) == pytest.approx(4 / 3, abs=0.02)
    grid = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    at = torch.cartesian_prod(grid, grid, grid[:1])
    parts = gam.explain(at)
    torch.testing.assert_close(parts[:, 0], at[:, 0] ** 2 - 1 / 3, rtol=0, atol=0.03)
    torch.testing.assert_close(parts[:, 1:3], torch.zeros(len(at), 2).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(parts[:, 3], at[:, 0] * at[:, 1], rtol=0, atol=0.03)
    assert gam.term((0, 1)).importance == pytest.approx(1 / 3, abs=0.02)


def test_orders_say_what_each_adds() -> None:
    X = uniform(8000, 4)
    gam = fit_gam(
        lambda x: x[:, 0] + x[:, 0] * x[:, 1] + 3 * x[:, 1] * x[:, 2] * x[:, 3], X, interactions=[(0, 1), (1, 2, 3)]
    )
    orders = gam.fidelity().by_order
    # Variances 1/3, 1/9 and 9/27.
    assert [o.name for o in orders] == ["main effects", "pairs", "triples"]
    assert [o.r2 for o in orders] == pytest.approx([3 / 7, 4 / 7, 1], abs=0.07)
    assert gam.fidelity().r2 > 0.995
    low, high = gam.fidelity().residual_bounds
    assert low <= high == gam.fidelity().residual_share


def test_residual_share_of_what_cannot_be_said() -> None:
    """A product of three features has no main effects and no pairs."""
    X = uniform(20_000, 3)
    gam = fit_gam(lambda x: x[:, 0] + 3 * x.prod(1), X, interactions=3)
    low, high = gam.fidelity().residual_bounds
    assert low < 0.5 + 0.02
    assert high > 0.5 - 0.03
    assert high - low < 0.15


def test_terms_add_up() -> None:
    X = uniform(3000)
    gam = fit_gam(lambda x: torch.stack([x[:, 0], x[:, 1] * x[:, 2]], 1), X, interactions=[(1, 2)])
    parts = gam.explain(X)
    assert parts.shape == (3000, 5, 2)
    torch.testing.assert_close(parts.sum(1) + gam.intercept, gam.predict(X), rtol=0, atol=1e-12)
    assert gam.term((1, 2)).values.shape == (16, 16, 2)
    torch.testing.assert_close(gam.predict_proba(X).sum(1), torch.ones(3000).double())


@pytest.mark.parametrize("basis", ["linear", "steps"])
def test_solution_is_that_of_dense_least_squares(basis: str) -> None:
    """The matrix-free solve against the normal equations written out."""
    X, rows = uniform(300, 2), torch.arange(300)
    fine = [make_grid(X[:, f], f, 7, basis) for f in range(2)]
    pair = tuple(coarsen(g, 4, torch.ones(g.size)) for g in fine)
    y = torch.randn(2, 300, dtype=torch.float64)
    w = torch.rand(300, dtype=torch.float64)
    w = w / w.sum()
    stage = Stage([(fine[0],), (fine[1],), pair], X, y, w, None)
    values = stage.fit([0.3, 0.2], [False, False]).values
    B = torch.zeros(300, stage.design.size, dtype=torch.float64)
    for start, grids in zip(stage.design.starts, stage.design.terms, strict=True):
        index, share = grids[0].encode(X[:, 0 if start != stage.design.starts[1] else 1])
        if len(grids) == 2:
            j, s = grids[1].encode(X[:, 1])
            index = (index[:, :, None] * grids[1].size + j[:, None]).flatten(1)
            share = (share[:, :, None] * s[:, None]).flatten(1)
        B[rows[:, None], start + index] += share
    Q = torch.block_diag(*stage.projectors)
    eyes = [torch.eye(g, dtype=torch.float64) for g in (fine[0].size, fine[1].size, *(g.size for g in pair))]
    pairs = torch.kron(pair[0].penalty(), eyes[3]) + torch.kron(eyes[2], pair[1].penalty())
    S = torch.block_diag(*(a * p / len(p) for a, p in ((0.3, fine[0].penalty()), (0.3, fine[1].penalty()), (0.2, pairs))))
    wanted = torch.linalg.pinv(Q @ (B.T @ (w[:, None] * B) + S) @ Q, hermitian=True) @ Q @ B.T @ (w * y).T
    torch.testing.assert_close(values, wanted.T, rtol=0, atol=2e-5)


def test_written_out_equations_have_the_solution_of_cg(monkeypatch: pytest.MonkeyPatch) -> None:
    X = uniform(2000)
    options = {"interactions": [(0, 1), (0, 1, 2)], "smoothing": 0.01, "bins": 16}
    direct = fit_gam(additive, X, **options)
    monkeypatch.setattr("xai_fast.distill._solve.DIRECT", 0)
    steps = fit_gam(additive, X, **options)
    assert {s.solver for s in direct.solutions} == {"exact"}
    assert {s.solver for s in steps.solutions} == {"cg"}
    torch.testing.assert_close(direct.predict(X), steps.predict(X), rtol=0, atol=1e-6)


def test_nearly_equal_features_are_solved_for() -> None:
    """Four copies of one feature but for noise of a thousandth: CG alone does not get there in its steps."""
    size = torch.rand(4000, 1, dtype=torch.float64)
    X = torch.cat([size + 1e-3 * torch.randn(4000, 4, dtype=torch.float64), uniform(4000, 2)], 1)
    gam = fit_gam(lambda x: x[:, :4].mean(1) ** 3 + x[:, 0] * x[:, 4], X, interactions=2, smoothing=1e-5)
    assert all(float(s.residual.max()) < 1e-8 for s in gam.solutions)
    assert gam.fidelity().r2 > 0.999


def test_projector() -> None:
    w = torch.rand(5, 4, dtype=torch.float64)
    Q = projector(w, [(0,), (1,)])
    table = (Q @ torch.randn(20, dtype=torch.float64)).reshape(5, 4)
    assert float((w * table).sum(0).abs().max()) < 1e-14
    assert float((w * table).sum(1).abs().max()) < 1e-14
    torch.testing.assert_close(Q @ Q, Q)
    assert round(float(Q.trace())) == 20 - 8


# ---- teachers and their outputs --------------------------------------------------------------------------------------


def test_module_in_its_own_dtype_and_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    X = uniform(3000).float()
    gam = fit_gam(model, X, interactions=3, batch_size=700)
    assert all(m.training for m in model.modules())
    assert gam.kind == "logits"
    fidelity = gam.fidelity()
    assert fidelity.agreement > 0.9
    assert fidelity.kl < 0.01
    assert gam.predict(X).dtype == torch.float32
    assert fit_gam(model, X.double().numpy()).predict(X.numpy()).dtype == torch.float32


def test_estimators() -> None:
    X = uniform(1500).numpy()
    labels = (X[:, 0] + X[:, 1] > 0).astype(int) + (X[:, 2] > 0.5)
    linear = LinearRegression().fit(X, X[:, 0])
    assert fit_gam(linear, X).fidelity().r2 > 0.9999
    logistic = LogisticRegression().fit(X, labels)
    gam = fit_gam(logistic, X)
    np.testing.assert_allclose(gam.predict(X), logistic.decision_function(X), atol=0.05)
    assert gam.fidelity().agreement > 0.98
    forest = RandomForestClassifier(20, max_depth=4, random_state=0).fit(X, labels)
    gam = fit_gam(forest, X, interactions=2)
    assert gam.kind == "logits"
    assert gam.fidelity().kl < 0.25
    binary = LogisticRegression().fit(X, labels > 0)
    gam = fit_gam(binary, X)
    np.testing.assert_allclose(gam.predict_proba(X), binary.predict_proba(X)[:, 1], atol=0.02)


def test_probabilities_become_logits() -> None:
    X = uniform()
    gam = fit_gam(lambda x: additive(x).sigmoid(), X, outputs="probabilities")
    torch.testing.assert_close(gam.predict(X), additive(X), rtol=0, atol=0.1)
    torch.testing.assert_close(gam.predict_proba(X), additive(X).sigmoid(), rtol=0, atol=0.02)
    three = torch.stack([additive(X), X[:, 3], 0 * X[:, 3]], 1)
    gam = fit_gam(three.softmax(1), X, outputs="probabilities")
    torch.testing.assert_close(gam.predict_proba(X), three.softmax(1), rtol=0, atol=0.03)


def test_target() -> None:
    X = uniform()
    teacher = lambda x: torch.stack([x[:, 3], additive(x)], 1)  # noqa: E731
    gam = fit_gam(teacher, X, target=1)
    assert gam.predict(X).shape == (4000,)
    assert gam.fidelity().r2 > 0.9999
    assert math.isnan(gam.fidelity().kl)


def test_classes_are_solved_for_as_if_alone() -> None:
    X = uniform(2000)
    both = fit_gam(lambda x: torch.stack([additive(x), x[:, 1] * x[:, 2]], 1), X, interactions=[(1, 2)], smoothing=0.01)
    for c, teacher in enumerate((additive, lambda x: x[:, 1] * x[:, 2])):
        alone = fit_gam(teacher, X, interactions=[(1, 2)], smoothing=0.01)
        torch.testing.assert_close(both.predict(X)[:, c], alone.predict(X), rtol=0, atol=1e-6)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_weights_are_repeated_rows() -> None:
    X = uniform(800)
    X = torch.cat([X, X[:400]])
    counts = torch.ones(800)
    counts[:400] = 2
    y = additive(X) + X[:, 1] * X[:, 2]
    options = {"interactions": [(1, 2)], "smoothing": 0.1, "holdout": 0.0, "bins": 2, "pair_bins": 2}
    repeated, weighted = fit_gam(y, X, **options), fit_gam(y[:800], X[:800], sample_weight=counts, **options)
    torch.testing.assert_close(repeated.predict(X), weighted.predict(X), rtol=0, atol=1e-7)


def test_categories_have_no_order() -> None:
    X = uniform(6000)
    X[:, 0] = torch.randint(0, 7, (6000,)).double()
    effect = torch.randn(7, dtype=torch.float64)
    slope = torch.randn(7, dtype=torch.float64)

    def teacher(x: Tensor) -> Tensor:
        return effect[x[:, 0].long()] + slope[x[:, 0].long()] * x[:, 1]

    gam = fit_gam(teacher, X, interactions=1, categorical=[0])
    assert gam.terms[-1].features == (0, 1)
    assert gam.fidelity().r2 > 0.999
    unseen = X[:1].clone()
    unseen[0, 0] = 99
    assert not bool(gam.support(unseen))
    assert bool(gam.predict(unseen).isfinite())


def test_constant_features_are_left_out() -> None:
    X = uniform(1000)
    X[:, 2] = 7
    gam = fit_gam(lambda x: x[:, 0], X, interactions=2, feature_names=["a", "b", "c", "d"])
    assert [t.names for t in gam.terms if t.order == 1] == [("a",), ("b",), ("d",)]
    assert gam.report().constant == ("c",)
    with pytest.raises(ValueError, match="interactions: expected features that vary, got c"):
        fit_gam(lambda x: x[:, 0], X, interactions=[(0, 2)], feature_names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="expected a feature that varies"):
        fit_gam(lambda x: x[:, 0], torch.ones(100, 2))


def test_seed_and_generator_repeat_and_inputs_stay() -> None:
    X = uniform(1000)
    before = X.clone()
    first, second = (fit_gam(additive, X, interactions=2, seed=3) for _ in range(2))
    assert torch.equal(first.predict(X), second.predict(X))
    third = fit_gam(additive, X, interactions=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first.predict(X), third.predict(X))
    assert torch.equal(X, before)


def test_constant_teacher() -> None:
    gam = fit_gam(lambda x: torch.full((len(x),), 5.0), uniform(500), interactions=2)
    torch.testing.assert_close(gam.predict(uniform(10)), torch.full((10,), 5.0).double())


def test_smoothing_helps_where_rows_are_few() -> None:
    X = uniform(300)
    noisy = additive(X) + 0.5 * torch.randn(300)
    chosen, rough = (fit_gam(noisy, X, smoothing=s) for s in ("auto", 1e-6))
    fresh = uniform(2000)
    errors = [float(((g.predict(fresh) - additive(fresh)) ** 2).mean()) for g in (chosen, rough)]
    assert errors[0] < 0.5 * errors[1]


def test_smoothing_starts_where_the_grid_asks() -> None:
    """On few rows a fine grid gives the function of a coarse one; the smoothing that this takes is larger."""
    torch.manual_seed(0)
    X, fresh = uniform(300, 6), uniform(2000, 6)

    def rugged(x: Tensor) -> Tensor:
        return additive(x) + 0.5 * torch.sin(20 * x[:, 3] * x[:, 4])

    def error(bins: int) -> float:
        found = fit_gam(rugged, X, bins=bins).predict(fresh)
        return float((found - rugged(fresh)).square().mean())

    assert error(256) < 1.1 * error(64)


def test_many_rows_have_finer_grids() -> None:
    X = torch.rand(10_000, 1, dtype=torch.float64)
    for n, bins in ((9_999, 64), (10_000, 256)):
        (term,) = fit_gam(lambda x: torch.sin(60 * x[:, 0]), X[:n]).terms
        assert term.grids[0].size == bins


# ---- what is told ----------------------------------------------------------------------------------------------------


def correlated() -> GAM:
    X = uniform(4000)
    X[:, 1] = 0.98 * X[:, 0] + 0.02 * X[:, 1]
    return fit_gam(lambda x: x[:, 0] + x[:, 1] + x[:, 2] * x[:, 3], X, interactions=[(2, 3), (0, 1)])


def test_report() -> None:
    gam = correlated()
    report = gam.report()
    assert report.candidates == {1: 4, 2: 6, 3: 4}
    assert report.fitted == {1: 4, 2: 2, 3: 0}
    assert report.free_directions == 4 + 2 * 31
    assert report.correlation > 0.99
    assert report.correlated == ("x0", "x1")
    assert report.concurvity[0] > 0.9
    assert report.concurvity[2] < 0.1
    assert 0.3 < report.empty_cells[2] < 0.6
    assert "x0, x1" in str(report)
    assert "not to be trusted" in str(report)
    assert "main effects" in str(gam.fidelity())


def test_support() -> None:
    gam = correlated()
    rows = torch.tensor([[0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0], [3.0, 3, 0, 0], [0, 0, 0.5, -0.5]], dtype=torch.float64)
    assert gam.support(rows).tolist() == [True, False, False, True]


@pytest.mark.parametrize("basis", ["linear", "steps"])
def test_outside_the_data_functions_are_constant(basis: str) -> None:
    X = uniform(1000)
    gam = fit_gam(lambda x: x[:, 0] + x[:, 1] * x[:, 2], X, interactions=[(1, 2)], basis=basis)
    edge = X.amax(0, keepdim=True)
    torch.testing.assert_close(gam.predict(edge + 5), gam.predict(edge))
    assert not bool(gam.support(edge + 5))


def test_fidelity_on_given_rows() -> None:
    X = uniform(1000)
    gam = fit_gam(additive(X), X)
    fresh = uniform(500)
    with pytest.raises(ValueError, match="outputs: expected the teacher's outputs"):
        gam.fidelity(fresh)
    assert gam.fidelity(X).r2 > 0.999
    given = gam.fidelity(fresh, outputs=additive(fresh))
    error = ((gam.predict(fresh) - additive(fresh)) ** 2).mean() / additive(fresh).var(correction=0)
    assert given.r2 == pytest.approx(1 - float(error), abs=1e-9)
    assert given.on == "given rows"
    assert fit_gam(additive, X).fidelity(fresh).r2 > 0.999


def test_kl_and_agreement_by_hand() -> None:
    X = uniform(2000)
    gam = fit_gam(lambda x: 3 * torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3]], 1), X)
    f, y = gam.predict(X), 3 * torch.stack([X[:, 0] * X[:, 1], X[:, 2], X[:, 3]], 1)
    found = gam.fidelity(X)
    assert found.agreement == pytest.approx(float((f.argmax(1) == y.argmax(1)).double().mean()))
    kl = nn.functional.kl_div(f.log_softmax(1), y.log_softmax(1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(float(kl), rel=1e-9)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_values_out_of_sight_do_not_set_the_shared_scale() -> None:
    x = torch.rand(2000, 1, dtype=torch.float64)
    x[:3] = 50.0
    gam = fit_gam(lambda x: x[:, 0], torch.cat([x, uniform(2000, 1)], 1), smoothing=1e-6)
    low, high = gam.plot().axes[0].get_ylim()
    assert high - low < 2


def test_plots() -> None:
    pytest.importorskip("matplotlib")
    X = uniform(2000)
    X[:, 0] = torch.randint(0, 3, (2000,)).double()
    gam = fit_gam(lambda x: x[:, 1:4] + x[:, :1], X, interactions=[(0, 1), (1, 2), (1, 2, 3)], categorical=[0])
    lines = gam.plot(1).axes[0].lines
    assert [line.get_label() for line in lines[1:]] == ["output 0", "output 1", "output 2"]
    np.testing.assert_allclose(lines[2].get_ydata(), gam.terms[1].values[:, 1])
    assert len(gam.plot(1, target=2).axes[0].lines) == 2
    assert gam.plot((1, 0)).axes[0].get_xlabel() == "x0"
    assert len(gam.plot((1, 2, 3)).axes) == 5
    shown = gam.plot(count=3, title="student").axes
    assert len([a for a in shown if a.get_xlabel()]) == 3
    for basis in ("steps", "linear"):
        fit_gam(additive, uniform(500), interactions=1, basis=basis).plot().canvas.draw()
    with pytest.raises(ValueError, match="target: expected an output below 3"):
        gam.plot(0, target=3)
    with pytest.raises(ValueError, match="term: expected the features of a term"):
        gam.plot((0, 3))


# ---- what is refused -------------------------------------------------------------------------------------------------

ROWS = torch.rand(100, 3)


@pytest.mark.parametrize(
    ("teacher", "X", "options", "error", "words"),
    [
        (lambda x: x[:, 0] / (x[:, 0] > 0.5), ROWS, {}, ValueError, r"NaN or infinity in \d+ of 100 rows"),
        (lambda x: x[:3, 0], ROWS, {}, ValueError, r"teacher: expected outputs of shape \(100,\)"),
        (torch.rand(99), ROWS, {}, ValueError, r"teacher: expected outputs of shape \(100,\)"),
        (lambda x: "no", ROWS, {}, TypeError, "teacher: expected outputs as a tensor"),
        (3, ROWS, {}, TypeError, "teacher: expected a module"),
        (additive, ROWS[0], {}, ValueError, r"X: expected shape \(n, F\)"),
        (additive, "rows", {}, TypeError, "X: expected a torch.Tensor"),
        (additive, torch.tensor([[1.0, math.nan, 2.0]]), {}, ValueError, "X: expected finite .* in 1 of 1 rows"),
        (additive, ROWS[:3], {}, ValueError, "X: expected enough rows"),
        (additive, ROWS, {"interactions": [(0, 3)]}, ValueError, "interactions: expected a whole number from 0 to 2, got 3"),
        (additive, ROWS, {"interactions": [(0, 0)]}, ValueError, "interactions: expected tuples"),
        (additive, ROWS, {"interactions": [(0,)]}, ValueError, "interactions: expected tuples"),
        (additive, ROWS, {"interactions": -1}, ValueError, "interactions"),
        (additive, ROWS, {"interactions": "all"}, TypeError, "interactions: expected a number or a list"),
        (additive, ROWS, {"interactions": [(0, 1)], "pair_bins": 70, "bins": 80}, ValueError, "tables of at most 4096"),
        (additive, ROWS, {"bins": 1}, ValueError, "bins"),
        (additive, ROWS, {"basis": "cubic"}, ValueError, "basis: expected one of linear, steps"),
        (additive, ROWS, {"outputs": "odds"}, ValueError, "outputs: expected one of"),
        (lambda x: 2 + x[:, 0], ROWS, {"outputs": "probabilities"}, ValueError, "teacher: expected probabilities"),
        (additive, ROWS, {"smoothing": "gcv"}, ValueError, "smoothing: expected numbers or 'auto'"),
        (additive, ROWS, {"smoothing": -1.0}, ValueError, "smoothing"),
        (additive, ROWS, {"holdout": 0}, ValueError, "smoothing: expected numbers where nothing is held out"),
        (additive, ROWS, {"holdout": 1.0}, ValueError, "holdout: expected a share below 1"),
        (additive, ROWS, {"categorical": [5]}, ValueError, "categorical"),
        (additive, ROWS, {"feature_names": ["a"]}, ValueError, "feature_names: expected 3 names, got 1"),
        (additive, ROWS, {"sample_weight": torch.ones(5)}, ValueError, "sample_weight: expected shape"),
        (additive, ROWS, {"sample_weight": -torch.ones(100)}, ValueError, "sample_weight: expected finite"),
        (lambda x: x, ROWS, {"target": 3}, ValueError, "target: expected a whole number from 0 to 2"),
        (additive, ROWS, {"max_order": 4}, ValueError, "max_order"),
        (additive, ROWS, {"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
    ],
)
def test_errors(teacher: object, X: object, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        fit_gam(teacher, X, **options)
    assert "\n" not in str(caught.value)


def test_errors_of_a_student() -> None:
    gam = fit_gam(additive, ROWS, smoothing=0.1, holdout=0)
    with pytest.raises(ValueError, match=r"X: expected shape \(n, 3\)"):
        gam.predict(torch.rand(5, 4))
    with pytest.raises(ValueError, match="predict_proba: expected a student of logits"):
        gam.predict_proba(ROWS)
    with pytest.raises(ValueError, match="fidelity: expected X"):
        gam.fidelity()
    with pytest.raises(ValueError, match="report: expected a student with held-out rows"):
        gam.report()
    assert gam.fidelity(ROWS).r2 > 0.9


def test_unsolved_equations_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xai_fast.distill._solve.STEPS", 1)
    monkeypatch.setattr("xai_fast.distill._solve.DIRECT", 0)
    with pytest.warns(NotConverged, match="residual"):
        fit_gam(additive, uniform(500), interactions=2, smoothing=0.01)
