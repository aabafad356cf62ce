"""llm.pretrain() of NeMo 2 with recipes of NeMo-Run, on CPU ranks; the import error without NeMo 2."""

import csv
import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, Rendezvous, run_processes

from megatron_dft import DFTConfig

METRICS = ["dft/loss", "dft/prob", "dft/gate", "dft/accuracy"]


def python(folder, code):
    """Run code in a Python process that imports the packages of a folder first."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)


def test_nemo_3_import_error_names_megatron_bridge(tmp_path):
    (tmp_path / "nemo_run.py").touch()
    for package in ("nemo", "nemo/collections", "nemo/collections/asr", "lightning", "lightning/pytorch"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("Callback = object")
    (tmp_path / "nemo_toolkit-3.0.0.dist-info").mkdir()
    (tmp_path / "nemo_toolkit-3.0.0.dist-info" / "METADATA").write_text("Name: nemo-toolkit\nVersion: 3.0.0\n")
    error = python(tmp_path, "import megatron_dft.hosts.nemo").stderr.splitlines()[-1]
    assert error.startswith(
        "ImportError: expected NeMo 2 with nemo.collections.llm, whose last release is nemo-toolkit 2"
    )
    assert "got nemo-toolkit 3.0.0" in error
    assert "for NeMo 3 use Megatron-Bridge: python -m megatron_dft.launch_bridge" in error


@pytest.fixture(scope="module")
def nemo():
    pytest.importorskip("nemo.collections", reason="needs NeMo 2: make test-nemo")
    os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"  # megatron-core compiles for the present GPU when it is imported
    from megatron_dft.hosts import nemo

    return nemo


class Runs:
    """Starts each distinct run once."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}

    def __call__(self, *arguments, ranks=1):
        """The logged metrics of training steps and validations."""
        if arguments not in self.known:
            self.known[arguments] = self.start(arguments, ranks)
        return self.known[arguments]

    def start(self, arguments, ranks):
        rendezvous, out = Rendezvous(), self.path(arguments)
        here = rendezvous.environment | {"WORLD_SIZE": str(ranks)}
        here |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "NEMO_HOME": str(self.folder / "home")}
        command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "nemo_training.py"), str(out), *arguments]
        outputs = [self.folder / f"{out.name}.{rank}.txt" for rank in range(ranks)]
        code = run_processes(command, os.environ | here, outputs)
        shown = "\n".join(output.read_text(errors="replace")[-4000:] for output in outputs)
        assert code == 0, shown
        (log,) = out.rglob("metrics.csv")
        with log.open() as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name != "step"]
        return {name: [float(row[name]) for row in rows if row[name]] for name in names}

    def path(self, arguments):
        return self.folder / ("-".join(arguments).replace("=", "_").replace(":", "_") or "stock")


@pytest.fixture(scope="module")
def runs(nemo, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("nemo"))


def agree(ours, theirs, names):
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (name, ours[name], theirs[name])


def test_nll_matches_nemo_loss(runs):
    stock, ours = runs(), runs("loss_type=nll")
    assert {"reduced_train_loss", "grad_norm", "val_loss"} <= set(stock) < set(ours)
    agree(ours, stock, stock)


def test_dft_logs_metrics_beside_nll(runs):
    stock, ours = runs(), runs("loss_type=dft")
    assert set(ours) - set(stock) == {*METRICS, *(f"val_{name}" for name in METRICS)}
    assert ours["reduced_train_loss"][0] == pytest.approx(stock["reduced_train_loss"][0], rel=1e-6)
    assert ours["dft/gate"] == ours["dft/prob"] and len(ours["dft/prob"]) == 4
    assert ours["grad_norm"][0] < 0.1 * stock["grad_norm"][0]  # gates are small at the start of training


def test_histograms_and_channels_under_tp_match_one_rank(runs):
    settings = ("loss_type=dft", "metrics=full", "channels=a")
    one, two = runs(*settings), runs(*settings, "tp=2", ranks=2)
    names = [name for name in one if name.count("/") > 1 or name.endswith("entropy")]
    assert len(names) == 2 * (20 + 2 * 4 - 3 + 1)  # training and validation; no token is in channel a
    for step in range(4):
        assert sum(one[f"dft/prob/{i / 10}-{(i + 1) / 10}"][step] for i in range(10)) == pytest.approx(1.0)
    assert one["dft/channel/other/prob"] == pytest.approx(one["dft/prob"]) and set(one["dft/channel/a/tokens"]) == {0.0}
    agree(two, one, names)


@pytest.mark.parametrize("chunk", ["vocab_chunk=5", "token_chunk=5"])
def test_linear_fused_matches_full_logits(runs, chunk):
    full, fused = runs("loss_type=dft"), runs("loss_type=dft", "linear_fused=true", chunk)
    agree(fused, full, [name for name in full if name not in ("lr", "consumed_samples")])


@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
def test_parallel_layout_matches_one_rank(runs, layout):
    """PP initializes stages differently, so its runs are compared with each other."""
    one, two = runs("loss_type=dft"), runs("loss_type=dft", layout, ranks=2)
    assert set(two) == set(one)
    if layout == "tp=2":
        agree(two, one, [name for name in one if name not in ("lr", "consumed_samples")])
    else:
        assert two["reduced_train_loss"] == pytest.approx(one["reduced_train_loss"], rel=0.05)
        stock = runs("loss_type=nll", layout, ranks=2)
        assert two["reduced_train_loss"][0] == pytest.approx(stock["reduced_train_loss"][0], rel=1e-6)
        assert two["dft/accuracy"][0] == stock["dft/accuracy"][0] and two["dft/prob"][0] == stock["dft/prob"][0]


def test_checkpoint_contains_no_megatron_dft_objects(runs):
    runs("loss_type=dft", "checkpoint=true")
    stored = list(runs.path(("loss_type=dft", "checkpoint=true")).rglob("context/io.json"))
    assert stored and all("megatron_dft" not in path.read_text() for path in stored)


class TestRecipes:
    def recipe(self, **strategy):
        from nemo.collections import llm

        recipe = llm.llama3_8b.finetune_recipe(name="x", dir="/tmp/x", num_nodes=1, num_gpus_per_node=8)
        for name, value in strategy.items():
            setattr(recipe.trainer.strategy, name, value)
        return recipe

    def test_with_dft_adds_serializable_callback(self, nemo):
        from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

        before = list(self.recipe().trainer.callbacks)
        recipe = nemo.with_dft(self.recipe(), loss_type="tsallis:q=0.5", linear_fused=True)
        assert recipe.trainer.callbacks == [*before, nemo.dft(loss_type="tsallis:q=0.5", linear_fused=True)]
        serializer = ZlibJSONSerializer()
        assert serializer.deserialize(serializer.serialize(recipe)) == recipe

    def test_nemo_dft_builds_callback_with_settings(self, nemo):
        import fiddle

        callback = fiddle.build(nemo.dft(loss_type="tsallis:q=0.5", vocab_chunk=64, linear_fused=True))
        assert callback.config == DFTConfig("tsallis:q=0.5", vocab_chunk=64, linear_fused=True)

    def test_with_dft_leaves_recipe_unchanged_for_ce(self, nemo):
        assert nemo.with_dft(self.recipe(), loss_type="ce") == self.recipe()

    def test_context_parallel_sets_required_settings(self, nemo, capsys):
        import nemo_run as run
        from megatron.core.distributed import DistributedDataParallelConfig

        ddp = run.Config(DistributedDataParallelConfig, average_in_collective=True)
        recipe = self.recipe(context_parallel_size=2, ddp=ddp)
        recipe.model.config.cross_entropy_fusion_impl = "te"
        nemo.with_dft(recipe)
        assert recipe.model.config.calculate_per_token_loss is True
        assert recipe.trainer.strategy.ddp.average_in_collective is False
        assert recipe.model.config.cross_entropy_fusion_impl == "native"
        assert capsys.readouterr().out.count("> megatron_dft: ") == 3

    def test_nemo_rejects_unknown_settings_and_objectives(self, nemo):
        with pytest.raises(ValueError, match="did you mean 'loss_type'"):
            nemo.with_dft(self.recipe(), loss_typ="dft")
        with pytest.raises(ValueError, match="did you mean 'dft'"):
            nemo.DFTCallback(loss_type="dtf")

    def test_nemo_dft_arguments_match_dft_config_fields(self, nemo):
        parameters = inspect.signature(nemo.dft).parameters
        assert list(parameters) == [f.name for f in dataclasses.fields(DFTConfig)]
        defaults = {name: p.default for name, p in parameters.items()}
        assert defaults == {f.name: f.default for f in dataclasses.fields(DFTConfig)} | {"loss_type": "dft"}

    def test_yaml_file_adds_callback_to_recipe(self, nemo, tmp_path):
        """The dry run of the `nemo` command of NeMo-Run."""
        yaml, out = ROOT / "examples" / "conf" / "nemo2" / "dft.yaml", tmp_path / "out.yaml"
        arguments = [
            "llm",
            "finetune",
            "--factory",
            "llama3_8b",
            "--yaml",
            str(yaml),
            "--dryrun",
            "--to-yaml",
            str(out),
        ]
        command = [Path(sys.executable).parent / "nemo", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        text = out.read_text()
        assert "megatron_dft.hosts.nemo.DFTCallback" in text and "loss_type: dft" in text

    def test_recipe_factory_on_command_line_adds_callback(self, nemo, tmp_path):
        out = tmp_path / "out.yaml"
        command = [str(Path(sys.executable).parent / "nemo"), "llm", "finetune", "--dryrun", "--to-yaml", str(out)]
        command += ["--factory", "dft(recipe=llama3_8b,loss_type=tsallis:q=0.5)", "trainer.num_nodes=2"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        text = out.read_text()
        assert "megatron_dft.hosts.nemo.DFTCallback" in text and "loss_type: tsallis:q=0.5" in text
        assert "num_nodes: 2" in text
