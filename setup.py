"""The extension build, nothing else (metadata and tool settings are in pyproject.toml).

The C++ part is always built. CUDA kernels are built whenever nvcc is found, also under a CPU-only torch: nvcc compiles
csrc/cuda/*.cu, which include no torch header, and the objects are linked with the static CUDA runtime.

Environment
-----------
XAI_FAST_CUDA         auto (default): CUDA kernels if nvcc is found; 1: fail without nvcc; 0: never
XAI_FAST_BUILD        auto (default) or none: install the pure Python package, without the compiled module
TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0+PTX"; default below
MAX_JOBS              parallel compile jobs
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
DEFAULT_ARCHS = "8.0;9.0+PTX"
LEAST_ARCH = 8.0  # asynchronous copies and bf16 products
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp", "-Wall"]


def fail(message: str) -> NoReturn:
    sys.exit(f"\nxai_fast: {message}\n")


try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    fail(
        "torch is not installed where the build runs. Install it, then build without isolation:\n"
        "    pip install torch && pip install --no-build-isolation ."
    )


MINIMUM_TORCH = (2, 11)
if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < MINIMUM_TORCH:
    fail(
        f"torch {torch.__version__} is too old: xai_fast needs {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} or newer. "
        "Upgrade with: pip install --upgrade torch"
    )


def choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        fail(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    return value


def find_nvcc() -> str | None:
    """nvcc by CUDA_HOME, PATH or the usual place; None if CUDA is switched off or absent."""
    wish = choice("XAI_FAST_CUDA", ("auto", "0", "1"))
    if wish == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((c for c in candidates if c and os.access(c, os.X_OK)), None)
    if nvcc is None and wish == "1":
        fail("XAI_FAST_CUDA=1 but nvcc was not found. Set CUDA_HOME to the CUDA toolkit, or build with XAI_FAST_CUDA=0")
    return nvcc


def cuda_root(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself reports it (nvcc on PATH may be a wrapper)."""
    report = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", report)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def check_toolkit(nvcc: str) -> None:
    """A driver that serves torch's CUDA need not serve the runtime of a newer toolkit."""
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", report)
    wanted = (torch.version.cuda or "").split(".")[0]
    if wanted and release and release.group(1) != wanted:
        fail(
            f"nvcc is of CUDA {release.group(1)}, but torch {torch.__version__} was built for CUDA {torch.version.cuda}. "
            f"Set CUDA_HOME to a toolkit of CUDA {wanted}, or build without CUDA kernels: XAI_FAST_CUDA=0"
        )


def static_runtime(nvcc: str) -> Path:
    """The folder of libcudart_static.a."""
    root = cuda_root(nvcc)
    for folder in (root / "lib64", root / "lib", root / "targets/x86_64-linux/lib"):
        if (folder / "libcudart_static.a").exists():
            return folder
    fail(f"libcudart_static.a was not found under {root}. Install the toolkit's runtime, or build with XAI_FAST_CUDA=0")


def arch_list() -> list[str]:
    archs = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).strip())
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", arch):
            fail(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, got {arch!r}")
    kept = [arch for arch in archs if float(re.match(r"\d+\.\d", arch)[0]) >= LEAST_ARCH]  # containers preset older ones too
    if not kept:
        wanted = f"an architecture from {LEAST_ARCH} on, which the kernels need"
        fail(f"TORCH_CUDA_ARCH_LIST: expected {wanted}, got {' '.join(archs)}")
    return kept


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def newer(target: Path, command: list[str]) -> bool:
    """True if target is up to date with its command line and every file of its dependency list."""
    depfile, stamp = target.with_suffix(".d"), target.with_suffix(".cmd")
    if not (target.exists() and depfile.exists() and stamp.exists() and stamp.read_text() == " ".join(command)):
        return False
    files = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(Path(f).exists() and Path(f).stat().st_mtime <= target.stat().st_mtime for f in files)


def compile_cuda(nvcc: str, build_dir: Path) -> list[str]:
    """One object per .cu, compiled side by side, skipped when up to date."""
    build_dir.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = build_dir / (source.stem + ".cu.o")
        command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
        command += [*gencode(arch_list()), f"-I{ROOT / 'csrc'}", "-MD", "-MF", str(target.with_suffix(".d"))]
        command += ["-c", str(source), "-o", str(target)]
        if newer(target, command):
            return str(target)
        result = subprocess.run(command, capture_output=True, text=True)
        target.with_suffix(".ptxas.log").write_text(result.stderr)
        if result.returncode:
            fail(f"nvcc failed on {source.name}:\n{result.stderr}")
        target.with_suffix(".cmd").write_text(" ".join(command))
        return str(target)

    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))


class Build(BuildExtension):
    """BuildExtension with the nvcc step of its own."""

    def build_extension(self, ext) -> None:
        nvcc = find_nvcc()
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None and shutil.which("g++") is None:
            fail(
                f"no C++ compiler ({compiler}) was found. Install one (Debian, Ubuntu: apt-get install g++), or install the "
                "slower pure Python package: XAI_FAST_BUILD=none pip install --no-build-isolation ."
            )
        if nvcc and CUDA_SOURCES:
            check_toolkit(nvcc)
            ext.extra_objects += compile_cuda(nvcc, Path(self.build_temp) / "cuda")
            ext.extra_link_args += [f"-L{static_runtime(nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        else:
            ext.sources.append("csrc/cuda/absent.cpp")
        archs = ",".join(arch_list()) if nvcc and CUDA_SOURCES else ""
        ext.define_macros += [("XAI_CUDA_ARCHS", f'"{archs}"'), ("XAI_BUILD_FLAGS", f'"{" ".join(CXX_FLAGS)}"')]
        print(f"xai_fast: torch {torch.__version__}; CUDA kernels: {archs or 'none'}")
        super().build_extension(ext)


def extensions() -> list:
    if choice("XAI_FAST_BUILD", ("auto", "none")) == "none":
        return []
    folders = (ROOT / "csrc" / "bindings", ROOT / "csrc" / "cpu")
    sources = [str(path.relative_to(ROOT)) for folder in folders for path in sorted(folder.glob("*.cpp"))]
    return [
        CppExtension(
            "xai_fast._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=["-fopenmp", "-Wl,-s"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
