"""Norms of the tokens after each block of an encoder, before its final normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from ...ops import _checks as check
from ...ops import row_norms
from ._blocks import Block, Layers, call, find_blocks, hidden_of, plainly, token_dim

__all__ = ["TokenNorms", "token_norms"]

HiddenStates = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]


@dataclass(frozen=True)
class TokenNorms:
    """Norms of the tokens of a model.

    Attributes
    ----------
    norms : Tensor, shape (L, B, T)
        After each block, float32 (float64 for a float64 model).
    layers : tuple of L str
        Paths of the blocks.
    hidden : tuple of L Tensor (B, T, D), or None
        The hidden states themselves, with ``keep_hidden=True``.

    Examples
    --------
    >>> import torch
    >>> TokenNorms(torch.ones(1, 2, 3), ("blocks.0",)).norms.shape
    torch.Size([1, 2, 3])
    """

    norms: Tensor
    layers: tuple[str, ...]
    hidden: tuple[Tensor, ...] | None = None


@overload
def token_norms(
    model_or_hidden_states: nn.Module, inputs: Any, *, layers: Layers = None, keep_hidden: bool = False
) -> TokenNorms: ...
@overload
def token_norms(model_or_hidden_states: HiddenStates) -> Tensor: ...


def token_norms(
    model_or_hidden_states: nn.Module | HiddenStates,
    inputs: Any = None,
    *,
    layers: Layers = None,
    keep_hidden: bool = False,
) -> TokenNorms | Tensor:
    """The L2 norm of every token after every block.

    .. math:: n_{lbt} = \\lVert h^{(l)}_{bt} \\rVert_2

    Parameters
    ----------
    model_or_hidden_states : nn.Module, or Tensor, ndarray or a sequence of them
        A model, to be run on `inputs`; or hidden states that are there already: (B, T, D), (L, B, T, D), or a sequence of
        (B, T, D), such as ``output.hidden_states`` of a Hugging Face model.
    inputs : Tensor, mapping or tuple
        For a model: ``model(inputs)``, ``model(**inputs)`` or ``model(*inputs)``.
    layers : optional
        For a model, which blocks: None for all, a slice or indices; or, where they are not found (they are in encoders of
        Hugging Face, timm and torch.nn), the path of a stack of blocks, or a sequence of paths or modules.
    keep_hidden : bool
        Return the hidden states of a model too. By default they are read once and not kept.

    Returns
    -------
    Tensor
        For hidden states: (B, T) for one tensor (B, T, D), else (L, B, T), in the order given.
    TokenNorms
        For a model. Its forward pass runs once, without gradients, in the mode (training or evaluation) that it is in.

    Raises
    ------
    TypeError
        Neither a model nor floating tensors; hidden states together with arguments for models.
    ValueError
        A wrong shape; no stack of blocks or several; an unknown path; a block that was not run; blocks with different
        numbers of tokens.

    Notes
    -----
    Taken before the final normalisation, which makes the norms of all tokens alike: the high-norm tokens of Darcet et al.
    (2024), "Vision Transformers Need Registers" (arXiv 2309.16588), cannot be seen in a model's final output. The last of
    Hugging Face's ``hidden_states`` is normalised in some models (Llama); hooks on the blocks, as here, are not affected.
    Blocks that end in a normalisation of their own (BERT) have no high norms to show. 16-bit states are squared and added
    in float32.

    Examples
    --------
    >>> import torch
    >>> token_norms(torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))
    tensor([[5., 1.]])
    >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True)
    >>> found = token_norms(torch.nn.TransformerEncoder(layer, 3).eval(), torch.randn(2, 5, 8))
    >>> found.norms.shape, found.layers
    (torch.Size([3, 2, 5]), ('layers.0', 'layers.1', 'layers.2'))
    """
    if isinstance(model_or_hidden_states, nn.Module):
        if inputs is None:
            raise TypeError("inputs: expected inputs for the model, got None")
        return _of_model(model_or_hidden_states, inputs, layers, keep_hidden)
    if inputs is not None or layers is not None or keep_hidden:
        raise TypeError("inputs, layers and keep_hidden: expected none with hidden states, they are for models")
    return _of_states(model_or_hidden_states)


def _of_states(states: Any) -> Tensor:
    if isinstance(states, (Tensor, np.ndarray)):
        hidden = check.from_array(states, "hidden_states")
        check.check_float_tensor(hidden, "hidden_states")
        if hidden.dim() not in (3, 4) or not hidden.shape[-1]:
            wanted = "(B, T, D) or (L, B, T, D) with D of at least 1"
            raise ValueError(f"hidden_states: expected {wanted}, got shape {check.shape_of(hidden)}")
        return row_norms(hidden)
    if not isinstance(states, Sequence) or isinstance(states, str):
        raise TypeError(f"hidden_states: expected a model, a tensor or a sequence of tensors, got {type(states).__name__}")
    if not states:
        raise ValueError(
            "hidden_states: expected at least one, got an empty sequence (Hugging Face models return them with "
            "output_hidden_states=True)"
        )
    found = []
    for number, state in enumerate(states):
        name = f"hidden_states[{number}]"
        hidden = check.from_array(state, name) if isinstance(state, np.ndarray) else state
        check.check_float_tensor(hidden, name)
        if hidden.dim() != 3 or not hidden.shape[-1]:
            raise ValueError(f"{name}: expected shape (B, T, D) with D of at least 1, got {check.shape_of(hidden)}")
        found.append(row_norms(hidden))
    return _stack(found, [f"hidden_states[{number}]" for number in range(len(found))])


def _of_model(model: nn.Module, inputs: Any, layers: Layers, keep_hidden: bool) -> TokenNorms:
    blocks = find_blocks(model, layers)
    # By block: one that runs twice would otherwise shift the others.
    norms: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}

    def note(block: Block, place: int, output: Any) -> None:
        if place in norms:
            raise ValueError(f"layers: expected blocks that run once in a forward pass, but {block.name!r} ran again")
        hidden = hidden_of(output, block).detach()
        hidden = hidden.transpose(0, 1) if token_dim(block.module) == 0 else hidden
        norms[place] = row_norms(hidden)
        if keep_hidden:
            # Later code may write to the block's output.
            kept[place] = hidden.clone()

    with ExitStack() as stack:
        stack.enter_context(plainly())
        stack.enter_context(torch.no_grad())
        for place, block in enumerate(blocks):
            hook = block.module.register_forward_hook(
                lambda _, __, output, block=block, place=place: note(block, place, output)
            )
            stack.callback(hook.remove)
        call(model, inputs)
    for place, block in enumerate(blocks):
        if place not in norms:
            raise ValueError(f"layers: expected blocks that the forward pass runs, but {block.name!r} was not run")
    names = [block.name for block in blocks]
    hidden = tuple(kept[place] for place in range(len(blocks))) if keep_hidden else None
    return TokenNorms(_stack([norms[place] for place in range(len(blocks))], names), tuple(names), hidden)


def _stack(norms: list[Tensor], names: list[str]) -> Tensor:
    first = norms[0]
    for found, name in zip(norms, names, strict=True):
        if found.shape != first.shape:
            shapes = f"{check.shape_of(first)} as {names[0]}, got {check.shape_of(found)}"
            raise ValueError(f"{name}: expected batch and tokens {shapes} (choose layers of one shape)")
    # The blocks of a model may lie on several devices.
    return torch.stack([found.to(first.device) for found in norms])
