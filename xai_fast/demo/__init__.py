"""``python -m xai_fast demo``: attention rollout of real photos by a real model, as one HTML page."""

from .rollout_demo import main

__all__ = ["main"]
