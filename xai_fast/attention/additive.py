"""Additive (MLP) attention, as recurrent networks use it, whose hidden layer is never stored for all pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._dtypes import accumulate_dtype
from ..ops import _checks as check

__all__ = ["AdditiveAttention", "additive_attention_scores"]

# Hidden values at a time: 2 MB in float32, which stays in a core's cache.
TILE = 1 << 19


def additive_attention_scores(keys: Tensor, queries: Tensor | None, weight: Tensor) -> Tensor:
    """Scores of additive attention from projected keys and queries.

    .. math:: e_{ti} = v^\\top \\tanh(k_i + q_t), \\qquad k_i = W_h h_i + b, \\quad q_t = W_q s_t

    Parameters
    ----------
    keys : Tensor, shape (B, S, H)
        :math:`k_i`, projected once for all queries.
    queries : Tensor, shape (B, T, H) or (B, H), or None
        :math:`q_t`; None: :math:`v^\\top \\tanh(k_i)`, the scores of self-attentive pooling.
    weight : Tensor, shape (H,)
        :math:`v`.

    Returns
    -------
    Tensor, shape (B, T, S), or (B, S) without an axis of queries
        In the dtype of the keys; 16-bit input is computed in float32. Differentiable once.

    Raises
    ------
    TypeError
        Not floating tensors, or of different dtypes.
    ValueError
        Shapes that do not fit, or different devices.

    Notes
    -----
    The hidden layer has B T S H values. It is computed tile by tile, and again in the backward pass, so that memory beyond a
    tile is B (T + S) H + B T S.

    Source: Bahdanau, Cho & Bengio (2015), "Neural Machine Translation by Jointly Learning to Align and Translate",
    arXiv 1409.0473, appendix A.1.2; pooling: Lin et al. (2017), "A Structured Self-attentive Sentence Embedding",
    arXiv 1703.03130, eq. 5.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.attention.additive import additive_attention_scores
    >>> keys, queries = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [-1.0]]])
    >>> additive_attention_scores(keys, queries, torch.ones(1))
    tensor([[[ 0.0000,  0.7616],
             [-0.7616,  0.0000]]])
    """
    _check_scores(keys, queries, weight)
    if queries is not None and queries.dim() == 3:
        return _Scores.apply(keys, queries, weight)
    single = torch.zeros_like(keys[:, 0]) if queries is None else queries
    return _Scores.apply(keys, single.unsqueeze(1), weight).squeeze(1)


class AdditiveAttention(nn.Module):
    """Additive attention over a memory, for queries or, without them, as self-attentive pooling.

    .. math:: e_{ti} = v^\\top \\tanh(W_h h_i + W_q q_t + b), \\qquad
              \\alpha_t = \\mathrm{softmax}(e_t), \\qquad c_t = \\sum_i \\alpha_{ti} h_i

    Parameters
    ----------
    key_dim : int
        Size of the memory's states :math:`h_i`.
    query_dim : int or None
        Size of the queries; None: pooling, :math:`e_i = v^\\top \\tanh(W_h h_i + b)`.
    hidden_dim : int
    bias : bool
        Whether there is b.

    Raises
    ------
    TypeError, ValueError
        Sizes that are no whole numbers of at least 1.

    Notes
    -----
    **Masks**: True keeps a key, as in the ``attn_mask`` of ``xf.ops`` and of torch's ``scaled_dot_product_attention``.
    ``torch.nn.MultiheadAttention`` gives its argument of the same name the opposite meaning: pass ``~mask`` of such a mask.

    Source: Bahdanau, Cho & Bengio (2015), arXiv 1409.0473; pooling: Lin et al. (2017), arXiv 1703.03130, with one hop.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> from xai_fast.attention.additive import AdditiveAttention
    >>> attention = AdditiveAttention(key_dim=4, query_dim=3, hidden_dim=8)
    >>> keep = torch.tensor([[True, True, False]])
    >>> context, alpha = attention(torch.randn(1, 3, 4), torch.randn(1, 2, 3), keep)
    >>> context.shape, alpha.shape, alpha[..., 2].tolist()
    (torch.Size([1, 2, 4]), torch.Size([1, 2, 3]), [[0.0, 0.0]])
    >>> xf.attention.signed_attention(alpha, context.square().sum()).shape
    torch.Size([1, 2, 3])
    """

    def __init__(self, key_dim: int, query_dim: int | None, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        key_dim = check.check_count(key_dim, "key_dim")
        hidden_dim = check.check_count(hidden_dim, "hidden_dim")
        if query_dim is not None:
            query_dim = check.check_count(query_dim, "query_dim")
        self.key = nn.Linear(key_dim, hidden_dim, bias=bias)
        self.query = None if query_dim is None else nn.Linear(query_dim, hidden_dim, bias=False)
        self.score = nn.Parameter(torch.empty(hidden_dim).uniform_(-1, 1) / math.sqrt(hidden_dim))

    def forward(
        self, memory: Tensor, query: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend to the memory.

        Parameters
        ----------
        memory : Tensor, shape (B, S, Dk)
        query : Tensor, shape (B, T, Dq) or (B, Dq), or None
            None for an attention without queries, and only then.
        key_padding_mask : bool Tensor, shape (B, S), optional
            **True keeps** (see the notes of the class). What a masked state holds does not matter, NaN included.

        Returns
        -------
        context : Tensor, shape (B, T, Dk), or (B, Dk) without an axis of queries
        alpha : Tensor, shape (B, T, S) or (B, S)
            Exactly 0 where masked; all 0 (and so the context) where every key is. The context is made of this tensor, so
            ``xf.attention.signed_attention(alpha, loss)`` finds it in the graph.

        Raises
        ------
        TypeError
            Not floating tensors; a mask that is not boolean.
        ValueError
            Shapes that do not fit; a query missing, or one too many.
        """
        alpha = self.weights(memory, query, key_padding_mask)
        return attend(alpha, _without_padding(memory, key_padding_mask)), alpha

    def weights(self, memory: Tensor, query: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Only alpha: arguments and errors as of a call."""
        self._check(memory, query, key_padding_mask)
        keys = self.key(_without_padding(memory, key_padding_mask))
        queries = None if self.query is None or query is None else self.query(query)
        # Under autocast the projections come in 16 bit, the parameter does not.
        scores = additive_attention_scores(keys, queries, self.score.to(keys.dtype))
        return _softmax(scores, key_padding_mask)

    def _check(self, memory: Any, query: Any, mask: Any) -> None:
        check.check_float_tensor(memory, "memory")
        size = self.key.in_features
        if memory.dim() != 3 or memory.shape[2] != size:
            raise ValueError(f"memory: expected shape (B, S, {size}), got {check.shape_of(memory)}")
        _check_query(query, memory, None if self.query is None else self.query.in_features)
        if mask is not None:
            _check_mask(mask, memory)


def attend(alpha: Tensor, memory: Tensor) -> Tensor:
    """sum_i alpha_ti h_i: (B, T, S) or (B, S) with (B, S, D) to (B, T, D) or (B, D)."""
    return alpha @ memory if alpha.dim() == 3 else (alpha.unsqueeze(1) @ memory).squeeze(1)


def _without_padding(memory: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where masked: 0 times what stands there could be NaN."""
    return memory if mask is None else memory.masked_fill(~mask.unsqueeze(-1), 0)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the kept keys, 0 elsewhere; zeros where none is kept."""
    if mask is None:
        return scores.softmax(-1)
    mask = mask.unsqueeze(1) if scores.dim() == 3 else mask
    # A row of -inf alone would be NaN, also in the gradient: such a row keeps its scores, and is cleared after.
    hidden = ~mask & mask.any(-1, keepdim=True)
    return scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(~mask, 0)


class _Scores(torch.autograd.Function):
    """v . tanh(k_s + q_t) in tiles; the backward pass computes each tile again."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, queries: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keys, queries, weight)
        dtype = accumulate_dtype(keys.dtype)
        scores = keys.new_empty(keys.shape[0], queries.shape[1], keys.shape[1])
        v = weight.to(dtype)
        # Autocast would round the hidden layer to 16 bit once more.
        with torch.autocast(keys.device.type, enabled=False):
            for b, t, s in _tiles(keys, queries):
                scores[b, t, s] = _hidden(keys[b, s], queries[b, t], dtype) @ v
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, queries, weight = ctx.saved_tensors
        dtype = accumulate_dtype(keys.dtype)
        grad_keys, grad_queries, grad_weight = (torch.zeros_like(x, dtype=dtype) for x in (keys, queries, weight))
        for b, t, s in _tiles(keys, queries):
            hidden = _hidden(keys[b, s], queries[b, t], dtype)
            outer = grad[b, t, s].to(dtype)
            grad_weight += outer.reshape(-1) @ hidden.reshape(-1, hidden.shape[-1])
            # g (1 - tanh^2); the factor v, the same for all tiles, comes last.
            inner = hidden.square_().neg_().add_(1).mul_(outer.unsqueeze(-1))
            grad_keys[b, s] += inner.sum(1)
            grad_queries[b, t] += inner.sum(2)
        v = weight.to(dtype)
        return (grad_keys * v).to(keys.dtype), (grad_queries * v).to(queries.dtype), grad_weight.to(weight.dtype)


def _hidden(keys: Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor:
    """tanh(k_s + q_t) of a tile (b, t, s, H)."""
    return (queries.to(dtype).unsqueeze(2) + keys.to(dtype).unsqueeze(1)).tanh_()


def _tiles(keys: Tensor, queries: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Ranges of samples, queries and keys, as square as they can be: the sums over a tile are then the smallest."""
    batch, columns, hidden = keys.shape
    rows = queries.shape[1]
    room = max(1, TILE // max(1, hidden))
    wide = max(1, min(columns, max(math.isqrt(room), room // max(1, rows))))
    high = max(1, min(rows, room // wide))
    deep = max(1, room // (wide * high))
    for b in range(0, batch, deep):
        for t in range(0, rows, high):
            for s in range(0, columns, wide):
                yield slice(b, b + deep), slice(t, t + high), slice(s, s + wide)


def _check_scores(keys: Any, queries: Any, weight: Any) -> None:
    check.check_float_tensor(keys, "keys")
    if keys.dim() != 3:
        raise ValueError(f"keys: expected shape (B, S, H), got {check.shape_of(keys)}")
    batch, _, hidden = keys.shape
    check.check_like(weight, "weight", (hidden,), keys)
    if queries is None:
        return
    check.check_float_tensor(queries, "queries")
    shape = check.shape_of(queries)
    if len(shape) not in (2, 3) or shape[0] != batch or shape[-1] != hidden:
        raise ValueError(f"queries: expected shape ({batch}, T, {hidden}) or ({batch}, {hidden}), got {shape}")
    check.check_like(queries, "queries", shape, keys)


def _check_query(query: Any, memory: Tensor, size: int | None) -> None:
    if size is None:
        if query is not None:
            raise ValueError("query: expected None, as query_dim is None, got a query")
        return
    if query is None:
        raise ValueError(f"query: expected a tensor, as query_dim is {size}, got None")
    check.check_float_tensor(query, "query")
    batch, shape = memory.shape[0], check.shape_of(query)
    if len(shape) not in (2, 3) or shape[0] != batch or shape[-1] != size:
        raise ValueError(f"query: expected shape ({batch}, T, {size}) or ({batch}, {size}), got {shape}")
    check.check_same_device(query, "query", memory.device)


def _check_mask(mask: Any, memory: Tensor) -> None:
    wanted = tuple(memory.shape[:2])
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask: expected a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected a boolean tensor, True for keys to keep, got {mask.dtype}")
    if tuple(mask.shape) != wanted:
        raise ValueError(f"key_padding_mask: expected shape (B, S) = {wanted}, got {check.shape_of(mask)}")
    check.check_same_device(mask, "key_padding_mask", memory.device)
