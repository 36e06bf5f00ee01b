"""The compiled kernels of attention relevance and targeted rows (CPU bodies, emulated CUDA, CUDA) against the float64
reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulator.build import sanitized
from tests.implementations import Implementation, assert_order_of_threads_does_not_matter
from tests.ops.relevance_checks import DTYPES, check, exactly, normal
from xai_fast.reference import relevance as reference

# ---- O = A V ---------------------------------------------------------------------------------------------------------

# (B, H, Hkv, Nq, Nk, D)
AV_SHAPES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 7, 9, 8), (1, 2, 1, 33, 70, 40), (2, 2, 2, 66, 34, 72), (1, 1, 1, 20, 40, 160)]


def av_problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, queries, keys, dim = shape
    attention = normal(batch, heads, queries, keys, dtype=torch.float64).softmax(-1).to(dtype)
    # Values of one sign: O does not cancel, so that dividing by it leaves digits to compare.
    return attention, normal(batch, kv_heads, keys, dim).abs().to(dtype), normal(batch, heads, queries, dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AV_SHAPES)
def test_av(implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    attention, value, relevance = av_problem(shape, dtype)
    for lam, eps in [(0.5, 1e-6), (0.0, 0.1), (1.0, 0.0)]:
        check(implementation, "av_relevance", attention, value, relevance, lam, eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_av_values_of_both_signs(implementation: Implementation, dtype: torch.dtype) -> None:
    attention, value, relevance = av_problem((1, 4, 2, 21, 30, 24), dtype)
    check(implementation, "av_relevance", attention, normal(*value.shape, dtype=dtype), relevance, 0.5, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_av_strides(implementation: Implementation, dtype: torch.dtype) -> None:
    attention, value, relevance = av_problem((3, 4, 4, 24, 26, 20), dtype)
    check(
        implementation,
        "av_relevance",
        attention[1:, ::2, 1:20, 3:20],
        value[1:, ::2, 3:20, 1:18],
        relevance[1:, ::2, 1:20, 1:18],
        0.5,
        0.1,
    )
    check(
        implementation,
        "av_relevance",
        attention.transpose(0, 1)[..., :3],
        value.transpose(0, 1)[:, :, :3],
        relevance.transpose(0, 1),
        0.5,
        0.1,
    )
    turned = attention.transpose(-1, -2).contiguous().transpose(-1, -2)
    check(
        implementation,
        "av_relevance",
        turned,
        value[:1].expand(3, -1, -1, -1),
        relevance[..., :1].expand(-1, -1, -1, 20),
        0.5,
        0.1,
    )


def test_av_zeros(implementation: Implementation) -> None:
    """O = 0 with eps = 0, rows without relevance, rows without attention."""
    attention, value, relevance = av_problem((1, 2, 1, 12, 15, 8), torch.float32)
    value[..., 3] = 0
    attention[:, 1, 4] = 0
    relevance[:, :, 5:7] = 0
    check(implementation, "av_relevance", attention, value, relevance, 0.5, 0.0)
    attention[0, 1, 9, 2] = math.nan
    to_attention, to_value = implementation("av_relevance", attention, value, relevance, 0.5, 0.1)
    assert to_value.isnan().any()
    assert not to_attention[0, 0].isnan().any()


# ---- attention from q, k, v ------------------------------------------------------------------------------------------

# (B, H, Hkv, Nq, Nk, D, Dv)
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 7, 9, 8, 8),
    (1, 2, 1, 33, 20, 40, 24),
    (1, 2, 2, 35, 70, 64, 64),
    (1, 1, 1, 40, 33, 72, 128),
    (1, 5, 1, 34, 20, 16, 8),
    (2, 6, 2, 130, 110, 32, 40),
]
MASKS = ["none", "boolean", "bias"] if sanitized() else ["none", "padding", "boolean", "bias", "float32 bias"]


def masks_for(batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    padding = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    padding[0, ..., keys // 2 :] = keys == 1
    some = torch.rand(1, heads, queries, keys) > 0.4
    some[:, :, 0] = False  # a query whose keys are all masked
    bias = torch.randn(batch, heads, queries, keys).to(dtype)
    bias[:, :1, -1] = -math.inf  # masked in one head only
    wide = torch.randn(1, 1, queries, keys)
    wide[..., 0] = torch.finfo(torch.float32).min
    return {"none": None, "padding": padding, "boolean": some, "bias": bias, "float32 bias": wide}


def attention_problem(shape: tuple[int, ...], dtype: torch.dtype, signed: bool = False) -> list[Tensor]:
    """query, key, value, upstream. Values of one sign unless `signed`, see av_problem."""
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    value = normal(batch, kv_heads, keys, value_dim)
    upstream = normal(batch, heads, queries, value_dim, dtype=dtype)
    upstream[:, :, 1::4] = 0  # queries without relevance
    value = (value if signed else value.abs() + 0.1).to(dtype)
    return [
        normal(batch, heads, queries, dim, dtype=dtype),
        normal(batch, kv_heads, keys, dim, dtype=dtype),
        value,
        upstream,
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(
    implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, mask: str, causal: bool
) -> None:
    batch, heads, _, queries, keys, _, _ = shape
    if implementation.emulated and (
        queries > 100 or (queries > 30 and (mask in ("padding", "float32 bias") or dtype == torch.float16))
    ):
        pytest.skip("too long for the emulator; shorter shapes cover it")
    problem = attention_problem(shape, dtype)
    chosen = masks_for(batch, heads, queries, keys, dtype)[mask]
    check(implementation, "attention_relevance", *problem, None, chosen, None, causal, 0.5, 1e-6, False)
    if not implementation.emulated or queries < 30:
        check(implementation, "attention_relevance", *problem, None, chosen, 0.3, causal, 0.0, 0.1, False)
        check(implementation, "attention_relevance", *problem, None, chosen, None, causal, 1.0, 0.1, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_attention_forms(implementation: Implementation, dtype: torch.dtype, eps: float, lam: float) -> None:
    """Relevances and gradients, with the output given and without."""
    problem = attention_problem((2, 4, 2, 19, 21, 16, 24), dtype)
    probs = torch.softmax(problem[0].double() @ problem[1].double().repeat_interleave(2, 1).transpose(-1, -2) / 4, -1)
    output = (probs @ problem[2].double().repeat_interleave(2, 1)).to(dtype)
    for gradient_form in (False, True):
        for given in (None, output):
            check(implementation, "attention_relevance", *problem, given, None, None, False, lam, eps, gradient_form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [0.0, 0.7])
def test_attention_with_lse(implementation: Implementation, dtype: torch.dtype, off: float) -> None:
    """As given: rows of P that do not sum to 1 show that it is used."""
    problem = attention_problem((2, 4, 2, 25, 25, 16, 24), dtype)
    mask = torch.rand(2, 1, 1, 25) > 0.3
    scores = (problem[0].double() @ problem[1].double().repeat_interleave(2, 1).transpose(-1, -2)) / 4
    causal = torch.ones(25, 25, dtype=torch.bool).tril()
    scores = scores.masked_fill(~(mask & causal), -math.inf)
    lse = scores.logsumexp(-1).to(reference.accumulate_dtype(dtype)) + off
    output = (scores.softmax(-1).nan_to_num() @ problem[2].double().repeat_interleave(2, 1)).to(dtype)
    for given in (None, output):
        check(implementation, "attention_relevance", *problem, given, mask, None, True, 0.5, 0.1, False, lse)
    check(implementation, "attention_relevance", *problem, None, mask, None, True, 0.0, 0.1, True, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_values_of_both_signs(implementation: Implementation, dtype: torch.dtype) -> None:
    problem = attention_problem((1, 4, 2, 21, 30, 24, 16), dtype, signed=True)
    check(implementation, "attention_relevance", *problem, None, None, None, True, 0.5, 0.1, False)
    check(implementation, "attention_relevance", *problem, None, None, None, False, 0.5, 1e-6, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_wide_heads(implementation: Implementation, dtype: torch.dtype) -> None:
    problem = attention_problem((1, 2, 1, 12, 18, 160, 136), dtype)
    check(implementation, "attention_relevance", *problem, None, None, None, True, 0.5, 0.1, False)
    check(implementation, "attention_relevance", *problem, None, None, None, False, 0.0, 0.1, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_strides(implementation: Implementation, dtype: torch.dtype) -> None:
    """Views into a packed (B, N, 3, H, D) projection, sliced batches, transposed features, odd offsets, expanded heads."""
    packed = normal(3, 19, 3, 4, 24, dtype=dtype)
    q, k, v = (packed[:, :, n].transpose(1, 2) for n in range(3))
    r = normal(3, 19, 4, 24, dtype=dtype).transpose(1, 2)
    v = v.abs()
    options = (None, None, None, False, 0.5, 0.1, False)
    check(implementation, "attention_relevance", q, k, v, r, *options)
    check(implementation, "attention_relevance", q[1:, :, 2:15], k[1:, ::2], v[1:, ::2], r[1:, :, 2:15], *options)
    check(
        implementation,
        "attention_relevance",
        q[..., 1:22],
        k[..., 3:24],
        v[..., 5:],
        r[..., 5:],
        r.abs()[..., 5:] + 1,
        *options[1:],
    )
    check(implementation, "attention_relevance", normal(3, 4, 24, 19, dtype=dtype).transpose(-1, -2), k, v, r, *options)
    check(
        implementation,
        "attention_relevance",
        q,
        k[:, :1].expand(-1, 4, -1, -1),
        v,
        r[:, :, :1].expand(-1, -1, 19, -1),
        *options,
    )
    mask = (torch.rand(19, 19, 3) > 0.3).permute(2, 1, 0).unsqueeze(1)  # no unit stride in the last dimension
    check(implementation, "attention_relevance", q, k, v, r, None, mask, *options[2:])


def test_attention_lowest_float_stands_for_minus_infinity(implementation: Implementation) -> None:
    """Also for a query whose keys are all removed: it passes nothing on."""
    problem = attention_problem((2, 2, 2, 20, 20, 8, 8), torch.float32)
    removed = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    removed[1, :, :, 12:] = True
    removed[0, :, 4] = True
    results = []
    for number in (-math.inf, torch.finfo(torch.float32).min):
        mask = torch.zeros(2, 1, 20, 20).masked_fill(removed, number)
        results.append(check(implementation, "attention_relevance", *problem, None, mask, None, False, 0.5, 1e-6, False))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[0][0][0, :, 4].eq(0).all()


@pytest.mark.parametrize("scale", [20.0, -20.0])
def test_attention_extreme_scores(implementation: Implementation, scale: float) -> None:
    """Scores around +-80 and beyond: the maximum is subtracted before the exponential."""
    problem = attention_problem((1, 2, 2, 24, 24, 16, 8), torch.float32)
    check(implementation, "attention_relevance", *problem, None, None, scale, False, 0.5, 1e-6, False)


def test_attention_zeros_and_nan(implementation: Implementation) -> None:
    """Outputs that are 0 pass nothing on; queries without relevance are not computed, not even their NaN."""
    query, key, value, upstream = attention_problem((2, 2, 1, 14, 14, 8, 8), torch.float32)
    value[..., 2] = 0
    check(implementation, "attention_relevance", query, key, value, upstream, None, None, None, False, 0.5, 0.0, False)
    expected = implementation("attention_relevance", query, key, value, upstream, None, None, None, False, 0.5, 0.1, False)
    assert upstream[1, 0, 5].eq(0).all()
    query[1, 0, 5, 2] = math.nan
    skipped = implementation("attention_relevance", query, key, value, upstream, None, None, None, False, 0.5, 0.1, False)
    assert torch.equal(skipped[1], expected[1])
    assert torch.equal(skipped[2], expected[2])
    query[1, 0, 6, 2] = math.nan
    to_query, to_key, to_value = implementation(
        "attention_relevance", query, key, value, upstream, None, None, None, False, 0.5, 0.1, False
    )
    assert to_query[1, 0, 6].isnan().all()
    assert to_key[1].isnan().all()
    assert to_value[1].isnan().all()
    assert not any(x[0].isnan().any() for x in (to_query, to_key, to_value))


def test_attention_without_relevance(implementation: Implementation) -> None:
    query, key, value, upstream = attention_problem((1, 2, 2, 70, 40, 8, 8), torch.float32)
    for result in implementation(
        "attention_relevance", query, key, value, upstream * 0, None, None, None, True, 0.5, 0.1, False
    ):
        assert result.eq(0).all()
    upstream[:, :, 1:] = 0  # one query has relevance: most tiles are skipped
    check(implementation, "attention_relevance", query, key, value, upstream, None, None, None, False, 0.5, 0.1, False)


# ---- targeted rows ---------------------------------------------------------------------------------------------------

# (B, H, Hkv, N, D, Dv, R)
TARGETED_SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 7, 8, 8, 2),
    (1, 2, 1, 33, 40, 24, 1),
    (1, 2, 2, 70, 24, 72, 6),
    (1, 5, 1, 34, 16, 8, 1),
    (2, 6, 2, 130, 32, 40, 1),
]


def targeted_problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """query, key, value, grad_out, rows; and a relevance of the output."""
    batch, heads, kv_heads, tokens, dim, value_dim, n_rows = shape
    query, key, value, relevance = attention_problem((batch, heads, kv_heads, tokens, tokens, dim, value_dim), dtype)
    rows = torch.rand(batch, n_rows, tokens, dtype=torch.float64).to(dtype)
    rows[..., 1::3] = 0
    return [query, key, value, normal(batch, heads, tokens, value_dim, dtype=dtype), rows], relevance


@pytest.mark.parametrize("shape", TARGETED_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_targeted(
    implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, mask: str, causal: bool
) -> None:
    batch, heads, _, tokens, _, _, _ = shape
    if implementation.emulated and (
        tokens > 100 or (tokens > 30 and (mask in ("padding", "float32 bias") or dtype == torch.float16))
    ):
        pytest.skip("too long for the emulator; shorter shapes cover it")
    problem, relevance = targeted_problem(shape, dtype)
    chosen = masks_for(batch, heads, tokens, tokens, dtype)[mask]
    ends = (0.5, 1e-6)
    check(implementation, "targeted_rows", *problem, chosen, None, None, None, None, causal, "mean", True, 1.0, True, *ends)
    if not implementation.emulated or tokens < 30:
        check(
            implementation,
            "targeted_rows",
            *problem,
            chosen,
            None,
            relevance,
            None,
            0.3,
            causal,
            "sum",
            True,
            0.5,
            True,
            *ends,
        )
        check(
            implementation,
            "targeted_rows",
            *problem,
            chosen,
            None,
            relevance,
            None,
            None,
            causal,
            "mean",
            False,
            0.0,
            False,
            *ends,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targeted_slots_without_work(implementation: Implementation, dtype: torch.dtype) -> None:
    """Causal blocks of early queries have fewer tiles than the sums have slots."""
    problem, _ = targeted_problem((1, 1, 1, 256, 8, 8, 1), dtype)
    ends = ("mean", True, 1.0, True, 0.5, 1e-6)
    check(implementation, "targeted_rows", *problem, None, None, None, None, None, True, *ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_that_fill_the_shared_memory(implementation: Implementation, dtype: torch.dtype) -> None:
    dim = 192 if dtype == torch.float64 else 256
    problem, _ = targeted_problem((1, 1, 1, 34, dim, dim, 1), dtype)
    ends = ("mean", True, 1.0, True, 0.5, 1e-6)
    check(implementation, "targeted_rows", *problem, None, None, None, None, None, False, *ends)


@pytest.mark.parametrize("dtype", DTYPES)
def test_targeted_with_lse_and_output(implementation: Implementation, dtype: torch.dtype) -> None:
    problem, relevance = targeted_problem((2, 4, 2, 25, 16, 24, 2), dtype)
    mask = torch.rand(2, 1, 1, 25) > 0.3
    scores = (problem[0].double() @ problem[1].double().repeat_interleave(2, 1).transpose(-1, -2)) / 4
    scores = scores.masked_fill(~mask, -math.inf)
    output = (scores.softmax(-1) @ problem[2].double().repeat_interleave(2, 1)).to(dtype)
    lse = scores.logsumexp(-1).to(reference.accumulate_dtype(dtype))
    for given in (None, output):
        check(
            implementation,
            "targeted_rows",
            *problem,
            mask,
            lse,
            relevance,
            given,
            None,
            False,
            "mean",
            True,
            1.0,
            True,
            0.5,
            0.1,
        )
    check(implementation, "targeted_rows", *problem, mask, lse, None, None, None, False, "sum", True, 1.0, False, 0.5, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_targeted_wide_heads(implementation: Implementation, dtype: torch.dtype) -> None:
    problem, relevance = targeted_problem((1, 2, 1, 19, 72, 160, 5), dtype)
    check(
        implementation, "targeted_rows", *problem, None, None, relevance, None, None, True, "mean", True, 1.0, True, 0.5, 0.1
    )
    problem, relevance = targeted_problem((1, 2, 1, 19, 104, 20, 3), dtype)
    check(
        implementation,
        "targeted_rows",
        *problem,
        None,
        None,
        relevance,
        None,
        None,
        False,
        "mean",
        True,
        1.0,
        True,
        0.5,
        0.1,
    )


def test_targeted_corner_cases(implementation: Implementation) -> None:
    """Rows whose sum is 0, rows of another dtype, queries that no row needs, NaN."""
    problem, _ = targeted_problem((2, 2, 2, 20, 8, 8, 2), torch.bfloat16)
    options = (None, None, None, None, None, False, "mean", True)
    zero = [*problem[:3], torch.zeros_like(problem[3]), problem[4]]
    out = check(implementation, "targeted_rows", *zero, *options, 0.0, True, 0.5, 0.1)
    assert out.eq(0).all()
    wide = [*problem[:4], torch.rand(2, 1, 20)]
    assert check(implementation, "targeted_rows", *wide, *options, 1.0, True, 0.5, 0.1).dtype == torch.float32
    expected = implementation("targeted_rows", *problem, *options, 1.0, True, 0.5, 0.1)
    assert problem[4][..., 1].eq(0).all()
    problem[0][1, 0, 1] = problem[3][1, 0, 1] = math.nan
    assert torch.equal(implementation("targeted_rows", *problem, *options, 1.0, True, 0.5, 0.1), expected)
    problem[3][1, 0, 2, 3] = math.nan
    out = implementation("targeted_rows", *problem, *options, 1.0, True, 0.5, 0.1)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_empty_batch(implementation: Implementation) -> None:
    q, v = torch.rand(0, 2, 5, 4), torch.rand(0, 2, 5, 3)
    for result in implementation("attention_relevance", q, q, v, v, None, None, None, False, 0.5, 0.1, False):
        assert result.numel() == 0
    to_attention, to_value = implementation("av_relevance", torch.rand(0, 2, 5, 5), v, v, 0.5, 0.1)
    assert to_attention.shape == (0, 2, 5, 5)
    assert to_value.shape == (0, 2, 5, 3)
    for batch, n_rows in ((0, 1), (2, 0)):
        q, rows = torch.rand(batch, 2, 5, 4), torch.rand(batch, n_rows, 5)
        out = implementation(
            "targeted_rows", q, q, q, q, rows, None, None, None, None, None, False, "mean", True, 1.0, True, 0.5, 0.1
        )
        assert out.shape == (batch, n_rows, 5)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_emulated_kernels_do_not_depend_on_the_order_of_threads(seed: int) -> None:
    mask = torch.rand(1, 1, 37, 70) > 0.3
    half, single = (attention_problem((1, 2, 1, 37, 70, 24, 20), d) for d in (torch.float16, torch.float32))
    wide = attention_problem((1, 1, 1, 37, 70, 72, 20), torch.bfloat16)
    rows, relevance = targeted_problem((1, 2, 1, 37, 24, 20, 5), torch.float32)
    half_rows, half_relevance = targeted_problem((1, 2, 1, 37, 24, 20, 1), torch.float16)
    calls: list[tuple[Any, ...]] = [
        ("av_relevance", *av_problem((1, 2, 1, 37, 70, 24), torch.float32), 0.5, 0.1),
        ("av_relevance", *av_problem((1, 2, 1, 37, 70, 24), torch.bfloat16), 0.5, 0.1),
        ("attention_relevance", *single, None, mask, None, True, 0.5, 0.1, False),
        ("attention_relevance", *half, None, mask, None, False, 0.5, 0.1, False),
        ("attention_relevance", *wide, None, mask, None, False, 0.5, 0.1, False),
        ("attention_relevance", *half, None, None, None, True, 0.0, 0.1, False),
        ("targeted_rows", *rows, None, None, relevance, None, None, True, "mean", True, 1.0, True, 0.5, 0.1),
        ("targeted_rows", *half_rows, None, None, half_relevance, None, None, True, "mean", True, 1.0, True, 0.5, 0.1),
    ]
    assert_order_of_threads_does_not_matter(seed, calls)


@pytest.mark.parametrize("dims", [(24, 40), (72, 20), (136, 8)])
def test_tf32(implementation: Implementation, tf32_allowed: Callable[[], None], dims: tuple[int, int]) -> None:
    """Within TF32 rounding of the exact result, and different from the float32 kernel on CUDA only."""
    problem = attention_problem((1, 2, 1, 35, 40, *dims), torch.float32)
    rows, relevance = targeted_problem((1, 2, 1, 20, *dims, 2), torch.float32)
    calls: list[tuple[Any, ...]] = [
        ("attention_relevance", *problem, None, None, None, False, 0.5, 0.1, False),
        ("targeted_rows", *rows, None, None, relevance, None, None, False, "mean", True, 1.0, True, 0.5, 0.1),
    ]
    plain = [implementation(*call) for call in calls]
    tf32_allowed()
    for call, before in zip(calls, plain, strict=True):
        rounded, exact = implementation(*call), getattr(reference, call[0])(*map(exactly, call[1:]))
        triples = zip(rounded, exact, before, strict=True) if isinstance(rounded, tuple) else [(rounded, exact, before)]
        for a, e, b in triples:
            assert (a - e).abs().max() <= 4e-3 * e.abs().max()
            assert torch.equal(a, b) == (implementation.device == "cpu" and not implementation.emulated)
