"""Influence functions: the training rows behind a prediction."""

from .distributed import DistributedInfluence
from .features import collect_features
from .heads import Head, LinearHead, LogisticHead, PoissonHead, SmoothHingeHead, SoftmaxHead
from .influence import Influence
from .projected import projected_scores
from .results import Convention, Scores, Solution, TopK
from .solvers import NotConverged, solve
from .store import ScoreStore, open_scores, write_scores
from .torch_influence import TorchInfluence
from .tracin import tracin

__all__ = [
    "Convention",
    "DistributedInfluence",
    "Head",
    "Influence",
    "LinearHead",
    "LogisticHead",
    "NotConverged",
    "PoissonHead",
    "ScoreStore",
    "Scores",
    "SmoothHingeHead",
    "SoftmaxHead",
    "Solution",
    "TopK",
    "TorchInfluence",
    "collect_features",
    "open_scores",
    "projected_scores",
    "solve",
    "tracin",
    "write_scores",
]
