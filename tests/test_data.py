"""Chat data to packed lines: nothing is lost silently, and Megatron trains on exactly the tokens that were counted."""

import io
import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from chat_examples import CHATML, talk, tokenizer
from host_runs import EXAMPLE, Host

from megatron_dft import data

GOOD = [
    {"messages": talk("one", "two"), "channel": "maths"},
    {"messages": talk("what is the sum of one and two", "maybe", "no", "yes", system="the system"), "channel": "code"},
    {"prompt": "one and ", "completion": "two"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"messages": [*talk("sum"), {"role": "tool", "content": "two"}, {"role": "assistant", "content": "two"}]},
]
BAD = {
    '{"messages": [': "not JSON",
    "": "empty line",
    "[1]": "not a conversation: expected an object with messages, got list",
    '{"text": "a"}': "no messages: expected messages, or prompt and completion, got text",
    '{"messages": []}': "no messages",
    '{"prompt": "a", "completion": 3}': "no messages",
    json.dumps({"messages": talk("one")}): "no assistant",
    json.dumps({"messages": talk("one", "  ")}): "empty reply: message 1",
    json.dumps({"messages": [{"role": "assistant", "content": "a"}]}): "reply to nobody: message 0",
    json.dumps({"messages": [{"role": "bot", "content": "a"}]}): "bad message: message 0: expected a role of",
    json.dumps({"messages": [{"role": "user", "content": ["a"]}]}): "bad message: message 0: expected content that is",
    json.dumps({"messages": [*talk("a", "b"), {"role": "system", "content": "a"}]}): "late system message: message 2",
    json.dumps({"messages": [{**talk("a")[0], "tool_calls": [1]}, talk("a", "b")[1]]}): "tool calls: message 0",
    json.dumps({"messages": talk("a", "b"), "channel": 3}): "bad channel: expected a name without a comma, got 3",
    json.dumps({"messages": talk("a", "\ud800")}): "not text: ",
    json.dumps({"messages": talk("a", "b"), "channel": "c,d"}): "bad channel: expected a name without a comma",
    json.dumps({"messages": talk("a", "yes " * 200)}): "tokens, a line has 96",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tokenizer().save_pretrained(path / "tokenizer")
    lines = [json.dumps(x) for x in GOOD]
    for i, line in enumerate(BAD):
        lines.insert(2 * i, line)
    (path / "law.jsonl").write_text("\n".join(lines))
    (path / "long.jsonl").write_text(
        "".join(json.dumps({"messages": talk("one " * (i % 7), "yes " * (i % 40 + 1))}) + "\n" for i in range(300))
    )
    return path


def prepare(folder, name, *words, tokenizer="tokenizer"):
    out = folder / f"{name}.train.jsonl"
    data.main([str(folder / f"{name}.jsonl"), "--tokenizer", str(folder / tokenizer), "--out", str(out), *words])
    return [json.loads(line) for line in out.read_text().splitlines()], json.loads(
        out.with_suffix(".report.json").read_text()
    )


def conversations(lines):
    """All of them, with their channels, in no order."""
    found = []
    for line in lines:
        parts = []
        for message in line["messages"]:
            parts += [[]] if message["role"] == "system" else []
            parts[-1].append((message["role"], message["content"]))
        found += zip(line["channels"], map(tuple, parts), strict=True)
    return Counter(found)


def wanted(records, stem):
    found = []
    for record in records:
        messages, channel = data.conversation_of(record)
        found.append((channel or stem, tuple((m["role"], m["content"]) for m in messages)))
    return Counter(found)


@pytest.mark.parametrize("packing", ["best-fit", "first-fit", "none"])
def test_data_packs_each_valid_line_once_and_reports_each_invalid_line(folder, packing, capsys):
    lines, report = prepare(folder, "law", "--seq-length", "96", "--packing", packing)
    assert conversations(lines) == wanted(GOOD, "law")
    assert all(line["messages"][0]["role"] == "system" for line in lines)
    assert (len(lines) == len(GOOD)) == (packing == "none")
    rejected = [json.loads(x) for x in (folder / "law.train.rejected.jsonl").read_text().splitlines()]
    text = (folder / "law.jsonl").read_text().splitlines()
    assert [text[x["line"] - 1] for x in rejected] == list(BAD)
    for entry, reason in zip(rejected, BAD.values(), strict=True):
        assert reason in entry["reason"] and entry["file"] == str(folder / "law.jsonl")
    assert (report["conversations"], report["rejected"]) == (len(GOOD), len(BAD))
    assert report["rejected_for"]["no messages"] == 3 and report["rejected_for"]["too long"] == 1
    assert set(report["channels"]) == {"maths", "code", "law"}
    printed = capsys.readouterr()
    assert f"{folder / 'law.jsonl'}:1: not JSON" in printed.err and "--loss-channels code,law,maths" in printed.out


@pytest.mark.parametrize("flags", ["", "--context-parallel-size 4", "--packing first-fit --open-lines 3"])
def test_packed_lines_fit_seq_length_and_report_adds_up(folder, flags):
    lines, report = prepare(folder, "long", "--seq-length", "96", *flags.split())
    tok = tokenizer()
    multiple = 8 if "context" in flags else 1
    total = 0
    for line in lines:
        used = 0
        for part in split(line["messages"]):
            length = len(tok.apply_chat_template(part, return_dict=False))
            total += length
            used += -(-length // multiple) * multiple
        assert used <= 96
    assert report["tokens"] == total and report["lines"] == len(lines)
    assert report["packing_efficiency"] == pytest.approx(total / (96 * len(lines)))
    assert report["length"]["max"] <= 96 and report["length"]["min"] > 0
    assert sum(x["tokens"] for x in report["channels"].values()) == total


def split(messages):
    parts = []
    for message in messages:
        if message["role"] == "system":
            parts.append([])
        if message["role"] != "system" or message["content"]:
            parts[-1].append(message)
    return parts


def test_too_long_truncate_drops_conversations_without_trained_tokens(folder, tmp_path):
    records = [talk("one", "yes " * 200), talk("yes " * 200, "one"), talk("one", "two")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in records))
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    lines, report = prepare(tmp_path, "x", "--seq-length", "64", "--too-long", "truncate")
    assert (len(lines), report["truncated"], report["rejected"]) == (2, 1, 1)
    assert report["rejected_for"] == {"nothing trains": 1}
    assert report["length"]["max"] == 64 and report["packing_efficiency"] <= 1.0


def test_data_rejects_only_lines_with_invalid_utf8(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    good = json.dumps(GOOD[0]).encode()
    (tmp_path / "x.jsonl").write_bytes(
        b"\xef\xbb\xbf" + good + b"\n" + good.replace(b"one", b"\xff\xfe") + b"\r\n" + good
    )
    _, report = prepare(tmp_path, "x", "--seq-length", "64")
    assert report["conversations"] == 2 and report["rejected_for"] == {"not UTF-8": 1}


@pytest.mark.parametrize("flag", ["--seq-length", "--open-lines", "--context-parallel-size"])
def test_data_flags_require_positive_numbers(folder, flag, capsys):
    with pytest.raises(SystemExit):
        data.main([str(folder / "law.jsonl"), "--tokenizer", str(folder / "tokenizer"), flag, "0"])
    assert f"{flag}: expected 1 or more, got 0" in capsys.readouterr().err


def test_data_removes_stale_rejected_file(folder, tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_text("nothing\n")
    assert prepare(tmp_path, "x", "--seq-length", "64")[0] == []
    assert (tmp_path / "x.train.rejected.jsonl").exists()
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD[0]))
    assert len(prepare(tmp_path, "x", "--seq-length", "64")[0]) == 1
    assert not (tmp_path / "x.train.rejected.jsonl").exists()


def test_data_packs_stdin_in_one_pass(folder, tmp_path, monkeypatch):
    text = "".join(json.dumps(x) + "\n" for x in GOOD).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    out = tmp_path / "out.jsonl"
    words = ["-", "--tokenizer", str(folder / "tokenizer"), "--out", str(out), "--seq-length", "96"]
    data.main([*words, "--packing", "first-fit", "--channel", "web"])
    assert conversations(map(json.loads, out.read_text().splitlines())) == wanted(GOOD, "web")


def test_preview_marks_trained_tokens(folder, capsys):
    data.main([str(folder / "law.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--preview", "4"])
    shown = capsys.readouterr().out
    assert "law.jsonl:1: not JSON" in shown and "law.jsonl:2: maths" in shown
    assert "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n[two<|im_end|>]" in shown
    encoded = data.encoder(str(folder / "tokenizer"), "chat")[1]([talk("one", "two")])[0]
    assert "\033[1;32mtwo<|im_end|>\033[0m" in data.rendering(tokenizer(), encoded, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nothing.jsonl --tokenizer .", "nothing.jsonl: expected a JSONL file, found none"),
        ("- --tokenizer .", "-: expected files, which best-fit reads twice, got a pipe"),
        ("{law} --tokenizer {tok}", "expected --seq-length and --out, or --preview N"),
        ("{law} --tokenizer /nowhere --preview 1", "--tokenizer: expected the folder of a tokenizer"),
        (
            "{law} --tokenizer {tok} --out {out} --seq-length 100 --context-parallel-size 2 "
            "--tensor-model-parallel-size 2 --sequence-parallel",
            "--seq-length: expected a multiple of 8 .* got 100; use 96",
        ),
    ],
)
def test_data_rejects_invalid_arguments(folder, words, expected):
    places = {"law": folder / "law.jsonl", "tok": folder / "tokenizer", "out": folder / "never.jsonl"}
    with pytest.raises(SystemExit, match=f"megatron_dft.data: {expected}"):
        data.main([word.format(**places) for word in words.split()])
    assert not (folder / "never.jsonl").exists()


def test_data_help_lists_every_flag():
    command = [sys.executable, "-m", "megatron_dft.data", "--help"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for action in data._parser()._actions:
        assert all(flag in usage for flag in action.option_strings)


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("form", "ranks", "layout"),
    [
        ("chat", 2, "--context-parallel-size 2"),
        ("completion", 1, ""),
        ("nemotron-nano-v2", 1, ""),
    ],
)
def test_data_report_matches_tokens_trained_by_megatron(tmp_path, form, ranks, layout):
    """One iteration over all lines, on CPU ranks: nothing is cut, every channel has its tokens."""
    pytest.importorskip("megatron.training")
    special = ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"]
    as_eos = tokenizer(CHATML, pad_token="<|im_end|>", eos_token="<|im_end|>", unk_token="<unk>")
    as_eos.add_special_tokens({"additional_special_tokens": special})
    as_eos.save_pretrained(tmp_path / "tokenizer")
    records = [
        {"messages": talk("one " * (i % 5 + 1), "yes no " * (i % 9 + 1)), "channel": ("maths", "code", "law")[i % 3]}
        for i in range(40)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    lines, report = prepare(tmp_path, "x", "--seq-length", "64", "--format", form, *layout.split())
    flags = (
        "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
        "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0 "
        "--hidden-dropout 0 --make-vocab-size-divisible-by 64 --train-iters 1 --lr 1e-3 --lr-decay-style constant "
        f"--global-batch-size {len(lines)} --micro-batch-size 1 --eval-iters 0 --eval-interval 100 --log-interval 1 "
        "--tensorboard-log-interval 1 --num-workers 0 --sft --tokenizer-type SFTTokenizer "
        f"--sft-tokenizer-prompt-format {form} --no-create-attention-mask-in-dataloader --calculate-per-token-loss "
        f"--tokenizer-model {tmp_path / 'tokenizer'} --train-data-path {tmp_path / 'x.train.jsonl'} "
        f"--data-cache-path {tmp_path / 'cache'} --loss-type nll --loss-channels maths,code {layout}"
    )
    curves = Host(tmp_path).curves(flags, ranks=ranks, script=EXAMPLE)
    assert curves["valid tokens"] == [report["tokens_that_train"]]
    for shown, name in {"maths": "maths", "code": "code", "other": "law"}.items():
        assert curves[f"channel/{shown} tokens"] == [report["channels"][name]["tokens_that_train"]]
