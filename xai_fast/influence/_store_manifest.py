"""The record beside a store on disk: what is in it, what it was made from, how far it is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._files import fsync
from .results import Convention

__all__ = ["FORMAT", "Manifest"]

FORMAT = 1


@dataclass
class Manifest:
    """What a store is, tile by tile.

    Tiles are numbered along the training rows first: all tiles of one group of test points, then the next group.

    Attributes
    ----------
    identity : dict
        What must be the same when the work goes on: versions, hashes of the data, options.
    shape : tuple of int
        (n_test, n_train).
    dtype : str
        "float32" or "float64".
    tile : tuple of int
        Test points and training rows of one tile.
    convention : dict
        The fields of the :class:`Convention`.
    solver : str
        The solver that was taken, not "auto".
    parameters : int
        Of the model: the length of a solution.
    solves : list of dict
        For each group of test points that was solved: steps, worst residual, convergence.
    tiles_done : int
    complete : bool
    format : int
    """

    identity: dict[str, Any]
    shape: tuple[int, int]
    dtype: str
    tile: tuple[int, int]
    convention: dict[str, Any]
    solver: str
    parameters: int
    solves: list[dict[str, Any]] = field(default_factory=list)
    tiles_done: int = 0
    complete: bool = False
    format: int = FORMAT

    @property
    def tiles_across(self) -> int:
        """Tiles of one group of test points."""
        return -(-self.shape[1] // self.tile[1])

    @property
    def tiles(self) -> int:
        return -(-self.shape[0] // self.tile[0]) * self.tiles_across

    def group(self, number: int) -> slice:
        """The test points of a group."""
        first = number * self.tile[0]
        return slice(first, min(first + self.tile[0], self.shape[0]))

    def place(self, number: int) -> tuple[int, slice]:
        """The group of test points of a tile, and its training rows."""
        group, across = divmod(number, self.tiles_across)
        first = across * self.tile[1]
        return group, slice(first, min(first + self.tile[1], self.shape[1]))

    def meaning(self) -> Convention:
        return Convention(**self.convention)

    def write(self, path: Path) -> None:
        """Replace the file in one step: a reader, or a process after a crash, finds the old or the new one, never a part."""
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w") as file:
            json.dump({**asdict(self), "meaning": str(self.meaning())}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)

    @staticmethod
    def read(path: Path) -> Manifest:
        """ValueError if the file is no manifest, or one of another format."""
        try:
            content = json.loads(path.read_text())
            found = content.get("format") if isinstance(content, dict) else None
            if found != FORMAT:
                raise ValueError(f"path: expected a manifest of format {FORMAT}, got format {found} in {str(path)!r}")
            del content["meaning"]
            manifest = Manifest(**content)
            manifest._check()
        except (AttributeError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            raise ValueError(f"path: expected a manifest of a store, got something else in {str(path)!r}") from None
        return manifest

    def _check(self) -> None:
        """TypeError where a file that was edited says what cannot be."""
        for name in ("shape", "tile"):
            rows, columns = (_count(number, 1) for number in _pair(getattr(self, name)))
            setattr(self, name, (rows, columns))
        if _count(self.tiles_done, 0) > self.tiles or len(self.solves) > -(-self.shape[0] // self.tile[0]):
            raise TypeError
        if type(self.complete) is not bool or not isinstance(self.identity, dict):
            raise TypeError
        self.meaning()


def _pair(numbers: Any) -> tuple[Any, Any]:
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 2:
        raise TypeError
    return numbers[0], numbers[1]


def _count(number: Any, least: int) -> int:
    if type(number) is not int or number < least:
        raise TypeError
    return number
