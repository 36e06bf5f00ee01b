"""What the function mode does with each operation: one handler for all spellings of one kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._interception import opened
from . import _elements as elements
from . import _products as products
from . import _ruled as ruled
from . import _spellings as spell
from ._arguments import Arguments, Handler, Keywords, argument
from ._inputs import order_of_ids

if TYPE_CHECKING:
    from ._mode import RelevanceMode
    from ._report import Observer
    from .composite import Composite

__all__ = ["build_table"]


def _plain(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """The gradient is the rule already; of a softmax the Taylor rule R_x = x (R_y - y sum R_y) of AttnLRP (eq. 13)."""
    return func(*args, **kwargs)


def _dropout(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    p = argument(args, kwargs, 1, "p", default=0.5)
    if p and argument(args, kwargs, 2, "training", "train", default=True) and not mode.switchable:
        raise ValueError(f"model: expected no active dropout, got p={p} in training mode; call model.eval()")
    return func(*args, **kwargs)


def _embedding(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    out = func(*args, **kwargs)
    ids = argument(args, kwargs, 0, "input", "indices")
    if func is torch.embedding:
        ids = argument(args, kwargs, 1, "indices")
    for given, leaves in mode.embedded:
        order = order_of_ids(ids, given)
        if order is None:
            continue
        # Shaped like the given ids (B,N), whatever the model made of them.
        leaf = out.detach().permute(*order, -1).reshape(*given.shape, out.shape[-1]).requires_grad_()
        # Gradient checkpointing runs this again, for values only: the graph is the one of the first run.
        if torch._C._current_graph_task_id() == -1:
            leaves.append(leaf)
        permuted = leaf.clone().view(*(ids.shape[i] for i in order), out.shape[-1])
        out = permuted.permute(*(order.index(i) for i in range(ids.ndim)), -1)
        mode.inputs.append(out)
    return out


def _backward(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """With the mode active inside: gradient checkpointing runs parts of the forward pass again."""
    with mode:
        return opened(func)(*args, **kwargs)


def _open(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    with mode:
        return opened(func)(*args, **kwargs)


def build_table(composite: Composite, observer: Observer | None) -> dict[Callable[..., Any], Handler]:
    """Function -> handler, of the functions that this composite (or the observer) needs to see."""
    table: dict[Callable[..., Any], Handler] = {}

    def add(spellings: Any, handler: Handler, kind: str | None = None) -> None:
        if observer is not None and kind is not None:
            handler = observer.watching(handler, kind)
        table.update(dict.fromkeys(spellings, handler))

    if observer is not None or composite.ruled_kinds():
        add({F.linear}, products.linear, "linear")
        add({torch.addmm, Tensor.addmm}, products.addmm, "linear")
        add(spell.CONVOLUTION | spell.TRANSPOSED_CONVOLUTION, ruled.convolution, "convolution")
    else:
        add({torch.addmm, Tensor.addmm}, products.addmm)
    if observer is not None:
        add(spell.SOFTMAX, _plain, "softmax")
        add(spell.ADDITION, _plain, "addition")
    add(spell.PRODUCT, products.matmul, "product")
    add(spell.INNER, products.inner, "product")
    add(spell.TENSORDOT, products.tensordot, "product")
    add({torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_}, products.baddbmm, "product")
    add({torch.einsum, torch.functional.einsum}, products.einsum, "product")
    add(spell.MULTIPLICATION, products.multiplication, "product")
    add(spell.POWER, products.power)
    add(spell.DIVISION, products.division)
    add(spell.DENOMINATOR, products.denominator)
    add({F.scaled_dot_product_attention}, products.fused_attention, "attention")
    add({F.layer_norm, torch.layer_norm}, elements.layer_norm, "norm")
    add({F.rms_norm, torch.rms_norm}, elements.rms_norm, "norm")
    add({F.group_norm, torch.group_norm}, elements.group_norm, "norm")
    add({F.instance_norm}, elements.instance_norm, "norm")
    add({F.batch_norm}, ruled.batch_norm, "batch norm")
    add(spell.ACTIVATION, elements.activation, "activation")
    add(spell.ACTIVATION_IN_PLACE, elements.activation_in_place)
    add(spell.DROPOUT, _dropout)
    add({F.embedding, torch.embedding}, _embedding)
    add(spell.OPENED, _open)
    add(spell.BACKWARD, _backward)
    return table
