"""Artifacts of vision transformers: high-norm tokens, what they know, and registers that take their place."""

from .clean import clean_rollout
from .norms import TokenNorms, token_norms
from .outliers import OutlierLayers, Outliers, find_outliers, outlier_layers, outlier_positions
from .probes import Probe, TokenBatch, probe_tokens
from .registers import RegisterNeuron, find_register_neurons, test_time_registers

__all__ = [
    "OutlierLayers",
    "Outliers",
    "Probe",
    "RegisterNeuron",
    "TokenBatch",
    "TokenNorms",
    "clean_rollout",
    "find_outliers",
    "find_register_neurons",
    "outlier_layers",
    "outlier_positions",
    "probe_tokens",
    "test_time_registers",
    "token_norms",
]
