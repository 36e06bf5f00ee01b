"""One self-contained HTML page: sections of paragraphs, figures, coloured texts and tables, the images inside the file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import

from .heatmap import to_rgb
from .text import color_legend, colored_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "image_data_uri"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
:root { --ink: #1c2430; --soft: #5a6675; --line: #dfe4ea; --wash: #f5f7f9; --mark: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; line-height: 1.55;
       font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 3rem 0 .6rem; padding-top: 1.4rem;
     border-top: 1px solid var(--line); }
p, li { max-width: 46rem; margin: 0 0 .9rem; }
.lead { font-size: 1.15rem; color: var(--soft); }
.note { padding: .8rem 1rem; background: #fff7e6; border-left: 4px solid #d98e04; }
.figures { display: grid; gap: 1.1rem; margin: 1.2rem 0;
           grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell, 230px)), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--wash); }
figcaption { font-size: .84rem; line-height: 1.4; color: var(--soft); margin-top: .45rem; }
figcaption strong { display: block; color: var(--ink); font-size: .95rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .5rem; }
th, td { padding: .5rem 1.1rem .5rem 0; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--ink); }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 16rem; }
.texts th, .texts td { text-align: left; white-space: normal; vertical-align: top; }
.texts th:first-child, .texts td:first-child { min-width: 0; width: 15rem; }
.texts td { padding: .55rem 1.6rem .55rem 0; line-height: 1.75; }
.texts td:first-child { line-height: 1.4; }
.texts { width: 100%; table-layout: fixed; }
.colored-text { white-space: pre-wrap; }
.colored-text > span[title] { padding: .18em 0; border-radius: 2px; }
nav { margin-top: .8rem; font-size: .95rem; }
nav a { color: var(--mark); margin-right: 1.2rem; }
.facts td { text-align: left; white-space: normal; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
         font-size: .85rem; }
@media print { main { max-width: none; padding: 0; } .figures, table { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ report.title }}</h1>
{% if report.lead %}<p class="lead">{{ report.lead }}</p>{% endif %}
{% if report.links %}
<nav>{% for name, target in report.links %}<a href="{{ target }}">{{ name }}</a>{% endfor %}</nav>
{% endif %}
</header>
{% for section in report.sections %}
<section>
<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{% if part.kind == "paragraph" %}
<p>{{ part.text }}</p>
{% elif part.kind == "note" %}
<p class="note">{{ part.text }}</p>
{% elif part.kind == "figures" %}
<div class="figures" style="--cell: {{ part.cell }}px">
{% for figure in part.figures %}
<figure><img src="{{ figure.source }}" alt="{{ figure.title or figure.caption }}">
<figcaption>
{% if figure.title %}<strong>{{ figure.title }}</strong>{% endif %}
{{ figure.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% elif part.kind == "texts" %}
<div class="scroll"><table class="texts">
<thead><tr>{% for name in part.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in part.texts %}
<tr><td><strong>{{ row.title }}</strong><br>{{ row.legend | safe }}</td>
{% for cell in row.cells %}<td>{{ cell | safe }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% elif part.kind == "table" %}
<div class="scroll"><table{% if not part.header %} class="facts"{% endif %}>
{% if part.caption %}<caption>{{ part.caption }}</caption>{% endif %}
{% if part.header %}
<thead><tr>{% for name in part.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
{% endif %}
<tbody>
{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% endfor %}
</section>
{% endfor %}
{% if report.footer %}<footer>{{ report.footer }}</footer>{% endif %}
</main>
</body>
</html>
"""


def image_data_uri(picture: Tensor | np.ndarray | Figure, *, format: str = "png", dpi: int = 120) -> str:
    """A picture as the ``src`` of an HTML image.

    Parameters
    ----------
    picture : array or matplotlib Figure
        Arrays as `to_rgb` takes them.
    format : {"png", "jpeg"}
        JPEG (quality 90, full colour resolution) makes photos about four times smaller; PNG is exact.
    dpi : int
        Resolution of a Figure.

    Returns
    -------
    str
        ``data:image/png;base64,...``

    Examples
    --------
    >>> image_data_uri(np.zeros((2, 2, 3), dtype=np.uint8))[:22]
    'data:image/png;base64,'
    """
    if format not in ("png", "jpeg"):
        raise ValueError(f"format: expected 'png' or 'jpeg', got {format!r}")
    buffer = io.BytesIO()
    if isinstance(picture, (Tensor, np.ndarray)):
        image = optional_import("PIL.Image", "demo").fromarray(to_rgb(picture))
        quality = {"optimize": True} if format == "png" else {"quality": 90, "subsampling": 0}
        image.save(buffer, format=format, **quality)
    else:
        picture.savefig(buffer, format=format, dpi=dpi)
    return f"data:image/{format};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class _Part:
    """One block of a section; `kind` chooses the template's branch."""

    kind: str
    text: str = ""
    caption: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figures: tuple[dict[str, str], ...] = ()
    texts: tuple[_TextRow, ...] = ()
    cell: int = 230


@dataclass(frozen=True)
class _TextRow:
    """A row of coloured texts; legend and cells are HTML that is already escaped."""

    title: str
    legend: str
    cells: tuple[str, ...]


@dataclass
class _Section:
    title: str
    parts: list[_Part] = field(default_factory=list)


@dataclass
class Report:
    """A page built from top to bottom. All text is escaped; every method returns the report.

    Parameters
    ----------
    title : str
    lead : str
        The sentence under the title.
    footer : str
    links : sequence of (str, str)
        Name and address of other pages, shown under the title.

    Examples
    --------
    >>> report = Report("Rollout", lead="What a photo's CLS token sees.")
    >>> page = report.section("Cat").paragraph("N < 1000").table(["method", "ms"], [["ours", 1.5]]).html()
    >>> "N &lt; 1000" in page
    True
    """

    title: str
    lead: str = ""
    footer: str = ""
    links: Sequence[tuple[str, str]] = ()
    sections: list[_Section] = field(default_factory=list)

    def section(self, title: str) -> Report:
        """Begin a section; what follows goes into it."""
        self.sections.append(_Section(title))
        return self

    def paragraph(self, text: str) -> Report:
        """Add a paragraph."""
        return self._add(_Part("paragraph", text=text))

    def note(self, text: str) -> Report:
        """Add a highlighted paragraph, for what the reader must not miss."""
        return self._add(_Part("note", text=text))

    def figures(
        self,
        figures: Iterable[tuple[Tensor | np.ndarray | Figure, str, str]],
        *,
        cell: int = 230,
        format: str = "png",
    ) -> Report:
        """Add a responsive grid of pictures.

        Parameters
        ----------
        figures : iterable of (picture, title, caption)
            Pictures as `image_data_uri` takes them.
        cell : int
            Least width of a picture in pixels; as many stand side by side as the window holds.
        format : {"png", "jpeg"}
            See `image_data_uri`.
        """
        embedded = tuple(
            {"source": image_data_uri(picture, format=format), "title": title, "caption": caption}
            for picture, title, caption in figures
        )
        return self._add(_Part("figures", figures=embedded, cell=cell))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> Report:
        """Add a table; the first column is aligned left, the others right.

        Parameters
        ----------
        header : sequence of str
            Empty for a list of facts: no header, all text aligned left.
        rows : iterable of sequences
            Cells are shown by ``str``; each row has the header's length.
        caption : str
        """
        cells = tuple(tuple(str(cell) for cell in row) for row in rows)
        for row in cells:
            if header and len(row) != len(header):
                raise ValueError(f"rows: expected {len(header)} cells as in the header, got {len(row)}: {row}")
        return self._add(_Part("table", caption=caption, header=tuple(header), rows=cells))

    def texts(
        self,
        header: Sequence[str],
        tokens: Sequence[str],
        rows: Iterable[tuple[str, bool, Sequence[Tensor | np.ndarray | Sequence[float]]]],
        *,
        ignore: Sequence[int] = (),
    ) -> Report:
        """Add the same text coloured in several ways, as a table; the cells of a row share their scale.

        Parameters
        ----------
        header : sequence of 1 + C str
        tokens : sequence of N str
            As `colored_text` takes them.
        rows : iterable of (title, signed, C weights of N numbers)
            See `colored_text`.
        ignore : sequence of int
            Places of tokens that shall not stretch the scales.

        Examples
        --------
        >>> page = Report("Words").section("A").texts(("", "yes"), ["a", " b"], [("gradient", True, [[0.5, -1.0]])])
        >>> 'title="b: -1"' in page.html()
        True
        """
        built = []
        for title, signed, cells in rows:
            if len(cells) != len(header) - 1:
                raise ValueError(f"rows: expected {len(header) - 1} texts as in the header, got {len(cells)} for {title!r}")
            limit = _scale(cells, ignore)
            texts = tuple(colored_text(tokens, weights, signed=signed, limit=limit, legend=False) for weights in cells)
            built.append(_TextRow(title, color_legend(limit, signed=signed), texts))
        return self._add(_Part("texts", header=tuple(header), texts=tuple(built)))

    def sentences(
        self,
        header: Sequence[str],
        rows: Iterable[tuple[str, str, Sequence[str], Sequence[tuple[Tensor | np.ndarray | Sequence[float], bool]]]],
    ) -> Report:
        """Add different texts, each coloured in several ways, as a table; every cell has a scale of its own.

        Parameters
        ----------
        header : sequence of 1 + C str
        rows : iterable of (title, note, N tokens, C pairs of N weights and whether they are signed)
            Tokens and weights as `colored_text` takes them; the note stands under the title.

        Raises
        ------
        ValueError
            Rows that do not have as many texts as the header; else as `colored_text`.

        Examples
        --------
        >>> rows = [("praise", "people: praise", ["So", " good"], [([0.1, 0.9], False), ([-0.1, 0.4], True)])]
        >>> page = Report("Words").section("A").sentences(("", "plain", "signed"), rows)
        >>> 'title="good: 0.9"' in page.html() and 'title="good: +0.4"' in page.html()
        True
        """
        built = []
        for title, note, tokens, cells in rows:
            if len(cells) != len(header) - 1:
                raise ValueError(f"rows: expected {len(header) - 1} texts as in the header, got {len(cells)} for {title!r}")
            texts = tuple(_text_with_scale(tokens, weights, signed) for weights, signed in cells)
            built.append(_TextRow(title, escape(note), texts))
        return self._add(_Part("texts", header=tuple(header), texts=tuple(built)))

    def html(self) -> str:
        """Render the page."""
        jinja2 = optional_import("jinja2", "demo")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return str(environment.from_string(PAGE).render(report=self))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to `path`, creating its folder, and return the absolute path.

        The file appears under its name only when complete.
        """
        target = Path(path).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        page = self.html()
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            part.write_text(page, encoding="utf-8")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def _add(self, part: _Part) -> Report:
        if not self.sections:
            raise ValueError("section: expected section(title) before its contents, got none")
        self.sections[-1].parts.append(part)
        return self


def _text_with_scale(tokens: Sequence[str], weights: Tensor | np.ndarray | Sequence[float], signed: bool) -> str:
    """A coloured text, and under it its scale."""
    limit = _scale([weights], ())
    return (
        f"{colored_text(tokens, weights, signed=signed, limit=limit, legend=False)}<br>{color_legend(limit, signed=signed)}"
    )


def _scale(cells: Sequence[Tensor | np.ndarray | Sequence[float]], ignore: Sequence[int]) -> float:
    """The largest absolute weight of all cells, without the ignored places unless they are all there is."""
    values = torch.stack([torch.as_tensor(weights).detach().double().cpu().abs() for weights in cells])
    kept = [index for index in range(values.shape[1]) if index not in set(ignore)]
    chosen = values[:, kept] if kept else values
    return float(chosen.max()) if chosen.numel() else 0.0
