"""The operations, one file per family: each registers its torch.library op, documents it, checks its arguments.

Every op runs the compiled kernel for its device, or the PyTorch reference where there is none; works under
``torch.compile(fullgraph=True)`` and FakeTensor; and is differentiable (the backward pass differentiates the reference).
"""

from .relevance import (
    attention_relevance,
    av_relevance,
    layer_norm_relevance,
    linear_relevance,
    skip_relevance,
    softmax_relevance,
    targeted_rows,
)
from .rollout import attention_probabilities, fuse_heads, rollout_rows, rollout_rows_qk

__all__ = [
    "attention_probabilities",
    "attention_relevance",
    "av_relevance",
    "fuse_heads",
    "layer_norm_relevance",
    "linear_relevance",
    "rollout_rows",
    "rollout_rows_qk",
    "skip_relevance",
    "softmax_relevance",
    "targeted_rows",
]
