"""Registers for trained models: every activation recomputed by hand, on all samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xai_fast as xf
from tests.attention.artifacts import models
from tests.models.dinov2 import load_dinov2
from xai_fast.attention import artifacts
from xai_fast.attention.artifacts import RegisterNeuron, find_outliers, find_register_neurons, token_norms

NEURONS = ((0, 3), (0, 11), (1, 7))


def _moved(hidden: Tensor, layer: int, registers: int, neurons: Any = NEURONS) -> Tensor:
    """The definition, one sample and one neuron at a time."""
    moved = hidden.clone()
    tokens = hidden.shape[1] - registers
    for sample in range(len(hidden)):
        for _, neuron in (entry for entry in neurons if entry[0] == layer):
            largest = max(float(x) for x in hidden[sample, :tokens, neuron])
            moved[sample, :tokens, neuron] = 0
            moved[sample, tokens:, neuron] = largest
    return moved


def _dinov2_by_hand(model: Any, images: Tensor, registers: int) -> Tensor:
    h = model.embeddings(images)
    h = torch.cat([h, torch.zeros(len(h), registers, h.shape[2])], 1)
    for number, layer in enumerate(model.encoder.layer):
        h = h + layer.layer_scale1(layer.attention(layer.norm1(h))[0])
        neurons = layer.mlp.activation_fn(layer.mlp.fc1(layer.norm2(h)))
        h = h + layer.layer_scale2(layer.mlp.fc2(_moved(neurons, number, registers)))
    return model.layernorm(h)


def _torch_by_hand(model: Any, x: Tensor, registers: int) -> Tensor:
    h = torch.cat([x, torch.zeros(len(x), registers, x.shape[2])], 1)
    for number, layer in enumerate(model.layers):
        h = layer.norm1(h + layer.self_attn(h, h, h, need_weights=False)[0])
        h = layer.norm2(h + layer.linear2(_moved(F.relu(layer.linear1(h)), number, registers)))
    return model.norm(h)


@pytest.mark.parametrize("registers", [0, 1, 3])
@torch.no_grad()
def test_dinov2_by_hand(registers: int) -> None:
    model, images = models.dinov2()
    wanted = _dinov2_by_hand(model, images, registers)
    plain = model(images).last_hidden_state
    hooks = models.hooks_on(model)
    with artifacts.test_time_registers(model, neurons=NEURONS, n_registers=registers) as chosen:
        found = model(images)
        kept = models.hooks_on(model)
    torch.testing.assert_close(found.last_hidden_state, wanted[:, :17], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, wanted[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.last_hidden_state, plain, rtol=1e-4, atol=1e-5)
    assert [neuron[:2] for neuron in chosen] == list(NEURONS)
    assert kept > hooks == models.hooks_on(model)
    assert torch.equal(model(images).last_hidden_state, plain)
    with artifacts.test_time_registers(model, neurons=NEURONS, n_registers=registers, keep_registers=True):
        found = model(images)
    torch.testing.assert_close(found.last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_torch_encoder_by_hand(batch_first: bool) -> None:
    model, x = models.encoder(batch_first), torch.randn(3, 5, 16)
    by_hand = models.encoder()
    by_hand.load_state_dict(model.state_dict())
    wanted = _torch_by_hand(by_hand, x, 2)
    for keep in (False, True):
        with artifacts.test_time_registers(model, neurons=NEURONS, n_registers=2, keep_registers=keep):
            found = model(x if batch_first else x.transpose(0, 1))
        found = found if batch_first else found.transpose(0, 1)
        torch.testing.assert_close(found, wanted if keep else wanted[:, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [models.dinov2, models.vit, models.with_registers, models.classifier])
@torch.no_grad()
def test_every_sample_as_if_alone(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, images = build()
    with artifacts.test_time_registers(model, neurons=NEURONS, n_registers=2):
        together = model(images)[0]
        alone = [model(image[None])[0] for image in images]
    plain = model(images)[0]
    assert together.shape == plain.shape
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, plain)


@pytest.mark.parametrize("neurons", [None, []])
@torch.no_grad()
def test_identity_without_neurons(neurons: Any) -> None:
    model, images = models.dinov2()
    plain = model(images).last_hidden_state
    with artifacts.test_time_registers(model, neurons=neurons, n_registers=4) as chosen:
        assert chosen == ()
        assert torch.equal(model(images).last_hidden_state, plain)


@torch.no_grad()
def test_attention_inside_has_the_registers_last() -> None:
    model, images = models.dinov2()
    with artifacts.test_time_registers(model, neurons=NEURONS, n_registers=2), xf.capture_attention(model) as record:
        states = model(images, output_hidden_states=True).hidden_states
    assert all(layer.shape == (2, 4, 19, 19) for layer in record.layers)
    assert record.rollout().shape == (2, 19)
    assert states[1].shape == (2, 19, 32)


def test_gradients_pass() -> None:
    model, images = models.dinov2()
    images.requires_grad_()
    with artifacts.test_time_registers(model, neurons=NEURONS):
        model(images).last_hidden_state.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    wanted = torch.autograd.grad(_dinov2_differentiable(model, images).square().sum(), images)[0]
    torch.testing.assert_close(images.grad, wanted, rtol=1e-3, atol=1e-5)


def _dinov2_differentiable(model: Any, images: Tensor) -> Tensor:
    h = model.embeddings(images)
    h = torch.cat([h, torch.zeros(len(h), 1, h.shape[2])], 1)
    for number, layer in enumerate(model.encoder.layer):
        h = h + layer.layer_scale1(layer.attention(layer.norm1(h))[0])
        neurons = layer.mlp.activation_fn(layer.mlp.fc1(layer.norm2(h)))
        places = [neuron for place, neuron in NEURONS if place == number]
        mask = torch.zeros(neurons.shape[-1]).index_fill(0, torch.tensor(places, dtype=torch.long), 1)
        largest = torch.cat([torch.zeros_like(neurons[:, :-1]), neurons[:, :-1].amax(1, keepdim=True)], 1)
        h = h + layer.layer_scale2(layer.mlp.fc2(neurons * (1 - mask) + largest * mask))
    return model.layernorm(h)[:, :-1]


# Which neurons


@torch.no_grad()
def test_scores_by_hand() -> None:
    model, images = models.dinov2()
    mask = torch.rand(2, 17) > 0.7
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.activation_fn.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.encoder.layer
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    scores = torch.stack([activations[mask].abs().mean(0) for activations in seen])
    before = models.hooks_on(model)
    found = find_register_neurons(model, images, mask, top=7)
    assert models.hooks_on(model) == before
    wanted = scores.flatten().sort(descending=True)
    assert [(n.layer, n.neuron) for n in found] == [divmod(int(i), 128) for i in wanted.indices[:7]]
    torch.testing.assert_close(torch.tensor([n.score for n in found]), wanted.values[:7])
    only = find_register_neurons(model, images, mask, top=7, layers=[-1])
    assert {n.layer for n in only} == {2}
    assert [n.neuron for n in only] == scores[2].argsort(descending=True)[:7].tolist()
    assert find_register_neurons(model, images, mask, top=7, layers=slice(2, 3)) == only
    assert find_register_neurons(model, images, mask.expand(3, -1, -1), top=7) == found


def _planted() -> tuple[Any, Tensor, RegisterNeuron]:
    """A model in which one neuron makes every outlier: it fires at one patch and writes a large vector."""
    model, _ = models.vit()
    images = 0.01 * torch.randn(3, 3, 28, 28)
    # One patch of each image differs, each at another place.
    for sample, patch in enumerate((2, 9, 13)):
        row, column = divmod(patch, 4)
        images[sample, :, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] = 3.0
    mlp = model.layers[1].mlp
    with torch.no_grad():
        states = token_norms(model, images, layers=["layers.1.layernorm_after"], keep_hidden=True).hidden[0]
        special = torch.stack([states[i, 1 + p] for i, p in enumerate((2, 9, 13))]).mean(0)
        others = states.flatten(0, 1).mean(0)
        direction = special - others
        mlp.fc1.weight[5] = 10 * direction / direction.norm()
        mlp.fc1.bias[5] = -mlp.fc1.weight[5] @ (special + others) / 2
        mlp.fc2.weight[:, 5] = 50 * F.normalize(torch.randn(32), dim=0)
    return model, images, RegisterNeuron(1, 5)


@torch.no_grad()
def test_a_planted_neuron_is_found_and_its_outliers_go() -> None:
    model, images, planted = _planted()
    norms = token_norms(model, images).norms
    outliers = find_outliers(norms, ignore_tokens=0)
    assert outliers.mask[1:].nonzero()[:, 1:].tolist() == [[0, 3], [1, 10], [2, 14]] * 2
    assert float(norms[1, 0, 3]) > 10 * float(norms[0].max())
    (found,) = find_register_neurons(model, images, outliers, top=1)
    assert found[:2] == planted[:2]
    # By default the outliers are looked for, and the neurons.
    assert find_register_neurons(model, images, top=1) == [found]
    with artifacts.test_time_registers(model, images, top=1, keep_registers=True) as chosen:
        assert chosen == (found,)
        after = token_norms(model, images).norms
    assert float(after[1, :, :-1].max()) < float(norms[1].max()) / 10
    # What made the patches outliers makes the registers outliers.
    assert (after[1, :, 17] > 5 * after[1, :, :17].amax(1)).all()


# Finding the layer


class _OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.wide(x))) + x.mean(1, keepdim=True)


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([_OwnBlock(), _OwnBlock()])

    def forward(self, tokens: Tensor) -> Tensor:
        for step in self.steps:
            tokens = step(tokens)
        return tokens


@torch.no_grad()
def test_own_modules_by_name() -> None:
    model, x = _Own(), torch.randn(2, 4, 6)
    mask = torch.arange(4).expand(2, -1) == 1
    by_name = find_register_neurons(model, x, mask, top=3, blocks="steps", mlp="narrow")
    # The only layer that narrows what another widened.
    assert find_register_neurons(model, x, mask, top=3, blocks=model.steps) == by_name
    with artifacts.test_time_registers(model, neurons=by_name, blocks="steps"):
        assert model(x).shape == x.shape
    with pytest.raises(ValueError, match="found none"):
        find_register_neurons(model, x, mask)
    with pytest.raises(ValueError, match="mlp: expected the path of a module"):
        find_register_neurons(model, x, mask, blocks="steps", mlp="last")
    model.steps[0].more = nn.Linear(12, 6)
    with pytest.raises(ValueError, match="mlp: found 2 layers"):
        find_register_neurons(model, x, mask, blocks="steps")


@torch.no_grad()
def test_gated_mlp() -> None:
    t = pytest.importorskip("transformers")
    model = t.Dinov2Model(t.Dinov2Config(**models.SHAPE, use_swiglu_ffn=True)).eval()
    images = torch.randn(2, 3, 28, 28)
    with artifacts.test_time_registers(model, neurons=[(0, 1)]):
        assert model(images).last_hidden_state.shape == (2, 17, 32)


def test_hooks_are_removed_after_an_exception() -> None:
    model = models.encoder()
    was = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), artifacts.test_time_registers(model, neurons=NEURONS):
        raise KeyError
    with pytest.raises(ValueError, match="mlp"), artifacts.test_time_registers(model, neurons=NEURONS, mlp="nothing"):
        pass
    assert models.hooks_on(model) == 0
    assert torch.backends.mha.get_fastpath_enabled() == was


def test_errors() -> None:
    model, x = models.encoder(), torch.randn(1, 5, 16)
    mask = torch.zeros(1, 5, dtype=torch.bool)
    for neurons, message in (
        ([(2, 0)], "layer: expected a whole number from 0 to 1, got 2"),
        ([(0, 24)], "indices below 24 in 'layers.0', got 24"),
        ([(0, -1)], "neuron: expected a whole number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message), artifacts.test_time_registers(model, neurons=neurons):
            pass
    with pytest.raises(TypeError, match=r"expected \(layer, neuron\)"), artifacts.test_time_registers(model, neurons=[3]):
        pass
    with pytest.raises(ValueError, match="n_registers"), artifacts.test_time_registers(model, n_registers=-1):
        pass
    with pytest.raises(ValueError, match="at least one outlier token"):
        find_register_neurons(model, x, mask)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 5\), the tokens of 'layers.0', got \(1, 4\)"):
        find_register_neurons(model, x, ~mask[:, 1:])
    with pytest.raises(TypeError, match="boolean tensor"):
        find_register_neurons(model, x, mask.float())
    with pytest.raises(ValueError, match="top"):
        find_register_neurons(model, x, ~mask, top=0)
    with pytest.raises(ValueError, match=r"layers: expected indices in \[-2, 2\)"):
        find_register_neurons(model, x, ~mask, layers=[2])
    with artifacts.test_time_registers(model, neurons=NEURONS):
        with pytest.raises(ValueError, match="other tensors too"):
            model(x, mask=torch.zeros(5, 5))
        model(x)


def test_rotary_embeddings_are_refused() -> None:
    t = pytest.importorskip("transformers")
    model = t.DINOv3ViTModel(t.DINOv3ViTConfig(**models.SHAPE, intermediate_size=64)).eval()
    with (
        artifacts.test_time_registers(model, neurons=NEURONS),
        pytest.raises(ValueError, match="rotary embeddings"),
    ):
        model(torch.randn(1, 3, 28, 28))


@torch.no_grad()
def test_real_dinov2_keeps_its_shape() -> None:
    model, images = load_dinov2(), torch.randn(2, 3, 56, 56)
    plain = model(images).last_hidden_state
    mask = torch.arange(17).expand(2, -1) == 4
    with artifacts.test_time_registers(model, neurons=find_register_neurons(model, images, mask)):
        assert model(images).last_hidden_state.shape == plain.shape
    assert torch.equal(model(images).last_hidden_state, plain)


def test_neurons_that_are_no_sequence_and_numbers_of_numpy() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    with pytest.raises(TypeError, match=r"neurons: expected a sequence of RegisterNeuron or .*, got int"):
        artifacts.test_time_registers(model, neurons=5).__enter__()
    with artifacts.test_time_registers(model, neurons=[(np.int64(0), np.int64(3))]) as chosen:
        assert [(type(n.layer), n.layer, n.neuron) for n in chosen] == [(int, 0, 3)]
