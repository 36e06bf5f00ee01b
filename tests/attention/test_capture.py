"""capture_attention: what it sees, what it leaves alone, what it keeps and what it refuses."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import xai_fast as xf
from tests.attention.models import FOLDED, HUGGING_FACE, PROBABILITIES_ONLY, WRITTEN, Written, lengths_mask
from tests.models.dinov2 import load_dinov2
from tests.models.tiny_llama import load_tiny_llama, sentence
from tests.peers.locate import peers_directory
from xai_fast.attention._layers import Kept
from xai_fast.attention._scores import Scores, ScoreTracker

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything a capture could leave behind on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (
            type(m),
            sorted(m.__dict__),
            [len(getattr(m, name)) for name in hooks],
            id(m.__dict__.get("forward")),
        )
        for m in model.modules()
    ] + [torch._C._len_torch_function_stack()]


@contextmanager
def leaves_nothing(model: nn.Module) -> Iterator[None]:
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]


def assert_identical(a: Any, b: Any) -> None:
    a, b = tensors_of(a), tensors_of(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert x.requires_grad == y.requires_grad
        assert x.stride() == y.stride()


def captured(model: nn.Module, *args: Any, seed: int = 3, **kwargs: Any) -> Any:
    """Run with and without capture, compare the outputs bit by bit, and return the record."""
    torch.manual_seed(seed)
    plain = model(*args, **kwargs)
    with leaves_nothing(model), xf.capture_attention(model) as record:
        torch.manual_seed(seed)
        assert_identical(plain, model(*args, **kwargs))
    return record


def assert_streams(record: Any, **options: Any) -> None:
    """The streamed rollout is the rollout of the materialised attention."""
    attentions = record.attentions()
    for token in (0, -1, [1, 0]):
        wanted = xf.attention_rollout(attentions, token=token, **options)
        torch.testing.assert_close(record.rollout(token, **options), wanted, rtol=1e-5, atol=1e-8)


def held_bytes(record: Any) -> int:
    """Bytes of all storages that the record keeps alive, each counted once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for p in record.passes for x in p for t in x.tensors()}
    return sum(storage.nbytes() for storage in held.values())


def valid_tokens(inputs: dict[str, Tensor], tokens: int) -> Tensor:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None else torch.ones(1, tokens, dtype=torch.bool)


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


# torch.nn


def encoder_attentions(encoder: nn.TransformerEncoder, x: Tensor, **masks: Any) -> list[Tensor]:
    """Weights that torch.nn itself returns, layer by layer."""
    found = []
    for layer in encoder.layers:
        inner = layer.norm1(x) if layer.norm_first else x
        found.append(layer.self_attn(inner, inner, inner, need_weights=True, average_attn_weights=False, **masks)[1])
        x = layer(x, src_mask=masks.get("attn_mask"), src_key_padding_mask=masks.get("key_padding_mask"))
    return found


def build_encoder(norm_first: bool = False, batch_first: bool = True, nested: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, norm_first=norm_first, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "per head"])
def test_transformer_encoder(fast: bool, norm_first: bool, batch_first: bool, mask: str) -> None:
    encoder = build_encoder(norm_first, batch_first)
    x = torch.randn(3, 6, 16) if batch_first else torch.randn(6, 3, 16)
    attn_mask = padding = None
    if mask == "padding":
        padding = ~lengths_mask(6, 4, 2)
    elif mask == "causal":
        attn_mask = nn.Transformer.generate_square_subsequent_mask(6)
    elif mask == "per head":
        attn_mask = torch.rand(3 * 2, 6, 6) > 0.6
        attn_mask[:, range(6), range(6)] = False

    # With gradients on, torch.nn takes its slow path.
    with torch.no_grad() if fast else torch.enable_grad():
        record = captured(encoder, x, mask=attn_mask, src_key_padding_mask=padding)
        wanted = encoder_attentions(encoder, x, attn_mask=attn_mask, key_padding_mask=padding)
        assert [layer.kind for layer in record.layers] == ["module" if fast else "sdpa"] * 2
    for ours, theirs in zip(record.attentions(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), **CLOSE)
    assert_streams(record)


def test_encoder_layer_takes_the_same_path_as_without_capture() -> None:
    """A function mode alone switches torch.nn's fused path off; a capture does not."""
    encoder, x = build_encoder(), torch.randn(3, 6, 16)
    calls = []
    encoder.layers[0].self_attn.register_parameter("watched", None)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        encoder(x)
    assert torch._transformer_encoder_layer_fwd not in calls
    assert F.multi_head_attention_forward in calls

    with torch.no_grad(), xf.capture_attention(encoder) as record, torch.profiler.profile() as profile:
        encoder(x)
    names = [event.key for event in profile.key_averages()]
    assert "aten::_transformer_encoder_layer_fwd" in names
    assert len(record.layers) == 2


def test_encoder_with_nested_tensors() -> None:
    encoder, x, padding = build_encoder(nested=True), torch.randn(3, 8, 16), ~lengths_mask(8, 4, 2)
    padding[:, 6:] = True  # even the longest sequence is padded
    with torch.no_grad():
        record = captured(encoder, x, src_key_padding_mask=padding)
        plain = build_encoder()
        plain.load_state_dict(encoder.state_dict())
        wanted = encoder_attentions(plain, x, key_padding_mask=padding)
    valid = ~padding
    for ours, theirs in zip(record.attentions(), wanted, strict=True):
        assert ours.shape == theirs.shape
        rows = valid[:, None, :].expand(-1, 2, -1)
        torch.testing.assert_close(ours[rows], theirs[rows], **CLOSE)
        assert not ours[(padding[:, None, None, :]).expand_as(ours)].any()
    assert_streams(record)


def test_fused_encoder_layer_reads_any_nonzero_float_as_masked() -> None:
    """torch's fused layer turns a floating mask into a boolean one; the record follows what was computed."""
    layer, x = build_encoder().layers[0], torch.randn(2, 5, 16)
    bias = torch.where(torch.rand(5, 5) > 0.7, 0.5, 0.0).fill_diagonal_(0.0)
    with torch.no_grad():
        record = captured(layer, x, src_mask=bias)
        wanted = layer.self_attn(x, x, x, attn_mask=bias != 0, average_attn_weights=False)[1]
    torch.testing.assert_close(record.attentions()[0], wanted, **CLOSE)


class Subclass(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src * 1.0, *args, **kwargs) * 1.0


class OwnAttention(nn.TransformerEncoderLayer):
    def _sa_block(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["layer", "own attention", "attention", "in an encoder", "inside"])
def test_subclasses_of_torch_nn(kind: str, grad_mode: Any, training: bool) -> None:
    model: nn.Module = {
        "layer": lambda: Subclass(16, 2, 32, batch_first=True),
        "own attention": lambda: OwnAttention(16, 2, 32, batch_first=True),
        "attention": lambda: SelfAttention(16, 2, batch_first=True),
        "in an encoder": lambda: nn.TransformerEncoder(Subclass(16, 2, 32, batch_first=True), 2),
        "inside": lambda: nn.Sequential(nn.Linear(16, 16), SelfAttention(16, 2, batch_first=True)),
    }[kind]()
    model.train(training)
    masks = {"src_key_padding_mask": ~lengths_mask(6, 4)} if kind == "in an encoder" else {}
    with grad_mode():
        record = captured(model, torch.randn(2, 6, 16), **masks)
    assert len(record.passes) == 1
    assert len(record.layers) == (2 if kind == "in an encoder" else 1)
    seen_inside = grad_mode is torch.enable_grad or (kind == "own attention" and training)
    assert record.layers[0].kind == ("sdpa" if seen_inside else "module")
    assert_streams(record)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("case", ["plain", "bool", "float", "both", "per head", "causal hint", "unbatched"])
def test_multihead_attention(case: str, separate: bool, batch_first: bool, need_weights: bool) -> None:
    sizes = {"kdim": 12, "vdim": 10} if separate else {}
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **sizes).eval()
    shape = (3, 5) if batch_first else (5, 3)
    query = torch.randn(*shape, 16)
    key, value = (torch.randn(*shape, 12), torch.randn(*shape, 10)) if separate else (query, query)
    options: dict[str, Any] = {}
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if case == "bool":
        options = {"key_padding_mask": ~lengths_mask(5, 3, 2)}
    elif case == "float":
        options = {"attn_mask": torch.randn(5, 5)}
    elif case == "both":
        options = {"key_padding_mask": ~lengths_mask(5, 3, 2), "attn_mask": causal}
    elif case == "per head":
        options = {"attn_mask": torch.randn(12, 5, 5)}
    elif case == "causal hint":
        options = {"attn_mask": causal, "is_causal": True}
    elif case == "unbatched":
        query, key, value = (x.flatten(0, 1)[:5] for x in (query, key, value))

    for grad_mode in (torch.no_grad, torch.enable_grad):
        with grad_mode():
            record = captured(module, query, key, value, need_weights=need_weights, **options)
        wanted = module(query, key, value, average_attn_weights=False, **options)[1].detach()
        wanted = wanted[None] if case == "unbatched" else wanted
        assert record.layers[0].is_causal == (case == "causal hint" and not need_weights)
        torch.testing.assert_close(record.attentions()[0], wanted, **CLOSE)
        assert_streams(record)


@pytest.mark.parametrize(
    "extra", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_keys_that_torch_nn_appends(extra: dict[str, bool]) -> None:
    module, x = nn.MultiheadAttention(16, 4, batch_first=True, **extra).eval(), torch.randn(3, 5, 16)
    padding = ~lengths_mask(5, 3, 2)
    record = captured(module, x, x, x, key_padding_mask=padding)
    wanted = module(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1].detach()
    torch.testing.assert_close(record.attentions()[0], wanted, **CLOSE)
    with pytest.raises(ValueError, match=r"5 queries and [67] keys"):
        record.rollout()


@pytest.mark.parametrize("static", [False, True])
def test_functional_multi_head_attention(static: bool) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4)

        def forward(self, x: Tensor, average: bool = True) -> tuple[Tensor, Tensor]:
            m = self.inner
            key = x.transpose(0, 1).reshape(3, 5, 4, 4).transpose(1, 2).reshape(12, 5, 4).contiguous()
            return F.multi_head_attention_forward(  # type: ignore[return-value]
                *(x, x, x, 16, 4, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0),
                *(m.out_proj.weight, m.out_proj.bias),
                static_k=key if static else None,
                average_attn_weights=average,
            )

    model, x = Functional(), torch.randn(5, 3, 16)
    record = captured(model, x)
    torch.testing.assert_close(record.attentions()[0], model(x, average=False)[1].detach(), **CLOSE)


def test_decoder_layers_can_be_left_out() -> None:
    model = nn.Transformer(16, 2, 1, 2, 32, batch_first=True).eval()
    source, target = torch.randn(2, 7, 16), torch.randn(2, 4, 16)
    with torch.no_grad():
        record = captured(model, source, target)
    assert [layer.name for layer in record.layers] == [
        "encoder.layers.0",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    with pytest.raises(ValueError, match=r"layers: .*layer 1 \(decoder\.layers\.0\.self_attn\).*such as layers=\[1, 3\]"):
        record.rollout()
    with pytest.raises(ValueError, match=r"layer 2 .* 4 queries and 7 keys"):
        record.rollout(layers=slice(1, None))
    assert record.rollout(layers=[1, 3]).shape == (2, 4)
    assert record.rollout(layers=slice(1)).shape == (2, 7)
    assert [a.shape[-2:] for a in record.attentions(layers=[0, -1])] == [(7, 7), (4, 7)]


def test_inputs_that_are_changed_in_place_after_the_attention() -> None:
    class InPlaceResidual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x += self.attention(x, x, x, need_weights=False)[0]
            return x

    model, x = InPlaceResidual().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        record = captured(model, x)
        wanted = model.attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(record.attentions()[0], wanted, **CLOSE)


@pytest.mark.parametrize("change", ["optimizer", "load_state_dict"])
def test_changed_weights_are_noticed(change: str) -> None:
    encoder, x = build_encoder(), torch.randn(2, 5, 16)
    # With gradients on, query and key are kept themselves.
    with torch.no_grad(), xf.capture_attention(encoder) as record:
        encoder(x)
    encoder(x).sum().backward()
    if change == "optimizer":
        torch.optim.SGD(encoder.parameters(), 0.1).step()
    else:
        encoder.load_state_dict(build_encoder().state_dict())
    with pytest.raises(RuntimeError, match=r"weight of layer 1 \(layers\.1\) was changed in place"):
        record.rollout()


def test_weights_that_are_replaced_or_changed_after_the_first_rollout_do_not_matter() -> None:
    encoder, x = build_encoder(), torch.randn(2, 5, 16)
    with torch.no_grad(), xf.capture_attention(encoder) as record:
        encoder(x)
    kept = record.rollout()
    encoder.load_state_dict(build_encoder().state_dict())
    assert torch.equal(record.rollout(), kept)

    with torch.no_grad(), xf.capture_attention(encoder) as record:
        encoder(x)
    wanted = encoder_attentions(encoder, x)[0].detach()
    encoder.double()
    torch.testing.assert_close(record.attentions()[0], wanted, **CLOSE)


def test_autocast() -> None:
    module, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        record = captured(module, x, x, x)
        wanted = module(x, x, x, average_attn_weights=False)[1].detach()
    assert record.attentions()[0].dtype == torch.bfloat16
    torch.testing.assert_close(record.attentions()[0], wanted.bfloat16(), rtol=2e-2, atol=2e-3)


# Written by hand


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRITTEN)
def test_written_by_hand(name: str, grad_mode: Any) -> None:
    model, x = Written(name), torch.randn(2, 6, 32)
    keep = torch.rand(6, 6) > 0.4
    keep.fill_diagonal_(True)
    options = {"num_heads": 4} if name in FOLDED else {}
    with grad_mode():
        plain = model(x, keep)
        with leaves_nothing(model), xf.capture_attention(model, **options) as record:
            assert_identical(plain, model(x, keep))

    kind = "probabilities" if name in PROBABILITIES_ONLY else "sdpa" if "sdpa" in name else "matmul"
    assert [layer.kind for layer in record.layers] == [kind, kind]
    for ours, wanted in zip(record.attentions(), model.expected_attentions(x, keep), strict=True):
        torch.testing.assert_close(ours, wanted.float(), **CLOSE)
    assert_streams(record)


def test_folded_heads_count_as_batch_unless_told() -> None:
    model, x, keep = Written("bmm_folded_heads"), torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool)
    record = captured(model, x, keep)
    assert [layer.shape for layer in record.layers] == [(8, 1, 6, 6)] * 2
    with xf.capture_attention(model, num_heads=3) as record:
        model(x, keep)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the 8 matrices of layer 0, got 3"):
        record.rollout()
    with pytest.raises(ValueError, match="num_heads: "):
        record.attentions()


class Grouped(nn.Module):
    """Four query heads on two key heads, in the ways that models write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if self.way == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        if self.way == "five dimensions":
            grouped, k = q.unflatten(1, (2, 2)), k.unsqueeze(2)
            return ((grouped @ k.mT * scale).masked_fill(~causal, -math.inf).softmax(-1) @ k).flatten(1, 2)
        if self.way == "einsum":
            scores = torch.einsum("bhgid,bhjd->bhgij", q.unflatten(1, (2, 2)), k) * scale
            return torch.einsum("bhgij,bhjd->bhgid", scores.where(causal, -math.inf).softmax(-1), k).flatten(1, 2)
        k = k.repeat_interleave(2, dim=1)
        return (q @ k.mT * scale).masked_fill(~causal, -math.inf).softmax(-1) @ k


@pytest.mark.parametrize("way", ["enable_gqa", "five dimensions", "einsum", "repeated"])
def test_grouped_query_attention(way: str) -> None:
    q, k = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 5, 8)
    record = captured(Grouped(way), q, k)
    wanted = xf.ops.attention_probabilities(q.double(), k.double(), is_causal=True).float()
    torch.testing.assert_close(record.attentions()[0], wanted, **CLOSE)
    assert record.layers[0].query_key()[1].shape[1] == (4 if way == "repeated" else 2)
    mask = 0 if way == "enable_gqa" else 5 * 5
    assert held_bytes(record) == (q.numel() + k.numel() * (2 if way == "repeated" else 1)) * 4 + mask
    assert_streams(record)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 3, 2, 5, 8)])
def test_dimension_0_is_the_batch_and_the_rest_are_heads(shape: tuple[int, ...]) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(shape)
    record = captured(Plain(), x)
    batch = shape[0] if len(shape) > 2 else 1
    assert record.layers[0].shape == (batch, math.prod(shape[1:-2]), 5, 5)
    wanted = (x.double() @ x.double().mT / math.sqrt(8)).softmax(-1).float()
    torch.testing.assert_close(record.attentions()[0].reshape(wanted.shape), wanted, **CLOSE)
    assert_streams(record)


# What is not attention


class Softmaxes(nn.Module):
    """Every softmax here is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.experts = nn.Linear(8, 4)
        self.codes = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        pooled = x.mean(1)
        router = self.experts(x).softmax(-1)
        mixed = (router[..., None] * x.unsqueeze(2)).sum(2)
        codes = (x @ self.codes.T).softmax(-1) @ self.codes
        codes = codes + torch.einsum("bnc,cd->bnd", (x @ self.codes.T).softmax(-1), self.codes)
        contrastive = (pooled @ pooled.T).softmax(-1) @ pooled
        channels = x.softmax(1) @ torch.ones(2, 8, 8)
        return self.head(pooled).softmax(-1), mixed, codes, contrastive, channels, F.log_softmax(x, -1)


def test_other_softmaxes_are_not_recorded() -> None:
    model = Softmaxes()
    record = captured(model, torch.randn(2, 5, 8))
    assert record.layers == ()
    with pytest.raises(ValueError, match=r"no attention was captured: looked for .*flash_attention_2"):
        record.rollout()
    with pytest.raises(ValueError, match="no attention was captured"):
        record.attentions()


def test_no_forward_pass() -> None:
    with xf.capture_attention(nn.Linear(2, 2)) as record:
        pass
    assert record.passes == record.layers == ()
    with pytest.raises(ValueError, match="was the model run inside the context"):
        record.rollout()


# Memory


def encoder_like(layers: int = 3) -> tuple[Written, Tensor, Tensor]:
    model = Written("sdpa_positional")
    model.projections = nn.ModuleList(nn.Linear(32, 96) for _ in range(layers))
    return model, torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool)


def test_memory_is_query_and_key() -> None:
    model, x, keep = encoder_like()
    record = captured(model, x, keep)
    # One mask for all layers, kept by reference; of the packed projections only two thirds.
    assert held_bytes(record) == 3 * 2 * x.numel() * 4 + keep.numel()
    assert all(layer._terms[0].kept.tensor.data_ptr() == keep.data_ptr() for layer in record.layers)

    model, inputs = HUGGING_FACE["llama"]("sdpa")
    record = captured(model.eval(), **inputs)
    queries = 3 * 9 * 32 * 4
    assert held_bytes(record) == 2 * (queries + queries // 2)
    assert all(t.data_ptr() == q.data_ptr() for x in record.layers for t, q in zip(x.tensors(), x.query_key(), strict=True))


def test_broadcast_masks_stay_views() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = lengths_mask(500, 300)[:, None, None, :].expand(2, 1, 500, 500)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    record = captured(Padded(), torch.randn(2, 1, 500, 4))
    assert held_bytes(record) == 2 * 500 * 4 * 4 + 2 * 500
    assert_streams(record)


def test_nothing_is_kept_alive_after_the_record() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x * 1.0
            scores = q @ q.mT
            weights = scores.softmax(-1)
            alive.extend(weakref.ref(t) for t in (q, scores, weights))
            return (weights @ q).sum()

    model, x = Watched(), torch.randn(2, 2, 5, 8, requires_grad=True)
    with xf.capture_attention(model) as record:
        out = model(x)
        out.backward()
        del out
        gc.collect()
        # The graph is gone: the record holds the detached query only.
        assert [reference() is None for reference in alive] == [True, True, True]
    assert held_bytes(record) == x.numel() * 4


def test_notes_go_with_their_tensors() -> None:
    """The key of a note is an id, which Python gives to another object as soon as the tensor is gone."""
    tracker, x = ScoreTracker(lambda build: None, None), torch.randn(2, 3, 4)
    note = Scores(Kept(x), Kept(x))
    scores, other = x @ x.mT, x @ x.mT
    tracker.note(scores, note)
    tracker.note(other, note)
    assert tracker.find(scores) is note
    assert tracker.find(x) is None
    number = id(scores)
    del scores
    assert number not in tracker.notes
    other.exp_()
    assert tracker.find(other) is None


def test_a_loop_does_not_grow() -> None:
    model, x, keep = encoder_like()
    with xf.capture_attention(model) as record:
        sizes = set()
        for _ in range(4):
            model(x, keep)
            sizes.add((len(record.passes), len(record.layers), held_bytes(record)))
    assert sizes == {(1, 3, 3 * 2 * x.numel() * 4 + keep.numel())}


# Forward passes and contexts


def test_forward_passes() -> None:
    model, _, keep = encoder_like()
    inputs = torch.randn(3, 2, 6, 32)
    with xf.capture_attention(model, keep="all") as everything, xf.capture_attention(model) as last:
        for x in inputs:
            model(x, keep)
    assert [len(layers) for layers in everything.passes] == [3, 3, 3]
    assert [len(layers) for layers in last.passes] == [3]
    for i, x in enumerate(inputs):
        wanted = xf.attention_rollout(model.expected_attentions(x, keep)).float()
        torch.testing.assert_close(everything.rollout(forward=i), wanted, **CLOSE)
        torch.testing.assert_close(
            everything.attentions(forward=i - 3)[0].float(),
            model.expected_attentions(x, keep)[0].float(),
            **CLOSE,
        )
    assert torch.equal(everything.rollout(), last.rollout())
    assert not torch.equal(everything.rollout(forward=0), everything.rollout(forward=1))
    with pytest.raises(ValueError, match=r"forward: expected a forward pass in \[-3, 3\), got 3"):
        everything.rollout(forward=3)
    with pytest.raises(ValueError, match=r"got 1 .*keep='all'"):
        last.rollout(forward=1)


def test_parts_of_the_model_that_are_called_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x, x, x)[0]

    model, x = Two(), torch.randn(1, 3, 8)
    with xf.capture_attention(model, keep="all") as record:
        model.b(x, x, x)
        model(x)
        model.b(x, x, x)
    assert [[layer.name for layer in layers] for layers in record.passes] == [["b"], ["a", "b"]]


def test_the_record_can_be_used_inside_the_context_and_sees_only_the_model() -> None:
    model, x, keep = encoder_like()
    with xf.capture_attention(model) as record:
        model(x, keep)
        first = record.rollout()
        record.attentions()
        record.rollout(None)
        assert len(record.passes) == 1
        assert len(record.layers) == 3
        assert torch.equal(first, record.rollout())


def test_only_the_model_is_recorded() -> None:
    """Of a larger model that runs inside the context, only the captured part counts."""
    whole = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True), Grouped("repeated"), Grouped("repeated")])
    x, q, k = torch.randn(1, 3, 8), torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)

    def run() -> None:
        whole[0](x, x, x)
        whole[1](q, k)
        whole[2].forward(q, k)
        F.scaled_dot_product_attention(q, q, q)

    names = []
    for part in (whole, *whole):
        with xf.capture_attention(part) as record:
            run()
        names.append([layer.name for layer in record.layers])
    assert names == [["0", "1", "2"], [""], [""], [""]]


def test_attention_of_a_plain_function_that_the_model_calls() -> None:
    class Calls(nn.Module):
        def forward(this, x: Tensor) -> Tensor:  # noqa: N805
            return F.scaled_dot_product_attention(x, x, x)

    record = captured(Calls(), torch.randn(1, 2, 3, 4))
    assert [layer.name for layer in record.layers] == [""]


def test_restored_after_an_exception() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(Subclass(16, 2, 32, batch_first=True), 1)

        def forward(self, x: Tensor) -> Tensor:
            self.encoder(x)
            raise KeyError("from the model")

    model = Fails().eval()
    with (
        leaves_nothing(model),
        pytest.raises(KeyError, match="from the model"),
        xf.capture_attention(model) as record,
    ):
        model(torch.randn(1, 3, 16))
    assert len(record.layers) == 1

    # Also where torch's own function fails in the middle of a wrapper.
    encoder = build_encoder()
    with (
        leaves_nothing(encoder),
        pytest.raises((RuntimeError, AssertionError)),
        xf.capture_attention(encoder) as record,
    ):
        encoder(torch.randn(1, 3, 17))
    assert record.layers == ()
    captured(encoder, torch.randn(1, 3, 16))


def test_nested_and_reused_contexts() -> None:
    model, x = build_encoder(), torch.randn(1, 4, 16)
    context = xf.capture_attention(model)
    with torch.no_grad(), leaves_nothing(model):
        plain = model(x)
        with context as outer:
            model(x)
            with context as inner, xf.capture_attention(model) as third:
                assert torch.equal(model(x), plain)
            assert torch.equal(model(2 * x), model(2 * x))
        with context as again:
            model(x)
    assert outer is not inner is not again
    assert torch.equal(inner.rollout(), third.rollout())
    assert torch.equal(inner.rollout(), again.rollout())
    assert not torch.equal(outer.rollout(), again.rollout())


def test_beside_other_function_modes() -> None:
    """A default device is a function mode too. It stays in force, and a mode on top of ours stays there."""

    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    model, x = build_encoder(), torch.randn(1, 4, 16)
    with torch.no_grad(), torch.device("cpu"):
        captured(model, x)
        plain = model(x)
        with xf.capture_attention(model) as record, Count() as top:
            before = Count.calls
            assert torch.equal(model(x), plain)
            assert Count.calls > before + 10
            assert torch._C._len_torch_function_stack() == 3
            assert torch._C._get_function_stack_at(2) is top
    assert len(record.layers) == 2


def test_other_threads_are_left_alone() -> None:
    model, x = build_encoder(), torch.randn(1, 4, 16)
    with xf.capture_attention(model) as record:
        thread = threading.Thread(target=lambda: model(x))
        thread.start()
        thread.join()
        assert record.layers == ()


@pytest.mark.parametrize("name", ["sdpa_positional", "scale_on_scores", "in_place"])
def test_compiled_models_run_uncompiled(name: str) -> None:
    model, x, keep = Written(name), torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool).tril()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        plain = compiled(x, keep)
        assert len(graphs) == 1
        with xf.capture_attention(compiled) as record:
            assert torch.equal(compiled(x, keep), plain)
        for ours, wanted in zip(record.attentions(), model.expected_attentions(x, keep), strict=True):
            torch.testing.assert_close(ours, wanted.float(), **CLOSE)
        # The compiled graph is in force again, and was not built anew.
        assert torch.equal(compiled(x, keep), plain)
    assert len(graphs) == 1
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_gradient_checkpointing_records_each_layer_once() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.written = build_encoder(), Written("scale_on_scores", 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.encoder, x, use_reentrant=False)
            return checkpoint(self.written, x, torch.ones(6, 6, dtype=torch.bool), use_reentrant=False)  # type: ignore[no-any-return]

    model, x = Checkpointed(), torch.randn(2, 6, 16, requires_grad=True)
    with xf.capture_attention(model) as record:
        model(x).sum().backward()
    assert [layer.kind for layer in record.layers] == ["sdpa", "sdpa", "matmul", "matmul"]
    assert x.grad is not None


def test_tensors_that_are_changed_after_the_forward_pass() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask = torch.randn(1, 2, 4, 8), torch.zeros(4, 4)
    record = captured(Plain(), x, mask)
    kept = record.rollout()
    mask[0, 1] = -5.0
    with pytest.raises(RuntimeError, match=r"the mask of layer 0 .*was changed in place"):
        record.rollout()

    record = captured(Plain(), x, mask)
    x += 1
    with pytest.raises(RuntimeError, match=r"the query of layer 0 .*was changed in place"):
        record.rollout()

    with torch.inference_mode():
        x = torch.randn(1, 2, 4, 8)
        record = captured(Plain(), x, torch.zeros(4, 4))
        kept = record.rollout()
        x += 1
        assert torch.equal(record.rollout(), kept)


# Arguments and errors


def test_rollout_arguments() -> None:
    model, x, keep = encoder_like()
    record = captured(model, x, keep)
    attentions = record.attentions()
    for options in (
        {"head_fusion": "max"},
        {"head_fusion": "min", "residual": 0.5},
        {"head_fusion": "sum", "normalize": False},
        {"residual": 0.0, "start_layer": 1},
        {"discard_ratio": 0.5, "start_layer": -1},
        {"discard_ratio": 0.9, "head_fusion": "max"},
    ):
        assert_streams(record, **options)
        for token in (None, range(6), torch.tensor([2, 2]), [0] * 40):
            wanted = xf.attention_rollout(attentions, token=token, **options)
            torch.testing.assert_close(record.rollout(token, **options), wanted, rtol=1e-5, atol=1e-8)
    assert record.rollout(0).shape == (2, 6)
    assert record.rollout([0, 3, 5]).shape == (2, 3, 6)
    assert record.rollout(None).shape == (2, 6, 6)
    torch.testing.assert_close(record.rollout(start_layer=1), record.rollout(layers=slice(1, None)))
    torch.testing.assert_close(record.rollout(None)[:, 2], record.rollout(2), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"token": 6}, ValueError, "token: "),
        ({"token": []}, ValueError, "token: "),
        ({"token": 1.5}, TypeError, "."),
        ({"head_fusion": "median"}, ValueError, "head_fusion: "),
        ({"residual": -1.0}, ValueError, "residual: "),
        ({"discard_ratio": 1.0}, ValueError, "discard_ratio: "),
        ({"start_layer": 3}, ValueError, "start_layer: "),
        ({"layers": [3]}, ValueError, r"layers: expected indices in \[-3, 3\), got 3"),
        ({"layers": []}, ValueError, "layers: expected at least one of the 3"),
        ({"layers": slice(7, None)}, ValueError, "layers: expected at least one of the 3"),
        ({"layers": [0.5]}, TypeError, "layers: .* got an entry 0.5"),
        ({"layers": "all"}, TypeError, "layers: .* got str"),
        ({"forward": 1}, ValueError, "forward: "),
        ({"forward": None}, TypeError, "forward: expected an int, got NoneType"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, x, keep = encoder_like()
    record = captured(model, x, keep)
    with pytest.raises(error, match=message) as caught:
        record.rollout(**options)
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_the_context() -> None:
    for model in (None, lambda x: x, nn.Linear):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
            xf.capture_attention(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep: expected 'last' or 'all', got 'first'"):
        xf.capture_attention(nn.Linear(1, 1), keep="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        xf.capture_attention(nn.Linear(1, 1), num_heads=0)
    with pytest.raises(TypeError, match="num_heads: expected an int or None, got float"):
        xf.capture_attention(nn.Linear(1, 1), num_heads=2.0)  # type: ignore[arg-type]


def test_windows_of_different_sizes_are_refused() -> None:
    """A Swin transformer halves its grid: later layers have fewer windows."""
    t = pytest.importorskip("transformers")
    config = t.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    model, images = t.SwinModel(config).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        record = captured(model, images)
        model.set_attn_implementation("eager")
        wanted = model(images, output_attentions=True).attentions
    with pytest.raises(ValueError, match=r"layer 2 .* has batch 8 and 16 tokens, layer 0 .*32 and 16; .*layers=\[0, 1\]"):
        record.rollout()
    assert record.rollout(layers=[0, 1]).shape == (32, 16)
    # Hugging Face returns one attention per stage; it is among ours.
    for theirs in wanted:
        assert any(a.shape == theirs.shape and torch.allclose(a, theirs, atol=1e-6) for a in record.attentions())


class SelfWays(nn.Module):
    """Self-attention without projections, in three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "module":
            return self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        if self.way == "written":
            return (x @ x.mT / 2).softmax(-1) @ x
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("way", "transform"),
    [(way, transform) for way in ("sdpa", "written", "module") for transform in ("vmap", "grad")] + [("sdpa", "nested")],
)
def test_tensors_that_cannot_be_kept(way: str, transform: str) -> None:
    model, x = SelfWays(way), torch.randn(3, 2, 5, 8)

    def run() -> Tensor:
        if transform == "vmap":
            return torch.vmap(model)(x)  # type: ignore[no-any-return]
        if transform == "grad":
            return torch.func.grad(lambda x: model(x).sum())(x[0])  # type: ignore[no-any-return]
        ragged = torch.nested.nested_tensor([x[0, 0, None], x[0, 1, None, :3]], layout=torch.jagged)
        return model(ragged.transpose(1, 2)).to_padded_tensor(0.0)  # type: ignore[no-any-return]

    with torch.set_grad_enabled(transform == "grad"):
        plain = run()
        with xf.capture_attention(model) as record:
            assert torch.equal(run(), plain)
    for ask in (record.rollout, record.attentions):
        with pytest.raises(ValueError, match=r"layer 0 .*which cannot be kept"):
            ask()


def test_nan_names_the_layer() -> None:
    model, x, keep = encoder_like()
    with torch.no_grad():
        model.projections[1].bias[0] = math.nan
    with xf.capture_attention(model) as record:
        model(x, keep)
    with pytest.raises(ValueError, match=r"the rollout is NaN: layer 1 has NaN inputs"):
        record.rollout()
    assert record.rollout(check_nan=False).isnan().any()


def test_repr_tells_what_was_seen() -> None:
    model, x, keep = encoder_like()
    with xf.capture_attention(model) as record:
        model(x, keep)
    text = repr(record)
    assert "passes=1" in text
    wanted = "CapturedLayer(0, sdpa, batch=2, heads=4, queries=6, keys=6, mask=bool, scale=0.3536, causal=False)"
    assert wanted in text
