"""A study on disk: one file for every finished part, and a manifest of what the study is of."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import fsync
from .._version import __version__

__all__ = ["Folder", "Part"]

FORMAT = 1
MANIFEST = "manifest.json"
# The ending of a file that is being written.
PART = ".part"
FACTS = "facts"
# Values that stand for data and code: they say nothing to a reader.
PLAIN = ("seed", "sparsity", "patch_size")
NAME = 60


@dataclass
class Part:
    """The tensors of a finished piece of work, and facts about it that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


class Folder:
    """The folder of a study. Every file appears at once, by a rename, so that what is there is complete."""

    def __init__(self, path: Any) -> None:
        if not isinstance(path, (str, Path)):
            raise TypeError(f"path: expected a str or Path, got {type(path).__name__}")
        self.path = Path(path)
        self._manifest = self.path / MANIFEST
        if self.path.exists() and not self._manifest.exists() and self._foreign():
            raise ValueError(f"path: expected a new or empty folder or that of a study, got {str(path)!r}")

    def _foreign(self) -> bool:
        """Whether there is anything but what a study leaves that was stopped at once."""
        return not self.path.is_dir() or any(file.name != MANIFEST + PART for file in self.path.iterdir())

    def begin(self, identity: dict[str, Any], explainers: dict[str, Any], measures: dict[str, Any]) -> None:
        """Compare with the study begun, if there is one; methods and measures that are new to it are added."""
        found = self._read_manifest()
        wanted = {"identity": identity, "explainers": explainers, "measures": measures}
        wanted = json.loads(json.dumps(wanted))  # tuples are lists there
        if found is not None:
            self._compare(found, wanted)
            wanted = {name: {**found[name], **values} for name, values in wanted.items()}
        if found is None or any(found[name] != values for name, values in wanted.items()):
            self.path.mkdir(parents=True, exist_ok=True)
            text = {"format": FORMAT, "xai_fast": __version__, "torch": torch.__version__, **wanted}
            self._write(self._manifest, json.dumps(text, indent=1).encode())
        for left in self.path.glob("*" + PART):
            left.unlink()

    def _read_manifest(self) -> dict[str, Any] | None:
        if not self._manifest.exists():
            return None
        try:
            found = json.loads(self._manifest.read_text())
            number = found.get("format")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            raise ValueError(f"path: expected the manifest of a study, got something else in {str(self.path)!r}") from None
        if number != FORMAT:
            raise ValueError(f"path: expected a study of format {FORMAT}, got format {number} in {str(self.path)!r}")
        return dict(found)

    def _compare(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """ValueError in one line that names all that differs."""
        differs = []
        for name, value in wanted["identity"].items():
            before = found["identity"].get(name)
            if value != before:
                differs.append(f"{name} = {value} instead of {before}" if name in PLAIN else f"another {name}")
        for what in ("explainers", "measures"):
            both = found[what].keys() & wanted[what].keys()
            one = {"explainers": "explainer", "measures": "options of the measure"}[what]
            differs += [f"another {one} {n!r}" for n in sorted(both) if found[what][n] != wanted[what][n]]
        if differs:
            raise ValueError(f"path: expected what the study {str(self.path)!r} was begun with, got {', '.join(differs)}")

    def read(self, *key: Any) -> Part | None:
        """The finished part of that key."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            with np.load(file) as arrays:
                facts = json.loads(bytes(arrays[FACTS]))
                tensors = {name: _tensor(arrays[name], facts["dtypes"][name]) for name in facts["dtypes"]}
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
            raise ValueError(f"path: expected a part of a study, got something else in {str(file)!r}") from None
        return Part(tensors, facts["of"])

    def facts(self, *key: Any) -> dict[str, Any] | None:
        """The facts of a part, without reading its tensors."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            with np.load(file) as arrays:
                return dict(json.loads(bytes(arrays[FACTS]))["of"])
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
            raise ValueError(f"path: expected a part of a study, got something else in {str(file)!r}") from None

    def write(self, part: Part, *key: Any) -> None:
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in part.tensors.items()}
        facts = np.frombuffer(json.dumps({"key": key, "dtypes": dtypes, "of": part.facts}).encode(), np.uint8)
        arrays: dict[str, Any] = {name: _array(value) for name, value in part.tensors.items()}
        self._write(self._file(key), {FACTS: facts, **arrays})

    def _write(self, file: Path, content: bytes | dict[str, Any]) -> None:
        temporary = file.with_name(file.name + PART)
        with open(temporary, "wb") as out:
            if isinstance(content, bytes):
                out.write(content)
            else:
                np.savez(out, **content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
        fsync(self.path)

    def _file(self, key: tuple[Any, ...]) -> Path:
        """Readable, and different for different keys."""
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=6).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(str(k) for k in key if k is not None)).strip("-")[:NAME]
        return self.path / f"{readable}.{digest}.npz"


def _array(value: Tensor) -> np.ndarray:
    x = value.detach().cpu().contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if dtype == "bfloat16" else found
