"""The forms as files: self-contained, silent about answers, the same for the same seed, escaped."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xai_fast._version import __version__
from xai_fast.metrics.human import AttentionCheck, ClassQuestion, ColoredText, Form, TrustQuestion, build_form

image_module = pytest.importorskip("PIL.Image")

HOSTILE = '</script><!-- <script>alert("it\'s")</script> & more'
WORDS = ["bad", " good"]


class _Page(HTMLParser):
    """Scripts and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag == "script":
            self.scripts.append("")
            self._in_script = True

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    @property
    def study(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0]))


def _text(*weights: float) -> ColoredText:
    return ColoredText(WORDS, list(weights))


def _questions(answer: str = "cat", models: tuple[str, str] = ("vgg", "alexnet"), method: str = "secretmethod") -> list[Any]:
    classes = [
        ClassQuestion(_text(0.1 * k, 1), ("cat", "dog"), answer=answer, method=method, id=f"{answer}-{k}") for k in range(6)
    ]
    trust = [
        TrustQuestion(_text(0, 0), (_text(0, 1), _text(1, k)), models, prediction="cat", method=method) for k in range(4)
    ]
    return [*classes, *trust]


def _check(number: int = 0, answer: str = "B") -> AttentionCheck:
    return AttentionCheck(f"Choose the middle one ({number}).", ("A", "B", "C"), answer=answer)


def _form(questions: list[Any] | None = None, **options: Any) -> Form:
    common: dict[str, Any] = {"title": "Study", "introduction": "Welcome.", "checks": [_check()]}
    return build_form(_questions() if questions is None else questions, **(common | options))


def _order(form: Form, version: int = 1) -> list[str]:
    return [shown["question"] for shown in form.manifest["versions"][version - 1]["order"]]


def test_a_page_names_no_address() -> None:
    form = _form([ClassQuestion(np.zeros((4, 4, 3)), ("cat", "dog"), answer="cat"), *_questions()])
    html = form.html()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<iframe", re.sub(r"(?m)^\s*//.*$|;\s*//.*$", "", html))
    page = _Page(html)
    assert page.addresses == []
    assert len(page.scripts) == 2
    assert [set(picture) for picture in page.study["pictures"]][:2] == [{"src"}, {"html"}]
    assert page.study["pictures"][0]["src"].startswith("data:image/png;base64,")
    assert "default-src 'none'" in html
    assert "form-action 'none'" in html


def test_a_page_does_not_depend_on_what_it_must_not_tell() -> None:
    """Other answers, methods and models give the very same pages, so that nothing in a page can tell them."""
    form = _form()
    other = _form(_questions("dog", ("m1", "m2"), "other"), checks=[_check(answer="C")])
    assert form.html() == other.html()
    assert form.manifest["questions"] != other.manifest["questions"]
    for secret in ("vgg", "alexnet", "secretmethod", "cat-0", "class-", "check-1", "trust"):
        assert secret not in form.html()


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first = _form(n_versions=3, seed=5).write(tmp_path / "one")
    second = _form(n_versions=3, seed=5).write(tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.name for path in first] == ["version-01.html", "version-02.html", "version-03.html", "manifest.json"]
    assert sorted((tmp_path / "one").iterdir()) == sorted(first)


def test_seeds_and_versions_differ_in_order() -> None:
    form = _form(n_versions=3, seed=5)
    orders = [_order(form, 1), _order(form, 2), _order(form, 3), _order(_form(seed=6))]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len({_form(seed=seed).manifest["study"] for seed in range(3)}) == 3


def test_the_order_of_a_seed_stays() -> None:
    """A manifest written today must fit the pages that another version of Python makes from the same seed."""
    assert _order(_form(seed=0))[:4] == ["trust-9", "cat-1", "cat-0", "trust-10"]
    assert _form(seed=0).manifest["questions"][0]["key"] == "q095f2730"


def test_options_and_sides_are_balanced_and_mirrored() -> None:
    form = _form(n_versions=2, seed=1)
    shown = [{entry["question"]: entry for entry in version["order"]} for version in form.manifest["versions"]]
    swapped = [
        name
        for name, entry in shown[0].items()
        if entry.get("options") == ["dog", "cat"] or entry.get("sides") == {"A": "alexnet", "B": "vgg"}
    ]
    assert len(swapped) == 5
    for name, entry in shown[0].items():
        mirror = shown[1][name]
        if "sides" in entry:
            assert mirror["sides"] == {"A": entry["sides"]["B"], "B": entry["sides"]["A"]}
        else:
            assert mirror["options"] == entry["options"][::-1]


def test_the_page_shows_what_the_manifest_says() -> None:
    form = _form(n_versions=2, seed=2)
    questions = {question["key"]: question for question in form.manifest["questions"]}
    for number, version in enumerate(form.manifest["versions"], 1):
        study = _Page(form.html(number)).study
        assert study["version"] == number
        assert [questions[shown["key"]]["id"] for shown in study["questions"]] == _order(form, number)
        for entry, shown in zip(version["order"], study["questions"], strict=True):
            labels = [option["label"] for option in shown["options"]]
            assert labels == entry["options"] if "options" in entry else labels[0] == "Robot A is clearly more reasonable"
    assert form.manifest["package"] == f"xai_fast {__version__}"
    assert form.manifest["seed"] == 2


def test_a_robot_shows_the_explanation_of_its_model() -> None:
    first, second = _text(0, 1), _text(1, 0)
    form = _form([TrustQuestion(None, (first, second), ("vgg", "alexnet"), prediction="cat")], checks=(), n_versions=2)
    for number, version in enumerate(form.manifest["versions"], 1):
        study = _Page(form.html(number)).study
        figures = study["questions"][0]["figures"]
        texts = {figure["caption"]: study["pictures"][figure["picture"]]["html"] for figure in figures}
        named = {"vgg": first.html(), "alexnet": second.html()}
        assert texts == {f"Robot {side}": named[model] for side, model in version["order"][0]["sides"].items()}
        assert [option["value"] for option in study["questions"][0]["options"]] == ["-2", "-1", "0", "1", "2"]


@pytest.mark.parametrize("seed", range(8))
def test_checks_are_spread_and_never_first(seed: int) -> None:
    order = _order(_form(seed=seed, checks=[_check(k) for k in range(2)]))
    first, second = (place for place, name in enumerate(order) if name.startswith("check"))
    assert 1 <= first <= 5 < second <= 11
    many = _order(_form(_questions()[:1], seed=seed, checks=[_check(k) for k in range(4)]))
    assert many[0] == "cat-0"
    assert len(many) == 5


def test_hostile_text_is_escaped() -> None:
    text = ColoredText([HOSTILE], [1.0])
    question = ClassQuestion(text, (HOSTILE, "dog"), answer="dog", prompt=HOSTILE)
    trust = TrustQuestion(text, (text, ColoredText([HOSTILE])), ("a", "b"), prediction=HOSTILE)
    check = AttentionCheck(HOSTILE, (HOSTILE, "b"), answer="b")
    options: dict[str, Any] = {"title": HOSTILE, "introduction": HOSTILE, "consent": HOSTILE, "submit_field": HOSTILE}
    html = _form([question, trust], checks=[check], submit_url="https://example.org/?a=1&b=</script>", **options).html()
    page = _Page(html)
    assert len(page.scripts) == 2
    assert html.count("</script>") == 2
    assert "<!--" not in html
    study = page.study
    assert (study["title"], study["consent"], study["submit"]["field"]) == (HOSTILE, [HOSTILE], HOSTILE)
    assert {asked["prompt"] for asked in study["questions"]} == {HOSTILE, "Which robot seems more reasonable?"}
    assert all("<script" not in picture["html"] for picture in study["pictures"])


def _pixels(study: dict[str, Any], place: int = 0) -> np.ndarray:
    data = study["pictures"][place]["src"].split(",")[1]
    return np.asarray(image_module.open(io.BytesIO(base64.b64decode(data))))


def test_every_kind_of_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image_module.fromarray(pixels).save(tmp_path / "secret-name.png")
    kinds: list[Any] = [
        pixels,
        pixels / 255,
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels / 255).requires_grad_(),
        image_module.fromarray(pixels),
        tmp_path / "secret-name.png",
        str(tmp_path / "secret-name.png"),
    ]
    questions = [ClassQuestion(kind, ("cat", "dog"), answer="cat", original=pixels) for kind in kinds]
    html = _form(questions).html()
    assert "secret-name" not in html
    study = _Page(html).study
    assert len(study["pictures"]) == 1  # the same pixels are stored once
    assert np.array_equal(_pixels(study), pixels)
    half = torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16)
    assert np.unique(_pixels(_Page(_form([ClassQuestion(half, ("a", "b"), answer="a")]).html()).study)).tolist() == [128]


def test_pil_images_are_upright_and_on_white(tmp_path: Path) -> None:
    clear = image_module.new("RGBA", (1, 1), (0, 0, 0, 0))
    assert _pixels(_Page(_form([ClassQuestion(clear, ("a", "b"), answer="a")]).html()).study).tolist() == [[[255, 255, 255]]]
    exif = image_module.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to see it upright
    image_module.new("RGB", (8, 4)).save(tmp_path / "turned.png", exif=exif)
    form = _form([ClassQuestion(tmp_path / "turned.png", ("a", "b"), answer="a")])
    assert _pixels(_Page(form.html()).study).shape == (8, 4, 3)


def test_inputs_are_not_changed() -> None:
    pixels, weights, options = np.random.default_rng(0).random((4, 4, 3)), torch.tensor([1.0, -1.0]), ["cat", "dog"]
    before = copy.deepcopy((pixels, weights, options))
    questions = [
        ClassQuestion(pixels, options, answer="cat"),
        ClassQuestion(ColoredText(WORDS, weights), options, answer="dog"),
    ]
    _form(questions, n_versions=2)
    assert np.array_equal(pixels, before[0])
    assert torch.equal(weights, before[1])
    assert options == before[2]


def test_text_without_weights_and_paragraphs() -> None:
    assert re.sub("<[^>]*>", "", ColoredText(WORDS).html()) == "bad good"
    study = _Page(_form(introduction="One\nline.\n\n \nTwo.").html()).study
    assert study["introduction"] == ["One line.", "Two."]
    assert study["consent"] == []
    assert study["submit"] is None


def test_submission_is_off_unless_asked_for() -> None:
    form = _form(submit_url="https://example.org/submit", submit_field="table")
    assert _Page(form.html()).study["submit"] == {"url": "https://example.org/submit", "field": "table"}
    assert "form-action" not in form.html()


def test_write_replaces_and_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _form(seed=0).write("study")
    paths = _form(seed=1).write("study")
    assert all(path.is_absolute() for path in paths)
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == ["manifest.json", "version-01.html"]
    assert json.loads(paths[-1].read_text(encoding="utf-8")) == _form(seed=1).manifest


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClassQuestion(_text(0, 1), ("cat", "cat"), answer="cat"), ValueError, "options: expected different texts"),
        (lambda: ClassQuestion(_text(0, 1), ("a", "b", "c"), answer="a"), ValueError, "options: expected 2, got 3"),
        (lambda: ClassQuestion(_text(0, 1), "ab", answer="a"), TypeError, "options: expected a sequence of texts, got str"),
        (lambda: ClassQuestion(_text(0, 1), ("a", "b\n"), answer="a"), ValueError, "options: expected single lines"),
        (
            lambda: ClassQuestion(_text(0, 1), ("a", "b"), answer="c"),
            ValueError,
            r"answer: expected one of \['a', 'b'\], got 'c'",
        ),
        (
            lambda: ClassQuestion(_text(0, 1), ("a", "b"), answer="a", method=1),
            TypeError,
            "method: expected a text, got int",
        ),
        (lambda: AttentionCheck("x", ["a"], answer="a"), ValueError, "options: expected at least 2, got 1"),
        (lambda: AttentionCheck(" ", ["a", "b"], answer="a"), ValueError, "prompt: expected a text that is not empty"),
        (lambda: TrustQuestion(None, (_text(0, 1),), ("a", "b"), "c"), ValueError, "explanations: expected 2, got 1"),
        (lambda: TrustQuestion(None, (_text(0, 1),) * 2, ("a", "a"), "c"), ValueError, "models: expected different texts"),
        (lambda: TrustQuestion(None, "xy", ("a", "b"), "c"), TypeError, "explanations: expected a pair, got str"),
        (lambda: _form([]), ValueError, "questions: expected at least one, got none"),
        (lambda: _form([_check()]), TypeError, "questions: expected ClassQuestion or TrustQuestion, got AttentionCheck"),
        (lambda: _form(_questions() * 2), ValueError, "questions: expected each id once, got 'cat-0' twice"),
        (lambda: _form(title=""), ValueError, "title: expected a text that is not empty, got ''"),
        (lambda: _form(consent=" "), ValueError, "consent: expected a text that is not empty"),
        (lambda: _form(seed=-1), ValueError, "seed: expected a whole number"),
        (lambda: _form(n_versions=0), ValueError, "n_versions: expected a whole number of at least 1, got 0"),
        (lambda: _form(submit_url="javascript:alert(1)"), ValueError, "submit_url: expected an http"),
        (lambda: _form(ClassQuestion(ColoredText(WORDS, [1, 0]), ("a", "b"), answer="a")), TypeError, "questions: expected"),
        (lambda: _form(checks=3), TypeError, "checks: expected several AttentionCheck, got int"),
        (lambda: _form(image_format="gif"), ValueError, "image_format: expected 'png' or 'jpeg', got 'gif'"),
        (lambda: _form().html(2), ValueError, "version: expected a whole number from 1 to 1, got 2"),
        (
            lambda: _form([ClassQuestion(7, ("a", "b"), answer="a")]),
            TypeError,
            "question 'class-1': picture: expected an array",
        ),
        (
            lambda: _form([ClassQuestion(np.full((2, 2), 7.0), ("a", "b"), answer="a")]),
            ValueError,
            "question 'class-1': image: expected 0 to 1",
        ),
        (
            lambda: _form([ClassQuestion(ColoredText(WORDS, [1.0]), ("a", "b"), answer="a")]),
            ValueError,
            "question 'class-1': weights: expected 2",
        ),
    ],
)
def test_misuse_is_one_line(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_check_may_not_take_a_question_name() -> None:
    check = AttentionCheck("x", ("a", "b"), answer="a", id="cat-0")
    with pytest.raises(ValueError, match="checks: expected names that no question has, got id 'cat-0' twice"):
        _form(checks=[check])


def test_where_answers_may_go_to() -> None:
    for url in ("/", "/submit?a=1", "http://a", "https://example.org/submit"):
        assert _form(submit_url=url).html()


@pytest.mark.parametrize(
    "url", ["//evil.com", "/\\evil.com", "/a\n", "/a b", "/a\tb", "/\u2028", "https://a.org/\r", "http://a\x00", "http:///a"]
)
def test_where_answers_may_not_go_to(url: str) -> None:
    with pytest.raises(ValueError, match=r"submit_url: expected an http.* a single '/', without spaces") as caught:
        _form(submit_url=url)
    assert "\n" not in str(caught.value)
