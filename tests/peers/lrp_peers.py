"""Run in a process of its own, with other LRP libraries importable: compares them with xai_fast and prints JSON.

``python -m tests.peers.lrp_peers zennit | captum | lxt | autolrp`` prints {case: largest difference relative to
the largest relevance}, all in double precision.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lrp.models import PlainCNN, Transformer, llama, mlp
from tests.peers import torchvision_shim  # noqa: F401
from xai_fast import lrp


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def total(output: Tensor) -> Tensor:
    return output.flatten(1).sum(1)


def zennit() -> dict[str, float]:
    from zennit import rules
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import NameLayerMapComposite
    from zennit.layer import Sum
    from zennit.types import Activation, AvgPool

    low, high = torch.full((1, 3, 1, 1), -4.0).double(), torch.full((1, 3, 1, 1), 4.0).double()
    pairs: dict[str, tuple[lrp.Rule, Callable[[], Any]]] = {
        "Epsilon": (lrp.Epsilon(0.1), lambda: rules.Epsilon(0.1)),
        "ZPlus": (lrp.ZPlus(), lambda: rules.ZPlus(zero_params="bias")),
        "Gamma": (lrp.Gamma(0.4), lambda: rules.Gamma(0.4)),
        "AlphaBeta": (lrp.AlphaBeta(2, 1), lambda: rules.AlphaBeta(2, 1)),
        "AlphaBeta10": (lrp.AlphaBeta(1, 0), lambda: rules.AlphaBeta(1, 0)),
        "Flat": (lrp.Flat(), rules.Flat),
        "WSquare": (lrp.WSquare(), rules.WSquare),
        "ZBox": (lrp.ZBox(low, high), lambda: rules.ZBox(low, high)),
    }
    image = torch.randn(2, 3, 7, 6).double()
    vector = torch.randn(4, 3, 1, 1).double()
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "Conv2d": (nn.Conv2d(3, 4, 3, padding=1, stride=2), image),
        "Conv2d groups": (nn.Conv2d(3, 6, (2, 3), groups=3, dilation=2, padding="same"), image),
        "ConvTranspose2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1, padding=1), image),
        "Linear": (nn.Linear(3, 5), vector[..., 0, 0]),
    }
    found = {}
    for layer_name, (layer, x) in layers.items():
        layer.double()
        for name, (ours, theirs) in pairs.items():
            if layer_name == "Linear" and name == "ZBox":
                ours, theirs = lrp.ZBox(-4.0, 4.0), lambda: rules.ZBox(-4.0, 4.0)
            relevance = lrp.attribute(layer, x, total, ours)
            leaf = x.clone().requires_grad_()
            handle = theirs().register(layer)
            y = layer(leaf)
            (expected,) = torch.autograd.grad(y, leaf, y.detach())
            handle.remove()
            found[f"{layer_name} {name}"] = difference(relevance, expected)

    image = image_of(12)
    for name in ("Epsilon", "ZPlus", "Gamma", "AlphaBeta"):
        ours, theirs = pairs[name]
        model = PlainCNN(join=_Join(Sum())).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # A batch norm that zennit has merged still divides by sqrt(1 + eps).
                module.eps = 1e-13
        composite = NameLayerMapComposite(
            name_map=[(["first"], rules.WSquare())],
            layer_map=[
                (Activation, rules.Pass()),
                ((AvgPool, Sum), rules.Norm(1e-12)),
                ((nn.Conv2d, nn.Linear), theirs()),
            ],
            canonizers=[SequentialMergeBatchNorm()],
        )
        relevance = lrp.attribute(model, image, 1, lrp.Composite(name, linear=ours, convolution=ours, first=lrp.WSquare()))
        seed = torch.eye(3).double()[[1, 1]] * model(image).detach()
        with Gradient(model, composite) as attributor:
            _, expected = attributor(image.clone().requires_grad_(), seed)
        found[f"CNN {name}"] = difference(relevance, expected)
    return found


class _Join(nn.Module):
    """a + b by a module of zennit, which has a rule for it."""

    def __init__(self, add: nn.Module) -> None:
        super().__init__()
        self.add = add

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        joined: Tensor = self.add(torch.stack([a, b], -1))
        return joined


def image_of(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def captum() -> dict[str, float]:
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU())
    cnn = _Flattening(features, nn.Linear(64, 3)).double()
    positive = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    vector, image = torch.randn(4, 6).double(), image_of(12)
    found = {}
    for name, model, x, rule, theirs in (
        ("MLP epsilon", mlp, vector, lrp.Epsilon(0.01), lambda: EpsilonRule(0.01)),
        ("CNN epsilon", cnn, image, lrp.Epsilon(0.01), lambda: EpsilonRule(0.01)),
        ("MLP z+", positive, vector.abs(), lrp.ZPlus(1e-9), Alpha1_Beta0_Rule),
    ):
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.rule = theirs()
        expected = LRP(model).attribute(x, target=2)
        for module in model.modules():
            module.__dict__.pop("rule", None)
        found[name] = difference(lrp.attribute(model, x, 2, rule), expected)
    return found


class _Flattening(nn.Module):
    """nn.Flatten has no rule in Captum."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x).flatten(1))
        return y


def lxt() -> dict[str, float]:
    import lxt.explicit.functional as lf

    model = Transformer().double().eval()
    x = torch.randn(2, 5, 8).double()
    eps = 1e-10

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probabilities = lf.softmax(lf.matmul(q, k.mT, epsilon=eps), -1, temperature=q.shape[-1] ** 0.5)
        return lf.matmul(probabilities, v, epsilon=eps)

    def gelu(h: Tensor) -> Tensor:
        return _Identity.apply(h)

    leaf = x.clone().requires_grad_()
    y = model(
        leaf,
        linear=lambda h, m: lf.linear_epsilon(h, m.weight, m.bias, epsilon=eps),
        attention=attention,
        norm=lambda h, m: lf.layer_norm_grad_fn.apply(h, m.weight, m.bias, m.eps, eps),
        add=lambda a, b: lf.add2(a, b, epsilon=eps),
        activation=gelu,
    )
    assert torch.allclose(y, model(x))
    score = y[:, 0, 3]
    (expected,) = torch.autograd.grad(score, leaf, score.detach())
    found = {"explicit transformer": difference(lrp.attribute(model, x, (0, 3)), expected)}
    return {**found, **_lxt_efficient()}


class _Identity(torch.autograd.Function):
    """GELU that passes relevance on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Tensor:
        return relevance


def _lxt_efficient() -> dict[str, float]:
    """Its table for Llama. lxt 2.1 imports a helper that transformers 5 does not have, and does not use it here."""
    import transformers.pytorch_utils

    for name in ("find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(transformers.pytorch_utils, name):
            setattr(transformers.pytorch_utils, name, None)
    from lxt.efficient import monkey_patch
    from lxt.efficient.models import llama as llama_map
    from transformers.models.llama import modeling_llama

    model, inputs = llama("eager")
    model.double()
    ours = lrp.attribute(model, inputs["input_ids"], (-1, 3))
    monkey_patch(modeling_llama, llama_map.attnLRP)
    modeling_llama.ALL_ATTENTION_FUNCTIONS = _Interfaces(modeling_llama.ALL_ATTENTION_FUNCTIONS)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, -1, 3].sum().backward()
    assert embeddings.grad is not None
    return {"efficient Llama": difference(ours, embeddings.detach() * embeddings.grad)}


class _Interfaces(dict):
    """What transformers 5 calls on the table that lxt replaces by a plain dict."""

    def get_interface(self, name: str, default: Any) -> Any:
        return self.get(name, default)


def autolrp() -> dict[str, float]:
    """An MLP without biases. It splits additions, means and products by magnitude, where the epsilon rule splits by value,
    and hands the share of a bias on to the inputs: transformers and biased networks cannot agree."""
    import autolrp as peer

    model, x = mlp(bias=False).double(), torch.randn(1, 6).double()
    wrapped = peer.tensor(x)
    model(wrapped)[0, 1].lrp(config=peer.LRPConfig(rule=peer.BASE))
    # Its relevance of the score is 1.
    ours = lrp.attribute(model, x, 1, details=True)
    return {"MLP": difference(ours.relevance / ours.score, wrapped.relevance.double())}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(globals()[sys.argv[1]]()))
