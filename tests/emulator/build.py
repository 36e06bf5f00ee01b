"""Compiles .cu files for the CPU emulator into shared libraries, cached by a hash of sources and flags."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulator"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-DXAI_EMULATE", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
INCLUDES = [HERE, ROOT / "csrc", ROOT / "csrc" / "cuda"]


def sanitized() -> bool:
    return os.environ.get("XAI_FAST_SANITIZE") == "1"


def cuda_include() -> Path | None:
    """The folder that holds cuda_runtime.h: of CUDA_HOME, else of the nvcc on PATH, else None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


def compile_flags() -> list[str]:
    """Flags that turn g++ into the emulator's compiler; a CUDA include folder must exist."""
    includes = [f"-I{folder}" for folder in INCLUDES] + ["-isystem", str(cuda_include())]
    return FLAGS + (SANITIZERS if sanitized() else []) + includes


def _digest(sources: list[Path], flags: list[str]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    headers = sorted(p for folder in INCLUDES for p in folder.glob("*") if p.suffix in {".h", ".cuh"})
    for path in [*sources, *headers]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(name: str, sources: list[Path]) -> Path:
    """Path of the shared library made of `sources`."""
    flags = compile_flags()
    library = CACHE / f"{name}-{_digest(sources, flags)}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        partial = Path(folder) / library.name
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, *flags, "-shared", "-x", "c++", *map(str, sources), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the emulator build of {name} failed:\n{' '.join(command)}\n{result.stderr}")
        partial.rename(library)
    return library


def load(name: str, sources: list[Path]) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(name, sources)))
