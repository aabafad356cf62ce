"""Per-token softmax statistics of vocabulary shards, and their merge.

An objective needs, for each token, a few sums over its row of logits x. They are taken relative to the maximum M of
the row, so nothing overflows:

    s = sum e^(x-M)            a = sum (x-M) e^(x-M)           q = sum e^(2(x-M))            x_y, the target's logit

Everything else follows from them, without the logits:

    log p_y = (x_y - M) - log s          the target's log-probability                         (nats, <= 0)
    H       = log s - a/s                entropy of the prediction                            (nats, >= 0)
    C       = q / s^2                    collision probability, the sum of squared probabilities

The k largest logits of a row, relative to M, give the entropy of the k most probable entries (`top_k_entropy`).

The vocabulary is split over tensor-parallel ranks, and over chunks of the output layer. Each shard has
(M, s, x_y[, a][, q][, k largest logits]) relative to its own maximum. `merge_shards` rebases them onto the common
maximum, as online softmax does. Shards are summed in rank order, so all ranks get the same bits.

Elsewhere: kernels of a shard (torch_backend.py, triton_backend.py), the all-gather (vocab_parallel.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

ENTROPY = "entropy"
COLLISION = "collision"
MEDIAN = "median NLL"
REFERENCE = "reference log-probability"
TOP = "top "  # begins the needs made by `top_k_need`
LOG_RATIO_LIMIT = 20.0
UNDERFLOW = -1e4  # e^-1e4 is 0 in every dtype, and 0 * -1e4 is 0 where 0 * -inf is NaN


@dataclass(frozen=True)
class VocabShard:
    """A contiguous slice of the vocabulary: the shard of a rank, or a chunk of it."""

    start: int  # id of the first column in the whole vocabulary
    columns: int  # columns without padding; padding columns are at the end of the shard
    vocab_size: int  # size of the whole vocabulary, the range of the softmax

    def chunk(self, columns: slice) -> VocabShard:
        """The shard of a slice of its columns, padding included."""
        inside = min(max(self.columns - columns.start, 0), columns.stop - columns.start)
        return VocabShard(start=self.start + columns.start, columns=inside, vocab_size=self.vocab_size)


@dataclass(frozen=True)
class ShardStats:
    """Sums over the whole vocabulary, merged from all shards. All [...]."""

    maximum: Tensor
    log_sum: Tensor
    target_logit: Tensor
    shifted_sum: Tensor | None
    square_sum: Tensor | None
    top_k_entropy: Tensor | None = None


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics of the whole vocabulary: the input of objectives and metrics.

    Detached, fp32 (fp64 for fp64 logits), 0 at invalid tokens. All tensors have the shape of the target [...].

    Attributes:
        logprob: log-probability of the target, nats, <= 0.
        valid: bool, the target is not `ignore_index`.
        top1: bool, no token has a larger logit than the target.
        entropy: entropy of the prediction, nats; None: not computed.
        collision: sum of squared probabilities; None: not computed.
        top_k_entropy: entropy of the k most probable entries, renormalized, nats; None: not computed.
        vocab_size: size of the vocabulary.
        reference: log-probability of the target under a reference model, nats; None: not needed; NaN: unknown.
        batch_group: ranks whose tokens `median_nll` covers; None: the tokens of this rank.
        loss: loss of the applied objective, nats.
        gate: gate of the applied objective.
    """

    logprob: Tensor
    valid: Tensor
    top1: Tensor | None = None
    entropy: Tensor | None = None
    collision: Tensor | None = None
    top_k_entropy: Tensor | None = None
    vocab_size: int | None = None
    reference: Tensor | None = None
    batch_group: ProcessGroup | None = None
    loss: Tensor | None = None
    gate: Tensor | None = None

    @cached_property
    def nll(self) -> Tensor:
        """Cross entropy of each token, nats, >= 0."""
        return -self.logprob

    @cached_property
    def prob(self) -> Tensor:
        """Probability of the target, in [0, 1]."""
        return self.logprob.exp()

    @cached_property
    def log_ratio(self) -> Tensor:
        """ln r, r = p / p_ref, clamped to [-20, 20]."""
        assert self.reference is not None
        return (self.logprob - self.reference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    @cached_property
    def ratio(self) -> Tensor:
        """r = p / p_ref, at most e^20."""
        assert self.reference is not None
        return (self.logprob - self.reference).clamp(max=LOG_RATIO_LIMIT).exp()

    @cached_property
    def kl(self) -> Tensor:
        """1/r - 1 + ln r >= 0, the k3 term of KL(model || reference), nats; from `log_ratio`."""
        return torch.expm1(-self.log_ratio) + self.log_ratio

    @cached_property
    def median_nll(self) -> Tensor:
        """Lower median [] of the NLL over the valid tokens of all ranks of `batch_group`, without NaN.

        0 without tokens. Collective: three all-reduces of 16 KiB, six for fp64. No host-device sync.
        """
        return lower_median(self.nll, self.valid & ~self.logprob.isnan(), self.batch_group)

    @cached_property
    def error(self) -> Tensor:
        """|softmax - onehot|, in [0, sqrt(2)]: the norm of the logit gradient is upstream x gate x error."""
        assert self.collision is not None
        return (1.0 - 2.0 * self.prob + self.collision).clamp(min=0.0).sqrt()


def row_names(needs: frozenset[str]) -> tuple[str, ...]:
    """The sums of a shard, in the order in which they are stored and sent."""
    optional = {ENTROPY: "shifted_sum", COLLISION: "square_sum"}
    largest = (f"largest {i}" for i in range(top_k(needs)))
    return ("maximum", "sum", "target_logit", *(row for need, row in optional.items() if need in needs), *largest)


def top_k_need(k: int) -> str:
    """The need of an objective for the entropy of the k most probable entries."""
    return f"{TOP}{k}"


def top_k(needs: frozenset[str]) -> int:
    """The k of `top_k_need`, or 0."""
    return max((int(need.removeprefix(TOP)) for need in needs if need.startswith(TOP)), default=0)


def merge_shards(
    shards: Tensor,  # [R, K, ...] sums of each shard relative to its own maximum; K as in `row_names`
    needs: frozenset[str],
) -> ShardStats:
    """Rebase the sums of R shards onto their common maximum, and add them in rank order."""
    row = dict(zip(row_names(needs), shards.unbind(1), strict=True))
    maximum = row["maximum"].amax(0)
    shift = row["maximum"] - maximum
    shift = shift.masked_fill(row["maximum"].isneginf(), 0.0)  # an empty shard, whose sums are 0
    scale = shift.exp()
    shifted = square = None
    if ENTROPY in needs:
        shifted = ((row["shifted_sum"] + shift * row["sum"]) * scale).sum(0)
    if COLLISION in needs:
        square = (row["square_sum"] * scale.square()).sum(0)
    log_sum = (row["sum"] * scale).sum(0).log()
    top = top_k_entropy(shards, top_k(needs)) if top_k(needs) else None
    return ShardStats(maximum, log_sum, row["target_logit"].sum(0), shifted, square, top)


def top_k_entropy(
    shards: Tensor,  # [R, K, ...] sums of each shard; the first is its maximum, the last k are its largest logits
    k: int,
) -> Tensor:  # [...]
    """Entropy of the k most probable entries of the whole vocabulary, renormalized; nats."""
    largest = (shards[:, :1] + shards[:, -k:]).flatten(0, 1).topk(k, 0).values
    x = largest - largest[0].masked_fill(largest[0].isneginf(), 0.0)
    e = x.exp()
    total = e.sum(0)
    return (total.log() - (x.clamp(min=UNDERFLOW) * e).sum(0) / total).clamp(min=0.0)


def token_stats(
    merged: ShardStats,
    valid: Tensor,
    vocab_size: int,
    reference: Tensor | None = None,
    batch_group: ProcessGroup | None = None,
) -> TokenStats:
    """Log-probability, top-1 hit, entropy and collision probability from the merged sums."""
    distance = merged.target_logit - merged.maximum
    # Rounding can give +1e-7, and with it p > 1.
    logprob = (distance - merged.log_sum).clamp(max=0.0)
    entropy = collision = None
    if merged.shifted_sum is not None:
        entropy = (merged.log_sum - merged.shifted_sum * torch.exp(-merged.log_sum)).clamp(min=0.0)
    if merged.square_sum is not None:
        collision = (merged.square_sum * torch.exp(-2.0 * merged.log_sum)).clamp(max=1.0)
    top = merged.top_k_entropy
    return TokenStats(
        logprob=logprob.masked_fill(~valid, 0.0),
        valid=valid,
        top1=(distance >= 0.0) & valid,
        entropy=None if entropy is None else entropy.masked_fill(~valid, 0.0),
        collision=None if collision is None else collision.masked_fill(~valid, 0.0),
        top_k_entropy=None if top is None else top.masked_fill(~valid, 0.0),
        vocab_size=vocab_size,
        reference=reference,
        batch_group=batch_group,
    )


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for all other dtypes."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lower_median(
    x: Tensor,  # [...] >= 0
    counted: Tensor,  # [...] bool
    group: ProcessGroup | None,
) -> Tensor:  # []
    """Lower median of the counted elements on all ranks of `group`: exact, and the same bits on all of them.

    Radix selection: numbers >= 0 are ordered as their bits are. Each step counts the candidates by their next 11 bits,
    and adds the counts up over the ranks. 0 without elements.
    """
    step, size = 11, 1 << 11
    bits, kind = (64, torch.int64) if x.dtype == torch.float64 else (32, torch.int32)
    keys = x.abs().flatten().view(kind).to(torch.int64)  # abs: -0.0 would be the smallest integer
    candidates = counted.flatten()
    found = keys.new_zeros(1)
    rank: Tensor | None = None  # [1], of the median among the candidates
    for low in reversed(range(0, bits, step)):
        digit = (keys >> low) & (size - 1)
        counts = keys.new_zeros(size).index_add_(0, digit, candidates.to(torch.int64))
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(counts, group=group)
        until = counts.cumsum(0)
        if rank is None:
            rank = (until[-1:] - 1) // 2  # -1 without elements: all digits are 0
        chosen = (until <= rank).sum(0, keepdim=True)
        rank = rank - (until - counts).gather(0, chosen)
        candidates = candidates & (digit == chosen)
        found = found | (chosen << low)
    return found.to(kind).view(x.dtype).squeeze(0)
