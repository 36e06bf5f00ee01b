"""Inverse-Hessian-vector products of generalised linear models: the product itself, the LiSSA loop, scores, projections.

    H v = (1/n) sum_i s_i x_i W_i(v^T x_i)^T + (l2 + damping) v

W_i is the curvature of the loss in the outputs theta^T x_i. Sources: Koh & Liang (2017), "Understanding black-box
predictions via influence functions"; Agarwal, Bullins & Hazan (2017), "Second-order stochastic optimization for machine
learning in linear time" (LiSSA). Formulas of the families: ``csrc/ihvp.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._dtypes import accumulate_dtype
from ..reference import ihvp as reference
from . import _checks as check
from . import _glm_checks as glm
from ._library import Op

# The sampler multiplies a row count by 64 random bits in two steps that must not overflow.
MOST_ROWS = 2**31 - 1

_C = _backend.C

_glm_hvp = Op(
    "glm_hvp(Tensor X, Tensor vectors, Tensor? theta, Tensor? weights, Tensor? y, Tensor? sample_weight, Tensor? batch, "
    "str family, bool intercept, float smoothing, float l2, float damping) -> Tensor",
    reference.glm_hvp,
    _C and _C.glm_hvp,
    lambda X, vectors, *options: vectors.new_empty(vectors.shape),
)

_lissa = Op(
    "lissa(Tensor X, Tensor gradient, Tensor weights, Tensor? sample_weight, Tensor start, str family, bool intercept, "
    "float l2, float damping, float sigma, int batch_size, int first_step, int steps, int skip, int seed) "
    "-> (Tensor, Tensor)",
    reference.lissa,
    _C and _C.lissa,
    lambda X, gradient, *options: (gradient.new_empty(gradient.shape), gradient.new_empty(gradient.shape)),
)


def _scores_fake(X: Tensor, delta: Tensor, solutions: Tensor, rows: Tensor | None, intercept: bool) -> Tensor:
    return solutions.new_empty(solutions.shape[0], X.shape[0] if rows is None else rows.shape[0])


def _top_k_fake(
    X: Tensor, delta: Tensor, solutions: Tensor, rows: Tensor | None, intercept: bool, k: int, largest: bool
) -> tuple[Tensor, Tensor]:
    shape = (solutions.shape[0], k)
    return solutions.new_empty(shape), solutions.new_empty(shape, dtype=torch.int64)


_influence_scores = Op(
    "influence_scores(Tensor X, Tensor delta, Tensor solutions, Tensor? rows, bool intercept) -> Tensor",
    reference.influence_scores,
    _C and _C.influence_scores,
    _scores_fake,
)

_influence_top_k = Op(
    "influence_top_k(Tensor X, Tensor delta, Tensor solutions, Tensor? rows, bool intercept, int k, bool largest) "
    "-> (Tensor, Tensor)",
    reference.influence_top_k,
    _C and _C.influence_top_k,
    _top_k_fake,
)


def _sample_rows_reference(like: Tensor, rows: int, count: int, seed: int, step: int) -> Tensor:
    return reference.sample_rows(rows, count, seed, step, like.device)


_sample_rows = Op(
    "sample_rows(Tensor like, int rows, int count, int seed, int step) -> Tensor",
    _sample_rows_reference,
    _C and _C.sample_rows,
    lambda like, rows, count, seed, step: like.new_empty(count, dtype=torch.int64),
)

_random_projection = Op(
    "random_projection(Tensor x, int outputs, int seed, int offset) -> Tensor",
    reference.random_projection,
    _C and _C.random_projection,
    lambda x, outputs, seed, offset: x.new_empty(x.shape[0], outputs, dtype=accumulate_dtype(x.dtype)),
)


def glm_hvp(
    X: Tensor,
    v: Tensor,
    *,
    theta: Tensor | None = None,
    weights: Tensor | None = None,
    family: str,
    l2: float = 0.0,
    damping: float = 0.0,
    batch: Tensor | None = None,
    y: Tensor | None = None,
    sample_weight: Tensor | None = None,
    intercept: bool = False,
    smoothing: float = 1.0,
) -> Tensor:
    """Hessian-vector product of a generalised linear model, in one pass over X for one vector.

    .. math:: H v = \\frac1n \\sum_i s_i\\, x_i\\, W_i(v^\\top x_i)^\\top + (\\lambda_2 + \\delta) v

    with W(z) = p o (z - <p, z>) for softmax and W(z) = w z for one output: w = 1 (linear), p (1 - p) (logistic),
    exp(theta x) (Poisson), h (1 - h) / t with h = sigmoid((1 - y theta x) / t) (smooth hinge).

    Parameters
    ----------
    X : Tensor, shape (n, D)
        Rows may be far apart in memory. 16-bit X is computed in float32.
    v : Tensor, shape (P,), (P, 1) or (M, P, 1); softmax: (P, C) or (M, P, C)
        One vector, or M of them. P is D, or D + 1 with `intercept`, whose entry comes last. float32, or float64, which
        computes in float64 whatever the dtype of X; or the dtype of X.
    theta : Tensor, shape (P,), (P, 1) or (P, C), optional
        Parameters at which the curvature is taken.
    weights : Tensor, shape (n, C), or (n,) for one output, optional
        Instead of `theta`: the curvature from an earlier :func:`glm_weights` (softmax: the probabilities).
    family : {"linear", "logistic", "poisson", "smooth_hinge", "softmax"}
    l2 : float
        Weight of (l2 / 2) ||theta||^2 in the mean objective; not on the intercept.
    damping : float
        Added to every eigenvalue of H.
    batch : Tensor of int64, shape (b,), optional
        The mean is taken over these rows of X alone; they may repeat.
    y : Tensor, shape (n,), optional
        Labels +1 and -1: the smooth hinge with `theta` needs them.
    sample_weight : Tensor, shape (n,), optional
        s, by default 1. The mean still divides by n (or b).
    intercept : bool
        Every row ends in a 1.
    smoothing : float
        t of the smooth hinge.

    Returns
    -------
    Tensor, shape of v
        In the dtype of v.

    Raises
    ------
    TypeError, ValueError
        Unsupported or mixed dtypes and devices, wrong shapes, rows out of range, an unknown family, neither `theta` nor
        `weights` (the linear family needs none), negative l2 or damping.

    Notes
    -----
    Source: Koh & Liang (2017), sections 2 and 3; the curvature of multinomial logistic regression is that of Böhning (1992).
    Differentiable; the backward pass differentiates the PyTorch reference.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> xf.ops.glm_hvp(X, torch.ones(2), family="linear", damping=1.0)
    tensor([1.5000, 3.0000])
    """
    glm.check_design(X)
    glm.check_family(family)
    vectors = glm.vectors_of(v, "v", X, family, bool(intercept))
    dtype, columns = vectors.dtype, vectors.shape[2]
    if weights is not None:
        weights = glm.per_row(weights, "weights", X, columns, dtype)
    elif theta is not None:
        theta = glm.theta_of(theta, X, family, bool(intercept), columns, dtype)
    elif family != "linear":
        raise ValueError(f"theta, weights: the {family} family needs one of them, got neither")
    if weights is not None or family != "smooth_hinge":
        y = None
    elif y is None:
        raise ValueError("y: the smooth hinge needs labels with theta, got None")
    else:
        y = glm.labels_of(y, X, dtype)
    if sample_weight is not None:
        sample_weight = glm.per_row(sample_weight, "sample_weight", X, None, dtype)
    if batch is not None:
        batch = glm.row_indices(batch, "batch", X)
    l2, damping = check.check_at_least_zero(l2, "l2"), check.check_at_least_zero(damping, "damping")
    smoothing = check.check_positive(smoothing, "smoothing")
    at = theta if weights is None else None
    out = _glm_hvp(X, vectors, at, weights, y, sample_weight, batch, family, bool(intercept), smoothing, l2, damping)
    return out.reshape(v.shape).to(v.dtype)


def glm_weights(
    X: Tensor,
    theta: Tensor,
    *,
    family: str,
    y: Tensor | None = None,
    intercept: bool = False,
    smoothing: float = 1.0,
) -> Tensor:
    """The curvature of every row, to be kept for many products: probabilities for softmax, else second derivatives.

    Parameters
    ----------
    X : Tensor, shape (n, D)
    theta : Tensor, shape (P,), (P, 1) or (P, C)
    family, y, intercept, smoothing
        As in :func:`glm_hvp`.

    Returns
    -------
    Tensor, shape (n, C)
        In the dtype of theta; (n, 1) for the one-output families.

    Raises
    ------
    TypeError, ValueError
        As :func:`glm_hvp`.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.glm_weights(torch.eye(2), torch.zeros(2), family="logistic")
    tensor([[0.2500],
            [0.2500]])
    """
    glm.check_design(X)
    glm.check_family(family)
    parameters = glm.vectors_of(theta, "theta", X, family, bool(intercept))
    if parameters.shape[0] != 1:
        raise ValueError(f"theta: expected one set of parameters, got {check.shape_of(theta)}")
    if family != "smooth_hinge":
        y = None
    elif y is None:
        raise ValueError("y: the smooth hinge needs labels, got None")
    else:
        y = glm.labels_of(y, X, parameters.dtype)
    logits = reference.glm_logits(X, parameters[0], bool(intercept))
    return reference.glm_weights(logits, y, family, check.check_positive(smoothing, "smoothing"))


def lissa(
    X: Tensor,
    gradient: Tensor,
    *,
    weights: Tensor | None = None,
    theta: Tensor | None = None,
    family: str,
    sigma: float,
    batch_size: int,
    steps: int,
    l2: float = 0.0,
    damping: float = 0.0,
    seed: int = 0,
    first_step: int = 0,
    skip: int = 0,
    start: Tensor | None = None,
    y: Tensor | None = None,
    sample_weight: Tensor | None = None,
    intercept: bool = False,
    smoothing: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The stochastic recursion for H^-1 g, all steps in one call: LiSSA.

    .. math:: v_{t+1} = g + v_t - H_{B_t} v_t / \\sigma, \\qquad H^{-1} g \\approx v_T / \\sigma

    H_B is the Hessian over a batch B that is drawn with replacement, l2 and damping included. All right-hand sides share it.
    The recursion needs sigma above half the largest eigenvalue of any H_B; lambda_max + R / b, R bounding the curvature
    of one row, never diverged in our tests. :func:`xai_fast.influence.solve` chooses sigma and the steps and certifies the
    result.

    Parameters
    ----------
    X : Tensor, shape (n, D)
        n below 2^31.
    gradient : Tensor, shape (P,), (P, 1) or (M, P, 1); softmax: (P, C) or (M, P, C)
        g: one right-hand side, or M.
    weights, theta, family, l2, damping, y, sample_weight, intercept, smoothing
        As in :func:`glm_hvp`. The curvature is fixed: weights are computed once from `theta` if they are not given.
    sigma : float
        Step size is 1 / sigma; in units of H.
    batch_size, steps : int
    seed : int
        Batches are a function of (seed, step), the same on every device (Philox4x32-10, see ``csrc/ihvp.h``).
    first_step : int
        Number of the first step, to go on where an earlier call ended.
    skip : int
        Steps before the average begins; below `steps`.
    start : Tensor, shape of gradient, optional
        v_0 / sigma, that is, an approximate solution. By default g / sigma.

    Returns
    -------
    last, average : Tensor, shape of gradient
        v_T / sigma, and the mean of v_t / sigma over t > skip.

    Raises
    ------
    TypeError, ValueError
        As :func:`glm_hvp`; a batch larger than n, sigma not above 0, skip not below steps.

    Notes
    -----
    Source: Agarwal, Bullins & Hazan (2017), section 4; Koh & Liang (2017), section 3. Damping is in the units of H: the
    fixed point is (H + (l2 + damping) I)^-1 g, not that of implementations that shrink v by 1 - damping in every step.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> X = torch.eye(2)
    >>> options = {"family": "linear", "sigma": 2.0, "batch_size": 2, "damping": 0.5}
    >>> last, average = xf.ops.lissa(X, torch.ones(2), steps=200, skip=100, **options)
    >>> torch.allclose(average, torch.ones(2), atol=0.2)  # H = I / 2 + I / 2
    True
    """
    glm.check_design(X)
    glm.check_family(family)
    g = glm.vectors_of(gradient, "gradient", X, family, bool(intercept))
    if weights is None:
        weights = _weights_at(X, theta, g, family, y, bool(intercept), smoothing)
    weights = glm.per_row(weights, "weights", X, g.shape[2], g.dtype)
    if sample_weight is not None:
        sample_weight = glm.per_row(sample_weight, "sample_weight", X, None, g.dtype)
    check.check_count(X.shape[0], "rows of X", 1, MOST_ROWS)
    batch_size = check.check_count(batch_size, "batch_size", 1, X.shape[0])
    steps = check.check_count(steps, "steps")
    first_step = check.check_count(first_step, "first_step", 0, 2**32 - 1 - steps)
    skip = check.check_count(skip, "skip", 0, steps - 1)
    sigma = check.check_positive(sigma, "sigma")
    l2, damping = check.check_at_least_zero(l2, "l2"), check.check_at_least_zero(damping, "damping")
    at = g
    if start is not None:
        at = sigma * glm.vectors_of(start, "start", X, family, bool(intercept)).to(g.dtype)
        if at.shape != g.shape:
            raise ValueError(f"start: expected shape {check.shape_of(gradient)}, as gradient, got {check.shape_of(start)}")
    options = (family, bool(intercept), l2, damping, sigma, batch_size, first_step, steps, skip, check.check_seed(seed))
    last, average = _lissa(X, g, weights, sample_weight, at, *options)
    shape, dtype = gradient.shape, gradient.dtype
    return last.div_(sigma).reshape(shape).to(dtype), average.div_(sigma).reshape(shape).to(dtype)


def _weights_at(
    X: Tensor, theta: Tensor | None, like: Tensor, family: str, y: Tensor | None, intercept: bool, smoothing: float
) -> Tensor:
    """The curvature of every row at theta, which the linear family does not need."""
    if theta is not None:
        return glm_weights(X, theta, family=family, y=y, intercept=intercept, smoothing=smoothing)
    if family != "linear":
        raise ValueError(f"theta, weights: the {family} family needs one of them, got neither")
    return like.new_ones(X.shape[0], 1)


def _score_operands(X: Any, delta: Any, solutions: Any, rows: Any, intercept: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    glm.check_design(X)
    check.check_float_tensor(solutions, "solutions")
    check.check_same_device(solutions, "solutions", X.device)
    params = X.shape[1] + intercept
    if solutions.dim() != 3 or solutions.shape[1] != params or 0 in solutions.shape:
        raise ValueError(f"solutions: expected shape (M, {params}, C), got {check.shape_of(solutions)}")
    wide = solutions.to(accumulate_dtype(solutions.dtype))
    delta = glm.per_row(delta, "delta", X, solutions.shape[2], wide.dtype)
    return delta, wide, None if rows is None else glm.row_indices(rows, "rows", X)


def influence_scores(
    X: Tensor, delta: Tensor, solutions: Tensor, *, rows: Tensor | None = None, intercept: bool = False
) -> Tensor:
    """Inner products of every row's gradient with every solution, without the gradients: (M, n).

    .. math:: \\mathrm{score}_{mi} = \\sum_c \\delta_{ic} \\langle x_i, s_{mc} \\rangle

    The gradient of one row of a generalised linear model is x_i delta_i^T, with delta the derivative of its loss in the
    outputs; it is never built.

    Parameters
    ----------
    X : Tensor, shape (n, D)
    delta : Tensor, shape (n, C), or (n,) for one output
    solutions : Tensor, shape (M, P, C)
        float32, or float64, which computes in float64.
    rows : Tensor of int64, shape (r,), optional
        Only these rows of X.
    intercept : bool
        Every row ends in a 1: P = D + 1.

    Returns
    -------
    Tensor, shape (M, n) or (M, r)
        In the dtype of `solutions`.

    Raises
    ------
    TypeError, ValueError
        As :func:`glm_hvp`.

    Notes
    -----
    Source: Koh & Liang (2017), eq. 2, without its sign: I_up,loss is minus this with solutions H^-1 g_test.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.influence_scores(torch.eye(2), torch.tensor([1.0, -1.0]), torch.tensor([[[3.0], [5.0]]]))
    tensor([[ 3., -5.]])
    """
    delta, wide, rows = _score_operands(X, delta, solutions, rows, bool(intercept))
    return _influence_scores(X, delta, wide, rows, bool(intercept)).to(solutions.dtype)


def influence_top_k(
    X: Tensor,
    delta: Tensor,
    solutions: Tensor,
    k: int,
    *,
    largest: bool = True,
    rows: Tensor | None = None,
    intercept: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k largest or smallest of :func:`influence_scores` for every solution, without the matrix of scores.

    Parameters
    ----------
    X, delta, solutions, rows, intercept
        As in :func:`influence_scores`.
    k : int
        At most the number of rows.
    largest : bool
        Largest first, else smallest first.

    Returns
    -------
    values : Tensor, shape (M, k)
        In order.
    indices : Tensor of int64, shape (M, k)
        Rows of X. Of equal scores the earlier row comes first.

    Raises
    ------
    TypeError, ValueError
        As :func:`glm_hvp`; k out of range.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> X, delta = torch.eye(3), torch.tensor([1.0, -1.0, 2.0])
    >>> xf.ops.influence_top_k(X, delta, torch.ones(1, 3, 1), 2)
    (tensor([[2., 1.]]), tensor([[2, 0]]))
    """
    delta, wide, rows = _score_operands(X, delta, solutions, rows, bool(intercept))
    k = check.check_count(k, "k", 1, X.shape[0] if rows is None else rows.shape[0])
    values, indices = _influence_top_k(X, delta, wide, rows, bool(intercept), k, bool(largest))
    return values.to(solutions.dtype), indices


def sample_rows(rows: int, count: int, *, seed: int, step: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The batch that :func:`lissa` draws in a step: ``count`` rows of 0 .. rows - 1, with replacement.

    Parameters
    ----------
    rows : int
        Below 2^31.
    count, seed, step : int
    device : torch.device, optional

    Returns
    -------
    Tensor of int64, shape (count,)
        The same on every device.

    Raises
    ------
    TypeError, ValueError
        Numbers out of range.

    Notes
    -----
    Source: Salmon et al. (2011), Philox4x32-10.

    Examples
    --------
    >>> import xai_fast as xf
    >>> xf.ops.sample_rows(1000, 4, seed=3, step=5)
    tensor([330, 195, 313, 836])
    """
    rows = check.check_count(rows, "rows", 1, MOST_ROWS)
    count = check.check_count(count, "count")
    step = check.check_count(step, "step", 0, 2**32 - 1)
    return _sample_rows(torch.empty(0, device=device), rows, count, check.check_seed(seed), step)


def random_projection(x: Tensor, outputs: int, *, seed: int = 0, offset: int = 0) -> Tensor:
    """Random projection by signs that are computed where they are needed, never stored.

    .. math:: y_{bj} = \\frac{1}{\\sqrt K} \\sum_p x_{bp}\\, r_{o + p, j}, \\qquad r_{pj} = \\pm 1

    Inner products are kept in the mean, E <y, y'> = <x, x'>, with a standard deviation of about ||x|| ||x'|| / sqrt(K).

    Parameters
    ----------
    x : Tensor, shape (B, P)
        For example per-sample gradients.
    outputs : int
        K.
    seed : int
        The signs are a function of (seed, p, j): the same on every device.
    offset : int
        Position of the first column of x among all inputs: a long vector can be projected piece by piece, and the pieces
        added.

    Returns
    -------
    Tensor, shape (B, K)
        float32, or float64 for float64 inputs.

    Raises
    ------
    TypeError, ValueError
        Not a matrix, unsupported dtype, numbers out of range.

    Notes
    -----
    Source: Achlioptas (2003), "Database-friendly random projections", theorem 1.1; as in TRAK (Park et al. 2023, step 2).

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> xf.ops.random_projection(torch.eye(2), 4, seed=1)
    tensor([[ 0.5000, -0.5000, -0.5000, -0.5000],
            [-0.5000,  0.5000,  0.5000, -0.5000]])
    """
    check.check_float_tensor(x, "x")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected shape (B, P) with P of at least 1, got {check.shape_of(x)}")
    outputs = check.check_count(outputs, "outputs")
    offset = check.check_count(offset, "offset", 0, 2**63 - 1 - x.shape[1])
    return _random_projection(x, outputs, check.check_seed(seed), offset)
