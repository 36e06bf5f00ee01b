"""capture_attention on models as they are: Hugging Face, real weights, timm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xai_fast as xf
from tests.attention.capture_checks import CLOSE, assert_streams, captured, held_bytes, tensors_of
from tests.attention.models import HUGGING_FACE, lengths_mask
from tests.models.dinov2 import load_dinov2
from tests.models.tiny_llama import load_tiny_llama, sentence
from tests.peers.locate import peers_directory

# Hugging Face


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name: str, attn_implementation: str) -> None:
    model, inputs = HUGGING_FACE[name](attn_implementation)
    model.eval()
    with torch.no_grad():
        record = captured(model, **inputs)
        expected, _ = HUGGING_FACE[name]("eager")
        expected.load_state_dict(model.state_dict())
        wanted = expected.eval()(**inputs, output_attentions=True).attentions

    found = record.attentions()
    assert len(found) == len(wanted) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert_streams(record)
    assert all(layer.name for layer in record.layers)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_hugging_face_in_training_mode_with_gradients(name: str) -> None:
    model, inputs = HUGGING_FACE[name]("sdpa")
    record = captured(model.train(), **inputs)
    gradients = []
    for capture in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        if capture:
            with xf.capture_attention(model):
                tensors_of(model(**inputs))[0].square().mean().backward()
        else:
            tensors_of(model(**inputs))[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any(t.requires_grad or t.grad_fn for layer in record.layers for t in layer.tensors())
    assert not record.rollout().requires_grad


def test_left_padded_decoder() -> None:
    """Rows of padded queries have no key to attend: they are 0, where the model spreads them evenly."""
    model, inputs = HUGGING_FACE["llama"]("eager")
    inputs["attention_mask"] = lengths_mask(9, 6, 4).flip(1).long()
    with torch.no_grad():
        record = captured(model.eval(), **inputs)
        wanted = model(**inputs, output_attentions=True).attentions
    rows = inputs["attention_mask"].bool()[:, None, :].expand(-1, 4, -1)
    for ours, theirs in zip(record.attentions(), wanted, strict=True):
        torch.testing.assert_close(ours[rows], theirs[rows], **CLOSE)
        assert not ours[~rows].any()
    assert_streams(record)


def test_rows_of_a_batch_do_not_mix() -> None:
    model, inputs = HUGGING_FACE["bert"]("sdpa")
    model.eval()
    with torch.no_grad(), xf.capture_attention(model, keep="all") as record:
        model(**inputs)
        for i in range(3):
            length = int(inputs["attention_mask"][i].sum())
            model(input_ids=inputs["input_ids"][i : i + 1, :length])
    together = record.rollout(forward=0)
    for i in range(3):
        alone = record.rollout(forward=i + 1)
        torch.testing.assert_close(together[i : i + 1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-6)
        assert not together[i, alone.shape[1] :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_roll_in_float32(dtype: torch.dtype) -> None:
    model, inputs = HUGGING_FACE["vit"]("sdpa")
    model.to(dtype).eval()
    with torch.no_grad():
        record = captured(model, pixel_values=inputs["pixel_values"].to(dtype))
    rollout = record.rollout()
    assert rollout.dtype == dtype
    queries_keys = [layer.query_key() for layer in record.layers]
    wide = [xf.ops.attention_probabilities(q.double(), k.double()) for q, k in queries_keys]
    # One rounding at the end and nothing on the way.
    torch.testing.assert_close(rollout, xf.attention_rollout(wide).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


# Real models


def test_real_dinov2_against_eager_attentions() -> None:
    model, images = load_dinov2("sdpa"), torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        record = captured(model, images)
        wanted = load_dinov2("eager")(images, output_attentions=True).attentions
    assert len(record.layers) == 12
    for ours, theirs in zip(record.attentions(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    exact = xf.attention_rollout([a.double() for a in wanted])
    assert ((record.rollout().double() - exact).norm() / exact.norm()) < 1e-5
    torch.testing.assert_close(record.rollout().double(), exact, rtol=1e-4, atol=1e-7)
    tokens = 1 + 8 * 8
    assert held_bytes(record) == 12 * 2 * tokens * 384 * 4


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_real_llama_against_eager_attentions(attn_implementation: str) -> None:
    model, ids = load_tiny_llama(attn_implementation), sentence()
    with torch.no_grad():
        record = captured(model, ids)
        wanted = load_tiny_llama("eager")(ids, output_attentions=True).attentions
    assert len(record.layers) == 4
    for ours, theirs in zip(record.attentions(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    exact = xf.attention_rollout([a.double() for a in wanted], token=-1)
    torch.testing.assert_close(record.rollout(-1).double(), exact, rtol=1e-5, atol=1e-8)
    assert torch.count_nonzero(record.rollout(3)[0, 4:]) == 0


def test_decoding_with_a_cache_is_refused() -> None:
    model, ids = load_tiny_llama("sdpa"), sentence()
    with torch.no_grad(), xf.capture_attention(model) as record:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with pytest.raises(
        ValueError, match=r"layer 0 \(model\.layers\.0\.self_attn\).* 1 queries and \d+ keys.*use_cache=False"
    ):
        record.rollout()
    # The probabilities themselves can still be looked at.
    assert record.attentions()[0].shape == (1, 4, 1, ids.shape[1] + 2)


# timm


def test_timm_vit() -> None:
    peers = peers_directory("timm")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")]), str(peers)])
    command = [sys.executable, "-m", "tests.peers.timm_vit"]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["identical"], name
        assert found["names"] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
        assert found["kinds"] == (["sdpa"] if name == "fused" else ["matmul"])
        assert found["difference"] < 1e-6
        assert found["rollout"] < 1e-5
        assert found["bytes"] == found["query and key bytes"]
