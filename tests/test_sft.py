"""Extensions of Megatron's --sft: channels of packed lines, and checks of data files and settings."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from host_runs import EXAMPLE, Host

from megatron_dft.hosts.sft import (
    ChannelDataset,
    _by_token,
    _whole,
    check_settings,
    data_paths,
    first_invalid_line,
    with_checks,
)

pytest.importorskip("tokenizers")

from chat_examples import talk, tokenizer

NUMBERS = {"other": 0, "maths": 1, "code": 2}


def sample(*ends, length=8):
    """A sample of Megatron's SFTDataset: the ends of conversations, padded with the length of the line."""
    edges = torch.full((length + 1,), length, dtype=torch.int32)
    edges[: len(ends) + 1] = torch.tensor((0, *ends), dtype=torch.int32)
    return {"labels": torch.zeros(length, dtype=torch.int64), "cu_seqlens": edges}


def test_channel_of_label_follows_target_token_at_boundary():
    line = {"channels": ["maths", "code", "maths"]}
    assert _by_token(line, sample(3, 5, 8), NUMBERS).tolist() == [1, 1, 2, 2, 1, 1, 1, 1]


def test_channel_of_line_may_be_single_unknown_or_missing():
    assert _by_token({"channel": "code"}, sample(8), NUMBERS).tolist() == [2] * 8
    assert _by_token({"channels": ["maths", "law"]}, sample(4, 8), NUMBERS).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    for line in ({"channels": None}, {}, {"channel": None, "channels": []}):
        assert not _by_token(line, sample(4, 8), NUMBERS).any()


def test_channels_ignore_truncated_conversations():
    """Megatron truncates long lines, so there may be fewer conversations than channel names."""
    line = {"channels": ["maths", "code", "maths"]}
    assert _by_token(line, sample(3, 8), NUMBERS).tolist()[:-1] == [1, 1, 2, 2, 2, 2, 2]  # the last label is padding


FLAGS = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0 --eval-interval 100 --num-workers 0 --sft "
    "--tokenizer-type SFTTokenizer --position-embedding-type rope --calculate-per-token-loss "
)


def sft_dataset(folder, lines):
    """An SFTDataset of Megatron with these lines."""
    pytest.importorskip("datasets")
    host = pytest.importorskip("megatron.training.datasets.sft_dataset")
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = object.__new__(host.SFTDataset)  # without tokenizer and sizes, which only samples need
    dataset.dataset = host.SFTLowLevelDataset(str(path))
    return dataset


@pytest.mark.host
def test_channel_dataset_wraps_nested_datasets_once(tmp_path):
    dataset = sft_dataset(tmp_path, [{"messages": talk("one", "two"), "channel": name} for name in ("maths", "code")])
    blend, other = SimpleNamespace(datasets=[dataset]), object()
    settings = SimpleNamespace(sft=True, sft_tokenizer_prompt_format="default")
    provide = with_checks(lambda counts: (blend, [dataset, other], None), settings, tuple(NUMBERS))
    for _ in range(2):
        first, (second, third), fourth = provide([1, 1, 1])
        assert (first, third, fourth) == (blend, other, None)
        for wrapped in (blend.datasets[0], second):
            assert type(wrapped) is ChannelDataset and wrapped.dataset is dataset and wrapped.numbers == NUMBERS
    assert pickle.loads(pickle.dumps(second)).numbers == NUMBERS  # as for spawned data loader workers


@pytest.mark.host
def test_channels_missing_from_data_are_rejected(tmp_path):
    settings = SimpleNamespace(sft=True, sft_tokenizer_prompt_format="default")
    messages = talk("one", "two")
    named = sft_dataset(tmp_path, [{"messages": messages, "channels": ["maths"]}, {"messages": messages}])
    with pytest.raises(ValueError, match=r"the data has no channel 'mats': it has maths; did you mean 'maths'"):
        with_checks(lambda counts: [named], settings, ("other", "mats"))([1])
    bare = sft_dataset(tmp_path, [{"messages": messages}])
    with pytest.raises(ValueError, match=r"the data has no channel 'maths': it has none"):
        with_checks(lambda counts: [bare], settings, ("other", "maths"))([1])


def test_data_paths_match_megatron_blend_parsing():
    blend = pytest.importorskip("megatron.core.datasets.utils").get_blend_from_list
    for paths in (["a"], ["0.3", "a", "0.7", "b"], ["1e-3", "a"], [".5", "a", "3", "b"], ["a", "b"], ["1", "2", "3"]):
        assert data_paths(SimpleNamespace(data_path=paths)) == list(blend(paths)[0]), paths
    assert data_paths(SimpleNamespace(data_path=None, train_data_path=["a"], valid_data_path=["2", "b"])) == ["a", "b"]


def test_check_settings_rejects_attention_mask_in_dataloader():
    check_settings(SimpleNamespace(sft=False, create_attention_mask_in_dataloader=True))
    with pytest.raises(ValueError, match=r"--sft: .* add --no-create-attention-mask-in-dataloader"):
        check_settings(SimpleNamespace(sft=True, create_attention_mask_in_dataloader=True))


GOOD = json.dumps({"messages": talk("one", "two", system="sum")}).encode()
INVALID = {  # line -> error message
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
    GOOD.replace(b'"two"', b"null"): "bad message: message 2: expected text as content and one of the roles",
    GOOD.replace(b'"two"', b"2"): "bad message: message 2: .* got int and 'assistant'",
    GOOD.replace(b'"user"', b'"bot"'): "bad message: message 1: .* got str and 'bot'",
    json.dumps({"messages": talk("one", system="sum")}).encode(): "no assistant",
    GOOD.replace(b'"two"', b'" \\n"'): "empty reply: message 2",
}


@pytest.mark.parametrize("line", [None, b"", b"  ", *INVALID])
def test_sft_data_check_reports_invalid_line_and_accepts_valid_lines(tmp_path, line):
    """Invalid data fails to load or is incomplete, and the error names the first invalid line."""
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\n".join([GOOD] * 4 + [line] * (line is not None) + [GOOD]) + b"\n")
    try:
        whole = _whole(datasets.load_dataset("json", data_files=str(file), split="all", cache_dir=str(tmp_path)).data)
    except datasets.exceptions.DatasetGenerationError:
        whole = False
    assert whole == (line not in INVALID)
    if whole:
        assert first_invalid_line(str(file)) is None
    else:
        with pytest.raises(ValueError, match=f"{file}:5: {INVALID[line]}"):
            raise ValueError(first_invalid_line(str(file)))


@pytest.mark.host
@pytest.mark.parametrize("line", [GOOD[:40], GOOD.replace(b'"user"', b'"bot"')], ids=["not JSON", "bad role"])
def test_sft_run_rejects_invalid_line_before_training(tmp_path, line):
    pytest.importorskip("megatron.training")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    flags = FLAGS + (
        "--no-create-attention-mask-in-dataloader --sft-tokenizer-prompt-format nemotron-nano-v2 --loss-type dft "
        f"--tokenizer-model {tmp_path / 'tokenizer'} --train-data-path {tmp_path / 'x.jsonl'} "
    )
    code, output = Host(tmp_path).start(flags, script=EXAMPLE)
    assert code and f"{tmp_path / 'x.jsonl'}:3: " in output and "megatron-dft data lists all" in output
    assert "before the start of training step" not in output


@pytest.mark.host
def test_sft_run_accepts_messages_with_unequal_keys(tmp_path):
    """datasets stores such messages as an extension type, which does not make lines invalid."""
    pytest.importorskip("megatron.training")
    saved = tokenizer(unk_token="<unk>")
    saved.add_special_tokens({"additional_special_tokens": ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"]})
    saved.save_pretrained(tmp_path / "tokenizer")
    lines = [talk("one", "two"), talk("one", "two")]
    lines[0][0]["name"], lines[1][1]["tags"] = "first", ["a", {"b": 1}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    flags = FLAGS + (
        "--no-create-attention-mask-in-dataloader --sft-tokenizer-prompt-format nemotron-nano-v2 --loss-type dft "
        f"--tokenizer-model {tmp_path / 'tokenizer'} --train-data-path {tmp_path / 'x.jsonl'} "
    )
    code, output = Host(tmp_path).start(flags, script=EXAMPLE)
    assert code == 0, output[-3000:]
    assert "dft/loss" in output
