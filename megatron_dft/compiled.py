"""The loss for torch.compile: two opaque operators, which do what the autograd function does in eager mode.

A compiled graph holds tensors, numbers and strings. Objectives that are given as objects, and process groups, are
known to it by a name; options that are numbers may change without a new graph. The gradient is always a new tensor
here: where it lies in memory is the compiler's business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft import reference
from megatron_dft.autograd import LossOptions, check, loss_backward, loss_forward
from megatron_dft.objectives import Objective, Scheduled, parse_objective


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
_OBJECTS: dict[str, Any] = {}  # objectives and groups of the compiled graphs of this process


@torch.compiler.assume_constant_result
def name_of(thing: Objective | ProcessGroup) -> str:
    """What stands for it in a graph, which holds no objects."""
    for name, known in _OBJECTS.items():
        if known is thing or (_is_value(thing) and known == thing):
            return name
    name = f"{thing} #{len(_OBJECTS)}"
    _OBJECTS[name] = thing
    return name


def _is_value(thing: Objective | ProcessGroup) -> bool:
    """Whether an equal object can stand for it: not for a scheduled objective, which has the state of its run."""
    return isinstance(thing, Objective) and not isinstance(thing, Scheduled)


def _named_options(objective: str, tp_group: str | None, *others) -> LossOptions:
    group = None if tp_group is None else _OBJECTS[tp_group]
    return LossOptions(parse_objective(_OBJECTS.get(objective, objective)), group, *others)
