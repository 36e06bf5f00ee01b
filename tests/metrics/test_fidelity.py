"""fid+ and fid- against a loop over samples, and their edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metrics.models import classifier, linear, removed
from xai_fast.metrics import Fidelity, fidelity, fidelity_scores

B, F, C = 7, 6, 4


def data(classes: int = C) -> tuple[Any, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(B, F, dtype=torch.float64)
    return classifier(F, classes), x, torch.randn(B, F, dtype=torch.float64), torch.randint(classes, (B,))


def by_loop(forward: Any, x: Tensor, maps: Tensor, labels: Tensor, kind: str, form: str, size: int) -> tuple[float, float]:
    """The formulas, word for word."""
    totals = [0.0, 0.0]
    for i in range(len(x)):
        whole = forward(x[i : i + 1])[0].softmax(0)
        truth = int(labels[i]) if kind == "phenomenon" else int(whole.argmax())
        for j, keep in enumerate((False, True)):
            other = forward(removed(x[i], maps[i], size, 0.0, keep)[None])[0].softmax(0)
            if form == "accuracy":
                totals[j] += abs(int(whole.argmax() == truth) - int(other.argmax() == truth))
            else:
                totals[j] += float(whole[truth] - other[truth])
    return totals[0] / len(x), totals[1] / len(x)


@pytest.mark.parametrize("kind", ["model", "phenomenon"])
@pytest.mark.parametrize("form", ["accuracy", "probability"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_is_the_formula(kind: str, form: str, batch_size: int | None) -> None:
    forward, x, maps, labels = data()
    sizes = [0, 1, 3, F]
    found = fidelity(forward, x, maps, labels, kind=kind, form=form, top_k=sizes, batch_size=batch_size)
    wanted = torch.tensor([by_loop(forward, x, maps, labels, kind, form, size) for size in sizes], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([found.fid_plus, found.fid_minus], 1), wanted)
    assert found.evaluations == B * (2 * len(sizes) + 1)
    assert found.size.tolist() == sizes


def test_other_kinds_from_the_same_forward_passes() -> None:
    forward, x, maps, labels = data()
    one = fidelity(forward, x, maps, labels, top_k=[1, 2])
    for kind in ("model", "phenomenon"):
        for form in ("accuracy", "probability"):
            other = fidelity(forward, x, maps, labels, kind=kind, form=form, top_k=[1, 2])
            for found, wanted in zip(one.scores(kind, form), other, strict=True):
                torch.testing.assert_close(found, wanted)
            for found, wanted in zip(one.per_sample(kind, form), other, strict=True):
                torch.testing.assert_close(found.mean(0), wanted)


def test_ways_to_select() -> None:
    forward, x, maps, _ = data()
    maps = torch.rand_like(maps)
    by_size = fidelity(forward, x, maps, top_k=[3, 1])
    by_share = fidelity(forward, x, maps, sparsity=[0.5, 5 / 6])
    for a, b in zip(by_size, by_share, strict=True):
        assert torch.equal(a, b)
    above = fidelity(forward, x, maps, threshold=0.4, form="probability")
    masked = fidelity(forward, x, maps > 0.4, form="probability")
    for a, b in zip(above, masked, strict=True):
        assert a.dim() == 0
        assert torch.equal(a, b)
    assert above.size == (maps > 0.4).sum(1).double().mean()
    hard = fidelity(forward, x, (maps > 0.4).double(), soft=True, form="probability")
    for a, b in zip(above, hard, strict=True):
        torch.testing.assert_close(a, b)
    assert fidelity(forward, x, maps).sparsity.shape == (5,)


def test_soft_masks_blend() -> None:
    forward, x, maps, _ = data()
    mask = maps.sigmoid()
    found = fidelity(forward, x, mask, soft=True, form="probability", baseline=2.0)
    whole = forward(x).softmax(1)
    chosen = whole.argmax(1, keepdim=True)
    for value, m in ((found.fid_plus, 1 - mask), (found.fid_minus, mask)):
        other = forward(x * m + 2 * (1 - m)).softmax(1)
        torch.testing.assert_close(value, (whole - other).gather(1, chosen).mean())


def test_images_tokens_groups_and_patches() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    model = classifier(32, 3)
    pixels = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    one = fidelity(model, images, pixels, top_k=5, form="probability")
    without_channel = fidelity(model, images, pixels[:, 0], top_k=5, form="probability")
    torch.testing.assert_close(one.fid_plus, without_channel.fid_plus)
    # Every entry with the value of its pixel: the 10 largest are the 5 pixels' both channels.
    by_entry = fidelity(model, images, pixels.expand(-1, 2, -1, -1), top_k=10, form="probability")
    torch.testing.assert_close(one.fid_plus, by_entry.fid_plus)
    grid = torch.arange(4).view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    by_mask = fidelity(model, images, pixels, top_k=1, feature_mask=grid[None, None], form="probability")
    by_patch = fidelity(model, images, pixels, top_k=1, patch_size=2, form="probability")
    worth = torch.stack([pixels[:, 0][:, grid == g].sum(1) for g in range(4)], 1)
    whole = model(images).softmax(1)
    chosen = whole.argmax(1)
    expected = 0.0
    for i in range(3):
        x = images[i].clone()
        x[:, grid == int(worth[i].argmax())] = 0
        expected += float(whole[i, chosen[i]] - model(x[None]).softmax(1)[0, chosen[i]]) / 3
    assert float(by_mask.fid_plus) == pytest.approx(expected)
    assert torch.equal(by_mask.fid_plus, by_patch.fid_plus)
    # Tokens (B,N) of embeddings (B,N,D), and token ids with a number in their place.
    embeddings, weight = torch.randn(3, 5, 4, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    model = classifier(20, 3)
    found = fidelity(model, embeddings, weight, top_k=2, form="probability")
    cut = torch.stack(
        [
            e.masked_fill((w.argsort(descending=True).argsort() < 2)[:, None], 0)
            for e, w in zip(embeddings, weight, strict=True)
        ]
    )
    whole, other = model(embeddings).softmax(1), model(cut).softmax(1)
    torch.testing.assert_close(found.fid_plus, (whole - other).gather(1, whole.argmax(1, keepdim=True)).mean())
    table = torch.randn(9, 4, dtype=torch.float64)
    ids = torch.randint(1, 9, (3, 5))
    of_ids = fidelity(lambda ids: model(table[ids]), ids, weight, top_k=2, baseline=0, form="probability")
    cut = torch.where(weight.argsort(1, descending=True).argsort(1) < 2, 0, ids)
    whole, other = model(table[ids]).softmax(1), model(table[cut]).softmax(1)
    torch.testing.assert_close(of_ids.fid_plus, (whole - other).gather(1, whole.argmax(1, keepdim=True)).mean())


def test_masks_of_a_graph() -> None:
    """Edges as inputs of ones: the forward function applies them."""
    torch.manual_seed(0)
    edges = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 0]])
    features = torch.randn(4, 3, dtype=torch.float64)

    def forward(weights: Tensor) -> Tensor:
        out = features.expand(len(weights), -1, -1).clone()
        for e, (a, b) in enumerate(edges.tolist()):
            out[:, b] += weights[:, e, None] * features[a]
        return out.sum(1)

    found = fidelity(forward, torch.ones(2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64), top_k=[0, 4])
    assert found.fid_plus[0] == 0
    assert found.fid_minus[1] == 0


@pytest.mark.parametrize("form", ["accuracy", "probability"])
@pytest.mark.parametrize("change", [{}, {"robust": True}, {"feature_mask": torch.arange(F) // 2}])
def test_a_map_with_nan_says_nothing(form: str, change: dict[str, Any]) -> None:
    forward, x, maps, labels = data()
    maps[2, 3] = float("nan")
    found = fidelity(forward, x, maps, labels, form=form, sparsity=[0.5, 0.9], generator=torch.Generator(), **change)
    for kind in ("model", "phenomenon"):
        for terms in found.per_sample(kind, form):
            assert terms.isnan().all(1).nonzero().flatten().tolist() == [2]
            assert terms.isnan().sum() == 2
    assert found.fid_plus.isnan().all()
    assert found.fid_minus.isnan().all()
    assert found.characterization().isnan().all()
    assert found.sparsity.isfinite().all()  # what was asked for is known
    assert fidelity(forward, x, maps, threshold=0.0).size.isnan()


@pytest.mark.parametrize("form", ["accuracy", "probability"])
@pytest.mark.parametrize("kind", ["model", "phenomenon"])
def test_outputs_with_nan_predict_nothing(kind: str, form: str) -> None:
    """Of one sample on the whole input, of another one only without its explanation."""
    forward, x, maps, labels = data()
    maps = torch.arange(F, dtype=torch.float64).expand(B, -1)
    x[0, 0], x[1, -1] = 77.0, 88.0

    def broken(z: Tensor) -> Tensor:
        lost = (z[:, 0] == 77) & (z[:, -1] != 0) | (z[:, -1] == 0) & (z == x[1]).any(1)
        return forward(z).masked_fill(lost[:, None], float("nan"))

    plus, minus = fidelity(broken, x, maps, labels, kind=kind, form=form, top_k=1).per_sample()
    assert plus.flatten().isnan().tolist() == [True, True, *[False] * (B - 2)]
    assert minus.flatten().isnan().tolist() == [True, *[False] * (B - 1)]


def test_nan_in_one_row_does_not_make_logits_of_probabilities() -> None:
    forward, x, maps, _ = data()
    x[0] = 50.0

    def broken(z: Tensor) -> Tensor:
        return forward(z).softmax(1).masked_fill((z == 50).any(1)[:, None], float("nan"))

    whole, rest = (fidelity(broken, x[i:], maps[i:], form="probability").per_sample()[0] for i in (0, 1))
    torch.testing.assert_close(whole[1:], rest)


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur", "uniform", 0.3, "tensor", "callable"])
def test_baselines(baseline: Any) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 6, 6)
    given = {"tensor": torch.rand(3, 1, 1), "callable": lambda x: x.flip(0)}.get(baseline, baseline)
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    fidelity(forward, images, torch.rand(2, 1, 6, 6), top_k=36, baseline=given, generator=torch.Generator().manual_seed(5))
    gone = seen[1].view(2, 2, 3, 6, 6)[:, 0]
    expected = {
        "zero": torch.zeros_like(images),
        "mean": images.mean((2, 3), keepdim=True).expand_as(images),
        0.3: torch.full_like(images, 0.3),
        "tensor": given.expand_as(images) if isinstance(given, Tensor) else None,
        "callable": images.flip(0),
    }.get(baseline)
    if expected is not None:
        torch.testing.assert_close(gone, expected)
    elif baseline == "blur":
        assert gone.std() < images.std() / 1.3
        torch.testing.assert_close(gone.mean((2, 3)), images.mean((2, 3)), rtol=0.1, atol=0.02)
    else:
        low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
        assert bool((gone.flatten(1).amin(1) >= low).all())
        assert bool((gone.flatten(1).amax(1) <= high).all())
        assert gone.flatten(1).std(1).min() > 0.2


def test_robust_fidelity() -> None:
    forward, x, maps, labels = data()
    plain = fidelity(forward, x, maps, labels, top_k=[1, 3], kind="phenomenon")
    same = fidelity(forward, x, maps, labels, top_k=[1, 3], kind="phenomenon", robust=(1.0, 1.0), n_samples=3)
    for a, b in zip(plain, same, strict=True):
        torch.testing.assert_close(a, b)
    none = fidelity(forward, x, maps, top_k=[1, 3], robust=(0.0, 0.0), n_samples=3)
    assert none.fid_plus.eq(0).all()
    assert none.fid_minus.eq(0).all()
    # In expectation, for a linear model and scores taken as probabilities: the share times the loss of all.
    weight = torch.tensor([[0.2, 0.0], [0.1, 0.0], [0.1, 0.0]], dtype=torch.float64)
    ones = torch.ones(1, 3, dtype=torch.float64)
    half = {"robust": (0.5, 0.25), "n_samples": 4000, "form": "probability", "outputs": "probabilities", "top_k": 1}
    generator = torch.Generator().manual_seed(1)
    found = fidelity(linear(weight), ones, weight[None, :, 0], generator=generator, **half)
    assert float(found.fid_plus) == pytest.approx(0.5 * 0.2, abs=0.01)
    assert float(found.fid_minus) == pytest.approx(0.25 * 0.2, abs=0.01)


def test_is_deterministic_and_does_not_depend_on_chunks() -> None:
    forward, x, maps, _ = data()
    runs = [
        fidelity(
            forward,
            x,
            maps,
            top_k=2,
            robust=True,
            form="probability",
            baseline="uniform",
            batch_size=size,
            generator=torch.Generator().manual_seed(9),
        )
        for size in (None, 1, 4)
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other.fid_plus, runs[0].fid_plus)
        torch.testing.assert_close(other.fid_minus, runs[0].fid_minus)


def test_more_than_64_classes_one_class_and_bfloat16() -> None:
    forward, x, maps, labels = data(classes=100)
    found = fidelity(forward, x, maps, labels, top_k=2, kind="phenomenon", form="probability")
    wanted = by_loop(forward, x, maps, labels, "phenomenon", "probability", 2)
    assert (float(found.fid_plus), float(found.fid_minus)) == pytest.approx(wanted)
    one = fidelity(lambda x: x.sum(1, keepdim=True), x, maps, top_k=2, form="probability")
    assert (one.fid_plus, one.fid_minus) != (0, 0)
    assert fidelity(lambda x: x.sum(1, keepdim=True), x, maps, top_k=2).fid_plus == 0
    half = fidelity(lambda x: forward(x.double()), x.bfloat16(), maps.bfloat16(), top_k=2, form="probability")
    wanted = by_loop(lambda x: forward(x.double()), x.bfloat16(), maps.bfloat16(), labels, "model", "probability", 2)
    assert (float(half.fid_plus), float(half.fid_minus)) == pytest.approx(wanted)


def test_ties_and_zero_maps_go_by_index() -> None:
    forward, x, _, _ = data()
    zero, falling = torch.zeros(B, F), torch.arange(F, 0, -1.0).expand(B, -1)
    for a, b in zip(fidelity(forward, x, zero, top_k=2), fidelity(forward, x, falling, top_k=2), strict=True):
        assert torch.equal(a, b)


def test_further_arguments_follow_their_samples() -> None:
    _, x, maps, _ = data()
    scale = torch.arange(1.0, B + 1, dtype=torch.float64)[:, None]
    model = classifier(F, C)
    found = fidelity(
        lambda x, s, name: model(x * s),
        x,
        maps,
        top_k=2,
        form="probability",
        additional_forward_args=(scale, "name"),
        batch_size=2,
    )
    wanted = fidelity(model, x * scale, maps, top_k=2, form="probability")
    torch.testing.assert_close(found.fid_plus, wanted.fid_plus)


def test_result_says_what_it_is() -> None:
    forward, x, maps, _ = data()
    found = fidelity(forward, x, maps, sparsity=[0.0, 0.5, 1.0])
    assert isinstance(found, Fidelity)
    assert torch.equal(found.sufficiency, 1 - found.fid_minus)
    assert torch.equal(found.necessity, found.fid_plus)
    assert [row["sparsity"] for row in found.table()] == [0.0, 0.5, 1.0]
    assert found.area() >= 0


# ---- the bare formulas ---------------------------------------------------------------------------------------------


def test_scores_of_classes_and_of_probabilities() -> None:
    y, y_hat = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 1])
    removed_, kept = torch.tensor([[1, 1, 2, 0], [0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1], [0, 2, 2, 1]])
    plus, minus = fidelity_scores(y, y_hat, removed_, kept, kind="phenomenon")
    assert plus.tolist() == [0.75, 0.0]
    assert minus.tolist() == [0.0, 0.5]
    plus, minus = fidelity_scores(None, y_hat, removed_, kept, kind="model")
    assert plus.tolist() == [0.75, 0.0]
    assert minus.tolist() == [0.0, 0.5]
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    q = torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    plus, minus = fidelity_scores(torch.tensor([1, 1]), p, q, p, kind="phenomenon")
    assert float(plus) == pytest.approx((0.3 - 0.9 + 0.8 - 0.5) / 2)
    assert float(minus) == 0
    plus, _ = fidelity_scores(None, p, q, p, kind="model")
    assert float(plus) == pytest.approx((0.7 - 0.1 + 0.8 - 0.5) / 2)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward": 3}, "forward: expected a callable"),
        ({"inputs": [1]}, "inputs: expected a torch.Tensor"),
        ({"inputs": torch.zeros(0, F)}, "inputs: expected shape"),
        ({"attributions": torch.zeros(B, F + 1)}, "attributions: expected the shape of inputs"),
        ({"attributions": torch.zeros(B, F, dtype=torch.int64)}, "attributions"),
        ({"kind": "truth"}, "kind: expected one of"),
        ({"form": "odds"}, "form: expected one of"),
        ({"kind": "phenomenon"}, "labels: expected the true classes"),
        ({"labels": torch.full((B,), C)}, "labels: expected classes from 0 to 3"),
        ({"top_k": F + 1}, "top_k: expected a whole number from 0 to 6"),
        ({"sparsity": 1.5}, "sparsity: expected shares"),
        ({"sparsity": 0.5, "top_k": 1}, "top_k: expected one way to select"),
        ({"sparsity": []}, "sparsity: expected at least one value"),
        ({"soft": True}, "attributions: expected values from 0 to 1"),
        ({"baseline": "black"}, "baseline: expected one of"),
        ({"baseline": float("nan")}, "baseline: expected a finite number, got nan"),
        ({"baseline": float("inf")}, "baseline: expected a finite number, got inf"),
        ({"baseline": torch.full((F,), float("nan"), dtype=torch.float64)}, "baseline: expected finite values, got nan"),
        ({"baseline": lambda x: x / 0}, "baseline: expected finite values, got -?inf"),
        ({"baseline": "blur"}, "baseline: expected images"),
        ({"baseline": torch.zeros(F + 1)}, "baseline: expected a shape"),
        ({"feature_mask": torch.zeros(F)}, "feature_mask: expected a tensor of whole numbers"),
        ({"feature_mask": torch.zeros(F + 1, dtype=torch.int64)}, "feature_mask: expected a shape"),
        ({"patch_size": 2}, "patch_size: expected maps of one channel"),
        ({"robust": (0.1, 2.0)}, "robust: expected shares"),
        ({"outputs": "odds"}, "outputs: expected one of"),
        ({"batch_size": 0}, "batch_size: expected a whole number"),
        ({"generator": 3}, "generator: expected a torch.Generator"),
        ({"forward": lambda x: x[:, 0]}, "forward: expected class scores"),
        ({"forward": lambda x: x[:, :0]}, "forward: expected outputs of shape"),
        ({"inputs": torch.zeros(B, F).to_sparse()}, "inputs: expected a dense tensor, got torch.sparse_coo"),
        ({"attributions": torch.zeros(B, F).to_sparse()}, "attributions.*: expected a dense tensor"),
        ({"labels": "cat"}, "labels: expected a torch.Tensor or numbers, got str"),
        ({"labels": 0.5}, "labels: expected whole class numbers"),
        ({"sparsity": True}, "sparsity: expected a number, got bool"),
        ({"top_k": np.bool_(True)}, "top_k: expected a whole number, got bool"),
        ({"sparsity": "half"}, "sparsity: expected a number or a sequence of numbers, got str"),
        ({"threshold": object()}, "threshold: expected a number or a sequence of numbers, got object"),
        ({"baseline": 10**400}, "baseline: expected a number that torch.float64"),
        ({"forward": lambda x: x[:1]}, "forward: expected outputs of shape"),
        ({"forward": lambda x: [x.long()]}, "forward: expected it to return a floating tensor"),
    ],
)
def test_bad_input_is_said_in_one_line(change: dict[str, Any], message: str) -> None:
    forward, x, maps, _ = data()
    arguments = {"forward": forward, "inputs": x, "attributions": maps, "robust": "robust" in change, **change}
    if "generator" in change:
        arguments["baseline"] = "uniform"
    with pytest.raises((ValueError, TypeError), match=message) as error:
        fidelity(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"top_k": np.int64(2)}, {"top_k": 2}),
        ({"top_k": torch.tensor(2)}, {"top_k": 2}),
        ({"top_k": torch.tensor([1, 2])}, {"top_k": [1, 2]}),
        ({"sparsity": np.float32(0.5)}, {"sparsity": 0.5}),
        ({"sparsity": torch.tensor(0.5)}, {"sparsity": 0.5}),
        ({"sparsity": np.array([0.5, 0.25])}, {"sparsity": [0.5, 0.25]}),
        ({"threshold": np.float64(0.1), "baseline": np.int64(1)}, {"threshold": 0.1, "baseline": 1.0}),
        ({"labels": [0] * B, "kind": "phenomenon"}, {"labels": torch.zeros(B).long(), "kind": "phenomenon"}),
    ],
)
def test_numbers_of_numpy_and_torch(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    forward, x, maps, _ = data()
    found, same = fidelity(forward, x, maps, **given), fidelity(forward, x, maps, **wanted)
    assert torch.equal(found.fid_plus, same.fid_plus)
    assert torch.equal(found.fid_minus, same.fid_minus)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int64, 2.9),
        (torch.int64, 2**63),
        (torch.uint8, -1),
        (torch.uint8, 256),
        (torch.bool, 2),
        (torch.float16, 1e6),
    ],
)
def test_a_baseline_that_inputs_cannot_hold(dtype: torch.dtype, value: float) -> None:
    x, maps = torch.ones(2, 3, dtype=dtype), torch.rand(2, 3)
    for baseline in (value, lambda _: value):
        with pytest.raises(ValueError, match=f"baseline: expected a number that {dtype}, the dtype of inputs, can hold"):
            fidelity(lambda z: z.double(), x, maps, baseline=baseline)


def test_whole_numbers_keep_their_baseline() -> None:
    seen = []

    def forward(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return z.double()

    x, maps = torch.full((2, 3), 7), torch.rand(2, 3)
    fidelity(forward, x, maps, top_k=3, baseline=2.0)
    assert torch.cat(seen).unique().tolist() == [2, 7]
    with pytest.raises(TypeError, match=r"soft: expected False for inputs of torch.int64"):
        fidelity(forward, x, maps, soft=True)


def test_an_area_needs_several_selections() -> None:
    forward, x, maps, _ = data()
    for sparsity in (0.5, [0.5]):
        with pytest.raises(ValueError, match="sparsity: expected several selections"):
            fidelity(forward, x, maps, sparsity=sparsity).area()


def test_scores_of_lists_and_booleans() -> None:
    y_hat, removed, kept = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1])
    wanted = fidelity_scores(torch.tensor([0, 0, 1]), y_hat, removed, kept, kind="phenomenon")
    assert fidelity_scores([0, 0, 1], y_hat, removed, kept, kind="phenomenon") == wanted  # type: ignore[arg-type]
    assert fidelity_scores(None, y_hat > 0, removed > 0, kept > 0) == fidelity_scores(None, y_hat, removed, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.tensor([-1, 1])}, "y: expected classes of at least 0, got -1 to 1"),
        ({"y": torch.tensor([0.5, 1.0])}, "y: expected whole class numbers, got torch.float32"),
        ({"y": "ab"}, "y: expected a torch.Tensor or numbers, got str"),
        ({"y": [0, 1, 1]}, r"y: expected shape \(2,\)"),
        ({"y_hat_removed": torch.tensor([0.9, 0.2])}, "y_hat_removed: expected whole class numbers"),
        ({"y_hat_kept": torch.tensor([0, -2])}, "y_hat_kept: expected classes of at least 0"),
        ({name: torch.zeros(2, 0) for name in ("y_hat", "y_hat_removed", "y_hat_kept")}, "y_hat: expected classes"),
    ],
)
def test_bad_classes_of_scores(change: dict[str, Any], message: str) -> None:
    y = torch.tensor([0, 1])
    with pytest.raises((ValueError, TypeError), match=message):
        fidelity_scores(**{"y": y, "y_hat": y, "y_hat_removed": y, "y_hat_kept": y, "kind": "phenomenon", **change})
