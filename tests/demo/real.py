"""What tests of whole pages share: real weights and data or a skip, and what a page was built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xai_fast.demo.wheels import WeightsUnavailable

__all__ = ["built_with", "needs"]


def needs(*loads: Callable[[], Any]) -> Any:
    """What the last one loads; a skip where one of them cannot be had."""
    found = None
    for load in loads:
        try:
            found = load()
        except WeightsUnavailable as reason:
            pytest.skip(str(reason))
    return found


def built_with(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """The positional arguments of every call of a module's function, which still runs."""
    calls: list[tuple[Any, ...]] = []
    build = getattr(module, name)

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return build(*arguments, **options)

    monkeypatch.setattr(module, name, spy)
    return calls
