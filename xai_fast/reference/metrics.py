"""The metrics family in plain PyTorch: what the kernels of csrc/metrics.h are measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from .philox import philox

__all__ = ["conciseness", "map_distances", "perturb", "rank_features", "replace_ranked", "row_norms"]

# Last word of the counter of the perturbations, and the first word of the draw of a radius (csrc/metrics.h).
PERTURB_STREAM = 0x70657274
RADIUS_COUNTER = 0xFFFFFFFF
STEPS = 1 << 24


def rank_features(scores: Tensor) -> Tensor:
    """ranks (B,F) int32 of scores (B,F): 0 for the largest, ties by index, NaN as -inf."""
    order = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order, dtype=torch.int32)
    places = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    return ranks.scatter_(1, order, places.expand_as(ranks))


def replace_ranked(
    x: Tensor, baseline: Tensor, ranks: Tensor, sample: Tensor, first: Tensor, last: Tensor, ranking: Tensor | None = None
) -> Tensor:
    """x, baseline (B,C,P,D), ranks (R,P), sample, first, last, ranking (E) -> (E,C,P,D); ranking: sample by default."""
    chosen = ranks[sample if ranking is None else ranking]
    replaced = (chosen >= first[:, None]) & (chosen < last[:, None])
    return torch.where(replaced[:, None, :, None], baseline.expand_as(x)[sample], x[sample])


def _words(number: Tensor, draw: Tensor, counter: Tensor, seed: int) -> Tensor:
    """The upper 24 bits of Philox's words for every example and counter: (E,counters,4)."""
    drawn = philox(seed, (counter[None, :], draw[:, None], number[:, None], PERTURB_STREAM), draw.device)
    return torch.stack(drawn, -1) >> 8


def _uniform(words: Tensor) -> Tensor:
    return ((2 * words + 1 - STEPS).double() / STEPS).flatten(1)


def _normal(words: Tensor) -> Tensor:
    length = ((words[..., 0::2] + 1).double() / STEPS).log().mul(-2).sqrt()
    angle = words[..., 1::2].double() * (2 * math.pi / STEPS)
    return torch.stack([length * angle.cos(), length * angle.sin()], -1).flatten(1)


def perturb(x: Tensor, sample: Tensor, draw: Tensor, ball: str, radius: float, seed: int, first_sample: int) -> Tensor:
    """x (B,D), sample and draw (E) -> x[sample] + noise (E,D), the noise uniform in the ball."""
    entries = x.shape[1]
    number = sample + first_sample
    words = _words(number, draw, torch.arange((entries + 3) // 4, device=x.device), seed)
    if ball == "linf":
        noise = radius * _uniform(words)[:, :entries]
    else:
        direction = _normal(words)[:, :entries]
        share = (_words(number, draw, torch.tensor([RADIUS_COUNTER], device=x.device), seed)[:, 0, :1] + 1).double() / STEPS
        length = direction.norm(dim=1, keepdim=True)
        noise = direction * torch.where(length > 0, radius * share ** (1 / entries) / length, 0.0)
    return (x[sample].to(accumulate_dtype(x.dtype)) + noise.to(accumulate_dtype(x.dtype))).to(x.dtype)


def map_distances(maps: Tensor, centre: Tensor, sample: Tensor, norm: str) -> Tensor:
    """maps (E,D), centre (B,D), sample (E) -> (E) in float64."""
    apart = maps.double() - centre.double()[sample]
    return torch.linalg.vector_norm(apart, ord={"l1": 1, "l2": 2, "linf": math.inf}[norm], dim=1)


def conciseness(maps: Tensor, threshold: float, gini: bool) -> Tensor:
    """maps (B,n) -> (B,3) in float64: size, entropy, Gini index of |maps|."""
    a = maps.double().abs()
    n = a.shape[1]
    total = a.sum(1)
    undefined = ~total.isfinite()
    size = (a > threshold).sum(1).double()
    entropy = torch.where(total == 0, 0.0, total.log() - torch.special.xlogy(a, a).sum(1) / total)
    entropy = entropy.masked_fill(undefined, math.nan)
    if not gini:
        return torch.stack([size, entropy, torch.full_like(size, math.nan)], 1)
    weights = 2 * torch.arange(1, n + 1, device=a.device, dtype=torch.float64) - n - 1
    uneven = (a.sort(dim=1).values * weights).sum(1)
    index = torch.where(total == 0, 0.0, uneven / (n * total)).masked_fill(undefined, math.nan)
    return torch.stack([size, entropy, index], 1)


def row_norms(x: Tensor) -> Tensor:
    """x (R,D) -> (R) in the accumulate type, squared and added in float64."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).to(accumulate_dtype(x.dtype))
