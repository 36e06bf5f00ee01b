"""Additive students by other libraries. They are installed outside site-packages by `make bench`."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import numpy as np

from .fast_vit_rollout import PEERS

__all__ = ["ebm"]


def ebm(
    X: np.ndarray, y: np.ndarray, pairs: list[tuple[int, int]], jobs: int, seconds: float | None = None, **options: Any
) -> Any:
    """An ExplainableBoostingRegressor with those pairs, fitted, or as far as it came in so many seconds."""
    begin = time.perf_counter()
    if seconds is not None:
        options["callback"] = lambda *state: time.perf_counter() - begin > seconds
    sys.path.append(str(PEERS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from interpret.glassbox import ExplainableBoostingRegressor

            model = ExplainableBoostingRegressor(interactions=pairs, n_jobs=jobs, random_state=0, **options)
            return model.fit(X, y)
    finally:
        sys.path.remove(str(PEERS))
