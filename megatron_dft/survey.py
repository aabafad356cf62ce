"""What a base model thinks of the training data, and which objective that speaks for.

A `Survey` adds up, over the tokens of a data set, what each objective would do with them before the first step:

    mean p              how well the model already predicts the targets; with its histogram, by channel
    gate mass           mean gate: the share of the plain cross entropy's gradient that an objective lets through
    effective tokens    sum of the gates: so many tokens of nll send as much
    gradient            sum of the lengths of the tokens' gradients, g |softmax - onehot|, relative to nll's

`advice` follows "Beyond Log-Likelihood" (arXiv:2510.00526): objectives that trust the model (dft) gain where mean p is
above a half and lose below a tenth, where nll wins; between them their intermediates. It is a rule of thumb, and says
so; what it rests on is printed beside it. Left out: what training changes. See docs/learning-dynamics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dft.metrics import BINS, TokenBatch, tenth_of
from megatron_dft.objectives import Objective, loss_and_gate

STRONG, WEAK = 0.5, 0.1  # mean p
OF_TOKEN = ("tokens", "mean_p", "nll", "accuracy")
OF_OBJECTIVE = ("loss", "gate_mass", "gradient")


class Survey:
    """Sums over tokens, on their device; `add` is a callback for `TokenBatch`."""

    def __init__(self, objectives: Sequence[Objective], channels: Sequence[str]) -> None:
        self.objectives, self.channels = objectives, channels or ("all",)
        self._sums: list[Tensor] = []

    def add(self, batch: TokenBatch) -> None:
        """Of one micro-batch on this rank."""
        weight = torch.where(batch.stats.valid, batch.loss_mask.double(), 0.0).flatten()
        stats = replace(batch.stats, valid=batch.stats.valid & (batch.loss_mask > 0.0))
        number = torch.zeros_like(stats.valid, dtype=torch.int64) if batch.channel is None else batch.channel
        number = number.masked_fill(number >= len(self.channels), 0).flatten()
        bin_of = tenth_of(stats.prob.flatten())
        assert stats.correct is not None

        def by(index: Tensor, size: int, *columns: Tensor) -> Tensor:
            """[size, k] sums of k columns."""
            values = torch.stack([torch.where(weight > 0.0, x.flatten().double() * weight, 0.0) for x in columns], 1)
            return values.new_zeros(size, len(columns)).index_add_(0, index, values)

        one = torch.ones_like(stats.prob)
        count = len(self.channels)
        sums = [
            by(number, count, one, stats.prob, stats.nll, stats.correct),
            by(number * BINS + bin_of, count * BINS, one),
        ]
        for objective in self.objectives:
            loss, gate = loss_and_gate(objective, stats)
            sums += [by(number, count, loss, gate, gate * stats.error), by(bin_of, BINS, gate * stats.error)]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def totals(self, device: torch.device) -> Tensor:
        """All of it in one row, to be added up over ranks; zeros on a rank that has seen no token."""
        if not self._sums:
            return torch.zeros(sum(self._sizes()), dtype=torch.float64, device=device)
        return torch.cat([x.flatten() for x in self._sums])

    def result(self, totals: Tensor) -> dict[str, Any]:
        """Means and shares from the totals of all ranks, with the advice.

        Raises:
            ValueError: if no token trains.
        """
        count = len(self.channels)
        parts = iter(totals.cpu().split(self._sizes()))
        tokens = next(parts).view(count, len(OF_TOKEN))
        bins = next(parts).view(count, BINS)
        if not tokens[:, 0].sum():
            raise ValueError("expected tokens that train, got none; check the loss mask of the data")
        every = _of_tokens(tokens.sum(0), bins.sum(0))
        named = {name: _of_tokens(t, b) for name, t, b in zip(self.channels, tokens, bins, strict=True) if t[0]}
        objectives: dict[str, dict[str, Any]] = {}
        for objective in self.objectives:
            loss, gate, gradient = next(parts).view(count, len(OF_OBJECTIVE)).sum(0).tolist()
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
        return {**every, "channels": named, "objectives": objectives, "advice": advice(every, named, objectives)}

    def _sizes(self) -> list[int]:
        count = len(self.channels)
        each = [count * len(OF_OBJECTIVE), BINS]
        return [count * len(OF_TOKEN), count * BINS, *each * len(self.objectives)]


def _of_tokens(sums: Tensor, bins: Tensor) -> dict[str, Any]:
    tokens, *others = sums.tolist()
    means = {name: value / tokens for name, value in zip(OF_TOKEN[1:], others, strict=True)}
    return {"tokens": tokens, **means, "histogram": (bins / tokens).tolist()}


def advice(every: dict[str, Any], channels: dict[str, Any], objectives: dict[str, Any]) -> dict[str, Any]:
    """An objective, why, and by how much its gradients are smaller than nll's."""
    mean, rare = every["mean_p"], every["histogram"][0]
    share = objectives["nll"]["gradient_by_p"][0]
    reasons = [
        f"mean p is {mean:.2f}; {rare:.0%} of the tokens have p below 0.1, and send {share:.0%} of nll's gradient",
    ]
    if mean > STRONG:
        chosen = "dft"
        reasons.append(f"above {STRONG} the model knows the material: what it finds implausible is more often noise")
    elif mean < WEAK:
        chosen = "nll"
        reasons.append(f"below {WEAK} the model has the material to learn; dft would learn {mean:.0%} of it")
    else:
        chosen = "deft" if "deft" in objectives else "tsallis:q=0.5"
        reasons.append(
            f"between {WEAK} and {STRONG} neither end is safe: deft trusts the model where it is sure; "
            "tsallis:q=0.5 is the same for every token"
        )
    reasons += [
        f"channel {name} (mean p {numbers['mean_p']:.2f}) is on the other side: {side}"
        for name, numbers in channels.items()
        if (side := _other_side(mean, numbers["mean_p"]))
    ]
    ratio = objectives[chosen]["gate_mass"] if chosen in objectives else None
    return {"objective": chosen, "learning_rate_ratio": ratio, "reasons": [*reasons, *_learning_rate(chosen, ratio)]}


def _other_side(mean: float, of_channel: float) -> str | None:
    if mean > WEAK >= of_channel:
        return "dft-like objectives would hardly learn it; train it apart, or start with nll (start=, ramp=)"
    if mean <= STRONG < of_channel:
        return "dft would suit it"
    return None


def _learning_rate(chosen: str, ratio: float | None) -> list[str]:
    if chosen == "nll" or not ratio:
        return []
    return [
        f"learning rate: the gates let {ratio:.2f} of nll's gradient through. Adam divides that out: begin with the "
        f"rate of your nll run, and try up to {1 / ratio:.1f} times it; with plain SGD that factor is missing"
    ]
