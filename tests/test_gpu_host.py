"""pretrain() of the megatron-core wheel on one GPU, through the launcher (`make gpu`)."""

import os
import subprocess
import sys

import pytest
import torch
from demo import read_curves
from ranks import ROOT, Rendezvous

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.host,
]

SCRIPT = ROOT / "tests" / "training_script.py"
FLAGS = (
    "--num-layers 2 --hidden-size 512 --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 31998 --make-vocab-size-divisible-by 128 "
    "--untie-embeddings-and-output-weights --lr 1e-4 --lr-decay-style constant --clip-grad 1.0 --eval-iters 2 "
    "--eval-interval 20 --log-interval 1 --tensorboard-log-interval 1 --num-workers 0 --train-iters 10 "
    "--global-batch-size 16 --micro-batch-size 4 --bf16 --calculate-per-token-loss --transformer-impl local "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion "
)
SCHEDULE = "--loss-type dft:start=3,ramp=4 --no-dft-compact-masked-tokens --no-check-for-nan-in-loss-and-grad "
# Without the launcher, Megatron calls make, and the wheel has no Makefile.
ALONE = f"""
import runpy, sys
from megatron.core.datasets import utils
utils.compile_helpers = lambda: None
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """curves(flags): TensorBoard curves of a run; without flags, of Megatron without the launcher. Runs are cached."""
    pytest.importorskip("megatron.training")
    pytest.importorskip("tensorboard")
    known = {}

    def of(flags="", **variables):
        if (flags, *variables.items()) in known:
            return known[flags, *variables.items()]
        folder, rendezvous = tmp_path_factory.mktemp("gpu"), Rendezvous()
        script = SCRIPT
        if not flags:
            script = folder / "alone.py"
            script.write_text(ALONE)
        command = [sys.executable, *(["-m", "megatron_dft.launch"] if flags else []), str(script)]
        command += [*FLAGS.split(), *flags.split(), "--tensorboard-dir", str(folder / "logs")]
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        environment = os.environ | rendezvous.environment | one | variables
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        known[flags, *variables.items()] = read_curves(folder / "logs")
        return known[flags, *variables.items()]

    return of


def test_nll_matches_megatron_on_gpu(curves):
    theirs, ours = curves(), curves("--loss-type nll")
    for tag in ("lm loss", "grad-norm"):
        assert ours[tag] == pytest.approx(theirs[tag], rel=2e-3), tag  # bf16, and different kernels
    assert len(theirs["lm loss"]) == 10


def test_dft_with_full_metrics_and_channels_trains_on_gpu(curves):
    found = curves("--loss-type dft --dft-metrics full --dft-channels a,b", CHANNELS="3")
    assert found["lm loss"][-1] < found["lm loss"][0]
    assert sum(found[f"dft/channel/{name}/tokens"][0] for name in ("other", "a", "b")) == found["dft/valid_tokens"][0]


def test_linear_fused_matches_full_logits_on_gpu(curves):
    full, fused = curves("--loss-type dft"), curves("--loss-type dft --dft-linear-fused")
    for tag in ("lm loss", "grad-norm", "dft/prob"):
        assert fused[tag] == pytest.approx(full[tag], rel=2e-3), tag


def test_schedule_in_full_iteration_cuda_graph_matches_eager(curves):
    eager = curves(SCHEDULE)
    graph = curves(f"{SCHEDULE} --cuda-graph-impl full_iteration --te-rng-tracker")
    for tag in ("lm loss", "dft/blend", "dft/loss", "dft/valid_tokens"):
        assert graph[tag] == pytest.approx(eager[tag], rel=2e-3), tag
