"""The operations, one file per family: each registers its torch.library op, documents it, checks its arguments.

Every op runs the compiled kernel for its device, or the PyTorch reference where there is none; works under
``torch.compile(fullgraph=True)`` and FakeTensor; and is differentiable (the backward pass differentiates the reference).
"""

from .fused_attention import attention_relevance, targeted_rows
from .ihvp import (
    glm_hvp,
    glm_weights,
    influence_scores,
    influence_top_k,
    lissa,
    random_projection,
    sample_rows,
)
from .metrics import conciseness, map_distances, perturb, rank_features, replace_ranked, row_norms
from .relevance import (
    av_relevance,
    layer_norm_relevance,
    linear_relevance,
    skip_relevance,
    softmax_relevance,
)
from .rollout import attention_probabilities, fuse_heads, rollout_rows, rollout_rows_qk

__all__ = [
    "attention_probabilities",
    "attention_relevance",
    "av_relevance",
    "conciseness",
    "fuse_heads",
    "glm_hvp",
    "glm_weights",
    "influence_scores",
    "influence_top_k",
    "layer_norm_relevance",
    "linear_relevance",
    "lissa",
    "map_distances",
    "perturb",
    "random_projection",
    "rank_features",
    "replace_ranked",
    "rollout_rows",
    "rollout_rows_qk",
    "row_norms",
    "sample_rows",
    "skip_relevance",
    "softmax_relevance",
    "targeted_rows",
]
