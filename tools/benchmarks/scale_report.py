"""Cost of the loss at scale: predictions of scale_model.py, the page docs/scale.md, and a comparison with measurements.

    python tools/benchmarks/scale_report.py --model "Llama 3 70B" --cluster H200 --masked 0.5    tables of one model
    python tools/benchmarks/scale_report.py --layers 48 --hidden 6144 --cp 4 --seq-length 65536  override any value
    python tools/benchmarks/scale_report.py --check DEVICE-DATE-layouts.csv                      check against times
    python tools/benchmarks/scale_report.py --docs                                               write docs/scale.md

    predicted     tables by model, number of GPUs, share of masked tokens and cluster
    one GPU       measured and predicted times and memory of one H100, from its files in results/; only in the page
    layouts       times of a file of benchmark_layouts.py. The costs of a FLOP, a byte and a call are fitted to its rows
                  with one rank and with two tensor-parallel ranks. All other rows are predicted and shown with their
                  errors
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron_step import Task
from report import RESULTS, ROOT, Rows, of_logits, pick, pick_head, read, table
from scale_model import (
    BENCHMARK_GRAD_BYTES,
    CHUNKS,
    CLUSTERS,
    DATA_SHEET,
    DROPPED,
    GIVEN_LOGITS,
    GPUS,
    H100_HEADS,
    H100_LOGITS,
    HEADS,
    IN_FORWARD,
    MAIN_GRAD_BYTES,
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
    head_work,
    logits_bytes,
    loss_memory,
    loss_work,
    materialized,
    model_of,
    products_rate,
    smallest,
    sustained_rates,
    valid_tokens,
    variant_of,
)

from megatron_dft.utils import HelpFormatter

PAGE = ROOT / "docs" / "scale.md"
BATCH_MEAN = "ours: cayley"  # the objective with a mean over the batch
H100_CHUNKS = RESULTS / "trials" / "NVIDIA-H100-2026-11-26-chunks.csv"
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
Pair = tuple[str, float, float]  # name, measured, predicted
MIB = 2**20
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
            "Predictions from counted FLOP, bytes and collectives, and from the measured rates of one H100. "
            "`python tools/benchmarks/scale_report.py --docs` writes this page; the docstring of `scale_model.py` "
            "lists every formula. **No run on several GPUs was measured**: every time, share and size of memory before "
            "[the last section](#comparison-with-measured-times) is a prediction. The last section compares the model "
            "with times and memory measured on one H100, and with times of CPU ranks.\n",
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
            comparison(of_logits(read(H100_LOGITS)), timed_heads(read(H100_HEADS)), read(H100_CHUNKS)),
            "### Layouts of CPU ranks\n",
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
            rates_text(read(H100_LOGITS), read(H100_HEADS)),
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


def rates_text(logits: Rows, heads: Rows) -> str:
    """Where the rates come from."""
    flop, moved = sustained_rates(logits, heads)
    sheet = {name: f"{peak / 1e12:g} TFLOP/s, {memory / 1e12:g} TB/s" for name, (peak, memory) in DATA_SHEET.items()}
    shares = [f"{rate / peak:.0%}" for rate, peak in zip((flop, moved), DATA_SHEET["H100"], strict=True)]
    return (
        f"- **Rates of the H100** are measured ({logits[0]['device']}, {logits[0]['date']}). TB/s: bandwidth of a "
        "copy. TFLOP/s: FLOP / (measured time - counted bytes of loss and weight / bandwidth of a copy), from "
        '"ours: materialized logits" without masked tokens, all hidden sizes together. One size alone gives '
        f"{implied_rates(heads, moved, masked=False)}. These rates are {shares[0]} and {shares[1]} of the data sheet "
        f"({sheet['H100']}; dense bf16).\n"
        "- **Rates of the H200 and the B200** are not measured. They are the same shares of the data sheets (H200: "
        f"{sheet['H200']}; B200: {sheet['B200']}; memory of the "
        "[DGX B200](https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html))."
    )


def implied_rates(heads: Rows, memory_bytes_per_s: float, masked: bool) -> str:
    """TFLOP/s of the products with our materialized logits, for each hidden size."""
    rows = [row for row in materialized(heads) if (float(row["masked"]) > 0.0) == masked]
    rates = [f"{products_rate([row], memory_bytes_per_s) / 1e12:.0f} (H = {row['hidden']})" for row in rows]
    return " and ".join(rates)


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


def consequences(every: Sequence[Plans]) -> str:
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
        "products are wider. Megatron's fused loss moves almost as many bytes as the unfused loss and uses the most "
        f"memory. {measured_megatron(of_logits(read(H100_LOGITS)))}",
        f"**Chunks of the vocabulary cost time**: {against_dropped(small, CHUNKS)} times that of dropping alone "
        f"({small.model.name}). They are faster than Megatron's loss from {break_even(small, CHUNKS):.0%} masked "
        f"tokens ({small.model.name}) or {break_even(large, CHUNKS):.0%} ({large.model.name}). At small TP they save "
        f"memory: from {small.loss_gb(STOCK):.1f} to {small.loss_gb(CHUNKS):.1f} GB at TP {small.layout.tp} "
        f"({small.model.name}). At TP 8 ({large.model.name}) they take {gb[CHUNKS]} GB, Megatron's loss {gb[STOCK]} "
        f"GB, dropping alone {gb[DROPPED]} GB.",
        "**The gradient in forward** avoids the recomputation. It takes "
        f"{against_dropped(small, IN_FORWARD)} times the time of dropping alone ({small.model.name}), "
        f"{against_dropped(large, IN_FORWARD)} ({large.model.name}). It is faster than Megatron's loss from "
        f"{break_even(small, IN_FORWARD):.0%} masked tokens ({small.model.name}) or "
        f"{break_even(large, IN_FORWARD):.0%} ({large.model.name}). It takes {small.loss_gb(IN_FORWARD):.1f} GB at TP "
        f"{small.layout.tp} ({small.model.name}) and {gb[IN_FORWARD]} GB at TP 8 ({large.model.name}). The predicted "
        "time is rather too long: [in a trial](#chunks), part of the weight traffic overlaps with the products.",
        "**Smaller layouts** than with Megatron's loss. " + smaller_layouts(every),
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


def against_dropped(plan: Plan, variant: Variant) -> str:
    """Time of the loss stage relative to that with masked tokens removed."""
    return f"{plan.loss_ms(variant) / plan.loss_ms(DROPPED):.2f}"


def break_even(plan: Plan, variant: Variant) -> float:
    """The smallest share of masked tokens at which a variant is faster than Megatron's loss."""
    return next(f / 100 for f in range(100) if ratio(plan, variant, f / 100) < 1.0)


def smaller_layouts(every: Sequence[Plans]) -> str:
    """Variants, models and numbers of GPUs with a smaller layout than Megatron's loss."""
    found: dict[str, list[str]] = {}
    for variant in (DROPPED, CHUNKS, IN_FORWARD):
        found.setdefault(fits_smaller(every, variant), []).append(variant.name.removeprefix("ours, "))
    return " ".join(f"{'; '.join(names).capitalize()}: {sizes}." for sizes, names in found.items())


def fits_smaller(every: Iterable[Plans], variant: Variant) -> str:
    """Models and numbers of GPUs for which a variant allows a smaller layout than Megatron's loss."""
    found: dict[str, list[int]] = {}
    for gpus, plan in itertools.chain.from_iterable(of_model.items() for of_model in every):
        other = plan and smallest(variant, plan.model, plan.cluster, gpus, plan.batch)
        if plan and other and other.layout != plan.layout:
            sizes = f"{plan.model.name}, {share_cells(other)[0]} instead of {share_cells(plan)[0]}"
            found.setdefault(sizes, []).append(gpus)
    return "; ".join(f"{name} on {span(gpus)} GPUs" for name, gpus in found.items()) or "none"


def published_table() -> str:
    """Published times compared with counted bytes."""
    body = []
    for name, (logit_bytes, ms) in PUBLISHED.items():
        predicted_ms = 1e3 * logit_bytes * 8192 * 131072 / CLUSTERS[0].memory_bytes_per_s
        body.append([name, f"{logit_bytes}", f"{ms:.2f}", f"{predicted_ms:.2f} ({predicted_ms / ms - 1:+.0%})"])
    return table(["loss", "bytes per logit", "measured ms", "predicted"], body)


# ---- Comparison with one measured GPU ---------------------------------------------------------------------------


def comparison(logits: Rows, heads: Rows, trials: Rows) -> str:
    """Predicted and measured times and memory on one H100."""
    first = logits[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "megatron-core"))
    return "\n".join(
        [
            f"**{first['device']}**, {first['date']}, commit {first['commit']}, {versions}. Files: "
            f"{', '.join(f'`{path.relative_to(ROOT)}`' for path in (H100_LOGITS, H100_HEADS, H100_CHUNKS))}. Cells: "
            "measured → predicted (error). Errors are relative to the measured value.\n",
            summary_text(logits, heads, trials),
            "### Loss of given logits\n",
            given_logits_text(logits),
            "### Output layer and loss\n",
            heads_text(heads, logits),
            "### Chunks\n",
            chunks_text(trials),
            "### Times of the authors of Liger Kernel\n",
            "The loss alone on another H100: bf16 logits, 8192 tokens x 131072 vocabulary entries. The prediction is "
            "counted bytes / memory bandwidth.\n",
            published_table(),
            "There, Megatron's fused loss is faster than the unfused one.\n",
        ]
    )


def timed_heads(rows: Rows) -> Rows:
    """Rows of output layer and loss that the model has a formula for."""
    return [row for row in rows if row["implementation"] in HEADS and not row["note"]]


def summary_text(logits: Rows, heads: Rows, trials: Rows) -> str:
    """Errors of all predicted times and peaks."""
    times = [*logits_times(logits), *predicted_heads(heads), *trial_times(trials)]
    own = [pair for pair in times if pair[0].startswith("ours") and not pair[0].startswith(BATCH_MEAN)]
    memory = [*logits_memory(logits), *heads_memory(heads), *trial_memory(of_vocabulary(trials))]
    return (
        f"Everything: {errors_of(times, 'times')} Ours without `{BATCH_MEAN}`, whose mean over the batch is not "
        f"modelled: {errors_of(own, 'times')} Memory: {errors_of(memory, 'peaks')}\n"
    )


def errors_of(pairs: list[Pair], what: str) -> str:
    """Median and largest error in one sentence."""
    errors = [abs(predicted_value / value - 1) for _, value, predicted_value in pairs]
    name, value, predicted_value = pairs[errors.index(max(errors))]
    return (
        f"{len(pairs)} predicted {what} have a median error of {statistics.median(errors):.0%} and a largest error of "
        f"{percent(predicted_value / value - 1)} ({name})."
    )


def percent(error: float) -> str:
    """A signed percentage; 0% has no sign."""
    return f"{error:+.0%}" if abs(error) >= 0.005 else "0%"


def digits(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def against_measured(value: float, predicted_value: float, mark: str = "") -> str:
    return f"{digits(value)} → {digits(predicted_value)} ({percent(predicted_value / value - 1)}){mark}"


def logits_ms(row: Row) -> float:
    """Predicted ms of the loss of given logits. All our objectives move the same bytes."""
    name = row["implementation"]
    moved = logits_bytes(row, name if name in GIVEN_LOGITS else "ours: dft")
    return 1e3 * moved / CLUSTERS[0].memory_bytes_per_s


def has_logits_formula(row: Row) -> bool:
    return row["implementation"] in GIVEN_LOGITS or row["implementation"].startswith("ours: ")


def logits_times(logits: Rows) -> list[Pair]:
    return [
        (
            f"{row['implementation']}, V = {row['vocab']}, {float(row['masked']):.0%} masked",
            total_ms(row),
            logits_ms(row),
        )
        for row in logits
        if has_logits_formula(row)
    ]


def logits_memory(logits: Rows) -> list[Pair]:
    """MiB beyond the logits, without implementations that need none."""
    found = []
    for row in (row for row in logits if row["implementation"] in GIVEN_LOGITS):
        extra = GIVEN_LOGITS[row["implementation"]][2] * int(row["tokens"]) * int(row["vocab"]) / MIB
        if extra:
            found.append((f"{row['implementation']}, V = {row['vocab']}", float(row["extra_mib"]), extra))
    return found


def total_ms(row: Row) -> float:
    return float(row["total_ms"])


def given_logits_text(logits: Rows) -> str:
    shares = sorted({float(row["masked"]) for row in logits})
    tables = [given_logits_table(logits, share) for share in shares]
    surplus = max(predicted_ms / ms - 1 for _, ms, predicted_ms in logits_times(logits))
    others = [pair for row in other_objectives(logits) for pair in logits_times([row])]
    in_place = [float(row["extra_mib"]) for row in logits if GIVEN_LOGITS.get(row["implementation"], (0, 0, 1))[2] == 0]
    return "\n".join(
        [
            f"Forward and backward of {logits[0]['tokens']} tokens in ms. The prediction is counted bytes / bandwidth "
            "of a copy. B/logit: bytes per valid and per masked logit. Liger's loss of a whole vocabulary and "
            "F.cross_entropy have no formula.\n",
            *tables,
            f"No time is more than {surplus:.1%} shorter than predicted. The other objectives move the bytes of "
            f"`ours: dft`: {errors_of(others, 'times')}\n",
            logits_reasons(logits),
            f"Memory beyond the logits: {errors_of(logits_memory(logits), 'peaks')} Implementations that overwrite the "
            f"logits take at most {max(in_place):.1f} MiB.\n",
        ]
    )


def other_objectives(logits: Rows) -> Rows:
    return [row for row in logits if has_logits_formula(row) and row["implementation"] not in GIVEN_LOGITS]


def given_logits_table(logits: Rows, masked: float) -> str:
    vocabularies = sorted({int(row["vocab"]) for row in logits}, reverse=True)
    body = []
    for name in GIVEN_LOGITS:
        rows = [pick(logits, name, vocab, masked) for vocab in vocabularies]
        moved = "{}, {}".format(*GIVEN_LOGITS[name])
        body.append([name, moved, *(against_measured(total_ms(row), logits_ms(row)) for row in rows)])
    return table([f"{masked:.0%} masked", "B/logit", *(f"V = {vocab}" for vocab in vocabularies)], body)


def logits_reasons(logits: Rows) -> str:
    """Why predictions of the loss of given logits are wrong, with the numbers of the file."""
    small = pick(logits, "ours: dft", min(int(row["vocab"]) for row in logits), 0.0)
    lines = [
        megatron_reason(logits),
        f"**Small shards** take longer than their bytes: ours {1e3 * (total_ms(small) - logits_ms(small)):.0f} µs at "
        f"V = {small['vocab']}. Launches of kernels, and their start and end, are not modelled.",
        "**V = 18992** is the worst size of Transformer Engine, Liger and flash-attn. They process the vocabulary in "
        f"blocks of 16384 or 32768 columns, which cover 32768 columns; V is {18992 / 32768:.0%} of that.",
        f"**{BATCH_MEAN}** computed a mean over the batch with a chain of small kernels at this commit. Its forward "
        f"took {batch_mean_us(logits)} µs longer than that of dft.",
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def megatron_reason(logits: Rows) -> str:
    largest = max(int(row["vocab"]) for row in logits)
    unfused, fused = (pick(logits, f"Megatron {kind}", largest, 0.0) for kind in ("unfused", "fused"))
    forward = " and ".join(f"{float(row['forward_ms']):.2f}" for row in (fused, unfused))
    longer = float(fused["backward_ms"]) / float(unfused["backward_ms"]) - 1
    return (
        f"**Megatron** takes the time of {moved_range(logits, 'Megatron unfused')} bytes per logit (unfused) and "
        f"{moved_range(logits, 'Megatron fused')} (fused). The times do not tell whether it moves more bytes than "
        "counted or does not reach the bandwidth of a copy. Forward of the fused loss takes as long as forward of the "
        f"unfused loss ({forward} ms at V = {largest}): nothing is fused there. Backward takes {longer:.0%} longer."
    )


def batch_mean_us(logits: Rows) -> str:
    """Range of the additional time of forward."""
    found = []
    for row in (row for row in logits if row["implementation"] == BATCH_MEAN):
        dft = pick(logits, "ours: dft", int(row["vocab"]), float(row["masked"]))
        found.append(1e3 * (float(row["forward_ms"]) - float(dft["forward_ms"])))
    return f"{min(found):.0f} to {max(found):.0f}"


def measured_megatron(logits: Rows) -> str:
    """Measured times of Megatron's losses against each other and against the prediction."""
    unfused = [row for row in logits if row["implementation"] == "Megatron unfused"]
    fused = [pick(logits, "Megatron fused", int(row["vocab"]), float(row["masked"])) for row in unfused]
    relative = statistics.median(total_ms(a) / total_ms(b) for a, b in zip(fused, unfused, strict=True))
    excess = [total_ms(row) / logits_ms(row) - 1 for row in unfused]
    return (
        f"On the measured H100, the fused loss takes {relative:.2f} times as long as the unfused loss. The unfused "
        f"loss takes {min(excess):.0%} to {max(excess):.0%} longer than predicted, so the advantage of ours is larger."
    )


def moved_range(logits: Rows, name: str) -> str:
    """Measured time x bandwidth of a copy, per logit."""
    values = [float(row["bytes_per_logit"]) for row in logits if row["implementation"] == name]
    return f"{min(values):.1f} to {max(values):.1f}"


def head_ms(row: Row) -> float:
    """Predicted ms of output layer and loss."""
    return sum(head_work(HEADS[row["implementation"]], row).ms(CLUSTERS[0], 1))


def head_mib(row: Row) -> float:
    """Predicted peak MiB of output layer and loss."""
    variant = HEADS[row["implementation"]]
    return loss_memory(variant, model_of(row), int(row["tokens"]), valid_tokens(row), tp=1) / MIB


def gives_rate(row: Row) -> bool:
    """Whether the FLOP/s of the model come from this row."""
    return row in materialized([row]) and float(row["masked"]) == 0.0


def predicted_heads(heads: Rows) -> list[Pair]:
    """Times that were not used for the rates."""
    return [(head_name(row), total_ms(row), head_ms(row)) for row in heads if not gives_rate(row)]


def heads_memory(heads: Rows) -> list[Pair]:
    return [(head_name(row), float(row["extra_mib"]), head_mib(row)) for row in heads]


def head_name(row: Row) -> str:
    return f"{row['implementation']}, H = {row['hidden']}, {float(row['masked']):.0%} masked"


def heads_text(heads: Rows, logits: Rows) -> str:
    first = heads[0]
    return "\n".join(
        [
            f"Forward and backward of {first['tokens']} tokens from hidden states, V = {first['vocab']}, in ms. This "
            f"benchmark has a bf16 main_grad: the weight moves {4 + BENCHMARK_GRAD_BYTES} H c bytes instead of "
            f"{4 + MAIN_GRAD_BYTES} H c. ° marks the times that give the FLOP/s of the model; they are not among the "
            "errors.\n",
            heads_table(heads, lambda row: against_measured(total_ms(row), head_ms(row), "°" * gives_rate(row))),
            errors_of(predicted_heads(heads), "times") + "\n",
            heads_reasons(heads, logits),
            "Peak memory beyond the inputs in MiB:\n",
            heads_table(heads, lambda row: against_measured(float(row["extra_mib"]), head_mib(row))),
            errors_of(heads_memory(heads), "peaks") + "\n",
        ]
    )


def heads_table(heads: Rows, cell: Callable[[Row], str]) -> str:
    """One row per variant, one column per hidden size and share of masked tokens."""
    columns = sorted({(int(row["hidden"]), float(row["masked"])) for row in heads})
    vocab = int(heads[0]["vocab"])
    body = [
        [name, *(cell(pick_head(heads, name, hidden, vocab, masked)) for hidden, masked in columns)] for name in HEADS
    ]
    return table(["implementation", *(f"H = {hidden}, {masked:.0%} masked" for hidden, masked in columns)], body)


def heads_reasons(heads: Rows, logits: Rows) -> str:
    """Why predictions of output layer and loss are wrong, with the numbers of the files."""
    moved = CLUSTERS[0].memory_bytes_per_s
    chunked = [row for row in heads if HEADS[row["implementation"]].vocab_chunk]
    worst = max(chunked, key=lambda row: abs(head_ms(row) / total_ms(row) - 1))
    unmasked = [row for row in heads if HEADS[row["implementation"]] == STOCK and float(row["masked"]) == 0.0]
    lines = [
        "**Masked tokens that are not removed** make products of the same size faster: "
        f"{implied_rates(heads, moved, masked=True)} TFLOP/s with our materialized logits. Their gradients are zeros. "
        "A GPU needs less power for zeros, which probably is the reason.",
        f"**Chunks of the vocabulary** are predicted {-mean_error(chunked):.0%} too fast on average. The model gives "
        "narrow products the rate of wide ones, and counts no launches. The worst row "
        f"({head_name(worst)}) also varies most between runs: its interquartile range is "
        f"{float(worst['spread_ms']) / total_ms(worst):.0%} of its time.",
        "**Megatron** takes longer in the loss than counted. With the measured time of the loss of given logits, the "
        f"errors without masked tokens are {' and '.join(with_measured_loss(row, logits) for row in unmasked)}.",
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def with_measured_loss(row: Row, logits: Rows) -> str:
    """Error of Megatron's time if the loss takes its measured time."""
    loss = pick(logits, "Megatron unfused", int(row["vocab"]), float(row["masked"]))
    error = (head_ms(row) - logits_ms(loss) + total_ms(loss)) / total_ms(row) - 1
    return f"{percent(error)} (H = {row['hidden']})"


def mean_error(rows: Rows) -> float:
    return statistics.mean(head_ms(row) / total_ms(row) - 1 for row in rows)


def of_vocabulary(trials: Rows) -> Rows:
    """Rows of the shipped variant, whose chunks split the vocabulary."""
    return [row for row in trials if row["chunk_of"] == "vocabulary"]


def trial_variant(row: Row) -> Variant:
    chunk = int(row["chunk"])
    if row["chunk_of"] == "vocabulary":
        return replace(CHUNKS, vocab_chunk=chunk)
    return replace(IN_FORWARD, token_chunk=chunk)


def trial_ms(row: Row) -> float:
    """Predicted ms. A returned bf16 gradient is written once, a main_grad is read and written."""
    gradient_bytes = {"returned, bfloat16": 2, "main_grad, bfloat16": 4, "main_grad, float32": 8}[
        row["weight_gradient"]
    ]
    return sum(head_work(trial_variant(row), row, gradient_bytes).ms(CLUSTERS[0], 1))


def trial_times(trials: Rows) -> list[Pair]:
    return [(trial_name(row), total_ms(row), trial_ms(row)) for row in trials]


def trial_memory(trials: Rows) -> list[Pair]:
    """Peak MiB with the returned gradient of the weight."""
    found = []
    for row in trials:
        peak = loss_memory(trial_variant(row), model_of(row), int(row["tokens"]), valid_tokens(row), tp=1)
        returned = 2 * int(row["hidden"]) * int(row["vocab"])
        found.append((trial_name(row), float(row["peak_mib"]), (peak + returned) / MIB))
    return found


def trial_name(row: Row) -> str:
    return f"{row['implementation']}, chunks of {row['chunk']}, H = {row['hidden']}, {row['weight_gradient']}"


def chunks_text(trials: Rows) -> str:
    shipped = of_vocabulary(trials)
    prototype = [row for row in trials if row not in shipped]
    peaks = {name: against_measured(value, predicted_value) for name, value, predicted_value in trial_memory(shipped)}
    sizes = f"{trials[0]['tokens']} tokens, V = {trials[0]['vocab']}, no masked tokens"
    return "\n".join(
        [
            f"**Chunks of tokens, gradient in forward.** A prototype was measured, not the shipped code: {sizes}, an "
            "upstream gradient of 1. Time in ms:\n",
            trials_table(prototype, trial_cell),
            errors_of(trial_times(prototype), "times") + " " + chunks_reason(prototype) + "\n",
            f"**Chunks of the vocabulary**, the shipped code, {sizes}. The weight gradient is returned. Time in ms:\n",
            trials_table(shipped, trial_cell),
            errors_of(trial_times(shipped), "times") + "\n",
            "Peak memory in MiB:\n",
            trials_table(shipped, lambda row: peaks[trial_name(row)]),
            errors_of(trial_memory(shipped), "peaks") + "\n",
        ]
    )


def trial_cell(row: Row) -> str:
    return against_measured(total_ms(row), trial_ms(row))


def trials_table(trials: Rows, cell: Callable[[Row], str]) -> str:
    """One row per chunk size, one column per hidden size and kind of weight gradient."""
    columns = sorted({(int(row["hidden"]), row["weight_gradient"]) for row in trials})
    body = []
    for chunk in sorted({int(row["chunk"]) for row in trials}):
        found = {(int(row["hidden"]), row["weight_gradient"]): row for row in trials if int(row["chunk"]) == chunk}
        body.append([str(chunk), *(cell(found[column]) for column in columns)])
    kind = trials[0]["chunk_of"]
    return table([f"chunk ({kind})", *(f"H = {hidden}; {gradient}" for hidden, gradient in columns)], body)


def chunks_reason(prototype: Rows) -> str:
    """What smaller chunks of tokens cost, measured and predicted, at the largest hidden size with an fp32 main_grad."""
    hidden = max(int(row["hidden"]) for row in prototype)
    rows = [row for row in prototype if row["weight_gradient"] == "main_grad, float32" and int(row["hidden"]) == hidden]
    rows.sort(key=lambda row: int(row["chunk"]))
    small, large = rows[0], rows[-1]
    return (
        f"Small chunks are predicted too slow. From {large['chunk']} to {small['chunk']} tokens (H = {hidden}, fp32), "
        f"the prediction grows by {trial_ms(small) - trial_ms(large):.1f} ms and the measured time by "
        f"{total_ms(small) - total_ms(large):.1f} ms: part of the weight traffic overlaps with the products. The "
        "trial recorded the size of its logit buffer, not its peak memory."
    )


# ---- Comparison with measured layouts ---------------------------------------------------------------------------


def check(path: Path) -> str:
    """Compare predictions with one file of benchmark_layouts.py and the -wire.csv beside it."""
    every, wire = read(path), read(path.with_name(path.stem.removesuffix("-layouts") + "-wire.csv"))
    rows = [row for row in every if variant_of(row["implementation"]) in TIMED]
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
    variant, tp, size = variant_of(row["implementation"]), int(row["tp"]), element_bytes(row)
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
    variant, sizes = variant_of(row["implementation"]), (int(row["tp"]), row["sp"] == "True", element_bytes(row))
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
