"""Add the log-probabilities of a reference model to a token file.

    megatron-dft reference train.arrow --model FOLDER --out train-reference.arrow

Train on the result with --loss-type asft, iw or psft. The reference is usually the model before training. FOLDER holds
a model of Hugging Face transformers. The command runs it on one CPU or GPU, forward only. Conversations are not packed:
each has a row of its own. The NLL of each trained token is stored as fp16. An earlier reference is replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_dft.advisor import hugging_face
from megatron_dft.utils import HelpFormatter

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def main(argv: list[str]) -> None:
    """Parse the options and write the token file."""
    args = _parser().parse_args(argv)
    try:
        print(write(args))
    except torch.OutOfMemoryError:
        sys.exit("megatron_dft.reference: out of memory; use --dtype bf16, or --device cpu")
    except (OSError, ValueError) as error:
        sys.exit(f"megatron_dft.reference: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "megatron-dft reference", allow_abbrev=False, description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="token file of megatron-dft data")
    add("--model", required=True, metavar="FOLDER", help="folder of a causal language model of transformers")
    add("--tokenizer", metavar="FOLDER", help="folder of the tokenizer (default: that of --model)")
    add("--out", required=True, type=Path, metavar="FILE", help="token file to write")
    hugging_face.add_device_arguments(parser)
    return parser


def write(args: argparse.Namespace) -> str:
    """Write the file with the reference; returns a summary.

    Raises:
        OSError: for files that cannot be read or written.
        ValueError: for missing packages, an invalid model or token file, another tokenizer, or an output file that is
            the input file.
    """
    hugging_face.check_environment()
    import numpy as np
    from tqdm import tqdm

    from megatron_dft.advisor.samples import sequences_of
    from megatron_dft.data import token_file
    from megatron_dft.data.prepare import Unfinished

    if not os.path.isfile(args.file):
        raise ValueError(f"{args.file}: no such file")
    file = token_file.TokenFile(args.file)
    if not file.header.statistics["trained_tokens"]:
        raise ValueError(f"{args.file}: has no trained token")
    if args.out.exists() and args.out.samefile(args.file):
        raise ValueError(f"--out {args.out}: this is the input file; choose another name")
    config = hugging_face.config_of(args.model)
    hugging_face.check_tokenizer(args, [args.file])
    device, dtype = hugging_face.device_and_dtype(args)
    longest = max(int(file[i].lengths.max()) for i in range(len(file)))
    hugging_face.check_fit(args.file, args.model, config, file.header.max_id, longest)
    model = hugging_face.load_model(args.model, dtype).to(device)
    header = replace(file.header, reference=identity(args.model, dtype))
    total, count = 0.0, 0

    def rows(bar: Any) -> Iterator[token_file.Row]:
        nonlocal total, count
        for first in range(0, len(file), token_file.ROWS):
            window = [file[i] for i in range(first, min(first + token_file.ROWS, len(file)))]
            sequences = [list(sequences_of(row, file.header)) for row in window]
            nll = iter(hugging_face.nll_of(model, [sequence for row in sequences for sequence in row], bar))
            for row, parts in zip(window, sequences, strict=True):
                values = np.concatenate([next(nll) for _ in parts])
                total, count = total + float(values.sum()), count + int((row.loss_weights > 0).sum())
                yield replace(row, reference_nll=np.clip(values, 2.0**-24, 65504.0).astype(np.float16))

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with Unfinished(args.out) as unfinished:
        with tqdm(total=file.header.statistics["tokens"], unit="token", desc="evaluating", disable=None) as bar:
            token_file.write(unfinished.path, header, rows(bar))
        if not math.isfinite(total):
            raise ValueError(f"--model {args.model}: the NLL is {total}; use another --dtype, or check the weights")
        unfinished.finish()
    return f"{count} trained tokens, mean NLL {total / count:.3f} under {token_file.named(header)}\n{args.out}"


def identity(folder: str, dtype: torch.dtype) -> dict[str, str]:
    """Identity of the reference: folder name, digest of configuration and weights, dtype."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name == "config.json" or name.endswith(WEIGHTS):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    model = os.path.basename(os.path.realpath(folder))
    return {"model": model, "weights": digest.hexdigest()[:16], "dtype": str(dtype).removeprefix("torch.")}


if __name__ == "__main__":
    main(sys.argv[1:])
