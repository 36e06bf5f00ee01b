"""Explanations from attention: rollout, and the interception of attention in models as they are."""

from .capture import capture_attention
from .rollout import attention_rollout

__all__ = ["attention_rollout", "capture_attention"]
