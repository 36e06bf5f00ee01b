"""Explainers to and from Quantus' ``explain_func``. It is a calling convention: Quantus itself is not needed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..metrics._study_explainers import caller

__all__ = ["from_quantus", "quantus_explain_func"]

ExplainFunc = Callable[..., np.ndarray]


def quantus_explain_func(explainer: Any, *, per_model: bool = False) -> ExplainFunc:
    """An ``explain_func(model, inputs, targets, **kwargs)`` for the metrics of Quantus.

    Parameters
    ----------
    explainer : callable or object with ``attribute``
        As :func:`xai_fast.metrics.run_study` takes them: ``explain(inputs, target)``, ``explain(inputs)``, or a Captum
        method. It explains the model that it holds, whichever model Quantus hands over.
    per_model : bool
        `explainer` is a function ``make(model) -> explainer``, called for the model that Quantus hands over. Metrics that
        change the model (randomisation of its weights) need it: else they see the same map again and again.

    Returns
    -------
    callable
        ``explain_func(model, inputs, targets, **kwargs)`` with numpy arrays in and out; of ``kwargs`` only "device" is read,
        by default the device of the model's parameters. Floating inputs take the dtype of the parameters.

    Raises
    ------
    TypeError
        An explainer that is none.

    Examples
    --------
    >>> import numpy as np, torch
    >>> explain_func = quantus_explain_func(lambda inputs, target: inputs * (target[:, None] + 1))
    >>> explain_func(model=None, inputs=np.ones((2, 2), dtype=np.float32), targets=np.array([0, 2]))
    array([[1., 1.],
           [3., 3.]], dtype=float32)
    """
    if per_model and not callable(explainer):
        raise TypeError(f"explainer: expected a function of the model, got {type(explainer).__name__}")
    fixed = None if per_model else caller(explainer, "explainer")

    def explain_func(model: Any, inputs: Any, targets: Any, **kwargs: Any) -> np.ndarray:
        explain = caller(explainer(model), "explainer") if fixed is None else fixed
        like = _parameter(model)
        device = kwargs.get("device") or (None if like is None else like.device)
        # Copies: an explainer that writes to its inputs must not reach the caller's array.
        x = torch.from_numpy(np.array(inputs, order="C")).to(device)
        if like is not None and x.is_floating_point():
            x = x.to(like.dtype)
        target = None if targets is None else torch.from_numpy(np.array(targets)).to(device).long()
        maps = explain(x, target)
        if not isinstance(maps, Tensor):
            raise TypeError(f"explainer: expected it to return a torch.Tensor, got {type(maps).__name__}")
        maps = maps.detach().cpu()
        return (maps.float() if maps.dtype == torch.bfloat16 else maps).numpy()

    return explain_func


def _parameter(model: Any) -> Tensor | None:
    """A floating parameter of the model, whose device and dtype its inputs need; None where it has none."""
    if not isinstance(model, nn.Module):
        return None
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def from_quantus(explain_func: ExplainFunc, model: Any, **kwargs: Any) -> Callable[..., Tensor]:
    """An explainer of this package that calls a Quantus ``explain_func``.

    Parameters
    ----------
    explain_func : callable
        ``explain_func(model, inputs, targets, **kwargs)`` with numpy arrays in and out; called by these names.
    model : object
        Handed over as it is.
    **kwargs
        Handed over as well.

    Returns
    -------
    callable
        ``explain(inputs, target=None) -> maps``, on the device of the inputs.

    Raises
    ------
    TypeError
        `explain_func` is not callable; when called: it does not return an array of numbers.

    Examples
    --------
    >>> import torch
    >>> def explain_func(model, inputs, targets, **kwargs):
    ...     return inputs * targets[:, None]
    >>> from_quantus(explain_func, model=None)(torch.ones(2, 2), torch.tensor([1, 3]))
    tensor([[1., 1.],
            [3., 3.]])
    """
    if not callable(explain_func):
        raise TypeError(f"explain_func: expected a callable, got {type(explain_func).__name__}")

    def explain(inputs: Tensor, target: Tensor | None = None) -> Tensor:
        x = inputs.detach().cpu()
        array = (x.float() if x.dtype == torch.bfloat16 else x).numpy().copy()
        targets = None if target is None else target.detach().cpu().numpy().copy()
        found = np.asarray(explain_func(model=model, inputs=array, targets=targets, **kwargs))
        if found.dtype.kind not in "fiub":
            raise TypeError(f"explain_func: expected an array of numbers, got dtype {found.dtype}")
        dtype = inputs.dtype if inputs.is_floating_point() else torch.float32
        return torch.tensor(found).to(device=inputs.device, dtype=dtype)

    return explain
