"""Additive attention in tiles against the form that stores its hidden layer, and what masks do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tolerances import assert_close_to_reference
from xai_fast.attention import additive, signed_attention
from xai_fast.attention.additive import AdditiveAttention, additive_attention_scores


def naive_scores(keys: Tensor, queries: Tensor, weight: Tensor) -> Tensor:
    return (queries.unsqueeze(2) + keys.unsqueeze(1)).tanh() @ weight


def projected(batch: int, queries: int, keys: int, hidden: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((batch, keys, hidden), (batch, queries, hidden), (hidden,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.fixture(params=[1, 7, 40, 1 << 19])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From a tile of one pair to a tile of everything."""
    monkeypatch.setattr(additive, "TILE", request.param)
    return request.param


@pytest.mark.parametrize("sizes", [(2, 3, 5, 4), (1, 1, 1, 1), (3, 1, 9, 2), (2, 8, 1, 3), (5, 4, 4, 6)])
def test_equals_the_naive_form(sizes: tuple[int, int, int, int], tile: int) -> None:
    inputs = projected(*sizes)
    expected, actual = naive_scores(*inputs), additive_attention_scores(*inputs)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck(tile: int) -> None:
    assert torch.autograd.gradcheck(additive_attention_scores, projected(2, 3, 4, 5))
    keys, queries, weight = projected(2, 3, 4, 5)
    assert torch.autograd.gradcheck(lambda k, q, v: additive_attention_scores(k, q[:, 0], v), (keys, queries, weight))
    assert torch.autograd.gradcheck(lambda k, v: additive_attention_scores(k, None, v), (keys, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_dtypes(dtype: torch.dtype) -> None:
    inputs = [x.detach().requires_grad_() for x in projected(2, 9, 17, 33, dtype)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    actual, exact = additive_attention_scores(*inputs), naive_scores(*exact_inputs)
    assert actual.dtype == dtype
    assert_close_to_reference(actual.detach(), exact.detach())
    for mine, theirs in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(exact.sum(), exact_inputs), strict=True
    ):
        assert_close_to_reference(mine, theirs)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2)])
def test_nothing_to_score(sizes: tuple[int, int, int, int]) -> None:
    inputs = projected(*sizes)
    scores = additive_attention_scores(*inputs)
    assert scores.shape == sizes[:3]
    assert all(not grad.any() for grad in torch.autograd.grad(scores.sum(), inputs))


def test_inputs_that_are_not_contiguous() -> None:
    keys, queries, weight = projected(4, 3, 5, 6)
    strided = (keys.transpose(0, 1)[:4, :, ::2], queries.flip(0).transpose(0, 1)[:, :, ::2], weight[::2])
    strided = (strided[0], strided[1].repeat(2, 1, 1)[:4], strided[2])
    torch.testing.assert_close(additive_attention_scores(*strided), naive_scores(*strided))


def test_extreme_values_stay_finite() -> None:
    keys, queries = torch.full((1, 2, 3), 1e30), torch.full((1, 2, 3), -1e4)
    scores = additive_attention_scores(keys, queries, torch.full((3,), 1e30))
    torch.testing.assert_close(scores, torch.full((1, 2, 2), 3e30))
    module = AdditiveAttention(3, None, 2)
    with torch.no_grad():
        module.score.fill_(1e30)
    context, alpha = module(torch.randn(2, 4, 3))
    assert context.isfinite().all()
    torch.testing.assert_close(alpha.sum(-1), torch.ones(2))


def test_only_one_derivative() -> None:
    keys, queries, weight = projected(1, 2, 2, 2)
    (grad,) = torch.autograd.grad(additive_attention_scores(keys, queries, weight).square().sum(), keys, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.entries = max(self.entries, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def largest_tensor(call: Callable[[], Tensor]) -> int:
    with Largest() as largest:
        call().sum().backward()
    return largest.entries


def test_the_hidden_layer_is_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of both passes is a tile or B S H, and B T S H is 64 times as large; kept for the backward pass are
    the arguments."""
    batch, queries, keys, hidden = 2, 64, 64, 32
    monkeypatch.setattr(additive, "TILE", 1 << 12)
    inputs = projected(batch, queries, keys, hidden, torch.float32)
    assert largest_tensor(lambda: naive_scores(*inputs)) == batch * queries * keys * hidden
    assert largest_tensor(lambda: additive_attention_scores(*inputs)) <= max(1 << 12, batch * queries * keys)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        additive_attention_scores(*inputs)
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in inputs)


def test_the_module_stores_no_hidden_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "TILE", 1 << 12)
    module = AdditiveAttention(8, 8, 32)
    memory, query = torch.randn(2, 64, 8), torch.randn(2, 64, 8)
    assert largest_tensor(lambda: module(memory, query)[0]) <= 2 * 64 * 64


def naive_attention(module: AdditiveAttention, memory: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor]:
    """One query or pooling, one sample, written out."""
    hidden = memory @ module.key.weight.T + (0 if module.key.bias is None else module.key.bias)
    if query is not None:
        assert module.query is not None
        hidden = hidden + module.query.weight @ query
    alpha = (hidden.tanh() @ module.score).softmax(0)
    return alpha @ memory, alpha


@pytest.mark.parametrize("bias", [True, False])
def test_module_equals_the_formula(bias: bool) -> None:
    module = AdditiveAttention(4, 3, 6, bias=bias).double()
    memory, query = torch.randn(2, 5, 4).double(), torch.randn(2, 7, 3).double()
    context, alpha = module(memory, query)
    assert (context.shape, alpha.shape) == ((2, 7, 4), (2, 7, 5))
    for b in range(2):
        for t in range(7):
            wanted = naive_attention(module, memory[b], query[b, t])
            torch.testing.assert_close((context[b, t], alpha[b, t]), wanted)
    torch.testing.assert_close(module(memory, query[:, 2]), (context[:, 2], alpha[:, 2]))
    torch.testing.assert_close(module.weights(memory, query), alpha)


def test_pooling_equals_the_formula() -> None:
    module = AdditiveAttention(4, None, 6).double()
    memory = torch.randn(2, 5, 4).double()
    context, alpha = module(memory)
    assert (context.shape, alpha.shape) == ((2, 4), (2, 5))
    for b in range(2):
        torch.testing.assert_close((context[b], alpha[b]), naive_attention(module, memory[b], None))


@pytest.mark.parametrize("query_dim", [None, 3])
def test_masked_keys_do_not_exist(query_dim: int | None) -> None:
    """The kept keys alone give the same; weights of the others are exactly zero, whatever stands there."""
    module = AdditiveAttention(4, query_dim, 6).double()
    memory = torch.randn(1, 6, 4).double()
    query = None if query_dim is None else torch.randn(1, 2, 3).double()
    keep = torch.tensor([[True, False, True, True, False, True]])
    wanted_context, wanted = module(memory[:, keep[0]], query)
    for garbage in (0.0, 1e300, math.nan, math.inf):
        spoiled = memory.masked_fill(~keep.unsqueeze(-1), garbage).requires_grad_()
        context, alpha = module(spoiled, query, keep)
        torch.testing.assert_close(context, wanted_context)
        torch.testing.assert_close(alpha[..., keep[0]], wanted)
        assert alpha[..., ~keep[0]].eq(0).all()
        (grad,) = torch.autograd.grad(context.square().sum(), spoiled)
        assert grad.isfinite().all()
        assert grad[:, ~keep[0]].eq(0).all()


def test_a_row_without_keys_is_zero() -> None:
    module = AdditiveAttention(4, 3, 6)
    memory, query = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 3, 3)
    keep = torch.tensor([[True] * 5, [False] * 5])
    context, alpha = module(memory, query, keep)
    assert alpha[1].eq(0).all()
    assert context[1].eq(0).all()
    torch.testing.assert_close(alpha[0].sum(-1), torch.ones(3))
    context.sum().backward()
    assert memory.grad is not None
    assert memory.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_masked_keys_stay_masked_beside_the_lowest_scores() -> None:
    module = AdditiveAttention(3, None, 2)
    with torch.no_grad():
        module.score.fill_(-1e30)
        module.key.weight.fill_(100.0)
    _, alpha = module(torch.ones(1, 4, 3), None, torch.tensor([[True, True, False, False]]))
    torch.testing.assert_close(alpha, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def test_true_keeps_as_in_scaled_dot_product_attention() -> None:
    keep = torch.tensor([[True, True, False]])
    memory = torch.randn(1, 3, 4)
    _, alpha = AdditiveAttention(4, None, 2)(memory, None, keep)
    heads = memory.unsqueeze(1)
    like = torch.nn.functional.scaled_dot_product_attention(heads, heads, torch.eye(3)[None, None], keep[None, None])
    assert (alpha[0] == 0).tolist() == (like[0, 0, 0] == 0).tolist() == [False, False, True]


def test_padding_changes_nothing() -> None:
    module = AdditiveAttention(4, 3, 6).double()
    memories = [torch.randn(n, 4).double() for n in (2, 5, 3)]
    query = torch.randn(3, 2, 3).double()
    padded = torch.nn.utils.rnn.pad_sequence(memories, batch_first=True)
    keep = torch.arange(5) < torch.tensor([[2], [5], [3]])
    context, alpha = module(padded, query, keep)
    for b, memory in enumerate(memories):
        alone_context, alone = module(memory.unsqueeze(0), query[b : b + 1])
        torch.testing.assert_close(context[b], alone_context[0])
        torch.testing.assert_close(alpha[b, :, : len(memory)], alone[0])


def test_signed_attention_of_a_linear_head() -> None:
    """A_i = alpha_i (y - p) . W h_i; the sum over i is (y - p) . W c."""
    module, head = AdditiveAttention(4, None, 6).double(), torch.nn.Linear(4, 3).double()
    memory, labels = torch.randn(5, 7, 4).double(), torch.tensor([0, 1, 2, 1, 0])
    keep = torch.arange(7) < torch.tensor([[7], [3], [1], [5], [2]])
    context, alpha = module(memory, None, keep)
    logits = head(context)
    signed = signed_attention(alpha, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    error = torch.nn.functional.one_hot(labels, 3) - logits.softmax(-1)
    torch.testing.assert_close(signed, alpha * ((memory @ head.weight.T) * error.unsqueeze(1)).sum(-1))
    torch.testing.assert_close(signed.sum(-1), (error * (logits - head.bias)).sum(-1))
    assert signed[~keep].eq(0).all()
    # The graph is still there.
    logits.sum().backward()


def test_autocast_keeps_the_hidden_layer_in_float32() -> None:
    module = AdditiveAttention(16, 16, 64)
    memory, query = torch.randn(2, 9, 16), torch.randn(2, 3, 16)
    assert module.query is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys, queries = module.key(memory), module.query(query)
        scores = additive_attention_scores(keys, queries, module.score.to(keys.dtype))
        context = module(memory, query)[0]
    exact = naive_scores(keys.double(), queries.double(), module.score.bfloat16().double())
    assert scores.dtype == torch.bfloat16
    # Nothing but the result is rounded to 16 bit: half a unit in the last place of 8 bits.
    torch.testing.assert_close(scores.double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(context.float(), module(memory, query)[0], rtol=0.1, atol=0.1)
    context.sum().backward()
    assert module.score.grad is not None


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs = projected(3, 20, 30, 64, torch.float32)
    there = [x.detach().cuda().requires_grad_() for x in inputs]
    exact = naive_scores(*(x.double() for x in inputs))
    actual = additive_attention_scores(*there)
    assert_close_to_reference(actual.detach().cpu(), exact.detach())
    for mine, theirs in zip(torch.autograd.grad(actual.sum(), there), torch.autograd.grad(exact.sum(), inputs), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4)


MODULE, POOLING = AdditiveAttention(4, 3, 6), AdditiveAttention(4, None, 6)
MEMORY, QUERY = torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)
KEEP = torch.ones(2, 5, dtype=torch.bool)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "keys": (lambda: additive_attention_scores(torch.zeros(2, 3), None, torch.zeros(3)), ValueError, "keys: "),
    "weight": (lambda: additive_attention_scores(MEMORY, None, torch.zeros(3)), ValueError, "weight: "),
    "weight's dtype": (lambda: additive_attention_scores(MEMORY, None, torch.zeros(4).double()), TypeError, "weight: "),
    "queries": (lambda: additive_attention_scores(MEMORY, QUERY, torch.zeros(4)), ValueError, "queries: "),
    "queries' batch": (lambda: additive_attention_scores(MEMORY, MEMORY[:1], torch.zeros(4)), ValueError, "queries: "),
    "queries' dtype": (lambda: additive_attention_scores(MEMORY, MEMORY.half(), torch.zeros(4)), TypeError, "queries: "),
    "integers": (lambda: additive_attention_scores(MEMORY.long(), None, torch.zeros(4)), TypeError, "keys: "),
    "memory": (lambda: MODULE(torch.zeros(2, 5, 3), QUERY), ValueError, "memory: "),
    "memory's axes": (lambda: POOLING(torch.zeros(5, 4)), ValueError, "memory: "),
    "query": (lambda: MODULE(MEMORY, torch.zeros(2, 7, 4)), ValueError, "query: "),
    "query's batch": (lambda: MODULE(MEMORY, torch.zeros(3, 3)), ValueError, "query: "),
    "no query": (lambda: MODULE(MEMORY), ValueError, "query: "),
    "a query too many": (lambda: POOLING(MEMORY, QUERY), ValueError, "query: "),
    "mask's shape": (lambda: MODULE(MEMORY, QUERY, KEEP[:, :4]), ValueError, "key_padding_mask: "),
    "mask's dtype": (lambda: MODULE(MEMORY, QUERY, KEEP.float()), TypeError, "key_padding_mask: "),
    "no mask": (lambda: MODULE(MEMORY, QUERY, [1]), TypeError, "key_padding_mask: "),
    "key_dim": (lambda: AdditiveAttention(0, None, 6), ValueError, "key_dim: "),
    "query_dim": (lambda: AdditiveAttention(4, 0, 6), ValueError, "query_dim: "),
    "hidden_dim": (lambda: AdditiveAttention(4, None, 1.5), TypeError, "hidden_dim: "),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_is_wrong(name: str) -> None:
    call, kind, start = WRONG[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        ([], ValueError, "alpha: expected at least one tensor, got an empty sequence"),
        (None, TypeError, "alpha: expected a tensor or a sequence of tensors, got NoneType"),
        (5, TypeError, "alpha: expected a tensor or a sequence of tensors, got int"),
    ],
)
def test_signed_attention_names_weights_that_are_none(alpha: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        signed_attention(alpha, torch.ones((), requires_grad=True) * 2)
