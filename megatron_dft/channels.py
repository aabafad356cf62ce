"""Channels: the data source of each token, carried by its label.

    label   token id + (channel << 32)        channel 0 is reported as `other`; masked labels (-100) have none

Megatron scripts pass known tensors to the model and drop all others. Labels reach every place: they are broadcast to
tensor-parallel ranks, split for context parallelism, flattened for packed sequences, and read on the last pipeline
stage. A label has 64 bits, of which a token id needs 20. The channel has the bits 32 to 47, a reference those above
(ops/reference.py). If channels are configured (`--dft-channels`), `install` removes the channel before the model
receives the labels. No other tensor is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

OTHER = "other"  # channel 0
SHIFT = 32
MASK = 0xFFFF << SHIFT


def with_channels(
    labels: Tensor,  # [...] int64 token ids; negative labels (-100) stay as they are
    channel: Tensor | int,  # [...] int64, or one for all: 0 has no name, 1 is the first name of `channels`, ...
) -> Tensor:  # [...] int64
    """Labels that carry their channel. A data set of your own returns them as `labels`. One host-device sync."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 token ids, got {labels.dtype}; convert them with .long()")
    numbers = torch.as_tensor(channel, dtype=torch.int64, device=labels.device)
    if ((numbers < 0) | (numbers > MASK >> SHIFT)).any():
        raise ValueError(f"channel: expected numbers from 0 to {MASK >> SHIFT}, got {numbers.min()} to {numbers.max()}")
    marked = labels + (numbers << SHIFT)
    return torch.where(labels < 0, labels, marked)


def split_channels(
    labels: Tensor,  # [...] int64, may carry channels
    channels: int,
) -> tuple[Tensor, Tensor]:  # labels and channel, both [...] int64
    """Separate labels and channels.

    A label whose channel is not in range(channels) keeps all its bits. It is no token id then, and its loss is NaN, as
    for every label that is out of range.
    """
    channel = (labels & MASK) >> SHIFT
    carries = (labels >= 0) & (channel < channels)
    return torch.where(carries, labels & ~MASK, labels), torch.where(carries, channel, 0)


def channel_names(specification: str | None) -> tuple[str, ...]:
    """Channel names by number from "maths,code", with `other` first; empty without a specification.

    Raises:
        ValueError: for an empty name, or one that is given twice.
    """
    if specification is None:
        return ()
    names = [name.strip() for name in specification.split(",")]
    if "" in names or OTHER in names or len(set(names)) < len(names):
        raise ValueError(
            f"channels: expected distinct names, e.g. maths,code ({OTHER!r} is reserved for all others), got "
            f"{specification!r}"
        )
    return (OTHER, *names)
