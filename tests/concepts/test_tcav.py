"""TCAV: against slow code written from the definition, on networks whose direction is known, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from xai_fast.concepts import TCAV, Concept, activations, fit_cav, sensitivity, tcav
from xai_fast.concepts._statistics import adjusted, incomplete_beta, student_two_sided, welch

METHODS = ("ridge", "lda", "logistic", "mean_difference")


def cnn() -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 9, 4)).eval()


class Tokens(nn.Module):
    """(N, T, 5) to class scores, with an output of each usual kind on the way."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.block = Wrapped(kind)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor, scale: Any = None) -> Any:
        hidden = self.first(x).tanh()
        if scale is not None:
            hidden = hidden * scale
        hidden = self.block.read(self.block(hidden))
        return SequenceClassifierOutput(logits=self.head(hidden).square().mean(1))


class Wrapped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return {
            "tensor": lambda: y,
            "tuple": lambda: (y, None),
            "nested": lambda: (None, [torch.arange(3), y]),
            "dict": lambda: {"ids": torch.arange(3), "states": y},
            "output": lambda: BaseModelOutput(last_hidden_state=y),
        }[self.kind]()

    def read(self, output: Any) -> Tensor:
        found = {
            "tensor": lambda: output,
            "tuple": lambda: output[0],
            "nested": lambda: output[1][1],
            "dict": lambda: output["states"],
            "output": lambda: output.last_hidden_state,
        }[self.kind]()
        return found.relu_()  # in place: what the hook kept must not change with it


class Planted(nn.Module):
    """Class c is the sum over positions of w_c . a, for the layer's outputs a themselves."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.register_buffer("w", w)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,kc->nk", self.layer(x), self.w)


def sets(count: int, n: int, *shape: int) -> list[Tensor]:
    return [torch.randn(n, *shape) for _ in range(count)]


def outputs_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    kept = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out.detach().clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    return kept[0]


def slow_shares(model: nn.Module, layer: str, inputs: Tensor, target: int, lift: Callable[..., Tensor], v: Tensor) -> Tensor:
    """S by a central difference along the shift: nothing of the gradient code is used."""

    def score(e: float) -> Tensor:
        module = model.get_submodule(layer)
        hook = module.register_forward_hook(lambda _m, _i, out: out + e * lift(out, v))
        with torch.no_grad():
            out = model(inputs)
        hook.remove()
        return getattr(out, "logits", out)[:, target]

    return (score(1e-5) - score(-1e-5)) / 2e-5


def spread(out: Tensor, v: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (out.dim() - 2)) if out.dim() == 4 else v


def at_token(out: Tensor, v: Tensor, token: int = 2) -> Tensor:
    shift = torch.zeros_like(out)
    shift[:, token] = v
    return shift


POOLS: dict[str, tuple[Any, Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "mean": ("mean", lambda a: a.mean((2, 3)) if a.dim() == 4 else a.mean(1), spread),
    "flatten": ("flatten", lambda a: a.flatten(1), lambda out, v: v.view(1, *out.shape[1:])),
    "token": (("token", 2), lambda a: a[:, 2], at_token),
    "last": (("token", -1), lambda a: a[:, -1], lambda out, v: at_token(out, v, -1)),
    # The positions add up to 1: the shift is v at each of them, over their number.
    "callable": (
        lambda a: a.flatten(2).mean(2) if a.dim() == 4 else a.mean(1),
        lambda a: a.flatten(2).mean(2) if a.dim() == 4 else a.mean(1),
        lambda out, v: spread(out, v) / (out[0].numel() // len(v)),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "pool"),
    [("cnn", "mean"), ("cnn", "flatten"), ("cnn", "callable")]
    + [("tokens", pool) for pool in ("mean", "flatten", "token", "last", "callable")],
)
def test_agrees_with_the_definition(kind: str, pool: str, method: str) -> None:
    """Each CAV by fit_cav, each sensitivity by a finite difference, each test by scipy."""
    model, shape, layers = (cnn(), (3, 8, 8), ["0", "2"]) if kind == "cnn" else (Tokens(), (4, 5), ["first", "block"])
    model.double()
    option, read, lift = POOLS[pool]
    concepts = {"a": torch.randn(9, *shape).double() + 0.5, "b": torch.randn(12, *shape).double()}
    random = [x.double() for x in sets(4, 10, *shape)]
    inputs, targets = torch.randn(7, *shape).double(), [2, 0]
    result = tcav(model, layers, inputs, targets, concepts, random, method=method, pool=option)
    assert result.gradient_passes == 2
    for at, target in enumerate(targets):
        one = result.of(target)
        for i, layer in enumerate(layers):
            vectors = [read(outputs_of(model, layer, x)) for x in [*concepts.values(), *random]]
            null = []
            for r in range(4):
                told = [fit_cav(vectors[2 + r], vectors[2 + s], method=method).vector for s in range(4) if s != r]
                own = [(slow_shares(model, layer, inputs, target, lift, v) > 0).double().mean() for v in told]
                null.append(float(torch.stack(own).mean()))
            assert result.null_scores[at, i].tolist() == pytest.approx(null)
            for c, name in enumerate(concepts):
                s = []
                for r in range(4):
                    cav = fit_cav(vectors[c], vectors[2 + r], method=method)
                    torch.testing.assert_close(result.cavs[layer][name][r].vector, cav.vector, rtol=0, atol=1e-8)
                    assert result.cavs[layer][name][r].bias == pytest.approx(cav.bias, abs=1e-8)
                    s.append(slow_shares(model, layer, inputs, target, lift, cav.vector))
                shares = torch.stack([(x > 0).double().mean() for x in s])
                magnitude = torch.stack([x.clamp_min(0).sum() / x.abs().sum() for x in s])
                assert one.score[layer][name] == pytest.approx(float(shares.mean()))
                assert one.std[layer][name] == pytest.approx(float(shares.std()))
                assert one.magnitude[layer][name] == pytest.approx(float(magnitude.mean()), abs=1e-5)
                assert one.sensitivity[layer][name] == pytest.approx(float(torch.stack(s).mean()), rel=1e-4, abs=1e-7)
                if shares.std() > 1e-9 and np.std(null) > 1e-9:
                    p = scipy.stats.ttest_ind(shares, null, equal_var=False).pvalue
                    assert one.p_value[layer][name] == pytest.approx(p, abs=1e-9)
                assert one.p_adjusted[layer][name] == pytest.approx(min(1, 8 * one.p_value[layer][name]))


def test_nonlinear_pooling_follows_its_jacobian() -> None:
    """The maximum over positions: a shift at the place of the maximum, channel by channel."""
    model, inputs = cnn().double(), torch.randn(5, 3, 8, 8).double()
    concepts, random = {"a": torch.randn(9, 3, 8, 8).double()}, [x.double() for x in sets(3, 9, 3, 8, 8)]
    result = tcav(model, "0", inputs, 1, concepts, random, pool=lambda a: a.amax((2, 3)))
    v = result.cavs["0"]["a"][1].vector

    def lift(out: Tensor, v: Tensor) -> Tensor:
        return (out == out.amax((2, 3), keepdim=True)) * v.view(1, -1, 1, 1)

    top = lift(outputs_of(model, "0", inputs), v)
    s = slow_shares(model, "0", inputs, 1, lambda _out, _v: top, v)
    assert float(result.sensitivities[0, 0, 0, 1]) == pytest.approx(float(s.mean()), rel=1e-5)


def test_published_example() -> None:
    """tensorflow/tcav, tcav_test.py: gradient [0, 1, 2] along [1, 2, 3] is 8."""
    gradient, vector = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1.0, 2.0, 3.0])
    assert sensitivity(gradient, vector).tolist() == [8.0]
    unit = fit_cav(vector[None], torch.zeros(1, 3), method="mean_difference")
    assert sensitivity(gradient, unit).tolist() == pytest.approx([8 / math.sqrt(14)], rel=1e-6)
    assert sensitivity(gradient.repeat(2, 1), torch.stack([vector, -vector])).tolist() == [[8.0, -8.0]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_planted_concept(method: str) -> None:
    w = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    w[1] -= (w[1] @ w[0]) * w[0]
    model, shape = Planted(w), (16, 3, 3)
    shift = 3 * w[:, :, None, None]
    concepts = [
        Concept("for", torch.randn(40, *shape) + shift[0]),
        Concept("against", torch.randn(40, *shape) - shift[0]),
        Concept("other class", torch.randn(40, *shape) + shift[1]),
    ]
    result = tcav(model, model.layer, torch.randn(25, *shape), [0, 1], concepts, sets(12, 40, *shape), method=method)
    first, second = result.of(0), result.of(1)
    assert first.score["layer"] | {"other class": 0} == {"for": 1.0, "against": 0.0, "other class": 0}
    assert second.score["layer"]["other class"] == 1
    assert first.magnitude["layer"]["for"] == 1
    assert first.significant["layer"]["for"]
    assert first.significant["layer"]["against"]
    assert second.significant["layer"]["other class"]
    assert first.accuracy["layer"]["for"] > 0.95
    for cav in result.cavs["layer"]["for"]:
        assert float(cav.vector @ w[0]) > 0.8
        assert (cav.positive, cav.method) == ("for", method)
    # The sensitivity is 9 positions times w . v.
    assert first.sensitivity["layer"]["for"] == pytest.approx(9, rel=0.1)


def smooth_case(seed: int, test: str, repeats: int) -> TCAV:
    """A concept that is one more random set, for a class whose gradients differ from input to input."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 20, generator=g)
    model = nn.Sequential(nn.Identity(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g)
    model[1].weight.data += 0.5 * weight
    random = [torch.randn(20, 20, generator=g) for _ in range(repeats + 1)]
    inputs = torch.randn(30, 20, generator=g)
    options: dict[str, Any] = {"test": test, "method": "mean_difference", "holdout": 0, "correction": None}
    return tcav(model, "0", inputs, 0, {"random": random[0]}, random[1:], **options)


def test_levels_of_the_two_tests() -> None:
    """Of random concepts "exchangeable" calls 5 % significant; "welch" far more, as its notes say."""
    found = {
        test: np.mean([smooth_case(seed, test, 12).significant["0"]["random"] for seed in range(200)])
        for test in ("welch", "exchangeable")
    }
    assert found["exchangeable"] < 0.1
    assert 0.2 < found["welch"] < 0.5


def test_passes_are_shared_by_all_layers_concepts_and_sets() -> None:
    model, counts = cnn(), {"forward": 0}
    model.register_forward_pre_hook(lambda *_: counts.__setitem__("forward", counts["forward"] + 1))
    concepts = {f"c{i}": torch.randn(8, 3, 8, 8) for i in range(3)}
    result = tcav(model, ["0", "2", "3"], torch.randn(6, 3, 8, 8), [0, 1], concepts, sets(5, 8, 3, 8, 8))
    assert result.gradient_passes == 2
    assert result.forward_passes == counts["forward"] == 1 + 3 + 5
    twice = {"a": concepts["c0"], "the same": concepts["c0"]}
    again = tcav(model, "0", torch.randn(6, 3, 8, 8), 0, twice, sets(5, 8, 3, 8, 8))
    assert again.forward_passes == 1 + 1 + 5
    assert again.score["0"]["a"] == again.score["0"]["the same"]


def test_batches_change_nothing() -> None:
    model = cnn().double()
    concepts, random = {"a": torch.randn(10, 3, 8, 8).double()}, [x.double() for x in sets(4, 9, 3, 8, 8)]
    inputs = torch.randn(11, 3, 8, 8).double()
    whole = tcav(model, ["0", "2"], inputs, [0, 3], concepts, random, pool="flatten")
    for size in (1, 4):
        parts = tcav(model, ["0", "2"], inputs, [0, 3], concepts, random, pool="flatten", batch_size=size)
        torch.testing.assert_close(parts.scores, whole.scores)
        torch.testing.assert_close(parts.sensitivities, whole.sensitivities)
        assert parts.gradient_passes == 2 * math.ceil(11 / size)


def test_order_of_random_sets_does_not_matter_to_the_scores() -> None:
    model = cnn()
    concepts, random = {"a": torch.randn(10, 3, 8, 8), "b": torch.randn(10, 3, 8, 8)}, sets(4, 9, 3, 8, 8)
    inputs = torch.randn(6, 3, 8, 8)
    there = tcav(model, "2", inputs, 1, concepts, random)
    back = tcav(model, "2", inputs, 1, dict(reversed(concepts.items())), random[::-1])
    torch.testing.assert_close(there.scores, back.scores.flip(2, 3))
    assert there.score["2"] == pytest.approx(back.score["2"])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "nested", "dict", "output"])
def test_outputs_of_every_kind(kind: str) -> None:
    plain, wrapped = Tokens("tensor"), Tokens(kind)
    wrapped.load_state_dict(plain.state_dict())
    inputs, concepts, random = torch.randn(5, 4, 5), {"a": torch.randn(8, 4, 5)}, sets(3, 8, 4, 5)
    results = [tcav(m, "block", inputs, 1, concepts, random, pool="flatten") for m in (plain, wrapped)]
    torch.testing.assert_close(results[0].sensitivities, results[1].sensitivities)
    for a, b in zip(results[0].cavs["block"]["a"], results[1].cavs["block"]["a"], strict=True):
        torch.testing.assert_close(a.vector, b.vector)


def test_leaves_no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
    model.train()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, concepts, random = torch.randn(5, 3, 8, 8), {"a": torch.randn(8, 3, 8, 8)}, sets(3, 8, 3, 8, 8)
    copies = [x.clone() for x in (inputs, concepts["a"], *random)]
    results = []
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        with torch.no_grad():
            results.append(tcav(model, ["1", model[0]], inputs, 0, concepts, random))
    assert torch.equal(results[0].scores, results[1].scores)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(copies, (inputs, concepts["a"], *random), strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError):
        tcav(model, "1", torch.randn(5, 3, 9, 9), 0, concepts, random)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = cnn()
    concepts = {"a": np.random.default_rng(0).normal(size=(8, 3, 8, 8)) + 1}
    inputs, random = torch.randn(9, 3, 8, 8), sets(4, 8, 3, 8, 8)
    exact = tcav(model.double(), "2", inputs.double(), 0, concepts, random)
    found = tcav(model.to(dtype), "2", inputs.to(dtype), 0, concepts, random)
    assert found.cavs["2"]["a"][0].vector.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    torch.testing.assert_close(found.sensitivities, exact.sensitivities, rtol=0.1, atol=0.01)


def test_vectors_one_output_and_loaders() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))
    images, random = torch.randn(10, 4), sets(3, 7, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(10)), batch_size=3)
    inputs = torch.randn(6, 4)
    results = [tcav(model, "0", inputs.numpy(), None, {"a": form}, random) for form in (images, loader, list(images))]
    for result in results:
        torch.testing.assert_close(result.sensitivities, results[0].sensitivities)
    assert results[0].table()[0]["target"] is None


def test_additional_arguments_reach_the_model() -> None:
    model = Tokens()
    inputs, concepts, random = torch.randn(5, 4, 5), {"a": torch.randn(8, 4, 5)}, sets(3, 8, 4, 5)
    given = [(2.0,), 2.0, (torch.full((5, 1, 1), 2.0),)]
    results = [tcav(model, "block", inputs, 1, concepts, random, additional_forward_args=a) for a in given]
    for result in results[1:]:
        torch.testing.assert_close(result.sensitivities, results[0].sensitivities)
    assert not torch.equal(results[0].sensitivities, tcav(model, "block", inputs, 1, concepts, random).sensitivities)
    with pytest.raises(ValueError, match="additional_forward_args: expected one for all, or equal rows"):
        tcav(model, "block", inputs, 1, concepts, random, additional_forward_args=torch.rand(5, 1, 1))


def test_dead_layers_score_zero() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    model[1].weight.data.zero_()
    result = tcav(model, "0", torch.randn(5, 4), 0, {"a": torch.randn(8, 4)}, sets(3, 8, 4))
    assert (result.score["0"]["a"], result.magnitude["0"]["a"], result.p_value["0"]["a"]) == (0.0, 0.0, 1.0)
    assert not result.significant["0"]["a"]


def test_table_captum_and_picture() -> None:
    model = cnn()
    concepts = {"a": torch.randn(8, 3, 8, 8), "b": torch.randn(8, 3, 8, 8)}
    result = tcav(model, ["0", "2"], torch.randn(6, 3, 8, 8), [1, 3], concepts, sets(3, 8, 3, 8, 8), correction="holm")
    rows = result.table()
    names = [(row["target"], row["layer"], row["concept"]) for row in rows]
    assert names[:3] == [(1, "0", "a"), (1, "0", "b"), (1, "2", "a")]
    assert len(rows) == 8
    assert rows[-1]["score"] == result.of(3).score["2"]["b"]
    with pytest.raises(ValueError, match=r"target: expected one of \[1, 3\], chosen with .of"):
        _ = result.score
    with pytest.raises(ValueError, match=r"target: expected one of \[1, 3\], got 2"):
        result.of(2)
    captum = result.of(1).to_captum()
    assert list(captum) == ["0-2", "0-3", "0-4", "1-2", "1-3", "1-4"]
    counts = captum["1-3"]["2"]["sign_count"]
    assert counts.tolist() == pytest.approx([float(result.scores[0, 1, 1, 1]), float(result.negatives[0, 1, 1, 1])])
    assert float(captum["1-3"]["2"]["magnitude"].sum()) == 0
    figure = result.plot(class_names=["cat", "dog"])
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights[:2] == pytest.approx([result.of(3).score[layer]["a"] for layer in ("0", "2")])
    assert len(heights) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "random"]
    with pytest.raises(ValueError, match="class_names: expected 2"):
        result.plot(class_names=["cat"])


def test_picture_marks_significance() -> None:
    w = torch.eye(4)[:1]
    shift = 4 * w[0, :, None, None]
    concepts = {"for": torch.randn(20, 4, 2, 2) + shift, "random": torch.randn(20, 4, 2, 2)}
    result = tcav(Planted(w), "layer", torch.randn(5, 4, 2, 2), 0, concepts, sets(10, 20, 4, 2, 2))
    stars = [text.get_text() for text in result.plot().axes[0].texts]
    assert len(stars) == sum(result.significant["layer"].values()) >= 1


def test_unknown_layers_get_a_hint() -> None:
    with pytest.raises(ValueError, match="got 'blok'; did you mean 'block'"):
        tcav(Tokens(), "blok", torch.randn(5, 4, 5), 1, {"a": torch.randn(8, 4, 5)}, sets(3, 8, 4, 5))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.aside, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.ids = Ids()

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        self.ids(x)
        return self.head(self.twice(self.twice(x)))


class Ids(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers: expected at least one"),
        ({"layers": ["head", "head"]}, "layers: expected different layers"),
        ({"layers": nn.Linear(2, 2)}, "layers: expected modules of the model, got a Linear"),
        ({"layers": "twice"}, "layers: expected layers that are called once"),
        ({"layers": "never"}, "'never', which it did not"),
        ({"layers": ["head", "aside"]}, "got 'aside' without a gradient"),
        ({"target": 4}, "target: expected classes from 0 to 3, got 4"),
        ({"target": -1}, "target: expected a whole number of at least 0"),
        ({"target": []}, "target: expected at least one class"),
        ({"target": [1, 1]}, "target: expected at least one class, each once"),
        ({"target": None}, "target: expected None for a model with one output"),
        ({"concepts": {}}, "concepts: expected at least one"),
        ({"concepts": [Concept("a", torch.randn(3, 4)), Concept("a", torch.randn(3, 4))]}, "expected different names"),
        ({"concepts": {"a": torch.full((5, 4), torch.nan)}}, "finite activations at 'head', got NaN or inf for 'a'"),
        ({"concepts": {"a": torch.ones(5, 4)}, "random_sets": [torch.ones(6, 4)] * 2}, "'a', .*'random 0'.*no direction"),
        ({"random_sets": [torch.randn(5, 4)]}, "random_sets: expected at least 2"),
        ({"inputs": torch.zeros(0, 4)}, "inputs: expected shape"),
        ({"inputs": torch.full((5, 4), torch.nan)}, None),
        ({"pool": "max"}, "pool: expected 'mean'"),
        ({"pool": ("token", 0)}, r"pool: expected outputs \(n, T, d\)"),
        ({"pool": lambda a: a.sum()}, "pool: expected a callable that returns a tensor"),
        ({"test": "z"}, "test: expected one of welch, exchangeable"),
        ({"correction": "sidak"}, "correction: expected one of bonferroni, holm, fdr_bh, None"),
        ({"alpha": 1.0}, "alpha: expected a level between 0 and 1"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
    ],
)
def test_refuses(change: dict, message: str | None) -> None:
    model = Odd()
    options: dict[str, Any] = {"layers": "head", "inputs": torch.randn(6, 4), "target": 0}
    options |= {"concepts": {"a": torch.randn(5, 4)}, "random_sets": sets(3, 5, 4)} | change
    if message is None:  # NaN inputs have finite gradients in a linear network
        assert tcav(model, **options).scores.isfinite().all()
    else:
        with pytest.raises(ValueError, match=message):
            tcav(model, **options)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda x: x}, "model: expected a torch.nn.Module"),
        ({"layers": [3]}, "layers: expected names or modules, got int"),
        ({"layers": "ids"}, "layers: expected 'ids' to put out a floating tensor"),
        ({"target": "cat"}, "target: expected a class number"),
        ({"concepts": [torch.randn(5, 4)]}, "concepts: expected a list of Concepts or a dict"),
        ({"inputs": [1.0]}, "inputs: expected a torch.Tensor"),
    ],
)
def test_refuses_other_types(change: dict, message: str) -> None:
    options: dict[str, Any] = {"model": Odd(), "layers": "head", "inputs": torch.randn(6, 4), "target": 0}
    options |= {"concepts": {"a": torch.randn(5, 4)}, "random_sets": sets(3, 5, 4)} | change
    with pytest.raises(TypeError, match=message):
        tcav(options.pop("model"), **options)


def test_student_and_beta_agree_with_scipy() -> None:
    t = torch.logspace(-3, 3, 60, dtype=torch.float64)[:, None]
    freedom = torch.tensor([1.0, 1.5, 2, 5, 18, 58, 1000], dtype=torch.float64)
    wanted = torch.from_numpy(2 * scipy.stats.t.sf(t.numpy(), freedom.numpy()))
    known = wanted > 1e-250
    torch.testing.assert_close(student_two_sided(t, freedom)[known], wanted[known], rtol=1e-11, atol=0)
    assert float(student_two_sided(torch.tensor(math.inf), torch.tensor(3.0))) == 0
    assert float(student_two_sided(torch.tensor(0.0), torch.tensor(3.0))) == 1
    x = torch.linspace(0, 1, 21, dtype=torch.float64)
    for a, b in ((0.5, 0.5), (2, 3), (30, 0.5), (0.1, 50)):
        found = incomplete_beta(torch.tensor(a), torch.tensor(b), x)
        torch.testing.assert_close(found, torch.from_numpy(scipy.special.betainc(a, b, x.numpy())), rtol=1e-6, atol=1e-12)


def test_welch_agrees_with_scipy() -> None:
    first, second = torch.randn(5, 3, 7, dtype=torch.float64), torch.randn(5, 3, 11, dtype=torch.float64) * 3 + 1
    t, freedom, p = welch(first, second)
    wanted = scipy.stats.ttest_ind(first.numpy(), second.numpy(), axis=-1, equal_var=False)
    for found, expected in ((t, wanted.statistic), (freedom, wanted.df), (p, wanted.pvalue)):
        torch.testing.assert_close(found, torch.tensor(np.asarray(expected)), rtol=1e-10, atol=0)


def test_welch_without_variance() -> None:
    same, other, near = torch.full((2, 4), 0.1), torch.full((2, 4), 0.7), torch.tensor([[0.0, 0.2, 0.1, 0.1]] * 2)
    assert welch(same, same)[2].tolist() == [1, 1]
    assert welch(same, other)[2].tolist() == [0, 0]
    assert welch(same, near)[2].tolist() == pytest.approx([1, 1])


def test_corrections() -> None:
    p = torch.rand(2, 3, 5, dtype=torch.float64) ** 3
    flat = p.flatten().numpy()
    wanted = scipy.stats.false_discovery_control(flat)
    torch.testing.assert_close(adjusted(p, "fdr_bh").flatten(), torch.from_numpy(wanted))
    order = np.argsort(flat)
    holm = np.maximum.accumulate([min(1, (30 - k) * flat[i]) for k, i in enumerate(order)])
    torch.testing.assert_close(adjusted(p, "holm").flatten()[torch.from_numpy(order)], torch.from_numpy(holm))
    torch.testing.assert_close(adjusted(p, "bonferroni"), (30 * p).clamp_max(1))
    torch.testing.assert_close(adjusted(p, None), p)


# ---- classes with examples of their own, other tests, what meaningless concepts get -------------------------------------


def test_each_class_with_its_own_examples() -> None:
    """As if each class were asked alone, but the sets run once."""
    model, random_sets, concept = cnn(), sets(4, 6, 3, 8, 8), torch.randn(7, 3, 8, 8) + 0.3
    examples = {2: torch.randn(5, 3, 8, 8), 0: torch.randn(9, 3, 8, 8)}
    found = tcav(model, ["1", "3"], examples, [0, 2], {"a": concept}, random_sets, correction=None)
    assert found.targets == (0, 2)
    assert (found.gradient_passes, found.forward_passes) == (2, 2 + 5)
    for target, x in examples.items():
        alone = tcav(model, ["1", "3"], x, target, {"a": concept}, random_sets, correction=None)
        for name in ("scores", "magnitudes", "null_scores", "p_values"):
            torch.testing.assert_close(getattr(found.of(target), name), getattr(alone, name), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"inputs: expected a key for each class of target, \[0, 1\], got \[2, 0\]"):
        tcav(model, "1", examples, [0, 1], {"a": concept}, random_sets)


def test_another_test_without_the_model() -> None:
    model, random_sets, x = cnn(), sets(5, 6, 3, 8, 8), torch.randn(9, 3, 8, 8)
    concepts = {"a": torch.randn(7, 3, 8, 8) + 0.3, "b": torch.randn(7, 3, 8, 8)}
    first = tcav(model, "1", x, 0, concepts, random_sets)
    options: dict[str, Any] = {"correction": "holm", "alpha": 0.1}
    other = tcav(model, "1", x, 0, concepts, random_sets, test="exchangeable", **options)
    again = first.with_test("exchangeable", **options)
    assert torch.equal(again.p_values, other.p_values)
    assert torch.equal(again.adjusted, other.adjusted)
    assert (again.test, again.correction, again.alpha) == ("exchangeable", "holm", 0.1)
    with pytest.raises(ValueError, match="test: expected one of welch, exchangeable, got 'student'"):
        first.with_test("student")


@pytest.mark.parametrize("test", ["welch", "exchangeable"])
def test_random_sets_as_concepts(test: str) -> None:
    """As if each random set were handed in as a concept, with the others as random sets."""
    model, random_sets, x = cnn(), sets(5, 6, 3, 8, 8), torch.randn(9, 3, 8, 8)
    result = tcav(model, ["1", "3"], x, [0, 1], {"a": torch.randn(7, 3, 8, 8)}, random_sets)
    assert result.random_scores.isnan().sum() == 2 * 2 * 5
    torch.testing.assert_close(result.random_scores.nanmean(-1), result.null_scores, rtol=0, atol=1e-12)
    found = result.random_p_values(test)
    for place, concept in enumerate(random_sets):
        others = random_sets[:place] + random_sets[place + 1 :]
        alone = tcav(model, ["1", "3"], x, [0, 1], {"r": concept}, others, test=test, correction=None)
        torch.testing.assert_close(found[..., place], alone.p_values[..., 0], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="random_sets: expected at least 3"):
        tcav(model, "1", x, 0, {"a": torch.randn(7, 3, 8, 8)}, random_sets[:2]).random_p_values(test)


def test_activations_of_a_layer() -> None:
    model, images = cnn(), torch.randn(7, 3, 8, 8)
    outputs = outputs_of(model, "1", images)
    torch.testing.assert_close(activations(model, "1", images, batch_size=3), outputs.mean((2, 3)))
    torch.testing.assert_close(activations(model, model[1], Concept("a", images), pool="flatten"), outputs.flatten(1))
    assert not activations(model, "1", list(images)).requires_grad
    with pytest.raises(ValueError, match="layers: expected the name of a module of the model, got 'x'"):
        activations(model, "x", images)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        activations(3, "1", images)  # type: ignore[arg-type]
