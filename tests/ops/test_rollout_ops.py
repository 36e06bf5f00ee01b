"""The rollout ops as users call them: checks, gradients, torch.compile, FakeTensor, autocast, threads, devices."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import xai_fast as xf
from tests.implementations import assert_number_of_threads_does_not_matter
from tests.tolerances import assert_close_to_reference
from xai_fast.ops import rollout as ops
from xai_fast.reference import rollout as reference

OPTIONS = ("mean", 1.0, True)


@pytest.fixture
def attention() -> torch.Tensor:
    return torch.randn(2, 3, 9, 9).softmax(-1)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.rand(2, 2, 9)


@pytest.fixture
def query() -> torch.Tensor:
    return torch.randn(2, 4, 9, 8)


@pytest.fixture
def key() -> torch.Tensor:
    return torch.randn(2, 2, 9, 8)


def test_opcheck(attention: torch.Tensor, rows: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    torch.library.opcheck(ops._rollout_rows.overload, (attention, rows, *OPTIONS))
    torch.library.opcheck(ops._fuse_heads.overload, (attention, *OPTIONS, False))
    mask = torch.rand(2, 1, 1, 9) > 0.5
    for extra in ((None, None, None, False), (mask, None, 0.5, True), (None, torch.zeros(2, 4, 9), None, False)):
        torch.library.opcheck(ops._rollout_rows_qk.overload, (query, key, rows, *extra, *OPTIONS))


def test_compile_fullgraph(attention: torch.Tensor, rows: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    def everything(a: torch.Tensor, r: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        step = xf.ops.rollout_rows(a, r, head_fusion="max") * 2
        streamed = xf.ops.rollout_rows_qk(q, k, step, is_causal=True)
        return streamed @ xf.ops.fuse_heads(a)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(attention, rows, query, key), everything(attention, rows, query, key))


def test_compile_with_gradient(attention: torch.Tensor, rows: torch.Tensor) -> None:
    attention.requires_grad_()
    eager = torch.autograd.grad(xf.ops.rollout_rows(attention, rows).square().sum(), attention)[0]
    compiled = torch.compile(lambda a, r: xf.ops.rollout_rows(a, r).square().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(attention, rows), attention)[0], eager)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        a, r, q = torch.rand(2, 3, 9, 9), torch.rand(2, 4, 9), torch.rand(2, 3, 9, 5, dtype=torch.float16)
        assert xf.ops.rollout_rows(a, r).shape == (2, 4, 9)
        assert xf.ops.fuse_heads(a).shape == (2, 9, 9)
        out = xf.ops.rollout_rows_qk(q, q, r)
        assert out.shape == (2, 4, 9)
        assert out.dtype == torch.float32


def test_vmap_and_subclasses(attention: torch.Tensor, rows: torch.Tensor) -> None:
    class Marked(torch.Tensor):
        pass

    expected = xf.ops.rollout_rows(attention, rows)
    assert torch.equal(xf.ops.rollout_rows(attention.as_subclass(Marked), rows).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("fusion", ["mean", "sum", "max", "min"])
def test_gradients_are_those_of_the_reference(fusion: str) -> None:
    attention = torch.rand(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.rand(1, 2, 4, dtype=torch.float64, requires_grad=True)
    query = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    options = {"head_fusion": fusion}
    assert torch.autograd.gradcheck(lambda a, r: xf.ops.rollout_rows(a, r, **options), (attention, rows))
    assert torch.autograd.gradcheck(lambda a: xf.ops.fuse_heads(a, **options), attention)
    assert torch.autograd.gradcheck(lambda q, k, r: xf.ops.rollout_rows_qk(q, k, r, **options), (query, key, rows))


def test_inputs_are_not_modified(
    attention: torch.Tensor, rows: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> None:
    before = [x.clone() for x in (attention, rows, query, key)]
    xf.ops.rollout_rows(attention, rows)
    xf.ops.fuse_heads(attention)
    xf.ops.rollout_rows_qk(query, key, rows, is_causal=True)
    assert all(torch.equal(x, y) for x, y in zip(before, (attention, rows, query, key), strict=True))


def test_autocast_and_inference_mode(attention: torch.Tensor, rows: torch.Tensor) -> None:
    expected = xf.ops.rollout_rows(attention, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(xf.ops.rollout_rows(attention, rows), expected)
    with torch.inference_mode():
        assert torch.equal(xf.ops.rollout_rows(attention.clone(), rows.clone()), expected)


@pytest.mark.parametrize("tokens", [40, 300])
def test_thread_count_does_not_matter(tokens: int) -> None:
    attention = torch.randn(3, 4, tokens, tokens).softmax(-1)
    query, rows = torch.randn(3, 4, tokens, 16), torch.rand(3, 2, tokens)
    assert_number_of_threads_does_not_matter(
        lambda: (
            xf.ops.rollout_rows(attention, rows),
            xf.ops.fuse_heads(attention),
            xf.ops.rollout_rows_qk(query, query, rows),
            xf.ops.rollout_rows_qk(query, query, rows, head_fusion="min", is_causal=True),
        )
    )


def test_many_rows_take_the_matrix_route() -> None:
    attention = torch.randn(2, 3, 50, 50).softmax(-1)
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.rand(2, ops.MANY_ROWS, 50)
        many = xf.ops.rollout_rows(attention.to(dtype), rows)
        few = torch.cat([xf.ops.rollout_rows(attention.to(dtype), r, normalize=True) for r in rows.split(5, 1)], 1)
        torch.testing.assert_close(many, few, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_lse_of_scaled_dot_product_attention() -> None:
    """The log-sum-exp that fused attention returns is the one that the op takes."""
    query, key = torch.randn(1, 2, 33, 16), torch.randn(1, 2, 33, 16)
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key)
    rows = torch.rand(1, 1, 33)
    with_lse = xf.ops.rollout_rows_qk(query, key, rows, lse=lse)
    torch.testing.assert_close(with_lse, xf.ops.rollout_rows_qk(query, key, rows), rtol=1e-5, atol=1e-6)


def test_streamed_equals_given(query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor) -> None:
    probabilities = xf.ops.attention_probabilities(query, key, is_causal=True)
    eager = F.scaled_dot_product_attention(query, key, torch.eye(9).expand(2, 2, 9, 9), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(probabilities, eager)
    for fusion in ("mean", "sum", "max", "min"):
        given = xf.ops.rollout_rows(probabilities, rows, head_fusion=fusion)
        streamed = xf.ops.rollout_rows_qk(query, key, rows, is_causal=True, head_fusion=fusion)
        assert_close_to_reference(streamed, given.double())


def test_cross_attention_probabilities() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8)
    expected = reference.attention_probabilities(query.double(), key.double(), None, None, None, False)
    torch.testing.assert_close(xf.ops.attention_probabilities(query, key).double(), expected, rtol=1e-5, atol=1e-6)


A = torch.rand(2, 3, 9, 9)
R = torch.rand(2, 2, 9)
Q = torch.rand(2, 4, 9, 8)
K = torch.rand(2, 2, 9, 8)
META = torch.rand(2, 2, 9, device="meta")
BAD = [
    (lambda: xf.ops.rollout_rows([1, 2], R), TypeError, "attention: expected a torch.Tensor, got list"),
    (lambda: xf.ops.rollout_rows(A.long(), R), TypeError, "attention: expected a float32.*got torch.int64"),
    (lambda: xf.ops.rollout_rows(A[0], R), ValueError, r"attention: expected shape \(B, H, N, N\).*got \(3, 9, 9\)"),
    (lambda: xf.ops.rollout_rows(A[..., :8], R), ValueError, r"attention: .*got \(2, 3, 9, 8\)"),
    (lambda: xf.ops.rollout_rows(A[:, :0], R), ValueError, r"attention: .*got \(2, 0, 9, 9\)"),
    (lambda: xf.ops.rollout_rows(A[..., :0, :0], R[..., :0]), ValueError, "N of at least 1"),
    (lambda: xf.ops.rollout_rows(A, R[:1]), ValueError, r"rows: expected shape \(B, R, N\) = \(2, R, 9\), got \(1, 2, 9\)"),
    (lambda: xf.ops.rollout_rows(A, R[:, 0]), ValueError, "rows: expected shape"),
    (lambda: xf.ops.rollout_rows(A, R.double()), TypeError, "rows: expected dtype torch.float32, got torch.float64"),
    (lambda: xf.ops.rollout_rows(A, META), ValueError, "rows: expected a tensor on cpu, got one on meta"),
    (lambda: xf.ops.rollout_rows(A, R, head_fusion="median"), ValueError, "head_fusion: expected one of mean.*'median'"),
    (lambda: xf.ops.rollout_rows(A, R, residual=-1.0), ValueError, "residual: expected a weight of at least 0, got -1.0"),
    (lambda: xf.ops.rollout_rows(A, R, residual=math.nan), ValueError, "residual: expected a finite number"),
    (lambda: xf.ops.fuse_heads(A, residual="1"), TypeError, "residual: expected a number, got str"),
    (lambda: xf.ops.rollout_rows_qk(Q[0], K, R), ValueError, "query: expected shape"),
    (lambda: xf.ops.rollout_rows_qk(Q, K[:, :, :8], R), ValueError, "key: rollout needs as many keys as queries"),
    (lambda: xf.ops.rollout_rows_qk(Q, K[..., :4], R), ValueError, "key: expected shape"),
    (lambda: xf.ops.rollout_rows_qk(Q[:, :3], K, R), ValueError, "Hkv a divisor of 3"),
    (lambda: xf.ops.rollout_rows_qk(Q, K.half(), R), TypeError, "key: expected dtype torch.float32"),
    (lambda: xf.ops.rollout_rows_qk(Q, K, R, attn_mask=torch.ones(3, 9)), ValueError, "attn_mask: expected a shape"),
    (lambda: xf.ops.rollout_rows_qk(Q, K, R, attn_mask=torch.ones(9, 9).int()), TypeError, "attn_mask.*torch.int32"),
    (lambda: xf.ops.rollout_rows_qk(Q, K, R, attn_mask="no"), TypeError, "attn_mask: expected a torch.Tensor or None"),
    (lambda: xf.ops.rollout_rows_qk(Q, K, R, lse=torch.ones(2, 2, 9)), ValueError, r"lse: expected shape \(B, H, N\)"),
    (lambda: xf.ops.rollout_rows_qk(Q, K, R, scale=math.inf), ValueError, "scale: expected a finite number"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_compiled_module_refuses_what_would_crash() -> None:
    """Calls that go round the Python checks still get an error, not memory that is not theirs."""
    module = pytest.importorskip("xai_fast._C")
    with pytest.raises(ValueError, match="rows: expected shape"):
        module.rollout_rows(A, R[..., :3], *OPTIONS)
    with pytest.raises(TypeError, match="expected a float32"):
        module.fuse_heads(A.int(), *OPTIONS, False)
    with pytest.raises(ValueError, match="head_fusion"):
        module.fuse_heads(A, "median", 1.0, True, False)
    with pytest.raises(ValueError, match="key: expected as many keys as queries"):
        module.rollout_rows_qk(Q, K[:, :, :4], R, None, None, None, False, *OPTIONS)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch, attention: torch.Tensor, rows: torch.Tensor) -> None:
    """The reference serves, and says so once."""
    expected = xf.ops.rollout_rows(attention, rows)
    monkeypatch.setattr(xf._backend, "_warned", False)
    with pytest.warns(RuntimeWarning, match="slower PyTorch reference"):
        ops._rollout_rows._fallback(attention, rows, *OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ops._rollout_rows._fallback(attention, rows, *OPTIONS)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_beyond_float32_are_refused(dtype: torch.dtype) -> None:
    attention, query, rows = (
        torch.rand(1, 2, 4, 4).to(dtype),
        torch.rand(1, 2, 4, 8).to(dtype),
        torch.rand(1, 1, 4).to(dtype),
    )
    calls = {
        "residual": [
            lambda x: xf.ops.rollout_rows(attention, rows, residual=x),
            lambda x: xf.ops.fuse_heads(attention, residual=x),
            lambda x: xf.ops.rollout_rows_qk(query, query, rows, residual=x),
            lambda x: xf.ops.targeted_rows(query, query, query, query, rows, residual=x),
        ],
        "scale": [
            lambda x: xf.ops.rollout_rows_qk(query, query, rows, scale=x),
            lambda x: xf.ops.rollout_rows_qk(query, query, rows, scale=-x),
            lambda x: xf.ops.attention_probabilities(query, query, scale=x),
            lambda x: xf.ops.attention_relevance(query, query, query, query, scale=x),
            lambda x: xf.ops.targeted_rows(query, query, query, query, rows, scale=x),
        ],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"{name}: expected a number that float32 can hold, got -?1e.39"):
                call(1e39)
    wide = xf.ops.rollout_rows(attention.double(), rows.double(), residual=1e39)
    torch.testing.assert_close(wide, rows.double())


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_numbers_of_numpy(number: Any) -> None:
    query, rows = torch.rand(1, 2, 4, 8), torch.rand(1, 1, 4)
    wanted = xf.ops.rollout_rows_qk(query, query, rows, residual=0.5, scale=0.5)
    assert torch.equal(xf.ops.rollout_rows_qk(query, query, rows, residual=number, scale=number), wanted)


def test_tensors_that_are_not_dense_are_refused() -> None:
    attention, query, rows = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 8), torch.rand(1, 1, 4)
    keep = torch.ones(4, 4, dtype=torch.bool)
    for name, call in {
        "attention": lambda: xf.ops.rollout_rows(attention.to_sparse(), rows),
        "rows": lambda: xf.ops.rollout_rows_qk(query, query, rows.to_sparse()),
        "query": lambda: xf.ops.rollout_rows_qk(query.to_mkldnn(), query, rows),
        "key": lambda: xf.ops.rollout_rows_qk(query, query.to_sparse(), rows),
        "attn_mask": lambda: xf.ops.rollout_rows_qk(query, query, rows, attn_mask=keep.to_sparse()),
    }.items():
        with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got torch"):
            call()
