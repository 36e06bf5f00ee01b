"""Photos of animals, plants and food, cut out, with their classes: from the Debian package ``tuxpaint-stamps-default``.

The package (160 MB) is fetched once by ``apt-get download``, which needs no root, and read, not installed; the pictures
that are used (5 MB) are kept in the cache as one archive of known SHA-256.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xai_fast._optional import optional_import

from .fetch import Source, copy_from, deb_members, obtain

__all__ = ["CLASSES", "Cutout", "load_cutouts", "pack"]

PACKAGE = "tuxpaint-stamps-default"
FOLDER = Path("/usr/share/tuxpaint/stamps")
# Of the version 2022.06.04-1.
ARCHIVE = {"cutouts.tar": "eba0a8944bfb3ff6d45b1c12681acdb5fab43c341c5d22c8831c72fb35a70bb8"}

# Class to its folders, and the pictures in them.
FILES: dict[str, dict[str, str]] = {
    "bird": {
        "animals/birds": (
            "adelaide-rosella albino_peahen blackbird chicken_profile crow crowned_crane cuckoo drake duck gander "
            "guineafowl helmeted_guineafowl hen heron_greatblue heron_greatblue_flying lark little-penguin "
            "magellanic_penguin magpie nandou ostrich owl peacock pelican penguin pigeon pink_flamingo quetzal "
            "rainbow-lorikeet rooster seagull silver-gull tucan turkey vulture"
        ),
    },
    "hoofed animal": {
        "animals/mammals/bovines": (
            "bison bull cow cow_white gnu-baby-stand gnu-baby gnu-sitting gnu-stand goat indian_blackbuck "
            "mountaingoat ram sheep sheep_lamb yak zebu"
        ),
        "animals/mammals/equines": "donkey donkey_eating horse zebra",
        "animals/mammals/deer": "caribou deer doe wapiti",
        "animals/mammals/camel": "camel dromedary",
    },
    "sea animal": {
        "animals/fish": (
            "bluegroper butterflyfish clownfish coraltrout dolphinfish lionfish lobster moonwrasse seahorse "
            "shrimp stripedfish"
        ),
        "animals/mammals/aquatic": "dolphin orca otter sea_lion whale",
    },
    "flower": {
        "plants/flowers": (
            "adeenia anemone_red anthoorium appooppanthady bolsom chemparathi daffodil flower1 flower10 flower2 "
            "flower3 flower4 flower5 flower6 flower7 flower8 flower9 iris marigold pigface red-gazania rose "
            "whitestar-petunia yellow-flower"
        ),
    },
    "fruit": {
        "food/fruit": (
            "Apricot_whole Cherry_Stella Strawberry2 apple_fuji apple_granny_smith apple_green apple_red "
            "apple_sierra_beauty apricot avocado banana cherimoya grapes kiwi lemon mandarine mango orange "
            "orange_seville pear pineapple pomegranate raspberry sliced_lime sliced_orange strawberry"
        ),
    },
    "vegetable": {
        "food/vegetables": (
            "broccoli carrot chilepepper corn eggplant garlic garlics lettuce mushroom onion pattypan_squash "
            "pepper potato pumpkin_small redlettuce tomato yam yellowpepper"
        ),
    },
}
CLASSES = tuple(FILES)


@dataclass(frozen=True)
class Cutout:
    """A picture (H, W, 4) of bytes, red, green, blue and opacity, and the number of its class in `CLASSES`."""

    name: str
    label: int
    picture: np.ndarray


def load_cutouts(*, cache: Path | None = None) -> list[Cutout]:
    """All cut-outs, class by class; fetched on the first call.

    Raises
    ------
    DataUnavailable
        If no source has them.

    Examples
    --------
    >>> load_cutouts()[0].name  # doctest: +SKIP
    'adelaide-rosella'
    """
    sources = [
        Source(f"the files of the Debian package {PACKAGE}", _packed(copy_from(FOLDER, _paths()))),
        Source(f"apt-get download {PACKAGE}", _packed(deb_members(PACKAGE, FOLDER, _paths()))),
    ]
    folder = obtain("the cut-out photos", "cutouts", ARCHIVE, sources, cache=cache)
    image_module = optional_import("PIL.Image", "demo")
    found = []
    with tarfile.open(folder / "cutouts.tar") as tar:
        for path, label in _paths().items():
            file = tar.extractfile(Path(path).name)
            assert file is not None
            picture = np.asarray(image_module.open(io.BytesIO(file.read())).convert("RGBA"))
            found.append(Cutout(Path(path).stem, label, picture))
    return found


def _paths() -> dict[str, int]:
    """Paths in the package, in order, to labels."""
    return {
        f"{folder}/{name}.png": label
        for label, folders in enumerate(FILES.values())
        for folder, names in folders.items()
        for name in names.split()
    }


def _packed(fetch: Callable[[Path], None]) -> Callable[[Path], None]:
    """Fetch single files and put them into one archive, whose bytes depend on theirs alone."""

    def fetch_and_pack(part: Path) -> None:
        for path in _paths():
            (part / path).parent.mkdir(parents=True, exist_ok=True)
        fetch(part)
        found = {file.name: file for file in part.rglob("*.png")}
        pack([found[Path(path).name] for path in _paths()], part / "cutouts.tar")

    return fetch_and_pack


def pack(files: Sequence[Path], archive: Path) -> None:
    """Put files into a tar archive by their names alone, without folders, dates, owners and modes.

    Examples
    --------
    >>> _ = Path("a.txt").write_text("hello")
    >>> pack([Path("a.txt")], Path("a.tar"))
    """
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            data = file.read_bytes()
            member = tarfile.TarInfo(file.name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
