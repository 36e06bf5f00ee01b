"""The metrics ops as users call them: shapes, checks, no gradients, torch.compile, FakeTensor, threads."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import xai_fast as xf
from tests.implementations import assert_number_of_threads_does_not_matter, assert_same_bits
from xai_fast import _backend
from xai_fast.ops import metrics as ops
from xai_fast.reference import metrics as reference

B, C, P, D, E = 3, 2, 12, 4, 5


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, C, P, D)


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(B, P)


SAMPLE = torch.tensor([0, 2, 1, 1, 0])
DRAW = torch.arange(E)
FIRST, LAST = torch.zeros(E, dtype=torch.int64), torch.arange(E) * 3


def everything(x: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    ranks = xf.ops.rank_features(scores)
    removed = xf.ops.replace_ranked(x, x.amax((2, 3), keepdim=True), ranks, sample=SAMPLE, first=FIRST, last=LAST)
    noisy = xf.ops.perturb(removed, sample=DRAW, draw=DRAW, radius=0.5)
    boxed = xf.ops.perturb(x, sample=SAMPLE, draw=DRAW, radius=0.5, ball="linf", seed=3, first_sample=7)
    return (
        ranks,
        removed,
        noisy,
        boxed,
        xf.ops.map_distances(noisy, x, sample=SAMPLE),
        xf.ops.map_distances(noisy, x, sample=SAMPLE, norm="linf"),
        xf.ops.conciseness(noisy, threshold=0.1),
        xf.ops.conciseness(scores, gini=False)[:, :2],
        xf.ops.row_norms(x),
    )


def test_removal_by_rank(x: Tensor, scores: Tensor) -> None:
    """The k largest scores are gone, and nothing else."""
    ranks = xf.ops.rank_features(scores)
    for k in (0, 1, 5, P):
        interval = {"first": torch.zeros(B, dtype=torch.int64), "last": torch.full((B,), k)}
        out = xf.ops.replace_ranked(x, torch.full((1,), 9.0), ranks, sample=torch.arange(B), **interval)
        gone = torch.zeros(B, P, dtype=torch.bool).scatter_(1, scores.topk(k, dim=1).indices, True)
        assert torch.equal(out, x.masked_fill(gone[:, None, :, None], 9.0))


def test_token_ids_and_masks(scores: Tensor) -> None:
    ranks = xf.ops.rank_features(scores)
    for ids in (torch.randint(0, 1000, (B, 1, P, 1)), torch.rand(B, 1, P, 1) > 0.5):
        pad = torch.full((1,), 1, dtype=ids.dtype)
        out = xf.ops.replace_ranked(ids, pad, ranks, sample=SAMPLE, first=FIRST, last=LAST)
        assert torch.equal(out, reference.replace_ranked(ids, pad, ranks, SAMPLE, FIRST, LAST))


def test_bounds_beyond_32_bits(x: Tensor, scores: Tensor) -> None:
    ranks, one = xf.ops.rank_features(scores), torch.ones(1, dtype=torch.int64)
    interval: dict[str, Tensor] = {"sample": 0 * one, "first": -(2**32) * one, "last": 2**32 * one}
    assert not xf.ops.replace_ranked(x, torch.zeros(1), ranks, **interval).any()
    interval |= {"first": 2**32 * one, "last": 2**33 * one}
    assert torch.equal(xf.ops.replace_ranked(x, torch.zeros(1), ranks, **interval), x[:1])


def test_perturbed_samples_keep_their_shape(x: Tensor) -> None:
    flat = xf.ops.perturb(x.flatten(1), sample=SAMPLE, draw=DRAW, radius=2.0, seed=1)
    assert torch.equal(xf.ops.perturb(x, sample=SAMPLE, draw=DRAW, radius=2.0, seed=1), flat.view(E, C, P, D))
    assert bool(((flat - x.flatten(1)[SAMPLE]).norm(dim=1) <= 2.0).all())
    boxed = xf.ops.perturb(x, sample=SAMPLE, draw=DRAW, radius=2.0, ball="linf")
    assert 1.5 < float((boxed - x[SAMPLE]).abs().max()) <= 2.0


def test_distances_are_norms(x: Tensor) -> None:
    maps = torch.randn(E, C, P, D)
    for norm, order in (("l1", 1), ("l2", 2), ("linf", math.inf)):
        expected = torch.linalg.vector_norm((maps - x[SAMPLE]).flatten(1).double(), order, dim=1)
        torch.testing.assert_close(xf.ops.map_distances(maps, x, sample=SAMPLE, norm=norm), expected, rtol=1e-6, atol=0)


def test_row_norms_of_any_shape(x: Tensor) -> None:
    for view in (x, x[:, 1:, ::2], x.transpose(1, 3), x[0, 0, 0]):
        torch.testing.assert_close(xf.ops.row_norms(view), view.norm(dim=-1), rtol=1e-6, atol=0)


def test_gradients_of_row_norms() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(xf.ops.row_norms, x)
    (gradient,) = torch.autograd.grad(xf.ops.row_norms(torch.zeros(1, 4, requires_grad=True) + 0 * x[:1].float()).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_conciseness_of_known_maps() -> None:
    """A constant map, one entry, and a half of each; the Gini index as half the mean absolute difference."""
    maps = torch.tensor([[1.0, 1, 1, 1], [0, 0, -5, 0], [2, 0, 2, 0]])
    expected = [[4, math.log(4), 0], [1, 0, 0.75], [2, math.log(2), 0.5]]
    torch.testing.assert_close(xf.ops.conciseness(maps), torch.tensor(expected, dtype=torch.float64))
    a = torch.rand(50, dtype=torch.float64)
    apart = (a[:, None] - a).abs().sum() / (2 * 50 * 50 * a.mean())
    torch.testing.assert_close(xf.ops.conciseness(a[None])[0, 2], apart)


@pytest.mark.parametrize("numbers", [torch.int32, torch.int64])
def test_numbers_of_both_widths(x: Tensor, numbers: torch.dtype) -> None:
    sample, draw = SAMPLE.to(numbers), DRAW.to(numbers)
    options: dict[str, Any] = {"radius": 0.5}
    assert torch.equal(
        xf.ops.perturb(x, sample=sample, draw=draw, **options), xf.ops.perturb(x, sample=SAMPLE, draw=DRAW, **options)
    )


def test_empty_requests(x: Tensor, scores: Tensor) -> None:
    none, ranks = SAMPLE[:0], xf.ops.rank_features(scores)
    assert xf.ops.rank_features(scores[:0]).shape == (0, P)
    assert xf.ops.replace_ranked(x, x, ranks, sample=none, first=none, last=none).shape == (0, C, P, D)
    assert xf.ops.perturb(x, sample=none, draw=none, radius=1.0).shape == (0, C, P, D)
    assert xf.ops.map_distances(x[:0], x, sample=none).shape == (0,)
    assert xf.ops.conciseness(x[:0]).shape == (0, 3)
    assert xf.ops.row_norms(x[:0]).shape == (0, C, P)
    assert xf.ops.perturb(x[:0], sample=none, draw=none, radius=1.0).shape == (0, C, P, D)


def test_inputs_are_not_modified(x: Tensor, scores: Tensor) -> None:
    before = x.clone(), scores.clone(), SAMPLE.clone()
    everything(x, scores)
    assert_same_bits((x, scores, SAMPLE), before)


def test_strides_do_not_matter(x: Tensor, scores: Tensor) -> None:
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    sliced = torch.stack([scores, scores], 2)[..., 0]
    assert_same_bits(everything(turned, sliced), everything(x, scores))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(x: Tensor, scores: Tensor, dtype: torch.dtype) -> None:
    ranks, removed, noisy, boxed, *measures, norms = everything(x.to(dtype), scores.to(dtype))
    assert ranks.dtype == torch.int32
    assert torch.equal(ranks, reference.rank_features(scores.to(dtype)))
    assert removed.dtype == noisy.dtype == boxed.dtype == dtype
    assert all(m.dtype == torch.float64 for m in measures)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_results_have_no_gradient(x: Tensor, scores: Tensor) -> None:
    """A measure is not a loss: the ops look at the numbers alone. Norms of tokens have gradients."""
    *measures, norms = everything(x.requires_grad_(), scores.requires_grad_())
    assert not any(m.requires_grad for m in measures)
    assert norms.requires_grad


def test_opcheck(x: Tensor, scores: Tensor) -> None:
    ranks, flat = xf.ops.rank_features(scores), x.flatten(1)
    baseline, maps = torch.zeros(1).expand(x.shape), torch.randn(E, C * P * D)
    torch.library.opcheck(ops._rank_features.overload, (scores,))
    torch.library.opcheck(ops._replace_ranked.overload, (x, baseline, ranks, SAMPLE, FIRST.int(), LAST.int()))
    torch.library.opcheck(
        ops._replace_ranked.overload, (x, baseline, ranks[:2], SAMPLE, FIRST.int(), LAST.int(), SAMPLE % 2)
    )
    for ball in ("l2", "linf"):
        torch.library.opcheck(ops._perturb.overload, (flat, SAMPLE, DRAW, ball, 0.5, 2**60, 3))
    torch.library.opcheck(ops._map_distances.overload, (maps, flat, SAMPLE, "l1"))
    torch.library.opcheck(ops._conciseness.overload, (maps, 0.1, True))
    torch.library.opcheck(ops._row_norms.overload, (maps,))


def test_compile_fullgraph(x: Tensor, scores: Tensor) -> None:
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, scores), everything(x, scores))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x, number = torch.rand(B, C, P, D, dtype=torch.float16), torch.zeros(E, dtype=torch.int64)
        ranks = xf.ops.rank_features(torch.rand(B, P))
        assert (ranks.shape, ranks.dtype) == ((B, P), torch.int32)
        out = xf.ops.replace_ranked(x, x, ranks, sample=number, first=number, last=number)
        assert (out.shape, out.dtype) == ((E, C, P, D), torch.float16)
        noisy = xf.ops.perturb(x, sample=number, draw=number, radius=1.0)
        assert (noisy.shape, noisy.dtype) == ((E, C, P, D), torch.float16)
        assert xf.ops.map_distances(noisy, x, sample=number).shape == (E,)
        assert xf.ops.conciseness(noisy).shape == (E, 3)
        assert (xf.ops.row_norms(noisy).shape, xf.ops.row_norms(noisy).dtype) == ((E, C, P), torch.float32)


def test_number_of_threads_does_not_matter() -> None:
    x, scores = torch.randn(B, 2, 30_000, 1), torch.randn(B, 30_000)
    assert_number_of_threads_does_not_matter(lambda: everything(x, scores))


X, R = torch.rand(B, C, P, D), torch.arange(P, dtype=torch.int32).expand(B, P).contiguous()
NUMBERS: dict[str, Any] = {"sample": SAMPLE, "first": FIRST, "last": LAST}
NOISE: dict[str, Any] = {"sample": SAMPLE, "draw": DRAW, "radius": 1.0}
META = torch.zeros(E, dtype=torch.int64, device="meta")
BAD = [
    (lambda: xf.ops.rank_features([1.0]), TypeError, "scores: expected a torch.Tensor, got list"),
    (lambda: xf.ops.rank_features(R), TypeError, "scores: expected a float32.*torch.int32"),
    (lambda: xf.ops.rank_features(X), ValueError, r"scores: expected shape \(B, n\).*got \(3, 2, 12, 4\)"),
    (lambda: xf.ops.rank_features(X[0, 0, :, :0]), ValueError, "scores: .*n of at least 1"),
    (lambda: xf.ops.replace_ranked(1, X, R, **NUMBERS), TypeError, "x and baseline: expected torch.Tensors, got int"),
    (lambda: xf.ops.replace_ranked(X[0], X, R, **NUMBERS), ValueError, r"x: expected shape \(B, C, P, D\)"),
    (lambda: xf.ops.replace_ranked(X, X.double(), R, **NUMBERS), TypeError, "baseline: expected dtype torch.float32, as x"),
    (lambda: xf.ops.replace_ranked(X, X[:2], R, **NUMBERS), ValueError, r"baseline: .*broadcasts to \(3, 2, 12, 4\)"),
    (lambda: xf.ops.replace_ranked(X, X.to("meta"), R, **NUMBERS), ValueError, "baseline: expected a tensor on cpu"),
    (
        lambda: xf.ops.replace_ranked(X, X, R.long(), **NUMBERS),
        TypeError,
        "ranks: expected an int32 tensor, .*int64",
    ),
    (lambda: xf.ops.replace_ranked(X, X, R[:, 1:], **NUMBERS), ValueError, r"ranks: .*\(3, 12\), got \(3, 11\)"),
    (lambda: xf.ops.replace_ranked(X, X, R, **NUMBERS | {"sample": SAMPLE + 1}), ValueError, "sample: .*0 to 2, got 1 to 3"),
    (lambda: xf.ops.replace_ranked(X, X, R, **NUMBERS | {"sample": SAMPLE - 1}), ValueError, "sample: .*got -1 to 1"),
    (lambda: xf.ops.replace_ranked(X, X, R[:2], **NUMBERS, ranking=SAMPLE), ValueError, "ranking: .*0 to 1, got 0 to 2"),
    (lambda: xf.ops.replace_ranked(X, X, R[0], **NUMBERS, ranking=SAMPLE), ValueError, r"ranks: .*got \(12,\)"),
    (lambda: xf.ops.replace_ranked(X, X, R, **NUMBERS | {"first": FIRST[1:]}), ValueError, r"first: .*\(5,\), got \(4,\)"),
    (lambda: xf.ops.replace_ranked(X, X, R, **NUMBERS | {"last": 3}), TypeError, "last: expected an int64 tensor, got int"),
    (lambda: xf.ops.replace_ranked(X, X, R, **NUMBERS | {"last": LAST + 0.5}), TypeError, "last: .*got torch.float32"),
    (lambda: xf.ops.perturb(X.int(), **NOISE), TypeError, "x: expected a float32"),
    (lambda: xf.ops.perturb(X[0, 0, 0], **NOISE), ValueError, r"x: expected shape \(B, ...\)"),
    (lambda: xf.ops.perturb(X, **NOISE | {"radius": -1.0}), ValueError, "radius: .*at least 0, got -1.0"),
    (lambda: xf.ops.perturb(X, **NOISE | {"radius": math.inf}), ValueError, "radius: expected a finite number"),
    (lambda: xf.ops.perturb(X, ball="l1", **NOISE), ValueError, "ball: expected one of l2, linf, got 'l1'"),
    (lambda: xf.ops.perturb(X, **NOISE | {"draw": DRAW - 1}), ValueError, "draw: expected numbers from 0"),
    (lambda: xf.ops.perturb(X, **NOISE | {"draw": DRAW + 2**32}), ValueError, "draw: expected numbers from 0 to 4294967295"),
    (lambda: xf.ops.perturb(X, **NOISE | {"draw": META}), ValueError, "draw: expected a tensor on cpu, got one on meta"),
    (lambda: xf.ops.perturb(X, seed=-1, **NOISE), ValueError, "seed: .*got -1"),
    (lambda: xf.ops.perturb(X, first_sample=2**31 + 1, **NOISE), ValueError, "first_sample: .*got 2147483649"),
    (lambda: xf.ops.map_distances(X[SAMPLE], X[..., :3], sample=SAMPLE), ValueError, r"centre: .*\(3, 2, 12, 4\), got"),
    (lambda: xf.ops.map_distances(X[SAMPLE], X.half(), sample=SAMPLE), TypeError, "centre: expected dtype torch.float32"),
    (lambda: xf.ops.map_distances(X[SAMPLE], 0, sample=SAMPLE), TypeError, "centre: expected a torch.Tensor, got int"),
    (lambda: xf.ops.map_distances(X[SAMPLE], X, sample=SAMPLE, norm="l3"), ValueError, "norm: expected one of l1, l2, linf"),
    (lambda: xf.ops.map_distances(X[SAMPLE], X, sample=SAMPLE[1:]), ValueError, r"sample: .*\(5,\), got \(4,\)"),
    (lambda: xf.ops.map_distances(X[SAMPLE], X, sample=SAMPLE * 2), ValueError, "sample: .*0 to 2, got 0 to 4"),
    (lambda: xf.ops.conciseness(X.long()), TypeError, "maps: expected a float32"),
    (lambda: xf.ops.conciseness(X[0, 0, 0]), ValueError, r"maps: expected shape \(B, ...\)"),
    (lambda: xf.ops.conciseness(X, threshold=-0.1), ValueError, "threshold: .*at least 0, got -0.1"),
    (lambda: xf.ops.conciseness(X, threshold="0"), TypeError, "threshold: expected a number, got str"),
    (lambda: xf.ops.row_norms(X.long()), TypeError, "x: expected a float32"),
    (lambda: xf.ops.row_norms(X[..., :0]), ValueError, r"x: expected shape \(..., D\) with D of at least 1"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_places_are_checked_where_no_kernel_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled module the reference would count -1 from the end."""
    monkeypatch.setattr(_backend, "C", None)
    for places in (SAMPLE - 1, SAMPLE + 1):
        low, high = int(places.min()), int(places.max())
        with pytest.raises(ValueError, match=f"^sample: expected numbers from 0 to 2, got {low} to {high}$"):
            xf.ops.perturb(X, **NOISE | {"sample": places})


def test_compiled_module_refuses_what_would_crash() -> None:
    """Calls that go round the Python checks still get an error, not memory that is not theirs."""
    module = pytest.importorskip("xai_fast._C")
    flat, first, last = X.flatten(1), FIRST.int(), LAST.int()
    with pytest.raises(ValueError, match="scores: expected shape"):
        module.rank_features(X)
    with pytest.raises(TypeError, match="scores: expected float32 or float64"):
        module.rank_features(X[0, 0].half())
    with pytest.raises(ValueError, match="ranks: expected shape"):
        module.replace_ranked(X, X, R[:, 1:], SAMPLE, first, last)
    with pytest.raises(TypeError, match="first: expected dtype"):
        module.replace_ranked(X, X, R, SAMPLE, FIRST, last)
    with pytest.raises(ValueError, match="sample: expected numbers from 0 to 2"):
        module.replace_ranked(X, X, R, SAMPLE + 1, first, last)
    with pytest.raises(RuntimeError, match="expanded size"):
        module.replace_ranked(X, X[:2], R, SAMPLE, first, last)
    wide = X.to(torch.complex128)
    with pytest.raises(TypeError, match="x: expected elements of at most 8 bytes"):
        module.replace_ranked(wide, wide, R, SAMPLE, first, last)
    with pytest.raises(ValueError, match="draw: expected shape"):
        module.perturb(flat, SAMPLE, DRAW[1:], "l2", 1.0, 0, 0)
    with pytest.raises(ValueError, match="ball: expected"):
        module.perturb(flat, SAMPLE, DRAW, "l1", 1.0, 0, 0)
    with pytest.raises(TypeError, match="expected a float32"):
        module.perturb(flat.long(), SAMPLE, DRAW, "l2", 1.0, 0, 0)
    with pytest.raises(ValueError, match="centre: expected shape"):
        module.map_distances(flat[SAMPLE], flat[:, 1:], SAMPLE, "l1")
    with pytest.raises(ValueError, match="norm: expected"):
        module.map_distances(flat[SAMPLE], flat, SAMPLE, "l3")
    with pytest.raises(ValueError, match="maps: expected shape"):
        module.conciseness(X, 0.0, True)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch, x: Tensor, scores: Tensor) -> None:
    """The reference serves, and says so once."""
    monkeypatch.setattr(xf._backend, "_warned", False)
    flat = x.flatten(1)
    with pytest.warns(RuntimeWarning, match="slower PyTorch reference"):
        ranks = ops._rank_features._fallback(scores)
    assert torch.equal(ranks, xf.ops.rank_features(scores))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ops._conciseness._fallback(flat, 0.1, True)
    torch.testing.assert_close(found, xf.ops.conciseness(flat, threshold=0.1))
