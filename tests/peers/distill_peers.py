"""interpret's purification and boosted students beside ours: prints what they differ by as JSON."""

from __future__ import annotations

import json
import warnings

import numpy as np
import torch

from xai_fast.distill import fit_gam, purify

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from interpret.glassbox import ExplainableBoostingRegressor
    from interpret.utils import purify as interpret_purify


def purification(shape: tuple[int, int], seed: int) -> float:
    """Largest difference of the pure table, both effects and the intercept."""
    generator = np.random.default_rng(seed)
    scores, weights = generator.standard_normal(shape), generator.random(shape) + 0.1
    theirs, impurities, intercept = interpret_purify(scores, weights, tolerance=0.0, is_randomized=False)
    effects = dict(impurities)
    ours = purify(scores, weights)
    wanted = (theirs, effects[(0,)], effects[(1,)], intercept)
    return max(float(np.abs(a.numpy() - b).max()) for a, b in zip(ours, wanted, strict=True))


def teacher(X: np.ndarray) -> np.ndarray:
    return np.sin(3 * X[:, 0]) + X[:, 1] ** 2 + 2 * X[:, 2] * X[:, 3] + 0.5 * X[:, 4]


def students() -> dict[str, float]:
    """Both students of one teacher: their fidelity on fresh rows, and how far their shapes lie apart."""
    generator = np.random.default_rng(0)
    X, fresh = 2 * generator.random((4000, 5)) - 1, 2 * generator.random((2000, 5)) - 1
    y, wanted = teacher(X), teacher(fresh)
    ebm = ExplainableBoostingRegressor(interactions=[(2, 3)], outer_bags=1, n_jobs=1, random_state=0).fit(X, y)
    gam = fit_gam(torch.from_numpy(y), X, interactions=[(2, 3)])

    def r2(f: np.ndarray) -> float:
        return float(1 - ((f - wanted) ** 2).mean() / wanted.var())

    parts, theirs = gam.explain(fresh).numpy(), ebm.eval_terms(fresh)
    apart = float(np.sqrt(((parts - theirs) ** 2).mean(0)).max() / wanted.std())
    names = [t.names for t in gam.terms]
    assert len(names) == len(ebm.term_names_) == 6
    return {
        "ours": r2(gam.predict(fresh).numpy()),
        "interpret": r2(ebm.predict(fresh)),
        "apart": apart,
    }


def main() -> None:
    found = {f"{shape}": purification(shape, seed) for seed, shape in enumerate([(2, 2), (5, 3), (12, 17)])}
    print(json.dumps({"purification": found, "students": students()}))


if __name__ == "__main__":
    main()
