"""The launch scripts of examples/launch, started as a user starts them.

The script that they run is tests/training_script.py behind a door: Megatron's first checkpoint starts a process that
imports the script once more, which costs as much as the start itself unless there is nothing to import.
"""

import re
import sys
from pathlib import Path

from demo import read_curves
from host_flags import MODEL, MODELS, PER_TOKEN
from host_runs import ROOT, UNTIMED

LAUNCH = ROOT / "examples" / "launch"
STEPS, SAVED, DEATH = 8, 4, 6
RUN = (
    f"{MODEL} {MODELS['dense']} {PER_TOKEN} --train-iters {STEPS} --save-interval {SAVED} --lr 1e-2 "
    "--global-batch-size 8 --micro-batch-size 2 --loss-type dft "
)
DOOR = f"""
if __name__ == "__main__":
    import os, sys
    if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.environ["DIE_IN_ITERATION"] = os.environ.get("DIE_ONCE_IN_ITERATION", "")
    sys.path.insert(0, {str(ROOT / "tests")!r})
    import training_script
    training_script.main()
"""


def script_in(folder: Path) -> Path:
    """The training script; DIE_ONCE_IN_ITERATION kills its rank 0, but not after a restart."""
    script = folder / "script.py"
    script.write_text(DOOR)
    return script


def steps_in(log: Path) -> list[int]:
    """The iterations that a log reports, in order."""
    return [int(step) for step in re.findall(rf"iteration +(\d+)/ +{STEPS}", log.read_text(errors="replace"))]


def curves_in(folder: Path) -> dict[str, list[float]]:
    return {tag: values for tag, values in read_curves(folder).items() if UNTIMED.search(tag)}


def environment(**more: str) -> dict[str, str]:
    return {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
