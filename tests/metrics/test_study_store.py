"""Studies on the disk: kill -9 and Ctrl-C, nothing computed twice, and refusal of another study's folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.metrics.models import classifier
from tests.metrics.studied import B, C, F, data, explainers, gradient, noise, same, study, trained
from xai_fast.metrics import _study_store
from xai_fast.metrics.conciseness import conciseness
from xai_fast.metrics.study import Seeded, Study, StudyContext, run_study

LIMIT = 120

# A job in the background of a script would otherwise ignore SIGINT, and so would its children.
CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys, time
from tests.metrics import studied
from xai_fast.metrics import _study_store
write = _study_store.Folder.write
def slowly(*arguments):
    time.sleep(0.05)
    write(*arguments)
_study_store.Folder.write = slowly
studied.study(path=sys.argv[1])
"""


def parts(path: Path) -> list[str]:
    return sorted(p.name for p in path.glob("*.npz")) if path.exists() else []


def stop_a_child(path: Path, how: signal.Signals, after: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], env=environment, stderr=subprocess.PIPE) as child:
        try:
            end = time.monotonic() + LIMIT
            while len(parts(path)) < after:
                assert child.poll() is None, child.stderr and child.stderr.read().decode()
                assert time.monotonic() < end, "the child did nothing"
                time.sleep(0.005)
            child.send_signal(how)
            child.wait(LIMIT)
        finally:
            child.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_resumed_after_a_signal_to_the_last_bit(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "study"
    stop_a_child(path, how, 9)
    done = parts(path)
    assert 9 <= len(done) < 46
    times = {name: (path / name).stat().st_mtime_ns for name in done}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = study(path=path)
        assert same(resumed, study(path=tmp_path / "whole"))
        assert same(resumed, study())
    finally:
        torch.set_num_threads(threads)
    assert {name: (path / name).stat().st_mtime_ns for name in done} == times  # what was done stayed
    assert parts(path) == parts(tmp_path / "whole")
    assert not list(path.glob("*.part"))


class Stop(BaseException):
    """Stands for a kill in tests that need no other process."""


def test_stopped_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"explainers": {"noise": noise, "trained": Seeded(trained)}, "measures": ["deletion", "stability"]}
    whole = study(**options)
    calls = {"left": 0}
    replace_file = os.replace

    def stopping(*arguments: Any) -> None:
        if calls["left"] == 0:
            raise Stop
        calls["left"] -= 1
        replace_file(*arguments)

    total = 2 + 2 * (2 * 2 + 1)  # manifest, outputs, parts
    for left in range(total):
        path = tmp_path / str(left)
        with monkeypatch.context() as patch:
            patch.setattr(_study_store.os, "replace", stopping)
            calls["left"] = left
            with pytest.raises(Stop):
                study(path=path, **options)
        assert len(list(path.glob("*.part"))) == 1
        assert same(study(path=path, **options), whole)
        assert not list(path.glob("*.part"))
    assert len(parts(tmp_path / "0")) == total - 1


def test_nothing_is_computed_twice_and_more_can_be_added(tmp_path: Path) -> None:
    forward, x, labels = data()
    calls = []

    def watched(inputs: Tensor, target: Tensor) -> Tensor:
        calls.append(len(inputs))
        return gradient(inputs, target)

    def run(**options: Any) -> Study:
        methods = {"watched": watched, **options.pop("more", {})}
        options = {"measures": ["deletion", "sensitivity"], "path": tmp_path / "s", **options}
        return run_study(methods, forward, x, labels, **options)

    first = run()
    count = len(calls)
    again = run(batch_size=2)
    assert len(calls) == count
    assert same(first, again)
    assert (again.evaluations, again.seconds) == (first.evaluations, first.seconds)
    added = run(measures=["deletion", "sensitivity", "conciseness"], more={"noise": noise})
    assert len(calls) == count  # their maps are on the disk
    assert torch.equal(added.per_sample("watched", "deletion_area"), first.per_sample("watched", "deletion_area"))
    assert not added.per_sample("watched", "gini").isnan().any()
    more = run(seeds=(0, 1))
    assert len(calls) > count
    assert torch.equal(more.values["watched", 0, "deletion_area"], first.values["watched", 0, "deletion_area"])


def test_failed_parts_are_tried_again(tmp_path: Path) -> None:
    state = {"broken": True}

    def own(context: StudyContext) -> Tensor:
        if state["broken"]:
            raise OSError("no route")
        return torch.ones(B)

    with pytest.warns(UserWarning, match="no route"):
        assert len(study(measures={"own": own}, path=tmp_path / "s").notes) == 6
    state["broken"] = False
    assert torch.equal(study(measures={"own": own}, path=tmp_path / "s").per_sample("noise", "own"), torch.ones(B).double())


def other_gradient(inputs: Tensor, target: Tensor) -> Tensor:
    return 2 * gradient(inputs, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": (0.5,)}, r"sparsity = \[0.5\] instead of \[0.25, 0.75\]"),
        ({"seed": 6}, "seed = 6 instead of 5"),
        ({"baseline": 1.0}, "another baseline"),
        ({"baseline": torch.ones(F, dtype=torch.float64)}, "another baseline"),
        ({"masks": torch.ones(B, F)}, "another masks"),
        ({"target": 1}, "another target"),
        ({"explainers": {"gradient": other_gradient}}, "another explainer 'gradient'"),
        ({"explainers": {"trained": Seeded(lambda seed: trained(seed + 1))}}, "another explainer 'trained'"),
        ({"measures": {"deletion": {"steps": 3}}}, "another options of the measure 'deletion'"),
    ],
)
def test_another_study_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "s"
    study(path=path, measures=["deletion"])
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(ValueError, match=f"path: expected what the study .* was begun with, got .*{message}") as caught:
        study(**{"path": path, "measures": ["deletion"], **change})
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_other_data_and_models_are_refused(tmp_path: Path) -> None:
    forward, x, labels = data()
    run_study(explainers(), forward, x, labels, path=tmp_path / "s", measures=["deletion"])
    moved = x.clone()
    moved[3, 2] += 1e-6
    for other_x, other_labels, name in ((moved, labels, "inputs"), (x, (labels + 1) % C, "labels")):
        with pytest.raises(ValueError, match=f"another {name}"):
            run_study(explainers(), forward, other_x, other_labels, path=tmp_path / "s", measures=["deletion"])
    with pytest.raises(ValueError, match=r"forward: expected the model that the study .* was begun with"):
        run_study(explainers(), classifier(F, C, seed=2), x, labels, path=tmp_path / "s", measures=["deletion"])


def test_lost_attributions_must_come_again(tmp_path: Path) -> None:
    path, forward, (_, x, _) = tmp_path / "s", data()[0], data()
    state = {"factor": 1.0}

    def explain(inputs: Tensor) -> Tensor:
        return inputs * state["factor"] + inputs.flip(1)

    def run() -> Study:
        return run_study({"a": explain}, forward, x, path=path, measures=["deletion"])

    first = run()
    for file in path.glob("a-0-attributions.*"):
        file.unlink()
    assert same(run(), first)
    for file in path.glob("a-0-attributions.*"):
        file.unlink()
    state["factor"] = 2.0  # in a dict that the description does not look into
    with pytest.raises(ValueError, match=r"explainers\['a'\]: expected the attributions that 'deletion' in .*, got others"):
        run()


def test_foreign_folders_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="path: expected a new or empty folder or that of a study"):
        study(path=tmp_path)
    path = tmp_path / "s"
    study(path=path, measures=["deletion"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["identity"]["seed"] == 5
    file = next(path.glob("gradient-0-deletion.*"))
    file.write_bytes(b"PK broken")
    with pytest.raises(ValueError, match="path: expected a part of a study, got something else in"):
        study(path=path, measures=["deletion"])
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(ValueError, match="path: expected a study of format 1, got format 9"):
        study(path=path, measures=["deletion"])
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="path: expected the manifest of a study"):
        study(path=path, measures=["deletion"])


def test_sixteen_bit_maps_survive_the_disk(tmp_path: Path) -> None:
    forward, x, _ = data()
    methods = {"half": lambda inputs: inputs.to(torch.bfloat16)}
    run_study(methods, forward, x, path=tmp_path / "s", measures=["deletion"])
    found = run_study(methods, forward, x, path=tmp_path / "s", measures=["deletion", "conciseness"])
    torch.testing.assert_close(found.per_sample("half", "gini"), conciseness(x.to(torch.bfloat16)).gini.double())
