"""Labels that carry more than a token id: data source, weight and reference of the token.

    bits  0 to 21   token id
    bits 22 to 23   reduction that the weight is for, a place in `REDUCTIONS`
    bits 24 to 31   channel, the data source; 0 is reported as `other`
    bits 32 to 47   weight in the gradient: 6 bits exponent, 10 bits fraction; 0: no weight
    bits 48 to 62   NLL under a reference model, fp16; 0: no reference
    -100            not in the loss
    -100 - n        not in the loss; adds n to the divisor of the gradient, for its conversation

Megatron scripts pass known tensors to the model and drop all others. Labels reach every place: they are broadcast to
tensor-parallel ranks, split for context parallelism, flattened for packed sequences, and read on the last pipeline
stage. `install` separates what is configured before the model receives the labels (--dft-channels, --dft-weights,
--dft-reduction, an objective with a reference). A label with a part that is not configured is no valid token id, and
its loss is NaN. No other tensor is sent.

A weight and a reference have 11 significant bits each: an error of at most 0.05%.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

IGNORE_INDEX = -100
KIND, CHANNEL, WEIGHT, REFERENCE = 22, 24, 32, 48  # first bits
CHANNELS = 1 << (WEIGHT - CHANNEL)
IDS = (1 << KIND) - 1
NLL_LIMITS = 2.0**-24, 65504.0  # the bits of 0.0 are those of a label without a reference
WEIGHT_LIMITS = 2.0**-30, 2.0**30
MEAN_LENGTHS = 1, 1 << 16  # of `with_conversations`; larger ones could overflow Megatron's int32 divisor
REDUCTIONS = ("token", "sample", "square-root")


def with_channels(
    labels: Tensor,  # [...] int64 token ids; negative labels stay as they are
    channel: Tensor | int,  # [...] int64, or one for all: 0 has no name, 1 is the first name of `channels`, ...
) -> Tensor:  # [...] int64
    """Labels that carry their channel. A data set of your own returns them as `labels`. One host-device sync.

    Raises:
        ValueError: for labels that are not int64, or a channel that is not from 0 to 255.
    """
    _check(labels)
    numbers = torch.as_tensor(channel, dtype=torch.int64, device=labels.device)
    if ((numbers < 0) | (numbers >= CHANNELS)).any():
        raise ValueError(f"channel: expected numbers from 0 to {CHANNELS - 1}, got {numbers.min()} to {numbers.max()}")
    return _replaced(labels, CHANNEL, WEIGHT, numbers)


def with_weights(
    labels: Tensor,  # [...] int64, may carry channels and references; negative labels stay as they are
    weight: Tensor,  # [...] of each label
) -> Tensor:  # [...] int64
    """Labels that carry their weight. A data set of your own returns them as `labels`, with --dft-weights.

    The weight multiplies the gradient of the token. The loss mask stays 0 or 1. One host-device sync. A weight replaces
    an earlier one.

    Raises:
        ValueError: for labels that are not int64, another shape of `weight`, or a weight outside of [2^-30, 2^30].
    """
    _check(labels)
    _check_shape("weight", weight, labels)
    return _weighted(labels, weight, 0)


def with_conversations(
    labels: Tensor,  # [s] int64, may carry channels and references; -100 if not in the loss
    cu_seqlens: Tensor,  # [conversations + 1] offsets, from 0 to s
    reduction: str,  # "sample" or "square-root"
    mean_length: int,  # mean number of trained tokens of a conversation, the same in the whole run
    weight: Tensor | None = None,  # [s] of each label
) -> Tensor:  # [s] int64
    """Labels for --dft-reduction: weights by the lengths of conversations, and the divisor of the gradient.

    n is the number of trained tokens of a conversation. The conversation adds c to the divisor. Its tokens have the
    weight c / n, times `weight`:

        sample        c = mean_length               mean over conversations of their mean over tokens
        square-root   c = sqrt(mean_length n)       tokens are weighted by 1 / sqrt(n)

    `mean_length` cancels in the gradient. It keeps the divisor near the number of tokens, by which Megatron scales
    auxiliary losses. The divisor is an integer: c is rounded so that the sum over the labels has an error below 1.

    The last -100 label of a conversation carries its count.

    Raises:
        ValueError: for an unknown reduction, offsets that do not fit the labels, a mean length below 1 or above 2^16, a
            conversation in which every label is in the loss, or an invalid weight.
    """
    if reduction not in REDUCTIONS[1:]:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS[1:])}, got {reduction!r}")
    _check(labels)
    bounds = cu_seqlens.tolist()
    if labels.dim() != 1 or bounds[:1] != [0] or bounds[-1] != len(labels) or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens: expected offsets that increase from 0 to the number of labels, {tuple(labels.shape)}, got "
            f"{bounds}"
        )
    if not MEAN_LENGTHS[0] <= mean_length <= MEAN_LENGTHS[1]:
        raise ValueError(f"mean_length: expected {MEAN_LENGTHS[0]} to {MEAN_LENGTHS[1]} tokens, got {mean_length}")
    labels, trained = labels.clone(), labels >= 0
    factor = torch.ones(labels.shape, dtype=torch.float64, device=labels.device)
    total = 0.0
    for first, last in itertools.pairwise(bounds):
        part = slice(first, last)
        n = int(trained[part].sum())
        if n == 0:
            continue
        if n == last - first:
            raise ValueError(
                f"labels: all {n} labels of the conversation at {first} are in the loss; its last label has no next "
                "token and is -100"
            )
        exact = mean_length if reduction == "sample" else math.sqrt(mean_length * n)
        factor[part] = exact / n
        count = math.floor(total + exact + 0.5) - math.floor(total + 0.5)
        labels[first + int((~trained[part]).nonzero()[-1])] = IGNORE_INDEX - count
        total += exact
    if weight is not None:
        _check_shape("weight", weight, labels)
        factor = factor * weight
    return _weighted(labels, factor, REDUCTIONS.index(reduction))


def with_reference(
    labels: Tensor,  # [...] int64, may carry channels and weights; negative labels stay as they are
    nll: Tensor,  # [...] of each label under the reference model, nats; NaN: unknown
) -> Tensor:  # [...] int64
    """Labels that carry their NLL under a reference model. A data set of your own returns them as `labels`.

    One host-device sync. A reference replaces an earlier one.

    Raises:
        ValueError: for labels that are not int64, another shape of `nll`, or a negative one.
    """
    _check(labels)
    _check_shape("nll", nll, labels)
    if (nll < 0.0).any():
        raise ValueError(f"nll: expected nats >= 0, got {nll.min().item():g}; pass -log p, not log p")
    return pack_reference(labels, nll)


def pack_reference(labels: Tensor, nll: Tensor) -> Tensor:
    """`with_reference` without checks and without a host-device sync."""
    bits = nll.float().clamp(*NLL_LIMITS).half().view(torch.int16).to(torch.int64)
    return _replaced(labels, REFERENCE, 63, bits.masked_fill(nll.isnan(), 0))


def split_channels(
    labels: Tensor,  # [...] int64, may carry channels
    channels: int,
) -> tuple[Tensor, Tensor]:  # labels and channel, both [...] int64
    """Separate labels and channels.

    A label whose channel is not in range(channels) keeps all its bits. It is no token id then, and its loss is NaN, as
    for every label that is out of range.
    """
    rest, channel = _split(labels, CHANNEL, WEIGHT)
    known = channel < channels
    return torch.where(known, rest, labels), torch.where(known, channel, 0)


def split_weights(
    labels: Tensor,  # [...] int64, may carry weights
    reduction: str = REDUCTIONS[0],
) -> tuple[Tensor, Tensor]:  # labels [...] int64, weight [...] fp32
    """Separate labels and weights.

    The weight is NaN if a label carries none, or one for another reduction, and 1 for negative labels.
    """
    rest, bits = _split(labels, WEIGHT, REFERENCE)
    rest, kind = _split(rest, KIND, CHANNEL)
    weight = ((bits + (96 << 10)) << 13).to(torch.int32).view(torch.float32)
    missing = (bits == 0) | (kind != REDUCTIONS.index(reduction))
    return rest, weight.masked_fill(missing, torch.nan).masked_fill(labels < 0, 1.0)


def split_counts(labels: Tensor) -> tuple[Tensor, Tensor]:  # labels [...] int64, sum of the counts [] int32
    """Separate labels and the counts of conversations."""
    counts = (IGNORE_INDEX - labels).clamp(min=0).sum().to(torch.int32)
    return labels.clamp(min=IGNORE_INDEX), counts


def split_reference(
    labels: Tensor,  # [...] int64, may carry an NLL
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # labels [...] int64, log-probability [...] of `dtype`
    """Separate labels and reference log-probabilities in nats, <= 0.

    The log-probability is NaN if a label carries none, and 0 for negative labels.
    """
    rest, bits = _split(labels, REFERENCE, 63)
    logprob = -bits.to(torch.int16).view(torch.float16).to(dtype)
    return rest, logprob.masked_fill(bits == 0, torch.nan).masked_fill(labels < 0, 0.0)


def _check(labels: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 token ids, got {labels.dtype}; convert them with .long()")


def _weighted(labels: Tensor, weight: Tensor, kind: int) -> Tensor:
    smallest, largest = WEIGHT_LIMITS
    unusable = (labels >= 0) & ~((weight >= smallest) & (weight <= largest))
    if unusable.any():
        raise ValueError(
            f"weight: expected weights from 2^-30 to 2^30, got {weight[unusable][0].item():g}; exclude a token by the "
            "label -100 and the loss mask 0"
        )
    # The exponent of fp32, less 96, in 6 bits; the fraction rounded to 10 bits.
    bits = weight.float().clamp(smallest, largest).view(torch.int32).to(torch.int64)
    labels = _replaced(labels, WEIGHT, REFERENCE, ((bits + (1 << 12)) >> 13) - (96 << 10))
    return _replaced(labels, KIND, CHANNEL, torch.full_like(labels, kind))


def _check_shape(name: str, values: Tensor, labels: Tensor) -> None:
    if values.shape != labels.shape:
        raise ValueError(f"{name}: expected the shape of the labels, {tuple(labels.shape)}, got {tuple(values.shape)}")


def _mask(first: int, last: int) -> int:
    return (1 << last) - (1 << first)


def _replaced(labels: Tensor, first: int, last: int, value: Tensor) -> Tensor:
    """The labels with `value` in the bits from `first` to before `last`; negative labels as they are."""
    return torch.where(labels < 0, labels, (labels & ~_mask(first, last)) | (value << first))


def _split(labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The labels without the bits from `first` to before `last`, and these bits; 0 for negative labels."""
    mask = _mask(first, last)
    value = torch.where(labels < 0, 0, (labels & mask) >> first)
    return torch.where(labels < 0, labels, labels & ~mask), value
