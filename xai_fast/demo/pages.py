"""What all pages of the demo share: their head, sections of text, parts that may be left out, and the versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from xai_fast import show_config
from xai_fast.viz import Report

__all__ = ["add_part", "add_text", "add_versions", "new_page"]

T = TypeVar("T")


def new_page(title: str, lead: str, links: Sequence[tuple[str, str]]) -> Report:
    """A page of the demo; `links` lead to the others."""
    return Report(title=title, lead=lead, footer="Made by python -m xai_fast demo.", links=links)


def add_text(report: Report, title: str, paragraphs: Iterable[str]) -> None:
    """A section of paragraphs."""
    report.section(title)
    for paragraph in paragraphs:
        report.paragraph(paragraph)


def add_part(report: Report, part: T | str, add: Callable[[Report, T], None]) -> None:
    """What `add` makes of a part; of a str, which is the reason why there is none, a note.

    Examples
    --------
    >>> page = new_page("Title", "Lead", []).section("Data")
    >>> add_part(page, "no network", lambda report, part: None)
    >>> "Left out: no network." in page.html()
    True
    """
    if isinstance(part, str):
        report.note(f"Left out: {part}.")
    else:
        add(report, part)


def add_versions(report: Report) -> None:
    """The last section of every page: what it was made with."""
    found = [(name, value) for name, value in show_config("dict").items() if value is not None]
    report.section("Versions").table((), found)
