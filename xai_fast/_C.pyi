from torch import Tensor

torch_version: str
cuda_archs: str
build_flags: str

def callable_directly(args: tuple[object, ...]) -> bool: ...
def is_usual_streamed(query: object, key: object, rows: object) -> bool: ...
def cpu_capability() -> str: ...
def rollout_rows(attention: Tensor, rows: Tensor, head_fusion: str, residual: float, normalize: bool) -> Tensor: ...
def fuse_heads(attention: Tensor, head_fusion: str, residual: float, normalize: bool) -> Tensor: ...
def rollout_rows_qk(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    is_causal: bool,
    head_fusion: str,
    residual: float,
    normalize: bool,
) -> Tensor: ...
