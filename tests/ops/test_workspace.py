"""Working memory that a thread keeps from call to call."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import xai_fast as xf
from xai_fast.demo.measure import peak_memory


def _qkv(tokens: int, fill: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, 3, tokens, 16, generator=generator) + fill for _ in range(4)]


def _streamed(tokens: int, fill: float) -> tuple[Tensor, ...]:
    query, key, *_ = _qkv(tokens, fill)
    return (xf.ops.rollout_rows_qk(query, key, torch.ones(2, 1, tokens), is_causal=True),)


def _attention(tokens: int, fill: float) -> tuple[Tensor, ...]:
    return xf.ops.attention_relevance(*_qkv(tokens, fill))


def _targeted(tokens: int, fill: float) -> tuple[Tensor, ...]:
    return (xf.ops.targeted_rows(*_qkv(tokens, fill), torch.ones(2, 2, tokens)),)


def _probabilities(tokens: int, fill: float) -> Tensor:
    query, key, *_ = _qkv(tokens, 0.0)
    return (query @ key.mT).softmax(-1) + fill


def _av(tokens: int, fill: float) -> tuple[Tensor, ...]:
    return xf.ops.av_relevance(_probabilities(tokens, fill), *_qkv(tokens, fill)[2:])


def _rollout(tokens: int, fill: float) -> tuple[Tensor, ...]:
    layers = [_probabilities(tokens, fill) for _ in range(3)]
    return (xf.attention_rollout(layers, token=None, check_nan=False),)


def _top_k(tokens: int, fill: float) -> tuple[Tensor, ...]:
    x, delta, solutions, _ = (t.flatten(0, 2) for t in _qkv(tokens, fill))
    return tuple(xf.ops.influence_top_k(x, delta[:, :2], solutions[:5, :, None].expand(-1, -1, 2), 4))


CALLS = [_streamed, _attention, _targeted, _av, _rollout, _top_k]
Call = Callable[[int, float], tuple[Tensor, ...]]


def _in_new_thread(call: Call, tokens: int) -> tuple[Tensor, ...]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, tokens, 0.0).result()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("tokens", [1, 37, 64])
def test_what_an_earlier_call_left_is_not_read(call: Call, tokens: int) -> None:
    expected = _in_new_thread(call, tokens)
    call(80, math.nan)
    for actual, wanted in zip(call(tokens, 0.0), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("call", CALLS)
def test_threads_at_once(call: Call) -> None:
    sizes = [33, 90, 64, 17] * 5
    expected = {tokens: call(tokens, 0.0) for tokens in sizes}
    with ThreadPoolExecutor(4) as pool:
        for tokens, found in zip(sizes, pool.map(lambda n: call(n, 0.0), sizes), strict=True):
            assert all(map(torch.equal, found, expected[tokens]))


def test_peak_memory_counts_it_every_time() -> None:
    query = torch.randn(1, 12, 2048, 64)
    rows = torch.ones(1, 1, 2048)
    first, second = (peak_memory(lambda: xf.ops.rollout_rows_qk(query, query, rows), query.device) for _ in range(2))
    if first is None or second is None:
        pytest.skip("no high-water mark on this system")
    assert second > first / 2 > 2**20
