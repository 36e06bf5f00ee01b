"""Students that can be read: generalised additive models with interactions, distilled from any teacher."""

from .binning import Grid
from .fidelity import Fidelity, OrderFidelity
from .fit import fit_gam
from .gam import GAM, Term
from .purify import purify
from .report import Report

__all__ = ["GAM", "Fidelity", "Grid", "OrderFidelity", "Report", "Term", "fit_gam", "purify"]
