"""pretrain() of the megatron-core wheel and of a Megatron-LM checkout on one GPU, through the launcher (`make gpu`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo import read_curves
from ranks import ROOT, Rendezvous

sys.path.insert(0, str(ROOT / "tools" / "benchmarks"))
from gpu import checkout_unavailable

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
    "--global-batch-size 16 --micro-batch-size 4 --calculate-per-token-loss --bf16 --transformer-impl local "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion "
)
SCHEDULE = "--loss-type dft:start=3,ramp=4 --no-dft-compact-masked-tokens --no-check-for-nan-in-loss-and-grad "
# Added to those of packed conversations (chat.sft).
CHECKOUT_FLAGS = (
    "--bf16 --transformer-impl transformer_engine --hidden-size 512 --num-attention-heads 8 --train-iters 2 --lr 1e-4 "
    "--untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8192 --no-gradient-accumulation-fusion "
)
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
        key = flags, *variables.items()
        if key in known:
            return known[key]
        folder = tmp_path_factory.mktemp("gpu")
        script = SCRIPT
        if not flags:
            script = folder / "alone.py"
            script.write_text(ALONE)
        known[key] = train(script, FLAGS, flags, folder, **variables)
        return known[key]

    return of


@pytest.fixture(scope="module")
def checkout_curves(tmp_path_factory, request):
    """The same for pretrain_gpt.py of a checkout with Transformer Engine, on packed conversations."""
    if reason := checkout_unavailable():
        pytest.skip(reason)
    base, known = request.getfixturevalue("chat").sft + CHECKOUT_FLAGS, {}

    def of(flags=""):
        script, folder = Path(os.environ["MEGATRON_LM"]) / "pretrain_gpt.py", tmp_path_factory.mktemp("checkout")
        if flags not in known:
            known[flags] = train(script, base, flags, folder, HF_HUB_OFFLINE="1")
        return known[flags]

    return of


def train(script, base, flags, folder, **variables):
    """TensorBoard curves of a script on one rank, through the launcher if there are flags of an objective."""
    command = [sys.executable, *(["-m", "megatron_dft.launch"] if flags else []), str(script)]
    command += [*base.split(), *flags.split(), "--tensorboard-dir", str(folder / "logs")]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    rendezvous = Rendezvous()
    environment = os.environ | rendezvous.environment | one | variables
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "full_iteration" not in flags or "CUDA graph capture done for training" in run.stdout + run.stderr
    return read_curves(folder / "logs")


def test_nll_matches_megatron_on_gpu(curves):
    theirs, ours = curves(), curves("--loss-type nll")
    for tag in ("lm loss", "grad-norm"):
        assert ours[tag] == pytest.approx(theirs[tag], rel=2e-3), tag  # bf16, and different kernels
    assert len(theirs["lm loss"]) == 10


def test_example_trains_on_gpu_with_and_without_launcher(tmp_path):
    """The wheel has no Makefile, and Megatron would call make."""
    base = FLAGS.replace("--train-iters 10", "--train-iters 2") + "--mock-data "
    theirs, ours = (
        train(ROOT / "examples" / "pretrain_gpt.py", base, flags, tmp_path / str(len(flags)))
        for flags in ("", "--loss-type nll")
    )
    assert ours["lm loss"] == pytest.approx(theirs["lm loss"], rel=2e-3)


def test_dft_with_full_metrics_and_channels_trains_on_gpu(curves):
    found = curves("--loss-type dft --dft-metrics full --dft-channels a,b", CHANNELS="3")
    assert found["lm loss"][-1] < found["lm loss"][0]
    assert sum(found[f"dft/channel/{name}/tokens"][0] for name in ("other", "a", "b")) == found["dft/valid_tokens"][0]


@pytest.mark.parametrize("chunks", ["", "--dft-token-chunk 500"], ids=["vocabulary", "tokens"])
def test_linear_fused_matches_full_logits_on_gpu(curves, chunks):
    full, fused = curves("--loss-type dft"), curves(f"--loss-type dft --dft-linear-fused {chunks}")
    for tag in ("lm loss", "grad-norm", "dft/prob"):
        assert fused[tag] == pytest.approx(full[tag], rel=2e-3), tag


def test_schedule_in_full_iteration_cuda_graph_matches_eager(curves):
    eager = curves(SCHEDULE)
    graph = curves(f"{SCHEDULE} --cuda-graph-impl full_iteration --te-rng-tracker")
    for tag in ("lm loss", "dft/blend", "dft/loss", "dft/valid_tokens"):
        assert graph[tag] == pytest.approx(eager[tag], rel=2e-3), tag


def test_nll_matches_pretrain_gpt_of_checkout_on_packed_data(checkout_curves):
    theirs, ours = checkout_curves(), checkout_curves("--loss-type nll")
    for tag in ("lm loss", "grad-norm"):
        assert ours[tag] == pytest.approx(theirs[tag], rel=5e-3), tag  # bf16: 2^-8
    assert len(theirs["lm loss"]) == 2


@pytest.mark.parametrize("chunks", ["--dft-vocab-chunk 2048", "--dft-token-chunk 100"])
def test_linear_fused_matches_full_logits_in_checkout_on_packed_data(checkout_curves, chunks):
    plain = checkout_curves("--loss-type dft --no-dft-compact-masked-tokens")
    fused = checkout_curves(f"--loss-type dft --dft-compact-masked-tokens --dft-linear-fused {chunks}")
    for tag in ("lm loss", "grad-norm", "dft/loss", "dft/prob", "dft/valid_tokens"):
        assert fused[tag] == pytest.approx(plain[tag], rel=5e-3), tag  # approx() is false for NaN
    assert 0 < plain["dft/valid_tokens"][0] < 6 * 256  # tokens of an iteration
