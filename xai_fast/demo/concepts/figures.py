"""The figures of the concepts page."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xai_fast._optional import optional_import
from xai_fast.concepts import TCAV
from xai_fast.viz.concepts import concept_grid
from xai_fast.viz.style import FAINT, INK, NORMAL

from ..models.efficientnet import CLASS_NAMES
from .tested import Studied, cosines

__all__ = ["block_name", "grid_figure", "rows_figure", "save_concepts_picture", "scores_figure"]

RANDOM = "random"
DPI = 100
# Pictures in a row of examples, and of a grid.
SHOWN, NEAREST = 8, 8


def block_name(layer: str) -> str:
    """A layer as the page calls it.

    Examples
    --------
    >>> block_name("_blocks.10")
    'block 10'
    """
    return layer.replace("_blocks.", "block ")


def rows_figure(rows: Mapping[str, Sequence[np.ndarray]], cell: float = 1.3, shown: int = SHOWN) -> Any:
    """The first pictures of each group, a row each, with its name at the left."""
    count = min(shown, *(len(row) for row in rows.values()))
    figure = optional_import("matplotlib.figure", "demo").Figure(
        figsize=(cell * count + 1.1, cell * len(rows)), layout="constrained"
    )
    axes = np.asarray(figure.subplots(len(rows), count, squeeze=False))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(FAINT)
        line[0].set_ylabel(name.replace(" ", "\n"), fontsize=NORMAL, color=INK, rotation=0, ha="right", va="center")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    return figure


def scores_figure(result: TCAV, targets: Sequence[int], title: str = "", panel: tuple[float, float] = (11.5, 2.1)) -> Any:
    """Bars by layer, a row for each of some classes."""
    chosen = _only(result, targets)
    labels = tuple(map(block_name, chosen.layers))
    named = replace(chosen, layers=labels, cavs=dict(zip(labels, chosen.cavs.values(), strict=True)))
    return named.plot(class_names=[CLASS_NAMES[target] for target in targets], title=title, panel=panel)


def _only(result: TCAV, targets: Sequence[int]) -> TCAV:
    """The result of some of the classes; p-values stay what they are."""
    places = [result.targets.index(target) for target in targets]
    names = ("scores", "negatives", "magnitudes", "sensitivities", "null_scores", "random_scores", "p_values", "adjusted")
    return replace(result, targets=tuple(targets), **{name: getattr(result, name)[places] for name in names})


def grid_figure(tested: Studied, concept: str) -> Any:
    """The pictures of the collection that are most and least like a concept."""
    pictures = tested.collection.pictures
    count = min(NEAREST, len(pictures) // 2)
    titles = (f"most {concept}", f"least {concept}")
    return concept_grid(pictures, cosines(tested, concept), count, titles=titles, cell=1.35)


def save_concepts_picture(tested: Studied, path: str | os.PathLike[str]) -> None:
    """Save examples of the concepts and the scores of three classes as one picture.

    Only drawn pictures and photos under free licences are on it, no cut-outs and textures.

    Parameters
    ----------
    tested : Studied
    path : path
        The ending chooses the format, for example .png or .jpg.
    """
    rows = {**tested.examples, RANDOM: tested.random[0]}
    targets = [target for target in (340, 339, 949, 285, 967) if target in tested.inputs][:3]
    parts = [
        rows_figure(rows, cell=0.95, shown=11),
        scores_figure(tested.result, targets),
    ]
    images = [_rendered(part) for part in parts]
    width = max(image.width for image in images)
    canvas = optional_import("PIL.Image", "demo").new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        canvas.paste(image, ((width - image.width) // 2, top))
        top += image.height
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, **({"quality": 80} if Path(path).suffix.lower() in (".jpg", ".jpeg") else {}))


def _rendered(figure: Any) -> Any:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return optional_import("PIL.Image", "demo").open(buffer).convert("RGB")
