"""From measured CSV files to the tables and the figures of the README.

    python tools/report.py            write the section between the markers of README.md, and tools/results/*.png

Every number comes from a file that benchmark.py or benchmark_layouts.py (-layouts.csv) wrote; losers are shown, and so
is who is missing and why.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import median

from rivals import DFT, STOCK

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
BEGIN, END = "<!-- benchmark: written by tools/report.py -->\n", "<!-- end of benchmark -->\n"
# For one node of eight H200: what a collective costs beside the bytes that it sends.
LATENCY_US, BYTES_PER_US = 20.0, 400e3
DROPPED = "ours, masked tokens dropped"
Rows = list[dict[str, str]]


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + section() + after)
    for path in results():
        if timed := of_logits(read(path)):
            draw(timed, path.with_suffix(".png"))
    for path in layouts():
        draw_layouts(read(path), path.with_suffix(".png"))


def read(path: Path) -> Rows:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def results() -> list[Path]:
    """Files of benchmark.py; GPUs first."""
    files = (path for path in RESULTS.glob("*.csv") if not path.stem.endswith(("-layouts", "-wire")))
    return sorted(files, key=lambda path: ("NVIDIA" not in path.name, path.stem))


def layouts() -> list[Path]:
    """Files of benchmark_layouts.py."""
    return sorted(RESULTS.glob("*-layouts.csv"))


def section() -> str:
    """What stands between the markers of the README: a part for each results file."""
    files = results()
    parts = [part(read(path), path) for path in files] + [layouts_part(read(path), path) for path in layouts()]
    if not any("NVIDIA" in path.name for path in files):
        parts.insert(0, "**On GPUs: not measured yet.** `make gpu` writes the files there.\n")
    parts.append(missing([row for path in files for row in read(path)]))
    return BEGIN + "\n" + "\n".join(parts) + "\n" + END


def of_logits(rows: Rows) -> Rows:
    """What was timed on given logits."""
    return [row for row in rows if not row["note"] and not row["hidden"]]


def part(rows: Rows, path: Path) -> str:
    """Text and tables of one file of benchmark.py."""
    timed, heads = of_logits(rows), [row for row in rows if row["hidden"]]
    lines = []
    if timed:
        first, vocabularies = timed[0], sorted({int(row["vocab"]) for row in timed}, reverse=True)
        lines += [
            f"**{conditions(first)}** {first['tokens']} tokens, bf16 logits, forward + backward in ms, medians of "
            f"{first['repetitions']} interleaved runs. A copy moves {float(first['copy_gb_per_s']):.0f} GB/s. "
            f"{origin(first, path)}.\n",
            rivals_table(timed, vocabularies),
            masked_table(timed, vocabularies[0]),
            objectives_table(timed, vocabularies[0]),
            f"![bytes per logit of each implementation]({path.with_suffix('.png').relative_to(ROOT)})\n",
        ]
    if heads:
        first = heads[0]
        lines += [
            f"**{conditions(first)}** Output layer and loss together, from hidden states: {first['tokens']} tokens, "
            f"{first['dtype']}, forward + backward in ms, medians of {first['repetitions']} interleaved runs; in "
            "brackets the share of Megatron's time with as many masked tokens. MiB are beyond the inputs; Megatron and "
            "ours add the weight's gradient to a buffer that is one of these, the others return it. "
            f"{origin(first, path)}.\n",
            heads_by_mask(heads),
            heads_by_size(heads),
        ]
    return "\n".join(lines)


def missing(rows: Rows) -> str:
    """What could not be measured on a device, and why."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["note"]:
            names.setdefault((row["device"], row["note"]), {})[row["implementation"]] = None
    notes = [f"on {device}, {', '.join(found)}: {note}" for (device, note), found in names.items()]
    return "Not in these tables: " + "; ".join(notes) + ".\n" if notes else ""


def layouts_part(rows: Rows, path: Path) -> str:
    """Text, table and figure of one file of benchmark_layouts.py."""
    first, ways, wire = rows[0], ways_of(rows), path.with_name(path.name.replace("-layouts", "-wire"))
    body = []
    for name, found in by_layout(rows).items():
        stock = float(found[ways[0]]["step_ms"])
        shares = [f"{float(found[way]['step_ms']) / stock:.2f}" for way in ways[1:]]
        share = f"{float(found[ways[0]]['loss_stage_share']):.0%}"
        body.append([name, f"{stock:.0f}", share, *shares, f"{float(found[DROPPED]['loss_stage_share']):.0%}"])
    steps = " or ".join(sorted({row["steps"] for row in rows if row["implementation"] in ways}, key=int))
    spread = median(float(row["spread_ms"]) / float(row["step_ms"]) for row in rows)
    shared = "" if "NVIDIA" in first["device"] else "; CPU ranks of one thread each, from 4 on more than the two cores"
    head = ["layout", f"{ways[0]}, ms", "its loss stage", *ways[1:], "loss stage, masked tokens dropped"]
    return (
        f"**{first['device']}:** Training steps of a GPT (hidden size {first['hidden']}, {first['layers']} layers, "
        f"{first['vocab']} words, {first['dtype']}) on a batch of {first['global_batch']} samples of "
        f"{first['seq_length']} tokens, {float(first['masked']):.0%} of them masked, in every layout the same: ms per "
        f"step with Megatron's loss, and ours as a share of it. Medians of {steps} interleaved steps, whose quartiles "
        f"are typically {spread:.0%} of a step apart{shared}. {origin(first, path)}; what is sent: "
        f"[{wire.name}]({wire.relative_to(ROOT)}).\n\n"
        f"{table(head, body)}\n"
        f"![step time by layout and loss]({path.with_suffix('.png').relative_to(ROOT)})\n"
    )


def ways_of(rows: Rows) -> list[str]:
    """Megatron's loss and the ways to compute DFT, without the other objectives."""
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
    """The device."""
    return row["device"] + (f" ({row['threads']} threads)" if row["threads"] else "") + ":"


def origin(row: dict[str, str], path: Path) -> str:
    """Versions, date, commit and file."""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "megatron-core") if row[name])
    return f"{versions}; {row['date']}, commit {row['commit']}; [{path.name}]({path.relative_to(ROOT)})"


def heads_by_mask(heads: Rows) -> str:
    """The largest size: what masked tokens save."""
    size = max((int(row["hidden"]), int(row["vocab"])) for row in heads)
    shares = sorted({float(row["masked"]) for row in heads})
    body = [
        [name, *(share_of_stock(heads, name, *size, share) for share in shares)]
        for name in dict.fromkeys(row["implementation"] for row in heads)
    ]
    return table([f"H = {size[0]}, V = {size[1]}", *(f"{share:.0%} masked" for share in shares)], body)


def heads_by_size(heads: Rows) -> str:
    """Every size, nothing masked and much: time against Megatron's, and memory."""
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
    """Megatron's time of the same size and share of masked tokens."""
    stock = pick_head(heads, STOCK, int(row["hidden"]), int(row["vocab"]), float(row["masked"]))
    return float(stock["total_ms"])


def pick_head(heads: Rows, name: str, hidden: int, vocab: int, masked: float) -> dict[str, str]:
    wanted = (name, str(hidden), str(vocab), masked)
    keys = ("implementation", "hidden", "vocab")
    (row,) = (row for row in heads if (*(row[key] for key in keys), float(row["masked"])) == wanted)
    return row


def rivals_table(timed: Rows, vocabularies: list[int]) -> str:
    """Every implementation of DFT, nothing masked: time, and what it costs beside time."""
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
    """ms on eight ranks: the shard's time, and for its collectives LATENCY_US each and what they send."""
    if not row["collectives"]:
        return "-"
    sent = int(row["collectives"]) * LATENCY_US
    sent += float(row["sent_bytes_per_token"]) * int(row["tokens"]) * 7 / BYTES_PER_US
    return f"{float(row['total_ms']) + sent / 1e3:.2f}"


def masked_table(timed: Rows, vocab: int) -> str:
    """What masked tokens save."""
    shares = sorted({float(row["masked"]) for row in timed})
    body = []
    for name in names(timed):
        whole = float(pick(timed, name, vocab, shares[0])["total_ms"])
        found = [float(pick(timed, name, vocab, share)["total_ms"]) for share in shares]
        body.append([name, *(f"{ms:.3g} ({ms / whole:.2f})" for ms in found)])
    return table([f"V = {vocab}", *(f"{share:.0%} masked" for share in shares)], body)


def objectives_table(timed: Rows, vocab: int) -> str:
    """The family against dft."""
    dft = pick(timed, DFT, vocab, 0.0)
    family = [row for row in timed if row["implementation"].startswith("ours: ") and "," not in row["implementation"]]
    found = [row for row in family if int(row["vocab"]) == vocab and float(row["masked"]) == 0.0]
    cells = [[row["implementation"].removeprefix("ours: "), against(row, dft)] for row in found]
    return table(["objective", *(cell[0] for cell in cells)], [[f"V = {vocab}", *(cell[1] for cell in cells)]])


def draw(timed: Rows, path: Path) -> None:
    """Bytes per logit at the largest vocabulary, for each share of masked tokens."""
    import matplotlib.pyplot as plt

    vocab = max(int(row["vocab"]) for row in timed)
    shares = sorted({float(row["masked"]) for row in timed})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, share in enumerate(shares):
        values = [float(pick(timed, name, vocab, share)["bytes_per_logit"]) for name in names(timed)]
        places = [place + 0.27 * (i - 1) for place in range(len(values))]
        axes.barh(places, values, 0.25, label=f"{share:.0%} masked", color=plt.cm.viridis(0.15 + 0.3 * i))
    axes.axvline(6.0, color="gray", linestyle=":", label="floor, nothing masked")
    axes.set_yticks(range(len(names(timed))), names(timed))
    axes.invert_yaxis()
    axes.set_xlabel(f"bytes per bf16 logit that a copy would have moved in that time; V = {vocab}")
    axes.set_title(f"{timed[0]['device']}, {timed[0]['date']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_layouts(rows: Rows, path: Path) -> None:
    """A step by layout: for each way its loss stage and the rest, as shares of the step with Megatron's loss."""
    import matplotlib.pyplot as plt

    found, ways = by_layout(rows), ways_of(rows)
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.55 * len(found)), layout="constrained")
    for i, way in enumerate(ways):
        stock = [float(row[ways[0]]["step_ms"]) for row in found.values()]
        steps = [float(row[way]["step_ms"]) / ms for row, ms in zip(found.values(), stock, strict=True)]
        losses = [float(row[way]["loss_stage_share"]) * step for row, step in zip(found.values(), steps, strict=True)]
        places = [place + (i - (len(ways) - 1) / 2) * 0.8 / len(ways) for place in range(len(found))]
        color = plt.cm.viridis(0.1 + 0.75 * i / len(ways))
        axes.barh(places, steps, 0.8 / len(ways), color=color, alpha=0.35)
        axes.barh(places, losses, 0.8 / len(ways), color=color, label=way)
    axes.axvline(1.0, color="gray", linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("step, as a share of that with Megatron's loss; dark: loss stage of the last pipeline stage")
    axes.set_title(f"{rows[0]['device']}, {rows[0]['date']}", fontsize=9)
    axes.margins(y=0.01)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(ways))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def names(timed: Rows) -> list[str]:
    """DFT by every implementation, in the order of the file: ours, then the rivals."""
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
    """ms, and how many times ours."""
    ms = float(row["total_ms"])
    return f"{ms:.3g} ({ms / float(dft['total_ms']):.2f}x)"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
