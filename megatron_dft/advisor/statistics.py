"""Token statistics of the training data under a base model, and the recommended objective.

`DatasetStatistics` computes for each objective, before training:

    mean p              mean probability of the targets, with its histogram, per channel
    gate mass           mean gate over tokens; 1 for nll
    effective tokens    sum of the gates
    gradient            sum over tokens of gate |softmax - onehot|, relative to nll: share of the gradient norm

The mean of `cayley` and the median of `talr` are those of the evaluated micro-batch, not of a training batch.

`recommend` decides by whether the model can do the task already:

    top-1 accuracy above 0.9    the model predicts nearly every token; what it does not predict is more often noise: dft
    mean p below 0.1            the content is new: nll ("Beyond Log-Likelihood", arXiv:2510.00526)
    between                     a schedule: nll first, to learn the task, then dft

It optimizes the exact match of sampled replies on correct held-out data. docs/real-model.md compares it with what won
in two studies. Mean p alone is not sufficient: most tokens of a reply are easy, so a chat model has a mean p above 0.5
on tasks that it cannot do. Not covered: changes during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dft.metrics import BINS, TokenBatch, bin_of
from megatron_dft.ops.objectives import Objective, loss_and_gate
from megatron_dft.ops.stats import REFERENCE, top_k

KNOWN = 0.9  # top-1 accuracy
WEAK = 0.1  # mean p
MARGIN = 0.02  # of both limits: the advice may be different for other samples of the data
FEW_TOKENS = 2000
TOKEN_SUMS = ("tokens", "mean_p", "nll", "accuracy")
OBJECTIVE_SUMS = ("loss", "gate_mass", "gradient")


class DatasetStatistics:
    """Sums over the tokens of a data set, accumulated on their device.

    Raises ValueError for objectives that it cannot evaluate: `eaft:k=20`, and those with a reference.
    """

    def __init__(self, objectives: Sequence[Objective], channels: Sequence[str]) -> None:
        for objective in objectives:
            if top_k(objective.needs):
                raise ValueError(
                    f"--advise-objectives {objective}: the k largest logits are not evaluated; use eaft without k="
                )
            if REFERENCE in objective.needs:
                raise ValueError(
                    f"--advise-objectives {objective}: requires reference log-probabilities, which the advisor does "
                    "not have; remove it"
                )
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

    def result(self, totals: Tensor, steps: int | None = None) -> dict[str, Any]:
        """Means, shares and the recommendation, from the totals of all ranks.

        Args:
            steps: number of training steps, for a schedule; None: unknown.

        Raises:
            ValueError: if no token contributes to the loss.
        """
        count = len(self.channels)
        parts = iter(totals.cpu().split(self._sizes()))
        tokens = next(parts).view(count, len(TOKEN_SUMS))
        bins = next(parts).view(count, BINS)
        if not tokens[:, 0].sum():
            raise ValueError("no token of the data is in the loss; check its loss mask")
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
        return {
            **every,
            "channels": named,
            "objectives": objectives,
            "advice": recommend(every, named, objectives, steps),
        }

    def _sizes(self) -> list[int]:
        count = len(self.channels)
        each = [count * len(OBJECTIVE_SUMS), BINS]
        return [count * len(TOKEN_SUMS), count * BINS, *each * len(self.objectives)]


def _of_tokens(sums: Tensor, bins: Tensor) -> dict[str, Any]:
    tokens, *others = sums.tolist()
    means = {name: value / tokens for name, value in zip(TOKEN_SUMS[1:], others, strict=True)}
    return {"tokens": tokens, **means, "histogram": (bins / tokens).tolist()}


def recommend(
    every: dict[str, Any], channels: dict[str, Any], objectives: dict[str, Any], steps: int | None = None
) -> dict[str, Any]:
    """The recommended objective and the reasons.

    The start and ramp of a schedule are a third of `steps` each; N/3 if `steps` is unknown.
    """
    accuracy, mean = every["accuracy"], every["mean_p"]
    chosen = _choice(accuracy, mean)
    reasons = [
        f"top-1 accuracy is {accuracy:.2f}, mean p {mean:.2f}; {every['histogram'][0]:.0%} of the tokens have p below "
        f"0.1 and cause {objectives['nll']['gradient_by_p'][0]:.0%} of nll's gradient",
        REASONS[chosen],
    ]
    if chosen == SCHEDULE and steps is None:
        reasons.insert(0, "replace N/3 by a third of your training steps, or repeat with --train-iters STEPS")
    if min(abs(accuracy - KNOWN), abs(mean - WEAK)) < MARGIN:
        reasons.append(f"close to a limit (top-1 accuracy {KNOWN}, mean p {WEAK}): compare with nll on held-out data")
    if every["tokens"] < FEW_TOKENS:
        reasons.append(
            f"thin evidence: {every['tokens']:.0f} tokens in the loss, fewer than {FEW_TOKENS}; evaluate more data "
            "(--advise-tokens, --advise-batches)"
        )
    reasons += [
        f"channel {name} (top-1 accuracy {numbers['accuracy']:.2f}, mean p {numbers['mean_p']:.2f}) differs: "
        f"for it alone the rules give {_choice(numbers['accuracy'], numbers['mean_p'])}"
        for name, numbers in channels.items()
        if _choice(numbers["accuracy"], numbers["mean_p"]) != chosen
    ]
    reasons.append(
        "optimized: exact match of sampled replies on correct held-out data; not greedy decoding, where nll is often "
        "as good, and not held-out NLL"
    )
    third = "N/3" if steps is None else max(1, steps // 3)
    named = {"nll": "nll", "dft": "dft", SCHEDULE: f"dft:start={third},ramp={third}"}[chosen]
    return {"objective": named, "reasons": [*reasons, LEARNING_RATE]}


SCHEDULE = "a schedule from nll to dft"
LEARNING_RATE = "learning rate: that of your nll run, and a lower one; if it is too high, dft loses more than nll"
REASONS = {
    "dft": f"above a top-1 accuracy of {KNOWN} the model can do the task: tokens with low p are more often noise",
    "nll": f"below a mean p of {WEAK} the content is new to the model: dft would give it a small gradient",
    SCHEDULE: "the model cannot do the whole task yet: dft alone learns improbable tokens slowly, nll alone "
    "also learns wrong ones",
}


def _choice(accuracy: float, mean_p: float) -> str:
    if mean_p < WEAK:
        return "nll"
    return "dft" if accuracy > KNOWN else SCHEDULE
