"""Run in a process of its own, with timm importable: LRP through a timm ViT, printed as JSON."""

from __future__ import annotations

import json

import torch

from tests.peers.timm_vit import build
from xai_fast import lrp


def main() -> None:
    images = torch.randn(2, 3, 32, 32)
    plain = build(True)(images)
    maps = {fused: lrp.attribute(build(fused), images, 1, details=True) for fused in (True, False)}
    fused, written = maps[True], maps[False]
    report = {
        "identical": torch.equal(fused.output, plain),
        "difference": ((fused.relevance - written.relevance).abs().max() / fused.relevance.abs().max()).item(),
        "heads": {name: list(heads.shape) for name, heads in fused.heads.items()},
        "heads written out": list(written.heads),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
