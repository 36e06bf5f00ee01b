"""Relevance ops: bounds of the input, and tensors that are not dense."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import xai_fast as xf

X, WEIGHT = torch.tensor([[0.0, 0.25], [0.5, 1.0]]), torch.tensor([[1.0, -2.0], [0.5, 1.0], [3.0, 0.0]])


def z_box(low: Any, high: Any, x: Tensor = X) -> Tensor:
    return xf.ops.linear_relevance(x, WEIGHT.to(x), None, torch.ones(2, 3).to(x), rule="z_box", low=low, high=high)


BAD = [
    (lambda: z_box(0.5, 1.0), "^low: expected bounds of at most x, got one 0.5 above it$"),
    (lambda: z_box(0.0, 0.75), "^high: expected bounds of at least x, got one 0.25 below it$"),
    (lambda: z_box(1.0, 0.0), "^low: expected bounds of at most high, got larger ones$"),
    (lambda: z_box(torch.tensor([0.0, 0.5]), 1.0), "^low: expected bounds of at most x, got one 0.25 above it$"),
    (lambda: z_box(torch.tensor(float("nan")), 1.0), "^low: expected finite bounds, got inf or NaN$"),
    (lambda: z_box(0.0, torch.tensor([1.0, float("nan")])), "^high: expected finite bounds"),
    (lambda: z_box(0.0, torch.tensor(float("inf"))), "^high: expected finite bounds"),
    (lambda: z_box(torch.zeros(7), 1.0), r"^low: expected a shape that broadcasts to \(2, 2\), got \(7,\)$"),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bounds_that_do_not_hold(index: int) -> None:
    call, message = BAD[index]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_bounds_hold_up_to_rounding(dtype: torch.dtype) -> None:
    """Images are normalised in the precision of the model, bounds in that of Python."""
    mean, deviation = 0.485, 0.229
    x = (X.to(dtype) - mean) / deviation
    assert z_box((0 - mean) / deviation, (1 - mean) / deviation, x).isfinite().all()


def test_bounds_are_not_looked_at_while_compiling() -> None:
    compiled = torch.compile(z_box, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(0.0, 1.0), z_box(0.0, 1.0))
    with FakeTensorMode() as mode:
        x, weight, relevance = (mode.from_tensor(t) for t in (X, WEIGHT, torch.ones(2, 3)))
        assert xf.ops.linear_relevance(x, weight, None, relevance, rule="z_box", low=0.0, high=1.0).shape == (2, 2)


def sparse(x: Tensor) -> Tensor:
    return x.to_sparse()


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


def strided_nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x))


OPS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "attention": (xf.ops.av_relevance, (torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 4), torch.rand(2, 1, 3, 4))),
    "logits": (xf.ops.softmax_relevance, (X, X, X)),
    "x": (xf.ops.skip_relevance, (X, X, X)),
    "weight": (lambda w, x, r: xf.ops.linear_relevance(x, w, None, r), (WEIGHT, X, torch.ones(2, 3))),
    "relevance": (lambda r, x: xf.ops.layer_norm_relevance(x, None, None, r), (X, X)),
    "query": (xf.ops.attention_relevance, (torch.rand(2, 1, 3, 4),) * 4),
}


@pytest.mark.parametrize("kind", [sparse, nested, strided_nested])
@pytest.mark.parametrize("name", OPS)
def test_tensors_that_are_not_dense(name: str, kind: Callable[[Tensor], Tensor]) -> None:
    call, (first, *rest) = OPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strange = kind(first)
    with warnings.catch_warnings():
        # No word of missing kernels.
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=rf"^{name}: expected a dense tensor, got (torch.sparse_coo|a nested one)$"):
            call(strange, *rest)
