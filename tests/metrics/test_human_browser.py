"""The forms in a real browser, driven by mouse and keyboard through Chromium's debugging pipe."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest

from xai_fast.metrics.human import (
    AttentionCheck,
    ClassQuestion,
    ColoredText,
    Form,
    TrustQuestion,
    build_form,
    read_answers,
    score,
)

pytest.importorskip("PIL.Image")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(os.name != "posix", reason="the debugging pipe needs file descriptors 3 and 4"),
]
LIMIT_S = 60.0
HOSTILE = 'a "cat", </script><img src=x onerror="window.broken=1"> & <b>more</b>'
DESKTOP, PHONE = (1280, 900), (390, 844)


class _Browser:
    """A headless Chromium: one message each way is JSON that ends with a zero byte."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_browser, from_browser = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [executable, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]

        def wire() -> None:
            # Through high numbers, so that neither end is overwritten before it is moved.
            ends = [os.dup(os.dup2(end, high)) for end, high in ((to_browser[0], 60), (from_browser[1], 61))]
            for end, wanted in zip(ends, (3, 4), strict=True):
                os.dup2(end, wanted)

        self.process = subprocess.Popen(
            command, preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self._write, self._read = to_browser[1], from_browser[0]
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply)
                return dict(reply["result"])
            self.events.append(reply)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], LIMIT_S)
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(LIMIT_S)
        os.close(self._write)
        os.close(self._read)


class _Page:
    """A tab with its own storage."""

    def __init__(self, browser: _Browser, size: tuple[int, int], downloads: Path) -> None:
        self.browser, self.downloads = browser, downloads
        context = browser.send("Target.createBrowserContext")["browserContextId"]
        target = browser.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.send("Browser.setDownloadBehavior", behavior="allow", browserContextId=context, downloadPath=str(downloads))
        self.send("Page.enable")
        self.send("Network.enable")
        width, height = size
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def run(self, script: str) -> Any:
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.wait(f"document.readyState == 'complete' && location.href == {json.dumps(address)}")

    def reload(self) -> None:
        self.run("window.before = true")
        self.send("Page.reload")
        self.wait("!window.before && document.readyState == 'complete'")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def click(self, element: str) -> None:
        """A mouse click in the middle of what a JavaScript expression names."""
        x, y = self.run(
            f"(() => {{ const e = {element}; e.scrollIntoView({{ block: 'center' }}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int, text: str = "") -> None:
        named = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def button(self, text: str) -> None:
        self.click(f"[...document.querySelectorAll('button')].find((b) => b.textContent == {json.dumps(text)})")

    def choose(self, value: Any) -> None:
        wanted = json.dumps(str(value))
        self.click(f"[...document.querySelectorAll('.option')].find((o) => o.querySelector('input').value == {wanted})")

    def text(self) -> str:
        return str(self.run("document.body.innerText"))

    def requests(self) -> list[str]:
        events = [event for event in self.browser.events if event.get("sessionId") == self.session]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


class _Platform(http.server.HTTPServer):
    """A server that thanks and remembers what it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Thanks)
        self.seen: list[str] = []


class _Thanks(http.server.BaseHTTPRequestHandler):
    server: _Platform

    def do_POST(self) -> None:
        self.server.seen.append(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"thanks")

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def platform() -> Iterator[_Platform]:
    server = _Platform()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Browser]:
    assert CHROMIUM is not None
    found = _Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def page(browser: _Browser, tmp_path: Path) -> _Page:
    return _Page(browser, DESKTOP, tmp_path)


def _picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((48, 64, 3))


def _study(**options: Any) -> Form:
    questions: list[Any] = [
        ClassQuestion(_picture(0), ("cat", "dog"), answer="cat", method="ours"),
        ClassQuestion(_picture(1), (HOSTILE, "dog"), answer=HOSTILE, method="ours", original=_picture(2)),
        ClassQuestion(ColoredText(["<i>", " sad"], [0.1, -1.0]), ("praise", "blame"), answer="blame", method="theirs"),
        TrustQuestion(_picture(2), (_picture(3), _picture(4)), ("large", "small"), prediction="cat", method="ours"),
        TrustQuestion(_picture(5), (_picture(6), _picture(7)), ("large", "small"), prediction="dog", method="ours"),
    ]
    checks = [AttentionCheck("Please choose the third letter.", ("A", "B", "C"), answer="C")]
    common: dict[str, Any] = {"title": "What did it see?", "introduction": "Welcome.", "checks": checks, "seed": 4}
    return build_form(questions, **(common | options))


def _wanted(form: Form, version: int) -> list[Any]:
    """Right answers in the order of the page; trust: +2 toward "large" in its first question, -1 in its second."""
    questions = {question["id"]: question for question in form.manifest["questions"]}
    wanted = []
    for shown in form.manifest["versions"][version - 1]["order"]:
        question = questions[shown["question"]]
        if question["kind"] == "trust":
            toward = 2 if question["prediction"] == "cat" else -1
            wanted.append(toward if shown["sides"]["B"] == "large" else -toward)
        else:
            wanted.append(question["answer"])
    return wanted


def _address(form: Form, folder: Path, version: int = 1, query: str = "") -> str:
    return form.write(folder)[version - 1].as_uri() + query


def _answer_all(page: _Page, wanted: list[Any]) -> None:
    for place, value in enumerate(wanted, 1):
        page.wait(f"document.getElementById('place').textContent == 'Question {place} of {len(wanted)}'")
        page.choose(value)
        page.button("Finish" if place == len(wanted) else "Next")
    page.wait("document.getElementById('results')")


def _downloaded(folder: Path) -> Path:
    end = time.monotonic() + LIMIT_S
    while not (found := list(folder.glob("*.csv"))):
        assert time.monotonic() < end, "no download"
        time.sleep(0.02)
    return found[0]


def test_a_person_clicks_through_and_the_table_scores(page: _Page, tmp_path: Path) -> None:
    form = _study(n_versions=2, consent="I may stop at any time.")
    page.open(_address(form, tmp_path / "study", 2, "?participant=P-7"))
    page.button("Start")
    assert "Please tick the box" in page.text()
    page.click("document.querySelector('.tick input')")
    page.button("Start")
    _answer_all(page, _wanted(form, 2))
    page.button("Download answers")
    path = _downloaded(tmp_path)
    assert path.name == "answers-02-P-7.csv"
    assert path.read_text(encoding="utf-8") == page.run("document.getElementById('results').value")

    answers = read_answers(path, tmp_path / "study" / "manifest.json")
    assert {(answer.participant, answer.version) for answer in answers} == {("P-7", 2)}
    assert all(0 < answer.response_time_ms < 1000 * LIMIT_S for answer in answers)
    ours, theirs, trust = score(answers, form.manifest).rows
    assert (ours.method, ours.value, ours.n_answers) == ("ours", 1.0, 2)
    assert (theirs.method, theirs.value, theirs.n_answers) == ("theirs", 1.0, 1)
    assert (trust.toward, trust.value, trust.n_answers) == ("large", 0.5, 2)
    assert page.run("window.broken") is None
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.requests())
    assert len(page.requests()) > 1


def test_the_keyboard_is_enough(page: _Page, tmp_path: Path) -> None:
    form = _study()
    page.open(_address(form, tmp_path / "study", query="?workerId=keys"))
    page.press("Tab", 9)
    page.press("Enter", 13, "\r")
    count = len(_wanted(form, 1))
    for place in range(1, count + 1):
        page.wait(f"document.getElementById('place').textContent == 'Question {place} of {count}'")
        page.press("Tab", 9)
        page.press(" ", 32, " ")
        page.press("ArrowDown", 40)
        page.press("Enter", 13, "\r")
    page.wait("document.getElementById('results')")
    answers = read_answers(io.StringIO(page.run("document.getElementById('results').value")), form.manifest)
    second = {shown["question"]: shown.get("options", (-2, -1))[1] for shown in form.manifest["versions"][0]["order"]}
    assert {answer.question: answer.answer for answer in answers} == second
    assert answers[0].participant == "keys"


def test_no_answer_no_next_and_nothing_chosen_before(page: _Page, tmp_path: Path) -> None:
    form = _study()
    page.open(_address(form, tmp_path / "study"))
    page.button("Start")
    for place, value in enumerate(_wanted(form, 1), 1):
        assert page.run("document.querySelectorAll('input:checked').length") == 0
        page.run("document.querySelector('form').requestSubmit()")
        assert "Please choose an answer" in page.text()
        assert f"Question {place} of" in page.text()
        page.choose(value)
        assert "Please choose an answer" not in page.text()
        page.run("document.querySelector('form').requestSubmit()")
    assert page.text().startswith("What did it see?")
    assert "Thank you" in page.text()
    assert page.run("document.getElementById('results').value").splitlines()[1].split(",")[1].startswith("anonymous-")


def test_a_reload_keeps_answers_and_time(page: _Page, tmp_path: Path) -> None:
    form = _study()
    wanted = _wanted(form, 1)
    page.open(_address(form, tmp_path / "study", query="?PROLIFIC_PID=abc"))
    page.button("Start")
    page.choose(wanted[0])
    page.button("Next")
    page.wait("document.getElementById('place').textContent.startsWith('Question 2')")
    time.sleep(0.4)
    page.reload()
    assert "Question 2 of 6" in page.text()
    for value in wanted[1:]:
        page.choose(value)
        page.run("document.querySelector('form').requestSubmit()")
    page.reload()
    answers = read_answers(io.StringIO(page.run("document.getElementById('results').value")), form.manifest)
    assert [answer.answer for answer in answers] == wanted
    assert answers[1].response_time_ms >= 400
    page.open(_address(form, tmp_path / "study", query="?PROLIFIC_PID=another"))
    assert "Start" in page.text()


def test_works_where_storage_is_forbidden(page: _Page, tmp_path: Path) -> None:
    form = _study()
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    page.send("Page.addScriptToEvaluateOnNewDocument", source=refuse)
    page.open(_address(form, tmp_path / "study", query="?participant=p"))
    page.button("Start")
    _answer_all(page, _wanted(form, 1))
    assert len(read_answers(io.StringIO(page.run("document.getElementById('results').value")), form.manifest)) == 6


def test_next_participant_begins_anew(page: _Page, tmp_path: Path) -> None:
    form = _study()
    page.open(_address(form, tmp_path / "study"))
    page.click("document.querySelector('input[type=text]')")
    page.send("Input.insertText", text='=cmd("first")')
    page.button("Start")
    _answer_all(page, _wanted(form, 1))
    again = "[...document.querySelectorAll('button')].find((b) => b.textContent == 'Next participant')"
    assert page.run(again + ".disabled")
    page.button("Copy answers")
    table = page.run("document.getElementById('results').value")
    assert table.splitlines()[1].split(",")[1] == "cmdfirst"
    page.button("Next participant")
    page.reload()
    assert "Participant code" in page.text()


def test_formulas_and_hostile_text_stay_text(page: _Page, tmp_path: Path) -> None:
    form = _study(title=HOSTILE, introduction=HOSTILE, consent=HOSTILE)
    page.open(_address(form, tmp_path / "study", query="?participant=%3D1%2B1%3Cimg%20src%3Dx%20onerror%3Dbroken%3D1%3E"))
    assert page.run("document.title") == HOSTILE
    assert page.text().count(HOSTILE) == 3
    page.click("document.querySelector('.tick input')")
    page.button("Start")
    _answer_all(page, _wanted(form, 1))
    answers = read_answers(io.StringIO(page.run("document.getElementById('results').value")), form.manifest)
    assert answers[0].participant == "11imgsrcxonerrorbroken1"
    assert HOSTILE in [answer.answer for answer in answers]
    assert page.run("window.broken") is None


def test_the_policy_stops_every_request(page: _Page, platform: _Platform, tmp_path: Path) -> None:
    page.open(_address(_study(), tmp_path / "study"))
    assert (
        page.run(f"fetch('http://127.0.0.1:{platform.server_port}/', {{ mode: 'no-cors' }}).catch(() => 'stopped')")
        == "stopped"
    )
    assert platform.seen == []
    page.run("var s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)")
    assert page.run("window.broken") is None


def test_a_preview_cannot_be_answered(page: _Page, tmp_path: Path) -> None:
    page.open(_address(_study(), tmp_path / "study", query="?assignmentId=ASSIGNMENT_ID_NOT_AVAILABLE"))
    assert "This is a preview" in page.text()
    assert page.run("document.querySelector('button').disabled")
    page.button("Start")
    assert "Question 1" not in page.text()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_fits_the_window(browser: _Browser, size: tuple[int, int], tmp_path: Path) -> None:
    page = _Page(browser, size, tmp_path)
    form = _study(consent="I may stop at any time.")
    page.open(_address(form, tmp_path / "study"))
    page.click("document.querySelector('.tick input')")
    page.button("Start")
    pictures = os.environ.get("XAI_FAST_SCREENSHOTS")
    for place, value in enumerate([*_wanted(form, 1), None], 1):
        assert page.run("document.documentElement.scrollWidth") <= size[0]
        assert page.run(
            "[...document.querySelectorAll('.option, button')].every((e) => e.getBoundingClientRect().height >= 44)"
        )
        if pictures:
            page.screenshot(Path(pictures) / f"{size[0]}-{place}.png")
        if value is not None:
            page.choose(value)
            page.run("document.querySelector('form').requestSubmit()")


def test_submission_posts_the_answers(page: _Page, platform: _Platform, tmp_path: Path) -> None:
    form = _study(submit_url=f"http://127.0.0.1:{platform.server_port}/submit", submit_field="table")
    page.open(_address(form, tmp_path / "study", query="?workerId=W1&assignmentId=A9"))
    page.button("Start")
    _answer_all(page, _wanted(form, 1))
    page.button("Submit answers")
    page.wait("document.body.innerText == 'thanks'")
    posted = parse_qs(platform.seen[0])
    assert posted["assignmentId"] == ["A9"]
    assert posted["participant"] == ["W1"]
    answers = read_answers(io.StringIO(posted["table"][0]), form.manifest)
    assert [answer.answer for answer in answers] == _wanted(form, 1)
