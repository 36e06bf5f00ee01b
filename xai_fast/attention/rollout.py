"""Attention rollout over all layers, from attention matrices that are given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from ..ops import _checks as check
from ..ops.rollout import fuse_heads, rollout_layers, rollout_rows

Token = int | Sequence[int] | Tensor | np.ndarray | None


def token_indices(token: Token, tokens: int) -> list[int] | None:
    """The chosen tokens as indices in [0, tokens); None for all of them. Negative indices count from the end."""
    if token is None:
        return None
    if isinstance(token, (Tensor, np.ndarray)):
        token = token.tolist()
    if not isinstance(token, (Integral, Sequence)) or isinstance(token, str):
        raise TypeError(f"token: expected an int, a sequence of ints or None, got {token!r}")
    chosen = list(token) if isinstance(token, Sequence) else [token]
    if not chosen:
        raise ValueError("token: expected an int, a non-empty sequence of ints or None, got an empty sequence")
    indices = []
    for t in chosen:
        if isinstance(t, bool) or not hasattr(t, "__index__"):
            raise TypeError(f"token: expected an int, a sequence of ints or None, got {t!r}")
        if not -tokens <= int(t) < tokens:
            raise ValueError(f"token: expected an index in [{-tokens}, {tokens}), got {int(t)}")
        indices.append(int(t) % tokens)
    return indices


def start_rows(indices: list[int] | None, batch: int, tokens: int, like: Tensor) -> Tensor:
    """Unit rows e_token (B, R, N) in the accumulate type of ``like``; all tokens for None."""
    dtype = accumulate_dtype(like.dtype)
    if indices is None:
        return torch.eye(tokens, dtype=dtype, device=like.device).expand(batch, -1, -1)
    rows = torch.zeros(len(indices), tokens, dtype=dtype, device=like.device)
    rows[torch.arange(len(indices)), torch.tensor(indices)] = 1
    return rows.expand(batch, -1, -1)


def finish(rows: Tensor, token: Token, dtype: torch.dtype) -> Tensor:
    """(B, R, N) -> (B, N) for one token, in the dtype of the attention."""
    single = isinstance(token, Integral) or (isinstance(token, (Tensor, np.ndarray)) and token.ndim == 0)
    return (rows.squeeze(1) if single else rows).to(dtype)


def check_discard_ratio(discard_ratio: Any) -> float:
    value = check.check_number(discard_ratio, "discard_ratio")
    if not 0 <= value < 1:
        raise ValueError(f"discard_ratio: expected a share in [0, 1), got {discard_ratio!r}")
    return value


def check_start_layer(start_layer: Any, layers: int) -> int:
    start_layer = check.check_int(start_layer, "start_layer")
    if not -layers <= start_layer < layers:
        raise ValueError(f"start_layer: expected a layer in [{-layers}, {layers}), got {start_layer}")
    return start_layer % layers


def _order_statistic(values: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 0) of each row of (B, M), as (B, 1); NaN counts as largest."""
    wide = values.detach().to(accumulate_dtype(values.dtype))
    if wide.device.type == "cpu":  # numpy's selection is several times faster than kthvalue there
        smallest = torch.from_numpy(np.partition(wide.numpy(), k, axis=1)[:, k : k + 1])
    else:
        smallest = wide.sort(dim=1).values[:, k : k + 1]  # kthvalue is not deterministic on a GPU
    return smallest.to(values.dtype)


def discard_smallest(fused: Tensor, ratio: float) -> Tensor:
    """Zero the int(ratio * N * N) smallest entries of each (N, N) matrix; entries tied with the smallest kept one stay."""
    flat = fused.flatten(1)
    dropped = int(ratio * flat.shape[1])
    if dropped == 0 or flat.shape[0] == 0:
        return fused
    return torch.where(flat < _order_statistic(flat, dropped), 0, flat).view_as(fused)


def advance_by_matrix(rows: Tensor | None, attention: Tensor, discard_ratio: float, options: dict[str, Any]) -> Tensor:
    """rows Abar of one layer, accumulate type; Abar itself for None. The smallest fused entries are dropped if asked."""
    if discard_ratio > 0:
        fused = fuse_heads(attention, head_fusion=options["head_fusion"], residual=0.0, normalize=False, wide=True)
        attention = discard_smallest(fused, discard_ratio).unsqueeze(1)
        options = {**options, "head_fusion": "sum"}
    if rows is None:
        return fuse_heads(attention, wide=True, **options)
    return rollout_rows(attention, rows, **options)


def as_layers(attentions: Any) -> list[Tensor]:
    """The layers as a list of (B, H, N, N) tensors of one shape, dtype and device."""
    if isinstance(attentions, Tensor) or hasattr(attentions, "__array__"):
        stacked = check.from_array(attentions, "attentions")
        check.check_tensor(stacked, "attentions")
        if stacked.dim() != 5:
            shape = check.shape_of(stacked)
            raise ValueError(f"attentions: expected (B, H, N, N) tensors or one (L, B, H, N, N), got shape {shape}")
        layers = list(stacked.unbind(0))
    elif isinstance(attentions, Sequence):
        layers = [check.from_array(layer, f"attentions[{number}]") for number, layer in enumerate(attentions)]
    else:
        raise TypeError(f"attentions: expected a sequence of tensors or one tensor, got {type(attentions).__name__}")
    if not layers:
        raise ValueError(
            "attentions: expected at least one layer, got none (Hugging Face models return an empty tuple unless "
            "attn_implementation='eager'; xai_fast.capture_attention needs no eager attention)"
        )
    for number, layer in enumerate(layers):
        check.check_attention(layer, f"attentions[{number}]")
        first = layers[0]
        if layer.shape != first.shape:
            raise ValueError(
                f"attentions[{number}]: expected shape {check.shape_of(first)} as layer 0, got {check.shape_of(layer)}"
            )
        if layer.dtype != first.dtype:
            raise TypeError(f"attentions[{number}]: expected dtype {first.dtype} as layer 0, got {layer.dtype}")
        check.check_same_device(layer, f"attentions[{number}]", first.device)
    return layers


def _raise_if_nan(result: Tensor, layers: list[Tensor], start_layer: int) -> None:
    """The guilty layer is looked for only when the result is NaN: a NaN anywhere in a layer reaches every later product."""
    if result.is_meta or not check.holds_nan(result):
        return
    for number in range(start_layer, len(layers)):
        if bool(layers[number].isnan().any()):
            raise ValueError(
                f"attentions[{number}]: expected finite attention, got NaN in layer {number} (check_nan=False lets it pass)"
            )
    if any(bool(layer.isinf().any()) for layer in layers[start_layer:]):
        raise ValueError("attentions: the rollout is NaN though no layer holds one; expected finite attention, got inf")
    raise ValueError(
        f"attentions: the rollout is NaN though all layers are finite; their product leaves the range of {result.dtype} "
        "(a large residual, or normalize=False)"
    )


def attention_rollout(
    attentions: Sequence[Tensor] | Tensor,
    *,
    token: Token = 0,
    head_fusion: str = "mean",
    residual: float = 1.0,
    normalize: bool = True,
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    check_nan: bool = True,
) -> Tensor:
    """Attention rollout: how much each input token reaches the chosen tokens through all layers.

    .. math:: C = \\bar A^{(L)} \\cdots \\bar A^{(1)}, \\qquad \\bar A = \\mathrm{norm}(w I + \\mathrm{fuse}_h A_h)

    Later layers stand on the left, as in every published implementation for ``A[query, key]``; the lecture's
    :math:`\\bar A^1 \\cdots \\bar A^L` is the same product for transposed matrices. Chosen tokens use the row form, one read
    of every layer and no N x N product.

    Parameters
    ----------
    attentions : sequence of L tensors (B, H, N, N), or one tensor (L, B, H, N, N)
        First layer first, ``attention[b, h, i, j]`` from query i to key j; numpy arrays are accepted.
        Rows need not sum to 1.
    token : int, sequence of int, or None
        The rows of C to return: one token (0 is the usual [CLS]), several, or all.
    head_fusion : {"mean", "sum", "max", "min"}
    residual : float
        Weight w of the identity (the skip connection). The raw form of the lecture, ``I + sum_h A``, is
        ``head_fusion="sum", normalize=False``.
    normalize : bool
        Divide each row of ``w I + fuse_h A`` by its sum.
    discard_ratio : float in [0, 1)
        Share of the smallest entries of each fused N x N matrix that are set to 0 before the residual is added; ties with
        the smallest kept entry stay. Builds the N x N matrices.
    start_layer : int
        First layer of the product; layers before it are left out.
    check_nan : bool
        Raise if the attention holds NaN. The check reads the result only; the layer is looked for once it is NaN.

    Returns
    -------
    Tensor
        (B, N) for one token, (B, T, N) for several, (B, N, N) for None; dtype and device of the attention. 16-bit
        attention is multiplied in float32 and rounded once, at the end.

    Raises
    ------
    TypeError
        ``attentions`` is no sequence of floating tensors, or its dtypes differ; a wrong type of another argument.
    ValueError
        No layers, layers that are not (B, H, N, N) or differ in shape or device, NaN (names the layer), a token or layer
        out of range, an unknown fusion, a negative residual, a discard_ratio outside [0, 1).

    Notes
    -----
    Source: Abnar & Zuidema (2020), "Quantifying Attention Flow in Transformers", section 3. ``discard_ratio`` follows
    the vit-explain project, without its exception for the entry (0, 0) and with row instead of column normalisation.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> attentions = torch.softmax(torch.zeros(12, 2, 4, 5, 5), -1)
    >>> xf.attention_rollout(attentions, token=0).shape
    torch.Size([2, 5])
    """
    layers = as_layers(attentions)
    batch, _, tokens, _ = layers[0].shape
    indices = token_indices(token, tokens)
    start_layer = check_start_layer(start_layer, len(layers))
    discard_ratio = check_discard_ratio(discard_ratio)
    check.check_head_fusion(head_fusion)
    residual = check.check_residual(residual, layers[0].dtype)
    options: dict[str, Any] = {"head_fusion": head_fusion, "residual": residual, "normalize": bool(normalize)}

    rows = None if indices is None else start_rows(indices, batch, tokens, layers[0])
    rows = _product(layers[start_layer:], rows, discard_ratio, options)
    if check_nan:
        _raise_if_nan(rows, layers, start_layer)
    return finish(rows, token, layers[0].dtype)


def _product(layers: list[Tensor], rows: Tensor | None, discard_ratio: float, options: dict[str, Any]) -> Tensor:
    """rows <- rows Abar^l for l = L..1; the whole product for None."""
    if discard_ratio == 0:
        return rollout_layers(layers[::-1], rows, **options)
    for layer in reversed(layers):
        rows = advance_by_matrix(rows, layer, discard_ratio, options)
    assert rows is not None
    return rows
