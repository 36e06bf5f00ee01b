"""Dates in words, and an encoder-decoder of them trained for a moment."""

from __future__ import annotations

import datetime

import pytest
import torch

from xai_fast.demo.recurrent import spelled_dates
from xai_fast.demo.recurrent.figures import alignment_figures
from xai_fast.demo.recurrent.spelled_dates import FIELDS, SPELLINGS, explain_dates, spell_dates

pytest.importorskip("matplotlib")


def test_spelled_dates_say_what_is_written() -> None:
    dates = spell_dates(400, seed=1)
    assert len({date.written for date in dates}) == 400
    assert {date.spelling for date in dates} == set(SPELLINGS)
    for date in dates:
        day = datetime.date.fromisoformat(date.written)
        says = {
            f: [t for t, g in zip(date.tokens, date.fields, strict=True) if g == f] for f in ("year", "month", "day", "")
        }
        assert "".join(says["year"]) == str(day.year)
        assert "".join(says["day"]) == str(day.day)
        assert says["month"] in ([day.strftime("%B")], [day.strftime("%b")])
        for token in says[""]:
            assert token in (",", ".", day.strftime("%A"), day.strftime("%a"))
    assert "".join(f[:1] or "-" for f in FIELDS) == "yyyy-mm-dd"


def test_dates_read_well() -> None:
    spelled = [spelled_dates._spell(datetime.date(2021, 5, 13), s).text for s in SPELLINGS]
    assert spelled[:3] == ["13 May 2021", "May 13, 2021", "Thursday, 13 May 2021"]
    assert spelled[3:6] == ["Thu, May 13, 2021", "13. May 2021", "Thursday, May 13, 2021"]
    assert spelled[6:] == ["2021 May 13", "Thu 2021 May 13"]


def test_dates_are_aligned_with_their_fields() -> None:
    ticks: list[int] = []
    found = explain_dates(count=900, tests=60, epochs=6, dim=16, hidden=32, tick=lambda: ticks.append(1))
    assert (found.train, found.tests, len(ticks)) == (840, 60, 6)
    assert list(found.shares) == ["year", "month", "day", "all"]
    share = found.shares["all"]
    assert 0.2 < share.uniform < 0.5
    assert share.plain > 1.2 * share.uniform
    assert 0 <= share.signed <= 1
    # A year has four digits, month and day two each.
    of_fields = [found.shares[field].plain for field in ("year", "month", "day")]
    assert share.plain == pytest.approx((4 * of_fields[0] + 2 * of_fields[1] + 2 * of_fields[2]) / 8, rel=1e-5)
    assert found.against.keys() == {"year", "month", "day", "-"}
    for alignment in found.alignments:
        shape = (len(alignment.written), len(alignment.date.tokens))
        assert alignment.attention.shape == alignment.signed.shape == shape
        torch.testing.assert_close(alignment.attention.sum(-1), torch.ones(shape[0]))
    plain, signed = alignment_figures(found.alignments[0])
    assert [t.get_text() for t in plain.axes[0].get_xticklabels()] == found.alignments[0].date.tokens
    assert signed.axes[0].collections[0].get_clim() == (-1, 1)


def test_shares_and_what_speaks_against() -> None:
    """One date whose digits all look at its first token, the day; half of them without a right to."""
    date = spelled_dates._spell(datetime.date(2021, 5, 3), "dmy")
    attention = torch.zeros(1, len(FIELDS), len(date.tokens))
    attention[..., 0], attention[..., 1] = 0.75, 0.25
    signed = -attention
    signed[:, 8:, 0] = 0.3
    signed[:, 8:, 1] = 0.1
    shares = spelled_dates._shares(attention, signed, [date])
    assert (shares["day"].plain, shares["month"].plain, shares["year"].plain) == (0.75, 0.25, 0)
    assert shares["day"].signed == pytest.approx(0.75)
    assert shares["all"].plain == pytest.approx((2 * 0.75 + 2 * 0.25) / 8)
    assert shares["day"].uniform == 0.5
    assert spelled_dates._against(attention, signed) == {"year": 1, "month": 1, "day": 0, "-": 1}


def test_dates_are_refused() -> None:
    with pytest.raises(ValueError, match="count: expected 1 to 73049, got 0"):
        spell_dates(0)
    with pytest.raises(ValueError, match="tests: expected 1 to 9, got 10"):
        explain_dates(count=10, tests=10)
