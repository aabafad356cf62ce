"""Helpers for runs of the launch scripts of examples/launch.

They run `SCRIPT`, which imports tests/training_script.py only in `__main__`. Megatron's first checkpoint starts a
process that imports the script again; this import costs as much as the start of the run.
"""

import re
import sys
from pathlib import Path

from demo import read_curves
from host_flags import MODEL, MODELS, PER_TOKEN
from host_runs import ROOT, UNTIMED

LAUNCH = ROOT / "examples" / "launch"
STEPS, SAVED, KILLED = 8, 4, 6
RUN = (
    f"{MODEL} {MODELS['dense']} {PER_TOKEN} --train-iters {STEPS} --save-interval {SAVED} --lr 1e-2 "
    "--global-batch-size 8 --micro-batch-size 2 --loss-type dft "
)
SCRIPT = f"""
if __name__ == "__main__":
    import os, sys
    if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.environ["KILL_IN_ITERATION"] = os.environ.get("KILL_ONCE_IN_ITERATION", "")
    sys.path.insert(0, {str(ROOT / "tests")!r})
    import training_script
    training_script.main()
"""


def script_in(folder: Path) -> Path:
    """Write the training script. KILL_ONCE_IN_ITERATION kills its rank 0 before the first restart only."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return script


def steps_in(log: Path) -> list[int]:
    """The iterations in a log, in order."""
    return [int(step) for step in re.findall(rf"iteration +(\d+)/ +{STEPS}", log.read_text(errors="replace"))]


def curves_in(folder: Path) -> dict[str, list[float]]:
    return {tag: values for tag, values in read_curves(folder).items() if UNTIMED.search(tag)}


def environment(**more: str) -> dict[str, str]:
    return {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
