"""The examples of the documents run: every docstring of the package, and the ten lines of the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import xai_fast

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(xai_fast.__path__, "xai_fast.") if not m.name.endswith(("._C", "__main__"))
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0


def test_public_names_have_examples() -> None:
    attention, metrics = xai_fast.attention, xai_fast.metrics
    owners = [xai_fast, xai_fast.ops, attention, attention.artifacts, xai_fast.lrp, xai_fast.influence]
    for owner in (*owners, metrics, metrics.human, xai_fast.concepts, xai_fast.distill):
        for name in owner.__all__:
            if callable(value := getattr(owner, name)):
                assert ">>>" in (value.__doc__ or ""), f"{name}: its docstring has no example"


def test_readme_examples() -> None:
    rollout, relevance, influence, measures = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(rollout, scope)
    assert scope["heat"].shape == (8, 257)
    assert scope["maps"].shape == (8, 16, 16)
    assert scope["full"].shape == (8, 257, 257)
    exec(relevance, scope)
    assert scope["pixel_relevance"].shape == (2, 3, 224, 224)
    assert scope["cat"].shape == scope["dog"].shape == (2, 197)
    assert not scope["cat"].equal(scope["dog"])
    assert set(scope["report"].heads) == {f"vit.layers.{i}.attention" for i in range(3)}
    exec(influence, scope)
    assert scope["scores"].shape == scope["loo"].shape == (10, 1500)
    assert scope["rows"].shape == (297, 5)
    assert scope["scores"].solution.converged
    exec(measures, scope)
    assert scope["fid"].fid_plus.shape == (3,)
    assert scope["curve"].values.shape == (6, 33)
    assert scope["steady"].accepted.shape == (6,)
