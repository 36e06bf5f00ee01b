"""Run in a process of its own, with timm importable: norms and registers of a timm ViT, printed as JSON."""

from __future__ import annotations

import json

import torch

from tests.peers import torchvision_shim  # noqa: F401  # isort: skip

import timm

from xai_fast.attention import artifacts


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=4,
        num_classes=5,
        global_pool="avg",
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    found = artifacts.token_norms(model, images)
    _, states = model.forward_intermediates(images, norm=False, return_prefix_tokens=True, output_fmt="NLC")
    wanted = torch.stack([torch.cat([prefix, patches], 1).norm(dim=-1) for patches, prefix in states])
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[:, 5] = True
    neurons = artifacts.find_register_neurons(model, images, mask, top=4)
    plain = model(images)
    with artifacts.test_time_registers(model, neurons=neurons, n_registers=3):
        moved = model(images)
        tokens = model.forward_features(images).shape[1]
    report = {
        "layers": found.layers,
        "difference": float((found.norms - wanted).abs().max() / wanted.max()),
        "neurons": len(neurons),
        "shape": tuple(moved.shape),
        "tokens": tokens,
        "changed": not torch.equal(moved, plain),
        "restored": torch.equal(model(images), plain),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
