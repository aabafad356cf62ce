"""Recommend a training objective for a data set and a base model, before training.

    torchrun --nproc-per-node 8 -m megatron_dft.advisor SCRIPT ARGUMENTS [--advise-out FOLDER] [--advise-batches N]

Use the command line of the training run with `advisor` instead of `launch`. The model is built in the same layout and
its weights are loaded (--load). The first global batches of the training data are evaluated, forward only. Nothing is
trained, and no checkpoint is saved. --dft-channels reports the channels of the data separately. With one rank
`python -m` replaces torchrun.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from megatron_dft import launch
from megatron_dft.advisor import evaluation
from megatron_dft.metrics import BINS
from megatron_dft.ops.objectives import OBJECTIVES, parse_objective
from megatron_dft.utils import HelpFormatter


def main(argv: list[str]) -> None:
    """Parse the options and run the script with evaluation instead of training."""
    parser = argparse.ArgumentParser(
        "torchrun ... -m megatron_dft.advisor",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        usage="%(prog)s SCRIPT ARGUMENTS [options]",
    )
    parser.add_argument("--advise-out", metavar="FOLDER", type=Path, default=Path("runs/advice"), help="output folder")
    parser.add_argument("--advise-batches", metavar="N", type=int, default=20, help="global batches of training data")
    parser.add_argument(
        "--advise-objectives", metavar="NAME", nargs="+", default=list(OBJECTIVES), help="objectives to compare"
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return
    ours, argv = parser.parse_known_args(argv)
    try:
        objectives = [parse_objective(name) for name in dict.fromkeys(("nll", *ours.advise_objectives))]
        if ours.advise_batches < 1:
            raise ValueError(f"--advise-batches: expected 1 or more, got {ours.advise_batches}")
        if "--full-validation" in argv:
            raise ValueError("--full-validation conflicts with --advise-batches; remove --full-validation")
        if importlib.util.find_spec("matplotlib") is None:  # before the model is loaded
            raise ValueError("advice.png requires matplotlib, which is missing; pip install 'megatron_dft[advisor]'")
    except ValueError as error:
        sys.exit(f"megatron_dft.advisor: {error}")
    launch.set_single_rank()
    report = functools.partial(write, out=ours.advise_out)
    enable = functools.partial(evaluation.enable, objectives=objectives, report=report)
    launch.run([*argv, *evaluation.arguments(ours.advise_batches)], "megatron_dft.advisor", enable)


def write(result: dict[str, Any], out: Path) -> None:
    """Write advice.json, advice.txt and advice.png; print the text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "advice.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "advice.txt").write_text(text(result))
    draw(result, out / "advice.png")
    print(f"{text(result)}\n{out}/advice.txt, advice.json, advice.png", flush=True)


def text(result: dict[str, Any]) -> str:
    """The result as tables."""
    rows = {"all": result, **(result["channels"] if len(result["channels"]) > 1 else {})}
    lines = [f"{'targets':<20}{'tokens':>10}{'mean p':>8}{'NLL':>8}{'top-1':>8}   share of tokens with p in tenths, %"]
    for name, numbers in rows.items():
        shares = "".join(f"{100 * share:4.0f}" for share in numbers["histogram"])
        means = f"{numbers['mean_p']:8.3f}{numbers['nll']:8.3f}{numbers['accuracy']:8.1%}"
        lines.append(f"{name:<20}{numbers['tokens']:10.0f}{means}  {shares}")
    width = max(map(len, result["objectives"])) + 2
    lines.append(f"\n{'objective':<{width}}{'gate mass':>10}{'effective tokens':>18}{'gradient':>10}{'loss':>8}")
    for name, numbers in result["objectives"].items():
        lines.append(
            f"{name:<{width}}{numbers['gate_mass']:10.3f}{numbers['effective_tokens']:18.0f}{numbers['gradient']:10.3f}"
            f"{numbers['loss']:8.3f}"
        )
    lines.append(f"\n--loss-type {result['advice']['objective']}")
    return "\n".join([*lines, *(f"  {reason}" for reason in result["advice"]["reasons"])]) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the histogram of p by channel, the gate mass by objective, and the share of the gradient by p."""
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
    gates.set(title="gate mass: mean gate (nll: 1)")
    for name in dict.fromkeys(("nll", result["advice"]["objective"], "dft")):
        if name in result["objectives"]:
            gradient.stairs(result["objectives"][name]["gradient_by_p"], edges, label=name)
    gradient.set(title="share of the gradient by p", xlabel="p, before training")
    gradient.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
