"""Is every step from the score back to the inputs one that relevance is known to go through?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import Parameter

from . import _functions as functions

__all__ = [
    "CONTRACTIONS",
    "is_attention_weights",
    "is_constant",
    "is_rearranged",
    "leaves_behind",
    "nodes_between",
    "unknown_step",
]


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_REARRANGING = _names(
    "Alias AsStrided Clone Contiguous Detach Diagonal Expand Flip Permute PixelShuffle PixelUnshuffle ReshapeAlias Roll",
    "Select Slice Split SplitWithSizes Squeeze T ToCopy Transpose Unbind Unfold UnsafeSplit UnsafeView Unsqueeze View",
)

# Linear in what carries relevance, or piecewise linear without an offset: the gradient times the input is the rule.
_LINEAR = _names(
    "AccumulateGrad Cat Stack Index IndexSelect Gather Take TakeAlongDim Embedding Repeat RepeatInterleave",
    "SelfRepeatInterleave Add Sub Rsub Neg Sum Mean Nansum Cumsum Trace Where MaskedFill MaskedSelect MaskedScatter Scatter",
    "ScatterAdd IndexAdd IndexCopy IndexFill IndexPut Copy CopySlices Triu Tril ConstantPadNd",
    "ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D Im2Col Col2Im",
    "Relu LeakyRelu PreluKernel Abs Max Min Amax Amin Maximum Minimum Fmax Fmin Aminmax Topk Sort Kthvalue Median Nanmedian",
    "MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D MaxUnpool2D AvgPool2D AvgPool3D AdaptiveAvgPool2D",
    "AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D GridSampler2D UpsampleNearest1D UpsampleNearest2D",
    "UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleBilinear2D UpsampleBilinear2DAa",
    "UpsampleBicubic2D UpsampleBicubic2DAa UpsampleLinear1D UpsampleTrilinear3D Softmax LogSoftmax",
)

# Linear in each of these operands: at most one of them may carry relevance, unless a rule has shared it out.
_PRODUCTS = {
    "Mul": (0, 1),
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Addmm": (1, 2),
    "Baddbmm": (1, 2),
    "Addbmm": (1, 2),
    "Linear": (0, 1),
    "Convolution": (0, 1),
    "MkldnnConvolution": (0, 1),
    "ConvolutionOverrideable": (0, 1),
    "SlowConv2D": (0, 1),
    "Addcmul": (1, 2),
    "Dot": (0, 1),
    "Mv": (0, 1),
    "EmbeddingBag": (0,),
}

# Sums of products with a weight, by the kind of their rule: their gradient is a rule only where that rule is the gradient.
CONTRACTIONS = {
    "linear": _names("Mm Bmm Addmm Baddbmm Addbmm Linear Dot Mv"),
    "convolution": _names("Convolution MkldnnConvolution ConvolutionOverrideable SlowConv2D"),
}

# The autograd Functions of this package.
_OUR_FUNCTIONS = {"_Scale", "_ScaleInPlace", "_Replace", "_Probe"}
_KNOWN = _LINEAR | _REARRANGING

# Steps that a weight or a denominator may go through on its way into a product and still be a constant.
_CONSTANT_STEPS = _REARRANGING | _names(
    "AccumulateGrad Add Sub Rsub Neg Mul Div Exp Cat Stack Softplus Mean Sum Rsqrt Sqrt Reciprocal Pow Clamp ClampMin"
)
_CONSTANT_STEPS |= {name for name in _KNOWN if name.startswith("Upsample")}

_SOFTMAX = _names("Softmax SafeSoftmax MaskedSoftmax")
# Steps that attention weights may go through and stay what they are: one entry at a time, selected, moved or averaged.
_WEIGHT_STEPS = (_CONSTANT_STEPS - {"AccumulateGrad"}) | _names(
    "Index IndexSelect Gather Take TakeAlongDim Repeat RepeatInterleave SelfRepeatInterleave Where MaskedFill MaskedSelect",
    "MaskedScatter Scatter IndexPut IndexFill IndexCopy Copy CopySlices Triu Tril ConstantPadNd NativeDropout NanToNum Abs",
    "Relu LeakyRelu Threshold Maximum Minimum Amax Max Topk Sort",
)
# Heads that are mixed by a weight matrix.
_MIXING_STEPS = CONTRACTIONS["linear"] | CONTRACTIONS["convolution"]


def _operation(node: Any) -> str:
    """MulBackward0 -> Mul."""
    name: str = node.name().rsplit("::", 1)[-1]
    return name.split("Backward", 1)[0]


def _parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _nodes_behind(root: Any) -> Iterator[Any]:
    """The node `root` and all that its gradient goes to."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        for parent in _parents(node):
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)


def unknown_step(root: Any, verified: set[Any], ruled: frozenset[str] = frozenset()) -> str | None:
    """Name of the first operation behind the node `root` that no rule covers; None if all are known.

    `verified` holds the nodes of operations that a rule has prepared, `ruled` the names of those that need it.
    """
    for node in _nodes_behind(root):
        if node not in verified and not _is_known(node, ruled):
            return str(node.name())
    return None


def leaves_behind(root: Any) -> list[Tensor]:
    """The tensors that the gradient of the node `root` ends at."""
    return [node.variable for node in _nodes_behind(root) if _operation(node) == "AccumulateGrad"]


def _is_known(node: Any, ruled: frozenset[str]) -> bool:
    operation = _operation(node)
    if isinstance(node, BackwardCFunction):
        return operation in _OUR_FUNCTIONS
    if operation in ruled:
        return False
    if operation in _PRODUCTS:
        edges = node.next_functions
        return sum(edges[i][0] is not None for i in _PRODUCTS[operation] if i < len(edges)) <= 1
    if operation == "Div":
        # A denominator that carries relevance would have been made a constant.
        return len(node.next_functions) < 2 or node.next_functions[1][0] is None
    return operation in _KNOWN


def nodes_between(output: Any, ends: Iterable[Any]) -> set[Any]:
    """The nodes that one call has put between its inputs, whose nodes are `ends`, and its output."""
    found: set[Any] = set()
    stop = set(ends)
    waiting = [t.grad_fn for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, Tensor)]
    while waiting:
        node = waiting.pop()
        if node is None or node in stop or node in found or _operation(node) == "AccumulateGrad":
            continue
        found.add(node)
        waiting += _parents(node)
    return found


def is_rearranged(x: Tensor, source: Tensor) -> bool:
    """Whether x holds entries of `source` and nothing else happened to them."""
    node, end = x.grad_fn, source.grad_fn
    while node is not None and node is not end:
        parents = _parents(node)
        if _operation(node) not in _REARRANGING | {"_Probe"} or len(parents) != 1:
            return False
        node = parents[0]
    return node is not None


def is_constant(x: Tensor) -> bool:
    """Whether no relevance goes through x although it requires grad: computed from parameters and stopped tensors alone."""
    if x.grad_fn is None:
        return isinstance(x, Parameter)
    waiting: list[Any] = [x.grad_fn]
    seen = {x.grad_fn}
    while waiting:
        node = waiting.pop()
        if _is_stop(node):
            continue
        operation = _operation(node)
        if operation not in _CONSTANT_STEPS or isinstance(node, BackwardCFunction):
            return False
        if operation == "AccumulateGrad" and not isinstance(node.variable, Parameter):
            return False
        fresh = [parent for parent in _parents(node) if parent not in seen]
        seen.update(fresh)
        waiting += fresh
    return True


def is_attention_weights(x: Tensor, *, may_be_mixed: bool = False) -> bool:
    """Whether x is the output of a softmax, changed at most entry by entry, rearranged or joined, and nothing else in it
    carries relevance. may_be_mixed: by matrix products with constants too.
    """
    if x.grad_fn is None:
        return False
    seen, waiting, is_found = {x.grad_fn}, [x.grad_fn], False
    while waiting:
        node = waiting.pop()
        if _is_stop(node) or _is_parameter(node):
            continue
        if _operation(node) in _SOFTMAX:
            is_found = True
            continue
        if not _keeps_weights(node, may_be_mixed):
            return False
        fresh = [parent for parent in _parents(node) if parent not in seen]
        seen.update(fresh)
        waiting += fresh
    return is_found


def _keeps_weights(node: Any, may_be_mixed: bool) -> bool:
    operation = _operation(node)
    if not isinstance(node, BackwardCFunction):
        return operation in _WEIGHT_STEPS or (may_be_mixed and operation in _MIXING_STEPS)
    if operation != "_Replace":
        return operation in _OUR_FUNCTIONS
    gradient = getattr(node, "gradient", None)
    if may_be_mixed:
        return gradient not in (functions.norm_gradient, functions.group_norm_gradient, functions.attention_gradient)
    return gradient is functions.identity_gradient


def _is_parameter(node: Any) -> bool:
    return _operation(node) == "AccumulateGrad" and isinstance(node.variable, Parameter)


def _is_stop(node: Any) -> bool:
    return isinstance(node, BackwardCFunction) and getattr(node, "factor", None) == 0 and _operation(node) in _OUR_FUNCTIONS
