"""What each objective does to training: several objectives, one checkpoint, the same batches.

    python tools/compare_objectives.py              8 seeds; figures, numbers and a page in runs/dynamics
    python tools/compare_objectives.py --docs       the same into docs/learning-dynamics.md, as committed
    python tools/compare_objectives.py --quick      seconds instead of minutes: small, two seeds, no evidence
    python tools/compare_objectives.py --from FILE  figures and page again from the numbers of an earlier run

The world is a table of facts. A question is (subject, phrasing); some phrasings ask for the same relation, and each
fact (subject, relation) has three answers, A, B and C, all different. The base model, a small MLP, sees every question
in pre-training with one of its answers: mostly A, less often B, rarely C, sometimes a random one; how much of A and B
differs from question to question. Fine-tuning then asks for one answer only, from that one checkpoint:

    A  strong prior    the base gives the targets a mean p above 0.5
    B  middle prior    0.1 to 0.5
    C  weak prior      below 0.1             measured for each seed; a base that is outside of its range is an error

Noisy targets: a share of the questions has a fixed wrong answer in the training set. Held-out questions are
subject-phrasing pairs that fine-tuning never saw, and their targets are always right. What is learned from the other
phrasings of a fact carries over to them; a wrong answer that is learned by heart spoils them.

For a token with target probability p, gate w of its objective and collision probability C, the gradient on its logits
is w (softmax - onehot), so its norm is

    |g| = w sqrt(sum_{i != y} p_i^2 + (1-p)^2) = w sqrt(1 - 2p + C)                exact, from `vocab_stats`

which gives the share of the gradient by p and the scatter without any backward pass. Gradient variance is

    mean_k |g_k - g|^2 / |g|^2

with g_k the gradient of all parameters of a mini-batch's mean loss, batches drawn with replacement as in training, and
g that of the whole training set, all at the same weights. 1 means that the noise of one batch is as large as the
signal. (For cayley, whose gate depends on its batch, g is not exactly the mean of g_k.)

All objectives of a seed share weights, batches, AdamW and learning rate; nll and dft also run at other learning rates,
so that a verdict does not hang on one. Verdicts are computed from paired differences over seeds, by the rule that the
page states. Cost: under ten minutes on two cores.

Left out: language, long training, large models, warm-up and decay of the learning rate. It shows mechanisms, not how
much an objective gains on a benchmark.
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
from measure import conditions
from torch import Tensor, nn

from megatron_dft import __version__
from megatron_dft.metrics import BINS, tenth_of
from megatron_dft.objectives import Objective, loss_and_gate, parse_objective
from megatron_dft.stats import TokenStats
from megatron_dft.vocab_parallel import vocab_parallel_dft_loss, vocab_stats


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers, beside versions and device."""

    objectives: tuple[str, ...] = ("nll", "dft", "prob", "tsallis:q=0.5", "deft")
    seeds: int = 8
    words: int = 32  # subjects, phrasings and answers, each
    relations: int = 4
    width: int = 64
    base_steps: int = 1500
    base_batch: int = 256
    base_rate: float = 2e-3  # falls to 0 in a straight line
    share_rare: float = 0.03  # of answer C in pre-training
    share_random: float = 0.1
    steps: int = 200
    batch: int = 128
    rate: float = 1e-3
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)  # of the learning rate, for SWEPT
    weight_decay: float = 0.01
    noise: float = 0.4  # share of noisy targets that is wrong, but for those that are right by chance
    held_out: float = 0.2
    every: int = 10  # steps between two points of a curve
    variance_batches: int = 32
    scattered: int = 150  # tokens per prior in the scatter


QUICK: Json = {"seeds": 2, "words": 16, "relations": 2, "base_steps": 500, "steps": 40, "factors": (1.0, 3.0)}
QUICK |= {"objectives": ("nll", "dft", "prob", "deft"), "variance_batches": 4, "scattered": 50}


def main(arguments: list[str] | None = None) -> int:
    wanted = parse(arguments)
    places = DOCS if wanted.docs else Places(*(wanted.out / name for name in ("results.json", "report.md", "figures")))
    for folder in {places.numbers.parent, places.page.parent, places.figures, wanted.out}:
        folder.mkdir(parents=True, exist_ok=True)
    source = wanted.source
    results = json.loads(source.read_text()) if source else measured(settings_of(wanted), wanted.out, wanted.processes)
    write(results, places.numbers)
    results = json.loads(places.numbers.read_text())
    for name, draw in FIGURES.items():
        draw(results, places.figures / name)
    places.page.write_text(page(results, places))
    print("\n" + accuracy_table(results) + "\n" + verdict_table(results) + f"\n{places.page}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--objectives", help="comma-separated; default: nll,dft,prob,tsallis:q=0.5,deft (--quick: without tsallis)"
    )
    parser.add_argument("--seeds", type=int, help="default: 8; with --quick 2")
    parser.add_argument("--quick", action="store_true", help="a small world and few steps: tests the tool")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="each with one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/dynamics"))
    parser.add_argument("--docs", action="store_true", help="write the committed page, figures and numbers")
    parser.add_argument("--from", dest="source", type=Path, help="a JSON file of an earlier run: train nothing")
    return parser.parse_args(arguments)


def settings_of(wanted: argparse.Namespace) -> Settings:
    chosen: Json = dict(QUICK) if wanted.quick else {}
    if wanted.objectives is not None:
        chosen["objectives"] = split_objectives(wanted.objectives)
    if wanted.seeds is not None:
        chosen["seeds"] = wanted.seeds
    settings = Settings(**chosen)
    if settings.seeds < 2:
        raise SystemExit(f"expected --seeds of 2 or more, for an error over seeds; got {settings.seeds}")
    return settings


def split_objectives(text: str) -> tuple[str, ...]:
    """At the commas that do not belong to an objective's parameters; unknown names raise ValueError."""
    found: list[str] = []
    for piece in filter(None, text.split(",")):
        if found and "=" in piece and ":" not in piece:
            found[-1] += "," + piece
        else:
            found.append(piece)
    for specification in found:
        parse_objective(specification)
    return tuple(dict.fromkeys(found))


# ---- The world, the base model and the tasks --------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The facts of one seed; N = words^2 questions."""

    questions: Tensor  # [N, 2] subject and phrasing
    answers: Tensor  # [3, N] A, B and C
    share: Tensor  # [4, N] how often pre-training gives A, B, C or a random answer
    given: Tensor  # [3, N] noisy targets for A, B and C
    train: Tensor  # [n] questions of the training set
    held_out: Tensor  # [N - n]


def make_world(settings: Settings, seed: int) -> World:
    generator = torch.Generator().manual_seed(1000 + seed)
    words, relations = settings.words, settings.relations
    questions = torch.cartesian_prod(torch.arange(words), torch.arange(words))
    subject, phrasing = questions.T
    # Shifts of one permutation per relation: three tables that agree nowhere.
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
    """The base: cross entropy on questions with answers drawn by `share`."""
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
    """One fine-tuning task of a seed. Its batches are the same for every objective."""

    train: tuple[Tensor, Tensor]  # questions [n, 2], targets [n] as given
    held_out: tuple[Tensor, Tensor]  # right targets
    batches: Tensor  # [steps, batch] rows of the training set

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.train[0][rows], self.train[1][rows]


def make_task(settings: Settings, world: World, seed: int, prior: str, targets: str) -> Task:
    i = list(PRIORS).index(prior)
    given = (world.given if targets == "noisy" else world.answers)[i]
    generator = torch.Generator().manual_seed(3000 + seed)
    batches = torch.randint(len(world.train), (settings.steps, settings.batch), generator=generator)
    train, held_out = world.train, world.held_out
    right = world.answers[i]
    return Task((world.questions[train], given[train]), (world.questions[held_out], right[held_out]), batches)


# ---- What is measured -------------------------------------------------------------------------------------------


def evaluate(model: Model, task: Task, objective: Objective) -> dict[str, float]:
    """Means over the training set (targets as given) and the held-out set: NLL and objective in nats, p, accuracy."""
    found: dict[str, float] = {}
    for name, (questions, targets) in (("train", task.train), ("held-out", task.held_out)):
        with torch.no_grad():
            logits = model(questions)
            stats = vocab_stats(logits, targets)
            loss = vocab_parallel_dft_loss(logits, targets, objective=objective)
        assert stats.correct is not None
        series = {"nll": stats.nll, "objective": loss, "p": stats.prob, "accuracy": stats.correct.float()}
        found |= {f"{name} {key}": values.mean().item() for key, values in series.items()}
    return found


def token_gradient(objective: Objective, stats: TokenStats) -> Tensor:
    """Norm of each token's gradient on its logits [...], for a loss that is not divided by anything."""
    _, gate = loss_and_gate(objective, stats)
    return gate * stats.error


def fine_stats(model: Model, questions: Tensor, targets: Tensor) -> TokenStats:
    """fp64, because 1 - 2p + C loses its digits where p is near 1."""
    with torch.no_grad():
        return vocab_stats(model(questions).double(), targets)


def gradient_share(objective: Objective, stats: TokenStats) -> list[float]:
    """Which part of the sum of token gradient norms comes from p in [0, 0.1), [0.1, 0.2), ... [0.9, 1]."""
    norms = token_gradient(objective, stats)
    return (torch.zeros(BINS, dtype=norms.dtype).index_add_(0, tenth_of(stats.prob), norms) / norms.sum()).tolist()


def gradient_variance(model: Model, task: Task, objective: Objective, batches: int) -> float:
    """mean_k |g_k - g|^2 / |g|^2 over the first batches of the task; see above."""

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
    """Train from the base weights; the points of the curves, first and last included."""
    model.load_state_dict(base)
    rate = settings.rate * factor
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=settings.weight_decay)
    points = []
    for step, rows in enumerate(task.batches):
        objective.begin(step + 1)
        if step % settings.every == 0:
            points.append(evaluate(model, task, objective))
        update(model, optimizer, *task.batch(rows), objective)
    return [*points, evaluate(model, task, objective)]


# ---- Jobs: one per base model, then one per seed, prior and kind of targets --------------------------------------


def base_job(settings: Settings, seed: int, path: Path) -> list[Json]:
    """Pre-train and store a base; how strong its priors are. RuntimeError if they are not what their names say."""
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
        assert stats.correct is not None
        accuracy = stats.correct.double().mean().item()
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
    found = {"runs": runs + sweep(model, base, task, settings, place), "curves": {**place, "points": curves}}
    return found | {"scatter": scatter(model, base, task, settings, place), "same": same(weights, curves, place)}


def gradients(model: Model, task: Task, name: str, settings: Settings) -> Json:
    """Share by p, and variance, at the model's weights; a scheduled objective counts as it was last."""
    objective = parse_objective(name)
    objective.begin(settings.steps)
    return {
        "share": gradient_share(objective, fine_stats(model, *task.train)),
        "variance": gradient_variance(model, task, objective, settings.variance_batches),
    }


def sweep(model: Model, base: dict[str, Tensor], task: Task, settings: Settings, place: Json) -> list[Json]:
    """nll and dft at the other learning rates."""
    ends_only = replace(settings, every=settings.steps)
    runs = []
    for name in set(SWEPT) & set(settings.objectives):
        for factor in set(settings.factors) - {1.0}:
            points = fine_tune(model, base, task, parse_objective(name), ends_only, factor)
            runs.append({**place, "objective": name, "factor": factor, "last": points[-1]})
    return sorted(runs, key=lambda run: (settings.objectives.index(run["objective"]), run["factor"]))


def scatter(model: Model, base: dict[str, Tensor], task: Task, settings: Settings, place: Json) -> Json | None:
    """p and gradient norm of some tokens at the base; for the noisy targets of the first seed."""
    if place["seed"] > 0 or place["targets"] != "noisy":
        return None
    model.load_state_dict(base)
    stats = fine_stats(model, *task.train)
    norms = {}
    for name in settings.objectives:
        objective = parse_objective(name)
        objective.begin(settings.steps)
        norms[name] = token_gradient(objective, stats)[: settings.scattered].tolist()
    return {**place, "p": stats.prob[: settings.scattered].tolist(), "norms": norms}


def same(weights: dict[str, Tensor], curves: dict[str, list[dict[str, float]]], place: Json) -> Json | None:
    """Largest differences between the runs of dft and prob: of a weight, and of a curve but for the objective's."""
    if not {"dft", "prob"} <= set(weights):
        return None
    pairs = zip(curves["dft"], curves["prob"], strict=True)
    apart = [abs(a[key] - b[key]) for a, b in pairs for key in a if not key.endswith("objective")]
    return {**place, "weights": (weights["dft"] - weights["prob"]).abs().max().item(), "curves": max(apart)}


def measured(settings: Settings, out: Path, processes: int) -> Json:
    """All the numbers."""
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
    """Results in the order of the calls."""
    if pool is None:
        return [show(job(*call)) for call in calls]
    futures: list[Future] = [pool.submit(job, *call) for call in calls]
    for future in as_completed(futures):
        show(future.result())
    return [future.result() for future in futures]


class Progress:
    """A line per finished job: how many, time elapsed and time left."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.done, self.begin = jobs, 0, time.perf_counter()

    def __call__(self, result: Any) -> Any:
        self.done += 1
        elapsed = time.perf_counter() - self.begin
        left = elapsed / self.done * (self.jobs - self.done)
        print(f"{self.done}/{self.jobs} jobs, {elapsed:.0f} s elapsed, about {left:.0f} s left", flush=True)
        return result


def merged_curves(parts: list[Json]) -> list[Json]:
    """Mean and standard error over seeds, of each series of each task and objective."""
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
    """Four digits, a run on a line. What is judged is what was written."""
    rounded = round_all(results)
    rounded["verdicts"] = verdicts(rounded)
    parts = []
    for key, value in rounded.items():
        lines = ",\n  ".join(json.dumps(item) for item in value) if isinstance(value, list) else ""
        parts.append(f"{json.dumps(key)}: " + (f"[\n  {lines}\n ]" if lines else json.dumps(value)))
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
