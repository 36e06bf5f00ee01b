"""Which part of a date in words each digit comes from: an encoder-decoder that writes "Monday, 3 May 2021" as "2021-05-03".

The data are made here: dates drawn at random and spelled with the names of the standard library's ``calendar``. Where a
digit comes from is known, so the alignment can be checked.
"""

from __future__ import annotations

import calendar
import datetime
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast.attention.rnn import BOS, EOS, PAD, Seq2Seq

from ..repeatable import one_thread, repeatable

__all__ = ["FIELDS", "Alignment", "Dates", "Share", "SpelledDate", "explain_dates", "spell_dates"]

# What output characters are made from; "-" from nothing.
FIELDS = ("year",) * 4 + ("",) + ("month",) * 2 + ("",) + ("day",) * 2
YEARS = (1900, 2099)
CHARACTERS = "0123456789-"
# Fields of a spelling: d day, m month, b its short name, y year, w weekday, a its short name; anything else is itself.
SPELLINGS = ("dmy", "md,y", "w,dmy", "a,md,y", "d.by", "w,bd,y", "ymd", "aybd")
SHOWN_SPELLINGS = ("w,dmy", "md,y", "d.by", "aybd")


@dataclass(frozen=True)
class SpelledDate:
    """A date in words: tokens, the field of the date that each says ("" for none), and the date as it shall be written."""

    spelling: str
    tokens: list[str]
    fields: list[str]
    written: str

    @property
    def text(self) -> str:
        """The tokens with spaces where a reader expects them."""
        return re.sub(r"(?<=\d) (?=\d)| (?=[,.])", "", " ".join(self.tokens))


@dataclass(frozen=True)
class Alignment:
    """A date, what the model wrote, and its weights (T, S), one row for each character that it wrote."""

    date: SpelledDate
    written: str
    attention: Tensor
    signed: Tensor


@dataclass(frozen=True)
class Share:
    """How much of the digits' attention lies on tokens of their own field, year, month or day, on average.

    Attributes
    ----------
    plain : float
        Of the attention.
    signed : float
        Of the signed attention where it is positive.
    uniform : float
        Of attention that is the same for all tokens.
    """

    plain: float
    signed: float
    uniform: float


@dataclass(frozen=True)
class Dates:
    """The encoder-decoder of dates.

    Attributes
    ----------
    train, tests : int
        Dates; no date is in both, in whatever spelling.
    accuracy : float
        Share of the held-out dates that are written without a fault.
    shares : dict of str to Share
        Over the digits of each field of the held-out dates, and over "all".
    against : dict of str to float
        For the digits of each field, and for "-": how often the token with the most attention has signed attention below
        zero.
    alignments : list of Alignment
        Of held-out dates, one in each of four spellings.
    seconds : float
        Of training.
    """

    train: int
    tests: int
    accuracy: float
    shares: dict[str, Share]
    against: dict[str, float]
    alignments: list[Alignment]
    seconds: float


def spell_dates(count: int, *, seed: int = 0) -> list[SpelledDate]:
    """Dates drawn at random, no two the same day, in one of several spellings each.

    Parameters
    ----------
    count : int
    seed : int

    Raises
    ------
    ValueError
        If there are not as many days from 1900 to 2099.

    Notes
    -----
    The names are those of the current locale: "Monday" and "May" unless the program has set another.

    Examples
    --------
    >>> date = spell_dates(1)[0]
    >>> len(date.tokens) == len(date.fields), len(date.written)
    (True, 10)
    """
    first, last = datetime.date(YEARS[0], 1, 1).toordinal(), datetime.date(YEARS[1], 12, 31).toordinal()
    if not 0 < count <= last - first + 1:
        raise ValueError(f"count: expected 1 to {last - first + 1}, got {count}")
    generator = np.random.default_rng(seed)
    days = generator.choice(np.arange(first, last + 1), count, replace=False)
    spellings = generator.integers(len(SPELLINGS), size=count)
    return [_spell(datetime.date.fromordinal(int(d)), SPELLINGS[s]) for d, s in zip(days, spellings, strict=True)]


def _spell(date: datetime.date, spelling: str) -> SpelledDate:
    says: dict[str, tuple[list[str], str]] = {
        "d": (list(str(date.day)), "day"),
        "m": ([calendar.month_name[date.month]], "month"),
        "b": ([calendar.month_abbr[date.month]], "month"),
        "y": (list(str(date.year)), "year"),
        "w": ([calendar.day_name[date.weekday()]], ""),
        "a": ([calendar.day_abbr[date.weekday()]], ""),
    }
    parts = [says.get(letter, ([letter], "")) for letter in spelling]
    fields = [field for tokens, field in parts for _ in tokens]
    return SpelledDate(spelling, [token for tokens, _ in parts for token in tokens], fields, date.isoformat())


def explain_dates(
    *,
    count: int = 5000,
    tests: int = 500,
    epochs: int = 5,
    dim: int = 32,
    hidden: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tick: Callable[[], object] = lambda: None,
) -> Dates:
    """Train the encoder-decoder and check where its digits come from.

    Parameters
    ----------
    count : int
        Dates in all.
    tests : int
        Of these, held out.
    epochs, dim, hidden : int
    seed : int
    device : device
        Of the model.
    tick : callable
        Called after each epoch.

    Raises
    ------
    ValueError
        If `tests` leaves nothing to learn from, or there are not as many days.

    Examples
    --------
    >>> explain_dates().accuracy  # doctest: +SKIP
    1.0
    """
    if not 0 < tests < count:
        raise ValueError(f"tests: expected 1 to {count - 1}, got {tests}")
    dates = spell_dates(count, seed=seed)
    held, train = dates[:tests], dates[tests:]
    start = time.perf_counter()
    with repeatable(seed):
        model = _train(train, epochs, dim, hidden, torch.device(device), tick)
    seconds = time.perf_counter() - start
    with one_thread():
        found = model.explain(_sources(held, device), _targets(held, device))
        attention, signed = (x[:, : len(FIELDS)].cpu() for x in (found.attention, found.signed))
        written = [_written(row) for row in model.greedy(_sources(held, device), len(FIELDS) + 1)[0].tolist()]
        shown = [date for spelling in SHOWN_SPELLINGS for date in [d for d in held if d.spelling == spelling][:1]]
        return Dates(
            train=len(train),
            tests=tests,
            accuracy=float(np.mean([text == date.written for text, date in zip(written, held, strict=True)])),
            shares=_shares(attention, signed, held),
            against=_against(attention, signed),
            alignments=[_alignment(model, date, device) for date in shown],
            seconds=seconds,
        )


def _source_vocabulary() -> dict[str, int]:
    """Ids, from 1 on, of all tokens of a spelled date."""
    names = (calendar.month_name, calendar.month_abbr, calendar.day_name, calendar.day_abbr)
    tokens = dict.fromkeys([*"0123456789,.", *(name for group in names for name in group if name)])
    return {token: 1 + i for i, token in enumerate(tokens)}


def _sources(dates: Sequence[SpelledDate], device: torch.device | str) -> Tensor:
    vocabulary = _source_vocabulary()
    rows = [torch.tensor([vocabulary[token] for token in date.tokens]) for date in dates]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)


def _targets(dates: Sequence[SpelledDate], device: torch.device | str) -> Tensor:
    rows = [[*(1 + EOS + CHARACTERS.index(c) for c in date.written), EOS] for date in dates]
    return torch.tensor(rows, device=device)


def _written(ids: Sequence[int]) -> str:
    return "".join(CHARACTERS[i - 1 - EOS] for i in ids if i not in (PAD, BOS, EOS))


def _train(
    train: Sequence[SpelledDate], epochs: int, dim: int, hidden: int, device: torch.device, tick: Callable[[], object]
) -> Seq2Seq:
    model = Seq2Seq(1 + len(_source_vocabulary()), 1 + EOS + len(CHARACTERS), dim, hidden).to(device)
    sources, targets = _sources(train, device), _targets(train, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train)).split(64):
            logits, _ = model(sources[chosen], targets[chosen])
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten()).backward()
            optimizer.step()
        tick()
    return model.eval()


def _shares(attention: Tensor, signed: Tensor, dates: Sequence[SpelledDate]) -> dict[str, Share]:
    own = torch.zeros_like(attention, dtype=torch.bool)
    for sample, date in enumerate(dates):
        for row, field in enumerate(FIELDS):
            own[sample, row, : len(date.fields)] = torch.tensor([field != "" and field == f for f in date.fields])
    weights = (attention, signed.clamp_min(0), (attention > 0).double())
    rows = {field: _rows(field) for field in ("year", "month", "day")} | {"all": ~_rows("")}
    return {field: Share(*(_mean_share(w[:, chosen], own[:, chosen]) for w in weights)) for field, chosen in rows.items()}


def _against(attention: Tensor, signed: Tensor) -> dict[str, float]:
    below = signed.gather(-1, attention.argmax(-1, keepdim=True)).squeeze(-1) < 0
    return {field or "-": float(below[:, _rows(field)].float().mean()) for field in ("year", "month", "day", "")}


def _rows(field: str) -> Tensor:
    """Where among the written characters a field is."""
    return torch.tensor([field == f for f in FIELDS])


def _mean_share(weights: Tensor, own: Tensor) -> float:
    """The mean over rows of the share of the weights (..., S) at own tokens; a row without any weight has no share."""
    inside, total = (weights * own).sum(-1), weights.sum(-1)
    return float((inside[total > 0] / total[total > 0]).mean())


def _alignment(model: Seq2Seq, date: SpelledDate, device: torch.device | str) -> Alignment:
    found = model.explain(_sources([date], device), steps=len(FIELDS) + 1)
    written = _written(found.target[0].tolist())
    attention, signed = (x[0, : len(written)].cpu() for x in (found.attention, found.signed))
    return Alignment(date, written, attention, signed)
