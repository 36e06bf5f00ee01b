"""The kernels' bodies for lesser CPUs than this one, and the product of many rows on a matrix unit."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import xai_fast as xf
from tests.emulator.build import sanitized
from tests.implementations import assert_number_of_threads_does_not_matter
from tests.tolerances import assert_close_to_reference
from xai_fast import _backend
from xai_fast.reference import rollout as reference

HERE = Path(__file__).parent
CAPABILITIES = ["base", "avx2", "avx512", "amx"]
BEST = _backend.C.cpu_capability()
LESSER = CAPABILITIES[: CAPABILITIES.index(BEST)]
needs_unit = pytest.mark.skipif(BEST != "amx", reason="this CPU has no matrix unit")


@pytest.mark.skipif(sanitized(), reason="the sanitized module is tested with the best body")
@pytest.mark.parametrize("capability", LESSER)
def test_bodies_of_lesser_cpus(capability: str) -> None:
    files = sorted(str(path) for path in HERE.glob("test_*_kernels.py"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *files,
            "-k",
            "cpu and not emulated",
        ],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, "XAI_FAST_CPU": capability},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def layers_of(count: int, batch: int, heads: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shape = (batch, heads, tokens, tokens)
    return [torch.randn(shape, dtype=torch.float64).mul(3).softmax(-1).to(dtype) for _ in range(count)]


def one_by_one(layers: list[torch.Tensor], rows: torch.Tensor, *options: object) -> torch.Tensor:
    for layer in layers:
        rows = reference.rollout_rows(layer, rows, *options)
    return rows


@needs_unit
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 15, 7), (1, 2, 33, 32), (5, 1, 64, 16), (3, 2, 130, 129), (1, 2, 301, 301)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [("mean", 1.0, True), ("max", 0.3, True), ("sum", 1.0, False), ("min", 0.0, True)])
def test_product_of_many_rows(shape: tuple[int, ...], dtype: torch.dtype, options: tuple[str, float, bool]) -> None:
    """Odd sizes, one layer and several, a batch for every thread and one that the threads share."""
    batch, heads, tokens, n_rows = shape
    layers = layers_of(3, batch, heads, tokens, dtype)
    rows = torch.rand(batch, n_rows, tokens)
    for some in (layers[:1], layers):
        actual = _backend.C.row_product(some, rows, *options)
        exact = one_by_one([a.double() for a in some], rows.double(), *options)
        assert_close_to_reference(actual, exact, one_by_one(some, rows, *options))


@needs_unit
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 15), (1, 2, 33), (5, 1, 64), (3, 2, 130), (1, 2, 301)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [("mean", 1.0, True), ("max", 0.3, True), ("sum", 1.0, False)])
def test_product_of_all_layers(shape: tuple[int, ...], dtype: torch.dtype, options: tuple[str, float, bool]) -> None:
    """Without rows the first layer is the left operand; a layer is a view with strides of its own."""
    layers = layers_of(4, *shape, dtype)
    layers[0] = layers[0].transpose(0, 1).contiguous().transpose(0, 1)
    for some in (layers[:2], layers):
        actual = _backend.C.row_product(some, None, *options)
        wide = [reference.fuse_heads(a.double(), *options) for a in some]
        assert actual.dtype == torch.float32
        assert_close_to_reference(actual, one_by_one([a.double() for a in some[1:]], wide[0], *options))


@needs_unit
def test_product_has_the_accuracy_of_floats_entry_by_entry() -> None:
    """Entries over twelve orders of magnitude; no sum cancels."""
    layer = torch.rand(1, 2, 97, 97) * 10.0 ** torch.randint(-6, 1, (1, 2, 97, 97))
    rows = torch.rand(1, 40, 97) * 10.0 ** torch.randint(-6, 1, (1, 40, 97))
    actual = _backend.C.row_product([layer], rows, "sum", 0.0, False)
    exact = one_by_one([layer.double()], rows.double(), "sum", 0.0, False)
    assert float((actual / exact - 1).abs().max()) < 1e-6


@needs_unit
def test_product_of_strided_layers() -> None:
    base = layers_of(1, 4, 6, 60)[0]
    rows = torch.rand(2, 41, 41)
    for view in (
        base[1:3, ::2, 3:44, 5:46],
        base.transpose(0, 1)[:2, :, 9:50, 1:42],
        base.transpose(-1, -2)[:2, :, :41, :41],
    ):
        actual = _backend.C.row_product([view, view], rows, "mean", 1.0, True)
        exact = one_by_one([view.double()] * 2, rows.double(), "mean", 1.0, True)
        assert_close_to_reference(actual, exact)


@needs_unit
def test_product_does_not_depend_on_threads() -> None:
    """From one thread on that takes all samples to three that share each of them."""
    layers, rows = layers_of(2, 2, 2, 150), torch.rand(2, 150, 150)
    for given in (rows, None):
        assert_number_of_threads_does_not_matter(
            lambda given=given: (_backend.C.row_product(layers, given, "mean", 1.0, True),)
        )


@needs_unit
def test_nan_stays_in_its_sample() -> None:
    layers = layers_of(2, 2, 1, 40)
    layers[0][1, 0, 3, 4] = float("nan")
    out = _backend.C.row_product(layers, torch.rand(2, 30, 40), "mean", 1.0, True)
    assert out[1].isnan().any()
    assert not out[0].isnan().any()


@pytest.fixture
def tile_configuration(tmp_path: Path) -> Callable[[], bytes]:
    """What the tile registers of this thread are configured for."""
    library = tmp_path / "configuration.so"
    source = """extern "C" void configuration(char (*out)[64]) { asm volatile("sttilecfg %0" : "=m"(*out)); }"""
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    read = ctypes.CDLL(str(library)).configuration

    def configuration() -> bytes:
        out = ctypes.create_string_buffer(64)
        read(out)
        return out.raw

    return configuration


@needs_unit
def test_registers_are_handed_back(tile_configuration: Callable[[], bytes]) -> None:
    """torch's own products in 16 bits use the same registers on the same threads, shaped as they were left."""
    a, b = torch.randn(37, 66).bfloat16(), torch.randn(66, 19).bfloat16()
    query = torch.randn(2, 4, 90, 32)
    expected, before = a @ b, tile_configuration()
    xf.ops.rollout_rows_qk(query, query, torch.rand(2, 1, 90))
    xf.ops.attention_relevance(query, query, query, query)
    xf.ops.influence_top_k(torch.randn(90, 8), torch.randn(90, 2), torch.randn(3, 8, 2), 4)
    xf.attention_rollout(layers_of(2, 2, 2, 90), token=None)
    assert tile_configuration() == before
    assert torch.equal(a @ b, expected)


def test_bad_layers_of_a_product() -> None:
    layer, rows = layers_of(1, 2, 2, 30)[0], torch.rand(2, 30, 30)
    with pytest.raises(ValueError, match="layers: expected at least 1, got 0"):
        _backend.C.row_product([], rows, "mean", 1.0, True)
    with pytest.raises(ValueError, match="attention: expected shape"):
        _backend.C.row_product([layer[0]], rows, "mean", 1.0, True)
    with pytest.raises(ValueError, match="layers: expected at least 2, got 1"):
        _backend.C.row_product([layer], None, "mean", 1.0, True)
    with pytest.raises(ValueError, match="layers: expected one batch size"):
        _backend.C.row_product([layer, layer[:1]], None, "mean", 1.0, True)
    with pytest.raises(ValueError, match="rows: expected shape"):
        _backend.C.row_product([layer], rows[:, :, :9], "mean", 1.0, True)
    with pytest.raises(RuntimeError, match="no matrix unit"):
        _backend.C.row_product([layer.double()], rows.double(), "mean", 1.0, True)
