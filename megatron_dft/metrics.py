"""What a run reports beside the NLL, as [sum, count] pairs of the kind Megatron adds up over micro-batches and ranks.

    dft loss      mean objective value, nats
    dft prob      mean probability of the target: how well the model already predicts the data
    dft gate      mean gate: the share of the plain cross entropy's gradient that is let through
    dft accuracy  share of targets that are the model's first choice
    dft entropy   mean entropy of the prediction, nats, for objectives that compute it anyway
    dft blend     share of the objective in its blend with nll, for a scheduled one

They come from the loss itself: no second pass over the logits, no collective, a dozen small operations. The set of keys
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
    assert stats.loss is not None and stats.gate is not None
    columns = {"dft loss": stats.loss, "dft prob": stats.prob, "dft gate": stats.gate}
    if stats.correct is not None:
        columns["dft accuracy"] = stats.correct.to(stats.loss.dtype)
    if stats.entropy is not None:
        columns["dft entropy"] = stats.entropy
    if isinstance(objective, Scheduled):
        columns["dft blend"] = objective.blend(stats.loss.device).to(stats.loss.dtype).expand_as(stats.loss)
    weight = loss_mask.float() * stats.valid
    sums = torch.where(weight > 0.0, torch.stack(list(columns.values())) * weight, 0.0).flatten(1).sum(1)
    pairs = torch.stack([sums, weight.sum().expand_as(sums)], 1)
    return dict(zip(columns, pairs, strict=True))
