"""Linear probes: what normal and outlying tokens still know about their place, their pixels and the image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...ops import _checks as check
from ._batches import TEST, TRAIN, VALIDATION, FlatBatch, Split, TokenBatch, flatten, read_batches
from ._ridge import Moments, choose_l2, fit_ridge

__all__ = ["Probe", "TokenBatch", "probe_tokens"]

KINDS = ("position", "coordinates", "pixels", "class")

# Multiples of the mean eigenvalue of the centred X^T X.
PENALTIES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class Probe:
    """A linear probe of one group of tokens, and how well it does on images that were held out.

    Attributes
    ----------
    kind : str
    weight, bias : Tensor of float64, shapes (D, P) and (P,)
    l2 : float
        The penalty, in multiples of the mean eigenvalue of the centred X^T X.
    n_train, n_test : int
        Tokens of the group that it was fitted to, and tested on. ``n_train`` counts all groups with ``fit="all"``.
    accuracy : float or None
        Share of right answers, for "position" and "class".
    distance : float or None
        Mean distance between the predicted and the true place in patches, for "coordinates", and "position" with a grid.
    error : float or None
        Mean of |y - prediction|_2, for "pixels" and "coordinates".
    r2 : float or None
        1 - squared error over squared distance from the mean of the tokens tested, all targets together; NaN if those do not
        vary.
    baseline : float
        Accuracy, or error, of the constant that the training tokens suggest: the most frequent label or the mean.

    Examples
    --------
    >>> import torch
    >>> tokens = torch.eye(4).repeat(40, 1, 1)
    >>> probe = probe_tokens(tokens, kind="position")["all"]
    >>> probe.predict(tokens[0]).argmax(1)
    tensor([0, 1, 2, 3])
    """

    kind: str
    weight: Tensor
    bias: Tensor
    l2: float
    n_train: int
    n_test: int
    accuracy: float | None
    distance: float | None
    error: float | None
    r2: float | None
    baseline: float

    def predict(self, tokens: Tensor) -> Tensor:
        """Scores of the labels, or values, (..., P) in float64 for tokens (..., D)."""
        return tokens.to(self.weight) @ self.weight + self.bias


def probe_tokens(
    tokens: Tensor | np.ndarray | Iterable[Any] | Callable[[], Iterable[Any]],
    targets: Tensor | np.ndarray | None = None,
    *,
    kind: Literal["position", "coordinates", "pixels", "class"] = "position",
    groups: Any = None,
    images: Tensor | np.ndarray | None = None,
    grid: tuple[int, int] | None = None,
    l2: float | Sequence[float] = PENALTIES,
    holdout: float | Collection[int] = 0.25,
    fit: Literal["group", "all"] = "group",
    group_names: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Probe]:
    """Fit a linear probe to each group of tokens in closed form, and test it on held-out images.

    .. math:: \\min_{W, b} \\sum_i \\lVert y_i - W^\\top x_i - b \\rVert^2
              + \\lambda \\tfrac{\\mathrm{tr}\\, S}{D} \\lVert W \\rVert_F^2,
              \\qquad S = \\sum_i (x_i - \\bar x)(x_i - \\bar x)^\\top

    Only sums over tokens are kept, in float64: O(D^2 + D P) for each group, whatever the number of tokens. One factorisation
    serves all targets and penalties.

    Parameters
    ----------
    tokens : Tensor or ndarray, shape (B, T, D) or (n, D); or batches
        Patch tokens of B images, or tokens one a row. Batches are `TokenBatch` or tuples (tokens, targets, groups, images)
        with the last ones left out or None; they are read twice, so give a list, a loader, or a function that starts a pass.
    targets : Tensor or ndarray
        "position": the patch's number, (B, T), (T,) or (n,); None for 0 to T - 1. "coordinates": its (row, column),
        (B, T, 2), (T, 2) or (n, 2); None for those in `grid`. "pixels": (B, T, P) or (n, P). "class": (B,), (B, T) or (n,).
    kind : {"position", "coordinates", "pixels", "class"}
        "position" and "class" are classification, by regression on one-hot targets and the largest score; "class" judges
        every token on its own.
    groups : Tensor, ndarray or Outliers, optional
        A mask that is True at outliers, or group numbers from 0; negative ones are left out. It broadcasts to the tokens.
    images : Tensor or ndarray of whole numbers, shape (n,) or (B,), optional
        Which image a token is from. By default every row of tokens (n, D) counts as an image of its own: then tokens of one
        image lie on both sides of the split, and what they share helps the probe.
    grid : (rows, columns), optional
        Of patches, in which "position" measures distance.
    l2 : float or sequence of float
        Penalty, or several of which the best on validation images is taken (a fifth of those not held out; the probe is then
        fitted to all of them).
    holdout : float in (0, 1), or collection of image numbers
        What is tested on. A share is exact for tensors, and in every 20 images of a stream.
    fit : {"group", "all"}
        A probe of its own for every group, or one for all tokens that is tested on each group. Outliers are few: by "group"
        they also have less to learn from (see ``n_train``).
    group_names : sequence of str, optional
        By default "normal" and "outlier" for a mask, the numbers for numbers, "all" without groups.
    seed : int
        Of the split.

    Returns
    -------
    dict of str to Probe
        In the order of the group numbers.

    Raises
    ------
    TypeError
        Tokens of a wrong type, or batches that can be read only once; labels that are no whole numbers.
    ValueError
        Shapes that do not fit; NaN or infinite tokens; an unknown kind; missing targets; a group without tokens to train,
        validate or test on; too few images.

    Notes
    -----
    Source of the task: Darcet et al. (2024), "Vision Transformers Need Registers" (arXiv 2309.16588), tables 1a and 1b, with
    logistic regression for the class; here all probes are ridge regressions. With one penalty the classification is that of
    scikit-learn's ``RidgeClassifier(alpha)``, the regression that of ``Ridge(alpha)``, for alpha = l2 tr(S) / D.

    Examples
    --------
    >>> import torch
    >>> tokens = torch.randn(40, 4, 8, generator=torch.Generator().manual_seed(0))
    >>> tokens[:, :2, :2] += 9 * torch.eye(2)
    >>> probes = probe_tokens(tokens, kind="position", groups=torch.tensor([False, False, True, True]), grid=(2, 2))
    >>> probes["normal"].accuracy, probes["outlier"].accuracy < 0.9
    (1.0, True)
    """
    _check_options(kind, fit, grid)
    penalties = _penalties(l2)
    whole = TokenBatch(tokens, targets, groups, images) if isinstance(tokens, (Tensor, np.ndarray)) else None
    if whole is None and any(x is not None for x in (targets, groups, images)):
        raise TypeError("targets, groups and images: expected None with batches, which bring their own")
    start = read_batches(tokens, whole)

    def batches() -> Iterator[FlatBatch]:
        seen = 0
        for batch in start():
            yield flatten(batch, kind, grid, seen)
            seen += len(batch.tokens)

    count = None if whole is None else len(next(batches()).images.unique())
    split = Split(_holdout(holdout), len(penalties) > 1, count, check.check_seed(seed))
    sums = _Sums(batches(), split)
    names = sums.names(group_names)
    fitted = _fit(sums, names, penalties, fit)
    scores = {group: _Scores(kind, grid) for group in fitted}
    for flat in batches():
        held_out = split(flat.images) == TEST
        for group, probe in fitted.items():
            here = held_out & (flat.groups == group)
            scores[group].add(flat.tokens[here], flat.targets[here], probe)
    return {names[group]: scores[group].result(fitted[group], names[group]) for group in fitted}


class _Fitted:
    """A probe before its test, and the constant that it is compared with."""

    def __init__(self, moments: Moments, penalty: float) -> None:
        ((self.weight, self.bias),) = fit_ridge(moments, [penalty])
        self.mean = moments.y / moments.count
        self.l2 = penalty
        self.n_train = moments.count


class _Scores:
    """Sums over the tokens that were held out."""

    def __init__(self, kind: str, grid: tuple[int, int] | None) -> None:
        self.kind, self.grid = kind, grid
        self.count = 0
        self.right = self.right_baseline = self.distance = self.error = self.error_baseline = self.squared = 0.0
        self.y: Tensor | float = 0.0
        self.square = 0.0

    def add(self, tokens: Tensor, targets: Tensor, probe: _Fitted) -> None:
        for x, y in zip(tokens.split(8192), targets.split(8192), strict=True):
            predicted = x.double() @ probe.weight + probe.bias
            self.count += len(x)
            if y.dim() == 1:
                self._labels(predicted.argmax(1), y, int(probe.mean.argmax()))
            else:
                self._values(predicted, y.double(), probe.mean)

    def _labels(self, predicted: Tensor, y: Tensor, most_frequent: int) -> None:
        self.right += int((predicted == y).sum())
        self.right_baseline += int((y == most_frequent).sum())
        if self.kind == "position" and self.grid is not None:
            columns = self.grid[1]
            rows_apart, columns_apart = predicted // columns - y // columns, predicted % columns - y % columns
            self.distance += float(torch.hypot(rows_apart.double(), columns_apart.double()).sum())

    def _values(self, predicted: Tensor, y: Tensor, mean: Tensor) -> None:
        apart = (predicted - y).norm(dim=1)
        self.error += float(apart.sum())
        self.squared += float(apart.square().sum())
        self.error_baseline += float((mean - y).norm(dim=1).sum())
        self.y = self.y + y.sum(0)
        self.square += float(y.square().sum())

    def result(self, probe: _Fitted, name: str) -> Probe:
        if not self.count:
            raise ValueError(f"groups: expected tokens of group {name!r} in the held-out images, got none")
        is_labels = self.kind in ("position", "class")
        has_distance = self.kind == "coordinates" or (self.kind == "position" and self.grid is not None)
        right, error = self.right / self.count, self.error / self.count
        return Probe(
            kind=self.kind,
            weight=probe.weight,
            bias=probe.bias,
            l2=probe.l2,
            n_train=probe.n_train,
            n_test=self.count,
            accuracy=right if is_labels else None,
            distance=(self.distance / self.count if is_labels else error) if has_distance else None,
            error=None if is_labels else error,
            r2=None if is_labels else self._r2(),
            baseline=(self.right_baseline if is_labels else self.error_baseline) / self.count,
        )

    def _r2(self) -> float:
        assert isinstance(self.y, Tensor)
        total = self.square - float(self.y.square().sum()) / self.count
        # Below the rounding of the sums there is no variation.
        return 1 - self.squared / total if total > 1e-12 * self.square else float("nan")


class _Sums:
    """Moments of the training and the validation tokens of each group."""

    def __init__(self, batches: Iterable[FlatBatch], split: Split) -> None:
        self.parts: dict[int, dict[int, Moments]] = {}
        self._known: set[tuple[str, ...]] = set()
        width: int | None = None
        for flat in batches:
            width = flat.tokens.shape[1] if width is None else width
            if width != flat.tokens.shape[1]:
                raise ValueError(f"tokens: expected {width} features as in the first batch, got {flat.tokens.shape[1]}")
            if not bool(flat.tokens.isfinite().all()):
                raise ValueError("tokens: expected finite values, got NaN or infinity")
            self._known.add(flat.names)
            self._add(flat, split(flat.images))

    def _add(self, flat: FlatBatch, parts: Tensor) -> None:
        for group in flat.groups.unique().tolist():
            if group < 0:
                continue
            if group not in self.parts:
                width, device = flat.tokens.shape[1], flat.tokens.device
                self.parts[group] = {part: Moments(width, device) for part in (TRAIN, VALIDATION)}
            for part, moments in self.parts[group].items():
                here = (flat.groups == group) & (parts == part)
                moments.add(flat.tokens[here], flat.targets[here])

    def names(self, given: Sequence[str] | None) -> dict[int, str]:
        """The name of every group that was seen, in the order of their numbers."""
        if not self.parts:
            raise ValueError("tokens: expected at least one token in a group, got none")
        if len(self._known) > 1:
            raise ValueError("groups: expected batches that all have a mask, all have numbers, or all have none")
        (usual,) = self._known
        names = tuple(given) if given is not None else usual or tuple(str(i) for i in range(max(self.parts) + 1))
        if max(self.parts) >= len(names):
            raise ValueError(f"group_names: expected a name for each group up to {max(self.parts)}, got {len(names)}")
        return {group: names[group] for group in sorted(self.parts)}


def _fit(sums: _Sums, names: dict[int, str], penalties: Sequence[float], fit: str) -> dict[int, _Fitted]:
    if fit == "all":
        total = {part: _total([parts[part] for parts in sums.parts.values()]) for part in (TRAIN, VALIDATION)}
        probe = _fit_one(total, "all", penalties)
        return dict.fromkeys(names, probe)
    return {group: _fit_one(sums.parts[group], name, penalties) for group, name in names.items()}


def _total(moments: list[Moments]) -> Moments:
    total = moments[0]
    for other in moments[1:]:
        total = total + other
    return total


def _fit_one(parts: dict[int, Moments], name: str, penalties: Sequence[float]) -> _Fitted:
    train, validation = parts[TRAIN], parts[VALIDATION]
    for moments, purpose in ((train, "train on"), (validation, "validate on")):
        if not moments.count and (purpose == "train on" or len(penalties) > 1):
            raise ValueError(f"groups: expected tokens of group {name!r} to {purpose}, got none")
    penalty = choose_l2(train, validation, penalties) if len(penalties) > 1 else penalties[0]
    return _Fitted(train + validation, penalty)


def _check_options(kind: Any, fit: Any, grid: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if fit not in ("group", "all"):
        raise ValueError(f"fit: expected 'group' or 'all', got {fit!r}")
    if grid is not None:
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise TypeError(f"grid: expected (rows, columns), got {grid!r}")
        for size in grid:
            check.check_count(size, "grid")


def _penalties(l2: Any) -> list[float]:
    entries = [l2] if isinstance(l2, (int, float)) else list(l2)
    if not entries:
        raise ValueError("l2: expected at least one penalty, got none")
    return [check.check_at_least_zero(entry, "l2", "a penalty") for entry in entries]


def _holdout(holdout: Any) -> float | frozenset[int]:
    if isinstance(holdout, (int, float)):
        share = check.check_number(holdout, "holdout")
        if not 0 < share < 1:
            raise ValueError(f"holdout: expected a share in (0, 1) or image numbers, got {holdout!r}")
        return share
    if not isinstance(holdout, (Iterable, Tensor)) or isinstance(holdout, str):
        raise TypeError(f"holdout: expected a share or image numbers, got {type(holdout).__name__}")
    numbers = frozenset(int(number) for number in (holdout.tolist() if isinstance(holdout, Tensor) else holdout))
    if not numbers:
        raise ValueError("holdout: expected at least one image number, got none")
    return numbers
