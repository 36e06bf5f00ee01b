"""Rows and models that TorchInfluence and its companions refuse by name, and recurrent layers, which take another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.influence.test_torch_influence import classification, influence, mlp, queries
from tests.influence.torch_models import gradients, hessian
from xai_fast.influence import TorchInfluence, projected_scores, tracin

NAN = float("nan")


def with_nan(row: int) -> tuple[Tensor, Tensor]:
    X, y = classification()
    X[row, 2] = NAN
    return X, y


# ---- rows that are not finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1, 15])
def test_training_rows_that_are_not_finite_are_named(row: int) -> None:
    with pytest.raises(ValueError, match=f"^train_loader: expected finite losses, got NaN or infinity in row {row}$"):
        influence(rows=with_nan(row))


def test_rows_of_the_test_set_and_of_companions_are_named() -> None:
    model, rows = mlp(), classification()
    with pytest.raises(ValueError, match=r"^X_test: expected finite gradients, got NaN or infinity in row 3$"):
        influence().scores(*with_nan(3))
    for name, data in (("train", (with_nan(15), rows)), ("test", (rows, with_nan(15)))):
        message = rf"^{name}: expected finite gradients, got NaN or infinity in row 15$"
        with pytest.raises(ValueError, match=message):
            tracin(model, F.cross_entropy, *data)
        with pytest.raises(ValueError, match=message):
            projected_scores(model, F.cross_entropy, *data, dim=4, damping=0.1)


def test_gradients_that_are_not_finite_where_losses_are() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z[:, 0] - z[:, 0].detach()).abs().sqrt()

    with pytest.raises(ValueError, match=r"^train_loader: expected finite gradients, got NaN or infinity in rows 0, 1, 2"):
        influence(loss_fn=loss, solver="cg").self_influence()


@pytest.mark.parametrize("solver", ["lissa", "lanczos", "exact"])
def test_a_hessian_that_is_not_finite(solver: str) -> None:
    """|x|^1.5 has a gradient at 0, and no curvature."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z[:, 0] - z[:, 0].detach()).abs().pow(1.5) + z.square().sum(1)

    with pytest.raises(ValueError, match=r"^H: expected finite"):
        influence(loss_fn=loss, solver=solver).scores(*queries())


# ---- no graph -----------------------------------------------------------------------------------------------------------


class WithoutGraph(nn.Linear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_losses_without_a_graph_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^loss_fn: expected losses that depend on the chosen parameters, got some without"
    ):
        influence(loss_fn=lambda z, y: F.cross_entropy(z, y).detach())
    model, rows = WithoutGraph(4, 3).double(), classification()
    for call in (lambda: influence(model), lambda: tracin(model, F.cross_entropy, rows, rows)):
        with pytest.raises(ValueError, match=r"^model: expected outputs that depend on the chosen parameters"):
            call()


def test_a_graph_is_found_where_gradients_are_off() -> None:
    expected = torch.Tensor(influence().scores(*queries()))
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.Tensor(influence().scores(*queries())).allclose(expected)


# ---- recurrent layers ---------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = getattr(nn, kind)(3, 2, batch_first=True)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(x)[0][:, -1])
        return found


def sequences(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(count, 4, 3, generator=generator, dtype=torch.float64)
    return X, torch.randint(2, (count,), generator=generator)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers(kind: str) -> None:
    model, (X, y) = Recurrent(kind).double(), sequences()
    found = TorchInfluence(model, F.cross_entropy, (X, y), damping=1.0, microbatch=4)
    G = gradients(model, X, y)
    H = hessian(model, F.cross_entropy, X, y)
    expected = -G @ torch.linalg.solve(H + torch.eye(len(H), dtype=H.dtype), G.T)
    torch.testing.assert_close(torch.Tensor(found.scores(X, y)), expected)
    assert found.problem.row_curvature() > torch.linalg.eigvalsh(H)[-1]
    torch.testing.assert_close(torch.Tensor(tracin(model, F.cross_entropy, (X, y), (X, y))), G @ G.T)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_gauss_newton_of_recurrent_layers(kind: str) -> None:
    model, rows = Recurrent(kind), tuple(part.float() if part.is_floating_point() else part for part in sequences())
    found = TorchInfluence(model, F.cross_entropy, rows, damping=1.0, curvature="gauss-newton", solver="exact")
    assert found.scores(*rows).isfinite().all()
    assert torch.backends.mkldnn.enabled


def test_an_operation_without_a_batching_rule_in_the_loss() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) * (2.0 if y.item() == 0 else 1.0)

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none") * torch.where(y == 0, 2.0, 1.0)

    expected = influence(loss_fn=weighted).scores(*queries())
    torch.testing.assert_close(torch.Tensor(influence(loss_fn=loss).scores(*queries())), torch.Tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operation_without_second_derivatives_is_named(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 3)).to(dtype)
    rows = torch.randint(10, (6, 3)), torch.randint(3, (6,))
    with pytest.raises(ValueError, match=r"^model: expected operations that torch .* got _embedding_bag$") as error:
        influence(model, rows)
    assert "\n" not in str(error.value)
    assert tracin(model, F.cross_entropy, rows, rows).shape == (6, 6)


def test_random_operations_are_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), training=True)

    with pytest.raises(ValueError, match="model: expected no random operations in eval mode"):
        influence(Noisy(4, 3).double())


# ---- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3, "solver": "cg"}, "rank: expected only with the solver lanczos, got it with cg"),
        ({"batch_size": 3, "solver": "cg"}, "batch_size: expected only with the solver lissa, got it with cg"),
        ({"max_steps": 3, "solver": "exact"}, "max_steps: expected only with cg, lissa or auto, got it with exact"),
        ({"max_steps": 0, "solver": "cg"}, "max_steps: expected a whole number of at least 1, got 0"),
        ({"params": 3}, "params: expected None, a list of names or parameters, or a callable, got int"),
    ],
)
def test_options_that_the_solver_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        influence(**options)


def test_arnoldi_is_lanczos() -> None:
    options = {"rank": 43, "tolerance": 0.1}
    found = influence(solver="arnoldi", **options).scores(*queries())
    assert found.equal(influence(solver="lanczos", **options).scores(*queries()))


def test_v_that_is_not_finite() -> None:
    found = influence()
    with pytest.raises(ValueError, match=r"^v: expected finite numbers, got NaN or infinity"):
        found.inverse_hvp(torch.full((found.problem.size,), NAN, dtype=torch.float64))


def test_bad_checkpoints_and_rates(tmp_path: Path) -> None:
    model, rows = mlp(), classification()
    (tmp_path / "broken.pt").write_bytes(b"einstein")
    missing = str(tmp_path / "none.pt")
    for options, kind, message in (
        ({"learning_rates": 0.1}, TypeError, "learning_rates: expected a list, one for each checkpoint, got float"),
        ({"checkpoints": [{"0.weight": 3}]}, ValueError, r"checkpoints\[0\]: expected 0.weight of shape \(5, 4\), got int"),
        (
            {"checkpoints": [tmp_path / "broken.pt"]},
            ValueError,
            r"checkpoints\[0\]: expected a state dict saved by torch.save",
        ),
        ({"checkpoints": [missing]}, FileNotFoundError, r"checkpoints\[0\]: expected the path of a state dict, got no file"),
    ):
        with pytest.raises(kind, match=message):
            tracin(model, F.cross_entropy, rows, rows, **options)


@pytest.mark.parametrize("solver", ["exact", "cg", "lissa"])
def test_a_model_that_begins_in_place(solver: str) -> None:
    """It gives what the same model out of place gives, and rows and test points stay as they were."""
    rows, tests = classification(), queries()
    before = [x.clone() for x in (*rows, *tests)]
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.ReLU(inplace), mlp())
        explained = TorchInfluence(model, F.cross_entropy, rows, damping=0.1, solver=solver, curvature="gauss-newton")
        found.append(explained.scores(*tests))
    assert torch.equal(*found)
    assert all(map(torch.equal, (*rows, *tests), before))
