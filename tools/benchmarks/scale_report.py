"""Cost of the loss at scale: predictions of scale_model.py, the page docs/scale.md, and a comparison with measurements.

    python tools/benchmarks/scale_report.py --model "Llama 3 70B" --cluster H200 --masked 0.5    tables of one model
    python tools/benchmarks/scale_report.py --layers 48 --hidden 6144 --cp 4 --seq-length 65536  override any value
    python tools/benchmarks/scale_report.py --check DEVICE-DATE-layouts.csv                      check against times
    python tools/benchmarks/scale_report.py --docs                                               write docs/scale.md

    predicted     tables by model, number of GPUs, share of masked tokens and cluster; nothing in them is measured
    times         of a file of benchmark_layouts.py. The costs of a FLOP, a byte and a call are fitted to its rows with
                  one rank and with two tensor-parallel ranks. All other rows are predicted and shown with their errors
    collectives   of the loss stage, from the -wire.csv file beside it. Calls and bytes must match exactly

With removed tokens, each data-parallel and context-parallel rank has its own number of valid tokens. The masks of the
measured batch are therefore regenerated (megatron_step.py). CPU ranks share the cores: times are multiplied by ranks /
CORES.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
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
    STOCK,
    USABLE_MEMORY,
    VARIANTS,
    Batch,
    Cluster,
    Layout,
    Model,
    Plan,
    Variant,
    calls,
    loss_work,
    smallest,
    way_of,
)

from megatron_dft.utils import HelpFormatter

PAGE = ROOT / "docs" / "scale.md"
CORES = 2  # of the machine that measured the CPU ranks in tools/benchmarks/results/
TIMED = (STOCK, OURS, DROPPED, CHUNKS)  # variants whose measured times are predicted
PLACE = ("world", "tp", "sp", "pp", "cp", "dp")
PUBLISHED = {  # bytes per logit, ms
    "Megatron": (52, 21.25),
    "Megatron, fused": (51, 18.23),
    "Liger, vocab-parallel": (22, 7.96),
}
OVERRIDES = {  # help texts
    "hidden": "hidden size",
    "ffn": "MLP width",
    "layers": "number of transformer layers",
    "q": "total width of the queries",
    "k": "total width of the keys",
    "vocab": "vocabulary size",
    "flop_per_s": "sustained FLOP/s of large bf16 products",
    "memory_bytes_per_s": "sustained memory bandwidth of a copy, bytes/s",
    "memory_gb": "memory per GPU, GB",
    "intra_bytes_per_s": "bandwidth per direction within a node, bytes/s",
    "inter_bytes_per_s": "bandwidth per direction between nodes, bytes/s",
    "intra_latency_us": "latency of a collective within a node, microseconds",
    "inter_latency_us": "latency of a collective between nodes, microseconds",
    "gpus_per_node": "GPUs per node",
    "seq_length": "sequence length in tokens",
    "micro_batch": "micro-batch size in samples",
    "global_batch": "global batch size in samples",
    "masked": "share of masked tokens",
}
Plans = Mapping[int, Plan | None]  # by number of GPUs
Row = dict[str, str]
Sent = tuple[str, int, int]  # collective, calls, bytes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write docs/scale.md")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare with a -layouts.csv of benchmark_layouts.py"
    )
    parser.add_argument("--model", choices=[x.name for x in MODELS], default=MODELS[0].name, help="model sizes")
    parser.add_argument("--cluster", choices=[x.name for x in CLUSTERS], default=CLUSTERS[0].name, help="GPU rates")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="numbers of GPUs")
    parser.add_argument("--cp", type=int, default=1, help="context-parallel size")
    for kind, default in ((Model, "that of --model"), (Cluster, "that of --cluster"), (Batch, "")):
        for field in fields(kind):
            if field.name != "name":
                number = int if field.type == "int" else float
                text = f"{OVERRIDES[field.name]} (default: {default or field.default})"
                parser.add_argument(f"--{field.name.replace('_', '-')}", type=number, metavar="NUMBER", help=text)
    wanted = parser.parse_args(argv)
    if wanted.docs:
        PAGE.write_text(page())
    elif wanted.check:
        print(check(wanted.check))
    else:
        model = overridden(next(x for x in MODELS if x.name == wanted.model), wanted)
        cluster = overridden(next(x for x in CLUSTERS if x.name == wanted.cluster), wanted)
        plans = [smallest(STOCK, model, cluster, n, overridden(Batch(), wanted), wanted.cp) for n in wanted.gpus]
        if not any(plans):
            sizes = f"{model.name} with {USABLE_MEMORY:.0%} of {cluster.memory_gb:g} GB a GPU"
            parser.error(f"--gpus: expected enough for {sizes}, got {wanted.gpus}; give more, or a larger --cp")
        print(tables(dict(zip(wanted.gpus, plans, strict=True))))
    return 0


def overridden(sizes: Any, wanted: argparse.Namespace) -> Any:
    """Sizes with the values of the flags that were given."""
    given = {field.name: getattr(wanted, field.name, None) for field in fields(sizes) if field.name != "name"}
    return replace(sizes, **{name: value for name, value in given.items() if value is not None})


# ---- Predictions ------------------------------------------------------------------------------------------------


def page() -> str:
    """Text of docs/scale.md."""
    every = [plans(model) for model in MODELS]
    files = sorted(RESULTS.glob("*-layouts.csv"))
    checks = [check(path) for path in files] or ["No layouts measured yet.\n"]
    return "\n".join(
        [
            "# The loss at scale\n",
            "Predictions from counted FLOP, bytes and collectives. `python tools/benchmarks/scale_report.py --docs` "
            "writes this page; the docstring of `scale_model.py` lists every formula. **This project has measured "
            "none of these GPU numbers.** [The last section](#comparison-with-measured-times) compares the model with "
            "measurements.\n",
            assumptions(),
            "## The loss stage of a micro-batch\n",
            f"Output layer and loss, forward and backward, {Batch().masked:.0%} of the tokens masked, on an "
            f"{CLUSTERS[0].name}. Each cell: time in ms, time relative to one transformer layer (t_loss / t_layer), "
            "peak memory in GB.\n",
            stage_table(every),
            "The same time by part, in ms: products + loss + weight and hidden states + collectives.\n",
            parts_table(every),
            "## Share of a step\n",
            "The share of a step that is saved if the loss is free. TP x PP is the smallest layout that fits into "
            "memory. A range of GPUs has equal values. m: micro-batches per pipeline, from the smallest to the largest "
            "number of GPUs.\n",
            share_table(every),
            "## Masked tokens\n",
            masked_table(MODELS[2]),
            "## Other GPUs\n",
            "512 GPUs. Each cell: time of the loss stage per micro-batch, share of a step.\n",
            cluster_table(),
            consequences(every),
            "## Comparison with measured times\n",
            "The loss alone on an H100: forward and backward of bf16 logits, 8192 tokens x 131072 vocabulary entries. "
            "The authors of Liger Kernel measured the times. The prediction is counted bytes / memory bandwidth.\n",
            published_table(),
            *checks,
        ]
    )


def plans(model: Model) -> dict[int, Plan | None]:
    """Plans on the first cluster, by number of GPUs."""
    return {gpus: smallest(STOCK, model, CLUSTERS[0], gpus, Batch()) for gpus in GPUS}


def tables(found: Plans) -> str:
    """Tables of one model."""
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
    head = ["GPU", "TFLOP/s", "TB/s", "GB", "within a node: GB/s, µs", "between nodes: GB/s, µs"]
    return "\n".join(
        [
            "## Assumptions\n",
            table(head, rates),
            "- **Rates** are sustained rates. On the H200, others have measured 4.3 TB/s for a copy and 790 TFLOP/s "
            "for a bf16 product: 90% and 80% of the data sheet (4.8 TB/s, 989 TFLOP/s dense). The H100 (3.35, 989) and "
            "the B200 (8.0, 2250; memory of the "
            "[DGX B200](https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html)) get the same "
            "shares.\n"
            "- **Links** are assumed, as in tools/benchmarks/report.py. 900 GB/s per direction of the B200's NVLink 5 "
            "and 50 GB/s per port are taken at 90%.\n"
            f"- **Batch**: {Batch().global_batch} samples of {Batch().seq_length} tokens, micro-batches of one sample. "
            "More pipelines than samples enlarge the batch.\n"
            "- **Layout**: the first of TP 1, 2, 4, 8, then TP 8 with PP 2, 4, ... 32 whose fullest rank, with "
            f"Megatron's loss, uses at most {USABLE_MEMORY:.0%} of the memory. DP takes the remaining GPUs.\n"
            "- **Training**: bf16 weights, fp32 gradients, Adam state sharded over DP, selective recomputation, "
            "sequence parallelism, 1F1B without interleaving.\n",
        ]
    )


def by_tp(every: Iterable[Plans]) -> list[Plan]:
    """One plan per model and TP size; the loss stage of a micro-batch depends on nothing else."""
    found = (plan for of_model in every for plan in of_model.values() if plan)
    return list({(plan.model.name, plan.layout.tp): plan for plan in found}.values())


def stage_table(every: Iterable[Plans]) -> str:
    body = [
        [plan.model.name, str(plan.layout.tp), *(stage_cell(plan, variant) for variant in VARIANTS)]
        for plan in by_tp(every)
    ]
    return table(["model", "TP", *(variant.name for variant in VARIANTS)], body)


def stage_cell(plan: Plan, variant: Variant) -> str:
    return f"{plan.loss_ms(variant):.1f} ms, {plan.layers_worth(variant):.2f}, {plan.loss_gb(variant):.1f} GB"


def parts_table(every: Iterable[Plans]) -> str:
    body = []
    for plan in by_tp(every):
        cells = [" + ".join(f"{part:.2f}" for part in plan.loss_parts_ms(variant)) for variant in VARIANTS]
        body.append([plan.model.name, str(plan.layout.tp), *cells])
    return table(["model", "TP", *(variant.name for variant in VARIANTS)], body)


def share_table(every: Iterable[Plans]) -> str:
    """One row per model and range of GPUs with equal values."""
    body = []
    for of_model in every:
        rows = [(gpus, plan, share_cells(plan)) for gpus, plan in of_model.items()]
        for cells, group in itertools.groupby(rows, key=lambda row: row[2]):
            same = list(group)
            model = next(plan.model.name for plan in of_model.values() if plan)
            body.append([model, span(gpus for gpus, *_ in same), *cells[:1], span_of_batches(same), *cells[1:]])
    return table(["model", "GPUs", "TP x PP", "m", *(variant.name for variant in VARIANTS)], body)


def share_cells(plan: Plan | None) -> list[str]:
    """Layout, and share of a step for each variant."""
    if plan is None:
        return ["does not fit", *[""] * len(VARIANTS)]
    return [f"{plan.layout.tp} x {plan.layout.pp}", *(f"{plan.share(variant):.1%}" for variant in VARIANTS)]


def span_of_batches(rows: list[tuple[int, Plan | None, list[str]]]) -> str:
    return span(plan.batch.micro_batches(plan.layout) for _, plan, _ in rows if plan)


def span(values: Iterable[int]) -> str:
    """First and last value."""
    ends = list(values)
    return " to ".join(str(x) for x in dict.fromkeys([*ends[:1], *ends[-1:]]))


def masked_table(model: Model) -> str:
    """Time of the loss stage by share of masked tokens."""
    shares = (0.0, 0.3, 0.5, 0.7, 0.9)
    every = [Plan(model, CLUSTERS[0], Layout(tp=8), Batch(masked=share)) for share in shares]
    body = []
    for variant in VARIANTS:
        cells = [f"{plan.loss_ms(variant):.1f} ({plan.loss_ms(variant) / plan.loss_ms(STOCK):.2f})" for plan in every]
        body.append([variant.name, *cells])
    text = f"{model.name} at TP 8 on an {CLUSTERS[0].name}: time of the loss stage per micro-batch in ms"
    return text + " (relative to Megatron's).\n\n" + table(["masked", *(f"{share:.0%}" for share in shares)], body)


def cluster_table() -> str:
    body = []
    for cluster, model in itertools.product(CLUSTERS[1:], MODELS):
        plan = smallest(STOCK, model, cluster, 512, Batch())
        cells = [f"{plan.loss_ms(variant):.1f} ms, {plan.share(variant):.1%}" for variant in VARIANTS] if plan else []
        body.append([cluster.name, model.name, share_cells(plan)[0], *(cells or [""] * len(VARIANTS))])
    return table(["GPU", "model", "TP x PP", *(variant.name for variant in VARIANTS)], body)


def consequences(every: list[Plans]) -> str:
    """Conclusions, with the numbers of the tables."""
    small, large = by_tp(every[:1])[0], next(plan for plan in every[-1].values() if plan and plan.layout.pp == 16)
    alone = large.loss_ms(STOCK) / (large.layer_ms() * large.model.layers + large.loss_ms(STOCK))
    across = replace(large, layout=replace(large.layout, tp=2 * large.cluster.gpus_per_node))
    worth = [
        ", ".join(f"{plan.layers_worth(variant):.1f} ({plan.model.name})" for plan in firsts(every))
        for variant in (STOCK, DROPPED)
    ]
    exchange = [
        f"{plan.loss_parts_ms(variant)[3]:.1f}" for plan in (large, across) for variant in (STOCK, OURS, DROPPED)
    ]
    gb = {variant: f"{large.loss_gb(variant):.1f}" for variant in VARIANTS}
    lines = [
        f"**Pipeline parallelism multiplies the cost of the loss.** In {large.model.name}, the loss stage is "
        f"{alone:.1%} of the work. At PP {large.layout.pp} it is {large.share(STOCK):.1%} of the step, because all "
        f"other stages wait for the last stage. Dropping masked tokens reduces it to {large.share(DROPPED):.1%}. With "
        "few micro-batches, the pipeline bubble hides part of it. Data parallelism has no effect: without a pipeline "
        "the share is the same on 8 and on 4096 GPUs.",
        f"**Layers on the last stage.** Megatron's loss stage takes as long as {worth[0]} layers. With masked tokens "
        f"removed: {worth[1]}. Above 1, move a layer to another stage. Below 1, that would make the other stage the "
        "slowest. If the layers do not divide evenly, give the last stage one layer less, as Meta did for the 405B "
        "(arXiv:2407.21783, section 3.3.2).",
        f"**Without masked tokens**, only the loss itself is cheaper. Ours takes {ratio(small, OURS, 0.0):.2f} of "
        f"Megatron's time for {small.model.name}, and {ratio(large, OURS, 0.0):.2f} for {large.model.name}, whose "
        "products are wider. Megatron's fused loss saves almost no time, because it moves almost as many bytes, and "
        "uses the most memory.",
        f"**Chunks cost time**: {ratio(small, CHUNKS) / ratio(small, DROPPED):.2f} times that of dropping alone. They "
        f"are faster than Megatron's loss from {break_even(small):.0%} masked tokens ({small.model.name}) or "
        f"{break_even(large):.0%} ({large.model.name}). At small TP they save memory: from "
        f"{small.loss_gb(STOCK):.1f} to {small.loss_gb(CHUNKS):.1f} GB at TP {small.layout.tp} ({small.model.name}). "
        f"At TP 8 ({large.model.name}) they reduce it from {gb[STOCK]} to {gb[CHUNKS]} GB; dropping alone reduces it "
        f"to {gb[DROPPED]} GB. " + fits_smaller(every),
        f"**Collectives** take {exchange[0]} of {large.loss_ms(STOCK):.1f} ms at TP 8 ({large.model.name}), mostly "
        f"for hidden states. Ours: {exchange[1]} ms; with masked tokens removed: {exchange[2]} ms. With TP across two "
        f"nodes: {exchange[3]}, {exchange[4]} and {exchange[5]} ms.",
    ]
    return "## Conclusions\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def firsts(every: Iterable[Plans]) -> list[Plan]:
    """The plan with the fewest GPUs, for each model."""
    return [next(plan for plan in of_model.values() if plan) for of_model in every]


def ratio(plan: Plan, variant: Variant, masked: float | None = None) -> float:
    """Time of the loss stage relative to Megatron's."""
    if masked is not None:
        plan = replace(plan, batch=replace(plan.batch, masked=masked))
    return plan.loss_ms(variant) / plan.loss_ms(STOCK)


def break_even(plan: Plan) -> float:
    """The smallest share of masked tokens at which chunks are faster than Megatron's loss."""
    return next(f / 100 for f in range(100) if ratio(plan, CHUNKS, f / 100) < 1.0)


def fits_smaller(every: Iterable[Plans]) -> str:
    """Models and GPU counts for which chunks allow a smaller layout."""
    found: dict[str, list[int]] = {}
    for gpus, plan in itertools.chain.from_iterable(of_model.items() for of_model in every):
        other = plan and smallest(CHUNKS, plan.model, plan.cluster, gpus, plan.batch)
        if plan and other and other.layout != plan.layout:
            sizes = f"{plan.model.name}, {share_cells(other)[0]} instead of {share_cells(plan)[0]}"
            found.setdefault(sizes, []).append(gpus)
    names = "; ".join(f"{name} on {span(gpus)} GPUs" for name, gpus in found.items())
    return f"Chunks allow a smaller layout for {names}." if found else "No layout gets smaller with chunks."


def published_table() -> str:
    """Published times compared with counted bytes."""
    body = []
    for name, (logit_bytes, ms) in PUBLISHED.items():
        predicted_ms = 1e3 * logit_bytes * 8192 * 131072 / CLUSTERS[0].memory_bytes_per_s
        body.append([name, f"{logit_bytes}", f"{ms:.2f}", f"{predicted_ms:.2f} ({predicted_ms / ms - 1:+.0%})"])
    return table(["loss", "bytes per logit", "measured ms", "predicted"], body)


# ---- Comparison with measurements -------------------------------------------------------------------------------


def check(path: Path) -> str:
    """Compare predictions with one file of benchmark_layouts.py and the -wire.csv beside it."""
    every, wire = read(path), read(path.with_name(path.stem.removesuffix("-layouts") + "-wire.csv"))
    rows = [row for row in every if way_of(row["implementation"]) in TIMED]
    costs = fitted(rows)
    pairs = [(row, float(row["loss_stage_ms"]), float(quantities(row) @ costs)) for row in rows]
    wrong = disagreements(every, wire)
    verdict = f"**{len(wrong)} of the predictions are wrong:** {'; '.join(wrong)}" if wrong else "all as predicted"
    first = rows[0]
    sizes = ", ".join(f"{name} {first[name]}" for name in ("hidden", "vocab", "seq_length", "global_batch"))
    link = f"`{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}`"
    return "\n".join(
        [
            f"**{first['device']}**, {first['date']}, commit {first['commit']}, torch {first['torch']}, {link}: "
            f"{sizes}, {first['dtype']}, {float(first['masked']):.0%} of the tokens masked. Time of the loss stage in "
            "ms per step: measured → predicted (error). ° marks the times that the costs were fitted to.\n",
            timed_table(pairs),
            errors_text(pairs),
            f"Fitted: {costs_text(costs)}. For more ranks than the {CORES} cores, the prediction assumes that all "
            "ranks are always busy. Ranks of a pipeline wait for each other, so the last stage can take less.\n",
            "Calls and bytes of the tensor-parallel collectives in the loss stage, for every objective "
            f"({len(of_loss(wire))} values each): {verdict}.\n",
        ]
    )


def where(row: Row) -> tuple[str, ...]:
    """The layout of a row."""
    return tuple(row[key] for key in PLACE)


def is_fitted(row: Row) -> bool:
    """Whether costs are fitted to this row: one rank, or two tensor-parallel ranks."""
    return row["world"] == row["tp"] and int(row["tp"]) <= 2


def fitted(rows: Rows) -> np.ndarray:
    """Nonnegative costs in ms of each of `quantities`, with the least sum of squared relative errors.

    Raises:
        ValueError: if no row has one rank or two tensor-parallel ranks.
    """
    chosen = [row for row in rows if is_fitted(row)]
    if not chosen:
        raise ValueError(
            "expected times of one rank, or of two that are tensor parallel, got none; run "
            "tools/benchmarks/benchmark_layouts.py on 1 and 2 ranks, which adds them to the file"
        )
    measured = np.array([float(row["loss_stage_ms"]) for row in chosen])
    matrix = np.array([quantities(row) for row in chosen]) / measured[:, None]
    best, least = np.zeros(matrix.shape[1]), np.inf
    for kept in itertools.product((False, True), repeat=matrix.shape[1]):  # few costs: try every subset
        columns = matrix[:, kept]
        scale = np.abs(columns).max(0, initial=0.0) + 1e-300
        solution = np.linalg.lstsq(columns / scale, np.ones(len(chosen)), rcond=None)[0] / scale
        error = float(np.square(columns @ solution - 1.0).sum())
        if (solution >= 0.0).all() and error < least - 1e-12:
            least, best = error, np.zeros(matrix.shape[1])
            best[list(kept)] = solution
    return best


def quantities(row: Row) -> np.ndarray:
    """Per step, on the busiest rank: FLOP, bytes of Megatron's logits, of ours, of the rest; calls, bytes sent."""
    variant, tp, size = way_of(row["implementation"]), int(row["tp"]), element_bytes(row)
    model = Model("", int(row["hidden"]), 0, 0, 0, 0, int(row["vocab"]))
    cores = 1.0 if "NVIDIA" in row["device"] else max(1.0, int(row["world"]) / CORES)
    ranks = []
    for micro_batches in live_tokens(row):
        works = [
            loss_work(variant, model, tokens_of(row), live, tp, row["sp"] == "True", size) for live in micro_batches
        ]
        sent = [call.sent(tp) for work in works for call in work.calls]
        logits = sum(work.logit_bytes for work in works)
        logits_of = (logits, 0.0) if variant.masked_logit_bytes == variant.logit_bytes else (0.0, logits)
        others = sum(work.other_bytes for work in works)
        ranks.append([sum(work.flop for work in works), *logits_of, others, len(sent), sum(sent)])
    return cores * np.array(max(ranks))


def element_bytes(row: Row) -> int:
    return torch.finfo(getattr(torch, row["dtype"])).bits // 8


def tokens_of(row: Row) -> int:
    return int(row["seq_length"]) * int(row["micro_batch"]) // int(row["cp"])


def live_tokens(row: Row) -> list[list[int]]:
    """Valid tokens in each micro-batch, for each data-parallel and context-parallel rank.

    Raises:
        ValueError: if the regenerated masks differ from those of the file.
    """
    names = ("hidden", "layers", "heads", "vocab", "seq_length", "micro_batch", "global_batch")
    sizes = {name: int(row[name]) for name in names}
    task, cp, dp = Task(**sizes, dtype=getattr(torch, row["dtype"])), int(row["cp"]), int(row["dp"])
    if task.valid() != int(row["valid"]):
        raise ValueError(
            f"valid: expected {row['valid']} tokens as in the file, got {task.valid()}: the masks of megatron_step.py "
            "have changed; measure again"
        )
    masks = [task.sample(i)[3].chunk(2 * cp) for i in range(task.global_batch)]
    live = [[int(chunks[r].sum() + chunks[-1 - r].sum()) for chunks in masks] for r in range(cp)]  # as Megatron splits
    firsts = range(0, task.global_batch, task.micro_batch)
    micro_batches = [[max(1, sum(samples[i : i + task.micro_batch])) for i in firsts] for samples in live]
    return [of_rank[d::dp] for of_rank in micro_batches for d in range(dp)]


def disagreements(rows: Rows, wire: Rows) -> list[str]:
    """Layouts and implementations whose counted collectives differ from the predicted ones."""
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
    """Rows of the tensor-parallel collectives in the loss stage."""
    return [row for row in wire if (row["group"], row["part"]) == ("tp", "loss")]


def predicted(row: Row) -> set[Sent]:
    """The distinct (collective, calls, bytes) per step of the ranks of the last stage."""
    variant, sizes = way_of(row["implementation"]), (int(row["tp"]), row["sp"] == "True", element_bytes(row))
    everything = set()
    for micro_batches in live_tokens(row):
        sent: dict[str, list[int]] = {}
        for live in micro_batches:
            for call in calls(variant, int(row["hidden"]), tokens_of(row), live, *sizes):
                sent.setdefault(call.collective, []).append(int(call.nbytes))
        everything |= {(name, len(sizes), sum(sizes)) for name, sizes in sent.items()}
    return everything


def timed_table(pairs: list[tuple[Row, float, float]]) -> str:
    body = []
    for place, group in itertools.groupby(pairs, key=lambda pair: where(pair[0])):
        cells = {row["implementation"]: timed_cell(row, ms, predicted_ms) for row, ms, predicted_ms in group}
        body.append([*place, *(cells.get(variant.name, "") for variant in TIMED)])
    return table([*PLACE, *(variant.name for variant in TIMED)], body)


def timed_cell(row: Row, ms: float, predicted_ms: float) -> str:
    return f"{ms:.0f} → {predicted_ms:.0f} ({predicted_ms / ms - 1:+.0%}){'°' * is_fitted(row)}"


def errors_text(pairs: list[tuple[Row, float, float]]) -> str:
    """Errors of the predicted times, and of their ratios to Megatron's time in the same layout, without fitted rows."""
    tested = [pair for pair in pairs if not is_fitted(pair[0])]
    if not tested:
        return "The file has no layout to predict.\n"
    errors = [abs(predicted_ms / ms - 1) for _, ms, predicted_ms in tested]
    stock = {where(row): (ms, predicted_ms) for row, ms, predicted_ms in tested if row["implementation"] == STOCK.name}
    ratios = []
    for row, ms, predicted_ms in tested:
        if row["implementation"] != STOCK.name and where(row) in stock:
            ratios.append(abs((predicted_ms / stock[where(row)][1]) / (ms / stock[where(row)][0]) - 1))
    text = f"The {len(tested)} predicted times have a median error of {statistics.median(errors):.0%} and a maximum of "
    text += f"{max(errors):.0%}"
    if ratios:
        text += f"; the {len(ratios)} ratios to Megatron's time, {statistics.median(ratios):.0%} and {max(ratios):.0%}"
    return text + ".\n"


def costs_text(costs: np.ndarray) -> str:
    """Costs as rates. A cost of 0 could not be separated from the others and is left out."""
    units = ("GFLOP/s", "GB/s of Megatron's logits", "GB/s of ours", "GB/s of weight and hidden states")
    rates = [f"{1e-6 / cost:.3g} {unit}" for cost, unit in zip(costs, units, strict=False) if cost]
    rates += [f"{1e3 * costs[4]:.0f} µs per call"] + [f"{1e-6 / costs[5]:.2g} GB/s sent"] * bool(costs[5])
    return ", ".join(rates)


if __name__ == "__main__":
    sys.exit(main())
