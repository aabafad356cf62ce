"""Arguments and YAML files of megatron_dft.launch_bridge, without Megatron-Bridge. See also test_bridge_host.py."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("omegaconf")

from megatron_dft import DFTConfig, launch_bridge
from megatron_dft.hosts.bridge import DFTStep

RECIPES = sorted((Path(__file__).parent.parent / "examples" / "conf").glob("*.yaml"))


@dataclasses.dataclass
class Section:
    seq_length: int = 8
    dataset_kwargs: dict | None = None
    _hidden: int = 0

    def finalize(self):
        """Not a setting."""


@dataclasses.dataclass
class Settings:
    model: Section = dataclasses.field(default_factory=Section)
    env_vars: dict = dataclasses.field(default_factory=dict)
    comm_overlap: object = None


def write(folder, text):
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


def test_bridge_overrides_take_precedence_over_yaml(tmp_path):
    file = write(
        tmp_path, "recipe: a\ndft: {loss_type: dft, vocab_chunk: 64, linear_fused: true}\nmodel: {seq_length: 1e-2}\n"
    )
    name, config, sections, overrides = launch_bridge.requested(
        None, file, ["dft.loss_type=tsallis:q=0.5", "a.b=c", "+d.e=f=g"]
    )
    assert (name, sections, overrides) == ("a", {"model": {"seq_length": 0.01}}, ["a.b=c", "+d.e=f=g"])
    assert config == DFTConfig(loss_type="tsallis:q=0.5", vocab_chunk=64, linear_fused=True)
    assert launch_bridge.requested("b", file, [])[0] == "b"


def test_bridge_reads_dft_settings_from_argv():
    argv = [
        "dft.loss_type=dft:start=2,ramp=3",
        "dft.linear_fused=true",
        "dft.vocab_chunk=64",
        "dft.true_vocab_size=null",
    ]
    _, config, sections, overrides = launch_bridge.requested("a", None, argv)
    assert config == DFTConfig(loss_type="dft:start=2,ramp=3", linear_fused=True, vocab_chunk=64)
    assert (sections, overrides) == ({}, [])


def test_bridge_leaves_yaml_references_unresolved(tmp_path):
    file = write(tmp_path, "recipe: a\ndataset: {seq_length: '${model.seq_length}'}")
    assert launch_bridge.requested(None, file, [])[2] == {"dataset": {"seq_length": "${model.seq_length}"}}


def test_bridge_without_loss_type_disables_dft(tmp_path):
    assert not launch_bridge.requested(None, write(tmp_path, "recipe: a\ndft:\nmodel: {}"), [])[1].enabled


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("dft: {loss_typ: dft}", [], "got 'loss_typ'; did you mean 'loss_type'"),
        ("dft: {loss_type: dtf}", [], "did you mean 'dft'"),
        ("dft: {linear_fused: 1}", [], "linear_fused: expected bool, got 1"),
        ("", ["dft.vocab_chunks=4"], "got 'vocab_chunks'; did you mean 'vocab_chunk'"),
        ("", ["train.train_iters"], "train.train_iters: expected KEY=VALUE"),
        ("", ["~model.seq_length=4"], "~model.seq_length=4: expected KEY=VALUE"),
        ("- dft", [], r"expected sections .*, got \['dft'\]"),
        ("dft: nll", [], "expected sections .* of KEY: VALUE"),
    ],
)
def test_bridge_rejects_invalid_settings(tmp_path, text, argv, message):
    with pytest.raises(ValueError, match=message):
        launch_bridge.requested("a", write(tmp_path, text), argv)


def test_bridge_requires_recipe_and_existing_file():
    with pytest.raises(ValueError, match="no recipe given; use --recipe NAME"):
        launch_bridge.requested(None, None, [])
    with pytest.raises(ValueError, match=r"--config-file .*nowhere\.yaml: no such file"):
        launch_bridge.requested("a", "/nowhere.yaml", [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modle": {}}, r"modle: Settings has no such setting.*did you mean 'model'"),
        ({"model": {"seq_lenght": 4}}, r"model\.seq_lenght: Section has no such setting.*did you mean 'seq_length'"),
        ({"model": {"finalize": 4}}, r"model\.finalize: Section has no such setting"),
        ({"model": {"_hidden": 4}}, r"model\._hidden: Section has no such setting"),
        (
            {"comm_overlap": {"tp_comm_overlap": True}},
            r"comm_overlap: the recipe has None here, .* add `_target_:`",
        ),
    ],
)
def test_check_keys_rejects_unknown_keys(given, message):
    with pytest.raises(ValueError, match=message):
        launch_bridge.check_keys(given, Settings())


@pytest.mark.parametrize(
    "given",
    [
        {"model": {"seq_length": 4, "dataset_kwargs": {"anything": 1}}, "env_vars": {"NCCL_DEBUG": "INFO"}},
        {"model": None, "comm_overlap": {"_target_": "a.B", "tp_comm_overlap": True}},
        {"model": {"_target_": "a.B"}},
    ],
)
def test_check_keys_accepts_existing_keys(given):
    launch_bridge.check_keys(given, Settings())


def test_bridge_prints_usage_and_one_line_errors():
    command = [sys.executable, "-m", "megatron_dft.launch_bridge"]
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(option in usage for option in ("--recipe", "--config-file", "--step", "--device", "--dry-run"))
    failed = subprocess.run([*command, "--recipe", "a", "dft.loss_type=dtf"], capture_output=True, text=True)
    error = "megatron_dft.launch_bridge: .*did you mean 'dft'.*\n"
    assert failed.returncode == 1 and re.fullmatch(error, failed.stderr)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_example_recipes_set_dft_and_per_token_loss(path):
    name, config, sections, _ = launch_bridge.requested(None, str(path), [])
    assert name.endswith(("_sft_config", "_peft_config")) and config.loss_type == "dft"
    assert "calculate_per_token_loss" in sections["model"] and "dft" not in sections
    assert all(isinstance(section, Mapping) for section in sections.values())
    assert f"--config-file examples/conf/{path.name}" in path.read_text()


def batches(*masks):
    labels = torch.arange(4).view(1, 4)
    return iter([{"labels": labels, "loss_mask": torch.tensor([mask]), "tokens": labels} for mask in masks])


def test_dft_step_sets_masked_labels_to_ignore_index_in_copy():
    seen = []

    def forward_step(state, data_iterator, model, return_schedule_plan=False):
        seen.append((state, next(data_iterator), model, return_schedule_plan))
        return None, None

    step = DFTStep(forward_step, DFTConfig("dft"))
    given = list(batches([1.0, 0.0, 0.5, 0.0]))
    assert step("state", iter(given), None, return_schedule_plan=True) == (None, None)
    ((state, batch, model, plan),) = seen
    assert (state, model, plan) == ("state", None, True)
    assert batch["labels"].tolist() == [[0, -100, 2, -100]] and batch["tokens"] is given[0]["tokens"]
    assert given[0]["labels"].tolist() == [[0, 1, 2, 3]]
    assert list(step.__signature__.parameters) == ["state", "data_iterator", "model", "return_schedule_plan"]


@pytest.mark.parametrize(
    "batch",
    [
        {"labels": None, "loss_mask": torch.zeros(1, 4)},
        {"labels": torch.zeros(1, 4)},
        {"labels": torch.zeros(1, 4), "loss_mask": torch.zeros(1, 2)},
    ],
)
def test_dft_step_passes_batch_without_matching_mask_unchanged(batch):
    step = DFTStep(lambda data_iterator, model: (next(data_iterator), None), DFTConfig("dft"))
    assert step(iter([batch]), None)[0] == batch


def test_dft_step_accepts_stage_without_data():
    step = DFTStep(lambda data_iterator, model: (data_iterator, None), DFTConfig("dft"))
    assert step(None, None) == (None, None)
