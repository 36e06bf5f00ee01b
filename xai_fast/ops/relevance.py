"""Relevance splitting: how the relevance R of an operation's output is handed to its inputs (LRP).

All rules divide by the signed ``stab(x) = x + eps sign(x)``, sign(0) = +1; a zero denominator (eps = 0) passes nothing on.
The functions that end in ``_gradient`` or ``_gradients`` are the same rules in gradient form: they take and give modified
gradients g with R = x g, and divide by nothing. ``xai_fast.lrp`` propagates in that form.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _backend
from ..reference import relevance as reference
from . import _checks as check
from . import _relevance_checks as rules
from ._library import Op

__all__ = [
    "attention_relevance",
    "av_relevance",
    "layer_norm_relevance",
    "linear_relevance",
    "skip_relevance",
    "softmax_relevance",
    "targeted_rows",
]

# The streamed CUDA kernels keep whole rows of q, k and v on the chip; wider heads run the reference.
CUDA_MOST_DIM = 256

_C = _backend.C

_ATTENTION_ARGS = (
    "Tensor query, Tensor key, Tensor value, Tensor upstream, Tensor? output, Tensor? attn_mask, float? scale, "
    "bool is_causal, float lam, float eps, bool gradient_form"
)

_av_relevance = Op(
    "av_relevance(Tensor attention, Tensor value, Tensor relevance, float lam, float eps) -> (Tensor, Tensor)",
    reference.av_relevance,
    _C and _C.av_relevance,
    lambda attention, value, relevance, lam, eps: (
        attention.new_empty(attention.shape),
        value.new_empty(value.shape),
    ),
)

_softmax_relevance = Op(
    "softmax_relevance(Tensor logits, Tensor probs, Tensor relevance) -> Tensor",
    reference.softmax_relevance,
    _C and _C.softmax_relevance,
    lambda logits, probs, relevance: logits.new_empty(logits.shape),
)

_skip_relevance = Op(
    "skip_relevance(Tensor x, Tensor y, Tensor relevance, str rule, float eps) -> (Tensor, Tensor)",
    reference.skip_relevance,
    _C and _C.skip_relevance,
    lambda x, y, relevance, rule, eps: (x.new_empty(x.shape), y.new_empty(y.shape)),
)

_norm_relevance = Op(
    "norm_relevance(Tensor x, Tensor? weight, Tensor? bias, Tensor upstream, float norm_eps, float eps, bool rms, "
    "bool detach_mean, bool gradient_form) -> Tensor",
    reference.norm_relevance,
    _C and _C.norm_relevance,
    lambda x, *options: x.new_empty(x.shape),
)

_stabilized_gradient = Op(
    "stabilized_gradient(Tensor grad, Tensor y, float eps) -> Tensor",
    reference.stabilized_gradient,
    _C and _C.stabilized_gradient,
    lambda grad, y, eps: grad.new_empty(grad.shape),
)

_identity_gradient = Op(
    "identity_gradient(Tensor grad, Tensor x, Tensor y, float at_zero) -> Tensor",
    reference.identity_gradient,
    _C and _C.identity_gradient,
    lambda grad, x, y, at_zero: grad.new_empty(grad.shape),
)


def _linear_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor, rule: str, *options: Any) -> Tensor:
    """Rules that are nothing but matrix products stay with torch."""
    if rule in ("flat", "wsquare", "zbox"):
        return reference.linear_relevance(x, weight, bias, relevance, rule, *options)
    return _C.linear_relevance(x, weight, bias, relevance, rule, *options[:4])


_linear_relevance = Op(
    "linear_relevance(Tensor x, Tensor weight, Tensor? bias, Tensor relevance, str rule, float eps, float gamma, "
    "float alpha, float beta, Tensor? low, Tensor? high) -> Tensor",
    reference.linear_relevance,
    _C and _linear_kernel,
    lambda x, *options: x.new_empty(x.shape),
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


def av_relevance(
    attention: Tensor, value: Tensor, relevance: Tensor, *, lam: float = 0.5, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Split the relevance of O = A V over A and V, in one pass over A.

    .. math:: S = R / \\mathrm{stab}(AV), \\qquad R_A = \\lambda\\, A \\circ (S V^\\top), \\qquad
              R_V = (1 - \\lambda)\\, V \\circ (A^\\top S)

    Parameters
    ----------
    attention : Tensor, shape (B, H, Nq, Nk)
        Weights from query i to key j; rows need not sum to 1.
    value : Tensor, shape (B, Hkv, Nk, D)
        Hkv divides H: query head h reads value head ``h // (H // Hkv)``.
    relevance : Tensor, shape (B, H, Nq, D)
        Relevance of ``attention @ value``.
    lam : float
        Share of the attention weights, in [0, 1]. 0.5 is AttnLRP and Chefer et al., 0 is CP-LRP.
    eps : float
        Stabiliser, at least 0.

    Returns
    -------
    tuple of Tensor
        R_A of shape (B, H, Nq, Nk) and R_V of shape (B, Hkv, Nk, D), in the dtype of the inputs. Their sum falls short of
        ``relevance.sum()`` by exactly the sum of R eps / (\\|O\\| + eps).

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, lam outside [0, 1], a negative eps.

    Notes
    -----
    Source: the epsilon rule for a product of two operands, Achtibat et al. (2024), "AttnLRP", eq. 12 and proposition 3.3.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> attention, value = torch.tensor([[[[0.2, 0.8]]]]), torch.tensor([[[[1.0], [3.0]]]])
    >>> to_attention, to_value = xf.ops.av_relevance(attention, value, torch.ones(1, 1, 1, 1))
    >>> to_attention
    tensor([[[[0.0385, 0.4615]]]])
    """
    check.check_float_tensor(attention, "attention")
    if attention.dim() != 4 or 0 in attention.shape[1:]:
        wanted = "(B, H, Nq, Nk) with H, Nq, Nk of at least 1"
        raise ValueError(f"attention: expected shape {wanted}, got {check.shape_of(attention)}")
    batch, heads, queries, keys = attention.shape
    rules.check_value(value, "value", batch, heads, keys, attention)
    check.check_like(relevance, "relevance", (batch, heads, queries, value.shape[3]), attention)
    return _av_relevance(attention, value, relevance, rules.check_lam(lam), rules.check_eps(eps))


def softmax_relevance(logits: Tensor, probs: Tensor, relevance: Tensor, *, rule: str = "taylor") -> Tensor:
    """Hand the relevance of A = softmax(x) to x, over the last dimension.

    .. math:: \\text{taylor: } R_x = x \\circ (R_A - A \\textstyle\\sum_j R_{A,j}), \\qquad \\text{identity: } R_x = R_A

    Parameters
    ----------
    logits, probs, relevance : Tensor, shape (..., N)
        Input x (after scale and mask), output A and its relevance. Logits of -inf, or the lowest finite float that models
        write for it (anything up to -1.7e38), get 0.
    rule : {"taylor", "identity"}
        ``taylor`` does not conserve over x: what is left belongs to the bias of the expansion. ``identity`` conserves.

    Returns
    -------
    Tensor, shape (..., N)

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, different shapes, mixed devices, an unknown rule.

    Notes
    -----
    Source: taylor, Achtibat et al. (2024), proposition 3.1; identity, Chefer et al. (2021), "Transformer Interpretability
    Beyond Attention Visualization".

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> logits = torch.tensor([1.0, 1.0])
    >>> xf.ops.softmax_relevance(logits, logits.softmax(-1), torch.tensor([0.0, 1.0]))
    tensor([-0.5000,  0.5000])
    """
    check.check_float_tensor(logits, "logits")
    if logits.dim() < 1:
        raise ValueError("logits: expected at least one dimension, got a scalar")
    check.check_like(probs, "probs", check.shape_of(logits), logits)
    check.check_like(relevance, "relevance", check.shape_of(logits), logits)
    if rule not in ("taylor", "identity"):
        raise ValueError(f"rule: expected 'taylor' or 'identity', got {rule!r}")
    return relevance.clone() if rule == "identity" else _softmax_relevance(logits, probs, relevance)


def skip_relevance(
    x: Tensor, y: Tensor, relevance: Tensor, *, rule: str = "epsilon", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Split the relevance of a skip connection O = X + Y over its branches.

    .. math:: R_X = X \\circ R / \\mathrm{stab}(X + Y), \\qquad R_Y = Y \\circ R / \\mathrm{stab}(X + Y)

    Parameters
    ----------
    x, y, relevance : Tensor, shape (B, ...)
        The two branches and the relevance of their sum; dimension 0 is the batch.
    rule : {"epsilon", "ratio"}
        ``ratio`` rescales the shares of each sample: with a, b the sums of R_X and R_Y over the sample, R_X then adds up to
        \\|a\\| / (\\|a\\| + \\|b\\|) of the sample's relevance and R_Y to the rest. A branch whose shares add up to 0 gets
        nothing.
    eps : float
        Stabiliser, at least 0.

    Returns
    -------
    tuple of Tensor
        R_X and R_Y, shaped like the inputs. They add up to R but for R eps / (\\|O\\| + eps) (epsilon), or to the sum of R
        of each sample (ratio).

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, different shapes, mixed devices, an unknown rule, a negative eps.

    Notes
    -----
    Source: epsilon, Bach et al. (2015), eq. 60; ratio, Chefer et al. (2021), eq. 9 and 10, with sums per sample: a sum over
    the batch, as in the published code, would make a sample's result depend on its batch mates.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.skip_relevance(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 4.0]]))
    (tensor([[1.0000, 3.0000]]), tensor([[1.0000, 1.0000]]))
    """
    check.check_float_tensor(x, "x")
    check.check_like(y, "y", check.shape_of(x), x)
    check.check_like(relevance, "relevance", check.shape_of(x), x)
    if rule not in ("epsilon", "ratio"):
        raise ValueError(f"rule: expected 'epsilon' or 'ratio', got {rule!r}")
    return _skip_relevance(x, y, relevance, rule, rules.check_eps(eps))


def layer_norm_relevance(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relevance: Tensor,
    *,
    norm_eps: float = 1e-5,
    eps: float = 1e-6,
    rms: bool = False,
    detach_mean: bool = False,
) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, its scale taken as a constant.

    .. math:: y = w \\circ (x - \\mu) / \\sigma + b, \\quad S = R / \\mathrm{stab}(y), \\quad
              R_x = x \\circ (w S - \\mathrm{mean}(w S)) / \\sigma

    Parameters
    ----------
    x, relevance : Tensor, shape (..., D)
    weight, bias : Tensor, shape (D,), optional
    norm_eps : float
        Added to the variance, as in the model.
    eps : float
        Stabiliser of the rule, at least 0.
    rms : bool
        RMSNorm: no mean is subtracted.
    detach_mean : bool
        Take the mean as a constant too.

    Returns
    -------
    Tensor, shape (..., D)

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, a negative eps.

    Notes
    -----
    Source: Ali et al. (2022), "XAI for Transformers", section 3.2; Achtibat et al. (2024), proposition 3.4.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.layer_norm_relevance(torch.tensor([[1.0, 3.0]]), None, None, torch.tensor([[1.0, 1.0]]))
    tensor([[-1.0000,  3.0000]])
    """
    check.check_float_tensor(x, "x")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (..., D) with D of at least 1, got {check.shape_of(x)}")
    for parameter, name in ((weight, "weight"), (bias, "bias")):
        if parameter is not None:
            check.check_like(parameter, name, (x.shape[-1],), x)
    check.check_like(relevance, "relevance", check.shape_of(x), x)
    norm_eps = check.check_number(norm_eps, "norm_eps")
    return _norm_relevance(x, weight, bias, relevance, norm_eps, rules.check_eps(eps), bool(rms), bool(detach_mean), False)


def linear_relevance(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    *,
    rule: str = "epsilon",
    eps: float = 1e-6,
    gamma: float = 0.25,
    alpha: float = 2.0,
    beta: float = 1.0,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
) -> Tensor:
    """Hand the relevance of a linear layer O = x W^T + b to its input.

    .. math:: R_k = \\sum_o c(x_k, w_{ok}) \\, R_o / \\mathrm{stab}(\\textstyle\\sum_k c(x_k, w_{ok}) + c_o)

    ========== ==================================================================================================
    rule       contribution c(x, w) and bias term
    ========== ==================================================================================================
    epsilon    x w; b
    z+         max(x w, 0); the bias is ignored
    gamma      where O > 0: x w + gamma max(x w, 0); b + gamma max(b, 0). Where O < 0: the same with min
    alpha-beta alpha times max(x w, 0); max(b, 0), minus beta times the same with min
    flat       1; no bias
    w^2        w^2; no bias
    z_box      x w - low max(w, 0) - high min(w, 0); the bias cancels
    ========== ==================================================================================================

    Parameters
    ----------
    x : Tensor, shape (..., K)
    weight : Tensor, shape (O, K)
    bias : Tensor, shape (O,), optional
    relevance : Tensor, shape (..., O)
    rule : str
        As above; ``zplus``, ``alphabeta``, ``wsquare`` and ``zbox`` are other spellings.
    eps : float
        Stabiliser, at least 0.
    gamma : float
        At least 0.
    alpha, beta : float
        alpha - beta = 1, beta at least 0.
    low, high : float or Tensor
        Bounds of the input for z_box, broadcastable to x.

    Returns
    -------
    Tensor, shape (..., K)

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, an unknown rule, alpha - beta other than 1,
        bounds that are missing or do not hold for x, a negative eps or gamma.

    Notes
    -----
    Source: epsilon and alpha-beta, Bach et al. (2015), eq. 58 and 60; z+, w^2 and z_box, Montavon et al. (2017), "Explaining
    nonlinear classification decisions with deep Taylor decomposition"; flat, Lapuschkin et al. (2019); gamma, Montavon et
    al. (2019), generalised to inputs of both signs.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.linear_relevance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), None, torch.tensor([[3.0]]))
    tensor([[1.0000, 2.0000]])
    """
    check.check_float_tensor(x, "x")
    check.check_float_tensor(weight, "weight")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape (O, K) with O and K of at least 1, got {check.shape_of(weight)}")
    outputs, inputs = weight.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x: expected shape (..., {inputs}), got {check.shape_of(x)}")
    check.check_like(weight, "weight", (outputs, inputs), x)
    if bias is not None:
        check.check_like(bias, "bias", (outputs,), x)
    check.check_like(relevance, "relevance", (*x.shape[:-1], outputs), x)
    rule = rules.check_linear_rule(rule)
    eps, gamma = rules.check_eps(eps), check.check_at_least_zero(gamma, "gamma")
    alpha, beta = rules.check_alpha_beta(alpha, beta)
    bounds = (rules.check_bound(low, "low", x), rules.check_bound(high, "high", x)) if rule == "zbox" else (None, None)
    return _linear_relevance(x, weight, bias, relevance, rule, eps, gamma, alpha, beta, *bounds)


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
    return _run_attention(query, key, value, relevance, *options, False)


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
    options = (attn_mask, lse, relevance_out, output, check.check_scale(scale), bool(is_causal), head_fusion, bool(clamp))
    numbers = (check.check_residual(residual), bool(normalize), rules.check_lam(lam), rules.check_eps(eps))
    if _too_wide(query, value):
        return reference.targeted_rows(query, key, value, grad_out, rows, *options, *numbers)
    return _targeted_rows(query, key, value, grad_out, rows, *options, *numbers)


# ---- gradient form -----------------------------------------------------------------------------------------------------


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


def norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, *, norm_eps: float, rms: bool = False, detach_mean: bool = False
) -> Tensor:
    """:func:`layer_norm_relevance` in gradient form, eps = 0."""
    return _norm_relevance(x, weight, None, grad, float(norm_eps), 0.0, rms, detach_mean, True)


def stabilized_gradient(grad: Tensor, y: Tensor, eps: float) -> Tensor:
    """Epsilon rule at an output y in gradient form: g |y| / (|y| + eps)."""
    return _stabilized_gradient(grad, y, float(eps))


def identity_gradient(grad: Tensor, x: Tensor, y: Tensor, at_zero: float = 0.0) -> Tensor:
    """Identity rule R_x = R_y of y = f(x) in gradient form: g y / x, and g at_zero, which should be f'(0), where x = 0."""
    return _identity_gradient(grad, x, y, float(at_zero))


def _too_wide(query: Tensor, value: Tensor) -> bool:
    return query.is_cuda and max(query.shape[3], value.shape[3]) > CUDA_MOST_DIM


def _run_attention(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, *options: Any) -> Any:
    if _too_wide(query, value):
        return reference.attention_relevance(query, key, value, upstream, *options)
    return _attention_relevance(query, key, value, upstream, *options)
