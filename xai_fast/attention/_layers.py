"""What a capture keeps of one attention layer, and how its probabilities are rebuilt from it.

A model may write attention over any leading dimensions: (B, H, N, d), heads folded in the batch (B*H, N, d),
grouped heads (B, Hkv, G, N, d) or none at all. The tensors are kept as the model made them, with ``lead``,
the leading dimensions of the scores; they are brought to (B, H, N, d) only when somebody asks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._dtypes import accumulate_dtype

if TYPE_CHECKING:
    from ._gradients import Tap

__all__ = [
    "LAST",
    "CannotKeepError",
    "CapturedLayer",
    "Kept",
    "LazyProjection",
    "LostLayer",
    "Place",
    "ProbabilityLayer",
    "Projection",
    "QueryKeyLayer",
    "Term",
    "keep",
    "keep_copy",
    "keep_owned",
]


# The dimensions of queries and of keys, counted from the end.
Place = tuple[int, int]
LAST: Place = (-2, -1)


class Kept:
    """A tensor held by reference, with the version that tells whether somebody wrote to it since.

    The reference is detached: it shares the storage and the version counter, and keeps no graph alive.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach() if tensor.requires_grad else tensor
        # Tensors made in inference mode have no version counter.
        self.version = None if self.tensor.is_inference() else self.tensor._version

    def intact(self) -> bool:
        return self.version is None or self.tensor._version == self.version

    def get(self, what: str) -> Tensor:
        """Return the tensor, or raise if it no longer holds the values of the forward pass."""
        if not self.intact():
            raise RuntimeError(
                f"{what} was changed in place after the forward pass was captured; "
                "ask for the rollout before the change, or run the forward pass again"
            )
        return self.tensor

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the tensor counts its versions anew.
        return _kept_again, (self.tensor, self.intact())


def _kept_again(tensor: Tensor, intact: bool) -> Kept:
    kept = Kept(tensor)
    if not intact:
        kept.version = -1
    return kept


class CannotKeepError(Exception):
    """A tensor cannot outlive the forward pass; the message says what it is."""


def keep(tensor: Tensor) -> Kept:
    """Hold a mask or a weight: always by reference, so that a broadcast view stays a view."""
    return Kept(tensor)


def keep_copy(tensor: Tensor) -> Kept:
    """Hold an input that may be written to right after the attention."""
    return Kept(_lasting(tensor).clone())


def keep_owned(tensor: Tensor) -> Kept:
    """Hold a query or a key: by reference if its storage holds nothing else, otherwise as a copy.

    A view of a packed projection would keep the value alive too. A tensor of inference mode is copied because
    a later change to it could not be noticed.
    """
    tensor = _lasting(tensor)
    if tensor.is_nested:
        raise CannotKeepError("nested tensors")
    shared = tensor.untyped_storage().nbytes() > tensor.nbytes
    return Kept(tensor.clone() if shared or tensor.is_inference() else tensor)


def _lasting(tensor: Tensor) -> Tensor:
    """The detached tensor, unless it exists only inside a transformation of torch.func."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise CannotKeepError("tensors of torch.func")
    return tensor.detach() if tensor.requires_grad else tensor


class Term(NamedTuple):
    """One thing that was done to the scores between query @ key^T and the softmax.

    kind "keep": a key is attended where the boolean mask is True; "remove": where the mask, of any dtype, is zero; "add":
    `factor` times the tensor is added.
    """

    kind: str
    kept: Kept
    factor: float = 1.0


class CapturedLayer:
    """One attention call of a captured forward pass.

    Attributes
    ----------
    index : int
        Position in the pass.
    name : str
        Path of the innermost module that was running, "" if it is not known.
    kind : str
        How the model computed it: "sdpa", "matmul" (scores and softmax written out), "module"
        (nn.MultiheadAttention and what is built on it) or "probabilities" (what multiplies the value, where that is
        not the softmax of scale * query @ key^T + mask).
    shape : tuple of int
        (B, H, Nq, Nk).
    """

    kind = ""

    def __init__(self, name: str, lead: tuple[int, ...], queries: int, keys: int, num_heads: int | None) -> None:
        self.index = -1
        self.name = name
        self.tap: Tap | None = None
        self._lead = lead
        self._size = queries, keys
        self._num_heads = num_heads

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*_batch_and_heads(self._lead, self._num_heads), *self._size)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the model computed the attention."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer keeps alive."""
        raise NotImplementedError

    def probabilities(self) -> Tensor:
        """Attention probabilities (B, H, Nq, Nk), built anew on every call."""
        raise NotImplementedError

    def advance(self, rows: Tensor, *, head_fusion: str, residual: float, normalize: bool) -> Tensor:
        """rows (B, R, N) times norm(residual I + fuse_h A), without building A if that can be avoided."""
        raise NotImplementedError

    def as_batch_heads(self, tensor: Tensor, *, grouped: bool = False) -> Tensor:
        """A tensor with the leading dimensions of the scores as (B, H, ., .); heads that are shared stay so if `grouped`."""
        batch, heads = self.shape[:2]
        found = _as_batch_heads(tensor, self._lead, batch, heads, grouped=grouped)
        return found.expand(batch, found.shape[1] if grouped else heads, -1, -1)

    def describe(self) -> str:
        """Name for error messages."""
        return f"layer {self.index}" + (f" ({self.name})" if self.name else "")

    def check(self) -> None:
        """Refuse a layer that cannot be used, here for heads that do not divide the folded dimension."""
        if len(self._lead) == 1 and self._num_heads and self._lead[0] % self._num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of the {self._lead[0]} matrices of {self.describe()}, got {self._num_heads}"
            )

    def _details(self) -> str:
        return ""

    def __getstate__(self) -> dict[str, Any]:
        # The graph of the forward pass cannot be copied.
        return {**self.__dict__, "tap": None}

    def __repr__(self) -> str:
        batch, heads, queries, keys = self.shape
        size = f"batch={batch}, heads={heads}, queries={queries}, keys={keys}"
        name = f"{self.name!r}, " if self.name else ""
        return f"CapturedLayer({self.index}, {name}{self.kind}, {size}{self._details()})"


class QueryKeyLayer(CapturedLayer):
    """Attention kept as its query and key: softmax(scale * query @ key^T + mask)."""

    def __init__(
        self,
        name: str,
        kind: str,
        source: tuple[Kept, Kept] | LazyProjection,
        *,
        lead: tuple[int, ...],
        queries: int,
        keys: int,
        scale: float | None = None,
        is_causal: bool = False,
        terms: tuple[Term, ...] = (),
        num_heads: int | None = None,
    ) -> None:
        super().__init__(name, lead, queries, keys, num_heads)
        self.kind = kind
        self.scale = scale
        self.is_causal = is_causal
        self._source = source
        self._terms = terms

    @property
    def dtype(self) -> torch.dtype:
        source = self._source
        return source.dtype if isinstance(source, LazyProjection) else source[0].tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def tensors(self) -> list[Tensor]:
        source = self._source
        held = source.tensors() if isinstance(source, LazyProjection) else [kept.tensor for kept in source]
        return held + [term.kept.tensor for term in self._terms]

    def query_key(self) -> tuple[Tensor, Tensor]:
        """Query (B, H, Nq, d) and key (B, Hkv, Nk, d), Hkv dividing H."""
        self.check()
        if isinstance(self._source, LazyProjection):
            # From here on the layer holds q and k instead of the input and the weights they come from.
            query, key = self._source.project(self.describe())
            self._source = (keep(query), keep(key))
        kept_query, kept_key = self._source
        query = kept_query.get(f"the query of {self.describe()}")
        key = kept_key.get(f"the key of {self.describe()}")
        return self.as_batch_heads(query), self.as_batch_heads(key, grouped=True)

    def attn_mask(self) -> Tensor | None:
        """The mask as F.scaled_dot_product_attention takes it, broadcastable to (B, H, Nq, Nk)."""
        what = f"the mask of {self.describe()}"
        batch, heads = self.shape[:2]
        allowed: Tensor | None = None
        adds: list[tuple[Tensor, float]] = []
        for term in self._terms:
            tensor = _as_batch_heads(term.kept.get(what), self._lead, batch, heads)
            if term.kind == "add":
                adds.append((tensor, term.factor))
                continue
            kept = tensor if term.kind == "keep" else tensor == 0
            allowed = kept if allowed is None else allowed & kept
        if not adds:
            return allowed
        bias = _sum_terms(adds, accumulate_dtype(self.dtype))
        return bias if allowed is None else torch.where(allowed, bias, -math.inf)

    def probabilities(self) -> Tensor:
        query, key = self.query_key()
        return ops.attention_probabilities(
            query, key, scale=self.scale, is_causal=self.is_causal, attn_mask=self.attn_mask()
        )

    def advance(self, rows: Tensor, *, head_fusion: str, residual: float, normalize: bool) -> Tensor:
        query, key = self.query_key()
        return ops.rollout_rows_qk(
            query,
            key,
            rows.to(query.device),
            scale=self.scale,
            is_causal=self.is_causal,
            attn_mask=self.attn_mask(),
            residual=residual,
            normalize=normalize,
            head_fusion=head_fusion,
        )

    def _details(self) -> str:
        mask = "+".join(_MASK_NAMES[term.kind] for term in self._terms) or "none"
        scale = "default" if self.scale is None else f"{self.scale:.4g}"
        return f", mask={mask}, scale={scale}, causal={self.is_causal}"


_MASK_NAMES = {"keep": "bool", "remove": "bool", "add": "additive"}


class ProbabilityLayer(CapturedLayer):
    """Attention kept as the matrix that multiplies the value, where that is not softmax(scale * query @ key^T + mask).

    Queries and keys may be in other dimensions than the last, `place`.
    """

    kind = "probabilities"

    def __init__(self, name: str, probabilities: Kept, num_heads: int | None, place: Place = LAST) -> None:
        probabilities = Kept(_lasting(probabilities.tensor))
        shape = tuple(probabilities.tensor.movedim(place, LAST).shape)
        super().__init__(name, shape[:-2], shape[-2], shape[-1], num_heads)
        self._kept = probabilities
        self._place = place

    @property
    def dtype(self) -> torch.dtype:
        return self._kept.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self._kept.tensor.device

    def tensors(self) -> list[Tensor]:
        return [self._kept.tensor]

    def probabilities(self) -> Tensor:
        self.check()
        kept = self._kept.get(f"the probabilities of {self.describe()}")
        return self.as_batch_heads(kept)

    def as_batch_heads(self, tensor: Tensor, *, grouped: bool = False) -> Tensor:
        return super().as_batch_heads(tensor.movedim(self._place, LAST), grouped=grouped)

    def advance(self, rows: Tensor, *, head_fusion: str, residual: float, normalize: bool) -> Tensor:
        attention = self.probabilities()
        return ops.rollout_rows(
            attention,
            rows.to(attention.device),
            head_fusion=head_fusion,
            residual=residual,
            normalize=normalize,
        )


class LostLayer(CapturedLayer):
    """Attention that was seen but whose tensors do not outlive the forward pass."""

    kind = "lost"

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, (), 0, 0, None)
        self._what = what

    def tensors(self) -> list[Tensor]:
        return []

    def check(self) -> None:
        raise ValueError(
            f"{self.describe()} computes attention on {self._what}, which cannot be kept; "
            "run the model on plain tensors, or leave the layer out with layers="
        )

    def probabilities(self) -> Tensor:
        self.check()
        raise AssertionError

    def _details(self) -> str:
        return f", {self._what}"


class Projection(NamedTuple):
    """One input of a torch.nn attention module with its weight (E, E_in) and bias (E,), all by reference or
    owned.

    Without a weight the input is the projected key itself, (B * H, N, d).
    """

    input: Kept
    weight: Kept | None
    bias: Kept | None


class LazyProjection:
    """Query and key of a torch.nn attention module, as its inputs and its projection weights.

    q = norm(x) W_q^T + b_q of shape (B, N, E), split into (B, H, N, d); k likewise. Computed by `project`,
    not before.

    Parameters
    ----------
    query, key : Projection
        Inputs (B, N, E) with `batch_first`, (N, B, E) without, (N, E) for one sample, or nested (B, *, E).
    num_heads : int
    batch_first : bool
    norm : (Kept or None, Kept or None, float), optional
        Weight, bias and eps of a layer norm in front of the projections.
    pad_to : int, optional
        Length to which nested inputs are padded with zeros.
    extra_keys : tuple of (Kept or None)
        Keys appended after the projection: of shape (1, 1, E), None for zeros.
    """

    def __init__(
        self,
        query: Projection,
        key: Projection,
        num_heads: int,
        batch_first: bool,
        *,
        norm: tuple[Kept | None, Kept | None, float] | None = None,
        pad_to: int | None = None,
        extra_keys: tuple[Kept | None, ...] = (),
    ) -> None:
        self._query, self._key = query, key
        self._num_heads, self._batch_first = num_heads, batch_first
        self._norm, self._pad_to, self._extra_keys = norm, pad_to, extra_keys
        device = query.input.tensor.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        self._autocast = torch.get_autocast_dtype(device) if autocast else None

    @property
    def dtype(self) -> torch.dtype:
        return self._autocast or self._query.input.tensor.dtype

    def tensors(self) -> list[Tensor]:
        """The inputs; the weights are the model's own."""
        query, key = self._query.input.tensor, self._key.input.tensor
        return [query] if key is query else [query, key]

    def project(self, layer: str) -> tuple[Tensor, Tensor]:
        """Query and key, both (B, H, N, d)."""
        query = self._projected(self._query, f"the {{}} of {layer}")
        if self._key.weight is None:
            key = self._key.input.get(f"the key of {layer}")
            key = key.reshape(query.shape[0], self._num_heads, *key.shape[1:])
        else:
            key = self._projected(self._key, f"the {{}} of {layer}")
        for extra in self._extra_keys:
            key = torch.cat([key, self._extra(extra, key, layer)], dim=2)
        return query, key

    def _projected(self, projection: Projection, what: str) -> Tensor:
        x = projection.input.get(what.format("input"))
        if x.is_nested:
            assert self._pad_to is not None
            x = x.to_padded_tensor(0.0, (x.size(0), self._pad_to, x.size(2)))
        if self._norm is not None:
            norm_weight, norm_bias, eps = self._norm
            name = what.format("norm")
            x = F.layer_norm(x, x.shape[-1:], _get(norm_weight, name), _get(norm_bias, name), eps)
        name = what.format("projection weight")
        assert projection.weight is not None
        weight, bias = projection.weight.get(name), _get(projection.bias, name)
        if self._autocast is None:
            x = F.linear(x, weight, bias)
        else:
            with torch.autocast(x.device.type, dtype=self._autocast):
                x = F.linear(x, weight, bias)
        if x.ndim == 2:
            x = x.unsqueeze(0)
        elif not self._batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self._num_heads, -1)).transpose(1, 2)

    def _extra(self, extra: Kept | None, key: Tensor, layer: str) -> Tensor:
        batch, heads, _, width = key.shape
        if extra is None:
            return key.new_zeros(batch, heads, 1, width)
        row = extra.get(f"bias_k of {layer}").to(key.dtype)
        return row.reshape(1, heads, 1, width).expand(batch, -1, -1, -1)


def _get(kept: Kept | None, what: str) -> Tensor | None:
    return None if kept is None else kept.get(what)


def _batch_and_heads(lead: tuple[int, ...], num_heads: int | None) -> tuple[int, int]:
    """(B, H) from the leading dimensions of the scores: dimension 0 is the batch, the rest are heads."""
    if len(lead) == 1 and num_heads and lead[0] % num_heads == 0:
        return lead[0] // num_heads, num_heads
    return (lead[0] if lead else 1), math.prod(lead[1:])


def _as_batch_heads(tensor: Tensor, lead: tuple[int, ...], batch: int, heads: int, *, grouped: bool = False) -> Tensor:
    """Bring a tensor whose leading dimensions broadcast to `lead` to 4-D, (B or 1, H or 1, ., .).

    With `grouped`, heads shared by a group of queries stay as they are, (B, Hkv, N, d).
    """
    if tensor.ndim < 2:
        tensor = tensor.reshape((1,) * (2 - tensor.ndim) + tensor.shape)
    last = tuple(tensor.shape[-2:])
    own = (1,) * (len(lead) + 2 - tensor.ndim) + tuple(tensor.shape[:-2])
    if math.prod(own) == 1:
        return tensor.reshape(1, 1, *last)
    if len(lead) < 2:
        return tensor.reshape(batch, heads, *last)
    inner = own[1:]
    if math.prod(inner) != 1 and not (grouped and _is_grouped(inner, lead[1:])):
        inner = lead[1:]
    tensor = tensor.reshape(own + last).expand(own[:1] + inner + last)
    return tensor.reshape(own[0], math.prod(inner), *last)


def _is_grouped(inner: tuple[int, ...], heads: tuple[int, ...]) -> bool:
    """Whether consecutive query heads share a key head: (Hkv,) for (H,), or (Hkv, 1) for (Hkv, G)."""
    if len(inner) == 1:
        return True
    pairs = list(zip(inner, heads, strict=True))
    while pairs and pairs[0][0] == pairs[0][1]:
        pairs.pop(0)
    return all(own == 1 for own, _ in pairs)


def _sum_terms(adds: list[tuple[Tensor, float]], dtype: torch.dtype) -> Tensor:
    """Sum of factor * tensor, the tensor itself if there is nothing to compute."""
    if len(adds) == 1 and adds[0][1] == 1.0:
        return adds[0][0]
    terms = [factor * tensor.to(dtype) for tensor, factor in adds]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
