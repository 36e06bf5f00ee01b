"""The demo's measurements and its eager baseline."""

from __future__ import annotations

import pytest
import torch

import xai_fast
from benchmarks.peers.eager_chain import eager_rollout
from xai_fast.demo.measure import compare, peak_memory
from xai_fast.demo.rollout.costs import eager_chain

CPU = torch.device("cpu")


def test_eager_chain_is_rollout() -> None:
    attentions = [torch.rand(2, 3, 9, 9, dtype=torch.float64).softmax(-1) for _ in range(4)]
    expected = xai_fast.attention_rollout(attentions, token=None)
    torch.testing.assert_close(eager_chain(attentions), expected)
    torch.testing.assert_close(eager_rollout(attentions), expected)


@pytest.mark.parametrize("head_fusion", ["mean", "max", "min", "sum"])
def test_benchmark_peer_agrees(head_fusion: str) -> None:
    attentions = [torch.rand(2, 3, 9, 9, dtype=torch.float64).softmax(-1) for _ in range(4)]
    torch.testing.assert_close(
        eager_rollout(attentions, head_fusion, discard_ratio=0.5),
        xai_fast.attention_rollout(attentions, token=None, head_fusion=head_fusion, discard_ratio=0.5),
    )


def test_peak_memory_sees_what_is_freed_again() -> None:
    mib = 2**20
    small = peak_memory(lambda: None, CPU)
    if small is None:
        pytest.skip("no high-water mark on this system")

    def work() -> float:
        torch.ones(16 * mib)  # 64 MiB, dropped at once
        return float(torch.ones(8 * mib).sum())

    large = peak_memory(work, CPU)
    assert small < 4 * mib
    assert large is not None
    # Both together where the allocator had room for the first on its heap and keeps it.
    assert 63 * mib < large < 112 * mib


def test_compare_calls_in_turn() -> None:
    order: list[str] = []
    ticks: list[None] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    measured = compare(calls, repeats=2, device=CPU, tick=lambda: ticks.append(None))
    assert order == ["a", "b"] * 3 + ["a", "b"]
    assert len(ticks) == 2 * (2 + 2)
    assert all(cost.seconds >= 0 for cost in measured.values())


def test_compare_needs_a_repeat() -> None:
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        compare({}, repeats=0, device=CPU)
