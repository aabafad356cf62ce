"""examples/llama_weights.py: Hugging Face weights in Megatron and back, in several layouts."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.training")
pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

import llama_weights
from host_runs import EXAMPLE, ROOT, Host
from tiny_chat_model import VOCABULARY, write_tiny_llama
from word_problems import word_problems, write_chat

SCRIPT = ROOT / "examples" / "llama_weights.py"
LINES = 6


def convert(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tied", [True, False])
def test_imported_model_has_the_loss_of_transformers_in_every_layout(tied, tmp_path):
    import random

    from transformers import AutoTokenizer

    from megatron_dft.data import __main__ as data

    folder, checkpoint = tmp_path / "model", tmp_path / "checkpoint"
    model = write_tiny_llama(folder, tied=tied)
    convert("import", folder, checkpoint)
    problems = word_problems(random.Random(0), LINES)
    write_chat(problems, tmp_path / "chat.jsonl")
    row = ["--tokenizer", str(folder), "--seq-length", "512", "--packing", "none", "--workers", "1"]
    data.main([str(tmp_path / "chat.jsonl"), *row, "--out", str(tmp_path / "chat.arrow")])

    tokenizer, nll = AutoTokenizer.from_pretrained(folder), []
    for problem in problems:
        *prompt, _ = problem.messages
        begin = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"])
        ids = torch.tensor(tokenizer.apply_chat_template(problem.messages, tokenize=True)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        nll.append(F.cross_entropy(logits[begin - 1 : -1].double(), ids[begin:], reduction="none"))
    expected = torch.cat(nll).mean().item()

    flags = f"{convert('arguments', folder)} --load {checkpoint} --finetune --loss-type nll "
    flags += f"--sft --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder} --seq-length 512 "
    flags += f"--train-data-path {tmp_path / 'chat.arrow'} --no-create-attention-mask-in-dataloader --num-workers 0 "
    flags += f"--calculate-per-token-loss --micro-batch-size 1 --global-batch-size {LINES} --train-iters 1 --lr 0 "
    flags += f"--eval-iters 0 --eval-interval 1 --log-interval 1 --data-cache-path {tmp_path / 'cache'} "
    host = Host(tmp_path)
    for ranks, layout in {1: "", 3: "--tensor-model-parallel-size 3", 2: "--pipeline-model-parallel-size 2"}.items():
        curves = host.curves(flags + layout, ranks=ranks, script=EXAMPLE)
        assert curves["lm loss"][0] == pytest.approx(expected, rel=2e-5), layout


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(("tied", "vocabulary"), [(True, VOCABULARY), (False, 500)])
def test_exported_folder_equals_imported_one(tied, vocabulary, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, out = tmp_path / "model", tmp_path / "out"
    model = write_tiny_llama(folder, tied=tied, vocabulary=vocabulary)
    convert("import", folder, tmp_path / "checkpoint")
    convert("export", tmp_path / "checkpoint", folder, out)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(folder).chat_template


def test_query_groups_keep_query_key_and_value_together():
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=1)
    query, key, value = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    whole = llama_weights.by_group([query, key, value], config)
    assert whole.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    parts = llama_weights.from_groups(whole, config)
    assert all(torch.equal(a, b) for a, b in zip(parts, (query, key, value), strict=True))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True)),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ],
)
def test_settings_that_are_not_converted_are_refused_by_name(setting, value):
    from transformers import LlamaConfig

    name = "rope_type" if setting == "rope_parameters" else setting
    with pytest.raises(ValueError, match=f"config.json: expected {name} .*use Megatron-Bridge's converter"):
        llama_weights.megatron_arguments(LlamaConfig(**{setting: value}))


def test_other_model_types_are_refused():
    from transformers import Qwen2Config

    with pytest.raises(ValueError, match="expected model_type 'llama', got 'qwen2'"):
        llama_weights.megatron_arguments(Qwen2Config())
