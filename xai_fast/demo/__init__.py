"""``python -m xai_fast demo``: attention rollout, targeted relevance and LRP of real models, as two HTML pages."""

from .command import main

__all__ = ["main"]
