"""xai_fast: the accelerated backend for explaining transformers. The public names, nothing else."""

from . import concepts, distill, influence, lrp, metrics, ops
from ._backend import show_config
from ._version import __version__
from .attention.capture import capture_attention
from .attention.rollout import attention_rollout

__all__ = [
    "__version__",
    "attention_rollout",
    "capture_attention",
    "concepts",
    "distill",
    "influence",
    "lrp",
    "metrics",
    "ops",
    "show_config",
]
