"""What a capture returns: the layers of each forward pass, their attention matrices and their rollout on request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from ..ops import _checks as check
from ..ops.rollout import MANY_ROWS
from ._gradients import Tap, check_score, layer_gradients
from ._layers import CapturedLayer
from .rollout import (
    Token,
    advance_by_matrix,
    check_discard_ratio,
    check_start_layer,
    finish,
    start_rows,
    token_indices,
)

__all__ = ["AttentionRecord"]

Layers = slice | Sequence[int] | None


class AttentionRecord:
    """What was captured: one list of layers per forward pass of the model.

    Made by :func:`capture_attention`. It can be used inside the context, after a forward pass, and after it. Copies and
    pickles have what needs no gradients: ``rollout``, ``attentions``, ``layers`` and ``passes``.
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
            A query that may not attend any key has a row of zeros in A, of which the rollout keeps the residual alone;
            models that let it attend every key alike (eager Hugging Face on left-padded text) compute something else there.
            Under nested sequences rows of padded queries are what a zero input gives.

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
            if check_nan and check.holds_nan(rows):
                _raise_nan(wanted)
        return finish(rows, token, wanted[-1].dtype)

    def relevance(
        self,
        score: Tensor,
        token: Token = 0,
        *,
        method: Literal["gradient", "lrp"] = "gradient",
        head_fusion: str = "mean",
        clamp: bool = True,
        residual: float = 1.0,
        normalize: bool = False,
        start_layer: int = 0,
        layers: Layers = None,
        forward: int = -1,
    ) -> Tensor:
        """Targeted relevance of every token for a score: rollout of attention weighted by its gradient.

        .. math:: C = \\bar A^{(L)} \\cdots \\bar A^{(1)}, \\qquad
                  \\bar A = w I + \\mathrm{mean}_h \\max(0, \\nabla A_h \\circ W_h)

        with W = A ("gradient") or the relevance of A under AttnLRP ("lrp"). Rows for chosen tokens are streamed: no
        attention matrix is built unless the model writes its attention out itself.

        Parameters
        ----------
        score : Tensor, scalar, (B,) or (B, K)
            What to explain, such as ``logits[:, 281]``, with its graph. Samples of a batch must not mix in the model. K
            targets take K backward passes. The graph is kept, so that other scores can follow.
        token, start_layer, layers, forward
            As in :meth:`rollout`. ``token=None`` builds the matrices of one layer at a time.
        method : {"gradient", "lrp"}
            One backward pass; or two, for the gradient and for the relevance. "lrp" needs the model in evaluation mode.
        head_fusion : {"mean", "sum"}
        clamp : bool
            Take the positive part before the heads are fused. The lecture's variant is ``head_fusion="sum", clamp=False``.
        residual : float
            Weight w of the identity.
        normalize : bool
            Divide each row of the matrix of a layer by its sum.

        Returns
        -------
        Tensor
            (B, N) for one token, (B, T, N) for several, (B, N, N) for None; for a (B, K) score with K after B.

        Raises
        ------
        TypeError
            ``score`` is no floating tensor; a wrong type of another argument.
        ValueError
            No attention was seen; the score has no graph, a wrong shape, or does not depend on a chosen layer; the forward
            pass ran without gradients; an unknown method or fusion; a token or layer out of range.

        Notes
        -----
        Source: "gradient", Chefer et al. (2021), "Generic Attention-model Explainability", eq. 5 and 6; "lrp", Chefer et al.
        (2021), "Transformer Interpretability Beyond Attention Visualization", eq. 13, with AttnLRP (Achtibat et al. 2024)
        for the relevance. The gradients of all layers, O(L N D), are held until the rows have passed.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
        >>> with xf.capture_attention(layer) as record:
        ...     out = layer(torch.randn(1, 3, 8))
        >>> record.relevance(out[:, 0, 0], token=0).shape
        torch.Size([1, 3])
        """
        _check_method(method)
        chosen = self._chosen(layers, forward)
        batch, tokens = _common_shape(chosen)
        indices = token_indices(token, tokens)
        wanted = chosen[check_start_layer(start_layer, len(chosen)) :]
        if head_fusion not in ("mean", "sum"):
            raise ValueError(f"head_fusion: expected 'mean' or 'sum', got {head_fusion!r}")
        residual = check.check_residual(residual)
        options = {"head_fusion": head_fusion, "clamp": bool(clamp), "residual": residual, "normalize": bool(normalize)}
        found = []
        for scalar in check_score(score, "score", batch):
            grads, modified = _gradients(scalar, wanted, method)
            with _plain_torch(wanted):
                rows = _roll_targeted(wanted, grads, modified, indices, batch, tokens, options)
            found.append(finish(rows, token, wanted[-1].dtype))
        return torch.stack(found, dim=1) if score.dim() == 2 else found[0]

    def weighted_attentions(
        self, score: Tensor, *, method: Literal["gradient", "lrp"] = "gradient", layers: Layers = None, forward: int = -1
    ) -> tuple[Tensor, ...]:
        """The matrices behind :meth:`relevance`, before clamping and fusion: dA o A, or dA o R_A.

        Parameters
        ----------
        score, method, layers, forward
            As in :meth:`relevance`; the score is a scalar or (B,).

        Returns
        -------
        tuple of Tensor
            One (B, H, Nq, Nk) per layer. Cross-attention is included.

        Raises
        ------
        TypeError, ValueError
            As :meth:`relevance`.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
        >>> with xf.capture_attention(layer) as record:
        ...     out = layer(torch.randn(1, 3, 8))
        >>> record.weighted_attentions(out[:, 0, 0])[0].shape
        torch.Size([1, 2, 3, 3])
        """
        _check_method(method)
        chosen = self._chosen(layers, forward)
        scalar = _one_scalar(score, "score", chosen)
        grads, modified = _gradients(scalar, chosen, method)
        with _plain_torch(chosen):
            return tuple(_tap(layer).weights(layer, g, m) for layer, g, m in zip(chosen, grads, modified, strict=True))

    def signed_attention(self, loss: Tensor, *, layers: Layers = None, forward: int = -1) -> tuple[Tensor, ...]:
        """Signed attention of every head and key: how much attending the key lowers the loss.

        .. math:: a_{hj} = -\\sum_i \\frac{\\partial L}{\\partial A_{hij}} A_{hij}

        Positive: the attention that goes to key j speaks for what the loss rewards. Streamed, without attention matrices.

        Parameters
        ----------
        loss : Tensor, scalar or (B,)
            With its graph, which is kept.
        layers, forward
            As in :meth:`rollout`.

        Returns
        -------
        tuple of Tensor
            One (B, H, Nk) per layer.

        Raises
        ------
        TypeError, ValueError
            As :meth:`relevance`.

        Notes
        -----
        The sum over queries equals -V_j . (A^T dO)_j. Source: gradient x attention, Serrano & Smith (2019), "Is Attention
        Interpretable?", with the sign of the loss.

        Examples
        --------
        >>> import torch, xai_fast as xf
        >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
        >>> with xf.capture_attention(layer) as record:
        ...     out = layer(torch.randn(1, 3, 8))
        >>> record.signed_attention(out[:, 0, 0])[0].shape
        torch.Size([1, 2, 3])
        """
        chosen = self._chosen(layers, forward)
        grads = layer_gradients(_one_scalar(loss, "loss", chosen), chosen, "loss")
        with _plain_torch(chosen):
            return tuple(-_tap(layer).signed(layer, grad) for layer, grad in zip(chosen, grads, strict=True))

    def _chosen(self, layers: Layers, forward: int) -> list[CapturedLayer]:
        forward = check.check_int(forward, "forward")
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


def _tap(layer: CapturedLayer) -> Tap:
    assert layer.tap is not None
    return layer.tap


def _check_method(method: Any) -> None:
    if method not in ("gradient", "lrp"):
        raise ValueError(f"method: expected 'gradient' or 'lrp', got {method!r}")


def _gradients(scalar: Tensor, layers: list[CapturedLayer], method: str) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The gradient at every layer, and for "lrp" that of a relevance pass."""
    grads = layer_gradients(scalar, layers, "score")
    if method == "gradient":
        return grads, [None] * len(layers)
    return grads, layer_gradients(scalar, layers, "score", relevance=True)


def _one_scalar(score: Any, name: str, layers: list[CapturedLayer]) -> Tensor:
    for layer in layers:
        layer.check()
    scalars = check_score(score, name, layers[0].shape[0])
    if score.dim() == 2:
        raise ValueError(f"{name}: expected a scalar or ({layers[0].shape[0]},), got shape {tuple(score.shape)}")
    return scalars[0]


def _roll_targeted(
    layers: list[CapturedLayer],
    grads: Sequence[Tensor],
    modified: Sequence[Tensor | None],
    indices: list[int] | None,
    batch: int,
    tokens: int,
    options: dict[str, Any],
) -> Tensor:
    many = indices is None or len(indices) >= MANY_ROWS
    fusing = {name: options[name] for name in ("head_fusion", "residual", "normalize")}
    rows = None if indices is None else _start(layers, indices, batch, tokens)
    for layer, grad, other in reversed(list(zip(layers, grads, modified, strict=True))):
        if rows is not None:
            rows = rows.to(layer.device, accumulate_dtype(layer.dtype))
        if not many and rows is not None:
            rows = _tap(layer).advance(layer, rows, grad, other, options)
            continue
        weights = _tap(layer).weights(layer, grad, other)
        rows = _advance(rows, weights.clamp(min=0) if options["clamp"] else weights, 0.0, fusing)
    assert rows is not None
    return rows


def _advance(rows: Tensor | None, attention: Tensor, discard_ratio: float, options: dict[str, Any]) -> Tensor:
    if rows is not None:
        rows = rows.to(attention.device, accumulate_dtype(attention.dtype))
    return advance_by_matrix(rows, attention, discard_ratio, options)


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
        rows = _advance(rows, layer.probabilities(), discard_ratio, options)
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
