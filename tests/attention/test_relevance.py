"""Targeted relevance and signed attention of captured models, against eager attention with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xai_fast as xf
from tests.attention import models
from tests.models.dinov2 import load_dinov2
from tests.models.tiny_llama import load_tiny_llama, sentence
from xai_fast.attention.record import AttentionRecord

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
FAMILIES = [models.vit, models.dinov2, models.bert, models.llama, models.gpt2]


def last_hidden(out: Any) -> Tensor:
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits


def score_of(out: Any) -> Tensor:
    """One score for each sample, of the last token, which no causal mask keeps from any layer."""
    return last_hidden(out)[:, -1].square().sum(-1) + last_hidden(out)[:, -1, 0]


def build_model(build: Callable[..., Any], attention: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build(attention)
    return model.eval(), inputs


def captured(model: nn.Module, inputs: dict[str, Any]) -> tuple[AttentionRecord, Any]:
    with xf.capture_attention(model) as record:
        out = model(**inputs)
    return record, out


def eager_matrices(
    build: Callable[..., Any], inputs: dict[str, Any], state: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(A, dA) of each layer from Hugging Face's own eager attention."""
    model, _ = build_model(build, "eager")
    model.load_state_dict(state)
    out = model(**inputs, output_attentions=True)
    attentions = list(out.attentions)
    grads = torch.autograd.grad(score_of(out).sum(), attentions)
    return [(a.detach(), g) for a, g in zip(attentions, grads, strict=True)]


def chefer(
    pairs: list[tuple[Tensor, Tensor]], *, clamp: bool = True, fusion: str = "mean", normalize: bool = False
) -> Tensor:
    """All rows of the product of I + fuse_h max(0, A dA), written out."""
    product: Tensor | None = None
    for a, gradient in pairs:
        weights = a * gradient
        fused = getattr(weights.clamp(min=0) if clamp else weights, fusion)(1)
        matrix = torch.eye(fused.shape[-1]) + fused
        if normalize:
            matrix = matrix / matrix.sum(-1, keepdim=True)
        product = matrix if product is None else matrix @ product
    assert product is not None
    return product


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradient_form_equals_eager_attention_with_autograd(build: Callable[..., Any], attention: str) -> None:
    model, inputs = build_model(build, attention)
    pairs = eager_matrices(build, inputs, model.state_dict())
    record, out = captured(model, inputs)
    assert {layer.kind for layer in record.layers} == {"sdpa" if attention == "sdpa" else "matmul"}
    score = score_of(out)
    full = chefer(pairs)
    tokens = full.shape[-1]
    torch.testing.assert_close(record.relevance(score, token=-1), full[:, -1], **CLOSE)
    torch.testing.assert_close(record.relevance(score, token=[0, tokens - 1]), full[:, [0, -1]], **CLOSE)
    torch.testing.assert_close(record.relevance(score, token=None), full, **CLOSE)
    raw = chefer(pairs, clamp=False, fusion="sum")
    torch.testing.assert_close(record.relevance(score, token=-1, head_fusion="sum", clamp=False), raw[:, -1], **CLOSE)
    normalized = chefer(pairs, normalize=True)
    torch.testing.assert_close(record.relevance(score, token=-1, normalize=True), normalized[:, -1], **CLOSE)


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_signed_attention_equals_eager_attention_with_autograd(build: Callable[..., Any]) -> None:
    model, inputs = build_model(build)
    pairs = eager_matrices(build, inputs, model.state_dict())
    record, out = captured(model, inputs)
    found = record.signed_attention(score_of(out))
    for layer, (a, gradient) in zip(found, pairs, strict=True):
        torch.testing.assert_close(layer, -(a * gradient).sum(2), **CLOSE)
    for layer, (a, gradient) in zip(record.weighted_attentions(score_of(out)), pairs, strict=True):
        torch.testing.assert_close(layer, a * gradient, **CLOSE)


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_lrp_form_is_the_same_streamed_and_from_written_out_attention(build: Callable[..., Any]) -> None:
    """Fused attention takes R_A from R_O in the kernel; written-out attention has it in the graph."""
    fused, inputs = build_model(build)
    written, _ = build_model(build, "eager")
    written.load_state_dict(fused.state_dict())
    results = []
    for model in (fused, written):
        record, out = captured(model, inputs)
        score = score_of(out)
        row = record.relevance(score, token=-1, method="lrp")
        matrices = [w.clamp(min=0) for w in record.weighted_attentions(score, method="lrp")]
        product = xf.attention_rollout(matrices, token=-1, normalize=False)
        torch.testing.assert_close(row, product, rtol=1e-5, atol=1e-6)
        results.append(row)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert float((results[0] - torch.eye(results[0].shape[-1])[-1]).abs().max()) > 1e-7


def test_lrp_form_of_one_layer_by_hand() -> None:
    """A single head of attention: R_O = O g, S = R_O / O, R_A = A (S V^T) / 2."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    model = Attention().eval()
    with xf.capture_attention(model) as record:
        out = model(x)
    weight = torch.randn(4, dtype=torch.float64)
    score = out[:, 0, 2] @ weight
    a = torch.softmax(x[:, 0] @ x[:, 0].mT / 2, -1).detach()
    share = torch.zeros(2, 5, 4, dtype=torch.float64)
    share[:, 2] = weight
    towards = share @ x[:, 0].detach().mT
    expected = torch.eye(5, dtype=torch.float64) + (towards * (0.5 * a * towards)).clamp(min=0)
    torch.testing.assert_close(record.relevance(score, token=2, method="lrp"), expected[:, 2], rtol=1e-6, atol=1e-8)


def test_real_llama_streams_and_materialises_alike() -> None:
    model = load_tiny_llama()
    ids = sentence()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with xf.capture_attention(model) as record:
        logits = model(inputs_embeds=embeddings).logits
    score = logits[:, -1].max(-1).values
    for method in ("gradient", "lrp"):
        row = record.relevance(score, token=-1, method=method)  # type: ignore[arg-type]
        full = record.relevance(score, token=None, method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(row, full[:, -1], rtol=1e-5, atol=1e-6)


def test_real_dinov2_streams_and_materialises_alike() -> None:
    model = load_dinov2().eval()
    pixels = torch.randn(1, 3, 112, 112, requires_grad=True)
    with xf.capture_attention(model) as record:
        hidden = model(pixels).last_hidden_state
    score = hidden[:, 0].square().mean(-1)
    for method in ("gradient", "lrp"):
        row = record.relevance(score, method=method)  # type: ignore[arg-type]
        full = record.relevance(score, token=None, method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(row, full[:, 0], rtol=1e-5, atol=1e-5 * float(full[:, 0].max()))


def test_several_targets_and_a_batch_of_targets() -> None:
    model, inputs = build_model(models.vit)
    record, out = captured(model, inputs)
    hidden = last_hidden(out)[:, 0]
    several = record.relevance(hidden[:, :3], token=[0, 2])
    for k in range(3):
        torch.testing.assert_close(several[:, k], record.relevance(hidden[:, k], token=[0, 2]), **CLOSE)
    own = torch.arange(hidden.shape[0]) % hidden.shape[1]
    per_sample = record.relevance(hidden.gather(1, own[:, None])[:, 0])
    for b in range(hidden.shape[0]):
        torch.testing.assert_close(per_sample[b], record.relevance(hidden[:, own[b]])[b], **CLOSE)


def test_batch_of_samples_equals_single_runs() -> None:
    model, inputs = build_model(models.vit)
    for method in ("gradient", "lrp"):
        record, out = captured(model, inputs)
        together = record.relevance(score_of(out), method=method)  # type: ignore[arg-type]
        for b in range(together.shape[0]):
            record, out = captured(model, {name: x[b : b + 1] for name, x in inputs.items()})
            alone = record.relevance(score_of(out), method=method)  # type: ignore[arg-type]
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_outputs_and_gradients_are_those_of_the_plain_model(build: Callable[..., Any]) -> None:
    model, inputs = build_model(build)
    plain = model(**inputs)
    wanted = torch.autograd.grad(score_of(plain).sum(), list(model.parameters()), allow_unused=True)
    _, out = captured(model, inputs)
    assert torch.equal(last_hidden(out), last_hidden(plain))
    found = torch.autograd.grad(score_of(out).sum(), list(model.parameters()), allow_unused=True)
    for f, w in zip(found, wanted, strict=True):
        assert (f is None) == (w is None)
        if f is not None:
            torch.testing.assert_close(f, w, rtol=1e-6, atol=1e-7)


def test_functions_that_are_always_random_run_as_they_do_without_capture() -> None:
    """F.dropout without `training` drops in evaluation mode too; a capture is no reason to refuse that."""

    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dropped = F.dropout(F.batch_norm(x.flatten(1), None, None, training=True), 0.5).view_as(x)
            return F.scaled_dot_product_attention(dropped, dropped, x, dropout_p=0.5)

    model, x = Random().eval(), torch.randn(2, 2, 5, 4, requires_grad=True)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    record, out = captured(model, {"x": x})
    assert torch.equal(out, plain)
    assert record.relevance(out.sum()).shape == (2, 5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_of_torch(need_weights: bool) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    with xf.capture_attention(module) as record:
        out = module(x, x, x, need_weights=need_weights)[0]
    score = out[:, 0].sum(-1)
    _, weights = module(x, x, x, average_attn_weights=False)
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    values = v.unflatten(-1, (4, -1)).transpose(1, 2)
    probabilities = weights.detach().requires_grad_()
    product = module.out_proj((probabilities @ values).transpose(1, 2).flatten(2))
    (gradient,) = torch.autograd.grad(product[:, 0].sum(), probabilities)
    expected = torch.eye(5) + (probabilities * gradient).clamp(min=0).mean(1)
    torch.testing.assert_close(record.relevance(score, token=None), expected, **CLOSE)
    assert q.shape == k.shape


def test_signed_attention_of_any_module() -> None:
    alpha = torch.softmax(torch.randn(2, 6, requires_grad=True), -1)
    values = torch.randn(2, 6)
    loss = (alpha * values).sum(-1).square().sum()
    found = xf.attention.signed_attention(alpha, loss)
    expected = -(2 * (alpha * values).sum(-1, keepdim=True) * values * alpha).detach()
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    both = xf.attention.signed_attention([alpha, alpha], loss)
    torch.testing.assert_close(both[1], expected)
    with pytest.raises(ValueError, match=r"alpha: expected weights on which the loss depends"):
        xf.attention.signed_attention(torch.randn(3, requires_grad=True), loss)
    with pytest.raises(ValueError, match=r"loss: expected a tensor with a graph"):
        xf.attention.signed_attention(alpha, loss.detach())
    with pytest.raises(TypeError, match=r"alpha\[0\]: expected a torch.Tensor, got list"):
        xf.attention.signed_attention([[1.0]], loss)  # type: ignore[list-item]


def test_encoder_decoder_relevance_follows_the_update_rules() -> None:
    encoder, decoder, cross = torch.rand(2, 2, 4, 4), torch.rand(3, 2, 3, 3), torch.rand(3, 2, 3, 4)
    found = xf.attention.encoder_decoder_relevance(list(encoder), list(decoder), list(cross))
    for b in range(2):
        inner, outer, across = torch.eye(4), torch.eye(3), torch.zeros(3, 4)
        for a in encoder[:, b]:
            inner = inner + a @ inner
        for own, other in zip(decoder[:, b], cross[:, b], strict=True):
            across = across + own @ across
            outer = outer + own @ outer
            added = [r - torch.eye(len(r)) for r in (outer, inner)]
            bars = [a / a.sum(-1, keepdim=True) + torch.eye(len(a)) for a in added]
            across = across + bars[0].T @ other @ bars[1]
        torch.testing.assert_close(found.encoder[b], inner)
        torch.testing.assert_close(found.decoder[b], outer)
        torch.testing.assert_close(found.cross[b], across)
    with pytest.raises(ValueError, match=r"cross: expected one matrix for each of the 3 decoder layers, got 2"):
        xf.attention.encoder_decoder_relevance(list(encoder), list(decoder), list(cross[:2]))
    with pytest.raises(ValueError, match=r"encoder\[0\]: expected shape \(2, 4, 4\), got \(2, 3, 3\)"):
        xf.attention.encoder_decoder_relevance([decoder[0]], list(decoder), list(cross))


def test_encoder_decoder_model_of_torch() -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True).eval()
    source, target = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    with xf.capture_attention(model) as record:
        out = model(source, target)
    weights = [w.clamp(min=0).mean(1) for w in record.weighted_attentions(out[:, -1].sum(-1))]
    assert [tuple(w.shape[1:]) for w in weights] == [(4, 4)] * 2 + [(3, 3), (3, 4)] * 2
    found = xf.attention.encoder_decoder_relevance(weights[:2], weights[2::2], weights[3::2])
    assert found.cross.shape == (2, 3, 4)
    assert bool((found.cross[:, -1] > 0).any())


@pytest.mark.parametrize("build", [models.vit, models.llama], ids=lambda build: build.__name__)
@pytest.mark.parametrize("token", [0, None])
def test_softmax_in_single_precision_in_a_model_in_double_precision(build: Callable[..., Any], token: Any) -> None:
    """As Hugging Face's eager attention does it; to its precision the result is that of fused attention."""
    model, inputs = build_model(build, "eager")
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    record, out = captured(model.double(), inputs)
    other, _ = build_model(build)
    other.load_state_dict(model.state_dict())
    fused, fused_out = captured(other.double(), inputs)
    for method in ("gradient", "lrp"):
        found = record.relevance(score_of(out), token, method=method)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, fused.relevance(score_of(fused_out), token, method=method), rtol=1e-5, atol=1e-6)


def test_bad_input() -> None:
    model, inputs = build_model(models.vit)
    record, out = captured(model, inputs)
    score = score_of(out)
    with pytest.raises(TypeError, match=r"score: expected a torch.Tensor, got float"):
        record.relevance(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"score: expected a tensor with a graph, got one without"):
        record.relevance(score.detach())
    with pytest.raises(ValueError, match=r"score: expected a scalar, \(2,\) or \(2, K\), got shape \(2, 3, 4\)"):
        record.relevance(torch.randn(2, 3, 4, requires_grad=True))
    with pytest.raises(ValueError, match=r"score: expected at least one score, got shape \(2, 0\)"):
        record.relevance(score[:, None][:, :0])
    with pytest.raises(ValueError, match=r"score: expected a score that depends on layer 0"):
        record.relevance(torch.randn(2, requires_grad=True))
    with pytest.raises(ValueError, match=r"method: expected 'gradient' or 'lrp', got 'rollout'"):
        record.relevance(score, method="rollout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token: expected an index in"):
        record.relevance(score, token=1000)
    with pytest.raises(ValueError, match=r"head_fusion: expected 'mean' or 'sum', got 'max'"):
        record.relevance(score, head_fusion="max")
    with pytest.raises(ValueError, match=r"residual: expected a weight of at least 0, got -1"):
        record.relevance(score, residual=-1)
    with pytest.raises(ValueError, match=r"score: expected a scalar or \(2,\), got shape \(2, 1\)"):
        record.weighted_attentions(score[:, None])
    with torch.no_grad():
        record, _ = captured(model, inputs)
    with pytest.raises(ValueError, match=r"layer 0 .* was captured without gradients"):
        record.relevance(score)
    model.train()
    record, out = captured(model, inputs)
    record.relevance(score_of(out))
    with pytest.raises(ValueError, match=r"method: 'lrp' needs a forward pass of the captured model in evaluation mode"):
        record.relevance(score_of(out), method="lrp")


def test_signed_attention_of_a_loss_for_each_sample_works_without_grad_mode() -> None:
    alpha = torch.rand(3, 4, requires_grad=True)
    loss = (alpha**2).sum(1)
    with torch.no_grad():
        found = xf.attention.signed_attention(alpha, loss)
    torch.testing.assert_close(found, -2 * alpha.detach() ** 2)


@pytest.mark.parametrize("weight", [1e-3, 1e-7, 1e-8, 1e-30])
def test_small_weights_of_an_encoder_decoder_are_not_lost(weight: float) -> None:
    """R - I, of the size of the weights, is what gets normalised: next to the ones of R it would vanish in float32."""
    draw = [torch.rand(1, 3, 3, dtype=torch.float64) for _ in range(6)]
    encoder, decoder, cross = [m * weight for m in draw[:2]], [m * weight for m in draw[2:4]], draw[4:]
    wanted = xf.attention.encoder_decoder_relevance(encoder, decoder, cross).cross
    single = [[m.float() for m in layers] for layers in (encoder, decoder, cross)]
    found = xf.attention.encoder_decoder_relevance(*single).cross
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=0.0)
    assert not torch.allclose(found, sum(m.float() for m in cross), rtol=1e-3)
