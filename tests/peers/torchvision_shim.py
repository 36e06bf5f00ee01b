"""Let torchvision's wheel be imported under a CPU-only torch.

The wheel's own library needs CUDA and does not load, and torchvision then fails while it describes two
operators that this library would have defined. Import this module first: it declares them. The operators
themselves stay unusable.
"""

from __future__ import annotations

import torch

if not torch.cuda.is_available():
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
