"""The picture of an alignment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from xai_fast.viz.alignment import plot_alignment

pytest.importorskip("matplotlib")


def test_picture_of_an_alignment() -> None:
    figure = plot_alignment(torch.tensor([[0.25, 0.75]]), ["a", "long"], ["b"], title="weights")
    axis = figure.axes[0]
    mesh = axis.collections[0]
    assert np.asarray(mesh.get_array()).tolist() == [[0.25, 0.75]]
    assert mesh.get_clim() == (0, 0.75)
    assert axis.get_title() == "weights"
    assert axis.yaxis_inverted()
    signed = plot_alignment(torch.tensor([[-0.5, 0.25]]), ["a", "b"], ["c"], signed=True)
    assert signed.axes[0].collections[0].get_clim() == (-0.5, 0.5)
    assert plot_alignment(torch.zeros(1, 1), ["a"], ["b"]).axes[0].collections[0].get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([[0.5]], {}, r"weights: expected shape \(T, S\) = \(1, 2\)"),
        ([[0.5, math.nan]], {}, "weights: expected finite values"),
        ([[0.5, -0.5]], {}, "weights: expected at least 0 where signed is False, got -0.5"),
        ([[0.5, 0.5]], {"limit": 0.0}, "limit: expected a finite number above 0, got 0"),
    ],
)
def test_picture_refuses(weights: list[list[float]], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_alignment(torch.tensor(weights), ["a", "b"], ["c"], **options)  # type: ignore[arg-type]
