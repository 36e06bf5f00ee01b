"""``python -m xai_fast demo``: explanations of real models, and what judges them, as HTML pages."""

from .command import main

__all__ = ["main"]
