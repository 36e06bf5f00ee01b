"""Influence in a space of random projections of gradients, after TRAK."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks as check
from ..ops._checks import check_count, check_seed
from ..ops.ihvp import random_projection
from ._torch_model import Checkpoint, ModelLoss, Params, State
from ._torch_rows import TorchRows
from .results import Convention, Scores
from .tracin import prepare_companion, states_of

__all__ = ["projected_scores"]


def projected_scores(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    train: Any,
    test: Any,
    *,
    dim: int = 512,
    damping: float = 0.0,
    seed: int = 0,
    checkpoints: Sequence[Checkpoint] | None = None,
    params: Params = None,
    microbatch: int | None = None,
) -> Scores:
    """Predicted rise of the loss of a test point if a training row were left out, from projected gradients.

    .. math:: \\mathrm{score}(i, test) = \\phi_{test}^\\top (\\Phi^\\top \\Phi + \\delta n I)^{-1} \\phi_i, \\qquad
              \\phi = \\mathrm{projection\\ of\\ } \\nabla L

    The empirical Fisher matrix Phi^T Phi / n stands for the Hessian. Positive = helpful: the other sign than I_up,loss. The
    scale is kept, so that scores compare with ``loo``: 1/n is in them.

    Parameters
    ----------
    model, loss_fn, train, test, checkpoints, params, microbatch
        As in :func:`tracin`. Scores are averaged over checkpoints, for example of models trained with several seeds.
    dim : int
        Dimension of the projection; with more the projected inner products are closer to the full ones.
    damping : float
        delta, in the units of Phi^T Phi / n.
    seed : int
        Of the projection; checkpoint number t takes seed + t.

    Returns
    -------
    Scores, shape (n_test, n_train)

    Raises
    ------
    TypeError, ValueError
        As :func:`tracin`; a kernel that is singular, as with damping = 0 and fewer rows or parameters than `dim`.

    Notes
    -----
    Source: Park et al. (2023), "TRAK: attributing model behavior at scale", eq. 13 to 16, with gradients of the loss in
    place of those of a margin and the residuals 1 - p.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.zero_()
    >>> rows = torch.ones(2, 1), torch.tensor([[-1.0], [1.0]])
    >>> xf.influence.projected_scores(model, torch.nn.functional.mse_loss, rows, rows, dim=1)
    Scores([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    dim = check_count(dim, "dim")
    damping = check.check_at_least_zero(damping, "damping")
    seed = check_seed(seed)
    loss, rows, tests = prepare_companion(model, loss_fn, train, test, params, microbatch)
    states = states_of(loss, checkpoints)
    out = torch.zeros(len(tests), len(rows), dtype=torch.float64, device=loss.device)
    for number, state in enumerate(states):
        features, of_tests = (
            _features(loss, data, state, dim, seed + number, name) for data, name in ((rows, "train"), (tests, "test"))
        )
        kernel = features.T @ features
        kernel.diagonal().add_(damping * len(rows))
        factor, info = torch.linalg.cholesky_ex(kernel)
        pivots = factor.diagonal() ** 2
        if info.item() or not bool(pivots.min() > dim * 1e-7 * kernel.diagonal().max()):
            raise ValueError(f"damping: expected enough for a kernel of dimension {dim} to be regular, got {damping:g}")
        out += torch.cholesky_solve(of_tests.T, factor).T @ features.T
    convention = Convention(
        quantity="L_test(theta without row i) - L_test(theta)",
        sign="positive = helpful",
        divided_by_n=True,
        hessian=f"empirical Fisher in {dim} projected dimensions + damping, mean over {len(states)} checkpoints",
        l2=0.0,
        damping=damping,
        train_gradient="loss",
        n=len(rows),
    )
    return Scores.wrap((out / len(states)).to(loss.dtype), convention, None)


def _features(loss: ModelLoss, rows: TorchRows, state: State, dim: int, seed: int, name: str) -> Tensor:
    """Projected gradients of all rows (n, dim), in float64."""
    found = loss.train_gradients(rows, state, name=name)
    return torch.cat([random_projection(gradients, dim, seed=seed).double() for _, gradients in found])
