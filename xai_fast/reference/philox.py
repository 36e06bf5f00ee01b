"""Philox4x32-10, the counter-based random number generator of the kernels, in plain PyTorch.

Salmon, Moraes, Dror & Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", section 3.3. The same seed and counter
give the same bits on every device, in every order and on any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox", "sample_rows", "signs"]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF

# Last word of the counter: keeps the streams of different uses apart (csrc/ihvp.h).
SAMPLE_STREAM = 0x73616D70
PROJECTION_STREAM = 0x70726F6A


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a b, in int64 arithmetic that must not overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, counter: tuple[Tensor | int, Tensor | int, Tensor | int, int], device: torch.device) -> list[Tensor]:
    """Four words of 32 bits (as int64) for every counter; the words of the counter broadcast."""
    words = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter]
    words = list(torch.broadcast_tensors(*words))
    keys = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], words[0])
        high1, low1 = _multiply(MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + step) & LOW for key, step in zip(keys, KEY_STEPS, strict=True)]
    return words


def sample_rows(rows: int, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """``count`` rows of 0 .. rows - 1 with replacement: the batch of that step. ``rows`` is below 2^31."""
    pair = torch.arange((count + 1) // 2, device=device)
    w0, w1, w2, w3 = philox(seed, (pair, step & LOW, 0, SAMPLE_STREAM), device)
    low, high = torch.stack([w0, w2], 1).flatten(), torch.stack([w1, w3], 1).flatten()
    return ((high * rows + (low * rows >> 32)) >> 32)[:count]


def signs(inputs: int, outputs: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """The random matrix r (inputs, outputs) of +1 and -1, as int8."""
    position = torch.arange(offset, offset + inputs, device=device)[:, None]
    group = torch.arange((outputs + 127) // 128, device=device)
    words = philox(seed, (position & LOW, position >> 32, group, PROJECTION_STREAM), device)
    bits = torch.stack(words, -1).unsqueeze(-1) >> torch.arange(32, device=device) & 1  # (inputs, groups, 4, 32)
    return (2 * bits - 1).to(torch.int8).flatten(1)[:, :outputs]
