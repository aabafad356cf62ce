"""Report of compare_objectives.py: verdicts on five claims, tables, figures, and the page that contains them.

Everything is computed from the JSON file of a run.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dft.metrics import BINS

ROOT = Path(__file__).resolve().parents[2]
PRIORS = {"strong": (0.5, 1.0), "middle": (0.1, 0.5), "weak": (0.0, 0.1)}  # mean p of the base model on clean targets
TARGETS = ("clean", "noisy")
SWEPT = ("nll", "dft")  # objectives that run at every learning rate
ACCURACY = "held-out accuracy"
Json = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """Paths of the numbers, the page and the figures."""

    numbers: Path
    page: Path
    figures: Path


RESULTS = Path(__file__).with_name("results")
DOCS = Places(RESULTS / "learning-dynamics.json", ROOT / "docs/learning-dynamics.md", ROOT / "docs/figures")


def round_all(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: round_all(item) for key, item in value.items()}
    return [round_all(item) for item in value] if isinstance(value, (list, tuple)) else value


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


# ---- Verdicts ---------------------------------------------------------------------------------------------------

RULE = (
    "Differences are paired within each seed. A difference is significant if its mean over seeds is larger than twice "
    "its standard error (yes or no in the table). A claim is reproduced if every comparison of its criterion is "
    "significant in the claimed direction. Otherwise it is not reproduced, even if some comparisons are significant."
)
CLAIMS = {
    1: "dft beats nll under a strong prior with noisy targets",
    2: "nll beats dft under a weak prior",
    3: "dft and prob give the same run",
    4: "NLL can rise while the DFT value falls",
    5: "deft is between dft and nll",
}
CRITERIA = {
    1: "Final held-out accuracy with noisy targets, at the same learning rate and at the best rate of each",
    2: "Final held-out accuracy with clean and with noisy targets, at the same learning rate and at the best rate of "
    "each",
    3: "No weight and no point of a curve differs by more than 1e-6 in any run; the value of the objective is exempt",
    4: "Training set, dft run: the mean NLL of the targets rises and the mean DFT value falls from start to end, in at "
    "least one task (one task is enough, because the claim says can)",
    5: "Final held-out accuracy between that of nll and dft, in every task in which nll and dft differ",
}


def is_significant(differences: Sequence[float]) -> bool:
    """Whether the mean difference is positive and larger than twice its standard error over seeds."""
    mean, error = mean_error(differences)
    return mean > 2.0 * error


def verdicts(results: Json) -> list[Json]:
    """One verdict per claim: "reproduced", "not reproduced", or "not tested" if an objective was not trained."""
    judges = {1: (judge_strong, SWEPT), 2: (judge_weak, SWEPT), 3: (judge_same, ("dft", "prob"))}
    judges |= {4: (judge_rise, ("dft",)), 5: (judge_between, (*SWEPT, "deft"))}
    rows = []
    for number, (judge, needed) in judges.items():
        if set(needed) <= set(results["settings"]["objectives"]):
            holds, numbers = judge(results)
            verdict = "reproduced" if holds else "not reproduced"
        else:
            verdict, numbers = "not tested", ["requires the objectives " + ", ".join(needed)]
        rows.append({"claim": number, "verdict": verdict, "numbers": numbers})
    return rows


def final(results: Json, prior: str, targets: str, objective: str, factor: float = 1.0) -> list[float]:
    """Final held-out accuracy of each seed."""
    return [run["last"][ACCURACY] for run in pick(results, prior, targets, objective, factor)]


def pick(results: Json, prior: str, targets: str, objective: str, factor: float = 1.0) -> list[Json]:
    """Runs of a task and objective, ordered by seed."""
    wanted = {"prior": prior, "targets": targets, "objective": objective, "factor": round_all(factor)}
    found = [run for run in results["runs"] if all(run[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda run: run["seed"])


def best_factor(results: Json, prior: str, targets: str, objective: str) -> float:
    """Learning-rate factor with the highest mean accuracy; the smallest of equal ones."""
    factors = sorted(results["settings"]["factors"])
    return max(factors, key=lambda factor: statistics.fmean(final(results, prior, targets, objective, factor)))


def minus(a: Iterable[float], b: Iterable[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def judge_strong(results: Json) -> tuple[bool, list[str]]:
    return leads(results, "dft", "nll", [("strong", "noisy")])


def judge_weak(results: Json) -> tuple[bool, list[str]]:
    return leads(results, "nll", "dft", [("weak", targets) for targets in TARGETS])


def leads(results: Json, winner: str, loser: str, tasks: list[tuple[str, str]]) -> tuple[bool, list[str]]:
    """Whether the winner is significantly better in every task, at the same and at the best learning rates."""
    every, numbers = True, []
    for task in tasks:
        best = {name: best_factor(results, *task, name) for name in (winner, loser)}
        for label, factors in (("same rate", {winner: 1.0, loser: 1.0}), ("best rates", best)):
            difference = minus(*(final(results, *task, name, factors[name]) for name in (winner, loser)))
            every &= is_significant(difference)
            mark = "yes" if is_significant(difference) else "no"
            numbers.append(
                f"{', '.join(task)}, {label}: {winner} - {loser} = {plus_minus(difference, sign=True)} ({mark})"
            )
    return every, numbers


def judge_same(results: Json) -> tuple[bool, list[str]]:
    largest = {key: max(row[key] for row in results["same"]) for key in ("weights", "curves")}
    numbers = [f"largest difference of {key} in {len(results['same'])} pairs: {v:.1e}" for key, v in largest.items()]
    return max(largest.values()) <= 1e-6, numbers


def judge_rise(results: Json) -> tuple[bool, list[str]]:
    numbers = []
    for prior in PRIORS:
        for targets in TARGETS:
            runs = pick(results, prior, targets, "dft")
            rise = {
                key: [run["last"][f"train {key}"] - run["first"][f"train {key}"] for run in runs]
                for key in ("nll", "objective")
            }
            if is_significant(rise["nll"]) and is_significant([-value for value in rise["objective"]]):
                nll, dft = (plus_minus(rise[key], sign=True) for key in ("nll", "objective"))
                numbers.append(f"{prior}, {targets}: NLL {nll}, DFT value {dft}")
    return bool(numbers), numbers or ["no task"]


def judge_between(results: Json) -> tuple[bool, list[str]]:
    places = {
        (p, t): between(*(final(results, p, t, o) for o in ("nll", "deft", "dft"))) for p in PRIORS for t in TARGETS
    }
    numbers = [f"{prior}, {targets}: {place}" for (prior, targets), place in places.items()]
    tested = [place for place in places.values() if place != "nll and dft do not differ"]
    return bool(tested) and all(place == "between" for place in tested), numbers


def between(nll: Sequence[float], deft: Sequence[float], dft: Sequence[float]) -> str:
    """Position of deft relative to nll and dft, from the values of each seed."""
    ends = (nll, dft) if is_significant(minus(dft, nll)) else (dft, nll)
    if not is_significant(minus(ends[1], ends[0])):
        return "nll and dft do not differ"
    if is_significant(minus(ends[0], deft)):
        return "below both"
    if is_significant(minus(deft, ends[1])):
        return "above both"
    inside = is_significant(minus(deft, ends[0])) and is_significant(minus(ends[1], deft))
    return "between" if inside else "within error of nll or dft"


def plus_minus(values: Sequence[float], sign: bool = False) -> str:
    mean, error = mean_error(values)
    return f"{mean:{'+' if sign else ''}.3f} ± {error:.3f}"


# ---- The page ---------------------------------------------------------------------------------------------------


def page(results: Json, places: Places) -> str:
    """Text of docs/learning-dynamics.md; every number comes from the JSON."""
    return "\n".join(
        [
            "# How the objectives train\n",
            *introduction(results, places),
            *claims_part(results),
            *accuracy_part(results, places),
            *curves_part(places),
            *gradient_part(results, places),
        ]
    )


def introduction(results: Json, places: Places) -> list[str]:
    facts, settings = results["facts"], results["settings"]
    numbers = os.path.relpath(places.numbers, ROOT)
    passes = settings["steps"] * settings["batch"] / ((1 - settings["held_out"]) * settings["words"] ** 2)
    return [
        f"`python tools/studies/compare_objectives.py{' --docs' if places == DOCS else ''}` writes this page from "
        f"`{numbers}`. {facts['device']}, {facts['processes']} processes with one thread each, "
        f"{facts['seconds'] / 60:.1f} minutes; torch {facts['torch']}, megatron_dft "
        f"{facts['megatron_dft']}, {facts['date']}, commit {facts['commit']}.\n",
        f"**Task.** A small MLP answers questions about {settings['words'] * settings['relations']} facts with "
        f"{settings['words'] // settings['relations']} phrasings each. In pre-training, the target of a question is "
        "one of three answers, A, B or C, or a random answer. Fine-tuning trains on one of the three: A, for which "
        "the base model has a strong prior, B (middle prior) or C (weak prior). Clean targets are all correct. Of the "
        f"noisy targets, {settings['noise']:.0%} are replaced by a fixed random answer. Held-out questions are pairs "
        "of subject and phrasing that are not in the training set; their targets are correct.\n",
        "**Training.** All objectives start from the same weights and use the same batches. AdamW at learning rate "
        f"{settings['rate']:g}, {settings['steps']} steps of {settings['batch']} tokens, {passes:.0f} epochs, "
        f"{settings['seeds']} seeds. ± is one standard error over seeds.\n",
        "**Limits.** This is a toy model of fine-tuning that runs in minutes. It has no language, and more epochs than "
        "usual, so that the model can memorize wrong targets. It shows mechanisms, not the gain of an objective on a "
        "benchmark.\n",
    ]


def claims_part(results: Json) -> list[str]:
    return [
        "## Five claims\n",
        verdict_table(results),
        RULE + " Criterion of each claim:\n",
        "\n".join(f"{number}. {text}." for number, text in CRITERIA.items()) + "\n",
        "## The priors\n",
        "Mean p of the targets under the base model, on the training set. Outside of its range, the tool stops.\n",
        prior_table(results),
    ]


def accuracy_part(results: Json, places: Places) -> list[str]:
    return [
        "## Final held-out accuracy\n",
        accuracy_table(results),
        picture(places, "accuracy", "final held-out accuracy of each objective; error bars of one standard error"),
        "Highest mean held-out accuracy of each curve and its step. This is the result of early stopping, which "
        "requires such a held-out set.\n",
        peak_table(results),
        "Further objectives at the same rate. The base model is the reference of asft, iw and psft:\n",
        each_task(results, lambda *task: plus_minus(final(results, *task)), results["settings"]["further"]),
        "## Learning rate\n",
        "Final held-out accuracy of nll and dft by learning rate, the best of each in bold. The best rate is selected "
        "by this same accuracy for both objectives.\n",
        rate_table(results),
    ]


def curves_part(places: Places) -> list[str]:
    return [
        "## Curves\n",
        "Solid lines: training set. Dashed lines: held-out set. The value of an objective is relative to its first "
        "value, because values of different objectives are not comparable. Shaded areas are one standard error. The "
        "curves of prob and dft coincide, except for the value of the objective.\n",
        *(picture(places, f"curves-{targets}", f"curves with {targets} targets") for targets in TARGETS),
    ]


def gradient_part(results: Json, places: Places) -> list[str]:
    settings = results["settings"]
    return [
        "## Where the gradient comes from\n",
        "The norm of a token's gradient with respect to its logits is gate x sqrt(1 - 2p + C), where C is the "
        "collision probability. The figure shows tokens of the training set under the base model (noisy targets, "
        "first seed):\n",
        picture(places, "scatter", "gradient norm of tokens against p, for each objective"),
        "Share of the sum of these norms by p, in bins of 0.1 (noisy targets):\n",
        picture(places, "share", "share of the gradient by p, before and after training"),
        "## Gradient variance\n",
        "Mean squared distance between the gradient of a mini-batch and the gradient of the whole training set, "
        f"relative to the squared norm of the latter: all parameters, {settings['variance_batches']} batches of "
        f"{settings['batch']}. At 1, the noise of a batch is as large as the signal. The table shows medians over "
        "seeds, before → after training. The error bars in the figure range from the smallest to the largest seed.\n",
        each_task(results, lambda *task: variance_cell(results, *task)),
        picture(places, "variance", "relative gradient variance before and after training"),
    ]


def picture(places: Places, name: str, text: str, study: str = "learning-dynamics") -> str:
    folder = os.path.relpath(places.figures, places.page.parent)
    return f"![{text}]({folder}/{study}-{name}.png)\n"


def table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body]) + "\n"


def verdict_table(results: Json) -> str:
    rows = [
        [f"{row['claim']}. {CLAIMS[row['claim']]}", f"**{row['verdict']}**", "; ".join(row["numbers"])]
        for row in results["verdicts"]
    ]
    return table(["claim", "verdict", "numbers"], rows)


def prior_table(results: Json) -> str:
    body = []
    for prior, (low, high) in PRIORS.items():
        rows = [row for row in results["priors"] if row["prior"] == prior]
        p = [row["p"] for row in rows]
        cells = [f"{low:g} to {high:g}", f"{statistics.fmean(p):.3f} ({min(p):.3f} to {max(p):.3f})"]
        body.append(
            [prior, *cells, *(plus_minus([row[k] for row in rows]) for k in ("p of noisy targets", "accuracy"))]
        )
    return table(["prior", "range of mean p", "mean p (range over seeds)", "mean p of noisy targets", "accuracy"], body)


def accuracy_table(results: Json) -> str:
    return each_task(results, lambda *task: plus_minus(final(results, *task)))


def peak_table(results: Json) -> str:
    """Highest mean held-out accuracy and its step; the first of equal ones."""
    settings = results["settings"]
    steps = [*range(0, settings["steps"], settings["every"]), settings["steps"]]
    curves = {(row["prior"], row["targets"], row["objective"]): row["series"][ACCURACY] for row in results["curves"]}

    def cell(*task: str) -> str:
        (mean, error), step = max(zip(curves[task], steps, strict=True), key=lambda point: point[0][0])
        return f"{mean:.3f} ± {error:.3f} at {step}"

    return each_task(results, cell)


def variance_cell(results: Json, *task: str) -> str:
    """Median over seeds, because a signal near 0 makes single ratios very large."""
    runs = pick(results, *task)
    before, after = (statistics.median(run[when]["variance"] for run in runs) for when in ("before", "after"))
    return f"{before:.2g} → {after:.2g}"


def each_task(results: Json, cell: Callable[..., str], names: Sequence[str] = ()) -> str:
    """Table with a row per task and a column per objective."""
    names = names or results["settings"]["objectives"]
    body = [[f"{p}, {t}", *(cell(p, t, name) for name in names)] for p in PRIORS for t in TARGETS]
    return table(["prior, targets", *names], body)


def rate_table(results: Json) -> str:
    factors = sorted(results["settings"]["factors"])
    names = [name for name in SWEPT if name in results["settings"]["objectives"]]
    body = []
    for prior in PRIORS:
        for targets in TARGETS:
            row = [f"{prior}, {targets}"]
            for name in names:
                best = best_factor(results, prior, targets, name)
                cells = {f: plus_minus(final(results, prior, targets, name, f)) for f in factors}
                row += [f"**{text}**" if factor == best else text for factor, text in cells.items()]
            body.append(row)
    return table(["prior, targets", *(f"{name}, x{f:.2g}" for name in names for f in factors)], body)


# ---- The figures ------------------------------------------------------------------------------------------------


def canvas(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, Any]:
    """A figure and its axes [rows][columns], without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def save(figure: Any, path: Path) -> None:
    """Save as PNG with 256 colours, which halves the size."""
    from PIL import Image

    figure.canvas.draw()
    size = figure.canvas.get_width_height()
    picture = Image.frombuffer("RGBA", size, bytes(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def legend_below(figure: Any, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)


def color(i: int) -> str:
    return f"C{i % 10}"


def draw_curves(targets: str) -> Callable[[Json, Path], None]:
    """Plot NLL, objective, p and accuracy over steps, a column per prior."""

    def draw(results: Json, path: Path) -> None:
        kinds = {"nll": "NLL, nats", "objective": "objective / first value", "p": "mean p", "accuracy": "accuracy"}
        figure, axes = canvas(len(kinds), len(PRIORS), 9.5, 9.5, sharex=True, sharey="row")
        names = results["settings"]["objectives"]
        for row in results["curves"]:
            if row["targets"] == targets:
                i, j = names.index(row["objective"]), list(PRIORS).index(row["prior"])
                for k, kind in enumerate(kinds):
                    draw_series(axes[k][j], row["series"], kind, i, results["settings"])
        for j, prior in enumerate(PRIORS):
            axes[0][j].set_title(f"{prior} prior, {targets} targets", fontsize=9)
            axes[-1][j].set_xlabel("step")
        for k, label in enumerate(kinds.values()):
            axes[k][0].set_ylabel(label)
        legend_below(figure, axes[0][0])
        save(figure, path)

    return draw


def draw_series(axes: Any, series: Json, kind: str, i: int, settings: Json) -> None:
    """Plot training set and held-out set. Later objectives have thinner lines, so coinciding lines stay visible."""
    steps = [*range(0, settings["steps"], settings["every"]), settings["steps"]]
    for part, style in (("train", "-"), ("held-out", "--")):
        mean, error = zip(*series[f"{part} {kind}"], strict=True)
        scale = mean[0] if kind == "objective" else 1.0
        label = settings["objectives"][i] if part == "train" else None
        mean, error = ([value / scale for value in values] for values in (mean, error))
        axes.plot(steps, mean, style, color=color(i), linewidth=max(2.6 - 0.5 * i, 0.8), label=label)
        low, high = minus(mean, error), [a + b for a, b in zip(mean, error, strict=True)]
        axes.fill_between(steps, low, high, color=color(i), alpha=0.15, linewidth=0)


def draw_share(results: Json, path: Path) -> None:
    """Plot the share of the gradient by p before and after training with noisy targets, a column per prior."""
    figure, axes = canvas(2, len(PRIORS), 9.5, 5.2, sharex=True, sharey=True)
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    for j, prior in enumerate(PRIORS):
        for k, when in enumerate(("before", "after")):
            for i, name in enumerate(results["settings"]["objectives"]):
                shares = [run[when]["share"] for run in pick(results, prior, "noisy", name)]
                mean, error = zip(*(mean_error(values) for values in zip(*shares, strict=True)), strict=True)
                width = max(2.6 - 0.5 * i, 0.8)
                axes[k][j].errorbar(middles, mean, error, fmt="o-", color=color(i), lw=width, ms=3, label=name)
            axes[k][j].set_title(f"{prior} prior, {when} training", fontsize=9)
        axes[1][j].set_xlabel("p of the target")
    for row in axes:
        row[0].set_ylabel("share of gradient")
    axes[0][0].legend(fontsize=7)
    save(figure, path)


def draw_scatter(results: Json, path: Path) -> None:
    """Plot gradient norm against p of tokens under the base model, a panel per objective, a colour per prior."""
    names = results["settings"]["objectives"]
    figure, axes = canvas(1, len(names), max(2.1 * len(names), 4.0), 2.9, sharey=True)
    for j, name in enumerate(names):
        for i, row in enumerate(results["scatter"]):
            axes[0][j].scatter(row["p"], row["norms"][name], s=5, color=color(i), alpha=0.5, label=row["prior"], lw=0)
        axes[0][j].set_title(name, fontsize=9)
        axes[0][j].set_xlabel("p of the target")
    axes[0][0].set_ylabel("gradient norm of the token")
    axes[0][0].legend(fontsize=7, title="prior", title_fontsize=7)
    save(figure, path)


def draw_variance(results: Json, path: Path) -> None:
    """Plot median and range over seeds of the relative gradient variance, before and after training."""
    figure, axes = canvas(2, 1, 9.5, 5.0, sharex=True)
    for k, when in enumerate(("before", "after")):
        bars(axes[k][0], results, lambda run, when=when: run[when]["variance"], spread)
        axes[k][0].set_ylabel(f"variance {when}")
    legend_below(figure, axes[0][0])
    save(figure, path)


def draw_accuracy(results: Json, path: Path) -> None:
    figure, axes = canvas(1, 1, 9.5, 3.2)
    bars(axes[0][0], results, lambda run: run["last"][ACCURACY], lambda v: (mean_error(v)[0], [mean_error(v)[1]] * 2))
    axes[0][0].set_ylabel(f"final {ACCURACY}")
    legend_below(figure, axes[0][0])
    save(figure, path)


def spread(values: list[float]) -> tuple[float, list[float]]:
    """Median, and its distances to the smallest and the largest value."""
    median = statistics.median(values)
    return median, [median - min(values), max(values) - median]


def bars(axes: Any, results: Json, value: Callable[[Json], float], summary: Callable) -> None:
    """Plot a group of bars per task, a bar per objective."""
    names = results["settings"]["objectives"]
    tasks = [(prior, targets) for prior in PRIORS for targets in TARGETS]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights, errors = zip(*(summary([value(run) for run in pick(results, *t, name)]) for t in tasks), strict=True)
        places = [k + width * (i - (len(names) - 1) / 2) for k in range(len(tasks))]
        ends = list(zip(*errors, strict=True))
        axes.bar(places, heights, width, yerr=ends, color=color(i), label=name, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(tasks)), [f"{prior}\n{targets}" for prior, targets in tasks])


FIGURES: dict[str, Callable[[Json, Path], None]] = {
    "learning-dynamics-curves-clean.png": draw_curves("clean"),
    "learning-dynamics-curves-noisy.png": draw_curves("noisy"),
    "learning-dynamics-share.png": draw_share,
    "learning-dynamics-scatter.png": draw_scatter,
    "learning-dynamics-variance.png": draw_variance,
    "learning-dynamics-accuracy.png": draw_accuracy,
}
