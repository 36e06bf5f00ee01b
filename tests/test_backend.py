"""The package without its compiled module, with one of another torch, and what it says about itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xai_fast as xf

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


WITHOUT = """
import sys, warnings
sys.modules["xai_fast._C"] = {stand_in}
import torch
import xai_fast as xf
attention = torch.softmax(torch.zeros(3, 1, 2, 4, 4), -1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    xf.attention_rollout(attention)
    out = xf.attention_rollout(attention, token=None)
assert out.shape == (1, 4, 4)
ours = [w for w in caught if "xai_fast" in str(w.message)]
assert len(ours) == 1, caught
print(ours[0].message)
xf.show_config()
"""


def test_without_the_compiled_module() -> None:
    done = run(WITHOUT.format(stand_in="None"))
    assert done.returncode == 0, done.stderr
    assert "the module was not built; build it with: pip install --no-build-isolation" in done.stdout
    assert re.search(r"compiled module\s+missing: the module was not built", done.stdout)


def test_compiled_for_another_torch() -> None:
    done = run(WITHOUT.format(stand_in='type(sys)("other"); sys.modules["xai_fast._C"].torch_version = "1.0.0"'))
    assert done.returncode == 0, done.stderr
    assert "built for torch 1.0.0" in done.stdout
    assert "rebuild with: pip install --no-build-isolation" in done.stdout


def test_info() -> None:
    done = subprocess.run([sys.executable, "-m", "xai_fast", "info"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0
    for fact in (xf.__version__, "torch", "CPU capability", "CUDA kernels for"):
        assert fact in done.stdout


def test_usage() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xai_fast", "nonsense"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2
    assert "usage: python -m xai_fast" in done.stderr


def test_show_config_modes(capsys: pytest.CaptureFixture[str]) -> None:
    assert xf.show_config() is None
    assert xf.__version__ in capsys.readouterr().out
    assert xf.show_config(mode="dict")["compiled module"] == "loaded"
    with pytest.raises(ValueError, match="mode: expected 'stdout' or 'dict'"):
        xf.show_config(mode="json")


@pytest.mark.parametrize("capability", ["base", "avx2", "avx512", "amx"])
def test_cpu_capability_can_be_lowered(capability: str) -> None:
    best = xf.show_config(mode="dict")["CPU capability"]
    order = ["base", "avx2", "avx512", "amx"]
    environment = {**os.environ, "XAI_FAST_CPU": capability}
    code = "import torch; from xai_fast import _C; print(_C.cpu_capability())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert done.stdout.strip() == order[min(order.index(best), order.index(capability))]
