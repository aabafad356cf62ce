"""Ask a base model, before training, which objective fits the data.

    torchrun --nproc-per-node 8 -m megatron_dft.advise SCRIPT ARGUMENTS [--advise-out FOLDER] [--advise-batches N]

The command line of the training run, with `advise` for `launch`: the model is built in the same layout, its weights are
loaded (--load), then the first global batches of the training data pass through it, forward only. Nothing is trained or
saved. --loss-channels tells the channels of the data apart. On one rank `python -m` does in place of torchrun.

--advise-out FOLDER         advice.txt, advice.json and advice.png (default: runs/advice)
--advise-batches N          global batches of the training data (20)
--advise-objectives A B C   what is compared (all, with their default parameters)
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_dft import launch
from megatron_dft.hosts import advising
from megatron_dft.metrics import BINS
from megatron_dft.objectives import OBJECTIVES, parse_objective


def main(words: list[str]) -> None:
    """Turn a training run into a look at its data."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    parser = argparse.ArgumentParser("megatron_dft.advise", allow_abbrev=False, add_help=False)
    parser.add_argument("--advise-out", type=Path, default=Path("runs/advice"))
    parser.add_argument("--advise-batches", type=int, default=20)
    parser.add_argument("--advise-objectives", nargs="+", default=list(OBJECTIVES))
    ours, words = parser.parse_known_args(words)
    try:
        objectives = [parse_objective(name) for name in dict.fromkeys(("nll", *ours.advise_objectives))]
        if ours.advise_batches < 1:
            raise ValueError(f"--advise-batches: expected 1 or more, got {ours.advise_batches}")
        if "--full-validation" in words:
            raise ValueError("--full-validation: expected --advise-batches, which says how much data is read; drop it")
        if importlib.util.find_spec("matplotlib") is None:  # before the model is loaded
            raise ValueError("expected matplotlib, for the picture, got none; pip install 'megatron_dft[advisor]'")
    except ValueError as error:
        sys.exit(f"megatron_dft.advise: {error}")
    _one_rank_alone()
    report = functools.partial(write, out=ours.advise_out)
    enable = functools.partial(advising.enable, objectives=objectives, report=report)
    launch.run([*words, *advising.arguments(ours.advise_batches)], "megatron_dft.advise", enable)


def write(result: dict[str, Any], out: Path) -> None:
    """The three files, and the text on the console."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "advice.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "advice.txt").write_text(text(result))
    draw(result, out / "advice.png")
    print(f"{text(result)}\n{out}/advice.txt, advice.json, advice.png", flush=True)


def text(result: dict[str, Any]) -> str:
    """The result as tables."""
    rows = {"all": result, **(result["channels"] if len(result["channels"]) > 1 else {})}
    lines = [f"{'targets':<20}{'tokens':>10}{'mean p':>8}{'NLL':>8}{'right':>8}   share of tokens with p in tenths, %"]
    for name, numbers in rows.items():
        shares = "".join(f"{100 * share:4.0f}" for share in numbers["histogram"])
        means = f"{numbers['mean_p']:8.3f}{numbers['nll']:8.3f}{numbers['accuracy']:8.1%}"
        lines.append(f"{name:<20}{numbers['tokens']:10.0f}{means}  {shares}")
    lines.append(f"\n{'objective':<28}{'gate mass':>10}{'effective tokens':>18}{'gradient':>10}{'value':>8}")
    for name, numbers in result["objectives"].items():
        lines.append(
            f"{name:<28}{numbers['gate_mass']:10.3f}{numbers['effective_tokens']:18.0f}{numbers['gradient']:10.3f}"
            f"{numbers['loss']:8.3f}"
        )
    lines.append(f"\n--loss-type {result['advice']['objective']}")
    return "\n".join([*lines, *(f"  {reason}" for reason in result["advice"]["reasons"])]) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Histogram of p by channel, gate mass by objective, and who sends the gradient."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = [i / BINS for i in range(BINS + 1)]
    figure, (tokens, gates, gradient) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, numbers in {"all": result, **result["channels"]}.items():
        style = {"color": "black", "linewidth": 2.5} if name == "all" else {}
        tokens.stairs(numbers["histogram"], edges, label=f"{name}: {numbers['mean_p']:.2f}", **style)
    tokens.set(title="share of tokens by p; mean p", xlabel="p, before training")
    tokens.legend()
    names = list(result["objectives"])
    gates.barh(names[::-1], [result["objectives"][name]["gate_mass"] for name in names[::-1]])
    gates.set(title="gate mass: share of nll's gradient let through")
    for name in dict.fromkeys(("nll", result["advice"]["objective"], "dft")):
        if name in result["objectives"]:
            gradient.stairs(result["objectives"][name]["gradient_by_p"], edges, label=name)
    gradient.set(title="share of the gradient by p", xlabel="p, before training")
    gradient.legend()
    figure.savefig(path, dpi=110)


def _one_rank_alone() -> None:
    """What torchrun would have set."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port; there is one rank


if __name__ == "__main__":
    main(sys.argv[1:])
