"""Additive students by other libraries. They are installed outside site-packages by `make bench`."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from .fast_vit_rollout import PEERS

__all__ = ["ebm"]


def ebm(X: np.ndarray, y: np.ndarray, pairs: list[tuple[int, int]], jobs: int, **options: Any) -> Any:
    """A fitted ExplainableBoostingRegressor with those pairs."""
    sys.path.append(str(PEERS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from interpret.glassbox import ExplainableBoostingRegressor

            model = ExplainableBoostingRegressor(interactions=pairs, n_jobs=jobs, random_state=0, **options)
            return model.fit(X, y)
    finally:
        sys.path.remove(str(PEERS))
