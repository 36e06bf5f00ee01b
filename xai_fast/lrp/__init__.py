"""Layer-wise relevance propagation through PyTorch models as they are."""

from ._mode import RelevanceMode
from ._report import Attribution
from .attribute import attribute
from .composite import COMPOSITES, Composite
from .rules import AlphaBeta, Attention, Epsilon, Flat, Gamma, Gradient, Identity, Norm, Rule, WSquare, ZBox, ZPlus

__all__ = [
    "COMPOSITES",
    "AlphaBeta",
    "Attention",
    "Attribution",
    "Composite",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gradient",
    "Identity",
    "Norm",
    "RelevanceMode",
    "Rule",
    "WSquare",
    "ZBox",
    "ZPlus",
    "attribute",
]
