"""Examples by how much they look like a concept, in the eyes of a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._scaling import power_of_two
from ..ops import _checks as check
from .cav import CAV

__all__ = ["sort_by_concept"]


def sort_by_concept(activations: Any, cav: CAV | Tensor) -> tuple[Tensor, Tensor]:
    """Order examples by the cosine similarity of their activations with a concept's vector.

    Parameters
    ----------
    activations : Tensor or ndarray, shape (n, d)
        Of the layer and with the pooling that the CAV was fitted on.
    cav : CAV, or Tensor of shape (d,)

    Returns
    -------
    order : Tensor of int64, shape (n,)
        Most similar example first; equal ones in the order given.
    cosine : Tensor, shape (n,)
        a.v / (||a|| ||v||) of each example, in the order given: ``cosine[order]`` falls. 0 for an activation of zeros.

    Raises
    ------
    TypeError
        Activations or a vector that are no floating tensors.
    ValueError
        Other shapes, NaN or inf, a vector of zeros.

    Notes
    -----
    Source: Kim et al. (2018), Interpretability Beyond Feature Attribution: TCAV (arXiv 1711.11279), section 4.1.

    Examples
    --------
    >>> import xai_fast.concepts
    >>> order, cosine = xai_fast.concepts.sort_by_concept(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 0.0]))
    >>> order, cosine
    (tensor([1, 0]), tensor([0., 1.]))
    """
    x = check.from_numpy(activations, "activations") if isinstance(activations, np.ndarray) else activations
    check.check_float_tensor(x, "activations")
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"activations: expected shape (n, d) with at least one example, got {check.shape_of(x)}")
    vector = cav.vector if isinstance(cav, CAV) else cav
    check.check_float_tensor(vector, "cav")
    if vector.shape != x.shape[1:]:
        raise ValueError(f"cav: expected a vector of shape {check.shape_of(x)[1:]}, got {check.shape_of(vector)}")
    check.check_same_device(vector, "cav", x.device)
    v = vector.detach().double()
    largest = v.abs().amax()
    if not bool(largest > 0) or not bool(largest.isfinite()):
        raise ValueError(f"cav: expected a vector of finite length above 0, got length {float(v.norm()):g}")
    if not bool(x.isfinite().all()):
        raise ValueError("activations: expected finite values, got NaN or inf")
    v = v / power_of_two(largest)
    a = x.detach().double()
    a = a / power_of_two(a.abs().amax(1, keepdim=True))
    norms = a.norm(dim=1)
    cosine = torch.where(norms > 0, a @ (v / v.norm()) / norms, 0.0)
    # Sorted before rounding: half precision would make ties of what differs.
    return cosine.argsort(descending=True, stable=True), cosine.to(x.dtype)
