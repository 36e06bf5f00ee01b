"""Which rule goes to which operation of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .rules import Attention, Epsilon, Gamma, Gradient, Identity, Kind, Norm, Rule, ZPlus, is_gradient

__all__ = ["COMPOSITES", "Composite", "as_composite"]

# LRP of the operations around the linear ones, as in AttnLRP.
_GRADIENT, _ATTENTION, _NORM, _IDENTITY = Gradient(), Attention(), Norm(), Identity()

LayerKey = type[nn.Module] | str

_LINEAR_KINDS: tuple[Kind, ...] = ("linear", "convolution")


@dataclass(frozen=True)
class Composite:
    """A rule for each kind of operation, and exceptions for chosen modules.

    Parameters
    ----------
    name : str
        For messages and tables.
    linear, convolution : Rule
        For F.linear and sums of products with a weight in any spelling of torch (matmul, bmm, einsum, tensordot ...); for
        convolutions. A weight is a parameter, a view of one, or a constant matrix without batch dimensions. Other
        constants are activations, whose product has its own gradient, like multiplication by a constant.
    attention, norm, activation : Rule
        For attention, fused or written out, and with it for every product of two tensors that depend on the input (halves,
        or their own gradients with ``Gradient()``); for layer, RMS and group norm and denominators; for functions of one
        element. Attention weights, the output of a softmax, stay attention weights when their entries are changed one by
        one, selected, rearranged, joined or averaged, and in a matrix product when a weight has mixed them; after anything
        else they are like other tensors.
    first : Rule, optional
        For linear operations that read the attributed input itself; otherwise they have the rule of their kind.
    layers : mapping
        Module type, or pattern of dotted module names (as in fnmatch), to the rule for what runs inside these modules.
        The innermost module counts; within one module the first match that fits the kind of operation.

    Raises
    ------
    TypeError, ValueError
        A rule of the wrong type or for another kind of operation.

    Examples
    --------
    >>> import torch
    >>> Composite("mine", linear=Epsilon(1e-3), layers={"head": ZPlus(), torch.nn.Conv2d: Gamma(0.1)}).linear
    Epsilon(eps=0.001)
    """

    name: str
    linear: Rule = _GRADIENT
    convolution: Rule = _GRADIENT
    attention: Rule = _ATTENTION
    norm: Rule = _NORM
    activation: Rule = _IDENTITY
    first: Rule | None = None
    layers: Mapping[LayerKey, Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in ("linear", "convolution", "attention", "norm", "activation"):
            _check_rule(getattr(self, kind), kind, {kind})
        if self.first is not None:
            _check_rule(self.first, "first", {"linear", "convolution"})
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers: expected a mapping of modules to rules, got {type(self.layers).__name__}")
        for key, rule in self.layers.items():
            if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
                raise TypeError(f"layers: expected module types or names as keys, got {key!r}")
            _check_rule(rule, f"layers[{key!r}]", None)

    def ruled_kinds(self) -> frozenset[Kind]:
        """The kinds of linear operation that have, somewhere, a rule that is not their gradient."""
        rules: list[tuple[Kind, Rule | None]] = [("linear", self.linear), ("convolution", self.convolution)]
        rules += [(kind, rule) for kind in _LINEAR_KINDS for rule in (self.first, *self.layers.values())]
        return frozenset(kind for kind, rule in rules if rule is not None and kind in rule.kinds and not is_gradient(rule))

    def rules_of_modules(self, model: nn.Module) -> dict[int, tuple[Rule, ...]]:
        """id of a module -> the rules of `layers` that match it, in their order."""
        found: dict[int, tuple[Rule, ...]] = {}
        for name, module in model.named_modules():
            rules = tuple(rule for key, rule in self.layers.items() if _matches(key, name, module))
            if rules:
                found[id(module)] = rules
        return found


def _matches(key: LayerKey, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, key) if isinstance(key, str) else isinstance(module, key)


def _check_rule(rule: Any, name: str, kinds: set[str] | None) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(f"{name}: expected a rule of xai_fast.lrp, got {type(rule).__name__}")
    if kinds is not None and not kinds & rule.kinds:
        raise ValueError(f"{name}: expected a rule for {' or '.join(sorted(kinds))} operations, got {rule}")


COMPOSITES: dict[str, Composite] = {
    composite.name: composite
    for composite in (
        Composite("attnlrp"),
        Composite("cp-lrp", attention=Attention(lam=0.0)),
        Composite("epsilon", linear=Epsilon(), convolution=Epsilon()),
        Composite("zplus", linear=ZPlus(), convolution=ZPlus()),
        Composite("gamma", linear=Gamma(), convolution=Gamma()),
    )
}


def as_composite(rule: Any) -> Composite:
    """A composite from its name, from itself, or from one rule for all linear operations."""
    if isinstance(rule, Composite):
        return rule
    if isinstance(rule, Rule):
        _check_rule(rule, "rule", {"linear"})
        return Composite(type(rule).__name__.lower(), linear=rule, convolution=rule)
    if isinstance(rule, str):
        if rule not in COMPOSITES:
            raise ValueError(f"rule: expected one of {', '.join(COMPOSITES)} or a Composite, got {rule!r}")
        return COMPOSITES[rule]
    raise TypeError(f"rule: expected a name, a Composite or a rule, got {type(rule).__name__}")
