"""Signed attention of attention weights from any module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["signed_attention"]


def signed_attention(alpha: Tensor | Sequence[Tensor], loss: Tensor, *, retain_graph: bool = True) -> Any:
    """How much each attention weight lowers a loss, for weights of any module (RNN attention, pooling by attention, an MLP).

    .. math:: a_i = -\\frac{\\partial L}{\\partial \\alpha_i} \\alpha_i

    Positive: the weight speaks for what the loss rewards. For transformers whose weights are never built see
    ``record.signed_attention``.

    Parameters
    ----------
    alpha : Tensor of any shape, or a sequence of them
        Attention weights as they entered the loss, with their graph.
    loss : Tensor
        Summed if it is no scalar.
    retain_graph : bool
        Keep the graph for further backward passes.

    Returns
    -------
    Tensor, or list of Tensor for a sequence
        Shaped like alpha, detached.

    Raises
    ------
    TypeError
        Not tensors.
    ValueError
        No weights, a loss without a graph, or weights on which it does not depend.

    Notes
    -----
    Source: gradient x attention, Serrano & Smith (2019), "Is Attention Interpretable?", with the sign of the loss.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> alpha = torch.softmax(torch.zeros(2, requires_grad=True), 0)
    >>> xf.attention.signed_attention(alpha, (alpha * torch.tensor([1.0, -1.0])).sum())
    tensor([-0.5000,  0.5000])
    """
    single = isinstance(alpha, Tensor)
    if not single and not isinstance(alpha, Iterable):
        raise TypeError(f"alpha: expected a tensor or a sequence of tensors, got {type(alpha).__name__}")
    weights = [alpha] if isinstance(alpha, Tensor) else list(alpha)
    if not weights:
        raise ValueError("alpha: expected at least one tensor, got an empty sequence")
    for number, weight in enumerate(weights):
        name = "alpha" if single else f"alpha[{number}]"
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(weight).__name__}")
        if not weight.requires_grad:
            raise ValueError(f"{name}: expected weights with a graph, got a tensor that does not require grad")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a torch.Tensor, got {type(loss).__name__}")
    if not loss.requires_grad:
        raise ValueError("loss: expected a tensor with a graph, got one without")
    grads = torch.autograd.grad(loss, weights, torch.ones_like(loss), retain_graph=retain_graph, allow_unused=True)
    found = []
    for number, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        if grad is None:
            raise ValueError(f"alpha{'' if single else f'[{number}]'}: expected weights on which the loss depends")
        found.append(-(grad * weight.detach()))
    return found[0] if single else found
