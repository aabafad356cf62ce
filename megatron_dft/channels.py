"""Channels: where each token of a batch comes from, a data source or domain, carried by its label.

    label   token id + (channel << 32)        channel 0: not named; a masked label (-100) has none

A Megatron script passes on the tensors it knows and drops all others; labels it takes everywhere: they are broadcast
to tensor-parallel ranks, cut for context parallelism, flattened for packed sequences, read by the last pipeline stage.
A label has 64 bits and a token id needs 20 of them, so the channel travels in the upper half. `install` takes it off
before the model sees the labels, if channels are configured (`--loss-channels`). Nothing else is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

OTHER = "other"  # channel 0
SHIFT = 32


def with_channels(
    labels: Tensor,  # [...] int64 token ids; negative ones (-100) are kept as they are
    channel: Tensor | int,  # [...] int64 or one for all: 0 is none, 1 the first name in `channels`, ...
) -> Tensor:  # [...] int64
    """Labels that carry their channel, for a data set of your own: return them as its `labels`."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 token ids, got {labels.dtype}; convert them with .long()")
    marked = labels + (torch.as_tensor(channel, dtype=torch.int64, device=labels.device) << SHIFT)
    return torch.where(labels < 0, labels, marked)


def split_channels(
    labels: Tensor,  # [...] int64, may carry channels
    channels: int,
) -> tuple[Tensor, Tensor]:  # labels and channel, both [...] int64
    """Take the channel off each label.

    A label whose channel is not one of the `channels` numbers keeps all of its bits. It is then no token id, and its
    loss is NaN: a label that is out of range by itself stays as visible as without channels.
    """
    channel = labels >> SHIFT
    carries = (channel >= 0) & (channel < channels)
    return torch.where(carries, labels & ((1 << SHIFT) - 1), labels), torch.where(carries, channel, 0)


def channel_names(specification: str | None) -> tuple[str, ...]:
    """From "maths,code" to the names by number, `other` first; none if there is no specification.

    Raises:
        ValueError: for an empty name, or one that is given twice.
    """
    if specification is None:
        return ()
    names = [name.strip() for name in specification.split(",")]
    if "" in names or OTHER in names or len(set(names)) < len(names):
        raise ValueError(
            f"channels: expected different names, as in maths,code ({OTHER!r} is what none of them covers), got "
            f"{specification!r}"
        )
    return (OTHER, *names)
