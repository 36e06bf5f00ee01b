"""The small vision transformer on scikit-learn's digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xai_fast.demo.models.digits import DigitsViT, accuracy, load_digits, train_digits_vit

pytest.importorskip("sklearn")


def test_learns_digits() -> None:
    data = load_digits()
    model = train_digits_vit(data, epochs=8)
    assert accuracy(model, data.test_pixels, data.test_labels) >= 0.95


def test_seeded_and_without_side_effects() -> None:
    whole = load_digits()
    data = replace(whole, train_pixels=whole.train_pixels[:96], train_labels=whole.train_labels[:96])
    before = torch.random.get_rng_state()
    first, again, other = (train_digits_vit(data, epochs=1, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_eager_and_fused_attention_agree() -> None:
    model, pixels = DigitsViT().eval(), torch.rand(2, 1, 8, 8)
    fused, eager = model(pixels), model(pixels, output_attentions=True)
    torch.testing.assert_close(fused.logits, eager.logits, rtol=1e-4, atol=1e-5)
    assert [attention.shape for attention in eager.attentions] == [(2, 4, 65, 65)] * 3
    assert not fused.attentions


def test_bad_epochs() -> None:
    with pytest.raises(ValueError, match="epochs: expected at least 1, got 0"):
        train_digits_vit(load_digits(), epochs=0)
