"""What can be wrong with an additive student as an explanation of its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .gam import GAM

__all__ = ["Report", "make_report"]

# From here on correlation and concurvity are worth a word.
HIGH = 0.8


@dataclass(frozen=True)
class Report:
    """Identifiability, explosion of interactions, extrapolation, correlated features.

    Attributes
    ----------
    free_directions : int
        Identifiability: how many changes of the tables leave every prediction as it is (a pair can take over any part of
        its main effects). The fit and the purification fix them; without that the terms would be arbitrary by so much.
    moved : dict of int to float
        What purification took out of the fitted terms of each order, as a share of the variance.
    candidates, fitted : dict of int to int
        Number of possible and of fitted terms of each order.
    parameters : int
        Values of all tables.
    rows_outside : float
        Share of the held-out rows for which :meth:`GAM.support` is False.
    empty_cells : dict of int to float
        By order, the share of the values that no data determine.
    correlation : float
        Largest absolute correlation of two features (0 where there is one feature).
    correlated : (str, str) or None
        Those features.
    concurvity : tuple of float
        For each term the share of the variance of its contribution that the other terms' contributions predict linearly;
        near 1 the split between terms is decided by little.
    constant : tuple of str
        Features that were left out since they have one value.

    Examples
    --------
    >>> from xai_fast.distill import fit_gam
    >>> report = fit_gam(lambda x: x[:, 0] * x[:, 1], torch.rand(2000, 4), interactions=1).report()
    >>> report.candidates, report.fitted
    ({1: 4, 2: 6, 3: 4}, {1: 4, 2: 1, 3: 0})
    >>> max(report.concurvity) < 0.1
    True
    """

    free_directions: int
    moved: dict[int, float]
    candidates: dict[int, int]
    fitted: dict[int, int]
    parameters: int
    rows_outside: float
    empty_cells: dict[int, float]
    correlation: float
    correlated: tuple[str, str] | None
    concurvity: tuple[float, ...]
    constant: tuple[str, ...]
    _names: tuple[str, ...] = ()

    def __str__(self) -> str:
        moved = ", ".join(f"order {k} {v:.2g}" for k, v in self.moved.items())
        terms = ", ".join(f"order {k}: {self.fitted[k]} of {n}" for k, n in self.candidates.items())
        empty = ", ".join(f"order {k} {v:.1%}" for k, v in self.empty_cells.items())
        lines = [
            f"identifiability: {self.free_directions} directions leave predictions as they are; purification fixed them "
            f"and moved, as a share of the variance: {moved}",
            f"interactions: terms fitted: {terms}; {self.parameters} values",
            f"extrapolation: {self.rows_outside:.2%} of the held-out rows lie outside the data; "
            f"values without data: {empty}",
        ]
        worst = max(self.concurvity, default=0.0)
        pair = f" ({self.correlated[0]}, {self.correlated[1]})" if self.correlated else ""
        where = f" ({self._names[self.concurvity.index(worst)]})" if self.concurvity else ""
        note = "; single shapes of such terms are not to be trusted" if max(worst, self.correlation) > HIGH else ""
        lines.append(f"correlation: largest {self.correlation:.2f}{pair}; largest concurvity {worst:.2f}{where}{note}")
        if self.constant:
            lines.append(f"left out, one value only: {', '.join(self.constant)}")
        return "\n".join(lines)


def make_report(gam: GAM, X: Tensor, parts: Tensor, w: Tensor) -> Report:
    """The report of a student on rows X (n, F) with its contributions (n, terms, C) and weights w (n,)."""
    w = w / w.sum()
    fitted = {order: sum(t.order == order for t in gam.terms) for order in gam.record.candidates}
    empty = {}
    for order in sorted({t.order for t in gam.terms}):
        flags = torch.cat([(t.weights == 0).reshape(-1) for t in gam.terms if t.order == order])
        empty[order] = float(flags.double().mean())
    correlation, pair = _correlation(X.double(), w)
    names = gam.feature_names
    return Report(
        free_directions=_free_directions(gam),
        moved=gam.moved,
        candidates=gam.record.candidates,
        fitted=fitted,
        parameters=sum(t.values.numel() for t in gam.terms),
        rows_outside=1 - float(w @ gam.support(X).double()),
        empty_cells=empty,
        correlation=correlation,
        correlated=(names[pair[0]], names[pair[1]]) if pair else None,
        concurvity=tuple(_concurvity(parts, w).tolist()),
        constant=gam.record.constant,
        _names=tuple(" x ".join(t.names) for t in gam.terms),
    )


def _free_directions(gam: GAM) -> int:
    """Tables of a pair that are sums of functions of one feature, and so on; and the means of main effects."""
    known = {t.features for t in gam.terms}
    total = 0
    for term in gam.terms:
        sizes = [g.size for g in term.grids]
        if term.order == 1:
            total += 1
        elif term.order == 2:
            total += sum(sizes) - 1
        else:
            a, b, c = sizes
            total += 1 + (a - 1) + (b - 1) + (c - 1)
            for i, j in ((0, 1), (0, 2), (1, 2)):
                if (term.features[i], term.features[j]) in known:
                    total += (sizes[i] - 1) * (sizes[j] - 1)
    return total * gam.terms[0].table.shape[-1] if gam.terms else 0


def _correlation(X: Tensor, w: Tensor) -> tuple[float, tuple[int, int] | None]:
    R = _correlation_matrix(X, w).abs()
    R.fill_diagonal_(0)
    if len(R) < 2:
        return 0.0, None
    place = int(R.argmax())
    i, j = sorted(divmod(place, len(R)))
    return float(R.max()), (i, j)


def _correlation_matrix(A: Tensor, w: Tensor) -> Tensor:
    A = A - w @ A
    covariance = A.T @ (A * w[:, None])
    scale = covariance.diagonal().clamp_min(torch.finfo(A.dtype).tiny).rsqrt() * (covariance.diagonal() > 0)
    return scale[:, None] * covariance * scale


def _concurvity(parts: Tensor, w: Tensor) -> Tensor:
    """1 - 1 / VIF of each term's contribution, the largest over the outputs."""
    worst = parts.new_zeros(parts.shape[1])
    for c in range(parts.shape[2]):
        R = _correlation_matrix(parts[:, :, c], w)
        used = R.diagonal() > 0.5
        inverse = torch.linalg.pinv(R[used][:, used], hermitian=True, rtol=1e-10)
        own = 1 - 1 / inverse.diagonal().clamp_min(1.0)
        worst[used] = torch.maximum(worst[used], own)
    return worst
