"""Preparation of a token file from files of chat data.

Worker processes parse, render and tokenize. This process reads, packs and writes. Tokens are in temporary files beside
the output until all lengths are known. Memory grows by about 1 KiB per sequence, independent of its length.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import multiprocessing
import os
import socket
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from megatron_dft.data import sources, token_file
from megatron_dft.data.conversations import conversation_of
from megatron_dft.data.packing import best_fit
from megatron_dft.data.sources import Record
from megatron_dft.data.token_file import Header, Row
from megatron_dft.data.tokens import ConversationTokenizer, Encoded

BATCH = 256  # records per task of a worker
BATCHES_BEFORE_WORKERS = 8  # batches before worker processes are started
MAX_PRINTED = 10  # rejected records that are printed
SPILLS = {"ids": np.int32, "weights": np.float16}  # temporary files, an entry per token


@dataclass(frozen=True)
class Plan:
    """Settings of `prepare`.

    Attributes:
        files: paths as returned by `sources.expand`; "-" for standard input.
        out: path of the token file.
        seq_length: tokens per row.
        context_parallel_size, tensor_model_parallel_size, sequence_parallel: of the training run.
        channel: channel of records without one. Default: the name of their file.
        truncate: truncate sequences that are longer than a row, instead of rejecting them.
        pack: several sequences per row.
        max_rejected: share of records that may be rejected.
        workers: number of processes; 1: no worker processes.
    """

    files: list[str]
    out: Path
    seq_length: int
    context_parallel_size: int = 1
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    channel: str | None = None
    truncate: bool = False
    pack: bool = True
    max_rejected: float = 0.01
    workers: int = 1

    @property
    def multiple(self) -> int:
        """Megatron pads each sequence to a multiple of this number of tokens."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    def check(self) -> None:
        """Raises ValueError for a length that cannot be split over the ranks, or an output that is an input."""
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size
        whole = self.multiple * (tp if self.sequence_parallel else 1)
        if self.seq_length % whole:
            raise ValueError(
                f"--seq-length {self.seq_length}: expected a multiple of {whole} for --context-parallel-size {cp} and "
                f"--tensor-model-parallel-size {tp}{' with --sequence-parallel' * self.sequence_parallel}; use "
                f"{self.seq_length // whole * whole or whole}"
            )
        for path in (self.out, *side_files(self.out).values()):
            if not path.name or (path.exists() and not path.is_file()):
                raise ValueError(f"--out {self.out}: {path} is not a regular file; choose another name")
        for path in (self.out, *side_files(self.out).values()):
            if any(os.path.exists(file) and path.exists() and os.path.samefile(file, path) for file in self.files):
                raise ValueError(f"--out {self.out}: {path} is an input file; choose another name")


def side_files(out: Path) -> dict[str, Path]:
    """Files beside the token file: its statistics, and the rejected records."""
    return {"report": out.with_name(f"{out.name}.report.json"), "rejected": out.with_name(f"{out.name}.rejected.jsonl")}


@dataclass
class Statistics:
    """Counts of records, sequences and tokens, and the reasons of rejections."""

    records: int = 0
    rejected: int = 0  # records with at least one rejected sequence
    truncated: int = 0
    split: int = 0  # conversations that became one sequence per assistant turn
    reasons: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)  # records by field
    lengths: array = field(default_factory=lambda: array("i"))
    trained: array = field(default_factory=lambda: array("i"))
    channels: array = field(default_factory=lambda: array("i"))
    names: dict[str, int] = field(default_factory=dict)
    weights: list[float] = field(default_factory=lambda: [math.inf, 0.0, 0.0])  # min, max, sum over trained tokens

    def add_weights(self, weights: np.ndarray) -> None:
        """Add the weights of the trained tokens of a sequence."""
        self.trained.append(len(weights))
        low, high, total = self.weights
        self.weights = [
            min(low, float(weights.min())),
            max(high, float(weights.max())),
            total + float(weights.sum(dtype=np.float64)),
        ]

    def report(self, rows: int, seq_length: int) -> dict[str, Any]:
        """The statistics as JSON: counts of records, sequences and tokens, lengths, packing efficiency."""
        lengths, trained, channels = map(np.asarray, (self.lengths, self.trained, self.channels))
        by_channel = {}
        for name, number in sorted(self.names.items()):
            selected = channels == number
            by_channel[name] = {
                "sequences": int(selected.sum()),
                "tokens": int(lengths[selected].sum()),
                "trained_tokens": int(trained[selected].sum()),
            }
        quantiles = {"min": 0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
        return {
            "records": self.records,
            "rejected": self.rejected,
            "rejected_for": dict(self.reasons.most_common()),
            "ignored_fields": dict(self.ignored.most_common()),
            "one_sequence_per_turn": self.split,
            "sequences": len(lengths),
            "truncated": self.truncated,
            "tokens": int(lengths.sum()),
            "trained_tokens": int(trained.sum()),
            "length": {
                "mean": float(lengths.mean()),
                **{name: float(np.quantile(lengths, q, method="nearest")) for name, q in quantiles.items()},
            },
            "weights": {"min": self.weights[0], "max": self.weights[1], "mean": self.weights[2] / int(trained.sum())},
            "channels": by_channel,
            "rows": rows,
            "seq_length": seq_length,
            "packing_efficiency": int(lengths.sum()) / (rows * seq_length),
            "unpacked_efficiency": int(lengths.sum()) / (len(lengths) * seq_length),
        }


def prepare(plan: Plan, tokenizer: ConversationTokenizer) -> dict[str, Any]:
    """Write the token file; return the statistics.

    Raises:
        ValueError: for an invalid plan, a file that cannot be read to its end, a killed worker process, no usable
            record, or more rejected records than `max_rejected`. In the last two cases the list of rejected records is
            written. The token file is not written.
    """
    plan.check()
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(Unfinished(path)) for name, path in _targets(plan.out).items()}
        spills = [stack.enter_context(Unfinished(plan.out.with_name(f"{plan.out.name}.{x}"))) for x in SPILLS]
        statistics = Statistics()
        with contextlib.ExitStack() as opened:
            rejected = opened.enter_context(files["rejected"].path.open("w"))
            _tokenize(plan, tokenizer, statistics, rejected, [opened.enter_context(x.path.open("wb")) for x in spills])
        if statistics.rejected:
            files["rejected"].finish()
        _check(plan, statistics)
        sizes = [-(-length // plan.multiple) * plan.multiple for length in statistics.lengths]
        rows = best_fit(sizes, plan.seq_length) if plan.pack else [[i] for i in range(len(sizes))]
        ids, weights = (np.memmap(x.path, kind, mode="r") for x, kind in zip(spills, SPILLS.values(), strict=True))
        report = statistics.report(len(rows), plan.seq_length)
        header = Header(
            seq_length=plan.seq_length,
            multiple=plan.multiple,
            context_parallel_size=plan.context_parallel_size,
            tensor_model_parallel_size=plan.tensor_model_parallel_size,
            sequence_parallel=plan.sequence_parallel,
            pad_id=tokenizer.pad_id,
            max_id=max(int(ids.max()), tokenizer.pad_id),
            channels=list(statistics.names),
            fingerprint=tokenizer.fingerprint(),
            statistics=report,
        )
        if plan.pack:  # best fit orders them by length
            np.random.default_rng(0).shuffle(rows)
        token_file.write(files["out"].path, header, _rows(rows, statistics, ids, weights))
        files["out"].finish()
        files["report"].path.write_text(json.dumps(report, indent=2) + "\n")
        files["report"].finish()
        if not statistics.rejected:  # remove the list of an earlier run
            side_files(plan.out)["rejected"].unlink(missing_ok=True)
    return report


def _targets(out: Path) -> dict[str, Path]:
    return {"out": out, **side_files(out)}


class Unfinished:
    """A temporary file in the same folder, renamed by `finish`, removed otherwise."""

    def __init__(self, target: Path) -> None:
        self.target = target = Path(os.path.realpath(target))  # a link stays a link
        self.prefix = f".{target.name}.unfinished-{socket.gethostname()}-"
        self.path = target.with_name(f"{self.prefix}{os.getpid()}")

    def __enter__(self) -> Unfinished:
        for path in self.target.parent.iterdir():  # remove files of killed processes of this machine
            pid = path.name.removeprefix(self.prefix)
            if pid != path.name and not os.path.exists(f"/proc/{pid}") and os.path.isdir("/proc/self"):
                path.unlink(missing_ok=True)
        return self

    def finish(self) -> None:
        """Rename the file to its target."""
        self.path.replace(self.target)

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _not_written(out: Path) -> str:
    return f"{out} is not written" + ("; the existing file is unchanged" if out.exists() else "")


def _check(plan: Plan, statistics: Statistics) -> None:
    rejected = side_files(plan.out)["rejected"]
    reasons = ", ".join(f"{reason} ({count})" for reason, count in statistics.reasons.most_common(3))
    if not statistics.lengths:
        raise ValueError(f"no usable conversation: {reasons or 'no records'}. {_not_written(plan.out)}")
    share = statistics.rejected / statistics.records
    if share > plan.max_rejected:
        raise ValueError(
            f"{statistics.rejected} of {statistics.records} records are rejected ({share:.1%}, --max-rejected "
            f"{plan.max_rejected:.1%}): {reasons}. {rejected} lists them. {_not_written(plan.out)}"
        )


# -- tokenizing, in worker processes


class Outcome(NamedTuple):
    """The sequences of a record, or why it is rejected.

    Attributes:
        sequences: tokens and weights as bytes, as returned by `_stored`.
        reasons: why the record, or some of its sequences, are rejected.
        ignored: fields without effect.
        cut: whether a sequence was truncated.
    """

    file: str
    number: int
    channel: str
    sequences: list[tuple[bytes, bytes]]
    reasons: list[str]
    ignored: set[str]
    cut: bool


def _tokenize(
    plan: Plan, tokenizer: ConversationTokenizer, statistics: Statistics, rejected: IO[str], spills: list[IO[bytes]]
) -> None:
    """Append the token ids of all records to the first spill, their weights to the second."""
    for outcome in _progress(_outcomes(plan, tokenizer), plan.files):
        statistics.records += 1
        statistics.rejected += bool(outcome.reasons)
        statistics.split += len(outcome.sequences) + len(outcome.reasons) > 1
        statistics.truncated += outcome.cut
        statistics.ignored.update(outcome.ignored)
        for reason in outcome.reasons:
            _reject(statistics, rejected, outcome, reason, plan.out)
        for stored in outcome.sequences:
            for spill, part in zip(spills, stored, strict=True):
                spill.write(part)
            weights = as_arrays(stored)[1]
            statistics.lengths.append(len(weights))
            statistics.add_weights(weights[weights > 0])
            statistics.channels.append(statistics.names.setdefault(outcome.channel, len(statistics.names)))


def _reject(statistics: Statistics, rejected: IO[str], outcome: Outcome, reason: str, out: Path) -> None:
    statistics.reasons[reason.partition(":")[0]] += 1
    rejected.write(json.dumps({"file": outcome.file, "line": outcome.number, "reason": reason}) + "\n")
    count = statistics.reasons.total()
    if count <= MAX_PRINTED:
        print(f"{outcome.file}:{outcome.number}: {reason}", file=sys.stderr)
    if count == MAX_PRINTED:
        print(f"further rejected records: see {side_files(out)['rejected']}", file=sys.stderr)


_worker: tuple[Plan, ConversationTokenizer] | None = None  # of a worker process


def _start_worker(plan: Plan, tokenizer: ConversationTokenizer) -> None:
    global _worker
    _worker = plan, tokenizer


def _work(records: list[Record]) -> list[Outcome]:
    assert _worker is not None
    return encode_records(records, *_worker)


def _outcomes(plan: Plan, tokenizer: ConversationTokenizer) -> Iterator[tuple[int, list[Outcome]]]:
    """The outcomes of each batch of records, in order, with the number of bytes read so far."""
    batches = _batches(_readable(sources.records(plan.files), plan.out))
    for batch in batches if plan.workers == 1 else islice(batches, BATCHES_BEFORE_WORKERS):
        yield batch[-1].done, encode_records(batch, plan, tokenizer)
    rest = next(batches, None)
    if rest is None:
        return
    batches = chain([rest], batches)
    # Not forked: libraries may have started threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(plan.workers, context, _start_worker, (plan, tokenizer)) as pool:
        waiting: collections.deque[tuple[int, Any]] = collections.deque()
        try:
            for batch in batches:
                waiting.append((batch[-1].done, pool.submit(_work, batch)))
                while len(waiting) > 3 * plan.workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, possibly out of memory; use fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _readable(records: Iterable[Record], out: Path) -> Iterator[Record]:
    """Raises ValueError for a file that cannot be read to its end; `max_rejected` does not apply to it."""
    for record in records:
        if isinstance(record.raw, sources.Unreadable):
            raise ValueError(f"{record.file}:{record.number}: {record.raw}. {_not_written(out)}")
        yield record


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def encode_records(records: list[Record], plan: Plan, tokenizer: ConversationTokenizer) -> list[Outcome]:
    """The outcome of each record: its sequences, or why it is rejected."""
    found: list[Any] = []
    for record in records:
        try:
            found.append(conversation_of(sources.parse(record)))
        except ValueError as error:
            found.append(error)
    encoded = iter(tokenizer.encode([x for x in found if not isinstance(x, ValueError)]))
    outcomes: list[Outcome] = []
    for record, conversation in zip(records, found, strict=True):
        sequences = conversation if isinstance(conversation, ValueError) else next(encoded)
        if isinstance(sequences, ValueError):
            reason = str(sequences) if sequences is conversation else f"bad conversation: {sequences}"
            outcomes.append(Outcome(record.file, record.number, "", [], [reason], set(), False))
            continue
        channel = conversation.channel or plan.channel or sources.channel_of(record.file)
        kept: list[tuple[bytes, bytes]] = []
        reasons: list[str] = []
        cut = False
        for sequence in sequences:
            if reason := _unusable(sequence, plan.seq_length, plan.truncate):
                reasons.append(reason)
            else:
                kept.append(_stored(sequence, plan.seq_length))
                cut |= len(sequence.ids) > plan.seq_length
        outcomes.append(Outcome(record.file, record.number, channel, kept, reasons, conversation.ignored, cut))
    return outcomes


def _unusable(sequence: Encoded, seq_length: int, truncate: bool) -> str:
    """Why a sequence is rejected; empty if it is usable."""
    if len(sequence.ids) > seq_length and not truncate:
        return f"too long: {len(sequence.ids)} tokens, --seq-length {seq_length}; raise it, or --too-long truncate"
    if not any(first < min(last, seq_length) for first, last in sequence.spans):
        return "no trained token: replies are empty" + " within --seq-length" * (len(sequence.ids) > seq_length)
    return ""


def _stored(sequence: Encoded, seq_length: int) -> tuple[bytes, bytes]:
    """Token ids and weights as bytes."""
    ids = np.array(sequence.ids[:seq_length], dtype=SPILLS["ids"])
    weights = np.zeros(len(ids), dtype=SPILLS["weights"])
    for (first, last), weight in zip(sequence.spans, sequence.weights, strict=True):
        weights[first:last] = weight
    return ids.tobytes(), weights.tobytes()


def as_arrays(stored: tuple[bytes, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and weights of a sequence of an `Outcome`."""
    ids, weights = stored
    return np.frombuffer(ids, SPILLS["ids"]), np.frombuffer(weights, SPILLS["weights"])


def _rows(rows: list[list[int]], statistics: Statistics, ids: np.ndarray, weights: np.ndarray) -> Iterator[Row]:
    lengths = np.asarray(statistics.lengths)
    channels = np.asarray(statistics.channels)
    ends = np.cumsum(lengths)
    for row in rows:
        parts = [slice(ends[i] - lengths[i], ends[i]) for i in row]
        row_ids, row_weights = (np.concatenate([x[part] for part in parts]) for x in (ids, weights))
        yield Row(row_ids, row_weights, lengths[row], channels[row])


def _progress(outcomes: Iterable[tuple[int, list[Outcome]]], files: list[str]) -> Iterator[Outcome]:
    """The outcomes one by one, with a progress bar of the bytes read."""
    from tqdm import tqdm

    sizes = [os.path.getsize(file) for file in files if os.path.isfile(file)]
    total = sum(sizes) if len(sizes) == len(files) else None
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for done, batch in outcomes:
            yield from batch
            bar.update(done - bar.n)
