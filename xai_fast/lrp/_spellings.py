"""Every spelling of the operations that a rule can change: functions, methods, operators, and their in-place variants."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATION",
    "ACTIVATION_IN_PLACE",
    "ADDITION",
    "BACKWARD",
    "CONVOLUTION",
    "DENOMINATOR",
    "DIVISION",
    "DROPOUT",
    "INNER",
    "IN_PLACE",
    "MULTIPLICATION",
    "OPENED",
    "POWER",
    "PRODUCT",
    "SOFTMAX",
    "TENSORDOT",
    "TRANSPOSED_CONVOLUTION",
]

Functions = frozenset[Callable[..., Any]]


def _named(*names: str, owners: Iterable[Any] = (torch, Tensor, F)) -> Functions:
    """What the owners have under these names; not every owner has every name."""
    return frozenset(getattr(owner, name) for owner in owners for name in names if hasattr(owner, name))


CONVOLUTION = _named("conv1d", "conv2d", "conv3d")
TRANSPOSED_CONVOLUTION = _named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

PRODUCT = _named("matmul", "bmm", "mm", "__matmul__", "__rmatmul__", owners=(torch, Tensor, torch.linalg))
INNER = _named("inner", "mv", "dot")
TENSORDOT: Functions = frozenset({torch.tensordot, torch.functional.tensordot})
MULTIPLICATION = _named("mul", "multiply", "__mul__", "__rmul__", "mul_", "multiply_", "__imul__")
DIVISION = _named(
    "div", "divide", "true_divide", "__truediv__", "__div__", "div_", "divide_", "true_divide_", "__itruediv__"
)
# Functions of a denominator: constants wherever they occur.
DENOMINATOR = _named("rsqrt", "reciprocal", "rsqrt_", "reciprocal_", "__rtruediv__", "__rdiv__")
POWER = _named("pow", "__pow__", "square", "pow_", "__ipow__", "square_")
ADDITION = _named("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__")
IN_PLACE = _named(
    *("mul_", "multiply_", "__imul__", "div_", "divide_", "true_divide_", "__itruediv__"),
    *("rsqrt_", "reciprocal_", "pow_", "__ipow__", "square_", "add_", "__iadd__", "sub_", "__isub__"),
)

SOFTMAX = _named("softmax", "_softmax") | {torch.special.softmax}
DROPOUT = _named(
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("feature_dropout", "native_dropout"),
)

ACTIVATION = _named(
    *("gelu", "silu", "tanh", "elu", "selu", "celu", "hardswish", "mish", "softsign", "tanhshrink", "relu6", "hardtanh"),
    *("sigmoid", "softplus", "hardsigmoid", "logsigmoid", "clamp", "clip", "clamp_min", "clamp_max", "erf"),
) | {torch.special.expit, torch.special.erf}
ACTIVATION_IN_PLACE = {
    getattr(owner, name + "_"): getattr(owner, name)
    for owner in (torch, Tensor, F)
    for name in ("tanh", "elu", "selu", "celu", "hardtanh", "sigmoid", "clamp", "clip", "clamp_min", "clamp_max")
    if hasattr(owner, name + "_") and hasattr(owner, name)
}

# Python functions that are read through: what they call is handled, not they themselves.
OPENED: Functions = frozenset({F.multi_head_attention_forward, F.normalize, F.local_response_norm})
BACKWARD: Functions = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})
