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

import copyreg
import functools
import threading
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
# entry(original, *args, **kwargs) -> what the original returned
Entry = Callable[..., Any]

# Modules are patched and restored by one thread at a time.
_LOCK = threading.RLock()


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


class _Patch:
    """What a method of a module goes through while it is captured; all sessions, of all threads, share it.

    The last session to leave takes it away, in whatever order they leave.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        # Replaced as a whole: another thread may be in the middle of a call.
        self.entries: tuple[Entry, ...] = ()

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for entry in self.entries:
            original = functools.partial(entry, original)
        return original(*args, **kwargs)

    def remove(self, entry: Entry) -> None:
        with _LOCK:
            self.entries = tuple(other for other in self.entries if other is not entry)
            if not self.entries:
                self._restore()
                _copy_as_before(self._module)

    def _restore(self) -> None:
        raise NotImplementedError


class _Attribute(_Patch):
    """In the instance, in front of the class' own method or of one that the user has set."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.previous = module.__dict__.get(name)
        self._original = getattr(module, name)
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self._original, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # For modules that have their own way of being copied.
        return getattr, (self._module, self._name)

    def _restore(self) -> None:
        # What somebody else has put on top calls the original through this.
        if self._module.__dict__.get(self._name) is not self:
            return
        if self.previous is None:
            del self._module.__dict__[self._name]
        else:
            self._module.__dict__[self._name] = self.previous


class _Splice(_Patch):
    """In a class between a subclass of the user's and the class of torch.nn that its forward reaches through ``super()``."""

    def __init__(self, module: nn.Module, base: type[nn.Module]) -> None:
        super().__init__(module, "forward")
        self.own = own = type(module)

        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            original = super(between, this).forward  # type: ignore[misc]
            return self.run(original, args, kwargs)

        between: Any = type(base.__name__, (base,), {"forward": forward})
        self.base, self._class = base, type(own.__name__, (own, between), {"__module__": own.__module__, "_splice": self})
        module.__class__ = self._class

    def _restore(self) -> None:
        if type(self._module) is self._class:
            self._module.__class__ = self.own


def _splice_of(module: nn.Module) -> _Splice | None:
    found = type(module).__dict__.get("_splice")
    return found if isinstance(found, _Splice) else None


def _own_class(module: nn.Module) -> type[nn.Module]:
    splice = _splice_of(module)
    return type(module) if splice is None else splice.own


def _copy_clean(module: nn.Module) -> None:
    """Let copies and pickles of a patched module be those of the module without patches."""
    module.__dict__.setdefault("__reduce_ex__", functools.partial(_reduce, module))


def _copy_as_before(module: nn.Module) -> None:
    if _splice_of(module) is None and not any(isinstance(value, _Attribute) for value in module.__dict__.values()):
        module.__dict__.pop("__reduce_ex__", None)


def _reduce(module: nn.Module, protocol: int) -> Any:
    reduced = type(module).__reduce_ex__(module, protocol)
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    own, state = _own_class(module), {}
    for name, value in reduced[2].items():
        if isinstance(value, _Attribute):
            value = value.previous
            if value is None:
                continue
        if name != "__reduce_ex__":
            state[name] = value
    made_by = tuple(own if part is type(module) else part for part in reduced[1])
    # pickle wants copyreg's constructor to make the class that the object has.
    make = object.__new__ if reduced[0] is copyreg.__newobj__ else reduced[0]  # type: ignore[attr-defined]
    return make, made_by, state, *reduced[3:]


class ModuleWrappers:
    """Wrappers on the attention modules of a model; `remove` takes every one of them away again.

    A module whose `forward` is torch.nn's own gets an instance attribute. A subclass with its own `forward`
    reaches torch.nn's through ``super()``; for the time of the capture a class is spliced in between, in its
    method resolution order. The forward of the model itself begins and ends the passes.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module], session: Session) -> None:
        self._model = model
        self._modules = modules
        self._session = session
        self._wrapped: list[tuple[nn.Module, str]] = []
        self._spliced: list[nn.Module] = []
        self._entries: list[tuple[_Patch, Entry]] = []
        # Counts calls of a self-attention, to tell whether an encoder layer used it or took its fused path.
        self._attention_calls = 0

    def install(self) -> None:
        with _LOCK:
            bases = self._bases()
            for module in self._modules:
                own = _own_class(module)
                for base, wrapper in bases:
                    if isinstance(module, base):
                        if own.forward is base.forward:
                            self._wrap(module, "forward", wrapper)
                        else:
                            self._splice(module, base, wrapper)
                if own in _PLAIN and module is not self._model and _has_own_forward(module):
                    self._enter(_attribute(module, "forward"), functools.partial(_aside, self._session))
            for module, name in self._unknown_parts():
                self._wrap(module, name, self._unknown)
            if not self._covers(self._model):
                self._wrap(self._model, "forward", _pass_through)

    def remove(self) -> None:
        while self._entries:
            patch, entry = self._entries.pop()
            patch.remove(entry)

    def _bases(self) -> list[tuple[type[nn.Module], Wrapper]]:
        return [
            (nn.MultiheadAttention, self._attention),
            (nn.TransformerEncoderLayer, self._encoder_layer),
            (nn.TransformerEncoder, self._encoder),
        ]

    def _covers(self, module: nn.Module) -> bool:
        return any(wrapped is module and name == "forward" for wrapped, name in self._wrapped)

    def _unknown_parts(self) -> list[tuple[nn.Module, str]]:
        """What torch.nn's modules call that is not torch.nn's own."""
        parts: list[tuple[nn.Module, str]] = []
        known = [*(module for module, _ in self._wrapped), *self._spliced]
        for module in known:
            if isinstance(module, nn.TransformerEncoder):
                parts += [(layer, "forward") for layer in module.layers if not self._covers(layer)]
            elif isinstance(module, nn.TransformerEncoderLayer):
                if not self._covers(module.self_attn):
                    parts.append((module.self_attn, "forward"))
                if type(module)._sa_block is not nn.TransformerEncoderLayer._sa_block:
                    parts.append((module, "_sa_block"))
        if any(module is self._model for module in self._spliced):
            parts.append((self._model, "forward"))
        return parts

    def _enter(self, patch: _Patch, entry: Entry) -> None:
        _copy_clean(patch._module)
        patch.entries = (*patch.entries, entry)
        self._entries.append((patch, entry))

    def _wrap(self, module: nn.Module, name: str, wrapper: Wrapper) -> None:
        if any(wrapped is module and other == name for wrapped, other in self._wrapped):
            return
        session = self._session
        is_root = module is self._model and name == "forward"

        def entry(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not session.listens():
                return original(*args, **kwargs)
            if not is_root:
                return wrapper(module, original, args, kwargs)
            session.begin_pass()
            try:
                return wrapper(module, original, args, kwargs)
            finally:
                session.end_pass()

        self._wrapped.append((module, name))
        patch = _attribute(module, name)
        # Callers look at the signature of forward.
        functools.update_wrapper(patch, patch._original, updated=())
        self._enter(patch, entry)

    def _splice(self, module: nn.Module, base: type[nn.Module], wrapper: Wrapper) -> None:
        session = self._session

        def entry(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return wrapper(module, original, args, kwargs) if session.listens() else original(*args, **kwargs)

        self._spliced.append(module)
        self._enter(_splice_of(module) or _Splice(module, base), entry)

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


def _attribute(module: nn.Module, name: str) -> _Attribute:
    """The patch of this method, new or that of another session."""
    found = module.__dict__.get(name)
    return found if isinstance(found, _Attribute) else _Attribute(module, name)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the forward of a module is that of its class, patched or not."""
    forward = module.__dict__.get("forward")
    return forward is None or (isinstance(forward, _Attribute) and forward.previous is None)


def _aside(session: Session, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return session.aside(original, *args, **kwargs)


def _pass_through(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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
