"""Heat maps over images, coloured text, pictures of measures and HTML reports (needs the extra ``xai_fast[demo]``)."""

from .alignment import plot_alignment
from .concepts import concept_grid, plot_tcav
from .gam import plot_term, plot_terms
from .heatmap import color_limits, colorize, overlay, patch_grid, plot_heatmaps, to_rgb, upsample
from .measures import plot_bars, plot_by_sparsity, plot_fidelity, plot_radar
from .report import Report, image_data_uri
from .text import color_legend, colored_text, readable_tokens

__all__ = [
    "Report",
    "color_legend",
    "color_limits",
    "colored_text",
    "colorize",
    "concept_grid",
    "image_data_uri",
    "overlay",
    "patch_grid",
    "plot_alignment",
    "plot_bars",
    "plot_by_sparsity",
    "plot_fidelity",
    "plot_heatmaps",
    "plot_radar",
    "plot_tcav",
    "plot_term",
    "plot_terms",
    "readable_tokens",
    "to_rgb",
    "upsample",
]
