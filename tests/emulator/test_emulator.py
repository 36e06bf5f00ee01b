"""The emulator's own tests: right kernels give the right numbers in every order, wrong ones are caught."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from tests.emulator import build

SOURCE = build.HERE / "self_test_kernels.cu"
SEEDS = [0, 1, 2, 3]

pytestmark = pytest.mark.skipif(build.cuda_include() is None, reason="the CUDA headers are not installed")


class Kernels:
    """Calls the exported launchers with tensors; raises RuntimeError with the message a launcher returns."""

    def __init__(self):
        self.library = build.load("self_test", [SOURCE])

    def __call__(self, name, *arguments, seed=0):
        self.library.set_schedule_seed(seed)
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*map(self._argument, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    @staticmethod
    def _argument(value):
        return ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def kernels():
    return Kernels()


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_operations(kernels, seed):
    x = torch.arange(32, dtype=torch.int32) * 3 + 1
    out = torch.empty(7, 32, dtype=torch.int32)
    kernels("warp_operations", x, out, seed=seed)
    lanes = torch.arange(32)
    odd = sum(1 << lane for lane in range(32) if x[lane] % 2)
    assert (out[0] == x[5]).all()
    assert torch.equal(out[1], x[lanes ^ 3])
    assert torch.equal(out[2], x[torch.where(lanes + 4 < 32, lanes + 4, lanes)])
    assert torch.equal(out[3], x[torch.where(lanes % 16 >= 4, lanes - 4, lanes)])
    assert (out[4].to(torch.int64) % 2**32 == odd).all()
    assert (out[5:] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [1, 32, 50, 256])
def test_block_reductions(kernels, seed, threads):
    x = torch.arange(3 * threads, dtype=torch.int32).reshape(3, threads)
    out = torch.empty(3, 5, dtype=torch.int32)
    kernels("block_reductions", x, out, 3, threads, seed=seed)
    expected = [x.sum(1), (x % 2).sum(1), (x == 7).any(1), (x > 0).all(1), torch.arange(3) + 3]
    assert torch.equal(out.long(), torch.stack([e.long() for e in expected], dim=1))


def reversed_by(kernels, seed, with_barrier):
    x, y = torch.arange(64.0), torch.empty(64)
    kernels("reverse", x, y, 64, with_barrier, seed=seed)
    return torch.equal(y, x.flip(0))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_makes_the_schedule_irrelevant(kernels, seed):
    assert reversed_by(kernels, seed, with_barrier=True)


def test_a_missing_barrier_gives_wrong_output(kernels):
    assert not all(reversed_by(kernels, seed, with_barrier=False) for seed in SEEDS)


def test_shared_memory_starts_as_nan(kernels):
    y = torch.zeros(16)
    kernels("read_fresh_shared", y, 16)
    assert y.isnan().all()


@pytest.mark.skipif(build.sanitized(), reason="AddressSanitizer ends the process instead")
@pytest.mark.parametrize("index", [-1, 8])
def test_a_write_outside_shared_memory_is_caught(kernels, index):
    kernels("write_shared", 8, 7)
    with pytest.raises(RuntimeError, match=r"block \(0,0,0\).*outside dynamic shared memory"):
        kernels("write_shared", 8, index)


WRITE_OUTSIDE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.write_shared.restype = None
library.write_shared(8, 7)
print("inside", flush=True)
library.write_shared(8, 8)
print("outside", flush=True)
"""


def test_address_sanitizer_sees_shared_memory(monkeypatch):
    """A float just behind the allocation, in a process of its own, since the sanitizer ends it."""
    monkeypatch.setenv("XAI_FAST_SANITIZE", "1")
    library = build.build("self_test", [SOURCE])
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in names]
    environment = os.environ | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", WRITE_OUTSIDE, str(library)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stdout.split() == ["inside"]
    assert "heap-buffer-overflow" in result.stderr
    assert "write_shared_kernel" in result.stderr


@pytest.mark.parametrize("kernel", ["divergent_barrier", "barrier_against_warp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_that_not_all_threads_reach_is_reported(kernels, kernel, seed):
    with pytest.raises(RuntimeError, match=r"deadlock: \d+ threads wait, this one at __sync"):
        kernels(kernel, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mask_that_names_an_exited_lane_is_reported(kernels, seed):
    with pytest.raises(RuntimeError, match=r"exited|deadlock"):
        kernels("exited_lane", torch.empty(32, dtype=torch.int32), seed=seed)


@pytest.mark.parametrize(
    ("grid", "grid_y", "threads", "shared"),
    [(1, 1, 1025, 0), (1, 1, 0, 0), (0, 1, 1, 0), (1, 65536, 1, 0), (1, 1, 1, 163 * 1024 + 1)],
)
def test_launch_limits(kernels, grid, grid_y, threads, shared):
    with pytest.raises(RuntimeError, match="invalid"):
        kernels("launch_empty", grid, grid_y, threads, ctypes.c_size_t(shared))


def test_the_largest_launch_is_accepted(kernels):
    assert kernels("launch_empty", 2, 1, 1024, ctypes.c_size_t(163 * 1024)) is None  # an error would have been raised


@pytest.mark.parametrize("seed", SEEDS)
def test_asynchronous_copy(kernels, seed):
    x, y = torch.arange(32.0), torch.empty(32)
    kernels("async_copy", x, y, 8, 5, True, seed=seed)
    assert torch.equal(y, torch.where(torch.arange(32) < 20, x, 0))


def test_an_asynchronous_copy_gives_nothing_before_the_wait(kernels):
    x, y = torch.arange(32.0), torch.empty(32)
    kernels("async_copy", x, y, 8, 8, False)
    assert y.isnan().all()


@pytest.mark.parametrize("wait", [False, True])
def test_a_write_under_an_asynchronous_copy_is_found(kernels, wait):
    with pytest.raises(RuntimeError, match="written while an asynchronous copy"):
        kernels("write_under_copy", torch.ones(4), wait)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "dtype", "k"),
    [("mma_half", torch.float16, 16), ("mma_bfloat16", torch.bfloat16, 16), ("mma_tf32", torch.float32, 8)],
)
def test_mma_fragments_against_a_plain_product(kernels, name, dtype, k, seed):
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randint(-9, 10, (n, k), generator=generator).to(dtype) for n in (16, 8))
    d = torch.empty(16, 8)
    kernels(name, a, b, d, seed=seed)
    assert torch.equal(d, a.float() @ b.float().T)


def test_rounding_to_tf32(kernels):
    rounded = kernels.library.round_to_tf32
    rounded.restype = ctypes.c_uint32
    one = 0x3F800000
    assert [rounded(one + low) - one for low in (0, 0xFFF, 0x1000, 0x2FFF)] == [0, 0, 0x2000, 0x2000]
    assert [rounded(x) for x in (0x7F800000, 0x7FFFFFFF)] == [0x7F800000, 0x7FFFFFFF]
