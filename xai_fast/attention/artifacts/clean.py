"""Rollout without the tokens that attract attention for no reason of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._dtypes import accumulate_dtype
from ...ops import _checks as check
from ...ops.rollout import fuse_heads, rollout_rows
from ..record import AttentionRecord
from ..rollout import Token, as_layers, attention_rollout, finish, start_rows, token_indices
from .outliers import Outliers, as_mask

__all__ = ["clean_rollout"]

WAYS = ("drop", "neighbours")


def clean_rollout(
    attentions: AttentionRecord | Sequence[Tensor] | Tensor,
    outliers: Outliers | Tensor,
    *,
    how: Literal["drop", "neighbours"] = "drop",
    token: Token = 0,
    head_fusion: str = "mean",
    residual: float = 1.0,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Attention rollout in which outlier tokens receive nothing, or are painted over.

    .. math:: \\text{drop: } \\bar A = \\mathrm{norm}(w I + \\mathrm{fuse}_h A_h \\circ (1 - m)), \\qquad m_j = 1
              \\text{ for outliers } j

    "drop" changes the rollout: attention to outliers is taken out of every layer before its rows are normalised, so that
    a layer which looks at nothing else passes its input on. The map is 0 at outliers, a hole. "neighbours" leaves the
    rollout as it is and changes the map: the value of an outlier is replaced by the mean of the ordinary patches next to it
    (up to eight), so that the map no longer sums to 1, and what the attention did there is hidden, not undone.

    Parameters
    ----------
    attentions : AttentionRecord, or as for :func:`xai_fast.attention_rollout`
        From :func:`xai_fast.capture_attention`, or the matrices (B, H, N, N) of all layers.
    outliers : Outliers or Tensor of bool, shape (B, N) or (N,); for "drop" also (L, B, N)
        Tokens, such as ``find_outliers(...)`` gives; do not include the tokens that you ask for.
    how : {"drop", "neighbours"}
    token, head_fusion, residual
        As for :func:`xai_fast.attention_rollout`.
    grid : (rows, columns)
        Of patches, for "neighbours"; they are the last rows x columns tokens.

    Returns
    -------
    Tensor
        (B, N) for one token, (B, T, N) for several, (B, N, N) for None; dtype of the attention.

    Raises
    ------
    TypeError, ValueError
        An unknown way; a mask of another shape; no grid, or one with more patches than tokens; for "neighbours" an outlier
        that is no patch; NaN; as :func:`xai_fast.attention_rollout`.

    Notes
    -----
    Neither comes from a paper; "drop" is the discard ratio of vit-explain with chosen columns in place of small entries.
    It builds the N x N matrix of one layer at a time. An outlier whose every neighbour is one too becomes the mean of all
    ordinary patches.

    Examples
    --------
    >>> import torch
    >>> attention = torch.tensor([[[[0.2, 0.4, 0.4], [0.2, 0.4, 0.4], [0.2, 0.4, 0.4]]]])
    >>> clean_rollout([attention], torch.tensor([False, True, False]))
    tensor([[0.7500, 0.0000, 0.2500]])
    """
    if how not in WAYS:
        raise ValueError(f"how: expected one of {', '.join(WAYS)}, got {how!r}")
    mask = as_mask(outliers)
    if how == "neighbours":
        options: dict[str, Any] = {"token": token, "head_fusion": head_fusion, "residual": residual}
        if isinstance(attentions, AttentionRecord):
            return _painted(attentions.rollout(**options), mask, grid)
        return _painted(attention_rollout(attentions, **options), mask, grid)
    check.check_head_fusion(head_fusion)
    return _dropped(attentions, mask, token, head_fusion, check.check_residual(residual))


def _dropped(attentions: Any, mask: Tensor, token: Token, head_fusion: str, residual: float) -> Tensor:
    rows: Tensor | None = None
    attentions = attentions if isinstance(attentions, AttentionRecord) else as_layers(attentions)
    count = len(attentions.layers if isinstance(attentions, AttentionRecord) else attentions)
    if not count:
        raise ValueError("attentions: expected at least one layer, got none")
    for layer in reversed(range(count)):
        # One layer at a time: the matrices of a record do not exist yet.
        attention = (
            attentions.attentions(layers=[layer])[0] if isinstance(attentions, AttentionRecord) else attentions[layer]
        )
        check.check_attention(attention, f"attentions[{layer}]")
        batch, _, tokens, _ = attention.shape
        kept = ~_for_layer(mask, layer, count, batch, tokens).to(attention.device)
        with torch.no_grad():
            fused = fuse_heads(attention, head_fusion=head_fusion, residual=0.0, normalize=False) * kept.unsqueeze(1)
            if rows is None:
                rows = start_rows(token_indices(token, tokens), batch, tokens, attention).contiguous()
            rows = rollout_rows(fused.unsqueeze(1), rows.to(attention.device), residual=residual)
    assert rows is not None
    if check.holds_nan(rows):
        raise ValueError(
            "attentions: the rollout is NaN; expected finite attention, and with residual=0 rows that keep some of it"
        )
    return finish(rows, token, attention.dtype)


def _for_layer(mask: Tensor, layer: int, layers: int, batch: int, tokens: int) -> Tensor:
    chosen = mask[layer] if mask.dim() == 3 and len(mask) == layers else mask
    if tuple(chosen.shape) not in ((batch, tokens), (1, tokens), (tokens,)):
        wanted = f"({tokens},), ({batch}, {tokens}) or ({layers}, {batch}, {tokens})"
        raise ValueError(f"outliers: expected a mask of shape {wanted}, got {check.shape_of(mask)}")
    return chosen.expand(batch, tokens)


def _painted(plain: Tensor, mask: Tensor, grid: Any) -> Tensor:
    """Outlier patches replaced by the mean of the ordinary ones around them."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid: expected (rows, columns) with how='neighbours', got {grid!r}")
    rows, columns = (check.check_count(size, "grid") for size in grid)
    tokens = plain.shape[-1]
    prefix = tokens - rows * columns
    if prefix < 0:
        raise ValueError(f"grid: expected at most {tokens} patches, as there are tokens, got {rows} x {columns}")
    chosen = _for_layer(mask, 0, -1, len(plain), tokens).to(plain.device)
    if bool(chosen[:, :prefix].any()):
        raise ValueError(f"outliers: expected patches with how='neighbours', got one among the first {prefix} tokens")
    maps = plain[..., prefix:].reshape(len(plain), -1, rows, columns).to(accumulate_dtype(plain.dtype))
    ordinary = (~chosen[:, prefix:]).reshape(-1, 1, rows, columns).to(maps)
    # Of a box filter over ordinary patches alone; an outlier itself counts as nothing.
    around = F.avg_pool2d(maps * ordinary, 3, 1, 1)
    share = F.avg_pool2d(ordinary, 3, 1, 1)
    overall = (maps * ordinary).sum((2, 3), keepdim=True) / ordinary.sum((2, 3), keepdim=True).clamp_min(1)
    filled = torch.where(share > 0, around / share.clamp_min(1e-3), overall)
    patches = torch.where(ordinary > 0, maps, filled).view(*plain.shape[:-1], -1).to(plain.dtype)
    return torch.cat([plain[..., :prefix], patches], dim=-1)
