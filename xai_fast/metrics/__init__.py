"""Measures that judge explanations: batch first, for any explainer and any model that is a callable."""

from . import human
from .aggregation import Aggregate, SmoothedExplainer, aggregate, lower_sensitivity
from .characterization import characterization_score, fidelity_curve_auc
from .conciseness import Conciseness, conciseness, effective_complexity, entropy, gini, size, sparsity
from .explainers import Explainer, gradient_explanation, gradient_times_input, integrated_gradients
from .faithfulness import faithfulness_correlation, feature_correlation, infidelity, monotonicity
from .fidelity import Fidelity, fidelity, fidelity_scores
from .localization import pointing_game, relevance_mass, relevance_rank
from .performance_loss import PerformanceLoss, relative_loss, relative_performance_loss
from .removal_curves import RemovalCurve, deletion_curve, insertion_curve
from .robustness import AttackResult, attack_explanation
from .sensitivity import Sensitivity, sensitivity, sensitivity_max
from .similarity import centre_shift, cosine_similarity, mass_centre, rank_correlation, top_k_intersection
from .stability import SeedStability, seed_stability
from .study import Measure, Seeded, Study, StudyContext, run_study

__all__ = [
    "Aggregate",
    "AttackResult",
    "Conciseness",
    "Explainer",
    "Fidelity",
    "Measure",
    "PerformanceLoss",
    "RemovalCurve",
    "SeedStability",
    "Seeded",
    "Sensitivity",
    "SmoothedExplainer",
    "Study",
    "StudyContext",
    "aggregate",
    "attack_explanation",
    "centre_shift",
    "characterization_score",
    "conciseness",
    "cosine_similarity",
    "deletion_curve",
    "effective_complexity",
    "entropy",
    "faithfulness_correlation",
    "feature_correlation",
    "fidelity",
    "fidelity_curve_auc",
    "fidelity_scores",
    "gini",
    "gradient_explanation",
    "gradient_times_input",
    "human",
    "infidelity",
    "insertion_curve",
    "integrated_gradients",
    "lower_sensitivity",
    "mass_centre",
    "monotonicity",
    "pointing_game",
    "rank_correlation",
    "relative_loss",
    "relative_performance_loss",
    "relevance_mass",
    "relevance_rank",
    "run_study",
    "seed_stability",
    "sensitivity",
    "sensitivity_max",
    "size",
    "sparsity",
    "top_k_intersection",
]
