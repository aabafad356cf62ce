"""Training metrics as [sum, count] pairs, which add up over micro-batches and ranks.

`token_metrics`, in every run:

    dft/loss      mean loss of the objective, nats
    dft/prob      mean probability of the target
    dft/gate      mean gate: the factor on the cross entropy's gradient, per token; 1 for nll
    dft/accuracy  share of targets that are the top-1 prediction
    dft/entropy   mean entropy of the prediction, nats, if the objective computes it
    dft/kl        mean of 1/r - 1 + ln r, the k3 estimate of the KL divergence to the reference, nats; r = p / p_ref
    dft/ratio     mean of r, for objectives with a reference, like dft/kl
    dft/clipped   share of tokens with r outside the limits of the objective (iw, psft)
    dft/blend     b of a scheduled objective: 0 is nll, 1 the objective
    dft/weight    mean weight of a token in the gradient, with --dft-weights or --dft-reduction. All other metrics are
                  means over tokens without these weights

`MetricSpec`, as configured with `metrics` and `channels`:

    dft/entropy, dft/collision          mean entropy (nats), mean sum of squared probabilities
    dft/effective_tokens                sum of the gates
    dft/prob/0.0-0.1, ...               share of tokens by probability of the target, ten bins
    dft/gradient/0.0-0.1, ...           share of the gradient norm by the same bins. The norm of a token is
                                        gate |softmax - onehot|, with |softmax - onehot|^2 = 1 - 2p + C exactly
    dft/channel/NAME/nll, loss, prob    means over the tokens of a channel; tokens: their number

All come from the statistics of the loss, without a second pass over the logits. In training, Megatron-LM and Bridge
reduce the pairs with their own losses, without another collective. Validation adds one all-reduce per evaluation, NeMo
one all-reduce and one broadcast per step. The set of pairs depends on the configuration alone: Megatron takes it from
the first micro-batch, and a channel may be missing on a rank.

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

from megatron_dft.labels import CHANNELS
from megatron_dft.ops.objectives import Blended, Objective
from megatron_dft.ops.stats import COLLISION, ENTROPY, TokenStats

BINS = 10
LEVELS = ("basic", "full")
CHANNEL_METRICS = ("nll", "loss", "prob", "tokens")
VALID_TOKENS = "dft/valid_tokens"
EFFECTIVE_TOKENS = "dft/effective_tokens"
CHANNEL = "dft/channel/"
OTHER = "other"  # channel 0


def channel_names(specification: str | None) -> tuple[str, ...]:
    """Channel names by number from "maths,code", with `other` first; empty without a specification.

    Raises:
        ValueError: for an empty name, one that is given twice, or too many names.
    """
    if specification is None:
        return ()
    names = [name.strip() for name in specification.split(",")]
    if "" in names or OTHER in names or len(set(names)) < len(names):
        raise ValueError(
            f"channels: expected distinct names, e.g. maths,code ({OTHER!r} is reserved for all others), got "
            f"{specification!r}"
        )
    if len(names) >= CHANNELS:
        raise ValueError(f"channels: expected at most {CHANNELS - 1} names, got {len(names)}")
    return (OTHER, *names)


def channel_metric(channel: str, name: str) -> str:
    """The metric `name`, one of CHANNEL_METRICS, of a channel."""
    return f"{CHANNEL}{channel}/{name}"


def is_total(name: str) -> bool:
    """Whether a metric is a sum over tokens. All others are means."""
    return name in (VALID_TOKENS, EFFECTIVE_TOKENS) or (name.startswith(CHANNEL) and name.endswith("/tokens"))


def in_validation(name: str) -> bool:
    """Whether a metric is reported in validation: no histograms, and of the totals only those of channels."""
    return name.startswith(CHANNEL) or (name.count("/") == 1 and not is_total(name))


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a micro-batch on this rank, detached: the argument of a `callback`.

    Attributes:
        stats: nll, loss (of the objective), gate, prob, ..., all [b, s].
        loss_mask: [b, s] weight of each token in the loss. Statistics are undefined where it is 0.
        channel: [b, s] int64, as in `with_channels`; None: no channels are configured.
        training: False in evaluation.
    """

    stats: TokenStats
    loss_mask: Tensor
    channel: Tensor | None
    training: bool


def token_metrics(
    stats: TokenStats,  # of [...]
    objective: Objective,
    loss_mask: Tensor,  # [...], weight of each token; 0 excludes it, whatever its statistics are
    token_weight: Tensor | None = None,  # [...] of each token in the gradient; None: 1, not reported
) -> dict[str, Tensor]:  # of [2]: sum, count
    """The metrics of every run, of one micro-batch."""
    assert stats.loss is not None and stats.gate is not None
    columns = {"dft/loss": stats.loss, "dft/prob": stats.prob, "dft/gate": stats.gate}
    if stats.top1 is not None:
        columns["dft/accuracy"] = stats.top1.to(stats.loss.dtype)
    if stats.entropy is not None and ENTROPY in objective.needs:
        columns["dft/entropy"] = stats.entropy
    if stats.reference is not None:
        columns |= {"dft/kl": stats.kl, "dft/ratio": stats.ratio}
        if (clipped := objective.clipped(stats)) is not None:
            columns["dft/clipped"] = clipped.to(stats.loss.dtype)
    if isinstance(objective, Blended):
        columns["dft/blend"] = objective.blend.to(stats.loss.dtype).expand_as(stats.loss)
    if token_weight is not None:
        columns["dft/weight"] = token_weight.to(stats.loss.dtype)
    weight = loss_mask.float() * stats.valid
    sums = torch.where(weight > 0.0, torch.stack(list(columns.values())) * weight, 0.0).flatten(1).sum(1)
    pairs = torch.stack([sums, weight.sum().expand_as(sums)], 1)
    return dict(zip(columns, pairs, strict=True))


@dataclass(frozen=True)
class MetricSpec:
    """The configured metrics beyond `token_metrics`: `sums` per micro-batch, added up, give `values`."""

    full: bool = False
    channels: tuple[str, ...] = ()  # names by number

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the loss must compute."""
        return frozenset({ENTROPY, COLLISION} if self.full else ())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of `sums`."""
        bins = [f"{i / BINS}-{(i + 1) / BINS}" for i in range(BINS)]
        full = ["dft/entropy", "dft/collision", EFFECTIVE_TOKENS]
        full += [f"dft/{what}/{bounds}" for what in ("prob", "gradient") for bounds in bins]
        return (
            *(full if self.full else ()),
            *(channel_metric(channel, name) for channel in self.channels for name in CHANNEL_METRICS),
        )

    def sums(
        self,
        stats: TokenStats,  # of [...]
        loss_mask: Tensor,  # [...]
        channel: Tensor | None,  # [...] int64; None: all tokens belong to channel 0
    ) -> Tensor:  # [K, 2] fp64: sum and count for each of the K names
        """[sum, count] of one micro-batch."""
        weight = (loss_mask.double() * stats.valid).flatten()
        pairs = [weight.new_zeros(0, 2)]
        if self.full:
            pairs.append(_full(stats, weight))
        if self.channels:
            number = torch.zeros_like(weight, dtype=torch.int64) if channel is None else channel.flatten()
            pairs.append(_by_channel(stats, weight, number, len(self.channels)))
        return torch.cat(pairs)

    def values(self, sums: Tensor) -> dict[str, float]:
        """Means and totals by name, without means of no tokens."""
        pairs = zip(self.names, sums.tolist(), strict=True)
        return {
            name: total if is_total(name) else total / count
            for name, (total, count) in pairs
            if count or is_total(name)
        }


class MetricAccumulator:
    """Sums of [sum, count] pairs over the micro-batches of an evaluation, on the device."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # [K, 2] fp64

    def add(self, pairs: Mapping[str, Tensor]) -> None:
        """Add the pairs of one micro-batch on this rank. The names are the same in every call."""
        sums = torch.stack([pair.detach().view(2).double() for pair in pairs.values()])
        if self._sums is None:
            self._names, self._sums = tuple(pairs), torch.zeros_like(sums)
        self._sums.add_(sums)

    def take(self, group: ProcessGroup | None) -> dict[str, float]:
        """Return means and totals over the ranks of `group`, and reset. Collective: one all-reduce.

        Metrics of a channel without tokens are left out; other means of no tokens are NaN. Empty before the first
        `add`.
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


def bin_of(prob: Tensor) -> Tensor:
    """Histogram bin of a probability: 0 for [0, 0.1), ... 9 for [0.9, 1]."""
    return (prob * BINS).to(torch.int64).clamp(0, BINS - 1)


def _full(stats: TokenStats, weight: Tensor) -> Tensor:
    assert stats.entropy is not None and stats.collision is not None and stats.gate is not None
    norm, one = stats.gate * stats.error, torch.ones_like(stats.gate)
    columns = torch.stack([stats.entropy, stats.collision, stats.gate, norm, one])
    means, norm, one = _weighted(columns, weight).split([3, 1, 1])
    shares = weight.new_zeros(BINS, 2).index_add_(0, bin_of(stats.prob.flatten()), torch.cat([one, norm]).t())
    tokens, total = shares.sum(0)
    counts = torch.stack([tokens, total]).repeat_interleave(BINS)
    return torch.cat([torch.stack([means.sum(1), tokens.expand(3)], 1), torch.stack([shares.t().flatten(), counts], 1)])


def _by_channel(stats: TokenStats, weight: Tensor, number: Tensor, channels: int) -> Tensor:
    assert stats.loss is not None
    columns = _weighted(torch.stack([stats.nll, stats.loss, stats.prob, torch.ones_like(stats.loss)]), weight)
    number = number.masked_fill(number >= channels, 0)  # a channel without a name counts as channel 0
    sums = weight.new_zeros(channels, len(CHANNEL_METRICS)).index_add_(0, number, columns.t())
    return torch.stack([sums, sums[:, -1:].expand_as(sums)], -1).flatten(0, 1)


def _weighted(columns: Tensor, weight: Tensor) -> Tensor:
    """[k, ...] x [n] -> [k, n] fp64; 0 for tokens of weight 0, even if their statistics are NaN."""
    return torch.where(weight > 0.0, columns.flatten(1).double() * weight, 0.0)
