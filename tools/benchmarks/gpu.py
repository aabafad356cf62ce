"""Run all checks of one GPU within a time budget: tests, benchmarks, a real pretrain().

    python tools/benchmarks/gpu.py [--budget 480] [--out runs/gpu] [--only tests logits ...]

Nothing is downloaded. Each part is a process with a time limit. A failed or stopped part does not stop the others. The
output of a part goes to OUT/PART.txt and OUT/*.csv, and the tool prints one line per part. The exit status is 1 if a
part fails or has no time left. PYTHONPATH may name a folder of unpacked wheels (megatron-core, liger-kernel, ...).
Unpack Transformer Engine without its CUDA libraries into .baselines/ only: on PYTHONPATH it breaks Megatron's imports.

The part "checkout" trains with the pretrain_gpt.py of a Megatron-LM checkout and Transformer Engine, on packed data. It
requires the variable MEGATRON_LM and the packages in CHECKOUT_PACKAGES; without them it is not run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the package may not be installed
from megatron_dft.utils import HelpFormatter  # noqa: E402

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
KERNELS = ["tests/test_triton.py", "tests/test_compile.py", "tests/test_gpu.py"]
HOST = "tests/test_gpu_host.py"
INTERRUPT_SECONDS = 10.0  # for pytest to report the failures so far
CHECKOUT_PACKAGES = ["transformer_engine.pytorch", "transformers", "datasets", "pybind11", "tensorboard"]


def checkout_unavailable() -> str:
    """Why the pretrain_gpt.py of a checkout cannot run with Transformer Engine; "" if it can."""
    if not (Path(os.environ.get("MEGATRON_LM", "/dev/null")) / "pretrain_gpt.py").is_file():
        return "MEGATRON_LM does not name a Megatron-LM checkout"
    command = [sys.executable, "-c", f"import {', '.join(CHECKOUT_PACKAGES)}"]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    return (probe.stderr.strip() or f"exit status {probe.returncode}").splitlines()[-1] if probe.returncode else ""


class Part(NamedTuple):
    """Arguments of the Python interpreter, a time limit in seconds, and a function that tells why it cannot run."""

    command: list[str]
    limit: float
    unavailable: Callable[[], str] = lambda: ""


def parts(out: Path) -> dict[str, Part]:
    """Parts in the order in which they run, the most informative first. Their limits add up to more than the budget."""
    spread = ["--numprocesses", "5"] if importlib.util.find_spec("xdist") else []
    timeout = ["--timeout", "100"] if importlib.util.find_spec("pytest_timeout") else []
    pytest = [*PYTEST, *timeout]
    benchmark, layouts = "tools/benchmarks/benchmark_loss.py", "tools/benchmarks/benchmark_layouts.py"
    return {
        "tests": Part([*pytest, *spread, *KERNELS], 150),
        "doctor": Part(["-m", "megatron_dft.doctor"], 60),
        "heads": Part([benchmark, "--vocab", "--repetitions", "5", "--out", str(out / "heads.csv")], 200),
        "pretrain": Part([*pytest, *spread, HOST, "-k", "not checkout"], 150),
        "logits": Part([benchmark, "--hidden", "--repetitions", "10", "--out", str(out / "logits.csv")], 120),
        "layouts": Part(
            [
                *(layouts, "--hidden", "1024", "--vocab", "128256", "--seq-length", "1024", "--micro-batch", "4"),
                *("--global-batch", "16", "--out", str(out / "layouts.csv")),
            ],
            90,
        ),
        "checkout": Part([*pytest, HOST, "-k", "checkout"], 300, checkout_unavailable),
    }


def run(name: str, part: Part, out: Path, limit: float) -> tuple[bool, str]:
    """Run a part; return whether it passed, and its line of the report."""
    begin = time.monotonic()
    for old in out.glob(f"{name}*.csv"):  # benchmark_layouts.py would skip what it has measured
        old.unlink()
    paths = [str(ROOT), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    log = out / f"{name}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        code: int | str = f"stopped after {limit:.0f} s"
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_SECONDS)
        finally:  # also after Ctrl-C
            with contextlib.suppress(ProcessLookupError):  # no process of the group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last_line = lines[-1] if lines else ""
    if "pytest" in part.command:
        results = [line for line in lines[-20:] if re.search(r"\d+ (passed|failed|skipped|error)", line)]
        last_line = results[-1] if results else last_line
        if code == 0 and not re.search(r"\d+ passed", last_line):
            code = "nothing was tested"
    seconds = time.monotonic() - begin
    return code == 0, f"{'ok' if code == 0 else f'FAILED ({code})'}, {seconds:.0f} s: {last_line[:110]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, help="time limit of all parts together, seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="FOLDER", help="output")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run (default: all)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    known = parts(args.out.resolve())
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"--only: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("expected a GPU, got none: torch.cuda.is_available() is False")
        return 1
    deadline, passed = time.monotonic() + args.budget, True
    report: list[str] = []
    for name in args.only or known:
        reason = known[name].unavailable()
        left = deadline - time.monotonic()
        if reason:
            good, line = True, f"not run: {reason}"
        elif left > 10.0:
            good, line = run(name, known[name], args.out, min(known[name].limit, left))
        else:
            good, line = False, "not run: no time left"
        passed &= good
        report.append(f"{name:9} {line}")
        print(report[-1], flush=True)
    (args.out / "report.txt").write_text("\n".join(report) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
