"""Influence against libraries that others wrote, in a process of its own."""

from __future__ import annotations

import pytest

from tests.peers.locate import run_with_peers

# statsmodels and we stop fitting at slightly different parameters.
LIMITS = {"captum": 1e-5, "statsmodels": 1e-6}


@pytest.mark.parametrize("peer", LIMITS)
def test_agrees_with(peer: str) -> None:
    found = run_with_peers("tests.peers.influence_peers", peer, peer)
    assert found
    for case, difference in found.items():
        assert difference < LIMITS[peer], case
