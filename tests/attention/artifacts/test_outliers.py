"""Outlying norms: formulas by hand, planted outliers, and the cases without spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from xai_fast.attention.artifacts import (
    Outliers,
    TokenNorms,
    clean_rollout,
    find_outliers,
    outlier_layers,
    outlier_positions,
)
from xai_fast.attention.capture import capture_attention
from xai_fast.attention.rollout import attention_rollout


def _norms() -> torch.Tensor:
    """(3, 2, 50), growing from layer to layer, with one outlier in the last two."""
    norms = (10 + torch.rand(3, 2, 50)) * torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    norms[1:, 1, 17] *= 5
    return norms


@pytest.mark.parametrize("method", ["mad", "absolute", "quantile"])
def test_planted_outlier(method: Any) -> None:
    options = {"absolute": {"threshold": 90.0}, "quantile": {"quantile": 0.99, "scope": "layer"}, "mad": {}}[method]
    found = find_outliers(_norms(), method, **options)
    where = found.mask[1:].nonzero().tolist()
    if method == "absolute":
        assert found.mask.nonzero().tolist() == [[1, 1, 17], [2, 1, 17]]
        assert found.threshold.shape == ()
    elif method == "mad":
        assert found.mask.nonzero().tolist() == [[1, 1, 17], [2, 1, 17]]
        assert found.share == 2 / 300
    else:
        assert [0, 1, 17] in where
        assert [1, 1, 17] in where


@pytest.mark.parametrize(("scope", "axes"), [("sample", (2,)), ("layer", (1, 2)), ("all", (0, 1, 2))])
@pytest.mark.parametrize("k", [0.0, 3.5, 5.0])
def test_mad_by_hand(scope: Any, axes: tuple[int, ...], k: float) -> None:
    norms = _norms().double()
    x = norms.numpy()
    median = np.median(x, axis=axes, keepdims=True)
    limit = median + k * 1.4826 * np.median(np.abs(x - median), axis=axes, keepdims=True)
    found = find_outliers(norms, k=k, scope=scope)
    np.testing.assert_allclose(found.threshold.numpy(), limit.reshape(found.threshold.shape), rtol=1e-12)
    np.testing.assert_array_equal(found.mask.numpy(), x > limit)
    assert found.threshold.shape == {"sample": (3, 2), "layer": (3,), "all": ()}[scope]


@pytest.mark.parametrize(("scope", "axes"), [("sample", (2,)), ("layer", (1, 2)), ("all", (0, 1, 2))])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.93, 1.0])
def test_quantile_by_hand(scope: Any, axes: tuple[int, ...], quantile: float) -> None:
    norms = _norms().double()
    limit = np.quantile(norms.numpy(), quantile, axis=axes, keepdims=True)
    found = find_outliers(norms, "quantile", quantile=quantile, scope=scope)
    np.testing.assert_allclose(found.threshold.numpy(), limit.reshape(found.threshold.shape), rtol=1e-12)
    np.testing.assert_array_equal(found.mask.numpy(), norms.numpy() > limit)


def test_quantile_of_long_rows() -> None:
    """Long enough for a selection to leave most of a row unsorted."""
    norms = torch.rand(3, 20_000, dtype=torch.float64)
    for quantile in (0.1234, 0.5, 0.98):
        found = find_outliers(norms, "quantile", quantile=quantile).threshold
        torch.testing.assert_close(found, torch.from_numpy(np.quantile(norms.numpy(), quantile, axis=1)), rtol=1e-12, atol=0)


def test_samples_are_judged_alone() -> None:
    norms = _norms()
    together = find_outliers(norms)
    for sample in range(2):
        alone = find_outliers(norms[:, sample : sample + 1])
        assert torch.equal(alone.mask[:, 0], together.mask[:, sample])


def test_shapes_and_types() -> None:
    norms = _norms()
    for x in (norms[2], norms[2, 1], norms[2].numpy(), norms[2].to(torch.bfloat16), norms[2].requires_grad_()):
        found = find_outliers(x)
        assert found.mask.shape == x.shape
        assert found.mask[..., 17].any()
        assert found.mask.sum() == 1
    assert torch.equal(find_outliers(TokenNorms(norms, ("a", "b", "c"))).mask, find_outliers(norms).mask)


def test_constant_norms_have_no_outliers() -> None:
    for value in (0.0, 1.0, 1e30):
        assert not find_outliers(torch.full((2, 9), value)).mask.any()
        assert not find_outliers(torch.full((2, 9), value), "quantile").mask.any()
    # Rounding is no outlier, another value is one.
    norms = torch.ones(1, 9)
    norms[0, 3] += torch.finfo(torch.float32).eps
    assert not find_outliers(norms).mask.any()
    norms[0, 3] = 1.1
    assert find_outliers(norms).mask.nonzero().tolist() == [[0, 3]]


def test_nan_and_infinity() -> None:
    norms = torch.rand(2, 9)
    norms[1, 4] = torch.inf
    assert find_outliers(norms).mask.nonzero().tolist() == [[1, 4]]
    norms[0, 2] = torch.nan
    with pytest.raises(ValueError, match="expected no NaN, got 1"):
        find_outliers(norms)
    ignored = norms.isnan()
    found = find_outliers(norms, ignore_tokens=ignored)
    assert not found.mask[0, 2]
    assert found.mask[1, 4]
    assert found.share == 1 / 17


@pytest.mark.parametrize("ignored", [0, -9, (0,), range(1), torch.tensor([0]), torch.arange(9) == 0])
def test_ignored_tokens(ignored: Any) -> None:
    norms = torch.linspace(1.0, 1.1, 9).expand(2, 3, 9).clone()
    norms[..., 0] = 50
    norms[1, 2, 5] = 20
    assert find_outliers(norms, ignore_tokens=ignored).mask.nonzero().tolist() == [[1, 2, 5]]
    limit = find_outliers(norms, ignore_tokens=ignored).threshold
    torch.testing.assert_close(limit, find_outliers(norms[..., 1:]).threshold)
    assert find_outliers(norms).mask[..., 0].all()


def test_all_tokens_ignored() -> None:
    found = find_outliers(torch.rand(2, 3), ignore_tokens=range(3))
    assert not found.mask.any()
    assert found.threshold.isnan().all()
    assert found.share == 0


def test_errors() -> None:
    norms = torch.rand(2, 5)
    for arguments, message in (
        ({"method": "z"}, "method: expected one of mad, absolute, quantile"),
        ({"scope": "batch"}, "scope: expected one of"),
        ({"method": "absolute"}, "threshold: expected a number"),
        ({"threshold": 3.0}, "threshold: expected None"),
        ({"method": "quantile", "quantile": 2}, r"quantile: expected a share in \[0, 1\]"),
        ({"k": -1}, "k: expected a number of at least 0"),
        ({"ignore_tokens": 5}, r"indices in \[-5, 5\), got 5"),
        ({"ignore_tokens": torch.zeros(4, dtype=torch.bool)}, r"broadcasts to \(2, 5\), got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            find_outliers(norms, **arguments)
    with pytest.raises(TypeError, match=r"norms: expected a torch\.Tensor"):
        find_outliers([1.0, 2.0])
    with pytest.raises(ValueError, match="norms: expected shape"):
        find_outliers(torch.rand(1, 1, 1, 1))


def test_layers() -> None:
    mask = torch.zeros(6, 2, 10, dtype=torch.bool)
    for layer, count in enumerate([1, 0, 3, 4, 6, 2]):
        mask[layer, 0, :count] = True
    found = outlier_layers(mask)
    assert found.share.tolist() == [0.05, 0.0, 0.15, 0.2, 0.3, 0.1]
    assert (found.peak, found.onset) == (4, 2)
    assert outlier_layers(mask, fraction=1).onset == 4
    assert outlier_layers(mask, fraction=0.01).onset == 2
    assert outlier_layers(Outliers(mask, torch.tensor(1.0), 0.1)).onset == 2
    assert outlier_layers(mask[1:2]).onset is None
    with pytest.raises(ValueError, match=r"\(L, B, T\)"):
        outlier_layers(mask[0])
    with pytest.raises(TypeError, match=r"boolean tensor, got torch\.float32"):
        outlier_layers(mask.float())
    with pytest.raises(ValueError, match="fraction"):
        outlier_layers(mask, fraction=2)


def test_positions() -> None:
    mask = torch.rand(3, 4, 5) > 0.5
    assert torch.equal(outlier_positions(mask), mask.sum(1))
    assert torch.equal(outlier_positions(mask[0]), mask[0].sum(0))
    with pytest.raises(ValueError, match="mask of shape"):
        outlier_positions(mask[0, 0])


# Rollout


def _attentions(sink: int | None) -> list[torch.Tensor]:
    """3 layers, 2 samples, 2 heads, [CLS] and 16 patches; the first layer sends half of its attention to a sink."""
    layers = [torch.rand(2, 2, 17, 17).softmax(-1) for _ in range(3)]
    if sink is not None:
        layers[0] = 0.5 * layers[0]
        layers[0][..., sink] += 0.5
    return layers


@pytest.mark.parametrize("token", [0, (0, 3), None])
@pytest.mark.parametrize("head_fusion", ["mean", "max"])
def test_dropped_columns_by_hand(token: Any, head_fusion: str) -> None:
    attentions, mask = _attentions(6), torch.zeros(2, 17, dtype=torch.bool)
    mask[:, 6] = True
    mask[1, 9] = True
    product = torch.eye(17).double()
    for layer in attentions:
        fused = layer.double().mean(1) if head_fusion == "mean" else layer.double().amax(1)
        matrix = fused * ~mask[:, None] + 0.7 * torch.eye(17)
        product = (matrix / matrix.sum(-1, keepdim=True)) @ product
    wanted = product if token is None else product[:, token if isinstance(token, int) else list(token)]
    found = clean_rollout(attentions, mask, token=token, head_fusion=head_fusion, residual=0.7)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    if token == 0:
        assert float(found[0, 6]) == float(found[1, 9]) == 0
        torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_without_outliers_it_is_the_rollout() -> None:
    attentions, nothing = _attentions(6), torch.zeros(17, dtype=torch.bool)
    torch.testing.assert_close(clean_rollout(attentions, nothing), attention_rollout(attentions))
    painted = clean_rollout(attentions, nothing, how="neighbours", grid=(4, 4))
    assert torch.equal(painted, attention_rollout(attentions))


def test_masks_of_layers() -> None:
    attentions, mask = _attentions(6), torch.zeros(3, 2, 17, dtype=torch.bool)
    mask[0, :, 6] = True
    attentions[0][..., 6] = 0
    torch.testing.assert_close(clean_rollout(_same(attentions), mask), attention_rollout(attentions))


def _same(attentions: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(attentions)


def test_painting_by_hand() -> None:
    attentions = _attentions(6)
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[0, 1 + 5] = mask[0, 1 + 6] = mask[1, 1] = True
    plain = attention_rollout(attentions)
    found = clean_rollout(attentions, mask, how="neighbours", grid=(4, 4))
    maps = plain[:, 1:].view(2, 4, 4)
    around = [maps[0, r, c] for r in range(3) for c in range(3) if (r, c) not in ((1, 1), (1, 2))]
    torch.testing.assert_close(found[0, 6], torch.stack(around).mean())
    torch.testing.assert_close(found[1, 1], (maps[1, 0, 1] + maps[1, 1, 0] + maps[1, 1, 1]) / 3)
    changed = (found != plain).nonzero().tolist()
    assert changed == [[0, 6], [0, 7], [1, 1]]
    everything = torch.arange(17) > 0
    everything[16] = False
    alone = clean_rollout(attentions, everything, how="neighbours", grid=(4, 4))
    torch.testing.assert_close(alone[:, 1], plain[:, 16])


def test_a_record_rolls_as_its_matrices() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad(), capture_attention(model) as record:
        model(torch.randn(2, 5, 16))
    mask = torch.arange(5) == 3
    for options in ({}, {"how": "neighbours", "grid": (2, 2)}):
        matrices = clean_rollout(record.attentions(), mask, **options)
        torch.testing.assert_close(clean_rollout(record, mask, **options), matrices)


def test_rollout_errors() -> None:
    attentions, mask = _attentions(None), torch.arange(17) == 0
    for arguments, message in (
        ({"how": "cut"}, "how: expected one of"),
        ({"how": "neighbours", "grid": (5, 5)}, "grid: expected at most 17 patches"),
        ({"how": "neighbours", "grid": (4, 4)}, "one among the first 1 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            clean_rollout(attentions, mask, **arguments)
    with pytest.raises(TypeError, match="grid: expected"):
        clean_rollout(attentions, mask, how="neighbours")
    with pytest.raises(ValueError, match="outliers: expected a mask of shape"):
        clean_rollout(attentions, mask[:5])


@pytest.mark.parametrize("how", ["drop", "neighbours"])
def test_clean_rollout_names_attentions_that_are_none(how: str) -> None:
    with pytest.raises(TypeError, match="attentions: expected a sequence of tensors or one tensor, got NoneType"):
        clean_rollout(None, torch.zeros(1, 4, dtype=torch.bool), how=how, grid=(2, 2))
