"""Small models for the tests of LRP: networks written here, and tiny Hugging Face ones whose biases are not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attention.models import HUGGING_FACE, TEXT


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 10, bias=bias), nn.GELU(), nn.Linear(10, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias)
    ).eval()


class PlainCNN(nn.Module):
    """Convolution, batch norm, ReLU, pooling, a residual block and a linear layer, as in torchvision's networks."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.block = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        )
        self.join = join
        self.last_relu, self.average, self.head = nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Linear(24, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.0, 1.0)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.first(x))))
        x = self.last_relu(self.join(self.block(x), x))
        return self.head(self.average(x).flatten(1))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Transformer(nn.Module):
    """Two pre-norm blocks; the operations can be given, to build the same model on another library."""

    def __init__(self, width: int = 8, heads: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width, bias=bias),
                    "packed": nn.Linear(width, 3 * width, bias=bias),
                    "out": nn.Linear(width, width, bias=bias),
                    "norm2": nn.LayerNorm(width, bias=bias),
                    "up": nn.Linear(width, 2 * width, bias=bias),
                    "down": nn.Linear(2 * width, width, bias=bias),
                }
            )
            for _ in range(2)
        )
        randomize(self)

    def forward(
        self,
        x: Tensor,
        linear: Callable[..., Tensor] = lambda h, m: m(h),
        attention: Callable[..., Tensor] = _attention,
        norm: Callable[..., Tensor] = lambda h, m: m(h),
        add: Callable[..., Tensor] = torch.add,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> Tensor:
        for block in self.blocks:
            packed = linear(norm(x, block["norm1"]), block["packed"])
            q, k, v = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = add(x, linear(attention(q, k, v).transpose(1, 2).flatten(2), block["out"]))
            hidden = activation(linear(norm(x, block["norm2"]), block["up"]))
            x = add(x, linear(hidden, block["down"]))
        return x


def randomize(model: nn.Module) -> None:
    """Weights of a size that makes attention sharp and biases count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.2
            offset = 1.0 if "norm" in name.lower() and name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))


def bert(attn_implementation: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor]]:
    """A classifier for three padded sentences."""
    import transformers as t

    config = t.BertConfig(**TEXT, num_labels=3, attn_implementation=attn_implementation)
    model = t.BertForSequenceClassification(config).eval()
    randomize(model)
    return model, HUGGING_FACE["bert"](attn_implementation)[1]


def llama(attn_implementation: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor]]:
    """A language model, two query heads per key head."""
    import transformers as t

    config = t.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation=attn_implementation)
    model = t.LlamaForCausalLM(config).eval()
    randomize(model)
    return model, {"input_ids": torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(2))}


def vision(name: str, attn_implementation: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor]]:
    """The "dinov2" or "vit" of the tests of attention, with its class token as features."""
    model, inputs = HUGGING_FACE[name](attn_implementation)
    randomize(model)
    return FirstToken(model.eval()), inputs


class FirstToken(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).last_hidden_state[:, 0]
