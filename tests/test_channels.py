"""with_channels and split_channels: channel numbers in the upper bits of labels."""

import pytest
import torch

from megatron_dft.channels import channel_names, split_channels, with_channels


def test_labels_and_channels_round_trip():
    labels = torch.tensor([[0, 5, -100], [2**31 - 1, 7, -100]])
    channel = torch.tensor([[0, 1, 2], [3, 1000, 5]])
    back, numbers = split_channels(with_channels(labels, channel), 1001)
    assert torch.equal(back, labels)
    assert numbers.tolist() == [[0, 1, 0], [3, 1000, 0]]  # ignored labels have no channel


def test_labels_without_channels_are_unchanged():
    labels = torch.tensor([3, -100, 0])
    assert torch.equal(with_channels(labels, 0), labels)
    back, channel = split_channels(labels, 3)
    assert torch.equal(back, labels) and not channel.any()
    assert split_channels(with_channels(labels, 2), 3)[1].tolist() == [2, 0, 2]


def test_label_out_of_range_stays_out_of_range():
    labels = torch.tensor([2**33 + 3, 2**62, 5])  # the first could be token 3 of channel 2
    back, channel = split_channels(labels, 2)
    assert torch.equal(back, labels) and not channel.any()


def test_with_channels_rejects_int32_labels():
    with pytest.raises(ValueError, match=r"labels: expected int64 token ids, got torch.int32"):
        with_channels(torch.zeros(2, dtype=torch.int32), 1)


@pytest.mark.parametrize("channel", [-1, 1 << 16])
def test_with_channels_rejects_numbers_beyond_16_bits(channel):
    with pytest.raises(ValueError, match="channel: expected numbers from 0 to 65535, got"):
        with_channels(torch.tensor([5]), channel)


def test_channel_names_puts_other_first():
    assert channel_names(None) == ()
    assert channel_names("maths, code") == ("other", "maths", "code")
