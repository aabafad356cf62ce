"""The loss from hidden states: output layer and loss as one, without ever holding the logits of all the vocabulary.

The vocabulary is split once more, into chunks of columns, and each chunk is to the loss what a tensor-parallel rank is:
the same kernels give its statistics, and the same merge puts them together.

    forward     for each chunk: logits = hidden weight_c^T -> statistics           one buffer [tokens, chunk] for all
                all-gather, merge, objective                                       as in autograd.py
    backward    for each chunk: logits again -> gradient over them
                hidden gradient += gradient weight_c,  weight gradient_c = gradient^T hidden

It buys memory with time: [tokens, V/tp] becomes [tokens, chunk], and four products of that size take the place of
three. `keep_chunks` goes back: the logits of so many chunks are kept for backward instead of being computed again.
Exact for any upstream gradient per token and for every objective, because nothing is decided before backward. The
gradient of the hidden states is summed over chunks in fp32 and, under tensor parallelism, over ranks in one all-reduce,
which runs beside the last product. Masked tokens are left out first (compaction.py).

Saved for backward: hidden states, three numbers per token. Left out: biases, and weights in fp8 or fp4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_dft import reference
from megatron_dft.autograd import LossOptions, check, gather_and_merge, pack_stats, unpack_stats
from megatron_dft.compaction import compacted, gather_sequence, whole
from megatron_dft.objectives import Objective, parse_objective
from megatron_dft.stats import TokenStats

VOCAB_CHUNK = 8192


@dataclass(frozen=True)
class Split:
    """How the vocabulary of a rank is cut."""

    vocab_chunk: int = VOCAB_CHUNK
    keep_chunks: int = 0

    def __post_init__(self) -> None:
        if self.vocab_chunk < 1:
            raise ValueError(f"vocab_chunk: expected at least 1 column, got {self.vocab_chunk}")
        if self.keep_chunks < 0:
            raise ValueError(f"keep_chunks: expected 0 or more, got {self.keep_chunks}")

    def columns(self, width: int) -> list[slice]:
        """The chunks in order; the last one may be smaller."""
        return [slice(c, min(c + self.vocab_chunk, width)) for c in range(0, width, self.vocab_chunk)]


class WeightGradient:
    """Where the gradient of the weight goes: a new tensor. A host with buffers of its own has its own class."""

    def __init__(self, weight: Tensor) -> None:
        self.total = torch.empty_like(weight)

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        """Of one chunk: gradient [n, chunk] of its logits, hidden [n, H]."""
        torch.mm(gradient.t(), hidden, out=self.total[columns])

    def result(self) -> Tensor | None:
        """What autograd is told, after the last chunk."""
        return self.total


@torch.compiler.disable
def linear_dft_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V/tp, H]
    target: Tensor,  # [...]
    *,
    objective: str | Objective = "dft",
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int = -100,
    value: str = "objective",
    true_vocab_size: int | None = None,
    backend: str = "auto",
    vocab_chunk: int = VOCAB_CHUNK,
    keep_chunks: int = 0,
    compact_masked_tokens: bool = True,
) -> Tensor:  # [...]
    """`vocab_parallel_dft_loss(hidden @ weight.t(), target, ...)`, in less memory and without masked tokens.

    Args:
        hidden: input of the output layer, bf16, fp16, fp32 or fp64, the same on all ranks of `tp_group`; its gradient
            is summed over them.
        weight: this rank's equal share of the output layer, in the dtype of `hidden`. May be frozen or tied.
        target: int64 ids in the whole vocabulary, as in `vocab_parallel_dft_loss`.
        sequence_parallel: `hidden` is this rank's part of the sequence, [s/tp, ...], and `target` all of it, [s, ...].
        vocab_chunk: how many columns of this rank's vocabulary are computed at a time.
        keep_chunks: how many chunks keep their logits for backward, [tokens, vocab_chunk] each, and are not computed
            twice. The gradient overwrites them, so with any a second backward is refused.
        compact_masked_tokens: drop ignored tokens first, for which the device is asked how many there are; False where
            a CUDA graph is captured.

    The other arguments, the result and the errors are those of `vocab_parallel_dft_loss`. Under torch.compile it is a
    break in the graph. Under torch.autocast the products stay in the dtype of `hidden`.
    """
    options = LossOptions(parse_objective(objective), tp_group, ignore_index, value, true_vocab_size, backend)
    split = Split(vocab_chunk, keep_chunks)
    if sequence_parallel:
        hidden = gather_sequence(hidden, tp_group)
    _check(hidden, weight, target)

    def loss_and_stats(hidden: Tensor, target: Tensor) -> tuple[Tensor, TokenStats]:
        return linear_loss_and_stats(hidden, weight, target, options, split)

    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    compute = compacted if compact_masked_tokens else whole
    return compute(loss_and_stats, rows, targets, ignore_index)[0].view(target.shape)


def linear_loss_and_stats(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V/tp, H]
    target: Tensor,  # [N]
    options: LossOptions,
    split: Split,
    weight_gradient: type[WeightGradient] = WeightGradient,
) -> tuple[Tensor, TokenStats]:
    """`linear_dft_loss` of rows, all of them, together with their statistics."""
    loss, *stats = _LinearLoss.apply(hidden, weight, target.contiguous(), options, split, weight_gradient)
    return loss, unpack_stats(stats, options.shard(len(weight)).vocab_size)


class _LinearLoss(torch.autograd.Function):
    """Chunk by chunk through output layer and kernels; the loss is differentiable, the statistics are not."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, options: LossOptions, split: Split, into):
        kernels, shard = options.kernels(hidden.device, hidden.dtype), options.shard(len(weight))
        chunks = split.columns(len(weight))
        count = split.keep_chunks if any(ctx.needs_input_grad) else 0
        kept = [_logits(hidden, weight, columns, _buffer(hidden, [columns])) for columns in chunks[:count]]
        buffer = _buffer(hidden, chunks[count:])
        parts = []
        for i, columns in enumerate(chunks):
            logits = kept[i] if i < count else _logits(hidden, weight, columns, buffer)
            part = kernels.shard_stats(logits, target, options.ignore_index, shard.chunk(columns), options.needs)
            parts.append(part)
        loss, saved, stats = gather_and_merge(kernels, torch.stack(parts), target, shard.vocab_size, options)
        ctx.save_for_backward(hidden, weight, target, saved, *kept)
        ctx.settings = kernels, shard, chunks, options.tp_group, into
        return loss, *pack_stats(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        hidden, weight, target, saved, *kept = ctx.saved_tensors
        kernels, shard, chunks, tp_group, into = ctx.settings
        hidden_gradient = _HiddenGradient(hidden, tp_group) if ctx.needs_input_grad[0] else None
        weight_gradient = into(weight) if ctx.needs_input_grad[1] else None
        buffer = _buffer(hidden, chunks[len(kept) :])
        for i, columns in enumerate(chunks):
            logits = kept[i] if i < len(kept) else _logits(hidden, weight, columns, buffer)
            kernels.shard_gradient(logits, target, saved, upstream, shard.chunk(columns), logits)
            if hidden_gradient:
                hidden_gradient.add(_product(logits, weight[columns]), last=i == len(chunks) - 1)
            if weight_gradient:
                weight_gradient.add(columns, logits, hidden)
        return (
            hidden_gradient.result() if hidden_gradient else None,
            weight_gradient.result() if weight_gradient else None,
            *[None] * 4,
        )


class _HiddenGradient:
    """The sum over chunks in fp32 (fp64 for fp64), then over ranks while the last product is computed."""

    def __init__(self, hidden: Tensor, tp_group: ProcessGroup | None) -> None:
        self.total = torch.zeros_like(hidden, dtype=reference.accumulation_dtype(hidden))
        self.dtype, self.tp_group = hidden.dtype, tp_group
        self.sum_over_ranks: torch.distributed.Work | None = None

    def add(self, part: Tensor, last: bool) -> None:
        self.total.add_(part)
        if last:
            self.total = self.total.to(self.dtype)
            if self.tp_group is not None and self.tp_group.size() > 1:
                self.sum_over_ranks = torch.distributed.all_reduce(self.total, group=self.tp_group, async_op=True)

    def result(self) -> Tensor:
        if self.sum_over_ranks:
            self.sum_over_ranks.wait()
        return self.total


def _buffer(hidden: Tensor, chunks: list[slice]) -> Tensor:
    """For the logits of any one of the chunks."""
    return hidden.new_empty(len(hidden) * max((c.stop - c.start for c in chunks), default=0))


def _logits(hidden: Tensor, weight: Tensor, columns: slice, buffer: Tensor) -> Tensor:
    shape = len(hidden), columns.stop - columns.start
    return torch.mm(hidden, weight[columns].t(), out=buffer[: shape[0] * shape[1]].view(shape))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In the dtype of its arguments, under torch.autocast, too, as the products above, which have an `out`."""
    return torch.mm(left, right, out=left.new_empty(len(left), right.shape[1]))


def _check(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Refuse what would give a wrong number, without asking the device."""
    check(hidden, target, "hidden states")
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"weight: expected [V/tp, {hidden.shape[-1]}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype or type(weight.data) is not Tensor or weight.device != hidden.device:
        raise ValueError(
            f"weight: expected a plain tensor as hidden is one, {hidden.dtype} on {hidden.device}, got a "
            f"{type(weight.data).__name__} of {weight.dtype} on {weight.device}; for fp8 and fp4 compute the logits "
            "with the quantized layer, and call vocab_parallel_dft_loss"
        )
