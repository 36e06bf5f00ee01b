"""Where packages live that would break others if they shared their site-packages (timm, which needs
torchvision), and how a module runs with them in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def peers_directory(package: str) -> Path:
    """$XAI_FAST_PEERS or .venv/peers of this checkout; skips the test if `package` is not in it."""
    chosen = os.environ.get("XAI_FAST_PEERS")
    directory = Path(chosen) if chosen else ROOT / ".venv" / "peers"
    if not (directory / package).is_dir():
        pytest.skip(f"{package} is not in {directory} (make peers installs it; XAI_FAST_PEERS names another folder)")
    return directory


def run_with_peers(module: str, package: str, *arguments: str) -> Any:
    """What `module` prints as JSON as a script that can import `package`; skips the test if that is not installed."""
    peers = peers_directory(package)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Appended: the folder also holds packages that are installed already.
    code = f"import sys, runpy; sys.path.append({str(peers)!r}); sys.argv = ['', *{arguments!r}]; "
    code += f"runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
