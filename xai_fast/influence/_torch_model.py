"""A torch model and its loss as functions of chosen parameters, laid out as one vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map

from .._copies import unshared
from .._dtypes import accumulate_dtype
from ._labels import named_rows
from ._torch_rows import TorchRows

__all__ = ["Checkpoint", "ModelLoss", "Params", "State"]

Params = None | str | Sequence[str | nn.Parameter] | Callable[[str, nn.Parameter], bool]
Checkpoint = Mapping[str, Tensor] | str | Path

# Rows whose activations are held at once by default, and the memory for gradients of single rows.
MICROBATCH, GRADIENT_BYTES = 128, 1 << 28
# Vectors that are multiplied at once: each needs its own tangents of all activations.
VECTORS = 16

# vmap, or what takes its place: (function, in_dims) -> the function of all rows.
Mapper = Callable[..., Callable[..., Any]]


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
        self._model, self.loss_fn = model, loss_fn
        chosen = select_parameters(model, params)
        self.names = list(chosen)
        self._shapes = [p.shape for p in chosen.values()]
        self.size = sum(p.numel() for p in chosen.values())
        self.device = next(iter(chosen.values())).device
        self.dtype = accumulate_dtype(next(iter(chosen.values())).dtype)
        self.microbatch = MICROBATCH if microbatch is None else microbatch
        self._is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._map_losses: Mapper = vmap
        self._map_rows: Mapper = vmap
        self.state = self._state(dict(model.named_parameters()) | dict(model.named_buffers()))

    def _state(self, values: Mapping[str, Tensor]) -> State:
        theta = torch.cat([values[name].detach().to(self.device, self.dtype).reshape(-1) for name in self.names])
        fixed = {name: _cast(value.detach(), self.dtype) for name, value in values.items() if name not in self.names}
        return State(theta, fixed)

    def state_of(self, checkpoint: Checkpoint, name: str) -> State:
        """The state in a checkpoint: a state dict, or the path of one saved by torch.save."""
        if isinstance(checkpoint, (str, Path)):
            checkpoint = _load(checkpoint, self.device, name)
        if not isinstance(checkpoint, Mapping):
            raise TypeError(f"{name}: expected a state dict or the path of one, got {type(checkpoint).__name__}")
        now = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        values = {}
        for key, value in now.items():
            found = checkpoint.get(key, value if key not in self.names else None)
            if not isinstance(found, Tensor) or found.shape != value.shape:
                what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                what = "nothing" if found is None else what
                raise ValueError(f"{name}: expected {key} of shape {tuple(value.shape)}, got {what}")
            values[key] = found.to(self.device)
        return self._state(values)

    # ---- losses -----------------------------------------------------------------------------------------------------------

    def _place(self, values: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda leaf: _cast(leaf.detach().to(self.device), dtype), values)

    def _outputs(self, state: State, theta: Tensor, inputs: Any) -> Any:
        parts = theta.split([shape.numel() for shape in self._shapes])
        chosen = {n: part.view(shape) for n, part, shape in zip(self.names, parts, self._shapes, strict=True)}
        inputs = unshared(inputs)  # rows are read again, and belong to the caller
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        return functional_call(self._model, {**state.fixed, **chosen}, args, kwargs)

    def _row_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Of one row without its first dimension."""
        loss = self.loss_fn(_unsqueeze(outputs), _unsqueeze(targets))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: expected a scalar or one loss for a batch of one row, got {what}")
        return loss.reshape(())

    def _batch_loss(self, state: State, inputs: Any, targets: Any) -> Callable[[Tensor], Tensor]:
        """theta -> sum of the losses of the rows of a batch, with one forward pass."""
        return lambda theta: self._batch_losses(self._outputs(state, theta, inputs), targets).sum()

    def _batch_losses(self, outputs: Any, targets: Any) -> Tensor:
        losses: Tensor = self._map_losses(self._row_loss)(outputs, targets)
        return losses

    def _single_loss(self, state: State, theta: Tensor, inputs: Any, targets: Any) -> Tensor:
        outputs = self._outputs(state, theta, _unsqueeze(inputs))
        return self._row_loss(tree_map(lambda leaf: leaf.squeeze(0), outputs), targets)

    def check(self, rows: TorchRows, name: str) -> None:
        """ValueError unless the first losses are finite, depend on the parameters, and are the same in a batch and alone.

        Settles whether rows go through vmap, or one after the other where an operation has no batching rule.
        """
        inputs, targets = self._place(rows.read(torch.arange(2) % len(rows)), self.dtype)
        theta = self.state.theta
        with self._evaluating():
            outputs = self._outputs(self.state, theta, inputs)
            self._map_losses, together = _first_that_works(lambda each: each(self._row_loss)(outputs, targets))
            single = self._gradient_and_loss(self.state)
            self._map_rows, found = _first_that_works(
                lambda each: each(single, in_dims=(None, 0, 0))(theta, inputs, targets)
            )
            self._check_graph(inputs, targets)
        refuse_rows(together[: len(rows)], name, "losses")
        if not torch.allclose(together, found[1], rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"model: expected rows that do not depend on each other, batch dimension first, got losses "
                f"{together.tolist()} in a batch and {found[1].tolist()} alone"
            )

    def _check_graph(self, inputs: Any, targets: Any) -> None:
        """torch.func takes a loss without a graph for a constant, with a gradient of zeros."""
        # Copies: tensors made under inference_mode cannot be part of a graph.
        with torch.inference_mode(False), torch.enable_grad():
            inputs, targets = tree_map(torch.clone, (inputs, targets))
            state = State(self.state.theta.clone(), {name: value.clone() for name, value in self.state.fixed.items()})
            outputs = self._outputs(state, state.theta.requires_grad_(), inputs)
            if self._batch_losses(outputs, targets).requires_grad:
                return
            has_graph = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_flatten(outputs)[0])
        name = "loss_fn: expected losses" if has_graph else "model: expected outputs"
        raise ValueError(f"{name} that depend on the chosen parameters, got some without a graph (detach, or no_grad)")

    def check_losses(self, rows: TorchRows, name: str) -> None:
        """ValueError that names the rows whose losses are not finite; a forward pass over all of them."""
        losses = [self.outputs_and_losses(self.state, batch)[1] for _, batch in rows.batches(self.microbatch)]
        refuse_rows(torch.cat(losses), name, "losses")

    def outputs_and_losses(self, state: State, batch: Any) -> tuple[list[Tensor], Tensor]:
        """What the model gives for rows: its tensors of floating-point numbers, and the losses (B,)."""
        inputs, targets = self._place(batch, state.dtype)
        with torch.no_grad(), self._evaluating():
            outputs = self._outputs(state, state.theta, inputs)
            losses = self._batch_losses(outputs, targets)
        return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()], losses

    def description(self) -> str:
        """The class and the layers of the model, without addresses in memory."""
        return re.sub(r" at 0x[0-9a-f]+", "", f"{type(self._model).__qualname__} {self._model!r}")

    # ---- derivatives ------------------------------------------------------------------------------------------------------

    def _gradient_and_loss(self, state: State) -> Callable[..., tuple[Tensor, Tensor]]:
        return grad_and_value(lambda theta, x, y: self._single_loss(state, theta, x, y))

    def gradients(
        self, inputs: Any, targets: Any, state: State | None = None, *, name: str = "inputs", first_row: int = 0
    ) -> Tensor:
        """Gradient of the loss of every row: (B, size); ValueError names the rows in which it is not finite."""
        state = self.state if state is None else state
        count = len(tree_flatten((inputs, targets))[0][0])
        out = state.theta.new_empty(count, self.size)
        single = self._gradient_and_loss(state)
        with self._evaluating():
            for first in range(0, count, self.gradient_rows):
                rows = slice(first, first + self.gradient_rows)
                x, y = self._place(tree_map(lambda leaf, rows=rows: leaf[rows], (inputs, targets)), state.dtype)
                out[rows] = self._map_rows(single, in_dims=(None, 0, 0))(state.theta, x, y)[0]
        refuse_rows(out, name, "gradients", first_row)
        return out

    @property
    def gradient_rows(self) -> int:
        """Rows whose gradients are held at once."""
        return max(1, min(self.microbatch, GRADIENT_BYTES // (self.size * self.dtype.itemsize)))

    def train_gradients(
        self, rows: TorchRows, state: State | None = None, *, name: str = "train_loader"
    ) -> Iterator[tuple[slice, Tensor]]:
        """Gradients of all rows, some at a time, with their positions."""
        for at, (inputs, targets) in rows.batches(self.gradient_rows):
            yield at, self.gradients(inputs, targets, state, name=name, first_row=at.start)

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
            parts = [
                tree_map(lambda leaf, at=at: leaf[at : at + VECTORS], (x, y, vectors))
                for at in range(0, len(vectors), VECTORS)
            ]
            return torch.cat([self._map_rows(one)(*part) for part in parts])

    def _multiply(self, state: State, inputs: Any, targets: Any, is_gauss_newton: bool) -> Callable[[Tensor], Tensor]:
        """v -> (sum of the Hessians of the rows) v: forward over reverse, or J^T H_out J v."""
        if not is_gauss_newton:
            gradient = grad(self._batch_loss(state, inputs, targets))
            return lambda v: jvp(gradient, (state.theta,), (v,))[1]

        def outputs(theta: Tensor) -> Any:
            return self._outputs(state, theta, inputs)

        at, pull_back = vjp(outputs, state.theta)[:2]
        gradient_of_outputs = grad(lambda out: self._batch_losses(out, targets).sum())

        def multiply(v: Tensor) -> Tensor:
            moved = jvp(outputs, (state.theta,), (v,))[1]
            product: Tensor = pull_back(jvp(gradient_of_outputs, (at,), (moved,))[1])[0]
            return product

        return multiply

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode, attention and recurrent layers in operations that have forward-mode derivatives."""
        modules = [module for module in self._model.modules() if module.training]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        self._model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), _plain_recurrence() if self._is_recurrent else nullcontext():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module in modules:
                module.training = True


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    """Without the fused layers of oneDNN and cuDNN."""
    was_enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


def select_parameters(model: nn.Module, params: Params) -> dict[str, nn.Parameter]:
    """The chosen parameters by name, in the order of the model."""
    every = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in every.items() if params(name, p)}
    else:
        if not isinstance(params, Iterable) or isinstance(params, Tensor):
            raise TypeError(
                f"params: expected None, a list of names or parameters, or a callable, got {type(params).__name__}"
            )
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


def refuse_rows(values: Tensor, name: str, what: str, first_row: int = 0) -> None:
    """ValueError that names the rows of values (B, ...) that are not finite."""
    bad = ~values.isfinite().reshape(len(values), -1).all(1)
    if bad.any():
        raise ValueError(f"{name}: expected finite {what}, got NaN or infinity in {named_rows(bad, first_row)}")


def _first_that_works(call: Callable[[Mapper], Any]) -> tuple[Mapper, Any]:
    """vmap and its result; a loop over the rows and its own where an operation has no batching rule."""
    try:
        return vmap, call(vmap)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "random operation" in str(error):
            raise ValueError("model: expected no random operations in eval mode, got some") from error
        return _one_by_one, call(_one_by_one)


def _one_by_one(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """vmap as a loop, for in_dims of 0 and None."""

    def mapped(*arguments: Any) -> Any:
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        count = next(len(tree_flatten(x)[0][0]) for x, dim in zip(arguments, dims, strict=True) if dim == 0)
        rows = [
            function(
                *(
                    x if dim is None else tree_map(lambda leaf, row=row: leaf[row], x)
                    for x, dim in zip(arguments, dims, strict=True)
                )
            )
            for row in range(count)
        ]
        return tree_map(lambda *leaves: torch.stack(leaves), *rows)

    return mapped


def _load(path: str | Path, device: torch.device, name: str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: expected the path of a state dict, got no file {str(path)!r}") from None
    except Exception as error:  # whatever the bytes of the file make of the reader
        raise ValueError(
            f"{name}: expected a state dict saved by torch.save, got {str(path)!r}, which cannot be read "
            f"({type(error).__name__})"
        ) from error
