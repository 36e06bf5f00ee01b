"""Linear probes against scikit-learn, their splits, and tokens of which it is known what they know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xai_fast.attention.artifacts import Outliers, TokenBatch, probe_tokens
from xai_fast.attention.artifacts._ridge import Moments, choose_l2, fit_ridge

HELD_OUT = tuple(range(0, 30, 4))


def _tokens(images: int = 30, patches: int = 6, width: int = 10) -> Tensor:
    """Correlated features of very different sizes, far from 0."""
    mixing = torch.randn(width, width) * torch.logspace(-1, 1, width)
    return torch.randn(images, patches, width) @ mixing + 5


def _alpha(x: np.ndarray, l2: float) -> float:
    return l2 * float(((x - x.mean(0)) ** 2).sum()) / x.shape[1]


def _parts(tokens: Tensor, held_out: tuple[int, ...] = HELD_OUT) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    train = [i for i in range(len(tokens)) if i not in held_out]
    x = tokens.double().numpy()
    return x[train].reshape(-1, x.shape[-1]), x[list(held_out)].reshape(-1, x.shape[-1]), train, list(held_out)


@pytest.mark.parametrize("l2", [1e-3, 0.1, 2.0])
def test_values_against_scikit_learn(l2: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    tokens = _tokens()
    pixels = tokens @ torch.randn(10, 7) + 3 * torch.randn(30, 6, 7)
    x, x_test, train, test = _parts(tokens)
    y, y_test = (pixels.double().numpy()[part].reshape(-1, 7) for part in (train, test))
    wanted = linear.Ridge(alpha=_alpha(x, l2)).fit(x, y)
    probe = probe_tokens(tokens, pixels, kind="pixels", l2=l2, holdout=HELD_OUT)["all"]
    np.testing.assert_allclose(probe.weight.numpy().T, wanted.coef_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(probe.bias.numpy(), wanted.intercept_, rtol=1e-8, atol=1e-10)
    predicted = wanted.predict(x_test)
    np.testing.assert_allclose(probe.predict(torch.from_numpy(x_test)).numpy(), predicted, rtol=1e-7, atol=1e-9)
    assert probe.error == pytest.approx(np.linalg.norm(predicted - y_test, axis=1).mean(), rel=1e-9)
    assert probe.r2 == pytest.approx(metrics.r2_score(y_test.ravel(), predicted.ravel()), abs=0.05)
    centred = ((y_test - y_test.mean(0)) ** 2).sum()
    assert probe.r2 == pytest.approx(1 - ((predicted - y_test) ** 2).sum() / centred, rel=1e-9)
    assert probe.baseline == pytest.approx(np.linalg.norm(y_test - y.mean(0), axis=1).mean(), rel=1e-9)
    assert (probe.n_train, probe.n_test, probe.l2) == (len(x), len(x_test), l2)
    assert probe.accuracy is None
    assert probe.distance is None


@pytest.mark.parametrize("l2", [1e-3, 0.5])
@pytest.mark.parametrize("classes", [2, 5])
def test_labels_against_scikit_learn(l2: float, classes: int) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    tokens = _tokens()
    labels = torch.randint(0, classes, (30,))
    tokens = tokens + 4 * torch.randn(classes, 10)[labels][:, None]
    x, x_test, train, test = _parts(tokens)
    y, y_test = (labels.numpy()[part].repeat(6) for part in (train, test))
    wanted = linear.RidgeClassifier(alpha=_alpha(x, l2)).fit(x, y)
    probe = probe_tokens(tokens, labels, kind="class", l2=l2, holdout=HELD_OUT)["all"]
    predicted = probe.predict(torch.from_numpy(x_test)).argmax(1).numpy()
    np.testing.assert_array_equal(predicted, wanted.predict(x_test))
    assert probe.accuracy == pytest.approx(wanted.score(x_test, y_test))
    assert probe.baseline == pytest.approx((y_test == np.bincount(y).argmax()).mean())
    if classes > 2:
        # Its targets are -1 and 1, ours 0 and 1.
        np.testing.assert_allclose(2 * probe.weight.numpy().T, wanted.coef_, rtol=1e-7, atol=1e-9)


def test_position_and_its_distance_by_hand() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    tokens = _tokens() + 2 * torch.randn(6, 10)
    x, x_test, *_ = _parts(tokens)
    wanted = linear.RidgeClassifier(alpha=_alpha(x, 0.1)).fit(x, np.tile(np.arange(6), len(x) // 6)).predict(x_test)
    true = np.tile(np.arange(6), len(x_test) // 6)
    probe = probe_tokens(tokens, kind="position", l2=0.1, holdout=HELD_OUT, grid=(2, 3))["all"]
    assert probe.accuracy == pytest.approx((wanted == true).mean())
    assert probe.distance == pytest.approx(np.hypot(wanted // 3 - true // 3, wanted % 3 - true % 3).mean())
    assert 0 < probe.accuracy < 1
    assert probe_tokens(tokens, l2=0.1, holdout=HELD_OUT)["all"].distance is None


def test_coordinates() -> None:
    tokens = _tokens()
    rows, columns = torch.arange(6) // 3, torch.arange(6) % 3
    tokens[..., 0] += 300 * rows
    tokens[..., 1] += 300 * columns
    targets = torch.stack([rows, columns], 1).float()
    given = probe_tokens(tokens, targets, kind="coordinates", l2=1e-6)["all"]
    probe = probe_tokens(tokens, kind="coordinates", l2=1e-6, grid=(2, 3))["all"]
    assert probe.r2 is not None
    assert probe.distance == probe.error == given.error
    assert probe.distance < 0.2
    assert probe.r2 > 0.95


# Penalty


def test_sums_give_the_error_of_the_tokens() -> None:
    x, y = torch.randn(50, 4).double() + 3, torch.randn(50, 3).double()
    moments = Moments(4, x.device)
    moments.add(x[:20], y[:20])
    moments.add(x[20:], y[20:])
    weight, bias = torch.randn(4, 3).double(), torch.randn(3).double()
    assert moments.squared_error(weight, bias) == pytest.approx(float((y - x @ weight - bias).square().sum()), rel=1e-10)
    labels = torch.randint(0, 3, (50,))
    counted, written = Moments(4, x.device), Moments(4, x.device)
    counted.add(x, labels)
    written.add(x, torch.nn.functional.one_hot(labels, 3).double())
    for name in ("xy", "y", "square", "count"):
        torch.testing.assert_close(getattr(counted, name), getattr(written, name))


def test_the_best_penalty_on_validation_tokens_is_taken() -> None:
    x = torch.randn(60, 20).double()
    y = x[:, :1] + 2 * torch.randn(60, 1).double()
    train, validation = Moments(20, x.device), Moments(20, x.device)
    train.add(x[:30], y[:30])
    validation.add(x[30:], y[30:])
    penalties = [1e-6, 1e-2, 0.3, 3.0, 1e4]
    errors = [float((y[30:] - x[30:] @ w - b).square().sum()) for w, b in fit_ridge(train, penalties)]
    best = int(np.argmin(errors))
    assert 0 < best < 4
    assert choose_l2(train, validation, penalties) == penalties[best]


def test_after_the_choice_all_training_images_are_used() -> None:
    tokens = _tokens(40)
    pixels = tokens[..., :2] + torch.randn(40, 6, 2)
    probe = probe_tokens(tokens, pixels, kind="pixels", l2=(1e-4, 1e-1))["all"]
    assert probe.l2 in (1e-4, 1e-1)
    assert (probe.n_train, probe.n_test) == (30 * 6, 10 * 6)
    same = probe_tokens(tokens, pixels, kind="pixels", l2=probe.l2)["all"]
    assert torch.allclose(same.weight, probe.weight, rtol=1e-9)


def test_without_penalty_tokens_that_do_not_vary_are_no_trouble() -> None:
    tokens = torch.cat([_tokens(), torch.ones(30, 6, 3)], 2)
    pixels = tokens[..., :2].clone()
    probe = probe_tokens(tokens, pixels, kind="pixels", l2=0)["all"]
    assert probe.error is not None
    assert probe.error < 1e-4
    assert float(probe.weight[10:].abs().max()) < 1e-9


# Groups and splits


def _knowing() -> tuple[Tensor, Tensor]:
    """Patches know their place, but those at an outlier know the class of the image instead."""
    labels = torch.arange(60) % 3
    tokens = 0.1 * torch.randn(60, 8, 16)
    tokens[..., :8] += torch.eye(8)
    outliers = torch.rand(60, 8) < 0.3
    tokens[outliers] = (10 * torch.nn.functional.one_hot(labels, 16).float() + 0.1 * torch.randn(60, 16))[:, None].expand(
        -1, 8, -1
    )[outliers]
    return tokens, outliers


def test_groups_know_different_things() -> None:
    tokens, outliers = _knowing()
    labels = torch.arange(60) % 3
    for groups in (outliers, outliers.long(), Outliers(outliers, torch.tensor(1.0), 0.3), outliers.numpy()):
        position = probe_tokens(tokens, groups=groups, grid=(2, 4))
        assert len(position) == 2
        normal, outlier = position.values()
        assert normal.accuracy == 1.0
        assert normal.distance == 0.0
        assert outlier.accuracy < 0.4
        assert outlier.distance > 0.7
    assert list(probe_tokens(tokens, groups=outliers)) == ["normal", "outlier"]
    assert list(probe_tokens(tokens, groups=outliers.long())) == ["0", "1"]
    image = probe_tokens(tokens, labels, kind="class", groups=outliers)
    assert image["outlier"].accuracy == 1.0
    assert image["normal"].accuracy < 0.6
    named = probe_tokens(tokens, labels, kind="class", groups=outliers.long() - 1, group_names=["high"])
    assert list(named) == ["high"]
    assert torch.equal(named["high"].weight, image["outlier"].weight)


def test_one_probe_for_all_groups() -> None:
    tokens, outliers = _knowing()
    probes = probe_tokens(tokens, groups=outliers, fit="all", l2=0.01)
    alone = probe_tokens(tokens, l2=0.01)["all"]
    assert torch.allclose(probes["normal"].weight, alone.weight)
    assert torch.equal(probes["normal"].weight, probes["outlier"].weight)
    assert probes["normal"].n_train == alone.n_train
    assert probes["normal"].n_test + probes["outlier"].n_test == alone.n_test
    right = sum(p.accuracy * p.n_test for p in probes.values())
    assert alone.accuracy == pytest.approx(right / alone.n_test)


def test_images_are_not_torn_apart() -> None:
    """Tokens that only know their image: with images on one side they cannot be told, with tokens on both they can."""
    codes = torch.randn(40, 64)
    tokens = codes[:, None] + 0.01 * torch.randn(40, 5, 64)
    labels = torch.randint(0, 2, (40,))
    by_image = probe_tokens(tokens, labels, kind="class", l2=1e-4)["all"]
    numbers = torch.arange(40).repeat_interleave(5)
    flat = tokens.flatten(0, 1), labels.repeat_interleave(5)
    same = probe_tokens(*flat, kind="class", images=numbers, l2=1e-4)["all"]
    torn = probe_tokens(*flat, kind="class", l2=1e-4)["all"]
    assert by_image.accuracy == same.accuracy
    assert torch.allclose(by_image.weight, same.weight)
    assert torn.accuracy == 1.0
    assert by_image.accuracy < 0.85


@pytest.mark.parametrize("size", [1, 7, 20])
def test_streams_give_the_same_probe(size: int) -> None:
    tokens, outliers = _knowing()
    places = torch.arange(8)
    batches = [
        TokenBatch(tokens[i : i + size], places, outliers[i : i + size], torch.arange(60)[i : i + size])
        for i in range(0, 60, size)
    ]
    held_out = range(0, 60, 5)
    wanted = probe_tokens(tokens, groups=outliers, holdout=held_out, l2=0.01)
    plain = [(b.tokens, None, b.groups) for b in batches]
    for stream in (batches, lambda: iter(batches), plain):
        found = probe_tokens(stream, holdout=held_out, l2=0.01)
        for name in wanted:
            torch.testing.assert_close(found[name].weight, wanted[name].weight, rtol=1e-9, atol=1e-12)
            assert found[name].accuracy == wanted[name].accuracy
            assert found[name].n_test == wanted[name].n_test


def test_labels_that_come_late_in_a_stream() -> None:
    tokens = torch.randn(60, 8)
    labels = torch.arange(60) // 20
    tokens[:, :3] += 20 * torch.nn.functional.one_hot(labels, 3)
    batches = [(tokens[i : i + 10], labels[i : i + 10]) for i in range(0, 60, 10)]
    assert probe_tokens(batches, kind="class")["all"].accuracy == 1.0


def test_shares_of_a_stream_are_exact_in_twenties() -> None:
    tokens = torch.randn(200, 3, 4)
    found = probe_tokens([(x,) for x in tokens.split(25)], l2=1.0, holdout=0.25)["all"]
    assert (found.n_train, found.n_test) == (450, 150)
    again = probe_tokens([(x,) for x in tokens.split(40)], l2=1.0, holdout=0.25)["all"]
    torch.testing.assert_close(again.weight, found.weight)
    other = probe_tokens([(x,) for x in tokens.split(25)], l2=1.0, holdout=0.25, seed=1)["all"]
    assert not torch.allclose(other.weight, found.weight)


@pytest.mark.parametrize("convert", [lambda x: x.numpy(), lambda x: x.to(torch.bfloat16), lambda x: x.requires_grad_()])
def test_other_types(convert: Any) -> None:
    tokens, outliers = _knowing()
    assert probe_tokens(convert(tokens), groups=outliers)["normal"].accuracy == 1.0


def test_errors() -> None:
    tokens = torch.randn(12, 3, 4)
    flat = tokens.flatten(0, 1)
    broken = tokens.clone()
    broken[0, 0, 0] = torch.nan
    rare = torch.zeros(12, 3, dtype=torch.bool)
    rare[0, 0] = True
    for arguments, keywords, message in (
        ((tokens,), {"kind": "colour"}, "kind: expected one of"),
        ((tokens,), {"fit": "some"}, "fit: expected"),
        ((tokens,), {"l2": -1.0}, "l2: expected a penalty of at least 0"),
        ((tokens,), {"l2": ()}, "l2: expected at least one"),
        ((tokens,), {"holdout": 1.0}, r"holdout: expected a share in \(0, 1\)"),
        ((tokens,), {"holdout": ()}, "holdout: expected at least one"),
        ((tokens[:2],), {}, "2 images are too few to train, validate and test on"),
        ((tokens,), {"kind": "class"}, "targets: expected targets for kind 'class'"),
        ((flat,), {}, "targets: expected targets for kind 'position'"),
        ((tokens,), {"kind": "coordinates"}, "grid: expected"),
        ((tokens,), {"grid": (1, 2)}, "positions in a grid of 1 x 2, got 2"),
        ((tokens, torch.randn(12, 3, 3)), {"kind": "coordinates"}, r"\(row, column\) in the last dimension"),
        ((tokens, torch.arange(4)), {}, r"targets: expected a shape that broadcasts to \(12, 3\), got \(4,\)"),
        ((tokens, -torch.arange(3)), {}, "labels of at least 0"),
        ((tokens,), {"groups": torch.zeros(5).bool()}, "groups: expected a shape that broadcasts"),
        ((tokens,), {"groups": rare}, "expected tokens of group 'outlier'"),
        ((tokens,), {"groups": rare.long() - 5}, "at least one token in a group"),
        ((tokens,), {"groups": rare.long(), "group_names": ["a"]}, "group_names: expected a name for each group up to 1"),
        ((broken,), {}, "tokens: expected finite"),
        ((tokens, torch.full((12, 3, 2), torch.inf)), {"kind": "pixels"}, "targets: expected finite"),
        ((tokens[0, 0],), {}, r"tokens: expected shape \(n, D\)"),
        ((tokens,), {"images": torch.arange(3)}, "images: expected whole numbers"),
        (([(tokens,), (tokens[..., :2],)],), {}, "expected 4 features as in the first batch, got 2"),
        (([(tokens,), (tokens, None, rare)],), {}, "batches that all have a mask"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_tokens(*arguments, **keywords)
    for arguments, keywords, message in (
        ((iter([tokens]),), {}, "can be read twice"),
        ((3,), {}, "tokens: expected a tensor, batches"),
        (([(tokens,)], torch.arange(3)), {}, "expected None with batches"),
        ((tokens, torch.rand(12, 3)), {}, "whole numbers for kind 'position'"),
        ((tokens,), {"groups": torch.rand(12, 3)}, "groups: expected a boolean mask"),
        ((tokens,), {"grid": 3}, r"grid: expected \(rows, columns\)"),
        ((tokens.long(),), {}, "tokens: expected a float32"),
    ):
        with pytest.raises(TypeError, match=message):
            probe_tokens(*arguments, **keywords)
