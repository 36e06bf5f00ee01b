"""What an influence is measured on: functions of the logits, and those that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.influence.problems import dense_hessian, labelled, random_head, row_gradients
from xai_fast.influence import Influence


def rows(count: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), labelled("softmax", count)


def first(z: Tensor, y: Tensor | None) -> Tensor:
    return z[:, 0]


@pytest.mark.parametrize("solver", ["auto", "exact", "cg", "lissa"])
def test_a_functional_that_rises_with_all_biases(solver: str) -> None:
    """H is singular along the direction that adds the same to all biases, and no row has a gradient there."""
    head = random_head("softmax", 4)
    X, y = rows()
    found = Influence(head, X, y, solver=solver).scores(*rows(3), of=first)
    assert found.solution is not None
    assert found.solution.converged
    inverse = torch.linalg.pinv(dense_hessian(X, y, head, l2=0.1), hermitian=True, rtol=1e-10)
    X1 = torch.cat([rows(3)[0].double(), torch.ones(3, 1, dtype=torch.float64)], 1)
    gradients = (X1[:, :, None] * torch.eye(3, dtype=torch.float64)[0]).flatten(1)
    torch.testing.assert_close(
        torch.Tensor(found).double(), -gradients @ inverse @ row_gradients(X, y, head).T, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("of", ["logit", "margin", first])
def test_under_inference_mode(of: Any) -> None:
    X, y = rows()
    head = random_head("softmax", 4)
    expected = Influence(head, X, y).scores(X, y, of=of)
    with torch.inference_mode():
        found = Influence(head, X * 1, y * 1).scores(X * 1, y * 1, of=of)
    torch.testing.assert_close(torch.Tensor(found), torch.Tensor(expected))


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda z, y: z[:, 0] * torch.nan, "of: expected finite values and gradients, got NaN or infinity in rows 0, 1"),
        (lambda z, y: z[:, 0].abs().sqrt() * torch.tensor([1.0, torch.inf]), "got NaN or infinity in row 1$"),
        (
            lambda z, y: torch.ones(2, requires_grad=True) * 2,
            "of: expected a function of the logits, got values that do not",
        ),
        (lambda z, y: z[:, 0].detach(), "of: expected a differentiable function of the logits, got values without a graph"),
    ],
)
def test_functions_that_have_no_gradient(of: Any, message: str) -> None:
    influence = Influence(random_head("softmax", 4), *rows())
    with pytest.raises(ValueError, match=message) as error:
        influence.scores(*rows(2), of=of)
    assert "\n" not in str(error.value)
