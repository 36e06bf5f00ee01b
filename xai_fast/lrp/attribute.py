"""Relevance of the inputs of a model, by layer-wise relevance propagation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from .._interception import uncompiled
from ._graph import leaves_behind, unknown_step
from ._inputs import Inputs
from ._mode import RelevanceMode, tensors_of
from ._report import Attribution, Observer, hookable_modules
from ._target import first_tensor, select_score
from .composite import Composite, as_composite
from .rules import Rule

__all__ = ["attribute"]

RuleLike = str | Composite | Rule
Relevance = Tensor | tuple[Tensor | None, ...] | dict[str, Tensor]


@overload
def attribute(
    model: nn.Module,
    inputs: Any,
    target: Any = None,
    rule: RuleLike = "attnlrp",
    *,
    additional_forward_args: Any = None,
    fallback: Literal["gradient"] | None = None,
    details: Literal[False] = False,
) -> Any: ...


@overload
def attribute(
    model: nn.Module,
    inputs: Any,
    target: Any = None,
    rule: RuleLike = "attnlrp",
    *,
    additional_forward_args: Any = None,
    fallback: Literal["gradient"] | None = None,
    details: Literal[True],
) -> Attribution: ...


def attribute(
    model: nn.Module,
    inputs: Any,
    target: Any = None,
    rule: RuleLike = "attnlrp",
    *,
    additional_forward_args: Any = None,
    fallback: Literal["gradient"] | None = None,
    details: bool = False,
) -> Any:
    """Layer-wise relevance propagation through a model as it is: which inputs made this score, and by how much.

    .. math:: R_x = x \\, g_x, \\qquad g_x = \\sum_y g_y \\, (\\text{rule of } y = f(x)), \\qquad g_{score} = 1

    The model runs unchanged, its output is bit-identical, and one backward pass with changed gradients gives the
    relevance; with ``rule="attnlrp"`` it costs about as much as an input gradient. Sums of relevance equal the score up to
    what biases, softmax and eps keep (``details=True`` tells).

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Its parameters, gradients, flags and hooks are left as they are.
    inputs : Tensor, tuple of tensors, or mapping
        First dimension: batch B. A float tensor is attributed entry by entry; integer token ids (B,N) at their embeddings
        (B,N,D). A tuple is given to the model by position, a mapping by keyword: there ``input_ids`` and float
        tensors are attributed, but no other integers and no masks.
    target : optional
        What is explained: None (an output of one number per sample itself, else the predicted class), an int, a tuple
        of indices behind the batch dimension as (token, class), one of either per sample, a tensor (B,), or a
        function of the output that returns scores (B,). Of a Hugging Face output the logits are taken, or else the
        first tensor.
    rule : str, Composite or Rule
        "attnlrp" (Achtibat et al. 2024; eps = 0), "cp-lrp" (Ali et al. 2022: attention weights are constants), "epsilon",
        "zplus" or "gamma" (that rule for linear and convolution, AttnLRP for the rest), a Composite, or one rule for
        all linear operations.
    additional_forward_args : optional
        Further arguments of the model, not attributed: one, a tuple, or a mapping of keywords. They are constants, also
        where they require grad.
    fallback : {None, "gradient"}
        What happens at operations without a rule: an error, or their own gradient.
    details : bool
        Return an :class:`Attribution` with relevance per layer and head and a table of what each operation kept.

    Returns
    -------
    Tensor, tuple, dict or Attribution
        Relevance shaped like the inputs; in a tuple None for what is not attributed, in a dict only what is.

    Raises
    ------
    TypeError, ValueError
        One line that names the argument; an operation that no rule covers (under a rule for linear operations also a product
        with a weight that it cannot be given to, as in ``torch.jit``); a score that depends on tensors that require grad and
        are neither inputs nor the model's own; dropout or batch norm in training mode.

    Notes
    -----
    A model under ``torch.compile`` runs uncompiled. Gradient checkpointing works in its non-reentrant form. Flat, WSquare
    and ZBox give relevance where x = 0 only at operations that read the input itself.

    Examples
    --------
    >>> import torch, xai_fast as xf
    >>> model = torch.nn.Linear(2, 2, bias=False).eval()
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    >>> xf.lrp.attribute(model, torch.tensor([[1.0, 1.0]]), target=1)
    tensor([[ 3., -1.]])
    """
    _check_model(model)
    if fallback not in (None, "gradient"):
        raise ValueError(f"fallback: expected None or 'gradient', got {fallback!r}")
    composite = as_composite(rule)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model), uncompiled():
        given = Inputs.of(inputs, additional_forward_args)
        observer = Observer(model, given.batch) if details else None
        with observer or nullcontext():
            mode, output, score = _forward(model, given, target, composite, observer)
            _check_sources(model, given, score)
            if fallback is None:
                _check_complete(model, given, composite, mode, score)
            gradients = _backward(mode, given, score)
        relevance = given.relevance(gradients)
        if observer is None:
            return relevance
        return observer.report(relevance, first_tensor(output).detach(), score.detach())


def _forward(
    model: nn.Module, given: Inputs, target: Any, composite: Composite, observer: Observer | None
) -> tuple[RelevanceMode, Any, Tensor]:
    mode = RelevanceMode(composite, model=model, observer=observer)
    args, kwargs = given.prepare(mode)
    with mode:
        output = model(*args, **kwargs)
        given.check_embedded()
        score = select_score(output, target, given.batch)
    return mode, output, score


def _backward(mode: RelevanceMode, given: Inputs, score: Tensor) -> Sequence[Tensor | None]:
    """The gradient of each leaf."""
    leaves = given.leaves()
    with mode:
        found = [*torch.autograd.grad(score.sum(), leaves, allow_unused=True)]
    if mode.direct:
        tensors, relevance = zip(*mode.direct, strict=True)
        given.add_direct(torch.autograd.grad(tensors, leaves, relevance, allow_unused=True))
    return found


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if not module.training:
            continue
        is_random = isinstance(module, _DropoutNd) and module.p > 0
        # Batch statistics would mix the samples, and the running ones would change.
        if is_random or (isinstance(module, _NormBase) and module.track_running_stats):
            raise ValueError(
                f"model: expected evaluation mode, got {type(module).__name__} {name!r} in training mode; call model.eval()"
            )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A model that needs no gradient: whatever requires grad then carries relevance, and weight gradients cost nothing."""
    trained = {id(tensor): tensor for tensor in _own_tensors(model) if tensor.requires_grad and tensor.is_leaf}.values()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes or entries of such."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            for entry in value if type(value) in (tuple, list) else value.values() if type(value) is dict else (value,):
                if isinstance(entry, Tensor):
                    yield entry


def _check_sources(model: nn.Module, given: Inputs, score: Tensor) -> None:
    """Relevance ends at the inputs: what else requires grad would take a share of it."""
    known = {id(leaf) for leaf in given.leaves()}
    others = [leaf for leaf in leaves_behind(score.grad_fn) if id(leaf) not in known]
    if others:
        names = {id(parameter): f"parameter {name!r}" for name, parameter in model.named_parameters()}
        what = names.get(id(others[0]), f"a tensor of shape {tuple(others[0].shape)}")
        raise ValueError(
            f"model: expected that only its inputs and parameters require grad, got a score with a graph to {what} as well; "
            "detach what brings it there"
        )


def _check_complete(model: nn.Module, given: Inputs, composite: Composite, mode: RelevanceMode, score: Tensor) -> None:
    step = unknown_step(score.grad_fn, mode.verified, mode.ruled)
    if step is not None:
        where = _module_of_unknown_step(model, given, composite)
        raise ValueError(f"model: expected operations with a rule, got {step}{where}; fallback='gradient' uses its gradient")


def _module_of_unknown_step(model: nn.Module, given: Inputs, composite: Composite) -> str:
    """Runs the model again, and looks at each module as it ends: the first with an unknown step behind its output, and none
    behind its inputs, holds it.
    """
    mode = RelevanceMode(composite, model=model)
    found: list[str] = []

    def is_unknown(values: Any) -> bool:
        roots = {t.grad_fn for t in tensors_of(values)} - {None}
        return any(unknown_step(root, mode.verified, mode.ruled) for root in roots)

    def look(name: str, inputs: Any, output: Any) -> None:
        if not found and is_unknown(output) and not is_unknown(inputs):
            found.append(name)

    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: look(name, (args, kwargs), output), with_kwargs=True
        )
        for name, module in hookable_modules(model)
    ]
    try:
        args, kwargs = given.prepare(mode)
        with mode:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return f" in module {found[0]!r}" if found and found[0] else ""
