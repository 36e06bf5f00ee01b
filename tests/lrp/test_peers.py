"""LRP against libraries that others wrote, each in a process of its own."""

from __future__ import annotations

import pytest

from tests.peers.locate import run_with_peers

# lxt adds eps without the sign of the denominator; Captum applies the epsilon rule at pooling too.
LIMITS = {"zennit": 1e-10, "captum": 1e-7, "lxt": 1e-6, "autolrp": 1e-8}


@pytest.mark.parametrize("peer", ["zennit", "captum", "lxt", "autolrp"])
def test_agrees_with(peer: str) -> None:
    found = run_with_peers("tests.peers.lrp_peers", peer, peer)
    assert found
    for case, difference in found.items():
        assert difference < LIMITS[peer], case


def test_timm() -> None:
    found = run_with_peers("tests.peers.lrp_timm", "timm")
    assert found["identical"]
    assert found["difference"] < 1e-4
    assert found["heads"] == {f"blocks.{i}.attn": [2, 4, 17] for i in range(3)}
    assert found["heads written out"] == list(found["heads"])
