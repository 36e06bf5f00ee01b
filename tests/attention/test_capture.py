"""capture_attention: what it keeps, what it leaves behind, what it refuses."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import xai_fast as xf
from tests.attention.capture_checks import (
    CLOSE,
    Grouped,
    Subclass,
    assert_streams,
    build_encoder,
    captured,
    held_bytes,
    leaves_nothing,
)
from tests.attention.models import HUGGING_FACE, Written, lengths_mask
from xai_fast.attention._layers import Kept
from xai_fast.attention._notes import Derived, Scores, ScoreTracker

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
    assert tracker.find(other) == Derived()


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
