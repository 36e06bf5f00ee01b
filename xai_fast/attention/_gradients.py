"""Gradients at captured attention, and the relevance that they give its weights.

A layer that was captured with gradients has a tap: at the output of its attention, or at its probabilities where the model
wrote them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .. import ops
from .._dtypes import accumulate_dtype
from ._layers import CapturedLayer, QueryKeyLayer, keep

__all__ = ["OutputTap", "ProbabilityTap", "Tap", "check_score", "layer_gradients"]


class Tap:
    """The place in the graph where a layer's gradient is asked for, and what its relevance is made of.

    ``modified`` is the gradient of a relevance pass, None without one.

    Parameters
    ----------
    tensor : Tensor
        With a graph, which stays alive with the tap: its gradient is that of the layer.
    relevance_pass : callable, optional
        Gives a context in which backward passes through this graph are relevance passes.
    """

    def __init__(self, tensor: Tensor, relevance_pass: Callable[[], AbstractContextManager[None]] | None) -> None:
        self.edge = get_gradient_edge(tensor)
        self.relevance_pass = relevance_pass

    def weights(self, layer: CapturedLayer, grad: Tensor, modified: Tensor | None) -> Tensor:
        """dA o A, or dA o R_A (B, H, Nq, Nk)."""
        raise NotImplementedError

    def advance(
        self, layer: CapturedLayer, rows: Tensor, grad: Tensor, modified: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """rows (B, R, N) times norm(w I + fuse_h max(0, weights))."""
        weights = self.weights(layer, grad, modified)
        clamped = weights.clamp(min=0) if options["clamp"] else weights
        chosen = {name: options[name] for name in ("head_fusion", "residual", "normalize")}
        # A model in float64 may take its softmax in float32, as those of Hugging Face do.
        dtype = torch.promote_types(rows.dtype, accumulate_dtype(clamped.dtype))
        if accumulate_dtype(clamped.dtype) != dtype:
            clamped = clamped.to(dtype)
        return ops.rollout_rows(clamped, rows.to(clamped.device, dtype), **chosen)

    def signed(self, layer: CapturedLayer, grad: Tensor) -> Tensor:
        """sum_i A_ij dA_ij for each head and key, (B, H, Nk)."""
        return self.weights(layer, grad, None).sum(2)


class ProbabilityTap(Tap):
    """At the probabilities of attention that is written out: their gradient is dA."""

    def __init__(self, probabilities: Tensor, relevance_pass: Any) -> None:
        super().__init__(probabilities, relevance_pass)
        self._kept = keep(probabilities)

    def weights(self, layer: CapturedLayer, grad: Tensor, modified: Tensor | None) -> Tensor:
        weights = self._kept.get(f"the probabilities of {layer.describe()}") * grad
        return layer.as_batch_heads(weights if modified is None else weights * modified)


class OutputTap(Tap):
    """At the output O = A V of fused attention: dA = dO V^T."""

    def __init__(self, value: Tensor, output: Tensor, relevance_pass: Any) -> None:
        super().__init__(output, relevance_pass)
        self._value, self._output = keep(value), keep(output)

    def _tensors(self, layer: QueryKeyLayer, grad: Tensor) -> tuple[Tensor, ...]:
        query, key = layer.query_key()
        value = layer.as_batch_heads(self._value.get(f"the value of {layer.describe()}"), grouped=True)
        if value.shape[:2] != key.shape[:2]:
            heads = max(value.shape[1], key.shape[1])
            key, value = (
                x.expand(query.shape[0], -1, -1, -1).repeat_interleave(heads // x.shape[1], 1) for x in (key, value)
            )
        return query, key, value, layer.as_batch_heads(grad)

    def _relevance(self, layer: QueryKeyLayer, modified: Tensor | None) -> dict[str, Any]:
        if modified is None:
            return {}
        output = layer.as_batch_heads(self._output.get(f"the attention output of {layer.describe()}"))
        # R_O = O g, so that R_O / O is g: nothing to stabilise.
        return {"relevance_out": output * layer.as_batch_heads(modified), "output": output, "eps": 0.0}

    def advance(
        self, layer: CapturedLayer, rows: Tensor, grad: Tensor, modified: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        assert isinstance(layer, QueryKeyLayer)
        query, key, value, grad = self._tensors(layer, grad)
        relevance = self._relevance(layer, modified)
        return ops.targeted_rows(
            query, key, value, grad, rows.to(query.device), **_score_options(layer), **relevance, **options
        )

    def weights(self, layer: CapturedLayer, grad: Tensor, modified: Tensor | None) -> Tensor:
        assert isinstance(layer, QueryKeyLayer)
        query, key, value, grad = self._tensors(layer, grad)
        probabilities = ops.attention_probabilities(query, key, **_score_options(layer))
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        gradient = grad @ value.transpose(-1, -2)
        if modified is None:
            return probabilities * gradient
        relevance = self._relevance(layer, modified)
        return ops.av_relevance(probabilities, value, relevance["relevance_out"], eps=0.0)[0] * gradient

    def signed(self, layer: CapturedLayer, grad: Tensor) -> Tensor:
        # sum_i A_ij dA_ij = V_j . (A^T dO)_j: no matrix needed.
        assert isinstance(layer, QueryKeyLayer)
        query, key, value, grad = self._tensors(layer, grad)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        _, _, passed = ops.fused_attention.attention_gradients(query, key, value, grad, lam=0.0, **_score_options(layer))
        return (value * passed).sum(-1)


def _score_options(layer: QueryKeyLayer) -> dict[str, Any]:
    return {"scale": layer.scale, "is_causal": layer.is_causal, "attn_mask": layer.attn_mask()}


def check_score(score: Any, name: str, batch: int) -> list[Tensor]:
    """The scalars to differentiate: one, or one for each of several targets of a (B, K) score."""
    if not isinstance(score, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(score).__name__}")
    if not score.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {score.dtype}")
    if not score.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor with a graph, got one without (run the model with gradients enabled, and on an "
            "input or parameters that require grad)"
        )
    if score.dim() > 2 or (score.dim() > 0 and score.shape[0] != batch):
        raise ValueError(f"{name}: expected a scalar, ({batch},) or ({batch}, K), got shape {tuple(score.shape)}")
    if score.numel() == 0:
        raise ValueError(f"{name}: expected at least one score, got shape {tuple(score.shape)}")
    return [score.sum()] if score.dim() < 2 else list(score.sum(0).unbind())


def layer_gradients(scalar: Tensor, layers: Sequence[CapturedLayer], name: str, *, relevance: bool = False) -> list[Tensor]:
    """The gradient of the scalar at every layer, by one backward pass (a relevance pass on request) that keeps the graph."""
    taps = [layer.tap for layer in layers]
    for layer, tap in zip(layers, taps, strict=True):
        if tap is None:
            raise ValueError(
                f"{layer.describe()} was captured without gradients; run the model inside the context with gradients "
                "enabled, on an input or parameters that require grad"
            )
        if relevance and tap.relevance_pass is None:
            raise ValueError(
                "method: 'lrp' needs a forward pass of the captured model in evaluation mode (model.eval()); "
                f"{layer.describe()} ran without it"
            )
    found = [tap for tap in taps if tap is not None]
    with found[0].relevance_pass() if relevance and found[0].relevance_pass else nullcontext():
        grads = torch.autograd.grad(scalar, [tap.edge for tap in found], retain_graph=True, allow_unused=True)
    for layer, grad in zip(layers, grads, strict=True):
        if grad is None:
            raise ValueError(f"{name}: expected a score that depends on {layer.describe()}, but no gradient reaches it")
    return list(grads)
