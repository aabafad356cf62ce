"""finetune() of Megatron-Bridge on CPU ranks, through `python -m megatron_dft.launch_bridge`."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.bridge", reason="needs Megatron-Bridge and Transformer Engine: make test-bridge")
import torch
from host_flags import CP2, DP, MODEL, MODELS, PER_TOKEN, PP2, SP, TP2, training
from host_runs import BRIDGE, ROOT, Host, agree
from noisy_counting import NoisyCounting
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.checkpoint import FileSystemReader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.host

LM = f"{MODEL} {MODELS['dense']} {PER_TOKEN} --micro-batch-size 2 "
LAYOUTS = {  # flags of Megatron-LM, overrides of Bridge, ranks
    "one rank": ("", "", 1),
    "TP": (TP2, "model.tensor_model_parallel_size=2", 2),
    "TP with SP": (TP2 + SP, "model.tensor_model_parallel_size=2 model.sequence_parallel=true", 2),
    "PP": (PP2, "model.pipeline_model_parallel_size=2", 2),
    "CP": (CP2, "model.context_parallel_size=2", 2),
    "DP": (DP, "optimizer.use_distributed_optimizer=true ddp.use_distributed_optimizer=true", 2),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    host = Host(tmp_path_factory.mktemp("bridge"))
    flags = f"{LM} {training(40, 1e-2, 16)} --micro-batch-size 8 --save {host.folder / 'base'}"
    host.curves(flags)
    return host


def finetune(host, argv, recipe="tiny", **kwargs):
    base = f"checkpoint.pretrained_checkpoint={host.folder / 'base'}"
    return host.curves(f"--recipe bridge_recipe:{recipe} {base} {argv}", script=BRIDGE, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nll_matches_bridge_loss(host, layout):
    _, argv, ranks = LAYOUTS[layout]
    stock = finetune(host, argv, ranks=ranks)
    ours = finetune(host, f"{argv} dft.loss_type=nll", ranks=ranks)
    assert {"lm loss", "grad-norm"} <= set(stock) < set(ours)
    agree({tag: ours[tag] for tag in stock}, stock, 1e-6)


@pytest.mark.parametrize("objective", ["dft", "dft:start=1,ramp=2", "cayley"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_objective_matches_megatron_lm_training(host, layout, objective):
    flags, argv, ranks = LAYOUTS[layout]
    theirs = host.curves(
        f"{LM} {flags} {training(3, 1e-3, 8)} --load {host.folder / 'base'} --finetune --loss-type {objective}",
        ranks=ranks,
    )
    ours = finetune(host, f"{argv} dft.loss_type={objective}", ranks=ranks)
    theirs = {tag: theirs[tag] for tag in theirs if "total" not in tag}
    agree(ours, theirs, 1e-6)


@pytest.mark.parametrize("objective", ["nll", "dft"])
def test_mtp_excludes_masked_tokens(host, objective):
    """Masked tokens skip the output layer in both, although only Megatron-LM passes the mask to the model."""
    common = f"{MODEL} {MODELS['mtp']} {PER_TOKEN} --micro-batch-size 2 "
    base = host.folder / "mtp"
    host.curves(f"{common} {training(40, 1e-2, 16)} --micro-batch-size 8 --save {base}")
    theirs = host.curves(f"{common} {training(3, 1e-3, 8)} --load {base} --finetune --loss-type {objective}")
    argv = f"checkpoint.pretrained_checkpoint={base} dft.loss_type={objective}"
    run = host.begin(f"--recipe bridge_recipe:tiny_mtp {argv}", script=BRIDGE)
    assert run.wait() == 0, run.output()[-6000:]
    assert "> megatron_dft: masked tokens skip the output layer" in run.output()
    assert "mtp_1 loss" in theirs
    agree(run.curves(), {tag: theirs[tag] for tag in theirs if "total" not in tag}, 1e-6)


@pytest.mark.parametrize("layout", ["one rank", "PP", "CP"])
def test_histograms_and_channels_match_megatron_lm(host, layout):
    """A third of the samples has no channel, the others have one of two."""
    flags, argv, ranks = LAYOUTS[layout]
    theirs = host.curves(
        f"{LM} {flags} {training(3, 1e-3, 8)} --load {host.folder / 'base'} --finetune --loss-type dft "
        "--dft-metrics full --dft-channels a,b",
        ranks=ranks,
        CHANNELS="3",
    )
    ours = finetune(host, f"{argv} dft.loss_type=dft dft.metrics=full dft.channels=a,b", ranks=ranks, CHANNELS="3")
    theirs = {tag: theirs[tag] for tag in theirs if "total" not in tag}
    assert {"dft/gradient/0.9-1.0", "dft/channel/b/nll", "dft/channel/b/nll validation"} <= set(theirs)
    agree(ours, theirs, 1e-6)


def test_bridge_without_loss_type_matches_bridge_alone(host):
    alone = host.curves(f"checkpoint.pretrained_checkpoint={host.folder / 'base'}", script=BRIDGE, alone=True)
    assert finetune(host, "") == alone


@pytest.mark.parametrize(
    "variant",
    [
        "dft.compact_masked_tokens=false",
        "dft.linear_fused=true dft.vocab_chunk=5",
        "dft.linear_fused=true dft.token_chunk=5",
    ],
)
def test_compaction_and_linear_fused_leave_curves_unchanged(host, variant):
    agree(finetune(host, f"dft.loss_type=dft {variant}"), finetune(host, "dft.loss_type=dft"), 2e-6)


def test_context_parallel_sets_required_settings(host):
    argv = "dft.loss_type=dft model.context_parallel_size=2"
    run = host.begin(
        f"--recipe bridge_recipe:tiny checkpoint.pretrained_checkpoint={host.folder / 'base'} {argv} "
        "model.calculate_per_token_loss=false ddp.average_in_collective=true",
        script=BRIDGE,
        ranks=2,
    )
    assert run.wait() == 0, run.output()[-6000:]
    assert "model.calculate_per_token_loss: False -> True, because under context parallelism" in run.output()
    assert "ddp.average_in_collective: True -> False, because the loss is divided by" in run.output()
    agree(run.curves(), finetune(host, argv, ranks=2))


def test_vlm_step_matches_default_step(host):
    agree(finetune(host, "--step vlm_step dft.loss_type=dft"), finetune(host, "dft.loss_type=dft"), 1e-6)


def test_callbacks_receive_metrics_of_steps_and_evaluations(host):
    run = host.begin(
        f"dft checkpoint.pretrained_checkpoint={host.folder / 'base'} validation.eval_interval=2",
        script=BRIDGE,
        alone=True,
    )
    assert run.wait() == 0, run.output()[-6000:]
    metrics = "dft/accuracy|dft/gate|dft/loss|dft/prob"
    assert run.output().count(f"step:|{metrics}|dft/valid_tokens|lm loss\n") == 3
    assert (
        run.output().count(f"evaluation:|{metrics}|lm loss\n") == 2
    )  # after steps 2 and 3; the test set has another event
    agree(run.curves(), finetune(host, "validation.eval_interval=2 dft.loss_type=dft"))


def test_metrics_are_logged_to_wandb(host):
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    from wandb.proto.wandb_internal_pb2 import Record

    folder = host.folder / "wandb"
    flags = f"logger.wandb_project=p logger.wandb_exp_name=e logger.wandb_save_dir={folder} dft.loss_type=dft"
    finetune(host, flags, WANDB_MODE="offline")
    (path,) = folder.rglob("*.wandb")
    file = datastore.DataStore()
    file.open_for_scan(str(path))
    logged = set()
    while (data := file.scan_data()) is not None:
        record = Record.FromString(data)
        logged |= {key for item in record.history.item for key in (item.key, *item.nested_key)}
    metrics = {"lm loss", "dft/loss", "dft/prob", "dft/gate", "dft/accuracy"}
    assert metrics | {f"{name} validation" for name in metrics} | {"dft/valid_tokens"} <= logged


class TestAdapters:
    def test_nll_matches_bridge_loss(self, host):
        for layout in ("one rank", "TP"):
            _, argv, ranks = LAYOUTS[layout]
            stock = finetune(host, argv, "tiny_lora", ranks=ranks)
            ours = finetune(host, f"{argv} dft.loss_type=nll", "tiny_lora", ranks=ranks)
            agree({tag: ours[tag] for tag in stock}, stock, 1e-6)

    def test_objective_trains_adapters(self, host):
        full, adapters = finetune(host, "dft.loss_type=dft"), finetune(host, "dft.loss_type=dft", "tiny_lora")
        assert set(full) == set(adapters)
        assert adapters["dft/loss"][0] == pytest.approx(full["dft/loss"][0], rel=1e-5)  # B starts as zero
        assert adapters["grad-norm"][0] != full["grad-norm"][0] and adapters["lm loss"][2] != full["lm loss"][2]

    def test_adapter_on_output_layer_disables_compaction(self, host):
        run = host.begin(
            f"--recipe bridge_recipe:tiny_lora checkpoint.pretrained_checkpoint={host.folder / 'base'} "
            "peft.target_modules=[linear_qkv,output_layer] dft.loss_type=dft",
            script=BRIDGE,
        )
        assert run.wait() == 0, run.output()[-6000:]
        assert "masked tokens pass through the output layer, because of an output layer that is LoRA" in run.output()


class TestCheckpoints:
    RUN = "train.train_iters=6 checkpoint.save_interval=3 "
    RAMP = "dft.loss_type=dft:start=2,ramp=3 "

    @pytest.mark.parametrize("recipe", ["tiny", "tiny_lora"])
    def test_resumed_run_matches_uninterrupted_run(self, host, recipe):
        folder = host.folder / f"whole-{recipe}"
        whole = finetune(host, f"{self.RUN} {self.RAMP} checkpoint.save={folder}", recipe)
        rest = finetune(host, f"{self.RUN} {self.RAMP} checkpoint.load={folder} checkpoint.ckpt_step=3", recipe)
        assert rest == {tag: values[3:] if len(values) == 6 else values for tag, values in whole.items()}

    @pytest.mark.parametrize("recipe", ["tiny", "tiny_lora"])
    def test_checkpoint_contains_no_dft_config_or_state(self, host, recipe):
        ours, stock = host.folder / f"whole-{recipe}", host.folder / f"stock-{recipe}"
        finetune(host, f"{self.RUN} {self.RAMP} checkpoint.save={ours}", recipe)
        finetune(host, f"{self.RUN} checkpoint.save={stock}", recipe)
        config = (ours / "iter_0000006" / "run_config.yaml").read_text()
        assert config and "dft" not in config.replace(str(ours), "")
        keys = [set(FileSystemReader(f / "iter_0000006").read_metadata().state_dict_metadata) for f in (ours, stock)]
        assert keys[0] == keys[1]

    def test_bridge_alone_resumes_from_checkpoint(self, host):
        ours = host.folder / "whole-tiny"
        finetune(host, f"{self.RUN} {self.RAMP} checkpoint.save={ours}")
        alone = host.curves(f"{self.RUN} checkpoint.load={ours} checkpoint.ckpt_step=3", script=BRIDGE, alone=True)
        assert len(alone["lm loss"]) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train.train_iter=3", "train.train_iter: TrainingConfig has no such setting"),
        ("+train.train_iter=3", "did you mean 'train_iters'"),
        (
            "model.cross_entropy_loss_fusion=true model.cross_entropy_fusion_impl=te",
            "cannot be combined with --cross-entropy-fusion-impl te",
        ),
        ("comm_overlap.tp_comm_overlap=true", "comm_overlap: the recipe has None here"),
        ("dist.use_decentralized_pg=true", "dist.use_decentralized_pg=true is not supported"),
        ("--step no_step", "got 'megatron.bridge.training.no_step:forward_step'"),
        ("--recipe llama32_1b_stf_config", "did you mean 'llama32_1b_sft_config'"),
    ],
)
def test_bridge_rejects_unknown_and_incompatible_settings(host, argv, message):
    base = f"checkpoint.pretrained_checkpoint={host.folder / 'base'}"
    run = host.begin(f"--recipe bridge_recipe:tiny {base} dft.loss_type=dft {argv}", script=BRIDGE)
    assert run.wait() == 1 and "\nmegatron_dft.launch_bridge: " in "\n" + run.output() and message in run.output()


def test_hugging_face_export_matches_validation_nll(host):
    """Import from Hugging Face, fine-tune with DFT, export: the NLL there equals the last validation of Bridge."""
    folder, saved, exported = (host.folder / name for name in ("hf", "hf-trained", "hf-exported"))
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**shape, **heads, tie_word_embeddings=False, dtype="float32", initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({str(word): word for word in range(32)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    flags = f"--recipe bridge_recipe:tiny_llama dft.loss_type=dft checkpoint.save={saved} checkpoint.save_interval=3"
    curves = host.curves(flags, script=BRIDGE, TINY_LLAMA=str(folder))
    run = host.begin(f"export {saved / 'iter_0000003'} {exported}", script=BRIDGE, alone=True, TINY_LLAMA=str(folder))
    assert run.wait() == 0, run.output()[-6000:]
    model, nll, count = LlamaForCausalLM.from_pretrained(exported), 0.0, 0.0
    for sample in map(NoisyCounting(1, 16, 30, 32, ignore_masked=False).__getitem__, range(16)):
        logits = model(sample["tokens"][None]).logits[0].detach().double()
        losses = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="none")
        nll, count = nll + (losses * sample["loss_mask"]).sum().item(), count + sample["loss_mask"].sum().item()
    assert curves["lm loss validation"][0] == pytest.approx(nll / count, rel=1e-6)


# The model configurations that the recipes load from Hugging Face, for machines without internet access.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
SHAPES = {
    "meta-llama/Llama-3.2-1B": LLAMA
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "meta-llama/Meta-Llama-3.1-70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face cache with the model configurations, under the revisions that the recipes pin."""
    folder = tmp_path_factory.mktemp("hf")
    source = importlib.util.find_spec("megatron.bridge.recipes.qwen.h100.qwen3").origin
    (pinned,) = re.findall(r"_QWEN3_8B_MODEL_REVISION = .(\w{40})", Path(source).read_text())
    for name, shape in SHAPES.items():
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        revision = pinned if "Qwen" in name else "0" * 40
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        (snapshot / "config.json").write_text(json.dumps(shape))
    return folder


READY = {  # ranks, some lines of the final configuration
    "llama32_1b_sft": (1, {"context_parallel_size: 1", "calculate_per_token_loss: true", "seq_length: 4096"}),
    "llama32_1b_lora": (1, {"target_modules:", "dim: 32"}),
    "qwen3_8b_sft": (4, {"tensor_model_parallel_size: 4", "packed_sequence_size: 4096", "pad_seq_to_mult: 4"}),
    "llama31_70b_sft_tp8_pp4_cp2": (
        64,
        {
            *("tensor_model_parallel_size: 8", "pipeline_model_parallel_size: 4", "context_parallel_size: 2"),
            *("virtual_pipeline_model_parallel_size: 5", "pad_seq_to_mult: 32", "average_in_collective: false"),
        },
    ),
}


def test_every_example_recipe_is_tested():
    assert set(READY) == {path.stem for path in (ROOT / "examples" / "conf").glob("*.yaml")}


@pytest.mark.parametrize("name", READY)
def test_example_recipe_builds_final_config(hub, name):
    """With Transformer Engine, as on GPUs, and the number of ranks of the recipe."""
    ranks, expected = READY[name]
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(ranks), "RANK": "0"}
    argv = [
        "--config-file",
        f"examples/conf/{name}.yaml",
        "--dry-run",
        "dft.loss_type=tsallis:q=0.5",
        f"checkpoint.pretrained_checkpoint={hub}",
    ]
    command = [sys.executable, "-m", "megatron_dft.launch_bridge", *argv]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert expected <= {line.strip() for line in run.stdout.splitlines()}
    assert "megatron_dft: DFTConfig(loss_type='tsallis:q=0.5'" in run.stdout and " -> " not in run.stdout
