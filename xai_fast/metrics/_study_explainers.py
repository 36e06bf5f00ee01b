"""The explainers of a study: one way to call them all, repeatable for a seed, and a description that tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from inspect import Parameter, signature
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._copies import unshared
from .._fingerprint import fingerprint, function_name
from .._seeding import seeded
from ..integrations.captum import captum_explainer
from ..ops import _checks as check
from .explainers import Explainer

__all__ = ["Explain", "Seeded", "caller", "describe"]

Call = Callable[..., Any]
EXTRA = "additional_forward_args"
# How deep the parts of an explainer are looked into.
DEPTH = 3


@dataclass(frozen=True)
class Seeded:
    """An explainer that is made anew for every seed of a study: one that is trained, or optimised, from a random start.

    Attributes
    ----------
    factory : callable
        ``factory(seed) -> explainer``, of any kind that :func:`run_study` takes; the random generators of torch, numpy and
        Python are seeded while it runs.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> from xai_fast.metrics.study import Seeded, run_study
    >>> def train(seed):
    ...     weight = torch.randn(3)
    ...     return lambda inputs: inputs * weight
    >>> x = torch.eye(3)
    >>> study = run_study({"trained": Seeded(train)}, lambda x: x, x, seeds=(0, 1), measures=["stability"])
    >>> bool(study.per_sample("trained", "stability_variance").sum() > 0)
    True
    """

    factory: Callable[[int], Any]

    def __post_init__(self) -> None:
        if not callable(self.factory):
            raise TypeError(f"factory: expected a callable, got {type(self.factory).__name__}")


def caller(explainer: Any, name: str) -> Call:
    """``call(inputs, target, **more)`` for an explainer: how it takes the target is decided here, once."""
    if isinstance(explainer, Explainer):
        own: Explainer = explainer
        # A class of its own stays; the study's are known to be classes of the model, which need not run for them again.
        return lambda x, target: own(x) if target is None or own.target is not None else own.maps(x, target)
    if callable(getattr(explainer, "attribute", None)):
        return captum_explainer(explainer)
    if not callable(explainer):
        got = type(explainer).__name__
        raise TypeError(f"{name}: expected a callable explain(inputs, target) or an object with attribute, got {got}")
    style = _style(explainer)
    if style == "inputs":
        return lambda x, target, **more: explainer(x, **more)
    if style == "positional":
        return lambda x, target, **more: explainer(x, target, **more)
    return lambda x, target, **more: explainer(x, **{style: target}, **more)


def _parameters(explainer: Any) -> list[Parameter]:
    if isinstance(explainer, nn.Module):
        explainer = explainer.forward  # a module's own call takes anything
    try:
        return list(signature(explainer).parameters.values())
    except (TypeError, ValueError):  # some builtins tell nothing of their arguments
        return []


def _style(explainer: Any) -> str:
    """ "inputs", "positional", or the name by which the target is handed over.

    A second argument that has a default and another name is an option of the explainer, not the target.
    """
    given = _parameters(explainer)
    for name in ("target", "targets"):
        if any(p.name == name and p.kind is not Parameter.POSITIONAL_ONLY for p in given[1:]):
            return name
    places = [p for p in given if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    if len(places) > 1 and places[1].default is Parameter.empty:
        return "positional"
    if any(p.kind is Parameter.VAR_POSITIONAL for p in given):
        return "positional"
    return "target" if any(p.kind is Parameter.VAR_KEYWORD for p in given) else "inputs"


def _takes_extra(explainer: Any) -> bool:
    """Whether it asks by name for what the model takes besides the inputs."""
    function = getattr(explainer, "attribute", explainer)
    return any(p.name == EXTRA for p in _parameters(function))


class Explain:
    """An explainer with a seed: ``explain(x, target=None)`` gives checked maps without a graph, and counts examples.

    Every call begins with the same seed, so that a call can be repeated whatever ran before it; but for those within
    :meth:`one_stream`, where perturbed samples must not get the noise that the samples themselves got.
    """

    def __init__(self, explainer: Any, method: str, seed: int, extra: tuple[Any, ...], batch: int) -> None:
        self._method, self._seed, self._extra, self._batch = method, seed, extra, batch
        if isinstance(explainer, Seeded):
            with seeded(seed):
                explainer = explainer.factory(seed)
        self._call = caller(explainer, f"explainers[{method!r}]")
        self._takes_extra = bool(extra) and _takes_extra(explainer)
        self.explained = 0
        self._streaming = False

    @contextmanager
    def one_stream(self) -> Iterator[None]:
        """Seed once, for all calls inside."""
        with seeded(self._seed):
            self._streaming = True
            try:
                yield
            finally:
                self._streaming = False

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Maps of examples that need not be samples of the data."""
        if self._takes_extra and any(self._of_samples(a) for a in self._extra):
            raise ValueError(f"{EXTRA}: expected none that belong to samples for an explanation of changed inputs")
        return self._maps(x, target, self._extra)

    def of_samples(self, x: Tensor, target: Tensor | None, part: slice) -> Tensor:
        """Maps of those samples of the data."""
        return self._maps(x, target, tuple(a[part] if self._of_samples(a) else a for a in self._extra))

    def _of_samples(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self._batch

    def _maps(self, x: Tensor, target: Tensor | None, extra: tuple[Any, ...]) -> Tensor:
        more = unshared({EXTRA: extra}) if self._takes_extra else {}
        with nullcontext() if self._streaming else seeded(self._seed), torch.enable_grad():
            # Copies: an explainer that works in place does not reach the data.
            maps = self._call(unshared(x.detach()), unshared(target), **more)
        self.explained += len(x)
        name = f"explainers[{self._method!r}]"
        if isinstance(maps, (tuple, list)) and len(maps) == 1:
            maps = maps[0]
        check.check_float_tensor(maps, f"{name}: maps")
        if maps.dim() < 2 or maps.shape[0] != len(x):
            raise ValueError(f"{name}: expected maps of shape ({len(x)}, ...), got {check.shape_of(maps)}")
        return maps.detach().to(x.device)


def describe(value: Any, depth: int = DEPTH) -> Any:
    """What tells an explainer or an option from another, as JSON: code, plain values, hashes of tensors.

    Lists and dictionaries count by their type alone, as they may change while it works; modules as well: that a model is
    another one shows in its outputs.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Tensor):
        return fingerprint([value])
    if isinstance(value, np.ndarray):
        return fingerprint([(str(value.dtype), value.shape, value.tobytes())])
    if depth == 0 or isinstance(value, (nn.Module, list, dict)):
        return type(value).__qualname__
    inner = partial(describe, depth=depth - 1)
    if isinstance(value, tuple):
        return [inner(v) for v in value]
    if isinstance(value, partial):
        return ["partial", inner(value.func), inner(value.args), [[k, inner(v)] for k, v in sorted(value.keywords.items())]]
    if isinstance(value, MethodType):
        return [function_name(value.__func__), inner(value.__self__)]
    if isinstance(value, FunctionType):
        cells = [inner(c.cell_contents) for c in value.__closure__ or () if _filled(c)]
        return [function_name(value), inner(value.__defaults__ or ()), cells]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return [name, [[k, inner(v)] for k, v in _members(value).items()]]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _members(value: Any) -> Mapping[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return dict(sorted(getattr(value, "__dict__", {}).items()))
