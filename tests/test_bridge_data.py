"""Token files as data sets of Megatron-Bridge's finetune(), through `python -m megatron_dft.launch_bridge`."""

import json
import os
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("megatron.bridge", reason="needs Megatron-Bridge and Transformer Engine: make test-bridge")
pytest.importorskip("pyarrow")
import torch
from chat_examples import talk, tokenizer
from host_runs import BRIDGE, EXAMPLE, ROOT, Host, agree
from test_bridge_host import hub  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dft import DFTConfig
from megatron_dft.data import __main__ as command
from megatron_dft.data.token_file import TokenFile

pytestmark = pytest.mark.host
LENGTH, VOCABULARY = 256, 512
TARGET = "megatron_dft.hosts.bridge_data.TokenFileDataset"
MODEL = f"model.seq_length={LENGTH} model.vocab_size={VOCABULARY} train.micro_batch_size=1"
LM = (
    f"--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length {LENGTH} --max-position-embeddings {LENGTH} "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 256 "
    "--lr-decay-style constant --clip-grad 1.0 --eval-iters 2 --eval-interval 100 --log-interval 1 "
    "--tensorboard-log-interval 1 --num-workers 0 --sft --tokenizer-type HuggingFaceTokenizer "
    "--no-create-attention-mask-in-dataloader --calculate-per-token-loss --micro-batch-size 1 --global-batch-size 8 "
)


class TokenHost(Host):
    """Runs of the tiny recipe on token files, from a checkpoint that Megatron-LM trained on the same files."""

    def __init__(self, folder):
        super().__init__(folder)
        self.tokenizer = folder / "tokenizer"
        tokenizer().save_pretrained(self.tokenizer)
        tp2_sp = "--tensor-model-parallel-size 2 --sequence-parallel"
        self.train = self.prepare("train", 0, f"--context-parallel-size 2 {tp2_sp}")
        self.valid = self.prepare("valid", 3, f"--context-parallel-size 2 {tp2_sp}")
        self.narrow = self.prepare("narrow", 0, "")
        self.dataset = (
            f"dataset._target_={TARGET} dataset.train_path={self.train} dataset.valid_path={self.valid} "
            "dataset.num_workers=0 dataset.pin_memory=false tokenizer.tokenizer_type=HuggingFaceTokenizer "
            f"tokenizer.tokenizer_model={self.tokenizer} "
        )
        self.lm = (
            f"{LM} --tokenizer-model {self.tokenizer} --data-cache-path {folder / 'cache'} "
            f"--train-data-path {self.train} --valid-data-path {self.valid} "
        )
        base = folder / "base"
        self.curves(
            f"{self.lm} --train-iters 20 --lr 1e-2 --save {base} --save-interval 20 --loss-type nll", script=EXAMPLE
        )
        self.base = f"checkpoint.pretrained_checkpoint={base}"
        self.loaded = f"--train-iters 3 --lr 1e-3 --load {base} --finetune"

    def prepare(self, name, shift, layout):
        """Write a token file of 120 conversations in two channels."""
        source, out = self.folder / f"{name}.jsonl", self.folder / f"{name}.arrow"
        records = [
            {
                "messages": talk("one " * (i % 7), "yes no " * ((i + shift) % 23 + 1), "and", "two"),
                "channel": ("maths", "code")[i % 2],
            }
            for i in range(120)
        ]
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        argv = [str(source), "--tokenizer", str(self.tokenizer), "--seq-length", str(LENGTH), "--out", str(out)]
        command.main([*argv, "--workers", "1", *layout.split()])
        return out

    def argv(self, argv, recipe="tiny"):
        return f"--recipe bridge_recipe:{recipe} {self.base} {MODEL} {self.dataset} {argv}"

    def finetune(self, argv, **kwargs):
        return self.curves(self.argv(argv), script=BRIDGE, **kwargs)

    def rejection(self, argv):
        """The output of a run that is rejected before its first iteration."""
        run = self.begin(self.argv(argv), script=BRIDGE)
        assert run.wait() == 1 and "iteration        1/" not in run.output()
        return run.output()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return TokenHost(tmp_path_factory.mktemp("bridge_data"))


def without_totals(curves):
    return {tag: curves[tag] for tag in curves if "total" not in tag}


def test_token_file_training_matches_megatron_lm(host):
    theirs = host.curves(f"{host.lm} {host.loaded} --loss-type dft --dft-channels maths", script=EXAMPLE)
    ours = host.finetune("dft.loss_type=dft dft.channels=maths")
    assert {"lm loss validation", "dft/channel/maths/nll", "dft/channel/maths/tokens"} <= set(ours)
    agree(ours, without_totals(theirs), 1e-6)


@pytest.mark.parametrize("reduction", ["sample", "square-root"])
def test_reduction_matches_megatron_lm(host, reduction):
    theirs = host.curves(f"{host.lm} {host.loaded} --loss-type dft --dft-reduction {reduction}", script=EXAMPLE)
    agree(host.finetune(f"dft.loss_type=dft dft.reduction={reduction}"), without_totals(theirs), 1e-6)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "model.context_parallel_size=2"),
        (2, "model.tensor_model_parallel_size=2 model.sequence_parallel=true"),
        (2, ""),
        (4, "model.pipeline_model_parallel_size=4"),  # middle stages need cu_seqlens as well
    ],
    ids=["CP", "TP with SP", "DP", "PP"],
)
def test_token_file_training_is_equal_in_every_layout(host, ranks, layout):
    one = host.finetune("dft.loss_type=dft dft.channels=maths")
    agree(host.finetune(f"dft.loss_type=dft dft.channels=maths {layout}", ranks=ranks), one, 2e-5)


@pytest.mark.parametrize(("ranks", "layout"), [(1, ""), (2, "model.context_parallel_size=2")])
def test_epochs_train_each_token_once(host, ranks, layout):
    """The global batch is the whole file, so each step is an epoch."""
    file = TokenFile(str(host.train))
    argv = f"dft.loss_type=nll train.global_batch_size={len(file)} validation.eval_iters=0 {layout}"
    curves = host.finetune(argv, ranks=ranks)
    assert curves["dft/valid_tokens"] == [file.header.statistics["trained_tokens"]] * 3


def test_bridge_loss_on_token_file_matches_nll(host):
    """Bridge's own loss without an objective. Labels that do not train are -100."""
    stock = host.finetune("")
    ours = host.finetune("dft.loss_type=nll")
    agree({tag: ours[tag] for tag in stock}, stock, 1e-6)


def test_validation_nll_matches_hugging_face_on_single_conversations(host):
    """The exported model evaluates each conversation separately, without packing."""
    folder, saved, exported = (host.folder / name for name in ("hf", "hf-trained", "hf-exported"))
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    config = LlamaConfig(**shape, **heads, tie_word_embeddings=False, dtype="float32", initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    file = TokenFile(str(host.valid))
    argv = (
        f"--recipe bridge_recipe:tiny_llama {MODEL} {host.dataset} dft.loss_type=dft validation.eval_iters=1 "
        f"train.global_batch_size={len(file)} checkpoint.save={saved} checkpoint.save_interval=3"
    )
    curves = host.curves(argv, script=BRIDGE, TINY_LLAMA=str(folder))
    run = host.begin(f"export {saved / 'iter_0000003'} {exported}", script=BRIDGE, alone=True, TINY_LLAMA=str(folder))
    assert run.wait() == 0, run.output()[-6000:]
    model, nll, count = LlamaForCausalLM.from_pretrained(exported), 0.0, 0.0
    for row in (file[i] for i in range(len(file))):
        for ids, weights in zip(
            torch.from_numpy(row.input_ids.copy()).long().split(row.lengths.tolist()),
            torch.from_numpy(row.loss_weights.copy()).double().split(row.lengths.tolist()),
            strict=True,
        ):
            logits = model(ids[None, :-1]).logits[0].detach().double()
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            nll, count = nll + (losses * weights[1:]).sum().item(), count + weights[1:].sum().item()
    assert count == file.header.statistics["trained_tokens"]
    assert curves["lm loss validation"][0] == pytest.approx(nll / count, rel=1e-6)


def test_resumed_run_continues_with_next_row(host):
    folder = host.folder / "whole"
    argv = "dft.loss_type=dft train.train_iters=6 checkpoint.save_interval=3"
    whole = host.finetune(f"{argv} checkpoint.save={folder}")
    rest = host.finetune(f"{argv} checkpoint.load={folder} checkpoint.ckpt_step=3")
    assert rest == {tag: values[3:] if len(values) == 6 else values for tag, values in whole.items()}
    # Bridge stores the section in the checkpoint but does not build it on loading: this run has other data.
    alone = f"train.train_iters=6 {MODEL} checkpoint.load={folder} checkpoint.ckpt_step=3"
    assert len(host.curves(alone, script=BRIDGE, alone=True)["lm loss"]) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("model.seq_length=128", f"train.arrow: prepared for --seq-length {LENGTH}, the run has model.seq_length 128"),
        (
            "model.context_parallel_size=2 dataset.valid_path={folder}/narrow.arrow",
            "narrow.arrow: prepared for --context-parallel-size 1, the run has model.context_parallel_size 2",
        ),
        ("train.micro_batch_size=2", "train.micro_batch_size=2: token files support only 1"),
        ("dataset.dataloader_type=batch", "dataset.dataloader_type=batch: token files support only single"),
        ("dataset.valid_path={folder}/train.jsonl", "train.jsonl: expected a token file"),
        ("dft.channels=maths,law", "dft.channels: the data has no channel 'law': it has code, maths"),
        ("tokenizer.tokenizer_model={folder}/other", "prepared with another tokenizer: tokenizer '"),
        (
            "tokenizer.tokenizer_type=NullTokenizer tokenizer.vocab_size=20 model.vocab_size=32",
            ", the model has a vocabulary of 32",
        ),
        ("dataset.train_paht=x", "dataset: Unexpected config keys"),
        ("dataset._target_=megatron_dft.ops.objectives.DFT", "is not in the allowlist"),
    ],
)
def test_settings_incompatible_with_token_file_are_rejected(host, change, reason):
    other = tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(host.folder / "other")
    assert reason in host.rejection(f"dft.loss_type=dft {change.format(folder=host.folder)}")


def test_context_parallel_without_objective_requires_per_token_loss(host):
    argv = "model.context_parallel_size=2 model.calculate_per_token_loss=false"
    assert "set model.calculate_per_token_loss=true and ddp.average_in_collective=false" in host.rejection(argv)


def test_section_in_yaml_replaces_data_set_of_recipe(host, hub, tmp_path):  # noqa: F811
    """A recipe of Bridge, whose data set has other fields."""
    (tmp_path / "run.yaml").write_text(
        f"recipe: llama32_1b_sft_config\nmodel: {{seq_length: {LENGTH}}}\ndft: {{loss_type: dft}}\n"
        f"dataset: {{_target_: {TARGET}, train_path: {host.train}}}\n"
        f"tokenizer: {{tokenizer_model: {host.tokenizer}}}\n"
    )
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "1", "RANK": "0"}
    argv = ["--config-file", str(tmp_path / "run.yaml"), "--dry-run", f"dataset.valid_path={host.valid}"]
    argv.append(f"checkpoint.pretrained_checkpoint={hub}")
    module = [sys.executable, "-m", "megatron_dft.launch_bridge"]
    run = subprocess.run([*module, *argv], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    printed = {line.strip() for line in run.stdout.splitlines()}
    assert {f"_target_: {TARGET}", f"valid_path: {host.valid}", "dataloader_type: single"} <= printed
    assert "hf_dataset" not in run.stdout and "pad_seq_to_mult" not in run.stdout


def test_data_set_requires_check_and_can_be_pickled(host):
    from megatron.bridge.data.base import DatasetBuildContext

    from megatron_dft.hosts.bridge_data import TokenFileDataset, TokenRows
    from megatron_dft.hosts.token_data import Carried

    section = TokenFileDataset(train_path=str(host.train))
    assert section.seq_length == section.offline_packing_specs.packed_sequence_size == LENGTH
    with pytest.raises(ValueError, match=r"check_token_files\(cfg\) was not called"):
        section.build_datasets(DatasetBuildContext(8, 0, 0))
    rows = TokenRows(TokenFile(str(host.train)), 100, 1234, Carried(DFTConfig("dft", channels="maths")))
    again = pickle.loads(pickle.dumps(rows))
    assert len(again) == 100 and all((again[99][name] == rows[99][name]).all() for name in rows[99])
