"""The compiled kernels of the metrics family (CPU bodies, emulated CUDA, CUDA) against the float64 reference."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulator.build import sanitized
from tests.implementations import Implementation, assert_order_of_threads_does_not_matter, with_threads
from tests.tolerances import assert_close_to_reference
from xai_fast.reference import metrics as reference

# Sanitizers look at memory, not at numbers, and are ten times slower: every code path, but not every combination.
FULL = not sanitized()
F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
DTYPES = [F32, F64, F16, BF16]
BALLS = ["l2", "linf"]
NORMS = ["l1", "l2", "linf"]


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype)


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, contiguous, one element behind an aligned address."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def check_ranks(implementation: Implementation, scores: Tensor) -> None:
    ranks = implementation("rank_features", scores)
    assert ranks.dtype == torch.int32
    assert torch.equal(ranks, reference.rank_features(scores))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 255, 256, 257, 1000, 5000, 70_000] if FULL else [1, 17, 256, 5000])
def test_ranks(implementation: Implementation, dtype: torch.dtype, n: int) -> None:
    scores = normal(3, n, dtype=dtype)
    check_ranks(implementation, scores)
    check_ranks(implementation, scores.mul(3).round())  # ties, 0 and -0
    check_ranks(implementation, scores.abs() * 1e-3)
    check_ranks(implementation, scores.sign() * scores.abs().pow(20))  # many exponents


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [20, 2000])
def test_ranks_of_hard_numbers(implementation: Implementation, dtype: torch.dtype, n: int) -> None:
    """NaN as -inf, -0 as 0, subnormal and largest numbers."""
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    hard = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, least, -least, least / 4, -least / 4, most, -most, 1.0]
    scores = torch.tensor(hard, dtype=dtype)[torch.randint(len(hard), (4, n))]
    scores[0] = -0.0
    scores[1] = math.nan
    scores[2] = 0.0
    scores[2, ::2] = -0.0
    check_ranks(implementation, scores)


@pytest.mark.parametrize("n", [50, 900])
def test_equal_scores_keep_their_order(implementation: Implementation, n: int) -> None:
    assert torch.equal(implementation("rank_features", torch.full((1, n), 7.0))[0], torch.arange(n, dtype=torch.int32))


def test_ranks_of_strided_and_empty_scores(implementation: Implementation) -> None:
    scores = normal(300, 8)
    check_ranks(implementation, scores.T)
    check_ranks(implementation, scores[:, ::3])
    check_ranks(implementation, scores[0, 0].expand(2, 5))
    check_ranks(implementation, scores[:0])


# ---- removal ---------------------------------------------------------------------------------------------------------

ELEMENTS = [torch.bool, torch.uint8, torch.int16, F16, BF16, torch.int32, F32, torch.int64, F64, torch.complex64]


def entries(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-100, 100, shape).to(dtype)


def check_replaced(
    implementation: Implementation, x: Tensor, baseline: Tensor, examples: int = 5, intervals: Tensor | None = None
) -> None:
    batch, _, positions, _ = x.shape
    ranks = reference.rank_features(torch.randn(batch, positions))
    sample = torch.randint(0, batch, (examples,))
    if intervals is None:
        intervals = torch.randint(0, positions + 1, (2, examples)).sort(dim=0).values
    first, last = intervals.int()
    args = (x, baseline, ranks, sample, first, last)
    before = [a.clone() for a in args]
    out = implementation("replace_ranked", *args)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    assert torch.equal(out, reference.replace_ranked(*args))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("dtype", ELEMENTS if FULL else [torch.bool, BF16, F32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 35, 1), (2, 3, 64, 1), (3, 2, 7, 5), (2, 1, 9, 32), (2, 2, 1, 48)])
def test_replaced_elements(implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Baselines that are broadcast in every way, whole, strided."""
    x = entries(*shape, dtype=dtype)
    batch, channels, positions, depth = shape
    parts = [(1, 1, 1, 1), shape, (1, channels, 1, depth), (batch, 1, positions, 1), (1, channels, 1, 1), (1, 1, 1, depth)]
    for part in parts:
        check_replaced(implementation, x, entries(*part, dtype=dtype))
    strided = entries(batch, channels, 2 * positions, 3 * depth, dtype=dtype)[:, :, ::2, ::3]
    turned = entries(depth, positions, channels, batch, dtype=dtype).permute(3, 2, 1, 0)
    check_replaced(implementation, x, strided)
    check_replaced(implementation, strided, turned)
    check_replaced(implementation, turned, strided)
    check_replaced(implementation, misaligned(x), misaligned(entries(*shape, dtype=dtype)))


@pytest.mark.parametrize("shape", [(2, 2, 20_000, 1), (1, 1, 150, 200), (2, 1, 9001, 3)])
def test_replaced_elements_of_long_rows(implementation: Implementation, shape: tuple[int, ...]) -> None:
    for dtype in (torch.uint8, F32, F64) if FULL else (F32,):
        check_replaced(implementation, entries(*shape, dtype=dtype), entries(1, shape[1], 1, 1, dtype=dtype), examples=3)
        check_replaced(implementation, entries(*shape, dtype=dtype), entries(*shape, dtype=dtype), examples=2)


@pytest.mark.parametrize("rankings", [1, 2, 7])
def test_rankings_that_are_not_the_samples_own(implementation: Implementation, rankings: int) -> None:
    x, sample = entries(3, 2, 40, 2, dtype=F32), torch.tensor([2, 0, 1, 1, 2])
    ranks = reference.rank_features(torch.randn(rankings, 40))
    ranking = torch.randint(0, rankings, (5,))
    args = (x, torch.zeros(1), ranks, sample, torch.full((5,), 3).int(), torch.full((5,), 20).int(), ranking)
    assert torch.equal(implementation("replace_ranked", *args), reference.replace_ranked(*args))


def test_replaced_intervals(implementation: Implementation) -> None:
    """Nothing, all, one, an empty interval that begins behind its end, intervals beyond the ranks."""
    x = entries(3, 2, 40, 1, dtype=F32)
    bounds = [(0, 0), (0, 40), (7, 8), (9, 3), (-5, 2), (39, 90), (40, 50), (-(2**31), 2**31 - 1)]
    check_replaced(implementation, x, torch.zeros(1), len(bounds), torch.tensor(bounds).T)
    check_replaced(implementation, x, torch.zeros(1), 0)
    check_replaced(implementation, x[:, :0], torch.zeros(1))


def test_replacing_copies_bits(implementation: Implementation) -> None:
    """NaN and -0 arrive as they were."""
    x = torch.tensor([math.nan, -0.0, math.inf, 1e-42]).view(1, 1, 4, 1)
    ranks, zero = torch.arange(4, dtype=torch.int32)[None], torch.zeros(1, dtype=torch.int32)
    out = implementation("replace_ranked", x, -torch.zeros(1), ranks, zero.long(), zero, zero + 1)
    assert out.view(torch.int32).flatten()[0] == torch.tensor(-0.0).view(torch.int32)
    assert torch.equal(out.view(torch.int32)[0, 0, 1:], x.view(torch.int32)[0, 0, 1:])


# ---- perturbation ----------------------------------------------------------------------------------------------------


def check_perturbed(implementation: Implementation, *args: Any) -> Tensor:
    """Calls the kernel and compares with the float64 reference. The radius, its product with the noise and the sum are
    rounded, half a unit each; normals are made in float32, also for float64.
    """
    x, sample, _, ball, radius = args[:5]
    out, exact = implementation("perturb", *args), reference.perturb(x.double(), *args[1:])
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    size = x[sample].abs().double() + radius
    unit = 0.0 if ball == "linf" else 2e-6 * radius
    assert bool(((out.double() - exact).abs() <= 1.5 * torch.finfo(x.dtype).eps * size + unit).all())
    return out


def draws(count: int, batch: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count) % batch, torch.arange(count) * 977


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 31, 64, 700, 8192, 20_003] if FULL else [1, 5, 700, 9001])
def test_perturbed(implementation: Implementation, dtype: torch.dtype, ball: str, n: int) -> None:
    x = normal(3, n, dtype=dtype)
    before = x.clone()
    out = check_perturbed(implementation, x, *draws(4, 3), ball, 0.3, 2**63 - 12345, 2**31 - 3)
    assert torch.equal(x, before)
    if dtype in (F16, BF16):  # rounded once, at the end
        rounded = reference.perturb(x, *draws(4, 3), ball, 0.3, 2**63 - 12345, 2**31 - 3)
        assert float((out == rounded).double().mean()) > 0.99 - 1 / out.numel()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("ball", BALLS)
def test_perturbed_numbers_and_scales(implementation: Implementation, dtype: torch.dtype, ball: str) -> None:
    sample, draw = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 2**32 - 1, 5, 5])
    x = normal(3, 50, dtype=dtype)
    for radius in (1e-30, 1e30) + ((1e-300, 1e300) if dtype == F64 else ()):
        check_perturbed(implementation, x * radius, sample, draw, ball, radius, 0, 0)
    assert torch.equal(implementation("perturb", x, sample, draw, ball, 0.0, 3, 0), x[sample])
    check_perturbed(implementation, x.T.contiguous().T, sample, draw, ball, 1.0, 3, 0)
    check_perturbed(implementation, x[:1].expand(3, 50), sample, draw, ball, 1.0, 3, 0)
    check_perturbed(implementation, misaligned(x), sample, draw, ball, 1.0, 3, 0)
    assert implementation("perturb", x, sample[:0], draw[:0], ball, 1.0, 3, 0).shape == (0, 50)
    x[0, 3], x[0, 4] = math.nan, math.inf
    spoiled = implementation("perturb", x, sample, draw, ball, 1.0, 3, 0)
    assert spoiled.isnan().nonzero().tolist() == [[1, 3]]
    assert spoiled[1, 4] == math.inf


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("ball", BALLS)
def test_noise_does_not_depend_on_the_chunk(implementation: Implementation, dtype: torch.dtype, ball: str) -> None:
    x = normal(4, 9001, dtype=dtype)
    sample, draw = draws(6, 4)
    whole = implementation("perturb", x, sample, draw, ball, 0.5, 9, 100)
    for e in range(6):
        one = slice(e, e + 1)
        assert torch.equal(implementation("perturb", x, sample[one], draw[one], ball, 0.5, 9, 100)[0], whole[e])
    later = implementation("perturb", x[2:], sample[2:4] - 2, draw[2:4], ball, 0.5, 9, 102)
    assert torch.equal(later, whole[2:4])


@pytest.mark.parametrize("ball", BALLS)
def test_noise_of_other_numbers_is_other_noise(implementation: Implementation, ball: str) -> None:
    x, zero = torch.zeros(1, 400), torch.zeros(1, dtype=torch.int64)

    def noise(seed: int = 0, draw: int = 0, first: int = 0) -> Tensor:
        return implementation("perturb", x, zero, zero + draw, ball, 1.0, seed, first)[0]

    assert torch.equal(noise(), noise())
    kinds = torch.stack([noise(), noise(seed=1), noise(seed=2**32), noise(draw=1), noise(first=1)])
    assert float((torch.corrcoef(kinds) - torch.eye(5)).abs().max()) < 0.2


def distance_from_uniform(u: Tensor) -> float:
    """Kolmogorov's distance between the numbers and the uniform distribution on [0, 1]."""
    places = torch.arange(1, u.numel() + 1, dtype=F64) / u.numel()
    return float((u.flatten().double().sort().values - places).abs().max())


def test_noise_is_uniform_in_the_box(implementation: Implementation) -> None:
    zero = torch.zeros(2, dtype=torch.int64)
    noise = implementation("perturb", torch.zeros(1, 20_000), zero, torch.arange(2), "linf", 2.0, 0, 0)
    assert noise.abs().max() < 2
    assert distance_from_uniform(noise / 4 + 0.5) < 1.95 / math.sqrt(noise.numel())
    for shift in (1, 2, 3, 4):
        assert float((noise[:, shift:] * noise[:, :-shift]).mean().abs()) < 4 * (4 / 3) / math.sqrt(noise.numel())


@pytest.mark.skipif(sanitized(), reason="numbers, not memory")
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_noise_is_uniform_in_the_ball(implementation: Implementation, n: int) -> None:
    """The share of the volume within is uniform, and no direction is preferred."""
    count = 3000
    sample = torch.zeros(count, dtype=torch.int64)
    noise = implementation("perturb", torch.zeros(1, n), sample, torch.arange(count), "l2", 2.0, 5, 0).double()
    length = noise.norm(dim=1, keepdim=True)
    assert length.max() <= 2 * (1 + 1e-6)
    assert distance_from_uniform((length / 2) ** n) < 1.95 / math.sqrt(count)
    direction = noise / length
    assert float(direction.mean(0).abs().max()) < 4.5 / math.sqrt(count * n)
    assert float((direction.T @ direction / count - torch.eye(n) / n).abs().max()) < 4.5 / math.sqrt(count)
    assert float((noise[1:] * noise[:-1]).sum(1).mean().abs()) < 4.5 * 4 / math.sqrt(count)


def test_normals_are_normal(implementation: Implementation) -> None:
    """In many dimensions the entries of a point of the ball are nearly normal."""
    n = 40_000
    zero = torch.zeros(1, dtype=torch.int64)
    noise = implementation("perturb", torch.zeros(1, n), zero, zero, "l2", math.sqrt(n), 3, 0)[0].double()
    assert distance_from_uniform(torch.special.ndtr(noise)) < 1.95 / math.sqrt(n)
    assert 3.5 < float(noise.abs().max()) < 6


# ---- distances -------------------------------------------------------------------------------------------------------


def check_distances(implementation: Implementation, maps: Tensor, centre: Tensor, norm: str) -> Tensor:
    sample = torch.randint(0, centre.shape[0], (maps.shape[0],))
    args = (maps, centre, sample, norm)
    found, exact = implementation("map_distances", *args), reference.map_distances(*args)
    assert found.dtype == F64
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [1, 3, 16, 100, 16_384, 40_005] if FULL else [1, 100, 17_001])
def test_distances(implementation: Implementation, dtype: torch.dtype, norm: str, n: int) -> None:
    maps, centre = normal(5, n, dtype=dtype), normal(2, n, dtype=dtype)
    check_distances(implementation, maps, centre, norm)
    check_distances(implementation, misaligned(maps), centre, norm)
    check_distances(implementation, centre[:1].expand(3, n), centre, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_distances_of_hard_numbers(implementation: Implementation, norm: str) -> None:
    """A NaN reaches its own distance alone, wherever it lies; so does inf - inf."""
    for scale in (1e-38, 1e30):
        check_distances(implementation, normal(3, 70) * scale, normal(1, 70) * scale, norm)
    check_distances(implementation, normal(3, 70, dtype=F64) * 1e150, normal(1, 70, dtype=F64), norm)
    n = 20_000
    for place in (0, 40, 63, 9000, 16_383, 16_384, n - 1):
        maps, centre = normal(2, n), normal(1, n)
        maps[0, place] = math.nan
        assert check_distances(implementation, maps, centre, norm).isnan().tolist() == [True, False]
        maps[0, place] = math.inf
        assert check_distances(implementation, maps, centre, norm)[0] == math.inf
        centre[0, place] = math.inf
        assert check_distances(implementation, maps, centre, norm)[0].isnan()
    assert check_distances(implementation, normal(0, 7), normal(1, 7), norm).shape == (0,)


# ---- norms of rows ---------------------------------------------------------------------------------------------------


def check_row_norms(implementation: Implementation, x: Tensor) -> Tensor:
    found, exact = implementation("row_norms", x), reference.row_norms(x.double())
    assert found.dtype == (F64 if x.dtype == F64 else F32)
    rounding, smallest = (1e-14, 0) if x.dtype == F64 else (5e-7, 2.0**-149)
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=smallest, equal_nan=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 64, 129, 384, 1000, 20_001] if FULL else [1, 7, 129, 1000])
def test_row_norms(implementation: Implementation, dtype: torch.dtype, n: int) -> None:
    x = normal(13, n, dtype=dtype)
    check_row_norms(implementation, x)
    check_row_norms(implementation, misaligned(x))
    check_row_norms(implementation, normal(n, 13, dtype=dtype).t())
    check_row_norms(implementation, x[:1].expand(3, n))
    assert check_row_norms(implementation, x[:0]).shape == (0,)


@pytest.mark.parametrize("n", [1, 40, 700])
def test_row_norms_of_hard_numbers(implementation: Implementation, n: int) -> None:
    """Squares may lie outside of float: norms below and above its root, and a NaN or an infinity in its own row alone."""
    for scale in (1e-44, 1e-38, 1e-25, 1e-10, 1e17, 1e19, 1e36):
        check_row_norms(implementation, torch.full((2, n), scale) * torch.tensor([[1.0], [-0.5]]))
    check_row_norms(implementation, torch.zeros(3, n))
    check_row_norms(implementation, normal(3, n, dtype=F64) * 1e150)
    for value in (math.nan, math.inf, -math.inf):
        x = normal(3, n)
        x[1, n // 2] = value
        assert check_row_norms(implementation, x).isfinite().tolist() == [True, False, True]


# ---- conciseness -----------------------------------------------------------------------------------------------------


def check_conciseness(implementation: Implementation, maps: Tensor, threshold: float = 0.0) -> Tensor:
    """Sizes are exact. An entropy may err by the rounding of the logarithms, a Gini index by that of its sum."""
    exact = reference.conciseness(maps, threshold, True)
    for gini in (True, False):
        found = implementation("conciseness", maps, threshold, gini)
        assert found.dtype == F64
        assert torch.equal(found[:, 0], exact[:, 0])
        rounding = 1e-11 if maps.dtype == F64 else 1e-7
        torch.testing.assert_close(found[:, 1], exact[:, 1], rtol=0, atol=rounding, equal_nan=True)
        if gini:
            torch.testing.assert_close(found[:, 2], exact[:, 2], rtol=0, atol=1e-12, equal_nan=True)
        else:
            assert found[:, 2].isnan().all()
    return exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 32, 255, 256, 1000, 40_005] if FULL else [1, 7, 300, 17_001])
def test_conciseness(implementation: Implementation, dtype: torch.dtype, n: int) -> None:
    maps = normal(3, n, dtype=dtype)
    check_conciseness(implementation, maps)
    check_conciseness(implementation, maps.abs(), 0.5)
    check_conciseness(implementation, maps.mul(2).round())  # ties and zeros
    check_conciseness(implementation, misaligned(maps), 1e300)
    check_conciseness(implementation, maps.T.contiguous().T, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [40, 3000])
def test_conciseness_of_extreme_scales(implementation: Implementation, dtype: torch.dtype, n: int) -> None:
    """Subnormal numbers, and entries that are far apart."""
    scales = {F32: (1e-44, 1e-38, 1e-30, 1e30), F64: (1e-310, 1e-300, 1e300), F16: (1e-7, 1e-3), BF16: (1e-40, 1e-38, 1e30)}
    for scale in scales[dtype]:
        check_conciseness(implementation, (normal(2, n, dtype=F64) * scale).to(dtype))
    apart = normal(2, n, dtype=F64).abs().pow(4 if dtype == F16 else 20)
    check_conciseness(implementation, apart.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [9, 400])
def test_conciseness_of_hard_maps(implementation: Implementation, dtype: torch.dtype, n: int) -> None:
    """Zeros, one entry, constants, NaN, inf."""
    maps = torch.zeros(6, n, dtype=dtype)
    maps[1, 3] = -2.0
    maps[2] = -0.25
    maps[3], maps[4], maps[5] = normal(n, dtype=dtype), normal(n, dtype=dtype), -0.0
    maps[3, n // 2] = math.nan
    maps[4, n - 2] = -math.inf
    exact = check_conciseness(implementation, maps, 0.1)
    expected = torch.tensor([[0, 0, 0], [1, 0, 1 - 1 / n], [n, math.log(n), 0]], dtype=F64)
    torch.testing.assert_close(exact[:3], expected, rtol=0, atol=1e-12)
    assert exact[3:5, 1:].isnan().all()
    assert exact[5].tolist() == [0, 0, 0]
    assert implementation("conciseness", maps[:0], 0.0, True).shape == (0, 3)


def test_sizes_at_the_threshold(implementation: Implementation) -> None:
    """Compared in float64: a threshold between two floats is above the lower one."""
    third = torch.full((1, 40), 1 / 3)
    for threshold, expected in [(1 / 3, 40), (float(third[0, 0]), 0), (float(third[0, 0]) + 1e-12, 0), (1e39, 0), (0.0, 40)]:
        assert implementation("conciseness", third, threshold, False)[0, 0] == expected
    assert implementation("conciseness", torch.tensor([[math.inf] * 33]), 1e300, False)[0, 0] == 33


# ---- order and number of threads -------------------------------------------------------------------------------------


def problems() -> list[tuple[Any, ...]]:
    sample, draw = draws(5, 3)
    maps = normal(5, 17_001)
    scores = normal(3, 500).round()
    ranks = reference.rank_features(scores)
    x, last = normal(3, 2, 500, 1), torch.arange(5, dtype=torch.int32) * 100
    return [
        ("rank_features", scores),
        ("replace_ranked", x, x.mean(2, keepdim=True), ranks, sample, last * 0, last),
        ("perturb", maps[:3], sample, draw, "l2", 1.0, 0, 0),
        ("perturb", maps[:3].bfloat16(), sample, draw, "linf", 1.0, 0, 0),
        *(("map_distances", maps, maps[:3].flip(1), sample, norm) for norm in NORMS),
        ("conciseness", maps, 0.1, True),
        ("row_norms", maps),
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_emulated_kernels_do_not_depend_on_the_order_of_threads(seed: int) -> None:
    assert_order_of_threads_does_not_matter(seed, problems())


def test_kernels_do_not_depend_on_the_number_of_threads(implementation: Implementation) -> None:
    for problem in problems():
        call = functools.partial(implementation, *problem)
        assert torch.equal(with_threads(3, call), with_threads(1, call))


# ---- random problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20) if FULL else range(3))
def test_random_problems(implementation: Implementation, seed: int) -> None:
    torch.manual_seed(seed)
    n = int(torch.randint(1, 3000, ()))
    batch, depth = (int(k) for k in torch.randint(1, 6, (2,)))
    dtype = DTYPES[seed % 4]
    maps = normal(batch, n, dtype=dtype).mul(4).round().div(4)
    check_ranks(implementation, maps.to(F64 if dtype == F64 else F32))
    check_conciseness(implementation, maps, seed / 10)
    check_row_norms(implementation, maps)
    for norm in NORMS:
        check_distances(implementation, normal(4, n, dtype=dtype), maps, norm)
    for ball in BALLS:
        check_perturbed(implementation, maps, *draws(3, batch), ball, 0.1, seed, seed)
    x = entries(batch, 1 + seed % 3, n, depth, dtype=ELEMENTS[seed % len(ELEMENTS)])
    check_replaced(implementation, x, x[:, :, :1] if seed % 2 else x.flip(2))


def test_noise_in_single_precision_is_as_good_as_torch(implementation: Implementation) -> None:
    x = normal(2, 5000)
    args = (*draws(4, 2), "l2", 1.0, 0, 0)
    exact, same = reference.perturb(x.double(), *args), reference.perturb(x, *args)
    assert_close_to_reference(implementation("perturb", x, *args), exact, same)
