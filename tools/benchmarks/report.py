"""Write the benchmark pages docs/benchmarks.md and docs/benchmarks-cpu.md, and their figures, from the measured files.

    python tools/benchmarks/report.py

The tables stand between two markers of each page. Every number comes from a file of benchmark_loss.py or
benchmark_layouts.py (-layouts.csv). All implementations are listed, slower ones included, and those that were not
measured are named with the reason.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from statistics import median

from baselines import DFT, STOCK

from megatron_dft.utils import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
PAGES = {ROOT / "docs" / "benchmarks.md": True, ROOT / "docs" / "benchmarks-cpu.md": False}  # whether of GPUs
BEGIN, END = "<!-- benchmark: written by tools/benchmarks/report.py -->\n", "<!-- end of benchmark -->\n"
# One node of eight H200: latency of a collective, and bandwidth per direction (400 GB/s).
LATENCY_US, BYTES_PER_US = 20.0, 400e3
DROPPED = "ours, masked tokens removed"
Rows = list[dict[str, str]]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter).parse_args()
    for page, on_gpu in PAGES.items():
        text = page.read_text()
        page.write_text(text.partition(BEGIN)[0] + section(on_gpu) + text.partition(END)[2])
    for path in results():
        if timed := of_logits(read(path)):
            draw(timed, figure(path))
    for path in layouts():
        draw_layouts(read(path), figure(path))


def figure(path: Path) -> Path:
    """The figure of a results file."""
    return ROOT / "docs" / "figures" / path.with_suffix(".png").name


def read(path: Path) -> Rows:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def results() -> list[Path]:
    """Files of benchmark_loss.py; GPUs first."""
    files = (path for path in RESULTS.glob("*.csv") if not path.stem.endswith(("-layouts", "-wire")))
    return sorted(files, key=lambda path: ("NVIDIA" not in path.name, path.stem))


def layouts() -> list[Path]:
    """Files of benchmark_layouts.py."""
    return sorted(RESULTS.glob("*-layouts.csv"))


def section(on_gpu: bool) -> str:
    """The section between the markers of a page: one part per results file of GPUs, or of CPUs."""
    files = [path for path in results() if ("NVIDIA" in path.name) == on_gpu]
    parts = [part(read(path), path) for path in files]
    parts += [layouts_part(read(path), path) for path in layouts() if ("NVIDIA" in path.name) == on_gpu]
    parts.append(missing([row for path in files for row in read(path)]))
    return BEGIN + "\n" + "\n".join(parts) + "\n" + END


def of_logits(rows: Rows) -> Rows:
    """Rows of the loss on given logits."""
    return of_complete([row for row in rows if not row["note"] and not row["hidden"]])


def of_complete(rows: Rows) -> Rows:
    """Rows of the implementations that were measured at every size. `missing` names the others."""
    count = Counter(row["implementation"] for row in rows)
    return [row for row in rows if count[row["implementation"]] == max(count.values())]


def part(rows: Rows, path: Path) -> str:
    """Text and tables of one file of benchmark_loss.py."""
    timed, heads = of_logits(rows), of_complete([row for row in rows if not row["note"] and row["hidden"]])
    lines = []
    if timed:
        first, vocabularies = timed[0], sorted({int(row["vocab"]) for row in timed}, reverse=True)
        lines += [
            f"**{conditions(first)}** Loss on given logits: {first['tokens']} tokens, bf16. Time of forward + backward "
            f"in ms, median of {first['repetitions']} interleaved runs. Bandwidth of a copy: "
            f"{float(first['copy_gb_per_s']):.0f} GB/s. {origin(first, path)}.\n",
            baselines_table(timed, vocabularies),
            masked_table(timed, vocabularies[0]),
            objectives_table(timed, vocabularies[0]),
            f"![Bytes per logit of each implementation](figures/{figure(path).name})\n",
        ]
    if heads:
        first = heads[0]
        lines += [
            f"**{conditions(first)}** Output layer and loss, from hidden states: {first['tokens']} tokens, "
            f"{first['dtype']}. Time of forward + backward in ms, median of {first['repetitions']} interleaved runs; "
            "in parentheses relative to Megatron's time with the same share of masked tokens. MiB: peak memory beyond "
            "the inputs. Megatron and ours add the weight gradient to a `main_grad` that is an input; the others "
            f"return it. {origin(first, path)}.\n",
            heads_by_mask(heads),
            heads_by_size(heads),
        ]
    return "\n".join(lines)


def missing(rows: Rows) -> str:
    """Implementations that were not measured on a device, with the reason."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["note"]:
            names.setdefault((row["device"], row["note"]), {})[row["implementation"]] = None
    notes = [f"- {device}, {'; '.join(found)}: {note}\n" for (device, note), found in names.items()]
    return "Not measured:\n\n" + "".join(notes) if notes else ""


def layouts_part(rows: Rows, path: Path) -> str:
    """Text, table and figure of one file of benchmark_layouts.py."""
    first, variants, wire = rows[0], variants_of(rows), path.with_name(path.name.replace("-layouts", "-wire"))
    body = []
    for name, found in by_layout(rows).items():
        stock = float(found[variants[0]]["step_ms"])
        shares = [f"{float(found[variant]['step_ms']) / stock:.2f}" for variant in variants[1:]]
        share = f"{float(found[variants[0]]['loss_stage_share']):.0%}"
        body.append([name, f"{stock:.0f}", share, *shares, f"{float(found[DROPPED]['loss_stage_share']):.0%}"])
    steps = " or ".join(sorted({row["steps"] for row in rows if row["implementation"] in variants}, key=int))
    spread = median(float(row["spread_ms"]) / float(row["step_ms"]) for row in rows)
    shared = "" if "NVIDIA" in first["device"] else " CPU ranks with one thread each; 4 and 8 ranks share two cores."
    head = ["layout", f"{variants[0]}, ms", "loss stage", *variants[1:], "loss stage, masked tokens removed"]
    return (
        f"**{first['device']}:** Training steps of a GPT (hidden size {first['hidden']}, {first['layers']} layers, "
        f"vocabulary {first['vocab']}, {first['dtype']}). Every layout trains on the same batch: "
        f"{first['global_batch']} samples of {first['seq_length']} tokens, {float(first['masked']):.0%} masked. "
        "Columns: ms per step and share of the loss stage with Megatron's loss, then the step time of ours relative to "
        "Megatron's. "
        f"Medians of {steps} interleaved steps; the interquartile range is typically {spread:.0%} of a step.{shared} "
        f"{origin(first, path)}; collectives: `{wire.relative_to(ROOT)}`.\n\n"
        f"{table(head, body)}\n"
        f"![Step time by layout and loss](figures/{figure(path).name})\n"
    )


def variants_of(rows: Rows) -> list[str]:
    """Megatron's loss and the variants of DFT, without the other objectives."""
    return [name for name in dict.fromkeys(row["implementation"] for row in rows) if not name.startswith("ours: ")]


def by_layout(rows: Rows) -> dict[str, dict[str, dict[str, str]]]:
    """Rows by name of the layout, then by implementation."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        sizes = {"TP": row["tp"], "PP": row["pp"], "CP": row["cp"], "DP": row["dp"]}
        parts = [f"{name} {size}" for name, size in sizes.items() if size != "1"] or ["1 rank"]
        name = " x ".join(parts).replace("TP", "TP, SP" if row["sp"] == "True" else "TP")
        found.setdefault(name, {})[row["implementation"]] = row
    return found


def conditions(row: dict[str, str]) -> str:
    """The device and its number of threads."""
    return row["device"] + (f" ({row['threads']} threads)" if row["threads"] else "") + ":"


def origin(row: dict[str, str], path: Path) -> str:
    """Versions, date, commit and file."""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "megatron-core") if row[name])
    return f"{versions}; {row['date']}, commit {row['commit']}; `{path.relative_to(ROOT)}`"


def heads_by_mask(heads: Rows) -> str:
    """Times at the largest size, by share of masked tokens."""
    size = max((int(row["hidden"]), int(row["vocab"])) for row in heads)
    shares = sorted({float(row["masked"]) for row in heads})
    body = [
        [name, *(share_of_stock(heads, name, *size, share) for share in shares)]
        for name in dict.fromkeys(row["implementation"] for row in heads)
    ]
    return table([f"H = {size[0]}, V = {size[1]}", *(f"{share:.0%} masked" for share in shares)], body)


def heads_by_size(heads: Rows) -> str:
    """Time relative to Megatron's and memory, for every size, at 0% and 70% masked tokens."""
    sizes = sorted({(int(row["hidden"]), int(row["vocab"])) for row in heads})
    shares = [share for share in sorted({float(row["masked"]) for row in heads}) if share in (0.0, 0.7)]
    body = []
    for name in dict.fromkeys(row["implementation"] for row in heads):
        found = [pick_head(heads, name, *size, share) for share in shares for size in sizes]
        cells = [
            f"{float(row['total_ms']) / stock_ms(heads, row):.2f}, {float(row['extra_mib']):.0f} MiB" for row in found
        ]
        body.append([name, *cells])
    names = [f"{share:.0%}: {size[0]}, {size[1]}" for share in shares for size in sizes]
    return table(["masked: H, V", *names], body)


def share_of_stock(heads: Rows, name: str, hidden: int, vocab: int, masked: float) -> str:
    row = pick_head(heads, name, hidden, vocab, masked)
    return f"{float(row['total_ms']):.0f} ({float(row['total_ms']) / stock_ms(heads, row):.2f})"


def stock_ms(heads: Rows, row: dict[str, str]) -> float:
    """Megatron's time at the same size and share of masked tokens."""
    stock = pick_head(heads, STOCK, int(row["hidden"]), int(row["vocab"]), float(row["masked"]))
    return float(stock["total_ms"])


def pick_head(heads: Rows, name: str, hidden: int, vocab: int, masked: float) -> dict[str, str]:
    wanted = (name, str(hidden), str(vocab), masked)
    keys = ("implementation", "hidden", "vocab")
    (row,) = (row for row in heads if (*(row[key] for key in keys), float(row["masked"])) == wanted)
    return row


def baselines_table(timed: Rows, vocabularies: list[int]) -> str:
    """Time, memory and collectives of every implementation of DFT, without masked tokens."""
    heads = [f"V = {vocab}" for vocab in vocabularies]
    on_gpu = "NVIDIA" in timed[0]["device"]
    heads += ["B/logit", "extra MiB", "collectives, B/token"] + ["TP = 8, projected"] * on_gpu
    body = []
    for name in names(timed):
        found = {vocab: pick(timed, name, vocab, 0.0) for vocab in vocabularies}
        first = found[vocabularies[0]]
        cells = [against(found[vocab], pick(timed, DFT, vocab, 0.0)) for vocab in vocabularies]
        sent = f"{first['collectives']}, {float(first['sent_bytes_per_token']):.0f}" if first["collectives"] else "-"
        cells += [f"{float(first['bytes_per_logit']):.1f}", f"{float(first['extra_mib']):.0f}", sent]
        cells += [projected(found[min(vocabularies, key=lambda v: abs(v - 16032))])] * on_gpu
        body.append([name, *cells])
    return table(["implementation", *heads], body)


def projected(row: dict[str, str]) -> str:
    """Projected ms on eight ranks: time of the shard, LATENCY_US per collective, bytes sent / bandwidth."""
    if not row["collectives"]:
        return "-"
    sent = int(row["collectives"]) * LATENCY_US
    sent += float(row["sent_bytes_per_token"]) * int(row["tokens"]) * 7 / BYTES_PER_US
    return f"{float(row['total_ms']) + sent / 1e3:.2f}"


def masked_table(timed: Rows, vocab: int) -> str:
    """Times by share of masked tokens, and relative to the smallest share."""
    shares = sorted({float(row["masked"]) for row in timed})
    body = []
    for name in names(timed):
        first = float(pick(timed, name, vocab, shares[0])["total_ms"])
        found = [float(pick(timed, name, vocab, share)["total_ms"]) for share in shares]
        body.append([name, *(f"{ms:.3g} ({ms / first:.2f})" for ms in found)])
    return table([f"V = {vocab}", *(f"{share:.0%} masked" for share in shares)], body)


def objectives_table(timed: Rows, vocab: int) -> str:
    """Time of each objective relative to dft."""
    dft = pick(timed, DFT, vocab, 0.0)
    family = [row for row in timed if row["implementation"].startswith("ours: ") and "," not in row["implementation"]]
    found = [row for row in family if int(row["vocab"]) == vocab and float(row["masked"]) == 0.0]
    cells = [[row["implementation"].removeprefix("ours: "), against(row, dft)] for row in found]
    return table(["objective", *(cell[0] for cell in cells)], [[f"V = {vocab}", *(cell[1] for cell in cells)]])


def draw(timed: Rows, path: Path) -> None:
    """Plot bytes per logit at the largest vocabulary, for each share of masked tokens."""
    import matplotlib.pyplot as plt

    vocab = max(int(row["vocab"]) for row in timed)
    shares = sorted({float(row["masked"]) for row in timed})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, share in enumerate(shares):
        values = [float(pick(timed, name, vocab, share)["bytes_per_logit"]) for name in names(timed)]
        places = [place + 0.27 * (i - 1) for place in range(len(values))]
        axes.barh(places, values, 0.25, label=f"{share:.0%} masked", color=plt.cm.viridis(0.15 + 0.3 * i))
    axes.axvline(6.0, color="gray", linestyle=":", label="minimum traffic, 0% masked")
    axes.set_yticks(range(len(names(timed))), names(timed))
    axes.invert_yaxis()
    axes.set_xlabel(f"time x copy bandwidth, in bytes per bf16 logit; V = {vocab}")
    axes.set_title(f"{timed[0]['device']}, {timed[0]['date']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_layouts(rows: Rows, path: Path) -> None:
    """Plot step and loss stage by layout and variant, relative to the step with Megatron's loss."""
    import matplotlib.pyplot as plt

    found, variants = by_layout(rows), variants_of(rows)
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.55 * len(found)), layout="constrained")
    for i, variant in enumerate(variants):
        stock = [float(row[variants[0]]["step_ms"]) for row in found.values()]
        steps = [float(row[variant]["step_ms"]) / ms for row, ms in zip(found.values(), stock, strict=True)]
        losses = [
            float(row[variant]["loss_stage_share"]) * step for row, step in zip(found.values(), steps, strict=True)
        ]
        places = [place + (i - (len(variants) - 1) / 2) * 0.8 / len(variants) for place in range(len(found))]
        color = plt.cm.viridis(0.1 + 0.75 * i / len(variants))
        axes.barh(places, steps, 0.8 / len(variants), color=color, alpha=0.35)
        axes.barh(places, losses, 0.8 / len(variants), color=color, label=variant)
    axes.axvline(1.0, color="gray", linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("step time relative to Megatron's loss; dark: loss stage of the last pipeline stage")
    axes.set_title(f"{rows[0]['device']}, {rows[0]['date']}", fontsize=9)
    axes.margins(y=0.01)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(variants))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def names(timed: Rows) -> list[str]:
    """Implementations of DFT in the order of the file: ours, then the baselines."""
    known = dict.fromkeys(row["implementation"] for row in timed)
    return [name for name in known if not name.startswith("ours") or name.startswith(DFT)]


def pick(timed: Rows, name: str, vocab: int, masked: float) -> dict[str, str]:
    (row,) = (
        row
        for row in timed
        if (row["implementation"], int(row["vocab"]), float(row["masked"])) == (name, vocab, masked)
    )
    return row


def against(row: dict[str, str], dft: dict[str, str]) -> str:
    """Time in ms, and relative to ours."""
    ms = float(row["total_ms"])
    return f"{ms:.3g} ({ms / float(dft['total_ms']):.2f}x)"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
