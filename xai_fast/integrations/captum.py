"""Captum's methods as explainers of this package: any object with ``attribute``; Captum itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._copies import unshared
from ..ops import _checks as check

__all__ = ["captum_explainer"]

INTERPOLATIONS = ("bilinear", "nearest")


def captum_explainer(
    method: Any,
    *,
    baselines: Any = None,
    internal_batch_size: int | None = None,
    reduce_channels: str | None = None,
    interpolate: str | None = "bilinear",
    **attribute_kwargs: Any,
) -> Callable[..., Tensor]:
    """An explainer ``explain(inputs, target=None) -> maps`` of a Captum method, for the measures of this package.

    Parameters
    ----------
    method : object with ``attribute``
        A Captum ``Attribution``, ``LayerAttribution`` or ``NeuronAttribution``, or anything that is called in the same way.
    baselines : number, Tensor or callable, optional
        Handed to ``attribute``. A tensor has first dimension 1 (or is what the method takes for any number of inputs); a
        callable makes it of the inputs, as measures run other batches than the data's.
    internal_batch_size : int, optional
        Handed to ``attribute``, for the methods that have it (integrated gradients).
    reduce_channels : {"sum", None}
        "sum": one value for a pixel, (B, 1, H, W), or for a token, (B, N). None: as the method gives them.
    interpolate : {"bilinear", "nearest", None}
        How the maps (B, C, h, w) of a layer come to the size of images; None leaves theirs.
    **attribute_kwargs
        Further arguments of ``attribute``, the same at every call.

    Returns
    -------
    callable
        ``explain(inputs, target=None)``; maps without a graph. Inputs are neither changed nor made to require gradients.

    Raises
    ------
    TypeError
        A method without ``attribute``, arguments that ``attribute`` does not have; when called: inputs that are no tensor.
    ValueError
        An unknown reduction or interpolation; when called: several maps (of several inputs or layers).

    Notes
    -----
    ``target`` is left out where ``attribute`` has none.

    Examples
    --------
    >>> import torch
    >>> class InputTimesWeight:  # as captum.attr.InputXGradient for a linear model
    ...     def attribute(self, inputs, target=None):
    ...         return inputs * torch.tensor([[1.0, 0.0], [2.0, 1.0]])[:, target].T
    >>> explain = captum_explainer(InputTimesWeight())
    >>> explain(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1]))
    tensor([[1., 2.],
            [0., 1.]])
    """
    attribute = getattr(method, "attribute", None)
    if not callable(attribute):
        raise TypeError(f"method: expected an object with attribute(inputs, target=...), got {type(method).__name__}")
    if reduce_channels not in ("sum", None):
        raise ValueError(f"reduce_channels: expected 'sum' or None, got {reduce_channels!r}")
    if interpolate is not None and interpolate not in INTERPOLATIONS:
        raise ValueError(f"interpolate: expected one of {', '.join(INTERPOLATIONS)} or None, got {interpolate!r}")
    options = dict(attribute_kwargs)
    if internal_batch_size is not None:
        options["internal_batch_size"] = check.check_count(internal_batch_size, "internal_batch_size")
    if baselines is not None:
        options["baselines"] = baselines
    takes_target = _check_arguments(attribute, options)

    def explain(inputs: Tensor, target: Any = None, **more: Any) -> Tensor:
        check.check_tensor(inputs, "inputs")
        # A leaf of its own: the gradient methods mark their inputs, others may write to them, and the caller's stay.
        x = unshared(inputs.detach())
        if x.is_floating_point():
            x.requires_grad_()
        chosen = unshared({**options, **more, **({"target": target} if takes_target else {})})
        if callable(chosen.get("baselines")):
            chosen["baselines"] = chosen["baselines"](unshared(inputs.detach()))
        maps = _single(attribute(x, **chosen))
        return _fitted(maps, inputs, reduce_channels, interpolate)

    return explain


def _check_arguments(attribute: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether `attribute` takes a target; TypeError for options that it does not take."""
    parameters = signature(attribute).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return True
    unknown = [name for name in options if name not in parameters]
    if unknown:
        wanted = ", ".join(name for name in list(parameters)[1:])
        raise TypeError(f"{unknown[0]}: expected one of the arguments of attribute ({wanted}), got another")
    return "target" in parameters


def _single(maps: Any) -> Tensor:
    """The one tensor of maps: layers give tuples, and a method asked for its convergence gives a pair."""
    parts = maps if isinstance(maps, (tuple, list)) else (maps,)
    if len(parts) != 1:
        raise ValueError(f"method: expected maps of one input or layer, got {len(parts)} results")
    if not isinstance(parts[0], Tensor):
        raise TypeError(f"method: expected a tensor of maps, got {type(parts[0]).__name__}")
    return parts[0].detach()


def _fitted(maps: Tensor, inputs: Tensor, reduce_channels: str | None, interpolate: str | None) -> Tensor:
    images = maps.dim() == 4 and inputs.dim() == 4
    if reduce_channels == "sum":
        if images:
            maps = maps.sum(1, keepdim=True)
        elif maps.dim() == 3:
            maps = maps.sum(2)
    if images and interpolate is not None and maps.shape[2:] != inputs.shape[2:]:
        corners = False if interpolate == "bilinear" else None
        maps = F.interpolate(maps, size=tuple(inputs.shape[2:]), mode=interpolate, align_corners=corners)
    return maps.to(torch.float32) if not maps.is_floating_point() else maps
