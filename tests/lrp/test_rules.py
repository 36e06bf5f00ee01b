"""Rules: against the relevance form, at zeros, by layer, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lrp.explicit import linear_rule, operations
from tests.lrp.models import PlainCNN, Transformer, mlp
from xai_fast import lrp


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("eps", [1e-14, 0.05])
@pytest.mark.parametrize("lam", [0.5, 0.0, 0.3, 1.0])
def test_transformer_in_relevance_form(lam: float, eps: float) -> None:
    model, x = Transformer().double().eval(), torch.randn(2, 5, 8).double()
    leaf = x.clone().requires_grad_()
    score = model(leaf, **operations(lam, eps))[:, 0, 3]
    (wanted,) = torch.autograd.grad(score, leaf, score.detach())
    composite = lrp.Composite("test", linear=lrp.Epsilon(eps), attention=lrp.Attention(lam))
    assert difference(lrp.attribute(model, x, (0, 3), composite), wanted) < 1e-9


LINEAR_RULES = [
    lrp.Epsilon(0.05),
    lrp.Epsilon(),
    lrp.ZPlus(0.01),
    lrp.Gamma(0.3, 0.01),
    lrp.AlphaBeta(2, 1, 0.01),
    lrp.AlphaBeta(1, 0),
    lrp.Flat(),
    lrp.WSquare(),
    lrp.ZBox(-4.0, 4.0),
]


@pytest.mark.parametrize("sign", ["both", "positive"])
@pytest.mark.parametrize("rule", LINEAR_RULES, ids=str)
def test_linear_rules_term_by_term(rule: lrp.Rule, sign: str) -> None:
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6).double()
    x = x.abs() if sign == "positive" else x
    y = layer(x).detach()
    weights = torch.randn(5).double()
    found = lrp.attribute(layer, x, lambda y: y @ weights, rule)
    torch.testing.assert_close(found, linear_rule(rule, x, layer.weight.detach(), layer.bias.detach(), y * weights))
    as_convolution = nn.Conv1d(6, 5, 1).double()
    as_convolution.load_state_dict({"weight": layer.weight[..., None], "bias": layer.bias})
    same = lrp.attribute(as_convolution, x[..., None], lambda y: y[..., 0] @ weights, rule)
    torch.testing.assert_close(same[..., 0], found)


def attend(way: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    if way == "einsum":
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(scale).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)
    if way == "bmm":
        folded = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
        scores = torch.baddbmm(torch.zeros(1, 1, 1).double(), folded[0], folded[1].mT, alpha=scale)
        return torch.bmm(F.dropout(F.softmax(scores, -1), 0.1, False), folded[2]).view(v.shape)
    if way == "sum":
        return (((q @ k.mT) * scale).softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(3)
    scores = q @ k.mT
    scores *= scale
    return torch.softmax(scores, -1).to(v.dtype) @ v


@pytest.mark.parametrize("lam", [0.5, 0.0, 0.3])
@pytest.mark.parametrize("way", ["einsum", "bmm", "sum", "in place"])
def test_attention_in_every_spelling(way: str, lam: float) -> None:
    model, x = Transformer().double().eval(), torch.randn(2, 5, 8).double()
    composite = lrp.Composite("test", attention=lrp.Attention(lam))
    wanted = lrp.attribute(model, x, (0, 3), composite)
    found = lrp.attribute(_Calling(model, lambda q, k, v: attend(way, q, k, v)), x, (0, 3), composite)
    assert difference(found, wanted) < 1e-9


class _Calling(nn.Module):
    def __init__(self, model: nn.Module, attention: Any) -> None:
        super().__init__()
        self.model, self.attention = model, attention

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, attention=self.attention)


def test_eps_in_fused_attention() -> None:
    """Against the epsilon rule term by term."""
    q, k, v = (torch.randn(1, 2, 4, 3).double() for _ in range(3))
    composite = lrp.Composite("test", attention=lrp.Attention(0.5, eps=0.1))
    found = lrp.attribute(_Fused(), (q, k, v), lambda y: y.flatten(1).sum(1), composite)
    a = (q @ k.mT / 3**0.5).softmax(-1)
    out = a @ v
    s = out / (out + 0.1 * out.sign())
    assert difference(found[2], 0.5 * v * (a.mT @ s)) < 1e-9


def test_fused_attention_of_other_shapes() -> None:
    """Three dimensions and constant operands: the shares of what carries relevance."""
    q, k, v = (torch.randn(2, 4, 3).double() for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v)
    found = lrp.attribute(_Fused(), (q, k, v), lambda y: y.flatten(1).sum(1), "cp-lrp")
    assert not found[0].any()
    torch.testing.assert_close(found[2].sum((1, 2)), out.sum((1, 2)))
    found = relevance(lambda v: F.scaled_dot_product_attention(q, k, v), v)
    torch.testing.assert_close(found.sum((1, 2)), out.sum((1, 2)))
    gradient = lrp.Composite("test", attention=lrp.Gradient())
    whole = relevance(lambda q: F.scaled_dot_product_attention(q, k, v), q, rule=gradient)
    torch.testing.assert_close(relevance(lambda q: F.scaled_dot_product_attention(q, k, v), q), whole)
    with pytest.raises(ValueError, match=r"^rule: Attention with eps > 0 needs query \(B,H,N,d\)"):
        relevance(F.scaled_dot_product_attention, q, k, v, rule=lrp.Composite("test", attention=lrp.Attention(0.5, 0.1)))


class _Fused(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class _Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


def relevance(function: Any, *x: Tensor, rule: Any = "attnlrp") -> Any:
    found = lrp.attribute(_Lambda(function), x, lambda y: y.flatten(1).sum(1), rule)
    return found[0] if len(x) == 1 else found


ACTIVATIONS = [
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    lambda x: F.silu(x * 1.0, inplace=True),
    torch.tanh,
    lambda x: (x * 1.0).tanh_(),
    F.elu,
    F.leaky_relu,
    F.relu,
    F.hardswish,
    F.mish,
    torch.sigmoid,
    F.softplus,
    lambda x: x.clamp(-0.5, 0.5),
    F.relu6,
    lambda x: x**2,
    lambda x: x * x,
    lambda x: x.square() * x,
    lambda x: torch.exp(torch.ones(1).double()) * x,
]


@pytest.mark.parametrize("index", range(len(ACTIVATIONS)))
def test_functions_of_one_element_pass_relevance_on(index: int) -> None:
    x = torch.randn(3, 7).double()
    torch.testing.assert_close(relevance(ACTIVATIONS[index], x), ACTIVATIONS[index](x.clone()))


def test_the_slope_at_zero_goes_on() -> None:
    """gelu(x) / x is 1/2 at x = 0, and relevance goes on to what cancelled there."""
    weight = torch.tensor([[1.0, 1.0]])
    found = relevance(lambda x: F.gelu(x @ weight.T), torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid()], ids=str)
def test_activations_that_are_not_zero_at_zero_in_half_precision(activation: nn.Module) -> None:
    """f(x) / x has to stay in the range of float16."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), activation, nn.Linear(4, 3))
    for x in (torch.zeros(2, 4), torch.full((2, 4), 1e-5), torch.randn(2, 4)):
        found = lrp.attribute(model.half(), x.half(), 1)
        assert found.isfinite().all()
    hidden = model.float()[0](x).abs().min()
    assert hidden > 1e-2
    torch.testing.assert_close(found.float(), lrp.attribute(model, x, 1), rtol=0.05, atol=0.01)


NORMS = {
    "layer": (lambda x, w: F.layer_norm(x, (6,), w), True),
    "written": (lambda x, w: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * w, True),
    "llama": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), False),
    "rms": (lambda x, w: F.rms_norm(x, (6,), w, 1e-6), False),
    "normalize": (lambda x, w: F.normalize(x, dim=-1) * w, False),
    "reciprocal": (lambda x, w: x * (x.norm(dim=-1, keepdim=True)).reciprocal() * w, False),
    "one over": (lambda x, w: x * (1 / x.norm(dim=-1, keepdim=True)) * w, False),
    "negative power": (lambda x, w: x * (x.square().sum(-1, keepdim=True) ** -0.5) * w, False),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_conserve(name: str) -> None:
    """Without a bias everything arrives: sum x g_x = sum y."""
    norm, _ = NORMS[name]
    x, w = torch.randn(3, 6).double() + 0.5, torch.rand(6).double()
    found = relevance(lambda x: norm(x, w), x)
    torch.testing.assert_close(found.sum(-1), norm(x, w).sum(-1))


@pytest.mark.parametrize(("one", "other"), [("layer", "written"), ("rms", "llama")])
def test_fused_norms_are_the_written_ones(one: str, other: str) -> None:
    x, w = torch.randn(3, 6).double() + 0.5, torch.rand(6).double()
    torch.testing.assert_close(relevance(lambda x: NORMS[one][0](x, w), x), relevance(lambda x: NORMS[other][0](x, w), x))


def test_group_and_instance_norm() -> None:
    x, w = torch.randn(2, 6, 5).double() + 0.5, torch.rand(6).double()

    def written(x: Tensor, groups: int) -> Tensor:
        y = x.view(2, groups, -1)
        y = (y - y.mean(-1, True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return y.view(x.shape) * w[:, None]

    for groups, norm in ((3, lambda x: F.group_norm(x, 3, w)), (6, lambda x: F.instance_norm(x, weight=w))):
        torch.testing.assert_close(relevance(norm, x), relevance(lambda x, g=groups: written(x, g), x))


def test_detached_mean_and_identity_of_norms() -> None:
    x = torch.randn(3, 6).double()
    detached = lrp.Composite("test", norm=lrp.Norm(detach_mean=True))
    scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(relevance(lambda x: F.layer_norm(x, (6,)), x, rule=detached), x * scale)
    identity = lrp.Composite("test", norm=lrp.Identity())
    torch.testing.assert_close(relevance(lambda x: F.layer_norm(x, (6,)), x, rule=identity), F.layer_norm(x, (6,)))


def test_products_give_halves() -> None:
    a, b = torch.randn(2, 3, 4).double(), torch.randn(2, 4, 3).double()
    for function in (torch.matmul, torch.bmm, lambda a, b: torch.einsum("bij,bjk->bik", a, b)):
        found = relevance(function, a, b)
        torch.testing.assert_close(found[0].sum((1, 2)), (a @ b).sum((1, 2)) / 2)
        torch.testing.assert_close(found[0].sum((1, 2)), found[1].sum((1, 2)))
    gate = relevance(lambda a, b: F.silu(a) * b.mT, a, b)
    torch.testing.assert_close(gate[0], (F.silu(a) * b.mT) / 2)
    in_place = relevance(lambda a, b: (a * 1.0).mul_(b.mT), a, b)
    torch.testing.assert_close(in_place[0], a * b.mT / 2)
    torch.testing.assert_close(in_place[1], (a * b.mT / 2).mT)


def test_flat_gives_relevance_to_inputs_of_zero() -> None:
    model, x = nn.Linear(3, 2).double().requires_grad_(False), torch.tensor([[0.0, 1.0, 0.0]]).double()
    y = model(x)
    composite = lrp.Composite("test", first=lrp.Flat(0.0))
    torch.testing.assert_close(lrp.attribute(model, x, 1, composite), (y[:, 1:] / 3).expand(1, 3), rtol=1e-12, atol=0)
    # Through what only rearranges the input too.
    moved = _Lambda(lambda x: model(x.flip(1).reshape(1, 3)))
    assert (lrp.attribute(moved, x, 1, composite) != 0).all()


def test_rules_of_chosen_modules() -> None:
    model, x = mlp().double(), torch.randn(4, 6).double()
    whole = lrp.attribute(model, x, 1, "gamma")
    by_type = lrp.Composite("test", layers={nn.Linear: lrp.Gamma()})
    by_name = lrp.Composite("test", layers={"[024]": lrp.Gamma()})
    for composite in (by_type, by_name):
        torch.testing.assert_close(lrp.attribute(model, x, 1, composite), whole, rtol=0, atol=0)
    some = lrp.Composite("test", layers={"4": lrp.Gamma()})
    assert not torch.allclose(lrp.attribute(model, x, 1, some), whole)
    assert not torch.allclose(lrp.attribute(model, x, 1, some), lrp.attribute(model, x, 1))


class WrittenGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x / 2**0.5))


def test_identity_of_a_whole_module() -> None:
    native, written = (nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 3)).double() for act in (nn.GELU(), WrittenGELU()))
    written.load_state_dict(native.state_dict())
    x = torch.randn(4, 6).double()
    wanted = lrp.attribute(native, x, 1)
    composite = lrp.Composite("test", layers={WrittenGELU: lrp.Identity()})
    torch.testing.assert_close(lrp.attribute(written, x, 1, composite), wanted)
    # Left to itself it is a product of two functions of x.
    assert not torch.allclose(lrp.attribute(written, x, 1), wanted)
    leaf = x.clone().requires_grad_()
    mode = lrp.RelevanceMode(composite, switchable=True, model=written)
    with mode:
        score = written(leaf)[:, 1].sum()
    with mode.state.relevance_pass():
        (modified,) = torch.autograd.grad(score, leaf, retain_graph=True)
    torch.testing.assert_close(x * modified, wanted)
    (true,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(true, torch.autograd.grad(native(leaf)[:, 1].sum(), leaf)[0])
    with pytest.raises(ValueError, match=r"^layers: expected a module that keeps the shape"):
        lrp.attribute(native, x, 1, lrp.Composite("test", layers={"0": lrp.Identity()}))


def test_batch_norm_is_merged_into_weights() -> None:
    model, x = PlainCNN().double().eval(), torch.randn(2, 3, 8, 8).double()
    merged = PlainCNN().double().eval()
    merged.load_state_dict(model.state_dict())
    merged.first, merged.norm = torch.nn.utils.fuse_conv_bn_eval(model.first, model.norm), nn.Identity()
    for i in (0, 3):
        merged.block[i] = torch.nn.utils.fuse_conv_bn_eval(model.block[i], model.block[i + 1])
        merged.block[i + 1] = nn.Identity()
    for rule in ("gamma", "zplus", "epsilon", "attnlrp"):
        assert difference(lrp.attribute(model, x, 1, rule), lrp.attribute(merged, x, 1, rule)) < 1e-4, rule


class Overwritten(nn.Module):
    """A linear operation, something that overwrites its output, and a batch norm."""

    def __init__(self, layer: nn.Module, norm: nn.Module, overwrite: Any) -> None:
        super().__init__()
        self.layer, self.norm, self.overwrite, self.last = layer, norm, overwrite, nn.LazyLinear(3)
        norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.overwrite(self.layer(x))).flatten(1))


# In place, and the same out of place.
OVERWRITING = {
    "relu": (lambda h: F.relu(h, inplace=True), F.relu),
    "leaky_relu_": (lambda h: F.leaky_relu_(h, 0.1), lambda h: F.leaky_relu(h, 0.1)),
    "clamp_": (lambda h: h.clamp_(-0.5, 0.5), lambda h: h.clamp(-0.5, 0.5)),
    "mul_": (lambda h: h.mul_(3.0), lambda h: h * 3.0),
    "add": (lambda h: h.add_(1.0), lambda h: h + 1.0),
    "item": (lambda h: h.index_fill_(1, torch.tensor([0]), 0.0), lambda h: h.index_fill(1, torch.tensor([0]), 0.0)),
    "view": (lambda h: h.view(-1).mul_(2.0).view(h.shape), lambda h: h * 2.0),
}


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("name", OVERWRITING)
def test_batch_norm_behind_what_overwrites(name: str, kind: str) -> None:
    """The batch norm does not read the output of the linear operation any more."""
    norm: nn.Module = nn.BatchNorm1d(6)
    layer, x = (nn.Linear(5, 6), torch.randn(4, 5)) if kind == "linear" else (nn.Conv1d(2, 6, 2), torch.randn(4, 2, 5))
    in_place, out_of_place = (Overwritten(layer, norm, f).eval().double() for f in OVERWRITING[name])
    out_of_place(x.double())
    in_place.last = out_of_place.last
    for rule in ("epsilon", "zplus", "gamma"):
        for details in (False, True):
            found, wanted = (lrp.attribute(m, x.double(), 1, rule, details=details) for m in (in_place, out_of_place))
            torch.testing.assert_close(*(r.relevance if details else r for r in (found, wanted)))


def test_batch_norm_behind_an_input_that_is_overwritten() -> None:
    """Merging needs the input as the linear operation read it."""
    layer, norm = nn.Linear(5, 5).double(), nn.BatchNorm1d(5).double().eval()
    norm.running_mean.normal_()

    def forward(x: Tensor) -> Tensor:
        y = layer(x * 2.0)
        return norm(y)

    def overwriting(x: Tensor) -> Tensor:
        h = x * 2.0
        y = layer(h)
        h.zero_()
        return norm(y)

    x = torch.randn(3, 5).double()
    layer.requires_grad_(False), norm.requires_grad_(False)
    assert relevance(forward, x, rule="zplus").any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        relevance(overwriting, x, rule="zplus")


def boxed(low: Any, high: Any) -> Any:
    return lrp.attribute(nn.Linear(4, 3), torch.full((2, 4), 0.5), 1, lrp.ZBox(low, high))


BAD = [
    (lambda: lrp.AlphaBeta(2, 2), ValueError, r"^alpha, beta: expected alpha - beta = 1, got alpha=2 and beta=2$"),
    (lambda: lrp.Epsilon(-1), ValueError, "^eps: expected .* at least 0, got -1$"),
    (lambda: lrp.Epsilon("x"), TypeError, "^eps: expected a number, got str$"),  # type: ignore[arg-type]
    (lambda: lrp.Gamma(float("nan")), ValueError, "^gamma: "),
    (lambda: lrp.Attention(1.5), ValueError, "^lam: "),
    (lambda: lrp.ZBox("a", 1), TypeError, "^low: "),  # type: ignore[arg-type]
    (lambda: lrp.Composite("x", linear=lrp.Norm()), ValueError, "^linear: expected a rule for linear operations"),
    (lambda: lrp.Composite("x", first=lrp.Identity()), ValueError, "^first: "),
    (lambda: lrp.Composite("x", layers={3: lrp.ZPlus()}), TypeError, "^layers: "),  # type: ignore[dict-item]
    (lambda: lrp.Composite("x", layers=[1]), TypeError, "^layers: expected a mapping of modules to rules, got list$"),  # type: ignore[arg-type]
    (lambda: lrp.Composite("x", layers=None), TypeError, "^layers: .* got NoneType$"),  # type: ignore[arg-type]
    (lambda: lrp.ZBox(1, 0), ValueError, "^low: expected a bound of at most high = 0, got 1$"),
    (lambda: lrp.ZBox(0, torch.tensor(float("nan"))), ValueError, "^high: expected finite bounds, got inf or NaN$"),
    (lambda: boxed(torch.zeros(7), 1.0), ValueError, r"^low: expected a shape that broadcasts to \(2, 4\), got \(7,\)$"),
    (lambda: boxed(torch.ones(4), torch.zeros(4)), ValueError, "^low: expected bounds of at most high"),
    (lambda: boxed(0.75, 1.0), ValueError, "^low: expected bounds of at most x, got one 0.25 above it$"),
    (lambda: boxed(0.0, 0.25), ValueError, "^high: expected bounds of at least x, got one 0.25 below it$"),
    (lambda: lrp.Composite("x", norm="zplus"), TypeError, "^norm: "),  # type: ignore[arg-type]
    (lambda: lrp.RelevanceMode(lrp.Composite("x", layers={"a": lrp.ZPlus()})), ValueError, "^model: "),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_rules(index: int) -> None:
    build, kind, message = BAD[index]
    with pytest.raises(kind, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
