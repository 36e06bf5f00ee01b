"""The matrix of scores on disk: written tile by tile, resumed where it stopped, read without loading it."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import fsync
from .._optional import optional_import
from ..ops._checks import check_count
from ._extremes import extremes, merged
from ._functionals import Functional
from ._store_arrays import SUFFIXES, DiskArray, NpyArray, array_on_disk
from ._store_manifest import Manifest
from ._store_source import Source, source_of
from .influence import Influence
from .results import Convention, Solution, TopK
from .torch_influence import TorchInfluence

__all__ = ["ScoreStore", "open_scores", "write_scores"]

# Work space of a solve for one right-hand side, in vectors of float64.
SOLVE_VECTORS = 6
# Training rows that a tile should have, so that what is written are long stretches of the file.
WIDE = 4096
# Names that stand for hashes: their values say nothing to a reader.
HASHED = (
    "X_train",
    "y_train",
    "sample_weight",
    "X_test",
    "y_test",
    "head",
    "train_loader",
    "X_test, y_test",
    "model",
    "forward pass",
    "params",
)


def write_scores(
    influence: Influence | TorchInfluence,
    X_test: Any,
    y_test: Any,
    path: str | Path,
    *,
    of: Functional = "loss",
    tile: tuple[int, int] | None = None,
    memory_budget: int = 256 * 2**20,
    progress: bool = False,
    resume: bool = True,
) -> ScoreStore:
    """The influence of every training row on every test point, written to disk tile by tile.

    The work can be stopped at any moment, by Ctrl-C, ``kill -9`` or a power cut: called again with the same arguments it
    goes on after the last finished tile, and the result is the same to the last bit (on the same machine, with the same
    number of threads). Until it is complete the data are in ``<path>.part``, the solutions H^-1 g in
    ``<path>.solutions.npy``; ``<path>.manifest.json`` says what they are and how far they are, and stays.

    Called with other data, options, functions or another model it refuses, also once the store is complete. A function is
    known by its code and by the values that it holds and reads. What has no content (open files, generators, locks) counts
    by its type alone; a function that changes what it holds, as one that counts its calls does, is another one each time.

    Parameters
    ----------
    influence : Influence or TorchInfluence
    X_test, y_test
        As in ``influence.scores``, n_test points.
    path : str or Path
        Ends in .npy, or in .zarr for a folder with one chunk for every tile (needs zarr).
    of : str or callable
        As in :meth:`Influence.scores`; "loss" for TorchInfluence.
    tile : (int, int), optional
        Test points and training rows of a tile, instead of what `memory_budget` gives. Test points of a tile are solved
        together.
    memory_budget : int
        Bytes, about, for a tile and a solve, besides the data and what the solver itself keeps (a factor of H). Smaller
        tiles read the training data more often.
    progress : bool
        A progress bar of tiles (needs tqdm).
    resume : bool
        False: throw away what an unfinished call left, and begin anew.

    Returns
    -------
    ScoreStore, shape (n_test, n_train)
        At once, if it is complete already.

    Raises
    ------
    TypeError, ValueError
        Bad test points, another ending of the path; data, model, options or versions that are not those of the work begun
        (named; nothing is changed); a file in the way that is no store; not enough room on the disk.

    Warns
    -----
    NotConverged
        A residual of a solve above the tolerance.

    Examples
    --------
    >>> import tempfile, torch, xai_fast as xf
    >>> X, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 6.0])
    >>> influence = xf.influence.Influence(xf.influence.LinearHead([23 / 14]), X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = write_scores(influence, X[:1], y[:1] + 1, folder + "/scores.npy")
    ...     store.shape, store[0].round(2)
    ((1, 3), array([ 0.05,  0.2 , -0.25], dtype=float32))
    """
    files = _Files(path)
    source = source_of(influence, X_test, y_test, of)
    memory_budget = check_count(memory_budget, "memory_budget")
    if not files.path.exists():
        _check_room(files, source)
    manifest = _manifest(files, source, _check_tile(tile), memory_budget, resume)
    if not manifest.complete:
        _Writer(files, source, manifest).run(progress)
    return open_scores(files.path)


def open_scores(path: str | Path) -> ScoreStore:
    """Scores that :func:`write_scores` has written.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    ScoreStore

    Raises
    ------
    FileNotFoundError
        Nothing there.
    ValueError
        Not a store, or one that is not complete: the message says how much is done.

    Examples
    --------
    >>> open_scores("nothing.npy")
    Traceback (most recent call last):
    FileNotFoundError: path: expected a store of scores, got no file 'nothing.npy'
    """
    files = _Files(path)
    if not files.manifest.exists():
        if not files.path.exists():
            raise FileNotFoundError(f"path: expected a store of scores, got no file {str(path)!r}")
        raise ValueError(f"path: expected a store of scores, got {str(path)!r} without a manifest beside it")
    manifest = Manifest.read(files.manifest)
    if not manifest.complete:
        done = f"{manifest.tiles_done} of {manifest.tiles} tiles"
        raise ValueError(
            f"path: expected a complete store, got {str(path)!r} with {done} done; call write_scores again to finish it"
        )
    return ScoreStore(files.path, files.open(manifest), manifest)


class ScoreStore:
    """A matrix of scores on disk, read-only: index it as a numpy array; what is indexed is read.

    Attributes
    ----------
    path : Path
    shape : tuple of int
        (n_test, n_train).
    dtype : numpy.dtype
    convention : Convention
        What the scores mean.
    manifest : Manifest
        The record of the solves and of what the store was made from.

    Examples
    --------
    >>> import tempfile, torch, xai_fast as xf
    >>> influence = xf.influence.Influence(xf.influence.LinearHead([0.0]), torch.ones(2, 1), torch.tensor([1.0, -1.0]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = write_scores(influence, torch.ones(1, 1), torch.tensor([1.0]), folder + "/scores.npy")
    ...     print(store, store[:, 1])
    ScoreStore scores.npy (1, 2): I_up,loss; positive = harmful; not divided by n = 2; H = mean loss Hessian + l2 + \
damping, l2 = 0, damping = 0; train gradient of the loss [1.]
    """

    def __init__(self, path: Path, array: Any, manifest: Manifest) -> None:
        self.path, self.manifest, self._array = path, manifest, array
        self.shape, self.dtype = manifest.shape, np.dtype(manifest.dtype)

    @property
    def convention(self) -> Convention:
        return self.manifest.meaning()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        # Not a memmap, not a 0-dimensional array: what numpy gives for an array in memory.
        return np.asarray(self._array[key])[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self._array[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"ScoreStore {self.path.name} {self.shape}: {self.convention}"

    def top_k(self, k: int, *, which: str = "helpful") -> TopK:
        """The k most helpful or harmful training rows of every test point, read tile by tile.

        Parameters
        ----------
        k : int
            At most n_train.
        which : {"helpful", "harmful"}

        Returns
        -------
        TopK
            values, indices: tensors (n_test, k), most extreme first; of equal scores the earlier row comes first.

        Raises
        ------
        ValueError
            k out of range, another `which`.

        Examples
        --------
        >>> import tempfile, torch, xai_fast as xf
        >>> influence = xf.influence.Influence(xf.influence.LinearHead([0.0]), torch.ones(2, 1), torch.tensor([1.0, -1.0]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = write_scores(influence, torch.ones(1, 1), torch.tensor([1.0]), folder + "/scores.npy")
        ...     store.top_k(1, which="harmful").indices
        tensor([[1]])
        """
        k = check_count(k, "k", 1, self.shape[1])
        if which not in ("helpful", "harmful"):
            raise ValueError(f"which: expected 'helpful' or 'harmful', got {which!r}")
        largest = self.convention.sign == f"positive = {which}"
        groups = range(-(-self.shape[0] // self.manifest.tile[0]))
        values, indices = zip(*(self._group_top_k(group, k, largest) for group in groups), strict=True)
        return TopK(torch.cat(values), torch.cat(indices), which, self.convention, None)

    def _group_top_k(self, group: int, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        at, across = self.manifest.group(group), self.manifest.tiles_across
        best: tuple[Tensor, Tensor] | None = None
        for number in range(group * across, (group + 1) * across):
            columns = self.manifest.place(number)[1]
            # A copy: tensors on a read-only map warn.
            values, places = extremes(torch.from_numpy(np.array(self._array[at, columns])), k, largest=largest)
            places += columns.start
            if best is not None:
                values, places = torch.cat([best[0], values], 1), torch.cat([best[1], places], 1)
            best = merged(values, places, k, largest=largest)
        assert best is not None
        return best


class _Files:
    """The names of all that belongs to a store."""

    def __init__(self, path: Any) -> None:
        if not isinstance(path, (str, Path)):
            raise TypeError(f"path: expected a str or Path, got {type(path).__name__}")
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"path: expected a name that ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
        self.part = self._beside(".part")
        self.solutions = self._beside(".solutions.npy")
        self.manifest = self._beside(".manifest.json")

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(self.path.name + ending)

    def array(self, path: Path) -> DiskArray:
        return array_on_disk(path, self.path.suffix)

    def open(self, manifest: Manifest) -> Any:
        """The complete array, read-only; ValueError if it is another than the manifest says."""
        if not self.path.exists():
            raise ValueError(f"path: expected the scores of {str(self.manifest)!r}, got no file {str(self.path)!r}")
        found = self.array(self.path).open()
        if (tuple(found.shape), str(found.dtype)) != (manifest.shape, manifest.dtype):
            wanted = f"{manifest.dtype} of shape {manifest.shape}, as its manifest says"
            raise ValueError(f"path: expected {wanted}, got {found.dtype} of shape {tuple(found.shape)}")
        return found


# ---- begin, or go on ------------------------------------------------------------------------------------------------------


def _manifest(files: _Files, source: Source, tile: tuple[int, int] | None, memory_budget: int, resume: bool) -> Manifest:
    """The manifest of the work begun, if there is one and it is of the same work; else a new one, not on disk yet."""
    if not files.manifest.exists():
        for foreign in (files.path, files.part):
            if foreign.exists():
                raise ValueError(f"path: expected no file or a store of scores, got {str(foreign)!r} without a manifest")
        return _new(source, tile, memory_budget)
    found = Manifest.read(files.manifest)
    _finish_rename(files, found)
    if found.complete:
        files.open(found)
    elif files.path.exists():
        raise ValueError(f"path: expected no file until the store is complete, got {str(files.path)!r}")
    elif not resume:
        return _new(source, tile, memory_budget)
    _check_same(files, found, source, tile)
    if found.solves and not files.solutions.exists() and not found.complete:
        raise ValueError(f"path: expected the solutions of the work begun, got no file {str(files.solutions)!r}")
    if found.tiles_done and not files.part.exists() and not found.complete:
        raise ValueError(f"path: expected the tiles of the work begun, got no file {str(files.part)!r}")
    return found


def _new(source: Source, tile: tuple[int, int] | None, memory_budget: int) -> Manifest:
    if tile is None:
        tile = _tile(source, memory_budget)
    tile = min(tile[0], source.shape[0]), min(tile[1], source.shape[1])
    return Manifest(
        source.identity(), source.shape, str(source.dtype).removeprefix("torch."), tile, asdict(source.convention),
        "", source.parameters,
    )  # fmt: skip


def _finish_rename(files: _Files, manifest: Manifest) -> None:
    """Note what a kill between the rename and its record left unsaid."""
    if not manifest.complete and manifest.tiles_done == manifest.tiles and not files.part.exists() and files.path.exists():
        manifest.complete = True
        manifest.write(files.manifest)
        files.solutions.unlink(missing_ok=True)


def _check_same(files: _Files, found: Manifest, source: Source, tile: tuple[int, int] | None) -> None:
    """ValueError that names all that differs from the work begun."""
    identity = source.identity()
    if found.complete:
        # Finished numbers are what they are, whichever version is asked now.
        identity |= {name: found.identity.get(name) for name in ("xai_fast", "torch")}
    differs = [name for name in {**found.identity, **identity} if found.identity.get(name) != identity.get(name)]
    if tile is not None and tuple(found.tile) != (min(tile[0], found.shape[0]), min(tile[1], found.shape[1])):
        differs.append("tile")
        identity["tile"], found.identity["tile"] = tile, found.tile
    if differs:
        parts = [
            f"another {name}" if name in HASHED else f"{name} = {identity.get(name)} instead of {found.identity.get(name)}"
            for name in differs
        ]
        raise ValueError(f"{differs[0]}: expected what the store {str(files.path)!r} was begun with, got {', '.join(parts)}")


def _check_tile(tile: Any) -> tuple[int, int] | None:
    if tile is None:
        return None
    if not isinstance(tile, (tuple, list)) or len(tile) != 2:
        raise TypeError(f"tile: expected (test points, training rows), got {tile!r}")
    return check_count(tile[0], "tile"), check_count(tile[1], "tile")


def _tile(source: Source, budget: int) -> tuple[int, int]:
    """Test points and training rows of a tile: half of the budget for the solve, half for the tile."""
    itemsize = source.dtype.itemsize
    by_solve = budget // (2 * SOLVE_VECTORS * 8 * source.parameters)
    # Twice: the tile, and its copy on the way to the disk.
    by_width = budget // (2 * 2 * itemsize * min(WIDE, source.shape[1]))
    tests = max(1, min(source.shape[0], by_solve, by_width))
    rows = max(1, min(source.shape[1], budget // (2 * (2 * itemsize * tests + source.row_bytes))))
    return tests, rows


def _check_room(files: _Files, source: Source) -> None:
    """ValueError unless the disk has room for what is still to come."""
    folder = files.path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"path: expected a folder that exists, got {str(folder)!r}")
    needed = source.shape[0] * source.dtype.itemsize * (source.shape[1] + source.parameters)
    needed -= files.array(files.part).bytes_on_disk() + NpyArray(files.solutions).bytes_on_disk()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"path: expected {needed / 1e9:.3g} GB of free disk for the scores, got {free / 1e9:.3g} GB")


# ---- the work -------------------------------------------------------------------------------------------------------------


class _Writer:
    """Solves and tiles, each on the disk before the manifest says so."""

    def __init__(self, files: _Files, source: Source, manifest: Manifest) -> None:
        self._files, self._source, self._manifest = files, source, manifest
        self._scores, self._solutions = files.array(files.part), NpyArray(files.solutions)

    def run(self, progress: bool) -> None:
        manifest = self._manifest
        self._settle()
        with self._bar(progress) as bar:
            held, solutions = -1, torch.empty(0)
            while manifest.tiles_done < manifest.tiles:
                group, rows = manifest.place(manifest.tiles_done)
                at = manifest.group(group)
                if group == len(manifest.solves):
                    self._solve(at)
                if group != held:
                    held, solutions = group, torch.from_numpy(np.array(self._solutions.open()[at]))
                self._scores.write(at, rows, self._source.scores(solutions, rows).numpy())
                manifest.tiles_done += 1
                self._save()
                if bar is not None:
                    bar.update()
        self._complete()

    def _settle(self) -> None:
        """The solver and, where there is nothing yet, the files."""
        manifest = self._manifest
        manifest.solver = self._source.take_solver(manifest.solver or None)
        self._save()
        if not manifest.solves:
            shape = (manifest.shape[0], manifest.parameters)
            self._solutions.create(shape, manifest.dtype, manifest.tile)
        if not manifest.tiles_done:
            self._scores.create(manifest.shape, manifest.dtype, manifest.tile)

    def _solve(self, at: slice) -> None:
        solution = self._source.solve(at)
        self._solutions.write(at, slice(None), solution.x.flatten(1).to(self._source.dtype).cpu().numpy())
        self._manifest.solves.append(_certificate(solution))
        self._save()

    def _save(self) -> None:
        self._manifest.write(self._files.manifest)

    def _complete(self) -> None:
        files = self._files
        os.replace(files.part, files.path)
        fsync(files.path.absolute().parent)
        self._manifest.complete = True
        self._save()
        files.solutions.unlink(missing_ok=True)

    def _bar(self, progress: bool) -> Any:
        if not progress:
            return nullcontext()
        total, done = self._manifest.tiles, self._manifest.tiles_done
        return optional_import("tqdm", "demo").tqdm(total=total, initial=done, desc="scores", unit="tile")


def _certificate(solution: Solution) -> dict[str, Any]:
    return {
        "solver": solution.solver,
        "why": solution.why,
        "steps": solution.steps,
        "worst_residual": float(solution.residual.max()),
        "tolerance": solution.tolerance,
        "converged": solution.converged,
    }
