"""The examples of the documents run: every docstring of the package, and the ten lines of the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

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


def readme_examples() -> dict[str, str]:
    """Code by the heading that it stands under."""
    sections = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)[1:]
    found = {part.split("\n", 1)[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in sections}
    return {title: code[0] for title, code in found.items() if code}


def test_readme_examples() -> None:
    examples = readme_examples()
    scope: dict[str, Any] = {}
    exec(examples["Ten lines"], scope)
    assert scope["heat"].shape == (8, 257)
    assert scope["maps"].shape == (8, 16, 16)
    assert scope["full"].shape == (8, 257, 257)
    exec(examples["Why this class, and not only where it looked"], scope)
    assert scope["pixel_relevance"].shape == (2, 3, 224, 224)
    assert scope["cat"].shape == scope["dog"].shape == (2, 197)
    assert not scope["cat"].equal(scope["dog"])
    assert set(scope["report"].heads) == {f"vit.layers.{i}.attention" for i in range(3)}
    exec(examples["Which training rows are behind a prediction"], scope)
    assert scope["scores"].shape == scope["loo"].shape == (10, 1500)
    assert scope["rows"].shape == (297, 5)
    assert scope["scores"].solution.converged
    exec(examples["Is the explanation any good?"], scope)
    assert scope["fid"].fid_plus.shape == (3,)
    assert scope["curve"].values.shape == (6, 33)
    assert scope["steady"].accepted.shape == (6,)


def test_readme_examples_of_models_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = readme_examples()
    scope: dict[str, Any] = {}
    exec(examples["Which concepts a class depends on"], scope)
    assert set(scope["result"].accuracy) == {"1", "2"}
    assert scope["order"].shape == scope["cosine"].shape == (50,)
    exec(examples["A black box as functions that can be drawn"], scope)
    assert scope["gam"].fidelity().r2 > 0.8
    assert (tmp_path / "term.png").stat().st_size > 1000
    assert scope["pure"].shape == (4, 5)
    exec(examples["Attention in recurrent networks"], scope)
    assert scope["found"].signed.shape == (2, 5)
    assert scope["alpha"].shape == scope["signed"].shape == (2, 80, 500)
    exec(examples["Patches that hold what does not belong to them"], scope)
    assert scope["mended"].shape == (6, 65)
    assert len(scope["neurons"]) == 4
