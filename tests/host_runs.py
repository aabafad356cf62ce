"""Run training scripts through Megatron's own pretrain() on real CPU ranks, a second or two each.

Ranks are forked (`ranks`) and otherwise start as torchrun starts them: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
in the environment, and the store of an agent.
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
BRIDGE = ROOT / "tests" / "bridge_recipe.py"  # which has none of its own: --recipe bridge_recipe:tiny
UNTIMED = re.compile("lm loss|dft |channel/|grad-norm|learning-rate|mtp|valid tokens(?! per)")


def megatron_has(path: str, text: str) -> bool:
    """Whether a file of the installed Megatron, as training/argument_utils.py, has this text; nothing is imported."""
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec("megatron") and importlib.util.find_spec(f"megatron.{package}")
    file = spec and spec.origin and Path(spec.origin).parent / rest
    return bool(file and file.is_file() and text in file.read_text())


# Its configuration says which model pretrain() builds, so that it can be a HybridModel: from 0.19 on.
HAS_HYBRID = megatron_has("training/argument_utils.py", "def gpt_config_from_args")


class Host:
    """Starts runs that share a folder for logs, data and checkpoints; remembers what each run has logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple, dict[str, list[float]]] = {}

    def begin(self, flags: str, *, ranks: int = 1, script: Path = SCRIPT, alone: bool = False, **environment) -> Run:
        """Start the ranks; `alone` leaves the launcher out."""
        folder = self.folder / f"run{len(list(self.folder.glob('run*')))}"
        folder.mkdir()
        logs = f"logger.tensorboard_dir={folder}" if script == BRIDGE else f"--tensorboard-dir={folder}"
        return Run(folder, script, [*flags.split(), logs], ranks, alone, environment)

    def start(self, flags: str, **kwargs) -> tuple[int, str]:
        """Exit code and output of a whole run."""
        run = self.begin(flags, **kwargs)
        return run.wait(), run.output()

    def curves(self, flags: str, **kwargs) -> dict[str, list[float]]:
        """What a run wrote to TensorBoard, but for times; each distinct run is started once."""
        key = (flags, *kwargs.items())
        if key not in self.known:
            run = self.begin(flags, **kwargs)
            assert run.wait() == 0, run.output()[-6000:]
            self.known[key] = run.curves()
        return self.known[key]


class Run:
    """The ranks of one run, and what it writes."""

    def __init__(
        self, folder: Path, script: Path, words: list[str], ranks: int, alone: bool, environment: dict[str, str]
    ) -> None:
        self.folder = folder
        self.rendezvous = Rendezvous()
        size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment = environment | size | self.rendezvous.environment
        self.processes = [
            FORK.Process(target=_rank, args=(str(rank), environment, folder, script, words, alone))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120.0) -> int:
        """The exit code, 0 or that of the first rank that failed; the others are killed soon after."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in self.processes):
                time.sleep(0.02)
                if any(process.exitcode for process in self.processes):
                    deadline = min(deadline, time.monotonic() + 5.0)
                if time.monotonic() > deadline:
                    break
        finally:  # also when the test is timed out, and what killed ranks have left behind
            self.kill()
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def kill(self) -> None:
        """As a machine that loses power would: SIGKILL, all at once."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank*.txt")))

    def curves(self) -> dict[str, list[float]]:
        return {tag: values for tag, values in read_curves(self.folder).items() if UNTIMED.search(tag)}


def agree(ours: dict[str, list[float]], theirs: dict[str, list[float]], tolerance: float = 1e-5) -> None:
    """Fails unless two runs logged the same."""
    assert set(ours) == set(theirs)
    for tag in theirs:
        assert ours[tag] == pytest.approx(theirs[tag], rel=tolerance, abs=1e-7), (tag, ours[tag], theirs[tag])


def _rank(rank: str, environment: dict[str, str], folder: Path, script: Path, words: list[str], alone: bool) -> None:
    with (folder / f"rank{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.setsid()
    assert "megatron.training" in sys.modules, "the server has not preloaded Megatron"
    os.environ |= environment | {"RANK": rank, "LOCAL_RANK": rank}
    from megatron_dft import bridge, launch
    from megatron_dft.hosts import cpu, megatron_lm

    if alone:
        sys.argv = [str(script), *(words if script == BRIDGE else cpu.complete_arguments(words))]
        runpy.run_path(str(script), run_name="__main__")
    elif script == BRIDGE:
        bridge.main([*words, "--device", "cpu"])
    else:
        launch.main([str(script), *words, "--device", "cpu"])
    if script != BRIDGE:
        megatron_lm.flush_tensorboard()  # Megatron alone may lose its last validation
