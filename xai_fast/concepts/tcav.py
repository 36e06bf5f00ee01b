"""Testing with concept activation vectors: how often a class score rises towards a concept, and whether that is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops import _checks as check
from ._activations import Pool, Probe, named_layers
from ._pairs import Fits, Sets, draw_ranks, fit_pairs
from ._result import TCAV, check_test
from .cav import CAV, DEFAULT_HOLDOUT, check_fit_options
from .concept import Concept

__all__ = ["check_pool", "sensitivity", "tcav"]


def sensitivity(gradients: Tensor, vectors: CAV | Tensor) -> Tensor:
    """Conceptual sensitivity S = grad h . v: how a class score changes as activations move towards a concept.

    Parameters
    ----------
    gradients : Tensor, shape (N, d)
        Of the class score by the (pooled) activations of a layer.
    vectors : CAV, or Tensor of shape (d,) or (K, d)
        Taken as they are: of unit length if they come from :func:`fit_cav`.

    Returns
    -------
    Tensor, shape (N,) or (N, K)
        In float64.

    Raises
    ------
    TypeError
        Arguments that are no floating tensors.
    ValueError
        Other shapes.

    Notes
    -----
    Source: Kim et al. (2018), Interpretability Beyond Feature Attribution: TCAV (arXiv 1711.11279), equation 1.

    Examples
    --------
    >>> sensitivity(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([8.], dtype=torch.float64)
    """
    check.check_float_tensor(gradients, "gradients")
    v = vectors.vector if isinstance(vectors, CAV) else vectors
    check.check_float_tensor(v, "vectors")
    if gradients.dim() != 2:
        raise ValueError(f"gradients: expected shape (N, d), got {check.shape_of(gradients)}")
    if v.dim() not in (1, 2) or v.shape[-1] != gradients.shape[1]:
        d = gradients.shape[1]
        raise ValueError(f"vectors: expected shape ({d},) or (K, {d}), got {check.shape_of(v)}")
    return gradients.double() @ v.double().mT if v.dim() == 2 else gradients.double() @ v.double()


def tcav(
    model: nn.Module,
    layers: Any,
    inputs: Any,
    target: int | Sequence[int] | None,
    concepts: Any,
    random_sets: Any,
    *,
    method: str = "ridge",
    pool: Pool = "mean",
    test: str = "welch",
    correction: str | None = "bonferroni",
    alpha: float = 0.05,
    holdout: float = DEFAULT_HOLDOUT,
    l2: float | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    additional_forward_args: Any = (),
) -> TCAV:
    """The share of inputs whose class score rises towards a concept, with the test against random concepts.

    Parameters
    ----------
    model : nn.Module
        Returns class scores (N, C), or something with ``logits``; runs in eval mode, its mode is restored.
    layers : str, nn.Module, or sequence of them
        Parts of the model, by name or as objects, each called once in a forward pass. Of several outputs the first
        floating tensor is taken.
    inputs : Tensor or ndarray, shape (N, ...), or mapping of class to them
        Examples of the class, on the model's device. Of several classes, each with its own examples: a mapping with a key
        for each class in `target`; all classes then share the passes over concepts and random sets.
    target : int or sequence of int
        One or several classes; None for a model with one output (N,).
    concepts : sequence of Concept, or mapping of str to images
        Concepts of different names; images as :class:`Concept` takes them.
    random_sets : sequence of Concept or of images, or mapping
        At least two sets of random examples, better 10 or more, as large as those of the concepts. A sequence of tensors
        is one set each.
    method, holdout, l2
        How CAVs are fitted, see :func:`fit_cav`.
    pool : {"mean", "flatten"}, ("token", i), or callable
        How outputs become vectors (n, d): the mean over positions (of maps (n, C, H, W) over H and W, of tokens (n, T, d)
        over T), all entries, one token, or a function that torch can differentiate.
    test : {"welch", "exchangeable"}
        See Notes: "welch" is near that of the paper, and too optimistic; "exchangeable" keeps its level.
    correction : {"bonferroni", "holm", "fdr_bh"} or None
        For the number of layers x concepts x classes.
    alpha : float
        Level: corrected p-values below it are significant.
    batch_size : int, optional
        Examples in a pass, by default 64. Loaders keep their own.
    generator : torch.Generator, optional
        Draws the folds behind the accuracies; nothing else is random.
    additional_forward_args : tuple
        Passed on to the model. Tensors with a row for each input need equal rows: examples of concepts get them too.

    Returns
    -------
    TCAV
        ``.score[layer][concept]``, ``.p_value``, ``.significant``, ``.magnitude``, ``.table()``, ``.plot()``.

    Raises
    ------
    TypeError
        Arguments of another kind.
    ValueError
        Unknown layers (with the nearest names), layers that are not called once, empty sets, fewer than two random sets,
        names twice, classes out of range, NaN or inf, layers that the class score does not depend on, activations that are
        the same in a concept and a random set.

    Notes
    -----
    S(x) = d/de h(a(x) + e u) at e = 0, for the class score h, a layer's output a and the shift u that moves the pooled
    activation by the unit CAV v. For "mean", u is v at every position, so that S = sum_p grad_p . v; for "flatten" u = v;
    for a token, v at that token. For a callable, S = J grad . v with its Jacobian J: this is u = J^T v, and the same up to a
    positive factor for any pooling that is linear with orthogonal rows of equal length.

    score = share of S > 0. magnitude = sum of positive S / sum |S|, 0 if all are 0. Both are taken for each random set that
    the concept is told from, then averaged.

    Each random set is tested as a concept too: its score is the mean over all other random sets. "welch" is Welch's t-test
    of a concept's R scores against these R. A concept's scores share its examples, so they are not independent: the
    statistic of a meaningless concept is about sqrt(R / 2) times as large as it should be, and with many random sets nearly
    every concept differs. "exchangeable" compares the concept's mean score with the same R: Student's prediction interval
    with R - 1 degrees of freedom. It asks whether the concept is more than one more random set.

    Cost: a forward pass over all sets; a forward pass over the inputs with one gradient pass for each class, whatever the
    number of layers, concepts and random sets; a Gram matrix a layer. Nothing is written to disk. Held at once: pooled
    activations of all sets, and concepts x random sets vectors a layer.

    Source: Kim et al. (2018), Interpretability Beyond Feature Attribution: TCAV (arXiv 1711.11279), sections 3.2 to 3.4.

    Examples
    --------
    >>> import xai_fast as xf
    >>> import xai_fast.concepts
    >>> g = torch.Generator().manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    >>> model[0].weight.copy_(torch.eye(8)), model[2].weight.zero_()[0, 0].fill_(1.0)  # class 0 is feature 0
    (...)
    >>> bright = torch.rand(30, 8, generator=g)
    >>> bright[:, 0] += 3
    >>> random_sets = [torch.rand(30, 8, generator=g) for _ in range(10)]
    >>> result = xf.concepts.tcav(model, "1", torch.rand(20, 8, generator=g), 0, {"bright": bright}, random_sets)
    >>> result.score["1"]["bright"], result.significant["1"]["bright"]
    (1.0, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_test(test, correction, alpha)
    if batch_size is not None:
        batch_size = check.check_count(batch_size, "batch_size")
    folds = check_fit_options(method, holdout, l2)
    named = _concepts(concepts, "concepts")
    random = _concepts(random_sets, "random_sets")
    if len(random) < 2:
        raise ValueError(f"random_sets: expected at least 2, for a test against chance, got {len(random)}")
    targets = _targets(target)
    extra = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    parts, pooling = named_layers(model, layers), check_pool(pool)
    probes: list[Probe] = []
    gradients: list[dict[str, Tensor]] = []
    for examples, classes in _examples(inputs, targets):
        probes.append(Probe(model, parts, pooling, examples, batch_size, extra))
        found = probes[-1].gradients(classes)
        gradients += [{name: g[place] for name, g in found.items()} for place in range(len(classes))]
    probe = probes[0]
    sets, places = _distinct([*named, *random])
    activations = probe.activations(sets)
    pairs = _pairs(places[: len(named)], places[len(named) :])
    ranks = draw_ranks([len(x) for x in next(iter(activations.values()))], generator)
    layer_parts = []
    for name in probe.layers:
        data = Sets(activations.pop(name))
        labels = [f"concepts at {name!r}: {concept.name!r}" for concept in sets]
        fits = fit_pairs(data, pairs, labels, ranks, method=method, l2=l2, folds=folds, held_out=len(named) * len(random))
        shares = torch.stack([_shares(fits.project(one.pop(name))) for one in gradients])
        layer_parts.append((shares, fits.accuracy, _cavs(fits, named, random, method)))
    return TCAV.build(
        tuple(probe.layers),
        tuple(concept.name for concept in named),
        tuple(concept.name for concept in random),
        targets,
        layer_parts,
        test=test,
        correction=correction,
        alpha=alpha,
        gradient_passes=sum(one.gradient_passes for one in probes),
        forward_passes=sum(one.forward_passes for one in probes),
    )


def _shares(s: Tensor) -> Tensor:
    """(P, 4) of sensitivities (P, N): share above 0, share below 0, magnitude, mean."""
    whole = s.abs().sum(1)
    magnitude = torch.where(whole > 0, s.clamp_min(0).sum(1) / whole, 0.0)
    return torch.stack([(s > 0).double().mean(1), (s < 0).double().mean(1), magnitude, s.mean(1)], 1)


def _cavs(fits: Fits, named: Sequence[Concept], random: Sequence[Concept], method: str) -> dict[str, list[CAV]]:
    count = len(named) * len(random)
    vectors = fits.vectors(count)
    middle = torch.stack([vector.double() @ fits.data.centre for vector in vectors])
    biases = (fits.offset[:count] / fits.norm[:count] - middle).tolist()
    accuracies = fits.accuracy[:count].tolist()
    found = []
    for i, (c, r) in enumerate((c, r) for c in named for r in random):
        found.append(CAV(vectors[i], accuracies[i], biases[i], method, c.name, r.name))
    return {c.name: found[i * len(random) : (i + 1) * len(random)] for i, c in enumerate(named)}


def _pairs(concepts: Sequence[int], random: Sequence[int]) -> list[tuple[int, int]]:
    """Every concept against every random set, then random sets against each other, once: the other way turns the sign."""
    return [(c, r) for c in concepts for r in random] + [(r, s) for i, r in enumerate(random) for s in random[i + 1 :]]


def _concepts(given: Any, argument: str) -> list[Concept]:
    if isinstance(given, Concept):
        given = [given]
    if isinstance(given, Mapping):
        found = [value if isinstance(value, Concept) else Concept(name, value) for name, value in given.items()]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        found = [value if isinstance(value, Concept) else _unnamed(value, i, argument) for i, value in enumerate(given)]
    else:
        raise TypeError(f"{argument}: expected a list of Concepts or a dict of images by name, got {type(given).__name__}")
    if not found:
        raise ValueError(f"{argument}: expected at least one, got none")
    names = [concept.name for concept in found]
    if argument == "concepts" and len(set(names)) < len(names):
        raise ValueError(f"concepts: expected different names, got {names}")
    return found


def _unnamed(images: Any, place: int, argument: str) -> Concept:
    if argument == "concepts":
        raise TypeError(f"concepts: expected a list of Concepts or a dict of images by name, got {type(images).__name__}")
    return Concept(f"random {place}", images)


def _distinct(concepts: Sequence[Concept]) -> tuple[list[Concept], list[int]]:
    """Sets that are the same object run once: (sets, the set of each concept)."""
    first = {id(concept.images): concept for concept in reversed(concepts)}
    sets = [concept for concept in concepts if first[id(concept.images)] is concept]
    place = {id(concept.images): i for i, concept in enumerate(sets)}
    return sets, [place[id(concept.images)] for concept in concepts]


def _targets(target: Any) -> tuple[int | None, ...]:
    if isinstance(target, (Tensor, np.ndarray)):
        target = target.tolist()
    if target is None or isinstance(target, (int, np.integer)):
        target = [target]
    if not isinstance(target, Sequence) or isinstance(target, str):
        raise TypeError(f"target: expected a class number or several, got {type(target).__name__}")
    found = tuple(int(t) if isinstance(t, np.integer) else t for t in target)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"target: expected at least one class, each once, got {list(found)}")
    for t in found:
        if t is not None:
            check.check_count(t, "target", 0)
    return found


def check_pool(pool: Any) -> Pool:
    """The pooling itself, or ValueError for what is none."""
    token = isinstance(pool, tuple) and len(pool) == 2 and pool[0] == "token" and isinstance(pool[1], int)
    if token or pool in ("mean", "flatten") or callable(pool):
        return pool
    raise ValueError(f"pool: expected 'mean', 'flatten', ('token', i) or a callable, got {pool!r}")


def _examples(inputs: Any, targets: tuple[int | None, ...]) -> list[tuple[Tensor, tuple[int | None, ...]]]:
    """Inputs with their classes: all classes share them, or each has its own."""
    if not isinstance(inputs, Mapping):
        return [(_inputs(inputs), targets)]
    if set(inputs) != set(targets):
        raise ValueError(f"inputs: expected a key for each class of target, {list(targets)}, got {list(inputs)}")
    return [(_inputs(inputs[target]), (target,)) for target in targets]


def _inputs(inputs: Any) -> Tensor:
    x = check.from_numpy(inputs, "inputs") if isinstance(inputs, np.ndarray) else inputs
    if not isinstance(x, Tensor):
        raise TypeError(f"inputs: expected a torch.Tensor or an array, got {type(inputs).__name__}")
    if x.dim() < 2 or 0 in x.shape:
        raise ValueError(f"inputs: expected shape (N, ...) with at least one example, got {check.shape_of(x)}")
    return x.detach()
