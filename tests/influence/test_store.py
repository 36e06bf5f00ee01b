"""Scores on disk: resumed after kill -9 and Ctrl-C to the last bit, refused where something differs, read as an array."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.influence.problems import labelled, random_head
from xai_fast.influence import Influence, TorchInfluence, _store_arrays, _store_manifest, store
from xai_fast.influence._extremes import extremes
from xai_fast.influence.store import ScoreStore, open_scores, write_scores

N, D, TESTS = 60, 4, 10
TILE = (3, 7)  # 4 groups of test points, 9 tiles each
TILES = 36
LIMIT = 60.0

# A job in the background of a script would otherwise ignore SIGINT, and so would its children.
CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.influence.test_store import TILE, make, points
from xai_fast.influence import _store_arrays
from xai_fast.influence.store import write_scores

kind = _store_arrays.SUFFIXES[Path(sys.argv[1]).suffix]
write = kind.write
def slowly(*arguments):
    time.sleep(0.02)
    write(*arguments)
kind.write = slowly
write_scores(make(), *points(), sys.argv[1], tile=TILE)
"""


def make(**options: Any) -> Influence:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(N, D, generator=generator)
    head = random_head("softmax", D, l2=options.pop("l2", 0.1), seed=options.pop("head_seed", 2))
    return Influence(head, X, labelled("softmax", N), **{"solver": "cg", **options})


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(TESTS, D, generator=torch.Generator().manual_seed(4)), labelled("softmax", TESTS, seed=5)


def manifest_of(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def leftovers(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if file.name.startswith(path.name))


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.parent.rglob("*")) if file.is_file()}


def stop_a_child(path: Path, how: signal.Signals, tiles: int = 5) -> int:
    """Start the writing in another process, end it after some tiles; how many it had done."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        try:
            end = time.monotonic() + LIMIT
            while tiles_done(path) < tiles:
                assert child.poll() is None, f"the child ended by itself: {child.stderr.read() if child.stderr else ''}"
                assert time.monotonic() < end, "the child did nothing in a minute"
                time.sleep(0.005)
            child.send_signal(how)
            child.wait(LIMIT)
        finally:
            child.kill()
        if how == signal.SIGKILL:
            assert child.returncode == -signal.SIGKILL
    return tiles_done(path)


def tiles_done(path: Path) -> int:
    file = manifest_of(path)
    return json.loads(file.read_text())["tiles_done"] if file.exists() else 0


class Stop(BaseException):
    """Stands for a kill in tests that need no other process."""


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, before: bool = True) -> None:
    """Let the given call of a function end everything, before or after it did its work."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def stopping(*arguments: Any, **options: Any) -> Any:
        number = next(calls)
        if number == call and before:
            raise Stop
        result = original(*arguments, **options)
        if number == call:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, stopping)


# ---- the numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_same_scores_and_top_k_as_in_memory(tmp_path: Path, suffix: str) -> None:
    influence, (X, y) = make(), points()
    path = tmp_path / f"scores{suffix}"
    written = write_scores(influence, X, y, path, tile=TILE)
    expected = influence.scores(X, y)
    assert written.shape == (TESTS, N)
    assert written.dtype == np.float32
    assert written.convention == expected.convention
    np.testing.assert_allclose(np.asarray(written), expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(written[2:4, 5], np.asarray(written)[2:4, 5])
    np.testing.assert_array_equal(written[-1], np.asarray(written)[-1])
    for which in ("helpful", "harmful"):
        found, direct = written.top_k(9, which=which), influence.top_k(X, y, 9, which=which)
        assert found.indices.equal(direct.indices)
        torch.testing.assert_close(found.values, direct.values, rtol=1e-4, atol=1e-4)
        assert found.which == which
    assert leftovers(path) == [path.name, path.name + ".manifest.json"]
    record = json.loads(manifest_of(path).read_text())
    assert record["complete"]
    assert record["solver"] == "cg"
    assert [solve["converged"] for solve in record["solves"]] == [True] * 4
    assert record["meaning"] == str(expected.convention)


@pytest.mark.parametrize("of", ["logit", "margin", lambda logits, y: logits.square().sum(1)])
@pytest.mark.parametrize("train_gradient", ["loss", "objective"])
def test_other_functionals_and_gradients(tmp_path: Path, of: Any, train_gradient: str) -> None:
    influence, (X, y) = make(train_gradient=train_gradient, solver="exact"), points()
    written = write_scores(influence, X, y, tmp_path / "scores.npy", of=of)
    np.testing.assert_allclose(np.asarray(written), influence.scores(X, y, of=of).numpy(), rtol=1e-4, atol=1e-4)
    assert written.top_k(4).indices.equal(influence.top_k(X, y, 4, of=of).indices)


def test_ties_go_to_the_earlier_row(tmp_path: Path) -> None:
    head = random_head("linear", 2, bias=False)
    X = torch.ones(40, 2, dtype=torch.float64)
    y = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(20)
    influence = Influence(head, X, y)
    written = write_scores(influence, X[:2], y[:2], tmp_path / "scores.npy", tile=(2, 6))
    for which in ("helpful", "harmful"):
        assert written.top_k(25, which=which).indices.equal(influence.top_k(X[:2], y[:2], 25, which=which).indices)
    values = torch.randint(3, (5, 2000)).float()
    for largest in (False, True):
        for k in (1, 700, 2000):
            found, columns = extremes(values, k, largest=largest)
            assert columns.equal(values.argsort(dim=1, descending=largest, stable=True)[:, :k])
            assert found.equal(values.gather(1, columns))


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_any_torch_model(tmp_path: Path, curvature: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2))
    X, y = torch.randn(N, D), torch.randint(2, (N,))
    rows = {"curvature": curvature, "damping": 1.0, "solver": "auto", "max_steps": 50, "microbatch": 16}
    influence = TorchInfluence(model, nn.functional.cross_entropy, (X, y), **rows)
    path = tmp_path / "scores.npy"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, _store_arrays.NpyArray, "write", 12)
        with pytest.raises(Stop):
            write_scores(influence, X[:TESTS], y[:TESTS], path, tile=TILE)
    assert 0 < tiles_done(path) < TILES
    written = write_scores(influence, X[:TESTS], y[:TESTS], path, tile=TILE)
    expected = influence.scores(X[:TESTS], y[:TESTS])
    np.testing.assert_allclose(np.asarray(written), expected.numpy(), rtol=1e-3, atol=1e-5)
    assert written.convention == expected.convention
    changed = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="another model"):
        write_scores(TorchInfluence(changed, nn.functional.cross_entropy, (X, y), **rows), X[:TESTS], y[:TESTS], path)
    with pytest.raises(ValueError, match="of: expected 'loss' for TorchInfluence, got 'logit'"):
        write_scores(influence, X, y, path, of="logit")


# ---- stopped and resumed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "how"), [(".npy", signal.SIGKILL), (".zarr", signal.SIGKILL), (".npy", signal.SIGINT)])
def test_resumed_after_a_signal_to_the_last_bit(tmp_path: Path, suffix: str, how: signal.Signals) -> None:
    path = tmp_path / f"scores{suffix}"
    done = stop_a_child(path, how)
    assert 5 <= done < TILES
    assert not path.exists()
    with pytest.raises(ValueError, match=f"got .* with {done} of {TILES} tiles done; call write_scores again"):
        open_scores(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = write_scores(make(), *points(), path, tile=TILE)
        whole = write_scores(make(), *points(), tmp_path / f"whole{suffix}", tile=TILE)
    finally:
        torch.set_num_threads(threads)
    assert np.asarray(resumed).tobytes() == np.asarray(whole).tobytes()
    assert np.asarray(resumed).any(axis=0).all()


MOMENTS: list[tuple[Any, str, int, bool]] = [
    (_store_manifest.Manifest, "write", 0, True),  # nothing on disk
    (_store_manifest.Manifest, "write", 0, False),  # only the manifest
    (_store_arrays.NpyArray, "create", 1, True),  # solutions without scores
    (_store_arrays.NpyArray, "create", 1, False),  # empty files
    (_store_arrays.NpyArray, "write", 0, False),  # solutions written, not recorded
    (_store_arrays.NpyArray, "write", 1, False),  # a tile written, not recorded
    (_store_arrays.NpyArray, "write", 11, True),  # at the second group
    (store.os, "replace", 0, True),  # while the first manifest is written
    (_store_manifest.Manifest, "write", TILES + 5, True),  # renamed, not recorded
    (_store_manifest.Manifest, "write", TILES + 5, False),  # recorded, solutions still there
]


@pytest.mark.parametrize("moment", range(len(MOMENTS)))
def test_resumed_from_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    owner, name, call, before = MOMENTS[moment]
    path = tmp_path / "scores.npy"
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, call, before=before)
        with pytest.raises(Stop):
            write_scores(make(), *points(), path, tile=TILE)
    assert path.exists() == (call == TILES + 5)
    resumed = write_scores(make(), *points(), path, tile=TILE)
    whole = write_scores(make(), *points(), tmp_path / "whole.npy", tile=TILE)
    assert path.read_bytes() == whole.path.read_bytes()
    assert isinstance(resumed, ScoreStore)
    assert open_scores(path).shape == (TESTS, N)


def half_done(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, _store_arrays.NpyArray, "write", 15)
        with pytest.raises(Stop):
            write_scores(make(**options), *points(), path, tile=TILE)


def test_the_same_solutions_and_solver_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solves that are done are not repeated, and "auto" takes the solver it took before."""
    path = tmp_path / "scores.npy"
    half_done(path, monkeypatch, solver="auto")
    assert json.loads(manifest_of(path).read_text())["solver"] == "exact"
    influence = make(solver="auto")
    solves: list[tuple[int, str]] = []
    original = Influence._solve

    def counting(self: Influence, gradients: Tensor) -> Any:
        solves.append((len(gradients), self._solver))
        return original(self, gradients)

    monkeypatch.setattr(Influence, "_solve", counting)
    monkeypatch.setattr("xai_fast.influence.influence.choose", lambda *_: ("cg", "no memory"))
    write_scores(influence, *points(), path)
    assert solves == [(3, "exact"), (1, "exact")]
    assert influence._solver == "auto"
    again = write_scores(influence, *points(), path)
    assert len(solves) == 2
    assert not again[:].flags.writeable


def test_without_resume_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.npy"
    half_done(path, monkeypatch)
    written = write_scores(make(l2=0.2), *points(), path, resume=False)
    np.testing.assert_allclose(written[:], make(l2=0.2).scores(*points()).numpy(), rtol=1e-4, atol=1e-4)


# ---- refused --------------------------------------------------------------------------------------------------------------


def other_rows() -> Any:
    influence = make()
    X = next(influence.problem.data.spans())[1].clone()
    X[N - 1, 0] += 1e-6
    return Influence(influence.head, X, influence.problem.labels, solver="cg")


def other_labels() -> Any:
    influence = make()
    y = influence.problem.labels.clone()
    y[0] = (y[0] + 1) % 3
    return Influence(influence.head, next(influence.problem.data.spans())[1], y, solver="cg")


DIFFERENCES: dict[str, tuple[Callable[[], Any], str]] = {
    "rows": (other_rows, "another X_train$"),
    "labels": (other_labels, "another y_train$"),
    "weights": (lambda: make(sample_weight=torch.full((N,), 2.0)), "another sample_weight$"),
    "head": (lambda: make(head_seed=7), "another head$"),
    "l2": (lambda: make(l2=0.2), "l2 = 0.2 instead of 0.1$"),
    "damping": (lambda: make(damping=0.5), "damping = 0.5 instead of 0.0$"),
    "solver": (lambda: make(solver="exact"), "solver = exact instead of cg$"),
    "seed": (lambda: make(seed=1), "seed = 1 instead of 0$"),
    "tolerance": (lambda: make(tolerance=1e-3), "tolerance = 0.001 instead of 1e-05$"),
    "train_gradient": (lambda: make(train_gradient="objective"), "train_gradient = objective instead of loss$"),
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("what", DIFFERENCES)
def test_another_problem_is_refused_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, complete: bool
) -> None:
    path = tmp_path / "scores.npy"
    if complete:
        write_scores(make(), *points(), path)
    else:
        half_done(path, monkeypatch)
    before = snapshot(path)
    build, message = DIFFERENCES[what]
    with pytest.raises(ValueError, match=f"expected what the store .* was begun with, got {message}"):
        write_scores(build(), *points(), path)
    assert snapshot(path) == before
    write_scores(make(), *points(), path)


def test_other_test_points_functional_version_and_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (X, y) = tmp_path / "scores.npy", points()
    half_done(path, monkeypatch)
    before = snapshot(path)
    with pytest.raises(ValueError, match="another X_test"):
        write_scores(make(), X * 2, y, path)
    with pytest.raises(ValueError, match="another y_test"):
        write_scores(make(), X, (y + 1) % 3, path)
    with pytest.raises(ValueError, match=r"of = logit instead of loss"):
        write_scores(make(), X, y, path, of="logit")
    with pytest.raises(ValueError, match=r"tile = \(2, 7\) instead of \(3, 7\)"):
        write_scores(make(), X, y, path, tile=(2, 7))
    with monkeypatch.context() as patch:
        patch.setattr("xai_fast.influence._store_source.__version__", "9.9")
        with pytest.raises(ValueError, match=r"^xai_fast: .* got xai_fast = 9.9 instead of "):
            write_scores(make(), X, y, path)
    assert snapshot(path) == before
    # Another budget is no other work: the tiles stay as they are.
    write_scores(make(), X, y, path, memory_budget=1)
    with monkeypatch.context() as patch:
        patch.setattr("xai_fast.influence._store_source.__version__", "9.9")
        assert write_scores(make(), X, y, path).shape == (TESTS, N)


def test_another_function_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.npy"
    write_scores(make(), *points(), path, of=lambda logits, y: logits.log_softmax(1)[:, 0])
    write_scores(make(), *points(), path, of=lambda logits, y: logits.log_softmax(1)[:, 0])
    with pytest.raises(ValueError, match="of = "):
        write_scores(make(), *points(), path, of=lambda logits, y: logits.log_softmax(1)[:, 1])


def test_foreign_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.npy"
    np.save(path, np.zeros(3))
    before = snapshot(path)
    with pytest.raises(
        ValueError, match=r"path: expected no file or a store of scores, got .*scores.npy' without a manifest"
    ):
        write_scores(make(), *points(), path)
    with pytest.raises(ValueError, match="without a manifest beside it"):
        open_scores(path)
    assert snapshot(path) == before
    path.unlink()
    half_done(path, monkeypatch)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match="expected no file until the store is complete"):
        write_scores(make(), *points(), path)
    path.unlink()
    part = path.with_name("scores.npy.part")
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"expected the tiles of the work begun, got no file .*\.part"):
        write_scores(make(), *points(), path)
    (tmp_path / "elsewhere").rename(part)
    write_scores(make(), *points(), path)
    np.save(path, np.zeros(3))
    with pytest.raises(
        ValueError, match=r"expected float32 of shape \(10, 60\), as its manifest says, got float64 of shape"
    ):
        open_scores(path)
    manifest_of(path).write_text("{}")
    with pytest.raises(ValueError, match="expected a manifest of format 1, got format None"):
        open_scores(path)
    manifest_of(path).write_text("not JSON")
    with pytest.raises(ValueError, match="expected a manifest of a store, got something else"):
        write_scores(make(), *points(), path)


def test_a_full_disk_is_seen_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.npy"
    usage = shutil.disk_usage(tmp_path)
    needed = TESTS * 4 * (N + 15)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(ValueError, match=r"path: expected 3e-06 GB of free disk for the scores, got 3e-06 GB"):
            write_scores(make(), *points(), path)
        assert not leftovers(path)
    half_done(path, monkeypatch)
    with monkeypatch.context() as patch:
        # What is reserved already needs no more room.
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        assert write_scores(make(), *points(), path).shape == (TESTS, N)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("scores.txt",), {}, ValueError, r"path: expected a name that ends in .npy or .zarr, got 'scores.txt'"),
        ((3,), {}, TypeError, "path: expected a str or Path, got int"),
        (("nowhere/scores.npy",), {}, ValueError, "path: expected a folder that exists, got .*nowhere"),
        (("scores.npy",), {"tile": 3}, TypeError, "tile: expected .test points, training rows., got 3"),
        (("scores.npy",), {"tile": (0, 3)}, ValueError, "tile: "),
        (("scores.npy",), {"memory_budget": 0}, ValueError, "memory_budget: "),
        (("scores.npy",), {"of": "nothing"}, ValueError, "of: expected 'loss'"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, options: Any, error: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"^{message}"):
        write_scores(make(), *points(), *arguments, **options)
    assert not list(tmp_path.iterdir())


def test_bad_test_points_are_named_by_their_row(tmp_path: Path) -> None:
    X, y = points()
    X[TESTS - 1, 0] = torch.nan
    with pytest.raises(ValueError, match=f"X_test: expected finite numbers, got NaN or infinity in row {TESTS - 1}"):
        write_scores(make(), X, y, tmp_path / "scores.npy", tile=TILE)
    with pytest.raises(ValueError, match="X_test: expected at least one"):
        write_scores(make(), X[:0], y[:0], tmp_path / "scores.npy")
    with pytest.raises(TypeError, match="influence: expected an Influence or TorchInfluence, got Tensor"):
        write_scores(X, X, y, tmp_path / "scores.npy")  # type: ignore[arg-type]


# ---- use ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_read_only(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    write_scores(make(), *points(), path)
    opened = open_scores(str(path))
    with pytest.raises((ValueError, TypeError)):
        opened._array[0, 0] = 1.0
    with pytest.raises(TypeError):
        opened[0, 0] = 1.0  # type: ignore[index]
    assert len(opened) == TESTS
    assert type(opened[0]) is np.ndarray
    assert type(opened[0, 0]) is np.float32
    assert not opened[0].flags.writeable or suffix == ".zarr"
    assert np.asarray(opened, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="k: expected"):
        opened.top_k(N + 1)
    with pytest.raises(ValueError, match="which: expected 'helpful' or 'harmful', got 'best'"):
        opened.top_k(1, which="best")


@pytest.mark.parametrize("budget", [1, 4000, 20_000, 1 << 28])
def test_tiles_keep_to_the_memory_budget(tmp_path: Path, budget: int) -> None:
    influence = make()
    written = write_scores(influence, *points(), tmp_path / "scores.npy", memory_budget=budget)
    tests, rows = written.manifest.tile
    work = 6 * 8 * influence.problem.size * tests + rows * (2 * 4 * tests + 4 * (D + 3))
    assert work <= budget or (tests, rows) == (1, 1)
    assert (tests, rows) == (TESTS, N) or budget < 1 << 28
    np.testing.assert_allclose(written[:], influence.scores(*points()).numpy(), rtol=1e-4, atol=1e-4)


def test_training_rows_in_a_file(tmp_path: Path) -> None:
    influence = make()
    X = next(influence.problem.data.spans())[1]
    np.save(tmp_path / "X.npy", X.numpy())
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    of_file = Influence(influence.head, mapped, influence.problem.labels, solver="cg")
    first = write_scores(influence, *points(), tmp_path / "first.npy", tile=TILE)
    second = write_scores(of_file, *points(), tmp_path / "second.npy", tile=TILE)
    np.testing.assert_allclose(first[:], second[:], rtol=1e-5, atol=1e-7)
    # The same rows, wherever they are: the hash does not depend on how they are read.
    assert first.manifest.identity == second.manifest.identity
    assert write_scores(of_file, *points(), first.path).shape == (TESTS, N)


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scores(make(), *points(), tmp_path / "scores.npy", tile=TILE, progress=True)
    assert f"{TILES}/{TILES}" in capsys.readouterr().err
