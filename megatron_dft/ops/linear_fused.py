"""Output layer and loss fused: the loss from hidden states, without materializing all logits.

Chunks of the vocabulary, for every upstream gradient. A chunk of columns is handled like the shard of a further rank:
the same kernels compute its statistics, and the same merge combines them.

    forward     for each chunk: logits = hidden weight_c^T -> statistics           one buffer [tokens, chunk] for all
                all-gather, merge, objective                                       as in vocab_parallel.py
    backward    for each chunk: logits recomputed -> gradient written over them
                hidden gradient += gradient weight_c,  weight gradient_c = gradient^T hidden

Memory: [tokens, chunk] instead of [tokens, V/tp]. Compute: four products of size [tokens, V/tp, H] instead of three.
`keep_chunks` trades back: that many chunks keep their logits for backward and are not recomputed. The hidden gradient
is summed over chunks in fp32 and cast to the dtype of the hidden states.

Chunks of tokens, for an upstream gradient that is known in forward. Forward computes the gradients as well:

    forward     for each chunk: logits = hidden_c weight^T -> statistics           one buffer [chunk, V/tp] for all
                all-gather, merge, objective -> gradient written over the logits
                hidden gradient_c = gradient weight,  weight gradient += gradient^T hidden_c
    backward    if the upstream gradient is another one, the gradients become NaN; no host-device sync

Memory: [chunk, V/tp], and the hidden gradient until backward. Compute: three products. The weight gradient is read and
written once per chunk, and summed in fp32: in a buffer of the host, or in one of its own, which lives until backward.
Forward has to be followed by exactly one backward. Not for objectives that depend on all tokens of a batch.

Both: tensor-parallel ranks sum the hidden gradient in one all-reduce, which overlaps with the last product. Masked
tokens are removed first (compaction.py). Not supported: biases, fp8 and fp4 weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_dft.ops.compaction import gather_sequence, loss_all_tokens, loss_valid_tokens
from megatron_dft.ops.objectives import Objective, parse_objective
from megatron_dft.ops.stats import TokenStats, accumulation_dtype
from megatron_dft.ops.vocab_parallel import (
    LossOptions,
    check_inputs,
    gather_and_merge,
    join_stats,
    pack_stats,
    unpack_stats,
)

VOCAB_CHUNK = 8192
TOKEN_CHUNK = 2048


@dataclass(frozen=True)
class Split:
    """How the logits of a rank are split into chunks: of the vocabulary, or of tokens."""

    vocab_chunk: int = VOCAB_CHUNK
    keep_chunks: int = 0
    token_chunk: int = TOKEN_CHUNK

    def __post_init__(self) -> None:
        if self.vocab_chunk < 1:
            raise ValueError(f"vocab_chunk: expected at least 1 column, got {self.vocab_chunk}")
        if self.keep_chunks < 0:
            raise ValueError(f"keep_chunks: expected 0 or more, got {self.keep_chunks}")
        if self.token_chunk < 1:
            raise ValueError(f"token_chunk: expected at least 1 token, got {self.token_chunk}")

    def columns(self, width: int) -> list[slice]:
        """The chunks of the vocabulary, in order; the last may be smaller."""
        return [slice(c, min(c + self.vocab_chunk, width)) for c in range(0, width, self.vocab_chunk)]

    def rows(self, tokens: int) -> list[slice]:
        """The chunks of tokens, in order: as few as possible, of equal size up to rounding; one without tokens."""
        size = math.ceil(tokens / max(math.ceil(tokens / self.token_chunk), 1))
        return [slice(r, min(r + size, tokens)) for r in range(0, tokens, size or 1)] or [slice(0, 0)]


class WeightGradient:
    """Collects the gradient of the weight in a new tensor. A host with gradient buffers has a subclass."""

    def __init__(self, weight: Tensor, summed: bool) -> None:
        """`summed`: the same columns are added several times, in fp32 (fp64 for fp64)."""
        self.summed, self.dtype = summed, weight.dtype
        self.total = torch.zeros_like(weight, dtype=accumulation_dtype(weight)) if summed else torch.empty_like(weight)

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        """Add one chunk: gradient [n, chunk] of its logits, hidden [n, H]."""
        if self.summed:
            add_product(self.total[columns], gradient.t(), hidden)
        else:
            torch.mm(gradient.t(), hidden, out=self.total[columns])

    def multiply(self, factor: Tensor) -> None:
        """Multiply the gradient by a factor []: 1 or NaN. In the buffer of a host the first row is enough."""
        self.total.mul_(factor)

    def result(self) -> Tensor | None:
        """The weight gradient returned to autograd, or None if it was added to a buffer."""
        return self.total.to(self.dtype)


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
    vocab_chunk: int | None = None,
    keep_chunks: int = 0,
    upstream: float | Tensor | None = None,  # [] or [...]
    token_chunk: int | None = None,
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
        vocab_chunk: columns of the vocabulary shard per chunk; None: 8192.
        keep_chunks: chunks that keep their logits for backward, [tokens, vocab_chunk] each, and are not recomputed.
            The gradient overwrites them; a second backward raises.
        upstream: the gradient that the loss of each valid token will receive, if it is known: 1.0 for
            `linear_dft_loss(...).sum()`. Gradients are then computed in forward, in chunks of tokens, with three
            products instead of four. If backward receives a gradient that differs by more than 1e-6, relative, all
            gradients are NaN. A second backward raises. The weight gradient is summed in an fp32 buffer, which lives
            until backward.
        token_chunk: tokens per chunk if `upstream` is given; None: 2048.
        compact_masked_tokens: remove ignored tokens first. Costs one host-device sync. Set False under CUDA graph
            capture.

    Other arguments, result and errors: as in `vocab_parallel_dft_loss`. ValueError also for `upstream` with an
    objective that depends on all tokens of a batch, and for chunk sizes of the other kind. Under torch.compile it
    breaks the graph. Under torch.autocast the products stay in the dtype of `hidden`.
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
    split = _split(vocab_chunk, keep_chunks, token_chunk, upstream is not None)
    if sequence_parallel:
        hidden = gather_sequence(hidden, tp_group)
    _check(hidden, weight, target)

    def loss_and_stats(hidden: Tensor, target: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, TokenStats]:
        return linear_loss_and_stats(hidden, weight, target, options, split, upstream)

    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    known = () if upstream is None else (_per_token(upstream, hidden, target).reshape(-1),)
    compute = loss_valid_tokens if compact_masked_tokens else loss_all_tokens
    loss, *_ = compute(loss_and_stats, rows, targets, *known, ignore_index=ignore_index)
    return loss.view(target.shape)


def linear_loss_and_stats(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V/tp, H]
    target: Tensor,  # [N]
    options: LossOptions,
    split: Split,
    upstream: Tensor | None = None,  # [N] the gradient that the loss will receive; None: unknown
    weight_gradient: type[WeightGradient] = WeightGradient,
) -> tuple[Tensor, TokenStats]:
    """`linear_dft_loss` of N rows without compaction, and their statistics.

    Raises:
        ValueError: for `upstream` with an objective that depends on all tokens of a batch.
    """
    if upstream is not None and not options.objective.per_token:
        raise ValueError(
            f"upstream: objective {str(options.objective)!r} depends on all tokens of a batch, so its gradient cannot "
            "be computed in chunks of tokens; omit upstream"
        )
    target, reference = options.split(target.contiguous(), hidden)
    if upstream is None or not torch.is_grad_enabled():
        loss, *stats = _LossInVocabChunks.apply(hidden, weight, target, reference, options, split, weight_gradient)
    else:
        rows = split.rows(len(hidden))
        loss, *stats = _LossInTokenChunks.apply(
            hidden, weight, target, reference, upstream, options, rows, weight_gradient
        )
    return loss, unpack_stats(stats, options.shard(len(weight)).vocab_size)


def differs(upstream: Tensor, expected: Tensor, valid: Tensor) -> Tensor:  # each [...] -> [] bool
    """Whether a valid token received another gradient than expected. No host-device sync."""
    return (~((upstream - expected).abs() <= 1e-6 * expected.abs()) & valid).any()


class _LossInVocabChunks(torch.autograd.Function):
    """hidden [N, H] -> loss [N], differentiable, and the statistics, which are not; in chunks of the vocabulary."""

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
        # Saved tensors may lose the attributes of a parameter, as `main_grad`: with hooks, they are copies.
        ctx.settings = kernels, shard, chunks, options.tp_group, partial(into, weight, summed=False)
        return loss, *pack_stats(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        hidden, weight, target, saved, *kept = ctx.saved_tensors
        kernels, shard, chunks, tp_group, into = ctx.settings
        hidden_gradient = _HiddenGradient(hidden, tp_group) if ctx.needs_input_grad[0] else None
        weight_gradient = into() if ctx.needs_input_grad[1] else None
        buffer = _buffer(hidden, chunks[len(kept) :])
        for i, columns in enumerate(chunks):
            logits = kept[i] if i < len(kept) else _logits(hidden, weight, columns, buffer)
            kernels.shard_gradient(
                logits=logits, target=target, saved=saved, upstream=upstream, shard=shard.chunk(columns), out=logits
            )
            if hidden_gradient:
                hidden_gradient.add(logits, weight[columns], last=i == len(chunks) - 1)
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

    def add(self, gradient: Tensor, weight: Tensor, last: bool) -> None:
        add_product(self.total, gradient, weight)
        if last:
            self.total = self.total.to(self.dtype)
            self.sum_over_ranks = _all_reduce(self.total, self.tp_group)

    def result(self) -> Tensor:
        if self.sum_over_ranks:
            self.sum_over_ranks.wait()
        return self.total


class _LossInTokenChunks(torch.autograd.Function):
    """As `_LossInVocabChunks`, in chunks of tokens. `expected` [N] is the upstream gradient."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        reference: Tensor | None,
        expected: Tensor,
        options: LossOptions,
        chunks: list[slice],
        into: type[WeightGradient],
    ):
        kernels, shard = options.kernels(hidden.device, hidden.dtype), options.shard(len(weight))
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = into(weight, summed=True) if ctx.needs_input_grad[1] else None
        buffer = hidden.new_empty(chunks[0].stop, len(weight))
        losses, parts, sum_over_ranks = [], [], None
        for rows in chunks:
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: rows.stop - rows.start])
            sums = kernels.shard_stats(
                logits=logits,
                target=target[rows],
                ignore_index=options.ignore_index,
                shard=shard,
                needs=options.needs,
            )
            of_reference = None if reference is None else reference[rows]
            loss, saved, stats = gather_and_merge(
                kernels, sums[None], target[rows], of_reference, shard.vocab_size, options
            )
            losses.append(loss)
            parts.append(stats)
            if hidden_gradient is None and weight_gradient is None:
                continue
            kernels.shard_gradient(
                logits=logits, target=target[rows], saved=saved, upstream=expected[rows], shard=shard, out=logits
            )
            if hidden_gradient is not None:
                torch.mm(logits, weight, out=hidden_gradient[rows])
                if rows is chunks[-1]:
                    sum_over_ranks = _all_reduce(hidden_gradient, options.tp_group)
            if weight_gradient is not None:
                weight_gradient.add(slice(None), logits, hidden[rows])
        ctx.save_for_backward(expected, target != options.ignore_index)
        ctx.gradients = hidden_gradient, sum_over_ranks, weight_gradient
        return torch.cat(losses), *pack_stats(ctx, join_stats(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_dft_loss: forward computed the gradients for one backward, and this is the second; omit "
                "upstream (in Megatron --dft-token-chunk)"
            )
        (hidden_gradient, sum_over_ranks, weight_gradient), ctx.gradients = ctx.gradients, None
        factor = torch.where(differs(upstream, *ctx.saved_tensors), torch.nan, 1.0)
        if sum_over_ranks:
            sum_over_ranks.wait()
        if weight_gradient is not None:
            weight_gradient.multiply(factor)
        return (
            None if hidden_gradient is None else hidden_gradient.mul_(factor),
            None if weight_gradient is None else weight_gradient.result(),
            *[None] * 6,
        )


def _all_reduce(gradient: Tensor, tp_group: ProcessGroup | None) -> torch.distributed.Work | None:
    """Sum over the tensor-parallel ranks in place, asynchronously."""
    if tp_group is None or tp_group.size() == 1:
        return None
    return torch.distributed.all_reduce(gradient, group=tp_group, async_op=True)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, also under torch.autocast, which ignores in-place operations and those with `out`.

    An fp32 total and bf16 factors: CUDA adds the fp32 product from torch 2.8 on. Elsewhere the product is rounded to
    bf16 first.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right, out=left.new_empty(len(left), right.shape[1])))


def _buffer(hidden: Tensor, chunks: list[slice]) -> Tensor:
    """A buffer that fits the logits of each of the chunks."""
    return hidden.new_empty(len(hidden) * max((c.stop - c.start for c in chunks), default=0))


def _logits(hidden: Tensor, weight: Tensor, columns: slice, buffer: Tensor) -> Tensor:
    shape = len(hidden), columns.stop - columns.start
    return torch.mm(hidden, weight[columns].t(), out=buffer[: shape[0] * shape[1]].view(shape))


def _split(vocab_chunk: int | None, keep_chunks: int, token_chunk: int | None, in_forward: bool) -> Split:
    """The chunks of `linear_dft_loss`. Raises ValueError for sizes of the kind that is not used."""
    if in_forward and (vocab_chunk is not None or keep_chunks):
        raise ValueError("vocab_chunk, keep_chunks: not used with upstream; pass token_chunk")
    if not in_forward and token_chunk is not None:
        raise ValueError("token_chunk: requires upstream; without it pass vocab_chunk")
    return Split(
        vocab_chunk=VOCAB_CHUNK if vocab_chunk is None else vocab_chunk,
        keep_chunks=keep_chunks,
        token_chunk=TOKEN_CHUNK if token_chunk is None else token_chunk,
    )


def _per_token(upstream: float | Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    """[] or [...] -> [...], in the dtype of the loss. No host-device sync."""
    dtype = accumulation_dtype(hidden)
    if not isinstance(upstream, Tensor):
        upstream = torch.full((), upstream, dtype=dtype, device=hidden.device)
    if upstream.dim() and upstream.shape != target.shape:
        raise ValueError(
            f"upstream: expected a number or the shape of the target, {tuple(target.shape)}, got "
            f"{tuple(upstream.shape)}"
        )
    return upstream.detach().to(hidden.device, dtype).expand(target.shape)


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
