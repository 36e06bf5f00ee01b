"""Concepts: directions in activation space that stand for what people name, and how much a class depends on them."""

from ._result import TCAV
from .cav import CAV, fit_cav
from .concept import Concept
from .reading import activations
from .sorting import sort_by_concept
from .tcav import sensitivity, tcav

__all__ = ["CAV", "TCAV", "Concept", "activations", "fit_cav", "sensitivity", "sort_by_concept", "tcav"]
