"""Masked-token compaction: only tokens with a loss pass through the output layer.

In SFT, 50% to 90% of the tokens are masked. The output layer, the largest matrix of the model, multiplies them three
times: in forward, for the gradient of the hidden states, for the gradient of the weight. Here they are removed first:

    rows    positions whose target is not ignored             one host-device sync (`nonzero`)
    loss    of hidden[rows] and target[rows]                  output layer and loss on fewer tokens
    result  the loss at `rows`, 0 elsewhere

This is exact: an ignored token has neither loss nor gradient. `rows` is the same on all tensor-parallel ranks, because
the mask is. A micro-batch without valid tokens keeps one ignored token: every parameter gets a zero gradient, and all
ranks take part in the collectives.

Under sequence parallelism the sequence is gathered first (`gather_sequence`).
Not supported: CUDA graphs, whose sizes cannot depend on data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.ops.stats import TokenStats

LossAndStats = Callable[..., tuple[Tensor, TokenStats]]  # (hidden [n, H], target [n], *others [n]) -> loss [n]


def loss_valid_tokens(
    loss_and_stats: LossAndStats,
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N]
    *others: Tensor,  # [N], further arguments of loss_and_stats
    ignore_index: int,
) -> tuple[Tensor, TokenStats, Tensor | None]:
    """Loss without the masked tokens: loss [N], statistics of the valid tokens [n], and their positions [n].

    The positions are None if all N tokens are valid.
    """
    rows = _valid_rows(target, ignore_index)
    if len(rows) == len(target):
        return loss_all_tokens(loss_and_stats, hidden, target, *others, ignore_index=ignore_index)
    loss, stats = loss_and_stats(_Select.apply(hidden, rows), target[rows], *(x[rows] for x in others))
    return loss.new_zeros(len(target)).index_copy(0, rows, loss), stats, rows


def loss_all_tokens(
    loss_and_stats: LossAndStats,
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N]
    *others: Tensor,  # [N]
    ignore_index: int,
) -> tuple[Tensor, TokenStats, None]:
    """The same result from all tokens, without compaction and without a host-device sync."""
    return *loss_and_stats(hidden, target, *others), None


def gather_sequence(
    hidden: Tensor,  # [s/tp, ...]
    tp_group: ProcessGroup | None,
) -> Tensor:  # [s, ...]
    """All-gather along the sequence dimension over the tensor-parallel ranks.

    The gradient that reaches it must already be summed over the ranks, as the output layer does without sequence
    parallelism. Backward takes this rank's slice, without a collective.
    """
    return hidden if tp_group is None or tp_group.size() == 1 else _GatherSequence.apply(hidden, tp_group)


def _valid_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Positions of the valid tokens; of one ignored token if there are none. One host-device sync."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "compact_masked_tokens: not supported during CUDA graph capture, because sizes depend on the data; pass "
            "compact_masked_tokens=False (--no-dft-compact-masked-tokens)"
        )
    rows = (target != ignore_index).nonzero().squeeze(1)
    return rows if len(rows) else rows.new_zeros(min(1, len(target)))


class _Select(torch.autograd.Function):
    """index_select of distinct rows. Its backward copies; that of index_select adds, with atomics on a GPU."""

    @staticmethod
    def forward(ctx, hidden: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = hidden.shape
        return hidden.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(0, rows, gradient), None


class _GatherSequence(torch.autograd.Function):
    """All-gather along the first dimension in forward, slice in backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, tp_group: ProcessGroup) -> Tensor:
        ctx.part = slice(tp_group.rank() * len(hidden), (tp_group.rank() + 1) * len(hidden))
        gathered = hidden.new_empty(tp_group.size() * len(hidden), *hidden.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, hidden.contiguous(), group=tp_group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[ctx.part].clone(), None  # a view would keep the whole sequence alive
