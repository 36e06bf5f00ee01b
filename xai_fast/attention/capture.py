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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._interception import opened, uncompiled
from ..lrp._mode import RelevanceMode
from ..lrp.composite import Composite, as_composite
from ..ops import _checks as check
from ._gradients import OutputTap
from ._layers import CannotKeepError, CapturedLayer, LostLayer, QueryKeyLayer, Term, keep, keep_owned
from ._modules import ModuleWrappers, carries_gradient, record_attention_forward
from ._notes import ScoreTracker
from ._passing import PASSING
from ._scores import FOLLOWERS, STARTERS, Handler
from .record import AttentionRecord

__all__ = ["AttentionCapture", "AttentionRecord", "capture_attention"]


class _CaptureMode(TorchFunctionMode):
    """Calls every function with unchanged arguments, and tells the handlers of those that matter."""

    def __init__(self, tracker: ScoreTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self._notes = tracker.notes
        tracker.mode = self

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
    _record_fused(tracker, out, *args, **kwargs)
    return out


def _record_fused(
    tracker: ScoreTracker,
    out: Tensor,
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
    layer = tracker.emit(
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
    if layer is not None and out.requires_grad:
        layer.tap = OutputTap(value, out, tracker.relevance_pass)


def _attention_forward(
    tracker: ScoreTracker, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    if carries_gradient(args, kwargs):
        # Its own attention is then seen, with its graph; it may fold the heads into the batch.
        with tracker.mode, tracker.folding(args[4] if len(args) > 4 else kwargs["num_heads"]):
            return opened(func)(*args, **kwargs)
    out = func(*args, **kwargs)
    tracker.emit(record_attention_forward(*args, **kwargs))
    return out


_FIRST_HANDLERS: dict[Callable[..., Any], Handler] = {
    **STARTERS,
    F.scaled_dot_product_attention: _fused_attention,
    F.multi_head_attention_forward: _attention_forward,
}
_ALL_HANDLERS: dict[Callable[..., Any], Handler] = {**PASSING, **FOLLOWERS, **_FIRST_HANDLERS}


class _Session:
    """One activation of the context: the mode, the wrappers and the record that they fill."""

    def __init__(self, model: nn.Module, keep_all: bool, num_heads: int | None, composite: Composite) -> None:
        self.record = AttentionRecord(keep_all)
        self.tracker = ScoreTracker(self.emit, num_heads)
        self.tracker.running = self._where
        self.pad_to: int | None = None
        self._model = model
        # Walking the modules takes most of the time of entering the context: once is enough.
        named = list(model.named_modules())
        self._names = {id(module): name for name, module in named}
        # Code that was met on the call stack by its id (its hash reads all of it), and whether it is a method of others.
        self._methods: dict[int, tuple[CodeType, bool]] = {}
        self._thread = threading.get_ident()
        self._mode = _CaptureMode(self.tracker)
        # Modes of this session on the stack, lowest first: the rules of relevance during a forward pass with gradients.
        self._modes: list[TorchFunctionMode] = [self._mode]
        self._modules = [module for _, module in named]
        self._composite = composite
        self._is_suspended = False
        self._wrappers = ModuleWrappers(model, self._modules, self)
        self._stance: Any = None
        self._is_over = False
        # How many calls of the model are running.
        self._depth = 0

    def start(self) -> None:
        try:
            self._wrappers.install()
            stance = uncompiled()
            stance.__enter__()
            self._stance = stance
        except BaseException:
            self._detach()
            raise
        self._mode.__enter__()

    def stop(self) -> None:
        try:
            problem = self._leave_stack()
        finally:
            self._detach()
        if problem:
            raise RuntimeError(f"capture_attention: {problem}; this capture has ended, its record stays as it is")
        self._warn_of_missing()

    def _leave_stack(self) -> str:
        """Take the modes off the stack of function modes, and return what was wrong with it."""
        if threading.get_ident() != self._thread:
            return "expected the thread that entered the context to leave it, got another one"
        if not all(map(_is_on_stack, self._modes)):
            return "expected its function mode to be active when the context is left, but it was taken off"
        above = _pop_all(self._modes)
        _push(above)
        if above:
            return "expected contexts to be left in the opposite order of entering them, but a later one is still active"
        return ""

    def _detach(self) -> None:
        self._is_over = True
        self._wrappers.remove()
        self.tracker.clear()
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)

    def listens(self) -> bool:
        return threading.get_ident() == self._thread and not self._is_over

    def begin_pass(self) -> None:
        if not self.listens():
            return
        self._depth += 1
        self.tracker.clear()
        passes = self.record._passes
        if not self.record._keep_all:
            passes.clear()
        passes.append([])
        is_plain = torch.is_grad_enabled() and not any(module.training for module in self._modules)
        if self._depth == 1 and is_plain and not _is_transformed():
            self._weave_rules()

    def end_pass(self) -> None:
        if not self.listens():
            return
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0 and len(self._modes) > 1:
            self._set_modes([self._mode])
            self.tracker.relevance_pass = None
        if self._depth == 0:
            self._warn_of_missing()

    def _warn_of_missing(self) -> None:
        missing = self.tracker.take_missing()
        # A pass that has failed has not met every value.
        if not missing or sys.exc_info()[0] is not None:
            return
        names = ", ".join(repr(name) for name in dict.fromkeys(missing))
        warnings.warn(
            f"capture_attention: attention of {names} is missing from the record: its product with a value was not seen",
            stacklevel=2,
        )

    def _weave_rules(self) -> None:
        """Let the graph of this pass serve relevance passes too; forward values and true gradients stay as they are."""
        rules = RelevanceMode(self._composite, switchable=True)
        self._set_modes([rules, self._mode])
        self.tracker.relevance_pass = rules.state.relevance_pass

    def _set_modes(self, modes: list[TorchFunctionMode]) -> None:
        above = _pop_all(self._modes)
        self._modes = modes
        _push([*modes, *above])

    def emit(
        self,
        build: Callable[[str], CapturedLayer],
        module: nn.Module | None = None,
        instead_of: Sequence[CapturedLayer] = (),
    ) -> CapturedLayer | None:
        name = self._where(module)
        if name is None:
            return None
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
        if instead_of:
            _replace(passes[-1], instead_of, layer)
        return layer

    def _where(self, module: nn.Module | None = None) -> str | None:
        """Path of the module that runs; None if its attention is not to be recorded."""
        # Gradient checkpointing runs the forward pass again during backward.
        if self._is_over or torch._C._current_graph_task_id() != -1:
            return None
        name = self._names[id(module)] if module is not None else self._running_module()
        # Attention of something else, unless the model calls it from where no module can be seen.
        return "" if name is None and self._depth > 0 else name

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
        """Take the modes of this session off the stack, below whatever the caller has put on top of them."""
        # Off the stack already: in another wrapper, or under a function that the mode passed on, such as backward().
        if not _is_on_stack(self._mode):
            yield
            return
        above = _pop_all(self._modes)
        _push(above)
        self._is_suspended = True
        try:
            yield
        finally:
            self._is_suspended = False
            for _ in above:
                torch._C._pop_torch_function_stack()
            _push([*self._modes, *above])

    @contextmanager
    def resumed(self) -> Iterator[None]:
        if not self._is_suspended:
            yield
            return
        self._is_suspended = False
        _push(self._modes)
        try:
            yield
        finally:
            for _ in self._modes:
                torch._C._pop_torch_function_stack()
            self._is_suspended = True

    def aside(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call without the mode, unless a note may be handed on or the mode is not on top of this thread's stack."""
        above = torch._C._len_torch_function_stack() - 1
        if self.tracker.notes or above < 0 or torch._C._get_function_stack_at(above) is not self._mode:
            return forward(*args, **kwargs)
        torch._C._pop_torch_function_stack()
        try:
            return forward(*args, **kwargs)
        finally:
            torch._C._push_on_torch_function_stack(self._mode)


def _replace(layers: list[CapturedLayer], old: Sequence[CapturedLayer], new: CapturedLayer) -> None:
    """Move the layer to the place of the first of `old`, which all go."""
    place = next((index for index, layer in enumerate(layers) if layer in old), None)
    if place is None:
        return
    layers.insert(place, layers.pop())
    layers[:] = [layer for layer in layers if layer not in old]
    for index, layer in enumerate(layers):
        layer.index = index


def _is_method_of_others(frame: FrameType) -> bool:
    """Reading the variables of a frame takes a copy of them, so it is done only where it may help."""
    return frame.f_code.co_varnames[:1] == ("self",) and frame.f_globals.get("__package__") != __package__


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which functions for relevance do not support."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _is_on_stack(mode: TorchFunctionMode) -> bool:
    return any(torch._C._get_function_stack_at(i) is mode for i in range(torch._C._len_torch_function_stack()))


def _pop_all(modes: list[TorchFunctionMode]) -> list[Any]:
    """Pop the stack of function modes down to and with `modes`; the others that were popped, lowest first."""
    others: list[Any] = []
    left = list(modes)
    while left:
        top = torch._C._pop_torch_function_stack()
        if top is left[-1]:
            left.pop()
        else:
            others.insert(0, top)
    return others


def _push(modes: Sequence[Any]) -> None:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


class AttentionCapture:
    """The context manager of :func:`capture_attention`; every `with` gives a new record."""

    def __init__(self, model: nn.Module, keep_all: bool, num_heads: int | None, composite: Composite) -> None:
        self._model = model
        self._keep_all = keep_all
        self._num_heads = num_heads
        self._composite = composite
        self._sessions: list[_Session] = []

    def __enter__(self) -> AttentionRecord:
        session = _Session(self._model, self._keep_all, self._num_heads, self._composite)
        session.start()
        self._sessions.append(session)
        return session.record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Several threads may be inside the same context.
        own = [session for session in self._sessions if session.listens()]
        session = (own or self._sessions)[-1]
        self._sessions.remove(session)
        session.stop()


def capture_attention(
    model: nn.Module,
    *,
    keep: Literal["last", "all"] = "last",
    num_heads: int | None = None,
    rule: str | Composite = "attnlrp",
) -> AttentionCapture:
    """Capture the attention of a model as it is, while it runs inside a ``with`` block.

    .. math:: A = \\mathrm{softmax}(s\\, Q K^\\top + M)

    Fused attention needs no eager fallback: Q, K, the scale s and the mask M are kept, never A. The model's
    outputs are bit-identical with and without capture, and nothing stays attached to the model afterwards.
    Understood are ``F.scaled_dot_product_attention``, ``nn.MultiheadAttention``, ``nn.TransformerEncoder``
    and its layers (fused path included), ``F.multi_head_attention_forward``, and attention that is written
    out: scores q k^T by matmul, bmm, baddbmm or einsum, scaled, with additive masks or biases, masked_fill or
    where, then softmax. Where what multiplies the value is anything else (tanh soft-capping, attention sinks, talking
    heads, probabilities that are mixed, masked or renormalised), that matrix itself is kept, O(N^2) for that layer; a
    UserWarning names the modules whose softmax(q k^T) was not seen to meet a value. A softmax over a 2-D tensor is never
    attention.

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
    rule : str or Composite
        Rules of ``record.relevance(..., method="lrp")``, as in :func:`xai_fast.lrp.attribute`.

    Returns
    -------
    context manager
        Gives an :class:`AttentionRecord` with ``rollout``, ``attentions``, ``layers`` and ``passes``; after a forward pass
        with gradients also ``relevance``, ``signed_attention`` and ``weighted_attentions``. Entered again, it gives a new
        record.

    Raises
    ------
    TypeError
        `model` is no nn.Module; num_heads is no int; `rule` is no rule.
    ValueError
        An unknown `keep` or `rule`; num_heads below 1.
    RuntimeError
        On leaving: contexts are left in another order than the opposite of entering them, or by another thread. This capture
        has then ended all the same.

    Notes
    -----
    Memory per layer: query and key in the model's dtype, Hkv key heads if the model passes them so; copied
    only if they are views of something larger. For torch.nn modules the input is kept, and q and k are
    computed when first needed. Probabilities are those before dropout. Masks are kept by reference. A model
    under ``torch.compile`` runs uncompiled while it is captured, and its output is that of the uncompiled
    model. Several threads may capture one model at once, each its own passes; a copy or a pickle of the model made inside
    the block is not captured. Passes under ``torch.func`` or forward-mode differentiation have no ``relevance``.

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
        if not check.is_whole(num_heads):
            raise TypeError(f"num_heads: expected an int or None, got {type(num_heads).__name__}")
        if num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    return AttentionCapture(model, keep == "all", None if num_heads is None else int(num_heads), as_composite(rule))
