"""A small vision transformer trained on Fashion-MNIST with and without registers, and what differs.

Darcet et al. (2024) see high-norm tokens in large models after long training. A model of this size need not have any: the
comparison says what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xai_fast.attention.artifacts import OutlierLayers, find_outliers, outlier_layers, token_norms
from xai_fast.attention.capture import capture_attention

from ..datasets import FashionMNIST, load_fashion_mnist
from ..repeatable import repeatable

__all__ = ["RegisterViT", "Trained", "compare_registers", "evaluate", "fashion_tensors", "train"]

# Mean and standard deviation of the training pixels.
MEAN, STD = 0.286, 0.353


@dataclass(frozen=True)
class Trained:
    """A trained model and what was measured on test pictures.

    Attributes
    ----------
    registers : int
    model : RegisterViT
    accuracy : float
    norms : Tensor, shape (L, n, T)
        After each block; tokens are [CLS], registers, patches.
    outliers : OutlierLayers
        Among the patches, by :func:`find_outliers` with its defaults.
    largest_ratio : Tensor, shape (L,)
        The largest norm of a patch over the median of its picture, averaged over pictures.
    register_ratio : Tensor, shape (L,)
        The mean norm of the registers over that of the patches; NaN without registers.
    concentration : float
        The largest share of a patch in the rollout of [CLS] over patches, in multiples of the uniform share; the mean over
        pictures.
    """

    registers: int
    model: RegisterViT
    accuracy: float
    norms: Tensor
    outliers: OutlierLayers
    largest_ratio: Tensor
    register_ratio: Tensor
    concentration: float


class RegisterViT(nn.Module):
    """A pre-norm vision transformer for pictures (B, 1, 28, 28); tokens are [CLS], registers, patches.

    Parameters
    ----------
    registers : int
        Learned tokens that take part in attention and are not used by the head.
    patch, width, depth, heads : int
        The patch divides 28.

    Examples
    --------
    >>> RegisterViT(registers=2, depth=1)(torch.rand(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    """

    def __init__(self, registers: int = 0, *, patch: int = 4, width: int = 64, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        if registers < 0:
            raise ValueError(f"registers: expected at least 0, got {registers}")
        if patch < 1 or 28 % patch:
            raise ValueError(f"patch: expected a divisor of 28, got {patch}")
        self.registers = registers
        self.grid = (28 // patch, 28 // patch)
        self.embed = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.register = nn.Parameter(0.02 * torch.randn(1, registers, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 10)."""
        patches = self.embed(pixels).flatten(2).transpose(1, 2) + self.position
        first = torch.cat([self.cls, self.register], dim=1).expand(len(patches), -1, -1)
        x = torch.cat([first, patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """Attention and a two-layer network, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


def fashion_tensors(images: Tensor) -> Tensor:
    """Pictures (n, 28, 28) as bytes, normalised, (n, 1, 28, 28).

    Examples
    --------
    >>> fashion_tensors(torch.zeros(2, 28, 28, dtype=torch.uint8)).shape
    torch.Size([2, 1, 28, 28])
    """
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def train(
    model: RegisterViT,
    pixels: Tensor,
    labels: Tensor,
    *,
    epochs: int = 2,
    batch: int = 32,
    lr: float = 2e-3,
    progress: Callable[[], object] = lambda: None,
) -> RegisterViT:
    """Train a model in place, in the order that torch's random state gives.

    Parameters
    ----------
    model : RegisterViT
    pixels, labels : Tensor, shapes (n, 1, 28, 28) and (n,)
    epochs, batch : int
    lr : float
        The highest of a one-cycle schedule, for AdamW.
    progress : callable
        Called after each step.

    Returns
    -------
    RegisterViT
        The same, in evaluation mode.

    Examples
    --------
    >>> model = train(RegisterViT(depth=1), torch.rand(8, 1, 28, 28), torch.arange(8), epochs=1)
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    steps = epochs * -(-len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(batch):
            loss = F.cross_entropy(model(pixels[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress()
    return model.eval()


@torch.no_grad()
def evaluate(model: RegisterViT, pixels: Tensor, labels: Tensor, *, looked_at: int = 256) -> Trained:
    """Accuracy on all pictures; norms, outliers and rollout on the first `looked_at`.

    Examples
    --------
    >>> found = evaluate(RegisterViT(2, depth=2).eval(), torch.rand(6, 1, 28, 28), torch.arange(6))
    >>> found.norms.shape
    torch.Size([2, 6, 52])
    """
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(pixels.split(500), labels.split(500), strict=True))
    some = pixels[:looked_at]
    norms = token_norms(model, some).norms
    first = 1 + model.registers
    patches = norms[..., first:]
    with capture_attention(model) as record:
        model(some)
    rollout = record.rollout()[:, first:]
    return Trained(
        registers=model.registers,
        model=model,
        accuracy=right / len(labels),
        norms=norms,
        outliers=outlier_layers(find_outliers(patches).mask),
        largest_ratio=(patches.amax(2) / patches.median(2).values).mean(1),
        register_ratio=norms[..., 1:first].mean((1, 2)) / patches.mean((1, 2)),
        concentration=float((rollout.amax(1) / rollout.mean(1)).mean()),
    )


def compare_registers(
    data: FashionMNIST | None = None,
    *,
    registers: Sequence[int] = (0, 4),
    pictures: int = 6_000,
    tested: int = 2_000,
    epochs: int = 2,
    batch: int = 32,
    lr: float = 2e-3,
    model: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> list[Trained]:
    """Train one model for each number of registers, on the same pictures in the same order, and measure them.

    Parameters
    ----------
    data : FashionMNIST, optional
        Fetched by default.
    registers : sequence of int
    pictures, tested : int
        How many are used to train and to test, the first ones.
    epochs, batch, lr
        See `train`.
    model : mapping, optional
        Options of `RegisterViT`.
    seed : int
        Of weights and order; the global random state is left as it was.
    progress : callable
        Called after each step of training.

    Returns
    -------
    list of Trained

    Raises
    ------
    DataUnavailable
        If Fashion-MNIST cannot be had.

    Examples
    --------
    >>> plain, four = compare_registers()  # doctest: +SKIP
    >>> four.norms.shape  # doctest: +SKIP
    torch.Size([6, 256, 54])
    """
    data = load_fashion_mnist() if data is None else data
    pixels, labels = fashion_tensors(data.train_images[:pictures]), data.train_labels[:pictures].long()
    test_pixels, test_labels = fashion_tensors(data.test_images[:tested]), data.test_labels[:tested].long()
    found = []
    for count in registers:
        with repeatable(seed):
            vit = RegisterViT(count, **(model or {}))
            # The number of registers changes how many random numbers the weights take.
            torch.manual_seed(seed + 1)
            train(vit, pixels, labels, epochs=epochs, batch=batch, lr=lr, progress=progress)
        found.append(evaluate(vit, test_pixels, test_labels))
    return found
