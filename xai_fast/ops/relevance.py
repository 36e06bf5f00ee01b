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
    "av_relevance",
    "layer_norm_relevance",
    "linear_relevance",
    "skip_relevance",
    "softmax_relevance",
]

_C = _backend.C

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
    run = _av_relevance.reference if check.too_wide_for_cuda(value) else _av_relevance
    return run(attention, value, relevance, rules.check_lam(lam), rules.check_eps(eps))


def softmax_relevance(logits: Tensor, probs: Tensor, relevance: Tensor, *, rule: str = "taylor") -> Tensor:
    """Hand the relevance of A = softmax(x) to x, over the last dimension.

    .. math:: \\text{taylor: } R_x = x \\circ (R_A - A \\textstyle\\sum_j R_{A,j}), \\qquad \\text{identity: } R_x = R_A

    Parameters
    ----------
    logits, probs, relevance : Tensor, shape (..., N)
        Input x (after scale and mask), output A and its relevance. Logits of -inf, or the lowest finite float that models
        write for it (anything up to -1.7e38), get 0. The lowest float16, -65504, is a number like any other: it gets
        -65504 R where its R is not 0.
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
        Bounds of the input for z_box, finite and broadcastable to x, with low <= x <= high up to rounding.

    Returns
    -------
    Tensor, shape (..., K)

    Raises
    ------
    TypeError, ValueError
        Not tensors, unsupported or mixed dtypes, wrong shapes, mixed devices, an unknown rule, alpha - beta other than 1,
        bounds that are missing or do not hold for x (not looked at while compiling), a negative eps or gamma.

    Notes
    -----
    The rule w^2 leaves the bias out; :class:`xai_fast.lrp.WSquare` gives the squared bias its share, as zennit does.

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
    bounds = rules.check_bounds(low, high, x) if rule == "zbox" else (None, None)
    return _linear_relevance(x, weight, bias, relevance, rule, eps, gamma, alpha, beta, *bounds)


# ---- gradient form -----------------------------------------------------------------------------------------------------


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
