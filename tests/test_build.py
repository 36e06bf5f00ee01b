"""What the build promises: one clear message for each way it can fail, and CUDA kernels without register spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xai_fast import _backend

ROOT = Path(__file__).resolve().parents[1]


def build(prelude: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext up to where it fails; nothing of the real build folder is touched."""
    arguments = ["setup.py", "build_ext", "--build-temp", "build/never", "--build-lib", "build/never"]
    code = f"import sys; sys.argv = {arguments}\n{prelude}\nexec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    variables = {**os.environ, "XAI_FAST_CUDA": "0", **environment}
    return subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=variables,
        timeout=300,
    )


FAILURES = [
    ("sys.modules['torch'] = None", {}, "torch is not installed.*pip install torch && pip install --no-build-isolation"),
    (
        "",
        {"PATH": "/nonexistent", "CXX": "no-such-compiler"},
        r"no C\+\+ compiler \(no-such-compiler\).*apt-get install g\+\+",
    ),
    ("", {"XAI_FAST_CUDA": "yes"}, "XAI_FAST_CUDA='yes': expected one of auto, 0, 1"),
    (
        "import os; os.access = lambda *a: False",
        {"XAI_FAST_CUDA": "1"},
        "XAI_FAST_CUDA=1 but nvcc was not found. Set CUDA_HOME",
    ),
    (
        "import torch; torch.__version__ = '2.10.0'",
        {},
        "torch 2.10.0 is too old: xai_fast needs 2.11 or newer. Upgrade with: pip install",
    ),
]
WITH_NVCC = [
    (
        "",
        {"XAI_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.0 7.5"},
        "TORCH_CUDA_ARCH_LIST: expected an architecture from 8.0 on.*got 7.0 7.5",
    ),
    (
        "import torch; torch.version.cuda = '11.8'",
        {"XAI_FAST_CUDA": "1"},
        r"nvcc is of CUDA \d+, but torch .* was built for CUDA 11.8. Set CUDA_HOME to a toolkit of CUDA 11",
    ),
]
if _backend.HAS_CUDA_KERNELS:
    FAILURES += WITH_NVCC


@pytest.mark.parametrize("case", range(len(FAILURES)))
def test_build_failures_say_what_to_do(case: int) -> None:
    prelude, environment, message = FAILURES[case]
    done = build(prelude, **environment)
    assert done.returncode != 0
    assert re.search(message, done.stderr, re.DOTALL), done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def ptxas_logs() -> list[Path]:
    return sorted((ROOT / "build").glob("temp*/cuda/*.ptxas.log"))


@pytest.mark.skipif(not _backend.HAS_CUDA_KERNELS, reason="built without nvcc")
def test_kernels_do_not_spill_registers() -> None:
    logs = ptxas_logs()
    assert logs, "the build keeps ptxas' report of each .cu"
    for log in logs:
        text = log.read_text()
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert spills, f"{log.name}: no kernel was reported"
        assert all(pair == ("0", "0") for pair in spills), f"{log.name}: a kernel spills registers"
        for arch in ("sm_80", "sm_90"):
            assert f"for '{arch}'" in text
