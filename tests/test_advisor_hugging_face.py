"""python -m megatron_dft.advisor --model: statistics of a Hugging Face model, compared with its logits in fp64."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import numpy as np
import transformers
from chat_examples import talk, tokenizer

from megatron_dft.advisor import __main__ as advise
from megatron_dft.advisor import hugging_face
from megatron_dft.advisor.samples import TokenSequence
from megatron_dft.data import __main__ as data

RECORDS = [
    {"messages": talk("what is one and two", "maybe"), "channel": "maths"},
    {"messages": talk("sum", "yes yes", "no", "the sum of one and two is what", system="the system")},
    {"messages": talk("one", "two"), "channel": "maths"},
    {"messages": talk("the user", "no")},
]
PROGRAM = "megatron_dft.advisor: "


def save_model(folder, kind="Llama", **changes):
    """A small model, trained for some steps so that it predicts some tokens, and a tokenizer, in a folder."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "head_dim": 8}
    if kind == "GPT2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    settings = {"vocab_size": 420, "max_position_embeddings": 128, **size, **changes}
    config = getattr(transformers, f"{kind}Config")(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = trained_tokens(RECORDS[0]["messages"])[0][None] % config.vocab_size
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of the model."""
    return save_model(tmp_path_factory.mktemp("model"))


def write_lines(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def run(model, source, out, *argv):
    """Run the command in this process; returns advice.json."""
    advise.main(["--model", str(model), "--data", str(source), "--device", "cpu", "--advise-out", str(out), *argv])
    return json.loads((out / "advice.json").read_text())


def trained_tokens(messages):
    """Token ids, and whether each is in the loss, from the character offsets of assistant turns in ChatML."""
    text, spans = "", []
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        begin, text = len(text), text + f"{message['content']}<|im_end|>\n"
        if message["role"] == "assistant":
            spans.append((begin, len(text)))
    encoded = tokenizer()(text, return_offsets_mapping=True, add_special_tokens=False)
    inside = [any(begin <= a < end for begin, end in spans) for a, _ in encoded["offset_mapping"]]
    return torch.tensor(encoded["input_ids"]), torch.tensor(inside)


def expected(folder, records, name):
    """Statistics from fp64 logits, of one unpadded conversation at a time. `name`: the channel without one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = []
    for record in records:
        ids, inside = trained_tokens(record["messages"])
        q = model(ids[None]).logits[0, :-1].detach().softmax(-1)
        p = q.gather(1, ids[1:, None])[:, 0]
        onehot = torch.nn.functional.one_hot(ids[1:], q.shape[1])
        columns = torch.stack([p, -p.log(), (q.argmax(-1) == ids[1:]).double(), (q - onehot).norm(dim=1)])
        rows.append((record.get("channel", name), columns[:, inside[1:]]))
    return {
        channel: torch.cat([columns for of, columns in rows if channel in ("all", of)], 1)
        for channel in ("all", *{of for of, _ in rows})
    }


def check(found, columns):
    p, nll, top1, _ = columns
    assert found["tokens"] == len(p)
    assert found["mean_p"] == pytest.approx(p.mean().item(), rel=1e-4)
    assert found["nll"] == pytest.approx(nll.mean().item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx(top1.mean().item())
    assert found["histogram"][0] == pytest.approx((p < 0.1).double().mean().item())


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma2"])
def test_statistics_match_fp64_logits(kind, tmp_path, capsys):
    """Padding, learned positions (GPT2), capped logits and local attention (Gemma2); rejected records."""
    kwargs = {"final_logit_softcapping": 8.0, "sliding_window": 8} if kind == "Gemma2" else {}
    folder = save_model(tmp_path / kind, kind, **kwargs)
    bad = ['{"messages": [\n', {"messages": talk("one")}, {"messages": talk("a", "yes " * 90)}]
    source = write_lines(tmp_path / "law.jsonl", [*bad, *RECORDS])
    result = run(folder, source, tmp_path / "out", "--seq-length", "80")
    columns = expected(folder, RECORDS, "law")
    assert 0.05 < columns["all"][0].mean() < 0.9 and 0.1 < columns["all"][2].mean() < 0.9
    check(result, columns["all"])
    assert set(result["channels"]) == {"law", "maths"}
    for name, found in result["channels"].items():
        check(found, columns[name])
    p, nll, _, error = columns["all"]
    dft = result["objectives"]["dft"]
    assert dft["loss"] == pytest.approx((p * nll).mean().item(), rel=1e-4)
    assert dft["gradient"] == pytest.approx(((p * error).sum() / error.sum()).item(), rel=1e-4)
    assert result["data"]["rejected_for"] == {"not JSON": 1, "no assistant message": 1, "too long": 1}
    assert (result["data"]["rejected"], result["data"]["used"], result["data"]["total"]) == (3, 7, 7)
    shown, stderr = capsys.readouterr()
    assert "7 of 7 records (100.0%), drawn at random" in shown and "rejected: too long: 1" in shown
    assert f"{source}:1: not JSON" in stderr and (tmp_path / "out" / "advice.txt").read_text() in shown
    assert (tmp_path / "out" / "advice.png").stat().st_size > 20_000


def test_token_file_gives_same_result_as_chat_data(model, tmp_path):
    source, out = write_lines(tmp_path / "law.jsonl", RECORDS), tmp_path / "law.arrow"
    argv = [str(source), "--tokenizer", str(model), "--seq-length", "80", "--out", str(out), "--workers", "1"]
    data.main(argv)
    of_chat, of_file = run(model, source, tmp_path / "chat"), run(model, out, tmp_path / "file")
    assert of_file["channels"].keys() == of_chat["channels"].keys()
    for name in ("tokens", "mean_p", "nll", "histogram"):
        assert of_file[name] == pytest.approx(of_chat[name], rel=1e-5)
    assert of_file["data"]["tokens"] == of_chat["data"]["tokens"] and of_file["data"]["unit"] == "rows"


def test_completion_format_and_other_tokenizer_folder(model, tmp_path):
    shutil.copytree(model, weights := tmp_path / "weights")
    (weights / "tokenizer.json").unlink()
    source = write_lines(tmp_path / "law.jsonl", [{"prompt": "one and ", "completion": "two"}])
    result = run(weights, source, tmp_path / "out", "--tokenizer", str(model), "--format", "completion")
    assert result["tokens"] == 2  # " two" and "</s>"


def test_advise_tokens_limits_random_sample_of_whole_file(model, tmp_path):
    lines = [{"messages": talk("one", "two"), "channel": f"{i // 100}"} for i in range(1000)]
    source = write_lines(tmp_path / "law.jsonl", lines)
    length = len(trained_tokens(lines[0]["messages"])[0])
    result = run(model, source, tmp_path / "out", "--advise-tokens", str(50 * length - 1))
    assert result["data"]["used"] == 50 and result["data"]["total"] == 1000 and result["data"]["share"] == 0.05
    assert result["data"]["tokens"] == 50 * length
    assert len(result["channels"]) >= 8  # of ten tenths of the file
    assert run(model, source, tmp_path / "again", "--advise-tokens", str(50 * length - 1)) == result


def test_token_file_rows_are_drawn_at_random(model, tmp_path):
    lines = [{"messages": talk("one", "two"), "channel": f"{i // 10}"} for i in range(100)]
    source, out = write_lines(tmp_path / "law.jsonl", lines), tmp_path / "law.arrow"
    length = len(trained_tokens(lines[0]["messages"])[0])
    argv = ["--seq-length", "80", "--out", str(out), "--packing", "none", "--workers", "1"]
    data.main([str(source), "--tokenizer", str(model), *argv])
    result = run(model, out, tmp_path / "out", "--advise-tokens", str(20 * length))
    assert (result["data"]["used"], result["data"]["total"]) == (20, 100)
    assert len(result["channels"]) >= 6


def make_sequences():
    generator = np.random.default_rng(0)
    for length in (5, 9, 7, 30):
        trained = generator.random(length) < 0.5
        trained[:2] = False, True
        yield TokenSequence(generator.integers(0, 400, length), trained, "all")


def test_output_layer_receives_trained_tokens_only(model, monkeypatch):
    """Without access to the output layer, the logits of all tokens give the same statistics."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    monkeypatch.setattr(hugging_face, "BATCH_TOKENS", {"cpu": 20})
    sequences = list(make_sequences())
    rows = []
    loaded.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    objectives = advise.parse_objective("nll"), advise.parse_objective("deft")
    totals = hugging_face.statistics_of(loaded, sequences, objectives).totals(loaded.device)
    assert rows == [sum(sequences[i].trained.sum() for i in batch) for batch in ([3], [1, 2], [0])]
    monkeypatch.setattr(loaded, "get_output_embeddings", lambda: None)
    again = hugging_face.statistics_of(loaded, sequences, objectives).totals(loaded.device)
    torch.testing.assert_close(again, totals, rtol=1e-5, atol=1e-6)
    assert rows[3:] == [30, 2 * 9, 5]


# -- arguments and errors


def fails(argv, expected):
    with pytest.raises(SystemExit) as caught:
        advise.main([str(x) for x in argv])
    message = caught.value.code
    assert isinstance(message, str) and message.startswith(PROGRAM) and "\n" not in message, message
    assert expected in message, message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model", "nowhere/model"], "--model nowhere/model: no such folder"),
        (["--model", "."], "--model .: the folder has no config.json"),
        (["--tokenizer", "org/name"], "--tokenizer org/name: no such folder"),
        (["--tokenizer", "."], "--tokenizer .: no tokenizer found"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--data", "bad.jsonl"], "--data: no usable conversation in 1 of 1 records: not JSON (1)"),
        (["--data", "cut.jsonl.gz"], "cut.jsonl.gz:1: truncated gzip data"),
        (["--seq-length", "4"], "no usable conversation in 4 of 4 records: too long (4)"),
        (
            ["--data", "long.jsonl", "--seq-length", "900"],
            "has 128 positions (max_position_embeddings)",
        ),
        (["--data", "law.arrow", "law.jsonl"], "law.jsonl: expected a token file like law.arrow"),
        (["--data", "law.arrow", "--seq-length", "9"], "--seq-length has no effect on law.arrow"),
        (["--data", "law.arrow", "--tokenizer", "other"], "law.arrow: prepared with another tokenizer"),
        (["--model", "small"], "has a vocabulary of 100; use the tokenizer of the model"),
        (["--model", "small", "--data", "law.arrow"], "has a vocabulary of 100; use the tokenizer of the model"),
        (
            ["--model", "headless"],
            "the weights lack 1 tensors of LlamaForCausalLM, e.g. lm_head.weight",
        ),
        (["--model", "plain"], "plain: the tokenizer has no chat template; pass --chat-template FILE"),
        (["--model", "broken"], "--model broken: expected a causal language model ("),
        (["--chat-template", "no.jinja"], "--chat-template no.jinja: expected a Jinja file"),
        (["--advise-objectives", "dtf"], "unknown objective 'dtf'"),
        (["--advise-out", "law.jsonl"], "law.jsonl"),
    ],
)
def test_error_names_cause_and_remedy_in_one_line(argv, expected, folder, monkeypatch):
    monkeypatch.chdir(folder)
    defaults = {"--model": "good", "--data": "law.jsonl", "--device": "cpu"}
    fails([*argv, *(x for flag, value in defaults.items() if flag not in argv for x in (flag, value))], expected)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Models and data with one defect each."""
    path = tmp_path_factory.mktemp("defects")
    shutil.copytree(model, path / "good")
    save_model(path / "small", vocab_size=100)
    for name in ("headless", "plain", "broken", "other"):
        shutil.copytree(model, path / name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded.model.save_pretrained(path / "headless")
    plain = tokenizer()
    plain.chat_template = None
    (path / "plain" / "chat_template.jinja").unlink()
    plain.save_pretrained(path / "plain")
    (path / "broken" / "config.json").write_text('{"model_type": "unheard-of"}')
    other = tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(path / "other")
    write_lines(path / "law.jsonl", RECORDS)
    write_lines(path / "bad.jsonl", ['{"messages": [\n'])
    write_lines(path / "long.jsonl", [{"messages": talk("one", "yes " * 140)}])
    (path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\0")
    flags = ["--seq-length", "80", "--workers", "1", "--out", str(path / "law.arrow")]
    data.main([str(path / "law.jsonl"), "--tokenizer", str(model), *flags])
    return path


def test_missing_folder_never_reaches_network(model, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: calls.append(args) or [])
    source = write_lines(tmp_path / "law.jsonl", RECORDS)
    fails(["--model", "org/name", "--data", source], "no such folder")
    fails(["--model", model, "--tokenizer", "org/name", "--data", source], "no such folder")
    run(model, source, tmp_path / "out")
    assert not calls


def test_missing_packages_are_named(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expected = "--model: missing packages: transformers, tokenizers, jinja2, numpy, pyarrow, tqdm, matplotlib"
    fails(["--model", model, "--data", "x.jsonl"], expected)


def test_several_ranks_and_missing_gpu_are_errors(model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fails(["--model", model, "--data", "x", "--device", "cuda"], "--device cuda: PyTorch finds no GPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(["--model", model, "--data", "x"], "--model evaluates on one device")


def test_nan_logits_are_an_error(model, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded.lm_head.weight.data[3] = torch.nan
    loaded.save_pretrained(tmp_path / "nan")
    tokenizer().save_pretrained(tmp_path / "nan")
    source = write_lines(tmp_path / "law.jsonl", RECORDS)
    fails(["--model", tmp_path / "nan", "--data", source, "--device", "cpu"], "the NLL is nan")


@pytest.mark.parametrize("first", [["--device", "cpu"], ["--advise-batches", "3"], ["--advise-out", "x"], []])
def test_script_before_other_arguments_selects_megatron(first):
    fails([*first, "nowhere.py", "--model", "x", "--data", "y"], "no script at 'nowhere.py'")


def test_model_without_data_is_usage_error(capsys):
    with pytest.raises(SystemExit):
        advise.main(["--model", "x"])
    assert "the following arguments are required: --data" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--model", "x", "--help"]])
def test_help_documents_both_forms_with_defaults(argv, capsys):
    advise.main(argv)
    shown = capsys.readouterr().out
    for text in ("--advise-batches N", "--advise-tokens N", "--data FILE", "(default: 8192)", "SCRIPT ARGUMENTS"):
        assert text in shown


def test_command_runs_without_megatron(model, tmp_path):
    source = write_lines(tmp_path / "law.jsonl", RECORDS)
    code = "import sys; sys.modules['megatron'] = None; from megatron_dft.cli import main; main()"
    argv = ["advise", "--data", source, "--model", model, "--advise-out", tmp_path / "out", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--loss-type" in done.stdout
