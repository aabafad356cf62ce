"""Backend "torch": the kernel interface of the loss in plain PyTorch.

Other backends are tested against it, and it is the fast path on a CPU. Rows are processed in chunks that fit into the
cache: a chunk is copied into one fp32 scratch buffer (fp64 for fp64) and modified in place there. Results are rounded
to the output dtype once. Rows that are ignored, or whose coefficient is 0, are not read.

Cost on the logits: one read in forward; one read and one write in backward. Extra memory: a few MiB.
Slow on a GPU: it launches many small kernels, and needs host-device syncs to find the rows to compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.ops.objectives import Objective, loss_and_gate
from megatron_dft.ops.stats import (
    COLLISION,
    ENTROPY,
    UNDERFLOW,
    TokenStats,
    VocabShard,
    accumulation_dtype,
    merge_shards,
    row_names,
    token_stats,
    top_k,
)

NAME = "torch"
CHUNK_ELEMENTS = 1 << 19  # 2 MiB of fp32 scratch
LOG2_E = 1.0 / math.log(2.0)


def shard_stats(
    logits: Tensor,  # [N, V/tp]
    target: Tensor,  # [N] int64, ids of the whole vocabulary
    ignore_index: int,
    shard: VocabShard,
    needs: frozenset[str],
) -> Tensor:  # [K, N], rows as in `stats.row_names`
    """Sums over this shard, relative to the shard's own maximum; 0 at ignored rows."""
    valid = target != ignore_index
    names = row_names(needs)
    out = logits.new_zeros(len(names), len(logits), dtype=accumulation_dtype(logits))
    row = dict(zip(names, out, strict=True))
    k = min(top_k(needs), shard.columns)
    out[len(out) - top_k(needs) + k :] = -torch.inf
    spare: Tensor | None = None
    for rows, x in _chunks(logits, valid, shard):
        maximum = x.amax(1) if shard.columns else x.new_full((len(x),), -torch.inf)
        row["maximum"][rows] = maximum
        # A row of -inf: exponentials of 0 instead of NaN.
        x.sub_(maximum.masked_fill(maximum.isneginf(), 0.0)[:, None])
        for i, largest in enumerate(x.topk(k, 1).values.unbind(1) if k else ()):
            row[f"largest {i}"][rows] = largest
        if ENTROPY in needs:
            spare = torch.empty_like(x) if spare is None else spare  # the first chunk is the largest
            shifted = torch.clamp(x, min=UNDERFLOW, out=spare[: len(x)])
            row["shifted_sum"][rows] = shifted.mul_(_exp_(x)).sum(1)
        else:
            _exp_(x)
        row["sum"][rows] = x.sum(1)
        if COLLISION in needs:
            row["square_sum"][rows] = x.square_().sum(1)
    row["target_logit"].copy_(_target_logit(logits, target, valid, shard))
    return out


def merge(
    shards: Tensor,  # [R, K, N] from all ranks
    target: Tensor,  # [...] int64, N tokens
    ignore_index: int,
    vocab_size: int,
    objective: Objective,
    needs: frozenset[str],
    return_nll: bool,
    reference: Tensor | None = None,  # [...]
    batch_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, TokenStats]:
    """Loss [...], saved for backward [3, ...] (maximum, log-sum, gate), merged statistics [...]."""
    merged = merge_shards(shards.view(*shards.shape[:2], *target.shape), needs)
    stats = token_stats(merged, target != ignore_index, vocab_size, reference, batch_group)
    loss, gate = loss_and_gate(objective, stats)
    saved = torch.stack([merged.maximum, merged.log_sum, gate])
    return (-stats.logprob if return_nll else loss.clone()), saved, replace(stats, loss=loss, gate=saved[2])


def shard_gradient(
    logits: Tensor,  # [N, V/tp]
    target: Tensor,  # [N] int64, ids of the whole vocabulary
    saved: Tensor,  # [3, N] maximum and log-sum of the whole vocabulary, gate
    upstream: Tensor,  # [N]
    shard: VocabShard,
    out: Tensor,  # [N, V/tp], may be `logits`
) -> None:
    """Write upstream x gate x (softmax - onehot) to `out`; 0 in padding columns and where upstream or gate is 0."""
    maximum, log_sum, gate = saved
    coefficient = gated(upstream, gate)
    live = coefficient != 0.0
    out.index_fill_(0, (~live).nonzero().squeeze(1), 0.0)
    out[:, shard.columns :] = 0.0
    scale = coefficient * torch.exp(-log_sum)
    for rows, x in _chunks(logits, live, shard):
        _exp_(x.sub_(maximum[rows][:, None])).mul_(scale[rows][:, None])
        column, owned = _local_column(target[rows], shard)
        if shard.columns:
            x.scatter_add_(1, column[:, None], (-coefficient[rows] * owned)[:, None])
        out[rows, : shard.columns] = x.to(out.dtype)


def gated(upstream: Tensor, gate: Tensor) -> Tensor:
    """upstream x gate, and 0 where one of them is 0, even if the other is inf or NaN."""
    return (upstream * gate).masked_fill((upstream == 0.0) | (gate == 0.0), 0.0)


def _exp_(x: Tensor) -> Tensor:
    """e^x in place, as 2^(x log2 e): with AVX2 PyTorch's exp2 takes half the time of its exp."""
    return x.mul_(LOG2_E).exp2_()


def _chunks(logits: Tensor, live: Tensor, shard: VocabShard) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Live rows in chunks: their indices, and a scratch copy of their logits [rows, columns]."""
    columns = shard.columns
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    index = None if bool(live.all()) else live.nonzero().squeeze(1)
    count = len(logits) if index is None else len(index)
    scratch = logits.new_empty(min(step, count), columns, dtype=accumulation_dtype(logits))
    picked = logits.new_empty(0 if index is None else len(scratch), columns)
    for first in range(0, count, step):
        last = min(first + step, count)
        if index is None:
            yield slice(first, last), scratch[: last - first].copy_(logits[first:last, :columns])
        else:
            rows = index[first:last]
            source = torch.index_select(logits[:, :columns], 0, rows, out=picked[: len(rows)])
            yield rows, scratch[: len(rows)].copy_(source)


def _local_column(target: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Column of each target in this shard (0 if another shard owns it), and whether this shard owns it."""
    column = target - shard.start
    owned = (column >= 0) & (column < shard.columns)
    return column.masked_fill(~owned, 0), owned


def _target_logit(logits: Tensor, target: Tensor, valid: Tensor, shard: VocabShard) -> Tensor:
    """The target's logit on the shard that owns it, 0 on others; NaN on all for an id outside the vocabulary."""
    if shard.columns:
        column, owned = _local_column(target, shard)
        logit = logits.gather(1, column[:, None]).squeeze(1).to(accumulation_dtype(logits))
        logit = logit.masked_fill(~(owned & valid), 0.0)
    else:
        logit = logits.new_zeros(len(target), dtype=accumulation_dtype(logits))
    outside = valid & ((target < 0) | (target >= shard.vocab_size))
    return logit.masked_fill(outside, torch.nan)
