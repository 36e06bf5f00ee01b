"""The compiled rollout kernels (CPU bodies, emulated CUDA, CUDA) against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.emulator.build import sanitized
from tests.implementations import Implementation, assert_order_of_threads_does_not_matter, available
from tests.tolerances import assert_close_to_reference
from xai_fast.reference import rollout as reference

# Sanitizers look at memory, not at numbers, and are ten times slower: every code path, but not every combination.
DTYPES = [torch.float32, torch.bfloat16] if sanitized() else [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FUSIONS = ["mean", "max"] if sanitized() else ["mean", "sum", "max", "min"]
ROW_SHAPES = [(1, 1, 1, 1), (2, 3, 7, 2), (1, 4, 33, 1), (3, 5, 66, 3), (1, 2, 130, 9)]


def attention_of(batch: int, heads: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, tokens, dtype=torch.float64).mul(2).softmax(-1).to(dtype)


def check_rows(implementation: Implementation, attention: torch.Tensor, rows: torch.Tensor, *options: object) -> None:
    actual = implementation("rollout_rows", attention, rows, *options)
    exact = reference.rollout_rows(attention.double(), rows.double(), *options)
    assert actual.dtype == rows.dtype
    assert_close_to_reference(actual, exact, reference.rollout_rows(attention, rows, *options))


def check_fused(implementation: Implementation, attention: torch.Tensor, *options: object) -> None:
    exact = reference.fuse_heads(attention.double(), *options)
    for wide in (False, True):
        actual = implementation("fuse_heads", attention, *options, wide)
        assert actual.dtype == (reference.accumulate_dtype(attention.dtype) if wide else attention.dtype)
        assert actual.is_contiguous()
        assert_close_to_reference(actual, exact, reference.fuse_heads(attention, *options, wide))


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("normalize", [True] if sanitized() else [True, False])
def test_given_attention(
    implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, fusion: str, normalize: bool
) -> None:
    batch, heads, tokens, n_rows = shape
    attention = attention_of(batch, heads, tokens, dtype)
    rows = torch.rand(batch, n_rows, tokens, dtype=torch.float64).to(dtype)
    for residual in (0.0, 1.0, 0.3):
        check_rows(implementation, attention, rows, fusion, residual, normalize)
        check_fused(implementation, attention, fusion, residual, normalize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number(implementation: Implementation, dtype: torch.dtype) -> None:
    """Read exactly, and written rounded to nearest, ties (the mean of neighbours) to even."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for fusion, partner in (("mean", numbers.roll(1)), ("sum", numbers.roll(1)), ("mean", numbers.roll(-(2**13) - 77))):
        pairs = torch.stack([numbers, partner]).view(1, 2, 256, 256)
        wide, narrow = (implementation("fuse_heads", pairs, fusion, 0.0, False, wide) for wide in (True, False))
        exact = pairs.float().sum(1) * (0.5 if fusion == "mean" else 1.0)
        torch.testing.assert_close(wide, exact, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(narrow, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_attention(implementation: Implementation, dtype: torch.dtype) -> None:
    """Slices, gaps between rows, swapped batch and head, broadcast batch, transposed keys, every alignment."""
    base = attention_of(4, 6, 24, dtype)
    views = [
        base[1:3, ::2, 3:20, 3:20],
        base[:, :, ::1, :][..., 1:18, 5:22],
        base.transpose(0, 1)[:2],
        base[:1].expand(3, -1, -1, -1),
        base.transpose(-1, -2),
        base.flatten()[1 : 1 + 2 * 3 * 23 * 23].view(2, 3, 23, 23),
    ]
    for view in views:
        rows = torch.rand(view.shape[0], 2, view.shape[2]).to(dtype)
        check_rows(implementation, view, rows, "mean", 1.0, True)
        check_rows(implementation, view, rows, "max", 1.0, True)
        check_fused(implementation, view, "min", 0.5, True)


def test_rows_of_many_kinds(implementation: Implementation) -> None:
    attention = attention_of(2, 3, 19, torch.bfloat16)
    wide = torch.rand(2, 3, 19)
    check_rows(implementation, attention, wide, "mean", 1.0, True)  # float32 rows for 16-bit attention
    check_rows(implementation, attention, wide.bfloat16().flip(0)[:, ::2], "mean", 1.0, True)
    check_rows(implementation, attention, torch.zeros(2, 1, 19), "sum", 1.0, True)


def test_row_that_sums_to_zero_becomes_zero(implementation: Implementation) -> None:
    attention = attention_of(1, 2, 8, torch.float32)
    attention[:, :, 3] = 0
    rows = torch.ones(1, 1, 8)
    out = implementation("fuse_heads", attention, "mean", 0.0, True, False)
    assert out[0, 3].eq(0).all()
    assert torch.allclose(out[0].sum(-1), torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1]))
    check_rows(implementation, attention, rows, "mean", 0.0, True)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nan_spreads_as_in_a_product(implementation: Implementation, fusion: str) -> None:
    attention = attention_of(2, 3, 21, torch.float32)
    attention[1, 1, 5, 7] = math.nan
    rows = torch.zeros(2, 1, 21)
    rows[:, :, 0] = 1  # 0 * NaN is NaN: the row with the NaN is not skipped
    out = implementation("rollout_rows", attention, rows, fusion, 1.0, True)
    assert out[1].isnan().any()
    assert not out[0].isnan().any()
    fused = implementation("fuse_heads", attention, fusion, 1.0, False, False)
    assert fused[1, 5, 7].isnan()
    assert fused.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_16_bit_values(implementation: Implementation, dtype: torch.dtype) -> None:
    """Subnormals, the largest finite value, ties of rounding, inf."""
    bits = torch.randint(0, 1 << 15, (1, 2, 64, 64), dtype=torch.int32).to(torch.int16)
    attention = bits.view(dtype).clone()
    attention[attention.isnan()] = 1.0
    finite = attention.clone()
    finite[finite.isinf()] = 0.5
    for values in (attention, finite / 4):
        exact = values.float().amax(1)
        assert torch.equal(implementation("fuse_heads", values, "max", 0.0, False, False).float(), exact)
    halves = torch.arange(64 * 64, dtype=torch.float32).view(1, 1, 64, 64).div(4099).to(dtype)
    pair = torch.cat([halves, halves.flip(-1)], 1)
    expected = (pair.float().sum(1) / 2).to(dtype)
    assert torch.equal(implementation("fuse_heads", pair, "mean", 0.0, False, False), expected)


# (B, H, Hkv, N, D, R); the emulator, which runs one GPU thread after the other, takes the short ones.
STREAM_SHAPES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 7, 8, 2), (1, 2, 2, 33, 40, 1), (1, 2, 1, 70, 72, 3), (2, 6, 2, 130, 128, 1)]
MASKS = ["none", "boolean", "bias"] if sanitized() else ["none", "padding", "boolean", "bias", "float32 bias"]


def masks_for(batch: int, heads: int, tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    padding = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
    padding[0, ..., tokens // 2 :] = tokens == 1
    some = torch.rand(1, heads, tokens, tokens) > 0.4
    some[:, :, 0] = False  # a query whose keys are all masked
    bias = torch.randn(batch, heads, tokens, tokens).to(dtype)
    bias[:, :1, -1] = -math.inf  # masked in one head only
    return {
        "none": None,
        "padding": padding,
        "boolean": some,
        "bias": bias,
        "float32 bias": torch.randn(1, 1, tokens, tokens),
    }


def check_streamed(
    implementation: Implementation, q, k, rows, mask, lse, scale, causal, fusion, residual, normalize
) -> None:
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact_lse = None if lse is None else lse.double()
    options = (scale, causal, fusion, residual, normalize)
    exact = reference.rollout_rows_qk(q.double(), k.double(), rows.double(), exact_mask, exact_lse, *options)
    same = reference.rollout_rows_qk(q, k, rows, mask, lse, *options)
    actual = implementation("rollout_rows_qk", q, k, rows, mask, lse, *options)
    assert actual.dtype == rows.dtype
    assert_close_to_reference(actual, exact, same)


@pytest.mark.parametrize("shape", STREAM_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_streamed(
    implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, mask: str, causal: bool
) -> None:
    batch, heads, kv_heads, tokens, dim, n_rows = shape
    if implementation.emulated and (tokens > 100 or (tokens > 40 and mask in ("padding", "float32 bias"))):
        pytest.skip("too long for the emulator; shorter shapes cover it")
    q = torch.randn(batch, heads, tokens, dim, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, kv_heads, tokens, dim, dtype=torch.float64).to(dtype)
    rows = torch.rand(batch, n_rows, tokens, dtype=torch.float64).to(dtype)
    rows[..., ::3] = 0
    chosen = masks_for(batch, heads, tokens, dtype)[mask]
    for fusion in ("mean", "max") if implementation.emulated else FUSIONS:
        check_streamed(implementation, q, k, rows, chosen, None, None, causal, fusion, 1.0, True)
    if not implementation.emulated or tokens < 30:
        check_streamed(implementation, q, k, rows, chosen, None, 0.3, causal, "mean", 0.5, False)
        check_streamed(implementation, q, k, rows, chosen, None, None, causal, "min", 0.0, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_streamed_with_lse(implementation: Implementation, dtype: torch.dtype, fusion: str) -> None:
    q, k = torch.randn(2, 4, 45, 32).to(dtype), torch.randn(2, 2, 45, 32).to(dtype)
    mask = torch.rand(2, 1, 1, 45) > 0.3
    wide = reference.accumulate_dtype(dtype)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)) / math.sqrt(32)
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1).to(wide)
    rows = torch.rand(2, 2, 45).to(dtype)
    check_streamed(implementation, q, k, rows, mask, lse, None, False, fusion, 1.0, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_strides(implementation: Implementation, dtype: torch.dtype) -> None:
    """Views into a packed (B, N, 3, H, D) projection, sliced batches, transposed features, odd offsets."""
    packed = torch.randn(3, 29, 3, 4, 24).to(dtype)
    q, k = packed[:, :, 0].transpose(1, 2), packed[:, :, 1].transpose(1, 2)
    rows = torch.rand(3, 1, 29).to(dtype)
    check_streamed(implementation, q, k, rows, None, None, None, False, "mean", 1.0, True)
    check_streamed(implementation, q[1:], k[1:], rows[1:], None, None, None, True, "max", 1.0, True)
    odd_q, odd_k = packed[:, :, 0, :, 1:22].transpose(1, 2), packed[:, :, 1, :, 3:24].transpose(1, 2)
    check_streamed(implementation, odd_q, odd_k, rows, None, None, None, False, "mean", 1.0, True)
    features_first = torch.randn(3, 4, 24, 29).to(dtype).transpose(-1, -2)
    check_streamed(implementation, features_first, k, rows, None, None, None, False, "mean", 1.0, True)
    mask = (torch.rand(29, 29, 3) > 0.3).permute(2, 1, 0).unsqueeze(1)  # no unit stride in the last dimension
    check_streamed(implementation, q, k, rows, mask, None, None, False, "mean", 1.0, True)


@pytest.mark.parametrize("magnitude", [30.0, 300.0])
def test_streamed_extreme_scores(implementation: Implementation, magnitude: float) -> None:
    """Scores far outside the range of exp: the maximum is subtracted before the exponential."""
    q, k = torch.randn(1, 2, 40, 16) * magnitude, torch.randn(1, 2, 40, 16)
    rows = torch.rand(1, 1, 40)
    check_streamed(implementation, q, k, rows, None, None, 1.0, False, "mean", 1.0, True)
    check_streamed(implementation, q, k, rows, None, None, 1.0, True, "max", 1.0, True)


def test_lowest_float_stands_for_minus_infinity(implementation: Implementation) -> None:
    """Models write finfo.min for -inf: the same result, also for a query whose keys are all removed."""
    q, k, rows = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8), torch.rand(2, 1, 20)
    removed = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    removed[1, :, :, 12:] = True
    removed[0, :, 4] = True
    results = []
    for number in (-math.inf, torch.finfo(torch.float32).min):
        mask = torch.zeros(2, 1, 20, 20).masked_fill(removed, number)
        check_streamed(implementation, q, k, rows, mask, None, None, False, "mean", 1.0, True)
        results.append(implementation("rollout_rows_qk", q, k, rows, mask, None, None, False, "mean", 0.0, True))
    assert torch.equal(*results)


def test_streamed_nan(implementation: Implementation) -> None:
    q, k, rows = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8), torch.rand(2, 1, 20)
    q[1, 0, 3, 2] = math.nan
    out = implementation("rollout_rows_qk", q, k, rows, None, None, None, False, "mean", 1.0, True)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


def test_unused_queries_cost_nothing_and_change_nothing(implementation: Implementation) -> None:
    """A query with r = 0 is not computed: even a NaN in it does not reach the result."""
    q, k, rows = torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8), torch.zeros(1, 1, 70)
    rows[0, 0, 5] = 1
    expected = implementation("rollout_rows_qk", q, k, rows, None, None, None, False, "mean", 1.0, True)
    assert_close_to_reference(
        expected, reference.rollout_rows_qk(q, k, rows, None, None, None, False, "mean", 1.0, True).double()
    )


def test_empty_batch_and_no_rows(implementation: Implementation) -> None:
    for batch, n_rows in ((0, 1), (2, 0)):
        attention = torch.rand(batch, 2, 5, 5)
        rows = torch.rand(batch, n_rows, 5)
        assert implementation("rollout_rows", attention, rows, "mean", 1.0, True).shape == (batch, n_rows, 5)
        q = torch.rand(batch, 2, 5, 4)
        out = implementation("rollout_rows_qk", q, q, rows, None, None, None, False, "mean", 1.0, True)
        assert out.shape == (batch, n_rows, 5)
    assert implementation("fuse_heads", torch.rand(0, 2, 5, 5), "mean", 1.0, True, False).shape == (0, 5, 5)


@st.composite
def problems(draw: st.DrawFn, most_tokens: int = 75) -> dict[str, object]:
    return {
        "batch": draw(st.integers(1, 2)),
        "kv_heads": draw(st.integers(1, 3)),
        "repeat": draw(st.integers(1, 3)),
        "tokens": draw(st.integers(1, most_tokens)),
        "dim": draw(st.integers(1, 70)),
        "n_rows": draw(st.integers(1, 5)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "fusion": draw(st.sampled_from(FUSIONS)),
        "causal": draw(st.booleans()),
        "normalize": draw(st.booleans()),
        "residual": draw(st.sampled_from([0.0, 0.25, 1.0, 3.0])),
        "mask": draw(st.sampled_from(MASKS)),
        "seed": draw(st.integers(0, 1 << 16)),
    }


def check_problem(implementation: Implementation, p: dict) -> None:
    torch.manual_seed(p["seed"])
    heads = p["kv_heads"] * p["repeat"]
    rows = torch.rand(p["batch"], p["n_rows"], p["tokens"], dtype=torch.float64).to(p["dtype"])
    rows[torch.rand(rows.shape) < 0.3] = 0
    attention = attention_of(p["batch"], heads, p["tokens"], p["dtype"])
    options = (p["fusion"], p["residual"], p["normalize"])
    check_rows(implementation, attention, rows, *options)
    check_fused(implementation, attention, *options)
    q = torch.randn(p["batch"], heads, p["tokens"], p["dim"]).to(p["dtype"])
    k = torch.randn(p["batch"], p["kv_heads"], p["tokens"], p["dim"]).to(p["dtype"])
    mask = masks_for(p["batch"], heads, p["tokens"], p["dtype"])[p["mask"]]
    check_streamed(implementation, q, k, rows, mask, None, None, p["causal"], *options)


SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(SETTINGS, max_examples=20 if sanitized() else 150)
@given(p=problems())
def test_random_problems_cpu(p: dict) -> None:
    check_problem(available()[0], p)


@settings(SETTINGS, max_examples=8 if sanitized() else 25)
@given(p=problems(most_tokens=40))
def test_random_problems_cuda(p: dict) -> None:
    for implementation in available()[1:]:
        check_problem(implementation, p)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_emulated_kernels_do_not_depend_on_the_order_of_threads(seed: int) -> None:
    attention = attention_of(1, 3, 37, torch.float32)
    q, k, rows = torch.randn(1, 2, 37, 24), torch.randn(1, 1, 37, 24), torch.rand(1, 2, 37)
    half_q, half_k = q.half(), k.half()
    calls = [
        ("rollout_rows", attention, rows, "mean", 1.0, True),
        ("fuse_heads", attention, "max", 1.0, True, False),
        ("rollout_rows_qk", q, k, rows, None, None, None, True, "mean", 1.0, True),
        ("rollout_rows_qk", q, k, rows, None, None, None, False, "mean", 1.0, True),
        ("rollout_rows_qk", half_q, half_k, rows, None, None, None, False, "max", 1.0, True),
    ]
    assert_order_of_threads_does_not_matter(seed, calls)


@pytest.mark.parametrize("dim", [32, 100, 200])
def test_tf32_on_cuda(tf32_allowed: Callable[[], None], dim: int) -> None:
    """TF32 products keep ten bits of each factor: near the exact result, and used only where torch allows them."""
    q, k, rows = torch.randn(1, 2, 40, dim), torch.randn(1, 2, 40, dim), torch.rand(1, 1, 40)
    calls = [("rollout_rows_qk", q, k, rows, None, None, None, False, fusion, 1.0, True) for fusion in ("mean", "max")]
    exact = [implementation(*call) for implementation in available()[1:] for call in calls]
    tf32_allowed()
    rounded = [implementation(*call) for implementation in available()[1:] for call in calls]
    for a, b in zip(rounded, exact, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-4)
