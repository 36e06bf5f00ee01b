"""The rules of layer-wise relevance propagation, as small objects that say what to do with one kind of operation.

Rules of linear operations (``F.linear`` and all convolutions) redistribute R_y over the contributions x_i w_io to
``y_o = sum_i x_i w_io + b_o``. stab(z) = z + eps sign(z), sign(0) = +1. How they are computed is in ``_linear.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

__all__ = [
    "AlphaBeta",
    "Attention",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gradient",
    "Identity",
    "Kind",
    "Norm",
    "Rule",
    "WSquare",
    "ZBox",
    "ZPlus",
    "is_gradient",
]

Kind = Literal["linear", "convolution", "attention", "norm", "activation"]
_LINEAR_OPERATIONS: frozenset[str] = frozenset({"linear", "convolution"})


@dataclass(frozen=True)
class Rule:
    """What all rules have in common: the kinds of operation that they can be given to.

    Examples
    --------
    >>> sorted(Epsilon().kinds)
    ['convolution', 'linear']
    """

    kinds: ClassVar[frozenset[str]] = frozenset()
    # Relevance that does not come as input times a gradient: only exact where the operation reads the input itself.
    is_direct: ClassVar[bool] = False


def _number(value: Any, name: str, *, least: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name}: expected a finite number of at least {least:g}, got {value}")


@dataclass(frozen=True)
class Gradient(Rule):
    """The gradient of PyTorch; for linear operations this is the epsilon rule with eps = 0 (LRP-0).

    Examples
    --------
    >>> Gradient()
    Gradient()
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution", "attention", "norm", "activation"})


@dataclass(frozen=True)
class Epsilon(Rule):
    """``R_i = x_i sum_o w_io R_o / stab(y_o)`` (Bach et al. 2015, eq. 58). The bias keeps its share.

    Examples
    --------
    >>> Epsilon(eps=0.1)
    Epsilon(eps=0.1)
    """

    eps: float = 1e-6
    kinds: ClassVar[frozenset[str]] = _LINEAR_OPERATIONS

    def __post_init__(self) -> None:
        _number(self.eps, "eps")


def is_gradient(rule: Rule) -> bool:
    """Whether this rule is the gradient of PyTorch at a linear operation."""
    return isinstance(rule, Gradient) or rule == Epsilon(0.0)


@dataclass(frozen=True)
class ZPlus(Rule):
    """``R_i = sum_o max(x_i w_io, 0) R_o / stab(sum_i max(x_i w_io, 0))`` (Montavon et al. 2017). The bias is ignored.

    Examples
    --------
    >>> ZPlus()
    ZPlus(eps=1e-06)
    """

    eps: float = 1e-6
    kinds: ClassVar[frozenset[str]] = _LINEAR_OPERATIONS

    def __post_init__(self) -> None:
        _number(self.eps, "eps")


@dataclass(frozen=True)
class Gamma(Rule):
    """Contributions ``x w + gamma max(x w, 0)`` where y > 0, ``x w + gamma min(x w, 0)`` where y < 0; y = 0 passes nothing.

    The form for inputs of both signs (Andeol et al. 2021) of the gamma rule (Montavon et al. 2019). The bias
    takes its share like one more contribution.

    Examples
    --------
    >>> Gamma(gamma=0.5)
    Gamma(gamma=0.5, eps=1e-06)
    """

    gamma: float = 0.25
    eps: float = 1e-6
    kinds: ClassVar[frozenset[str]] = _LINEAR_OPERATIONS

    def __post_init__(self) -> None:
        _number(self.gamma, "gamma")
        _number(self.eps, "eps")


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """alpha times the share in the positive contributions minus beta times that in the negative (Bach et al. 2015, eq. 60).

    The positive part of the bias takes its share of the first, the negative part of the second.

    Raises
    ------
    ValueError
        A negative number, or alpha - beta other than 1.

    Examples
    --------
    >>> AlphaBeta(alpha=1, beta=0)
    AlphaBeta(alpha=1, beta=0, eps=1e-06)
    """

    alpha: float = 2.0
    beta: float = 1.0
    eps: float = 1e-6
    kinds: ClassVar[frozenset[str]] = _LINEAR_OPERATIONS

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "eps"):
            _number(getattr(self, name), name)
        if abs(self.alpha - self.beta - 1) > 1e-9 * max(1.0, self.alpha):
            raise ValueError(f"alpha, beta: expected alpha - beta = 1, got alpha={self.alpha} and beta={self.beta}")


@dataclass(frozen=True)
class Flat(Rule):
    """Equal shares for all inputs of an output (Lapuschkin et al. 2019). Made for the first layer.

    Examples
    --------
    >>> Flat()
    Flat(eps=1e-06)
    """

    eps: float = 1e-6
    kinds: ClassVar[frozenset[str]] = _LINEAR_OPERATIONS
    is_direct: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _number(self.eps, "eps")


@dataclass(frozen=True)
class WSquare(Rule):
    """Shares by squared weight, ``w_io^2`` (Montavon et al. 2017); the squared bias takes its share. For the first layer.

    zennit counts the bias like this too; ``ops.linear_relevance(rule="w^2")`` leaves it out.

    Examples
    --------
    >>> WSquare()
    WSquare(eps=1e-06)
    """

    eps: float = 1e-6
    kinds: ClassVar[frozenset[str]] = _LINEAR_OPERATIONS
    is_direct: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _number(self.eps, "eps")


@dataclass(frozen=True, eq=False)
class ZBox(Rule):
    """Contributions ``x w - low max(w, 0) - high min(w, 0)`` for inputs in [low, high] (Montavon et al. 2017).

    low and high are numbers, or tensors that broadcast against the input, such as (1, 3, 1, 1). For the first layer.

    Raises
    ------
    TypeError, ValueError
        Bounds that are no finite numbers, low above high; when it is used, a bound that does not fit or hold for the input.

    Examples
    --------
    >>> ZBox(0.0, 1.0)
    ZBox(low=0.0, high=1.0, eps=1e-06)
    """

    low: float | Tensor
    high: float | Tensor
    eps: float = 1e-6
    kinds: ClassVar[frozenset[str]] = _LINEAR_OPERATIONS
    is_direct: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _number(self.eps, "eps")
        for name in ("low", "high"):
            bound = getattr(self, name)
            if not isinstance(bound, Tensor):
                _number(bound, name, least=-math.inf)
            elif not bool(bound.isfinite().all()):
                raise ValueError(f"{name}: expected finite bounds, got inf or NaN")
        if not isinstance(self.low, Tensor) and not isinstance(self.high, Tensor) and self.low > self.high:
            raise ValueError(f"low: expected a bound of at most high = {self.high}, got {self.low}")


@dataclass(frozen=True)
class Attention(Rule):
    """``O = A V``: A gets the part lam of the relevance, V the rest, each by the epsilon rule on the products.

    lam = 1/2 is AttnLRP (Achtibat et al. 2024, eq. 14), with the Taylor rule for the softmax and halves for q k^T;
    lam = 0 is CP-LRP (Ali et al. 2022): attention weights are constants. A positive eps acts in
    F.scaled_dot_product_attention only.

    Raises
    ------
    ValueError
        lam outside [0, 1]; a negative eps.

    Examples
    --------
    >>> Attention(lam=0.0)
    Attention(lam=0.0, eps=0.0)
    """

    lam: float = 0.5
    eps: float = 0.0
    kinds: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        _number(self.lam, "lam")
        _number(self.eps, "eps")
        if self.lam > 1:
            raise ValueError(f"lam: expected a number from 0 to 1, got {self.lam}")


@dataclass(frozen=True)
class Norm(Rule):
    """Normalisation with its scale (and on request its mean) as constants (Ali et al. 2022, section 4).

    Examples
    --------
    >>> Norm(detach_mean=True)
    Norm(detach_mean=True)
    """

    detach_mean: bool = False
    kinds: ClassVar[frozenset[str]] = frozenset({"norm"})


@dataclass(frozen=True)
class Identity(Rule):
    """R_x = R_y (AttnLRP, Achtibat et al. 2024, eq. 9), for functions of one element and for norms.

    In `Composite.layers` it makes the whole module such a function: an activation that is written out, as Hugging Face's
    NewGELUActivation, or computed by an autograd Function of its own.

    Examples
    --------
    >>> Identity()
    Identity()
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"norm", "activation"})
