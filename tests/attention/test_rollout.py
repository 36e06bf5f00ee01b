"""attention_rollout: conventions, other people's formulas, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import xai_fast as xf


def random_attentions(layers: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    batch, heads, tokens = shape
    return [
        torch.randn(batch, heads, tokens, tokens, dtype=torch.float64).mul(2).softmax(-1).to(dtype) for _ in range(layers)
    ]


def abnar_numpy(attentions: list[torch.Tensor]) -> np.ndarray:
    """Abnar and Zuidema's definition for one sample, written independently: mean of heads, add I, rows to 1, multiply."""
    product = None
    for attention in attentions:
        mean = attention[0].double().numpy().mean(axis=0)
        mixed = mean + np.eye(len(mean))
        mixed = mixed / mixed.sum(axis=-1, keepdims=True)
        product = mixed if product is None else mixed @ product
    assert product is not None
    return product


def test_abnar() -> None:
    attentions = random_attentions(5, 1, 3, 11)
    expected = torch.from_numpy(abnar_numpy(attentions))
    torch.testing.assert_close(xf.attention_rollout(attentions, token=None)[0], expected)
    torch.testing.assert_close(xf.attention_rollout(attentions)[0], expected[0])
    torch.testing.assert_close(xf.attention_rollout(attentions, token=[3, -1])[0], expected[[3, 10]])


def test_lecture_form() -> None:
    """I + sum_h A without normalisation; the lecture writes the product for transposed matrices."""
    attentions = random_attentions(4, 2, 3, 6)
    lecture = torch.eye(6, dtype=torch.float64)
    for attention in attentions:
        lecture = lecture @ (torch.eye(6, dtype=torch.float64) + attention.sum(1)).transpose(-1, -2)
    raw = xf.attention_rollout(attentions, token=None, head_fusion="sum", normalize=False)
    torch.testing.assert_close(raw, lecture.transpose(-1, -2))


def test_later_layers_on_the_left() -> None:
    first, last = random_attentions(2, 1, 1, 5)
    eye = torch.eye(5, dtype=torch.float64)
    expected = ((last[0, 0] + eye) / 2) @ ((first[0, 0] + eye) / 2)
    torch.testing.assert_close(xf.attention_rollout([first, last], token=None)[0], expected)


@pytest.mark.parametrize("fusion", ["mean", "sum", "max", "min"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0])
def test_row_form_equals_full_form(fusion: str, normalize: bool, residual: float) -> None:
    attentions = random_attentions(4, 3, 4, 40)
    options = {"head_fusion": fusion, "normalize": normalize, "residual": residual}
    full = xf.attention_rollout(attentions, token=None, **options)
    torch.testing.assert_close(xf.attention_rollout(attentions, token=7, **options), full[:, 7])
    torch.testing.assert_close(xf.attention_rollout(attentions, token=torch.tensor([0, 39]), **options), full[:, [0, 39]])
    torch.testing.assert_close(xf.attention_rollout(attentions, token=range(40), **options), full)


def test_rows_of_the_rollout_sum_to_one() -> None:
    attentions = random_attentions(6, 2, 4, 30)
    for fusion in ("mean", "max", "min", "sum"):
        total = xf.attention_rollout(attentions, token=None, head_fusion=fusion).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_discard_ratio() -> None:
    """Against the loop: drop the k smallest fused entries of each sample, add I, normalise rows."""
    attentions = random_attentions(3, 2, 3, 12)
    product = torch.eye(12, dtype=torch.float64).expand(2, -1, -1)
    for attention in attentions:
        fused = attention.amax(1).clone()
        for sample in fused:
            flat = sample.view(-1)
            flat[flat.argsort()[: int(0.9 * 144)]] = 0
        mixed = fused + torch.eye(12, dtype=torch.float64)
        product = (mixed / mixed.sum(-1, keepdim=True)) @ product
    options = {"head_fusion": "max", "discard_ratio": 0.9}
    torch.testing.assert_close(xf.attention_rollout(attentions, token=None, **options), product)
    torch.testing.assert_close(xf.attention_rollout(attentions, token=4, **options), product[:, 4])


def test_discard_keeps_ties() -> None:
    uniform = torch.full((1, 2, 4, 4), 0.25)
    assert torch.equal(xf.attention_rollout([uniform], discard_ratio=0.9), xf.attention_rollout([uniform]))


def test_start_layer() -> None:
    attentions = random_attentions(5, 1, 2, 7)
    assert torch.equal(xf.attention_rollout(attentions, start_layer=2), xf.attention_rollout(attentions[2:]))
    assert torch.equal(xf.attention_rollout(attentions, start_layer=-1), xf.attention_rollout(attentions[4:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_kept_and_rows_stay_wide(dtype: torch.dtype) -> None:
    attentions = random_attentions(24, 1, 2, 50, dtype=dtype)
    exact = xf.attention_rollout([a.double() for a in attentions])
    for token in (0, None):
        out = xf.attention_rollout(attentions, token=token)
        assert out.dtype == dtype
        row = out if token == 0 else out[:, 0]
        # One rounding at the end, not one a layer (24 roundings in bfloat16 would be near 1e-2).
        allowed = torch.finfo(dtype).eps * (1 if token == 0 else 6) + 1e-15
        assert float((row.double() - exact).abs().max() / exact.max()) < allowed * 8 if dtype.itemsize > 2 else allowed


def test_batch_equals_single_runs() -> None:
    attentions = random_attentions(4, 8, 3, 33, dtype=torch.float32)
    together = xf.attention_rollout(attentions)
    for b in range(8):
        single = xf.attention_rollout([a[b : b + 1] for a in attentions])
        torch.testing.assert_close(together[b : b + 1], single, rtol=1e-6, atol=1e-8)


def test_stacked_and_numpy() -> None:
    attentions = random_attentions(3, 2, 2, 6)
    expected = xf.attention_rollout(attentions)
    assert torch.equal(xf.attention_rollout(torch.stack(attentions)), expected)
    assert torch.equal(xf.attention_rollout(tuple(attentions)), expected)
    assert torch.equal(xf.attention_rollout(np.stack([a.numpy() for a in attentions])), expected)
    assert torch.equal(xf.attention_rollout([a.numpy() for a in attentions]), expected)


def test_edges() -> None:
    assert torch.equal(xf.attention_rollout([torch.ones(2, 3, 1, 1)] * 2), torch.ones(2, 1))
    assert xf.attention_rollout([torch.rand(0, 3, 5, 5)]).shape == (0, 5)
    assert xf.attention_rollout([torch.rand(0, 3, 5, 5)], token=None, discard_ratio=0.5).shape == (0, 5, 5)
    unnormalised = torch.rand(1, 2, 4, 4) * 3  # rows need not sum to 1
    expected = torch.eye(4)[0] @ (torch.eye(4) + unnormalised[0].mean(0))
    torch.testing.assert_close(xf.attention_rollout([unnormalised], normalize=False)[0], expected)


def test_gradient_reaches_the_attention() -> None:
    attentions = [a.requires_grad_() for a in random_attentions(3, 1, 2, 5)]
    assert torch.autograd.gradcheck(lambda *a: xf.attention_rollout(a, check_nan=False), attentions)
    assert torch.autograd.gradcheck(lambda *a: xf.attention_rollout(a, token=None, check_nan=False), attentions)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 3, 4)])
def test_nan_names_the_layer(layer: int, place: tuple[int, ...]) -> None:
    attentions = random_attentions(3, 2, 3, 6)
    attentions[layer][place] = math.nan
    for options in ({}, {"token": None}, {"head_fusion": "max"}):
        with pytest.raises(ValueError, match=rf"attentions\[{layer}\].*NaN in layer {layer}"):
            xf.attention_rollout(attentions, **options)
    assert xf.attention_rollout(attentions, check_nan=False, token=None).isnan().any()


def test_infinity_is_not_called_nan() -> None:
    result = xf.attention_rollout([torch.full((1, 1, 3, 3), 0.25)] * 2, residual=1e30, normalize=False)
    assert result[0, 0] == math.inf
    assert result[0, 1].isfinite()


GOOD = random_attentions(3, 2, 3, 6)
BAD = [
    ([], {}, ValueError, "attentions: expected at least one layer, got none"),
    ((), {}, ValueError, "at least one layer"),
    (None, {}, TypeError, "attentions: expected a sequence of tensors or one tensor, got NoneType"),
    ([1.0], {}, TypeError, r"attentions\[0\]: expected a torch.Tensor, got float"),
    (GOOD[0], {}, ValueError, r"attentions: expected .*got shape \(2, 3, 6, 6\)"),
    ([GOOD[0][0]], {}, ValueError, r"attentions\[0\]: expected shape \(B, H, N, N\)"),
    ([GOOD[0], GOOD[1][..., :5, :5]], {}, ValueError, r"attentions\[1\]: expected shape \(2, 3, 6, 6\) as layer 0"),
    ([GOOD[0], GOOD[1].float()], {}, TypeError, r"attentions\[1\]: expected dtype torch.float64 as layer 0"),
    ([GOOD[0], GOOD[1].to("meta")], {}, ValueError, r"attentions\[1\]: expected a tensor on cpu, got one on meta"),
    ([a.long() for a in GOOD], {}, TypeError, r"attentions\[0\]: expected a float32.*got torch.int64"),
    (GOOD, {"token": 6}, ValueError, r"token: expected an index in \[-6, 6\), got 6"),
    (GOOD, {"token": [0, -7]}, ValueError, "got -7"),
    (GOOD, {"token": []}, ValueError, "token: expected an int, a non-empty sequence"),
    (GOOD, {"token": 1.5}, TypeError, "token: expected an int"),
    (GOOD, {"token": [0.5]}, TypeError, "token: expected an int"),
    (GOOD, {"token": True}, TypeError, "token: expected an int"),
    (GOOD, {"residual": -0.1}, ValueError, "residual: expected a weight of at least 0"),
    (GOOD, {"head_fusion": "avg"}, ValueError, "head_fusion"),
    (GOOD, {"discard_ratio": 1.0}, ValueError, r"discard_ratio: expected a share in \[0, 1\), got 1.0"),
    (GOOD, {"discard_ratio": -0.5}, ValueError, "discard_ratio"),
    (GOOD, {"start_layer": 3}, ValueError, r"start_layer: expected a layer in \[-3, 3\), got 3"),
    (GOOD, {"start_layer": 0.0}, TypeError, "start_layer: expected an int"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    attentions, options, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        xf.attention_rollout(attentions, **options)
    assert "\n" not in str(caught.value)


# What comes from NumPy, and what cannot be used


def numbered() -> torch.Tensor:
    return torch.rand(3, 2, 2, 5, 5).softmax(-1)


@pytest.mark.parametrize("token", [np.int64(2), np.int32(-3), np.array(2), np.argmax([0, 0, 1])])
def test_tokens_from_numpy(token: Any) -> None:
    attentions = numbered()
    assert torch.equal(xf.attention_rollout(attentions, token=token), xf.attention_rollout(attentions, token=2))


def test_numbers_from_numpy() -> None:
    attentions = numbered()
    wanted = xf.attention_rollout(attentions, token=[0, 3], residual=2.0, start_layer=1)
    for residual, start in ((np.float32(2), np.int64(1)), (np.int64(2), np.array(1)), (np.array(2.0), 1)):
        found = xf.attention_rollout(attentions, token=np.array([0, 3]), residual=residual, start_layer=start)
        assert torch.equal(found, wanted)


def test_arrays_in_any_memory(recwarn: pytest.WarningsRecorder) -> None:
    attentions = numbered()
    array, wanted = attentions.numpy(), xf.attention_rollout(attentions)
    fixed = array.copy()
    fixed.flags.writeable = False
    for same in (array[..., ::-1].copy()[..., ::-1], array.astype(">f4"), fixed, list(fixed)):
        assert torch.equal(xf.attention_rollout(same), wanted)
    packed = np.zeros(array.shape, dtype=[("weight", "f4"), ("flag", "i1")])
    packed["weight"] = array
    assert torch.equal(xf.attention_rollout(packed["weight"]), wanted)
    assert not recwarn.list


def test_meta_tensors_give_the_shape() -> None:
    assert xf.attention_rollout(numbered().to("meta")).shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda a: a.numpy().astype(object), {}, TypeError, "attentions: expected an array of numbers, got dtype object"),
        (lambda a: [x.numpy().astype(str) for x in a], {}, TypeError, r"attentions\[0\]: expected an array of numbers"),
        (lambda a: a.to_sparse(), {}, TypeError, "attentions: expected a dense tensor, got torch.sparse_coo"),
        (lambda a: [x.to_sparse() for x in a], {}, TypeError, r"attentions\[0\]: expected a dense tensor"),
        (lambda a: [x.to_mkldnn() for x in a], {}, TypeError, r"attentions\[0\]: expected a dense tensor"),
        (lambda a: torch.nested.nested_tensor(list(a)), {}, TypeError, "attentions: expected a dense tensor, got a nested"),
        (lambda a: a, {"residual": 10**400}, ValueError, "residual: expected a finite number, got one beyond the range"),
        (lambda a: a, {"residual": 1e308}, ValueError, "residual: expected a number that float32 can hold, got 1e.308"),
        (lambda a: a, {"residual": np.bool_(True)}, TypeError, "residual: expected a number, got bool"),
        (lambda a: a, {"token": np.bool_(True)}, TypeError, "token: "),
        (lambda a: a, {"token": np.array([0.0])}, TypeError, "token: "),
        (lambda a: a, {"start_layer": np.array([0])}, TypeError, "start_layer: expected an int, got ndarray"),
        (
            lambda a: torch.eye(5).expand(3, 2, 2, 5, 5),
            {"residual": 3e38, "normalize": False, "token": None},
            ValueError,
            "all layers are finite; their product leaves the range of torch.float32",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_used_is_named(
    change: Callable[[torch.Tensor], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        xf.attention_rollout(change(numbered()), **options)
    assert "\n" not in str(caught.value)
