"""Relevance against its peers: rules on given tensors, fused attention, targeted steps, and whole models.

Run: make bench, or pytest benchmarks/test_relevance.py -s [--write-results] [--threads N]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xai_fast as xf
from benchmarks.harness import Table, alternate
from benchmarks.peers import relevance_chains as chains
from benchmarks.peers.fast_vit_rollout import PEERS
from xai_fast.attention.record import AttentionRecord
from xai_fast.demo.measure import peak_memory
from xai_fast.demo.models.dinov2 import WeightsUnavailable, load_dinov2

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Peers = dict[str, Callable[[], Any]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def add_rows(
    table: Table, case: str, times: dict[str, float], base: str, floor: tuple[str, float] | None = None, **memory: int | None
) -> None:
    """One line a peer: time, time relative to `base`, and the roof measured in the same run."""
    for name, seconds in times.items():
        cells = {"ms": f"{seconds * 1e3:.2f}", f"relative to {base}": f"{seconds / times[base]:.2f}"}
        if floor is not None:
            cells[floor[0]] = f"{floor[1] / seconds:.2f}"
        if name in memory and memory[name] is not None:
            cells["extra MB"] = f"{memory[name] / 2**20:.1f}"  # type: ignore[operator]
        table.add(case=case, method=name, **cells)


def assert_alike(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Medians: where an output nearly vanishes, rounding decides its share R / O."""
    assert float((found - wanted).abs().median() / wanted.abs().median()) < tolerance


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@functools.cache
def gemm_rate() -> float:
    """Floating-point operations a second of a large matrix product."""
    large = normal(2048, 2048)
    return 2 * 2048**3 / alternate({"gemm": lambda: large @ large})["gemm"]


@contextmanager
def peers_importable() -> Iterator[None]:
    from tests.peers import torchvision_shim  # noqa: F401  must come before torchvision

    sys.path.append(str(PEERS))
    try:
        yield
    finally:
        sys.path.remove(str(PEERS))


@pytest.mark.parametrize("shape", [(8, 12, 197, 64), (1, 16, 577, 64)], ids=str)
def test_av(table: Table, shape: tuple[int, ...]) -> None:
    batch, heads, tokens, dim = shape
    attention, value = normal(batch, heads, tokens, tokens).softmax(-1), normal(*shape)
    relevance = (attention @ value) * normal(*shape)  # no relevance where there is no output, as in a model
    peers: Peers = {
        "xai_fast": lambda: xf.ops.av_relevance(attention, value, relevance),
        "unfused torch": lambda: chains.unfused_av(attention, value, relevance),
    }
    with peers_importable():
        from lxt.explicit import functional as lxt
    leaves = [t.clone().requires_grad_() for t in (attention, value)]
    peers["lxt.explicit (forward and backward)"] = lambda: torch.autograd.grad(
        lxt.matmul(*leaves, False, 1e-6), leaves, relevance
    )
    for found, wanted in zip(peers["xai_fast"](), peers["unfused torch"](), strict=True):  # type: ignore[call-overload]
        assert_alike(found, wanted)
    memory = {name: peak_memory(call, DEVICE) for name, call in peers.items()}
    floor = 3 * 2 * batch * heads * tokens**2 * dim / gemm_rate()
    case = f"av_relevance, A given, (B,H,N,d) = {shape}; outputs take {(attention.nbytes + value.nbytes) / 2**20:.1f} MB"
    add_rows(table, case, alternate(peers), "xai_fast", ("share of GEMM peak (3 products)", floor), **memory)


@pytest.mark.parametrize("tokens", [197, 577, 1024, 2048, 4096])
def test_attention(table: Table, tokens: int) -> None:
    shape = (1, 12, tokens, 64)
    query, key, value = (normal(*shape) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out = F.scaled_dot_product_attention(*leaves)
    known = out.detach()
    relevance = known * normal(*shape)
    lse = torch.stack([(q @ k.T / 8).logsumexp(-1) for q, k in zip(query[0], key[0], strict=True)])[None]
    ours = functools.partial(xf.ops.attention_relevance, query, key, value, relevance)
    peers: Peers = {
        "SDPA backward (has O and LSE)": lambda: torch.autograd.grad(out, leaves, relevance, retain_graph=True),
        "xai_fast, O and LSE given": lambda: ours(output=known, lse=lse),
        "xai_fast, O given": lambda: ours(output=known),
        "xai_fast, O given, eps = 0": lambda: ours(output=known, eps=0.0),
        "xai_fast": ours,
        "xai_fast, eps = 0": lambda: ours(eps=0.0),
        "xai_fast, lam = 0 (CP-LRP), O given": lambda: ours(lam=0.0, output=known),
        "xai_fast, lam = 0 (CP-LRP)": lambda: ours(lam=0.0),
        "SDPA forward": lambda: F.scaled_dot_product_attention(query, key, value),
    }
    if tokens <= 2048:
        peers["unfused torch"] = lambda: chains.unfused_attention(query, key, value, relevance)
        for found, wanted in zip(ours(), peers["unfused torch"](), strict=True):  # type: ignore[call-overload]
            assert_alike(found, wanted)
    floor = 5 * 2 * 12 * tokens**2 * 64 / gemm_rate()
    times = alternate(peers, rounds=7)
    add_rows(
        table,
        f"attention_relevance, fp32, H = 12, d = 64, N = {tokens}",
        times,
        "SDPA backward (has O and LSE)",
        ("share of GEMM peak (5 products)", floor),
    )


def test_attention_memory(table: Table) -> None:
    query, key, value, relevance = (normal(1, 4, 16384, 64) for _ in range(4))
    case = "peak extra memory, attention_relevance, N = 16384, H = 4, d = 64"
    for name, lam in (("xai_fast", 0.5), ("xai_fast, lam = 0", 0.0)):
        relevance[:, :, 512:] = 0  # time, not memory, depends on how many queries have relevance
        extra = peak_memory(lambda lam=lam: xf.ops.attention_relevance(query, key, value, relevance, lam=lam), DEVICE)
        assert extra is not None
        assert extra < 300 * 2**20
        table.add(case=case, method=name, MB=f"{extra / 2**20:.1f}")
    table.add(case=case, method="outputs R_Q, R_K, R_V alone", MB=f"{3 * query.nbytes / 2**20:.1f}")
    table.add(case=case, method="attention matrices (computed, not allocated)", MB=f"{4 * 16384**2 * 4 / 2**20:.1f}")


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_targeted_step(table: Table, tokens: int) -> None:
    query, key, value, grad, relevance = (normal(1, 12, tokens, 64) for _ in range(5))
    rows = torch.rand(1, 1, tokens, device=DEVICE)
    probs = xf.ops.attention_probabilities(query, key)
    peers: Peers = {
        "xai_fast, ICCV form": lambda: xf.ops.targeted_rows(query, key, value, grad, rows),
        "xai_fast, CVPR form": lambda: xf.ops.targeted_rows(query, key, value, grad, rows, relevance_out=relevance),
        "Chefer's step, A given": lambda: chains.chefer_step(probs, value, grad, rows),
        "Chefer's step, A built first": lambda: chains.chefer_step(
            xf.ops.attention_probabilities(query, key), value, grad, rows
        ),
        "SDPA forward": lambda: F.scaled_dot_product_attention(query, key, value),
    }
    found, wanted = peers["xai_fast, ICCV form"](), peers["Chefer's step, A given"]()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    memory = {name: peak_memory(call, DEVICE) for name, call in peers.items()}
    floor = 2 * 2 * 12 * tokens**2 * 64 / gemm_rate()
    case = f"targeted step, fp32, H = 12, d = 64, N = {tokens}"
    add_rows(table, case, alternate(peers), "xai_fast, ICCV form", ("share of GEMM peak (2 products)", floor), **memory)


def test_bandwidth_bound_rules(table: Table) -> None:
    x, y, relevance = normal(64, 257, 768), normal(64, 257, 768), normal(64, 257, 768)
    weight, bias, probs = normal(768), normal(768), x.softmax(-1)
    cases: dict[str, tuple[Peers, tuple[int, int]]] = {
        "skip_relevance": (
            {
                "xai_fast": lambda: xf.ops.skip_relevance(x, y, relevance),
                "xai_fast, ratio": lambda: xf.ops.skip_relevance(x, y, relevance, rule="ratio"),
                "unfused torch": lambda: chains.unfused_skip(x, y, relevance),
            },
            (3, 2),
        ),
        "softmax_relevance": (
            {
                "xai_fast": lambda: xf.ops.softmax_relevance(x, probs, relevance),
                "unfused torch": lambda: chains.unfused_softmax(x, probs, relevance),
            },
            (3, 1),
        ),
        "layer_norm_relevance": (
            {
                "xai_fast": lambda: xf.ops.layer_norm_relevance(x, weight, bias, relevance),
                "unfused torch": lambda: chains.unfused_layer_norm(x, weight, bias, relevance),
            },
            (2, 1),
        ),
    }
    for name, (peers, (reads, writes)) in cases.items():
        for a, b in zip(*map(as_tuple, (peers["xai_fast"](), peers["unfused torch"]())), strict=True):
            assert_alike(a, b)
        peers[f"read {reads} and write {writes} once (new memory for the results)"] = _allocating(reads, writes, x)
        times = alternate(peers)
        roof = times[next(reversed(times))]
        add_rows(table, f"{name}, (64,257,768) fp32", times, "xai_fast", ("share of bandwidth", roof))


def test_sixteen_bits(table: Table) -> None:
    """What 16-bit inputs save, or cost, beside the same numbers in fp32."""
    batch, heads, tokens, dim = 4, 12, 257, 64
    attention = normal(batch, heads, tokens, tokens).softmax(-1)
    query, key, value, share = (normal(batch, heads, tokens, dim) for _ in range(4))
    x, y, r = (normal(16, tokens, 768) for _ in range(3))
    # No relevance where there is no output, as in a model.
    from_av, from_attention = share * (attention @ value), share * F.scaled_dot_product_attention(query, key, value)
    cases: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = {
        "av_relevance, (4,12,257,257) x 64": (xf.ops.av_relevance, chains.unfused_av, (attention, value, from_av)),
        "attention_relevance, (4,12,257,64)": (
            xf.ops.attention_relevance,
            chains.unfused_attention,
            (query, key, value, from_attention),
        ),
        "skip_relevance, (16,257,768)": (xf.ops.skip_relevance, chains.unfused_skip, (x, y, r)),
        "softmax_relevance, (16,257,768)": (xf.ops.softmax_relevance, chains.unfused_softmax, (x, y.softmax(-1), r)),
    }
    for name, (ours, by_hand, inputs) in cases.items():
        peers: Peers = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            arguments = [t.to(dtype) for t in inputs]
            rounding = float(torch.finfo(dtype).eps) if dtype.itemsize == 2 else 1e-4
            wanted = by_hand(*(t.float() for t in arguments))
            for a, b in zip(*map(as_tuple, (ours(*arguments), wanted)), strict=True):
                assert_alike(a.float(), b, rounding)
            kind = str(dtype).removeprefix("torch.")
            peers[f"xai_fast, {kind}"] = functools.partial(ours, *arguments)
            peers[f"unfused torch, {kind}"] = functools.partial(by_hand, *arguments)
        add_rows(table, name, alternate(peers), "xai_fast, float32")


def _allocating(reads: int, writes: int, like: Tensor) -> Callable[[], object]:
    """The least that an op of new results moves: `writes` clones, and the sums of the other inputs."""
    sources = [like.clone() for _ in range(reads)]

    def run() -> list[Tensor]:
        results = [source.clone() for source in sources[:writes]]
        for source in sources[writes:]:
            source.sum()
        return results

    return run


class Classifier(nn.Module):
    """DINOv2 with a linear head on CLS."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(384, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.backbone(pixel_values).last_hidden_state[:, 0])


def test_whole_vision_transformer(table: Table) -> None:
    """lrp.attribute and targeted relevance beside a forward pass and an input gradient of the same model."""
    try:
        model = Classifier(load_dinov2()).eval().to(DEVICE).requires_grad_(False)
    except (ImportError, WeightsUnavailable) as error:
        pytest.skip(str(error))
    pixels = normal(8, 3, 224, 224)

    def gradient() -> Tensor:
        leaf = pixels.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return model(pixels)

    def captured() -> tuple[AttentionRecord, Tensor]:
        leaf = pixels.clone().requires_grad_()
        with xf.capture_attention(model) as record:
            return record, model(leaf)[:, 3]

    def targeted(method: Any) -> Tensor:
        record, score = captured()
        return record.relevance(score, method=method)

    done, done_score = captured()

    peers: Peers = {
        "forward and input gradient": gradient,
        "forward alone": forward,
        "lrp.attribute, attnlrp": lambda: xf.lrp.attribute(model, pixels, 3),
        "lrp.attribute, cp-lrp": lambda: xf.lrp.attribute(model, pixels, 3, "cp-lrp"),
        "forward and targeted relevance, gradient": lambda: targeted("gradient"),
        "forward and targeted relevance, lrp": lambda: targeted("lrp"),
        "targeted relevance, gradient (forward done)": lambda: done.relevance(done_score),
        "targeted relevance, lrp (forward done)": lambda: done.relevance(done_score, method="lrp"),
    }
    assert all(call().isfinite().all() for call in peers.values())
    memory = {name: peak_memory(call, DEVICE) for name, call in peers.items()}
    times = alternate(peers, rounds=7, seconds=60)
    add_rows(table, "DINOv2 ViT-S/14, batch 8, 224 px, frozen", times, "forward and input gradient", **memory)


def test_whole_text_model_against_autolrp(table: Table) -> None:
    """A BERT of the size of MiniLM (6 layers, width 384) and 128 tokens, from its embeddings; eager attention for both."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, attn_implementation="eager"
    )
    model = transformers.BertForSequenceClassification(config).eval().to(DEVICE).requires_grad_(False)
    embeddings = normal(4, 128, 384)

    def gradient() -> Tensor:
        leaf = embeddings.clone().requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=leaf).logits[:, 1].sum(), leaf)[0]

    peers: Peers = {
        "forward and input gradient": gradient,
        "lrp.attribute, attnlrp": lambda: xf.lrp.attribute(model, {"inputs_embeds": embeddings}, 1)["inputs_embeds"],
    }
    with peers_importable():
        import autolrp  # type: ignore[import-not-found]

    def peer() -> Tensor:
        wrapped = autolrp.tensor(embeddings)
        rules = autolrp.merge(autolrp.BASE, autolrp.ATTNLRP)
        model(inputs_embeds=wrapped).logits[:, 1].sum().lrp(config=autolrp.LRPConfig(rule=rules))
        return wrapped.relevance

    peers["autolrp, ATTNLRP"] = peer
    assert all(call().isfinite().all() for call in peers.values())
    add_rows(table, "BERT, 6 layers, width 384, 4 x 128 tokens", alternate(peers), "forward and input gradient")
