"""Report of real_model.py: tables, verdicts, the check of the advisor, figures, and the page that contains them.

Everything is computed from the JSON file of a run, and from that of compare_objectives.py.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynamics_report import DOCS as DYNAMICS
from dynamics_report import (
    RESULTS,
    ROOT,
    Places,
    canvas,
    color,
    is_significant,
    legend_below,
    mean_error,
    minus,
    pick,
    picture,
    save,
    table,
)
from dynamics_report import TARGETS as DYNAMICS_TARGETS

from megatron_dft.advisor.statistics import recommend
from megatron_dft.metrics import BINS

Json = dict[str, Any]
DOCS = Places(RESULTS / "real-model.json", ROOT / "docs/real-model.md", ROOT / "docs/figures")
MEASURES = {"sampled": "sampled replies", "greedy": "greedy replies"}
LEARNED = 0.1  # exact match above which a task counts as learned
PREFIX = "real-model"


class Setting(NamedTuple):
    """Task, start and share of wrong replies."""

    task: str
    start: str
    noise: float

    def __str__(self) -> str:
        return f"{self.task}, {self.start}, {self.noise:.0%} wrong"


def settings_of(results: Json) -> list[Setting]:
    return [Setting(*place.split(), noise) for place in results["settings"]["seeds"] for noise in noises(results)]


def noises(results: Json) -> list[float]:
    return results["settings"]["noise"]


def runs_at(results: Json, setting: Setting, objective: str, rate: float | None = None) -> list[Json]:
    """Runs of a setting and objective by seed; rate None: the rate that every objective has."""
    rate = results["settings"]["rates"][0] if rate is None else rate
    wanted = {**setting._asdict(), "objective": objective, "rate": rate}
    found = [run for run in results["runs"] if all(run[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda run: run["seed"])


def scores(results: Json, setting: Setting, objective: str, measure: str, rate: float | None = None) -> list[float]:
    """Exact match per held-out problem, mean over seeds."""
    runs = runs_at(results, setting, objective, rate)
    return [statistics.fmean(values) for values in zip(*(run[measure] for run in runs), strict=True)]


def best_and_ties(values: dict[str, list[float]]) -> tuple[str, list[str]]:
    """The name with the highest mean, and every name that is not significantly below it (paired)."""
    best = max(values, key=lambda name: statistics.fmean(values[name]))
    ties = [name for name in values if name == best or not is_significant(minus(values[best], values[name]))]
    return best, ties


def show(values: Sequence[float]) -> str:
    mean, error = mean_error(values)
    return f"{mean:.2f} ± {error:.2f}"


# ---- The page ---------------------------------------------------------------------------------------------------


def page(results: Json, dynamics: Json, places: Places) -> str:
    """Text of docs/real-model.md; every number comes from the JSON files."""
    return "\n".join(
        [
            "# A real model\n",
            *introduction(results, places),
            *results_part(results, places),
            *verdicts_part(results),
            *rates_part(results),
            *curves_part(places),
            *advisor_part(results, dynamics),
        ]
    )


def introduction(results: Json, places: Places) -> list[str]:
    facts, settings = results["facts"], results["settings"]
    seconds = sum(run["seconds"] for run in results["runs"])
    gsm8k = any(place.startswith("gsm8k") for place in settings["seeds"])
    command = f"python tools/studies/real_model.py{' --reduced' * settings['reduced']}{' --data FOLDER' * gsm8k}"
    seeds = ", ".join(f"{place.replace(' ', ', ')}: {count}" for place, count in settings["seeds"].items())
    return [
        f"`{command}{' --docs' * (places == DOCS)}` writes this page from `{os.path.relpath(places.numbers, ROOT)}`. "
        f"{facts['model']}, {facts['device']}, processes: {facts['processes']}, threads of each: {facts['threads']}; "
        f"{seconds / 60:.0f} process-minutes of runs; torch {facts['torch']}, megatron_dft {facts['megatron_dft']}, "
        f"{facts['date']}, commit {facts['commit']}.\n",
        "**Task.** Two-step word problems with a worked reply that ends in the number "
        "(`examples/word_problems.py`)"
        + f", and GSM8K, questions and replies of at most {settings['longest']} tokens"
        * gsm8k
        + ". A share of the training replies belongs to another problem (wrong). Held-out replies are all correct. "
        "The start *pretrained* is the model as it comes; *trained* was first trained with nll on "
        f"{settings['trained_examples']} other problems with correct replies.\n",
        f"**Training.** {settings['steps']} steps of {settings['batch']} conversations, each seen once. AdamW at "
        f"{settings['rates'][0]:g}, decaying to 0. All objectives of a seed have the same batches. Seeds: {seeds}.\n",
        f"**Measured** on {settings['held_out']} held-out problems: exact match of the last number, greedy and sampled "
        f"at temperature 1 ({settings['samples']} replies per problem and seed). ± is one standard error over "
        "problems, of the mean over seeds. *Known* is the NLL of the base model's own replies to 16 general questions: "
        "the more it rises, the more was forgotten.\n",
        f"**Limits.** One model of 135M parameters, arithmetic word problems only, {settings['steps']} steps. The "
        f"standard error does not contain the variance between seeds, which can be much larger: {widest(results)}.\n",
    ]


def results_part(results: Json, places: Places) -> list[str]:
    parts = [
        "## Results\n",
        f"At a learning rate of {results['settings']['rates'][0]:g}, all seeds. The order of the objectives depends on "
        "the [learning rate](#learning-rate). Bold: the best, and what is not significantly below it. From the trained "
        "start a score below *before* is damage.\n",
        picture_of(places, "match", "exact match of sampled and greedy replies, a group of bars per setting"),
    ]
    for setting in settings_of(results):
        parts += [f"### {setting}\n", setting_table(results, setting)]
        if not any(learned(results, setting, measure) for measure in MEASURES):
            parts.append(f"No objective learned this task: no exact match is above {LEARNED}. Compare only the NLL.\n")
    return parts


def learned(results: Json, setting: Setting, measure: str) -> bool:
    """Whether an objective has an exact match above `LEARNED` at its best rate."""
    names = results["settings"]["objectives"]
    return max(statistics.fmean(best_scores(results, setting, name, measure)) for name in names) > LEARNED


def setting_table(results: Json, setting: Setting) -> str:
    """One row per objective, the best in bold with everything that is not significantly below it."""
    start = before(results, setting)
    names = results["settings"]["objectives"]
    ties = {
        m: best_and_ties({n: scores(results, setting, n, m) for n in names})[1] if learned(results, setting, m) else []
        for m in MEASURES
    }
    rows = [["before", show(start["sampled"]), show(start["greedy"]), *numbers_of([start])]]
    for name in names:
        cells = {m: show(scores(results, setting, name, m)) for m in MEASURES}
        marked = [f"**{text}**" if name in ties[m] else text for m, text in cells.items()]
        rows.append([f"`{name}`", *marked, *numbers_of(runs_at(results, setting, name))])
    return table(["", *MEASURES.values(), "NLL", "mean p", "known"], rows)


def numbers_of(runs: list[Json]) -> list[str]:
    return [f"{statistics.fmean(run[key] for run in runs):.3f}" for key in ("nll", "p", "known")]


def before(results: Json, setting: Setting) -> Json:
    return next(b for b in results["before"] if (b["task"], b["start"]) == setting[:2])


Differences = list[tuple[str, list[float]]]  # what is compared, and its paired differences
CLAIMS: dict[str, Callable[[Json], Differences]] = {}


def claim(text: str) -> Callable:
    """Register a claim: the paired differences that must all be significantly positive."""

    def register(function: Callable[[Json], Differences]) -> Callable:
        CLAIMS[text] = function
        return function

    return register


def differences(results: Json, start: str, better: str, worse: str, noisy: bool | None) -> Differences:
    """Exact match of sampled replies, `better` minus `worse`, in every setting of a start."""
    found: Differences = []
    for setting in settings_of(results):
        if setting.start == start and setting.task == "problems" and noisy in (None, setting.noise > 0):
            pair = (better, worse)
            same = minus(*(scores(results, setting, name, "sampled") for name in pair))
            best = minus(*(best_scores(results, setting, name, "sampled") for name in pair))
            found += [(f"{setting}, same rate{by_seed(results, setting, pair)}", same)]
            found += [(f"{setting}, best rates", best)]
    return found


@claim("1. From a model that cannot do the task, nll beats dft")
def _weak_start(results: Json) -> Differences:
    return differences(results, "pretrained", "nll", "dft", None)


@claim("2. From a model that can, dft beats nll on data with wrong replies")
def _strong_start(results: Json) -> Differences:
    return differences(results, "trained", "dft", "nll", True)


@claim("3. From a model that cannot do the task, nll followed by dft beats nll on data with wrong replies")
def _schedule(results: Json) -> Differences:
    return differences(results, "pretrained", schedule_of(results), "nll", True)


def by_seed(results: Json, setting: Setting, pair: tuple[str, str]) -> str:
    """The differences of each seed."""
    better, worse = ([statistics.fmean(r["sampled"]) for r in runs_at(results, setting, name)] for name in pair)
    return f" (by seed {', '.join(f'{d:+.2f}' for d in minus(better, worse))})"


def widest(results: Json) -> str:
    """The setting and objective whose seeds differ most."""
    values = {
        (setting, name): [statistics.fmean(run["sampled"]) for run in runs_at(results, setting, name)]
        for setting in settings_of(results)
        for name in results["settings"]["objectives"]
    }
    (setting, name), shares = max(values.items(), key=lambda item: max(item[1]) - min(item[1]))
    return f"sampled replies of {name} in {setting}: {', '.join(f'{share:.2f}' for share in shares)}"


def seeds_text(results: Json) -> str:
    """Number of seeds that ran at every rate."""
    count = results["settings"]["swept_seeds"]
    return "one seed" if count == 1 else f"{count} seeds"


def schedule_of(results: Json) -> str:
    return next(name for name in results["settings"]["objectives"] if "start=" in name)


def verdict(found: Differences) -> str:
    """reproduced: every difference is significantly positive."""
    if not found:
        return "not tested"
    return "reproduced" if all(is_significant(values) for _, values in found) else "not reproduced"


def verdicts_part(results: Json) -> list[str]:
    rows = []
    for text, judge in CLAIMS.items():
        found = judge(results)
        shown = "; ".join(f"{name} = {mean_error(v)[0]:+.2f} ± {mean_error(v)[1]:.2f}" for name, v in found)
        rows.append([text, f"**{verdict(found)}**", shown])
    return [
        "## Claims\n",
        "Exact match of sampled replies, differences paired by problem: at the same learning rate, all seeds; at the "
        f"best rate of each, {seeds_text(results)}. A difference is significant if it is larger than twice its "
        "standard error. The best rate is selected by this same score. A claim is reproduced if all its differences "
        "are significant. This is a weak criterion, because it pools the seeds: *by seed* shows them.\n",
        table(["claim", "verdict", "differences"], rows),
    ]


def rates_part(results: Json) -> list[str]:
    """Exact match of the swept objectives at each learning rate."""
    rates = results["settings"]["rates"]
    rows = []
    for setting in settings_of(results):
        cells = []
        for name in results["settings"]["swept"]:
            values = {rate: rate_scores(results, setting, name, rate) for rate in rates}
            known = {rate: v for rate, v in values.items() if v}
            best = max(known, key=lambda rate: statistics.fmean(known[rate])) if len(known) > 1 else None
            cells += [f"**{show(v)}**" if rate == best else show(v) if v else "" for rate, v in values.items()]
        rows.append([str(setting), *cells])
    head = [f"{name}, {rate:g}" for name in results["settings"]["swept"] for rate in rates]
    return [
        "## Learning rate\n",
        f"Exact match of sampled replies, {seeds_text(results)}, the best rate of each objective in "
        "bold. Only these rates were run. The advisor recommends the rate of the nll run, and a lower one.\n",
        table(["setting", *head], rows),
        *(same_best_rate(results, name) for name in results["settings"]["swept"] if name != "nll"),
        "",
    ]


def same_best_rate(results: Json, name: str) -> str:
    """In how many settings an objective has the best rate of nll."""
    rates = results["settings"]["rates"]
    settings = [s for s in settings_of(results) if all(runs_at(results, s, name, rate) for rate in rates)]

    def best(setting: Setting, objective: str) -> float:
        return max(rates, key=lambda rate: statistics.fmean(rate_scores(results, setting, objective, rate)))

    same = sum(best(setting, name) == best(setting, "nll") for setting in settings)
    return f"- The best rate of `{name}` is that of `nll` in {same} of {len(settings)} settings."


def rate_scores(results: Json, setting: Setting, name: str, rate: float, measure: str = "sampled") -> list[float]:
    """Scores of the seeds that ran at every rate."""
    runs = runs_at(results, setting, name, rate)[: results["settings"]["swept_seeds"]]
    return [statistics.fmean(v) for v in zip(*(run[measure] for run in runs), strict=True)]


def best_scores(results: Json, setting: Setting, name: str, measure: str) -> list[float]:
    """Scores at the rate with the highest mean, of the seeds that ran at every rate."""
    found = [rate_scores(results, setting, name, rate, measure) for rate in results["settings"]["rates"]]
    return max(filter(None, found), key=statistics.fmean)


def curves_part(places: Places) -> list[str]:
    return [
        "## Curves\n",
        "NLL of the training batches, wrong replies included, mean over seeds.\n",
        picture_of(places, "curves", "training NLL over steps, a panel per setting"),
        "Share of held-out tokens by p after training, log scale. dft leaves more tokens below p = 0.1 than nll.\n",
        picture_of(places, "histogram", "histogram of p on correct held-out replies, a panel per setting"),
    ]


def picture_of(places: Places, name: str, text: str) -> str:
    return picture(places, name, text, PREFIX)


# ---- The advisor ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A setting of a study, the advice for it, and what won there."""

    name: str
    advice: str
    winners: dict[str, list[str]]  # of each measure: the best and all not significantly below; none if nothing learned
    tested: list[str]
    half: int  # index into HALVES


def cases_of(results: Json, dynamics: Json) -> list[Case]:
    """Every setting of both studies, in a fixed order."""
    found, later = [], []
    names = results["settings"]["objectives"]
    for setting in settings_of(results):
        measured = before(results, setting)["advice"][str(setting.noise)]
        advice = advice_of(measured, measured["objectives"], names)
        winners = {}
        for measure in MEASURES:
            best = {name: best_scores(results, setting, name, measure) for name in names}
            winners[measure] = best_and_ties(best)[1] if learned(results, setting, measure) else []
        of_rules = setting.task == "problems"  # the rules were chosen before GSM8K was run
        case = Case(str(setting), advice, winners, names, half_of(len(found)) if of_rules else 1)
        (found if of_rules else later).append(case)
    names = dynamics["settings"]["objectives"]
    for prior in ("strong", "middle", "weak"):
        for targets in DYNAMICS_TARGETS:
            runs = {name: pick(dynamics, prior, targets, name) for name in names}
            first = [run["first"] for run in runs["nll"]]
            every = {ours: statistics.fmean(row[theirs] for row in first) for ours, theirs in OF_DYNAMICS.items()}
            share = [statistics.fmean(x) for x in zip(*(run["before"]["share"] for run in runs["nll"]), strict=True)]
            every |= {"tokens": 1e6, "histogram": [0.0] * BINS}
            objectives = {"nll": {"gradient_by_p": share}, "dft": {"gate_mass": every["mean_p"]}}
            keys = {"sampled": "held-out p", "greedy": "held-out accuracy"}
            winners = {}
            for measure, key in keys.items():
                values = {name: [run["last"][key] for run in runs[name]] for name in names}
                winners[measure] = best_and_ties(values)[1]
            advice = advice_of(every, objectives, names)
            found.append(Case(f"{FACTS}{prior} prior, {targets}", advice, winners, names, half_of(len(found))))
    return found + later


OF_DYNAMICS = {"accuracy": "train accuracy", "mean_p": "train p", "nll": "train nll"}


def advice_of(every: Json, objectives: Json, names: Sequence[str]) -> str:
    """The advisor's objective. Its schedule is compared with that of the study, whatever the steps are."""
    advised = recommend(every, {}, objectives)["objective"]
    return next((name for name in names if "start=" in name), advised) if "start=" in advised else advised


def outcome(case: Case, measure: str) -> str:
    if case.advice not in case.tested:
        return "not tested"
    if not case.winners[measure]:
        return NOTHING
    return "hit" if case.advice in case.winners[measure] else "miss"


def advisor_part(results: Json, dynamics: Json) -> list[str]:
    cases = cases_of(results, dynamics)
    head = ["setting", "half", "advice", *(x for text in MEASURES.values() for x in (f"best, {text}", "outcome"))]
    rows = []
    for case in cases:
        cells = [x for m in MEASURES for x in (", ".join(case.winners[m]), outcome(case, m))]
        rows.append([case.name, HALVES[case.half], case.advice, *cells])
    counts = []
    for half in (0, 1):
        for measure, text in MEASURES.items():
            outcomes = [outcome(case, measure) for case in cases if case.half == half]
            tested = outcomes.count("hit") + outcomes.count("miss")
            counts.append(f"{text}, {HALVES[half]}: {outcomes.count('hit')} of {tested}")
    return [
        "## The advisor, compared with what won\n",
        "Rows: the settings of this study and of [learning dynamics](learning-dynamics.md). Advice: the recommendation "
        "of `megatron-dft advise` for the start and its training data. Best: the objectives that won. This study "
        "compares objectives at the best rate of each, learning dynamics at one rate. An objective wins if it is not "
        "significantly below the best. In learning dynamics, the mean p of the correct answer replaces the score of "
        "sampled replies. The rules were chosen on one half of the settings and are evaluated on both. "
        f"{NOTHING.capitalize()}: no objective has an exact match above {LEARNED}.\n",
        table(head, rows),
        f"Hits: {'; '.join(counts)}.\n",
        "Hits of the advice, and of one objective for every setting:\n",
        always_table(cases),
        "The evidence is thin: a few settings, one real model, and the halves are not independent. The advice "
        "is meant for sampled replies.\n",
    ]


def always_table(cases: list[Case]) -> str:
    """Settings in which the advice wins, and in which an objective does, in each study."""
    studies: dict[str, list[Case]] = {"this study": [], "learning dynamics": []}
    for case in cases:
        studies["learning dynamics" if case.name.startswith(FACTS) else "this study"].append(case)
    choices: dict[str, Callable[[Case], str]] = {
        "the advice": lambda case: case.advice,
        "always nll": lambda case: "nll",
        "always dft": lambda case: "dft",
        "always the schedule": lambda case: next(name for name in case.tested if "start=" in name),
    }

    def share(of: list[Case], choose: Callable[[Case], str], measure: str) -> str:
        of = [case for case in of if case.winners[measure]]
        return f"{sum(choose(case) in case.winners[measure] for case in of)} of {len(of)}"

    rows = [
        [name, *(share(of, choose, measure) for of in studies.values() for measure in MEASURES)]
        for name, choose in choices.items()
    ]
    return table(["", *(f"{study}, {text}" for study in studies for text in MEASURES.values())], rows)


FACTS = "facts, "
NOTHING = "nothing learned"
HALVES = ("rules chosen on it", "held out")


def half_of(i: int) -> int:
    """Alternates by task and, within it, by the share of wrong replies."""
    return (i // 2 + i) % 2


# ---- The figures ------------------------------------------------------------------------------------------------


def draw_match(results: Json, path: Path) -> None:
    """Plot exact match of each objective, a row per measure, a group of bars per setting."""
    names, settings = results["settings"]["objectives"], settings_of(results)
    figure, axes = canvas(len(MEASURES), 1, 9.5, 5.5, sharex=True, sharey=True)
    width = 0.8 / len(names)
    for k, (measure, title) in enumerate(MEASURES.items()):
        for i, name in enumerate(names):
            means, errors = zip(*(mean_error(scores(results, s, name, measure)) for s in settings), strict=True)
            places = [j + width * (i - (len(names) - 1) / 2) for j in range(len(settings))]
            axes[k][0].bar(places, means, width, yerr=errors, color=color(i), label=name, error_kw={"elinewidth": 0.8})
        starts = [statistics.fmean(before(results, s)[measure]) for s in settings]
        for j, start in enumerate(starts):
            axes[k][0].plot([j - 0.45, j + 0.45], [start, start], "k--", lw=1, label="before" if j == 0 else None)
        axes[k][0].set_ylabel(f"exact match,\n{title}")
    axes[-1][0].set_xticks(range(len(settings)), [str(s).replace(", ", "\n") for s in settings], fontsize=8)
    legend_below(figure, axes[0][0])
    save(figure, path)


def panels(results: Json, draw: Callable[[Any, Setting, str, int], None], path: Path, label: str, **how: Any) -> None:
    """One panel per setting."""
    settings = settings_of(results)
    figure, axes = canvas(1, len(settings), max(3.0 * len(settings), 6.0), 3.4, sharey=True)
    for axis, setting in zip(axes[0], settings, strict=True):
        for i, name in enumerate(results["settings"]["objectives"]):
            draw(axis, setting, name, i)
        axis.set_title(str(setting), fontsize=9)
        axis.set(**how)
    axes[0][0].set_ylabel(label)
    legend_below(figure, axes[0][0])
    save(figure, path)


def draw_curves(results: Json, path: Path) -> None:
    def draw(axis: Any, setting: Setting, name: str, i: int) -> None:
        curves = [[point["nll"] for point in run["curve"]] for run in runs_at(results, setting, name)]
        axis.plot([statistics.fmean(values) for values in zip(*curves, strict=True)], color=color(i), label=name)

    panels(results, draw, path, "training NLL, nats", xlabel="step")


def draw_histogram(results: Json, path: Path) -> None:
    def draw(axis: Any, setting: Setting, name: str, i: int) -> None:
        shares = [run["histogram"] for run in runs_at(results, setting, name)]
        mean = [statistics.fmean(values) for values in zip(*shares, strict=True)]
        axis.stairs(mean, [k / BINS for k in range(BINS + 1)], color=color(i), label=name)

    panels(results, draw, path, "share of held-out tokens", xlabel="p", yscale="log")


FIGURES: dict[str, Callable[[Json, Path], None]] = {
    f"{PREFIX}-match.png": draw_match,
    f"{PREFIX}-curves.png": draw_curves,
    f"{PREFIX}-histogram.png": draw_histogram,
}


def write_page(results: Json, places: Places) -> None:
    """Write the page and its figures."""
    dynamics = json.loads(DYNAMICS.numbers.read_text())
    for name, draw in FIGURES.items():
        draw(results, places.figures / name)
    places.page.write_text(page(results, dynamics, places))
