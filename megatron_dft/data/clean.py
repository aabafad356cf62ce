"""Token cleaning: remove from the loss the tokens that a better model does not predict better.

    megatron-dft reference train.arrow --model BASE --out base.arrow
    megatron-dft reference train.arrow --model BETTER --out better.arrow
    megatron-dft clean base.arrow better.arrow --keep 0.6 --out clean.arrow

The score of a token is its NLL under BASE minus its NLL under BETTER, which is BASE after training on data of good
quality. The tokens with the largest scores stay in the loss. The others get the weight 0 and remain context. Source:
arXiv:2502.01968, with a fixed model. The output keeps the log-probabilities of the first file.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_dft.data import token_file
from megatron_dft.data.prepare import Unfinished
from megatron_dft.data.token_file import Row, TokenFile
from megatron_dft.utils import HelpFormatter


def main(argv: list[str]) -> None:
    """Parse the options and write the token file."""
    args = _parser().parse_args(argv)
    try:
        print(write(args.base, args.better, args.keep, args.out))
    except (OSError, ValueError) as error:
        sys.exit(f"megatron_dft.clean: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "megatron-dft clean", allow_abbrev=False, description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="token file with the NLL of the base model, of megatron-dft reference")
    add("better", metavar="BETTER", help="the same token file with the NLL of the better model")
    add("--keep", type=float, default=0.6, metavar="SHARE", help="share of trained tokens that stay in the loss")
    add("--out", required=True, type=Path, metavar="FILE", help="token file to write")
    return parser


def write(base: str, better: str, keep: float, out: Path) -> str:
    """Write the file; returns a summary. Memory: about 30 bytes per trained token.

    Raises:
        OSError: for files that cannot be read or written.
        ValueError: for a share outside of (0, 1], files without log-probabilities or with those of the same weights,
            files that differ in anything else, or an output file that is an input file.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"--keep {keep:g}: expected a share above 0 and up to 1, e.g. 0.6")
    for path in (base, better):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out}: this is not a regular file; choose another name")
    files = TokenFile(base), TokenFile(better)
    for file in files:
        if file.header.reference is None:
            raise ValueError(
                f"{file.path}: has no log-probabilities; write it with megatron-dft reference FILE --model FOLDER"
            )
        if out.exists() and out.samefile(file.path):
            raise ValueError(f"--out {out}: this is an input file; choose another name")
    first, second = (file.header for file in files)
    names = [token_file.named(header) for header in (first, second)]
    if (first.reference or {})["weights"] == (second.reference or {})["weights"]:
        raise ValueError(f"{base} and {better}: {names[0]} and {names[1]} have the same weights; use two models")
    if replace(first, reference=None) != replace(second, reference=None) or len(files[0]) != len(files[1]):
        raise ValueError(f"{base} and {better}: expected the same data with two models, got different data")
    tokens = [_trained(*rows) for rows in _pairs(*files)]
    scores, weights, channels = (np.concatenate(x) for x in zip(*tokens, strict=True))
    if not len(scores):
        raise ValueError(f"{base}: has no trained token")
    kept = max(round(keep * len(scores)), 1)
    limit = np.partition(scores, len(scores) - kept)[len(scores) - kept]
    stays = scores >= limit
    statistics = copy.deepcopy(first.statistics)
    remaining = statistics["trained_tokens"] = int(stays.sum())
    for name, count in zip(first.channels, np.bincount(channels[stays], minlength=len(first.channels)), strict=True):
        statistics["channels"][name]["trained_tokens"] = int(count)
    statistics["weights"] = {x: float(getattr(weights[stays].astype(float), x)()) for x in ("min", "max", "mean")}
    statistics["cleaned"] = {"keep": keep, "limit": float(limit), "models": names}

    def cleaned() -> Iterator[Row]:
        for rows in _pairs(*files):
            row = rows[0]
            loss_weights = row.loss_weights.copy()
            score, weight, _ = _trained(*rows)
            loss_weights[loss_weights > 0] = np.where(score >= limit, weight, 0)
            yield replace(row, loss_weights=loss_weights)

    out.parent.mkdir(parents=True, exist_ok=True)
    with Unfinished(out) as unfinished:
        token_file.write(unfinished.path, replace(first, statistics=statistics), cleaned())
        unfinished.finish()
    return (
        f"{remaining} of {len(scores)} trained tokens stay in the loss: score >= {limit:.3f} nats\n"
        f"score: NLL under {names[0]} minus NLL under {names[1]}\n{out}"
    )


def _pairs(*files: TokenFile) -> Iterator[tuple[Row, Row]]:
    """The rows of the two files, which differ in their references alone."""
    for i in range(len(files[0])):
        rows = files[0][i], files[1][i]
        if not all(np.array_equal(getattr(rows[0], x), getattr(rows[1], x)) for x in token_file.COLUMNS):
            raise ValueError(
                f"{files[0].path} and {files[1].path}: row {i} differs; expected the same data with two models"
            )
        yield rows


def _trained(base: Row, better: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each trained token of a row: the decrease of its NLL in nats, its weight, its channel."""
    assert base.reference_nll is not None and better.reference_nll is not None
    trained = base.loss_weights > 0
    score = base.reference_nll[trained].astype(np.float32) - better.reference_nll[trained]
    return score, base.loss_weights[trained], np.repeat(base.channels, base.lengths)[trained]


if __name__ == "__main__":
    main(sys.argv[1:])
