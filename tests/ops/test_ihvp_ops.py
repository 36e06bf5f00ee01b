"""The ihvp ops as users call them: shapes, checks, gradients, torch.compile, FakeTensor, autocast, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import xai_fast as xf
from tests.implementations import assert_number_of_threads_does_not_matter
from tests.tolerances import assert_close_to_reference
from xai_fast.ops import ihvp as ops
from xai_fast.ops._glm_checks import FAMILIES
from xai_fast.reference import ihvp as reference

N, D, C = 40, 7, 3
SPECIMEN = "softmax", False, 1.0, 0.1, 0.2  # family, intercept, smoothing, l2, damping


@pytest.fixture(name="X")
def design() -> Tensor:
    return torch.randn(N, D)


@pytest.fixture
def theta() -> Tensor:
    return torch.randn(D, C)


@pytest.fixture
def v() -> Tensor:
    return torch.randn(2, D, C)


@pytest.fixture
def weights(X: Tensor, theta: Tensor) -> Tensor:
    return (X @ theta).softmax(-1)


def loss(family: str, theta: Tensor, X: Tensor, y: Tensor, s: Tensor, intercept: bool) -> Tensor:
    """The mean objective whose Hessian the op multiplies with, written with autograd in mind."""
    z = X @ theta[:-1] + theta[-1] if intercept else X @ theta
    if family == "softmax":
        rows = F.cross_entropy(z, y.long(), reduction="none")
    elif family == "linear":
        rows = 0.5 * (z[:, 0] - y) ** 2
    elif family == "logistic":
        rows = F.softplus(z[:, 0]) - y * z[:, 0]
    elif family == "poisson":
        rows = z[:, 0].exp() - y * z[:, 0]
    else:
        rows = 0.5 * F.softplus((1 - y * z[:, 0]) / 0.5)
    penalised = theta[:-1] if intercept else theta
    return (s * rows).mean() + 0.05 * penalised.square().sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("intercept", [False, True])
def test_hessian_is_that_of_the_loss(family: str, intercept: bool) -> None:
    """Against autograd's Hessian of the objective: an oracle that knows no closed form."""
    columns = C if family == "softmax" else 1
    X, theta = torch.randn(N, D, dtype=torch.float64), torch.randn(D + intercept, columns, dtype=torch.float64)
    y = torch.randint(0, C, (N,)).double()
    if family == "smooth_hinge":
        y = (y > 0) * 2.0 - 1
    s = torch.rand(N, dtype=torch.float64)
    dense = torch.autograd.functional.hessian(lambda t: loss(family, t, X, y, s, intercept), theta)
    v = torch.randn(4, *theta.shape, dtype=torch.float64)
    expected = torch.einsum("pcqd,mqd->mpc", dense, v) + 0.3 * v
    options: dict[str, Any] = {"family": family, "l2": 0.1, "damping": 0.3, "intercept": intercept, "smoothing": 0.5}
    found = xf.ops.glm_hvp(X, v, theta=theta, y=y, sample_weight=s, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    kept = xf.ops.glm_weights(X, theta, family=family, y=y, intercept=intercept, smoothing=0.5)
    torch.testing.assert_close(xf.ops.glm_hvp(X, v, weights=kept, sample_weight=s, **options), found)


def test_shapes_of_one_output_and_of_many() -> None:
    X, w = torch.randn(N, D), torch.rand(N)
    flat = torch.randn(D)
    options: dict[str, Any] = {"weights": w, "family": "logistic"}
    one = xf.ops.glm_hvp(X, flat, **options)
    assert one.shape == (D,)
    assert torch.equal(xf.ops.glm_hvp(X, flat[:, None], **options), one[:, None])
    both = torch.stack([flat, 2 * flat])[:, :, None]
    torch.testing.assert_close(xf.ops.glm_hvp(X, both, **options)[1, :, 0], 2 * one)


def test_float64_vectors_compute_in_float64(X: Tensor, v: Tensor, weights: Tensor) -> None:
    exact = reference.glm_hvp(X.double(), v.double(), None, weights.double(), None, None, None, *SPECIMEN)
    found = xf.ops.glm_hvp(X, v.double(), weights=weights, family="softmax", l2=0.1, damping=0.2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-14)


def test_16_bit_vectors_come_back_in_their_dtype(X: Tensor, v: Tensor, weights: Tensor) -> None:
    half = X.bfloat16()
    found = xf.ops.glm_hvp(half, v.bfloat16(), weights=weights, family="softmax")
    assert found.dtype == torch.bfloat16
    exact = reference.glm_hvp(half.double(), v.bfloat16().double(), None, weights.double(), None, None, None,
                              "softmax", False, 1.0, 0.0, 0.0)  # fmt: skip
    assert_close_to_reference(found, exact)


def test_symmetric_and_positive(X: Tensor, v: Tensor, weights: Tensor) -> None:
    a, b = v.double()
    options: dict[str, Any] = {"weights": weights, "family": "softmax"}
    first, second = (a * xf.ops.glm_hvp(X, b, **options)).sum(), (b * xf.ops.glm_hvp(X, a, **options)).sum()
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    assert (a * xf.ops.glm_hvp(X, a, **options)).sum() > 0


def test_batch_is_the_mean_over_its_rows(X: Tensor, v: Tensor, weights: Tensor) -> None:
    batch = torch.tensor([3, 3, 39, 0])
    found = xf.ops.glm_hvp(X, v, weights=weights, family="softmax", batch=batch, damping=1.0)
    torch.testing.assert_close(found, xf.ops.glm_hvp(X[batch], v, weights=weights[batch], family="softmax", damping=1.0))


def test_lissa_finds_the_inverse() -> None:
    X = torch.randn(500, D, dtype=torch.float64)
    theta = torch.randn(D, C, dtype=torch.float64)
    g = torch.randn(2, D, C, dtype=torch.float64)
    options: dict[str, Any] = {"theta": theta, "family": "softmax", "l2": 0.1}
    _, average = xf.ops.lissa(X, g, sigma=4.0, batch_size=200, steps=3000, skip=1000, **options)
    residual = xf.ops.glm_hvp(X, average, **options) - g
    assert float(residual.norm() / g.norm()) < 0.01
    last, _ = xf.ops.lissa(X, g, sigma=4.0, batch_size=200, steps=3000, skip=1000, seed=1, **options)
    assert not torch.equal(last, xf.ops.lissa(X, g, sigma=4.0, batch_size=200, steps=3000, seed=2, **options)[0])


def test_lissa_goes_on_where_it_ended(X: Tensor, v: Tensor, weights: Tensor) -> None:
    options: dict[str, Any] = {"weights": weights, "family": "softmax", "sigma": 9.0, "batch_size": 8, "seed": 5}
    whole, _ = xf.ops.lissa(X, v, steps=7, **options)
    first, _ = xf.ops.lissa(X, v, steps=3, **options)
    torch.testing.assert_close(xf.ops.lissa(X, v, steps=4, first_step=3, start=first, **options)[0], whole)


def test_scores_are_inner_products_of_gradients(X: Tensor, v: Tensor) -> None:
    delta = torch.randn(N, C)
    gradients = torch.einsum("nd,nc->ndc", X, delta)
    torch.testing.assert_close(xf.ops.influence_scores(X, delta, v), torch.einsum("ndc,mdc->mn", gradients, v))


@pytest.mark.parametrize("largest", [True, False])
def test_top_k_is_that_of_the_scores(X: Tensor, v: Tensor, largest: bool) -> None:
    delta = torch.randn(N, C)
    rows = torch.randperm(N)[:20]
    values, indices = xf.ops.influence_top_k(X, delta, v, 6, largest=largest, rows=rows)
    scores = xf.ops.influence_scores(X, delta, v, rows=rows)
    expected = scores.topk(6, largest=largest)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, rows[expected.indices])


def test_equal_scores_come_in_row_order() -> None:
    X, delta = torch.ones(600, 2), torch.ones(600)
    _, indices = xf.ops.influence_top_k(X, delta, torch.ones(1, 2, 1), 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]
    _, indices = xf.ops.influence_top_k(X, delta, torch.ones(1, 2, 1), 3, rows=torch.tensor([7, 3, 500]), largest=False)
    assert indices.tolist() == [[7, 3, 500]]


def test_projection_keeps_inner_products_and_adds_up() -> None:
    x = torch.randn(6, 5000)
    y = xf.ops.random_projection(x, 3000, seed=3)
    products, kept = x @ x.T, y @ y.T
    spread = x.norm(dim=1)[:, None] * x.norm(dim=1) / math.sqrt(3000)
    assert float(((kept - products) / spread).abs().max()) < 5
    pieces = sum(xf.ops.random_projection(p, 3000, seed=3, offset=o) for o, p in ((0, x[:, :1234]), (1234, x[:, 1234:])))
    torch.testing.assert_close(pieces, y, rtol=1e-4, atol=1e-3)


def test_opcheck(X: Tensor, theta: Tensor, v: Tensor, weights: Tensor) -> None:
    y, s, batch = torch.ones(N), torch.rand(N), torch.arange(9)
    torch.library.opcheck(ops._glm_hvp.overload, (X, v, theta, None, None, None, None, *SPECIMEN))
    torch.library.opcheck(ops._glm_hvp.overload, (X, v, None, weights, None, s, batch, *SPECIMEN))
    one = v[:, :, :1].contiguous()
    hinge = (X, one, theta[:, :1].contiguous(), None, y, None, None, "smooth_hinge", False, 1.0, 0.1, 0.2)
    torch.library.opcheck(ops._glm_hvp.overload, hinge)
    torch.library.opcheck(ops._lissa.overload, (X, v, weights, s, v, "softmax", False, 0.1, 0.2, 9.0, 4, 0, 3, 1, 7))
    delta = torch.randn(N, C)
    torch.library.opcheck(ops._influence_scores.overload, (X, delta, v, batch, False))
    torch.library.opcheck(ops._influence_top_k.overload, (X, delta, v, None, False, 3, True))
    torch.library.opcheck(ops._sample_rows.overload, (X, 10, 3, 1, 0))
    torch.library.opcheck(ops._random_projection.overload, (X, 5, 1, 0))


def test_compile_fullgraph(X: Tensor, theta: Tensor, v: Tensor, weights: Tensor) -> None:
    def everything(X: Tensor, theta: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        curved = xf.ops.glm_hvp(X, v, theta=theta, family="softmax", damping=0.1)
        last, average = xf.ops.lissa(X, curved, weights=weights, family="softmax", sigma=9.0, batch_size=4, steps=3)
        values, indices = xf.ops.influence_top_k(X, weights, last, 3)
        projected = xf.ops.random_projection(xf.ops.influence_scores(X, weights, average), 5)
        return curved, last, average, values, indices, projected

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(X, theta, v, weights)
    assert all(torch.equal(a, b) for a, b in zip(compiled, everything(X, theta, v, weights), strict=True))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        X, v = torch.rand(N, D, dtype=torch.float16), torch.rand(2, D, C)
        assert xf.ops.glm_hvp(X, v, weights=torch.rand(N, C), family="softmax").shape == (2, D, C)
        assert xf.ops.influence_scores(X, torch.rand(N, C), v).shape == (2, N)
        values, indices = ops._influence_top_k(X, torch.rand(N, C), v, None, False, 4, True)
        assert (values.shape, indices.dtype) == ((2, 4), torch.int64)
        assert xf.ops.random_projection(X, 6).dtype == torch.float32


def test_gradients_are_those_of_the_reference() -> None:
    X = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    theta, v = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options: dict[str, Any] = {"family": "softmax", "l2": 0.1}
    assert torch.autograd.gradcheck(lambda X, t, v: xf.ops.glm_hvp(X, v, theta=t, **options), (X, theta, v))
    delta, s = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 2), (1, 3, 2)))
    assert torch.autograd.gradcheck(xf.ops.influence_scores, (X, delta, s))
    assert torch.autograd.gradcheck(lambda X: xf.ops.random_projection(X, 4), X)
    g = v.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda g: xf.ops.lissa(X.detach(), g, theta=theta.detach(), sigma=4.0, batch_size=3, steps=4, **options), g
    )


def test_inputs_are_not_modified(X: Tensor, theta: Tensor, v: Tensor, weights: Tensor) -> None:
    before = [t.clone() for t in (X, theta, v, weights)]
    xf.ops.glm_hvp(X, v, theta=theta, family="softmax")
    xf.ops.lissa(X, v, weights=weights, family="softmax", sigma=9.0, batch_size=4, steps=3, start=v)
    xf.ops.influence_top_k(X, weights, v, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, (X, theta, v, weights), strict=True))


def test_autocast_and_inference_mode(X: Tensor, v: Tensor, weights: Tensor) -> None:
    expected = xf.ops.glm_hvp(X, v, weights=weights, family="softmax")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(xf.ops.glm_hvp(X, v, weights=weights, family="softmax"), expected)
    with torch.inference_mode():
        assert torch.equal(xf.ops.glm_hvp(X.clone(), v.clone(), weights=weights.clone(), family="softmax"), expected)


def test_thread_count_does_not_matter() -> None:
    X, delta = torch.randn(3000, 33), torch.randn(3000, C)
    v, weights = torch.randn(2, 33, C), torch.rand(3000, C)
    many = torch.randn(48, 33, C)  # matrix products of MKL would round differently
    options: dict[str, Any] = {"weights": weights, "family": "softmax"}
    steps: dict[str, Any] = {**options, "sigma": 99.0, "batch_size": 300, "steps": 3}
    assert_number_of_threads_does_not_matter(
        lambda: (
            xf.ops.glm_hvp(X, v, **options),
            xf.ops.glm_hvp(X, many, **options),
            *xf.ops.lissa(X, many, **steps),
            *xf.ops.lissa(X, v, **steps),
            *xf.ops.influence_top_k(X, delta, v, 9),
            xf.ops.random_projection(X.T, 50),
        )
    )


DATA, V, W = torch.randn(N, D), torch.randn(D, C), torch.rand(N, C)
TH: dict[str, Any] = {"theta": V, "family": "softmax"}
LISSA: dict[str, Any] = {"weights": W, "family": "softmax", "sigma": 9.0, "batch_size": 4, "steps": 3}
BAD = [
    (lambda: xf.ops.glm_hvp([1], V, **TH), TypeError, "X: expected a torch.Tensor, got list"),
    (lambda: xf.ops.glm_hvp(DATA.long(), V, **TH), TypeError, "X: expected a float32.*torch.int64"),
    (lambda: xf.ops.glm_hvp(DATA[0], V, **TH), ValueError, r"X: expected shape \(n, D\).*got \(7,\)"),
    (lambda: xf.ops.glm_hvp(DATA[:0], V, **TH), ValueError, r"X: .*at least one row.*got \(0, 7\)"),
    (lambda: xf.ops.glm_hvp(DATA, V[:-1], **TH), ValueError, r"v: expected shape \(7, C\) or \(M, 7, C\).*got \(6, 3\)"),
    (lambda: xf.ops.glm_hvp(DATA, V, intercept=True, **TH), ValueError, r"v: expected shape \(8, C\)"),
    (lambda: xf.ops.glm_hvp(DATA, V, theta=V, family="logistic"), ValueError, r"v: expected shape \(7,\), \(7, 1\)"),
    (lambda: xf.ops.glm_hvp(DATA, V.half(), **TH), TypeError, "v: expected torch.float32 or torch.float64"),
    (lambda: xf.ops.glm_hvp(DATA.double(), V, **TH), TypeError, "v: expected torch.float64"),
    (lambda: xf.ops.glm_hvp(DATA, V.to("meta"), **TH), ValueError, "v: expected a tensor on cpu, got one on meta"),
    (lambda: xf.ops.glm_hvp(DATA, V, theta=V[:, :2], family="softmax"), ValueError, "theta: expected one set"),
    (lambda: xf.ops.glm_hvp(DATA, V, family="softmax"), ValueError, "theta, weights: the softmax family needs one"),
    (lambda: xf.ops.glm_hvp(DATA, V, theta=V, family="probit"), ValueError, "family: expected one of linear.*'probit'"),
    (lambda: xf.ops.glm_hvp(DATA, V, weights=W[:5], family="softmax"), ValueError, r"weights: .*\(40, 3\), got \(5, 3\)"),
    (lambda: xf.ops.glm_hvp(DATA, V, l2=-1.0, **TH), ValueError, "l2: expected a number of at least 0, got -1.0"),
    (lambda: xf.ops.glm_hvp(DATA, V, damping=math.nan, **TH), ValueError, "damping: expected a finite number"),
    (lambda: xf.ops.glm_hvp(DATA, V, batch=torch.tensor([0, 40]), **TH), ValueError, "batch: .*39, got 0 to 40"),
    (lambda: xf.ops.glm_hvp(DATA, V, batch=torch.tensor([-1]), **TH), ValueError, "batch: .*0 to 39, got -1"),
    (lambda: xf.ops.glm_hvp(DATA, V, batch=torch.tensor([0.0]), **TH), TypeError, "batch: expected an int64 tensor"),
    (
        lambda: xf.ops.glm_hvp(DATA, V, sample_weight=torch.ones(3), **TH),
        ValueError,
        r"sample_weight: .*\(40,\), got \(3,\)",
    ),
    (
        lambda: xf.ops.glm_hvp(DATA, V[:, 0], theta=V[:, 0], family="smooth_hinge"),
        ValueError,
        "y: the smooth hinge needs labels",
    ),
    (
        lambda: xf.ops.glm_hvp(DATA, V[:, 0], theta=V[:, 0], family="smooth_hinge", y=torch.zeros(N)),
        ValueError,
        r"y: expected \+1 and -1",
    ),
    (lambda: xf.ops.lissa(DATA, V, **LISSA | {"sigma": 0.0}), ValueError, "sigma: expected a number above 0, got 0.0"),
    (lambda: xf.ops.lissa(DATA, V, **LISSA | {"batch_size": 41}), ValueError, "batch_size: .*from 1 to 40, got 41"),
    (lambda: xf.ops.lissa(DATA, V, **LISSA | {"steps": 0}), ValueError, "steps: .*at least 1, got 0"),
    (lambda: xf.ops.lissa(DATA, V, skip=3, **LISSA), ValueError, "skip: .*from 0 to 2, got 3"),
    (lambda: xf.ops.lissa(DATA, V, seed=-1, **LISSA), ValueError, "seed: .*got -1"),
    (lambda: xf.ops.lissa(DATA, V, seed=1.0, **LISSA), TypeError, "seed: expected a whole number, got float"),
    (lambda: xf.ops.lissa(DATA, V, start=V[None].repeat(2, 1, 1), **LISSA), ValueError, "start: expected shape"),
    (lambda: xf.ops.influence_scores(DATA, W, V), ValueError, r"solutions: expected shape \(M, 7, C\)"),
    (lambda: xf.ops.influence_scores(DATA, W[:, :2], V[None]), ValueError, r"delta: expected shape \(40, 3\)"),
    (lambda: xf.ops.influence_top_k(DATA, W, V[None], 41), ValueError, "k: .*from 1 to 40, got 41"),
    (lambda: xf.ops.influence_top_k(DATA, W, V[None], 1, rows=torch.tensor([50])), ValueError, "rows: .*39, got 50 to 50"),
    (lambda: xf.ops.sample_rows(0, 3, seed=1), ValueError, "rows: .*got 0"),
    (lambda: xf.ops.random_projection(DATA[0], 3), ValueError, r"x: expected shape \(B, P\)"),
    (lambda: xf.ops.random_projection(DATA, 0), ValueError, "outputs: .*at least 1, got 0"),
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
    v = V[None]
    with pytest.raises(ValueError, match="weights: expected shape"):
        module.glm_hvp(DATA, v, None, W[:5], None, None, None, *SPECIMEN)
    with pytest.raises(ValueError, match="batch: expected numbers from 0 to 39"):
        module.glm_hvp(DATA, v, V, None, None, None, torch.tensor([40]), *SPECIMEN)
    with pytest.raises(ValueError, match="one output"):
        module.glm_hvp(DATA, v, V, None, None, None, None, "logistic", False, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="delta: expected shape"):
        module.influence_top_k(DATA, W[:3], v, None, False, 1, True)
    with pytest.raises(ValueError, match="k: expected 1 to 40"):
        module.influence_top_k(DATA, W, v, None, False, 41, True)
    with pytest.raises(ValueError, match="start: expected shape"):
        module.lissa(DATA, v, W, None, v[:, :3], "softmax", False, 0.0, 0.0, 9.0, 4, 0, 3, 0, 0)
