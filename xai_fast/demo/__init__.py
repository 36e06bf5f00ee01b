"""``python -m xai_fast demo``: attention rollout, targeted relevance and LRP, influence functions, as HTML pages."""

from .command import main

__all__ = ["main"]
