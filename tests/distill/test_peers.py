"""Against interpret: the same purification, and the same shapes of one teacher."""

from __future__ import annotations

from tests.peers.locate import run_with_peers


def test_interpret() -> None:
    found = run_with_peers("tests.peers.distill_peers", "interpret")
    assert max(found["purification"].values()) < 1e-12
    students = found["students"]
    assert students["ours"] > 0.9999
    assert students["ours"] >= students["interpret"]
    assert students["apart"] < 0.1
