"""Reference log-probabilities: the NLL of each target under another model, carried by its label.

    label   token id (32 bits) + channel (16 bits, channels.py) + NLL as fp16 (15 bits, its sign is 0)

Labels reach the loss in every layout. `vocab_parallel_dft_loss` and the hosts remove the NLL from them if the objective
needs it. fp16 has 11 significant bits: the error of an NLL is at most 0.05%.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 48
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of fp16; the bits of 0.0 are those of a label without a reference


def with_reference(
    labels: Tensor,  # [...] int64 token ids, may carry channels; negative labels (-100) stay as they are
    nll: Tensor,  # [...] of each label under the reference model, nats; NaN: unknown
) -> Tensor:  # [...] int64
    """Labels that carry their NLL under a reference model. A data set of your own returns them as `labels`.

    Raises:
        ValueError: for labels that are not int64.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 token ids, got {labels.dtype}; convert them with .long()")
    stored = nll.float().clamp(SMALLEST, LARGEST).half().view(torch.int16).to(torch.int64)
    return torch.where((labels < 0) | nll.isnan(), labels, labels | (stored << SHIFT))


def split_reference(
    labels: Tensor,  # [...] int64, may carry an NLL
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # labels [...] int64, log-probability [...] of `dtype`
    """Separate labels and reference log-probabilities in nats, <= 0.

    The log-probability is NaN if a label carries none, and 0 for negative labels.
    """
    bits = (labels >> SHIFT) & 0x7FFF
    logprob = -bits.to(torch.int16).view(torch.float16).to(dtype)
    logprob = logprob.masked_fill(bits == 0, torch.nan).masked_fill(labels < 0, 0.0)
    return torch.where(labels < 0, labels, labels & ((1 << SHIFT) - 1)), logprob
