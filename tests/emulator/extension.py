"""Builds csrc/bindings/*.cpp with the CUDA sources compiled for the CPU emulator, as a second extension module.

CPU tensors given to this module run through the CUDA launchers, so every CUDA kernel is tested through the same Python
signature as the real one. The build is cached by a hash of its sources and flags.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from tests.emulator.build import CACHE, ROOT, compile_flags

NAME = "xai_fast_emulated"
CXX = os.environ.get("CXX", "g++")


def _sources() -> list[Path]:
    csrc = ROOT / "csrc"
    folders = ((csrc / "bindings", "*.cpp"), (csrc / "cpu", "*.cpp"), (csrc / "cuda", "*.cu"))
    return [path for folder, pattern in folders for path in sorted(folder.glob(pattern))]


def _flags() -> list[str]:
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include"), str(ROOT / "csrc")]
    defines = [f"-DTORCH_EXTENSION_NAME={NAME}", '-DXAI_CUDA_ARCHS="emulated"', '-DXAI_BUILD_FLAGS="emulated"']
    return [*compile_flags(), "-fopenmp", *defines, *(f"-isystem{p}" for p in includes)]


def _fingerprint() -> str:
    parts = [torch.__version__, *_flags()]
    headers = [
        p for d in ("csrc", "tests/emulator") for p in sorted((ROOT / d).rglob("*")) if p.is_file() and p.suffix != ".py"
    ]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in headers:
        if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".inc"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(target: Path) -> None:
    """Each source to an object, side by side, then one shared library."""
    work = target.parent / f"{target.name}.parts.{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    pending, objects = [], []
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    for source in _sources():
        objects.append(str(work / f"{source.parent.name}_{source.name}.o"))
        pending.append(["-x", "c++", "-c", str(source), "-o", objects[-1]])
    running: list[subprocess.Popen] = []
    for arguments in pending:
        if len(running) >= jobs:
            _finish(running.pop(0))
        running.append(subprocess.Popen([CXX, *_flags(), *arguments], stderr=subprocess.PIPE, text=True))
    for process in running:
        _finish(process)
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run([CXX, *_flags(), "-shared", *objects, *libraries, "-o", str(partial)], check=True)
    partial.rename(target)


def _finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the emulated extension does not compile:\n{errors}")


@functools.cache
def emulated_module() -> ModuleType:
    """The module, built on the first call."""
    target = CACHE / f"{NAME}_{_fingerprint()}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # one of the test processes builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(target)
    spec = importlib.util.spec_from_file_location(NAME, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
