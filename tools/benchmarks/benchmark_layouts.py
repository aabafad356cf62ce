"""Benchmark training steps by TP x PP x CP x DP layout: Megatron's loss, ours, every objective; count the collectives.

    torchrun --nproc-per-node 4 tools/benchmarks/benchmark_layouts.py          all layouts of 4 ranks, a small model
    torchrun --nnodes 8 --nproc-per-node 8 ... benchmark_layouts.py --layouts tp8sppp4 tp8sppp8 --hidden 8192 ...

It runs on GPUs over NCCL, or on CPU ranks over gloo if there are none. Rank 0 writes two files in
tools/benchmarks/results/. Layouts that are already in the files are skipped: an interrupted benchmark resumes, and
calls with other numbers of ranks add rows.

In each round, each implementation builds its model (megatron_step.py), runs a first step that is not timed, and then
timed steps. Implementations are interleaved, so disturbances of the machine affect all of them alike. Objectives other
than dft run in the first round only.

    DEVICE-DATE-layouts.csv
        step_ms            median over all timed steps, slowest rank; spread_ms: interquartile range
        loss_stage_ms      from the hidden states to the loss and back, all micro-batches of a step, slowest rank
        loss_stage_share   loss_stage_ms / step_ms
        peak_mib           per rank, beyond the memory before the model was built
        loss, grad_norm    of the first step: NLL per token and gradient norm
    DEVICE-DATE-wire.csv
        calls, bytes       per step and rank, by group and collective; part "loss" is the loss stage

Loss and gradient norm must not depend on the layout, and must agree between implementations of the same objective. If
they differ by more than 1e-4 (bf16: 2e-2), the tool names the rows and exits with 1.

CPU ranks that share cores show how the parts of a step compare, not the time on a cluster. For that, see
tools/benchmarks/scale_report.py.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import conditions
from megatron_step import Layout, Task, Training, model_parallel, start

from megatron_dft import DFTConfig
from megatron_dft.ops.linear_fused import TOKEN_CHUNK
from megatron_dft.ops.objectives import WITHOUT_REFERENCE
from megatron_dft.utils import HelpFormatter, exit_rank

VARIANTS = {
    "Megatron": DFTConfig(),
    "ours": DFTConfig("dft", compact_masked_tokens=False),
    "ours, masked tokens removed": DFTConfig("dft", compact_masked_tokens=True),
    "ours, linear-fused": DFTConfig("dft", compact_masked_tokens=True, linear_fused=True),
    "ours, linear-fused, gradient in forward": DFTConfig(
        "dft", compact_masked_tokens=True, linear_fused=True, token_chunk=TOKEN_CHUNK
    ),
    "ours, full metrics": DFTConfig("dft", compact_masked_tokens=True, metrics="full", channels="a,b,c"),
}
IMPLEMENTATIONS = VARIANTS | {f"ours: {name}": DFTConfig(name) for name in WITHOUT_REFERENCE if name != "dft"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
PLACE = ("world", "tp", "sp", "pp", "cp", "dp")
SIZES = ("hidden", "layers", "heads", "vocab", "seq_length", "micro_batch", "global_batch")
WIRE = (*PLACE, "implementation", "stage", "part", "group", "collective", "calls", "bytes")
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    device = start()
    world, first = dist.get_world_size(), dist.get_rank() == 0
    task = Task(*(getattr(args, name) for name in SIZES), dtype=args.dtype or default_dtype(device))
    facts = {**conditions(device), **described(task)}
    name = f"{str(facts['device']).replace(' ', '-')}-{facts['date']}-layouts.csv"
    path = args.out or Path(__file__).resolve().parent / "results" / name
    wire_path = path.with_name(path.stem.removesuffix("-layouts") + "-wire.csv")
    files = [read(path), read(wire_path)] if first else [None, None]
    dist.broadcast_object_list(files)  # other nodes may not share the file system
    rows, wire = files
    for layout in [Layout.parse(text) for text in args.layouts or ()] or usual_layouts(world, task):
        place = {"world": str(world)} | {k: str(v) for k, v in vars(layout).items()} | {"dp": str(layout.dp(world))}
        if any(place.items() <= row.items() for row in rows):
            continue
        new, sent = measured(layout, args, task, device)
        rows += [facts | place | row for row in new]
        wire = [row for row in wire if not place.items() <= row.items()] + [place | row for row in sent]
        if first:
            write(wire_path, wire, WIRE)  # before the rows that mark this layout as done
            write(path, rows, list(rows[0]))
            for row in rows[-len(new) :]:
                print(f"{named(row):76} {row['step_ms']:9} ms, loss stage {row['loss_stage_share']:.0%}", flush=True)
    wrong = disagreements(rows)
    if first:
        print(*wrong, path, sep="\n")
    return int(bool(wrong))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--layouts", nargs="+", help="such as tp2 tp2sppp2 pp2cp2 dp (default: all that fit the number of ranks)"
    )
    parser.add_argument("--only", nargs="+", help="implementations whose name contains one of these (default: all)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--layers", type=int, default=4, help="number of transformer layers")
    parser.add_argument("--heads", type=int, default=8, help="number of attention heads")
    parser.add_argument("--vocab", type=int, default=16384, help="vocabulary size")
    parser.add_argument("--seq-length", type=int, default=128, help="sequence length in tokens")
    parser.add_argument("--micro-batch", type=int, default=2, help="micro-batch size in samples")
    parser.add_argument("--global-batch", type=int, default=8, help="global batch size in samples")
    parser.add_argument(
        "--dtype", type=lambda name: DTYPES[name], help="bf16 or fp32 (default: bf16, fp32 on CPU ranks)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="rounds over all implementations")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round, at least 2")
    parser.add_argument("--out", type=Path, help="CSV file (default: tools/benchmarks/results/DEVICE-DATE-layouts.csv)")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps: expected 2 or more, for an interquartile range, got {args.steps}")
    args.only = args.only or [""]
    if not any(part in name for part in args.only for name in IMPLEMENTATIONS):
        parser.error(f"--only: expected parts of {', '.join(IMPLEMENTATIONS)}, got {' '.join(args.only)}")
    return args


def default_dtype(device: torch.device) -> torch.dtype:
    return DTYPES["bf16" if device.type == "cuda" else "fp32"]


def usual_layouts(world: int, task: Task) -> list[Layout]:
    """Powers of two for TP (with sequence parallelism), PP and CP; DP of 1 or 2, or DP alone."""
    powers = [2**i for i in range(world.bit_length())]
    layouts = [Layout(tp, tp > 1, pp, cp) for tp, pp, cp in itertools.product(powers, repeat=3)]
    possible = [x for x in layouts if task.layers % x.pp == 0 and task.heads % x.tp == 0]
    return [x for x in possible if x.tp * x.pp * x.cp in (world, world // 2) or x == Layout()]


def described(task: Task) -> Row:
    """Columns that describe the task."""
    valid = task.valid()
    masked = 1 - valid / (task.global_batch * task.seq_length)
    sizes = {name: getattr(task, name) for name in SIZES}
    return sizes | {"dtype": str(task.dtype).removeprefix("torch."), "masked": round(masked, 4), "valid": valid}


def measured(layout: Layout, args: argparse.Namespace, task: Task, device: torch.device) -> tuple[list[Row], list[Row]]:
    """Rows of one layout: its times and its collectives."""
    names = [name for name in IMPLEMENTATIONS if any(part in name for part in args.only)]
    firsts, timed, sent = {}, {name: [] for name in names}, []
    with model_parallel(layout) as groups:
        for round_, name in itertools.product(range(args.rounds), names):
            if round_ > 0 and name not in VARIANTS:
                continue
            training = Training(task, layout, IMPLEMENTATIONS[name], device)
            *first, calls = training.first_step()
            timed[name] += [training.timed_step() for _ in range(args.steps)]
            if round_ == 0:
                firsts[name] = first
                sent += [{"implementation": name, **row} for row in counted(calls, groups)]
            del training
    return [summary(name, firsts[name], timed[name], task) for name in names], of_all_ranks(sent)


def summary(name: str, first: list[float], timed: list[tuple[float, float, list[float]]], task: Task) -> Row:
    """Medians of the timed steps."""
    step_ms, loss_ms, peaks = zip(*timed, strict=True)
    middle = statistics.median(step_ms)
    quarters = statistics.quantiles(step_ms, n=4)
    shares = [loss / step for loss, step in zip(loss_ms, step_ms, strict=True)]
    return {
        "implementation": name,
        "steps": len(timed),
        "step_ms": round(middle, 2),
        "spread_ms": round(quarters[2] - quarters[0], 2),
        "tokens_per_s": round(1e3 * task.global_batch * task.seq_length / middle, 1),
        "loss_stage_ms": round(statistics.median(loss_ms), 2),
        "loss_stage_share": round(statistics.median(shares), 4),
        "peak_mib": " ".join(f"{statistics.median(mib):.0f}" for mib in zip(*peaks, strict=True)),
        "loss": f"{first[0]:.7g}",
        "grad_norm": f"{first[1]:.7g}",
    }


def counted(calls: list[tuple[str, str, str, int]], groups: dict[str, str]) -> list[Row]:
    """Calls and bytes of this rank by part, group and collective, without groups of one rank."""
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    number: Counter = Counter()
    nbytes: Counter = Counter()
    for part, group, collective, size in calls:
        key = (part, groups.get(group), collective)
        number[key] += 1
        nbytes[key] += size
    rows = [(stage, *key, number[key], nbytes[key]) for key in number if key[1]]
    return [dict(zip(WIRE[-6:], row, strict=True)) for row in rows]


def of_all_ranks(sent: list[Row]) -> list[Row]:
    """The rows of all ranks without duplicates. Outside of the loss stage, all implementations have the same rows."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sent)
    found: dict[tuple, Row] = {}
    for row in itertools.chain(*everyone):
        found.setdefault(tuple(row[name] for name in row if name != "implementation" or row["part"] == "loss"), row)
    return list(found.values())


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row], columns: Sequence[str]) -> None:
    """Write a CSV file atomically."""
    part = path.with_suffix(".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def named(row: Row) -> str:
    return " ".join(f"{name} {row[name]}" for name in PLACE) + f"  {row['implementation']}"


def disagreements(rows: list[Row]) -> list[str]:
    """Rows whose loss or gradient norm differs from the first row of the same objective and task."""
    found, expected = [], {}
    for row in rows:
        same = "nll" if row["implementation"] in ("Megatron", "ours: nll") else row["implementation"].partition(",")[0]
        # The mean of cayley is over the tokens of one rank, the median of talr over the micro-batches of all ranks.
        depends = {"ours: cayley": "cp", "ours: talr": "dp"}.get(same)
        for key in ("loss",) if depends and row[depends] != "1" else ("loss", "grad_norm"):
            truth = expected.setdefault((key, same, *(str(row[name]) for name in (*SIZES, "dtype"))), float(row[key]))
            if not abs(float(row[key]) - truth) <= TOLERANCE[row["dtype"]] * abs(truth):
                found.append(f"{named(row)}: expected a {key} of {truth}, got {row[key]}")
    return found


if __name__ == "__main__":
    exit_rank(main())
