"""Forms that ask people about explanations: one HTML file per participant, no server.

The page never holds what it must not tell: right answers, methods and models stand in the manifest alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from xai_fast._version import __version__
from xai_fast.ops._checks import check_count, check_iterable, check_seed

from ._gallery import Gallery
from ._page import render
from .questions import SCALE, AttentionCheck, ClassQuestion, ColoredText, Question, TrustQuestion, check_text

__all__ = ["COLUMNS", "FORMAT", "Form", "build_form"]

FORMAT = "xai_fast human study 1"
COLUMNS = ("study", "participant", "version", "question", "kind", "answer", "response_time_ms", "position")


@dataclass(frozen=True, eq=False)
class Form:
    """A study ready to be written: `build_form` makes it.

    Attributes
    ----------
    manifest : dict
        What the scorer needs, ready for JSON: questions with right answers, methods and models, and what each version shows.
    n_versions : int

    Examples
    --------
    >>> question = ClassQuestion(ColoredText(["a", " cat"], [0, 1]), ("cat", "dog"), answer="cat")
    >>> form = build_form([question], title="Study", introduction="Welcome.", n_versions=2)
    >>> [path.name for path in form.write("study")]
    ['version-01.html', 'version-02.html', 'manifest.json']
    """

    manifest: dict[str, Any]
    _versions: tuple[dict[str, Any], ...] = field(repr=False)

    @property
    def n_versions(self) -> int:
        return len(self._versions)

    def html(self, version: int = 1) -> str:
        """The page of one version, counted from 1."""
        return render(self._versions[check_count(version, "version", 1, self.n_versions) - 1])

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``version-01.html`` and so on, and ``manifest.json``, and return their absolute paths.

        Each file appears under its name only when complete. Hand out the pages, keep the manifest: it has the answers.
        """
        target = Path(folder).absolute()
        target.mkdir(parents=True, exist_ok=True)
        paths = []
        for shown in self.manifest["versions"]:
            paths.append(target / shown["file"])
            _write_whole(paths[-1], self.html(shown["version"]))
        paths.append(target / "manifest.json")
        _write_whole(paths[-1], json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")
        return paths


def build_form(
    questions: Iterable[Question],
    *,
    title: str,
    introduction: str,
    consent: str | None = None,
    seed: int = 0,
    checks: Iterable[AttentionCheck] = (),
    n_versions: int = 1,
    submit_url: str | None = None,
    submit_field: str = "answers",
    image_format: str = "png",
) -> Form:
    """Make the forms of a study: every version asks every question, in its own order.

    Parameters
    ----------
    questions : iterable of ClassQuestion and TrustQuestion
    title : str
    introduction : str
        Shown first; an empty line begins a new paragraph.
    consent : str, optional
        Text to agree to before the first question.
    seed : int
        Orders questions, options and sides. The same seed gives the same files.
    checks : iterable of AttentionCheck
        Mixed in, spread over the form.
    n_versions : int
        How many forms to make, for example one for each participant. Sides and options of versions 1 and 2, 3 and 4, ...
        mirror each other, so that an even number of versions shows both equally often.
    submit_url : str, optional
        Where the last page posts the answers to, for a crowd-work platform: an http(s) address, or a path that begins with
        a single "/", without whitespace and control characters. Default: nothing is sent; the participant downloads or
        copies the answers.
    submit_field : str
        Name of the hidden form field that carries the answers as CSV.
    image_format : {"png", "jpeg"}
        JPEG makes the files of large photos about four times smaller.

    Returns
    -------
    Form

    Raises
    ------
    ValueError, TypeError
        No questions, ids used twice, pictures that are none, another `submit_url`.
    OSError
        A path at which there is no readable picture.

    Notes
    -----
    Each page is a single file that loads nothing, so it works from a disk and inside a frame. It takes the participant's
    name from its own address (``?participant=``, ``?workerId=`` or ``?PROLIFIC_PID=``) or asks for a code. Answers survive a
    reload where the browser allows it. Response times count only while the page is visible. In each version, half of the
    questions show their options or sides in the order given, half exchanged.

    Sources: Selvaraju et al. 2017 (Grad-CAM), section 5, for both questions; Kim et al. 2022, "HIVE: Evaluating the Human
    Interpretability of Visual Explanations", for forms whose right answer is known and that compare methods.

    Pictures need Pillow (the extra ``xai_fast[demo]``); coloured text needs nothing.

    Examples
    --------
    >>> question = ClassQuestion(ColoredText(["a", " cat"], [0, 1]), ("cat", "dog"), answer="cat", method="gradient")
    >>> check = AttentionCheck("Please choose B.", ("A", "B"), answer="B")
    >>> form = build_form([question], title="Study", introduction="Welcome.", checks=[check], seed=3)
    >>> [shown["question"] for shown in form.manifest["versions"][0]["order"]]
    ['class-1', 'check-1']
    """
    texts = {"title": title, "introduction": introduction, "submit_field": submit_field}
    for name, text in (texts if consent is None else {**texts, "consent": consent}).items():
        check_text(text, name)
    seed = check_seed(seed)
    n_versions = check_count(n_versions, "n_versions")
    _check_submit_url(submit_url)
    if image_format not in ("png", "jpeg"):
        raise ValueError(f"image_format: expected 'png' or 'jpeg', got {image_format!r}")
    asked, checked = _named(questions, checks)

    gallery = Gallery(image_format)
    items: dict[str, _Item] = {**asked, **checked}
    bodies = {name: _page_question(item, name, gallery) for name, item in items.items()}
    for body, key in zip(bodies.values(), _keys(len(items), seed), strict=True):
        body["key"] = key
    plans = [_plan(asked, checked, seed, version) for version in range(n_versions)]
    common = {
        "title": title,
        "introduction": _paragraphs(introduction),
        "consent": _paragraphs(consent or ""),
        "submit": {"url": submit_url, "field": submit_field} if submit_url else None,
        "columns": COLUMNS,
        "pictures": gallery.pictures,
    }
    versions = [{**common, "version": number, "questions": _arrange(bodies, plan)} for number, plan in enumerate(plans, 1)]
    study = _digest([common, *(version["questions"] for version in versions)])
    manifest = {
        "format": FORMAT,
        "package": f"xai_fast {__version__}",
        "study": study,
        "title": title,
        "seed": seed,
        "questions": [_manifest_question(item, name, bodies[name]["key"]) for name, item in items.items()],
        "versions": [_manifest_version(items, plan, number, n_versions) for number, plan in enumerate(plans, 1)],
    }
    return Form(manifest, tuple({**version, "study": study} for version in versions))


# One version's plan: names in order of appearance, each with the places of its options or sides, such as (1, 0).
_Plan: TypeAlias = list[tuple[str, tuple[int, ...]]]
_Item: TypeAlias = ClassQuestion | TrustQuestion | AttentionCheck


def _plan(asked: Mapping[str, Question], checked: Mapping[str, AttentionCheck], seed: int, version: int) -> _Plan:
    """Order of questions and of their options. Versions 2k and 2k + 1 share the draw of the options, mirrored."""
    order_rng = random.Random(f"{seed}/order/{version}")
    order = _spread(_shuffled(list(asked), order_rng), _shuffled(list(checked), order_rng), order_rng)
    rng = random.Random(f"{seed}/options/{version // 2}")
    coins = _shuffled([index % 2 for index in range(len(asked))], rng)
    places: dict[str, tuple[int, ...]] = {name: (coin, 1 - coin) for name, coin in zip(asked, coins, strict=True)}
    places |= {name: tuple(_shuffled(list(range(len(check.options))), rng)) for name, check in checked.items()}
    return [(name, places[name][::-1] if version % 2 else places[name]) for name in order]


def _spread(questions: list[str], checks: list[str], rng: random.Random) -> list[str]:
    """Put each check at random into its own stretch of the questions, never first."""
    order = list(questions)
    for index in reversed(range(len(checks))):
        low, high = (len(questions) * place // len(checks) for place in (index, index + 1))
        order.insert(max(1, low + 1 + int(rng.random() * (high - low)) if high > low else high), checks[index])
    return order


def _shuffled(items: list[Any], rng: random.Random) -> list[Any]:
    """Fisher-Yates on `random()`, whose sequence Python promises to keep; that of `shuffle` it does not."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


def _keys(count: int, seed: int) -> list[str]:
    """Names for the page: drawn, since those of the manifest may tell the answer."""
    rng = random.Random(f"{seed}/keys")
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f"q{int(rng.random() * 16**8):08x}"] = None
    return list(keys)


def _page_question(item: _Item, name: str, gallery: Gallery) -> dict[str, Any]:
    """What the page shows of a question, options and sides in the order given."""
    if isinstance(item, TrustQuestion):
        shown = [("The picture", "Original", item.image)] if item.image is not None else []
        if isinstance(item.image, ColoredText):
            shown = [("The text", "Original", item.image)]
        shown += [("", "Explanation", picture) for picture in item.explanations]
        body: dict[str, Any] = {"kind": "scale", "note": "Both robots answered:", "emphasis": item.prediction}
    elif isinstance(item, ClassQuestion):
        original = [("Original", "Original", item.original)] if item.original is not None else []
        shown = [*original, ("Explanation" if original else "", "Explanation", item.explanation)]
        body = {"kind": "choice", "note": "", "emphasis": "", "options": _choices(item.options)}
    else:
        shown = [("", "Picture", item.picture)] if item.picture is not None else []
        body = {"kind": "choice", "note": "", "emphasis": "", "options": _choices(item.options)}
    figures = [{"caption": caption, "alt": alt, "picture": gallery.add(picture, name)} for caption, alt, picture in shown]
    return {**body, "prompt": item.prompt, "figures": figures}


def _choices(options: Sequence[str]) -> list[dict[str, str]]:
    return [{"value": option, "label": option} for option in options]


def _arrange(bodies: Mapping[str, Mapping[str, Any]], plan: _Plan) -> list[dict[str, Any]]:
    """The questions of one version, with options or sides in their drawn places."""
    return [
        _sided(bodies[name], places) if _is_scale(bodies[name]) else _ordered(bodies[name], places) for name, places in plan
    ]


def _is_scale(body: Mapping[str, Any]) -> bool:
    return bool(body["kind"] == "scale")


def _ordered(body: Mapping[str, Any], places: tuple[int, ...]) -> dict[str, Any]:
    return {**body, "options": [body["options"][place] for place in places]}


def _sided(body: Mapping[str, Any], places: tuple[int, ...]) -> dict[str, Any]:
    *original, first, second = body["figures"]
    pair = [(first, second)[place] for place in places]
    robots = [
        {**figure, "caption": f"Robot {side}", "alt": f"Explanation of robot {side}"}
        for side, figure in zip("AB", pair, strict=True)
    ]
    return {
        **body,
        "figures": [*original, *robots],
        "options": [{"value": str(value), "label": text} for value, text in SCALE],
    }


def _manifest_question(item: _Item, name: str, key: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": name, "key": key, "kind": _kind(item), "prompt": item.prompt}
    if isinstance(item, TrustQuestion):
        return {**entry, "models": list(item.models), "method": item.method, "prediction": item.prediction}
    entry |= {"options": list(item.options), "answer": item.answer}
    return {**entry, "method": item.method} if isinstance(item, ClassQuestion) else entry


def _manifest_version(items: Mapping[str, _Item], plan: _Plan, number: int, count: int) -> dict[str, Any]:
    order = [
        {"position": position, "question": name, **_shown(items[name], places)}
        for position, (name, places) in enumerate(plan, 1)
    ]
    return {"version": number, "file": f"version-{number:0{max(2, len(str(count)))}d}.html", "order": order}


def _shown(item: _Item, places: tuple[int, ...]) -> dict[str, Any]:
    if isinstance(item, TrustQuestion):
        return {"sides": {side: item.models[place] for side, place in zip("AB", places, strict=True)}}
    return {"options": [item.options[place] for place in places]}


def _kind(item: _Item) -> str:
    return {ClassQuestion: "class", TrustQuestion: "trust", AttentionCheck: "check"}[type(item)]


def _named(
    questions: Iterable[Question], checks: Iterable[AttentionCheck]
) -> tuple[dict[str, Question], dict[str, AttentionCheck]]:
    """Questions and checks by name, each name used once."""
    asked = _by_name(questions, "questions", (ClassQuestion, TrustQuestion))
    checked = _by_name(checks, "checks", (AttentionCheck,))
    if not asked:
        raise ValueError("questions: expected at least one, got none")
    if twice := sorted(set(asked) & set(checked)):
        raise ValueError(f"checks: expected names that no question has, got id {twice[0]!r} twice")
    return asked, checked


def _by_name(items: Iterable[Any], name: str, kinds: tuple[type[Any], ...]) -> dict[str, Any]:
    wanted = " or ".join(kind.__name__ for kind in kinds)
    check_iterable(items, name, f"several {wanted}")
    found: dict[str, Any] = {}
    for place, item in enumerate(items, 1):
        if not isinstance(item, kinds):
            raise TypeError(f"{name}: expected {wanted}, got {type(item).__name__}")
        key = item.id or f"{_kind(item)}-{place}"
        if key in found:
            raise ValueError(f"{name}: expected each id once, got {key!r} twice")
        found[key] = item
    return found


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _digest(content: Any) -> str:
    """Ties answers to the pages they were given on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()[:12]


def _write_whole(target: Path, text: str) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _check_submit_url(url: Any) -> None:
    if url is None:
        return
    check_text(url, "submit_url")
    # Browsers read "//host" and "/\host" as another site, and drop line breaks before they look.
    if not re.match(r"https?://[^/\\]|/(?![/\\])", url) or not url.isprintable() or " " in url:
        wanted = "an http(s) address or a path that begins with a single '/', without spaces"
        raise ValueError(f"submit_url: expected {wanted}, got {url!r}")
