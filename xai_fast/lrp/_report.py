"""What a relevance pass can tell besides the result: relevance of layers and heads, and where relevance was kept back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import _spellings as spell
from ._arguments import Arguments, Handler, Keywords, argument
from ._linear import LINEAR, convolution, expected_losses
from ._products import attention_weights
from .rules import Attention, Gradient, Identity, Norm, Rule

if TYPE_CHECKING:
    from ._mode import RelevanceMode
    from ._ruled import RuledLinear

__all__ = ["Attribution", "Observer", "Operation", "hookable_modules"]

# Reason of a loss -> how much
Losses = dict[str, float]


@dataclass
class Operation:
    """One operation of the forward pass: the relevance that came to its output and what it passed on, summed over the batch.

    `expected` says how much is lost by the rule and why, {reason: amount}; None where there is no closed form.
    """

    kind: str
    module: str
    relevance_out: float = 0.0
    relevance_in: float = 0.0
    expected: Losses | None = None

    @property
    def loss(self) -> float:
        return self.relevance_out - self.relevance_in

    def __str__(self) -> str:
        if self.expected is None:
            why = "-"
        else:
            why = ", ".join(f"{reason} {amount:+.3e}" for reason, amount in self.expected.items()) or "0"
        return (
            f"{self.kind:<12} {self.relevance_out:+.4e} {self.relevance_in:+.4e} {self.loss:+.3e}  {why:<28} {self.module}"
        )


@dataclass
class Attribution:
    """What ``attribute(..., details=True)`` returns.

    Attributes
    ----------
    relevance : Tensor, tuple or dict
        As without details.
    output, score : Tensor
        The output of the model (logits) and the explained scores (B,).
    layers : dict
        Module name -> relevance of its output, in the shape of its output; summed over calls of equal shape.
    heads : dict
        Module name -> (B,H,N), relevance of the attention output per head and token, of the module's last call. A product
        of attention weights and values with three dimensions, (B*H,N,d), is taken apart into samples and heads.
    conservation : list of Operation
        In the order of execution. Expected losses: ``sum R eps / (|y| + eps) + sum_o b_o S_o`` with ``S = R / stab(y)`` for
        the epsilon rule (eps = 0: the gradient), ``sum b g`` for norms, ``sum c g`` for the addition of a constant c, and
        for softmax what the Taylor rule leaves at its expansion point.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> model = torch.nn.Linear(2, 1).eval()
    >>> found = xf.lrp.attribute(model, torch.ones(1, 2), details=True)
    >>> [step.kind for step in found.conservation], list(found.layers)
    (['linear'], [''])
    >>> abs(found.conservation[0].loss - found.conservation[0].expected["bias"]) < 1e-6
    True
    """

    relevance: Any
    output: Tensor
    score: Tensor
    layers: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    conservation: list[Operation] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{'operation':<12} {'out':<11} {'in':<11} {'loss':<10}  {'expected':<28} module"
        lines = [head, *map(str, self.conservation)]
        total = sum(part.sum().item() for part in _parts(self.relevance))
        return "\n".join([*lines, f"score {self.score.sum().item():+.4e}, relevance of the inputs {total:+.4e}"])


def _parts(relevance: Any) -> Iterator[Tensor]:
    if isinstance(relevance, Tensor):
        yield relevance
    elif relevance is not None:
        for part in relevance.values() if isinstance(relevance, dict) else relevance:
            yield from _parts(part)


class _Probe(Function):
    """x, counting the relevance that one operation passes to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, record: Operation) -> Tensor:
        # Kept as attributes: what is saved for backward would have to be saved again under gradient checkpointing.
        ctx.x, ctx.record = x.detach().clone(), record
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.record.relevance_in += _relevance(ctx.x, g).sum().item()
        return g, None


def _relevance(x: Tensor, g: Tensor) -> Tensor:
    """x g in double precision; masked scores are infinite and have none."""
    return torch.where(g == 0, 0.0, x.double() * g.double())


def hookable_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The named modules that Python runs: those of a script take no hooks."""
    return [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.RecursiveScriptModule)]


class Observer:
    """Watches the operations and modules of one forward and backward pass; active inside ``with``."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self._model = model
        self._batch = batch
        # Names of the running modules, and how many operations there were before each.
        self._stack: list[str] = []
        self._starts: list[int] = []
        self._hooks: list[Any] = []
        self._records: list[Operation] = []
        self._layers: dict[str, Tensor] = {}
        self._heads: dict[str, Tensor] = {}

    def __enter__(self) -> Observer:
        for name, module in hookable_modules(self._model):
            self._hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: self._enter(name)))
            self._hooks.append(
                module.register_forward_hook(lambda _, __, out, name=name: self._leave(name, out), always_call=True)
            )
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def report(self, relevance: Any, output: Tensor, score: Tensor) -> Attribution:
        return Attribution(relevance, output, score, self._layers, self._heads, self._records)

    def _enter(self, name: str) -> None:
        self._stack.append(name)
        self._starts.append(len(self._records))

    def _leave(self, name: str, output: Any) -> None:
        if self._stack:
            self._stack.pop()
            self._starts.pop()
        first = output
        if not isinstance(output, Tensor):
            values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else []
            first = next((value for value in values if isinstance(value, Tensor)), None)
        if isinstance(first, Tensor) and first.requires_grad and not _is_running_again():
            _on_gradient(first, lambda y, g: self._keep_layer(name, y * g))

    def _keep_layer(self, name: str, relevance: Tensor) -> None:
        before = self._layers.get(name)
        is_sum = before is not None and before.shape == relevance.shape
        self._layers[name] = before + relevance if is_sum and before is not None else relevance

    def watch_module(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """run(x), one operation in the place of all that the running module is made of."""
        if _is_running_again():
            return run(x)
        del self._records[self._starts[-1] :]
        record = Operation("activation", self._stack[-1])
        self._records.append(record)
        out = run(_Probe.apply(x, record))
        _on_gradient(out, lambda y, g: self._finish(record, lambda g, y: {}, False, y, g))
        return out

    def watching(self, handler: Handler, kind: str) -> Handler:
        """The handler, with a record of every call that relevance goes through."""

        def watched(mode: RelevanceMode, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
            carrying = any(mode.carries(x) for x in _flat((args, kwargs)))
            # What is written to cannot be looked at through a view.
            if not carrying or func in spell.IN_PLACE or _is_running_again():
                return handler(mode, func, args, kwargs)
            record = Operation(kind, self._stack[-1] if self._stack else "")
            expected = _expectation(mode, kind, func, args, kwargs)
            is_attention = kind == "attention" or (kind == "product" and _has_attention_weights(mode, func, (args, kwargs)))
            out = handler(mode, func, *_probed(mode, record, args, kwargs))
            if kind == "product" and mode.note_on(out) is not None:
                expected = _expected_of_ruled(mode.note_on(out))
            if isinstance(out, Tensor) and out.requires_grad:
                self._records.append(record)
                _on_gradient(out, lambda y, g: self._finish(record, expected, is_attention, y, g))
            return out

        return watched

    def _finish(self, record: Operation, expected: Expectation, is_attention: bool, y: Tensor, g: Tensor) -> None:
        relevance = _relevance(y, g)
        record.relevance_out += relevance.sum().item()
        record.expected = expected(g, y)
        if is_attention and y.ndim == 3 and y.shape[0] % self._batch == 0:
            relevance = relevance.unflatten(0, (self._batch, -1))
        if is_attention and relevance.ndim == 4:
            self._heads[record.module] = relevance.sum(-1).to(y.dtype)


Expectation = Callable[[Tensor, Tensor], Losses | None]


def _is_running_again() -> bool:
    """Gradient checkpointing runs the forward pass again during backward."""
    return bool(torch._C._current_graph_task_id() != -1)


def _on_gradient(y: Tensor, use: Callable[[Tensor, Tensor], None]) -> None:
    value = y.detach().clone()
    y.register_hook(lambda g: use(value, g.detach()))


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from _flat(value)
    elif isinstance(values, dict):
        yield from _flat(list(values.values()))
    else:
        yield values


def _probed(mode: RelevanceMode, record: Operation, args: Arguments, kwargs: Keywords) -> tuple[Any, Any]:
    def look(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(look, value)) if type(value) in (tuple, list) else value
        if not mode.carries(value):
            return value
        probed = _Probe.apply(value, record)
        mode.note(probed, mode.note_on(value))
        return probed

    return tuple(map(look, args)), {name: look(value) for name, value in kwargs.items()}


def _expectation(mode: RelevanceMode, kind: str, func: Any, args: Arguments, kwargs: Keywords) -> Expectation:
    """(g, y) -> what the rule of this call keeps back."""

    def get(position: int, *names: str, default: Any = None) -> Any:
        return argument(args, kwargs, position, *names, default=default)

    if kind == "linear" and func is not torch.nn.functional.linear:
        rule, bias = mode.rule("linear", get(1, "mat1")), get(0, "input")
        return lambda g, y: expected_losses(rule, LINEAR, g, bias, y)
    if kind == "linear":
        rule, bias = mode.rule("linear", get(0, "input")), get(2, "bias")
        return lambda g, y: expected_losses(rule, LINEAR, g, bias, y)
    if kind == "convolution":
        x, weight, bias = get(0, "input"), get(1, "weight"), get(2, "bias")
        named = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
        operation, rule = convolution(func, x, weight, args[3:], named), mode.rule("convolution", x)
        return lambda g, y: expected_losses(rule, operation, g, bias, y)
    if kind == "addition":
        return _expected_of_addition(mode, func, args, kwargs)
    if kind == "product":
        return _expected_of_product(mode, args, kwargs)
    if kind == "softmax":
        x, dim = get(0, "input"), get(1, "dim")
        value = x.detach().clone()
        return lambda g, y: {"softmax": _kept_by_softmax(value, y, g, dim)}
    if kind == "norm":
        rule, bias = mode.rule("norm"), get(3, "bias") if func is not torch.nn.functional.rms_norm else None
        is_channel = func in (torch.nn.functional.group_norm, torch.group_norm)
        return lambda g, y: _kept_by_norm(rule, bias, is_channel, g)
    if kind == "attention":
        rule = mode.rule("attention")
        return lambda g, y: {} if rule == Attention(0.0, 0.0) else None
    if kind == "activation" and isinstance(mode.rule("activation"), Identity):
        return lambda g, y: {}
    return lambda g, y: None


def _expected_of_addition(mode: RelevanceMode, func: Any, args: Arguments, kwargs: Keywords) -> Expectation:
    """A constant operand keeps its share."""
    operands = list(_flat((args, {k: v for k, v in kwargs.items() if k != "alpha"})))[:2]
    if all(map(mode.carries, operands)):
        return lambda g, y: {}
    carrier = next(x for x in operands if mode.carries(x)).detach().clone()
    sign = -1 if "sub" in func.__name__ and (mode.carries(operands[1]) != (func is Tensor.__rsub__)) else 1
    return lambda g, y: {"constant": ((y.double() - sign * carrier.double()) * g.double()).sum().item()}


def _has_attention_weights(mode: RelevanceMode, func: Any, values: Any) -> bool:
    """Whether this is a product of attention weights and values, not their multiplication by a constant."""
    carrying, is_matrix = [x for x in _flat(values) if mode.carries(x)], func not in spell.MULTIPLICATION
    return (is_matrix or len(carrying) > 1) and attention_weights(carrying, is_matrix) is not None


def _expected_of_product(mode: RelevanceMode, args: Arguments, kwargs: Keywords) -> Expectation:
    """Of two activations, or of one and a constant that leaves it its gradient."""
    is_shared = sum(map(mode.carries, _flat((args, kwargs)))) < 2 or not isinstance(mode.rule("attention"), Gradient)
    return lambda g, y: {} if is_shared else None


def _expected_of_ruled(call: RuledLinear) -> Expectation:
    """Of an activation and a weight."""
    rule, operation = call.rule, call.operation
    return lambda g, y: expected_losses(rule, operation, g, None, y)


def _kept_by_softmax(x: Tensor, y: Tensor, g: Tensor, dim: int) -> float:
    y, g = y.double(), g.double()
    passed = y * (g - (y * g).sum(dim, keepdim=True))
    return ((y * g).sum() - torch.where(y == 0, 0.0, x.double() * passed).sum()).item()


def _kept_by_norm(rule: Rule, bias: Tensor | None, is_channel: bool, g: Tensor) -> Losses | None:
    if isinstance(rule, Identity):
        return {}
    if not isinstance(rule, Norm) or rule.detach_mean:
        return None
    if bias is None:
        return {}
    if is_channel:
        bias = bias.view(-1, *[1] * (g.ndim - 2))
    return {"bias": (bias.double() * g.double()).sum().item()}
