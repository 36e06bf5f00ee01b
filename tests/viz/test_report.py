"""The HTML report."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from xai_fast.viz import Report, image_data_uri, plot_heatmaps

pytest.importorskip("jinja2")
image_module = pytest.importorskip("PIL.Image")

VOID = {"meta", "img", "br"}


class _Balance(HTMLParser):
    """Collects tags and fails on one that closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _report() -> Report:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    return (
        Report("A <title>", lead="lead", footer="the end")
        .section("One & only")
        .paragraph("a < b")
        .note("look here")
        .figures([(picture, "name", "caption"), (picture, "", "no title")], format="png")
        .table(("method", "ms"), [("ours", 1.5), ("theirs", None)], caption="times")
        .table((), [("torch", "2")])
    )


def test_page_is_complete_and_escaped() -> None:
    html = _report().html()
    parser = _Balance()
    parser.feed(html)
    assert not parser.open
    counts = {tag: parser.seen.count(tag) for tag in ("section", "img", "table", "th", "td", "footer")}
    assert counts == {"section": 1, "img": 2, "table": 2, "th": 2, "td": 6, "footer": 1}
    assert "a &lt; b" in html
    assert "A &lt;title&gt;" in html
    assert "One &amp; only" in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # self-contained


def test_images_survive() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    header, data = image_data_uri(picture).split(",")
    assert header == "data:image/png;base64"
    assert np.array_equal(np.asarray(image_module.open(io.BytesIO(base64.b64decode(data)))), picture)
    header, data = image_data_uri(picture, format="jpeg").split(",")
    assert header == "data:image/jpeg;base64"
    assert image_module.open(io.BytesIO(base64.b64decode(data))).size == (6, 5)
    with pytest.raises(ValueError, match="format: expected 'png' or 'jpeg', got 'gif'"):
        image_data_uri(picture, format="gif")


def test_matplotlib_figure_is_embedded() -> None:
    figure = plot_heatmaps([np.zeros((4, 4), np.uint8)], {"map": np.zeros((1, 2, 2))})
    assert image_data_uri(figure).startswith("data:image/png;base64,")


def test_write_is_absolute_and_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _report().write("out/page.html")
    assert path == tmp_path / "out" / "page.html"
    assert list((tmp_path / "out").iterdir()) == [path]


def test_misuse() -> None:
    with pytest.raises(ValueError, match="section: expected"):
        Report("t").paragraph("text")
    with pytest.raises(ValueError, match="rows: expected 2 cells as in the header, got 1"):
        Report("t").section("s").table(("a", "b"), [("x",)])


def test_sentences_have_their_own_scales() -> None:
    rows = [
        ("one", "note <1>", ["a", " b"], [([0.2, 0.8], False), ([-0.1, 0.4], True)]),
        ("two", "", ["<c>"], [([0.1], False), ([-2.0], True)]),
    ]
    html = Report("A").section("B").sentences(("", "plain", "signed"), rows).html()
    parser = _Balance()
    parser.feed(html)
    assert not parser.open
    assert "note &lt;1&gt;" in html
    assert 'title="&lt;c&gt;: -2"' in html
    assert html.count("color-legend") == 4
    assert "against &minus;0.4" in html
    assert "against &minus;2" in html
    with pytest.raises(ValueError, match="rows: expected 1 texts as in the header, got 2 for 'one'"):
        Report("A").section("B").sentences(("", "plain"), rows[:1])
