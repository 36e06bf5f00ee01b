"""The function mode that turns the backward pass of an unchanged model into relevance propagation.

It works in gradient form: the gradient g at a tensor x stands for the relevance R = x g, so that LRP with eps = 0 in linear
layers and additions is PyTorch's own gradient, and only products, attention, norms and activations differ (Achtibat et
al. 2024, section 3.3 and the efficient implementation after it). Forward values never change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _functions as functions
from . import _graph as graph
from ._arguments import Arguments, Keywords
from ._elements import identity_of_module
from ._handlers import build_table
from ._report import Observer
from .composite import Composite
from .rules import Identity, Kind, Rule

__all__ = ["RelevanceMode", "tensors_of"]


class RelevanceMode(TorchFunctionMode):
    """While it is active, backward passes through what is computed give relevance by the rules of a composite.

    Parameters
    ----------
    composite : Composite
        Which rule goes where.
    switchable : bool
        False: parameters must not require grad; every backward pass gives relevance. True: parameters may require
        grad; backward passes give true gradients, and relevance inside ``with mode.state.relevance_pass():``.
    model : nn.Module, optional
        Needed for a composite with rules for chosen modules, and for names of modules in a report.
    observer : Observer, optional
        Is told of every operation, for reports.

    Raises
    ------
    ValueError
        A composite with rules for chosen modules without a model; dropout or batch norm in training mode.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.lrp.composite import as_composite
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> mode = RelevanceMode(as_composite("attnlrp"), switchable=True)
    >>> with mode:
    ...     y = torch.tanh(x)
    >>> with mode.state.relevance_pass():
    ...     (g,) = torch.autograd.grad(y, x, retain_graph=True)
    >>> bool((x * g).isclose(y)), torch.autograd.grad(y, x)[0].isclose(1 - y**2).item()
    (True, True)
    """

    def __init__(
        self,
        composite: Composite,
        *,
        switchable: bool = False,
        model: nn.Module | None = None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        if composite.layers and model is None:
            raise ValueError(f"model: expected the model whose modules the layers of {composite.name!r} name, got None")
        self.state = functions.PassState()
        self.state.relevance = not switchable
        self.composite = composite
        self.switchable = switchable
        self.observer = observer
        # Nodes of native operations that a handler has prepared, for the check of completeness.
        self.verified: set[Any] = set()
        # Tensors that the model was given and that are to be attributed.
        self.inputs: list[Tensor] = []
        # Relevance of rules that give it directly: (tensor, its relevance).
        self.direct: list[tuple[Tensor, Tensor]] = []
        # Token ids, and the leaves that stand for their embeddings.
        self.embedded: list[tuple[Tensor, list[Tensor]]] = []
        # Names of the operations that need a rule's preparation, for the same check.
        self.ruled = frozenset[str]().union(*(graph.CONTRACTIONS[kind] for kind in composite.ruled_kinds()))
        self._notes: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}
        self._model = model
        self._module_rules = composite.rules_of_modules(model) if composite.layers and model is not None else {}
        self._stack: list[int] = []
        self._hooks: list[Any] = []
        self._depth = 0
        self._table = build_table(composite, observer)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Arguments = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # This runs for every function of the forward pass: one look-up, and the call.
        handler = self._table.get(func)
        if handler is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return handler(self, func, args, kwargs or {})

    def __enter__(self) -> RelevanceMode:
        if self._depth == 0 and self._module_rules:
            assert self._model is not None
            for module in self._model.modules():
                if id(module) in self._module_rules:
                    self._hooks.append(module.register_forward_pre_hook(self._enter_module))
                    # Before the hooks of an observer: it is to see the output that goes on.
                    self._hooks.append(module.register_forward_hook(self._leave_module, prepend=True, always_call=True))
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            while self._hooks:
                self._hooks.pop().remove()
            self._stack.clear()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._stack.append(id(module))

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._stack:
            self._stack.pop()
        if Identity() in self._module_rules[id(module)] and args and isinstance(output, Tensor) and self.carries(args[0]):
            if self.observer is not None:
                return self.observer.watch_module(lambda x: identity_of_module(self, module, x, output), args[0])
            return identity_of_module(self, module, args[0], output)
        return None

    def rule(self, kind: Kind, x: Tensor | None = None) -> Rule:
        """The rule for an operation of this kind that runs now and reads x."""
        for module in reversed(self._stack):
            for rule in self._module_rules[module]:
                if kind in rule.kinds:
                    return rule
        first = self.composite.first
        if first is not None and x is not None and self.reads_input(x):
            return first
        chosen: Rule = getattr(self.composite, kind)
        return chosen

    def reads_input(self, x: Tensor) -> bool:
        return any(x is given or graph.is_rearranged(x, given) for given in self.inputs)

    def carries(self, x: Any) -> bool:
        """Whether relevance goes through x."""
        if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
            return False
        return not (self.switchable and graph.is_constant(x))

    def stop(self, x: Tensor) -> Tensor:
        """x as a constant."""
        return functions.scale(x, 0.0, self.state) if self.switchable else x.detach()

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self.stop(x) if factor == 0 else functions.scale(x, factor, self.state)

    def native(self, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        """The call as it is, its nodes noted as known."""
        if self.switchable:
            return func(*args, **kwargs)
        ends = [t.grad_fn for t in tensors_of((*args, *kwargs.values()))]
        out = func(*args, **kwargs)
        self.verified |= graph.nodes_between(out, ends)
        return out

    def value(self, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        """The call for its value; with its graph only if true gradients may be asked for."""
        if self.switchable:
            return func(*args, **kwargs)
        with torch.no_grad():
            return func(*args, **kwargs)

    def note(self, tensor: Tensor, note: Any) -> None:
        key, notes = id(tensor), self._notes
        notes[key] = (weakref.ref(tensor, lambda _: notes.pop(key, None)), tensor._version, note)

    def note_on(self, tensor: Tensor) -> Any:
        """The note on this tensor, unless it was overwritten since."""
        entry = self._notes.get(id(tensor))
        if entry is None or entry[0]() is not tensor or entry[1] != tensor._version:
            return None
        return entry[2]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
