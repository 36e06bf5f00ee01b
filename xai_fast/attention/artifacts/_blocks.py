"""The blocks of an encoder: where they are, what they return, and how a model is run with hooks on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._copies import unshared
from ..._interception import uncompiled

__all__ = ["Block", "Layers", "call", "find_blocks", "hidden_of", "outer_blocks", "plainly", "token_dim"]

# What encoders call the list of their blocks: Hugging Face, timm and torch.nn, original CLIP.
STACK_NAMES = ("layer", "layers", "block", "blocks", "h", "resblocks")

Layers = slice | Sequence[int] | Sequence[str] | Sequence[nn.Module] | str | nn.Module | None


class Block(NamedTuple):
    """A block of the model, by its path and its place among all blocks."""

    place: int
    name: str
    module: nn.Module


def find_blocks(model: nn.Module, layers: Layers) -> list[Block]:
    """The blocks that `layers` names, in the order of the model or in that of `layers`.

    `layers` may be None (the one stack of blocks that is found), positions in that stack, the path of a stack, paths of
    modules, or modules.
    """
    if isinstance(layers, str):
        return _of_stack(layers, _module(model, layers))
    if isinstance(layers, nn.Module):
        return _of_stack(_path(model, layers), layers)
    if layers is None or isinstance(layers, slice):
        found = outer_blocks(model)
        chosen = found if layers is None else found[layers]
        if not chosen:
            raise ValueError(f"layers: expected at least one of the {len(found)} blocks, got {layers!r}")
        return chosen
    if not isinstance(layers, Sequence) or not len(layers):
        raise TypeError(f"layers: expected a slice, indices, paths or modules (at least one), got {layers!r}")
    return [_one(model, number, entry) for number, entry in enumerate(layers)]


def outer_blocks(model: nn.Module) -> list[Block]:
    """The blocks of the only stack in the model, or an error that says what was found."""
    stacks = _stacks(model)
    if len(stacks) != 1:
        names = ", ".join(repr(name) for name in stacks)
        found = f"several ({names})" if stacks else f"none (looked for lists of modules called {', '.join(STACK_NAMES)})"
        raise ValueError(f"layers: expected a model with one stack of blocks, found {found}; give the path of one")
    ((name, stack),) = stacks.items()
    return _of_stack(name, stack)


def _stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Stacks that lie in no other: the parts of a block may be lists too."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_stack = isinstance(module, (nn.ModuleList, nn.Sequential)) and name.rpartition(".")[2] in STACK_NAMES
        if is_stack and len(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _of_stack(name: str, stack: nn.Module) -> list[Block]:
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
        return [Block(0, name, stack)]
    prefix = f"{name}." if name else ""
    return [Block(place, prefix + key, child) for place, (key, child) in enumerate(stack.named_children())]


def _one(model: nn.Module, number: int, entry: Any) -> Block:
    if isinstance(entry, str):
        return Block(number, entry, _module(model, entry))
    if isinstance(entry, nn.Module):
        return Block(number, _path(model, entry), entry)
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise TypeError(f"layers: expected indices, paths or modules, got an entry {entry!r}")
    found = outer_blocks(model)
    if not -len(found) <= int(entry) < len(found):
        raise ValueError(f"layers: expected indices in [{-len(found)}, {len(found)}), got {int(entry)}")
    return found[int(entry)]


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"layers: expected the path of a module of the model, got {path!r}") from None


def _path(model: nn.Module, module: nn.Module) -> str:
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise ValueError(f"layers: expected modules of the model, got a {type(module).__name__} that is not part of it")


def hidden_of(output: Any, block: Block) -> Tensor:
    """The hidden states in what a block returned: the tensor, or the first of a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        what = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"layers: expected blocks that return hidden states (B, T, D), but {block.name!r} returned {what}")
    return hidden


def token_dim(block: nn.Module) -> int:
    """Which dimension of the hidden states counts the tokens: 1, or 0 for torch.nn's layers without batch_first."""
    attention = getattr(block, "self_attn", None)
    return 0 if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first else 1


def call(model: nn.Module, inputs: Any) -> Any:
    """model(inputs), with a mapping as keywords and a tuple or list as positional arguments; it gets copies."""
    if isinstance(inputs, Mapping):
        return model(**unshared(dict(inputs)))
    if isinstance(inputs, (tuple, list)):
        return model(*unshared(tuple(inputs)))
    return model(unshared(inputs))


@contextmanager
def plainly() -> Iterator[None]:
    """Run models so that hooks on their parts are called: not compiled, and without torch.nn's fused encoder layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with uncompiled():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
