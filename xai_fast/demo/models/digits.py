"""A small vision transformer trained on scikit-learn's handwritten digits: a subject without any download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xai_fast._optional import optional_import

from ..repeatable import repeatable

__all__ = ["DigitsData", "DigitsViT", "ViTOutput", "accuracy", "load_digits", "train_digits_vit"]


@dataclass(frozen=True)
class DigitsData:
    """Grey digits: pixels (n, 1, 8, 8) from 0 to 1, labels (n,); a stratified quarter is kept for testing."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class ViTOutput:
    """What a forward pass gives: logits (B, 10), and the rest on request."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()  # (B, 65, width) before each block, and after the last
    attentions: tuple[Tensor, ...] = ()  # (B, H, 65, 65) per block


class DigitsViT(nn.Module):
    """A plain pre-norm vision transformer: CLS and one token per pixel, 65 tokens.

    Each pixel is embedded with its eight neighbours (a 3 x 3 convolution): one grey value says little.

    Parameters
    ----------
    width, depth, heads : int
        Size of the model.

    Examples
    --------
    >>> DigitsViT()(torch.rand(2, 1, 8, 8)).logits.shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, kernel_size=3, padding=1)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> ViTOutput:
        """Classify images (B, 1, 8, 8). Attentions, on request, take the plain way, not the fused one."""
        patches = self.embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(patches), -1, -1), patches], dim=1) + self.position
        states, attentions = [x], []
        for block in self.blocks:
            x, attention = block(x, output_attentions)
            states.append(x)
            attentions.append(attention)
        return ViTOutput(
            logits=self.head(self.norm(x[:, 0])),
            hidden_states=tuple(states) if output_hidden_states else (),
            attentions=tuple(attentions) if output_attentions else (),
        )


class _Block(nn.Module):
    """Attention and a two-layer network, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = None
        if output_attentions:
            attention = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
            mixed = attention @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x)), attention


def load_digits() -> DigitsData:
    """The 1797 digits that come with scikit-learn, split 75 : 25.

    Examples
    --------
    >>> load_digits().test_pixels.shape
    torch.Size([450, 1, 8, 8])
    """
    datasets = optional_import("sklearn.datasets", "demo")
    selection = optional_import("sklearn.model_selection", "demo")
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = selection.train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return DigitsData(pixels[train], labels[train], pixels[test], labels[test])


def train_digits_vit(
    data: DigitsData,
    *,
    epochs: int = 12,
    seed: int = 0,
    progress: Callable[[int], object] = lambda epoch: None,
) -> DigitsViT:
    """Train a `DigitsViT`; the default reaches about 97 % test accuracy.

    Parameters
    ----------
    data : DigitsData
    epochs : int
        Passes over the training digits.
    seed : int
        Fixes initial weights and order; the global random state is left as it was.
    progress : callable
        Called with the epoch's number after each.

    Returns
    -------
    DigitsViT
        In evaluation mode.

    Examples
    --------
    >>> model = train_digits_vit(load_digits(), epochs=1)
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    with repeatable(seed):
        model = DigitsViT()
        _fit(model, data, epochs, progress)
    return model.eval()


def _fit(model: DigitsViT, data: DigitsData, epochs: int, progress: Callable[[int], object]) -> None:
    batch = 32
    steps = epochs * -(-len(data.train_labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        for index in torch.randperm(len(data.train_labels)).split(batch):
            logits = model(data.train_pixels[index]).logits
            optimizer.zero_grad()
            F.cross_entropy(logits, data.train_labels[index]).backward()
            optimizer.step()
            schedule.step()
        progress(epoch)


@torch.no_grad()
def accuracy(model: DigitsViT, pixels: Tensor, labels: Tensor) -> float:
    """Share of images (n, 1, 8, 8) whose most likely class is the label.

    Examples
    --------
    >>> 0 <= accuracy(DigitsViT(), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])) <= 1
    True
    """
    return float((model(pixels).logits.argmax(-1) == labels).double().mean())
