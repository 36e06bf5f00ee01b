"""lrp.attribute: models, inputs, targets, what it leaves alone and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.lrp.models import PlainCNN, Transformer, bert, llama, mlp, vision
from xai_fast import lrp

NAMES = list(lrp.COMPOSITES)


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a call could leave behind on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (type(m), m.training, sorted(m.__dict__), [len(getattr(m, name)) for name in hooks]) for m in model.modules()
    ] + [
        [
            (name, p.requires_grad, p.grad, p.clone().tolist())
            for name, p in (*model.named_parameters(), *model.named_buffers())
        ],
        torch._C._len_torch_function_stack(),
        torch.is_grad_enabled(),
    ]


@contextmanager
def leaves_nothing(model: nn.Module) -> Iterator[None]:
    next(model.parameters()).requires_grad_(False)
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# Models

MODELS: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "mlp": lambda: (mlp(), torch.randn(3, 6), None),
    "cnn": lambda: (PlainCNN().eval(), torch.randn(2, 3, 12, 12), 1),
    "transformer": lambda: (Transformer().eval(), torch.randn(2, 5, 8), (0, 3)),
    "torch.nn": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8), (0, 3)),
    "dinov2": lambda: (*vision("dinov2"), 3),
    "vit": lambda: (*vision("vit"), 3),
    "vit eager": lambda: (*vision("vit", "eager"), 3),
    "bert": lambda: (*bert(), None),
    "bert eager": lambda: (*bert("eager"), None),
    "llama": lambda: (*llama(), (-1, 3)),
    "llama eager": lambda: (*llama("eager"), (-1, 3)),
}


def the_tensor(relevance: Any) -> Tensor:
    return relevance if isinstance(relevance, Tensor) else next(iter(relevance.values()))


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_composite_on_every_model(name: str, rule: str) -> None:
    model, inputs, target = MODELS[name]()
    with leaves_nothing(model):
        found = lrp.attribute(model, inputs, target, rule)
    relevance = the_tensor(found)
    given = the_tensor(inputs)
    assert relevance.shape == (given.shape if given.is_floating_point() else (*given.shape, 32))
    assert relevance.isfinite().all()
    assert relevance.dtype == torch.float32
    assert relevance.any()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_plain_model(name: str) -> None:
    model, inputs, target = MODELS[name]()
    model.requires_grad_(False)
    kwargs = inputs if isinstance(inputs, dict) else {}
    args = () if isinstance(inputs, dict) else (inputs,)
    # torch.nn takes other kernels where no gradient is asked for.
    with torch.enable_grad():
        plain = model(*(x.clone().requires_grad_() for x in args), **kwargs)
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda _, __, output: seen.append(output))
    for rule in NAMES:
        lrp.attribute(model, inputs, target, rule)
    handle.remove()
    assert len(seen) == len(NAMES)
    for output in seen:
        assert torch.equal(*(y if isinstance(y, Tensor) else y.logits for y in (output, plain)))


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
@pytest.mark.parametrize("rule", ["attnlrp", "cp-lrp"])
def test_fused_and_written_attention_agree(name: str, rule: str) -> None:
    maps = []
    for kind in ("", " eager"):
        torch.manual_seed(0)
        model, inputs, target = MODELS[name + kind]()
        maps.append(the_tensor(lrp.attribute(model.double(), to_double(inputs), target if target is not None else 1, rule)))
    # Both compute some steps in single precision.
    assert difference(*maps) < 1e-5


def to_double(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    return {name: to_double(value) for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["cnn", "transformer", "bert", "llama"])
@pytest.mark.parametrize("rule", ["attnlrp", "gamma"])
def test_samples_do_not_mix(name: str, rule: str) -> None:
    model, inputs, target = MODELS[name]()
    model, inputs, target = model.double(), to_double(inputs), 1 if target is None else target
    together = the_tensor(lrp.attribute(model, inputs, target, rule))
    for i in range(len(together)):
        alone = {k: v[i : i + 1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[i : i + 1]
        assert difference(the_tensor(lrp.attribute(model, alone, target, rule)), together[i : i + 1]) < 1e-9


def test_without_biases_everything_arrives() -> None:
    model, x = Transformer(bias=False).double().eval(), torch.randn(2, 5, 8).double()
    for inputs, network, target, rule in (
        (x, model, (0, 3), "cp-lrp"),
        (torch.randn(3, 6).double(), mlp(bias=False).double(), 1, "attnlrp"),
        (llama()[1]["input_ids"], llama()[0].double(), (-1, 3), "cp-lrp"),
    ):
        found = lrp.attribute(network, inputs, target, rule, details=True)
        torch.testing.assert_close(found.relevance.flatten(1).sum(1), found.score, rtol=1e-6, atol=1e-9)


def test_attnlrp_is_the_gradient_where_only_linear_steps_are() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.randn(4, 6)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    torch.testing.assert_close(lrp.attribute(model, x, 2), x * gradient)


@pytest.mark.parametrize("rule", ["attnlrp", "gamma", "cp-lrp"])
def test_gradient_checkpointing(rule: str) -> None:
    model, x = Transformer().double().eval(), torch.randn(2, 5, 8).double()
    wanted = lrp.attribute(model, x, (0, 3), rule, details=True)
    found = lrp.attribute(_Checkpointed(model, False), x, (0, 3), rule, details=True)
    torch.testing.assert_close(found.relevance, wanted.relevance)
    assert list(map(str, found.conservation)) != []
    with pytest.raises(ValueError, match=r"got CheckpointFunctionBackward in module"):
        lrp.attribute(nn.Sequential(_Checkpointed(model, True)), x, (0, 3), rule)


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def test_checkpointed_hugging_face_model() -> None:
    model, inputs = llama()
    wanted = lrp.attribute(model, inputs["input_ids"], (-1, 3))
    model.gradient_checkpointing_enable()
    model.train()
    with leaves_nothing(model):
        found = lrp.attribute(model, inputs["input_ids"], (-1, 3))
    torch.testing.assert_close(found, wanted)


def test_compiled_model_runs_uncompiled() -> None:
    model, x = mlp(), torch.randn(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model)
        torch.testing.assert_close(lrp.attribute(compiled, x, 1), lrp.attribute(model, x, 1))


def test_sixteen_bit() -> None:
    model, x = Transformer().eval(), torch.randn(2, 5, 8)
    wanted = lrp.attribute(model, x, (0, 3))
    found = lrp.attribute(model.bfloat16(), x.bfloat16(), (0, 3))
    assert found.dtype == torch.bfloat16
    assert difference(found.float(), wanted) < 0.1


# Inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a: Tensor, b: Tensor, offset: float = 0.0, keep: Tensor | None = None) -> Tensor:
        y = self.a(a) + self.b(b) + offset
        return y if keep is None else y * keep


def test_forms_of_inputs() -> None:
    model, a, b = Two(), torch.randn(5, 4), torch.randn(5, 2)
    as_tuple = lrp.attribute(model, (a, b), 1)
    as_dict = lrp.attribute(model, {"a": a, "b": b, "offset": 2.0}, 1)
    assert list(as_dict) == ["a", "b"]
    one = lrp.attribute(model, a, 1, additional_forward_args=(b, 2.0))
    named = lrp.attribute(model, a, 1, additional_forward_args={"b": b, "keep": torch.ones(5, 1, dtype=torch.bool)})
    for found in (as_tuple[0], as_dict["a"], one, named):
        torch.testing.assert_close(found, a * model.a.weight[1])
    torch.testing.assert_close(as_tuple[1], b * model.b.weight[1])


def test_token_ids_and_their_embeddings() -> None:
    model, inputs = bert()
    embeddings = model.bert.embeddings.word_embeddings(inputs["input_ids"]).detach()
    more = {"attention_mask": inputs["attention_mask"]}
    wanted = lrp.attribute(model, {"inputs_embeds": embeddings, **more}, 1)["inputs_embeds"]
    found = lrp.attribute(model, inputs, 1)
    assert list(found) == ["input_ids"]
    torch.testing.assert_close(found["input_ids"], wanted)
    torch.testing.assert_close(lrp.attribute(model, inputs["input_ids"], 1, additional_forward_args=more), wanted)
    pair = lrp.attribute(model, (inputs["input_ids"], inputs["attention_mask"]), 1)
    torch.testing.assert_close(pair[0], wanted)
    assert pair[1] is None


def test_inputs_are_not_modified() -> None:
    x = torch.randn(2, 3).requires_grad_()
    before = x.detach().clone()
    found = lrp.attribute(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1)), x)
    assert torch.equal(x, before)
    assert x.grad is None
    assert not found.requires_grad


def test_no_grad_and_inference_mode_around_it() -> None:
    model, x = mlp(), torch.randn(2, 6)
    wanted = lrp.attribute(model, x, 1)
    with torch.no_grad():
        torch.testing.assert_close(lrp.attribute(model, x, 1), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(lrp.attribute(model, x + 0, 1), wanted)


# Targets


def test_targets() -> None:
    model, x = Transformer().eval(), torch.randn(3, 5, 8)
    rows = [lrp.attribute(model, x[i : i + 1], (i, 2 * i))[0] for i in range(3)]
    wanted = torch.stack(rows)
    per_sample: list[Any] = [
        [(0, 0), (1, 2), (2, 4)],
        torch.tensor([[0, 0], [1, 2], [2, 4]]),
        lambda y: torch.stack([y[i, i, 2 * i] for i in range(3)]),
    ]
    for target in per_sample:
        torch.testing.assert_close(lrp.attribute(model, x, target), wanted)

    flat, x = mlp(), torch.randn(3, 6)
    predicted = flat(x).argmax(1)
    for target in (predicted, predicted.tolist(), predicted - 3, lambda y: y.max(1).values):
        torch.testing.assert_close(lrp.attribute(flat, x, target), lrp.attribute(flat, x))
    single = nn.Sequential(nn.Linear(6, 1))
    torch.testing.assert_close(lrp.attribute(single, x), lrp.attribute(nn.Sequential(single, nn.Flatten(0)), x))


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class ReluBackward(torch.autograd.Function):
    """Named so as to look native."""

    forward = staticmethod(lambda ctx, x: x.exp())
    backward = staticmethod(lambda ctx, g: g)


class Step(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


UNKNOWN = {
    "ExpBackward0": torch.exp,
    "_ExpBackward": _Exp.apply,
    "ReluBackwardBackward": ReluBackward.apply,
    "SinBackward0": torch.sin,
    "MulBackward0": lambda x: torch.ops.aten.mul(x, x),
    "AddcmulBackward0": lambda x: torch.addcmul(x, x, x),
    "DivBackward0": lambda x: torch.ops.aten.div(1.0 + x, x),
    "CumprodBackward0": lambda x: x.cumprod(1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operations_without_a_rule(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Step(UNKNOWN[name]), nn.Linear(6, 3))
    x = torch.randn(2, 6)
    with (
        leaves_nothing(model),
        pytest.raises(ValueError, match=rf"^model: .* got {name} in module '1'; fallback='gradient'"),
    ):
        lrp.attribute(model, x, 1)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    if name != "MulBackward0":
        torch.testing.assert_close(lrp.attribute(model, x, 1, fallback="gradient"), x * gradient)


class Between(nn.Module):
    """An operation between two layers, of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=torch.exp(self.first(x)))


def test_the_module_of_an_operation_without_a_rule() -> None:
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match=r" got ExpBackward0; fallback="):
        lrp.attribute(Between(), x, 1)
    with pytest.raises(ValueError, match=r" got ExpBackward0 in module '1'; "):
        lrp.attribute(nn.Sequential(nn.Linear(6, 6), Between(), nn.ReLU()), x, 1)
    with pytest.raises(ValueError, match=r" got ExpBackward0; fallback="):
        lrp.attribute(mlp(), x, lambda y: y.exp()[:, 0])


def test_lstm_is_refused() -> None:
    model = nn.LSTM(4, 3, batch_first=True)
    with pytest.raises(ValueError, match=r"^model: expected operations with a rule"):
        lrp.attribute(model, torch.randn(2, 5, 4), lambda out: out[0][:, -1, 0])


class Plain(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.output = nn.Linear(6, 3), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.linear(x.to(self.linear.weight.dtype)))


X = torch.ones(2, 6)
BAD: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    ("^model: expected a torch.nn.Module, got str", TypeError, lambda: lrp.attribute("x", X)),  # type: ignore[call-overload]
    ("^rule: expected one of attnlrp", ValueError, lambda: lrp.attribute(mlp(), X, rule="lrp")),
    ("^rule: expected a name", TypeError, lambda: lrp.attribute(mlp(), X, rule=3)),  # type: ignore[call-overload]
    ("^rule: expected a rule for linear", ValueError, lambda: lrp.attribute(mlp(), X, rule=lrp.Norm())),
    ("^fallback: ", ValueError, lambda: lrp.attribute(mlp(), X, fallback="no")),  # type: ignore[call-overload]
    ("^inputs: expected a tensor", TypeError, lambda: lrp.attribute(mlp(), [1.0])),
    ("^inputs: expected real|^inputs: expected floating", TypeError, lambda: lrp.attribute(mlp(), X.to(torch.complex64))),
    ("^inputs: expected floating", TypeError, lambda: lrp.attribute(mlp(), X.bool())),
    ("^inputs: expected at least one sample", ValueError, lambda: lrp.attribute(mlp(), X[:0])),
    ("^inputs: expected at least one sample", ValueError, lambda: lrp.attribute(mlp(), torch.tensor(1.0))),
    ("^inputs: expected a floating-point tensor or token ids", ValueError, lambda: lrp.attribute(mlp(), {"a": 3})),
    ("^inputs: expected one batch size", ValueError, lambda: lrp.attribute(Two(), (torch.ones(2, 4), torch.ones(3, 2)))),
    ("^inputs: expected token ids that", ValueError, lambda: lrp.attribute(Plain(lambda y: y), X.long())),
    ("^target: expected indices below", ValueError, lambda: lrp.attribute(mlp(), X, 3)),
    ("^target: expected indices below", ValueError, lambda: lrp.attribute(mlp(), X, -4)),
    ("^target: expected 2 targets", ValueError, lambda: lrp.attribute(mlp(), X, [0, 1, 2])),
    ("^target: expected 2 targets", ValueError, lambda: lrp.attribute(mlp(), X, torch.tensor([0, 1, 2]))),
    ("^target: expected integers, got torch.float32", TypeError, lambda: lrp.attribute(mlp(), X, torch.ones(2))),
    ("^target: expected None, an int", TypeError, lambda: lrp.attribute(mlp(), X, "cat")),
    ("^target: expected ints", TypeError, lambda: lrp.attribute(mlp(), X, ["a", "b"])),
    ("^target: expected a tuple of 2 indices", ValueError, lambda: lrp.attribute(Transformer(), torch.ones(2, 5, 8))),
    ("^target: expected a tuple of 2 indices", ValueError, lambda: lrp.attribute(Transformer(), torch.ones(2, 5, 8), 1)),
    ("^target: expected a tuple of 1 indices", ValueError, lambda: lrp.attribute(mlp(), X, (0, 1))),
    (r"^target: expected scores of shape \(2,\)", ValueError, lambda: lrp.attribute(mlp(), X, lambda y: y)),
    ("^target: expected a function", TypeError, lambda: lrp.attribute(mlp(), X, lambda y: 1.0)),
    ("^target: expected real", TypeError, lambda: lrp.attribute(mlp(), X, lambda y: y[:, 0].to(torch.complex64))),
    ("^target: expected scores that depend", ValueError, lambda: lrp.attribute(mlp(), X, lambda y: y[:, 0].detach())),
    ("^model: expected an output that", TypeError, lambda: lrp.attribute(Plain(lambda y: "text"), X)),
    ("^model: expected an output with batch", ValueError, lambda: lrp.attribute(Plain(lambda y: y.sum()), X)),
    (
        "^model: .*Dropout '1' in training mode; call model.eval",
        ValueError,
        lambda: lrp.attribute(training(nn.Dropout()), X, 1),
    ),
    ("^model: .*BatchNorm1d '1' in training", ValueError, lambda: lrp.attribute(training(nn.BatchNorm1d(3)), X, 1)),
    (
        r"^model: expected batch norm with running statistics, got one .*track_running_stats=False\)$",
        ValueError,
        lambda: lrp.attribute(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(), X, 1),
    ),
    ("^model: .*dropout.*call model.eval", ValueError, lambda: lrp.attribute(Plain(lambda y: F.dropout(y, 0.5)), X, 1)),
]


def training(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3), module).train()


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_arguments(index: int) -> None:
    message, kind, call = BAD[index]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert torch._C._len_torch_function_stack() == 0


def test_an_exception_in_the_model_leaves_nothing() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    model = nn.Sequential(nn.Linear(6, 6), Step(fail))
    for details in (False, True):
        for rule in ("attnlrp", lrp.Composite("layers", layers={nn.Linear: lrp.ZPlus()})):
            with leaves_nothing(model), pytest.raises(RuntimeError, match="broken"):
                lrp.attribute(model, X, 1, rule, details=details)


def test_gradients_that_were_there_stay() -> None:
    model, x = mlp(), torch.randn(2, 6)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    lrp.attribute(model, x, 1, "gamma")
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.requires_grad for p in model.parameters())
