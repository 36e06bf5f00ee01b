"""The operations in plain PyTorch: their definition, the fallback without the compiled module, the tests' oracle."""

from . import rollout

__all__ = ["rollout"]
