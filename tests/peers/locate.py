"""Where packages live that would break others if they shared their site-packages (timm, which needs
torchvision)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def peers_directory(package: str) -> Path:
    """$XAI_FAST_PEERS or .venv/peers of this checkout; skips the test if `package` is not in it."""
    chosen = os.environ.get("XAI_FAST_PEERS")
    directory = Path(chosen) if chosen else Path(__file__).parents[2] / ".venv" / "peers"
    if not (directory / package).is_dir():
        pytest.skip(f"{package} is not in {directory} (make peers installs it; XAI_FAST_PEERS names another folder)")
    return directory
