"""Studies: every measure for every method and seed, on the same data, resumable, as one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._fingerprint import fingerprint, pieces
from ..ops import _checks as check
from ._baselines import Baseline
from ._forwards import DEFAULT_BUDGET, Forwards, target_classes
from ._study_explainers import Seeded, caller, describe
from ._study_measures import Measure, StudyContext
from ._study_plan import check_options, plan_measures
from ._study_result import Study
from ._study_store import Folder, Part
from ._study_work import Counted, Work, no_explainer
from .fidelity import DEFAULT_SPARSITY

__all__ = ["Measure", "Seeded", "Study", "StudyContext", "run_study"]

# Largest difference of the outputs of the same model, relative to the largest output: what other chunks or threads make.
SAME_MODEL = 1e-4


def run_study(
    explainers: Mapping[str, Any],
    forward: Callable[..., Any],
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    measures: Any = None,
    seeds: Iterable[int] = (0,),
    target: int | Tensor | None = None,
    baseline: Baseline = "zero",
    sparsity: float | Sequence[float] = DEFAULT_SPARSITY,
    masks: Tensor | np.ndarray | None = None,
    feature_mask: Tensor | None = None,
    patch_size: int | None = None,
    batch_size: int | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
    additional_forward_args: Any = (),
) -> Study:
    """Compare explanation methods: all measures for all methods and seeds.

    Parameters
    ----------
    explainers : mapping of str to explainer
        A callable ``explain(inputs, target)`` or ``explain(inputs)``, an object with ``attribute(inputs, target=...)``
        (Captum), or :class:`Seeded`. The target, (B,) class numbers or None, is handed over as the argument named ``target``
        or ``targets`` or as a second argument without default; an explainer without these takes inputs alone.
        One that has an argument ``additional_forward_args`` gets the model's. Maps are as for :func:`fidelity`.
    forward : callable
        ``forward(x, *additional_forward_args)`` gives class scores (B, C), or one number a sample, (B,).
    inputs : Tensor, shape (B, ...)
    labels : Tensor, shape (B,), optional
        True classes: adds the fidelity to the phenomenon.
    measures : sequence of names and callables, or mapping, optional
        Of "fidelity" (both forms, and both kinds with labels, over all levels of sparsity; from it the characterization
        score), "deletion", "insertion" (areas), "faithfulness" (correlation), "infidelity", "sensitivity" (max, mean,
        accepted), "conciseness" (size, sparsity, entropy, Gini), "localization" (pointing game, relevance mass and rank;
        needs `masks`), "stability" (across seeds; needs two). Default: all that the arguments allow but "infidelity". A
        mapping gives options to a name: ``{"deletion": {"steps": 20}, "sensitivity": {"radius": 0.1, "n_samples": 50},
        "mine": measure}``. A callable, or :class:`Measure`, is ``measure(context: StudyContext) -> {name: (B,) values}``.
    seeds : iterable of int
        For each of them, all is done once: torch's, numpy's and Python's random generators start from it at every call of an
        explainer, and are put back after it.
    target : int or Tensor, shape (B,), optional
        Classes to explain; by default the predicted ones. None for a model with one output.
    baseline : as for :func:`fidelity`
        Of all measures that remove features; an option ``baseline`` of a measure goes before it.
    sparsity : float or sequence of float
        Levels for fidelity: shares of the features that are left out of the explanation.
    masks : Tensor or ndarray, optional
        Ground truth, as for :func:`pointing_game`.
    feature_mask, patch_size
        Groups of features, as for :func:`fidelity`.
    batch_size : int, optional
        Examples that run together, for model and explainers. Default: as many as ``memory_budget`` holds.
    memory_budget : int
        Bytes of inputs that exist at once besides the data and the maps of one method.
    seed : int
        Of subsets, perturbations and the uniform baseline: the same for every method.
    path : str or Path, optional
        Folder where every finished part is kept. A study that was stopped, by Ctrl-C, ``kill -9`` or a power cut, goes on
        there when it is called again with the same arguments, and finds the same numbers. Methods, seeds and measures may
        be added; ``batch_size`` and ``memory_budget`` may differ.
    progress : bool
        Show a progress bar over methods, seeds and measures (needs tqdm).
    additional_forward_args : tuple
        As for :func:`fidelity`.

    Returns
    -------
    Study

    Raises
    ------
    TypeError, ValueError
        Before the work begins: bad arguments and options; data, options, explainers or a model that are not those of the
        study in `path`. While it runs: maps that do not fit, results of a measure of one's own that do not.

    Warns
    -----
    UserWarning
        A measure failed for a method: its values are NaN, the reason is in ``Study.notes``, and the part is tried again when
        the study is called again. Maps hold a NaN: the scores of these samples are NaN, a note says how many there are.

    Notes
    -----
    Defaults that differ from those of the measures alone: sensitivity draws 10 neighbours within a twentieth of the median
    norm of the inputs, and is relative to the norm of the map, as methods differ in scale. The fidelity of all kinds and
    forms comes from one stream of forward passes. Explainers are told apart by code, arguments, plain enclosed values and
    tensors; a model by its outputs. The noise of an explainer that draws it for a batch depends on ``batch_size``.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> weight = torch.tensor([[2.0, -1.0], [0.5, 1.0], [-1.0, 0.0]])
    >>> x = torch.tensor([[1.0, 0.2, 0.1], [0.3, 1.0, 0.5]])
    >>> explainers = {
    ...     "weights": lambda inputs, target: inputs * weight[:, target].T,
    ...     "noise": lambda inputs, target: torch.randn_like(inputs),
    ... }
    >>> study = run_study(explainers, lambda x: x @ weight, x, seeds=(0, 1), measures=["faithfulness", "stability"])
    >>> {row["method"]: round(row["stability_cosine"], 2) for row in study.wide()}["weights"]
    1.0
    >>> study.ranking()["faithfulness_correlation"]
    ['weights', 'noise']
    """
    counted = Counted(forward)
    run = Forwards(counted, inputs, additional_forward_args, batch_size, memory_budget)
    methods, runs = _check_explainers(explainers), _check_seeds(seeds)
    folder = None if path is None else Folder(path)
    outputs = run.on_inputs()
    classes = target_classes(target, outputs) if outputs.dim() == 2 or target is not None else None
    base = StudyContext(
        method="",
        seed=None,
        attributions=torch.empty(0),
        by_seed={},
        explain=no_explainer,
        forward=counted,
        inputs=run.inputs,
        labels=None if labels is None else target_classes(labels, outputs, "labels"),
        target=classes,
        outputs=outputs,
        masks=_check_masks(masks, run.inputs),
        sparsity=_check_sparsity(sparsity),
        baseline=baseline,
        feature_mask=feature_mask,
        patch_size=patch_size,
        additional_forward_args=run.additional_forward_args,
        batch_size=batch_size,
        memory_budget=memory_budget,
        study_seed=check.check_seed(seed),
    )
    planned = plan_measures(measures, base, len(runs))
    check_options(planned, base)
    if folder is not None:
        told = {p.name: describe(p.own) if p.own else [[k, describe(v)] for k, v in p.options.items()] for p in planned}
        folder.begin(_identity(base, target), {m: describe(e) for m, e in methods.items()}, told)
        base = _same_model(folder, base)
    work = Work(methods, runs, planned, base, run, counted, folder)
    work.run(progress)
    return work.study()


# ---- checks -------------------------------------------------------------------------------------------------------


def _check_explainers(explainers: Any) -> dict[str, Any]:
    if not isinstance(explainers, Mapping):
        raise TypeError(f"explainers: expected a dict of name to explainer, got {type(explainers).__name__}")
    if not explainers:
        raise ValueError("explainers: expected at least one, got none")
    for name, explainer in explainers.items():
        if not isinstance(name, str):
            raise TypeError(f"explainers: expected names, got {type(name).__name__}")
        if not isinstance(explainer, Seeded):
            caller(explainer, f"explainers[{name!r}]")
    return dict(explainers)


def _check_seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, (str, int)) or not isinstance(seeds, Iterable):
        raise TypeError(f"seeds: expected a sequence of whole numbers, got {seeds!r}")
    runs = tuple(check.check_count(s, "seeds", 0, 2**63 - 1) for s in seeds)
    if not runs or len(set(runs)) < len(runs):
        raise ValueError(f"seeds: expected at least one, each once, got {runs}")
    return runs


def _check_sparsity(sparsity: Any) -> tuple[float, ...]:
    levels = tuple(check.check_number(v, "sparsity") for v in check.one_or_more(sparsity, "sparsity")[0])
    if len(set(levels)) < len(levels) or not all(0 <= v <= 1 for v in levels):
        raise ValueError(f"sparsity: expected shares from 0 to 1, each once, got {sparsity!r}")
    return levels


def _check_masks(masks: Any, inputs: Tensor) -> Tensor | None:
    if masks is None:
        return None
    found = check.from_numpy(masks, "masks") if isinstance(masks, np.ndarray) else masks
    if not isinstance(found, Tensor):
        raise TypeError(f"masks: expected a torch.Tensor or a numpy array, got {type(masks).__name__}")
    if found.dim() < 2 or found.shape[0] not in (1, len(inputs)):
        raise ValueError(f"masks: expected {len(inputs)} masks or 1, got shape {check.shape_of(found)}")
    return found.detach().to(inputs.device)


# ---- what a study on disk is compared with ------------------------------------------------------------------------


def _identity(c: StudyContext, target: Any) -> dict[str, Any]:
    """What decides the numbers besides explainers and options, in JSON."""

    def data(x: Any) -> Any:
        return fingerprint(pieces(x)) if isinstance(x, Tensor) and x.dim() else describe(x)

    return {
        "inputs": [list(c.inputs.shape), data(c.inputs)],
        "labels": data(c.labels),
        "target": data(target),
        "masks": data(c.masks),
        "feature_mask": data(c.feature_mask),
        "additional_forward_args": [data(a) for a in c.additional_forward_args],
        "baseline": data(c.baseline),
        "patch_size": c.patch_size,
        "sparsity": list(c.sparsity),
        "seed": c.study_seed,
    }


def _same_model(folder: Folder, c: StudyContext) -> StudyContext:
    """The context with the classes of the study begun: a tie may fall otherwise in another batch."""
    found = folder.read("outputs")
    if found is None:
        part = {"outputs": c.outputs} if c.target is None else {"outputs": c.outputs, "target": c.target}
        folder.write(Part(part), "outputs")
        return c
    before = found.tensors["outputs"].to(c.outputs.device)
    same_shape = before.shape == c.outputs.shape
    apart = float((before.double() - c.outputs.double()).abs().max() / before.double().abs().max()) if same_shape else 1.0
    if apart > SAME_MODEL:
        raise ValueError(
            f"forward: expected the model that the study {str(folder.path)!r} was begun with, got one whose outputs differ"
        )
    return c if c.target is None else replace(c, target=found.tensors["target"].to(c.target.device))
