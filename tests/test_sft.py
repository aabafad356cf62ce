"""What Megatron's --sft is taught: the channels of a packed line, and prompt formats of Hugging Face."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dft.hosts.sft import _by_token, naming_channels

NUMBERS = {"other": 0, "maths": 1, "code": 2}


def sample(*ends, length=8):
    """As Megatron's SFTDataset gives it: the ends of conversations, filled up with the length of the line."""
    edges = torch.full((length + 1,), length, dtype=torch.int32)
    edges[: len(ends) + 1] = torch.tensor((0, *ends), dtype=torch.int32)
    return {"labels": torch.zeros(length, dtype=torch.int64), "cu_seqlens": edges}


def test_a_label_belongs_to_the_conversation_of_the_token_it_names_at_each_boundary():
    line = {"channels": ["maths", "code", "maths"]}
    assert _by_token(line, sample(3, 5, 8), NUMBERS).tolist() == [1, 1, 2, 2, 1, 1, 1, 1]


def test_a_line_may_have_one_channel_an_unknown_one_or_none():
    assert _by_token({"channel": "code"}, sample(8), NUMBERS).tolist() == [2] * 8
    assert _by_token({"channels": ["maths", "law"]}, sample(4, 8), NUMBERS).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    for line in ({"channels": None}, {}, {"channel": None, "channels": []}):
        assert not _by_token(line, sample(4, 8), NUMBERS).any()


def test_conversations_that_a_line_has_no_room_for_change_nothing():
    """Megatron cuts a line that is too long; then there are fewer conversations than names."""
    line = {"channels": ["maths", "code", "maths"]}
    assert _by_token(line, sample(3, 8), NUMBERS).tolist()[:-1] == [1, 1, 2, 2, 2, 2, 2]  # the last one is padding


@pytest.mark.host
def test_a_data_set_that_is_given_twice_is_named_once():
    sft_dataset = pytest.importorskip("megatron.training.datasets.sft_dataset")
    names = tuple(NUMBERS)
    dataset = object.__new__(sft_dataset.SFTDataset)
    blend, other = SimpleNamespace(datasets=[dataset]), object()
    provide = naming_channels(lambda counts: (blend, [dataset, other], None), names)
    assert provide([1, 1, 1]) == provide([1, 1, 1]) == (blend, [dataset, other], None)
    kind = type(dataset)
    assert kind.__mro__[1] is sft_dataset.SFTDataset and kind.channels == names
    assert not hasattr(sft_dataset.SFTDataset, "channels") and type(other) is object
