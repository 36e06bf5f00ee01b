"""The compiled product of whole rollout matrices (CPU only) against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.emulator.build import sanitized
from tests.implementations import Implementation, assert_number_of_threads_does_not_matter, available
from tests.tolerances import assert_close_to_reference
from xai_fast.reference import rollout as reference

DTYPES = [torch.float32, torch.bfloat16] if sanitized() else [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FUSIONS = ["mean", "max"] if sanitized() else ["mean", "sum", "max", "min"]

# (L, B, H, N) around the sizes of a group (24 rows), a chunk (16), a panel (32 or 16) and a depth (192).
SHAPES = [
    (1, 2, 3, 5),
    (2, 1, 1, 1),
    (3, 2, 3, 16),
    (2, 3, 2, 25),
    (4, 1, 5, 33),
    (2, 2, 2, 48),
    (3, 1, 2, 197),
    (2, 1, 3, 209),
]


@pytest.fixture
def cpu() -> Implementation:
    return available()[0]


def attentions_of(layers: int, batch: int, heads: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    stacked = torch.randn(layers, batch, heads, tokens, tokens, dtype=torch.float64).mul(2).softmax(-1)
    return list(stacked.to(dtype).unbind(0))


def chain(layers: list[Tensor], options: tuple[object, ...]) -> Tensor:
    product = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype).expand(layers[0].shape[0], -1, -1)
    for layer in layers:
        product = reference.fuse_heads(layer, *options) @ product
    return product


def check_product(cpu: Implementation, layers: list[Tensor], *options: object) -> None:
    wide = [layer.to(reference.accumulate_dtype(layer.dtype)) for layer in layers]
    actual = cpu.load().rollout_product(layers, *options)
    assert actual.dtype == wide[0].dtype
    assert actual.is_contiguous()
    assert_close_to_reference(actual, chain([layer.double() for layer in layers], options), chain(wide, options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_product(cpu: Implementation, shape: tuple[int, ...], dtype: torch.dtype, fusion: str) -> None:
    layers = attentions_of(*shape, dtype)
    check_product(cpu, layers, fusion, 1.0, True)
    check_product(cpu, layers, fusion, 0.3, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(cpu: Implementation, dtype: torch.dtype) -> None:
    """Slices, gaps between rows, swapped batch and head, broadcast batch, transposed keys, layers of different strides."""
    base = attentions_of(1, 4, 4, 60, dtype)[0]
    views = [
        base[..., 3:50, 3:50],
        base[:, :, 5:52, 13:60],
        base.transpose(0, 1)[..., :47, :47],
        base[:1, ..., :47, :47].expand(4, -1, -1, -1),
        base.transpose(-1, -2)[..., :47, 1:48],
        base.flatten()[1 : 1 + 4 * 4 * 47 * 47].view(4, 4, 47, 47),
        base[:, :1, 2:49, 2:49].expand(-1, 4, -1, -1),
    ]
    for view in views:
        check_product(cpu, [view, view], "mean", 1.0, True)
    check_product(cpu, views, "max", 0.5, True)


def test_rows_that_sum_to_zero(cpu: Implementation) -> None:
    layers = attentions_of(3, 2, 2, 30, torch.float32)
    layers[1][:, :, 7] = 0
    check_product(cpu, layers, "mean", 0.0, True)
    assert cpu.load().rollout_product(layers[1:2], "mean", 0.0, True)[:, 7].eq(0).all()


@pytest.mark.parametrize("tokens", [40, 220])
def test_nan_spreads_as_in_a_product(cpu: Implementation, tokens: int) -> None:
    layers = attentions_of(3, 3, 2, tokens, torch.float32)
    layers[1][1, 0, 33, 2] = math.nan
    out = cpu.load().rollout_product(layers[:2], "mean", 1.0, True)
    assert torch.equal(out.isnan().any(-1).nonzero(), torch.tensor([[1, 33]]))
    everywhere = cpu.load().rollout_product(layers, "mean", 1.0, True)
    assert everywhere[1].isnan().all()
    assert not everywhere[[0, 2]].isnan().any()


def test_number_of_threads_does_not_matter(cpu: Implementation) -> None:
    layers = attentions_of(3, 2, 3, 150, torch.float32)
    assert_number_of_threads_does_not_matter(lambda: (cpu.load().rollout_product(layers, "mean", 1.0, True),))


def test_empty_batch(cpu: Implementation) -> None:
    assert cpu.load().rollout_product([torch.rand(0, 2, 5, 5)] * 2, "mean", 1.0, True).shape == (0, 5, 5)


def test_wrong_calls_are_refused(cpu: Implementation) -> None:
    """The checks that keep a wrong call from reading past a tensor; users meet those of attention_rollout before."""
    square = torch.rand(1, 2, 5, 5)
    for layers in ([], [square, torch.rand(1, 2, 6, 6)], [torch.rand(1, 2, 5, 6)], [square[0]]):
        with pytest.raises(ValueError, match="attentions"):
            cpu.load().rollout_product(layers, "mean", 1.0, True)
    with pytest.raises(TypeError, match="attentions"):
        cpu.load().rollout_product([square, square.double()], "mean", 1.0, True)
