"""LRP against libraries that others wrote, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.peers.locate import peers_directory

# lxt adds eps without the sign of the denominator; Captum applies the epsilon rule at pooling too.
LIMITS = {"zennit": 1e-10, "captum": 1e-7, "lxt": 1e-6, "autolrp": 1e-8}


def run_with_peers(module: str, *arguments: str) -> Any:
    peers = peers_directory(arguments[0] if arguments else "timm")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Appended: the folder also holds packages that are installed already.
    code = f"import sys, runpy; sys.path.append({str(peers)!r}); sys.argv = ['', *{arguments!r}]; "
    code += f"runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("peer", ["zennit", "captum", "lxt", "autolrp"])
def test_agrees_with(peer: str) -> None:
    found = run_with_peers("tests.peers.lrp_peers", peer)
    assert found
    for case, difference in found.items():
        assert difference < LIMITS[peer], case


def test_timm() -> None:
    found = run_with_peers("tests.peers.lrp_timm")
    assert found["identical"]
    assert found["difference"] < 1e-4
    assert found["heads"] == {f"blocks.{i}.attn": [2, 4, 17] for i in range(3)}
    assert found["heads written out"] == list(found["heads"])
