"""capture_attention and plain modules of torch.nn (norms, dropout, ...), which run without its mode."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import xai_fast as xf
from tests.attention.capture_checks import CLOSE, captured, leaves_nothing
from xai_fast.attention.capture import _CaptureMode


class Plain(nn.Module):
    """A plain module in front of attention, or inside attention that is written out."""

    def __init__(self, module: nn.Module, inside: bool) -> None:
        super().__init__()
        self.module, self.inside = module, inside

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            x = self.module(x)
            return F.scaled_dot_product_attention(x, x, x)
        return self.module(x @ x.mT).softmax(-1) @ x


class Seen(TorchFunctionMode):
    """Remembers the functions that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that the mode of a capture is asked about."""
    functions: list[Any] = []
    own = _CaptureMode.__torch_function__

    def watched(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        functions.append(func)
        return own(self, func, types, args, kwargs)

    monkeypatch.setattr(_CaptureMode, "__torch_function__", watched)
    return functions


@pytest.mark.parametrize("gradients", [False, True])
def test_plain_modules_pass_by_the_mode(asked: list[Any], gradients: bool) -> None:
    model = Plain(nn.LayerNorm(8), inside=False).eval()
    with torch.set_grad_enabled(gradients), Seen() as below:
        record = captured(model, torch.randn(1, 2, 5, 8))
    assert [layer.kind for layer in record.layers] == ["sdpa"]
    assert F.scaled_dot_product_attention in asked
    assert F.layer_norm not in asked
    # Other modes see what they would have seen: here the two calls of `captured`.
    assert below.functions.count(F.layer_norm) == 2


def test_plain_modules_below_other_modes(asked: list[Any]) -> None:
    """A mode on top of ours stays there, also if there is none of ours in this thread."""
    model, x = Plain(nn.LayerNorm(8), inside=False), torch.randn(1, 2, 5, 8)
    counts: list[int] = []

    def run_below_another() -> None:
        with Seen() as above:
            model(x)
        counts.append(above.functions.count(F.layer_norm))

    with xf.capture_attention(model):
        run_below_another()
        assert asked.count(F.layer_norm) == 1
        thread = threading.Thread(target=run_below_another)
        thread.start()
        thread.join()
    assert counts == [1, 1]
    assert asked.count(F.layer_norm) == 1


def test_plain_modules_hand_notes_on(asked: list[Any]) -> None:
    """Without scores around, dropout passes by; between scores and softmax it must not."""
    outside, inside = (Plain(nn.Dropout(0.5), inside).eval() for inside in (False, True))
    x = torch.randn(1, 2, 5, 8)
    captured(outside, x)
    assert F.dropout not in asked
    record = captured(inside, x)
    assert F.dropout in asked
    assert [layer.kind for layer in record.layers] == ["matmul"]
    torch.testing.assert_close(record.attentions()[0], (x @ x.mT).softmax(-1), **CLOSE)


def test_plain_modules_that_are_not_plain(asked: list[Any]) -> None:
    """Subclasses and a forward of the user's own may hold attention; a plain module may be the model itself."""

    class Attentive(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 5, 8)
    patched = Plain(nn.LayerNorm(8), inside=False)
    patched.module.forward = lambda x: F.scaled_dot_product_attention(x, x, x)
    for model in (Plain(Attentive(8), inside=False), patched):
        record = captured(model, x)
        assert [layer.name for layer in record.layers] == ["module", ""]
    assert captured(nn.LayerNorm(8), x).passes == ((),)
    assert F.layer_norm in asked


def test_plain_modules_that_raise() -> None:
    model = Plain(nn.LayerNorm(8), inside=False)
    with leaves_nothing(model), xf.capture_attention(model) as record:
        with pytest.raises(RuntimeError, match="normalized_shape"):
            model(torch.randn(1, 2, 5, 7))
        assert torch._C._len_torch_function_stack() == 1
        model(torch.randn(1, 2, 5, 8))
    assert len(record.layers) == 1


def test_copies_of_plain_modules_are_their_own(asked: list[Any]) -> None:
    model, x = Plain(nn.LayerNorm(8), inside=False), torch.randn(1, 2, 5, 8)
    with xf.capture_attention(model):
        model(x)
        other = copy.deepcopy(model)
        nn.init.constant_(other.module.weight, 2)
        asked.clear()
        torch.testing.assert_close(other.module(x), 2 * model.module(x))
        assert asked.count(F.layer_norm) == 1
