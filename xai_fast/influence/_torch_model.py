"""A torch model and its loss as functions of chosen parameters, laid out as one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map

from .._dtypes import accumulate_dtype
from ._torch_rows import TorchRows

__all__ = ["Checkpoint", "ModelLoss", "Params", "State"]

Params = None | str | Sequence[str | nn.Parameter] | Callable[[str, nn.Parameter], bool]
Checkpoint = Mapping[str, Tensor] | str | Path

# Rows whose activations are held at once by default, and the memory for gradients of single rows.
MICROBATCH, GRADIENT_BYTES = 128, 1 << 28
# Vectors that are multiplied at once: each needs its own tangents of all activations.
VECTORS = 16


@dataclass(frozen=True)
class State:
    """Values of all parameters and buffers: the chosen ones as a vector (size,), the others by name."""

    theta: Tensor
    fixed: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.theta.dtype

    def to(self, dtype: torch.dtype) -> State:
        return State(self.theta.to(dtype), {name: _cast(value, dtype) for name, value in self.fixed.items()})


class ModelLoss:
    """loss_fn(model(inputs), targets) of single rows, as a function of the chosen parameters.

    The model runs in eval mode, which is undone after every call; its parameters and buffers are never written to.

    Attributes
    ----------
    names : list of str
    size : int
    dtype : torch.dtype
        float32, also for models in 16 bits; float64.
    device : torch.device
    state : State
        Of the model when this object was made.

    Raises
    ------
    TypeError, ValueError
        No module; no parameters chosen, unknown names, parameters on several devices or of several dtypes.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any], params: Params, microbatch: int | None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a callable of (outputs, targets), got {type(loss_fn).__name__}")
        self._model, self._loss_fn = model, loss_fn
        chosen = select_parameters(model, params)
        self.names = list(chosen)
        self._shapes = [p.shape for p in chosen.values()]
        self.size = sum(p.numel() for p in chosen.values())
        self.device = next(iter(chosen.values())).device
        self.dtype = accumulate_dtype(next(iter(chosen.values())).dtype)
        self.microbatch = MICROBATCH if microbatch is None else microbatch
        self.state = self._state(dict(model.named_parameters()) | dict(model.named_buffers()))

    def _state(self, values: Mapping[str, Tensor]) -> State:
        theta = torch.cat([values[name].detach().to(self.device, self.dtype).reshape(-1) for name in self.names])
        fixed = {name: _cast(value.detach(), self.dtype) for name, value in values.items() if name not in self.names}
        return State(theta, fixed)

    def state_of(self, checkpoint: Checkpoint, name: str) -> State:
        """The state in a checkpoint: a state dict, or the path of one saved by torch.save."""
        if isinstance(checkpoint, (str, Path)):
            checkpoint = torch.load(checkpoint, map_location=self.device, weights_only=True)
        if not isinstance(checkpoint, Mapping):
            raise TypeError(f"{name}: expected a state dict or the path of one, got {type(checkpoint).__name__}")
        now = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        values = {}
        for key, value in now.items():
            found = checkpoint.get(key, value if key not in self.names else None)
            if found is None or found.shape != value.shape:
                what = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise ValueError(f"{name}: expected {key} of shape {tuple(value.shape)}, got {what}")
            values[key] = found.to(self.device)
        return self._state(values)

    # ---- losses -----------------------------------------------------------------------------------------------------------

    def _place(self, values: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda leaf: _cast(leaf.detach().to(self.device), dtype), values)

    def _outputs(self, state: State, theta: Tensor, inputs: Any) -> Any:
        parts = theta.split([shape.numel() for shape in self._shapes])
        chosen = {n: part.view(shape) for n, part, shape in zip(self.names, parts, self._shapes, strict=True)}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        return functional_call(self._model, {**state.fixed, **chosen}, args, kwargs)

    def _row_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Of one row without its first dimension."""
        loss = self._loss_fn(_unsqueeze(outputs), _unsqueeze(targets))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: expected a scalar or one loss for a batch of one row, got {what}")
        return loss.reshape(())

    def _batch_loss(self, state: State, inputs: Any, targets: Any) -> Callable[[Tensor], Tensor]:
        """theta -> sum of the losses of the rows of a batch, with one forward pass."""
        return lambda theta: vmap(self._row_loss)(self._outputs(state, theta, inputs), targets).sum()

    def _single_loss(self, state: State, theta: Tensor, inputs: Any, targets: Any) -> Tensor:
        outputs = self._outputs(state, theta, _unsqueeze(inputs))
        return self._row_loss(tree_map(lambda leaf: leaf.squeeze(0), outputs), targets)

    def check(self, rows: TorchRows) -> None:
        """ValueError unless the loss of a row is the same in a batch and alone."""
        inputs, targets = self._place(rows.read(torch.arange(min(2, len(rows)))), self.dtype)
        with self._evaluating():
            together = vmap(self._row_loss)(self._outputs(self.state, self.state.theta, inputs), targets)
            alone = vmap(lambda x, y: self._single_loss(self.state, self.state.theta, x, y))(inputs, targets)
        if not torch.allclose(together, alone, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"model: expected rows that do not depend on each other, batch dimension first, got losses "
                f"{together.tolist()} in a batch and {alone.tolist()} alone"
            )

    # ---- derivatives ------------------------------------------------------------------------------------------------------

    def gradients(self, inputs: Any, targets: Any, state: State | None = None) -> Tensor:
        """Gradient of the loss of every row: (B, size)."""
        state = self.state if state is None else state
        count = len(tree_flatten((inputs, targets))[0][0])
        out = state.theta.new_empty(count, self.size)
        single = grad(lambda theta, x, y: self._single_loss(state, theta, x, y))
        with self._evaluating():
            for first in range(0, count, self.gradient_rows):
                rows = slice(first, first + self.gradient_rows)
                x, y = self._place(tree_map(lambda leaf, rows=rows: leaf[rows], (inputs, targets)), state.dtype)
                out[rows] = vmap(single, in_dims=(None, 0, 0))(state.theta, x, y)
        return out

    @property
    def gradient_rows(self) -> int:
        """Rows whose gradients are held at once."""
        return max(1, min(self.microbatch, GRADIENT_BYTES // (self.size * self.dtype.itemsize)))

    def train_gradients(self, rows: TorchRows, state: State | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Gradients of all rows, some at a time, with their positions."""
        for at, (inputs, targets) in rows.batches(self.gradient_rows):
            yield at, self.gradients(inputs, targets, state)

    def product(self, state: State, batch: Any, vectors: Tensor, is_gauss_newton: bool) -> Tensor:
        """(sum of the Hessians of the rows) v for vectors (M, size), in microbatches."""
        total = torch.zeros_like(vectors)
        count = len(tree_flatten(batch)[0][0])
        with self._evaluating():
            for first in range(0, count, self.microbatch):
                rows = slice(first, first + self.microbatch)
                x, y = self._place(tree_map(lambda leaf, rows=rows: leaf[rows], batch), state.dtype)
                total += vmap(self._multiply(state, x, y, is_gauss_newton), chunk_size=VECTORS)(vectors)
        return total

    def row_products(self, state: State, batch: Any, vectors: Tensor, is_gauss_newton: bool) -> Tensor:
        """The Hessian of each row times its own vector: (B, size) for vectors (B, size)."""

        def one(x: Any, y: Any, v: Tensor) -> Tensor:
            return self._multiply(state, _unsqueeze(x), _unsqueeze(y), is_gauss_newton)(v)

        with self._evaluating():
            x, y = self._place(batch, state.dtype)
            return vmap(one, chunk_size=VECTORS)(x, y, vectors)

    def _multiply(self, state: State, inputs: Any, targets: Any, is_gauss_newton: bool) -> Callable[[Tensor], Tensor]:
        """v -> (sum of the Hessians of the rows) v: forward over reverse, or J^T H_out J v."""
        if not is_gauss_newton:
            gradient = grad(self._batch_loss(state, inputs, targets))
            return lambda v: jvp(gradient, (state.theta,), (v,))[1]

        def outputs(theta: Tensor) -> Any:
            return self._outputs(state, theta, inputs)

        at, pull_back = vjp(outputs, state.theta)[:2]
        gradient_of_outputs = grad(lambda out: vmap(self._row_loss)(out, targets).sum())

        def multiply(v: Tensor) -> Tensor:
            moved = jvp(outputs, (state.theta,), (v,))[1]
            product: Tensor = pull_back(jvp(gradient_of_outputs, (at,), (moved,))[1])[0]
            return product

        return multiply

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode, and attention in operations that have forward-mode derivatives."""
        modules = [module for module in self._model.modules() if module.training]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        self._model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module in modules:
                module.training = True


def select_parameters(model: nn.Module, params: Params) -> dict[str, nn.Parameter]:
    """The chosen parameters by name, in the order of the model."""
    every = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in every.items() if params(name, p)}
    else:
        wanted = [params] if isinstance(params, str) else list(params)
        matches = [_matching(every, want) for want in wanted]
        for want, found in zip(wanted, matches, strict=True):
            if not found:
                what = repr(want) if isinstance(want, str) else "a parameter that is not in it"
                raise ValueError(f"params: expected names of parameters or modules of the model, got {what}")
        chosen = {name: p for name, p in every.items() if any(name in found for found in matches)}
    if not chosen:
        raise ValueError("params: expected at least one parameter, got none")
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) > 1:
        raise ValueError(f"params: expected parameters of one dtype on one device, got {sorted(map(str, kinds))}")
    return chosen


def _matching(every: dict[str, nn.Parameter], want: Any) -> set[str]:
    if isinstance(want, str):
        return {name for name in every if name == want or name.startswith(want.rstrip(".") + ".")}
    if isinstance(want, nn.Parameter):
        return {name for name, p in every.items() if p is want}
    raise TypeError(f"params: expected names or parameters, got {type(want).__name__}")


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _unsqueeze(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.unsqueeze(0), values)
