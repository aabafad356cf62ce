"""The loss under torch.compile: two opaque operators with the forward and the backward of the autograd function.

The arguments of an operator are tensors, numbers and strings. Objectives and process groups are therefore registered
here and passed by name. Numeric options may change without a recompile. The gradient is a new tensor: the compiler
decides where it is placed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.ops.objectives import Objective, of_graph_name
from megatron_dft.ops.stats import accumulation_dtype
from megatron_dft.ops.vocab_parallel import LossOptions, check_inputs, loss_backward, loss_forward

_GROUPS: dict[str, ProcessGroup] = {}  # of the compiled graphs of this process


def compiled_loss(
    logits: Tensor,
    target: Tensor,
    *,
    objective: str | Objective,
    tp_group: ProcessGroup | None,
    ignore_index: int,
    return_nll: bool,
    true_vocab_size: int | None,
    backend: str,
    batch_group: ProcessGroup | None,
) -> Tensor:
    """`vocab_parallel_dft_loss` in a graph that is being compiled."""
    name = objective if isinstance(objective, str) else _objective_name(objective)
    group, batch = (None if x is None else _group_name(x) for x in (tp_group, batch_group))
    return _loss(logits, target, name, group, ignore_index, return_nll, true_vocab_size, backend, batch)[0]


@torch.library.custom_op("megatron_dft::loss", mutates_args=())
def _loss(
    logits: Tensor,
    target: Tensor,
    objective: str,
    tp_group: str | None,
    ignore_index: int,
    return_nll: bool,
    true_vocab_size: int | None,
    backend: str,
    batch_group: str | None,
) -> tuple[Tensor, Tensor]:
    """Loss [...], and what is saved for backward [3, ...]."""
    options = LossOptions(
        objective=of_graph_name(objective),
        tp_group=_group(tp_group),
        ignore_index=ignore_index,
        return_nll=return_nll,
        true_vocab_size=true_vocab_size,
        backend=backend,
        batch_group=_group(batch_group),
    )
    return loss_forward(logits, *options.split(target, logits), options)[:2]


@torch.library.custom_op("megatron_dft::loss_backward", mutates_args=())
def _loss_backward(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    upstream: Tensor,
    objective: str,
    tp_group: str | None,
    true_vocab_size: int | None,
    backend: str,
) -> Tensor:
    """Gradient of the logits [..., V/tp]."""
    options = LossOptions(
        objective=of_graph_name(objective),
        tp_group=_group(tp_group),
        true_vocab_size=true_vocab_size,
        backend=backend,
    )
    target, _ = options.split(target, logits)
    return loss_backward(logits, target, saved, upstream, options, inplace=False)


@_loss.register_fake
def _(logits: Tensor, target: Tensor, *options) -> tuple[Tensor, Tensor]:
    check_inputs(logits, target)
    dtype = accumulation_dtype(logits)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty((3, *target.shape), dtype=dtype)


@_loss_backward.register_fake
def _(logits: Tensor, *others) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, target, objective, tp_group, _, _, true_vocab_size, backend, _ = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.options = (objective, tp_group, true_vocab_size, backend)


def _backward(ctx, upstream: Tensor, _) -> tuple:
    logits, target, saved = ctx.saved_tensors
    return _loss_backward(logits, target, saved, upstream, *ctx.options), *[None] * 8


_loss.register_autograd(_backward, setup_context=_save_for_backward)


def _objective_name(objective: Objective) -> str:
    """The objective's `graph_name`. Adds a guard on each parameter, or on the object: another one recompiles."""
    for field in objective.__match_args__ if objective.by_value else ("serial",):
        value, known = getattr(objective, field), objective.graph_value(field)
        # Never true. Dynamo guards only values that are used.
        if value != (known if isinstance(value, str) else float(known)):
            raise ValueError(field)
    return objective.graph_name()


@torch.compiler.assume_constant_result
def _group_name(group: ProcessGroup) -> str:
    """The string that identifies a process group in a compiled graph."""
    name = f"group #{id(group)}"
    _GROUPS[name] = group  # kept, so that no other group gets its id
    return name


def _group(name: str | None) -> ProcessGroup | None:
    return None if name is None else _GROUPS[name]
