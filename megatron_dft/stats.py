"""What one pass over the vocabulary leaves behind, and how the pieces of a split vocabulary are put together.

Every objective of the family needs, for each token, only a handful of sums over its row of logits x. Relative to
the row's maximum M (so that nothing overflows) they are

    s = sum e^(x-M)            a = sum (x-M) e^(x-M)           q = sum e^(2(x-M))            x_y, the target's logit

and everything else follows without touching the logits again:

    log p_y = (x_y - M) - log s          the target's log-probability                         (nats, <= 0)
    H       = log s - a/s                entropy of the prediction                            (nats, >= 0)
    C       = q / s^2                    collision probability, the sum of squared probabilities

The vocabulary is an axis that is split, over tensor-parallel ranks and over chunks of the output layer. Each part
reports (M, s, x_y[, a][, q]) relative to its own maximum, and `merge_shards` rebases them onto the common one
(the algebra of online softmax). Parts are summed in rank order: every rank gets the same bits.

Left out: how a part is computed (a backend's business) and how parts travel (`vocab_parallel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ENTROPY = "entropy"
COLLISION = "collision"


@dataclass(frozen=True)
class VocabShard:
    """A slice of the vocabulary: what one rank holds, or a chunk of that."""

    start: int  # global id of the first column
    columns: int  # how many columns belong to the vocabulary; padding lies behind them
    vocab_size: int  # the whole vocabulary, over which the softmax runs

    def chunk(self, columns: slice) -> VocabShard:
        """Some of its columns, padding included."""
        inside = min(max(self.columns - columns.start, 0), columns.stop - columns.start)
        return VocabShard(self.start + columns.start, inside, self.vocab_size)


@dataclass(frozen=True)
class ShardStats:
    """The parts of all ranks, merged: what backward needs, and the sums behind `TokenStats`. All [...]."""

    maximum: Tensor
    log_sum: Tensor
    target_logit: Tensor
    shifted_sum: Tensor | None
    square_sum: Tensor | None


@dataclass(frozen=True)
class TokenStats:
    """Statistics per token, detached, fp32 (fp64 for fp64 logits); 0 at tokens that are not valid.

    Objectives turn them into a loss and a gate; metrics sum them up.
    """

    logprob: Tensor  # [...] log-probability of the target, nats, <= 0
    valid: Tensor  # [...] bool, the target is not ignored
    correct: Tensor | None = None  # [...] bool, no other token has a larger logit than the target
    entropy: Tensor | None = None  # [...] nats
    collision: Tensor | None = None  # [...] sum of squared probabilities
    vocab_size: int | None = None
    loss: Tensor | None = None  # [...] value of the objective that was applied, nats
    gate: Tensor | None = None  # [...] and its gate

    @cached_property
    def nll(self) -> Tensor:
        """Cross entropy of each token, nats, >= 0."""
        return -self.logprob

    @cached_property
    def prob(self) -> Tensor:
        """Probability of the target, in [0, 1]."""
        return self.logprob.exp()

    @cached_property
    def error(self) -> Tensor:
        """|softmax - onehot|, in [0, sqrt(2)]: a token's gradient on its logits is so long, times gate and upstream."""
        assert self.collision is not None
        return (1.0 - 2.0 * self.prob + self.collision).clamp(min=0.0).sqrt()


def row_names(needs: frozenset[str]) -> tuple[str, ...]:
    """Which sums a shard reports, in the order in which they are packed and sent."""
    optional = {ENTROPY: "shifted_sum", COLLISION: "square_sum"}
    return ("maximum", "sum", "target_logit", *(row for need, row in optional.items() if need in needs))


def merge_shards(
    shards: Tensor,  # [R, K, ...] each shard's sums, relative to its own maximum; K as in `row_names`
    needs: frozenset[str],
) -> ShardStats:
    """Rebase the sums of R shards onto their common maximum and add them in order."""
    part = dict(zip(row_names(needs), shards.unbind(1), strict=True))
    maximum = part["maximum"].amax(0)
    shift = part["maximum"] - maximum
    shift = shift.masked_fill(part["maximum"].isneginf(), 0.0)  # an empty shard: its sums are 0 already
    scale = shift.exp()
    shifted = square = None
    if ENTROPY in needs:
        shifted = ((part["shifted_sum"] + shift * part["sum"]) * scale).sum(0)
    if COLLISION in needs:
        square = (part["square_sum"] * scale.square()).sum(0)
    log_sum = (part["sum"] * scale).sum(0).log()
    return ShardStats(maximum, log_sum, part["target_logit"].sum(0), shifted, square)


def token_stats(merged: ShardStats, valid: Tensor, vocab_size: int) -> TokenStats:
    """From sums to log-probability, entropy and collision."""
    distance = merged.target_logit - merged.maximum
    # Rounding can leave +1e-7, and p > 1 with it.
    logprob = (distance - merged.log_sum).clamp(max=0.0)
    entropy = collision = None
    if merged.shifted_sum is not None:
        entropy = (merged.log_sum - merged.shifted_sum * torch.exp(-merged.log_sum)).clamp(min=0.0)
    if merged.square_sum is not None:
        collision = (merged.square_sum * torch.exp(-2.0 * merged.log_sum)).clamp(max=1.0)
    return TokenStats(
        logprob=logprob.masked_fill(~valid, 0.0),
        valid=valid,
        correct=(distance >= 0.0) & valid,
        entropy=None if entropy is None else entropy.masked_fill(~valid, 0.0),
        collision=None if collision is None else collision.masked_fill(~valid, 0.0),
        vocab_size=vocab_size,
    )
