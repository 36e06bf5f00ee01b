"""Finds the compiled module ``_C``, keeps the reason if it cannot be used, and reports on both."""

from __future__ import annotations

import importlib
import platform
import sys
import warnings
from typing import Any, Literal, overload

import torch

from ._version import __version__

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> tuple[Any, str]:
    """The module and an empty reason, or None and one line that says why."""
    try:
        module = importlib.import_module(f"{__package__}._C")  # torch is loaded already: _C links against its libraries
    except ModuleNotFoundError:
        return None, f"the module was not built; build it with: {REBUILD}"
    except ImportError as error:
        first_line = str(error).splitlines()[0]
        return None, f"the module does not load under torch {torch.__version__} ({first_line}); rebuild with: {REBUILD}"
    if _minor(module.torch_version) != _minor(torch.__version__):
        return None, f"it was built for torch {module.torch_version}, this is {torch.__version__}; rebuild with: {REBUILD}"
    return module, ""


C, REASON = _load()
HAS_CUDA_KERNELS = C is not None and bool(C.cuda_archs)

_warned = False


def warn_fallback(device: str) -> None:
    """One warning per process when an op runs its plain PyTorch reference."""
    global _warned
    if _warned:
        return
    _warned = True
    if C is None:
        why = f"the compiled module is missing: {REASON}"
    else:
        why = f"the compiled module has no {device.upper()} kernels"
    warnings.warn(f"xai_fast runs its slower PyTorch reference: {why}", RuntimeWarning, stacklevel=4)


def config() -> dict[str, Any]:
    """What :func:`show_config` prints, as a dictionary."""
    return {
        "xai_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled module": "loaded" if C is not None else f"missing: {REASON}",
        "built for torch": C.torch_version if C is not None else None,
        "build flags": C.build_flags if C is not None else None,
        "CPU capability": C.cpu_capability() if C is not None else None,
        "CUDA kernels for": C.cuda_archs or "none" if C is not None else None,
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


@overload
def show_config(mode: Literal["stdout"] = ...) -> None: ...
@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print the version, torch, CPU capability, CUDA archs, and why the compiled module is missing if it is.

    Parameters
    ----------
    mode : {"stdout", "dict"}
        ``"dict"`` returns the facts instead of printing them (as in ``numpy.show_config``).

    Raises
    ------
    ValueError
        If ``mode`` is neither.

    Examples
    --------
    >>> import xai_fast
    >>> sorted(xai_fast.show_config(mode="dict"))[:2]
    ['CPU capability', 'CUDA device']
    """
    if mode not in ("stdout", "dict"):
        raise ValueError(f"mode: expected 'stdout' or 'dict', got {mode!r}")
    facts = config()
    if mode == "dict":
        return facts
    width = max(map(len, facts))
    sys.stdout.write("".join(f"{name:<{width}}  {value}\n" for name, value in facts.items() if value is not None))
    return None
