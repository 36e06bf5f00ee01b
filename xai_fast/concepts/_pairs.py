"""CAVs of many pairs of example sets at once. What pairs share, the Gram matrix of all examples, is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._scaling import power_of_two
from ..ops import _checks as check
from . import _linear

__all__ = ["Fits", "Sets", "draw_ranks", "fit_pairs"]

# Bytes of the systems that are solved together, of a Gram matrix that is kept, and of a float64 copy of some columns.
SYSTEMS, KEPT, COPY = 64 << 20, 2 << 30, 64 << 20
# Rows of a Gram matrix that are computed together, from the diagonal on.
BLOCK = 256
# Relative to the activations' square: class means that are this near differ by rounding only.
SAME_MEAN = 1e-24
# Activations of float64 beyond this, or below one over it, are taken in other units.
LARGEST = 2.0**200


class Sets:
    """Activations (n, d) of several sets, with what is shared by every pair of them.

    Attributes
    ----------
    unit : float
        A power of two. All below is of the activations divided by it, which changes neither unit vectors nor accuracies.
    rows : list of slice
        Place of each set among all examples.
    means : Tensor of float64, shape (sets, d)
    squares : Tensor of float64, shape (sets,)
        Mean of ||x||^2.
    finite : list of bool
        Whether a set has neither NaN nor inf.
    centre : Tensor of float64, shape (d,)
        Gram matrices are those of x - centre: a large common offset would cost digits.
    """

    def __init__(self, sets: Sequence[Tensor]) -> None:
        self.unit = _unit(sets)
        sets = self.sets = list(sets) if self.unit == 1 else [x / self.unit for x in sets]
        ends = torch.tensor([len(x) for x in sets]).cumsum(0).tolist()
        self.rows = [slice(end - len(x), end) for x, end in zip(sets, ends, strict=True)]
        self.device = sets[0].device
        self.means = torch.stack([x.mean(0, dtype=torch.float64) for x in sets])
        # What is not finite shows in the mean of its column, and needs no pass of its own.
        suspects = zip(self.means.isfinite().all(1).tolist(), sets, strict=True)
        self.finite = [fine or bool(x.isfinite().all()) for fine, x in suspects]
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in sets]
        self.squares = torch.stack([norm.square() / len(x) for norm, x in zip(norms, sets, strict=True)])
        self.centre = self.means.mean(0)
        self._gram: Tensor | None = None
        self._centred: Tensor | None = None

    @property
    def features(self) -> int:
        return self.sets[0].shape[1]

    def columns(self, examples: int) -> list[slice]:
        width = max(1, COPY // (8 * examples))
        return [slice(start, start + width) for start in range(0, self.features, width)]

    def gram(self, members: Sequence[Sequence[int]]) -> Tensor:
        """(P, n, n): Gram matrices of the sets in each of P groups, together n examples."""
        total = self.rows[-1].stop
        if 8 * total * total > KEPT:
            return torch.stack([self._product([self.sets[s] for s in group]) for group in members])
        if self._gram is None:
            self._gram = self._product(self.sets)
        chosen = self._places(members)
        return self._gram[chosen[:, :, None], chosen[:, None, :]]

    def examples(self, members: Sequence[Sequence[int]]) -> Tensor:
        """(P, n, d) in float64, without the centre."""
        if self._centred is None:
            self._centred = torch.cat([x.double() for x in self.sets]) - self.centre
        return self._centred[self._places(members)]

    def _places(self, members: Sequence[Sequence[int]]) -> Tensor:
        every = torch.arange(self.rows[-1].stop)
        return torch.stack([torch.cat([every[self.rows[s]] for s in group]) for group in members]).to(self.device)

    def _product(self, sets: Sequence[Tensor]) -> Tensor:
        total = sum(len(x) for x in sets)
        product = torch.zeros(total, total, dtype=torch.float64, device=self.device)
        for part in self.columns(total):
            x = torch.cat([x[:, part] for x in sets]).double().sub_(self.centre[part])
            for start in range(0, total, BLOCK):
                product[start : start + BLOCK, start:].addmm_(x[start : start + BLOCK], x[start:].T)
        # Only blocks on and above the diagonal were added up.
        return product.triu().add_(product.triu(1).T)


def _unit(sets: Sequence[Tensor]) -> float:
    """1, or what keeps the fourth powers of float64 activations in range."""
    if sets[0].dtype != torch.float64:
        return 1.0
    largest = torch.stack([torch.linalg.vector_norm(x, torch.inf) for x in sets]).amax()
    if not bool(largest.isfinite()) or 1 / LARGEST < float(largest) < LARGEST:
        return 1.0
    return float(power_of_two(largest))


@dataclass
class Fits:
    """The CAVs of P pairs (positive set, negative set).

    Attributes
    ----------
    accuracy : Tensor of float64, shape (P,)
        Balanced accuracy on held-out examples; NaN where none were held out.
    norm : Tensor of float64, shape (P,)
        Of the vectors before they were made unit.
    offset : Tensor of float64, shape (P,)
        Decision values are v.(x - centre) + offset, with v before it was made unit.
    weights : Tensor of float64
        (P, examples): coefficients of all examples; (P, d): the vectors themselves, where `primal`.
    """

    data: Sets
    accuracy: Tensor
    norm: Tensor
    offset: Tensor
    weights: Tensor
    primal: bool

    def project(self, gradients: Tensor) -> Tensor:
        """(P, N): products of the unit vectors with gradients (N, d)."""
        g = gradients.double()
        if self.primal:
            products = self.weights @ g.T
        else:
            products = self.weights @ torch.cat([x.double() @ g.T for x in self.data.sets])
        return products / self.norm[:, None]

    def vectors(self, count: int) -> Tensor:
        """(count, d) unit vectors of the first pairs, in the dtype of the activations."""
        data, weights = self.data, self.weights[:count] / self.norm[:count, None]
        dtype = data.sets[0].dtype
        if self.primal:
            return weights.to(dtype)
        found = torch.empty(count, data.features, dtype=dtype, device=data.device)
        used = [(s, torch.nonzero(weights[:, rows].any(1))[:, 0]) for s, rows in enumerate(data.rows)]
        for part in data.columns(max(count, max(len(x) for x in data.sets))):
            sums = torch.zeros(count, len(range(data.features)[part]), dtype=torch.float64, device=data.device)
            for s, pairs in used:
                x = data.sets[s][:, part].double()
                sums.index_add_(0, pairs, weights[pairs][:, data.rows[s]] @ x)
            found[:, part] = sums.to(dtype)
        return found


def draw_ranks(sizes: Sequence[int], generator: torch.Generator | None) -> list[Tensor]:
    """A random order of each set, from which its folds are cut."""
    check.check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return [torch.randperm(size, generator=generator, device=device).cpu() for size in sizes]


def fit_pairs(
    data: Sets,
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    ranks: Sequence[Tensor],
    *,
    method: str,
    l2: float | None,
    folds: int,
    held_out: int,
) -> Fits:
    """A CAV for each pair of sets; only the first `held_out` pairs are cross-validated, over that many `folds`.

    `names` are those of the sets in error messages; `ranks` come from :func:`draw_ranks`.
    """
    _check_directions(data, pairs, names)
    sizes = [(len(data.sets[p]), len(data.sets[n])) for p, n in pairs]
    # Dual systems are (n, n), primal ones (d, d). One kind for all pairs, so that all have weights of one shape.
    primal = data.features < max(sum(size) for size in sizes)
    total = data.features if primal else data.rows[-1].stop
    zeros = torch.zeros(len(pairs), total, dtype=torch.float64, device=data.device)
    accuracy, norm, offset = (zeros.new_full((len(pairs),), torch.nan) for _ in range(3))
    found = Fits(data, accuracy, norm, offset, zeros, primal)
    for size in dict.fromkeys(sizes):
        same = [i for i, other in enumerate(sizes) if other == size]
        for chosen, count in (([i for i in same if i < held_out], folds), ([i for i in same if i >= held_out], 0)):
            count = min(count, *size)
            count = count if count > 1 else 0
            side = sum(size) if not primal else max(data.features, sum(size))
            step = max(1, SYSTEMS // (8 * (count + 1) * side * side))
            for start in range(0, len(chosen), step):
                _fit_chunk(found, pairs, chosen[start : start + step], ranks, size, count, method, l2)
    return found


def _fit_chunk(
    found: Fits,
    pairs: Sequence[tuple[int, int]],
    chosen: list[int],
    ranks: Sequence[Tensor],
    size: tuple[int, int],
    folds: int,
    method: str,
    l2: float | None,
) -> None:
    """Pairs of equal sizes in one batch, with the fits of their folds."""
    data, members = found.data, [pairs[i] for i in chosen]
    dual = not found.primal
    problem = _linear.Dual(data.gram(members), data.features) if dual else _linear.Primal(data.examples(members))
    y = torch.cat([torch.ones(size[0]), -torch.ones(size[1])]).to(data.device, torch.float64)
    held = _held_out(members, ranks, folds).to(data.device)
    w = (~held).double()
    for label in (1, -1):
        w[..., y == label] /= 2 * w[..., y == label].sum(-1, keepdim=True)
    coefficients, values = _linear.fit(problem, w, y, method, l2)
    index = torch.tensor(chosen, device=data.device)
    full = coefficients[:, :1]
    found.norm[index] = problem.inner(full, full)[:, 0].sqrt()
    if found.primal:
        found.weights[index] = full[:, 0]
    else:
        for i, a, (positive, negative) in zip(chosen, full[:, 0], members, strict=True):
            found.weights[i, data.rows[positive]] += a[: size[0]]
            found.weights[i, data.rows[negative]] += a[size[0] :]
    found.offset[index] = (values[:, :1] - problem.plain(full)).mean((-2, -1))
    if folds:
        right = ((values[:, 1:] * y > 0) & held[:, 1:]).any(1).double()
        found.accuracy[index] = (right[:, y > 0].mean(1) + right[:, y < 0].mean(1)) / 2


def _held_out(members: Sequence[tuple[int, int]], ranks: Sequence[Tensor], folds: int) -> Tensor:
    """(P, 1 + folds, n): what each fit leaves out, nothing in the first; folds take equal shares of both classes."""
    rank = torch.stack([torch.cat([ranks[s] for s in group]) for group in members])[:, None]
    if not folds:
        return torch.zeros(rank.shape, dtype=torch.bool)
    fold = torch.arange(-1, folds)[None, :, None]
    return rank % folds == fold


def _check_directions(data: Sets, pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
    positive, negative = (torch.tensor(side, device=data.device) for side in zip(*pairs, strict=True))
    size = data.squares[positive] + data.squares[negative]
    apart = torch.stack([(data.means[p] - data.means[n]).square().sum() for p, n in pairs])
    if bool((same := apart <= SAME_MEAN * size).any()):
        p, n = pairs[int(same.nonzero()[0])]
        raise ValueError(f"{names[p]}, {names[n]}: expected activations with different means, got equal ones (no direction)")
