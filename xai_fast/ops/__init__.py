"""The operations, one file per family: each registers its torch.library op, documents it, checks its arguments.

Every op runs the compiled kernel for its device, or the PyTorch reference where there is none; works under
``torch.compile(fullgraph=True)`` and FakeTensor; and is differentiable (the backward pass differentiates the reference).
"""

from .rollout import attention_probabilities, fuse_heads, rollout_rows, rollout_rows_qk

__all__ = ["attention_probabilities", "fuse_heads", "rollout_rows", "rollout_rows_qk"]
