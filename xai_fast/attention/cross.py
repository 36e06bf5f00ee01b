"""Relevance through self- and cross-attention of encoder-decoder models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from ..ops import _checks as check

__all__ = ["EncoderDecoderRelevance", "encoder_decoder_relevance"]


class EncoderDecoderRelevance(NamedTuple):
    """Relevance of tokens for each other, row = the token that receives.

    Attributes
    ----------
    encoder : Tensor, shape (B, Ne, Ne)
    decoder : Tensor, shape (B, Nd, Nd)
    cross : Tensor, shape (B, Nd, Ne)
        What each decoder token takes from the input tokens.
    """

    encoder: Tensor
    decoder: Tensor
    cross: Tensor


def encoder_decoder_relevance(
    encoder: Sequence[Tensor], decoder: Sequence[Tensor], cross: Sequence[Tensor]
) -> EncoderDecoderRelevance:
    """Relevance through an encoder-decoder, from the fused matrix of every attention layer.

    .. math:: R^{ee} \\mathrel{+}= A^{ee} R^{ee}, \\quad R^{dd} \\mathrel{+}= A^{dd} R^{dd}, \\quad
              R^{de} \\mathrel{+}= A^{dd} R^{de}, \\quad
              R^{de} \\mathrel{+}= (\\bar R^{dd})^\\top A^{de} \\bar R^{ee}

    layer by layer, where a decoder layer is its self-attention, then its cross-attention, and
    :math:`\\bar R = \\hat R / \\mathrm{rowsum}(\\hat R) + I`, :math:`\\hat R = R - I`.

    Parameters
    ----------
    encoder : sequence of Tensor, shape (B, Ne, Ne)
        One fused matrix per encoder layer, such as ``w.clamp(min=0).mean(1)`` of ``record.weighted_attentions(score)``
        (targeted), or the attention's mean over heads (raw).
    decoder : sequence of Tensor, shape (B, Nd, Nd)
        Self-attention of the decoder layers.
    cross : sequence of Tensor, shape (B, Nd, Ne)
        Cross-attention of the decoder layers, as many as ``decoder``.

    Returns
    -------
    EncoderDecoderRelevance
        ``cross[:, t]`` is what decoder token t takes from each input token.

    Raises
    ------
    TypeError, ValueError
        Not floating tensors, shapes that do not fit, different numbers of decoder and cross-attention layers.

    Notes
    -----
    Source: Chefer et al. (2021), "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers", eq. 6 to 10; a row of zeros in R - I stays zero. Computed in float32 or better.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> uniform = torch.full((1, 2, 2), 0.5)
    >>> xf.attention.encoder_decoder_relevance([uniform], [uniform], [uniform]).cross
    tensor([[[2., 2.],
             [2., 2.]]])
    """
    sizes = _check(encoder, decoder, cross)
    batch, inputs, outputs = sizes
    like = encoder[0]
    dtype = accumulate_dtype(like.dtype)
    # R - I throughout: next to 1, small weights would be lost.
    to_encoder = torch.zeros(batch, inputs, inputs, dtype=dtype, device=like.device)
    for matrix in encoder:
        to_encoder = to_encoder + matrix.to(dtype) @ to_encoder + matrix.to(dtype)
    settled = _normalized(to_encoder)
    to_decoder = torch.zeros(batch, outputs, outputs, dtype=dtype, device=like.device)
    across = torch.zeros(batch, outputs, inputs, dtype=dtype, device=like.device)
    for own, other in zip(decoder, cross, strict=True):
        across = across + own.to(dtype) @ across
        to_decoder = to_decoder + own.to(dtype) @ to_decoder + own.to(dtype)
        across = across + _normalized(to_decoder).transpose(-1, -2) @ (other.to(dtype) @ settled)
    encoded, decoded = (_with_identity(added).to(like.dtype) for added in (to_encoder, to_decoder))
    return EncoderDecoderRelevance(encoded, decoded, across.to(like.dtype))


def _with_identity(added: Tensor) -> Tensor:
    return added + torch.eye(added.shape[-1], dtype=added.dtype, device=added.device)


def _normalized(added: Tensor) -> Tensor:
    """R - I with rows that sum to 1, plus I (eq. 8 and 9)."""
    total = added.sum(-1, keepdim=True)
    return _with_identity(torch.where(total == 0, 0.0, added / torch.where(total == 0, 1.0, total)))


def _check(encoder: Any, decoder: Any, cross: Any) -> tuple[int, int, int]:
    """(B, Ne, Nd)."""
    for layers, name in ((encoder, "encoder"), (decoder, "decoder"), (cross, "cross")):
        if not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"{name}: expected a non-empty sequence of tensors, got {type(layers).__name__}")
    if len(decoder) != len(cross):
        raise ValueError(f"cross: expected one matrix for each of the {len(decoder)} decoder layers, got {len(cross)}")
    first = cross[0]
    check.check_float_tensor(first, "cross[0]")
    if first.dim() != 3:
        raise ValueError(f"cross[0]: expected shape (B, Nd, Ne), got {check.shape_of(first)}")
    batch, outputs, inputs = first.shape
    wanted = {"encoder": (batch, inputs, inputs), "decoder": (batch, outputs, outputs), "cross": (batch, outputs, inputs)}
    for layers, name in ((encoder, "encoder"), (decoder, "decoder"), (cross, "cross")):
        for number, matrix in enumerate(layers):
            check.check_like(matrix, f"{name}[{number}]", wanted[name], first)
    return batch, inputs, outputs
