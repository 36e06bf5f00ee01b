"""Missing optional packages are named together with the extra that brings them."""

from __future__ import annotations

import json.decoder
import sys

import pytest

from xai_fast._optional import optional_import


def test_returns_the_innermost_module() -> None:
    assert optional_import("json.decoder", "demo") is json.decoder


def test_missing_package_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r'^no_such_package is not .* pip install "xai_fast\[demo\]"$'):
        optional_import("no_such_package.part", "demo")


def test_a_broken_package_keeps_its_own_error(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("import another_missing_package")  # type: ignore[operator]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModuleNotFoundError, match="another_missing_package"):
        optional_import("broken_one", "demo")
