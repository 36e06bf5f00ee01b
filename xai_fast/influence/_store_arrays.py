"""Arrays on disk that are written tile by tile: numpy files and zarr folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._files import fsync
from .._optional import optional_import

__all__ = ["SUFFIXES", "DiskArray", "NpyArray", "ZarrArray", "array_on_disk"]

Array = np.ndarray[Any, Any]


class DiskArray(Protocol):
    """A matrix on disk, as :func:`write_scores` uses it."""

    path: Path

    def create(self, shape: tuple[int, int], dtype: str, tile: tuple[int, int]) -> None:
        """Begin anew, over what is there."""

    def write(self, rows: slice, columns: slice, values: Array) -> None:
        """Write a tile; it is on the disk when this returns."""

    def open(self) -> Any:
        """The array, read-only."""

    def bytes_on_disk(self) -> int:
        """What is allocated already; 0 if there is nothing."""


class NpyArray:
    """A .npy file, written through a map."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, shape: tuple[int, int], dtype: str, tile: tuple[int, int]) -> None:
        np.lib.format.open_memmap(self.path, mode="w+", dtype=dtype, shape=shape)
        # A write to a mapped file that finds the disk full kills the process: take the room now.
        if hasattr(os, "posix_fallocate"):
            with open(self.path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        fsync(self.path)

    def write(self, rows: slice, columns: slice, values: Array) -> None:
        # Mapped for one tile only: pages that were written leave the memory of the process with the map.
        mapped = np.lib.format.open_memmap(self.path, mode="r+")
        mapped[rows, columns] = values
        mapped.flush()

    def open(self) -> Array:
        return np.lib.format.open_memmap(self.path, mode="r")

    def bytes_on_disk(self) -> int:
        return self.path.stat().st_blocks * 512 if self.path.exists() else 0


class ZarrArray:
    """A zarr folder (version 3), one chunk for every tile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zarr = optional_import("zarr", "store")

    def create(self, shape: tuple[int, int], dtype: str, tile: tuple[int, int]) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self._zarr.create_array(store=str(self.path), shape=shape, chunks=tile, dtype=dtype)

    def write(self, rows: slice, columns: slice, values: Array) -> None:
        array = self._zarr.open_array(str(self.path), mode="r+")
        array[rows, columns] = values
        chunk = rows.start // array.chunks[0], columns.start // array.chunks[1]
        file = self.path / array.metadata.encode_chunk_key(chunk)
        # A chunk of zeros, the fill value, has no file.
        if file.exists():
            fsync(file)
            fsync(file.parent)

    def open(self) -> Any:
        return self._zarr.open_array(str(self.path), mode="r")

    def bytes_on_disk(self) -> int:
        return sum(file.stat().st_blocks * 512 for file in self.path.rglob("*") if file.is_file())


SUFFIXES = {".npy": NpyArray, ".zarr": ZarrArray}


def array_on_disk(path: Path, suffix: str) -> DiskArray:
    """The array in a file or folder of the kind that the suffix says."""
    kind: Any = SUFFIXES[suffix]
    array: DiskArray = kind(path)
    return array
