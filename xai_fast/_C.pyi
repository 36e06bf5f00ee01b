from torch import Tensor

torch_version: str
cuda_archs: str
build_flags: str

def callable_directly(args: tuple[object, ...]) -> bool: ...
def is_usual_streamed(query: object, key: object, rows: object) -> bool: ...
def cpu_capability() -> str: ...
def release_workspace() -> None: ...
def rollout_rows(attention: Tensor, rows: Tensor, head_fusion: str, residual: float, normalize: bool) -> Tensor: ...
def has_row_product(attention: Tensor) -> bool: ...
def row_product(layers: list[Tensor], rows: Tensor | None, head_fusion: str, residual: float, normalize: bool) -> Tensor: ...
def fuse_heads(attention: Tensor, head_fusion: str, residual: float, normalize: bool, wide: bool) -> Tensor: ...
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
def av_relevance(attention: Tensor, value: Tensor, relevance: Tensor, lam: float, eps: float) -> tuple[Tensor, Tensor]: ...
def attention_relevance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
    output: Tensor | None,
    attn_mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    lam: float,
    eps: float,
    gradient_form: bool,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def targeted_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    rows: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    relevance_out: Tensor | None,
    output: Tensor | None,
    scale: float | None,
    is_causal: bool,
    head_fusion: str,
    clamp: bool,
    residual: float,
    normalize: bool,
    lam: float,
    eps: float,
) -> Tensor: ...
def softmax_relevance(logits: Tensor, probs: Tensor, relevance: Tensor) -> Tensor: ...
def skip_relevance(x: Tensor, y: Tensor, relevance: Tensor, rule: str, eps: float) -> tuple[Tensor, Tensor]: ...
def norm_relevance(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    upstream: Tensor,
    norm_eps: float,
    eps: float,
    rms: bool,
    detach_mean: bool,
    gradient_form: bool,
) -> Tensor: ...
def stabilized_gradient(grad: Tensor, y: Tensor, eps: float) -> Tensor: ...
def identity_gradient(grad: Tensor, x: Tensor, y: Tensor, at_zero: float) -> Tensor: ...
def linear_relevance(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor,
    rule: str,
    eps: float,
    gamma: float,
    alpha: float,
    beta: float,
) -> Tensor: ...
def glm_hvp(
    X: Tensor,
    vectors: Tensor,
    theta: Tensor | None,
    weights: Tensor | None,
    y: Tensor | None,
    sample_weight: Tensor | None,
    batch: Tensor | None,
    family: str,
    intercept: bool,
    smoothing: float,
    l2: float,
    damping: float,
) -> Tensor: ...
def glm_hvp_route(
    X: Tensor,
    vectors: Tensor,
    theta: Tensor | None,
    weights: Tensor | None,
    y: Tensor | None,
    sample_weight: Tensor | None,
    batch: Tensor | None,
    family: str,
    intercept: bool,
    smoothing: float,
    l2: float,
    damping: float,
    route: str,
) -> Tensor: ...
def lissa(
    X: Tensor,
    gradient: Tensor,
    weights: Tensor,
    sample_weight: Tensor | None,
    start: Tensor,
    family: str,
    intercept: bool,
    l2: float,
    damping: float,
    sigma: float,
    batch_size: int,
    first_step: int,
    steps: int,
    skip: int,
    seed: int,
) -> tuple[Tensor, Tensor]: ...
def sample_rows(like: Tensor, rows: int, count: int, seed: int, step: int) -> Tensor: ...
def influence_scores(X: Tensor, delta: Tensor, solutions: Tensor, rows: Tensor | None, intercept: bool) -> Tensor: ...
def influence_top_k(
    X: Tensor, delta: Tensor, solutions: Tensor, rows: Tensor | None, intercept: bool, k: int, largest: bool
) -> tuple[Tensor, Tensor]: ...
def random_projection(x: Tensor, outputs: int, seed: int, offset: int) -> Tensor: ...
def rank_features(scores: Tensor) -> Tensor: ...
def replace_ranked(
    x: Tensor, baseline: Tensor, ranks: Tensor, sample: Tensor, first: Tensor, last: Tensor, ranking: Tensor | None = None
) -> Tensor: ...
def perturb(x: Tensor, sample: Tensor, draw: Tensor, ball: str, radius: float, seed: int, first_sample: int) -> Tensor: ...
def map_distances(maps: Tensor, centre: Tensor, sample: Tensor, norm: str) -> Tensor: ...
def conciseness(maps: Tensor, threshold: float, gini: bool) -> Tensor: ...
def row_norms(x: Tensor) -> Tensor: ...
