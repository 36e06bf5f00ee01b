"""Captum's sensitivity and infidelity against ours, on the same perturbations."""

from __future__ import annotations

from tests.peers.locate import run_with_peers


def test_agrees_with_captum() -> None:
    found = run_with_peers("tests.peers.metrics_peers", "captum")
    assert len(found) == 10
    for case, difference in found.items():
        assert difference < 1e-5, case
