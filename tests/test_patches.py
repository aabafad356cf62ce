"""The registry of patches of Megatron: applied in every module, checked, undone, listed in CONTRIBUTING.md."""

import ast
import importlib
import subprocess
import sys
import types

import pytest
from host_runs import ROOT

from megatron_dft import DFTConfig
from megatron_dft.hosts import megatron_lm, patches
from megatron_dft.hosts.patches import REGISTRY, TRAINING, Patches

PRETRAIN = f"{TRAINING}:pretrain"


SETTERS = ("patches.py", "cpu.py", "iterations.py", "bridge.py", "launch_bridge.py", "nemo.py")


@pytest.fixture
def training():
    return pytest.importorskip("megatron.training.training")


def test_contributing_lists_patch_registry():
    assert patches.table() in (ROOT / "CONTRIBUTING.md").read_text()
    assert len({patch.target for patch in REGISTRY}) == len(REGISTRY)


def test_only_listed_files_assign_to_megatron():
    """Other files than patches.py set attributes of objects only: models with a bound loss, and settings."""
    for path in (ROOT / "megatron_dft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                assert path.name in SETTERS, path
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    assert not ast.unparse(target).startswith("megatron."), (path, ast.unparse(target))


@pytest.mark.host
def test_wrap_replaces_function_in_every_module_and_restores_it(training):
    import megatron.training

    original = training.pretrain
    other = types.ModuleType("some_script")
    other.start_training = original  # imported under another name before the patch
    sys.modules["some_script"] = other
    try:
        with Patches() as applied:
            applied.wrap(PRETRAIN, lambda pretrain: lambda: "ours")
            assert megatron.training.pretrain is training.pretrain is other.start_training is not original
            assert other.start_training() == "ours"
        assert megatron.training.pretrain is training.pretrain is other.start_training is original
    finally:
        del sys.modules["some_script"]


@pytest.mark.host
def test_undo_keeps_later_replacements(training):
    original = training.evaluate
    try:
        with Patches() as applied:
            applied.wrap(f"{TRAINING}:evaluate", lambda evaluate: lambda: "ours")
            training.evaluate = "theirs"
        assert training.evaluate == "theirs"
    finally:
        training.evaluate = original


@pytest.mark.host
def test_wrap_rejects_missing_function(training, monkeypatch):
    monkeypatch.delattr(training, "train_step")
    with pytest.raises(ValueError, match=r"megatron.training.training: expected a function train_step\(\)"):
        Patches().wrap(f"{TRAINING}:train_step", lambda step: step)


@pytest.mark.host
def test_registry_targets_exist_in_megatron_lm(training):
    for patch in REGISTRY:
        if "bridge" not in patch.target and not patch.when.startswith("--device cpu"):
            owner, name = patches._owner(patch.target)
            assert callable(getattr(owner, name)), patch.target


@pytest.mark.host
def test_enable_and_undo_restore_megatron(training):
    names = ("megatron.training", TRAINING, "megatron.training.arguments", "megatron.core.tokenizers.text.libraries")
    modules = [importlib.import_module(name) for name in names]
    before = [dict(vars(module)) for module in modules]
    run = megatron_lm.enable(DFTConfig("dft"))
    assert [dict(vars(module)) for module in modules] != before
    run.patches.undo()
    assert [dict(vars(module)) for module in modules] == before


@pytest.mark.host
def test_enable_uses_compiled_dataset_helpers_of_wheel():
    """Without --device cpu, which has its own patch. Megatron calls make, and a wheel has no Makefile."""
    pytest.importorskip("megatron.core.datasets.helpers_cpp", reason="needs the compiled helpers of a wheel")
    code = (
        "import sys; from megatron.core.datasets import utils; from megatron_dft import DFTConfig\n"
        "from megatron_dft.hosts import megatron_lm\n"
        "if sys.argv[1:]: megatron_lm.enable(DFTConfig('dft'))\n"
        "utils.compile_helpers(); from megatron.core.datasets import helpers_cpp; print('started')"
    )
    alone, ours = (
        subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True) for argv in ((), ("ours",))
    )
    assert alone.returncode == 1 and "No targets specified and no makefile found" in alone.stderr
    assert ours.returncode == 0 and ours.stdout.endswith("started\n"), ours.stderr
