# ruff: noqa: PT028 - test_time_registers is no test
"""Registers for a trained model: extra tokens that take over the activations which make outliers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._dtypes import accumulate_dtype
from ...ops import _checks as check
from ._blocks import Block, call, find_blocks, hidden_of, plainly, token_dim
from ._neurons import read_neurons, reader_of
from .norms import token_norms
from .outliers import Outliers, as_mask, find_outliers

__all__ = ["RegisterNeuron", "find_register_neurons", "test_time_registers"]

Stack = str | nn.Module | None


class RegisterNeuron(NamedTuple):
    """A neuron of the hidden layer of a block's MLP.

    Examples
    --------
    >>> RegisterNeuron(layer=3, neuron=17, score=2.5).neuron
    17
    """

    layer: int
    neuron: int
    score: float = 0.0


def find_register_neurons(
    model: nn.Module,
    inputs: Any,
    outliers: Outliers | Tensor | None = None,
    *,
    top: int = 10,
    layers: slice | Sequence[int] | None = None,
    ignore_tokens: int | Iterable[int] = 0,
    blocks: Stack = None,
    mlp: str | None = None,
) -> list[RegisterNeuron]:
    """The MLP neurons that are most active at outlier tokens.

    .. math:: s_{lj} = \\mathrm{mean}_{(b,t) \\in \\text{outliers}} |a^{(l)}_{btj}|

    with a the activations after the nonlinearity.

    Parameters
    ----------
    model : nn.Module
        A vision transformer of Hugging Face, timm or torch.nn, or another one with `blocks` and `mlp`.
    inputs : Tensor, mapping or tuple
        Some images: ``model(inputs)``, ``model(**inputs)`` or ``model(*inputs)``.
    outliers : Outliers or Tensor of bool, shape (B, T) or (L, B, T), optional
        Which tokens; of (L, B, T) the last layer that has any. By default what :func:`find_outliers` finds after the last
        block but one, by its default method.
    top : int
        How many neurons.
    layers : slice or sequence of int, optional
        The blocks in which to look; all by default. Those up to the onset of the outliers can have made them.
    ignore_tokens : int or ints
        For the default `outliers`: tokens that take no part, 0 for [CLS].
    blocks : str or nn.Module, optional
        The stack of blocks, where it is not found.
    mlp : str, optional
        Path, in a block, of the layer whose input are the neurons, such as "mlp.fc2"; found by default.

    Returns
    -------
    list of RegisterNeuron
        (layer, neuron, score), highest score first; neurons of equal score in the order of the model.

    Raises
    ------
    TypeError, ValueError
        No outliers in these inputs; a mask of another shape; no blocks or neurons found; an argument out of range.

    Notes
    -----
    Source: Jiang et al. (2025), "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010), section 3. The images
    are run once, or twice without `outliers`; activations are averaged where they occur and not kept.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2).eval()
    >>> mask = torch.tensor([[False, False, True]])
    >>> [type(found.score).__name__ for found in find_register_neurons(model, torch.randn(1, 3, 8), mask, top=2)]
    ['float', 'float']
    """
    top = check.check_count(top, "top")
    found = find_blocks(model, blocks)
    chosen = _among(found, layers)
    mask = _mask(model, inputs, outliers, found, ignore_tokens)
    scores: dict[int, Tensor] = {}

    def note(block: Block, args: tuple[Any, ...]) -> None:
        neurons = read_neurons(args, block)
        if neurons.shape[:2] != mask.shape:
            shapes = f"{tuple(neurons.shape[:2])}, the tokens of {block.name!r}, got {tuple(mask.shape)}"
            raise ValueError(f"outliers: expected a mask of shape {shapes}")
        at_outliers = neurons[mask.to(neurons.device)]
        scores[block.place] = at_outliers.abs().mean(0, dtype=accumulate_dtype(at_outliers.dtype))

    with ExitStack() as stack:
        stack.enter_context(plainly())
        stack.enter_context(torch.no_grad())
        for block in chosen:
            hook = reader_of(block, mlp).register_forward_pre_hook(lambda _, args, block=block: note(block, args))
            stack.callback(hook.remove)
        call(model, inputs)
    return _highest(scores, top)


@contextmanager
def test_time_registers(
    model: nn.Module,
    inputs: Any = None,
    *,
    neurons: Iterable[RegisterNeuron | tuple[int, ...]] | None = None,
    n_registers: int = 1,
    keep_registers: bool = False,
    top: int = 10,
    blocks: Stack = None,
    mlp: str | None = None,
) -> Iterator[tuple[RegisterNeuron, ...]]:
    """Run a model with registers that it was not trained with, inside a ``with`` block.

    .. math:: a_{b,\\mathrm{reg},j} \\leftarrow \\max_t a_{btj}, \\qquad a_{btj} \\leftarrow 0

    Tokens of zeros are added after the last token before the first block and taken away after the last one. In the hidden
    layer of the MLPs the activations of chosen neurons are moved to them: what would make a patch an outlier makes a
    register one. Every sample has its own maximum.

    Parameters
    ----------
    model : nn.Module
        A vision transformer of Hugging Face, timm or torch.nn, or another one with `blocks` and `mlp`.
    inputs : optional
        Images in which to find the neurons, by :func:`find_register_neurons` with `top`; only if `neurons` is None.
    neurons : sequence of RegisterNeuron or (layer, neuron), optional
        Without neurons, given or found, the model runs unchanged and without registers.
    n_registers : int
        With 0 the activations are set to 0 and go nowhere.
    keep_registers : bool
        Leave the registers in what the last block returns: outputs then have that many tokens more, at their end, and models
        that pool or reshape tokens see them.
    top : int
        How many neurons to find.
    blocks, mlp
        As in :func:`find_register_neurons`.

    Yields
    ------
    tuple of RegisterNeuron
        The neurons that are moved.

    Raises
    ------
    TypeError, ValueError
        A neuron that the model does not have; arguments of a wrong type; in the forward pass: attention masks or rotary
        position embeddings, which know nothing of the extra tokens.

    Notes
    -----
    Source: Jiang et al. (2025), "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010), section 4. The
    maximum is the largest value, not the largest magnitude, over the tokens that the model has without the registers.
    Attention captured inside the context has the registers as its last tokens, as have hidden states of inner blocks: for
    :func:`token_norms` of all blocks use ``keep_registers=True``. Gradients pass.

    The attention of the first block comes before any MLP. A patch that draws attention there, because of its embedding, is
    no work of neurons and draws it still.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2).eval()
    >>> with test_time_registers(model, neurons=[(0, 3), (1, 7)]):
    ...     model(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """
    n_registers = check.check_count(n_registers, "n_registers", 0)
    found = find_blocks(model, blocks)
    if neurons is None and inputs is not None:
        neurons = find_register_neurons(model, inputs, top=top, blocks=blocks, mlp=mlp)
    chosen = _as_neurons(neurons, len(found))
    if not chosen:
        yield ()
        return
    with ExitStack() as stack:
        stack.enter_context(plainly())
        for block in found:
            places = [neuron.neuron for neuron in chosen if neuron.layer == block.place]
            if places:
                reader = reader_of(block, mlp)
                _check_width(reader, places, block)
                hook = reader.register_forward_pre_hook(_mover(block, places, n_registers))
                stack.callback(hook.remove)
        if n_registers:
            first, last = found[0], found[-1]
            adding = first.module.register_forward_pre_hook(_adder(first, n_registers), with_kwargs=True)
            stack.callback(adding.remove)
            if not keep_registers:
                stack.callback(last.module.register_forward_hook(_remover(last, n_registers)).remove)
        yield chosen


# The name is not that of a test, though pytest would take it for one in a module that imports it.
test_time_registers.__test__ = False  # type: ignore[attr-defined]


def _among(found: list[Block], layers: slice | Sequence[int] | None) -> list[Block]:
    if layers is None or isinstance(layers, slice):
        chosen = found if layers is None else found[layers]
    else:
        for layer in layers:
            if isinstance(layer, bool) or not hasattr(layer, "__index__"):
                raise TypeError(f"layers: expected a slice or indices, got an entry {layer!r}")
            if not -len(found) <= int(layer) < len(found):
                raise ValueError(f"layers: expected indices in [{-len(found)}, {len(found)}), got {int(layer)}")
        chosen = [found[int(layer)] for layer in layers]
    if not chosen:
        raise ValueError(f"layers: expected at least one of the {len(found)} blocks, got {layers!r}")
    return chosen


def _mask(model: nn.Module, inputs: Any, outliers: Any, blocks: list[Block], ignore_tokens: Any) -> Tensor:
    """Outliers (B, T), at least one of them."""
    if outliers is None:
        block = blocks[max(len(blocks) - 2, 0)]
        outliers = find_outliers(token_norms(model, inputs, layers=[block.module]).norms[0], ignore_tokens=ignore_tokens)
    mask = as_mask(outliers)
    if mask.dim() == 3:
        having = mask.flatten(1).any(1).nonzero().flatten()
        mask = mask[int(having[-1])] if len(having) else mask[-1]
    if mask.dim() != 2:
        raise ValueError(f"outliers: expected a mask of shape (B, T) or (L, B, T), got {check.shape_of(mask)}")
    if not bool(mask.any()):
        raise ValueError("outliers: expected at least one outlier token in these inputs, got none")
    return mask


def _highest(scores: dict[int, Tensor], top: int) -> list[RegisterNeuron]:
    """The neurons of all layers in one sort."""
    layers = sorted(scores)
    joined = torch.cat([scores[layer].double().cpu() for layer in layers])
    of_layer = torch.cat([torch.full((len(scores[layer]),), layer) for layer in layers])
    of_neuron = torch.cat([torch.arange(len(scores[layer])) for layer in layers])
    order = joined.argsort(descending=True, stable=True)[:top]
    columns = (of_layer[order].tolist(), of_neuron[order].tolist(), joined[order].tolist())
    return [RegisterNeuron(*entry) for entry in zip(*columns, strict=True)]


def _as_neurons(neurons: Any, layers: int) -> tuple[RegisterNeuron, ...]:
    if neurons is not None and not isinstance(neurons, Iterable):
        raise TypeError(f"neurons: expected a sequence of RegisterNeuron or (layer, neuron), got {type(neurons).__name__}")
    chosen = []
    for entry in neurons if neurons is not None else ():
        if not isinstance(entry, tuple) or len(entry) not in (2, 3):
            raise TypeError(f"neurons: expected (layer, neuron) or RegisterNeuron, got an entry {entry!r}")
        layer = check.check_count(entry[0], "neurons: layer", 0, layers - 1)
        chosen.append(RegisterNeuron(layer, check.check_count(entry[1], "neurons: neuron", 0), *entry[2:]))
    return tuple(chosen)


def _check_width(reader: nn.Module, places: list[int], block: Block) -> None:
    width = getattr(reader, "in_features", None)
    if isinstance(width, int) and max(places) >= width:
        raise ValueError(f"neurons: expected indices below {width} in {block.name!r}, got {max(places)}")


def _mover(block: Block, places: list[int], registers: int) -> Callable[..., Any]:
    def move(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        neurons = read_neurons(args, block)
        if max(places) >= neurons.shape[-1]:
            raise ValueError(f"neurons: expected indices below {neurons.shape[-1]} in {block.name!r}, got {max(places)}")
        tokens = neurons.shape[1] - registers
        index = torch.tensor(places, device=neurons.device)
        largest = neurons[:, :tokens].index_select(2, index).amax(1, keepdim=True)
        spared = torch.zeros_like(largest).expand(-1, tokens, -1)
        moved = neurons.index_copy(2, index, torch.cat([spared, largest.expand(-1, registers, -1)], dim=1))
        return (moved.transpose(0, 1) if token_dim(block.module) == 0 else moved, *args[1:])

    return move


def _adder(block: Block, registers: int) -> Callable[..., Any]:
    dim = token_dim(block.module)

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Called by position, or with the hidden states as the first keyword.
        name = "" if args else next((key for key, value in kwargs.items() if isinstance(value, Tensor)), "")
        hidden = args[0] if args else kwargs.get(name)
        others = [*args[1:], *(value for key, value in kwargs.items() if key != name)]
        if any(isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and x) for x in others):
            raise ValueError(
                f"test_time_registers: expected blocks that take hidden states alone, but {block.name!r} was called with "
                "other tensors too (a mask, rotary embeddings), which know nothing of registers"
            )
        hidden = hidden_of(hidden, block)
        shape = [registers if d == dim else size for d, size in enumerate(hidden.shape)]
        longer = torch.cat([hidden, hidden.new_zeros(shape)], dim=dim)
        return ((longer, *args[1:]), kwargs) if args else ((), {**kwargs, name: longer})

    return add


def _remover(block: Block, registers: int) -> Callable[..., Any]:
    dim = token_dim(block.module)

    def remove(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = hidden_of(output, block)
        shorter = hidden.narrow(dim, 0, hidden.shape[dim] - registers)
        return shorter if output is hidden else type(output)((shorter, *output[1:]))

    return remove
