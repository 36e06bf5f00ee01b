"""RelevanceMode(switchable=True): one graph for true gradients and for relevance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.lrp.models import PlainCNN, Transformer, llama, mlp, vision
from tests.lrp.test_rules import NORMS
from xai_fast import lrp


class Written(nn.Module):
    """Norms, products and activations in all spellings, with weights that are used in them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.rand(6)) for name in NORMS})
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        for name, (norm, _) in NORMS.items():
            x = x + norm(self.linear(x), 2.0 * self.weights[name])
        x = x * self.temperature.exp() + x.square() / (1.0 + x.abs())
        scores = (x[:, :, None] * x[:, None, :]).tanh() + 0.1
        scores *= 0.5
        return torch.einsum("bij,bj->bi", scores.softmax(-1), x)


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor], Any]]] = {
    "mlp": lambda: (mlp(), {"input": torch.randn(3, 6)}, 1),
    "cnn": lambda: (PlainCNN().eval(), {"x": torch.randn(2, 3, 12, 12)}, 1),
    "transformer": lambda: (Transformer().eval(), {"x": torch.randn(2, 5, 8)}, (0, 3)),
    "written": lambda: (Written(), {"x": torch.randn(2, 6)}, 3),
    "dinov2": lambda: (*vision("dinov2"), 3),
    "llama": lambda: llama_by_embeddings("sdpa"),
    "llama eager": lambda: llama_by_embeddings("eager"),
}


def llama_by_embeddings(kind: str) -> tuple[nn.Module, dict[str, Tensor], Any]:
    model, inputs = llama(kind)
    return model, {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}, (-1, 3)


def score_of(output: Any, target: Any) -> Tensor:
    output = output if isinstance(output, Tensor) else output.logits
    index = target if isinstance(target, tuple) else (target,)
    return output[(slice(None), *index)].sum()


@pytest.mark.parametrize("rule", list(lrp.COMPOSITES))
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_both(name: str, rule: str) -> None:
    model, inputs, target = MODELS[name]()
    leaf = next(iter(inputs.values())).requires_grad_()
    wanted_inputs = [leaf, *model.parameters()]
    plain = model(**inputs)
    wanted = torch.autograd.grad(score_of(plain, target), wanted_inputs, allow_unused=True)

    mode = lrp.RelevanceMode(lrp.COMPOSITES[rule], switchable=True)
    with mode:
        output = model(**inputs)
    score = score_of(output, target)
    assert torch.equal(score, score_of(plain, target))
    first = torch.autograd.grad(score, wanted_inputs, allow_unused=True, retain_graph=True)
    with mode.state.relevance_pass():
        (modified,) = torch.autograd.grad(score, leaf, retain_graph=True)
    again = torch.autograd.grad(score, wanted_inputs, allow_unused=True)
    for found in (first, again):
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None)

    relevance = lrp.attribute(model, {k: v.detach() for k, v in inputs.items()}, target, rule)
    torch.testing.assert_close(leaf.detach() * modified, next(iter(relevance.values())), rtol=1e-4, atol=1e-6)


def test_relevance_starts_at_embeddings_where_no_input_needs_grad() -> None:
    """Embeddings depend on weights alone as far as autograd knows; products of what follows are shared all the same."""
    model, inputs = llama()
    wanted = lrp.attribute(model, inputs["input_ids"], (-1, 3))
    held = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, out: held.append(out))
    mode = lrp.RelevanceMode(lrp.COMPOSITES["attnlrp"], switchable=True)
    with mode:
        output = model(**inputs)
    handle.remove()
    with mode.state.relevance_pass():
        (modified,) = torch.autograd.grad(score_of(output, (-1, 3)), held[0])
    torch.testing.assert_close(held[0].detach() * modified, wanted, rtol=1e-4, atol=1e-7)


def test_checkpointed_training_step() -> None:
    model, x = Transformer(), torch.randn(2, 5, 8, requires_grad=True)
    wanted = torch.autograd.grad(model(x)[:, 0, 3].sum(), [x, *model.parameters()])
    mode = lrp.RelevanceMode(lrp.COMPOSITES["attnlrp"], switchable=True)
    with mode:
        score = checkpoint(model, x, use_reentrant=False)[:, 0, 3].sum()
        score.backward()
    for leaf, gradient in zip([x, *model.parameters()], wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)


def test_the_state_is_restored_after_an_exception() -> None:
    mode = lrp.RelevanceMode(lrp.COMPOSITES["attnlrp"], switchable=True)
    with pytest.raises(RuntimeError, match="stop"), mode.state.relevance_pass():
        raise RuntimeError("stop")
    assert not mode.state.relevance


def test_nothing_is_kept_alive_by_the_mode() -> None:
    import gc
    import weakref

    mode = lrp.RelevanceMode(lrp.COMPOSITES["gamma"], switchable=True)
    model, x = PlainCNN().eval(), torch.randn(1, 3, 8, 8, requires_grad=True)
    with mode:
        output = model(x)
    alive = weakref.ref(output)
    del output
    gc.collect()
    assert alive() is None
    assert not mode._notes
