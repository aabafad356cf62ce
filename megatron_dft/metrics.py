"""What a run reports beside the NLL, as [sum, count] pairs that add up over micro-batches and ranks.

`token_metrics`, always:

    dft loss      mean objective value, nats
    dft prob      mean probability of the target: how well the model already predicts the data
    dft gate      mean gate: the share of the plain cross entropy's gradient that is let through
    dft accuracy  share of targets that are the model's first choice
    dft entropy   mean entropy of the prediction, nats, for objectives that compute it anyway
    dft blend     share of the objective in its blend with nll, for a scheduled one

`Detail`, what is asked for with `metrics` and `channels`:

    dft entropy, dft collision       means of the entropy (nats) and of the sum of squared probabilities
    dft effective tokens             sum of the gates: so many tokens of nll send as much gradient
    dft prob/0.0-0.1, ...            share of tokens whose target has such a probability, ten bins
    dft gradient/0.0-0.1, ...        share of the gradient that such tokens send. A token sends g |softmax - onehot|,
                                     g its gate, and |softmax - onehot|^2 = 1 - 2p + C with the collision C: exact
    channel/NAME nll, loss, prob     means over the tokens of a channel, and how many those are: tokens

All come from the loss itself: no second pass over the logits, and no collective of their own, because a host adds the
pairs up as it does its own losses. The set of pairs depends on the configuration alone, never on the data, because
Megatron takes it from the first micro-batch, and because a channel may be missing on one rank.

Totals (`is_total`) are sums, not means. In a report of [sum, count] pairs their counts add up to 1 over an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.objectives import Objective, Scheduled
from megatron_dft.stats import COLLISION, ENTROPY, TokenStats

BINS = 10
LEVELS = ("basic", "full")
OF_CHANNEL = ("nll", "loss", "prob", "tokens")
VALID_TOKENS = "valid tokens"
EFFECTIVE_TOKENS = "dft effective tokens"
CHANNEL = "channel/"


def is_total(name: str) -> bool:
    """Whether a metric of ours is a sum over tokens; all others are means."""
    return name in (VALID_TOKENS, EFFECTIVE_TOKENS) or (name.startswith(CHANNEL) and name.endswith(" tokens"))


@dataclass(frozen=True)
class TokenBatch:
    """Every token of a micro-batch on this rank, detached: what a `callback` gets. All [b, s]."""

    stats: TokenStats  # nll, loss (the objective's), gate, prob, ...
    loss_mask: Tensor  # weight of each token in the loss; where it is 0, the statistics mean nothing
    channel: Tensor | None  # int64, as in `with_channels`; None: the model was called in another way
    training: bool  # False in evaluation


def token_metrics(
    stats: TokenStats,  # of [...]
    objective: Objective,
    loss_mask: Tensor,  # [...], weight of each token; 0 leaves it out, whatever its statistics are
) -> dict[str, Tensor]:  # of [2]: sum, count
    """The report of one micro-batch."""
    assert stats.loss is not None and stats.gate is not None
    columns = {"dft loss": stats.loss, "dft prob": stats.prob, "dft gate": stats.gate}
    if stats.correct is not None:
        columns["dft accuracy"] = stats.correct.to(stats.loss.dtype)
    if stats.entropy is not None and ENTROPY in objective.needs:
        columns["dft entropy"] = stats.entropy
    if isinstance(objective, Scheduled):
        columns["dft blend"] = objective.blend(stats.loss.device).to(stats.loss.dtype).expand_as(stats.loss)
    weight = loss_mask.float() * stats.valid
    sums = torch.where(weight > 0.0, torch.stack(list(columns.values())) * weight, 0.0).flatten(1).sum(1)
    pairs = torch.stack([sums, weight.sum().expand_as(sums)], 1)
    return dict(zip(columns, pairs, strict=True))


@dataclass(frozen=True)
class Detail:
    """What is reported beyond `token_metrics`: `sums` of each micro-batch, added up, are `values`."""

    full: bool = False
    channels: tuple[str, ...] = ()  # names by number

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the loss has to yield."""
        return frozenset({ENTROPY, COLLISION} if self.full else ())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The metrics, in the order of `sums`."""
        bins = [f"{i / BINS}-{(i + 1) / BINS}" for i in range(BINS)]
        full = ["dft entropy", "dft collision", EFFECTIVE_TOKENS]
        full += [f"dft {what}/{bounds}" for what in ("prob", "gradient") for bounds in bins]
        return (
            *(full if self.full else ()),
            *(f"{CHANNEL}{channel} {what}" for channel in self.channels for what in OF_CHANNEL),
        )

    def sums(
        self,
        stats: TokenStats,  # of [...]
        loss_mask: Tensor,  # [...]
        channel: Tensor | None,  # [...] int64; None: no token has one
    ) -> Tensor:  # [K, 2] fp64: sum and count of each of the K names
        """Of one micro-batch."""
        weight = (loss_mask.double() * stats.valid).flatten()
        parts = [weight.new_zeros(0, 2)]
        if self.full:
            parts.append(_full(stats, weight))
        if self.channels:
            number = torch.zeros_like(weight, dtype=torch.int64) if channel is None else channel.flatten()
            parts.append(_by_channel(stats, weight, number, len(self.channels)))
        return torch.cat(parts)

    def values(self, sums: Tensor) -> dict[str, float]:
        """Means and totals, by name; without those that no token was counted in."""
        pairs = zip(self.names, sums.tolist(), strict=True)
        return {
            name: total if is_total(name) else total / count
            for name, (total, count) in pairs
            if count or is_total(name)
        }

    def in_validation(self, name: str) -> bool:
        """Whether a metric is reported in validation, too: no histograms, and of totals only those of channels."""
        return name.startswith(CHANNEL) or ("/" not in name and not is_total(name))


class MetricAccumulator:
    """Sums of [sum, count] pairs over micro-batches, on the device; of an evaluation."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # [K, 2] fp64

    def add(self, pairs: Mapping[str, Tensor]) -> None:
        """Of one micro-batch on this rank, the same names each time."""
        sums = torch.stack([pair.detach().view(2).double() for pair in pairs.values()])
        if self._sums is None:
            self._names, self._sums = tuple(pairs), torch.zeros_like(sums)
        self._sums.add_(sums)

    def take(self, group: ProcessGroup | None) -> dict[str, float]:
        """Means and totals over the ranks of `group`, by name; starts again from zero. Collective, one all-reduce.

        A channel in which no token was counted is left out; another metric is then NaN. Empty before the first `add`.
        """
        if self._sums is None:
            return {}
        torch.distributed.all_reduce(self._sums, group=group)
        pairs = dict(zip(self._names, self._sums.tolist(), strict=True))
        self._sums.zero_()
        return {
            name: total if is_total(name) else total / count if count else math.nan
            for name, (total, count) in pairs.items()
            if count or is_total(name) or not name.startswith(CHANNEL)
        }


def tenth_of(prob: Tensor) -> Tensor:
    """Its bin: 0 for [0, 0.1), ... 9 for [0.9, 1]."""
    return (prob * BINS).to(torch.int64).clamp(0, BINS - 1)


def _full(stats: TokenStats, weight: Tensor) -> Tensor:
    assert stats.entropy is not None and stats.collision is not None and stats.gate is not None
    sent, one = stats.gate * stats.error, torch.ones_like(stats.gate)
    columns = torch.stack([stats.entropy, stats.collision, stats.gate, sent, one])
    means, gradient, one = _weighted(columns, weight).split([3, 1, 1])
    tokens_and_gradient = torch.cat([one, gradient]).t()
    shares = weight.new_zeros(BINS, 2).index_add_(0, tenth_of(stats.prob.flatten()), tokens_and_gradient)
    tokens, sent = shares.sum(0)
    counts = torch.stack([tokens, sent]).repeat_interleave(BINS)
    return torch.cat([torch.stack([means.sum(1), tokens.expand(3)], 1), torch.stack([shares.t().flatten(), counts], 1)])


def _by_channel(stats: TokenStats, weight: Tensor, number: Tensor, channels: int) -> Tensor:
    assert stats.loss is not None
    columns = _weighted(torch.stack([stats.nll, stats.loss, stats.prob, torch.ones_like(stats.loss)]), weight)
    # What has a number without a name is counted with those without a number.
    number = number.masked_fill(number >= channels, 0)
    sums = weight.new_zeros(channels, len(OF_CHANNEL)).index_add_(0, number, columns.t())
    return torch.stack([sums, sums[:, -1:].expand_as(sums)], -1).flatten(0, 1)


def _weighted(columns: Tensor, weight: Tensor) -> Tensor:
    """[k, ...] x [n] -> [k, n] fp64; a token of weight 0 is worth 0, even if its statistics are NaN."""
    return torch.where(weight > 0.0, columns.flatten(1).double() * weight, 0.0)
