"""What is done to attention weights between their softmax and their product with the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.lrp.models import randomize
from xai_fast import lrp

KEEP = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]).double()

# All keep the weights what they are.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "times one": lambda a: a * 1.0,
    "one times": lambda a: 1.0 * a,
    "over one": lambda a: a / 1.0,
    "plus zero": lambda a: a + 0,
    "mask": lambda a: a * KEEP,
    "mask in place": lambda a: (a + 0).mul_(KEEP),
    "masked_fill": lambda a: a.masked_fill(KEEP == 0, 0.0),
    "masked_fill in place": lambda a: (a + 0).masked_fill_(KEEP == 0, 0.0),
    "where": lambda a: torch.where(KEEP > 0, a, 0.0),
    "normalised": lambda a: a * KEEP / (a * KEEP).sum(-1, keepdim=True),
    "index": lambda a: a[:, :, :],
    "transposed": lambda a: a.mT.mT,
    "chunk and cat": lambda a: torch.cat(a.chunk(2, 1), 1),
    "stack": lambda a: torch.stack(a.unbind(1), 1),
    "assigned": lambda a: a.clone().index_fill_(3, torch.tensor([2]), 0.0),
    "item": lambda a: set_item(a),
    "clamp": lambda a: a.clamp(0.0, 0.9),
    "dropout": lambda a: F.dropout(a, 0.5, False).double(),
    "differential": lambda a: a - 0.5 * a.flip(1),
    "sharpened": lambda a: a**2 / (a**2).sum(-1, keepdim=True),
    "heads averaged": lambda a: a.mean(1, keepdim=True).expand_as(a),
    "heads mixed": lambda a: torch.einsum("bhij,hg->bgij", a, MIXING),
    "heads mixed by a layer": lambda a: F.linear(a.permute(0, 2, 3, 1), MIXING, MIXING[0]).permute(0, 3, 1, 2),
}
MIXING = torch.tensor([[0.7, 0.3], [0.4, 0.8]]).double()


def set_item(a: Tensor) -> Tensor:
    a = a.clone()
    a[..., 2] = 0.0
    return a


class Attending(nn.Module):
    """One layer of attention, with a step between the weights and the product."""

    def __init__(self, step: Callable[[Tensor], Tensor], detached: bool = False, product: str = "matmul") -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
        self.step, self.detached, self.product = step, detached, product
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT).softmax(-1)
        a = self.step(a.detach() if self.detached else a)
        if self.product == "einsum":
            y = torch.einsum("bhij,bhjd,hd->bhid", a, v, torch.ones(2, 4).double())
        elif self.product == "multiplied":
            y = (a.unsqueeze(-1) * v.unsqueeze(2)).sum(3)
        else:
            y = a @ v
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", STEPS)
def test_weights_are_constants_of_cp_lrp(name: str) -> None:
    """As if the model had detached them."""
    model, constant = Attending(STEPS[name]).double(), Attending(STEPS[name], detached=True).double()
    x = torch.randn(2, 5, 8).double()
    wanted = lrp.attribute(constant, x, 1)
    for rule in ("cp-lrp", lrp.Composite("test", attention=lrp.Attention(0.0))):
        assert difference(lrp.attribute(model, x, 1, rule), wanted) < 1e-9
    # The test can tell: with halves the weights have a share.
    assert difference(lrp.attribute(model, x, 1), wanted) > 1e-2


@pytest.mark.parametrize("product", ["einsum", "multiplied"])
def test_other_products_with_the_values(product: str) -> None:
    model, constant = (Attending(STEPS["mask"], detached, product).double() for detached in (False, True))
    x = torch.randn(2, 5, 8).double()
    assert difference(lrp.attribute(model, x, 1, "cp-lrp"), lrp.attribute(constant, x, 1)) < 1e-9


@pytest.mark.parametrize("name", ["mask", "normalised", "chunk and cat", "clamp", "heads mixed"])
def test_one_graph_for_both_keeps_them_too(name: str) -> None:
    model, constant = (Attending(STEPS[name], detached).double() for detached in (False, True))
    x = torch.randn(2, 5, 8).double()
    leaf = x.clone().requires_grad_()
    mode = lrp.RelevanceMode(lrp.COMPOSITES["cp-lrp"], switchable=True)
    with mode:
        score = model(leaf)[:, 1].sum()
    with mode.state.relevance_pass():
        (modified,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(x * modified, lrp.attribute(constant, x, 1))


def test_shares_of_weights_and_values() -> None:
    """lam of the relevance goes to the weights, whatever touched them."""
    q, k, v = (torch.randn(1, 2, 5, 3).double() for _ in range(3))

    class Product(nn.Module):
        def forward(self, a: Tensor, v: Tensor) -> Tensor:
            return (a.softmax(-1) * KEEP) @ v

    composite = lrp.Composite("test", attention=lrp.Attention(0.3))
    _, to_value = lrp.attribute(Product(), (q @ k.mT, v), lambda y: y.flatten(1).sum(1), composite)
    total = ((q @ k.mT).softmax(-1) * KEEP @ v).sum()
    torch.testing.assert_close(to_value.sum(), 0.7 * total)


def test_other_tensors_are_no_attention_weights() -> None:
    """A sum of a softmax and something else, and a gate behind a softmax and a layer: halves."""
    layer = nn.Linear(4, 4).double()

    class Gate(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.layer = kind, layer

        def forward(self, x: Tensor) -> Tensor:
            p = x.softmax(-1)
            gate = p + x if self.kind == "sum" else self.layer(p)
            return gate * x.flip(1)

    for kind in ("sum", "layer"):
        x = torch.randn(3, 4).double()
        wanted = lrp.attribute(Gate(kind), x, 1)
        torch.testing.assert_close(lrp.attribute(Gate(kind), x, 1, "cp-lrp"), wanted)


def test_under_gradient_checkpointing() -> None:
    model, constant = (Attending(STEPS["normalised"], detached).double() for detached in (False, True))
    x = torch.randn(2, 5, 8).double()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    torch.testing.assert_close(lrp.attribute(Checkpointed(), x, 1, "cp-lrp"), lrp.attribute(constant, x, 1))
