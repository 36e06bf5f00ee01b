"""What an influence is measured on: functions of the logits of a test point, by their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._labels import named_rows
from .heads import Head

__all__ = ["Functional", "check_functional", "logit_gradient", "quantity", "rises_when_good"]

Functional = str | Callable[[Tensor, Tensor | None], Tensor]
NAMED = ("loss", "logit", "margin")


def check_functional(of: Any) -> None:
    """ValueError unless `of` is a name that is known, or callable."""
    if not callable(of) and of not in NAMED:
        raise ValueError(f"of: expected 'loss', 'logit', 'margin' or a callable (logits, y) -> (n_test,), got {of!r}")


def quantity(of: Functional) -> str:
    """The name of the influence on that functional."""
    return f"I_up,{of if isinstance(of, str) else getattr(of, '__name__', 'functional')}"


def rises_when_good(of: Functional) -> bool:
    """Whether a larger value is a better prediction: logit and margin; not a loss, and a callable is taken as one."""
    return of in ("logit", "margin")


def logit_gradient(head: Head, logits: Tensor, y: Tensor | None, of: Functional) -> Tensor:
    """d of / d logits of every test point, (n_test, C)."""
    if of == "loss":
        assert y is not None
        return head.residual(logits, y)
    function = {"logit": head.class_logit, "margin": head.margin}[of] if isinstance(of, str) else of
    # Copies: tensors made under inference_mode cannot be part of a graph.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = logits.detach().clone().requires_grad_(True)
        values = function(inputs, None if y is None else y.clone())  # type: ignore[arg-type]
        if not isinstance(values, Tensor) or values.shape != (len(logits),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"of: expected one value for each of {len(logits)} test points, got {got}")
        if not values.requires_grad:
            raise ValueError("of: expected a differentiable function of the logits, got values without a graph")
        gradient = torch.autograd.grad(values.sum(), inputs, allow_unused=True)[0]
    if gradient is None:
        raise ValueError("of: expected a function of the logits, got values that do not depend on them")
    bad = ~(gradient.isfinite().all(1) & values.isfinite())
    if bad.any():
        raise ValueError(f"of: expected finite values and gradients, got NaN or infinity in {named_rows(bad)}")
    return gradient
