"""What Megatron's --sft is taught: the channels of a packed line, and prompt formats of Hugging Face."""

import json
from types import SimpleNamespace

import pytest
import torch
from host_runs import EXAMPLE, Host

from megatron_dft.hosts.sft import _by_token, _whole, damage, naming_channels

pytest.importorskip("tokenizers")

from chat_examples import talk, tokenizer

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


GOOD = json.dumps({"messages": talk("one", "two", system="sum")}).encode()
DAMAGED = {  # what is wrong with a line, and how it is called
    GOOD[:-1]: "not JSON",
    GOOD[:40]: "not JSON",
    b"\x00\xff{": "not JSON",
    GOOD.replace(b"two", b"\xff"): "not JSON: 'utf-8' codec can't decode byte 0xff",
    b"[1]": "no messages",
    b"null": "no messages",
    b"{}": "no messages",
    b'{"messages": null}': "no messages",
    b'{"messages": "one"}': "no messages",
    b'{"messages": []}': "no assistant",
    b'{"messages": [null]}': "bad message: message 0",
    GOOD.replace(b'"two"', b"null"): "bad message: message 2: expected content that is text and a role of",
    GOOD.replace(b'"two"', b"2"): "bad message: message 2: .* got int and 'assistant'",
    GOOD.replace(b'"user"', b'"bot"'): "bad message: message 1: .* got str and 'bot'",
    json.dumps({"messages": talk("one", system="sum")}).encode(): "no assistant",
}


@pytest.mark.parametrize("line", [None, b"", b"  ", *DAMAGED])
def test_a_damaged_line_is_found_and_a_good_one_is_not(tmp_path, line):
    """Either the data cannot be loaded, or it is not whole; and the first such line is named."""
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\n".join([GOOD] * 4 + [line] * (line is not None) + [GOOD]) + b"\n")
    try:
        whole = _whole(datasets.load_dataset("json", data_files=str(file), split="all", cache_dir=str(tmp_path)).data)
    except datasets.exceptions.DatasetGenerationError:
        whole = False
    assert whole == (line not in DAMAGED)
    if whole:
        assert damage(str(file)) is None
    else:
        with pytest.raises(ValueError, match=f"{file}:5: {DAMAGED[line]}"):
            raise ValueError(damage(str(file)))


@pytest.mark.host
@pytest.mark.parametrize("line", [GOOD[:40], GOOD.replace(b'"user"', b'"bot"')], ids=["not JSON", "bad role"])
def test_a_run_on_a_damaged_file_is_refused_before_it_trains(tmp_path, line):
    pytest.importorskip("megatron.training")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    flags = (
        "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
        "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0 --eval-interval 100 --num-workers 0 --sft "
        "--tokenizer-type SFTTokenizer --sft-tokenizer-prompt-format completion --position-embedding-type rope "
        "--no-create-attention-mask-in-dataloader --calculate-per-token-loss --loss-type dft "
        f"--tokenizer-model {tmp_path / 'tokenizer'} --train-data-path {tmp_path / 'x.jsonl'} "
    )
    code, output = Host(tmp_path).start(flags, script=EXAMPLE)
    assert code and f"{tmp_path / 'x.jsonl'}:3: " in output and "python -m megatron_dft.data names all" in output
    assert "before the start of training step" not in output
