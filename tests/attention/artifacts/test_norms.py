"""Norms of tokens: against the hidden states that models give themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.attention.artifacts import models
from tests.models.dinov2 import load_dinov2
from tests.peers.locate import run_with_peers
from xai_fast.attention.artifacts import TokenNorms, token_norms

HUGGING_FACE = {f.__name__: f for f in (models.dinov2, models.with_registers, models.vit, models.classifier, models.bert)}


def _states(model: nn.Module, inputs: Any) -> tuple[torch.Tensor, ...]:
    named = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
    with torch.no_grad():
        return model(**named, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name: str) -> None:
    model, inputs = HUGGING_FACE[name]()
    states = _states(model, inputs)
    # Hugging Face models have hooks of their own.
    hooks = models.hooks_on(model)
    found = token_norms(model, inputs)
    assert isinstance(found, TokenNorms)
    assert found.hidden is None
    assert len(found.layers) == len(states) - 1 == len(found.norms)
    torch.testing.assert_close(found.norms, torch.stack([s.square().sum(-1).sqrt() for s in states[1:]]))
    torch.testing.assert_close(token_norms(states)[1:], found.norms, rtol=0, atol=0)
    assert models.hooks_on(model) == hooks


def test_norms_are_those_before_the_final_normalisation() -> None:
    model, images = models.dinov2()
    with torch.no_grad():
        final = model(images).last_hidden_state.norm(dim=-1)
    # The final layer norm has weight 1: all norms become the root of the width.
    torch.testing.assert_close(final, torch.full((2, 17), 32**0.5), rtol=1e-2, atol=0)
    assert float(token_norms(model, images).norms[-1].std()) > 0
    assert not torch.allclose(token_norms(model, images).norms[-1], final, rtol=0.1)


def test_a_planted_outlier_is_seen_from_its_block_on() -> None:
    model, images = models.dinov2()
    block = model.encoder.layer[1]

    def plant(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1, 6] += 100
        return output

    hook = block.register_forward_hook(plant)
    norms = token_norms(model, images).norms
    hook.remove()
    large = (norms > 100).nonzero().tolist()
    assert large == [[1, 1, 6], [2, 1, 6]]


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoder(batch_first: bool) -> None:
    model = models.encoder(batch_first)
    x = torch.randn(3, 5, 16)
    passed = x if batch_first else x.transpose(0, 1)
    found = token_norms(model, passed, keep_hidden=True)
    states, state = [], passed
    with torch.no_grad():
        for layer in model.layers:
            state = layer(state)
            states.append(state if batch_first else state.transpose(0, 1))
    assert found.norms.shape == (2, 3, 5)
    torch.testing.assert_close(found.norms, torch.stack(states).norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert found.hidden is not None
    for ours, theirs in zip(found.hidden, states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_torch_encoder_with_padding_that_would_be_nested() -> None:
    model, x = models.encoder(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    was = torch.backends.mha.get_fastpath_enabled()
    found = token_norms(model, {"src": x, "src_key_padding_mask": padding})
    alone = token_norms(model, x[1:, :3])
    torch.testing.assert_close(found.norms[:, 1:, :3], alone.norms, rtol=1e-4, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled() == was


def test_timm() -> None:
    found = run_with_peers("tests.attention.artifacts.timm_vit", "timm")
    assert found["layers"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found["difference"] < 1e-6
    # Pooled over patches without the registers, which are gone from the features.
    assert found["shape"] == [2, 5]
    assert found["tokens"] == 17
    assert found["neurons"] == 4
    assert found["changed"]
    assert found["restored"]


@pytest.mark.parametrize("make", [lambda x: x, lambda x: list(x), lambda x: tuple(np.asarray(s) for s in x), np.asarray])
def test_hidden_states_in_every_form(make: Callable[[torch.Tensor], Any]) -> None:
    states = torch.randn(4, 2, 3, 5)
    torch.testing.assert_close(token_norms(make(states)), states.norm(dim=-1))
    torch.testing.assert_close(token_norms(states[0]), states[0].norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_added_in_float32(dtype: torch.dtype) -> None:
    state = torch.full((1, 1, 4096), 200.0, dtype=dtype)
    found = token_norms(state)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(200.0 * 64, rel=1e-6)


def test_bfloat16_model() -> None:
    model, images = models.vit()
    model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
    wanted = torch.stack(_states(model, images)[1:]).float().norm(dim=-1)
    torch.testing.assert_close(token_norms(model, images).norms, wanted)


def test_choice_of_layers() -> None:
    model, images = models.dinov2()
    norms = token_norms(model, images).norms
    last = token_norms(model, images, layers=[-1, 0])
    assert last.layers == ("encoder.layer.2", "encoder.layer.0")
    assert torch.equal(last.norms, norms[[2, 0]])
    assert torch.equal(token_norms(model, images, layers=slice(1, None)).norms, norms[1:])
    assert torch.equal(token_norms(model, images, layers="encoder.layer").norms, norms)
    assert torch.equal(token_norms(model, images, layers=model.encoder.layer).norms, norms)
    assert torch.equal(token_norms(model, images, layers=["encoder.layer.1"]).norms, norms[1:2])
    assert torch.equal(token_norms(model, images, layers=[model.encoder.layer[1]]).norms, norms[1:2])
    # Of any module that gives hidden states.
    inside = token_norms(model, images, layers=["encoder.layer.0.mlp"])
    assert inside.norms.shape == (1, 2, 17)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_a_model_that_begins_in_place_leaves_the_inputs(form: Callable[[torch.Tensor], Any]) -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)
    before = x.clone()
    token_norms(nn.Sequential(nn.ReLU(inplace=True), block).eval(), form(x), layers=["1"])
    assert torch.equal(x, before)


def test_hooks_are_removed_after_an_exception() -> None:
    model = models.encoder()
    was = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises((RuntimeError, AssertionError)):
        token_norms(model, torch.randn(2, 5, 3))
    assert models.hooks_on(model) == 0
    assert torch.backends.mha.get_fastpath_enabled() == was


def test_compiled_models_are_seen() -> None:
    model, x = models.encoder(), torch.randn(2, 5, 16)
    wanted = token_norms(model, x).norms
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    assert torch.equal(token_norms(compiled, x).norms, wanted)


def test_model_is_left_as_it_was() -> None:
    model, images = models.dinov2()
    with torch.no_grad():
        before = model(images).last_hidden_state
    found = token_norms(model.train(), images.requires_grad_())
    assert model.training
    assert not found.norms.requires_grad
    with torch.no_grad():
        assert torch.equal(model.eval()(images).last_hidden_state, before)


class _TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        self.first.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.second.layers = nn.ModuleList([nn.Linear(4, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second.layers[0](self.first.layers[0](x))


def test_errors() -> None:
    model, x = _TwoStacks(), torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match=r"found several \('first.layers', 'second.layers'\)"):
        token_norms(model, x)
    assert token_norms(model, x, layers="first.layers").norms.shape == (1, 1, 3)
    with pytest.raises(ValueError, match="found none"):
        token_norms(nn.Linear(4, 4), x)
    with pytest.raises(ValueError, match="path of a module of the model, got 'third'"):
        token_norms(model, x, layers="third")
    with pytest.raises(ValueError, match="a Linear that is not part of it"):
        token_norms(model, x, layers=[nn.Linear(4, 4)])
    with pytest.raises(ValueError, match=r"returned shape \(3, 4\)"):
        token_norms(model, x[0], layers="first.layers")
    model.third = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'third' was not run"):
        token_norms(model, x, layers=["third"])
    with pytest.raises(TypeError, match="inputs: expected inputs"):
        token_norms(model)
    with pytest.raises(TypeError, match="they are for models"):
        token_norms(x, x)
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        token_norms(())
    with pytest.raises(ValueError, match=r"got shape \(3, 4\)"):
        token_norms(x[0])
    with pytest.raises(ValueError, match=r"hidden_states\[1\]: expected batch and tokens \(1, 3\)"):
        token_norms([x, x[:, :2]])
    with pytest.raises(TypeError, match=r"torch\.int64"):
        token_norms(torch.ones(1, 2, 3, dtype=torch.long))


def test_real_dinov2() -> None:
    model, images = load_dinov2(), torch.randn(1, 3, 112, 112)
    found = token_norms(model, images)
    torch.testing.assert_close(found.norms, torch.stack(_states(model, images)[1:]).norm(dim=-1), rtol=1e-5, atol=0)
    assert found.norms.shape == (12, 1, 65)


def test_hidden_states_that_need_a_closer_look() -> None:
    states = torch.randn(2, 3, 4)
    for same in (states.numpy()[..., ::-1], states.numpy().astype(">f4")):
        torch.testing.assert_close(token_norms(same), states.norm(dim=-1))
    for empty, name in ((torch.zeros(2, 3, 0), "hidden_states"), ([torch.zeros(2, 3, 0)], r"hidden_states\[0\]")):
        with pytest.raises(ValueError, match=f"^{name}: expected .*D of at least 1, got"):
            token_norms(empty)
