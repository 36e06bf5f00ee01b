"""Captum's measures and ours on the same perturbations: prints the largest relative difference of each as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from captum.attr import IntegratedGradients, Saliency
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max as captum_sensitivity_max
from torch import Tensor, nn

from xai_fast.metrics import infidelity, sensitivity_max


def repeated(rows: Tensor, batch: int, order: str) -> Callable[[int], Tensor]:
    """The noise of (sample, draw) for the next examples: Captum asks sample by sample, we draw by draw."""
    state = {"at": 0}

    def take(count: int) -> Tensor:
        start, state["at"] = state["at"], state["at"] + count
        example = torch.arange(start, start + count)
        draws = rows.shape[1]
        if order == "sample":
            return rows[example // draws, example % draws]
        return rows[example % batch, example // batch]

    return take


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def main() -> None:
    torch.manual_seed(0)
    batch, draws = 6, 12
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    x, target = torch.randn(batch, 3, 12, 12), torch.tensor([0, 1, 2, 3, 4, 0])
    noise = torch.randn(batch, draws, 3, 12, 12) * 0.05
    results = {}
    for name, method in (("saliency", Saliency(model)), ("integrated gradients", IntegratedGradients(model))):
        for norm in ("fro", 1, float("inf")):
            pair = []
            for measure, order in ((captum_sensitivity_max, "sample"), (sensitivity_max, "draw")):
                take = repeated(noise, batch, order)
                pair.append(
                    measure(
                        method.attribute,
                        x,
                        lambda z, r, take=take: z + take(len(z)),
                        n_perturb_samples=draws,
                        norm_ord=norm,
                        target=target,
                    )
                )
            results[f"sensitivity_max, {name}, {norm}"] = difference(pair[1], pair[0])
        maps = method.attribute(x, target=target)
        for normalize in (False, True):
            pair = []
            for measure in (captum_infidelity, infidelity):
                take = repeated(noise, batch, "sample")

                def shift(z: Tensor, take: Callable[[int], Tensor] = take) -> tuple[Tensor, Tensor]:
                    change = take(len(z))
                    return change, z - change

                pair.append(measure(model, shift, x, maps, target=target, n_perturb_samples=draws, normalize=normalize))
            results[f"infidelity, {name}, normalize={normalize}"] = difference(pair[1], pair[0])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
