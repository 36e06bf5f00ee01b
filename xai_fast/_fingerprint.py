"""Short hashes of data and functions: are they the same as the last time, or on the other processes?"""

from __future__ import annotations

import dis
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import IOBase
from logging import Logger
from pathlib import PurePath
from threading import Lock
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    CoroutineType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

__all__ = ["callable_name", "fingerprint", "function_name", "pieces"]

# What is held of data on another device, or in a file, at a time.
PIECE_BYTES = 1 << 26


def fingerprint(batches: Iterable[Any]) -> str:
    """A hash of rows that come in batches: tensors, or any nesting of them; how they are cut does not matter."""
    digests: dict[int, Any] = {}
    for batch in batches:
        for number, leaf in enumerate(tree_flatten(batch)[0]):
            if number not in digests:
                digests[number] = hashlib.blake2b(_describe(leaf), digest_size=16)
            if isinstance(leaf, Tensor) and leaf.numel():
                digests[number].update(_bytes(leaf))
    whole = hashlib.blake2b(digest_size=16)
    for number in sorted(digests):
        whole.update(digests[number].digest())
    return whole.hexdigest()


def pieces(x: Tensor) -> Iterator[Tensor]:
    """x in pieces along its first dimension."""
    yield from x.split(max(1, PIECE_BYTES * len(x) // max(1, x.nbytes)))


def _describe(leaf: Any) -> bytes:
    return f"{leaf.dtype} {tuple(leaf.shape[1:])}".encode() if isinstance(leaf, Tensor) else repr(leaf).encode()


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def function_name(function: Any) -> str:
    """The name of a function with a hash of its code; a string stands for itself. Values that it encloses do not count."""
    if isinstance(function, str):
        return function
    code = getattr(function, "__code__", None)
    return _name(function) if code is None else f"{_name(function)} {_hash(_code(code))}"


def callable_name(function: Any) -> str:
    """The name of a callable with a hash of all that it computes with; a string stands for itself.

    Of functions: code, constants, defaults, attributes, enclosed values, and the globals of its module that it reads; of
    partials, bound methods and callable objects: what they hold; of modules of torch: class, repr, options, parameters and
    buffers. Tensors and arrays count by their content, containers and objects by that of their parts. What has no content
    that stays the same (open files, generators, locks, loggers), and objects among the globals, count by their type alone;
    modules, classes and functions of other modules by their names. A callable that changes what it holds, as one that counts
    its calls does, is another one after each call.
    """
    return function if isinstance(function, str) else f"{_name(function)} {_hash(_Describer().of(function))}"


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _hash(description: Any) -> str:
    return hashlib.blake2b(repr(description).encode(), digest_size=8).hexdigest()


def _code(code: CodeType) -> tuple[Any, ...]:
    return code.co_code, code.co_names, [_constant(constant) for constant in code.co_consts]


def _constant(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        return _code(constant)
    # The order of a set of strings is another in every process.
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant


def _global_names(code: CodeType) -> set[str]:
    """What a function and those defined in it read from their module."""
    names = {found.argval for found in dis.get_instructions(code) if found.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


PLAIN = (
    type(None), bool, int, float, complex, str, bytes, type(...), range, slice, PurePath, np.dtype, np.generic, torch.dtype,
    torch.device, torch.Size,
)  # fmt: skip
BY_TYPE = (IOBase, Logger, Iterator, CoroutineType, type(Lock()), np.random.Generator, torch.Generator)
DATA = (*PLAIN, Tensor, np.ndarray, list, tuple, set, frozenset, dict, partial, nn.Module)
GETTERS = (operator.itemgetter, operator.attrgetter, operator.methodcaller)
# Parts within parts that are looked at.
DEPTH = 50


class _Describer:
    """Nested tuples of plain values that are the same in every process, for values of any kind."""

    def __init__(self) -> None:
        # The values around this one, which may be parts of their parts; and functions and modules, which share parts.
        self._met: dict[int, int] = {}
        self._count = self._depth = 0

    def of(self, value: Any) -> Any:
        if isinstance(value, PLAIN):
            return type(value).__qualname__, repr(value)
        if isinstance(value, BY_TYPE) or self._depth == DEPTH:
            return _type_name(value)
        if id(value) in self._met:
            return "met", self._met[id(value)]
        self._met[id(value)] = self._count
        self._count, self._depth = self._count + 1, self._depth + 1
        found = _type_name(value), self._parts(value)
        self._depth -= 1
        if not isinstance(value, (FunctionType, nn.Module)):
            del self._met[id(value)]
        return found

    def _parts(self, value: Any) -> Any:
        for kinds, describe in self._KINDS:
            if isinstance(value, kinds):
                return describe(self, value)
        return self._object(value)

    def _tensor(self, value: Tensor) -> Any:
        if value.layout != torch.strided or value.is_meta:
            return str(value.layout)
        return tuple(value.shape), fingerprint(pieces(value) if value.dim() else [value])

    def _array(self, value: np.ndarray[Any, Any]) -> Any:
        if value.dtype.hasobject:
            return value.shape, [self.of(item) for item in value.flatten().tolist()]
        return str(value.dtype), value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()

    def _sequence(self, value: Any) -> Any:
        return [self.of(item) for item in value]

    def _set(self, value: Any) -> Any:
        return sorted(repr(self.of(item)) for item in value)

    def _mapping(self, value: Any) -> Any:
        return sorted(((repr(self.of(key)), self.of(item)) for key, item in value.items()), key=operator.itemgetter(0))

    def _function(self, value: FunctionType) -> Any:
        compiled_from = getattr(value, "_torchdynamo_orig_callable", None)
        if compiled_from is not None:
            return self.of(compiled_from)
        cells = [self.of(cell.cell_contents) if _is_filled(cell) else None for cell in value.__closure__ or ()]
        held = self.of((value.__defaults__, value.__kwdefaults__)), self._mapping(vars(value)), cells
        return _code(value.__code__), held, self._globals(value)

    def _globals(self, function: FunctionType) -> Any:
        known = function.__globals__
        names = sorted(name for name in _global_names(function.__code__) if name in known)
        return [(name, self._global(known[name], function.__module__)) for name in names]

    def _global(self, value: Any, module: str) -> Any:
        if isinstance(value, FunctionType) and value.__module__ == module:
            return self.of(value)
        if isinstance(value, (ModuleType, type, FunctionType)):
            return value.__name__
        return self.of(value) if isinstance(value, DATA) else _type_name(value)

    def _method(self, value: Any) -> Any:
        return self.of(getattr(value, "__func__", value.__name__)), self.of(value.__self__)

    def _partial(self, value: partial[Any]) -> Any:
        return self.of(value.func), self._sequence(value.args), self._mapping(value.keywords)

    def _getter(self, value: Any) -> Any:
        return self._sequence(value.__reduce__()[1])

    def _module(self, value: nn.Module) -> Any:
        state = [(name, self.of(x)) for name, x in (*value.named_parameters(), *value.named_buffers())]
        return repr(value), state, [self._options(module) for module in value.modules()]

    def _options(self, module: nn.Module) -> Any:
        """What a module keeps beside parameters, buffers and modules, and what it does with them."""
        plain = {key: v for key, v in vars(module).items() if key[0] != "_" and key != "training" and isinstance(v, PLAIN)}
        return _type_name(module), self._mapping(plain), self._code_of(type(module), "forward")

    def _named(self, value: Any) -> Any:
        return value.__name__

    def _object(self, value: Any) -> Any:
        slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
        held = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}
        return self._mapping(held), self._code_of(type(value), "__call__")

    def _code_of(self, kind: type, name: str) -> Any:
        method = getattr(kind, name, None)
        return self.of(method) if isinstance(method, FunctionType) else None

    _KINDS: tuple[tuple[Any, Callable[[Any, Any], Any]], ...] = (
        (Tensor, _tensor),
        (np.ndarray, _array),
        ((list, tuple), _sequence),
        ((set, frozenset), _set),
        (dict, _mapping),
        (FunctionType, _function),
        ((MethodType, BuiltinFunctionType, MethodWrapperType), _method),
        (partial, _partial),
        (GETTERS, _getter),
        (nn.Module, _module),
        ((ModuleType, type), _named),
    )


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _slots(kind: type) -> list[str]:
    found = kind.__dict__.get("__slots__", ())
    return [name for name in ([found] if isinstance(found, str) else found) if name not in ("__dict__", "__weakref__")]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
