"""Models and pools that write to what they get, and pools that return one buffer at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xai_fast.concepts import activations, tcav


def cnn() -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 9, 4)).eval()


def test_a_model_may_write_to_what_it_gets() -> None:
    net = cnn()
    model = nn.Sequential(nn.ReLU(inplace=True), net).eval()
    inputs, concepts, random = (
        torch.randn(5, 3, 8, 8),
        {"a": torch.randn(8, 3, 8, 8)},
        [torch.randn(8, 3, 8, 8) for _ in range(3)],
    )
    given = (inputs, concepts["a"], *random)
    copies = [x.clone() for x in given]
    found = tcav(model, "1.2", inputs, 0, concepts, random)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    clean = tcav(nn.Sequential(nn.ReLU(), net).eval(), "1.2", inputs, 0, concepts, random)
    assert torch.equal(found.scores, clean.scores)


def test_a_pool_may_write_to_what_it_gets() -> None:
    """And return one buffer again and again; the layers that follow see none of it."""
    model, x, buffer = cnn(), torch.randn(5, 3, 8, 8), torch.empty(64, 6)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda _module, given, _output: seen.append(given[0].clone()))

    def pool(output: Tensor) -> Tensor:
        return buffer[: len(output)].copy_(output.mul_(2).mean((2, 3)))

    wanted = 2 * activations(model, "0", x)
    for size in (None, 3):
        assert torch.equal(activations(model, "0", x, pool=pool, batch_size=size), wanted)
    torch.testing.assert_close(torch.cat(seen[1:]), seen[0].repeat(2, 1, 1, 1))


def test_what_goes_with_the_inputs_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return self.net(x * scale.mul_(2)[:, None, None, None] + shift.add_(1))

    scale, shift = torch.ones(5), torch.ones(1)
    options = {"additional_forward_args": (scale, shift), "batch_size": 2}
    tcav(
        Scaled(),
        "net.1",
        torch.randn(5, 3, 8, 8),
        0,
        {"a": torch.randn(8, 3, 8, 8)},
        torch.randn(24, 3, 8, 8).split(8),
        **options,
    )
    assert scale.unique().tolist() == shift.tolist() == [1]
