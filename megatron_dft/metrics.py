"""What a run reports beside the NLL, as [sum, count] pairs of the kind Megatron adds up over micro-batches and ranks.

    dft loss      mean objective value, nats
    dft prob      mean probability of the target: how well the model already predicts the data
    dft gate      mean gate: the share of the plain cross entropy's gradient that is let through
    dft accuracy  share of targets that are the model's first choice
    dft entropy   mean entropy of the prediction, nats, for objectives that compute it anyway
    dft blend     share of the objective in its blend with nll, for a scheduled one

They come from the statistics of the loss itself: no second pass over the logits, no collective. The set of keys
depends on the objective alone, never on the data, because Megatron takes it from the first micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dft.objectives import Objective, Scheduled
from megatron_dft.stats import TokenStats


def token_metrics(
    stats: TokenStats,  # of [...]
    objective: Objective,
    loss_mask: Tensor,  # [...], weight of each token; 0 leaves it out, whatever its statistics are
) -> dict[str, Tensor]:  # of [2]: sum, count
    """The report of one micro-batch."""
    weight = loss_mask.float() * stats.valid
    loss, gate = objective(stats)
    columns = {"dft loss": loss, "dft prob": stats.prob, "dft gate": gate}
    if stats.correct is not None:
        columns["dft accuracy"] = stats.correct.float()
    if stats.entropy is not None:
        columns["dft entropy"] = stats.entropy
    if isinstance(objective, Scheduled):
        columns["dft blend"] = objective.blend(loss.device).expand_as(loss)
    count = weight.sum()
    return {name: torch.stack([_weighted_sum(x, weight), count]) for name, x in columns.items()}


def _weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0.0, x * weight, 0.0).sum()
