"""The inputs of a network's last layer, collected over a loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._optional import optional_import

__all__ = ["collect_features"]


def collect_features(
    model: nn.Module,
    layer: nn.Linear,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What enters `layer` for every row of a loader: the X of an influence problem whose head is that layer.

    The model runs in eval mode without gradients; its mode is restored and the hook removed whatever happens.

    Parameters
    ----------
    model : nn.Module
    layer : nn.Linear
        A part of the model that is called once in a forward pass, with inputs (B, D).
    loader : iterable
        Of batches: inputs, ``(inputs, targets)``, or a dictionary that the model takes as keywords, whose ``labels`` are the
        targets. Not shuffled, if rows are to be found again.
    device : torch.device, optional
        Where the model runs and inputs are moved to; by default where its parameters are.
    progress : bool
        A progress bar (needs tqdm).

    Returns
    -------
    features : Tensor, shape (n, D)
        On the CPU, in the dtype of the layer's inputs.
    targets : Tensor, shape (n,), or None
        None if the batches have none.

    Raises
    ------
    TypeError
        `model` is no module, `layer` no nn.Linear, `loader` not iterable, or batches of another kind.
    ValueError
        `layer` is not part of `model`, is not called or called twice in a pass, gets inputs that are not (B, D); an empty
        loader; a batch with another number of targets than rows.

    Examples
    --------
    >>> import xai_fast as xf
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> X, y = xf.influence.collect_features(model, model[3], [(torch.ones(5, 2, 2), torch.zeros(5))])
    >>> X.shape, y.shape
    (torch.Size([5, 3]), torch.Size([5]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader: expected an iterable of batches, got {type(loader).__name__}")
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"layer: expected an nn.Linear, got {type(layer).__name__}")
    if all(module is not layer for module in model.modules()):
        raise ValueError("layer: expected a module of the model, got one that is not part of it")
    seen: list[Tensor] = []
    modes = [(module, module.training) for module in model.modules()]
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        model.eval()
        with torch.no_grad():
            return _run(model, seen, loader, device, progress)
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training


def _run(
    model: nn.Module, seen: list[Tensor], loader: Iterable[Any], device: torch.device | str | None, progress: bool
) -> tuple[Tensor, Tensor | None]:
    first = next(model.parameters())
    device = first.device if device is None else torch.device(device)
    if progress:
        loader = optional_import("tqdm", "demo").tqdm(loader, desc="features")
    features: list[Tensor] = []
    targets: list[Tensor | None] = []
    for batch in loader:
        inputs, labels = _split(batch)
        seen.clear()
        model(*[_moved(x, device) for x in inputs[0]], **{key: _moved(x, device) for key, x in inputs[1].items()})
        features.append(_only(seen).cpu())
        targets.append(_labels(labels, len(features[-1])))
    if not features:
        raise ValueError("loader: expected at least one batch, got none")
    return torch.cat(features), _joined(targets)


def _split(batch: Any) -> tuple[tuple[list[Any], dict[str, Any]], Any]:
    """(positional and keyword inputs), labels."""
    if isinstance(batch, Tensor):
        return ([batch], {}), None
    if hasattr(batch, "keys"):
        return ([], {key: batch[key] for key in batch if key != "labels"}), dict(batch).get("labels")
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return ([batch[0]], {}), batch[1] if len(batch) == 2 else None
    got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise TypeError(f"loader: expected batches of inputs, (inputs, targets) or a dictionary, got {got}")


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, np.ndarray):
        raise TypeError("loader: expected tensors as inputs, got ndarray")
    return x.to(device) if isinstance(x, Tensor) else x


def _only(seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise ValueError(f"layer: expected one call in a forward pass, got {len(seen)}")
    if seen[0].dim() != 2:
        raise ValueError(f"layer: expected inputs of shape (B, D), got {tuple(seen[0].shape)}")
    return seen[0]


def _labels(labels: Any, rows: int) -> Tensor | None:
    if labels is None:
        return None
    found = torch.as_tensor(labels).detach().cpu()
    if not found.dim() or len(found) != rows:
        raise ValueError(
            f"loader: expected one target for each of the {rows} rows of a batch, got shape {tuple(found.shape)}"
        )
    return found


def _joined(targets: list[Tensor | None]) -> Tensor | None:
    found = [labels for labels in targets if labels is not None]
    return torch.cat(found) if len(found) == len(targets) else None
