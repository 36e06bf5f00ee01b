"""Captum's TCAV and ours with the same vectors: prints the largest difference of each case as JSON."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.peers import torchvision_shim  # noqa: F401  must come before torchvision

warnings.simplefilter("ignore")

from captum.concept import TCAV, Classifier, Concept  # noqa: E402

from xai_fast.concepts import fit_cav, tcav  # noqa: E402

LAYERS = ["0", "2", "4"]
RANDOM, TARGET = 3, 2


class OurVectors(Classifier):
    """Gives Captum our vectors, times a length of its own."""

    def __init__(self, length: float) -> None:
        self.length = length

    def train_and_eval(self, dataloader: DataLoader, **_: Any) -> dict[str, Tensor]:
        batches = list(dataloader)
        x, labels = torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])
        self.found = sorted(set(labels.tolist()))
        sides = [x[labels == label] for label in self.found]
        cav = fit_cav(*sides)
        self.vector = self.length * cav.vector
        return {"accs": torch.tensor(cav.accuracy)}

    def weights(self) -> Tensor:
        return torch.stack([self.vector, -self.vector])

    def classes(self) -> list[int]:
        return self.found


def captum_scores(model: nn.Module, inputs: Tensor, sets: list[list[tuple[int, Tensor]]], length: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/default_model_id", exist_ok=True)
        peer = TCAV(model, LAYERS, classifier=OurVectors(length), save_path=folder)
        images = {number: x for one in sets for number, x in one}
        concepts = {number: Concept(number, f"set{number}", DataLoader(x, batch_size=4)) for number, x in images.items()}
        return peer.interpret(inputs, [[concepts[number] for number, _ in one] for one in sets], target=TARGET)


def difference(ours: dict[str, Any], theirs: dict[str, Any], kind: str, factor: float = 1.0) -> float:
    assert ours.keys() == theirs.keys()
    pairs = [(ours[key][layer][kind], theirs[key][layer][kind] / factor) for key in ours for layer in LAYERS]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def main() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(72, 20), nn.Tanh(), nn.Linear(20, 4)).eval()
    inputs = torch.randn(13, 3, 8, 8)
    images = [torch.randn(10, 3, 8, 8) for _ in range(2 + RANDOM)]
    images[0] += 0.3
    numbered = list(enumerate(images))
    results = {}
    concepts, random = {"a": images[0], "b": images[1]}, images[2:]
    ours = tcav(model, LAYERS, inputs, TARGET, concepts, random, pool="flatten").to_captum()
    pairs = [[numbered[c], numbered[2 + r]] for c in range(2) for r in range(RANDOM)]
    for length in (1.0, 6.0):
        theirs = captum_scores(model, inputs, pairs, length)
        results[f"sign_count, length {length}"] = difference(ours, theirs, "sign_count")
        results[f"magnitude, length {length}"] = difference(ours, theirs, "magnitude", length)

    # The other order of the sets, and other ids: the entries follow.
    theirs = captum_scores(model, inputs, [pair[::-1] for pair in pairs], 1.0)
    turned = {"-".join(key.split("-")[::-1]): value for key, value in theirs.items()}
    turned = {k: {layer: {n: t.flip(0) for n, t in kinds.items()} for layer, kinds in v.items()} for k, v in turned.items()}
    results["sign_count, sets swapped"] = difference(ours, turned, "sign_count")
    flipped = captum_scores(model, inputs, [[(9 - number, x) for number, x in pair] for pair in pairs], 1.0)
    renamed = {"-".join(str(9 - int(n)) for n in key.split("-")): value for key, value in flipped.items()}
    results["sign_count, ids flipped"] = difference(ours, renamed, "sign_count")
    results["magnitude, ids flipped"] = difference(ours, renamed, "magnitude")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
