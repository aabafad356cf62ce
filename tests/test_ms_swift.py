"""ms-swift: `megatron sft` with the plugin, on CPU ranks; the settings in the environment."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, Rendezvous, run_processes

from megatron_dft import DFTConfig
from megatron_dft.hosts import ms_swift

needs_swift = pytest.mark.skipif(importlib.util.find_spec("swift") is None, reason="needs ms-swift: make test-swift")
PLUGIN = ROOT / "megatron_dft" / "plugins" / "ms_swift.py"
ARGUMENTS = (
    "--model_type llama --template chatml --use_hf true --check_model false --split_dataset_ratio 0 --tuner_type full "
    "--load_from_cache_file false --dataset_num_proc 1 --torch_dtype float32 --fp16 false --bf16 false "
    "--ddp_backend gloo --attention_backend local --padding_free false --gradient_accumulation_fusion false "
    '--masked_softmax_fusion false --megatron_extra_kwargs {"persist_layer_norm":false} --recompute_granularity none '
    "--micro_batch_size 2 --global_batch_size 8 --train_iters 3 --max_length 256 --lr 1e-3 --lr_warmup_iters 0 "
    "--lr_decay_style constant --logging_steps 1 --save_steps 1000 --no_save_optim true --no_save_rng true "
    "--save_safetensors false --dataloader_num_workers 0 --report_to tensorboard --add_version false "
)
# Megatron's fused cross entropy casts the gradient to bf16.
EXACT = ("--cross_entropy_loss_fusion", "false")


class Runs:
    """Starts each distinct run once."""

    def __init__(self, folder):
        from tiny_chat_model import write_tiny_llama

        self.folder, self.known = folder, {}
        write_tiny_llama(folder / "model", tied=False, groups=2).save_pretrained(folder / "model")
        numbers = random.Random(0)
        plain, weighted, channels = [], [], []
        for i in range(64):
            some = [numbers.randint(1, 99) for _ in range(numbers.randint(2, 9))]
            messages = [
                {"role": "user", "content": f"Add {' and '.join(map(str, some))}"},
                {"role": "assistant", "content": f"The sum of {' '.join(map(str, some))} is {sum(some)}."},
            ]
            plain.append({"messages": messages})
            channels.append({"messages": messages, "channel": "ab"[i % 2]})
            weighted.append({"messages": [messages[0], {**messages[1], "loss_scale": (0.5, 2.0, 1.0)[i % 3]}]})
        for name, records in (("plain", plain), ("weighted", weighted), ("channels", channels)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def start(self, settings, arguments, ranks, data="plain"):
        """Exit code, output, and the rows of logging.jsonl."""
        out = self.folder / f"run{len(list(self.folder.glob('run*')))}"
        out.mkdir()
        rendezvous = Rendezvous()
        environment = {name: value for name, value in os.environ.items() if name != ms_swift.VARIABLE}
        environment |= rendezvous.environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(ROOT / "tests" / "swift_training.py"), *ARGUMENTS.split()]
        command += ["--model", str(self.folder / "model"), "--dataset", str(self.folder / f"{data}.jsonl")]
        if settings is not None:
            environment[ms_swift.VARIABLE] = settings
            command += ["--external_plugins", str(PLUGIN)]
        command += ["--output_dir", str(out / "out"), *arguments]
        outputs = [out / f"rank{rank}.txt" for rank in range(ranks)]
        code = run_processes(command, environment, outputs)
        shown = "\n".join(output.read_text(errors="replace")[-6000:] for output in outputs)
        logs = out / "out" / "logging.jsonl"
        rows = [json.loads(line) for line in logs.read_text().splitlines()] if logs.exists() else []
        return code, shown, rows

    def __call__(self, settings, *arguments, ranks=1, data="plain"):
        """The logged metrics of a run, by name."""
        key = (settings, arguments, ranks, data)
        if key not in self.known:
            code, shown, rows = self.start(settings, (*EXACT, *arguments), ranks, data)
            assert code == 0, shown
            names = {name for row in rows for name in row if isinstance(row[name], float)}
            self.known[key] = {name: [row[name] for row in rows if name in row] for name in names}
        return self.known[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("swift"))


def agree(ours, theirs, names, tolerance=1e-6):
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=tolerance), (name, ours[name], theirs[name])


LORA = ("--tuner_type", "lora", "--lora_dropout", "0")
SCALED = ("--loss_scale", "default", "--is_binary_loss_scale", "false")


@needs_swift
@pytest.mark.parametrize(
    ("arguments", "data"),
    [((), "plain"), (LORA, "plain"), (("--mtp_num_layers", "1"), "plain"), (SCALED, "weighted")],
    ids=["full", "LoRA", "MTP", "loss_scale"],
)
def test_nll_matches_ms_swift(runs, arguments, data):
    stock, ours = runs(None, *arguments, data=data), runs("--loss-type nll", *arguments, data=data)
    agree(ours, stock, {"loss", "grad_norm"} | {name for name in stock if "mtp" in name})
    if arguments == SCALED:
        assert ours["loss"][0] != pytest.approx(ours["dft/loss"][0], rel=1e-3)  # metrics are unweighted


@needs_swift
@pytest.mark.parametrize(("arguments", "data"), [((), "plain"), (SCALED, "weighted")], ids=["full", "loss_scale"])
def test_dft_has_the_gradient_of_enable_dft_loss(runs, arguments, data):
    theirs = runs(None, "--enable_dft_loss", "true", *arguments, data=data)
    ours, nll = (runs(f"--loss-type {name}", *arguments, data=data) for name in ("dft", "nll"))
    agree(ours, theirs, ["grad_norm"])
    if not arguments:
        agree({"loss": ours["dft/loss"]}, theirs, ["loss"])
    assert ours["loss"][0] == pytest.approx(nll["loss"][0], rel=1e-6)


LAYOUTS = {
    "TP with SP": ("--tensor_model_parallel_size 2 --sequence_parallel true", 2),
    "PP": ("--pipeline_model_parallel_size 2", 2),
    "CP": ("--context_parallel_size 2", 2),
    "DP": ("", 2),
    "packing": ("--packing true", 1),
    "packing, CP": ("--packing true --context_parallel_size 2", 2),
    "linear-fused": ("", 1),
    "linear-fused, gradient in forward": ("", 1),
}
CHUNKS = {
    "linear-fused": " --dft-linear-fused --dft-vocab-chunk 100",
    "linear-fused, gradient in forward": " --dft-linear-fused --dft-token-chunk 60",
}


@needs_swift
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_matches_one_rank(runs, name):
    layout, ranks = LAYOUTS[name]
    packed = ("--packing", "true") if "packing" in name else ()
    one = runs("--loss-type dft --dft-metrics full", *packed)
    many = runs(f"--loss-type dft --dft-metrics full{CHUNKS.get(name, '')}", *layout.split(), ranks=ranks)
    names = {x for x in one if x in ("loss", "grad_norm") or x.startswith("dft/")} - {"dft/valid_tokens_per_second"}
    assert len(names) > 20 and names <= set(many)
    agree(many, one, names, 2e-5)
    assert all(value > 0.0 for value in many["dft/valid_tokens_per_second"])


@needs_swift
def test_log_and_evaluation_are_means_over_tokens(runs):
    every, once = (runs("--loss-type dft", "--logging_steps", str(n), ranks=2) for n in (1, 3))
    counts, losses = every["dft/valid_tokens"], every["dft/loss"]
    rest = sum(x * n for x, n in zip(losses[1:], counts[1:], strict=True)) / sum(counts[1:])
    assert once["dft/loss"] == pytest.approx([losses[0], rest], rel=1e-6)  # ms-swift always logs the first step
    assert once["dft/valid_tokens"] == pytest.approx([counts[0], sum(counts[1:]) / 2])
    split = ("--split_dataset_ratio", "0.25", "--eval_steps", "3", "--global_batch_size", "4")
    ours, stock = runs("--loss-type nll", *split), runs(None, *split)
    agree(ours, stock, ["eval_loss"])
    assert ours["eval_dft/loss"] == pytest.approx(stock["eval_loss"], rel=1e-6)
    assert "eval_dft/valid_tokens" not in ours


@needs_swift
def test_channel_loss_of_ms_swift_in_training_and_evaluation(runs):
    """A micro-batch reports the channels that it contains."""
    arguments = ("--enable_channel_loss", "true", "--split_dataset_ratio", "0.25", "--eval_steps", "1")
    ours, stock = (runs(settings, *arguments, data="channels") for settings in ("--loss-type nll", None))
    names = {name for name in stock if "loss" in name}
    assert {"loss_a", "loss_b", "eval_loss_a", "eval_loss_b"} <= names
    agree(ours, stock, names)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [("infer.py", 0, ""), ("export.py", 0, ""), ("sft.py", 1, "expected megatron sft or megatron pt, got swift sft")],
)
def test_plugin_in_other_commands(tmp_path, command, code, message):
    """Checkpoints of ms-swift name the plugin, and other commands import it."""
    script = tmp_path / "cli" / command
    script.parent.mkdir()
    script.write_text(f"exec(open({str(PLUGIN)!r}).read())")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == code and message in done.stderr


@needs_swift
@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ("", (), "MEGATRON_DFT='': no objective; export MEGATRON_DFT=\"--loss-type dft\""),
        ("--loss-type dft --dft-channels a", (), "channels (--dft-channels): the data of ms-swift contain no"),
        (
            "--loss-type dft",
            ("--external_plugins", str(PLUGIN), "{folder}/own.py"),
            "two plugins of megatron_dft; keep",
        ),
        ("--loss-type dft", ("--enable_dft_loss", "true"), "--enable_dft_loss multiplies the loss of dft by the"),
    ],
)
def test_incompatible_settings_end_the_run(runs, settings, arguments, message):
    register = "from megatron_dft.hosts import ms_swift\nms_swift.register(ms_swift.DFTConfig('nll'))\n"
    (runs.folder / "own.py").write_text(register)
    code, shown, rows = runs.start(settings, [x.format(folder=runs.folder) for x in arguments], 1)
    assert code == 1 and message in shown and not any("loss" in row for row in rows)


# Settings


def test_environment_reads_flags_and_yaml(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGATRON_DFT", "--loss-type tsallis:q=0.5 --dft-metrics full")
    assert ms_swift.environment() == DFTConfig("tsallis:q=0.5", metrics="full")
    pytest.importorskip("yaml")
    path = tmp_path / "x.yaml"
    path.write_text("dft: {loss_type: dft, linear_fused: true}\n")
    monkeypatch.setenv("MEGATRON_DFT", str(path))
    assert ms_swift.environment() == DFTConfig("dft", linear_fused=True)
    for text in ("loss_type: dft\n", "- dft\n", "dft: dft\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected a block `dft:` of KEY: VALUE, got"):
            ms_swift.environment()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no objective; export MEGATRON_DFT"),
        ("--dft-metrics full", "requires --loss-type"),
        ("--loss-type dtf", "did you mean 'dft'"),
        ("--loss-type dft --dft-metric full", "unrecognized arguments: --dft-metric full"),
        ("loss_type=dft", "unrecognized arguments: loss_type=dft"),
        ("missing.yaml", "MEGATRON_DFT=missing.yaml: no such file"),
    ],
)
def test_invalid_environment_is_rejected(monkeypatch, text, message):
    monkeypatch.setenv("MEGATRON_DFT", text)
    with pytest.raises(ValueError, match=message):
        ms_swift.environment()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DFTConfig("dft", channels="a"), "channels"),
        (DFTConfig("dft", weights=True), "weights"),
        (DFTConfig("dft", reduction="sample"), "reduction=sample"),
        (DFTConfig("psft"), "loss_type=psft"),
    ],
)
def test_settings_that_need_labels_of_a_token_file_are_rejected(config, name):
    with pytest.raises(ValueError, match=rf"{name}.*: the data of ms-swift contain no channels, weights"):
        ms_swift.register(config)


def test_plugin_command_prints_the_plugin(capsys):
    from megatron_dft.plugins import __main__ as command

    command.main([])
    assert Path(capsys.readouterr().out.strip()) == PLUGIN
