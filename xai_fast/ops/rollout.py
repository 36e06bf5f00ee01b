"""Attention rollout, one step at a time: the row step, the fused matrix, and the row step streamed from q and k.

    Abar = norm(w I + fuse_h A_h)      A (B,H,N,N), query i, key j; w = residual; norm divides each row by its sum

Rollout (Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", eq. 1 and section 3) multiplies later layers
on the left, Abar^L ... Abar^1; a row of that product needs only ``r <- r Abar^l`` for l = L..1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..reference import rollout as reference
from . import _checks as check
from ._library import Op

# From this many rows on, the fused matrix and one GEMM beat a pass over the attention for every group of rows.
MANY_ROWS = 24

_C = _backend.C


def _rollout_rows_kernel(attention: Tensor, rows: Tensor, head_fusion: str, residual: float, normalize: bool) -> Tensor:
    if rows.shape[1] < MANY_ROWS:
        return _C.rollout_rows(attention, rows, head_fusion, residual, normalize)
    if _C.has_row_product(attention):
        return _C.row_product([attention], rows, head_fusion, residual, normalize)
    fused = _C.fuse_heads(attention, head_fusion, residual, normalize, True)
    return torch.bmm(rows.to(fused.dtype), fused).to(rows.dtype)


_rollout_rows = Op(
    "rollout_rows(Tensor attention, Tensor rows, str head_fusion, float residual, bool normalize) -> Tensor",
    reference.rollout_rows,
    _C and _rollout_rows_kernel,
    lambda attention, rows, head_fusion, residual, normalize: rows.new_empty(rows.shape),
)

_fuse_heads = Op(
    "fuse_heads(Tensor attention, str head_fusion, float residual, bool normalize, bool wide) -> Tensor",
    reference.fuse_heads,
    _C and _C.fuse_heads,
    lambda attention, head_fusion, residual, normalize, wide: attention.new_empty(
        (attention.shape[0], attention.shape[2], attention.shape[3]),
        dtype=reference.accumulate_dtype(attention.dtype) if wide else attention.dtype,
    ),
)


_rollout_rows_qk = Op(
    "rollout_rows_qk(Tensor query, Tensor key, Tensor rows, Tensor? attn_mask, Tensor? lse, float? scale, bool is_causal, "
    "str head_fusion, float residual, bool normalize) -> Tensor",
    reference.rollout_rows_qk,
    _C and _C.rollout_rows_qk,
    lambda query, key, rows, *options: rows.new_empty(rows.shape),
)


def rollout_rows(
    attention: Tensor, rows: Tensor, *, head_fusion: str = "mean", residual: float = 1.0, normalize: bool = True
) -> Tensor:
    """One rollout step with the attention given: ``rows @ Abar``, in one read of the attention.

    .. math:: r'_j = \\sum_i r_i \\, \\bar A_{ij}, \\qquad \\bar A = \\mathrm{norm}(w I + \\mathrm{fuse}_h A_h)

    Parameters
    ----------
    attention : Tensor, shape (B, H, N, N)
        Attention of one layer, ``attention[b, h, i, j]`` from query i to key j. Any strides. Rows need not sum to 1.
    rows : Tensor, shape (B, R, N)
        Rows of the product so far. dtype of ``attention``, or float32 for 16-bit attention.
    head_fusion : {"mean", "sum", "max", "min"}
    residual : float
        Weight w of the identity, at least 0.
    normalize : bool
        Divide each row of ``w I + fuse_h A`` by its sum. A row whose sum is 0 becomes 0.

    Returns
    -------
    Tensor, shape (B, R, N)
        In the dtype of ``rows``. Sums are taken in float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, an unknown fusion, a negative residual.

    Notes
    -----
    Source: Abnar & Zuidema (2020), section 3. Differentiable; the backward pass runs the PyTorch reference.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> attention = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]]]])
    >>> xf.ops.rollout_rows(attention, torch.tensor([[[1.0, 0.0]]]))
    tensor([[[0.7500, 0.2500]]])
    """
    check.check_attention(attention)
    shape = attention.shape
    check.check_rows(rows, shape[0], shape[2], attention)
    check.check_head_fusion(head_fusion)
    residual = check.check_residual(residual, attention.dtype)
    return _rollout_rows(attention, rows, head_fusion, residual, bool(normalize))


def _unit_takes(layers: list[Tensor], rows: Tensor | None) -> bool:
    """Whether one call does the product of all layers: it has nothing to gain for few rows, or for Abar of one layer."""
    if torch.compiler.is_compiling() or _C is None or len(layers) < (2 if rows is None else 1):
        return False
    tensors, n_rows = (layers, layers[0].shape[-1]) if rows is None else ([rows, *layers], rows.shape[1])
    return n_rows >= MANY_ROWS and _C.callable_directly(tuple(tensors)) and all(map(_C.has_row_product, layers))


def rollout_layers(
    layers: list[Tensor], rows: Tensor | None, *, head_fusion: str, residual: float, normalize: bool
) -> Tensor:
    """``rows`` (B, R, N) through :func:`rollout_rows` of one layer after the other; arguments are taken as checked.

    The product of the layers' Abar (B, N, N) for None, which wants a layer. On a CPU with a matrix unit many rows stay its
    operands from layer to layer.
    """
    options = (head_fusion, residual, normalize)
    if _unit_takes(layers, rows):
        return _C.row_product(layers, rows, *options)
    if rows is None:
        rows, layers = _fuse_heads(layers[0], *options, True), layers[1:]
    for layer in layers:
        rows = _rollout_rows(layer, rows, *options)
    return rows


def fuse_heads(
    attention: Tensor,
    *,
    head_fusion: str = "mean",
    residual: float = 1.0,
    normalize: bool = True,
    wide: bool = False,
) -> Tensor:
    """The matrix of one layer, ``Abar = norm(w I + fuse_h A_h)``: one read of the attention, one N x N write.

    Parameters
    ----------
    attention : Tensor, shape (B, H, N, N)
    head_fusion, residual, normalize
        As in :func:`rollout_rows`.
    wide : bool
        Leave the matrix of 16-bit attention in float32, for products that round once.

    Returns
    -------
    Tensor, shape (B, N, N)
        In the dtype of ``attention``; see ``wide``.

    Raises
    ------
    TypeError, ValueError
        As :func:`rollout_rows`.

    Notes
    -----
    Source: Abnar & Zuidema (2020), section 3. Differentiable; the backward pass runs the PyTorch reference.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.fuse_heads(torch.tensor([[[[0.5, 0.5], [0.0, 1.0]]]]))
    tensor([[[0.7500, 0.2500],
             [0.0000, 1.0000]]])
    """
    check.check_attention(attention)
    check.check_head_fusion(head_fusion)
    residual = check.check_residual(residual, attention.dtype)
    return _fuse_heads(attention, head_fusion, residual, bool(normalize), bool(wide))


def _check_streamed(query: Any, key: Any, rows: Any) -> None:
    check.check_query_key(query, key)
    batch, _, tokens, _ = query.shape
    if key.shape[2] != tokens:
        raise ValueError(
            f"key: rollout needs as many keys as queries ({tokens}), got {key.shape[2]} (a cache, or cross-attention?)"
        )
    check.check_rows(rows, batch, tokens, query)


def rollout_rows_qk(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    lse: Tensor | None = None,
    residual: float = 1.0,
    normalize: bool = True,
    head_fusion: str = "mean",
) -> Tensor:
    """One rollout step streamed from query and key, with no attention matrix anywhere.

    .. math:: P_{hij} = \\exp(s\\, q_{hi} \\cdot k_{hj} + m_{ij} - \\mathrm{LSE}_{hi}), \\qquad
              r'_j = \\sum_i r_i \\, \\mathrm{norm}(w I + \\mathrm{fuse}_h P_h)_{ij}

    Queries with ``rows[:, :, i] = 0`` cost nothing, so the step of the last layer, whose rows are unit vectors, is O(N D H).

    Parameters
    ----------
    query : Tensor, shape (B, H, N, D)
    key : Tensor, shape (B, Hkv, N, D)
        Hkv divides H: query head h reads key head ``h // (H // Hkv)`` (grouped-query attention).
    rows : Tensor, shape (B, R, N)
        dtype of ``query``, or float32 for 16-bit queries.
    scale : float, optional
        s, by default ``1 / sqrt(D)``.
    is_causal : bool
        Keep keys ``j <= i``. May be combined with ``attn_mask``.
    attn_mask : Tensor, optional, broadcastable to (B, H, N, N)
        Boolean: True keeps the pair. Floating: added to the scaled score; -inf, or the lowest finite float that models write
        for it (anything up to -1.7e38), removes the pair. A query whose keys are all removed attends nothing: its row of
        P is 0.
    lse : Tensor, shape (B, H, N), optional
        Log-sum-exp of the masked, scaled scores, if it is known (fused attention returns it). On CUDA it saves a pass.
    residual, normalize, head_fusion
        As in :func:`rollout_rows`. Rows of P are taken to sum to 1 when ``lse`` is given.

    Returns
    -------
    Tensor, shape (B, R, N)
        In the dtype of ``rows``. Extra memory is O(N), see ``csrc/rollout.h``.

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, query and key of different lengths, an
        unknown fusion, a negative residual.

    Notes
    -----
    Source: Abnar & Zuidema (2020), section 3, with the softmax recomputed tile by tile as in FlashAttention (Dao et al.
    2022, algorithm 1). Differentiable; the backward pass runs the PyTorch reference, which does build the matrices.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> query = key = torch.zeros(1, 2, 4, 8)
    >>> xf.ops.rollout_rows_qk(query, key, torch.eye(4)[None, :1])
    tensor([[[0.6250, 0.1250, 0.1250, 0.1250]]])
    """
    if _C is None or torch.compiler.is_compiling() or not _C.is_usual_streamed(query, key, rows):
        _check_streamed(query, key, rows)
    check.check_head_fusion(head_fusion)
    residual = check.check_residual(residual, query.dtype)
    scale = check.check_scale(scale, query.dtype)
    if attn_mask is not None:
        attn_mask = check.check_mask(attn_mask, query, query.shape[2])
    if lse is not None:
        check.check_lse(lse, query)
    options = (attn_mask, lse, scale, bool(is_causal), head_fusion, residual, bool(normalize))
    run = _rollout_rows_qk.reference if check.too_wide_for_cuda(query) else _rollout_rows_qk
    return run(query, key, rows, *options)


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The attention matrices themselves, softmax(s q k^T + mask), for inspection: plain PyTorch, O(N^2) memory.

    Parameters
    ----------
    query : Tensor, shape (B, H, Nq, D)
    key : Tensor, shape (B, Hkv, Nk, D)
    scale, is_causal, attn_mask
        As in :func:`rollout_rows_qk`; the mask broadcasts to (B, H, Nq, Nk).

    Returns
    -------
    Tensor, shape (B, H, Nq, Nk)
        In the dtype of ``query``; fully masked rows are 0.

    Raises
    ------
    TypeError, ValueError
        As :func:`rollout_rows_qk`.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.attention_probabilities(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), is_causal=True)
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])
    """
    check.check_query_key(query, key)
    if attn_mask is not None:
        attn_mask = check.check_mask(attn_mask, query, key.shape[2])
    scale = check.check_scale(scale, query.dtype)
    out = reference.attention_probabilities(query, key, attn_mask, None, scale, bool(is_causal))
    return out.to(query.dtype)
