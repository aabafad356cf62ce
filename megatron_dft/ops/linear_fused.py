"""Output layer and loss fused: the loss from hidden states, without materializing all logits.

The vocabulary shard of a rank is split into chunks of columns. Chunks are handled like shards of further ranks: the
same kernels compute their statistics, and the same merge combines them.

    forward     for each chunk: logits = hidden weight_c^T -> statistics           one buffer [tokens, chunk] for all
                all-gather, merge, objective                                       as in vocab_parallel.py
    backward    for each chunk: logits recomputed -> gradient written over them
                hidden gradient += gradient weight_c,  weight gradient_c = gradient^T hidden

Memory: [tokens, chunk] instead of [tokens, V/tp]. Compute: four products of size [tokens, V/tp, H] instead of three.
`keep_chunks` trades back: that many chunks keep their logits for backward and are not recomputed. Exact for every
upstream gradient per token and every objective. The gradient of the hidden states is summed over chunks in fp32 and
cast to their dtype. Tensor-parallel ranks sum it in one all-reduce, which overlaps with the last product. Masked tokens
are removed first (compaction.py).

Saved for backward: hidden states, weight, target, three numbers per token, and the logits of `keep_chunks` chunks.
Not supported: biases, fp8 and fp4 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_dft.ops.compaction import gather_sequence, loss_all_tokens, loss_valid_tokens
from megatron_dft.ops.objectives import Objective, parse_objective
from megatron_dft.ops.stats import TokenStats, accumulation_dtype
from megatron_dft.ops.vocab_parallel import LossOptions, check_inputs, gather_and_merge, pack_stats, unpack_stats

VOCAB_CHUNK = 8192


@dataclass(frozen=True)
class Split:
    """How the vocabulary shard of a rank is split into chunks."""

    vocab_chunk: int = VOCAB_CHUNK
    keep_chunks: int = 0

    def __post_init__(self) -> None:
        if self.vocab_chunk < 1:
            raise ValueError(f"vocab_chunk: expected at least 1 column, got {self.vocab_chunk}")
        if self.keep_chunks < 0:
            raise ValueError(f"keep_chunks: expected 0 or more, got {self.keep_chunks}")

    def columns(self, width: int) -> list[slice]:
        """The chunks, in order; the last may be smaller."""
        return [slice(c, min(c + self.vocab_chunk, width)) for c in range(0, width, self.vocab_chunk)]


class WeightGradient:
    """Collects the gradient of the weight in a new tensor. A host with gradient buffers has a subclass."""

    def __init__(self, weight: Tensor) -> None:
        self.total = torch.empty_like(weight)

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        """Add one chunk: gradient [n, chunk] of its logits, hidden [n, H]."""
        torch.mm(gradient.t(), hidden, out=self.total[columns])

    def result(self) -> Tensor | None:
        """The weight gradient returned to autograd, or None if it was added to a buffer."""
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
    return_nll: bool = False,
    true_vocab_size: int | None = None,
    backend: str = "auto",
    vocab_chunk: int = VOCAB_CHUNK,
    keep_chunks: int = 0,
    compact_masked_tokens: bool = True,
    batch_group: ProcessGroup | None = None,
) -> Tensor:  # [...]
    """Output layer and per-token loss fused: `vocab_parallel_dft_loss(hidden @ weight.t(), target)` in less memory.

    Args:
        hidden: [..., H], input of the output layer, bf16, fp16, fp32 or fp64, the same on all ranks of `tp_group`; its
            gradient is summed over them.
        weight: [V/tp, H], this rank's equal shard of the output layer, in the dtype of `hidden`. May be frozen or tied.
        target: [...], int64 ids of the whole vocabulary, as in `vocab_parallel_dft_loss`.
        sequence_parallel: `hidden` is this rank's slice of the sequence, [s/tp, ...]; `target` is the whole, [s, ...].
        vocab_chunk: columns of the vocabulary shard per chunk.
        keep_chunks: chunks that keep their logits for backward, [tokens, vocab_chunk] each, and are not recomputed.
            The gradient overwrites them; a second backward raises.
        compact_masked_tokens: remove ignored tokens first. Costs one host-device sync. Set False under CUDA graph
            capture.

    Other arguments, result and errors: as in `vocab_parallel_dft_loss`. Under torch.compile it breaks the graph. Under
    torch.autocast the products stay in the dtype of `hidden`.
    """
    options = LossOptions(
        objective=parse_objective(objective),
        tp_group=tp_group,
        ignore_index=ignore_index,
        return_nll=return_nll,
        true_vocab_size=true_vocab_size,
        backend=backend,
        batch_group=batch_group,
    )
    split = Split(vocab_chunk=vocab_chunk, keep_chunks=keep_chunks)
    if sequence_parallel:
        hidden = gather_sequence(hidden, tp_group)
    _check(hidden, weight, target)

    def loss_and_stats(hidden: Tensor, target: Tensor) -> tuple[Tensor, TokenStats]:
        return linear_loss_and_stats(hidden, weight, target, options, split)

    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    compute = loss_valid_tokens if compact_masked_tokens else loss_all_tokens
    return compute(loss_and_stats, rows, targets, ignore_index)[0].view(target.shape)


def linear_loss_and_stats(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V/tp, H]
    target: Tensor,  # [N]
    options: LossOptions,
    split: Split,
    weight_gradient: type[WeightGradient] = WeightGradient,
) -> tuple[Tensor, TokenStats]:
    """`linear_dft_loss` of N rows without compaction, and their statistics."""
    target, reference = options.split(target.contiguous(), hidden)
    loss, *stats = _LinearLoss.apply(hidden, weight, target, reference, options, split, weight_gradient)
    return loss, unpack_stats(stats, options.shard(len(weight)).vocab_size)


class _LinearLoss(torch.autograd.Function):
    """hidden [N, H] -> loss [N], differentiable, and the statistics, which are not; chunk by chunk."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        reference: Tensor | None,
        options: LossOptions,
        split: Split,
        into: type[WeightGradient],
    ):
        kernels, shard = options.kernels(hidden.device, hidden.dtype), options.shard(len(weight))
        chunks = split.columns(len(weight))
        count = split.keep_chunks if any(ctx.needs_input_grad) else 0
        kept = [_logits(hidden, weight, columns, _buffer(hidden, [columns])) for columns in chunks[:count]]
        buffer = _buffer(hidden, chunks[count:])
        sums = []
        for i, columns in enumerate(chunks):
            logits = kept[i] if i < count else _logits(hidden, weight, columns, buffer)
            sums.append(
                kernels.shard_stats(
                    logits=logits,
                    target=target,
                    ignore_index=options.ignore_index,
                    shard=shard.chunk(columns),
                    needs=options.needs,
                )
            )
        loss, saved, stats = gather_and_merge(kernels, torch.stack(sums), target, reference, shard.vocab_size, options)
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
            kernels.shard_gradient(
                logits=logits, target=target, saved=saved, upstream=upstream, shard=shard.chunk(columns), out=logits
            )
            if hidden_gradient:
                hidden_gradient.add(_product(logits, weight[columns]), last=i == len(chunks) - 1)
            if weight_gradient:
                weight_gradient.add(columns, logits, hidden)
        return (
            hidden_gradient.result() if hidden_gradient else None,
            weight_gradient.result() if weight_gradient else None,
            *[None] * 5,
        )


class _HiddenGradient:
    """Gradient of the hidden states: sum over chunks in fp32 (fp64 for fp64), cast, asynchronous all-reduce."""

    def __init__(self, hidden: Tensor, tp_group: ProcessGroup | None) -> None:
        self.total = torch.zeros_like(hidden, dtype=accumulation_dtype(hidden))
        self.dtype, self.tp_group = hidden.dtype, tp_group
        self.sum_over_ranks: torch.distributed.Work | None = None

    def add(self, product: Tensor, last: bool) -> None:
        self.total.add_(product)
        if last:
            self.total = self.total.to(self.dtype)
            if self.tp_group is not None and self.tp_group.size() > 1:
                self.sum_over_ranks = torch.distributed.all_reduce(self.total, group=self.tp_group, async_op=True)

    def result(self) -> Tensor:
        if self.sum_over_ranks:
            self.sum_over_ranks.wait()
        return self.total


def _buffer(hidden: Tensor, chunks: list[slice]) -> Tensor:
    """A buffer that fits the logits of each of the chunks."""
    return hidden.new_empty(len(hidden) * max((c.stop - c.start for c in chunks), default=0))


def _logits(hidden: Tensor, weight: Tensor, columns: slice, buffer: Tensor) -> Tensor:
    shape = len(hidden), columns.stop - columns.start
    return torch.mm(hidden, weight[columns].t(), out=buffer[: shape[0] * shape[1]].view(shape))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in their dtype, also under torch.autocast, which ignores products with an `out`."""
    return torch.mm(left, right, out=left.new_empty(len(left), right.shape[1]))


def _check(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Raises ValueError for dtypes, shapes and devices that do not fit. No host-device sync."""
    check_inputs(hidden, target, "hidden states")
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"weight: expected [V/tp, {hidden.shape[-1]}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype or type(weight.data) is not Tensor or weight.device != hidden.device:
        raise ValueError(
            f"weight: expected a torch.Tensor of {hidden.dtype} on {hidden.device}, as hidden, got a "
            f"{type(weight.data).__name__} of {weight.dtype} on {weight.device}; for fp8 and fp4 compute the logits "
            "with the quantized layer, and call vocab_parallel_dft_loss"
        )
