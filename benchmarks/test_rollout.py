"""Rollout against its peers: rows with the attention given, the full matrix, rows streamed from q and k, call overhead.

Run: make bench, or pytest benchmarks/test_rollout.py -s [--write-results] [--threads N]
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import xai_fast as xf
from benchmarks.harness import Table, alternate, synchronize
from benchmarks.peers.eager_chain import eager_rollout
from benchmarks.peers.fast_vit_rollout import fast_vit_rollout
from benchmarks.peers.flex_rows import flex_rows
from benchmarks.peers.row_chain import row_chain
from xai_fast.demo.measure import peak_memory
from xai_fast.demo.models.dinov2 import WeightsUnavailable, load_dinov2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GIVEN = [(12, 8, 12, 197), (24, 1, 16, 577), (12, 1, 12, 1024)]
STREAMED = [1024, 2048, 4096]

Peers = dict[str, Callable[[], object]]


def attentions_of(layers: int, batch: int, heads: int, tokens: int) -> torch.Tensor:
    return torch.rand(layers, batch, heads, tokens, tokens, device=DEVICE).softmax(-1)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def report(table: Table, case: str, times: dict[str, float], ours: str, roof: tuple[str, float]) -> None:
    """One line a peer: time, time relative to ours, and how near it is to the roof measured in the same run."""
    name, floor = roof
    for peer, seconds in times.items():
        table.add(
            case=case,
            method=peer,
            **{"ms": ms(seconds), "relative to ours": f"{seconds / times[ours]:.2f}", name: f"{floor / seconds:.2f}"},
        )


@pytest.mark.parametrize("shape", GIVEN, ids=str)
def test_rows_given(table: Table, benchmark, shape: tuple[int, ...]) -> None:
    attentions = attentions_of(*shape)
    half = attentions.bfloat16()
    compiled = torch.compile(row_chain)
    peers: Peers = {
        "xai_fast": lambda: xf.attention_rollout(attentions),
        "xai_fast bf16": lambda: xf.attention_rollout(half),
        "torch row chain": lambda: row_chain(attentions),
        "torch.compile of the row chain": lambda: compiled(attentions),
        "eager chain (vit-explain, Abnar)": lambda: eager_rollout(attentions)[:, 0],
        "fast-vit-rollout": lambda: fast_vit_rollout(attentions)[:, 0],
        "read A once (A.sum())": lambda: attentions.sum(),
        "read bf16 A once": lambda: half.sum(),
    }
    expected = row_chain(attentions)
    for name, call in peers.items():
        if "read" not in name:
            torch.testing.assert_close(call(), expected.to(call().dtype), rtol=2e-2 if "bf16" in name else 1e-4, atol=1e-5)
    times = alternate(peers)
    report(
        table,
        f"rows, A given, (L,B,H,N) = {shape}",
        times,
        "xai_fast",
        ("share of read bandwidth", times["read A once (A.sum())"]),
    )
    benchmark.pedantic(peers["xai_fast"], rounds=3)
    benchmark.extra_info.update(times)


@pytest.mark.parametrize("shape", GIVEN, ids=str)
def test_full_given(table: Table, benchmark, shape: tuple[int, ...]) -> None:
    attentions = attentions_of(*shape)
    layers, batch, _, tokens = shape
    square = torch.rand(batch, tokens, tokens, device=DEVICE)
    peers: Peers = {
        "xai_fast": lambda: xf.attention_rollout(attentions, token=None),
        "eager chain (vit-explain, Abnar)": lambda: eager_rollout(attentions),
        "fast-vit-rollout": lambda: fast_vit_rollout(attentions),
        "read A once, and the N^3 products in torch": lambda: [
            attentions.sum(),
            *(torch.bmm(square, square) for _ in range(layers - 1)),
        ],
    }
    torch.testing.assert_close(peers["xai_fast"](), eager_rollout(attentions), rtol=1e-4, atol=1e-6)
    times = alternate(peers)
    report(
        table,
        f"full matrix, (L,B,H,N) = {shape}",
        times,
        "xai_fast",
        ("share of torch's roof", times["read A once, and the N^3 products in torch"]),
    )
    benchmark.pedantic(peers["xai_fast"], rounds=3)
    benchmark.extra_info.update(times)


@pytest.mark.parametrize("tokens", STREAMED)
def test_rows_streamed(table: Table, benchmark, tokens: int) -> None:
    heads, dim = 12, 64
    query, key, value = (torch.randn(1, heads, tokens, dim, device=DEVICE) for _ in range(3))
    rows = torch.rand(1, 1, tokens, device=DEVICE)
    large = torch.rand(4096, 4096, device=DEVICE)
    peers: Peers = {
        "xai_fast": lambda: xf.ops.rollout_rows_qk(query, key, rows),
        "xai_fast causal": lambda: xf.ops.rollout_rows_qk(query, key, rows, is_causal=True),
        "SDPA forward": lambda: F.scaled_dot_product_attention(query, key, value),
        "FlexAttention, q and k swapped": lambda: flex_rows(query, key, rows),
        "materialised: softmax(QK^T), then the row step": lambda: xf.ops.rollout_rows(
            xf.ops.attention_probabilities(query, key), rows
        ),
        "GEMM 4096^3": lambda: large @ large,
    }
    torch.testing.assert_close(peers["xai_fast"](), peers["FlexAttention, q and k swapped"](), rtol=1e-4, atol=1e-5)
    times = alternate(peers)
    flops = 2 * heads * tokens**2 * dim
    floor = flops / (2 * 4096**3 / times.pop("GEMM 4096^3"))
    report(
        table,
        f"rows streamed, fp32, H = {heads}, d = {dim}, N = {tokens}",
        times,
        "xai_fast",
        ("share of GEMM peak (2 N^2 d H flops)", floor),
    )
    benchmark.pedantic(peers["xai_fast"], rounds=3)
    benchmark.extra_info.update(times)


def test_streamed_memory(table: Table) -> None:
    tokens, heads, dim = 16384, 12, 64
    query, key = (torch.randn(1, heads, tokens, dim, device=DEVICE) for _ in range(2))
    rows = torch.rand(1, 1, tokens, device=DEVICE)
    extra = peak_memory(lambda: xf.ops.rollout_rows_qk(query, key, rows), torch.device(DEVICE))
    assert extra is not None
    assert extra < 64 * 2**20
    table.add(case="peak extra memory, streamed, N = 16384, H = 12, d = 64", method="xai_fast", MB=f"{extra / 2**20:.1f}")
    table.add(
        case="peak extra memory, streamed, N = 16384, H = 12, d = 64",
        method="one layer's attention matrix (computed, not allocated)",
        MB=f"{heads * tokens**2 * 4 / 2**20:.1f}",
    )


class EmptyMode(TorchFunctionMode):
    """What torch itself takes for a function mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class HoldingMode(EmptyMode):
    """The floor of any capture by a function mode: nothing but the memory of q and k, which the model cannot use again."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.held.append(args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_capture(table: Table, batch: int) -> None:
    """What a forward pass costs while it is captured: DINOv2 ViT-S/14, 224 px."""
    try:
        model = load_dinov2().eval().to(DEVICE)
    except (ImportError, WeightsUnavailable) as error:
        pytest.skip(str(error))
    pixels = torch.randn(batch, 3, 224, 224, device=DEVICE)

    with xf.capture_attention(model):
        inside = model(pixels).last_hidden_state
    assert torch.equal(inside, model(pixels).last_hidden_state)
    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, context: AbstractContextManager[Any]) -> None:
        synchronize()
        start = time.perf_counter()
        with context:
            begin = time.perf_counter()
            model(pixels)
            synchronize()
            end = time.perf_counter()
        times[name].append(end - begin)
        times[f"{name}: entering and leaving"].append(begin - start + time.perf_counter() - end)

    captured, empty = "inside capture_attention", "inside an empty function mode of torch"
    holding = "inside a function mode that holds q and k"
    for _ in range(100 if batch == 1 else 30):
        timed("plain", nullcontext())
        timed(captured, xf.capture_attention(model))
        timed(empty, EmptyMode())
        timed(holding, HoldingMode())
    for name in ("plain", captured, f"{captured}: entering and leaving", empty, holding):
        pairs = list(zip(times[name], times["plain"], strict=True))[3:]
        table.add(
            case=f"forward pass of DINOv2 ViT-S/14, 224 px, batch {batch}",
            method=name,
            **{
                "ms": ms(statistics.median(seconds for seconds, _ in pairs)),
                "relative to plain": f"{statistics.median(seconds / plain for seconds, plain in pairs):.3f}",
            },
        )


def test_overhead(table: Table, benchmark) -> None:
    attention, rows, query = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4), torch.rand(1, 1, 4, 4)
    calls = {
        "rollout_rows": lambda: xf.ops.rollout_rows(attention, rows),
        "fuse_heads": lambda: xf.ops.fuse_heads(attention),
        "rollout_rows_qk": lambda: xf.ops.rollout_rows_qk(query, query, rows),
        "torch.mul (for scale)": lambda: torch.mul(rows, rows),
    }
    assert all(call().isfinite().all() for call in calls.values())

    def many(call: Callable[[], object]) -> Callable[[], None]:
        return lambda: [call() for _ in range(2000)] and None

    for name, seconds in alternate({name: many(call) for name, call in calls.items()}, rounds=15).items():
        table.add(case="overhead of a call on 4 tokens", method=name, us=f"{seconds / 2000 * 1e6:.1f}")
    benchmark(calls["rollout_rows"])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_gpu(table: Table) -> None:
    attentions = attentions_of(12, 8, 12, 577)
    copy = torch.empty_like(attentions)
    times = alternate(
        {"xai_fast": lambda: xf.attention_rollout(attentions, check_nan=False), "copy": lambda: copy.copy_(attentions)},
        rounds=25,
    )
    bandwidth = 2 * attentions.nbytes / times["copy"]
    table.add(
        case="GPU rows, A given, (12,8,12,577)",
        method="xai_fast",
        ms=ms(times["xai_fast"]),
        **{"share of copy bandwidth": f"{attentions.nbytes / times['xai_fast'] / bandwidth:.2f}"},
    )
    query, key, value = (torch.randn(1, 32, 8192, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    rows = torch.rand(1, 1, 8192, device=DEVICE)
    scores = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[1]
    peers: Peers = {
        "xai_fast": lambda: xf.ops.rollout_rows_qk(query, key, rows),
        "xai_fast, LSE given": lambda: xf.ops.rollout_rows_qk(query, key, rows, lse=scores),
        "SDPA forward": lambda: F.scaled_dot_product_attention(query, key, value),
    }
    report(
        table,
        "GPU rows streamed, bf16, N = 8192, H = 32, d = 128",
        alternate(peers, rounds=25),
        "xai_fast",
        ("share of peak", math.nan),
    )
