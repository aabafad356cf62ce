"""Tokenize and pack chat data. Report every rejected record.

    megatron-dft data chat.jsonl --tokenizer MODEL --seq-length 4096 --out train.arrow

Train on the result with

    ... -m megatron_dft.launch pretrain_gpt.py ARGUMENTS --sft --train-data-path train.arrow \\
        --no-create-attention-mask-in-dataloader --eval-iters 0 --calculate-per-token-loss --loss-type dft

Input: JSONL and JSON arrays, also .gz or .zst; parquet; folders; - for a pipe. Records: `messages`, ShareGPT, Alpaca,
or prompt and completion. See docs/data.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_dft.data import options, preview, sources
from megatron_dft.data.options import positive
from megatron_dft.data.prepare import Plan, prepare, side_files
from megatron_dft.data.tokens import ConversationTokenizer
from megatron_dft.utils import HelpFormatter


def main(argv: list[str]) -> None:
    """Parse the options, then print the preview or write the token file."""
    args = _parser().parse_args(argv)
    try:
        files = sources.expand(args.files)
        tokenizer = _tokenizer(args)
        if args.preview or args.preview_html:
            return _preview(args, files, tokenizer)
        if args.out is None or args.seq_length is None:
            raise ValueError("--seq-length and --out are required, unless --preview N or --preview-html FILE is given")
        plan = Plan(
            files=files,
            out=args.out,
            seq_length=args.seq_length,
            context_parallel_size=args.context_parallel_size,
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            sequence_parallel=args.sequence_parallel,
            channel=args.channel,
            truncate=args.too_long == "truncate",
            pack=args.packing == "best-fit",
            max_rejected=args.max_rejected,
            workers=args.workers,
        )
        show(prepare(plan, tokenizer), plan.out)
    except (OSError, ValueError) as error:
        sys.exit(f"megatron_dft.data: {error}")
    except KeyboardInterrupt:
        print("megatron_dft.data: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _tokenizer(args: argparse.Namespace) -> ConversationTokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if args.workers > 1 else "true"
    return options.load_tokenizer(args, args.tokenizer)


def _preview(args: argparse.Namespace, files: list[str], tokenizer: ConversationTokenizer) -> None:
    items = preview.shown(islice(sources.records(files), args.preview or 100), tokenizer, args.channel)
    if args.preview_html:
        if any(
            os.path.exists(file) and args.preview_html.exists() and args.preview_html.samefile(file) for file in files
        ):
            raise ValueError(f"--preview-html {args.preview_html}: this is an input file; choose another name")
        args.preview_html.write_text(preview.as_html(items), encoding="utf-8", errors="backslashreplace")
        print(args.preview_html)
        return
    for item in items:
        print(preview.as_text(item, sys.stdout.isatty()))


def show(report: dict[str, Any], out: Path) -> None:
    """Print the statistics."""
    length, share = report["length"], report["trained_tokens"] / report["tokens"]
    print(
        f"{report['records']} records, {report['rejected']} rejected, {report['truncated']} truncated; "
        f"{report['sequences']} sequences, {report['tokens']} tokens, {share:.1%} of them in the loss"
    )
    for reason, count in report["rejected_for"].items():
        print(f"  rejected: {reason}: {count}")
    if report["ignored_fields"]:
        print("  fields without effect: " + ", ".join(f"{name} ({n})" for name, n in report["ignored_fields"].items()))
    if report["one_sequence_per_turn"]:
        print(
            f"  {report['one_sequence_per_turn']} conversations became one sequence per assistant turn: the chat "
            "template renders a turn differently when another one follows"
        )
    print("tokens per sequence: " + ", ".join(f"{name} {value:.0f}" for name, value in length.items()))
    if (weights := report["weights"])["min"] != 1.0 or weights["max"] != 1.0:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in weights.items())
        print(f"weights of trained tokens: {numbers}; train with --dft-weights")
    for name, numbers in report["channels"].items():
        print(
            f"  {name}: {numbers['sequences']} sequences, {numbers['tokens']} tokens, "
            f"{numbers['trained_tokens']} in the loss"
        )
    print(
        f"{report['rows']} rows of {report['seq_length']} tokens, {report['packing_efficiency']:.1%} used; with one "
        f"sequence per row {report['unpacked_efficiency']:.1%}"
    )
    print(f"{out}; {side_files(out)['report']}" + f"; {side_files(out)['rejected']}" * bool(report["rejected_for"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "megatron-dft data", allow_abbrev=False, description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="files, folders, or - for a pipe")
    add(
        "--tokenizer",
        required=True,
        metavar="MODEL",
        help="folder or Hub name of a model with a fast tokenizer",
    )
    add("--out", type=Path, metavar="FILE", help="token file to write")
    add("--seq-length", type=positive, metavar="N", help="tokens per row, as in the training run")
    options.add_arguments(parser)
    add("--packing", choices=("best-fit", "none"), default="best-fit", help="none: one sequence per row")
    add(
        "--max-rejected",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="largest share of rejected records; above it nothing is written, and the exit code is 1 "
        "(default: %(default)s)",
    )
    add("--context-parallel-size", type=positive, default=1, metavar="N", help="as in the training run")
    add("--tensor-model-parallel-size", type=positive, default=1, metavar="N", help="as in the training run")
    add("--sequence-parallel", action="store_true", help="as in the training run")
    add(
        "--preview",
        type=positive,
        default=0,
        metavar="N",
        help="print the first N records with trained tokens marked; write no token file",
    )
    add("--preview-html", type=Path, metavar="FILE", help="write the preview (100 records, or --preview N) as HTML")
    add(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="processes",
    )
    return parser


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, e.g. 0.01, got {text!r}")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes temporary files
    main(sys.argv[1:])
