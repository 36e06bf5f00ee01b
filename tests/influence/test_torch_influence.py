"""Influence functions of torch models against explicit Hessians, closed forms and captum."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from tests.influence.torch_models import Rows, classification, gauss_newton, gradients, hessian, mlp, vector
from tests.peers.locate import run_with_peers
from xai_fast import ops
from xai_fast.influence import Influence as GlmInfluence
from xai_fast.influence import LogisticHead, NotConverged, TorchInfluence
from xai_fast.influence._torch_rows import as_rows

DAMPING = 0.5


def influence(model: nn.Module | None = None, rows: Any = None, **options: Any) -> TorchInfluence:
    return TorchInfluence(
        mlp() if model is None else model,
        options.pop("loss_fn", F.cross_entropy),
        classification() if rows is None else rows,
        **{"damping": DAMPING, **options},
    )


def queries() -> Rows:
    return classification(5, seed=9)


def expected(model: nn.Module, matrix: Tensor, ridge: float = DAMPING) -> Tensor:
    """-G_test (H + ridge)^-1 G_train^T."""
    H = matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype)
    return -gradients(model, *queries()) @ torch.linalg.solve(H, gradients(model, *classification()).T)


# ---- derivatives --------------------------------------------------------------------------------------------------------


def test_hessian() -> None:
    model = mlp()
    found = influence(model, l2=0.25)
    H = hessian(model, F.cross_entropy, *classification())
    assert torch.linalg.eigvalsh(H)[0] < 0  # not the Gauss-Newton matrix
    torch.testing.assert_close(found.problem.dense(), H + (DAMPING + 0.25) * torch.eye(len(H), dtype=H.dtype))


def test_gauss_newton() -> None:
    model = mlp()
    found = influence(model, curvature="gauss-newton", damping=0.0)
    torch.testing.assert_close(found.problem.dense(), gauss_newton(model, *classification()))


@pytest.mark.parametrize("microbatch", [1, 5, 24, 100])
def test_microbatches_change_nothing(microbatch: int) -> None:
    model, v = mlp(), torch.randn(40, 43, dtype=torch.float64)
    whole, parts = influence(model), influence(model, microbatch=microbatch)
    torch.testing.assert_close(parts.problem.hvp(v), whole.problem.hvp(v))
    torch.testing.assert_close(parts.gradients(*queries()), whole.gradients(*queries()))
    torch.testing.assert_close(parts.scores(*queries()).as_subclass(Tensor), whole.scores(*queries()).as_subclass(Tensor))


def test_gradients() -> None:
    model = mlp()
    torch.testing.assert_close(influence(model).gradients(*queries()), gradients(model, *queries()))


def test_batches_are_those_of_the_sampler() -> None:
    model, (X, y) = mlp(), classification()
    v = torch.randn(2, 43, dtype=torch.float64)
    rows = ops.sample_rows(24, 7, seed=3, step=5)
    H = hessian(model, F.cross_entropy, X[rows], y[rows])
    torch.testing.assert_close(influence(model).problem.batch_hvp(v, 7, 3, 5), v @ H + DAMPING * v)


def test_row_curvature_bounds_the_rows() -> None:
    model, (X, y) = mlp(), classification()
    for curvature in ("hessian", "gauss-newton"):
        bound = influence(model, damping=0.0, curvature=curvature).problem.row_curvature()
        largest = max(
            torch.linalg.eigvalsh(hessian(model, F.cross_entropy, X[i : i + 1], y[i : i + 1]))[-1] for i in range(24)
        )
        assert largest < bound < 4 * largest


# ---- influence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["exact", "cg", "lissa", "auto", "lanczos"])
def test_scores(solver: str) -> None:
    model = mlp()
    options: dict[str, Any] = {"rank": 43} if solver == "lanczos" else {}
    found = influence(model, solver=solver, tolerance=1e-7, **options).scores(*queries())
    matrix = hessian(model, F.cross_entropy, *classification())
    torch.testing.assert_close(found.as_subclass(Tensor), expected(model, matrix), rtol=1e-4, atol=1e-5)
    assert found.solution is not None
    assert found.solution.converged
    assert str(found.convention).startswith("I_up,loss; positive = harmful; not divided by n = 24; H = mean loss Hessian")


def test_gauss_newton_scores() -> None:
    model = mlp()
    found = influence(model, curvature="gauss-newton").scores(*queries())
    torch.testing.assert_close(found.as_subclass(Tensor), expected(model, gauss_newton(model, *classification())))
    assert found.convention is not None
    assert "Gauss-Newton" in found.convention.hessian


def test_objective_gradients_contain_the_regulariser() -> None:
    model = mlp()
    loss, objective = (influence(model, l2=0.25, train_gradient=kind) for kind in ("loss", "objective"))
    theta = vector(model.parameters()).detach()
    x = objective.inverse_hvp(gradients(model, *queries())).x
    torch.testing.assert_close(
        objective.scores(*queries()) - loss.scores(*queries()), (-0.25 * x @ theta)[:, None].expand(5, 24)
    )


@pytest.mark.parametrize("which", ["helpful", "harmful"])
def test_top_k(which: str) -> None:
    found = influence(microbatch=5)
    scores = found.scores(*queries()).as_subclass(Tensor)
    values, indices = found.top_k(*queries(), 4, which=which)
    torch.testing.assert_close(values, scores.sort(1, descending=which == "harmful")[0][:, :4])
    assert indices.equal(scores.argsort(1, descending=which == "harmful")[:, :4])


def test_top_k_of_equal_scores_gives_the_earlier_rows() -> None:
    X, y = classification(3)
    repeated = torch.tensor([0, 1, 0, 1, 0, 2])
    _, indices = influence(rows=(X[repeated], y[repeated]), microbatch=2, damping=5.0).top_k(*queries(), 6)
    for row in indices.tolist():
        assert sorted(row) == list(range(6))
        assert [i for i in row if i in (0, 2, 4)] == [0, 2, 4]
        assert [i for i in row if i in (1, 3)] == [1, 3]


def test_top_k_per_class() -> None:
    X, y = classification()
    y[y == 1] = 7  # classes 0, 2, 7, of which one is rare
    y[3] = 2
    rows = (X, torch.where(torch.arange(24).eq(3), 2, torch.where(y.eq(2), 0, y)))
    model = mlp(classes=8)
    found = influence(model, rows, microbatch=5, damping=5.0)
    scores = found.scores(*queries()).as_subclass(Tensor)
    values, indices = found.top_k(*queries(), 3, per_class=True)
    assert values.shape == indices.shape == (5, 3, 3)
    assert indices[:, 1].tolist() == [[3, -1, -1]] * 5
    assert values[:, 1, 1:].isnan().all()
    for number, label in ((0, 0), (2, 7)):
        own = scores.masked_fill(rows[1] != label, torch.inf)
        torch.testing.assert_close(values[:, number], own.sort(1)[0][:, :3])
        assert (rows[1][indices[:, number]] == label).all()


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_self_influence_is_the_diagonal(solver: str) -> None:
    found = influence(solver=solver, microbatch=5, tolerance=1e-9)
    own = found.self_influence()
    torch.testing.assert_close(own.as_subclass(Tensor), found.scores(*classification()).diagonal())
    assert (own < 0).all()


def test_self_influence_warns_once() -> None:
    found = influence(solver="cg", microbatch=5, max_steps=1)
    with pytest.warns(NotConverged) as caught:
        found.self_influence()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_loo_is_minus_influence_by_n() -> None:
    found = influence()
    loo = found.loo(*queries())
    torch.testing.assert_close(loo.as_subclass(Tensor), -found.scores(*queries()).as_subclass(Tensor) / 24)
    assert loo.convention is not None
    assert loo.convention.divided_by_n


def test_loo_predicts_retraining() -> None:
    """Ridge regression, whose optimum has a closed form with and without a row."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(200, 3, generator=generator).double(), torch.randn(200, 1, generator=generator).double()

    def fit(X: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(2 * X.T @ X / len(X) + 0.1 * torch.eye(3).double(), 2 * X.T @ y / len(X))

    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data.copy_(fit(X, y).T)
    test = X[:1] + 1, y[:1]
    found = influence(model, (X, y), loss_fn=F.mse_loss, damping=0.0, l2=0.1, train_gradient="objective").loo(*test)[0]
    here = F.mse_loss(test[0] @ fit(X, y), test[1])
    others = [torch.arange(200) != row for row in range(20)]
    retrained = torch.stack([F.mse_loss(test[0] @ fit(X[rest], y[rest]), test[1]) - here for rest in others])
    assert (found[:20] - retrained).norm() < 0.05 * retrained.norm()


def test_logistic_regression_closed_form() -> None:
    X, y = classification(classes=2)
    X_test, y_test = classification(6, classes=2, seed=5)
    theta, bias = torch.tensor([0.5, -1.0, 0.3, 2.0]).double(), 0.2
    model = nn.Linear(4, 1).double()
    model.weight.data.copy_(theta[None])
    model.bias.data.fill_(bias)

    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out[:, 0], target.to(out.dtype), reduction="none")

    ours = influence(model, (X, y), loss_fn=loss_fn, damping=0.1)
    head = LogisticHead(theta, bias=bias)
    closed = GlmInfluence(head, X, y, damping=0.1)
    torch.testing.assert_close(
        ours.scores(X_test, y_test).as_subclass(Tensor), closed.scores(X_test, y_test).as_subclass(Tensor)
    )


def test_inverse_hvp_shapes() -> None:
    model = mlp()
    found = influence(model)
    H = hessian(model, F.cross_entropy, *classification()) + DAMPING * torch.eye(43).double()
    v = torch.randn(3, 43, dtype=torch.float64)
    many, one = found.inverse_hvp(v), found.inverse_hvp(v[0].float())
    torch.testing.assert_close(many.x, torch.linalg.solve(H, v.T).T)
    assert many.residual.shape == (3,)
    assert (one.x.shape, one.residual.shape, one.x.dtype) == ((43,), (), torch.float32)
    assert one.solver == "exact"
    assert "auto" in one.why
    with pytest.raises(ValueError, match=r"v: expected shape \(43,\) or \(M, 43\), got \(42,\)"):
        found.inverse_hvp(v[0, 1:])


def test_float32_model_has_float64_residuals() -> None:
    found = influence(mlp(torch.float32), (classification()[0].float(), classification()[1]), solver="cg", tolerance=1e-10)
    assert found.problem.wide == torch.float64
    assert found.inverse_hvp(torch.randn(2, 43, dtype=torch.float64)).converged


class Casts(nn.Module):
    """Runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh().float())


def test_a_model_that_casts_is_measured_in_its_dtype() -> None:
    X, y = classification()
    found = influence(Casts(), (X.float(), y))
    assert found.problem.wide == torch.float32
    assert found.scores(X[:2].float(), y[:2]).isfinite().all()


def test_16_bits_are_computed_in_float32() -> None:
    X, y = classification()
    found = influence(mlp(torch.bfloat16), (X.bfloat16(), y)).scores(X[:2].bfloat16(), y[:2])
    assert found.dtype == torch.float32
    same = mlp(torch.bfloat16).float()
    torch.testing.assert_close(found, influence(same, (X.bfloat16().float(), y)).scores(X[:2].bfloat16().float(), y[:2]))


# ---- models, losses, parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_are_the_same(reduction: str) -> None:
    model = mlp()
    found = influence(model, loss_fn=nn.CrossEntropyLoss(reduction=reduction)).scores(*queries())
    torch.testing.assert_close(found.as_subclass(Tensor), influence(model).scores(*queries()).as_subclass(Tensor))


class Several(nn.Module):
    """Two inputs, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"logits": self.one(a) + self.two(b)}


def test_tuples_and_dicts_of_inputs() -> None:
    model, (X, y) = Several().double(), classification()

    def loss_fn(out: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(out["logits"], target)

    by_position = influence(model, ((X, X.flip(1)), y), loss_fn=loss_fn)
    by_name = influence(model, ({"b": X.flip(1), "a": X}, y), loss_fn=loss_fn)
    scores = by_position.scores((X[:3], X[:3].flip(1)), y[:3])
    assert scores.shape == (3, 24)
    assert scores.equal(by_name.scores({"b": X[:3].flip(1), "a": X[:3]}, y[:3]))


class Everything(nn.Module):
    """What must not be in the way: batch norm, dropout, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.norm(x)[:, None].expand(-1, 3, -1)).mean(1))


def test_batch_norm_dropout_and_attention() -> None:
    torch.manual_seed(0)
    model = Everything().double().train()
    model.head.eval()
    model.norm.running_mean = torch.randn(4).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = influence(model, damping=1.0).scores(*queries())
    assert [model.training, model.norm.training, model.block.dropout.training, model.head.training] == [True] * 3 + [False]
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        H = hessian(model, F.cross_entropy, *classification())
    torch.testing.assert_close(found.as_subclass(Tensor), expected(model, H, 1.0))


def test_chosen_parameters() -> None:
    model = mlp()
    H = hessian(model, F.cross_entropy, *classification())[25:, 25:]
    choices: list[Any] = [
        "2",
        ["2.weight", "2.bias"],
        list(model[2].parameters()),
        lambda name, p: name.startswith("2"),
    ]
    for params in choices:
        found = influence(model, params=params)
        assert found.names == ["2.weight", "2.bias"]
        torch.testing.assert_close(found.problem.dense(), H + DAMPING * torch.eye(18).double())
        torch.testing.assert_close(found.gradients(*queries()), gradients(model, *queries())[:, 25:])
    model[0].requires_grad_(False)
    assert influence(model).names == ["2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "params: expected at least one parameter, got none"),
        (lambda name, p: False, "params: expected at least one parameter, got none"),
        ("1", "params: expected names of parameters or modules of the model, got '1'"),
        (["0", "head"], "got 'head'"),
        ([nn.Parameter(torch.ones(1))], "got a parameter that is not in it"),
    ],
)
def test_bad_parameters(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence(params=params)


def test_training_on_changes_nothing() -> None:
    model = mlp()
    found = influence(model)
    before = found.scores(*queries())
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert found.scores(*queries()).equal(before)


class Mixes(nn.Module):
    """Rows that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


def test_rows_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="model: expected rows that do not depend on each other"):
        influence(Mixes())


def test_losses_that_are_none_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"loss_fn: expected a scalar or one loss for a batch of one row, got shape \(1, 3\)"
    ):
        influence(loss_fn=lambda out, y: out)
    with pytest.raises(TypeError, match="loss_fn: expected a callable"):
        influence(loss_fn="mse")


# ---- data ---------------------------------------------------------------------------------------------------------------


class Indexed(Dataset[Any]):
    def __init__(self) -> None:
        self.rows = classification()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> Any:
        return self.rows[0][row], self.rows[1][row]


class Streamed(IterableDataset[Any]):
    def __init__(self, shuffles: bool = False) -> None:
        self.rows, self.shuffles = classification(), shuffles

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(24) if self.shuffles else torch.arange(24)
        return iter([(self.rows[0][row], self.rows[1][row]) for row in order])


def forms() -> dict[str, Any]:
    X, y = classification()
    return {
        "pair": (X, y),
        "tensors": TensorDataset(X, y),
        "loader": DataLoader(TensorDataset(X, y), batch_size=7, drop_last=True),
        "batched by the dataset": DataLoader(TensorDataset(X.unflatten(0, (4, 6)), y.unflatten(0, (4, 6))), batch_size=None),
        "indexed": DataLoader(Indexed(), batch_size=5),
        "subset": Subset(Indexed(), list(range(24))),
        "streamed": DataLoader(Streamed(), batch_size=5),
        "list": [(X[:10], y[:10]), [X[10:], y[10:]]],
        "generator": ((X[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_forms_of_data(form: str) -> None:
    X, y = classification()
    rows = as_rows(forms()[form], "data")
    assert len(rows) == 24
    wanted = torch.tensor([3, 3, 23, 0])
    found = rows.read(wanted)
    assert found[0].equal(X[wanted])
    assert found[1].equal(y[wanted])
    assert torch.cat([batch[0] for _, batch in rows.batches(5)]).equal(X)


def test_a_shuffling_loader_is_read_in_order() -> None:
    X, y = classification()
    with pytest.warns(UserWarning, match="train_loader: the loader shuffles") as caught:
        found = influence(rows=DataLoader(TensorDataset(X, y), batch_size=5, shuffle=True))
    assert caught[0].filename == __file__
    torch.testing.assert_close(found.scores(*queries()), influence().scores(*queries()))


def test_what_does_not_fit_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xai_fast.influence._torch_rows.free_memory", lambda device: 0.0)
    dataset = Indexed()
    read: list[int] = []
    get = Indexed.__getitem__
    monkeypatch.setattr(Indexed, "__getitem__", lambda self, row: read.append(row) or get(self, row))
    found = influence(rows=DataLoader(dataset, batch_size=5))
    torch.testing.assert_close(found.scores(*queries()), influence().scores(*queries()))
    assert len(read) > 48


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (DataLoader(Streamed(shuffles=True), batch_size=5), "train_loader: expected the same order in every iteration"),
        (DataLoader(Indexed(), sampler=SubsetRandomSampler([1, 2])), "sampler, got SubsetRandomSampler; pass a torch.utils"),
        (TensorDataset(torch.zeros(0, 4), torch.zeros(0)), "train_loader: expected at least one row, got an empty dataset"),
        ((torch.zeros(0, 4), torch.zeros(0)), "train_loader: expected at least one row, got none"),
        ([], "train_loader: expected at least one batch, got none"),
        (
            (torch.zeros(3, 4), torch.zeros(2)),
            r"train_loader: expected as many targets as rows of every input, got \[2, 3\]",
        ),
        ((torch.zeros(3, 4),), r"train_loader: expected \(inputs, targets\), got 1 parts"),
        ([(torch.zeros(3, 4), torch.zeros(3)), (torch.zeros(3, 5), torch.zeros(3))], "rows of the same shape"),
    ],
)
def test_bad_data(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence(rows=rows)


def test_bad_types_of_data() -> None:
    with pytest.raises(TypeError, match="train_loader: expected a DataLoader, a Dataset or a tuple"):
        influence(rows=torch.zeros(3, 4))
    with pytest.raises(TypeError, match="train_loader: expected tensors with a first dimension of rows, got str"):
        influence(rows=(torch.zeros(3, 4), "abc"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver: expected one of"),
        ({"curvature": "fisher"}, "curvature: expected one of hessian, gauss-newton, got 'fisher'"),
        ({"train_gradient": "both"}, "train_gradient: expected 'loss' or 'objective', got 'both'"),
        ({"damping": -1.0}, "damping: expected a number of at least 0"),
        ({"l2": -1.0}, "l2: expected a number of at least 0"),
        ({"microbatch": 0}, "microbatch: expected a whole number"),
        ({"tolerance": -1.0}, "tolerance: expected a number above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence(**options)


def test_bad_calls() -> None:
    found = influence()
    X, y = queries()
    with pytest.raises(ValueError, match="X_test: expected at least one row"):
        found.scores(X[:0], y[:0])
    with pytest.raises(ValueError, match="X_test, y_test: expected as many targets"):
        found.scores(X, y[:2])
    with pytest.raises(ValueError, match="k: expected a whole number from 1 to 24, got 25"):
        found.top_k(X, y, 25)
    with pytest.raises(ValueError, match="which: expected 'helpful' or 'harmful', got 'best'"):
        found.top_k(X, y, 2, which="best")
    regression = influence(nn.Linear(4, 1).double(), (X, X[:, :1]), loss_fn=F.mse_loss)
    with pytest.raises(
        ValueError, match=r"per_class: expected training targets that are whole numbers \(n,\), got \(5, 1\)"
    ):
        regression.top_k(X, X[:, :1], 2, per_class=True)


def test_auto_assembles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for damping in (DAMPING, 0.0):  # exact, and CG because exact fails
        found = influence(damping=damping)
        assembled: list[int] = []
        dense = found.problem.dense
        monkeypatch.setattr(found.problem, "dense", lambda dense=dense, assembled=assembled: assembled.append(1) or dense())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            found.scores(*queries())
            found.top_k(*queries(), 2)
        assert len(assembled) == 1


def test_an_indefinite_hessian_is_said() -> None:
    with pytest.raises(ValueError, match="damping: expected enough for a positive definite Hessian"):
        influence(damping=0.0, solver="exact").scores(*queries())
    with pytest.warns(NotConverged):
        influence(damping=0.0, solver="cg", max_steps=50).scores(*queries())


# ---- captum -------------------------------------------------------------------------------------------------------------


def test_agrees_with_captum() -> None:
    found = run_with_peers("tests.peers.torch_influence_peers", "captum")
    # captum's Arnoldi inverse differs from its exact one by as much, whatever its dimension.
    limits = {"naive": 1e-10, "arnoldi": 2e-2, "tracin": 1e-10, "tracin self": 1e-10}
    assert found.keys() == limits.keys()
    for case, difference in found.items():
        assert difference < limits[case], case


def test_no_warnings_when_all_is_well() -> None:
    influence().top_k(*queries(), 3)  # torch deprecates parts of its own when it first loads them
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        influence().top_k(*queries(), 3)
    assert [str(warning.message) for warning in caught] == []
