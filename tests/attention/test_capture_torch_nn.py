"""capture_attention on torch.nn: MultiheadAttention, the Transformer layers, and what is built on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import xai_fast as xf
from tests.attention.capture_checks import CLOSE, Subclass, assert_streams, build_encoder, captured, encoder_attentions
from tests.attention.models import lengths_mask

# torch.nn


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
