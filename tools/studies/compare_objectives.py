"""Compare the learning dynamics of objectives: fine-tune one checkpoint with each of them on the same batches.

    python tools/studies/compare_objectives.py              8 seeds; numbers, page and figures in runs/dynamics
    python tools/studies/compare_objectives.py --docs       write the committed docs/learning-dynamics.md
    python tools/studies/compare_objectives.py --quick      seconds instead of minutes: small, two seeds, no evidence
    python tools/studies/compare_objectives.py --from FILE  page and figures from the numbers of an earlier run

The data are a table of facts. A question is (subject, phrasing). Several phrasings ask for the same relation, and each
fact (subject, relation) has three different answers, A, B and C. In pre-training, the base model, a small MLP, sees
every question with one of its answers: mostly A, less often B, rarely C, sometimes a random one. The shares of A and B
differ between questions. Fine-tuning starts from this checkpoint and has one answer per question as the target:

    A  strong prior    mean p of the targets above 0.5 under the base model
    B  middle prior    0.1 to 0.5
    C  weak prior      below 0.1             measured for each seed; a value outside of its range is an error

Noisy targets: a share of the questions has a fixed wrong answer in the training set. Held-out questions are
subject-phrasing pairs that are not in the training set; their targets are correct. Other phrasings of the same fact
generalize to them; memorized wrong answers harm them.

For a token with target probability p, gate w and collision probability C, the gradient with respect to its logits is
w (softmax - onehot). Its norm is

    |g| = w sqrt(sum_{i != y} p_i^2 + (1-p)^2) = w sqrt(1 - 2p + C)                exact, from `vocab_stats`

The share of the gradient by p and the scatter plot use this norm and need no backward pass. Gradient variance is

    mean_k |g_k - g|^2 / |g|^2

where g_k is the gradient of the mean loss of a mini-batch with respect to all parameters, and g that of the whole
training set, at the same weights. Batches are drawn with replacement, as in training. At 1, the noise of one batch is
as large as the signal. (The gate of cayley depends on its batch, so g is not exactly the mean of g_k.)

All objectives of a seed share weights, batches, AdamW and learning rate. nll and dft also run at other learning rates,
so a verdict does not depend on one rate. Verdicts come from paired differences over seeds, by the rule on the page.
Further objectives run at the same rate, for the final accuracy alone. The reference model of asft, iw and psft is the
base model.
Cost: under ten minutes on two cores.

Not covered: language, long training, large models, learning-rate warm-up and decay. The study shows mechanisms, not the
gain of an objective on a benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from dynamics_report import (
    DOCS,
    FIGURES,
    PRIORS,
    ROOT,
    SWEPT,
    TARGETS,
    Json,
    Places,
    accuracy_table,
    mean_error,
    page,
    round_all,
    verdict_table,
    verdicts,
)
from torch import Tensor, nn

from megatron_dft import __version__
from megatron_dft.labels import split_reference, with_reference
from megatron_dft.metrics import BINS, bin_of
from megatron_dft.ops.objectives import Objective, Scheduled, loss_and_gate, parse_objective
from megatron_dft.ops.stats import REFERENCE, TokenStats
from megatron_dft.ops.vocab_parallel import vocab_parallel_dft_loss, vocab_stats
from megatron_dft.utils import HelpFormatter

sys.path.append(str(ROOT / "tools" / "benchmarks"))
from measure import conditions


@dataclass(frozen=True)
class Settings:
    """All settings of a run; the results also depend on versions and device."""

    objectives: tuple[str, ...] = ("nll", "dft", "prob", "tsallis:q=0.5", "deft", "dft:start=66,ramp=66")
    further: tuple[str, ...] = ("eaft", "trsft", "talr", "asft", "iw", "psft")
    seeds: int = 8
    words: int = 32  # number of subjects, of phrasings, and of answers
    relations: int = 4
    width: int = 64
    base_steps: int = 1500
    base_batch: int = 256
    base_rate: float = 2e-3  # decays linearly to 0
    share_rare: float = 0.03  # of answer C in pre-training
    share_random: float = 0.1
    steps: int = 200
    batch: int = 128
    rate: float = 1e-3
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)  # of the learning rate, for SWEPT
    weight_decay: float = 0.01
    noise: float = 0.4  # share of noisy targets replaced by a random answer, which can be the correct one
    held_out: float = 0.2
    every: int = 10  # steps between evaluations
    variance_batches: int = 32
    scattered: int = 150  # tokens per prior in the scatter plot


QUICK: Json = {"seeds": 2, "words": 16, "relations": 2, "base_steps": 500, "steps": 40, "factors": (1.0, 3.0)}
QUICK |= {"objectives": ("nll", "dft", "prob", "deft"), "further": ("trsft", "psft")}
QUICK |= {"variance_batches": 4, "scattered": 50}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    places = DOCS if args.docs else Places(*(args.out / name for name in ("results.json", "report.md", "figures")))
    for folder in {places.numbers.parent, places.page.parent, places.figures, args.out}:
        folder.mkdir(parents=True, exist_ok=True)
    source = args.source
    results = json.loads(source.read_text()) if source else run_jobs(settings_of(args), args.out, args.processes)
    write(results, places.numbers)
    results = json.loads(places.numbers.read_text())
    for name, draw in FIGURES.items():
        draw(results, places.figures / name)
    places.page.write_text(page(results, places))
    print("\n" + accuracy_table(results) + "\n" + verdict_table(results) + f"\n{places.page}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--objectives",
        help="comma-separated (default: nll,dft,prob,tsallis:q=0.5,deft, a schedule; with --quick nll,dft,prob,deft)",
    )
    parser.add_argument("--seeds", type=int, help="number of seeds, at least 2 (default: 8; with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="few facts and steps, to test the tool")
    parser.add_argument(
        "--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes with one thread each"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/dynamics"), help="output folder")
    parser.add_argument("--docs", action="store_true", help="write the committed page, figures and numbers")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="JSON file of an earlier run to report; trains nothing"
    )
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> Settings:
    chosen: Json = dict(QUICK) if args.quick else {}
    if args.objectives is not None:
        chosen["objectives"] = split_objectives(args.objectives)
    if args.seeds is not None:
        chosen["seeds"] = args.seeds
    settings = Settings(**chosen)
    if settings.seeds < 2:
        raise SystemExit(f"expected --seeds of 2 or more, for an error over seeds; got {settings.seeds}")
    return settings


def split_objectives(text: str) -> tuple[str, ...]:
    """Split at the commas that do not belong to the parameters of an objective.

    Raises:
        ValueError: for an unknown objective.
    """
    found: list[str] = []
    for piece in filter(None, text.split(",")):
        if found and "=" in piece and ":" not in piece:
            found[-1] += "," + piece
        else:
            found.append(piece)
    for specification in found:
        parse_objective(specification)
    return tuple(dict.fromkeys(found))


# ---- Facts, base model and tasks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The facts of one seed; N = words^2 questions."""

    questions: Tensor  # [N, 2] subject and phrasing
    answers: Tensor  # [3, N] answers A, B and C
    share: Tensor  # [4, N] shares of A, B, C and a random answer in pre-training
    given: Tensor  # [3, N] noisy targets for A, B and C
    train: Tensor  # [n] questions of the training set
    held_out: Tensor  # [N - n]


def make_world(settings: Settings, seed: int) -> World:
    generator = torch.Generator().manual_seed(1000 + seed)
    words, relations = settings.words, settings.relations
    questions = torch.cartesian_prod(torch.arange(words), torch.arange(words))
    subject, phrasing = questions.T
    # Shifts of one permutation per relation: the three answers of a fact always differ.
    permutation = torch.stack([torch.randperm(words, generator=generator) for _ in range(relations)])
    shift = torch.stack([torch.randperm(words, generator=generator)[:3] for _ in range(relations)])
    relation = phrasing % relations
    answers = torch.stack([permutation[relation, (subject + shift[relation, i]) % words] for i in range(3)])
    taste = torch.randn(2, words, generator=generator)
    known = 1.0 - settings.share_rare - settings.share_random
    often = known * torch.sigmoid(0.9 + taste[0, subject] + taste[1, phrasing])
    rest = torch.tensor([[settings.share_rare], [settings.share_random]]).expand(2, len(often))
    share = torch.cat([torch.stack([often, known - often]), rest])
    wrong = torch.rand(len(often), generator=generator) < settings.noise
    other = torch.randint(words, (len(often),), generator=generator)
    order = torch.randperm(len(often), generator=generator)
    cut = round((1.0 - settings.held_out) * len(often))
    return World(questions, answers, share, torch.where(wrong, other, answers), order[:cut], order[cut:])


class Model(nn.Module):
    """Questions [n, 2] -> logits [n, words]."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = words
        self.embedding = nn.Embedding(2 * words, width)
        hidden = 2 * width
        layers = [nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, words)]
        self.layers = nn.Sequential(*layers)

    def forward(self, questions: Tensor) -> Tensor:
        return self.layers(self.embedding(questions + torch.tensor([0, self.words])).flatten(1))


def pretrain(settings: Settings, world: World, seed: int) -> Model:
    """Train the base model with cross entropy on answers drawn by `share`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(2000 + seed)
    model = Model(settings.words, settings.width)
    optimizer = torch.optim.AdamW(model.parameters(), settings.base_rate, weight_decay=settings.weight_decay)
    for step in range(settings.base_steps):
        optimizer.param_groups[0]["lr"] = settings.base_rate * (1.0 - step / settings.base_steps)
        rows = torch.randint(len(world.questions), (settings.base_batch,), generator=generator)
        random = torch.randint(settings.words, (1, len(rows)), generator=generator)
        choice = torch.multinomial(world.share[:, rows].T, 1, generator=generator).T
        targets = torch.cat([world.answers[:, rows], random]).gather(0, choice)[0]
        update(model, optimizer, world.questions[rows], targets, parse_objective("nll"))
    return model


def update(
    model: Model, optimizer: torch.optim.Optimizer, questions: Tensor, targets: Tensor, objective: Objective
) -> None:
    """One step on the mean loss of a batch."""
    optimizer.zero_grad()
    vocab_parallel_dft_loss(model(questions), targets, objective=objective).mean().backward()
    optimizer.step()


@dataclass(frozen=True)
class Task:
    """One fine-tuning task of a seed, with the same batches for every objective."""

    train: tuple[Tensor, Tensor]  # questions [n, 2], clean or noisy targets [n]
    held_out: tuple[Tensor, Tensor]  # questions, clean targets
    batches: Tensor  # [steps, batch] rows of the training set

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.train[0][rows], self.train[1][rows]


def make_task(settings: Settings, world: World, seed: int, prior: str, targets: str) -> Task:
    i = list(PRIORS).index(prior)
    given = (world.given if targets == "noisy" else world.answers)[i]
    generator = torch.Generator().manual_seed(3000 + seed)
    batches = torch.randint(len(world.train), (settings.steps, settings.batch), generator=generator)
    train, held_out = world.train, world.held_out
    clean = world.answers[i]
    return Task((world.questions[train], given[train]), (world.questions[held_out], clean[held_out]), batches)


def referenced(task: Task, base: Model) -> Task:
    """The task with labels that carry their NLL under the base model."""

    def with_base(questions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return questions, with_reference(targets, vocab_stats(base(questions), targets).nll)

    return replace(task, train=with_base(*task.train), held_out=with_base(*task.held_out))


# ---- Measurements -----------------------------------------------------------------------------------------------


def evaluate(model: Model, task: Task, objective: Objective) -> dict[str, float]:
    """Means over training set and held-out set: NLL and value of the objective in nats, p, accuracy."""
    found: dict[str, float] = {}
    for name, (questions, targets) in (("train", task.train), ("held-out", task.held_out)):
        with torch.no_grad():
            logits = model(questions)
            stats = vocab_stats(logits, split_reference(targets)[0])
            loss = vocab_parallel_dft_loss(logits, targets, objective=objective)
        assert stats.top1 is not None
        series = {"nll": stats.nll, "objective": loss, "p": stats.prob, "accuracy": stats.top1.float()}
        found |= {f"{name} {key}": values.mean().item() for key, values in series.items()}
    return found


def token_gradient(objective: Objective, stats: TokenStats) -> Tensor:
    """Norm [...] of each token's gradient with respect to its logits, for the sum of the losses."""
    _, gate = loss_and_gate(objective, stats)
    return gate * stats.error


def fine_stats(model: Model, questions: Tensor, targets: Tensor) -> TokenStats:
    """Token statistics in fp64, because 1 - 2p + C cancels for p near 1."""
    with torch.no_grad():
        return vocab_stats(model(questions).double(), targets)


def gradient_share(objective: Objective, stats: TokenStats) -> list[float]:
    """Shares of the sum of token gradient norms for p in [0, 0.1), [0.1, 0.2), ... [0.9, 1]."""
    norms = token_gradient(objective, stats)
    return (torch.zeros(BINS, dtype=norms.dtype).index_add_(0, bin_of(stats.prob), norms) / norms.sum()).tolist()


def gradient_variance(model: Model, task: Task, objective: Objective, batches: int) -> float:
    """mean_k |g_k - g|^2 / |g|^2 over the first batches of the task (module docstring)."""

    def gradient(rows: Tensor) -> Tensor:
        questions, targets = task.batch(rows)
        loss = vocab_parallel_dft_loss(model(questions), targets, objective=objective).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    whole = gradient(torch.arange(len(task.train[0])))
    distances = [(gradient(rows) - whole).square().sum() for rows in task.batches[:batches]]
    return (torch.stack(distances).mean() / whole.square().sum()).item()


def fine_tune(
    model: Model, base: dict[str, Tensor], task: Task, objective: Objective, settings: Settings, factor: float
) -> list[dict[str, float]]:
    """Fine-tune from the base weights; return the evaluations, including the first and the last weights."""
    model.load_state_dict(base)
    rate = settings.rate * factor
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=settings.weight_decay)
    points = []
    for step, rows in enumerate(task.batches):
        current = at_iteration(objective, step + 1)
        if step % settings.every == 0:
            points.append(evaluate(model, task, current))
        update(model, optimizer, *task.batch(rows), current)
    return [*points, evaluate(model, task, current)]


def at_iteration(objective: Objective, iteration: int) -> Objective:
    """The objective at an iteration; a schedule sets its blend."""
    if not isinstance(objective, Scheduled):
        return objective
    return objective.with_blend(torch.tensor(objective.blend_at(iteration), dtype=torch.float64))


# ---- Jobs: one per base model, then one per seed, prior and targets ---------------------------------------------


def base_job(settings: Settings, seed: int, path: Path) -> list[Json]:
    """Pre-train and save a base model; return the mean p and accuracy of each prior.

    Raises:
        RuntimeError: if the mean p of a prior is outside of its range.
    """
    torch.set_num_threads(1)
    world = make_world(settings, seed)
    model = pretrain(settings, world, seed)
    torch.save(model.state_dict(), path)
    rows = []
    for prior, (low, high) in PRIORS.items():
        clean, noisy = (make_task(settings, world, seed, prior, targets).train for targets in TARGETS)
        stats = fine_stats(model, *clean)
        p, given = stats.prob.mean().item(), fine_stats(model, *noisy).prob.mean().item()
        if not low <= p < high:
            raise RuntimeError(
                f"seed {seed}: expected a {prior} prior, a mean p between {low} and {high}, got {p:.3f}; change "
                "base_steps or the shares of the answers in Settings"
            )
        assert stats.top1 is not None
        accuracy = stats.top1.double().mean().item()
        rows.append({"seed": seed, "prior": prior, "p": p, "p of noisy targets": given, "accuracy": accuracy})
    return rows


def compare_job(settings: Settings, seed: int, prior: str, targets: str, path: Path) -> Json:
    """Every objective on one task, from one checkpoint."""
    torch.set_num_threads(1)
    task = make_task(settings, make_world(settings, seed), seed, prior, targets)
    base = torch.load(path, weights_only=True)
    model = Model(settings.words, settings.width)
    place = {"seed": seed, "prior": prior, "targets": targets}
    runs: list[Json] = []
    curves: dict[str, list[dict[str, float]]] = {}
    weights: dict[str, Tensor] = {}
    for name in settings.objectives:
        model.load_state_dict(base)
        before = gradients(model, task, name, settings)
        points = fine_tune(model, base, task, parse_objective(name), settings, 1.0)
        after = gradients(model, task, name, settings)
        runs.append({**place, "objective": name, "factor": 1.0, "first": points[0], "last": points[-1]})
        runs[-1] |= {"before": before, "after": after}
        curves[name] = points
        weights[name] = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    runs += further(model, base, task, settings, place) + sweep(model, base, task, settings, place)
    found = {"runs": runs, "curves": {**place, "points": curves}}
    return found | {"scatter": scatter(model, base, task, settings, place), "same": same(weights, curves, place)}


def gradients(model: Model, task: Task, name: str, settings: Settings) -> Json:
    """Share by p and variance at the model's weights; a schedule is evaluated at the last iteration."""
    objective = at_iteration(parse_objective(name), settings.steps)
    return {
        "share": gradient_share(objective, fine_stats(model, *task.train)),
        "variance": gradient_variance(model, task, objective, settings.variance_batches),
    }


def further(model: Model, base: dict[str, Tensor], task: Task, settings: Settings, place: Json) -> list[Json]:
    """The ends of the runs of the further objectives."""
    ends_only = replace(settings, every=settings.steps)
    model.load_state_dict(base)
    with_labels = referenced(task, model)
    runs = []
    for name in settings.further:
        objective = parse_objective(name)
        chosen = with_labels if REFERENCE in objective.needs else task
        points = fine_tune(model, base, chosen, objective, ends_only, 1.0)
        runs.append({**place, "objective": name, "factor": 1.0, "last": points[-1]})
    return runs


def sweep(model: Model, base: dict[str, Tensor], task: Task, settings: Settings, place: Json) -> list[Json]:
    """Runs of nll and dft at the other learning rates."""
    ends_only = replace(settings, every=settings.steps)
    runs = []
    for name in set(SWEPT) & set(settings.objectives):
        for factor in set(settings.factors) - {1.0}:
            points = fine_tune(model, base, task, parse_objective(name), ends_only, factor)
            runs.append({**place, "objective": name, "factor": factor, "last": points[-1]})
    return sorted(runs, key=lambda run: (settings.objectives.index(run["objective"]), run["factor"]))


def scatter(model: Model, base: dict[str, Tensor], task: Task, settings: Settings, place: Json) -> Json | None:
    """p and gradient norm of some tokens under the base model, for noisy targets of the first seed."""
    if place["seed"] > 0 or place["targets"] != "noisy":
        return None
    model.load_state_dict(base)
    stats = fine_stats(model, *task.train)
    norms = {}
    for name in settings.objectives:
        objective = at_iteration(parse_objective(name), settings.steps)
        norms[name] = token_gradient(objective, stats)[: settings.scattered].tolist()
    return {**place, "p": stats.prob[: settings.scattered].tolist(), "norms": norms}


def same(weights: dict[str, Tensor], curves: dict[str, list[dict[str, float]]], place: Json) -> Json | None:
    """Largest differences between dft and prob: of a weight, and of a curve other than the value of the objective."""
    if not {"dft", "prob"} <= set(weights):
        return None
    pairs = zip(curves["dft"], curves["prob"], strict=True)
    differences = [abs(a[key] - b[key]) for a, b in pairs for key in a if not key.endswith("objective")]
    return {**place, "weights": (weights["dft"] - weights["prob"]).abs().max().item(), "curves": max(differences)}


def run_jobs(settings: Settings, out: Path, processes: int) -> Json:
    """Run all jobs; return the results."""
    begin = time.perf_counter()
    bases = [out / f"base-{seed}.pt" for seed in range(settings.seeds)]
    places = [(seed, prior, targets) for seed in range(settings.seeds) for prior in PRIORS for targets in TARGETS]
    show = Progress(len(bases) + len(places))
    pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else None
    priors = each(base_job, [(settings, seed, path) for seed, path in enumerate(bases)], pool, show)
    found = each(compare_job, [(settings, *place, bases[place[0]]) for place in places], pool, show)
    if pool is not None:
        pool.shutdown()
    torch.set_num_threads(1)
    facts = {key: conditions(torch.device("cpu"))[key] for key in ("device", "date", "commit", "torch")}
    facts |= {"megatron_dft": __version__, "processes": processes, "seconds": round(time.perf_counter() - begin)}
    return {
        "facts": facts,
        "settings": asdict(settings),
        "priors": [row for rows in priors for row in rows],
        "runs": [run for part in found for run in part["runs"]],
        "curves": merged_curves([part["curves"] for part in found]),
        "scatter": [part["scatter"] for part in found if part["scatter"]],
        "same": [part["same"] for part in found if part["same"]],
    }


def each(job: Callable, calls: list[tuple], pool: ProcessPoolExecutor | None, show: Progress) -> list:
    """Results of a job for each call, in order."""
    if pool is None:
        return [show(job(*call)) for call in calls]
    futures: list[Future] = [pool.submit(job, *call) for call in calls]
    for future in as_completed(futures):
        show(future.result())
    return [future.result() for future in futures]


class Progress:
    """Print a line per finished job: count, elapsed time, remaining time."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.done, self.begin = jobs, 0, time.perf_counter()

    def __call__(self, result: Any) -> Any:
        self.done += 1
        elapsed = time.perf_counter() - self.begin
        left = elapsed / self.done * (self.jobs - self.done)
        print(f"{self.done}/{self.jobs} jobs, {elapsed:.0f} s elapsed, about {left:.0f} s left", flush=True)
        return result


def merged_curves(parts: list[Json]) -> list[Json]:
    """Mean and standard error over seeds of each series, by task and objective."""
    rows = []
    for prior in PRIORS:
        for targets in TARGETS:
            seeds = [part["points"] for part in parts if (part["prior"], part["targets"]) == (prior, targets)]
            for name in seeds[0]:
                runs = [points[name] for points in seeds]
                series = {
                    key: [mean_error([run[i][key] for run in runs]) for i in range(len(runs[0]))] for key in runs[0][0]
                }
                rows.append({"prior": prior, "targets": targets, "objective": name, "series": series})
    return rows


def write(results: Json, path: Path) -> None:
    """Write results with four digits and one run per line; verdicts use the rounded values."""
    rounded = round_all(results)
    rounded["verdicts"] = verdicts(rounded)
    parts = []
    for key, value in rounded.items():
        lines = ",\n  ".join(json.dumps(item) for item in value) if isinstance(value, list) else ""
        parts.append(f"{json.dumps(key)}: " + (f"[\n  {lines}\n ]" if lines else json.dumps(value)))
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
