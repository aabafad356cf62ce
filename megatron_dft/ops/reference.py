"""Reference log-probabilities: the NLL of each target under another model, carried by its label.

    label   token id (32 bits) + channel (16 bits, channels.py) + NLL as fp16 (15 bits, its sign is 0)

Labels reach the loss in every layout. If the objective needs the NLL, `vocab_parallel_dft_loss` and the hosts split it
off. Otherwise such a label is no valid id, and its loss is NaN. fp16 has 11 significant bits: the error of an NLL is at
most 0.05%. NLLs are clamped to [2^-24, 65504], because the bits of 0.0 are those of a label without a reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 48
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of fp16
IDS = (1 << SHIFT) - 1  # bits of token id and channel


def with_reference(
    labels: Tensor,  # [...] int64 token ids, may carry channels; negative labels (-100) stay as they are
    nll: Tensor,  # [...] of each label under the reference model, nats; NaN: unknown
) -> Tensor:  # [...] int64
    """Labels that carry their NLL under a reference model. A data set of your own returns them as `labels`.

    One host-device sync. An earlier reference is replaced.

    Raises:
        ValueError: for labels that are not int64, another shape of `nll`, or a negative one.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 token ids, got {labels.dtype}; convert them with .long()")
    if nll.shape != labels.shape:
        raise ValueError(f"nll: expected the shape of the labels, {tuple(labels.shape)}, got {tuple(nll.shape)}")
    if (nll < 0.0).any():
        raise ValueError(f"nll: expected nats >= 0, got {nll.min().item():g}; pass -log p, not log p")
    return pack(labels, nll)


def pack(labels: Tensor, nll: Tensor) -> Tensor:
    """`with_reference` without checks and without a host-device sync."""
    stored = nll.float().clamp(SMALLEST, LARGEST).half().view(torch.int16).to(torch.int64)
    known = torch.where(nll.isnan(), 0, stored << SHIFT)
    return torch.where(labels < 0, labels, (labels & IDS) | known)


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
    return torch.where(labels < 0, labels, labels & IDS), logprob
