"""What scale_model.py predicts, as the page docs/scale.md; and its predictions against steps that were measured.

    predicted     tables by model, number of GPUs, share of masked tokens, cluster: nothing in them is measured
    times         of a file of benchmark_layouts.py. What a FLOP, a byte and a call cost is fitted to its rows of one
                  rank and of two tensor-parallel ones; all others are predictions, shown with their errors
    collectives   of the loss stage, from the -wire.csv file beside it: calls and bytes must be exactly those predicted

The masks of the measured batch are made again (megatron_step.py), because with dropped tokens each rank of data and
context parallelism has a number of its own. CPU ranks share the cores: times are multiplied by ranks / CORES.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import scale_model
import torch
from megatron_step import Task
from report import RESULTS, ROOT, Rows, read, table
from scale_model import (
    CHUNKS,
    CLUSTERS,
    DROPPED,
    GPUS,
    MODELS,
    OURS,
    ROOM,
    STOCK,
    WAYS,
    Batch,
    Cluster,
    Layout,
    Model,
    Plan,
    Way,
    calls,
    loss_work,
    smallest,
    way_of,
)

PAGE = ROOT / "docs" / "scale.md"
CORES = 2  # of the machine whose CPU ranks have a file in tools/results/
TIMED = (STOCK, OURS, DROPPED, CHUNKS)  # whose times are predicted
PLACE = ("world", "tp", "sp", "pp", "cp", "dp")
PUBLISHED = {
    "Megatron": (52, 21.25),
    "Megatron, fused": (51, 18.23),
    "Liger, vocab-parallel": (22, 7.96),
}  # B/logit, ms
Plans = Mapping[int, Plan | None]  # by number of GPUs
Row = dict[str, str]
Sent = tuple[str, int, int]  # collective, calls, bytes


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=scale_model.__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write docs/scale.md")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a file of benchmark_layouts.py")
    parser.add_argument("--model", choices=[model.name for model in MODELS], default=MODELS[0].name)
    parser.add_argument("--cluster", choices=[cluster.name for cluster in CLUSTERS], default=CLUSTERS[0].name)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--cp", type=int, default=1, help="context-parallel size")
    for kind in (Model, Cluster, Batch):
        for field in fields(kind):
            if field.name != "name":
                number = int if field.type == "int" else float
                parser.add_argument(f"--{field.name.replace('_', '-')}", type=number, help=f"of the {kind.__name__}")
    wanted = parser.parse_args(words)
    if wanted.docs:
        PAGE.write_text(page())
    elif wanted.check:
        print(check(wanted.check))
    else:
        model = overridden(next(x for x in MODELS if x.name == wanted.model), wanted)
        cluster = overridden(next(x for x in CLUSTERS if x.name == wanted.cluster), wanted)
        plans = [smallest(STOCK, model, cluster, n, overridden(Batch(), wanted), wanted.cp) for n in wanted.gpus]
        if not any(plans):
            sizes = f"{model.name} with {ROOM:.0%} of {cluster.memory_gb:g} GB a GPU"
            parser.error(f"--gpus: expected enough for {sizes}, got {wanted.gpus}; give more, or a larger --cp")
        print(tables(dict(zip(wanted.gpus, plans, strict=True))))
    return 0


def overridden(sizes: Any, wanted: argparse.Namespace) -> Any:
    """With the values that flags give."""
    given = {field.name: getattr(wanted, field.name, None) for field in fields(sizes) if field.name != "name"}
    return replace(sizes, **{name: value for name, value in given.items() if value is not None})


# ---- What is predicted ------------------------------------------------------------------------------------------


def page() -> str:
    """docs/scale.md."""
    every = [plans(model) for model in MODELS]
    files = sorted(RESULTS.glob("*-layouts.csv"))
    checks = [check(path) for path in files] or ["No layouts measured yet.\n"]
    return "\n".join(
        [
            "# The loss at scale\n",
            "Predicted by counting FLOP, bytes and collectives (`python tools/scale_model.py --docs` wrote this page, "
            "and the tool's first lines have every formula). **None of these GPU numbers has been measured by this "
            "project.** What the counting is worth is at the end.\n",
            assumptions(),
            "## The loss stage of a micro-batch\n",
            f"Output layer and loss, forward and backward, with {Batch().masked:.0%} of the tokens masked, on an "
            f"{CLUSTERS[0].name}: ms, as many transformer layers (t_loss / t_layer), and GB of memory.\n",
            stage_table(every),
            "The same by its parts, ms of products + loss + weight and hidden states + collectives:\n",
            parts_table(every),
            "## Its share of a step\n",
            "What a step would save if the loss were free. TP x PP is the smallest layout that fits; a range of GPUs "
            "has equal rows. m: micro-batches of a pipeline, from the fewest GPUs to the most.\n",
            share_table(every),
            "## Masked tokens\n",
            masked_table(MODELS[2]),
            "## Other GPUs\n",
            "512 of them: layout, ms of the loss stage of a micro-batch, share of a step.\n",
            cluster_table(),
            consequences(every),
            "## Against measured times\n",
            "The loss alone on an H100, forward and backward of 8192 tokens x 131072 words in bf16, as measured by the "
            "authors of Liger Kernel; the predicted time is that of the bytes counted:\n",
            published_table(),
            *checks,
        ]
    )


def plans(model: Model) -> dict[int, Plan | None]:
    """On the first of the clusters."""
    return {gpus: smallest(STOCK, model, CLUSTERS[0], gpus, Batch()) for gpus in GPUS}


def tables(found: Plans) -> str:
    """For one model."""
    return "\n".join([stage_table([found]), parts_table([found]), share_table([found])])


def assumptions() -> str:
    rates = [
        [
            x.name,
            f"{x.flop_per_s / 1e12:g}",
            f"{x.memory_bytes_per_s / 1e12:g}",
            f"{x.memory_gb:g}",
            f"{x.intra_bytes_per_s / 1e9:g}, {x.intra_latency_us:g}",
            f"{x.inter_bytes_per_s / 1e9:g}, {x.inter_latency_us:g}",
        ]
        for x in CLUSTERS
    ]
    head = ["GPU", "TFLOP/s", "TB/s", "GB", "within a node: GB/s, µs", "between nodes"]
    return "\n".join(
        [
            "## What is assumed\n",
            table(head, rates),
            "Sustained rates. Of the H200 others have measured 4.3 TB/s for a copy and 790 TFLOP/s for a bf16 product: "
            "90% and 80% of its data sheet (4.8, and 989 dense). The H100 and the B200 get the same shares of theirs "
            "(3.35 and 989; 8.0 and 2250; memory of the "
            "[DGX B200](https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html)). Links: assumed, "
            "as in tools/report.py; 900 GB/s of a B200's NVLink 5 one way and 50 GB/s of a port are taken at 90%.\n",
            f"Batches: {Batch().global_batch} samples of {Batch().seq_length} tokens, in micro-batches of one sample; "
            "more pipelines than samples enlarge the batch. Layout: the first of TP 1, 2, 4, 8, then TP 8 with PP 2, "
            f"4, ... 32 whose fullest rank, with Megatron's loss, takes at most {ROOM:.0%} of the memory; DP takes the "
            "rest. bf16 weights, fp32 gradients, Adam's state sharded over DP, selective recomputation, sequence "
            "parallelism, 1F1B without interleaving.\n",
        ]
    )


def by_tp(every: Iterable[Plans]) -> list[Plan]:
    """One plan for each model and TP: the loss stage of a micro-batch is the same in all others."""
    found = (plan for of_model in every for plan in of_model.values() if plan)
    return list({(plan.model.name, plan.layout.tp): plan for plan in found}.values())


def stage_table(every: Iterable[Plans]) -> str:
    body = [[plan.model.name, str(plan.layout.tp), *(stage_cell(plan, way) for way in WAYS)] for plan in by_tp(every)]
    return table(["model", "TP", *(way.name for way in WAYS)], body)


def stage_cell(plan: Plan, way: Way) -> str:
    return f"{plan.loss_ms(way):.1f} ms, {plan.layers_worth(way):.2f}, {plan.loss_gb(way):.1f} GB"


def parts_table(every: Iterable[Plans]) -> str:
    body = []
    for plan in by_tp(every):
        cells = [" + ".join(f"{part:.2f}" for part in plan.loss_parts_ms(way)) for way in WAYS]
        body.append([plan.model.name, str(plan.layout.tp), *cells])
    return table(["model", "TP", *(way.name for way in WAYS)], body)


def share_table(every: Iterable[Plans]) -> str:
    """A row for each model and range of GPUs in which nothing changes."""
    body = []
    for of_model in every:
        rows = [(gpus, plan, share_cells(plan)) for gpus, plan in of_model.items()]
        for cells, group in itertools.groupby(rows, key=lambda row: row[2]):
            same = list(group)
            model = next(plan.model.name for plan in of_model.values() if plan)
            body.append([model, span(gpus for gpus, *_ in same), *cells[:1], span_of_batches(same), *cells[1:]])
    return table(["model", "GPUs", "TP x PP", "m", *(way.name for way in WAYS)], body)


def share_cells(plan: Plan | None) -> list[str]:
    """Layout and shares."""
    if plan is None:
        return ["does not fit", *[""] * len(WAYS)]
    return [f"{plan.layout.tp} x {plan.layout.pp}", *(f"{plan.share(way):.1%}" for way in WAYS)]


def span_of_batches(rows: list[tuple[int, Plan | None, list[str]]]) -> str:
    return span(plan.batch.micro_batches(plan.layout) for _, plan, _ in rows if plan)


def span(values: Iterable[int]) -> str:
    """First and last of them."""
    ends = list(values)
    return " to ".join(str(x) for x in dict.fromkeys([*ends[:1], *ends[-1:]]))


def masked_table(model: Model) -> str:
    """The loss stage over the share of masked tokens."""
    shares = (0.0, 0.3, 0.5, 0.7, 0.9)
    every = [Plan(model, CLUSTERS[0], Layout(tp=8), Batch(masked=share)) for share in shares]
    body = []
    for way in WAYS:
        cells = [f"{plan.loss_ms(way):.1f} ({plan.loss_ms(way) / plan.loss_ms(STOCK):.2f})" for plan in every]
        body.append([way.name, *cells])
    text = (
        f"{model.name} at TP 8 on an {CLUSTERS[0].name}: ms of the loss stage of a micro-batch (share of Megatron's)."
    )
    return text + "\n\n" + table(["masked", *(f"{share:.0%}" for share in shares)], body)


def cluster_table() -> str:
    body = []
    for cluster, model in itertools.product(CLUSTERS[1:], MODELS):
        plan = smallest(STOCK, model, cluster, 512, Batch())
        cells = [f"{plan.loss_ms(way):.1f} ms, {plan.share(way):.1%}" for way in WAYS] if plan else []
        body.append([cluster.name, model.name, share_cells(plan)[0], *(cells or [""] * len(WAYS))])
    return table(["GPU", "model", "TP x PP", *(way.name for way in WAYS)], body)


def consequences(every: list[Plans]) -> str:
    """Said with the numbers of the tables."""
    small, large = by_tp(every[:1])[0], next(plan for plan in every[-1].values() if plan and plan.layout.pp == 16)
    alone = large.loss_ms(STOCK) / (large.layer_ms() * large.model.layers + large.loss_ms(STOCK))
    across = replace(large, layout=replace(large.layout, tp=2 * large.cluster.gpus_per_node))
    worth = [
        ", ".join(f"{plan.layers_worth(way):.1f} ({plan.model.name})" for plan in firsts(every))
        for way in (STOCK, DROPPED)
    ]
    exchange = [f"{plan.loss_parts_ms(way)[3]:.1f}" for plan in (large, across) for way in (STOCK, OURS, DROPPED)]
    gb = {way: f"{large.loss_gb(way):.1f}" for way in WAYS}
    lines = [
        f"**The pipeline multiplies the loss.** In the {large.model.name} it is {alone:.1%} of the work, but at PP "
        f"{large.layout.pp} {large.share(STOCK):.1%} of the step, because all other stages wait for the last one; "
        f"dropping masked tokens leaves {large.share(DROPPED):.1%}. Where micro-batches are few, the filling of the "
        "pipeline hides part of it. Data parallelism changes nothing: without a pipeline the share is the same on 8 "
        "GPUs and on 4096.",
        f"**Layers fewer on the last stage.** Megatron's loss is worth {worth[0]} layers; with masked tokens dropped "
        f"it is {worth[1]}. Above 1 a layer should move to another stage; below 1 that would only make the other one "
        "the slowest. Where layers do not divide anyway, the last stage is one short and has room for the loss: so "
        "Meta did with the 405B (arXiv:2407.21783, section 3.3.2).",
        f"**Without masked tokens** only the loss itself is cheaper: ours takes {ratio(small, OURS, 0.0):.2f} of "
        f"Megatron's time for the {small.model.name}, {ratio(large, OURS, 0.0):.2f} for the {large.model.name}, whose "
        "products are wider. Megatron's fused loss saves next to nothing, as it moves as many bytes, and takes the "
        "most memory.",
        f"**Chunks lose time**, {ratio(small, CHUNKS) / ratio(small, DROPPED):.2f} times that of dropping alone. They "
        f"are faster than Megatron's loss from {break_even(small):.0%} masked tokens on ({small.model.name}), "
        f"{break_even(large):.0%} ({large.model.name}). They save memory where TP is small: "
        f"{small.loss_gb(STOCK):.1f} to {small.loss_gb(CHUNKS):.1f} GB at TP {small.layout.tp}; at TP 8 "
        f"({large.model.name}) {gb[STOCK]} to {gb[CHUNKS]}, more than dropping alone, {gb[DROPPED]}. "
        + fits_smaller(every),
        f"**Collectives** take {exchange[0]} of {large.loss_ms(STOCK):.1f} ms at TP 8 ({large.model.name}), most of "
        f"it for hidden states; {exchange[1]} with ours, {exchange[2]} with masked tokens dropped. TP across two "
        f"nodes makes that {exchange[3]}, {exchange[4]} and {exchange[5]}.",
    ]
    return "## What follows\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def firsts(every: Iterable[Plans]) -> list[Plan]:
    """The plan of each model with the fewest GPUs."""
    return [next(plan for plan in of_model.values() if plan) for of_model in every]


def ratio(plan: Plan, way: Way, masked: float | None = None) -> float:
    """Time of the loss stage against Megatron's."""
    if masked is not None:
        plan = replace(plan, batch=replace(plan.batch, masked=masked))
    return plan.loss_ms(way) / plan.loss_ms(STOCK)


def break_even(plan: Plan) -> float:
    """The share of masked tokens from which chunks are faster than Megatron's loss."""
    return next(f / 100 for f in range(100) if ratio(plan, CHUNKS, f / 100) < 1.0)


def fits_smaller(every: Iterable[Plans]) -> str:
    """Where the memory they save decides about the layout."""
    found: dict[str, list[int]] = {}
    for gpus, plan in itertools.chain.from_iterable(of_model.items() for of_model in every):
        other = plan and smallest(CHUNKS, plan.model, plan.cluster, gpus, plan.batch)
        if plan and other and other.layout != plan.layout:
            sizes = f"{plan.model.name}, {share_cells(other)[0]} instead of {share_cells(plan)[0]}"
            found.setdefault(sizes, []).append(gpus)
    names = "; ".join(f"{name} on {span(gpus)} GPUs" for name, gpus in found.items())
    return f"A smaller layout fits with them for: {names}." if found else "No layout gets smaller with them."


def published_table() -> str:
    """Others' measurements against the bytes that are counted."""
    body = []
    for name, (logit_bytes, ms) in PUBLISHED.items():
        guess = 1e3 * logit_bytes * 8192 * 131072 / CLUSTERS[0].memory_bytes_per_s
        body.append([name, f"{logit_bytes}", f"{ms:.2f}", f"{guess:.2f} ({guess / ms - 1:+.0%})"])
    return table(["loss", "bytes per logit", "measured ms", "predicted"], body)


# ---- Against what was measured ----------------------------------------------------------------------------------


def check(path: Path) -> str:
    """Predicted against measured, of one file of benchmark_layouts.py and the -wire.csv beside it."""
    every, wire = read(path), read(path.with_name(path.stem.removesuffix("-layouts") + "-wire.csv"))
    rows = [row for row in every if way_of(row["implementation"]) in TIMED]
    costs = fitted(rows)
    pairs = [(row, float(row["loss_stage_ms"]), float(quantities(row) @ costs)) for row in rows]
    wrong = disagreements(every, wire)
    verdict = f"**{len(wrong)} of the predictions are wrong:** {'; '.join(wrong)}" if wrong else "all as predicted"
    first = rows[0]
    sizes = ", ".join(f"{name} {first[name]}" for name in ("hidden", "vocab", "seq_length", "global_batch"))
    link = f"[{path.name}]({os.path.relpath(path, PAGE.parent)})"
    return "\n".join(
        [
            f"**{first['device']}**, {first['date']}, commit {first['commit']}, torch {first['torch']}, {link}: "
            f"{sizes}, {first['dtype']}, {float(first['masked']):.0%} of the tokens masked. The loss stage in ms per "
            "step, measured → predicted (error); ° marks what the costs were fitted to.\n",
            timed_table(pairs),
            errors_text(pairs),
            f"Fitted: {costs_text(costs)}. More ranks than the {CORES} cores are predicted as if all of them worked "
            "all the time; those of a pipeline wait for each other, so that the last can take less.\n",
            "Calls and bytes of the collectives between tensor-parallel ranks in the loss stage, every objective, "
            f"{len(of_loss(wire))} numbers of each: {verdict}.\n",
        ]
    )


def where(row: Row) -> tuple[str, ...]:
    """The layout."""
    return tuple(row[key] for key in PLACE)


def is_fitted(row: Row) -> bool:
    """One rank, and two tensor-parallel ones."""
    return row["world"] == row["tp"] and int(row["tp"]) <= 2


def fitted(rows: Rows) -> np.ndarray:
    """ms of each of `quantities`, none below 0, with the least sum of squared relative errors.

    Raises:
        ValueError: where there is nothing to fit them to.
    """
    chosen = [row for row in rows if is_fitted(row)]
    if not chosen:
        raise ValueError(
            "expected times of one rank, or of two that are tensor parallel, got none; run "
            "tools/benchmark_layouts.py on 1 and 2 ranks, which adds them to the file"
        )
    measured = np.array([float(row["loss_stage_ms"]) for row in chosen])
    matrix = np.array([quantities(row) for row in chosen]) / measured[:, None]
    best, least = np.zeros(matrix.shape[1]), np.inf
    for kept in itertools.product((False, True), repeat=matrix.shape[1]):  # the few costs allow to try every subset
        columns = matrix[:, kept]
        scale = np.abs(columns).max(0, initial=0.0) + 1e-300
        solution = np.linalg.lstsq(columns / scale, np.ones(len(chosen)), rcond=None)[0] / scale
        error = float(np.square(columns @ solution - 1.0).sum())
        if (solution >= 0.0).all() and error < least - 1e-12:
            least, best = error, np.zeros(matrix.shape[1])
            best[list(kept)] = solution
    return best


def quantities(row: Row) -> np.ndarray:
    """Of a step, on the rank that has most to do: FLOP, bytes of Megatron's logits, of ours, others; calls, sent."""
    way, tp, size = way_of(row["implementation"]), int(row["tp"]), element_bytes(row)
    model = Model("", int(row["hidden"]), 0, 0, 0, 0, int(row["vocab"]))
    cores = 1.0 if "NVIDIA" in row["device"] else max(1.0, int(row["world"]) / CORES)
    ranks = []
    for micro_batches in live_tokens(row):
        works = [loss_work(way, model, tokens_of(row), live, tp, row["sp"] == "True", size) for live in micro_batches]
        sent = [call.sent(tp) for work in works for call in work.calls]
        logits = sum(work.logit_bytes for work in works)
        logits_of = (logits, 0.0) if way.masked_logit_bytes == way.logit_bytes else (0.0, logits)
        others = sum(work.other_bytes for work in works)
        ranks.append([sum(work.flop for work in works), *logits_of, others, len(sent), sum(sent)])
    return cores * np.array(max(ranks))


def element_bytes(row: Row) -> int:
    return torch.finfo(getattr(torch, row["dtype"])).bits // 8


def tokens_of(row: Row) -> int:
    return int(row["seq_length"]) * int(row["micro_batch"]) // int(row["cp"])


def live_tokens(row: Row) -> list[list[int]]:
    """Tokens that are not masked in each micro-batch, for each rank of data and context parallelism.

    Raises:
        ValueError: if the masks that are made here are not those of the file.
    """
    names = ("hidden", "layers", "heads", "vocab", "seq_length", "micro_batch", "global_batch")
    sizes = {name: int(row[name]) for name in names}
    task, cp, dp = Task(**sizes, dtype=getattr(torch, row["dtype"])), int(row["cp"]), int(row["dp"])
    if task.valid() != int(row["valid"]):
        raise ValueError(
            f"valid: expected {row['valid']} tokens as in the file, got {task.valid()}; its masks are no longer those "
            "of megatron_step.py: measure again"
        )
    masks = [task.sample(i)[3].chunk(2 * cp) for i in range(task.global_batch)]
    live = [[int(chunks[r].sum() + chunks[-1 - r].sum()) for chunks in masks] for r in range(cp)]  # as Megatron cuts
    firsts = range(0, task.global_batch, task.micro_batch)
    micro_batches = [[max(1, sum(samples[i : i + task.micro_batch])) for i in firsts] for samples in live]
    return [of_rank[d::dp] for of_rank in micro_batches for d in range(dp)]


def disagreements(rows: Rows, wire: Rows) -> list[str]:
    """Layouts and implementations whose counted collectives are not those predicted."""
    found = []
    for row in (row for row in rows if row["tp"] != "1"):
        counted = {
            (sent["collective"], int(sent["calls"]), int(sent["bytes"]))
            for sent in of_loss(wire)
            if (where(sent), sent["implementation"]) == (where(row), row["implementation"])
        }
        if counted != predicted(row):
            name = " ".join(f"{key}{row[key]}" for key in PLACE) + f" {row['implementation']}"
            found.append(f"{name}: predicted {sorted(predicted(row))}, got {sorted(counted)}")
    return found


def of_loss(wire: Rows) -> Rows:
    """What tensor-parallel ranks send each other in the loss stage."""
    return [row for row in wire if (row["group"], row["part"]) == ("tp", "loss")]


def predicted(row: Row) -> set[Sent]:
    """Collective, calls and bytes of a step, of all ranks of the last stage, each once."""
    way, sizes = way_of(row["implementation"]), (int(row["tp"]), row["sp"] == "True", element_bytes(row))
    everything = set()
    for micro_batches in live_tokens(row):
        sent: dict[str, list[int]] = {}
        for live in micro_batches:
            for call in calls(way, int(row["hidden"]), tokens_of(row), live, *sizes):
                sent.setdefault(call.collective, []).append(int(call.nbytes))
        everything |= {(name, len(sizes), sum(sizes)) for name, sizes in sent.items()}
    return everything


def timed_table(pairs: list[tuple[Row, float, float]]) -> str:
    body = []
    for place, group in itertools.groupby(pairs, key=lambda pair: where(pair[0])):
        cells = {row["implementation"]: timed_cell(row, ms, guess) for row, ms, guess in group}
        body.append([*place, *(cells.get(way.name, "") for way in TIMED)])
    return table([*PLACE, *(way.name for way in TIMED)], body)


def timed_cell(row: Row, ms: float, guess: float) -> str:
    return f"{ms:.0f} → {guess:.0f} ({guess / ms - 1:+.0%}){'°' * is_fitted(row)}"


def errors_text(pairs: list[tuple[Row, float, float]]) -> str:
    """Of what is not fitted: errors of times, and of their ratios to Megatron's in the same layout."""
    tested = [pair for pair in pairs if not is_fitted(pair[0])]
    if not tested:
        return "No layout is left to predict.\n"
    errors = [abs(guess / ms - 1) for _, ms, guess in tested]
    stock = {where(row): (ms, guess) for row, ms, guess in tested if row["implementation"] == STOCK.name}
    ratios = []
    for row, ms, guess in tested:
        if row["implementation"] != STOCK.name and where(row) in stock:
            ratios.append(abs((guess / stock[where(row)][1]) / (ms / stock[where(row)][0]) - 1))
    text = f"Of {len(tested)} predicted times the median error is {statistics.median(errors):.0%}, the largest "
    text += f"{max(errors):.0%}"
    if ratios:
        text += f"; of {len(ratios)} ratios to Megatron's time {statistics.median(ratios):.0%} and {max(ratios):.0%}"
    return text + ".\n"


def costs_text(costs: np.ndarray) -> str:
    """As rates. A cost of 0: what it counts could not be told from the rest."""
    units = ("GFLOP/s", "GB/s of Megatron's logits", "GB/s of ours", "GB/s of weight and hidden states")
    rates = [f"{1e-6 / cost:.3g} {unit}" for cost, unit in zip(costs, units, strict=False) if cost]
    rates += [f"{1e3 * costs[4]:.0f} µs per call"] + [f"{1e-6 / costs[5]:.2g} GB/s sent"] * bool(costs[5])
    return ", ".join(rates)
