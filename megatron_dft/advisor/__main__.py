"""Recommend a training objective for a data set and a base model, before training.

    megatron-dft advise --model FOLDER --data FILE [FILE ...]
    torchrun --nproc-per-node 8 -m megatron_dft.advisor SCRIPT ARGUMENTS

--model: a Hugging Face folder, on one CPU or GPU. Megatron is not needed. Chat data are tokenized and masked as by
megatron-dft data. A random sample is evaluated; its records and channels are reported.

SCRIPT: the command line of the training run with `advisor` instead of `launch`. The model is built in the same layout
and its weights are loaded (--load). The first global batches of the training data are evaluated. --dft-channels reports
the channels of the data separately. With one rank `python -m` replaces torchrun.

Both evaluate forward only. Nothing is trained, and no checkpoint is saved.
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
from megatron_dft.advisor import evaluation, hugging_face
from megatron_dft.metrics import BINS
from megatron_dft.ops.objectives import WITHOUT_REFERENCE, parse_objective
from megatron_dft.utils import HelpFormatter, Parser

USAGE = """megatron-dft advise --model FOLDER --data FILE [FILE ...] [options]
       torchrun ... -m megatron_dft.advisor SCRIPT ARGUMENTS [options]"""


def main(argv: list[str]) -> None:
    """Evaluate with Megatron if argv has a SCRIPT before its other arguments, otherwise with --model."""
    ours, rest = _parser(script=True).parse_known_args(argv)
    with_model = _begins_with_option(rest)
    if argv[:1] in (["-h"], ["--help"]) or (with_model and not {"-h", "--help"}.isdisjoint(rest)):
        _parser(script=True, model=True).print_help()
        return
    if with_model:
        ours = _parser(model=True).parse_args(argv)
    elif not rest:
        sys.exit("megatron_dft.advisor: expected --model FOLDER --data FILE, or SCRIPT; see megatron-dft advise --help")
    elif os.path.isdir(rest[0]):
        sys.exit(f"megatron_dft.advisor: {rest[0]}: a folder, not a script; write --model {rest[0]} --data FILE")
    try:
        objectives = [parse_objective(name) for name in dict.fromkeys(("nll", *ours.advise_objectives))]
        if with_model:
            ours.advise_out.mkdir(parents=True, exist_ok=True)
            return write(hugging_face.evaluate(ours, objectives), ours.advise_out)
        if importlib.util.find_spec("matplotlib") is None:  # before the model is loaded
            raise ValueError("advice.png requires matplotlib, which is missing; pip install 'megatron_dft[advisor]'")
        if ours.advise_batches < 1:
            raise ValueError(f"--advise-batches: expected 1 or more, got {ours.advise_batches}")
        if "--full-validation" in rest:
            raise ValueError("--full-validation conflicts with --advise-batches; remove --full-validation")
    except (OSError, ValueError) as error:
        sys.exit(f"megatron_dft.advisor: {error}")
    launch.set_single_rank()
    report = functools.partial(write, out=ours.advise_out)
    enable = functools.partial(evaluation.enable, objectives=objectives, report=report)
    launch.run([*rest, *evaluation.arguments(ours.advise_batches)], "megatron_dft.advisor", enable)


def _parser(script: bool = False, model: bool = False) -> argparse.ArgumentParser:
    """The parser of one form of the command. Of both: the parser of --help."""
    parser = argparse.ArgumentParser(
        "megatron-dft advise",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        usage=USAGE,
    )
    add = parser.add_argument
    add("--advise-out", metavar="FOLDER", type=Path, default=Path("runs/advice"), help="output folder")
    add("--advise-objectives", metavar="NAME", nargs="+", default=list(WITHOUT_REFERENCE), help="objectives to compare")
    if model:
        hugging_face.add_arguments(parser.add_argument_group("with --model"), required=not script)
    if script:
        group = parser.add_argument_group("with SCRIPT")
        group.add_argument(
            "--advise-batches", metavar="N", type=int, default=20, help="global batches of training data"
        )
    return parser


def _begins_with_option(argv: list[str]) -> bool:
    """Whether the first argument is no SCRIPT. --device may precede a SCRIPT."""
    parser = Parser()
    parser.add_argument("--device")
    rest = parser.parse_known_args(argv)[1]
    return bool(rest) and rest[0].startswith("-")


def write(result: dict[str, Any], out: Path) -> None:
    """Write advice.json, advice.txt and advice.png; print the text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "advice.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "advice.txt").write_text(text(result))
    draw(result, out / "advice.png")
    print(f"{text(result)}\n{out}/advice.txt, advice.json, advice.png", flush=True)


def text(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [sample_text(result["data"]), ""] if "data" in result else []
    rows = {"all": result, **(result["channels"] if len(result["channels"]) > 1 else {})}
    lines.append(
        f"{'targets':<20}{'tokens':>10}{'mean p':>8}{'NLL':>8}{'top-1':>8}   share of tokens by p, bins of 0.1, %"
    )
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
    lines.append(f"\nrecommended: --loss-type {result['advice']['objective']}")
    return "\n".join([*lines, *(f"  {reason}" for reason in result["advice"]["reasons"])]) + "\n"


def sample_text(data: dict[str, Any]) -> str:
    """The counts of the sample that was evaluated with --model."""
    used = f"{data['used']} of {data['total']} {data['unit']} ({data['share']:.1%})"
    lines = [f"{used}, drawn at random: {data['tokens']} tokens, prompts included"]
    lines += [f"  rejected: {reason}: {count}" for reason, count in data["rejected_for"].items()]
    if data["ignored_fields"]:
        lines.append("  fields without effect: " + ", ".join(f"{k} ({n})" for k, n in data["ignored_fields"].items()))
    return "\n".join(lines)


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
