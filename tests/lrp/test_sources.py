"""Where relevance ends: at the inputs that are attributed, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.lrp.models import bert
from xai_fast import lrp


class Gated(nn.Module):
    """A product of x with something else."""

    def __init__(self, gate: Callable[[nn.Module, Any], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(4, 3).double(), gate
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, c: Any = None) -> Tensor:
        return self.linear(x * self.gate(self, c))


C = torch.randn(2, 4).double()


def grad(x: Tensor = C) -> Tensor:
    return x.clone().requires_grad_()


GIVEN: dict[str, Callable[[], Any]] = {
    "tensor": grad,
    "computed": lambda: grad() * 1.0,
    "tuple": lambda: ([grad()],),
    "mapping": lambda: {"c": {"of": [grad()]}},
}


def first(c: Any) -> Tensor:
    while not isinstance(c, Tensor):
        c = c[0] if isinstance(c, (tuple, list)) else c["of"]
    return c


@pytest.mark.parametrize("name", GIVEN)
def test_further_arguments_are_constants(name: str) -> None:
    model, x = Gated(lambda _, c: first(c)), torch.randn(2, 4).double()
    wanted = lrp.attribute(model, x, 1, additional_forward_args=C)
    assert wanted.any()
    given = GIVEN[name]()
    torch.testing.assert_close(lrp.attribute(model, x, 1, additional_forward_args=given), wanted)
    named = {"x": x, "c": [grad()]}
    torch.testing.assert_close(lrp.attribute(model, named, 1)["x"], wanted)
    masked = Masked()
    masked.load_state_dict(model.state_dict())
    torch.testing.assert_close(lrp.attribute(masked, {"x": x, "mask": grad()}, 1)["x"], wanted)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x * mask)


OWNED: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[], Any]]] = {
    "attribute": (lambda m, _: m.own, grad),
    "computed from it": (lambda m, _: (m.own * 2.0 / 2.0).view(2, 4), grad),
    "in a list": (lambda m, _: m.own[0], lambda: [grad()]),
    "in a dict": (lambda m, _: m.own["c"], lambda: {"c": grad()}),
    "parameter in a list": (lambda m, _: m.own[0], lambda: [nn.Parameter(C.clone())]),
    "parameter": (lambda m, _: m.own, lambda: nn.Parameter(C.clone())),
}


@pytest.mark.parametrize("name", OWNED)
def test_tensors_of_the_model_are_constants(name: str) -> None:
    gate, build = OWNED[name]
    x, plain = torch.randn(2, 4).double(), Gated(lambda _, c: c)
    model = Gated(gate, own=build())
    model.load_state_dict(plain.state_dict(), strict=False)
    wanted = lrp.attribute(plain, x, 1, additional_forward_args=C)
    for rule in ("attnlrp", "zplus"):
        wanted = lrp.attribute(plain, x, 1, rule, additional_forward_args=C)
        torch.testing.assert_close(lrp.attribute(model, x, 1, rule), wanted)
    own = first(list(model.own.values()) if isinstance(model.own, dict) else model.own)
    assert own.requires_grad
    assert own.grad is None


def test_buffers_that_require_grad_are_constants() -> None:
    x, plain, model = torch.randn(2, 4).double(), Gated(lambda _, c: c), Gated(lambda m, _: m.own)
    model.register_buffer("own", grad())
    model.linear = plain.linear
    wanted = lrp.attribute(plain, x, 1, additional_forward_args=C)
    torch.testing.assert_close(lrp.attribute(model, x, 1), wanted)
    assert model.own.requires_grad


def test_other_tensors_that_require_grad_are_named() -> None:
    x, outside, weight = torch.randn(2, 4).double(), grad(), nn.Parameter(C.clone())
    for model, what in (
        (Gated(lambda *_: outside), r"a tensor of shape \(2, 4\)"),
        (Gated(lambda m, _: m.own, own=outside * 2.0), r"a tensor of shape \(2, 4\)"),
        (Gated(lambda m, _: m.own, weight=weight, own=weight * 2.0), "parameter 'weight'"),
    ):
        for fallback in (None, "gradient"):
            with pytest.raises(
                ValueError, match=rf"^model: .* got a score with a graph to {what} as well; detach"
            ) as caught:
                lrp.attribute(model, x, 1, fallback=fallback)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^model: .* detach"):
        lrp.attribute(Gated(lambda *_: C), x, lambda y: (y * outside[:, :3]).sum(1))


# Token ids


class Words(nn.Module):
    """Words and types, each from its own table, and the words once more from a third."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types, self.gates = (nn.Embedding(20, 6) for _ in range(3))
        self.linear = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        h = self.words(input_ids)
        if token_type_ids is not None:
            h = h + self.types(token_type_ids)
        return self.linear(h.mean(1))


BATCHES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "stacked": lambda ids, types: torch.stack([ids, types]).unbind(0),
    "stacked behind": lambda ids, types: torch.stack([ids, types], -1).unbind(-1),
    "chunks": lambda ids, types: torch.cat([ids, types], 1).chunk(2, 1),
    # The same memory read in another order.
    "transposed": lambda ids, types: (ids, ids.view(5, 2).T),
    "as 32 bits": lambda ids, types: (ids, ids.view(torch.int32)[:, ::2]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_ids_that_share_memory_are_told_apart(name: str) -> None:
    model = Words()
    ids, types = BATCHES[name](torch.randint(0, 20, (2, 5)), torch.randint(0, 2, (2, 5)))
    wanted = lrp.attribute(model, {"input_ids": ids.clone(), "token_type_ids": types.clone()}, 1)
    found = lrp.attribute(model, {"input_ids": ids, "token_type_ids": types}, 1)
    torch.testing.assert_close(found["input_ids"], wanted["input_ids"])


def test_bert_on_a_stacked_batch() -> None:
    model, inputs = bert()
    batch = torch.stack([inputs["input_ids"], (inputs["input_ids"] % 2)])
    mask = {"attention_mask": inputs["attention_mask"]}
    wanted = lrp.attribute(model, {"input_ids": batch[0].clone(), "token_type_ids": batch[1].clone(), **mask}, 1)
    found = lrp.attribute(model, {"input_ids": batch[0], "token_type_ids": batch[1], **mask}, 1)
    torch.testing.assert_close(found["input_ids"], wanted["input_ids"])


class Looking(nn.Module):
    def __init__(self, look: Callable[[nn.Embedding, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.linear, self.look = nn.Embedding(20, 6), nn.Linear(6, 3), look

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.look(self.words, input_ids).mean(1))


@pytest.mark.parametrize("first", [False, True])
def test_ids_that_the_model_rearranges(first: bool) -> None:
    """Relevance is shaped like the ids that were given, (B,N,D)."""
    looks: list[Callable[[nn.Embedding, Tensor], Tensor]] = [
        lambda table, ids: table(ids),
        lambda table, ids: table(ids.view(-1)).view(*ids.shape, -1),
        lambda table, ids: table(ids.T).transpose(0, 1),
        lambda table, ids: table(ids.unsqueeze(1)).squeeze(1),
        lambda table, ids: table(ids[:, :]),
    ]
    for ids in (torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 8))[:, 1:6], torch.randint(0, 20, (1, 5))):
        for look in looks if ids.is_contiguous() else looks[2:]:
            plain, model = Looking(looks[0]), Looking(look)
            model.load_state_dict(plain.state_dict())
            rule = lrp.Composite("test", first=lrp.WSquare()) if first else "attnlrp"
            wanted = lrp.attribute(plain, ids, 1, rule)
            assert wanted.shape == (*ids.shape, 6)
            torch.testing.assert_close(lrp.attribute(model, ids, 1, rule), wanted)


class Tables(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.words, self.gates, self.linear = nn.Embedding(20, 6), nn.Embedding(20, 6), nn.Linear(6, 3)
        self.checkpointed = checkpointed

    def body(self, ids: Tensor) -> Tensor:
        return self.words(ids) * torch.sigmoid(self.gates(ids)) * self.gates(ids.flip(1).flip(1))

    def forward(self, ids: Tensor) -> Tensor:
        h = checkpoint(self.body, ids, use_reentrant=False) if self.checkpointed else self.body(ids)
        return self.linear(h.sum(1))


@pytest.mark.parametrize("rule", ["attnlrp", "cp-lrp", "zplus"])
def test_two_look_ups_under_gradient_checkpointing(rule: str) -> None:
    plain, model = Tables(False).double(), Tables(True).double()
    model.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 20, (2, 5))
    for details in (False, True):
        wanted, found = (lrp.attribute(m, ids, 1, rule, details=details) for m in (plain, model))
        torch.testing.assert_close(*(r.relevance if details else r for r in (found, wanted)))
