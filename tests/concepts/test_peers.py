"""Captum's TCAV against ours, with the same vectors."""

from __future__ import annotations

from tests.peers.locate import run_with_peers


def test_agrees_with_captum() -> None:
    found = run_with_peers("tests.peers.concepts_peers", "captum")
    assert len(found) == 7
    for case, difference in found.items():
        assert difference < (1e-6 if "sign_count" in case else 1e-4), case
