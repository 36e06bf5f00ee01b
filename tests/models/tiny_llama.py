"""The demo's real, tiny Llama as tests want it: the bare model and a sentence of its book, or a skip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from xai_fast.demo.models import tiny_llama
from xai_fast.demo.models.dinov2 import WeightsUnavailable

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SENTENCE = "Alice was beginning to get very tired of sitting by her"


def _load(attn_implementation: str) -> tiny_llama.TinyLlama:
    try:
        return tiny_llama.load_tiny_llama(attn_implementation)
    except (ImportError, WeightsUnavailable) as error:
        pytest.skip(str(error))


def sentence() -> Tensor:
    """The ids of `SENTENCE`, shape (1, N)."""
    return torch.tensor([_load("sdpa").tokenizer.encode(SENTENCE)])


def load_tiny_llama(attn_implementation: str = "sdpa") -> LlamaForCausalLM:
    """LlamaForCausalLM in evaluation mode."""
    return _load(attn_implementation).model.llama
