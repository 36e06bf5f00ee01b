"""Generalised linear models as the last layer of anything: loss, gradient and curvature in closed form.

objective(theta) = (1/n) sum_i s_i loss(theta^T x_i + b, y_i) + (l2 / 2) ||theta||^2        b is not penalised
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .._dtypes import accumulate_dtype
from ..ops import _checks as check
from ..ops._checks import check_count, check_positive
from ._labels import as_array, class_indices, real_numbers
from ._penalty import Penalty
from ._rows import native
from ._sklearn import read_estimator

__all__ = ["Head", "LinearHead", "LogisticHead", "PoissonHead", "SmoothHingeHead", "SoftmaxHead"]


class Head(ABC):
    """A linear model with its loss: what an influence function needs to know of a trained model.

    Parameters
    ----------
    theta : Tensor or numpy array, shape (D,), (D, 1) or (D, C)
        Trained parameters; C outputs for softmax alone.
    bias : Tensor, numpy array or number, shape (C,), optional
        Trained intercept. It becomes the last row of `parameters` and is not penalised.
    l2 : float
        Weight of (l2 / 2) ||theta||^2 in the mean objective (1/n) sum_i s_i loss_i.

    Attributes
    ----------
    family : str
        Name of the family in :mod:`xai_fast.ops`.
    parameters : Tensor, shape (P, C)
        P = D, or D + 1 with a bias.
    outputs : int
        C.
    intercept : bool
    shape : tuple of int
        Of one vector of parameters as the user writes it: like theta, with one row more if there is a bias.
    l2 : float or None
        None for a scikit-learn model whose penalty is known only once the number of training rows is.
    classes : list or None
        Labels in the order of the outputs, where they are not 0, 1, ...

    Raises
    ------
    TypeError, ValueError
        Not numbers, wrong shapes, values that are not finite, a negative l2.

    Examples
    --------
    >>> import xai_fast as xf
    >>> head = xf.influence.LogisticHead(torch.zeros(3), bias=0.5, l2=0.01)
    >>> head.parameters.shape, head.shape
    (torch.Size([4, 1]), (4,))
    """

    family: ClassVar[str]
    multi_output: ClassVar[bool] = False
    smoothing: float = 1.0

    def __init__(self, theta: Any, *, bias: Any = None, l2: float = 0.0) -> None:
        weight = _numbers(theta, "theta")
        wanted = "(D, C) with C of at least 2" if self.multi_output else "(D,) or (D, 1)"
        columns = weight.shape[1] if weight.dim() == 2 else 1
        if weight.dim() not in (1, 2) or 0 in weight.shape or (columns > 1) != self.multi_output:
            raise ValueError(f"theta: expected shape {wanted} for {type(self).__name__}, got {tuple(weight.shape)}")
        self.outputs = columns
        self.intercept = bias is not None
        self.parameters = weight.reshape(-1, columns)
        if bias is not None:
            self.parameters = torch.cat([self.parameters, _bias_row(bias, columns, weight)])
        self.shape = (self.parameters.shape[0], *weight.shape[1:])
        self.classes: list[Any] | None = None
        self.penalty = Penalty(check.check_at_least_zero(l2, "l2"))

    @property
    def l2(self) -> float | None:
        return self.penalty.known

    @property
    def dim(self) -> int:
        """D: features of a row."""
        return self.parameters.shape[0] - self.intercept

    def logits(self, X: Tensor) -> Tensor:
        """theta^T x + b for X (n, D): (n, C), in the wider of the dtypes of X and of float32."""
        parameters = self.parameters.to(X.device, accumulate_dtype(X.dtype))
        if not self.intercept:
            return X.to(parameters.dtype) @ parameters
        return torch.addmm(parameters[-1], X.to(parameters.dtype), parameters[:-1])

    @abstractmethod
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of every row (n,), for labels of :meth:`check_labels`; without regulariser and sample weight."""

    @abstractmethod
    def residual(self, logits: Tensor, y: Tensor) -> Tensor:
        """d loss / d logits: (n, C). The gradient of a row is x residual^T."""

    @abstractmethod
    def weights(self, logits: Tensor, y: Tensor) -> Tensor:
        """The curvature (n, C) as :func:`xai_fast.ops.glm_weights`: probabilities for softmax, else second derivatives."""

    def curvature_bound(self, weights: Tensor) -> Tensor:
        """A bound of the largest eigenvalue of the curvature in the logits, for every row of :meth:`weights`: (n,)."""
        return weights[:, 0]

    @abstractmethod
    def check_labels(self, y: Any, rows: int, *, name: str = "y") -> Tensor:
        """Labels as the other methods take them, (rows,); errors name the first bad row and its value."""

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        """How far the right class is ahead of the next one, (n,); ValueError for regression."""
        raise ValueError(f"of: expected 'loss' or 'logit' for {type(self).__name__}, which has no classes, got 'margin'")

    def class_logit(self, logits: Tensor, y: Tensor | None) -> Tensor:
        """The logit of the right class (n,): with one output the log odds of that class; for regression the logit itself."""
        return logits[:, 0]

    def class_of(self, y: Tensor) -> Tensor:
        """The class number of every label, int64 (n,); ValueError for regression."""
        raise ValueError(f"per_class: expected a classifier, got {type(self).__name__}")

    @classmethod
    def from_sklearn(cls, estimator: Any, n: int | None = None) -> Head:
        """The head of a fitted scikit-learn estimator; on the base class the kind of head is chosen.

        LogisticRegression (binary: LogisticHead, else SoftmaxHead), LinearRegression, Ridge, PoissonRegressor, and
        SGDClassifier(loss="log_loss"). Penalties become the l2 of the mean objective: 1 / (C n) and alpha / n for Ridge,
        which :class:`Influence` fills in when it knows the number of rows; alpha for PoissonRegressor and SGDClassifier.

        Parameters
        ----------
        estimator : fitted scikit-learn estimator
        n : int, optional
            Number of training rows, to know `l2` at once.

        Raises
        ------
        TypeError
            An estimator of another kind; `n` no whole number.
        ValueError
            Not fitted; `n` below 1; another penalty than l2; something that changes the objective: class_weight, a
            penalised intercept (solver="liblinear"), positive=True, several targets.

        Notes
        -----
        Sample weights of the fit belong to :class:`Influence`. Source of the objectives: scikit-learn user guide, 1.1.

        Examples
        --------
        >>> import numpy as np, xai_fast as xf
        >>> from sklearn.linear_model import Ridge
        >>> xf.influence.Head.from_sklearn(Ridge(alpha=2.0).fit(np.eye(4), np.arange(4.0)), n=4).l2
        0.5
        """
        if n is not None:
            check_count(n, "n")
        found = read_estimator(estimator)
        kind: Any = {
            "linear": LinearHead, "logistic": LogisticHead, "softmax": SoftmaxHead, "poisson": PoissonHead,
        }[found.family]  # fmt: skip
        if not issubclass(kind, cls):
            raise TypeError(f"estimator: expected one for {cls.__name__}, got {type(estimator).__name__}, a {kind.__name__}")
        head = kind(found.theta, bias=found.bias)
        head.classes = found.classes
        head.penalty = found.penalty if n is None else Penalty(found.penalty.l2(n))
        return head

    @classmethod
    def from_linear(cls, module: nn.Linear, *, l2: float = 0.0) -> Head:
        """The head of the last layer of a network; its inputs come from :func:`collect_features`.

        Parameters
        ----------
        module : nn.Linear
        l2 : float
            Weight decay in the mean objective.

        Raises
        ------
        TypeError
            Not an nn.Linear; or called on Head itself, which cannot know the loss.

        Examples
        --------
        >>> import xai_fast as xf
        >>> xf.influence.SoftmaxHead.from_linear(torch.nn.Linear(5, 3), l2=0.1).shape
        (6, 3)
        """
        if cls is Head:
            raise TypeError("Head: from_linear is called on the head of the loss, for example SoftmaxHead.from_linear")
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module: expected an nn.Linear, got {type(module).__name__}")
        weight = module.weight.detach().T
        bias = None if module.bias is None else module.bias.detach()
        return cls(weight if cls.multi_output else weight[:, 0] if weight.shape[1] == 1 else weight, bias=bias, l2=l2)


class LinearHead(Head):
    """Least squares: loss (z - y)^2 / 2.

    Parameters, attributes and errors as :class:`Head`.

    Examples
    --------
    >>> import xai_fast as xf
    >>> head = xf.influence.LinearHead([1.0, 2.0])
    >>> head.loss(head.logits(torch.ones(1, 2)), torch.tensor([1.0]))
    tensor([2.])
    """

    family = "linear"

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return (logits[:, 0] - y.to(logits.dtype)).square() / 2

    def residual(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits - y[:, None].to(logits.dtype)

    def weights(self, logits: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(logits)

    def check_labels(self, y: Any, rows: int, *, name: str = "y") -> Tensor:
        """Finite numbers."""
        return real_numbers(as_array(y, name, rows), name).to(self.parameters.device)


class PoissonHead(Head):
    """Poisson regression with the log link: loss exp(z) - y z.

    Parameters, attributes and errors as :class:`Head`.

    Examples
    --------
    >>> import xai_fast as xf
    >>> head = xf.influence.PoissonHead([0.0])
    >>> head.residual(head.logits(torch.ones(1, 1)), torch.tensor([3.0]))
    tensor([[-2.]])
    """

    family = "poisson"

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits[:, 0].exp() - y.to(logits.dtype) * logits[:, 0]

    def residual(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits.exp() - y[:, None].to(logits.dtype)

    def weights(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits.exp()

    def check_labels(self, y: Any, rows: int, *, name: str = "y") -> Tensor:
        """Counts: finite numbers of at least 0."""
        return real_numbers(as_array(y, name, rows), name, 0.0).to(self.parameters.device)


class LogisticHead(Head):
    """Binary logistic regression: loss log(1 + exp(z)) - y z, labels 0 and 1 (or bool, or `classes` of scikit-learn).

    Parameters, attributes and errors as :class:`Head`. A two-output softmax layer is a :class:`SoftmaxHead`.

    Examples
    --------
    >>> import xai_fast as xf
    >>> head = xf.influence.LogisticHead([0.0])
    >>> head.residual(head.logits(torch.ones(1, 1)), torch.tensor([1.0]))
    tensor([[-0.5000]])
    """

    family = "logistic"

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(-self.margin(logits, y))

    def residual(self, logits: Tensor, y: Tensor) -> Tensor:
        # Not p - y, which loses all digits where the prediction is sure and right.
        sign = (2 * y - 1)[:, None].to(logits.dtype)
        return -sign * (-sign * logits).sigmoid()

    def weights(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits.sigmoid() * (-logits).sigmoid()

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        return (2 * y - 1).to(logits.dtype) * logits[:, 0]

    def class_logit(self, logits: Tensor, y: Tensor | None) -> Tensor:
        return logits[:, 0] if y is None else self.margin(logits, y)

    def class_of(self, y: Tensor) -> Tensor:
        return y.long()

    def check_labels(self, y: Any, rows: int, *, name: str = "y") -> Tensor:
        """0 and 1 as float64."""
        array = as_array(y, name, rows)
        return class_indices(array, self.classes or [0, 1], name).double().to(self.parameters.device)


class SmoothHingeHead(Head):
    """Support vector machine with a smooth hinge: loss t log(1 + exp((1 - y z) / t)), labels +1 and -1.

    Parameters
    ----------
    theta, bias, l2
        As :class:`Head`.
    smoothing : float
        t; the hinge max(0, 1 - y z) is the limit of 0.

    Raises
    ------
    TypeError, ValueError
        As :class:`Head`; smoothing not above 0.

    Notes
    -----
    Source: Koh & Liang (2017), section 4.3. Labels 0 and 1 are taken as -1 and +1.

    Examples
    --------
    >>> import xai_fast as xf
    >>> head = xf.influence.SmoothHingeHead([1.0], smoothing=0.1)
    >>> head.loss(head.logits(torch.full((1, 1), 3.0)), torch.tensor([-1.0]))
    tensor([4.])
    """

    family = "smooth_hinge"

    def __init__(self, theta: Any, *, bias: Any = None, l2: float = 0.0, smoothing: float = 1.0) -> None:
        super().__init__(theta, bias=bias, l2=l2)
        self.smoothing = check_positive(smoothing, "smoothing")

    def _inner(self, logits: Tensor, y: Tensor) -> Tensor:
        return (1 - y[:, None].to(logits.dtype) * logits) / self.smoothing

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.smoothing * nn.functional.softplus(self._inner(logits, y)[:, 0])

    def residual(self, logits: Tensor, y: Tensor) -> Tensor:
        return -y[:, None].to(logits.dtype) * self._inner(logits, y).sigmoid()

    def weights(self, logits: Tensor, y: Tensor) -> Tensor:
        inner = self._inner(logits, y)
        return inner.sigmoid() * (-inner).sigmoid() / self.smoothing

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        return y.to(logits.dtype) * logits[:, 0]

    def class_logit(self, logits: Tensor, y: Tensor | None) -> Tensor:
        return logits[:, 0] if y is None else self.margin(logits, y)

    def class_of(self, y: Tensor) -> Tensor:
        return (y > 0).long()

    def check_labels(self, y: Any, rows: int, *, name: str = "y") -> Tensor:
        """+1 and -1 as float64; 0 and 1 are mapped."""
        array = as_array(y, name, rows)
        has_zero = bool((array == 0).any())
        codes = class_indices(array, self.classes or ([0, 1] if has_zero else [-1, 1]), name)
        return (2 * codes - 1).double().to(self.parameters.device)


class SoftmaxHead(Head):
    """Multinomial logistic regression: loss -log p_y with p = softmax(theta^T x + b), labels 0 .. C - 1.

    Parameters, attributes and errors as :class:`Head`.

    Examples
    --------
    >>> import xai_fast as xf
    >>> head = xf.influence.SoftmaxHead(torch.zeros(2, 4))
    >>> head.residual(head.logits(torch.ones(1, 2)), torch.tensor([3]))
    tensor([[ 0.2500,  0.2500,  0.2500, -0.7500]])
    """

    family = "softmax"
    multi_output = True

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, y, reduction="none")

    def residual(self, logits: Tensor, y: Tensor) -> Tensor:
        p = logits.softmax(-1)
        rows = torch.arange(len(y), device=logits.device)
        # p_y - 1 as minus the sum of the others: sure and right predictions keep their digits.
        p[rows, y] = 0
        p[rows, y] = -p.sum(-1)
        return p

    def weights(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits.softmax(-1)

    def curvature_bound(self, weights: Tensor) -> Tensor:
        """Of diag(p) - p p^T: at most max_c p_c, and at most max_c 2 p_c (1 - p_c) (Gershgorin)."""
        return torch.minimum(weights.amax(-1), (2 * weights * (1 - weights)).amax(-1))

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        others = logits.scatter(1, y[:, None], -torch.inf)
        return self.class_logit(logits, y) - others.amax(-1)

    def class_logit(self, logits: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            raise TypeError("y_test: expected the classes whose logits are asked for, got None")
        return logits.gather(1, y[:, None])[:, 0]

    def class_of(self, y: Tensor) -> Tensor:
        return y

    def check_labels(self, y: Any, rows: int, *, name: str = "y") -> Tensor:
        """Class numbers as int64."""
        classes = self.classes or list(range(self.outputs))
        return class_indices(as_array(y, name, rows), classes, name).to(self.parameters.device)


def _numbers(x: Any, name: str) -> Tensor:
    """x as a finite tensor of its own in float32 or float64."""
    if isinstance(x, Tensor):
        tensor = x.detach().clone()
    else:
        try:
            is_array = isinstance(x, np.ndarray)
            tensor = torch.from_numpy(native(x).copy()) if is_array else torch.tensor(x, dtype=torch.get_default_dtype())
        except (TypeError, ValueError):
            raise TypeError(f"{name}: expected numbers, got {type(x).__name__}") from None
    check.check_float_tensor(tensor, name)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return tensor.to(accumulate_dtype(tensor.dtype))


def _bias_row(bias: Any, columns: int, like: Tensor) -> Tensor:
    row = _numbers(bias, "bias").to(like)
    if row.numel() != columns or row.dim() > 1:
        raise ValueError(f"bias: expected shape ({columns},), got {tuple(row.shape)}")
    return row.reshape(1, columns)
