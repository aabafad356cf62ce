"""Run training scripts through Megatron's own pretrain() on CPU ranks. A run takes one or two seconds.

Ranks are forked (`ranks`). Their environment is that of torchrun: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and the
TCPStore of an agent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
from demo import read_curves
from ranks import FORK, ROOT, Rendezvous

EXAMPLE = ROOT / "examples" / "pretrain_gpt.py"
SCRIPT = ROOT / "tests" / "training_script.py"
BRIDGE = ROOT / "tests" / "bridge_recipe.py"  # no script is passed to the launcher: --recipe bridge_recipe:tiny
UNTIMED = re.compile("lm loss|dft/(?!valid_tokens_per)|grad-norm|learning-rate|mtp")


def megatron_has(path: str, text: str) -> bool:
    """Whether a file of the installed Megatron, as training/argument_utils.py, contains a text. Imports nothing."""
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec("megatron") and importlib.util.find_spec(f"megatron.{package}")
    file = spec and spec.origin and Path(spec.origin).parent / rest
    return bool(file and file.is_file() and text in file.read_text())


# From 0.19 on, the configuration selects the model that pretrain() builds, GPTModel or HybridModel.
HAS_HYBRID = megatron_has("training/argument_utils.py", "def gpt_config_from_args")


class Host:
    """Starts runs that share a folder for logs, data and checkpoints. Caches the curves of each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple, dict[str, list[float]]] = {}

    def begin(self, flags: str, *, ranks: int = 1, script: Path = SCRIPT, alone: bool = False, **environment) -> Run:
        """Start the ranks. `alone` runs the script without the launcher."""
        folder = self.folder / f"run{len(list(self.folder.glob('run*')))}"
        folder.mkdir()
        logs = f"logger.tensorboard_dir={folder}" if script == BRIDGE else f"--tensorboard-dir={folder}"
        return Run(folder, script, [*flags.split(), logs], ranks, alone, environment)

    def start(self, flags: str, **kwargs) -> tuple[int, str]:
        """Run to the end; returns exit code and output."""
        run = self.begin(flags, **kwargs)
        return run.wait(), run.output()

    def curves(self, flags: str, **kwargs) -> dict[str, list[float]]:
        """TensorBoard curves of a run, without timings. Each distinct run is started once."""
        key = (flags, *kwargs.items())
        if key not in self.known:
            run = self.begin(flags, **kwargs)
            assert run.wait() == 0, run.output()[-6000:]
            self.known[key] = run.curves()
        return self.known[key]


class Run:
    """The ranks of one run, its output and its curves."""

    def __init__(
        self, folder: Path, script: Path, argv: list[str], ranks: int, alone: bool, environment: dict[str, str]
    ) -> None:
        self.folder = folder
        self.rendezvous = Rendezvous()
        size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment = environment | size | self.rendezvous.environment
        self.processes = [
            FORK.Process(target=_rank, args=(str(rank), environment, folder, script, argv, alone))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120.0) -> int:
        """Exit code: 0, or that of the first rank that failed. The others are killed 5 s later."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in self.processes):
                time.sleep(0.02)
                if any(process.exitcode for process in self.processes):
                    deadline = min(deadline, time.monotonic() + 5.0)
                if time.monotonic() > deadline:
                    break
        finally:  # also after a timeout of the test, and children of killed ranks
            self.kill()
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def kill(self) -> None:
        """Send SIGKILL to all ranks and their children."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank*.txt")))

    def curves(self) -> dict[str, list[float]]:
        return {tag: values for tag, values in read_curves(self.folder).items() if UNTIMED.search(tag)}


def agree(ours: dict[str, list[float]], theirs: dict[str, list[float]], tolerance: float = 1e-5) -> None:
    """Assert that two runs logged the same tags and, within tolerance, the same values."""
    assert set(ours) == set(theirs)
    for tag in theirs:
        assert ours[tag] == pytest.approx(theirs[tag], rel=tolerance, abs=1e-7), (tag, ours[tag], theirs[tag])


def _rank(rank: str, environment: dict[str, str], folder: Path, script: Path, argv: list[str], alone: bool) -> None:
    with (folder / f"rank{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.setsid()
    assert "megatron.training" in sys.modules, "the server has not preloaded Megatron"
    os.environ |= environment | {"RANK": rank, "LOCAL_RANK": rank}
    from megatron_dft import launch, launch_bridge
    from megatron_dft.hosts import megatron_lm
    from megatron_dft.testing import cpu

    if alone:
        sys.argv = [str(script), *(argv if script == BRIDGE else cpu.complete_arguments(argv))]
        runpy.run_path(str(script), run_name="__main__")
    elif script == BRIDGE:
        launch_bridge.main([*argv, "--device", "cpu"])
    else:
        launch.main([str(script), *argv, "--device", "cpu"])
    if script != BRIDGE:
        megatron_lm.flush_tensorboard()  # Megatron may not write its last validation
