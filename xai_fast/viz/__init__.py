"""Heat maps over images, coloured text and self-contained HTML reports (needs the extra ``xai_fast[demo]``)."""

from .heatmap import color_limits, colorize, overlay, patch_grid, plot_heatmaps, to_rgb, upsample
from .report import Report, image_data_uri
from .text import color_legend, colored_text, readable_tokens

__all__ = [
    "Report",
    "color_legend",
    "color_limits",
    "colored_text",
    "colorize",
    "image_data_uri",
    "overlay",
    "patch_grid",
    "plot_heatmaps",
    "readable_tokens",
    "to_rgb",
    "upsample",
]
