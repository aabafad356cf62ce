"""Fine-tune a small GPT on noisy chat data with NLL and with DFT through Megatron's own pretrain(), and compare them.

    make demo        (about 5 minutes on two cores)

1. `make_chat_data.py` writes clean and noisy conversations and a tokenizer.
2. A base model is trained on clean data at tensor-parallel size 2. Megatron saves its checkpoint.
3. Two fine-tunes on the noisy data start from that checkpoint. They differ in one flag: --loss-type nll or dft. Both
   are evaluated on clean conversations that no training set contains.
4. The first steps of the DFT run are repeated at tensor-parallel size 1 from the same checkpoint.

The demo prints a table and writes curves.png and summary.json to the output folder. Every number comes from the
TensorBoard files of Megatron.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from megatron_dft.utils import HelpFormatter

EXAMPLES = Path(__file__).resolve().parent
BASE_STEPS, TUNE_STEPS, EVAL_STEPS, PARITY_STEPS = 400, 120, 20, 8
TIE = 0.01  # the difference of the two accuracies varies by 0.7% between values of --seed

SEQ_LENGTH = "256"
MODEL = f"""
--num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 512 --seq-length {SEQ_LENGTH}
--max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--make-vocab-size-divisible-by 64
"""
DATA = """
--sft --tokenizer-type HuggingFaceTokenizer
--no-create-attention-mask-in-dataloader --calculate-per-token-loss
"""
TRAINING = """
--micro-batch-size 2 --global-batch-size 8 --lr-decay-style cosine --weight-decay 0.01 --clip-grad 1.0
--attention-dropout 0 --hidden-dropout 0 --eval-iters 11
--log-interval 1 --tensorboard-log-interval 1 --log-throughput
"""


class Demo:
    """Paths of the demo, and the start of each Megatron run."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out = out
        self.seed = seed
        self.data = out / "data"

    def train(self, name: str, *, tp: int, steps: int, flags: str, stop: int = 0) -> dict[str, list[float]]:
        """Run Megatron on `tp` CPU ranks for `steps`, or until step `stop`; show its progress, return its curves."""
        folder = self.out / name
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp)]
        command += ["-m", "megatron_dft.launch", str(EXAMPLES / "pretrain_gpt.py"), "--device", "cpu"]
        command += [*MODEL.split(), *DATA.split(), *TRAINING.split(), *flags.split()]
        data = {"--tokenizer-model": "tokenizer", "--valid-data-path": "valid.arrow"}
        command += [part for flag, file in data.items() for part in (flag, str(self.data / file))]
        command += ["--tensor-model-parallel-size", str(tp), "--train-iters", str(steps), "--seed", str(self.seed)]
        command += ["--tensorboard-dir", str(folder / "tensorboard"), "--data-cache-path", str(self.out / "cache")]
        command += ["--exit-interval", str(stop)] if stop else []
        shutil.rmtree(
            folder / "tensorboard", ignore_errors=True
        )  # Megatron would append to the files of an earlier demo
        folder.mkdir(parents=True, exist_ok=True)
        show(command, folder / "log.txt", name, stop or steps)
        return read_curves(folder / "tensorboard")


def tokenize(file: Path, tokenizer: Path) -> None:
    """Write the token file of a chat data file beside it."""
    command = [sys.executable, "-m", "megatron_dft.data", str(file), "--tokenizer", str(tokenizer)]
    subprocess.run([*command, "--seq-length", SEQ_LENGTH, "--out", str(file.with_suffix(".arrow"))], check=True)


def show(command: list[str], log: Path, name: str, steps: int) -> None:
    """Run a command, write its output to a file, show a progress bar with elapsed and remaining time."""
    from tqdm import tqdm

    with log.open("w") as file, tqdm(total=steps, desc=f"  {name:<8}", ncols=100) as bar:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if step := re.search(r"iteration +(\d+)/ +\d+ \|.*lm loss: (\S+)", line):
                bar.set_postfix_str(f"lm loss {float(step[2]):.4f}", refresh=False)
                bar.update(int(step[1]) - bar.n)
    if process.wait() != 0:
        sys.exit(f"{name} failed; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-30:]))


def read_curves(folder: Path) -> dict[str, list[float]]:
    """Every TensorBoard scalar of a run, in order of iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def final(curves: dict[str, list[float]]) -> dict[str, float]:
    """Metrics of the last evaluation on clean held-out data."""
    names = {"valid_lm_loss": "lm loss", "valid_prob": "dft/prob", "valid_accuracy": "dft/accuracy"}
    return {key: curves[f"{name} validation"][-1] for key, name in names.items()}


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs[: len(ours)], strict=True))


def plot(path: Path, base: dict[str, list[float]], runs: dict[str, dict[str, list[float]]]) -> None:
    """Plot the training and held-out curves of both fine-tunes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "lm loss": "NLL on the noisy training data (nats)",
        "dft/loss": "objective on the noisy training data (nats)",
        "lm loss validation": "NLL on clean held-out data (nats)",
        "dft/accuracy validation": "top-1 accuracy on clean held-out data",
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (tag, title) in zip(axes.flat, panels.items(), strict=True):
        for (name, curves), color in zip(runs.items(), ("tab:gray", "tab:blue"), strict=True):
            if tag.endswith("validation"):  # both start with the base model
                values = [base[tag][-1], *curves[tag][: TUNE_STEPS // EVAL_STEPS]]
                axis.plot(range(0, TUNE_STEPS + 1, EVAL_STEPS), values, label=name, color=color)
            else:
                axis.plot(range(1, TUNE_STEPS + 1), curves[tag], label=name, color=color)
        axis.set(title=title, xlabel="fine-tuning step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(title="--loss-type")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder")
    parser.add_argument(
        "--noise-kind",
        choices=("both", "swap", "slip"),
        default="both",
        help="kind of wrong replies (make_chat_data.py)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="Megatron's seed of weights and data order")
    args = parser.parse_args()
    demo = Demo(args.out.resolve(), args.seed)
    start = time.monotonic()

    make_data = [sys.executable, str(EXAMPLES / "make_chat_data.py"), str(demo.data), "--noise-kind", args.noise_kind]
    subprocess.run(make_data, check=True)
    for name in ("base_train", "noisy_train", "valid"):
        tokenize(demo.data / f"{name}.jsonl", demo.data / "tokenizer")
    checkpoint = demo.out / "base" / "checkpoint"
    print("training on 2 tensor-parallel ranks: base model on clean data, then nll and dft on noisy data")
    base = demo.train(
        "base",
        tp=2,
        steps=BASE_STEPS,
        flags=f"--loss-type nll --lr 4e-3 --lr-warmup-iters 20 --eval-interval {BASE_STEPS} --train-data-path "
        f"{demo.data / 'base_train.arrow'} --save {checkpoint} --save-interval {BASE_STEPS}",
    )
    tune = (
        f"--load {checkpoint} --finetune --lr 5e-4 --lr-warmup-iters 10 "
        f"--eval-interval {EVAL_STEPS} --train-data-path {demo.data / 'noisy_train.arrow'}"
    )
    runs = {
        name: demo.train(name, tp=2, steps=TUNE_STEPS, flags=f"{tune} --loss-type {name}") for name in ("nll", "dft")
    }
    single = demo.train("tp1", tp=1, steps=TUNE_STEPS, stop=PARITY_STEPS, flags=f"{tune} --loss-type dft")

    summary = {
        "noise_kind": args.noise_kind,
        "seed": args.seed,
        "base": final(base),
        "objectives": {
            name: {"steps": TUNE_STEPS, "train_lm_loss": curves["lm loss"], **final(curves)}
            for name, curves in runs.items()
        },
        "tp_parity": {
            "steps": PARITY_STEPS,
            "lm_loss_max_rel": largest_difference(single["lm loss"], runs["dft"]["lm loss"]),
            "grad_norm_max_rel": largest_difference(single["grad-norm"], runs["dft"]["grad-norm"]),
        },
        "seconds": round(time.monotonic() - start),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core", "megatron_dft")},
        },
    }
    summary["objectives"]["dft"]["train_dft_loss"] = runs["dft"]["dft/loss"]
    (demo.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(demo.out / "curves.png", base, runs)
    report(summary, demo.out)


def report(summary: dict, out: Path) -> None:
    """Print the final table."""
    print(f"\n{'clean held-out data':<22}{'NLL':>8}{'mean p':>9}{'accuracy':>10}")
    rows = {"base model": summary["base"], **{f"fine-tuned, {k}": v for k, v in summary["objectives"].items()}}
    for name, row in rows.items():
        print(f"{name:<22}{row['valid_lm_loss']:8.4f}{row['valid_prob']:9.4f}{row['valid_accuracy']:10.4f}")
    base, nll, dft = rows.values()
    print(
        f"\nChange of mean p on clean targets: {nll['valid_prob'] - base['valid_prob']:+.3f} with NLL, "
        f"{dft['valid_prob'] - base['valid_prob']:+.3f} with DFT. Accuracy of DFT minus NLL: "
        f"{dft['valid_accuracy'] - nll['valid_accuracy']:+.2%}."
    )
    if dft["valid_accuracy"] - nll["valid_accuracy"] < TIE:
        print(
            f"A difference below {TIE:.0%} is not a clear win. The wrong replies contradict each other, so NLL loses "
            "confidence but\nkeeps its top-1 prediction. DFT learns less from the correct replies."
        )
    parity = summary["tp_parity"]
    print(
        f"TP=1 compared with TP=2, {parity['steps']} steps: largest relative difference "
        f"{parity['lm_loss_max_rel']:.1e} in the loss, {parity['grad_norm_max_rel']:.1e} in the gradient norm"
    )
    shown = os.path.relpath(out)
    print(f"{summary['seconds']} s; {shown}/summary.json, {shown}/curves.png")


if __name__ == "__main__":
    main()
