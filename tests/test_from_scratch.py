"""A small GPT, trained from scratch on token files and fine-tuned with nll and dft through pretrain()."""

import subprocess
import sys

import pytest

pytest.importorskip("megatron.training")

from demo import largest_difference, read_curves, show
from host_runs import EXAMPLE, ROOT

BASE_STEPS, STEPS, PARITY_STEPS = 24, 12, 2
ARGUMENTS = """
--num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 512 --seq-length 256
--max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--make-vocab-size-divisible-by 64 --sft --tokenizer-type HuggingFaceTokenizer --calculate-per-token-loss
--no-create-attention-mask-in-dataloader --micro-batch-size 2 --global-batch-size 8 --lr-decay-style cosine
--weight-decay 0.01 --clip-grad 1.0 --attention-dropout 0 --hidden-dropout 0 --eval-iters 1
--log-interval 1 --tensorboard-log-interval 1
"""


class FromScratch:
    """Token files of `make_chat_data.py`, and runs of examples/pretrain_gpt.py on them."""

    def __init__(self, folder):
        self.folder, self.data = folder, folder / "data"
        subprocess.run([sys.executable, ROOT / "examples" / "make_chat_data.py", self.data], check=True)
        for name in ("base_train", "noisy_train", "valid"):
            command = [sys.executable, "-m", "megatron_dft.data", self.data / f"{name}.jsonl", "--seq-length", "256"]
            command += ["--tokenizer", self.data / "tokenizer", "--out", self.data / f"{name}.arrow"]
            subprocess.run(command, check=True)

    def train(self, name, flags, *, data="noisy_train", tp=2, steps=STEPS):
        out = self.folder / name
        out.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp)]
        command += ["-m", "megatron_dft.launch", str(EXAMPLE), "--device", "cpu", *ARGUMENTS.split(), *flags.split()]
        paths = {
            "--tokenizer-model": "tokenizer",
            "--valid-data-path": "valid.arrow",
            "--train-data-path": f"{data}.arrow",
        }
        command += [part for flag, file in paths.items() for part in (flag, str(self.data / file))]
        command += ["--tensor-model-parallel-size", str(tp), "--train-iters", str(steps), "--eval-interval", str(steps)]
        command += ["--tensorboard-dir", str(out / "tensorboard"), "--data-cache-path", str(self.folder / "cache")]
        show(command, out / "log.txt", name, steps)
        return read_curves(out / "tensorboard")


@pytest.mark.slow
@pytest.mark.host
def test_fine_tuning_from_a_checkpoint_agrees_under_tp_and_repeats_exactly(tmp_path):
    runs = FromScratch(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    saving = f"--loss-type nll --lr 4e-3 --lr-warmup-iters 20 --save {checkpoint} --save-interval {BASE_STEPS}"
    base = runs.train("base", saving, data="base_train", steps=BASE_STEPS)
    assert base["lm loss"][-1] < base["lm loss"][0]

    tune = f"--load {checkpoint} --finetune --lr 5e-4 --lr-warmup-iters 2 --loss-type"
    nll, dft = (runs.train(name, f"{tune} {name}") for name in ("nll", "dft"))
    assert len(nll["lm loss"]) == len(dft["dft/loss"]) == STEPS
    assert nll["lm loss"][0] == dft["lm loss"][0] < base["lm loss"][0]  # from the same checkpoint
    assert nll["lm loss validation"] != dft["lm loss validation"]

    again = runs.train("again", f"{tune} dft")
    assert all(again[tag] == dft[tag] for tag in ("lm loss", "dft/loss", "grad-norm"))
    one = runs.train("one", f"{tune} dft --exit-interval {PARITY_STEPS}", tp=1)
    assert all(largest_difference(one[tag], dft[tag]) < 1e-4 for tag in ("lm loss", "dft/loss", "grad-norm"))
