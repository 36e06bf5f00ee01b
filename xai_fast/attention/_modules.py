"""Capture from torch.nn's own attention modules without changing what they compute.

nn.MultiheadAttention, nn.TransformerEncoderLayer and nn.TransformerEncoder leave their fused path as soon as
a torch function mode is active, which changes the last bits of their output. So while a capture is active
each of them gets a wrapper around `forward` that runs it with the mode taken off the stack, and notes its
inputs and weights instead. Modules inside them that torch.nn does not know are run with the mode back in
place.

Norms, embeddings and the like have nothing to tell, but torch takes 10 us to offer one of their calls to a mode. So
torch.nn's modules for them run with the mode taken off too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ._layers import (
    CapturedLayer,
    Kept,
    LazyProjection,
    Projection,
    QueryKeyLayer,
    Term,
    keep,
    keep_copy,
    keep_owned,
)

__all__ = ["ModuleWrappers", "Session", "carries_gradient", "record_attention_forward"]

# Modules in which no attention begins, whose functions torch offers to a mode in Python. Subclasses may do anything.
_PLAIN = frozenset({nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding, nn.Dropout, nn.ReLU, nn.SiLU})

# wrapper(module, original, args, kwargs) -> what the original returned
Wrapper = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Session(Protocol):
    """What the wrappers need of the active capture."""

    pad_to: int | None

    def suspended(self) -> AbstractContextManager[None]:
        """Run without the function mode."""

    def resumed(self) -> AbstractContextManager[None]:
        """Run with the function mode again."""

    def aside(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the forward of a plain module without the function mode, if nothing in it can matter."""

    def begin_pass(self) -> None: ...

    def end_pass(self) -> None: ...

    def listens(self) -> bool:
        """Whether this thread is the one that captures."""

    def emit(self, build: Callable[[str], CapturedLayer], module: nn.Module | None = None) -> CapturedLayer | None: ...


def carries_gradient(args: Any, kwargs: Any, module: nn.Module | None = None) -> bool:
    """Whether a call records a graph. torch.nn's modules then leave their fused path, and may run with the mode in place."""
    if not torch.is_grad_enabled():
        return False
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    parameters = [] if module is None else module.parameters()
    return any(x.requires_grad for x in (*tensors, *parameters))


class _Aside:
    """The forward of a plain module while it is captured. A copy of the module has its class' own."""

    def __init__(self, session: Session, module: nn.Module) -> None:
        self._session, self._module, self._forward = session, module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.aside(self._forward, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "forward")


class ModuleWrappers:
    """Wrappers on the attention modules of a model; `remove` takes every one of them away again.

    A module whose `forward` is torch.nn's own gets an instance attribute. A subclass with its own `forward`
    reaches torch.nn's through ``super()``; for the time of the capture a class is spliced in between, in its
    method resolution order.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module], session: Session) -> None:
        self._model = model
        self._modules = modules
        self._session = session
        self._wrapped: list[tuple[nn.Module, str, Any]] = []
        self._spliced: list[tuple[nn.Module, type[nn.Module]]] = []
        # Counts calls of a self-attention, to tell whether an encoder layer used it or took its fused path.
        self._attention_calls = 0

    def install(self) -> None:
        bases = self._bases()
        for module in self._modules:
            for base, wrapper in bases:
                if isinstance(module, base):
                    if type(module).forward is base.forward:
                        self._wrap(module, "forward", wrapper)
                    else:
                        self._splice(module, base, wrapper)
            if type(module) in _PLAIN and module is not self._model and "forward" not in module.__dict__:
                self._wrapped.append((module, "forward", None))
                module.forward = _Aside(self._session, module)
        for module, name in self._unknown_parts():
            self._wrap(module, name, self._unknown)

    def begins_passes(self) -> bool:
        """Whether the model itself is wrapped, and the start of a forward pass is seen here."""
        return self._covers(self._model)

    def remove(self) -> None:
        while self._wrapped:
            module, name, previous = self._wrapped.pop()
            if previous is None:
                delattr(module, name)
            else:
                setattr(module, name, previous)
        while self._spliced:
            module, original = self._spliced.pop()
            module.__class__ = original

    def _bases(self) -> list[tuple[type[nn.Module], Wrapper]]:
        return [
            (nn.MultiheadAttention, self._attention),
            (nn.TransformerEncoderLayer, self._encoder_layer),
            (nn.TransformerEncoder, self._encoder),
        ]

    def _covers(self, module: nn.Module) -> bool:
        return any(wrapped is module and name == "forward" for wrapped, name, _ in self._wrapped)

    def _unknown_parts(self) -> list[tuple[nn.Module, str]]:
        """What torch.nn's modules call that is not torch.nn's own."""
        parts: list[tuple[nn.Module, str]] = []
        known = [module for module, *_ in (*self._wrapped, *self._spliced)]
        for module in known:
            if isinstance(module, nn.TransformerEncoder):
                parts += [(layer, "forward") for layer in module.layers if not self._covers(layer)]
            elif isinstance(module, nn.TransformerEncoderLayer):
                if not self._covers(module.self_attn):
                    parts.append((module.self_attn, "forward"))
                if type(module)._sa_block is not nn.TransformerEncoderLayer._sa_block:
                    parts.append((module, "_sa_block"))
        if any(module is self._model for module, _ in self._spliced):
            parts.append((self._model, "forward"))
        return parts

    def _wrap(self, module: nn.Module, name: str, wrapper: Wrapper) -> None:
        if any(wrapped is module and other == name for wrapped, other, _ in self._wrapped):
            return
        previous = module.__dict__.get(name)
        original = getattr(module, name)
        is_root = module is self._model and name == "forward"

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self._session.listens():
                return original(*args, **kwargs)
            if not is_root:
                return wrapper(module, original, args, kwargs)
            self._session.begin_pass()
            try:
                return wrapper(module, original, args, kwargs)
            finally:
                self._session.end_pass()

        self._wrapped.append((module, name, previous))
        setattr(module, name, wrapped)

    def _splice(self, module: nn.Module, base: type[nn.Module], wrapper: Wrapper) -> None:
        session = self._session

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            original = super(between, self).forward  # type: ignore[misc]
            if not session.listens():
                return original(*args, **kwargs)
            return wrapper(self, original, args, kwargs)

        between: Any = type(base.__name__, (base,), {"forward": forward})
        own = type(module)
        self._spliced.append((module, own))
        module.__class__ = type(own.__name__, (own, between), {"__module__": own.__module__})

    def _attention(self, module: nn.MultiheadAttention, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._attention_calls += 1
        if carries_gradient(args, kwargs, module):
            return original(*args, **kwargs)
        with self._session.suspended():
            out = original(*args, **kwargs)
        arguments = _attention_arguments(*args, **kwargs)
        self._session.emit(lambda name: _attention_layer(name, module, self._session.pad_to, *arguments), module)
        return out

    def _encoder_layer(
        self, module: nn.TransformerEncoderLayer, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if carries_gradient(args, kwargs, module):
            return original(*args, **kwargs)
        calls = self._attention_calls
        with self._session.suspended():
            out = original(*args, **kwargs)
        if self._attention_calls == calls:
            arguments = _encoder_layer_arguments(*args, **kwargs)
            self._session.emit(lambda name: _fused_encoder_layer(name, module, self._session.pad_to, *arguments), module)
        return out

    def _encoder(self, module: nn.TransformerEncoder, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if carries_gradient(args, kwargs, module):
            return original(*args, **kwargs)
        source = args[0] if args else kwargs["src"]
        outer = self._session.pad_to
        # The encoder may turn padded sequences into nested ones; its layers then do not know the padded
        # length.
        self._session.pad_to = None if source.is_nested or source.ndim != 3 else source.shape[1]
        try:
            with self._session.suspended():
                return original(*args, **kwargs)
        finally:
            self._session.pad_to = outer

    def _unknown(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._attention_calls += 1
        with self._session.resumed():
            return original(*args, **kwargs)


def _attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """What counts of the arguments of nn.MultiheadAttention.forward."""
    # Without weights to return and without padding, the mask is only a hint and the fused function's own is
    # used.
    hinted = is_causal and key_padding_mask is None and not need_weights
    return query, key, None if hinted else attn_mask, key_padding_mask, hinted


def _encoder_layer_arguments(
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return src, src_mask, src_key_padding_mask


def _attention_layer(
    name: str,
    module: nn.MultiheadAttention,
    pad_to: int | None,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> QueryKeyLayer:
    extra = _extra_keys(module.bias_k, module.add_zero_attn)
    return _projected_layer(
        name,
        query,
        key,
        _module_weights(module),
        num_heads=module.num_heads,
        batch_first=module.batch_first,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        extra_keys=extra,
        pad_to=pad_to,
    )


def _fused_encoder_layer(
    name: str,
    module: nn.TransformerEncoderLayer,
    pad_to: int | None,
    source: Tensor,
    src_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> QueryKeyLayer:
    """The fused path of an encoder layer, which reads the weights of self_attn and never calls it."""
    norm = module.norm1 if module.norm_first else None
    return _projected_layer(
        name,
        source,
        source,
        _module_weights(module.self_attn),
        num_heads=module.self_attn.num_heads,
        batch_first=True,
        attn_mask=src_mask,
        key_padding_mask=key_padding_mask,
        # This path takes any non-zero entry of a floating mask for "masked".
        floating="remove",
        norm=None if norm is None else (_maybe(norm.weight), _maybe(norm.bias), norm.eps),
        pad_to=pad_to,
    )


def record_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Callable[[str], QueryKeyLayer]:
    """What a call of F.multi_head_attention_forward with these arguments leaves to record."""
    hinted = is_causal and key_padding_mask is None and not need_weights
    separate = (q_proj_weight, k_proj_weight) if use_separate_proj_weight else None
    return lambda name: _projected_layer(
        name,
        query,
        key,
        _projection_weights(in_proj_weight, in_proj_bias, separate, query.shape[-1]),
        num_heads=num_heads,
        batch_first=False,
        attn_mask=None if hinted else attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=hinted,
        extra_keys=_extra_keys(bias_k, add_zero_attn),
        static_key=static_k,
    )


Weights = tuple[Kept, Kept | None, Kept, Kept | None]


def _module_weights(module: nn.MultiheadAttention) -> Weights:
    separate = None if module._qkv_same_embed_dim else (module.q_proj_weight, module.k_proj_weight)
    return _projection_weights(module.in_proj_weight, module.in_proj_bias, separate, module.embed_dim)


def _projection_weights(packed: Tensor | None, bias: Tensor | None, separate: tuple[Any, Any] | None, width: int) -> Weights:
    """Weight and bias of the query's and of the key's projection, as views of the parameters."""
    query_rows, key_rows = slice(0, width), slice(width, 2 * width)
    if separate is not None:
        weights = separate
    else:
        assert packed is not None
        weights = packed.detach()[query_rows], packed.detach()[key_rows]
    biases = [None if bias is None else keep(bias.detach()[rows]) for rows in (query_rows, key_rows)]
    return keep(weights[0]), biases[0], keep(weights[1]), biases[1]


def _maybe(tensor: Tensor | None) -> Kept | None:
    return None if tensor is None else keep(tensor)


def _extra_keys(bias_k: Tensor | None, add_zero_attn: bool) -> tuple[Kept | None, ...]:
    keys: tuple[Kept | None, ...] = () if bias_k is None else (keep(bias_k),)
    return (*keys, None) if add_zero_attn else keys


def _projected_layer(
    name: str,
    query: Tensor,
    key: Tensor,
    weights: Weights,
    *,
    num_heads: int,
    batch_first: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool = False,
    floating: str = "add",
    norm: tuple[Kept | None, Kept | None, float] | None = None,
    extra_keys: tuple[Kept | None, ...] = (),
    static_key: Tensor | None = None,
    pad_to: int | None = None,
) -> QueryKeyLayer:
    # Inputs are copied: a residual connection often adds to them in place right after the attention.
    kept_query = keep_copy(query)
    kept_key = kept_query if key is query else keep_copy(key)
    projection_query = Projection(kept_query, weights[0], weights[1])
    projection_key = Projection(kept_key, weights[2], weights[3])
    if static_key is not None:
        projection_key = Projection(keep_owned(static_key), None, None)

    batch, queries, keys, lengths = _sizes(query, key, batch_first, pad_to)
    if static_key is not None:
        keys = static_key.shape[1]
    terms = _mask_terms(attn_mask, key_padding_mask, batch, num_heads, len(extra_keys), floating)
    if lengths is not None:
        inside = torch.arange(keys, device=query.device) < lengths[:, None]
        terms = (*terms, Term("keep", keep(inside[:, None, None, :])))
    return QueryKeyLayer(
        name,
        "module",
        LazyProjection(
            projection_query,
            projection_key,
            num_heads,
            batch_first,
            norm=norm,
            pad_to=queries,
            extra_keys=extra_keys,
        ),
        lead=(batch, num_heads),
        queries=queries,
        keys=keys + len(extra_keys),
        is_causal=is_causal,
        terms=terms,
    )


def _sizes(query: Tensor, key: Tensor, batch_first: bool, pad_to: int | None) -> tuple[int, int, int, Tensor | None]:
    """Batch, number of queries and of keys, and for nested sequences their lengths."""
    if query.is_nested:
        lengths = torch.tensor([len(sequence) for sequence in query.unbind()], device=query.device)
        longest = pad_to or int(lengths.max())
        return len(lengths), longest, longest, lengths
    if query.ndim == 2:
        return 1, query.shape[0], key.shape[0], None
    tokens = 1 if batch_first else 0
    return query.shape[1 - tokens], query.shape[tokens], key.shape[tokens], None


def _mask_terms(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    num_heads: int,
    extra_keys: int,
    floating: str,
) -> tuple[Term, ...]:
    """torch.nn's masks (True = do not attend, or a number to add), brought to (B, H, Nq, Nk)."""
    terms = []
    if attn_mask is not None:
        mask = attn_mask.detach()
        terms.append(mask.reshape(batch, num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask)
    if key_padding_mask is not None:
        terms.append(key_padding_mask.detach().reshape(batch, 1, 1, -1))
    if extra_keys:
        terms = [nn.functional.pad(mask, (0, extra_keys)) for mask in terms]
    return tuple(Term("remove" if mask.dtype == torch.bool else floating, keep(mask)) for mask in terms)
