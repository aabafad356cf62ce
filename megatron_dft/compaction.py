"""Masked tokens left out: only tokens that have something to learn go through the output layer.

In SFT half to nine tenths of the tokens are masked, yet all of them are multiplied with the largest matrix of the
model, three times: forward, for the gradient of the hidden states and for that of the weight. Here they are dropped:

    rows    where the target is not ignored                   one question to the device, the only one
    loss    of hidden[rows] and target[rows]                  output layer and loss, at the size that is left
    result  the loss at those tokens, 0 at the others

Exact, because a token that is ignored has neither a loss nor a gradient. The rows are the same on all tensor-parallel
ranks, because the mask is. A batch without any token to learn from keeps one, which is ignored: every parameter gets
its gradient of 0, and no rank is missing from a collective.

Under sequence parallelism the sequence is gathered first (`gather_sequence`) and the rows are picked from all of it.
Left out: CUDA graphs, which cannot hold a size that depends on data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.stats import TokenStats

LossAndStats = Callable[[Tensor, Tensor], tuple[Tensor, TokenStats]]  # hidden [n, H], target [n] -> [n], of [n]


def compacted(
    loss_and_stats: LossAndStats,
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N]
    ignore_index: int,
) -> tuple[Tensor, TokenStats, Tensor | None]:
    """Loss [N], and the statistics of the tokens at `rows` [n]; None: they are of all N tokens, in order."""
    rows = _live_rows(target, ignore_index)
    if len(rows) == len(target):
        return whole(loss_and_stats, hidden, target, ignore_index)
    loss, stats = loss_and_stats(_Select.apply(hidden, rows), target[rows])
    return loss.new_zeros(len(target)).index_copy(0, rows, loss), stats, rows


def whole(
    loss_and_stats: LossAndStats,
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N]
    ignore_index: int,
) -> tuple[Tensor, TokenStats, None]:
    """The same without leaving tokens out."""
    return *loss_and_stats(hidden, target), None


def gather_sequence(
    hidden: Tensor,  # [s/tp, ...]
    tp_group: ProcessGroup | None,
) -> Tensor:  # [s, ...]
    """The whole sequence on every tensor-parallel rank.

    For a function whose gradient is already summed over the ranks, as that of an output layer without sequence
    parallelism is: backward takes this rank's part of it, without a collective.
    """
    return hidden if tp_group is None or tp_group.size() == 1 else _GatherSequence.apply(hidden, tp_group)


def _live_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Positions of the tokens that are not ignored; never empty where there are tokens. Waits for the device."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "compact_masked_tokens: expected no CUDA graph, got a stream that captures one, which cannot hold a size "
            "that depends on data; pass compact_masked_tokens=False (--no-loss-compact-masked-tokens)"
        )
    rows = (target != ignore_index).nonzero().squeeze(1)
    return rows if len(rows) else rows.new_zeros(min(1, len(target)))


class _Select(torch.autograd.Function):
    """Some rows. Backward copies: index_select's own adds, which on a GPU takes atomics, as rows might repeat."""

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
    """All-gather along the first dimension; backward slices."""

    @staticmethod
    def forward(ctx, hidden: Tensor, tp_group: ProcessGroup) -> Tensor:
        ctx.part = slice(tp_group.rank() * len(hidden), (tp_group.rank() + 1) * len(hidden))
        gathered = hidden.new_empty(tp_group.size() * len(hidden), *hidden.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, hidden.contiguous(), group=tp_group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[ctx.part].clone(), None  # not a view, which would keep the whole sequence
