"""Heat maps over images and self-contained HTML reports (needs the extra ``xai_fast[demo]``)."""

from .heatmap import color_limits, colorize, overlay, patch_grid, plot_heatmaps, to_rgb, upsample
from .report import Report, image_data_uri

__all__ = [
    "Report",
    "color_limits",
    "colorize",
    "image_data_uri",
    "overlay",
    "patch_grid",
    "plot_heatmaps",
    "to_rgb",
    "upsample",
]
