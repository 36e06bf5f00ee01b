"""The artifacts demo: high-norm tokens, sinks of attention and registers, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xai_fast._optional import optional_import

from ..datasets import load_fashion_mnist
from ..models.dinov2 import load_dinov2
from ..photos import PHOTOS
from ..rollout.setups import quiet_transformers
from ..wheels import WeightsUnavailable, or_reason
from .figures import save_artifacts_picture
from .page import build_artifacts_page, shown_photos
from .pictures import Pictures, crops_of_photos, objects_on_textures
from .register_training import Trained, compare_registers
from .study import PLAIN, Control, Effort, Real, study_control, study_real

__all__ = ["write_artifacts_page"]

REGISTERS = (0, 4)
# Of `RegisterViT`, and how it is trained.
MODEL = {"patch": 7, "width": 48, "depth": 4}
BATCH, RATE = 32, 4e-3
# Steps of the two studies, each with the loading before it.
REAL_STEPS, CONTROL_STEPS = 8, 5


class _Size:
    """How much is done: all, or as little as shows that it runs."""

    def __init__(self, smallest: bool) -> None:
        if smallest:
            self.effort = Effort(("cat",), probed=8, mapped=2, fitted=16, control=8, folds=2, l2=(0.01,))
            self.seeds, self.trained, self.tested, self.epochs = 1, 320, 200, 1
        else:
            self.effort = Effort(tuple(PHOTOS), probed=145, mapped=16, fitted=32, control=64)
            self.seeds, self.trained, self.tested, self.epochs = 3, 5_000, 2_000, 2

    @property
    def training_steps(self) -> int:
        return self.seeds * len(REGISTERS) * self.epochs * -(-self.trained // BATCH)


def write_artifacts_page(options: argparse.Namespace, device: torch.device, links: Sequence[tuple[str, str]]) -> Path:
    """Measure, write the page beside ``options.out`` as artifacts.html, and return its path.

    Parameters
    ----------
    options : argparse.Namespace
        With ``out``, ``smallest``, ``model`` and ``artifacts_picture``.
    device : torch.device
    links : sequence of (str, str)
        See `xai_fast.viz.Report`.
    """
    size = _Size(options.smallest)
    tqdm = optional_import("tqdm", "demo").tqdm
    total = REAL_STEPS + CONTROL_STEPS + size.training_steps
    with tqdm(total=total, unit="step") as bar, quiet_transformers():
        both = or_reason(lambda: _dinov2(options.model, size, device, bar), "DINOv2")
        trained = or_reason(lambda: _train(size, bar), "small models")
        bar.set_description("done")
    real, control = (both, both) if isinstance(both, str) else both
    page = build_artifacts_page(real, control, trained, links).write(Path(options.out).with_name("artifacts.html"))
    if options.artifacts_picture:
        if isinstance(real, str) or isinstance(control, str):
            raise WeightsUnavailable(f"artifacts picture: left out, {both}")
        save_artifacts_picture(real, control, shown_photos(real), options.artifacts_picture)
    _print_summary(real, control, trained)
    return page


def _dinov2(model_name: str, size: _Size, device: torch.device, bar: Any) -> tuple[Real, Control]:
    if model_name == "digits":
        raise WeightsUnavailable("it needs DINOv2, and --model digits was asked for")
    bar.set_description("loading DINOv2")
    model = load_dinov2("sdpa").to(device)  # type: ignore[arg-type]
    pictures = _pictures()
    bar.update()
    bar.set_description("looking at DINOv2")
    real = study_real(model, pictures, size.effort, device, bar.update)
    bar.set_description("planting high norms")
    return real, study_control(model, pictures, size.effort, device, bar.update)


def _pictures() -> Pictures:
    """The cut-outs, or crops of photos where these cannot be had."""
    found = or_reason(objects_on_textures, "cut-out photos")
    return crops_of_photos() if isinstance(found, str) else found


def _train(size: _Size, bar: Any) -> list[list[Trained]]:
    bar.set_description("loading Fashion-MNIST")
    data = load_fashion_mnist()
    bar.set_description("training small models")
    return [
        compare_registers(
            data, registers=REGISTERS, pictures=size.trained, tested=size.tested, epochs=size.epochs, batch=BATCH, lr=RATE,
            model=MODEL, seed=seed, progress=bar.update,
        )
        for seed in range(size.seeds)
    ]  # fmt: skip


def _print_summary(real: Real | str, control: Control | str, trained: list[list[Trained]] | str) -> None:
    table = optional_import("rich.table", "demo").Table("of", "what", "value")
    if not isinstance(real, str):
        table.add_row("DINOv2", "largest patch norm over median", f"{float(real.looked.largest().max()):.2f}")
        for name in real.photo_maps.maps:
            share = float(real.photo_maps.of(name).largest.mean())
            table.add_row("DINOv2", f"largest share, {name if name == PLAIN else name.lower()}", f"{share:.1%}")
    if not isinstance(control, str):
        table.add_row("control", "planted neurons found", f"{control.recovered} of {len(control.neurons)}")
    if not isinstance(trained, str):
        for place, count in enumerate(REGISTERS):
            mean = sum(pair[place].accuracy for pair in trained) / len(trained)
            table.add_row(f"{count} registers", "accuracy", f"{mean:.3f}")
    if table.row_count:
        optional_import("rich.console", "demo").Console().print(table)
