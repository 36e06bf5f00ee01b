"""What measures do to inputs and maps: ranks, removal by rank, seeded noise, distances, conciseness, norms of tokens.

The measures themselves (``xai_fast.metrics``) run a model on what these make. Formulas: ``csrc/metrics.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._dtypes import accumulate_dtype
from ..reference import metrics as reference
from . import _checks as check
from ._library import Op

BALLS = ("l2", "linf")
NORMS = ("l1", "l2", "linf")

_C = _backend.C

_rank_features = Op(
    "rank_features(Tensor scores) -> Tensor",
    reference.rank_features,
    _C and _C.rank_features,
    lambda scores: scores.new_empty(scores.shape, dtype=torch.int32),
)

_replace_ranked = Op(
    "replace_ranked(Tensor x, Tensor baseline, Tensor ranks, Tensor sample, Tensor first, Tensor last, "
    "Tensor? ranking=None) -> Tensor",
    reference.replace_ranked,
    _C and _C.replace_ranked,
    lambda x, baseline, ranks, sample, *numbers: x.new_empty((sample.shape[0], *x.shape[1:])),
)

_perturb = Op(
    "perturb(Tensor x, Tensor sample, Tensor draw, str ball, float radius, int seed, int first_sample) -> Tensor",
    reference.perturb,
    _C and _C.perturb,
    lambda x, sample, *options: x.new_empty((sample.shape[0], x.shape[1])),
)

_map_distances = Op(
    "map_distances(Tensor maps, Tensor centre, Tensor sample, str norm) -> Tensor",
    reference.map_distances,
    _C and _C.map_distances,
    lambda maps, *options: maps.new_empty(maps.shape[0], dtype=torch.float64),
)

_conciseness = Op(
    "conciseness(Tensor maps, float threshold, bool gini) -> Tensor",
    reference.conciseness,
    _C and _C.conciseness,
    lambda maps, *options: maps.new_empty((maps.shape[0], 3), dtype=torch.float64),
)

_row_norms = Op(
    "row_norms(Tensor x) -> Tensor",
    reference.row_norms,
    _C and _C.row_norms,
    lambda x: x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype)),
)


def _check_matrix(x: Any, name: str) -> None:
    check.check_float_tensor(x, name)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"{name}: expected shape (B, n) with n of at least 1, got {check.shape_of(x)}")


def _check_numbers(x: Any, name: str, count: int | None, like: Tensor, below: int | None = None) -> None:
    """A vector of whole numbers on the device of `like`, from 0 to below - 1."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() != 1 or (count is not None and x.shape[0] != count):
        raise ValueError(f"{name}: expected shape ({'E' if count is None else count},), got {check.shape_of(x)}")
    check.check_same_device(x, name, like.device)
    if below is not None:
        check.check_places(x, name, below)


def _rank_bound(x: Tensor) -> Tensor:
    """As int32. No rank is below 0 or above 2^31 - 2, so that the interval stays the same."""
    return x if x.dtype == torch.int32 else x.clamp(0, 2**31 - 1).int()


def rank_features(scores: Tensor) -> Tensor:
    """Place of every feature when the features of a sample are sorted by falling score.

    Every removal sweep needs no more than this: what is removed at a level is an interval of ranks.

    Parameters
    ----------
    scores : Tensor, shape (B, F)
        Ties go by rising index; +0 and -0 are equal; NaN counts as -inf.

    Returns
    -------
    Tensor, shape (B, F), int32
        0 for the largest score.

    Raises
    ------
    TypeError, ValueError
        Not a floating tensor of two dimensions.

    Notes
    -----
    Source: the ordering of Samek et al. (2017), "Evaluating the visualization of what a deep neural network has learned",
    section III. CPU: radix sort of the bits. CUDA: torch's stable sort, then one kernel that inverts the order.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.rank_features(torch.tensor([[0.1, 0.7, 0.2]]))
    tensor([[2, 0, 1]], dtype=torch.int32)
    """
    _check_matrix(scores, "scores")
    return _rank_features(scores.detach().to(accumulate_dtype(scores.dtype)))


def replace_ranked(
    x: Tensor,
    baseline: Tensor,
    ranks: Tensor,
    *,
    sample: Tensor,
    first: Tensor,
    last: Tensor,
    ranking: Tensor | None = None,
) -> Tensor:
    """Copies of samples with the features of an interval of ranks replaced by a baseline.

    .. math:: out_{e,c,i,d} = \\begin{cases} baseline_{b,c,i,d} & first_e \\le rank_{r,i} < last_e \\\\
              x_{b,c,i,d} & \\text{otherwise} \\end{cases} \\quad b = sample_e, \\; r = ranking_e

    Parameters
    ----------
    x : Tensor, shape (B, C, P, D)
        Any dtype, whole numbers (token ids) too. P positions have a rank; C and D entries share it.
    baseline : Tensor
        Broadcasts to the shape of ``x``, in its dtype.
    ranks : Tensor, shape (B, P), int32, or (R, P)
        As :func:`rank_features` gives them; R rankings of which ``ranking`` picks one for every example.
    sample : Tensor, shape (E,), int64
        Which sample an example is a copy of.
    first, last : Tensor, shape (E,), whole numbers
        Interval of ranks to replace: ``(0, k)`` removes the k most important, ``(k, F)`` keeps them alone.
    ranking : Tensor, shape (E,), int64, optional
        Row of ``ranks`` that an example goes by; by default that of its sample.

    Returns
    -------
    Tensor, shape (E, C, P, D)
        In the dtype of ``x``.

    Raises
    ------
    TypeError, ValueError
        Wrong shapes, dtypes or devices; a sample number out of range.

    Notes
    -----
    Source: removal by rank, Samek et al. (2017), section III. Not differentiable.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 3, 1)
    >>> ranks = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    >>> zero, two = torch.tensor([0, 0]), torch.tensor([1, 2])
    >>> xf.ops.replace_ranked(x, torch.zeros(1), ranks, sample=zero, first=zero, last=two).flatten(1)
    tensor([[1., 0., 3.],
            [1., 0., 0.]])
    """
    if not isinstance(x, Tensor) or not isinstance(baseline, Tensor):
        raise TypeError(f"x and baseline: expected torch.Tensors, got {type(x).__name__} and {type(baseline).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, P, D), got {check.shape_of(x)}")
    if baseline.dtype != x.dtype:
        raise TypeError(f"baseline: expected dtype {x.dtype}, as x, got {baseline.dtype}")
    check.check_same_device(baseline, "baseline", x.device)
    try:
        baseline = baseline.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"baseline: expected a shape that broadcasts to {check.shape_of(x)}, got {check.shape_of(baseline)}"
        ) from None
    if not isinstance(ranks, Tensor) or ranks.dtype != torch.int32:
        raise TypeError(f"ranks: expected an int32 tensor, got {getattr(ranks, 'dtype', type(ranks).__name__)}")
    rankings = x.shape[0] if ranking is None or ranks.dim() != 2 else ranks.shape[0]
    if ranks.shape != (rankings, x.shape[2]):
        raise ValueError(f"ranks: expected shape {(rankings, x.shape[2])}, got {check.shape_of(ranks)}")
    check.check_same_device(ranks, "ranks", x.device)
    _check_numbers(sample, "sample", None, x, below=x.shape[0])
    _check_numbers(first, "first", sample.shape[0], x)
    _check_numbers(last, "last", sample.shape[0], x)
    interval = (_rank_bound(first), _rank_bound(last))
    if ranking is None:
        return _replace_ranked(x.detach(), baseline.detach(), ranks, sample.long(), *interval)
    _check_numbers(ranking, "ranking", sample.shape[0], x, below=rankings)
    return _replace_ranked(x.detach(), baseline.detach(), ranks, sample.long(), *interval, ranking.long())


def perturb(
    x: Tensor,
    *,
    sample: Tensor,
    draw: Tensor,
    radius: float,
    ball: str = "l2",
    seed: int = 0,
    first_sample: int = 0,
) -> Tensor:
    """Copies of samples with noise that is uniform in a ball, the same on every device for a seed.

    .. math:: out_e = x_{sample_e} + \\epsilon, \\qquad \\epsilon \\sim U\\{z : \\lVert z \\rVert \\le radius\\}

    Parameters
    ----------
    x : Tensor, shape (B, ...)
        Floating. The ball is that of a whole sample.
    sample, draw : Tensor, shape (E,), int64
        An example is draw number ``draw[e]`` for sample ``sample[e]``. The noise depends on the seed, the number
        ``first_sample + sample[e]``, the draw and the entry alone, so that no cut into chunks changes it.
    radius : float
        At least 0.
    ball : {"l2", "linf"}
    seed : int
    first_sample : int
        Number of the first sample of ``x`` in the whole data set.

    Returns
    -------
    Tensor, shape (E, ...)
        In the dtype of ``x``.

    Raises
    ------
    TypeError, ValueError
        Not a floating tensor, numbers out of range, an unknown ball, a negative radius.

    Notes
    -----
    Bits by Philox4x32-10 (Salmon et al. 2011), normals by Box & Muller (1958); counters: ``csrc/metrics.h``. Noise is
    made in float32. Not differentiable.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> two = torch.zeros(2, dtype=torch.int64)
    >>> z = xf.ops.perturb(torch.zeros(1, 3, 4), sample=two, draw=torch.arange(2), radius=0.5)
    >>> z.shape, bool((z.flatten(1).norm(dim=1) <= 0.5).all())
    (torch.Size([2, 3, 4]), True)
    """
    check.check_float_tensor(x, "x")
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape (B, ...) with entries in every sample, got {check.shape_of(x)}")
    if ball not in BALLS:
        raise ValueError(f"ball: expected one of {', '.join(BALLS)}, got {ball!r}")
    radius = check.check_at_least_zero(radius, "radius")
    _check_numbers(sample, "sample", None, x, below=x.shape[0])
    _check_numbers(draw, "draw", sample.shape[0], x, below=2**32)
    first_sample = check.check_count(first_sample, "first_sample", 0, 2**31)
    flat = x.detach().flatten(1).contiguous()
    out = _perturb(flat, sample.long(), draw.long(), ball, radius, check.check_seed(seed), first_sample)
    return out.view(sample.shape[0], *x.shape[1:])


def map_distances(maps: Tensor, centre: Tensor, *, sample: Tensor, norm: str = "l2") -> Tensor:
    """Distance of every map to the map of its sample, in one read and with sums in float64.

    .. math:: out_e = \\lVert maps_e - centre_{sample_e} \\rVert

    Parameters
    ----------
    maps : Tensor, shape (E, ...)
    centre : Tensor, shape (B, ...)
        Of the same shape per sample and the same dtype.
    sample : Tensor, shape (E,), int64
    norm : {"l2", "l1", "linf"}
        Over all entries of a sample.

    Returns
    -------
    Tensor, shape (E,), float64

    Raises
    ------
    TypeError, ValueError
        Not floating tensors of fitting shapes, an unknown norm, a sample number out of range.

    Notes
    -----
    The distance D of max and mean sensitivity: Bhatt, Weller & Moura (2020), "Evaluating and aggregating feature-based model
    explanations" (arXiv 2005.00631), section 2.2. Not differentiable.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.map_distances(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), sample=torch.tensor([0]))
    tensor([5.], dtype=torch.float64)
    """
    check.check_float_tensor(maps, "maps")
    if maps.dim() < 2 or 0 in maps.shape[1:]:
        raise ValueError(f"maps: expected shape (E, ...) with entries in every map, got {check.shape_of(maps)}")
    batch = centre.shape[0] if isinstance(centre, Tensor) and centre.dim() else 0
    check.check_like(centre, "centre", (batch, *maps.shape[1:]), maps)
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    _check_numbers(sample, "sample", maps.shape[0], maps, below=batch)
    flat, middle = maps.detach().flatten(1).contiguous(), centre.detach().flatten(1).contiguous()
    return _map_distances(flat, middle, sample.long(), norm)


def conciseness(maps: Tensor, *, threshold: float = 0.0, gini: bool = True) -> Tensor:
    """Size, entropy and Gini index of the magnitudes of maps, in one read (and one sort for the Gini index).

    .. math:: size = \\#\\{|a_i| > t\\}, \\quad H = -\\sum_i p_i \\log p_i, \\quad
              G = \\frac{\\sum_i (2i - n - 1)\\,|a|_{(i)}}{n \\sum_i |a_i|}, \\qquad p_i = |a_i| / \\sum_j |a_j|

    Parameters
    ----------
    maps : Tensor, shape (B, ...)
        Floating; signs do not count.
    threshold : float
        At least 0.
    gini : bool
        False leaves the sort out and returns NaN in its place.

    Returns
    -------
    Tensor, shape (B, 3), float64
        Size, entropy in nats, Gini index (0 for a constant map, 1 - 1/n where one entry is all). A map of zeros gives
        0, 0, 0; a map with a NaN gives a NaN entropy and Gini index.

    Raises
    ------
    TypeError, ValueError
        Not a floating tensor with entries in every map, a negative threshold.

    Notes
    -----
    Sources: size and entropy, Amara et al. (2022), GraphFramEx (arXiv 2206.09677); entropy as complexity, Bhatt, Weller &
    Moura (2020, arXiv 2005.00631), section 2.3; Gini index, Chalasani et al. (2020), "Concise explanations of neural
    networks using adversarial training". Sums in float64, as the maps come: those of magnitudes near the ends of its range,
    1e308 / n^2 and 5e-324, overflow or lose their digits, and the entropy and Gini index with them; the measures of
    ``xai_fast.metrics`` rescale such maps. Not differentiable.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.conciseness(torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    tensor([[2.0000, 0.6931, 0.5000]], dtype=torch.float64)
    """
    check.check_float_tensor(maps, "maps")
    if maps.dim() < 2 or 0 in maps.shape[1:]:
        raise ValueError(f"maps: expected shape (B, ...) with entries in every map, got {check.shape_of(maps)}")
    threshold = check.check_at_least_zero(threshold, "threshold")
    return _conciseness(maps.detach().flatten(1).contiguous(), threshold, bool(gini))


def row_norms(x: Tensor) -> Tensor:
    """L2 norms over the last dimension, such as those of the tokens of hidden states, in one read.

    .. math:: out_r = \\lVert x_r \\rVert_2

    Parameters
    ----------
    x : Tensor, shape (..., D)
        Floating.

    Returns
    -------
    Tensor, shape (...)
        float64 for float64 inputs, float32 for every shorter type, in which a norm does not overflow as its square would.

    Raises
    ------
    TypeError, ValueError
        Not a floating tensor, no dimension, or D = 0.

    Notes
    -----
    For the token norms of Darcet et al. (2024), "Vision Transformers Need Registers" (arXiv 2309.16588); see
    `xai_fast.attention.artifacts`. Differentiable.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.row_norms(torch.tensor([[3.0, 4.0], [1e30, 0.0]]))
    tensor([5.0000e+00, 1.0000e+30])
    """
    check.check_float_tensor(x, "x")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (..., D) with D of at least 1, got {check.shape_of(x)}")
    return _row_norms(x.reshape(-1, x.shape[-1])).view(x.shape[:-1])
