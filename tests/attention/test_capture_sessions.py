"""capture_attention several times at once: threads, exits out of order, copies of the model, torch.func."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import xai_fast as xf
from tests.attention.capture_checks import Subclass, build_encoder, fingerprint, leaves_nothing
from tests.attention.models import Written


def build(kind: str) -> nn.Module:
    """Models whose modules are patched in every way."""
    parts: dict[str, Callable[[], nn.Module]] = {
        "encoder": build_encoder,
        "subclass": lambda: nn.TransformerEncoder(Subclass(16, 2, 32, batch_first=True, dropout=0.0), 2).eval(),
        "spliced": lambda: Subclass(16, 2, 32, batch_first=True, dropout=0.0).eval(),
        "plain": lambda: nn.Sequential(nn.LayerNorm(16), build_encoder().layers[0]).eval(),
        "written": lambda: Kept().eval(),
    }
    return parts[kind]()


class Kept(Written):
    def __init__(self) -> None:
        super().__init__("scale_on_scores", 16, 2)

    def forward(self, x: Tensor, keep: Any = None) -> Tensor:
        return super().forward(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))


KINDS = ["encoder", "subclass", "spliced", "plain", "written"]


def in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_capture_one_model(kind: str, shared: bool) -> None:
    model = build(kind)
    inputs = [torch.randn(1, 4 + number, 16) for number in range(4)]
    with torch.no_grad():
        wanted = []
        for x in inputs:
            with xf.capture_attention(model) as record:
                model(x)
            wanted.append(record.rollout())
    context = xf.capture_attention(model)

    def work(number: int) -> None:
        for _ in range(15):
            with context if shared else xf.capture_attention(model) as record, torch.no_grad():
                model(inputs[number])
            assert torch.equal(record.rollout(), wanted[number])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with leaves_nothing(model):
            in_threads(work, 4)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_that_are_left_in_the_wrong_order(kind: str) -> None:
    model, x = build(kind), torch.randn(1, 4, 16)
    torch._dynamo.eval_frame  # noqa: B018  # a stance is taken only once the compiler is there
    with torch.no_grad(), leaves_nothing(model):
        plain = model(x)
        first, second = xf.capture_attention(model), xf.capture_attention(model)
        early, late = first.__enter__(), second.__enter__()
        model(x)
        with pytest.raises(RuntimeError, match="contexts to be left in the opposite order") as caught:
            first.__exit__(None, None, None)
        assert "\n" not in str(caught.value)
        layers = early.layers
        assert torch.equal(model(x), plain)
        assert early.layers == layers
        assert len(late.passes) == 1
        second.__exit__(None, None, None)
        assert torch.equal(model(x), plain)
    assert torch.equal(early.rollout(), late.rollout())
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_context_that_another_thread_leaves() -> None:
    model = build("encoder")
    context = xf.capture_attention(model)
    with leaves_nothing(model):

        def enter(_: int) -> None:
            context.__enter__()

        in_threads(enter, 1)
        with pytest.raises(RuntimeError, match="expected the thread that entered the context"):
            context.__exit__(None, None, None)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_made_inside_the_block_are_clean(kind: str, gradients: bool) -> None:
    model, x = build(kind), torch.randn(1, 4, 16)
    before = fingerprint(model)
    with torch.set_grad_enabled(gradients):
        wanted, buffer = model(x), io.BytesIO()
        with xf.capture_attention(model) as record:
            model(x)
            copied, pickled = copy.deepcopy(model), pickle.dumps(model)
            torch.save(model, buffer)
        assert fingerprint(model) == before
        buffer.seek(0)
        for other in (copied, pickle.loads(pickled), torch.load(buffer, weights_only=False)):
            assert fingerprint(other) == before
            assert torch.equal(other(x), wanted)
        assert len(record.passes) == 1


def test_a_forward_of_the_users_own_is_kept_and_copied() -> None:
    model = nn.Sequential(nn.LayerNorm(16))
    model.forward = torch.sin
    with leaves_nothing(model), xf.capture_attention(model):
        copied = copy.deepcopy(model)
        assert torch.equal(model(torch.ones(16)), torch.ones(16).sin())
    assert copied.__dict__["forward"] is torch.sin


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).pow(2).sum())(x),
    "vmap of grad": lambda model, x: torch.vmap(torch.func.grad(lambda x: model(x[None]).pow(2).sum()))(x),
    "functional call": lambda model, x: torch.func.grad(
        lambda parameters: torch.func.functional_call(model, parameters, (x,)).pow(2).sum()
    )(dict(model.named_parameters()))["qkv.weight"],
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "dual level": lambda model, x: dual(model, x),
}


def dual(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


class Plain(nn.Module):
    """Soft-capped, so that the weaving of rules has something to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + torch.tanh(q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_of_the_users_own_code(name: str) -> None:
    model, x = Plain().eval(), torch.randn(2, 5, 8)
    wanted = TRANSFORMS[name](model, x)
    with xf.capture_attention(model) as record:
        found = TRANSFORMS[name](model, x)
        score = model(x.requires_grad_())[:, 0].sum(-1)
    torch.testing.assert_close(found, wanted)
    # A plain pass afterwards serves relevance as ever.
    assert record.relevance(score, method="lrp").shape == (2, 5)
