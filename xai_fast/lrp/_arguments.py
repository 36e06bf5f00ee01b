"""Arguments of the functions that the mode sees, by position or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._mode import RelevanceMode

__all__ = ["Arguments", "Handler", "Keywords", "argument", "with_arguments"]

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
Handler = Callable[["RelevanceMode", Callable[..., Any], Arguments, Keywords], Any]


def argument(args: Arguments, kwargs: Keywords, position: int, *names: str, default: Any = None) -> Any:
    """An argument that may have been given by position or under one of several names."""
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


def with_arguments(
    args: Arguments, kwargs: Keywords, changes: Mapping[int, tuple[str, Any]]
) -> tuple[Arguments, dict[str, Any]]:
    """The arguments with some of them replaced, {position: (name, value)}, wherever they were given."""
    positional, keywords = list(args), dict(kwargs)
    for position, (name, value) in changes.items():
        if position < len(positional):
            positional[position] = value
        else:
            keywords[name] = value
    return tuple(positional), keywords
