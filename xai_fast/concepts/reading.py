"""What a layer puts out for examples, pooled as `tcav` pools it: what CAVs are fitted on, and what they sort."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks as check
from ._activations import Pool, Probe, named_layers
from .concept import Concept
from .tcav import check_pool

__all__ = ["activations"]


def activations(
    model: nn.Module, layer: str | nn.Module, images: Any, *, pool: Pool = "mean", batch_size: int | None = None
) -> Tensor:
    """The pooled outputs of a layer, for :func:`fit_cav` and :func:`sort_by_concept`.

    Parameters
    ----------
    model : nn.Module
        Runs in eval mode, without gradients; its mode is restored.
    layer : str or nn.Module
        Part of the model, called once in a forward pass. Of several outputs the first floating tensor is taken.
    images : Concept, or examples as it takes them
        On any device: batches move to that of the model's parameters.
    pool, batch_size
        As in :func:`tcav`.

    Returns
    -------
    Tensor, shape (n, d)
        In float32, or float64 where the layer is, on the model's device.

    Raises
    ------
    TypeError
        Arguments of another kind.
    ValueError
        As :func:`tcav` for the layer and the pooling; activations that are not finite.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2))
    >>> activations(model, "1", torch.rand(7, 3, 8, 8)).shape
    torch.Size([7, 5])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if batch_size is not None:
        batch_size = check.check_count(batch_size, "batch_size")
    # Examples follow the model's device and dtype.
    like = next(iter(model.parameters()), torch.zeros(()))
    probe = Probe(model, named_layers(model, [layer]), check_pool(pool), like, batch_size)
    concept = images if isinstance(images, Concept) else Concept("images", images)
    ((found,),) = probe.activations([concept]).values()
    return found
