"""Maps over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xai_fast.viz import color_limits, colorize, overlay, patch_grid, plot_heatmaps, to_rgb, upsample

pytest.importorskip("matplotlib")


def test_patch_grid_is_row_by_row() -> None:
    relevance = torch.arange(14.0).view(2, 7)
    assert patch_grid(relevance, grid=(2, 3)).tolist() == [[[1, 2, 3], [4, 5, 6]], [[8, 9, 10], [11, 12, 13]]]
    assert patch_grid(relevance, num_prefix_tokens=3).tolist() == [[[3, 4], [5, 6]], [[10, 11], [12, 13]]]
    assert patch_grid(torch.arange(4.0), num_prefix_tokens=0).shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 1, 5), {}, r"relevance: expected \(B, N\) or \(N,\), got shape \(1, 1, 5\)"),
        ((1, 7), {}, "relevance: expected a square number of patches, got 6 tokens after 1 prefix tokens"),
        ((1, 7), {"grid": (2, 2)}, "relevance: expected 2 x 2 = 4 patches, got 6 tokens"),
        ((1, 7), {"num_prefix_tokens": 8}, "num_prefix_tokens: expected 0 to 7, got 8"),
    ],
)
def test_patch_grid_refuses(shape: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_grid(torch.zeros(shape), **options)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
def test_upsample_stays_in_range(mode: str) -> None:
    heat = torch.zeros(2, 5, 5)
    heat[0, 2, 2] = 1
    large = upsample(heat, (50, 40), mode=mode)
    assert large.shape == (2, 50, 40)
    assert large.min() == 0
    assert large.max() <= 1
    assert large[0, 25, 20] > 0.5
    assert not large[1].any()


def test_colorize_ends_of_the_scale() -> None:
    colors = colorize(np.array([[-1.0, 0.0, 1.0, 7.0]]), cmap="gray", limits=(0.0, 1.0))
    assert colors.tolist() == [[[0, 0, 0], [0, 0, 0], [255, 255, 255], [255, 255, 255]]]
    assert not colorize(torch.full((2, 2), 3.0), cmap="gray").any()  # a constant map is dark, not NaN


def test_color_limits() -> None:
    heat = torch.arange(101.0).view(1, 101)
    assert color_limits(heat, percentile=(10, 90)) == (10, 90)
    assert color_limits(heat, ignore=heat > 50) == (0, 50)
    assert color_limits(heat, ignore=heat >= 0) == (0, 100)  # nothing left: the whole map
    with pytest.raises(ValueError, match="percentile: expected 0 <= low < high <= 100"):
        color_limits(heat, percentile=(90, 10))
    with pytest.raises(ValueError, match="heat: expected finite values"):
        color_limits(torch.tensor([[torch.nan]]))


def test_overlay_mixes_grey_image_and_color() -> None:
    image = torch.zeros(3, 4, 4)
    image[0] = 1.0  # red: grey value 0.299 * 255 = 76
    heat = torch.tensor([[0.0, 1.0]])
    plain = overlay(image, heat, alpha=0, mode="nearest")
    assert np.unique(plain).tolist() == [76]
    full = overlay(image, heat, cmap="gray", alpha=1, mode="nearest")
    assert full[:, :2].max() == 0
    assert full[:, 2:].min() == 255
    half = overlay(image, heat, cmap="gray", alpha=0.5, mode="nearest")
    assert half[0, 0, 0] == 38
    assert half[0, 3, 0] == 166


def test_overlay_clips_a_huge_patch_before_smoothing() -> None:
    heat = torch.rand(8, 8)
    heat[3, 3] = 1000.0
    spotted = overlay(np.zeros((64, 64, 3), np.uint8), heat, cmap="gray", alpha=1, percentile=(0, 95))
    assert spotted[:8, :8].max() > 0


def test_inputs_are_not_changed() -> None:
    image, heat = torch.rand(3, 8, 8), torch.rand(2, 2)
    copies = image.clone(), heat.clone()
    overlay(image, heat)
    plot_heatmaps([image], {"map": heat.unsqueeze(0)})
    assert torch.equal(image, copies[0])
    assert torch.equal(heat, copies[1])


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4), (1, 4, 5), (3, 4, 5)])
def test_to_rgb_takes_usual_images(shape: tuple[int, ...]) -> None:
    assert to_rgb(np.ones(shape)).tolist() == np.full((4, 5, 3), 255).tolist()
    assert to_rgb(np.full(shape, 7, np.uint8)).tolist() == np.full((4, 5, 3), 7).tolist()


def test_to_rgb_refuses() -> None:
    with pytest.raises(ValueError, match="image: expected 0 to 1, got float64 values from -1 to 2"):
        to_rgb(np.array([[-1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"image: expected .*, got shape \(2, 4, 5\)"):
        to_rgb(np.ones((2, 4, 5)))


def test_plot_heatmaps() -> None:
    images = [torch.rand(3, 28, 28), np.zeros((14, 14), np.uint8)]
    figure = plot_heatmaps(images, {"a": torch.rand(2, 2, 2), "b": torch.rand(2, 4, 4)}, titles=["x", "y"])
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "a", "b"]
    assert figure.axes[3].get_ylabel() == "y"
    with pytest.raises(ValueError, match="maps: expected 2, one per image, got 1 maps for 'a'"):
        plot_heatmaps(images, {"a": torch.rand(1, 2, 2)})
