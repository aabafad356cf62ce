"""The loss for torch.compile: two opaque operators, which do what the autograd function does in eager mode.

A compiled graph holds tensors, numbers and strings. Objective objects and process groups are therefore passed by name.
Numeric options may change without a recompile. The gradient is always a new tensor: the compiler places it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft import reference
from megatron_dft.autograd import LossOptions, check, loss_backward, loss_forward
from megatron_dft.objectives import Objective, of_graph_name


@torch.library.custom_op("megatron_dft::loss", mutates_args=())
def loss_operator(
    logits: Tensor,
    target: Tensor,
    objective: str,
    tp_group: str | None,
    ignore_index: int,
    value: str,
    true_vocab_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss and what backward needs, as one operation of a compiled graph."""
    options = _named_options(objective, tp_group, ignore_index, value, true_vocab_size, backend)
    return loss_forward(logits, target, options)[:2]


@torch.library.custom_op("megatron_dft::loss_backward", mutates_args=())
def _backward_operator(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    upstream: Tensor,
    tp_group: str | None,
    true_vocab_size: int | None,
    backend: str,
) -> Tensor:
    """The gradient of the logits."""
    options = _named_options("nll", tp_group, -100, "objective", true_vocab_size, backend)
    return loss_backward(logits, target, saved, upstream, options, inplace=False)


@loss_operator.register_fake
def _(logits: Tensor, target: Tensor, *options) -> tuple[Tensor, Tensor]:
    check(logits, target)
    dtype = reference.accumulation_dtype(logits)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty((3, *target.shape), dtype=dtype)


@_backward_operator.register_fake
def _(logits: Tensor, *others) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, target, _, tp_group, _, _, true_vocab_size, backend = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.options = (tp_group, true_vocab_size, backend)


def _operator_backward(ctx, upstream: Tensor, _) -> tuple:
    logits, target, saved = ctx.saved_tensors
    return _backward_operator(logits, target, saved, upstream, *ctx.options), *[None] * 7


loss_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)
_GROUPS: dict[str, ProcessGroup] = {}  # of the compiled graphs of this process


def name_of_objective(objective: Objective) -> str:
    """The objective's `graph_name`. Adds a guard on each parameter, or on the object: another one recompiles."""
    for field in objective.__match_args__ if objective.by_value else ("serial",):
        value, known = getattr(objective, field), objective.graph_value(field)
        # Never true. Dynamo guards only values that are used.
        if value != (known if isinstance(value, str) else float(known)):
            raise ValueError(field)
    return objective.graph_name()


@torch.compiler.assume_constant_result
def name_of(group: ProcessGroup) -> str:
    """The string that stands for a process group in a compiled graph."""
    name = f"group #{id(group)}"
    _GROUPS[name] = group  # kept, so that no other group gets its id
    return name


def _named_options(objective: str, tp_group: str | None, *others) -> LossOptions:
    return LossOptions(of_graph_name(objective), None if tp_group is None else _GROUPS[tp_group], *others)
