"""The smooth twin of a ReLU network: a torch function mode that computes softplus where the model asks for ReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._interception import uncompiled
from ..ops._checks import check_positive

__all__ = ["softplus_relu"]

# Beyond beta x = 40 softplus is the identity to the last bit of float64; torch's own threshold of 20 leaves a kink.
THRESHOLD = 40.0


def softplus_relu(beta: float) -> TorchFunctionMode:
    """A context in which every ReLU of an unchanged model is softplus(x) = log(1 + exp(beta x)) / beta.

    A ReLU network is piecewise linear: the second derivative that an attack on its gradient needs is zero almost
    everywhere. Softplus has one, and |softplus(x) - relu(x)| <= log(2) / beta.

    Parameters
    ----------
    beta : float
        Sharpness, above 0; the larger, the closer to ReLU.

    Returns
    -------
    TorchFunctionMode
        For ``with``; can be nested (the innermost decides) and entered again. Nothing is patched.

    Raises
    ------
    TypeError, ValueError
        beta is not a number above 0.

    Notes
    -----
    Twins, on floating tensors: ``relu`` in every spelling; ``clamp``, ``clip`` and ``clamp_min`` with ``min=0``, which are
    ReLUs; with r the ReLU, ``leaky_relu`` of slope s is s x + (1 - s) r(x), and ``hardtanh`` from a to b, ``relu6`` and
    ``clamp`` from 0 to b are a + r(x - a) - r(x - b), all with the same error bound (times 1 - s). In-place forms write
    into their argument, which residual branches may read. A compiled model runs uncompiled.

    Left as they are: max pooling (a choice of its input, its derivative follows the smooth values), clamps to other
    limits (guards against division by zero), ``prelu``, ``rrelu``, ``threshold``, ``hardswish``, ``hardsigmoid``, ReLUs
    inside fused operations (``nn.RNN``), in scripted modules or written by hand (``x * (x > 0)``).

    Twin: Ghorbani, Abid & Zou 2017 (arXiv 1710.10547), section 3; Dombrowski et al. 2019 (arXiv 1906.07983), section 3.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([-1.0, 0.0, 2.0])
    >>> with softplus_relu(10.0):
    ...     torch.relu(x)
    tensor([4.5399e-06, 6.9315e-02, 2.0000e+00])
    >>> torch.relu(x)
    tensor([0., 0., 2.])
    """
    return _SoftplusMode(check_positive(beta, "beta"))


class _SoftplusMode(TorchFunctionMode):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self._stances: list[Any] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        twin = _TWINS.get(func)
        smooth = None if twin is None else twin(self.beta, *args, **kwargs)
        return func(*args, **kwargs) if smooth is None else smooth

    def __enter__(self) -> _SoftplusMode:
        stance = uncompiled()
        stance.__enter__()
        self._stances.append(stance)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stances.pop().__exit__(*error)


# The twins have the signatures of the functions they stand for, after beta; None: the call is left as it is.


def _softplus(x: Tensor, beta: float) -> Tensor:
    return F.softplus(x, beta, THRESHOLD)


def _write(function: Callable[[Tensor], Tensor], x: Tensor, inplace: bool) -> Tensor | None:
    """function(x); in place through a copy, as autograd keeps what the function read."""
    if not x.is_floating_point():
        return None
    return x.copy_(function(x.clone())) if inplace else function(x)


def _relu(beta: float, input: Tensor, inplace: bool = False) -> Tensor | None:
    return _write(lambda x: _softplus(x, beta), input, inplace)


def _leaky(beta: float, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor | None:
    return _write(lambda x: negative_slope * x + (1 - negative_slope) * _softplus(x, beta), input, inplace)


def _between(
    beta: float, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor | None:
    def steps(x: Tensor) -> Tensor:
        return min_val + _softplus(x - min_val, beta) - _softplus(x - max_val, beta)

    return _write(steps, input, inplace)


def _relu6(beta: float, input: Tensor, inplace: bool = False) -> Tensor | None:
    return _between(beta, input, 0.0, 6.0, inplace)


def _clamp(beta: float, input: Tensor, min: Any = None, max: Any = None, *, out: Any = None, inplace: bool = False) -> Any:
    if isinstance(min, Tensor) or min != 0 or out is not None:
        return None
    if max is None:
        return _relu(beta, input, inplace)
    if isinstance(max, Tensor) or max <= 0:
        return None
    return _between(beta, input, 0.0, max, inplace)


def _in_place(twin: Callable[..., Any]) -> Callable[..., Any]:
    def written(beta: float, *args: Any, **kwargs: Any) -> Any:
        return twin(beta, *args, **kwargs, inplace=True)

    return written


_TWINS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _in_place(_relu)),
    **dict.fromkeys((torch.clamp, torch.clip, torch.clamp_min, Tensor.clamp, Tensor.clip, Tensor.clamp_min), _clamp),
    **dict.fromkeys((torch.clamp_, torch.clip_, torch.clamp_min_), _in_place(_clamp)),
    **dict.fromkeys((Tensor.clamp_, Tensor.clip_, Tensor.clamp_min_), _in_place(_clamp)),
    F.leaky_relu: _leaky,
    F.leaky_relu_: _in_place(_leaky),
    F.relu6: _relu6,
    F.hardtanh: _between,
    F.hardtanh_: _in_place(_between),
}
