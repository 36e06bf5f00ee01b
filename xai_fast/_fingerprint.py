"""Short hashes of data and functions: are they the same as the last time, or on the other processes?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["fingerprint", "function_name", "pieces"]

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
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    if code is None:
        return str(name)
    constants = [c for c in code.co_consts if not hasattr(c, "co_code")]
    return f"{name} {hashlib.blake2b(repr((code.co_code, code.co_names, constants)).encode(), digest_size=8).hexdigest()}"
