"""Relevance through fused attention: the whole operation at once, and one targeted step, without attention matrices.

As in `relevance`, the function that ends in ``_gradients`` is the same rule in gradient form.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _backend
from ..reference import relevance as reference
from . import _checks as check
from . import _relevance_checks as rules
from ._library import Op

__all__ = ["attention_relevance", "targeted_rows"]

_C = _backend.C

_ATTENTION_ARGS = (
    "Tensor query, Tensor key, Tensor value, Tensor upstream, Tensor? output, Tensor? attn_mask, float? scale, "
    "bool is_causal, float lam, float eps, bool gradient_form, Tensor? lse=None"
)


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    lam, gradient_form = options[5], options[7]
    if lam == 0 and gradient_form:
        return query.new_empty(0), key.new_empty(0), value.new_empty(value.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_attention_relevance = Op(
    f"attention_relevance({_ATTENTION_ARGS}) -> (Tensor, Tensor, Tensor)",
    reference.attention_relevance,
    _C and _C.attention_relevance,
    _attention_fake,
)

_targeted_rows = Op(
    "targeted_rows(Tensor query, Tensor key, Tensor value, Tensor grad_out, Tensor rows, Tensor? attn_mask, Tensor? lse, "
    "Tensor? relevance_out, Tensor? output, float? scale, bool is_causal, str head_fusion, bool clamp, float residual, "
    "bool normalize, float lam, float eps) -> Tensor",
    reference.targeted_rows,
    _C and _C.targeted_rows,
    lambda query, key, value, grad_out, rows, *options: rows.new_empty(rows.shape),
)


def attention_relevance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relevance: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    lam: float = 0.5,
    eps: float = 1e-6,
    output: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance of fused attention O = softmax(s Q K^T + M) V to Q, K and V, with no attention matrix anywhere.

    .. math:: S = R / \\mathrm{stab}(O), \\quad R_V = (1 - \\lambda)\\, V \\circ P^\\top S, \\quad
              G = P \\circ (S V^\\top - \\mathrm{rowsum}(S \\circ O)) \\circ x / \\mathrm{stab}(x), \\quad
              R_Q = \\tfrac{\\lambda}{2} s\\, Q \\circ G K, \\quad R_K = \\tfrac{\\lambda}{2} s\\, K \\circ G^\\top Q

    It composes the rules of :func:`av_relevance`, :func:`softmax_relevance` (taylor) and the epsilon rule of the product
    x = (s Q) K^T, in which both operands get half. A query without relevance costs nothing.

    Parameters
    ----------
    query : Tensor, shape (B, H, Nq, D)
    key : Tensor, shape (B, Hkv, Nk, D)
        Hkv divides H: query head h reads key head ``h // (H // Hkv)`` (grouped-query attention).
    value : Tensor, shape (B, Hkv, Nk, Dv)
    relevance : Tensor, shape (B, H, Nq, Dv)
        Relevance of the output.
    scale : float, optional
        s, by default ``1 / sqrt(D)``.
    is_causal : bool
        Keep keys ``j <= i``. May be combined with ``attn_mask``.
    attn_mask : Tensor, optional, broadcastable to (B, H, Nq, Nk)
        Boolean: True keeps the pair. Floating: added to the scaled score; values up to -1.7e38 remove the pair.
    lam : float
        Share of the attention weights, in [0, 1]. 0 is CP-LRP: R_Q and R_K are zeros and most of the work falls away.
    eps : float
        Stabiliser of both products, at least 0.
    output : Tensor, shape (B, H, Nq, Dv), optional
        O, if it is known; saves one of the products.
    lse : Tensor, shape (B, H, Nq), optional
        log sum exp of the masked and scaled scores, as fused attention returns it; on a GPU it saves another product.

    Returns
    -------
    tuple of Tensor
        R_Q, R_K, R_V, shaped like query, key and value. Extra memory is O(N D), see ``csrc/relevance.h``.

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, lam outside [0, 1], a negative eps.

    Notes
    -----
    Source: Achtibat et al. (2024), propositions 3.1 and 3.3; lam = 0, Ali et al. (2022). That the softmax rule is the
    softmax's own gradient, and so the whole a FlashAttention backward pass (Dao et al. 2022, algorithm 4), follows from
    sum_j R_A,ij = lam rowsum(S o O)_i.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> q = k = torch.zeros(1, 1, 2, 4)
    >>> value = torch.tensor([[[[1.0], [3.0]]]])
    >>> xf.ops.attention_relevance(q, k, value, torch.ones(1, 1, 2, 1))[2]
    tensor([[[[0.2500],
              [0.7500]]]])
    """
    rules.check_attention_inputs(query, key, value)
    shape = (*query.shape[:3], value.shape[3])
    check.check_like(relevance, "relevance", shape, query)
    options = rules.attention_options(query, key, output, attn_mask, scale, is_causal, lam, eps, shape)
    if lse is not None:
        check.check_lse(lse, query)
    return _run_attention(query, key, value, relevance, *options, False, lse)


def targeted_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    rows: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    lse: Tensor | None = None,
    relevance_out: Tensor | None = None,
    output: Tensor | None = None,
    head_fusion: str = "mean",
    clamp: bool = True,
    residual: float = 1.0,
    normalize: bool = False,
    lam: float = 0.5,
    eps: float = 1e-6,
) -> Tensor:
    """One step of class-specific (targeted) rollout, streamed from q, k, v and the gradient at the attention output.

    .. math:: \\bar A = w I + \\mathrm{mean}_h \\max(0, \\nabla A_h \\circ W_h), \\quad
              \\nabla A = \\nabla O\\, V^\\top, \\quad r' = r \\bar A

    W is A itself, or its relevance R_A = lam A o (S V^T), S = R_O / stab(O), where ``relevance_out`` is given.

    Parameters
    ----------
    query : Tensor, shape (B, H, N, D)
    key : Tensor, shape (B, Hkv, N, D)
    value : Tensor, shape (B, Hkv, N, Dv)
    grad_out : Tensor, shape (B, H, N, Dv)
        Gradient of the score at the output of the attention.
    rows : Tensor, shape (B, R, N)
        Rows of the product so far: later layers come first. dtype of ``query``, or float32 for 16-bit queries.
    scale, is_causal, attn_mask, lse
        As in :func:`rollout_rows_qk`.
    relevance_out : Tensor, shape (B, H, N, Dv), optional
        Relevance of the output.
    output : Tensor, shape (B, H, N, Dv), optional
        The output O, read only with ``relevance_out``; computed if it is not given.
    head_fusion : {"mean", "sum"}
    clamp : bool
        Take the positive part before the heads are fused.
    residual : float
        Weight w of the identity, at least 0.
    normalize : bool
        Divide each row of the matrix by its sum; a second pass.
    lam, eps : float
        Of the AV rule; read only with ``relevance_out``.

    Returns
    -------
    Tensor, shape (B, R, N)
        In the dtype of ``rows``.

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, a fusion other than mean and sum, a negative
        residual or eps, lam outside [0, 1].

    Notes
    -----
    Source: Chefer et al. (2021), "Generic Attention-model Explainability", eq. 5 and 6 (W = A), and "Transformer
    Interpretability Beyond Attention Visualization", eq. 13 (W = R_A).

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> query = key = torch.zeros(1, 1, 2, 4)
    >>> value, grad_out = torch.tensor([[[[1.0], [-1.0]]]]), torch.ones(1, 1, 2, 1)
    >>> xf.ops.targeted_rows(query, key, value, grad_out, torch.tensor([[[1.0, 0.0]]]))
    tensor([[[1.5000, 0.0000]]])
    """
    rules.check_attention_inputs(query, key, value)
    batch, heads, tokens, _ = query.shape
    if key.shape[2] != tokens:
        raise ValueError(f"key: expected as many keys as queries ({tokens}), got {key.shape[2]}")
    shape = (batch, heads, tokens, value.shape[3])
    check.check_like(grad_out, "grad_out", shape, query)
    check.check_rows(rows, batch, tokens, query)
    for tensor, name in ((relevance_out, "relevance_out"), (output, "output")):
        if tensor is not None:
            check.check_like(tensor, name, shape, query)
    if attn_mask is not None:
        attn_mask = check.check_mask(attn_mask, query, tokens)
    if lse is not None:
        check.check_lse(lse, query)
    if head_fusion not in ("mean", "sum"):
        raise ValueError(f"head_fusion: expected 'mean' or 'sum', got {head_fusion!r}")
    options = (
        attn_mask,
        lse,
        relevance_out,
        output,
        check.check_scale(scale, query.dtype),
        bool(is_causal),
        head_fusion,
        bool(clamp),
    )
    numbers = (check.check_residual(residual, query.dtype), bool(normalize), rules.check_lam(lam), rules.check_eps(eps))
    run = _targeted_rows.reference if check.too_wide_for_cuda(query, value) else _targeted_rows
    return run(query, key, value, grad_out, rows, *options, *numbers)


def attention_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    output: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    lam: float = 0.5,
    eps: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """:func:`attention_relevance` in gradient form: R_O = O grad_out, R_Q = Q g_q, ...; for lam = 0 g_q and g_k are None."""
    rules.check_attention_inputs(query, key, value)
    shape = (*query.shape[:3], value.shape[3])
    check.check_like(grad_out, "grad_out", shape, query)
    options = rules.attention_options(query, key, output, attn_mask, scale, is_causal, lam, eps, shape)
    g_q, g_k, g_v = _run_attention(query, key, value, grad_out, *options, True)
    return (None, None, g_v) if lam == 0 else (g_q, g_k, g_v)


def _run_attention(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, *options: Any) -> Any:
    run = _attention_relevance.reference if check.too_wide_for_cuda(query, value) else _attention_relevance
    return run(query, key, value, upstream, *options)
