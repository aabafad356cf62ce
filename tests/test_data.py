"""megatron-dft data: token files, their reports, errors, and atomic replacement of the output."""

import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from chat_examples import CHATML, THINKING, talk, tokenizer
from host_runs import EXAMPLE, Host

from megatron_dft.data import __main__ as command
from megatron_dft.data.token_file import Header, Row, TokenFile, sample_of

GOOD = [
    {"messages": talk("one", "two"), "channel": "maths"},
    {"messages": talk("what is the sum of one and two", "maybe", "no", "yes", system="the system"), "channel": "code"},
    {"prompt": "one and ", "completion": "two"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"messages": [*talk("sum", "one"), {"role": "tool", "content": "two"}, {"role": "assistant", "content": "two"}]},
]
BAD = {
    '{"messages": [': "not JSON",
    "[1]": "expected an object, got list",
    json.dumps({"messages": talk("one")}): "no assistant message",
    json.dumps({"messages": talk("a", "b"), "images": ["x"]}): "unsupported field: 'images'",
    json.dumps({"messages": talk("a", "yes " * 200)}): "tokens, --seq-length 96",
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


def prepare(folder, source, *argv, out=None):
    """Run the command; returns the token file and the report."""
    out = out or folder / f"{source.name}.arrow"
    command.main([str(source), "--tokenizer", str(folder / "tokenizer"), "--out", str(out), *argv])
    return TokenFile(str(out)), json.loads(out.with_name(f"{out.name}.report.json").read_text())


def sequences(file):
    """Counter of (channel, ids, trained ids) over all conversations."""
    found = []
    for row in map(file.__getitem__, range(len(file))):
        ends = np.cumsum(row.lengths)
        for end, length, channel in zip(ends, row.lengths, row.channels, strict=True):
            ids, weights = row.input_ids[end - length : end], row.loss_weights[end - length : end]
            found.append((file.header.channels[channel], tuple(ids.tolist()), tuple(ids[weights == 1].tolist())))
    return Counter(found)


@pytest.mark.parametrize("flags", ["", "--packing none", "--workers 2", "--context-parallel-size 4"])
def test_data_stores_each_valid_record_once_and_names_each_invalid_one(folder, flags, capsys):
    argv = ["--seq-length", "96", "--max-rejected", "0.6", "--workers", "1", *flags.split()]
    file, report = prepare(folder, folder / "law.jsonl", *argv)
    found = sequences(file)
    assert sum(found.values()) == len(GOOD)
    tok = tokenizer()
    texts = {(name, tok.decode(ids), tok.decode(trained)) for name, ids, trained in found}
    maths = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    assert ("maths", maths, "two<|im_end|>\n") in texts
    assert {name for name, _, _ in texts} == {"maths", "code", "law"}
    assert any(trained == "maybe<|im_end|>\nyes<|im_end|>\n" for _, _, trained in texts)
    assert (len(file) == len(GOOD)) == ("none" in flags)
    rejected = [json.loads(x) for x in (folder / "law.jsonl.arrow.rejected.jsonl").read_text().splitlines()]
    lines = (folder / "law.jsonl").read_text().splitlines()
    assert [lines[x["line"] - 1] for x in rejected] == list(BAD)
    for entry, reason in zip(rejected, BAD.values(), strict=True):
        assert reason in entry["reason"] and entry["file"] == str(folder / "law.jsonl")
    assert (report["records"], report["rejected"]) == (len(GOOD) + len(BAD), len(BAD))
    assert report == file.header.statistics
    assert report["trained_tokens"] == sum(len(x[2]) * n for x, n in found.items())
    assert f"{folder / 'law.jsonl'}:1: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_rows_fit_seq_length_with_context_parallel_padding(folder, cp):
    file, report = prepare(folder, folder / "long.jsonl", "--seq-length", "104", "--context-parallel-size", str(cp))
    multiple = 2 * cp if cp > 1 else 1
    rows = [file[i] for i in range(len(file))]
    assert all(sum(-(-n // multiple) * multiple for n in row.lengths) <= 104 for row in rows)
    assert sum(int(row.lengths.sum()) for row in rows) == report["tokens"]
    assert report["packing_efficiency"] == pytest.approx(report["tokens"] / (104 * len(rows)))
    assert sum(x["tokens"] for x in report["channels"].values()) == report["tokens"]
    lengths = [int(row.lengths.max()) for row in rows]
    assert lengths != sorted(lengths, reverse=True)  # shuffled


def test_sample_of_shifts_pads_and_masks():
    header = SimpleNamespace(seq_length=12, multiple=4, pad_id=0)
    ids, weights = np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 1, 1, 0, 1], np.float16)
    sample = sample_of(Row(ids, weights, np.array([3, 2], np.int32), np.array([1, 0], np.int32)), header)
    assert sample.tokens.tolist() == [5, 6, 7, 0, 8, 9, 0, 0, 0, 0, 0, 0]
    assert sample.labels.tolist() == [6, 7, -100, -100, 9, *[-100] * 7]
    assert sample.loss_mask.tolist() == [1, 1, 0, 0, 1, *[0] * 7]
    assert sample.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert sample.cu_seqlens.tolist() == [0, 4, 12] and sample.channels.tolist() == [1] * 4 + [0] * 8


def test_sample_of_never_trains_on_first_token_or_across_conversations(folder):
    """A full row in which every token has weight 1."""
    header = SimpleNamespace(seq_length=6, multiple=1, pad_id=0)
    row = Row(np.arange(1, 7), np.ones(6), np.array([2, 4]), np.array([0, 0]))
    assert sample_of(row, header).labels.tolist() == [2, -100, 4, 5, 6, -100]


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_empty_prompt_report_counts_trained_tokens(folder, tmp_path, form):
    records = [{"prompt": "", "completion": "one two yes"}, {"prompt": "", "completion": "no"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    file, report = prepare(folder, tmp_path / "x.jsonl", "--seq-length", "64", "--format", form)
    samples = [sample_of(file[i], file.header) for i in range(len(file))]
    assert sum(int((sample.labels >= 0).sum()) for sample in samples) == report["trained_tokens"]
    if form == "completion":
        assert report["tokens"] - report["trained_tokens"] == 2  # the first token of each sequence


def test_data_splits_conversation_that_template_rewrites(folder, tmp_path, capsys):
    tokenizer(THINKING).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk("one", "yes", "two", "no")}))
    file, report = prepare(tmp_path, tmp_path / "x.jsonl", "--seq-length", "128")
    trained = sorted(tokenizer().decode(ids) for _, _, ids in sequences(file))
    assert trained == [f"<think>\n\n</think>\n\n{reply}<|im_end|>\n" for reply in ("no", "yes")]
    assert (report["sequences"], report["one_sequence_per_turn"]) == (2, 1)
    assert "1 conversations became one sequence per assistant turn" in capsys.readouterr().out


def test_too_long_truncate_rejects_sequences_without_trained_tokens(folder, tmp_path):
    records = [talk("one", "yes " * 200), talk("yes " * 200, "one"), talk("one", "two")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in records))
    flags = ["--seq-length", "64", "--too-long", "truncate", "--max-rejected", "0.5"]
    file, report = prepare(folder, tmp_path / "x.jsonl", *flags)
    assert (len(file), report["truncated"], report["rejected"]) == (2, 1, 1)
    assert report["rejected_for"] == {"no trained token": 1} and report["length"]["max"] == 64


def test_record_with_one_rejected_sequence_counts_as_rejected(folder, tmp_path):
    """A conversation becomes two sequences, and the second is too long. The first is kept."""
    tokenizer(THINKING).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk("one", "yes", "two", "no " * 100), "id": 3}))
    file, report = prepare(tmp_path, tmp_path / "x.jsonl", "--seq-length", "64", "--max-rejected", "1")
    assert (len(file), report["records"], report["rejected"]) == (1, 1, 1)
    assert report["rejected_for"] == {"too long": 1} and report["ignored_fields"] == {"id": 1}


def test_record_that_is_nested_too_deeply_is_rejected_alone(folder, tmp_path):
    deep = json.dumps({"messages": talk("one", "two"), "tools": [{"a": "HERE"}]})
    deep = deep.replace('"HERE"', "[" * 5000 + "]" * 5000)
    (tmp_path / "x.jsonl").write_text(f"{deep}\n{json.dumps(GOOD[0])}\n")
    file, report = prepare(folder, tmp_path / "x.jsonl", "--seq-length", "64", "--max-rejected", "0.5")
    assert (len(file), report["rejected"]) == (1, 1)


def test_data_reads_pipe(folder, tmp_path, monkeypatch):
    text = "".join(json.dumps(x) + "\n" for x in GOOD).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    out = tmp_path / "out.arrow"
    argv = ["-", "--tokenizer", str(folder / "tokenizer"), "--out", str(out), "--seq-length", "96", "--workers", "1"]
    command.main([*argv, "--channel", "web"])
    assert sum(sequences(TokenFile(str(out))).values()) == len(GOOD)
    assert TokenFile(str(out)).header.channels == ["maths", "code", "web"]


def test_chat_template_file_and_kwargs_override_tokenizer(folder, tmp_path):
    (tmp_path / "t.jinja").write_text("\ufeff" + CHATML.replace("m['content']", "(m['content'] + ending)"))
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD[0]))
    flags = ["--chat-template", str(tmp_path / "t.jinja"), "--chat-template-kwargs", '{"ending": " yes"}']
    file, _ = prepare(folder, tmp_path / "x.jsonl", "--seq-length", "64", *flags)
    ((_, ids, trained),) = sequences(file)
    assert tokenizer().decode(trained) == "two yes<|im_end|>\n" and "\ufeff" not in tokenizer().decode(ids)
    assert file.header.fingerprint["chat_template_kwargs"] == {"ending": " yes"}


# -- errors and atomic output


def assert_rejected(argv, reason):
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert str(end.value.code).startswith("megatron_dft.data: ") and reason in end.value.code, end.value.code


def test_run_without_usable_records_keeps_earlier_file(folder, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD[0]))
    out = tmp_path / "x.jsonl.arrow"
    prepare(folder, tmp_path / "x.jsonl", "--seq-length", "64", out=out)
    before = out.read_bytes()
    argv = [str(tmp_path / "x.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--seq-length", "64"]
    argv += ["--out", str(out), "--workers", "1"]
    for text in ("nothing\n", "", "\n\n", json.dumps({"messages": talk("a")})):
        (tmp_path / "x.jsonl").write_text(text)
        assert_rejected(argv, "no usable conversation")
        assert out.read_bytes() == before
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(GOOD[0])}\nnothing\n")
    assert_rejected(argv, "1 of 2 records are rejected (50.0%, --max-rejected 1.0%)")
    assert out.read_bytes() == before
    assert json.loads((tmp_path / "x.jsonl.arrow.rejected.jsonl").read_text())["line"] == 2
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]
    command.main([*argv, "--max-rejected", "0.5"])
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD[0]))
    command.main(argv)
    assert not (tmp_path / "x.jsonl.arrow.rejected.jsonl").exists()


@pytest.mark.parametrize("content", [gzip.compress(b"{}\n" * 999, mtime=0)[:-9], "{}".encode("utf-16"), b"PAR1 no"])
def test_truncated_or_unreadable_file_fails_run_and_keeps_earlier_file(folder, tmp_path, content):
    """Even with --max-rejected 1, because the number of lost records is unknown."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_text(json.dumps(GOOD[0]))
    (source / "b.jsonl").write_bytes(content)
    argv = [str(source), "--tokenizer", str(folder / "tokenizer"), "--seq-length", "64"]
    argv += ["--out", str(tmp_path / "x.arrow"), "--max-rejected", "1"]
    assert_rejected(argv, f"{source / 'b.jsonl'}:")
    assert not (tmp_path / "x.arrow").exists()
    (source / "b.jsonl").unlink()
    command.main(argv)
    before = (tmp_path / "x.arrow").read_bytes()
    (source / "b.jsonl").write_bytes(content)
    assert_rejected(argv, f"{tmp_path / 'x.arrow'} is not written; the existing file is unchanged")
    assert (tmp_path / "x.arrow").read_bytes() == before


def test_skipped_files_of_folder_are_listed(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD[0]))
    (tmp_path / "b.jsonl.bz2").write_bytes(b"BZh")
    command.main([str(tmp_path), "--tokenizer", str(folder / "tokenizer"), "--preview", "9"])
    assert f"{tmp_path / 'b.jsonl.bz2'}: skipped for its suffix" in capsys.readouterr().err


def test_output_is_written_through_symlink(folder, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD[0]))
    (tmp_path / "store").mkdir()
    (tmp_path / "x.arrow").symlink_to(tmp_path / "store" / "real.arrow")
    for _ in range(2):
        prepare(folder, tmp_path / "x.jsonl", "--seq-length", "64", out=tmp_path / "x.arrow")
        assert (tmp_path / "x.arrow").is_symlink() and len(TokenFile(str(tmp_path / "store" / "real.arrow"))) == 1


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing_behind(folder, tmp_path, kind):
    (tmp_path / "x.jsonl").write_text((folder / "long.jsonl").read_text() * 60)
    argv = [sys.executable, "-m", "megatron_dft.data", str(tmp_path / "x.jsonl"), "--tokenizer"]
    argv += [str(folder / "tokenizer"), "--seq-length", "104", "--out", str(tmp_path / "x.arrow"), "--workers", "1"]
    heeds_sigint = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    run = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_sigint)
    deadline = time.monotonic() + 60
    while not any("unfinished" in path.name for path in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(kind)
    _, printed = run.communicate(timeout=60)
    assert run.returncode == 128 + kind and "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("kind", ["same path", "other spelling", "link", "report"])
def test_data_never_writes_its_input(folder, tmp_path, kind):
    source = tmp_path / ("x.arrow.report.json" if kind == "report" else "x.jsonl")
    source.write_text(json.dumps(GOOD[0]))
    os.link(source, tmp_path / "link.jsonl")
    out = {
        "same path": source,
        "other spelling": tmp_path / ".." / tmp_path.name / "x.jsonl",
        "link": tmp_path / "link.jsonl",
        "report": tmp_path / "x.arrow",
    }[kind]
    argv = [str(source), "--tokenizer", str(folder / "tokenizer"), "--seq-length", "64", "--out", str(out)]
    assert_rejected(argv, "is an input file")
    assert source.read_text() == json.dumps(GOOD[0])


def test_shards_have_separate_side_files(folder, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD[0]))
    for shard in ("train.shard0", "train.shard1"):
        prepare(folder, tmp_path / "x.jsonl", "--seq-length", "64", out=tmp_path / shard)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("train")} == {
        f"train.shard{i}{ending}" for i in (0, 1) for ending in ("", ".report.json")
    }


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_data_killed_at_any_moment_leaves_old_or_new_file(folder, tmp_path):
    """Kill at 50 random moments. A later run removes the unfinished files."""
    (tmp_path / "x.jsonl").write_text((folder / "long.jsonl").read_text() * 10)
    argv = [sys.executable, "-m", "megatron_dft.data", str(tmp_path / "x.jsonl"), "--tokenizer"]
    argv += [str(folder / "tokenizer"), "--seq-length", "104", "--out", str(tmp_path / "x.arrow")]
    start = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True)
    whole = time.monotonic() - start
    old = (tmp_path / "x.arrow").read_bytes()
    rng, finished = random.Random(1), 0
    for _ in range(50):
        run = subprocess.Popen([*argv, "--channel", "new"], stdout=-3, stderr=-3, start_new_session=True)
        time.sleep(rng.uniform(0.3, 1.1) * whole)
        finished += run.poll() is not None
        with contextlib.suppress(ProcessLookupError):  # the run has ended
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        stored = (tmp_path / "x.arrow").read_bytes()
        if stored != old:
            assert TokenFile(str(tmp_path / "x.arrow")).header.channels == ["new"]
            assert len(TokenFile(str(tmp_path / "x.arrow"))) > 0
            (tmp_path / "x.arrow").write_bytes(old)
    assert finished < 50
    subprocess.run(argv, check=True, capture_output=True)
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("nothing.jsonl --tokenizer {tok}", "nothing.jsonl"),
        ("{law} --tokenizer {tok}", "--seq-length and --out are required, unless --preview N"),
        ("{law} --tokenizer /nowhere --preview 1", "--tokenizer /nowhere: no tokenizer found"),
        ("{law} --tokenizer {tok} --preview 1 --chat-template /nowhere", "--chat-template /nowhere: expected a Jinja"),
        ("{law} --tokenizer {tok} --preview 1 --format completion --chat-template {law}", "uses no chat template"),
        (
            '{law} --tokenizer {tok} --preview 1 --format completion --chat-template-kwargs {{"x":1}}',
            "--chat-template-kwargs: --format completion uses no chat template",
        ),
        ('{law} --tokenizer {tok} --preview 1 --chat-template-kwargs {{"enable":1}}', "has no variable 'enable'"),
        ('{law} --tokenizer {tok} --preview 1 --chat-template-kwargs {{"tools":[]}}', "'tools' is reserved"),
        (
            "{law} --tokenizer {tok} --out {out} --seq-length 100 --context-parallel-size 2 "
            "--tensor-model-parallel-size 2 --sequence-parallel",
            "--seq-length 100: expected a multiple of 8 for --context-parallel-size 2",
        ),
        ("{law} --tokenizer {tok} --out {tok} --seq-length 96", "is not a regular file"),
        ("{law} --tokenizer {tok} --out {fifo} --seq-length 96", "fifo is not a regular file"),
        ("{law} --tokenizer {tok} --preview 1 --chat-template {blank}", "blank.jinja: the chat template is empty"),
        ("{law} --tokenizer {tok} --preview-html {law}", "this is an input file"),
    ],
)
def test_data_rejects_invalid_arguments(folder, argv, reason):
    places = {"law": folder / "law.jsonl", "tok": folder / "tokenizer", "out": folder / "never.arrow"}
    places |= {"fifo": folder / "fifo", "blank": folder / "blank.jinja"}
    places["blank"].write_text(" ")
    if not places["fifo"].exists():
        os.mkfifo(places["fifo"])
    assert_rejected([argument.format(**places) for argument in argv.split()], reason)
    assert not (folder / "never.arrow").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((flag, "0") for flag in ("--seq-length", "--context-parallel-size", "--workers", "--preview")),
        *(("--max-rejected", value) for value in ("-0.1", "2", "x")),
        *(("--chat-template-kwargs", value) for value in ("x", "[1]")),
        ("--channel", "a,b"),
    ],
)
def test_data_rejects_invalid_values(folder, flag, value, capsys):
    with pytest.raises(SystemExit):
        command.main([str(folder / "law.jsonl"), "--tokenizer", str(folder / "tokenizer"), f"{flag}={value}"])
    assert flag in capsys.readouterr().err


def test_data_help_shows_defaults():
    run = subprocess.run([sys.executable, "-m", "megatron_dft.data", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--max-rejected SHARE" in run.stdout and "(default: 0.01)" in run.stdout


# -- token files


def test_token_file_is_memory_mapped_and_picklable(folder):
    file, _ = prepare(folder, folder / "long.jsonl", "--seq-length", "104")
    again = pickle.loads(pickle.dumps(file))
    assert len(pickle.dumps(file)) < 500 and len(again) == len(file)
    for i in (0, len(file) - 1):
        assert (again[i].input_ids == file[i].input_ids).all()
    with pytest.raises(IndexError):
        file[len(file)]


def test_token_file_rejects_other_files(folder, tmp_path):
    file, _ = prepare(folder, folder / "long.jsonl", "--seq-length", "104")
    data = (folder / "long.jsonl.arrow").read_bytes()
    holes, mark = bytearray(data), b"\xff" * 4
    batch = data.index(mark, data.index(mark) + 8)  # the message after the schema, and its length
    holes[batch + 4 : batch + 8] = mark
    versions = data.replace(b'"version": 1', b'"version": 9')
    for content in (b"", b"ARROW1", data[: len(data) // 2], versions, bytes(holes)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path / 'x'}: expected a token file"):
            TokenFile(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="expected a token file"):
        TokenFile(str(tmp_path / "nothing"))
    assert isinstance(file.header, Header)


def test_reading_a_sample_takes_less_than_a_millisecond(folder):
    file, _ = prepare(folder, folder / "long.jsonl", "--seq-length", "4096")
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for i in range(len(file)):
            sample_of(file[i], file.header)
        times.append((time.perf_counter() - start) / len(file))
    assert min(times) < 1e-3  # the fastest run is least disturbed


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(("form", "ranks", "layout"), [("chat", 2, "--context-parallel-size 2"), ("completion", 1, "")])
def test_data_report_matches_tokens_trained_by_megatron(tmp_path, form, ranks, layout):
    """One iteration over all rows, on CPU ranks. Megatron trains every token and channel of the report."""
    pytest.importorskip("megatron.training")
    tokenizer(CHATML, pad_token="<|im_end|>", eos_token="<|im_end|>").save_pretrained(tmp_path / "tokenizer")
    records = [
        {
            "messages": talk("one " * (i % 5), "yes <|im_end|>no " * (i % 9 + 1)),
            "channel": ("maths", "code", "law")[i % 3],
        }
        for i in range(40)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    file, report = prepare(tmp_path, tmp_path / "x.jsonl", "--seq-length", "128", "--format", form, *layout.split())
    flags = (
        "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 128 --max-position-embeddings 128 "
        "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0 "
        "--hidden-dropout 0 --make-vocab-size-divisible-by 64 --train-iters 1 --lr 1e-3 --lr-decay-style constant "
        f"--global-batch-size {len(file)} --micro-batch-size 1 --eval-iters 0 --eval-interval 100 --log-interval 1 "
        "--tensorboard-log-interval 1 --num-workers 0 --sft --tokenizer-type HuggingFaceTokenizer "
        "--no-create-attention-mask-in-dataloader --calculate-per-token-loss "
        f"--tokenizer-model {tmp_path / 'tokenizer'} --train-data-path {tmp_path / 'x.jsonl.arrow'} "
        f"--data-cache-path {tmp_path / 'cache'} --loss-type nll --dft-channels maths,code {layout}"
    )
    curves = Host(tmp_path).curves(flags, ranks=ranks, script=EXAMPLE)
    assert curves["dft/valid_tokens"] == [report["trained_tokens"]]
    for shown, name in {"maths": "maths", "code": "code", "other": "law"}.items():
        assert curves[f"dft/channel/{shown}/tokens"] == [report["channels"][name]["trained_tokens"]]
