"""examples/launch: the scripts train and restart killed ranks. slurm.sh is only parsed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from host_flags import TP2
from host_runs import Host
from launch_script_runs import KILLED, LAUNCH, RUN, SAVED, STEPS, curves_in, environment, script_in, steps_in

pytest.importorskip("megatron.training")
pytest.importorskip("tensorboard")
pytestmark = [pytest.mark.host, pytest.mark.slow]


def launch(name: str, argv: list[str], log: Path, **more: str) -> int:
    """Exit code of a launch script; 124 if it hangs. Its output is written to a file."""
    with log.open("w") as file:
        return subprocess.run(
            ["timeout", "300", "bash", str(LAUNCH / name), *argv],  # on SIGTERM, torchrun ends its ranks, then exits
            env={**os.environ, **environment(**more)},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode


def test_launch_script_restarts_killed_rank_with_unchanged_curves(tmp_path):
    folders = f"--save {tmp_path}/saved --load {tmp_path}/saved --tensorboard-dir {tmp_path}/logs --device cpu"
    argv = [str(script_in(tmp_path)), *f"{RUN} {TP2} {folders}".split()]
    log = tmp_path / "log.txt"
    code = launch("one_machine.sh", argv, log, GPUS="2", KILL_ONCE_IN_ITERATION=str(KILLED))
    assert code == 0, log.read_text()[-6000:]
    assert steps_in(log) == [*range(1, KILLED), *range(SAVED + 1, STEPS + 1)]
    uninterrupted = Host(tmp_path).curves(f"{RUN} {TP2}", ranks=2)
    for tag, values in curves_in(tmp_path / "logs").items():
        left = STEPS - SAVED if len(uninterrupted[tag]) == STEPS else 1  # an evaluation has one value
        assert values[-left:] == uninterrupted[tag][-left:], tag


def test_launch_script_preflight_stops_run_before_launch(tmp_path):
    log = tmp_path / "log.txt"
    code = launch("one_machine.sh", [str(tmp_path / "not_there.py")], log, GPUS="1")
    assert code != 0
    assert "megatron_dft.doctor" in log.read_text() and "megatron_dft.launch" not in log.read_text()


@pytest.mark.parametrize("missing", ["NODES", "HEAD"])
def test_several_machines_script_requires_nodes_and_head(tmp_path, missing):
    variables = {"GPUS": "1", "NODES": "2", "HEAD": "localhost"}
    log = tmp_path / "log.txt"
    assert launch("several_machines.sh", ["script.py"], log, **{**variables, missing: ""}) != 0
    assert f"{missing}: expected" in log.read_text()


@pytest.mark.parametrize("name", ["one_machine.sh", "several_machines.sh", "slurm.sh"])
def test_launch_scripts_parse_and_are_executable(name):
    assert os.access(LAUNCH / name, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", LAUNCH / name], check=True)
