"""Write the parts of README.md and docs/ that follow from the code: tables, and the figures that show formulas.

    python tools/write_docs.py

Tables stand between markers. docs/figures gets gates.png and data-flow.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dft import OBJECTIVES, DFTConfig, TokenStats
from megatron_dft.ops.objectives import TALR, WITHOUT_REFERENCE, Cayley, Entropy, Objective, Prob

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"


def objectives_table(names: Iterable[str]) -> str:
    """One row per objective: specification, loss, gate, parameters with their defaults."""
    lines = ["| `--loss-type` | loss | gate | parameters (default) |", "|---|---|---|---|"]
    for name in names:
        cls = OBJECTIVES[name]
        parameters = ", ".join(f"{key} ({getattr(cls, field)})" for key, field in cls.parameters().items())
        loss, gate = cls.formula
        lines.append(f"| `{name}` | {loss} | {gate} | {parameters} |")
    return "\n".join(lines)


def configuration_table() -> str:
    """One row per field of DFTConfig: flag, key, default, help."""
    parser = DFTConfig.add_arguments(argparse.ArgumentParser(add_help=False))
    lines = ["| flag | key | default | meaning |", "|---|---|---|---|"]
    for field, action in zip(fields(DFTConfig), parser._actions, strict=True):
        flag = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            flag = flag.replace("--", "--[no-]", 1)
        default = "" if field.default is None else {True: "on", False: "off"}.get(field.default, field.default)
        lines.append(f"| `{flag}` | `{field.name}` | {default} | {action.help} |")
    return "\n".join(lines)


def sections() -> dict[Path, dict[str, str]]:
    """The generated tables of each file, by the name of their markers."""
    return {
        ROOT / "README.md": {"objectives": objectives_table(WITHOUT_REFERENCE)},
        ROOT / "docs" / "objectives.md": {"objectives": objectives_table(OBJECTIVES)},
        ROOT / "docs" / "configuration.md": {"configuration": configuration_table()},
    }


def with_sections(text: str, tables: dict[str, str]) -> str:
    """The text of a file with its generated tables.

    Raises:
        ValueError: if a marker is missing.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by tools/write_docs.py -->\n", f"<!-- end of {name} -->\n"
        if begin not in text or end not in text:
            raise ValueError(f"expected the markers {begin!r} and {end!r}")
        head, tail = text.partition(begin)[0], text.partition(end)[2]
        text = f"{head}{begin}\n{table}\n\n{end}{tail}"
    return text


def gates(objectives: Iterable[Objective], prob: Tensor) -> dict[str, Tensor]:
    """Gates over p, if one other token has the rest of the probability."""
    rest = 1.0 - prob
    stats = TokenStats(
        logprob=prob.log(),
        valid=torch.ones_like(prob, dtype=torch.bool),
        entropy=-(prob.xlogy(prob) + rest.xlogy(rest)),
        collision=prob.square() + rest.square(),
        vocab_size=2,
    )
    return {str(objective): objective(stats)[1] for objective in objectives}


def draw_gates(path: Path) -> None:
    """Gate over the probability of the target, of every objective."""
    plt = pyplot()
    of_p, of_more = [], []
    for cls in map(OBJECTIVES.get, WITHOUT_REFERENCE):
        if cls is not None and cls is not Prob:  # its gate is that of dft
            (of_more if cls.needs or cls is Cayley else of_p).append(cls())
    of_more += [Entropy(form=form) for form in ("complement", "exponential")]
    prob = torch.linspace(1e-4, 1.0, 1000, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for ax, objectives, title in zip(axes, (of_p, of_more), ("of p alone", "one other token has 1 - p"), strict=True):
        for name, gate in gates(objectives, prob).items():
            label = {"dft": "dft, prob", str(TALR()): "talr, tau = ln 2"}.get(name, name)
            ax.plot(
                prob, gate, label=label, color="black" if name == "dft" else None, linewidth=3 if name == "dft" else 1.5
            )
        ax.set(xlabel="p: probability of the target", xlim=(0, 1), ylim=(0, 1.05), title=title)
        figure.legend(
            *ax.get_legend_handles_labels(), loc=f"outside lower {'left' if ax is axes[0] else 'right'}", ncols=2
        )
    axes[0].set_ylabel("gate")
    figure.savefig(path, dpi=110)


def draw_data_flow(path: Path) -> None:
    """Forward, collective and backward of the loss on two tensor-parallel ranks."""
    figure, axes = pyplot().subplots(figsize=(11, 4.2), layout="constrained")
    axes.set(xlim=(0, 110), ylim=(0, 42))
    axes.axis("off")

    from matplotlib.patches import Rectangle

    def box(x: float, y: float, width: float, height: float, text: str, color: str) -> None:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)

    def arrow(x: float, y: float, to_x: float, to_y: float) -> None:
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "->"})

    for rank, y in enumerate((24.0, 4.0)):
        box(1, y, 15, 12, f"rank {rank}\nlogits [N, V/2]", "#d6e6f4")
        box(21, y, 17, 12, "shard_stats\nM, s, x_y [, a] [, q]\n[3..5, N]", "#fdebd0")
        box(60, y, 20, 12, "merge: log p, H, C\nobjective: loss, gate\n[N] each", "#fdebd0")
        box(86, y, 23, 12, "shard_gradient\nupstream x gate x\n(softmax - onehot)", "#d5f0dd")
        arrow(16, y + 6, 21, y + 6)
        arrow(38, y + 6, 43, 20)
        arrow(55, 20, 60, y + 6)
        arrow(80, y + 6, 86, y + 6)
    box(43, 14, 12, 12, "all-gather\n(the only\ncollective)", "#f6d5d5")
    for x, text in ((8, "input"), (45, "forward"), (97, "backward")):
        axes.text(x, 39, text, ha="center", fontsize=10, fontweight="bold")
    figure.savefig(path, dpi=110)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main() -> None:
    """Write tables and figures."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    for path, tables in sections().items():
        path.write_text(with_sections(path.read_text(), tables))
    draw_gates(FIGURES / "gates.png")
    draw_data_flow(FIGURES / "data-flow.png")


if __name__ == "__main__":
    main()
