"""Unmodified scripts through the launcher and Megatron's own pretrain(), on CPU ranks."""

import contextlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat_runs import CHAT_MOCK, CHAT_STEPS, split_at_system
from host_runs import EXAMPLE, HAS_HYBRID, agree

from megatron_dft import DFTConfig, launch
from megatron_dft.hosts import compat, megatron_lm


def megatron_has_pretrain():
    return importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.training")


@pytest.mark.slow
@pytest.mark.host
def test_launcher_without_loss_type_is_bitwise_equal_to_script(chat):
    script_alone = chat.curves(CHAT_MOCK, alone=True)
    assert chat.curves(CHAT_MOCK) == script_alone
    assert not any(tag.startswith("dft") for tag in script_alone)


@pytest.mark.slow
@pytest.mark.host
def test_nll_matches_megatron_run(chat, checkpoint):
    stock = chat.curves(f"{chat.sft} {checkpoint}")
    ours = chat.curves(f"{chat.sft} {checkpoint} --loss-type nll")
    # With --sft Megatron validates with a mean of means of micro-batches and ranks.
    stock = {tag: x for tag, x in stock.items() if "validation" not in tag}
    agree({tag: ours[tag] for tag in stock}, stock, 1e-5)
    assert {tag for tag in ours if tag.startswith("dft")} > {"dft/loss", "dft/prob", "dft/gate", "dft/accuracy"}


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2"),
        (2, "--context-parallel-size 2"),
        (2, "--use-distributed-optimizer"),
    ],
)
def test_parallel_layout_matches_one_rank(chat, checkpoint, ranks, layout):
    one = chat.curves(f"{chat.sft} {checkpoint} --loss-type dft")
    many = chat.curves(f"{chat.sft} {checkpoint} --loss-type dft {layout}", ranks=ranks)
    agree(many, one, 2e-5)


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--no-dft-compact-masked-tokens"),
        (2, "--dft-linear-fused --dft-vocab-chunk 50 --tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--dft-linear-fused --dft-vocab-chunk 50 --context-parallel-size 2"),
        (1, "--dft-linear-fused --dft-token-chunk 30"),
        (2, "--dft-linear-fused --dft-token-chunk 30 --tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--dft-linear-fused --dft-token-chunk 30 --context-parallel-size 2"),
    ],
)
def test_compaction_and_linear_fused_leave_curves_unchanged(chat, checkpoint, ranks, flags):
    one = chat.curves(f"{chat.sft} {checkpoint} --loss-type dft")
    other = chat.curves(f"{chat.sft} {checkpoint} --loss-type dft {flags}", ranks=ranks)
    agree(other, one, 2e-5 if ranks > 1 else 2e-6)


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.skipif(not HAS_HYBRID, reason="pretrain() builds a HybridModel from 0.19 on")
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--context-parallel-size 2 --dft-linear-fused --dft-vocab-chunk 50"),
        (2, "--pipeline-model-parallel-size 2 --no-dft-compact-masked-tokens"),
    ],
)
def test_hybrid_model_on_packed_sequences_matches_one_rank(chat, ranks, layout):
    script = chat.folder / "pretrain_hybrid.py"
    script.write_text(EXAMPLE.read_text().replace("gpt_config_from_args", "hybrid_config_from_args"))
    pattern = "--hybrid-layer-pattern *-*- --spec hybrid_stack stack"
    common = chat.sft.replace("--num-layers 2", f"{pattern} --untie-embeddings-and-output-weights") + "--loss-type dft "
    path = chat.folder / "hybrid"
    chat.curves(f"{common} --save {path} --save-interval {CHAT_STEPS}", script=script)
    common += f"--load {path} --finetune "
    agree(chat.curves(common + layout, ranks=ranks, script=script), chat.curves(common, script=script), 2e-5)


FULL_METRICS = "--loss-type dft --dft-metrics full --dft-channels addition,subtraction"


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2"),
        (2, "--context-parallel-size 2"),
        (2, "--dft-linear-fused --dft-vocab-chunk 50"),
        (1, "--no-dft-compact-masked-tokens --micro-batch-size 3"),
    ],
)
def test_histograms_and_channels_match_one_rank(chat, checkpoint, ranks, layout):
    one = chat.curves(f"{chat.sft} {checkpoint} {FULL_METRICS}")
    many = chat.curves(f"{chat.sft} {checkpoint} {FULL_METRICS} {layout}", ranks=ranks)
    agree(many, one, 2e-5)


@pytest.mark.slow
@pytest.mark.host
def test_channels_match_conversations_of_packed_lines(chat, checkpoint):
    """Batches of two packed lines, one per rank."""
    flags = f"{chat.sft} {checkpoint} {FULL_METRICS} --global-batch-size 2 --train-iters 6"
    curves = chat.curves(flags, ranks=2)
    assert sum("/0." in tag for tag in curves) == 2 * 2 * 10  # each over iterations and over samples
    channels = ("other", "addition", "subtraction")
    counts = {name: curves[f"dft/channel/{name}/tokens"] for name in channels}
    assert [sum(x) for x in zip(*counts.values(), strict=True)] == curves["dft/valid_tokens"]
    for step, valid in enumerate(curves["dft/valid_tokens"]):
        for what, mean in {"nll": "lm loss", "loss": "dft/loss", "prob": "dft/prob"}.items():
            weighted = sum(curves[f"dft/channel/{name}/{what}"][step] * counts[name][step] for name in channels)
            assert weighted / valid == pytest.approx(curves[mean][step], rel=1e-5)
    assert sum(curves["dft/channel/other/tokens"]) == chat.tokens_of("shopping", 12)
    assert sum(curves["dft/channel/addition/tokens"]) == chat.tokens_of("addition", 12)


@pytest.mark.slow
@pytest.mark.host
def test_sft_packing_matches_unpacked_training(chat, checkpoint):
    """One batch of packed lines of two conversations, and one of the same conversations in separate lines."""
    lines = (chat.folder / "chat" / "noisy_train.jsonl").read_text().splitlines()
    packed = [json.loads(line)["messages"] for line in lines]
    packed = [line for line in packed if sum(message["role"] == "system" for message in line) > 1][:4]
    conversations = [part for line in packed for part in split_at_system(line)]
    gradient = {}
    for name, data in {"packed": packed, "unpacked": conversations}.items():
        path = chat.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"messages": line}) + "\n" for line in data))
        flags = chat.sft.replace(str(chat.folder / "chat" / "noisy_train.jsonl"), str(path))
        curves = chat.curves(f"{flags} {checkpoint} --loss-type dft --global-batch-size {len(data)} --train-iters 1")
        gradient[name] = [curves[tag] for tag in ("lm loss", "dft/loss", "dft/prob", "dft/valid_tokens", "grad-norm")]
    assert len(conversations) > len(packed)
    for ours, theirs in zip(gradient["packed"], gradient["unpacked"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.host
def test_dft_reduces_gradient_norm_and_reports_nll(chat, checkpoint):
    stock = chat.curves(f"{chat.sft} {checkpoint}")
    dft = chat.curves(f"{chat.sft} {checkpoint} --loss-type dft")
    assert dft["lm loss"][0] == pytest.approx(stock["lm loss"][0], rel=1e-6)
    assert dft["dft/loss"][0] < 0.5 * dft["lm loss"][0]
    assert dft["grad-norm"][0] < 0.5 * stock["grad-norm"][0]
    assert dft["dft/gate"] == dft["dft/prob"]


@pytest.mark.slow
@pytest.mark.host
def test_entropy_objective_reports_entropy(chat, checkpoint):
    two = chat.curves(f"{chat.sft} {checkpoint} --loss-type entropy --bf16 --tensor-model-parallel-size 2", ranks=2)
    assert two["dft/entropy"][0] > 0.0
    assert "dft/entropy validation" in two


@pytest.mark.slow
@pytest.mark.host
def test_incompatible_settings_are_rejected_before_model_is_built(chat):
    code, output = chat.start(f"{CHAT_MOCK} --loss-type dft --context-parallel-size 2", ranks=2)
    assert code != 0
    assert "with --context-parallel-size 2 requires --calculate-per-token-loss" in output
    assert "number of parameters" not in output


@pytest.mark.slow
@pytest.mark.host
def test_log_describes_replaced_loss_once(chat):
    run = chat.begin(f"{CHAT_MOCK} --loss-type dft --tensor-model-parallel-size 2", ranks=2)
    assert run.wait() == 0
    line = "> megatron_dft: objective dft replaces the cross entropy; `lm loss` stays the NLL; backend torch"
    assert run.output().count(line) == 1
    assert run.output().count("--calculate-per-token-loss makes it the mean over all tokens") == 1
    assert run.output().count("> megatron_dft: masked tokens skip the output layer\n") == 1


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--no-dft-compact-masked-tokens", "masked tokens pass through the output layer, as requested\n"),
        ("--dft-linear-fused", "masked tokens skip the output layer; linear-fused, 8192 columns per chunk\n"),
        (
            "--calculate-per-token-loss --dft-linear-fused --dft-token-chunk 30",
            "masked tokens skip the output layer; linear-fused, 30 tokens per chunk, gradient in forward\n",
        ),
    ],
)
def test_log_describes_compaction_and_linear_fused(chat, flags, line):
    _, output = chat.start(f"{CHAT_MOCK} --loss-type dft {flags} --pipeline-model-parallel-size 2", ranks=2)
    assert output.count("> megatron_dft: " + line) == 1


@pytest.mark.slow
@pytest.mark.host
def test_torchrun_matches_forked_ranks(chat, checkpoint):
    flags = f"{chat.sft} {checkpoint} --loss-type dft --tensor-model-parallel-size 2"
    assert chat.torchrun(flags, 2, EXAMPLE)[0] == chat.curves(flags, ranks=2)


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss-type dtf", "unknown objective 'dtf'"),
        ("--loss-type tsallis:q=-1", "expected 0 <= q <= 3e38"),
        ("--loss-type dft --transformer-impl transformer_engine", "--transformer-impl"),
    ],
)
def test_launcher_rejects_invalid_flags_without_traceback(flags, message, tmp_path):
    command = [sys.executable, "-m", "megatron_dft.launch", str(EXAMPLE), *flags.split(), "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_yaml_cfg_configures_objective_in_place_of_flags(tmp_path):
    pytest.importorskip("yaml")  # Megatron needs it for --yaml-cfg
    path = tmp_path / "run.yaml"
    path.write_text("language_model:\n  num_layers: 2\ndft:\n  loss_type: tsallis:q=0.5\n  mtp: same\n")
    arguments = ["--yaml-cfg", str(path)]
    assert launch.config_of(arguments) == (DFTConfig(loss_type="tsallis:q=0.5", mtp="same"), arguments)
    with pytest.raises(ValueError, match="remove one of the two"):
        launch.config_of([*arguments, "--loss-type", "dft"])
    path.write_text("dft:\n  los_type: dft\n")
    with pytest.raises(ValueError, match=r"got 'los_type'; did you mean 'loss_type'"):
        launch.config_of(arguments)
    for text, message in {
        "dft: [1]\n": "expected KEY: VALUE in the block",
        "dft:\n": "expected KEY: VALUE in the block `dft:`, got None",
        "dft: {}\n": "expected KEY: VALUE in the block",
        "dtf:\n  loss_type: dft\n": "loss_type is set at 'dtf'; move it to a block `dft:`",
        "loss_type: dft\n": "loss_type is set at 'loss_type'",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            launch.config_of(arguments)
    path.write_text("language_model:\n  num_layers: 2\n")
    assert launch.config_of([*arguments, "--loss-type", "dft"])[0] == DFTConfig(loss_type="dft")


def test_launcher_removes_ce_flag_and_rejects_flags_without_loss_type():
    assert launch.config_of(["--lr", "1", "--loss-type", "ce"]) == (DFTConfig(), ["--lr", "1"])
    with pytest.raises(ValueError, match=r"--dft-mtp \(mtp\) requires --loss-type"):
        launch.config_of(["--dft-mtp", "same"])
    for argv in (["--loss-typ", "dft"], ["--loss_type=dft"], ["--", "--loss-type", "dft"]):
        with pytest.raises(ValueError, match=r"unknown flag; write --loss-type OBJECTIVE, before any"):
            launch.config_of(argv)
    assert launch.device_of(["s.py", "--device", "cuda:0"]) == (False, ["s.py", "--device", "cuda:0"])


def test_check_pretrain_rejects_unknown_signature():
    def pretrain(train_valid_test_dataset_provider, model_provider, model_type, forward_step):
        raise AssertionError

    with pytest.raises(ValueError, match=r"expected one that takes a forward_step_func.* got pretrain\(train_valid"):
        compat.check_pretrain(inspect.signature(pretrain))


def test_pretrain_without_model_provider_is_rejected():
    call = inspect.signature(lambda cfg_container, forward_step_func: None).bind(object(), None)
    with pytest.raises(ValueError, match=r"expected a model_provider or .* got neither; use .* 0.17 to 0.19"):
        megatron_lm._hook_model(call, lambda chunks: chunks, contextlib.ExitStack())


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")
@pytest.mark.skipif(megatron_has_pretrain(), reason="for megatron-core without megatron.training, as 0.16.1")
def test_launcher_rejects_megatron_without_pretrain():
    command = [sys.executable, "-m", "megatron_dft.launch", str(EXAMPLE), "--loss-type", "dft", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "no Megatron with pretrain() is installed" in run.stderr


def test_launcher_prints_usage_and_rejects_missing_script():
    launch = [sys.executable, "-m", "megatron_dft.launch"]
    usage = subprocess.run([*launch, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--loss-type dft" in usage and "--dft-linear-fused" in usage
    for argv, message in (
        ([], "no script; pass the path"),
        (["no_such.py"], "no script at 'no_such.py'"),
        (
            ["--device=gpu", "x.py"],
            "--device: expected one of cuda, cpu, auto, got 'gpu'",
        ),
    ):
        wrong = subprocess.run([*launch, *argv], capture_output=True, text=True, check=False)
        assert wrong.returncode == 1 and message in wrong.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--dft-metric full", "--dft-metric: unknown flag; did you mean '--dft-metrics'"),
        ("--no-dft-inplace", "--no-dft-inplace: unknown flag; did you mean '--no-dft-inplace-backward'"),
        ("--dft-metrics ful", "--dft-metrics: invalid choice: 'ful'"),
        ("--dft-vocab-chunk x", "--dft-vocab-chunk: invalid int value: 'x'"),
        ("--loss-type", "--loss-type: expected one argument"),
    ],
)
def test_launcher_rejects_invalid_flag_in_one_line(argv, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        launch.config_of(argv.split())


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM does not name a Megatron-LM checkout")
def test_pretrain_gpt_of_checkout_matches_example_script(chat, checkpoint):
    checkout = Path(os.environ["MEGATRON_LM"])
    flags = f"{chat.sft} {checkpoint} --loss-type dft --tensor-model-parallel-size 2"
    theirs, output = chat.torchrun(flags, 2, checkout / "pretrain_gpt.py")
    ours = chat.curves(flags, ranks=2)
    assert str(checkout / "megatron" / "core") in output  # in its warnings: the checkout is imported, not the wheel
    assert {"lm loss", "dft/loss", "dft/prob", "grad-norm"} <= set(theirs)
    agree(theirs, {tag: ours[tag] for tag in theirs}, 1e-6)  # 0.19.0 does not validate after the last step


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM does not name a Megatron-LM checkout")
def test_pretrain_hybrid_of_checkout_trains_with_objective(chat):
    """A HybridModel of attention and MLP layers. Mamba layers need CUDA kernels."""
    script = Path(os.environ["MEGATRON_LM"]) / "pretrain_hybrid.py"
    flags = CHAT_MOCK.replace("--num-layers 2", "--hybrid-layer-pattern *-*- --spec hybrid_stack stack")
    runs = {loss: chat.torchrun(f"{flags} --loss-type {loss}", 1, script)[0] for loss in ("ce", "nll", "dft")}
    agree({tag: runs["nll"][tag] for tag in runs["ce"]}, runs["ce"])
    assert runs["dft"]["lm loss"][0] == pytest.approx(runs["ce"]["lm loss"][0], rel=1e-6)
    split = chat.torchrun(f"{flags} --loss-type dft --tensor-model-parallel-size 2", 2, script)[0]
    agree(split, runs["dft"], 2e-5)
