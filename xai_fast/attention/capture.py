"""Capture the attention of a model while it runs, whatever its attention is made of.

A torch function mode sees every call of `F.scaled_dot_product_attention` and follows attention that is
written out as matrix products and a softmax; torch.nn's own attention modules are wrapped. Nothing the model
computes is changed, and what is kept per layer is its query and its key: the attention matrices are never
built unless they are asked for.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._dtypes import accumulate_dtype
from ..ops import _checks as check
from ..ops.rollout import MANY_ROWS
from ._layers import CannotKeepError, CapturedLayer, LostLayer, QueryKeyLayer, Term, keep, keep_owned
from ._modules import ModuleWrappers, record_attention_forward
from ._scores import FOLLOWERS, STARTERS, Handler, ScoreTracker
from .rollout import (
    Token,
    check_discard_ratio,
    check_start_layer,
    finish,
    layer_matrix,
    start_rows,
    token_indices,
)

__all__ = ["AttentionCapture", "AttentionRecord", "capture_attention"]

Layers = slice | Sequence[int] | None


class AttentionRecord:
    """What was captured: one list of layers per forward pass of the model.

    Made by :func:`capture_attention`. It can be used inside the context, after a forward pass, and after it.
    """

    def __init__(self, keep_all: bool) -> None:
        self._keep_all = keep_all
        self._passes: list[list[CapturedLayer]] = []

    @property
    def passes(self) -> tuple[tuple[CapturedLayer, ...], ...]:
        """The layers of every kept forward pass, oldest first."""
        return tuple(tuple(layers) for layers in self._passes)

    @property
    def layers(self) -> tuple[CapturedLayer, ...]:
        """The layers of the last forward pass, in the order in which they ran."""
        return tuple(self._passes[-1]) if self._passes else ()

    def __repr__(self) -> str:
        lines = [f"AttentionRecord(passes={len(self._passes)}, layers of the last pass:"]
        return "\n  ".join([*lines, *(repr(layer) for layer in self.layers)]) + ")"

    def attentions(self, *, layers: Layers = None, forward: int = -1) -> tuple[Tensor, ...]:
        """Attention probabilities of each layer, built now: softmax(scale * q k^T + mask).

        Parameters
        ----------
        layers : slice or sequence of int, optional
            Which layers, in this order; all by default.
        forward : int
            Which forward pass, see :func:`capture_attention`'s `keep`.

        Returns
        -------
        tuple of Tensor
            One (B, H, Nq, Nk) per layer, before dropout, in the dtype of the queries. A query that may not attend any
            key has a row of zeros. Cross-attention and decoding with a cache are included here, with Nq != Nk.

        Raises
        ------
        ValueError
            No attention was seen; a layer or forward pass out of range.
        RuntimeError
            A weight or an input that the capture refers to was changed in place since the forward pass.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
        >>> with xf.capture_attention(layer) as record:
        ...     out = layer(torch.zeros(1, 3, 8))
        >>> record.attentions()[0].shape
        torch.Size([1, 2, 3, 3])
        """
        chosen = self._chosen(layers, forward)
        for layer in chosen:
            layer.check()
        with _plain_torch(chosen):
            return tuple(layer.probabilities() for layer in chosen)

    def rollout(
        self,
        token: Token = 0,
        *,
        head_fusion: str = "mean",
        residual: float = 1.0,
        normalize: bool = True,
        discard_ratio: float = 0.0,
        start_layer: int = 0,
        layers: Layers = None,
        forward: int = -1,
        check_nan: bool = True,
    ) -> Tensor:
        """Attention rollout of the captured layers, streamed from query and key.

        .. math:: C = \\bar A^{(L)} \\cdots \\bar A^{(1)},
                  \\qquad \\bar A = \\mathrm{norm}(w I + \\mathrm{fuse}_h A_h)

        A few tokens need O(N) memory per layer and no attention matrix. All tokens (None), many of them, or a
        `discard_ratio` build the matrices of one layer at a time.

        Parameters
        ----------
        token, head_fusion, residual, normalize, discard_ratio, check_nan
            As in :func:`xai_fast.attention_rollout`.
        start_layer : int
            First layer of the product, counted among the chosen `layers`.
        layers : slice or sequence of int, optional
            Layers that take part, such as ``slice(6)`` for the encoder of an encoder-decoder model; all by
            default.
        forward : int
            Which forward pass, see :func:`capture_attention`'s `keep`.

        Returns
        -------
        Tensor
            (B, N) for one token, (B, T, N) for several, (B, N, N) for None; dtype of the model's attention.
            Rows of padded queries are what the model computed for them, under nested sequences what a zero input gives.

        Raises
        ------
        ValueError
            No attention was seen; layers that differ in shape or have Nq != Nk (named, with the remedy); NaN
            (names the layer); an argument out of range.
        RuntimeError
            A weight or an input that the capture refers to was changed in place since the forward pass.

        Notes
        -----
        Source: Abnar & Zuidema (2020), "Quantifying Attention Flow in Transformers", section 3. Dropout on
        the probabilities in training mode is not part of it.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
        >>> with xf.capture_attention(layer) as record:
        ...     out = layer(torch.zeros(1, 3, 8))
        >>> record.rollout(token=0)
        tensor([[0.6667, 0.1667, 0.1667]])
        """
        chosen = self._chosen(layers, forward)
        batch, tokens = _common_shape(chosen)
        indices = token_indices(token, tokens)
        start_layer = check_start_layer(start_layer, len(chosen))
        discard_ratio = check_discard_ratio(discard_ratio)
        check.check_head_fusion(head_fusion)
        options = {
            "head_fusion": head_fusion,
            "residual": check.check_residual(residual),
            "normalize": bool(normalize),
        }

        wanted = chosen[start_layer:]
        with _plain_torch(wanted):
            if discard_ratio > 0 or indices is None or len(indices) >= MANY_ROWS:
                rows = _roll_matrices(wanted, indices, batch, tokens, discard_ratio, options)
            else:
                rows = _roll_rows(wanted, indices, batch, tokens, options)
            if check_nan and bool(rows.isnan().any()):
                _raise_nan(wanted)
        return finish(rows, token, wanted[-1].dtype)

    def _chosen(self, layers: Layers, forward: int) -> list[CapturedLayer]:
        if isinstance(forward, bool) or not isinstance(forward, int):
            raise TypeError(f"forward: expected an int, got {type(forward).__name__}")
        if not self._passes or not any(self._passes):
            raise ValueError(
                "no attention was captured: looked for F.scaled_dot_product_attention, softmax(q k^T) and "
                "nn.MultiheadAttention; was the model run inside the context, and with torch's own attention "
                "(flash_attention_2, flex_attention and torch.jit hide it)?"
            )
        count = len(self._passes)
        if not -count <= forward < count:
            raise ValueError(
                f"forward: expected a forward pass in [{-count}, {count}), got {forward} "
                "(capture_attention(keep='all') keeps all)"
            )
        found = self._passes[forward]
        if not found:
            raise ValueError(f"no attention was captured in forward pass {forward % count} of {count}")
        return _select(found, layers)


def _select(found: list[CapturedLayer], layers: Layers) -> list[CapturedLayer]:
    if layers is None:
        return list(found)
    if isinstance(layers, slice):
        chosen = found[layers]
    elif isinstance(layers, Iterable) and not isinstance(layers, (str, bytes)):
        chosen = []
        for index in layers:
            if isinstance(index, bool) or not hasattr(index, "__index__"):
                raise TypeError(f"layers: expected a slice or a sequence of ints, got an entry {index!r}")
            if not -len(found) <= int(index) < len(found):
                raise ValueError(f"layers: expected indices in [{-len(found)}, {len(found)}), got {int(index)}")
            chosen.append(found[int(index)])
    else:
        raise TypeError(f"layers: expected a slice or a sequence of ints, got {type(layers).__name__}")
    if not chosen:
        raise ValueError(f"layers: expected at least one of the {len(found)} captured layers, got {layers!r}")
    return chosen


def _common_shape(layers: list[CapturedLayer]) -> tuple[int, int]:
    """(B, N) of layers that can be multiplied with each other."""
    for layer in layers:
        layer.check()
        batch, _, queries, keys = layer.shape
        wanted = next((other for other in layers if other.shape[2] == other.shape[3]), layer)
        if queries != keys:
            problem = f"{queries} queries and {keys} keys (cross-attention, or decoding with a cache)"
        elif (batch, queries) != (wanted.shape[0], wanted.shape[2]):
            problem = f"batch {batch} and {queries} tokens"
            problem += f", {wanted.describe()} {wanted.shape[0]} and {wanted.shape[2]}"
        else:
            continue
        raise ValueError(
            f"layers: expected self-attention layers of one shape, but {layer.describe()} has {problem}; {_remedy(layers)}"
        )
    return layers[0].shape[0], layers[0].shape[2]


def _remedy(layers: list[CapturedLayer]) -> str:
    """The largest group of layers that do fit together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for layer in layers:
        if layer.shape[2] == layer.shape[3]:
            groups.setdefault((layer.shape[0], layer.shape[2]), []).append(layer.index)
    if not groups:
        return "run the whole sequence in one forward pass without a cache (use_cache=False)"
    return f"choose some that fit, such as layers={max(groups.values(), key=len)}"


def _roll_rows(layers: list[CapturedLayer], indices: list[int], batch: int, tokens: int, options: dict[str, Any]) -> Tensor:
    rows = _start(layers, indices, batch, tokens)
    for layer in reversed(layers):
        rows = layer.advance(rows.to(layer.device, accumulate_dtype(layer.dtype)), **options)
    return rows


def _roll_matrices(
    layers: list[CapturedLayer],
    indices: list[int] | None,
    batch: int,
    tokens: int,
    discard_ratio: float,
    options: dict[str, Any],
) -> Tensor:
    """The same with the matrices built, one layer at a time; from the right end for all tokens."""
    rows = None if indices is None else _start(layers, indices, batch, tokens)
    for layer in reversed(layers):
        matrix = layer_matrix(layer.probabilities(), discard_ratio=discard_ratio, **options)
        matrix = matrix.to(accumulate_dtype(layer.dtype))
        rows = matrix if rows is None else torch.bmm(rows.to(matrix), matrix)
    assert rows is not None
    return rows


def _start(layers: list[CapturedLayer], indices: list[int], batch: int, tokens: int) -> Tensor:
    like = torch.empty(0, dtype=layers[-1].dtype, device=layers[-1].device)
    return start_rows(indices, batch, tokens, like).contiguous()


def _raise_nan(layers: list[CapturedLayer]) -> None:
    """Name the first layer whose kept tensors hold NaN: it reaches every later one."""
    for layer in layers:
        if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in layer.tensors()):
            raise ValueError(f"the rollout is NaN: {layer.describe()} has NaN inputs (check_nan=False lets it pass)")
    raise ValueError("the rollout is NaN though no layer has NaN inputs; they may hold inf (check_nan=False lets it pass)")


@contextmanager
def _plain_torch(layers: list[CapturedLayer]) -> Iterator[None]:
    """Compute outside of the caller's gradients, autocast and function modes, our own among them."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        for device in {layer.device.type for layer in layers}:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _CaptureMode(TorchFunctionMode):
    """Calls every function with unchanged arguments, and tells the handlers of those that matter."""

    def __init__(self, tracker: ScoreTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self._notes = tracker.notes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # This runs for every function of the forward pass: one look-up, and the call.
        handler = (_ALL_HANDLERS if self._notes else _FIRST_HANDLERS).get(func)
        if handler is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if kwargs and "out" in kwargs:
            self._tracker.forget(kwargs["out"])
            return func(*args, **kwargs)
        return handler(self._tracker, func, args, kwargs or {})


def _fused_attention(
    tracker: ScoreTracker, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    out = func(*args, **kwargs)
    _record_fused(tracker, *args, **kwargs)
    return out


def _record_fused(
    tracker: ScoreTracker,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """A call of F.scaled_dot_product_attention."""
    lead = tuple(query.shape[:-2])
    if not enable_gqa and key.shape[:-2] != lead:
        lead = tuple(torch.broadcast_shapes(lead, key.shape[:-2]))
    terms: tuple[Term, ...] = ()
    if attn_mask is not None:
        terms = (Term("keep" if attn_mask.dtype == torch.bool else "add", keep(attn_mask), 1.0),)
    tracker.emit(
        lambda name: QueryKeyLayer(
            name,
            "sdpa",
            (keep_owned(query), keep_owned(key)),
            lead=lead,
            queries=query.shape[-2],
            keys=key.shape[-2],
            scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
            is_causal=is_causal,
            terms=terms,
            num_heads=tracker.num_heads,
        )
    )


def _attention_forward(
    tracker: ScoreTracker, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    out = func(*args, **kwargs)
    tracker.emit(record_attention_forward(*args, **kwargs))
    return out


_FIRST_HANDLERS: dict[Callable[..., Any], Handler] = {
    **STARTERS,
    F.scaled_dot_product_attention: _fused_attention,
    F.multi_head_attention_forward: _attention_forward,
}
_ALL_HANDLERS: dict[Callable[..., Any], Handler] = {**FOLLOWERS, **_FIRST_HANDLERS}


class _Session:
    """One activation of the context: the mode, the wrappers and the record that they fill."""

    def __init__(self, model: nn.Module, keep_all: bool, num_heads: int | None) -> None:
        self.record = AttentionRecord(keep_all)
        self.tracker = ScoreTracker(self.emit, num_heads)
        self.pad_to: int | None = None
        self._model = model
        # Walking the modules takes most of the time of entering the context: once is enough.
        named = list(model.named_modules())
        self._names = {id(module): name for name, module in named}
        # Code that was met on the call stack by its id (its hash reads all of it), and whether it is a method of others.
        self._methods: dict[int, tuple[CodeType, bool]] = {}
        self._thread = threading.get_ident()
        self._mode = _CaptureMode(self.tracker)
        self._is_suspended = False
        self._wrappers = ModuleWrappers(model, [module for _, module in named], self)
        self._hooks: list[Any] = []
        self._stance: Any = None
        # How many calls of the model are running.
        self._depth = 0

    def start(self) -> None:
        try:
            self._wrappers.install()
            # A hook on one of torch.nn's modules would switch off its fused path; there the wrapper does
            # this.
            if not self._wrappers.begins_passes():
                self._hooks = [
                    self._model.register_forward_pre_hook(lambda *_: self.begin_pass()),
                    self._model.register_forward_hook(lambda *_: self.end_pass(), always_call=True),
                ]
            self._stance = _uncompiled()
        except BaseException:
            self._detach()
            raise
        self._mode.__enter__()

    def stop(self) -> None:
        self._mode.__exit__(None, None, None)
        self._detach()
        self.tracker.clear()

    def _detach(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        self._wrappers.remove()

    def listens(self) -> bool:
        return threading.get_ident() == self._thread

    def begin_pass(self) -> None:
        if not self.listens():
            return
        self._depth += 1
        self.tracker.clear()
        passes = self.record._passes
        if not self.record._keep_all:
            passes.clear()
        passes.append([])

    def end_pass(self) -> None:
        if self.listens():
            self._depth = max(self._depth - 1, 0)

    def emit(self, build: Callable[[str], CapturedLayer], module: nn.Module | None = None) -> None:
        # Gradient checkpointing runs the forward pass again during backward.
        if torch._C._current_graph_task_id() != -1:
            return
        name = self._names[id(module)] if module is not None else self._running_module()
        if name is None:
            # Attention of something else, unless the model calls it from where no module can be seen.
            if self._depth == 0:
                return
            name = ""
        passes = self.record._passes
        if not passes:
            passes.append([])
        layer: CapturedLayer
        try:
            layer = build(name)
        except CannotKeepError as reason:
            layer = LostLayer(name, str(reason))
        layer.index = len(passes[-1])
        passes[-1].append(layer)

    def _running_module(self) -> str | None:
        """Path of the innermost module of the model on the call stack, None if there is none."""
        frame = sys._getframe(1).f_back
        while frame is not None:
            code = frame.f_code
            known = self._methods.get(id(code))
            if known is None:
                known = self._methods[id(code)] = code, _is_method_of_others(frame)
            if known[1]:
                name = self._names.get(id(frame.f_locals.get("self")))
                if name is not None:
                    return name
            frame = frame.f_back
        return None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take the mode off the stack, below whatever the caller has put on top of it."""
        # Off the stack already: in another wrapper, or under a function that this mode passed on, such as
        # backward().
        if not _is_on_stack(self._mode):
            yield
            return
        above = _pop_until(self._mode)
        _push(above)
        self._is_suspended = True
        try:
            yield
        finally:
            self._is_suspended = False
            for _ in above:
                torch._C._pop_torch_function_stack()
            _push([self._mode, *above])

    @contextmanager
    def resumed(self) -> Iterator[None]:
        if not self._is_suspended:
            yield
            return
        self._is_suspended = False
        _push([self._mode])
        try:
            yield
        finally:
            torch._C._pop_torch_function_stack()
            self._is_suspended = True


def _is_method_of_others(frame: FrameType) -> bool:
    """Reading the variables of a frame takes a copy of them, so it is done only where it may help."""
    return frame.f_code.co_varnames[:1] == ("self",) and frame.f_globals.get("__package__") != __package__


def _uncompiled() -> Any:
    """Have compiled modules run as they were written: a compiler cannot trace through our function mode."""
    # Nothing can be compiled where the compiler was never imported, which takes a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None


def _is_on_stack(mode: TorchFunctionMode) -> bool:
    return any(torch._C._get_function_stack_at(i) is mode for i in range(torch._C._len_torch_function_stack()))


def _pop_until(mode: TorchFunctionMode) -> list[Any]:
    """Pop the stack of function modes down to and with `mode`; the modes above it, lowest first."""
    above: list[Any] = []
    while (top := torch._C._pop_torch_function_stack()) is not mode:
        above.insert(0, top)
    return above


def _push(modes: list[Any]) -> None:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


class AttentionCapture:
    """The context manager of :func:`capture_attention`; every `with` gives a new record."""

    def __init__(self, model: nn.Module, keep_all: bool, num_heads: int | None) -> None:
        self._model = model
        self._keep_all = keep_all
        self._num_heads = num_heads
        self._sessions: list[_Session] = []

    def __enter__(self) -> AttentionRecord:
        session = _Session(self._model, self._keep_all, self._num_heads)
        session.start()
        self._sessions.append(session)
        return session.record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sessions.pop().stop()


def capture_attention(
    model: nn.Module, *, keep: Literal["last", "all"] = "last", num_heads: int | None = None
) -> AttentionCapture:
    """Capture the attention of a model as it is, while it runs inside a ``with`` block.

    .. math:: A = \\mathrm{softmax}(s\\, Q K^\\top + M)

    Fused attention needs no eager fallback: Q, K, the scale s and the mask M are kept, never A. The model's
    outputs are bit-identical with and without capture, and nothing stays attached to the model afterwards.
    Understood are ``F.scaled_dot_product_attention``, ``nn.MultiheadAttention``, ``nn.TransformerEncoder``
    and its layers (fused path included), ``F.multi_head_attention_forward``, and attention that is written
    out: scores q k^T by matmul, bmm, baddbmm or einsum, scaled, with additive masks or biases, masked_fill or
    where, then softmax. Scores of any other kind (tanh soft-capping) are kept as probabilities, O(N^2) for
    that layer. A softmax over a 2-D tensor is never attention.

    Parameters
    ----------
    model : nn.Module
        Hugging Face, timm, torch.nn or your own. A forward pass begins when this module is called.
    keep : {"last", "all"}
        Keep the last forward pass only (memory does not grow in a loop), or all of them, chosen by
        ``forward=``.
    num_heads : int, optional
        For attention over 3-D tensors: how many heads are folded in the leading dimension (B * H). By default
        1, so that every leading index counts as a batch entry.

    Returns
    -------
    context manager
        Gives an :class:`AttentionRecord` with ``rollout``, ``attentions``, ``layers`` and ``passes``. Entered
        again, it gives a new record.

    Raises
    ------
    TypeError
        `model` is no nn.Module; num_heads is no int.
    ValueError
        An unknown `keep`; num_heads below 1.

    Notes
    -----
    Memory per layer: query and key in the model's dtype, Hkv key heads if the model passes them so; copied
    only if they are views of something larger. For torch.nn modules the input is kept, and q and k are
    computed when first needed. Probabilities are those before dropout. Masks are kept by reference. A model
    under ``torch.compile`` runs uncompiled while it is captured, and its output is that of the uncompiled
    model.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
    >>> with xf.capture_attention(model) as record:
    ...     out = model(torch.zeros(1, 3, 8))
    >>> record.rollout(token=0)
    tensor([[0.6667, 0.1667, 0.1667]])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if keep not in ("last", "all"):
        raise ValueError(f"keep: expected 'last' or 'all', got {keep!r}")
    if num_heads is not None:
        if isinstance(num_heads, bool) or not isinstance(num_heads, int):
            raise TypeError(f"num_heads: expected an int or None, got {type(num_heads).__name__}")
        if num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    return AttentionCapture(model, keep == "all", num_heads)
