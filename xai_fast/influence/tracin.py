"""TracIn: influence as the inner product of gradients along training, without any Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..ops import _checks as check
from ..ops._checks import check_count
from ._torch_model import Checkpoint, ModelLoss, Params
from ._torch_rows import TorchRows, as_rows
from .results import Convention, Scores

__all__ = ["tracin"]


def tracin(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    train: Any,
    test: Any,
    *,
    checkpoints: Sequence[Checkpoint] | None = None,
    learning_rates: Sequence[float] | None = None,
    params: Params = None,
    microbatch: int | None = None,
) -> Scores:
    """How much the training steps with a row lowered the loss of a test point: TracIn over checkpoints.

    .. math:: \\mathrm{TracIn}(i, test) = \\sum_t \\eta_t \\langle \\nabla L_{test}(\\theta_t), \\nabla L_i(\\theta_t)
    \\rangle

    Positive = helpful (a proponent): the other sign than I_up,loss, where positive = harmful.

    Parameters
    ----------
    model : nn.Module
        Left as it is; runs in eval mode.
    loss_fn : callable
        As in :class:`TorchInfluence`.
    train, test : DataLoader, Dataset, tuple (inputs, targets), or iterable of batches
    checkpoints : list of state dicts or paths, optional
        By default the model as it is.
    learning_rates : list of float, optional
        eta of each checkpoint; 1 by default.
    params, microbatch
        As in :class:`TorchInfluence`.

    Returns
    -------
    Scores, shape (n_test, n_train)

    Raises
    ------
    TypeError, ValueError
        As :class:`TorchInfluence`; no checkpoints, another number of learning rates, a checkpoint of another model.

    Notes
    -----
    Source: Pruthi et al. (2020), "Estimating training data influence by tracing gradient descent", TracInCP.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.zero_()
    >>> rows = torch.ones(2, 1), torch.tensor([[-1.0], [1.0]])
    >>> xf.influence.tracin(model, torch.nn.functional.mse_loss, rows, rows, learning_rates=[0.5])
    Scores([[ 2., -2.],
            [-2.,  2.]])
    """
    loss, rows, tests = prepare_companion(model, loss_fn, train, test, params, microbatch)
    states = states_of(loss, checkpoints)
    given = [1.0] * len(states) if learning_rates is None else learning_rates
    if not isinstance(given, Iterable):
        raise TypeError(f"learning_rates: expected a list, one for each checkpoint, got {type(given).__name__}")
    rates = [check.check_number(rate, "learning_rates") for rate in given]
    if len(rates) != len(states):
        raise ValueError(f"learning_rates: expected {len(states)}, one for each checkpoint, got {len(rates)}")
    out = torch.zeros(len(tests), len(rows), dtype=loss.dtype, device=loss.device)
    for state, rate in zip(states, rates, strict=True):
        of_tests = torch.cat([gradients for _, gradients in loss.train_gradients(tests, state, name="test")])
        for at, gradients in loss.train_gradients(rows, state, name="train"):
            out[:, at] += rate * (of_tests @ gradients.T)
    convention = Convention(
        "TracIn", "positive = helpful", False, f"identity, {len(states)} checkpoints", 0.0, 0.0, "loss", len(rows)
    )
    return Scores.wrap(out, convention, None)


def prepare_companion(
    model: nn.Module, loss_fn: Callable[..., Any], train: Any, test: Any, params: Params, microbatch: int | None
) -> tuple[ModelLoss, TorchRows, TorchRows]:
    """The loss, the training rows and the test rows."""
    if microbatch is not None:
        microbatch = check_count(microbatch, "microbatch")
    loss = ModelLoss(model, loss_fn, params, microbatch)
    rows, tests = as_rows(train, "train"), as_rows(test, "test")
    loss.check(rows, "train")
    return loss, rows, tests


def states_of(loss: ModelLoss, checkpoints: Sequence[Checkpoint] | None) -> list[Any]:
    """The states of the checkpoints, or that of the model."""
    if checkpoints is None:
        return [loss.state]
    if not isinstance(checkpoints, Sequence) or isinstance(checkpoints, str) or not checkpoints:
        raise ValueError(f"checkpoints: expected a list of state dicts or paths, got {checkpoints!r:.50}")
    return [loss.state_of(checkpoint, f"checkpoints[{number}]") for number, checkpoint in enumerate(checkpoints)]
