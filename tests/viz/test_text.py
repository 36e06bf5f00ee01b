"""Coloured text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from xai_fast.viz import Report, color_legend, colored_text, readable_tokens
from xai_fast.viz.text import AGAINST, FOR, MORE

COLOR = re.compile(r'style="background:rgb\((\d+),(\d+),(\d+)\)"')


class _Reader(HTMLParser):
    """Collects text and titles."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


def _read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    return reader


def _colors(html: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, found)) for found in COLOR.findall(html)]


def test_signed_colors_are_symmetric_about_white() -> None:
    html = colored_text(["a", " b", " c", " d"], torch.tensor([2.0, -2.0, 0.0, 1.0]), legend=False)
    colors = _colors(html)
    assert colors[:3] == [FOR, AGAINST, (255, 255, 255)]
    assert all(min(255, end) < half < 255 for end, half in zip(FOR, colors[3], strict=True))


def test_unsigned_ends_in_another_color() -> None:
    assert _colors(colored_text(["a", "b"], np.array([0.0, 3.0]), signed=False, legend=False)) == [(255, 255, 255), MORE]


def test_limit_clips_and_titles_keep_the_value() -> None:
    html = colored_text(["a", "b"], [5.0, 1.0], limit=1.0, legend=False)
    assert _colors(html) == [FOR, FOR]
    assert _read(html).titles == ["a: +5", "b: +1"]


def test_everything_is_escaped() -> None:
    tokens = ["<script>", ' "quoted"', " a&b", "'"]
    html = colored_text(tokens, [1.0, -1.0, 0.5, 0.0], legend=False)
    reader = _read(html)
    assert reader.text == "".join(tokens)
    assert reader.titles == ["<script>: +1", '"quoted": -1', "a&b: +0.5", "': 0"]
    assert "<script>" not in html


def test_legend_names_both_ends() -> None:
    assert _read(colored_text(["a"], [-0.25])).text == "a against \u22120.25for +0.25"
    assert _read(color_legend(3.0, signed=False)).text == "03"


def test_zeros_and_nothing() -> None:
    assert _colors(colored_text(["a"], [0.0])) == [(255, 255, 255)]
    assert _read(colored_text([], [], legend=False)).text == ""


@pytest.mark.parametrize("end", [FOR, AGAINST, MORE])
def test_dark_ink_is_readable_on_the_full_colors(end: tuple[int, int, int]) -> None:
    def luminance(color: tuple[int, ...]) -> float:
        linear = [(c / 255 + 0.055) ** 2.4 / 1.055**2.4 if c > 10 else c / 255 / 12.92 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = (0x1C, 0x24, 0x30)
    assert (luminance(end) + 0.05) / (luminance(ink) + 0.05) > 4.5


def test_errors_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^weights: expected 2, one for each token, got 1$"):
        colored_text(["a", "b"], [1.0])
    with pytest.raises(ValueError, match=r"^weights: expected one dimension, got shape \(1, 2\)$"):
        colored_text(["a", "b"], torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^weights: expected finite values, got NaN or inf$"):
        colored_text(["a"], [float("nan")])
    with pytest.raises(ValueError, match=r"^weights: expected at least 0 where signed is False, got -1$"):
        colored_text(["a"], [-1.0], signed=False)
    with pytest.raises(ValueError, match=r"^limit: expected a finite number of at least 0, got -2"):
        colored_text(["a"], [1.0], limit=-2)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (
            ["[CLS]", "my", "lug", "##gage", "is", "lost", ",", "right", "?", "[SEP]"],
            "[CLS] my luggage is lost, right? [SEP]",
        ),
        (["i", "don", "'", "t", "know"], "i don't know"),
        (["The", "▁Mock", "▁T", "urtle", ",”", "▁said"], "The Mock Turtle,” said"),
        (["Hello", "Ġworld"], "Hello world"),
        (["▁a", "\n", "▁b"], " a⏎ b"),
        ([], ""),
    ],
)
def test_readable_tokens(tokens: list[str], text: str) -> None:
    pieces = readable_tokens(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


def test_report_shares_the_scale_of_a_row() -> None:
    pytest.importorskip("jinja2")
    rows = [("signed", True, [[1.0, 9.0], [-4.0, 0.0]]), ("plain", False, [[0.0, 2.0], [1.0, 1.0]])]
    html = Report("t").section("s").texts(("", "yes", "no <b>"), ["a&", " b"], rows, ignore=[1]).html()
    assert "no &lt;b&gt;" in html
    assert "a&amp;" in html
    assert "for +4<" in html
    assert _colors(html)[1] == FOR  # beyond the scale: its place is ignored
    assert _colors(html)[2] == AGAINST
    with pytest.raises(ValueError, match="rows: expected 1 texts as in the header, got 2 for 'signed'"):
        Report("t").section("s").texts(("", "yes"), ["a", "b"], rows)


def test_report_links() -> None:
    pytest.importorskip("jinja2")
    html = Report("t", links=[("A & B", "other.html")]).html()
    assert '<a href="other.html">A &amp; B</a>' in html
    assert "<nav>" not in Report("t").html()
