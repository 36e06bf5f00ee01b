"""The PyPI package fast-vit-rollout, given attentions instead of a hooked model.

It imports OpenCV and torchvision, which `make bench` installs outside site-packages.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from torch import Tensor

PEERS = Path(__file__).resolve().parents[2] / ".venv" / "peers"


@functools.cache
def _rollout_class() -> type:
    from tests.peers import torchvision_shim  # noqa: F401  must come before torchvision

    sys.path.append(str(PEERS))
    try:
        from fast_vit_rollout.vit_rollout import ViTAttentionRollout
    finally:
        sys.path.remove(str(PEERS))
    return ViTAttentionRollout


def fast_vit_rollout(attentions: Tensor) -> Tensor:
    """(B, N, N), mean of heads, nothing discarded, computed by the package's own method."""
    peer = object.__new__(_rollout_class())
    peer.attentions, peer.head_fusion, peer.discard_ratio = list(attentions.unbind(0)), "mean", 0.0
    return peer._compute_rollout()
