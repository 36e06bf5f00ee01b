"""Textures that others made, and cut-outs as pictures: on other pictures, or on grey.

The textures come from the Debian package ``gimp-data``, installed, or fetched by ``apt-get download``, which needs no root;
every file is known by its SHA-256. They are under the GNU General Public License and used at run time only.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xai_fast._optional import optional_import

from ..fetch import DataUnavailable, Source, deb_members, obtain
from ..models.efficientnet import SIDE

__all__ = ["load_textures", "on_grey", "parse_pattern", "pasted"]

PACKAGE, FOLDER = "gimp-data", Path("/usr/share/gimp/2.0/patterns")
# Hashes of the files in version 2.10.34-1+deb12u10.
TEXTURES = {
    "Animal/leopard.pat": "7e4a43d6204607d6a2500aa92312b6db98dae0385c4120a666296be6c7d12ef2",
    "Fabric/burlap.pat": "b87b6a47578f8b721fc49c725b49b9df3cf228f6c3e2be51908d361190fdad46",
    "Food/choc_swirl.pat": "9da530468cfdf83ffe512251a594f17a53354cb2afb7721c36fa3aed05f590e6",
    "Legacy/bluegrid.pat": "50d8c2ead8d2c333ae694d97862ba5036eebd13ef97d3f3a2e92ed0e882efdb3",
    "Legacy/nops.pat": "47b2babb09ba8f01c258d3210779be1c3f101cda5681a31b99bbc225aed266ab",
    "Legacy/qube1.pat": "3b097f41d98fe6b2367707290863b41546079f38fdbfa1713b2d71fcd08daebc",
    "Legacy/redcube.pat": "87249104ed89f3050dcbc38abb3d07c7b342cb4591a798897f9fa9a2028c4dea",
    "Legacy/warning.pat": "561896d9404f8f10347078becffbd35ac8cfc651b7cf56241b6850b2df2b66bb",
    "Paper/crinklepaper.pat": "54d613f4aae5ca26d8d994e8291908b116696355ce8a2cf7064ba1ec597ddb80",
    "Plant/leaves.pat": "4013516376034142ff0260400b99e1b97ea7fdd5d7376416f8f455838ee7a3ce",
    "Sky/lightning.pat": "9d7b65ed323845a71b68f624b5075eccc348121336359dba4db709566e808764",
    "Stone/Moonfoot.pat": "11676b5dba4ffaa48acf6947fccfb83742463a85949b25f0bb8fb83d3daffc03",
    "Stone/brick.pat": "12356898af31948cd4991c0194450fda6a953b9fdd12da49230b997c1f2d5d28",
    "Stone/ground1.pat": "a7271df64e6de6468701030b3805800a35e1bd7e1b2a5721ca0dad3f9cb4306d",
    "Stone/granite1.pat": "2a98e1a6cd667606e37f2ac0ddf4b0e60facc6a2581248795451f908c0dbb594",
    "Stone/marble2.pat": "fb201b311f7b587ca970ad955698443646d1325b66cbed871d5129e05736bce7",
    "Stone/rock.pat": "49db682c694726149e86bd079a65ece5f0f3da2423c1e4b9aa9c1d0d365d85be",
    "Stone/terra.pat": "e6a58dd88c376b3a2db60e35cc771a26dd0be9abad3e50a7a2b00dfac5c4bb37",
    "Wood/bark.pat": "5a942a267cc11ee5792d9d2764dd7d2c37a7bb96bf05f54c2652d2336d6c5d1b",
    "Water/rain.pat": "ee89d8802625734cbb5d9322652e18365ef7a45cf2be21e4070a97640b55145e",
    "Wood/parque3.pat": "1603952ca18b2b558517343dde7e52378c35f31eb7f76027d61ac4c8445e6893",
    "Wood/pine.pat": "a3d93406c0a9e4d73b92796ef62f05fed6b97741166f83d9b8f7546e1af4cc18",
    "Wood/wood2.pat": "b38562fa27cea6714d2d4f2f0d124fab4d4111bd7f78f788ddcaa0162fa7b1bd",
    "Wood/wood3.pat": "67e99b4974a89dc7a63684d8fb96e97db0d6e0560b388ae0493c261f533926d7",
}
GREY = 150


def load_textures(*, cache: Path | None = None) -> dict[str, np.ndarray]:
    """The textures by name, tiled: (224, 224, 3) of bytes.

    Raises
    ------
    DataUnavailable
        If no source has them.

    Examples
    --------
    >>> load_textures()["bark"].shape  # doctest: +SKIP
    (224, 224, 3)
    """
    names = {Path(path).name: path for path in TEXTURES}
    sources = [
        Source(f"the files of the Debian package {PACKAGE}", _flat(_installed)),
        Source(f"apt-get download {PACKAGE}", _flat(deb_members(PACKAGE, FOLDER, TEXTURES))),
    ]
    folder = obtain("the textures", "textures", {n: TEXTURES[path] for n, path in names.items()}, sources, cache=cache)
    return {Path(name).stem: parse_pattern((folder / name).read_bytes()) for name in names}


def _installed(part: Path) -> None:
    if not FOLDER.is_dir():
        raise DataUnavailable("not installed")
    for path in TEXTURES:
        shutil.copyfile(FOLDER / path, part / path)


def _flat(fetch: Callable[[Path], None]) -> Callable[[Path], None]:
    """Fetch files that lie in folders, and put them side by side."""

    def fetch_and_move(part: Path) -> None:
        for path in TEXTURES:
            (part / path).parent.mkdir(exist_ok=True)
        fetch(part)
        for path in TEXTURES:
            (part / path).replace(part / Path(path).name)

    return fetch_and_move


def parse_pattern(data: bytes) -> np.ndarray:
    """The picture of a GIMP pattern file, repeated to 224 x 224.

    Raises
    ------
    DataUnavailable
        If it is something else, or cut short.

    Examples
    --------
    >>> header = struct.pack(">6I", 24, 1, 2, 1, 3, int.from_bytes(b"GPAT"))
    >>> parse_pattern(header + bytes([0, 0, 0, 9, 9, 9]))[0, :4, 0]
    array([0, 9, 0, 9], dtype=uint8)
    """
    sizes = struct.unpack(">6I", data[:24]) if len(data) >= 24 else (0,) * 6
    start, _, width, height, channels, magic = sizes
    if magic != int.from_bytes(b"GPAT") or channels not in (1, 3) or len(data) != start + width * height * channels:
        raise DataUnavailable(f"data: expected a GIMP pattern, got {len(data)} bytes of something else")
    picture = np.frombuffer(data, np.uint8, offset=start).reshape(height, width, channels)
    whole = np.tile(picture, (-(-SIDE // height), -(-SIDE // width), 3 // channels))
    return np.ascontiguousarray(whole[:SIDE, :SIDE])


def pasted(cutout: np.ndarray, ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A cut-out (H, W, 4) in front of a picture (224, 224, 3), at a random size and place, flipped or not.

    Examples
    --------
    >>> red = np.full((20, 40, 4), (255, 0, 0, 255), np.uint8)
    >>> int(pasted(red, np.zeros((224, 224, 3), np.uint8), np.random.default_rng(0))[..., 0].max())
    255
    """
    image = _scaled(cutout[:, ::-1] if rng.uniform() < 0.5 else cutout, rng.uniform(0.65, 0.95))
    return _in_front(image, ground, tuple(int(rng.integers(0, SIDE - length + 1)) for length in image.size))


def on_grey(cutout: np.ndarray) -> np.ndarray:
    """A cut-out (H, W, 4) in the middle of a grey square.

    Examples
    --------
    >>> on_grey(np.full((20, 40, 4), (255, 0, 0, 255), np.uint8))[0, 0]
    array([150, 150, 150], dtype=uint8)
    """
    image = _scaled(cutout, 0.95)
    ground = np.full((SIDE, SIDE, 3), GREY, np.uint8)
    return _in_front(image, ground, tuple((SIDE - length) // 2 for length in image.size))


def _scaled(cutout: np.ndarray, share: float) -> Any:
    """As an image without empty margins, with a longer side of that share of the picture."""
    module = optional_import("PIL.Image", "demo")
    image = module.fromarray(np.ascontiguousarray(cutout))
    image = image.crop(image.getchannel("A").getbbox())
    factor = share * SIDE / max(image.size)
    return image.resize([max(1, int(factor * length)) for length in image.size], module.Resampling.BICUBIC)


def _in_front(image: Any, ground: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
    picture = optional_import("PIL.Image", "demo").fromarray(ground)
    picture.paste(image, place, image)
    return np.asarray(picture)
