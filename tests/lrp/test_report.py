"""details=True: what each operation keeps, relevance of layers and heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.attention.models import TEXT
from tests.lrp.models import PlainCNN, Transformer, bert, llama, mlp
from xai_fast import lrp


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_expected_losses_are_the_losses(eps: float) -> None:
    composite = lrp.Composite("test", linear=lrp.Epsilon(eps), convolution=lrp.Epsilon(eps))
    for model, x, target in (
        (Transformer().double().eval(), torch.randn(2, 5, 8).double(), (0, 3)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)).double(), None, 1),
        (bert("eager")[0].double(), bert("eager")[1], 1),
    ):
        x = torch.randn(2, 3, 4, 4).double() if x is None else x
        found = lrp.attribute(model, x, target, composite, details=True)
        known = [step for step in found.conservation if step.expected is not None]
        assert {"linear", "activation", "norm"} <= {step.kind for step in known}
        for step in known:
            assert step.expected is not None
            assert step.loss == pytest.approx(sum(step.expected.values()), rel=1e-5, abs=1e-7), str(step)


def test_losses_add_up_to_what_is_missing() -> None:
    model, inputs = bert("eager")
    found = lrp.attribute(model.double(), inputs, 1, details=True)
    missing = found.score.sum().item() - found.relevance["input_ids"].sum().item()
    assert missing == pytest.approx(sum(step.loss for step in found.conservation), rel=1e-5)
    reasons = {reason for step in found.conservation for reason in step.expected or {}}
    assert reasons == {"bias", "constant", "softmax"}


def test_details_change_nothing() -> None:
    for rule in lrp.COMPOSITES:
        for model, x, target in (
            (PlainCNN().double().eval(), torch.randn(2, 3, 8, 8).double(), 1),
            (Transformer().double().eval(), torch.randn(2, 5, 8).double(), (0, 3)),
        ):
            found = lrp.attribute(model, x, target, rule, details=True)
            torch.testing.assert_close(found.relevance, lrp.attribute(model, x, target, rule))
            torch.testing.assert_close(
                found.score, model(x)[(slice(None), *(target if isinstance(target, tuple) else (target,)))]
            )


def test_layers() -> None:
    model, x = mlp().double(), torch.randn(4, 6).double()
    found = lrp.attribute(model, x, 1, details=True)
    assert set(found.layers) == {"", "0", "1", "2", "3", "4"}
    torch.testing.assert_close(found.layers[""], F.one_hot(torch.tensor(1), 3) * model(x))
    torch.testing.assert_close(found.layers["3"], found.layers["2"])
    hidden = model[:4](x).detach()
    torch.testing.assert_close(found.layers["3"], hidden * model[4].weight[1])
    assert not any(layer.requires_grad for layer in found.layers.values())


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_heads(kind: str) -> None:
    model, inputs = llama(kind)
    found = lrp.attribute(model, inputs["input_ids"], (-1, 3), details=True)
    assert {name: tuple(heads.shape) for name, heads in found.heads.items()} == {
        f"model.layers.{i}.self_attn": (3, 4, 9) for i in range(2)
    }
    # Of the last layer only the last token is read.
    last = found.heads["model.layers.1.self_attn"]
    assert not last[..., :-1].any()
    assert last[..., -1].any()
    steps = {step.module: step for step in found.conservation if step.kind == "linear"}
    arrived = steps["model.layers.1.self_attn.o_proj"].relevance_in
    assert last.sum().item() == pytest.approx(arrived, rel=1e-4)


class NewGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_modules_that_are_one_function() -> None:
    """A module with the identity rule: one operation, and a layer like the others."""
    native, written = (nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 3)).double() for act in (nn.GELU("tanh"), NewGELU()))
    written.load_state_dict(native.state_dict())
    x, composite = torch.randn(4, 6).double(), lrp.Composite("test", layers={NewGELU: lrp.Identity()})
    wanted, found = lrp.attribute(native, x, 1, details=True), lrp.attribute(written, x, 1, composite, details=True)
    torch.testing.assert_close(found.relevance, wanted.relevance)
    assert list(found.layers) == list(wanted.layers)
    for name, layer in wanted.layers.items():
        torch.testing.assert_close(found.layers[name], layer)
    assert [(step.kind, step.module) for step in found.conservation] == [
        ("linear", "0"),
        ("activation", "1"),
        ("linear", "2"),
    ]
    for step, other in zip(found.conservation, wanted.conservation, strict=True):
        assert step.relevance_out == pytest.approx(other.relevance_out)
        assert step.relevance_in == pytest.approx(other.relevance_in)
    assert found.conservation[1].expected == {}


def test_heads_of_attention_with_three_dimensions() -> None:
    """torch's attention with need_weights folds heads into samples; without it does not."""
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(3, 5, 8).double()

    class Model(nn.Module):
        def __init__(self, need_weights: bool) -> None:
            super().__init__()
            self.attention, self.need_weights = attention, need_weights

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=self.need_weights)[0]

    for rule in ("attnlrp", "cp-lrp"):
        wanted, found = (lrp.attribute(Model(need), x, (0, 3), rule, details=True).heads for need in (False, True))
        assert list(found) == ["attention"]
        assert found["attention"].shape == (3, 2, 5)
        torch.testing.assert_close(found["attention"], wanted["attention"])


def test_heads_of_deberta() -> None:
    t = pytest.importorskip("transformers")
    config = t.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, max_position_embeddings=32
    )
    model, ids = t.DebertaV2Model(config).eval(), torch.randint(0, 50, (3, 9))
    found = lrp.attribute(model, ids, lambda out: out.last_hidden_state[:, 0, 0], details=True)
    assert {tuple(heads.shape) for heads in found.heads.values()} == {(3, 4, 9)}
    assert len(found.heads) == 2


def test_table() -> None:
    found = lrp.attribute(mlp(), torch.randn(2, 6), 1, details=True)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.conservation)
    assert lines[0].split() == ["operation", "out", "in", "loss", "expected", "module"]
    assert lines[-1].startswith("score ")
