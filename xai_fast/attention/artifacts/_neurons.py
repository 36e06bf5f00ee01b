"""The hidden layer of a block's MLP: which module reads it, and what is in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._blocks import Block, token_dim

__all__ = ["read_neurons", "reader_of"]

# The last linear layer of the MLP, by its path in a block: its input are the neurons after the activation function.
READERS = ("mlp.fc2", "mlp.down_proj", "mlp.w3", "mlp.c_proj", "output.dense", "linear2")


def reader_of(block: Block, mlp: str | None) -> nn.Module:
    """The module whose input are the activations of the MLP's hidden layer."""
    if mlp is not None:
        try:
            return block.module.get_submodule(mlp)
        except AttributeError:
            raise ValueError(f"mlp: expected the path of a module in {block.name!r}, got {mlp!r}") from None
    children = dict(block.module.named_modules())
    for path in READERS:
        if path in children:
            return children[path]
    widening = {m.out_features: m.in_features for m in children.values() if isinstance(m, nn.Linear)}
    found = [
        module
        for module in children.values()
        if isinstance(module, nn.Linear) and module.in_features > module.out_features and module.in_features in widening
    ]
    if len(found) != 1:
        raise ValueError(
            f"mlp: found {len(found)} layers in {block.name!r} that could end its MLP; give the path of the right one, "
            "such as mlp='mlp.fc2'"
        )
    return found[0]


def read_neurons(args: tuple[Any, ...], block: Block) -> Tensor:
    """The activations (B, T, H) that the reader was called with, as a view."""
    hidden = args[0] if args else None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        what = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"mlp: expected a layer that is called with neurons (B, T, H), but in {block.name!r} it got {what}")
    return hidden.transpose(0, 1) if token_dim(block.module) == 0 else hidden
