"""Every script of a Megatron-LM checkout that calls pretrain(), with --loss-type dft, on one CPU rank.

Each trains with the objective, or is rejected with an error of megatron_dft. A script that fails for a missing package,
data set or GPU is skipped with the reason. It must then fail with the same error without --loss-type.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_runs import ROOT

pytestmark = pytest.mark.host
if "MEGATRON_LM" not in os.environ:
    pytest.skip("MEGATRON_LM does not name a Megatron-LM checkout", allow_module_level=True)
CHECKOUT = Path(os.environ["MEGATRON_LM"])
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--normalization RMSNorm --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --train-iters 2 --lr 1e-2 "
    "--lr-decay-style constant --global-batch-size 2 --micro-batch-size 1 --eval-iters 1 --eval-interval 100 "
    "--log-interval 1 --num-workers 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 120 "
)
HYBRID = FLAGS.replace("--num-layers 2", "--hybrid-layer-pattern *-*- --spec hybrid_stack stack")
SPECIAL = {  # flags of scripts that need others
    "pretrain_hybrid.py": HYBRID,
    "pretrain_mamba.py": HYBRID,
    "megatron/elastification/pretrain_hybrid_flex.py": HYBRID,
    "examples/bert/pretrain_bert.py": FLAGS + "--spec local --bert-no-binary-head ",
    "examples/t5/pretrain_t5.py": FLAGS + "--encoder-seq-length 64 --decoder-seq-length 64 --vocab-extra-ids 100 ",
    "pretrain_vlm.py": FLAGS + "--ckpt-format torch --img-h 28 --img-w 28 --patch-dim 14 --dataloader-seq-length 64 ",
}


def calls_pretrain(path):
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError):
        return False
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any("pretrain" in (getattr(f, "id", None), getattr(f, "attr", None)) for f in calls)


SCRIPTS = sorted(
    str(path.relative_to(CHECKOUT))
    for path in CHECKOUT.rglob("*.py")
    if "tests" not in path.parts and path.name != "training.py" and calls_pretrain(path)
)


def run(script, flags):
    """Exit code and output of one rank, with the environment of torchrun."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    path = os.pathsep.join([str(CHECKOUT), str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-m", "megatron_dft.launch", "--device", "cpu", str(CHECKOUT / script), *flags.split()]
    environment = {**os.environ, **rank, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    return done.returncode, done.stdout + done.stderr


def last_error(output):
    lines = [line.strip().removeprefix("[rank0]: ") for line in output.strip().splitlines()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("megatron_dft.launch: ")]
    return errors[-1] if errors else lines[-1]


def test_known_pretrain_scripts_are_found():
    assert {"pretrain_gpt.py", "pretrain_hybrid.py", "examples/mimo/pretrain_mimo.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_with_objective_or_is_rejected(script):
    flags = SPECIAL.get(script, FLAGS)
    code, output = run(script, f"{flags} --loss-type dft")
    if code == 0:
        assert "dft/loss: " in output and "objective dft replaces the cross entropy" in output, output[-3000:]
        return
    error = last_error(output)
    if "--loss-type" in error or "megatron_dft" in error or "install: " in error or "loss_func: " in error:
        return  # rejected
    alone, theirs = run(script, flags)
    assert alone != 0 and last_error(theirs) == error, f"only with --loss-type: {error}\n{output[-3000:]}"
    pytest.skip(f"fails without --loss-type: {error[:150]}")
