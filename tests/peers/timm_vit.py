"""Run in a process of its own, with timm importable: captures a timm ViT and prints what was found as JSON.

timm's own attention weights, the input of every `attn_drop` with fused attention off, are the expected
values.
"""

from __future__ import annotations

import json

import torch

from tests.peers import torchvision_shim  # noqa: F401  # isort: skip

import timm

import xai_fast as xf


def build(fused: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5
    ).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def expected_attentions(images: torch.Tensor) -> list[torch.Tensor]:
    model, seen = build(fused=False), []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    return seen


@torch.no_grad()
def main() -> None:
    images = torch.randn(2, 3, 32, 32)
    expected = expected_attentions(images)
    report = {}
    for fused in (True, False):
        model = build(fused)
        plain = model(images)
        with xf.capture_attention(model) as record:
            captured = model(images)
        attentions = record.attentions()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage() for layer in record.layers for t in layer.tensors()}
        rollout, chain = record.rollout(), xf.attention_rollout(attentions)
        report["fused" if fused else "written out"] = {
            "identical": torch.equal(plain, captured),
            "layers": len(attentions),
            "names": [layer.name for layer in record.layers],
            "kinds": sorted({layer.kind for layer in record.layers}),
            "difference": max((a - e).abs().max().item() for a, e in zip(attentions, expected, strict=True)),
            "rollout": ((rollout - chain).abs() / chain).max().item(),
            "bytes": sum(storage.nbytes() for storage in held.values()),
            "query and key bytes": 3 * 2 * expected[0].shape[0] * 17 * 48 * 4,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
