"""Labels: what they carry beside the token id comes back unchanged, in any order of packing and splitting."""

import itertools

import pytest
import torch

from megatron_dft.labels import (
    IDS,
    split_channels,
    split_counts,
    split_reference,
    split_weights,
    with_channels,
    with_conversations,
    with_reference,
    with_weights,
)
from megatron_dft.metrics import channel_names

PACK = {
    "channel": lambda labels: with_channels(labels, torch.tensor([0, 255, 3, 1, 2, 2])),
    "weight": lambda labels: with_weights(labels, torch.tensor([1.0, 2.0**-30, 2.0**30, 0.5, -1.0, 0.0])),
    "reference": lambda labels: with_reference(labels, torch.tensor([0.5, 65504.0, 2.0, 1.0, 1.0, 1.0])),
}
SPLIT = {"channel": lambda labels: split_channels(labels, 256), "weight": split_weights, "reference": split_reference}
CARRIED = {
    "channel": [0, 255, 3, 1, 0, 0],
    "weight": [1.0, 2.0**-30, 2.0**30, 0.5, 1.0, 1.0],
    "reference": [-0.5, -65504.0, -2.0, -1.0, 0.0, 0.0],
}
ORDERS = list(itertools.permutations(PACK))


@pytest.mark.parametrize("packing", ORDERS)
def test_parts_of_a_label_are_independent(packing):
    ids = torch.tensor([0, 5, IDS, 151935, -100, -103])
    packed = ids
    for name in packing:
        packed = PACK[name](packed)
    for order in ORDERS:
        labels = packed
        for name in order:
            labels, value = SPLIT[name](labels)
            assert value.tolist() == CARRIED[name]
        assert torch.equal(labels, ids)


@pytest.mark.parametrize(("pack", "split"), [(x, SPLIT[name]) for name, x in PACK.items()])
def test_new_value_replaces_the_old_one(pack, split):
    labels = pack(torch.tensor([1, 2, 3, 4, -100, 5 - 200]))
    once, again = split(labels), split(pack(pack(labels)))
    assert all(map(torch.equal, once, again))


def test_labels_without_parts_are_unchanged():
    labels = torch.tensor([3, -100, 0])
    assert torch.equal(with_channels(labels, 0), labels)
    back, channel = split_channels(labels, 3)
    assert torch.equal(back, labels) and not channel.any()
    back, weight = split_weights(labels)
    assert torch.equal(back, labels) and weight.isnan().tolist() == [True, False, True]
    back, count = split_counts(labels)
    assert torch.equal(back, labels) and count == 0


def test_label_out_of_range_stays_out_of_range():
    labels = torch.tensor([(2 << 24) + 3, 2**62, 2**33 + 3, 5])  # the first could be token 3 of channel 2
    back, channel = split_channels(labels, 2)
    assert torch.equal(back, labels) and not channel.any()


def test_weight_has_11_significant_bits():
    weight = torch.logspace(-9, 9, 1000, dtype=torch.float64)
    _, back = split_weights(with_weights(torch.arange(1000), weight))
    torch.testing.assert_close(back.double(), weight, rtol=2.0**-11, atol=0.0)


# 3 conversations with 2, 3 and 0 trained tokens; padding belongs to the last one.
LABELS = torch.tensor([-100, 7, 8, -100, 9, 9, 9, -100, -100, -100])
CU_SEQLENS = torch.tensor([0, 4, 8, 10, 10])


@pytest.mark.parametrize(
    ("reduction", "tokens", "counts", "weights"),
    [
        ("sample", 100, (100, 100), (100 / 2, 100 / 3)),
        ("square-root", 100, (14, 17), (50**0.5, (100 / 3) ** 0.5)),  # sqrt(200) and sqrt(300), rounded
        ("square-root", 2, (2, 2), (1.0, (2 / 3) ** 0.5)),  # sqrt(4) and sqrt(6)
        ("sample", 1, (1, 1), (1 / 2, 1 / 3)),
    ],
)
def test_conversations_carry_weights_and_counts(reduction, tokens, counts, weights):
    labels = with_conversations(LABELS, CU_SEQLENS, reduction, tokens)
    assert labels[3] == -100 - counts[0] and labels[7] == -100 - counts[1] and labels[9] == -100
    labels, count = split_counts(labels)
    assert count == sum(counts) and count.dtype == torch.int32
    assert split_weights(labels, reduction)[1].isfinite().all()
    labels, weight = split_weights(labels, reduction)
    assert torch.equal(labels, LABELS)
    expected = torch.tensor([1.0, *[weights[0]] * 2, 1.0, *[weights[1]] * 3, 1.0, 1.0, 1.0])
    torch.testing.assert_close(weight, expected, rtol=2.0**-11, atol=0.0)


def test_weights_of_the_data_multiply_those_of_conversations():
    given = torch.linspace(0.1, 1.0, 10)
    _, weight = split_weights(with_conversations(LABELS, CU_SEQLENS, "sample", 6, given), "sample")
    torch.testing.assert_close(weight[1:3], 3.0 * given[1:3], rtol=2.0**-11, atol=0.0)
    torch.testing.assert_close(weight[4:7], 2.0 * given[4:7], rtol=2.0**-11, atol=0.0)


def test_conversation_without_a_masked_label_is_rejected():
    with pytest.raises(ValueError, match="labels: all 3 labels of the conversation at 4 are in the loss"):
        with_conversations(LABELS[:7], torch.tensor([0, 4, 7]), "sample", 6)
    with pytest.raises(ValueError, match="reduction: expected one of sample, square-root, got 'token'"):
        with_conversations(LABELS, CU_SEQLENS, "token", 6)


@pytest.mark.parametrize("mean_length", [1, 4, 300])
def test_rounded_counts_add_up(mean_length):
    lengths = torch.randint(2, 9, (500,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    labels = torch.ones(int(lengths.sum()), dtype=torch.int64)
    labels[bounds[1:] - 1] = -100
    exact = (mean_length * (lengths - 1)).double().sqrt().sum()
    _, count = split_counts(with_conversations(labels, bounds, "square-root", mean_length))
    assert abs(count - exact) <= 0.5


def test_weight_for_another_reduction_is_missing():
    plain = with_weights(LABELS, torch.full(LABELS.shape, 0.5))
    by_kind = {"token": plain}
    by_kind |= {name: with_conversations(LABELS, CU_SEQLENS, name, 6) for name in ("sample", "square-root")}
    for name, labels in by_kind.items():
        for other in by_kind:
            rest, weight = split_weights(labels, other)
            assert weight[LABELS >= 0].isnan().all() == (name != other) and not weight[LABELS < 0].isnan().any()
            assert torch.equal(split_counts(rest)[0], LABELS)


@pytest.mark.parametrize(
    ("bounds", "mean_length", "message"),
    [
        (
            [0, 4],
            6,
            r"cu_seqlens: expected offsets that increase from 0 to the number of labels, \(10,\), got \[0, 4\]",
        ),
        ([4, 4, 2], 6, "cu_seqlens: expected offsets"),
        ([2, 4, 10], 6, "cu_seqlens: expected offsets"),
        ([0, 4, 12], 6, "cu_seqlens: expected offsets"),
        ([0, 8, 4, 10], 6, "cu_seqlens: expected offsets"),
        ([0, 10], 0, "mean_length: expected 1 to 65536 tokens, got 0"),
        ([0, 10], 10**6, "mean_length: expected 1 to 65536 tokens, got 1000000"),
    ],
)
def test_invalid_conversations_are_rejected(bounds, mean_length, message):
    with pytest.raises(ValueError, match=message):
        with_conversations(LABELS, torch.tensor(bounds), "sample", mean_length)


ONE, INT32 = torch.tensor([5]), torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (with_channels, (INT32, 1), "labels: expected int64 token ids, got torch.int32"),
        (with_weights, (INT32, torch.ones(1)), "labels: expected int64 token ids, got torch.int32"),
        (with_reference, (INT32, torch.ones(1)), "labels: expected int64 token ids, got torch.int32"),
        (with_channels, (ONE, -1), "channel: expected numbers from 0 to 255, got -1 to -1"),
        (with_channels, (ONE, 256), "channel: expected numbers from 0 to 255, got 256"),
        (with_weights, (ONE, torch.tensor([0.0])), r"weight: expected weights from 2\^-30 to 2\^30, got 0; exclude"),
        (with_weights, (ONE, torch.tensor([torch.nan])), "weight: expected weights .*, got nan"),
        (
            with_conversations,
            (LABELS, CU_SEQLENS, "sample", 6, torch.ones(1)),
            r"weight: expected the shape of the labels",
        ),
        (with_conversations, (LABELS[None], CU_SEQLENS, "sample", 6), "cu_seqlens: expected offsets"),
        (with_weights, (ONE, torch.ones(2)), r"weight: expected the shape of the labels, \(1,\), got \(2,\)"),
    ],
)
def test_invalid_values_are_rejected(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_channel_names_puts_other_first():
    assert channel_names(None) == ()
    assert channel_names("maths, code") == ("other", "maths", "code")
    with pytest.raises(ValueError, match="channels: expected at most 255 names, got 256"):
        channel_names(",".join(map(str, range(256))))
