"""TracIn and projected scores against the formulas, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.influence.torch_models import Rows, classification, gradients, mlp
from xai_fast import ops
from xai_fast.influence import TorchInfluence, projected_scores, tracin


def queries() -> Rows:
    return classification(5, seed=9)


def models() -> list[nn.Sequential]:
    """Two states of one model."""
    first, second = mlp(), mlp()
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(1.5)
    return [first, second]


def inner_products(model: nn.Module) -> Tensor:
    return gradients(model, *queries()) @ gradients(model, *classification()).T


# ---- TracIn -------------------------------------------------------------------------------------------------------------


def test_tracin_of_the_model_as_it_is() -> None:
    model = mlp()
    found = tracin(model, F.cross_entropy, classification(), queries())
    torch.testing.assert_close(found.as_subclass(Tensor), inner_products(model))
    assert found.convention is not None
    assert (found.convention.quantity, found.convention.sign) == ("TracIn", "positive = helpful")


@pytest.mark.parametrize("microbatch", [None, 5])
def test_tracin_over_checkpoints(microbatch: int | None, tmp_path: Path) -> None:
    first, second = models()
    torch.save(second.state_dict(), tmp_path / "second.pt")
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoints: list[Any] = [first.state_dict(), tmp_path / "second.pt"]
    options: dict[str, Any] = {"checkpoints": checkpoints, "learning_rates": [0.1, 0.01], "microbatch": microbatch}
    found = tracin(model, F.cross_entropy, classification(), queries(), **options)
    torch.testing.assert_close(found.as_subclass(Tensor), 0.1 * inner_products(first) + 0.01 * inner_products(second))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_tracin_predicts_a_step_of_sgd() -> None:
    """A step on one row lowers the loss of a test point by eta times the inner product, to first order."""
    rate, (X, y), (X_test, y_test) = 1e-5, classification(), queries()
    found = tracin(mlp(), F.cross_entropy, (X, y), (X_test, y_test), learning_rates=[rate])
    model = mlp()
    before = F.cross_entropy(model(X_test), y_test, reduction="none").detach()
    F.cross_entropy(model(X[:1]), y[:1]).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= rate * p.grad
    after = F.cross_entropy(model(X_test), y_test, reduction="none")
    torch.testing.assert_close(found[:, 0].as_subclass(Tensor), (before - after).detach(), rtol=1e-3, atol=1e-9)


def test_tracin_is_influence_without_a_hessian() -> None:
    """A large damping makes H a multiple of the identity: the same ranking with the other sign."""
    influence = TorchInfluence(mlp(), F.cross_entropy, classification(), damping=1e7, tolerance=1e-9)
    scores = influence.scores(*queries()).as_subclass(Tensor)
    found = tracin(mlp(), F.cross_entropy, classification(), queries()).as_subclass(Tensor)
    torch.testing.assert_close(-1e7 * scores, found, rtol=1e-5, atol=1e-5)


def test_data_of_all_forms_and_chosen_parameters() -> None:
    loader = DataLoader(TensorDataset(*classification()), batch_size=7)
    found = tracin(mlp(), nn.CrossEntropyLoss(reduction="none"), loader, [queries()], params="2")
    model = mlp()
    last = [gradients(model, *rows)[:, 25:] for rows in (queries(), classification())]
    torch.testing.assert_close(found.as_subclass(Tensor), last[0] @ last[1].T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": []}, "checkpoints: expected a list of state dicts or paths"),
        ({"checkpoints": "model.pt"}, "checkpoints: expected a list of state dicts or paths, got 'model.pt'"),
        ({"checkpoints": [{}]}, r"checkpoints\[0\]: expected 0.weight of shape \(5, 4\), got nothing"),
        ({"checkpoints": [mlp(inputs=3).state_dict()]}, r"checkpoints\[0\]: expected 0.weight .* got shape \(5, 3\)"),
        ({"learning_rates": [0.1, 0.2]}, "learning_rates: expected 1, one for each checkpoint, got 2"),
        ({"learning_rates": []}, "learning_rates: expected 1, one for each checkpoint, got 0"),
        ({"microbatch": 0}, "microbatch: expected a whole number"),
        ({"test": (torch.zeros(0, 4), torch.zeros(0))}, "test: expected at least one row"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    test = options.pop("test", queries())
    with pytest.raises(ValueError, match=message):
        tracin(mlp(), F.cross_entropy, classification(), test, **options)


def test_checkpoints_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"checkpoints\[0\]: expected a state dict or the path of one, got int"):
        tracin(mlp(), F.cross_entropy, classification(), queries(), checkpoints=[3])  # type: ignore[list-item]


# ---- projections --------------------------------------------------------------------------------------------------------


def explicit(model: nn.Module, dim: int, damping: float, seed: int) -> Tensor:
    phi, tests = (ops.random_projection(gradients(model, *rows), dim, seed=seed) for rows in (classification(), queries()))
    kernel = phi.T @ phi + damping * 24 * torch.eye(dim).double()
    return tests @ torch.linalg.solve(kernel, phi.T)


@pytest.mark.parametrize("microbatch", [None, 5])
def test_projected_scores(microbatch: int | None) -> None:
    options: dict[str, Any] = {"dim": 16, "damping": 0.01, "seed": 3, "microbatch": microbatch}
    found = projected_scores(mlp(), F.cross_entropy, classification(), queries(), **options)
    torch.testing.assert_close(found.as_subclass(Tensor), explicit(mlp(), 16, 0.01, 3))
    assert found.convention is not None
    assert (found.convention.sign, found.convention.divided_by_n) == ("positive = helpful", True)
    again = projected_scores(mlp(), F.cross_entropy, classification(), queries(), **options)
    assert again.equal(found)


def test_projected_scores_over_checkpoints() -> None:
    first, second = models()
    found = projected_scores(
        mlp(), F.cross_entropy, classification(), queries(),
        dim=8, damping=0.1, checkpoints=[first.state_dict(), second.state_dict()],
    )  # fmt: skip
    mean = (explicit(first, 8, 0.1, 0) + explicit(second, 8, 0.1, 1)) / 2
    torch.testing.assert_close(found.as_subclass(Tensor), mean)


def test_many_dimensions_approach_the_empirical_fisher() -> None:
    """The scores without a projection, to the accuracy of random projections; and in their scale."""
    train, tests = gradients(mlp(), *classification()), gradients(mlp(), *queries())
    fisher = train.T @ train + 0.5 * 24 * torch.eye(43).double()
    full = tests @ torch.linalg.solve(fisher, train.T)
    found = projected_scores(mlp(), F.cross_entropy, classification(), queries(), dim=4096, damping=0.5)
    assert (found.as_subclass(Tensor) - full).norm() < 0.1 * full.norm()


def test_least_squares_scale() -> None:
    """Where the empirical Fisher matrix is the Hessian, scores are those of leaving out."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4000, 3, generator=generator).double()
    noise = torch.randn(4000, 1, generator=generator).double()
    model = nn.Linear(3, 1, bias=False).double()
    # Half the squared error with noise of variance 1: E g g^T = E x x^T = H.
    rows, tests = (X, X @ model.weight.detach().T + noise), (X[:20] + 1, noise[:20])

    def half_squares(out: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(out, target) / 2

    found = projected_scores(model, half_squares, rows, tests, dim=3, seed=2).as_subclass(Tensor)
    loo = TorchInfluence(model, half_squares, rows).loo(*tests).as_subclass(Tensor)
    assert (found - loo).norm() < 0.1 * loo.norm()


@pytest.mark.parametrize("dim", [30, 64])
def test_a_singular_kernel_is_said(dim: int) -> None:
    with pytest.raises(ValueError, match=f"damping: expected enough for a kernel of dimension {dim} to be regular, got 0"):
        projected_scores(mlp(), F.cross_entropy, classification(), queries(), dim=dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: expected a whole number"),
        ({"damping": -1.0}, "damping: expected a number of at least 0"),
        ({"seed": -1}, "seed: expected a whole number"),
    ],
)
def test_bad_projections(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projected_scores(mlp(), F.cross_entropy, classification(), queries(), **options)
