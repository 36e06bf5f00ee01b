"""Explanations from attention: rollout, targeted relevance, signed attention, and how models' attention is captured."""

from .capture import capture_attention
from .cross import encoder_decoder_relevance
from .rollout import attention_rollout
from .signed import signed_attention

__all__ = ["attention_rollout", "capture_attention", "encoder_decoder_relevance", "signed_attention"]
