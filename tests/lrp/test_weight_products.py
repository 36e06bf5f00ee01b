"""Products with a weight in every spelling have the rule of linear operations; what no rule covers is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lrp.models import mlp
from tests.lrp.test_rules import LINEAR_RULES, difference
from xai_fast import lrp

Product = Callable[[Tensor, Tensor], Tensor]

# x (B,K), W (O,K) -> (B,O)
SPELLINGS: dict[str, Product] = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.T,
    "mm": lambda x, w: torch.mm(x, w.T),
    "einsum": lambda x, w: torch.einsum("bk,ok->bo", x, w),
    "einsum, implicit": lambda x, w: torch.einsum("ij,kj", x, w),
    "einsum, ellipsis": lambda x, w: torch.einsum("...k,ok->...o", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("ok,bk->bo", [w, x]),
    "einsum, sublists": lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2]),
    "left operand": lambda x, w: (w @ x.T).T,
    "reflected": lambda x, w: x.T.__rmatmul__(w).T,
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([1], [1])),
    "tensordot, by name": lambda x, w: torch.tensordot(a=w, b=x, dims=([1], [1])).T,
    "inner": torch.inner,
    "bmm": lambda x, w: torch.bmm(x[:, None], w.T.expand(len(x), -1, -1))[:, 0],
    "three dimensions": lambda x, w: torch.matmul(x, w.T[None])[0],
    "one at a time": lambda x, w: torch.stack([w.mv(row) for row in x.unbind(0)]),
    "rows": lambda x, w: torch.stack([x @ row for row in w.unbind(0)], 1),
    "linear rows": lambda x, w: torch.stack([F.linear(x, row) for row in w.unbind(0)], 1),
}


class Layer(nn.Module):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self.weight, self.product = nn.Parameter(torch.randn(5, 6)), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


def pair(product: Product) -> tuple[nn.Module, nn.Module]:
    """The model with F.linear, and with another spelling of it."""
    one, other = (nn.Sequential(nn.Linear(6, 6), nn.GELU(), Layer(f), nn.Linear(5, 3)) for f in (F.linear, product))
    other.load_state_dict(one.state_dict())
    return one.double(), other.double()


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_has_the_rule(name: str) -> None:
    one, other = pair(SPELLINGS[name])
    x = torch.randn(4, 6).double()
    for rule in ("zplus", "gamma", "epsilon", "attnlrp", lrp.AlphaBeta()):
        found = lrp.attribute(other, x, 1, rule, details=True)
        assert difference(lrp.attribute(other, x, 1, rule), lrp.attribute(one, x, 1, rule)) < 1e-9, rule
        torch.testing.assert_close(found.relevance, lrp.attribute(one, x, 1, rule))


@pytest.mark.parametrize("rule", LINEAR_RULES, ids=str)
def test_every_rule_at_the_input(rule: lrp.Rule) -> None:
    x = torch.randn(4, 6).double()
    for name in ("einsum", "left operand", "tensordot", "bmm"):
        one, other = Layer(F.linear).double(), Layer(SPELLINGS[name]).double()
        other.load_state_dict(one.state_dict())
        torch.testing.assert_close(lrp.attribute(other, x, 1, rule), lrp.attribute(one, x, 1, rule))


def test_weights_of_each_head() -> None:
    """A batch of weights: each head by itself."""
    heads, x = nn.Parameter(torch.randn(2, 3, 4).double()), torch.randn(5, 2, 3).double()

    class Heads(nn.Module):
        def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.weight, self.product = heads, product

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x).flatten(1)

    one = Heads(lambda x: torch.stack([F.linear(x[:, i], heads[i].T) for i in range(2)], 1))
    for product in (
        lambda x: torch.einsum("bhd,hde->bhe", x, heads),
        lambda x: (x.unsqueeze(2) @ heads).squeeze(2),
        lambda x: torch.bmm(x.transpose(0, 1), heads).transpose(0, 1),
    ):
        torch.testing.assert_close(lrp.attribute(Heads(product), x, 1, "zplus"), lrp.attribute(one, x, 1, "zplus"))


def test_the_loss_of_the_epsilon_rule_is_expected() -> None:
    model, x = Layer(SPELLINGS["einsum"]).double(), torch.randn(4, 6).double()
    (step,) = lrp.attribute(model, x, 1, lrp.Epsilon(0.05), details=True).conservation
    assert step.kind == "product"
    assert step.expected is not None
    assert step.loss == pytest.approx(step.expected["eps"], rel=1e-6)
    assert abs(step.loss) > 1e-4


def test_products_of_activations_stay_as_they_are() -> None:
    a, v, scale = torch.randn(3, 2, 5, 5).double(), torch.randn(3, 2, 5, 4).double(), nn.Parameter(torch.rand(4).double())

    class Activations(nn.Module):
        def __init__(self, product: Callable[..., Tensor]) -> None:
            super().__init__()
            self.product, self.scale = product, scale

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.product(*inputs)

    def score(y: Tensor) -> Tensor:
        return y.flatten(1).sum(1)

    constant = (
        lambda v, a: a @ v,
        lambda v, a: torch.einsum("bhij,bhjd->bhid", a, v),
        lambda v, a: torch.bmm(a.flatten(0, 1), v.flatten(0, 1)).view(v.shape),
        lambda v, a: torch.baddbmm(v.new_zeros(1), a.flatten(0, 1), v.flatten(0, 1)).view(v.shape),
        lambda v, a: F.scaled_dot_product_attention(a, a, v),
    )
    for product in constant:
        model = Activations(product)
        wanted = lrp.attribute(model, v, score, additional_forward_args=a)
        torch.testing.assert_close(lrp.attribute(model, v, score, "zplus", additional_forward_args=a), wanted)
    both = Activations(lambda a, v: torch.tensordot(a.flatten(0, 2), v.flatten(0, 2).T.mT, dims=([1], [1]))[None])
    one = torch.randn(1, 1, 5, 4).double()
    for found in lrp.attribute(both, (one, one.flip(2)), score, "zplus"):
        torch.testing.assert_close(found.sum(), (one.flatten(0, 2) @ one.flip(2).flatten(0, 2).T).sum() / 2)
    # Nothing is summed: one product is one share.
    scaled = Activations(lambda v: torch.einsum("bhjd,d->bhjd", v, scale))
    torch.testing.assert_close(lrp.attribute(scaled, v, score, "zplus"), v * scale.detach())


class Scripted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "three operands": lambda x, w: torch.einsum("bk,ok,o->bo", x, w, torch.ones(5).double()),
    "addmm with factors": lambda x, w: torch.addmm(torch.ones(5).double(), x, w.T, alpha=2.0),
    "baddbmm": lambda x, w: torch.baddbmm(torch.ones(1).double(), x[None], w.T[None])[0],
    "aten": lambda x, w: torch.ops.aten.mm(x, w.T),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w.T, torch.eye(5).double()]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_products_without_a_rule_are_refused(name: str) -> None:
    _, model = pair(REFUSED[name])
    x = torch.randn(4, 6).double()
    seen_by_python = name in ("three operands", "addmm with factors", "baddbmm")
    if seen_by_python:
        # Rules of other layers leave its gradient to this one.
        composite = lrp.Composite("test", layers={"0": lrp.ZPlus()})
        only = lrp.Composite("test", layers={"0": lrp.ZPlus(), "2": lrp.Epsilon(0.0)})
        torch.testing.assert_close(lrp.attribute(model, x, 1, composite), lrp.attribute(model, x, 1, only))
    for rule in ("zplus", "epsilon", lrp.Composite("test", layers={Layer: lrp.Gamma()})):
        with pytest.raises(ValueError, match=r"^model: expected operations with a rule, got \w+Backward0 in module '2'"):
            lrp.attribute(model, x, 1, rule)
    assert lrp.attribute(model, x, 1, "zplus", fallback="gradient").any()
    # Where the rule is the gradient there is nothing to refuse.
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model[2](leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(lrp.attribute(model[2], x, 1), x * gradient)


@pytest.mark.parametrize("compiler", ["trace", "script"])
def test_models_that_python_does_not_run_are_refused(compiler: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(4, 6)
    # Without the optimizer, which after some runs joins them to an operation that is refused under every rule.
    with warnings.catch_warnings(), torch.jit.optimized_execution(False):
        warnings.simplefilter("ignore")
        compiled = torch.jit.trace(model, x) if compiler == "trace" else torch.jit.script(model)
        for network in (compiled, Scripted(compiled)):
            for rule in ("zplus", "gamma", "epsilon"):
                with pytest.raises(
                    ValueError, match=r"^model: expected operations with a rule, got \w+Backward0.*; fallback="
                ):
                    lrp.attribute(network, x, 1, rule)
            for details in (False, True):
                # Its gradient is the rule.
                found = lrp.attribute(network, x, 1, details=details)
                relevance = found if isinstance(found, Tensor) else found.relevance
                torch.testing.assert_close(relevance, lrp.attribute(model, x, 1))


def test_rules_of_some_layers_leave_the_others_their_gradient() -> None:
    model, x = mlp().double(), torch.randn(4, 6).double()
    for layers in ({"0": lrp.ZPlus()}, {"0": lrp.Gradient()}):
        linear = lrp.Gradient() if isinstance(layers["0"], lrp.ZPlus) else lrp.ZPlus()
        assert lrp.attribute(model, x, 1, lrp.Composite("test", linear=linear, layers=layers)).isfinite().all()
    image = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 3)).double()
    assert lrp.attribute(image, torch.randn(2, 2, 4).double(), 1, lrp.Composite("test", linear=lrp.ZPlus())).any()
