"""The compiled kernels of the ihvp family (CPU bodies, emulated CUDA, CUDA) against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.emulator.build import sanitized
from tests.implementations import Implementation, assert_order_of_threads_does_not_matter, available
from tests.tolerances import assert_close_to_reference
from xai_fast.reference import ihvp as reference
from xai_fast.reference.philox import philox, signs

# Sanitizers look at memory, not at numbers, and are ten times slower: every code path, but not every combination.
FULL = not sanitized()
FAMILIES = ["linear", "logistic", "poisson", "smooth_hinge", "softmax"] if FULL else ["smooth_hinge", "softmax"]
F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
# dtype of X and dtype of the sums; float64 X needs float64 sums
ALL_DTYPES = [(F32, F32), (F64, F64), (F16, F32), (BF16, F32), (F32, F64), (F16, F64), (BF16, F64)]
DTYPES = ALL_DTYPES if FULL else [(F32, F32), (BF16, F64)]
ROUTES = ["fused", "products"]


def exactly(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(implementation: Implementation, function: str, *args: Any) -> Any:
    """Calls a kernel, compares each result with the float64 reference and returns what the kernel gave."""
    actual = implementation(function, *args)
    of_reference = getattr(reference, function)
    exact, same = of_reference(*map(exactly, args)), of_reference(*args)
    results = ((actual,), (exact,), (same,)) if isinstance(actual, Tensor) else (actual, exact, same)
    for a, e, s in zip(*results, strict=True):
        assert a.dtype == s.dtype
        assert a.is_contiguous()
        assert_close_to_reference(a, e, s)
    return actual


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype)


def labels(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 2, (n,)).mul(2).sub(1).to(dtype)


def curvature(n: int, classes: int, family: str, dtype: torch.dtype) -> Tensor:
    return normal(n, classes).softmax(-1).to(dtype) if family == "softmax" else torch.rand(n, 1, dtype=F64).to(dtype)


# ---- Hessian-vector product ------------------------------------------------------------------------------------------


def hvp_problem(
    n: int,
    dim: int,
    sides: int,
    classes: int,
    family: str,
    *,
    theta: bool,
    intercept: bool = False,
    weighted: bool = False,
    batch: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
) -> list[Any]:
    """The arguments of glm_hvp."""
    of_x, dtype = dtypes
    classes = classes if family == "softmax" else 1
    params = dim + intercept
    return [
        normal(n, dim, dtype=of_x),
        normal(sides, params, classes, dtype=dtype),
        (normal(params, classes) / math.sqrt(params)).to(dtype) if theta else None,
        None if theta else curvature(n, classes, family, dtype),
        labels(n, dtype) if theta and family == "smooth_hinge" else None,
        torch.rand(n, dtype=F64).to(dtype) if weighted else None,
        torch.randint(0, n, (batch,)) if batch else None,
        family,
        intercept,
        0.5,
        0.3,
        0.01,
    ]


def check_hvp(implementation: Implementation, args: list[Any], routes: list[str] = ROUTES) -> None:
    exact, same = reference.glm_hvp(*map(exactly, args)), reference.glm_hvp(*args)
    for route in routes:
        actual = implementation("glm_hvp_route", *args, route)
        assert actual.dtype == same.dtype
        assert actual.is_contiguous()
        assert_close_to_reference(actual, exact, same)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("theta", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_hvp_families(
    implementation: Implementation, family: str, theta: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Weights or theta, with and without intercept, sample weights and a batch with repeated rows; several slots."""
    for options in [{}, {"intercept": True, "weighted": True}, {"weighted": True, "batch": 41}]:
        check_hvp(implementation, hvp_problem(37, 24, 2, 3, family, theta=theta, dtypes=dtypes, **options))


@pytest.mark.parametrize("classes", [1, 2, 10, 17] if FULL else [2, 17])
@pytest.mark.parametrize("dim", [1, 3, 65, 128] if FULL else [3, 65])
@pytest.mark.parametrize("n", [1, 21, 90] if FULL else [21])
def test_hvp_sizes(implementation: Implementation, classes: int, dim: int, n: int) -> None:
    for sides in (1, 5):
        theta, intercept = (n + sides) % 2 == 0, sides == 1
        check_hvp(implementation, hvp_problem(n, dim, sides, classes, "softmax", theta=theta, intercept=intercept))


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 9, 11, 13, 16, 33] if FULL else [3, 11, 33])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64)])
def test_hvp_columns(implementation: Implementation, columns: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Every compiled number of columns, as right-hand sides and as classes."""
    check_hvp(implementation, hvp_problem(35, 20, columns, 1, "logistic", theta=True, dtypes=dtypes))
    check_hvp(implementation, hvp_problem(35, 20, 1, columns, "softmax", theta=True, intercept=True, dtypes=dtypes))


@pytest.mark.parametrize("dim", [768, 769, 2051] if FULL else [769])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (BF16, F32)])
def test_hvp_of_long_rows(implementation: Implementation, dim: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Sums that stay in registers (one output), and rows that are taken piece by piece."""
    check_hvp(implementation, hvp_problem(19, dim, 1, 10, "softmax", theta=True, intercept=True, dtypes=dtypes))
    check_hvp(implementation, hvp_problem(37, dim, 1, 1, "logistic", theta=False, batch=21, dtypes=dtypes))


@pytest.mark.parametrize("theta", [False, True])
def test_hvp_of_rows_beyond_shared_memory(implementation: Implementation, theta: bool) -> None:
    problem = hvp_problem(18, 60_001, 1, 1, "logistic", theta=theta, intercept=True, weighted=True)
    check_hvp(implementation, problem, ["fused"])
    check_hvp(implementation, hvp_problem(18, 5000, 1, 17, "softmax", theta=theta), ["fused"])


def test_hvp_of_many_classes(implementation: Implementation) -> None:
    check_hvp(implementation, hvp_problem(9, 12, 2, 300, "softmax", theta=True))
    check_hvp(implementation, hvp_problem(40, 12, 60, 3, "softmax", theta=False), [*ROUTES, "auto"])


def test_hvp_strides(implementation: Implementation) -> None:
    """Sliced, strided, transposed and misaligned X; vectors and weights that are not contiguous."""
    problem = hvp_problem(33, 24, 3, 4, "softmax", theta=False, weighted=True)
    wide = normal(80, 100)
    _, vectors, _, weights, _, sample_weight, *options = problem
    vectors = normal(3, 4, 24).transpose(1, 2)
    weights = torch.cat([weights, weights], 1)[:, ::2]
    sample_weight = sample_weight.repeat_interleave(2)[::2]
    half = wide.half()
    for X in (
        wide[5:38, :24],
        wide[:66:2, 3:27],
        wide[:24, :33].T,
        wide[:33, ::4][:, :24],
        half[1:34, 1:25],
        half[:33, 8:32],
    ):
        check_hvp(implementation, [X, vectors, None, weights, None, sample_weight, *options])
    check_hvp(implementation, [wide[:1].expand(33, 100)[:, :24], vectors, None, weights, None, sample_weight, *options])


@pytest.mark.parametrize("family", ["logistic", "smooth_hinge", "softmax"])
@pytest.mark.parametrize("route", ROUTES)
def test_hvp_extreme_values(implementation: Implementation, family: str, route: str) -> None:
    """Saturated probabilities and large X; logits beyond what exp can hold."""
    problem = hvp_problem(30, 10, 2, 4, family, theta=True, intercept=True)
    problem[0][::2] *= 1e3
    problem[2] *= 10
    check_hvp(implementation, problem, [route])
    problem = hvp_problem(30, 10, 2, 4, family, theta=False)
    problem[3] = problem[3].round()
    problem[0] *= 1e10
    check_hvp(implementation, problem, [route])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("theta", [False, True])
def test_hvp_nan_spreads(implementation: Implementation, route: str, theta: bool) -> None:
    """A NaN in a row of X reaches every parameter of its outputs; rows that are not visited reach nothing."""
    problem = hvp_problem(30, 9, 2, 3, "softmax", theta=theta, batch=12)
    problem[0][7, 2] = math.nan
    problem[6][problem[6] == 7] = 8
    assert not implementation("glm_hvp_route", *problem, route).isnan().any()
    problem[6][5] = 7
    assert implementation("glm_hvp_route", *problem, route).isnan().all()


def test_hvp_without_curvature_is_the_ridge(implementation: Implementation) -> None:
    problem = hvp_problem(20, 5, 1, 1, "logistic", theta=False, intercept=True)
    problem[3] = torch.zeros(20, 1)
    for route in ROUTES:
        out = implementation("glm_hvp_route", *problem, route)
        ridge = torch.tensor([0.31] * 5 + [0.01]).view(1, 6, 1)
        torch.testing.assert_close(out, ridge * problem[1])


# ---- LiSSA -----------------------------------------------------------------------------------------------------------


def lissa_problem(
    n: int,
    dim: int,
    sides: int,
    classes: int,
    family: str,
    *,
    intercept: bool = False,
    weighted: bool = False,
    batch: int = 8,
    first_step: int = 0,
    steps: int = 4,
    skip: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
) -> list[Any]:
    """The arguments of lissa."""
    of_x, dtype = dtypes
    classes = classes if family == "softmax" else 1
    shape = (sides, dim + intercept, classes)
    return [
        normal(n, dim, dtype=of_x),
        normal(*shape, dtype=dtype),
        curvature(n, classes, family, dtype),
        torch.rand(n, dtype=F64).to(dtype) if weighted else None,
        normal(*shape, dtype=dtype),
        family,
        intercept,
        0.1,
        0.02,
        float(2 * dim),
        batch,
        first_step,
        steps,
        skip,
        2**40 + 12345,
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_lissa_families(implementation: Implementation, family: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(implementation, "lissa", *lissa_problem(29, 20, 2, 3, family, intercept=True, weighted=True, dtypes=dtypes))
    check(implementation, "lissa", *lissa_problem(29, 33, 1, 2, family, batch=7, skip=2, first_step=9, dtypes=dtypes))


@pytest.mark.parametrize("sides", [1, 3, 20, 140] if FULL else [3, 140])
@pytest.mark.parametrize("classes", [1, 5])
def test_lissa_right_hand_sides(implementation: Implementation, sides: int, classes: int) -> None:
    for batch, dim, intercept in [(1, 3, True), (37, 70, False)]:
        problem = lissa_problem(40, dim, sides, classes, "softmax", batch=batch, intercept=intercept, steps=2)
        check(implementation, "lissa", *problem)


@pytest.mark.parametrize("classes", [10, 16, 17, 64, 70] if FULL else [16, 17, 70])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F64)])
def test_lissa_classes(implementation: Implementation, classes: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for sides in (1, 3):
        problem = lissa_problem(40, 9, sides, classes, "softmax", intercept=True, weighted=True, steps=2, dtypes=dtypes)
        check(implementation, "lissa", *problem)


@pytest.mark.parametrize(
    ("sides", "classes"),
    [(19, 5), (127, 1), (32, 4), (129, 1), (20, 7), (145, 1), (16, 10), (1, 176), (23, 7)]
    if FULL
    else [(129, 1), (20, 7), (23, 7)],
)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (BF16, F32)] if FULL else [(F32, F32), (F16, F64)])
def test_lissa_of_many_columns(
    implementation: Implementation, sides: int, classes: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """From 128 columns on they lie in panels on the CPU. Columns, parameters and rows that fill the last tile or do not."""
    for dim, batch, options in [
        (1, 1, {"intercept": True}),
        (11, 24, {"intercept": True, "weighted": True}),
        (24, 37, {"skip": 1}),
        (205, 13, {"weighted": True, "first_step": 5}),
    ]:
        problem = lissa_problem(40, dim, sides, classes, "softmax", batch=batch, steps=2, dtypes=dtypes, **options)
        check(implementation, "lissa", *problem)


@pytest.mark.parametrize("dim", [1, 768, 1500] if FULL else [768])
def test_lissa_dims(implementation: Implementation, dim: int) -> None:
    check(implementation, "lissa", *lissa_problem(21, dim, 1, 3, "softmax", intercept=True, steps=2))
    check(implementation, "lissa", *lissa_problem(21, dim, 1, 1, "logistic", steps=2, dtypes=(F64, F64)))


@pytest.mark.parametrize("sides", [2, 48])
def test_lissa_goes_on_where_it_ended(implementation: Implementation, sides: int) -> None:
    """Two calls give the iterates of one; the mean is that of the iterates after `skip` steps."""
    problem = lissa_problem(50, 6, sides, 3, "softmax", steps=7, skip=3)
    whole, mean = implementation("lissa", *problem)
    problem[12:14] = [4, 3]
    first, fourth = implementation("lissa", *problem)
    assert torch.equal(first, fourth)
    problem[4], problem[11:14] = first, [4, 3, 0]
    last, of_rest = implementation("lissa", *problem)
    assert torch.equal(last, whole)
    torch.testing.assert_close((fourth + 3 * of_rest) / 4, mean)


def test_lissa_many_steps(implementation: Implementation) -> None:
    """More steps than one CUDA graph holds, and a rest."""
    steps = 70 if FULL else 10
    check(implementation, "lissa", *lissa_problem(30, 3, 1, 1, "logistic", batch=4, steps=steps, skip=steps // 2))


@pytest.mark.parametrize("sides", [2, 48])
def test_lissa_does_not_change_its_inputs_and_reads_strides(implementation: Implementation, sides: int) -> None:
    problem = lissa_problem(30, 8, sides, 3, "softmax", weighted=True)
    problem[0] = normal(60, 20)[::2, 3:11]
    problem[1] = normal(sides, 3, 8).transpose(1, 2)
    problem[4] = normal(3, 8, sides).permute(2, 1, 0)
    before = [x.clone() if isinstance(x, Tensor) else x for x in problem]
    check(implementation, "lissa", *problem)
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True) if isinstance(a, Tensor))


# ---- random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(seed: int, counter: tuple[int, int, int, int], words: tuple[int, ...]) -> None:
    """The known answers that Random123, the authors' library, is tested with."""
    assert tuple(int(w) for w in philox(seed, counter, torch.device("cpu"))) == words


@pytest.mark.parametrize("rows", [1, 2, 1000, 2**31 - 1])
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_sampled_rows(implementation: Implementation, rows: int, count: int) -> None:
    for seed, step in [(0, 0), (2**63 - 1, 2**32 - 1), (12345678901234, 77)]:
        drawn = implementation("sample_rows", torch.empty(0), rows, count, seed, step)
        assert torch.equal(drawn, reference.sample_rows(rows, count, seed, step, torch.device("cpu")))


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores_problem(
    n: int,
    dim: int,
    tests: int,
    classes: int,
    *,
    picked: int = 0,
    intercept: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
) -> list[Any]:
    """The arguments of influence_scores. Whole numbers: products are exact and scores are often equal."""
    of_x, dtype = dtypes
    whole = [torch.randint(-2, 3, shape) for shape in [(n, dim), (n, classes), (tests, dim + intercept, classes)]]
    rows = torch.randint(0, n, (picked,)) if picked else None
    return [whole[0].to(of_x), whole[1].to(dtype), whole[2].to(dtype), rows, intercept]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_scores(implementation: Implementation, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for n, dim, tests, classes in [(1, 1, 1, 1), (45, 7, 35, 3), (70, 20, 2, 17)]:
        for picked, intercept in [(0, True), (33, False)]:
            problem = scores_problem(n, dim, tests, classes, picked=picked, intercept=intercept, dtypes=dtypes)
            check(implementation, "influence_scores", *problem)
            problem[0], problem[1] = normal(n, dim, dtype=dtypes[0]), normal(n, classes, dtype=dtypes[1])
            check(implementation, "influence_scores", *problem)


def check_top(implementation: Implementation, problem: list[Any], k: int, largest: bool) -> None:
    values, found = implementation("influence_top_k", *problem, k, largest)
    expected, rows = reference.influence_top_k(*problem, k, largest)
    assert torch.equal(values, expected)
    assert torch.equal(found, rows)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F64)])
def test_top_k(implementation: Implementation, largest: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Exact scores with many ties: the order must be that of a stable sort."""
    for n, tests, classes, picked in [(1, 1, 1, 0), (60, 9, 3, 0), (60, 2, 1, 90)]:
        problem = scores_problem(n, 4, tests, classes, picked=picked, intercept=True, dtypes=dtypes)
        for k in {1, min(10, n), picked or n}:
            check_top(implementation, problem, k, largest)


@pytest.mark.parametrize("k", [1, 10, 700, 5000] if FULL else [700])
def test_top_k_of_many_rows(implementation: Implementation, k: int) -> None:
    """More rows than candidates fit at a time; rows that get better and better, or worse and worse."""
    n = 5000
    for column in (torch.arange(n), -torch.arange(n), torch.arange(n) // 7 % 50):
        problem = [column.float().view(n, 1), torch.ones(n, 1), torch.tensor([1.0, -1.0]).view(2, 1, 1), None, False]
        check_top(implementation, problem, k, True)


@pytest.mark.skipif(sanitized(), reason="too large")
@pytest.mark.parametrize("largest", [False, True])
def test_top_k_over_several_chunks(implementation: Implementation, largest: bool) -> None:
    """So many classes that the CUDA bindings take 256 rows at a time: lists go on from chunk to chunk."""
    n, classes = 600, 2**17
    X, delta = torch.randint(0, 100, (n, 1)).float(), torch.ones(n, 1).expand(n, classes)
    solution = torch.zeros(1, 1, classes)
    solution[..., ::10_000] = 1
    values, found = implementation("influence_top_k", X, delta, solution, None, False, 300, largest)
    rows = torch.argsort(X[:, 0], descending=largest, stable=True)[:300]
    assert torch.equal(found, rows[None])
    assert torch.equal(values, X[rows].T * solution.sum())


def test_scores_that_are_no_numbers(implementation: Implementation) -> None:
    """NaN scores enter no list; infinite ones are in order like any other."""
    X = torch.tensor([1.0, math.nan, -math.inf, 5.0, math.inf, math.nan, 2.0]).view(7, 1)
    args = (X, torch.ones(7, 1), torch.ones(1, 1, 1), None, False)
    values, found = implementation("influence_top_k", *args, 7, True)
    assert found.tolist() == [[4, 3, 6, 0, 2, -1, -1]]
    assert values[0, :5].tolist() == [math.inf, 5, 2, 1, -math.inf]
    assert values[0, 5:].isnan().all()
    assert implementation("influence_top_k", *args, 2, False)[1].tolist() == [[2, 0]]
    assert reference.influence_top_k(*args, 7, True)[1].equal(found)
    assert reference.influence_top_k(*args, 2, False)[1].tolist() == [[2, 0]]
    assert torch.equal(implementation("influence_scores", *args).isnan(), X.T.isnan())
    infinite = torch.tensor([[1.0, math.inf], [2.0, 3.0], [-math.inf, 0.5]]).view(3, 2, 1)
    args = (torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.ones(2, 1), infinite, None, False)
    expected = [[math.inf, -math.inf], [8.0, 3.0], [-math.inf, -math.inf]]
    assert implementation("influence_scores", *args).tolist() == reference.influence_scores(*args).tolist() == expected


# ---- random projection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 33, 128, 200, 301] if FULL else [33, 200])
def test_projected_unit_vectors_are_the_signs(implementation: Implementation, outputs: int) -> None:
    for offset in (0, 2**32 - 5):
        out = implementation("random_projection", torch.eye(40), outputs, 2**50 + 3, offset)
        assert torch.equal(out.sign(), signs(40, outputs, 2**50 + 3, offset, torch.device("cpu")).float())
        torch.testing.assert_close(out.abs(), torch.full_like(out, 1 / math.sqrt(outputs)))


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_projection(implementation: Implementation, dtype: torch.dtype) -> None:
    for batch, inputs, outputs in [(1, 1, 1), (1, 700, 130), (3, 35, 5), (11, 300, 257), (8, 4100, 3)]:
        check(implementation, "random_projection", normal(batch, inputs, dtype=dtype), outputs, 7, 11)


def test_projection_of_pieces_adds_up(implementation: Implementation) -> None:
    x = normal(4, 500)
    whole = implementation("random_projection", x, 60, 5, 100)
    pieces = implementation("random_projection", x[:, :211], 60, 5, 100) + implementation(
        "random_projection", x[:, 211:], 60, 5, 311
    )
    torch.testing.assert_close(whole, pieces)
    turned = x.T.contiguous().T
    torch.testing.assert_close(implementation("random_projection", turned, 60, 5, 100), whole)
    assert implementation("random_projection", torch.full((1, 3), math.nan), 4, 0, 0).isnan().all()


# ---- random problems -------------------------------------------------------------------------------------------------

SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw: st.DrawFn, most: int = 100) -> dict[str, Any]:
    return {
        "n": draw(st.integers(1, most)),
        "dim": draw(st.sampled_from([1, 2, 5, 8, 31, 40, 100])),
        "sides": draw(st.sampled_from([1, 2, 4, 7, 40])),
        "classes": draw(st.sampled_from([1, 2, 3, 6, 11, 18])),
        "family": draw(st.sampled_from(FAMILIES)),
        "dtypes": draw(st.sampled_from(ALL_DTYPES)),
        "intercept": draw(st.booleans()),
        "weighted": draw(st.booleans()),
    }


def check_problem(implementation: Implementation, p: dict[str, Any]) -> None:
    torch.manual_seed(p["n"])
    check_hvp(implementation, hvp_problem(**p, theta=p["n"] % 2 == 0, batch=p["n"] % 3 * 9))
    check(implementation, "lissa", *lissa_problem(**p, batch=1 + p["n"] % 40, steps=3, skip=p["n"] % 3))


@settings(SETTINGS, max_examples=20 if sanitized() else 100)
@given(p=problems())
def test_random_problems_cpu(p: dict[str, Any]) -> None:
    check_problem(available()[0], p)


@settings(SETTINGS, max_examples=5 if sanitized() else 20)
@given(p=problems(most=50))
def test_random_problems_cuda(p: dict[str, Any]) -> None:
    for implementation in available()[1:]:
        check_problem(implementation, p)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_emulated_kernels_do_not_depend_on_the_order_of_threads(seed: int) -> None:
    scores = scores_problem(1500, 1, 1, 1)
    calls = [
        ("glm_hvp_route", *hvp_problem(90, 70, 2, 3, "softmax", theta=True, intercept=True), "fused"),
        ("glm_hvp_route", *hvp_problem(40, 1100, 1, 17, "softmax", theta=True), "fused"),
        ("glm_hvp_route", *hvp_problem(40, 30, 1, 17, "softmax", theta=True), "products"),
        ("lissa", *lissa_problem(30, 2200, 1, 3, "softmax", intercept=True, steps=2)),
        ("lissa", *lissa_problem(30, 70, 3, 20, "softmax", batch=40, steps=2)),
        ("lissa", *lissa_problem(30, 20, 1, 70, "softmax", batch=3, steps=2)),
        ("influence_scores", *scores_problem(40, 3, 35, 2)),
        ("influence_top_k", *scores, 400, True),
        ("random_projection", normal(9, 600), 140, 3, 0),
    ]
    assert_order_of_threads_does_not_matter(seed, calls)
