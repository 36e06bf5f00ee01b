"""Explanations by gradients that are differentiable themselves, so that they can be attacked or trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._copies import unshared
from .._dtypes import accumulate_dtype
from ..ops import _checks as check
from ._forwards import class_scores, target_classes

__all__ = ["Explainer", "gradient_explanation", "gradient_times_input", "integrated_gradients"]

Rule = Callable[[Callable[..., Any], Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Explainer:
    """A callable ``(x, target=None) -> maps`` whose maps can be differentiated by x; made by the functions of this module.

    If x requires grad (and grad mode is on) the maps carry a graph for second derivatives, else they are plain tensors.
    The model's parameters keep their ``.grad``, and x its values: model and rule get copies, and the model may begin with an
    operation in place.

    Attributes
    ----------
    forward : callable
        Model: inputs (B, ...) -> class scores (B, C), or one number a sample, (B,). Rows must not depend on each other: put
        the model in evaluation mode.
    rule : callable
        ``(forward, x, target, create_graph) -> maps`` of the shape of x.
    target : int, Tensor (B,) or None
        The class explained; None: the predicted one. A target of the call goes before it.
        :func:`.robustness.attack_explanation` keeps to the class that the original inputs have; measures of sensitivity let
        the targets of a tensor follow their samples.
    magnitude : bool
        Absolute values; for inputs of three or more dimensions summed over dimension 1, the channels.

    Examples
    --------
    >>> explain = Explainer(lambda x: x**2, lambda forward, x, target, create_graph: forward(x))
    >>> explain(torch.tensor([[1.0, -3.0]]))
    tensor([[1., 9.]])
    >>> gradient_explanation(lambda x: x**2, target=0)(torch.tensor([[1.0, -3.0]]), target=1)
    tensor([[ 0., -6.]])
    """

    forward: Callable[..., Any]
    rule: Rule
    target: Any = None
    magnitude: bool = False

    def __post_init__(self) -> None:
        if not callable(self.forward):
            raise TypeError(f"forward: expected a callable, got {type(self.forward).__name__}")
        if not isinstance(self.magnitude, bool):
            raise TypeError(f"magnitude: expected a bool, got {type(self.magnitude).__name__}")

    def __call__(self, x: Tensor, target: Any = None) -> Tensor:
        check.check_float_tensor(x, "x")
        with torch.no_grad():
            scores = class_scores(self.forward(unshared(x)))
        return self.maps(x, target_classes(self.target if target is None else target, scores))

    def maps(self, x: Tensor, target: Tensor) -> Tensor:
        """The maps for these classes (B,)."""
        create_graph = x.requires_grad and torch.is_grad_enabled()
        with torch.enable_grad():
            own = unshared(x) if create_graph else unshared(x.detach()).requires_grad_()
            maps = self.rule(self.forward, own, target, create_graph)
            if self.magnitude:
                maps = maps.abs().sum(1) if maps.ndim > 2 else maps.abs()
        return maps if create_graph else maps.detach()


def given_target(explanation: Any, target: Any) -> Any:
    """The target for changed copies of samples: that given, else an explainer's own where each sample has one."""
    own = explanation.target if target is None and isinstance(explanation, Explainer) else None
    return target if own is None or isinstance(check.as_number(own), int) else check.as_tensor(own, "target")


def gradient_explanation(forward: Callable[..., Any], target: Any = None, *, magnitude: bool = False) -> Explainer:
    """The gradient of a class score by the input, as an explanation that can be attacked.

    Parameters
    ----------
    forward : callable
        Model: inputs (B, ...) -> class scores (B, C), or one number a sample, (B,). Rows must not depend on each other.
    target : int, Tensor (B,) or None
        The class explained; None: the predicted one.
    magnitude : bool
        Absolute values, summed over dimension 1 of inputs with three or more dimensions: the saliency map (B, H, W) that
        the source attacks.

    Returns
    -------
    Explainer
        Maps x (B, ...) to maps of its shape, or of its shape without channels.

    Raises
    ------
    TypeError, ValueError
        forward is not callable; when called: a target that is no class of the model.

    Notes
    -----
    d f_c(x) / d x: Simonyan, Vedaldi & Zisserman 2013 (arXiv 1312.6034), section 3.

    Examples
    --------
    >>> import torch
    >>> explain = gradient_explanation(lambda x: torch.stack((x.prod(1), x.sum(1)), 1), target=0)
    >>> explain(torch.tensor([[2.0, 3.0]]))
    tensor([[3., 2.]])
    """
    return Explainer(forward, _gradient, target, magnitude)


def gradient_times_input(forward: Callable[..., Any], target: Any = None, *, magnitude: bool = False) -> Explainer:
    """The gradient of a class score times the input, as an explanation that can be attacked.

    Parameters, returns and errors are those of :func:`gradient_explanation`.

    Notes
    -----
    x * d f_c(x) / d x: Shrikumar et al. 2016 (arXiv 1605.01713). On a ReLU network its derivative by x is the gradient and
    not zero, but leaves out how the gradient itself changes: attack it with `softplus_beta`, too.

    Examples
    --------
    >>> import torch
    >>> gradient_times_input(lambda x: x**2, target=1)(torch.tensor([[2.0, 3.0]]))
    tensor([[ 0., 18.]])
    """
    return Explainer(forward, _gradient_times_input, target, magnitude)


def integrated_gradients(
    forward: Callable[..., Any],
    target: Any = None,
    *,
    baseline: float | Tensor = 0.0,
    n_steps: int = 32,
    magnitude: bool = False,
) -> Explainer:
    """Integrated gradients, as an explanation that can be attacked.

    Parameters
    ----------
    forward, target, magnitude
        As in :func:`gradient_explanation`.
    baseline : float or Tensor
        Where the path begins: one number, or a tensor of the shape of one sample.
    n_steps : int
        Points on the path. All run in one batch of n_steps * B rows.

    Returns
    -------
    Explainer
        Maps x (B, ...) to maps of its shape, or of its shape without channels.

    Raises
    ------
    TypeError, ValueError
        forward is not callable, baseline is no number or tensor, n_steps is not a whole number above 0; when called: a
        baseline of another shape or a target that is no class of the model.

    Notes
    -----
    (x - b) * mean_m d f_c / d x at b + (m - 1/2) / n_steps (x - b), the midpoint rule: Sundararajan, Taly & Yan 2017 (arXiv
    1703.01365), equation 1.

    Examples
    --------
    >>> import torch
    >>> integrated_gradients(lambda x: x**2, target=1)(torch.tensor([[2.0, 3.0]]))
    tensor([[0., 9.]])
    """
    if not isinstance(baseline, Tensor):
        baseline = check.check_number(baseline, "baseline")
    n_steps = check.check_count(n_steps, "n_steps")
    return Explainer(forward, partial(_integrated, baseline, n_steps), target, magnitude)


def _gradient(forward: Callable[..., Any], x: Tensor, target: Tensor, create_graph: bool) -> Tensor:
    # x is what the gradient is taken by: what the model may overwrite is a copy.
    scores = class_scores(forward(unshared(x)))
    chosen = scores if scores.ndim == 1 else scores.gather(1, target[:, None])
    return torch.autograd.grad(chosen.sum(), x, create_graph=create_graph)[0]


def _gradient_times_input(forward: Callable[..., Any], x: Tensor, target: Tensor, create_graph: bool) -> Tensor:
    return x * _gradient(forward, x, target, create_graph)


def _integrated(
    baseline: float | Tensor, n_steps: int, forward: Callable[..., Any], x: Tensor, target: Tensor, create_graph: bool
) -> Tensor:
    if isinstance(baseline, Tensor) and baseline.shape != x.shape[1:]:
        raise ValueError(f"baseline: expected shape {tuple(x.shape[1:])}, got {check.shape_of(baseline)}")
    if isinstance(baseline, Tensor):
        baseline = baseline.to(x)
    middles = (torch.arange(n_steps, device=x.device, dtype=accumulate_dtype(x.dtype)) + 0.5) / n_steps
    path = x - baseline
    points = baseline + middles.to(x.dtype).reshape(-1, *(1,) * x.ndim) * path
    gradients = _gradient(forward, points.flatten(0, 1), target.repeat(n_steps), create_graph)
    return path * gradients.unflatten(0, (n_steps, len(x))).mean(0)
