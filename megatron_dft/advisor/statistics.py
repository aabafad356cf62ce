"""Token statistics of the training data under a base model, and the recommended objective.

`DatasetStatistics` computes for each objective, before training:

    mean p              mean probability of the targets, with its histogram, per channel
    gate mass           mean gate over tokens; 1 for nll
    effective tokens    sum of the gates
    gradient            sum over tokens of gate |softmax - onehot|, relative to nll: share of the gradient norm

`recommend` follows "Beyond Log-Likelihood" (arXiv:2510.00526): objectives that weight tokens by p (dft) are best if
mean p is above 0.5, nll if it is below 0.1, and objectives between dft and nll otherwise. This is a rule of thumb; the
report states it and prints the numbers. Not covered: changes during training. See docs/learning-dynamics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dft.metrics import BINS, TokenBatch, bin_of
from megatron_dft.ops.objectives import Objective, loss_and_gate

STRONG, WEAK = 0.5, 0.1  # mean p
TOKEN_SUMS = ("tokens", "mean_p", "nll", "accuracy")
OBJECTIVE_SUMS = ("loss", "gate_mass", "gradient")


class DatasetStatistics:
    """Sums over the tokens of a data set, accumulated on their device."""

    def __init__(self, objectives: Sequence[Objective], channels: Sequence[str]) -> None:
        self.objectives, self.channels = objectives, channels or ("all",)
        self._sums: list[Tensor] = []

    def add(self, batch: TokenBatch) -> None:
        """Add one micro-batch of this rank."""
        weight = torch.where(batch.stats.valid, batch.loss_mask.double(), 0.0).flatten()
        stats = replace(batch.stats, valid=batch.stats.valid & (batch.loss_mask > 0.0))
        number = torch.zeros_like(stats.valid, dtype=torch.int64) if batch.channel is None else batch.channel
        number = number.masked_fill(number >= len(self.channels), 0).flatten()
        bins = bin_of(stats.prob.flatten())
        assert stats.top1 is not None

        def by(index: Tensor, size: int, *columns: Tensor) -> Tensor:
            """Weighted sums [size, k] of k columns, by index."""
            values = torch.stack([torch.where(weight > 0.0, x.flatten().double() * weight, 0.0) for x in columns], 1)
            return values.new_zeros(size, len(columns)).index_add_(0, index, values)

        one = torch.ones_like(stats.prob)
        count = len(self.channels)
        sums = [
            by(number, count, one, stats.prob, stats.nll, stats.top1),
            by(number * BINS + bins, count * BINS, one),
        ]
        for objective in self.objectives:
            loss, gate = loss_and_gate(objective, stats)
            sums += [by(number, count, loss, gate, gate * stats.error), by(bins, BINS, gate * stats.error)]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def totals(self, device: torch.device) -> Tensor:
        """All sums in one vector, for an all-reduce; zeros on a rank without tokens."""
        if not self._sums:
            return torch.zeros(sum(self._sizes()), dtype=torch.float64, device=device)
        return torch.cat([x.flatten() for x in self._sums])

    def result(self, totals: Tensor) -> dict[str, Any]:
        """Means, shares and the recommendation, from the totals of all ranks.

        Raises:
            ValueError: if no token contributes to the loss.
        """
        count = len(self.channels)
        parts = iter(totals.cpu().split(self._sizes()))
        tokens = next(parts).view(count, len(TOKEN_SUMS))
        bins = next(parts).view(count, BINS)
        if not tokens[:, 0].sum():
            raise ValueError("expected tokens that contribute to the loss, got none; check the loss mask of the data")
        every = _of_tokens(tokens.sum(0), bins.sum(0))
        named = {name: _of_tokens(t, b) for name, t, b in zip(self.channels, tokens, bins, strict=True) if t[0]}
        objectives: dict[str, dict[str, Any]] = {}
        for objective in self.objectives:
            loss, gate, gradient = next(parts).view(count, len(OBJECTIVE_SUMS)).sum(0).tolist()
            of_bin = next(parts)
            objectives[str(objective)] = {
                "loss": loss / every["tokens"],
                "gate_mass": gate / every["tokens"],
                "effective_tokens": gate,
                "gradient": gradient,
                "gradient_by_p": (of_bin / of_bin.sum().clamp(min=1e-300)).tolist(),
            }
        scale = objectives["nll"]["gradient"] or 1.0
        for numbers in objectives.values():
            numbers["gradient"] /= scale
        return {**every, "channels": named, "objectives": objectives, "advice": recommend(every, named, objectives)}

    def _sizes(self) -> list[int]:
        count = len(self.channels)
        each = [count * len(OBJECTIVE_SUMS), BINS]
        return [count * len(TOKEN_SUMS), count * BINS, *each * len(self.objectives)]


def _of_tokens(sums: Tensor, bins: Tensor) -> dict[str, Any]:
    tokens, *others = sums.tolist()
    means = {name: value / tokens for name, value in zip(TOKEN_SUMS[1:], others, strict=True)}
    return {"tokens": tokens, **means, "histogram": (bins / tokens).tolist()}


def recommend(every: dict[str, Any], channels: dict[str, Any], objectives: dict[str, Any]) -> dict[str, Any]:
    """The recommended objective, its gate mass (`learning_rate_ratio`; None if not evaluated), and the reasons."""
    mean, rare = every["mean_p"], every["histogram"][0]
    share = objectives["nll"]["gradient_by_p"][0]
    reasons = [
        f"mean p is {mean:.2f}; {rare:.0%} of the tokens have p below 0.1 and cause {share:.0%} of nll's gradient",
    ]
    if mean > STRONG:
        chosen = "dft"
        reasons.append(f"above {STRONG} the model predicts most tokens: those with low p are more often noise")
    elif mean < WEAK:
        chosen = "nll"
        reasons.append(f"below {WEAK} the model predicts few tokens; the mean gate of dft would be {mean:.2f}")
    else:
        chosen = "deft" if "deft" in objectives else "tsallis:q=0.5"
        reasons.append(
            f"between {WEAK} and {STRONG} neither dft nor nll is clearly better: deft interpolates per token by the "
            "model's confidence, tsallis:q=0.5 equally for every token"
        )
    reasons += [
        f"channel {name} (mean p {numbers['mean_p']:.2f}) differs: {difference}"
        for name, numbers in channels.items()
        if (difference := _channel_differs(mean, numbers["mean_p"]))
    ]
    ratio = objectives[chosen]["gate_mass"] if chosen in objectives else None
    return {"objective": chosen, "learning_rate_ratio": ratio, "reasons": [*reasons, *_learning_rate(chosen, ratio)]}


def _channel_differs(mean: float, of_channel: float) -> str | None:
    """Advice for a channel whose mean p suggests another objective than that of all tokens."""
    if mean > WEAK >= of_channel:
        return "its gradient under dft would be small; train it separately, or start with nll (start=, ramp=)"
    if mean <= STRONG < of_channel:
        return "dft would suit it"
    return None


def _learning_rate(chosen: str, ratio: float | None) -> list[str]:
    if chosen == "nll" or not ratio:
        return []
    return [
        f"learning rate: the mean gate is {ratio:.2f}, that of nll 1. Adam normalizes this factor: start with the rate "
        f"of your nll run, and try up to {1 / ratio:.1f} times it; plain SGD does not normalize it"
    ]
