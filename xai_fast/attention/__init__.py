"""Explanations from attention: rollout, targeted relevance, signed attention, and how models' attention is captured."""

from . import artifacts
from .additive import AdditiveAttention, additive_attention_scores
from .capture import capture_attention
from .cross import encoder_decoder_relevance
from .rnn import AttentionExplanation, BiLSTMClassifier, Seq2Seq
from .rollout import attention_rollout
from .signed import signed_attention

__all__ = [
    "AdditiveAttention",
    "AttentionExplanation",
    "BiLSTMClassifier",
    "Seq2Seq",
    "additive_attention_scores",
    "artifacts",
    "attention_rollout",
    "capture_attention",
    "encoder_decoder_relevance",
    "signed_attention",
]
