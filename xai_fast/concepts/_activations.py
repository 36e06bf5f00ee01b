"""What layers put out, and how class scores change with it: all layers in one pass, hooks that always go away."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._copies import unshared
from .._dtypes import accumulate_dtype
from ..metrics._forwards import class_scores
from ..ops import _checks as check
from .concept import Concept

__all__ = ["Pool", "Probe", "named_layers"]

BATCH = 64
Pool = str | tuple[str, int] | Callable[[Tensor], Tensor]


def named_layers(model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    """The layers by name; each is given as a name or as the module itself."""
    names = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    given = [layers] if isinstance(layers, (str, nn.Module)) else list(layers)
    if not given:
        raise ValueError("layers: expected at least one, got none")
    for layer in given:
        if isinstance(layer, nn.Module):
            name = next((name for name, module in names.items() if module is layer), None)
            if name is None:
                raise ValueError(
                    f"layers: expected modules of the model, got a {type(layer).__name__} that is none of its parts"
                )
        elif isinstance(layer, str):
            name = layer
            if name not in names:
                near = difflib.get_close_matches(name, [n for n in names if n], n=3, cutoff=0.4)
                hint = f"did you mean {', '.join(map(repr, near))}?" if near else "see model.named_modules()"
                raise ValueError(f"layers: expected the name of a module of the model, got {name!r}; {hint}")
        else:
            raise TypeError(f"layers: expected names or modules, got {type(layer).__name__}")
        if name in found:
            raise ValueError(f"layers: expected different layers, got {name!r} twice")
        found[name] = names[name]
    return found


@dataclass
class Probe:
    """A model, the layers that are read, and how an output becomes one vector an example."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    pool: Pool
    inputs: Tensor
    batch_size: int | None = None
    additional_forward_args: tuple[Any, ...] = ()
    gradient_passes: int = field(default=0, init=False)
    forward_passes: int = field(default=0, init=False)

    @property
    def batch(self) -> int:
        return BATCH if self.batch_size is None else self.batch_size

    def activations(self, concepts: Sequence[Concept]) -> dict[str, list[Tensor]]:
        """Pooled activations (n, d) of each concept by layer, in float32, or float64 where the layer is."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        for concept in concepts:
            parts: dict[str, list[Tensor]] = {name: [] for name in self.layers}
            for batch in concept.batches(self.batch):
                for name, value in self._pooled(batch).items():
                    parts[name].append(value)
            for name, pieces in parts.items():
                if len({piece.shape[1] for piece in pieces}) > 1:
                    raise ValueError(
                        f"concepts: expected activations of one size at {name!r}, got several for {concept.name!r}"
                    )
                found[name].append(torch.cat(pieces))
        for name, sets in found.items():
            for concept, x in zip(concepts, sets, strict=True):
                if x.shape[1] != sets[0].shape[1]:
                    got = f"{x.shape[1]} features for {concept.name!r}"
                    raise ValueError(f"concepts: expected {sets[0].shape[1]} features at {name!r} for all sets, got {got}")
                if not bool(x.isfinite().all()):
                    raise ValueError(
                        f"concepts: expected finite activations at {name!r}, got NaN or inf for {concept.name!r}"
                    )
        return found

    def gradients(self, targets: Sequence[int | None]) -> dict[str, Tensor]:
        """(targets, N, d): derivatives of each class score along shifts of the pooled activations."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        for start in range(0, len(self.inputs), self.batch):
            rows = slice(start, start + self.batch)
            with torch.enable_grad():
                with _tapped(self.model, self.layers, _as_node) as seen:
                    scores = class_scores(self.model(unshared(self.inputs[rows]), *self._arguments(rows)))
                self._check_called(seen)
                self.forward_passes += 1
                last = len(targets) - 1
                pieces = [self._derivatives(scores, target, seen, last=i == last) for i, target in enumerate(targets)]
            for name in self.layers:
                parts[name].append(torch.stack([piece[name] for piece in pieces]))
        found = {name: torch.cat(pieces, 1) for name, pieces in parts.items()}
        for name, value in found.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"inputs: expected finite gradients at {name!r}, got NaN or inf")
        return found

    def _derivatives(self, scores: Tensor, target: int | None, seen: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        chosen = _class_column(scores, target).sum()
        nodes = list(seen.values())
        if not chosen.requires_grad:
            raise ValueError("layers: expected layers that the class score depends on, got a score without a gradient")
        grads = torch.autograd.grad(chosen, nodes, retain_graph=not last, allow_unused=True)
        self.gradient_passes += 1
        found = {}
        for (name, node), grad in zip(seen.items(), grads, strict=True):
            if grad is None:
                raise ValueError(f"layers: expected layers that the class score depends on, got {name!r} without a gradient")
            dtype = accumulate_dtype(node.dtype)
            found[name] = pulled_back(node.detach().to(dtype), grad.to(dtype), self.pool)
        return found

    def _pooled(self, batch: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(_name: str, output: Tensor) -> tuple[Tensor, None]:
            # A change in place after the layer would change a view that was kept, the next call what a pool gave.
            value = pooled(output.detach().to(accumulate_dtype(output.dtype)), self.pool)
            shared = value.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
            return (value.clone() if shared or callable(self.pool) else value), None

        is_cast = batch.is_floating_point() and self.inputs.is_floating_point()
        # A copy: the examples stay as they are where the model begins in place.
        x = batch.to(self.inputs.device, self.inputs.dtype if is_cast else batch.dtype, copy=True)
        with torch.no_grad(), _tapped(self.model, self.layers, keep) as seen:
            self.model(x, *self._shared_arguments(len(x)))
        self._check_called(seen)
        self.forward_passes += 1
        for name, value in seen.items():
            if len(value) != len(x):
                raise ValueError(
                    f"layers: expected {name!r} to put out {len(x)} rows for {len(x)} examples, got {len(value)}"
                )
            found[name] = value
        return found

    def _check_called(self, seen: Mapping[str, Tensor]) -> None:
        for name in self.layers:
            if name not in seen:
                raise ValueError(f"layers: expected layers that the model calls, got {name!r}, which it did not")

    def _by_row(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(self.inputs)

    def _arguments(self, rows: slice) -> list[Any]:
        return [unshared(a[rows] if self._by_row(a) else a) for a in self.additional_forward_args]

    def _shared_arguments(self, count: int) -> list[Any]:
        """Arguments for examples of concepts: one row for each input is of use only where all rows are the same."""
        found = []
        for place, value in enumerate(self.additional_forward_args):
            if self._by_row(value):
                if not bool((value == value[:1]).all()):
                    wanted = "one for all, or equal rows (the examples of concepts get them too)"
                    raise ValueError(f"additional_forward_args: expected {wanted}, got different rows at {place}")
                value = value[:1].expand(count, *value.shape[1:])
            found.append(unshared(value))
        return found


def pooled(output: Tensor, pool: Pool) -> Tensor:
    """Layer outputs (n, ...) as vectors (n, d)."""
    if output.dim() < 2:
        output = output.reshape(-1, 1)
    if callable(pool):
        found = pool(unshared(output))  # the layers that follow read it as well
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(output):
            got = check.shape_of(found) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"pool: expected a callable that returns a tensor ({len(output)}, d), got {got}")
        return found
    if isinstance(pool, tuple):
        return output[:, _token(output, pool)]
    return output.mean(_positions(output)) if pool == "mean" and output.dim() > 2 else output.flatten(1)


def pulled_back(output: Tensor, grad: Tensor, pool: Pool) -> Tensor:
    """(n, d): products with a vector v are derivatives along the shift of the outputs that moves their pooling by v."""
    if output.dim() < 2:
        output, grad = output.reshape(-1, 1), grad.reshape(-1, 1)
    if callable(pool):
        return torch.func.jvp(lambda a: pooled(a, pool), (output,), (grad,))[1].detach()
    if pool == "mean" and output.dim() > 2:
        return grad.sum(_positions(output))
    return pooled(grad, pool)


def _positions(output: Tensor) -> tuple[int, ...]:
    """Tokens (n, T, d) have their features last, maps (n, C, H, W) have them first."""
    return (1,) if output.dim() == 3 else tuple(range(2, output.dim()))


def _token(output: Tensor, pool: Any) -> int:
    token: int = pool[1]
    if output.dim() != 3 or not -output.shape[1] <= token < output.shape[1]:
        raise ValueError(f"pool: expected outputs (n, T, d) with a token {token}, got shape {check.shape_of(output)}")
    return token


def _class_column(scores: Tensor, target: int | None) -> Tensor:
    if scores.dim() == 1 and target is None:
        return scores
    if scores.dim() != 2 or target is None:
        wanted = "None for a model with one output (N,), or classes of outputs (N, C)"
        raise ValueError(f"target: expected {wanted}, got {target} for outputs of shape {check.shape_of(scores)}")
    if not 0 <= target < scores.shape[1]:
        raise ValueError(f"target: expected classes from 0 to {scores.shape[1] - 1}, got {target}")
    return scores[:, target]


@contextmanager
def _tapped(
    model: nn.Module, layers: Mapping[str, nn.Module], tap: Callable[[str, Tensor], tuple[Tensor, Tensor | None]]
) -> Iterator[dict[str, Tensor]]:
    """Runs in eval mode with hooks: `tap` gets a layer's output and returns (what is kept, what goes on instead)."""
    seen: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if name in seen:
                raise ValueError(
                    f"layers: expected layers that are called once in a forward pass, got {name!r}, called again"
                )

            def keep(tensor: Tensor) -> Tensor:
                seen[name], instead = tap(name, tensor)
                return tensor if instead is None else instead

            changed = _with_first(output, keep)
            if changed is None:
                raise TypeError(f"layers: expected {name!r} to put out a floating tensor, got {type(output).__name__}")
            return changed

        return hook

    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        model.eval()
        yield seen
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes:
            module.training = training


def _as_node(_name: str, output: Tensor) -> tuple[Tensor, Tensor]:
    """A node of the graph to differentiate by, and a copy that the model may change in place."""
    node = output if output.requires_grad else output.detach().requires_grad_()
    return node, node.clone()


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with its first floating tensor changed; None if it holds none."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else None
    if isinstance(output, Mapping):
        items: Any = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    else:
        return None
    for key, value in items:
        changed = _with_first(value, change)
        if changed is not None:
            return _replaced(output, key, changed)
    return None


def _replaced(output: Any, key: Any, value: Any) -> Any:
    if isinstance(output, tuple):
        parts = [value if place == key else part for place, part in enumerate(output)]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    changed = copy.copy(output)
    changed[key] = value
    return changed
