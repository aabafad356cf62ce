"""The public functions.

    vocab_parallel_dft_loss     logits -> loss of each token
    vocab_stats                 logits -> what the objectives are functions of, detached
    token_loss                  a cross entropy that someone else computed -> loss of each token

They check what they are given and pass it on: to the autograd function, or in a compiled graph to its operators.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_dft import reference
from megatron_dft.autograd import LossOptions, loss_and_stats, loss_forward
from megatron_dft.compiled import loss_operator, name_of, name_of_objective
from megatron_dft.objectives import NLL, Objective, loss_and_gate, parse_objective
from megatron_dft.stats import COLLISION, ENTROPY, TokenStats


def vocab_parallel_dft_loss(
    vocab_parallel_logits: Tensor,  # [..., V/tp]
    target: Tensor,  # [...]
    *,
    objective: str | Objective = "dft",
    tp_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    value: str = "objective",
    true_vocab_size: int | None = None,
    backend: str = "auto",
    inplace_backward: bool = False,
) -> Tensor:  # [...]
    """Loss of each token under an objective of the family, exact for a vocabulary split over `tp_group`.

    Args:
        vocab_parallel_logits: this rank's equal share of the vocabulary, bf16, fp16, fp32 or fp64, with any leading
            shape. Forward never writes to it.
        target: int64 ids in the whole vocabulary. `ignore_index` contributes no loss and no gradient; any other id
            outside the vocabulary makes the loss and the gradient of its token NaN, and under
            torch.autograd.detect_anomaly() raises.
        objective: "dft", "tsallis:q=0.5", ... or an `Objective`; see `OBJECTIVES`.
        tp_group: the ranks that share the vocabulary; None: all of it is here.
        value: "objective" returns the objective's loss. "nll" returns the cross entropy while backward still sends
            the objective's gradient, so that what a host reports keeps its meaning.
        true_vocab_size: leave the columns from here on (padding) out of the softmax. None: use every column.
        backend: "triton" (CUDA kernels), "torch", or "auto": Triton on CUDA, except for fp64 logits, and PyTorch
            elsewhere. A backend that is named never falls back to another.
        inplace_backward: write the gradient over the logits, which saves a buffer of their size. The logits must not
            be a leaf; whoever uses them again in a later backward gets autograd's version error. Under torch.compile
            the compiler places the gradient.

    Returns:
        The loss in nats, fp32 (fp64 for fp64 logits), in the shape of `target`.

    Raises:
        ValueError: for a shape, dtype, objective or option that does not fit, saying what was expected.
    """
    if torch.compiler.is_compiling():
        name = objective if isinstance(objective, str) else name_of_objective(objective)
        group = None if tp_group is None else name_of(tp_group)
        numbers = (ignore_index, value, true_vocab_size, backend)
        return loss_operator(vocab_parallel_logits, target, name, group, *numbers)[0]
    options = LossOptions(
        parse_objective(objective), tp_group, ignore_index, value, true_vocab_size, backend, inplace_backward
    )
    return loss_and_stats(vocab_parallel_logits, target, options)[0]


def vocab_stats(
    vocab_parallel_logits: Tensor,  # [..., V/tp]
    target: Tensor,  # [...]
    *,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    true_vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:  # of [...]
    """Log-probability, correctness, entropy and collision probability of each token, detached.

    Arguments and errors as in `vocab_parallel_dft_loss`. One pass over the logits and one all-gather.
    """
    everything = frozenset({ENTROPY, COLLISION})
    options = LossOptions(NLL(), tp_group, ignore_index, "objective", true_vocab_size, backend, statistics=everything)
    stats = loss_forward(vocab_parallel_logits.detach(), target, options)[2]
    return replace(stats, loss=None, gate=None)


def token_loss(
    nll: Tensor,  # [...]
    objective: str | Objective = "dft",
    *,
    valid: Tensor | None = None,  # [...] bool
) -> Tensor:  # [...]
    """The objective as a function of a cross entropy that someone else computed; nats in, nats out.

    For every objective of the target's probability alone; its gate is the derivative with respect to `nll`. The loss
    is fp32 (fp64 for fp64), and 0 for tokens that are not `valid`. Raises ValueError for objectives that need more
    than the NLL.
    """
    chosen = parse_objective(objective)
    if chosen.needs:
        raise ValueError(
            f"token_loss: expected an objective of the NLL alone, got {str(chosen)!r}, which needs "
            f"{', '.join(sorted(chosen.needs))}; call vocab_parallel_dft_loss with the logits"
        )
    return _TokenLoss.apply(nll, chosen, torch.ones_like(nll, dtype=torch.bool) if valid is None else valid)


class _TokenLoss(torch.autograd.Function):
    """loss(nll) with the gate as its derivative."""

    @staticmethod
    def forward(ctx, nll: Tensor, objective: Objective, valid: Tensor) -> Tensor:
        logprob = -nll.to(reference.accumulation_dtype(nll))
        loss, gate = loss_and_gate(objective, TokenStats(logprob.clamp(max=0.0), valid))
        ctx.save_for_backward(gate)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gate,) = ctx.saved_tensors
        return reference.gated(upstream, gate), None, None
