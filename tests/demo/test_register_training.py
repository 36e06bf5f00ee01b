"""Training with and without registers, on pictures made up here."""

from __future__ import annotations

import pytest
import torch

from xai_fast.attention.artifacts import test_time_registers as added_registers
from xai_fast.demo.artifacts.register_training import RegisterViT, compare_registers, evaluate, fashion_tensors, train
from xai_fast.demo.datasets import FashionMNIST


def _pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dark ones and bright ones."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 60, (count, 28, 28)) + 190 * labels[:, None, None]
    return images.to(torch.uint8), labels.to(torch.uint8)


def test_a_tiny_comparison() -> None:
    data = FashionMNIST(*_pictures(70), *_pictures(20))
    steps: list[None] = []
    torch.manual_seed(3)
    state = torch.get_rng_state()
    plain, two = compare_registers(
        data, registers=(0, 2), pictures=70, tested=20, epochs=2, progress=lambda: steps.append(None)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert len(steps) == 2 * 2 * 3
    assert (plain.registers, two.registers) == (0, 2)
    assert plain.norms.shape == (6, 20, 50)
    assert two.norms.shape == (6, 20, 52)
    assert plain.register_ratio.isnan().all()
    assert two.register_ratio.isfinite().all()
    for found in (plain, two):
        assert found.outliers.share.shape == (6,)
        assert (found.largest_ratio >= 1).all()
        assert 1 <= found.concentration <= 49


def test_training_learns() -> None:
    images, labels = _pictures(100)
    pixels, labels = fashion_tensors(images), labels.long()
    model = RegisterViT(1, depth=2)
    untrained = evaluate(model, pixels, labels, looked_at=2).accuracy
    trained = evaluate(train(model, pixels, labels, epochs=4, batch=16), pixels, labels, looked_at=2).accuracy
    assert untrained < 0.6
    assert trained > 0.9
    assert not model.training


def test_training_is_repeatable() -> None:
    data = FashionMNIST(*_pictures(32), *_pictures(8))
    options = {"registers": (1,), "pictures": 32, "tested": 8, "epochs": 1}
    (first,), (again,) = (compare_registers(data, seed=5, **options) for _ in range(2))
    assert torch.equal(first.norms, again.norms)
    (other,) = compare_registers(data, seed=6, **options)
    assert not torch.equal(first.norms, other.norms)


def test_tokens_are_cls_registers_patches() -> None:
    model = RegisterViT(3, patch=7, depth=1).eval()
    pixels = torch.rand(2, 1, 28, 28)
    seen: list[torch.Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(pixels)
    hook.remove()
    (tokens,) = seen
    assert tokens.shape == (2, 1 + 3 + 16, 64)
    assert torch.equal(tokens[:, 0], model.cls[0].expand(2, -1))
    assert torch.equal(tokens[:, 1:4], model.register.expand(2, -1, -1))
    with torch.no_grad():
        patch = model.embed(pixels[:, :, 7:14, 0:7]).flatten(1) + model.position[0, 4]
    torch.testing.assert_close(tokens[:, 4 + 4], patch, rtol=1e-4, atol=1e-5)


def test_registers_can_be_added_to_a_trained_one() -> None:
    model, pixels = RegisterViT().eval(), torch.rand(2, 1, 28, 28)
    with torch.no_grad(), added_registers(model, neurons=[(0, 1)]):
        assert model(pixels).shape == (2, 10)


def test_concentration_of_even_attention_is_one() -> None:
    model = RegisterViT(depth=2).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight.zero_()
    found = evaluate(model, torch.rand(3, 1, 28, 28), torch.arange(3))
    assert found.concentration == pytest.approx(1, abs=1e-5)


def test_fashion_tensors() -> None:
    pixels = fashion_tensors(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    torch.testing.assert_close(pixels, torch.tensor([[[[-0.286 / 0.353, 0.714 / 0.353]]]]))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="registers: expected at least 0"):
        RegisterViT(-1)
    with pytest.raises(ValueError, match="patch: expected a divisor of 28"):
        RegisterViT(patch=5)
    with pytest.raises(ValueError, match="epochs"):
        train(RegisterViT(depth=1), torch.rand(1, 1, 28, 28), torch.tensor([0]), epochs=0)
