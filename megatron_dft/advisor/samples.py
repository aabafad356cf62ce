"""Random samples of chat data and of token files, as `megatron-dft data` tokenizes them.

The whole data are read. Records are drawn without replacement, in random order with a fixed seed, until they have the
requested number of tokens. Only these are tokenized. The rows of a token file are drawn in the same way.
"""

from __future__ import annotations

import heapq
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from megatron_dft.data import sources
from megatron_dft.data.prepare import MAX_PRINTED, Outcome, Plan, as_arrays, encode_records
from megatron_dft.data.token_file import Header, Row, TokenFile
from megatron_dft.data.tokens import ConversationTokenizer

SEED = 0
BATCH = 64  # records that are tokenized together
TOKENS_PER_RECORD = 8  # assumed minimum; determines how many records are kept in memory


@dataclass(frozen=True)
class TokenSequence:
    """One conversation.

    Attributes:
        ids: int64 [s], token ids.
        trained: bool [s], whether a token is in the loss as a target. False for the first token.
        channel: name of its channel.
    """

    ids: np.ndarray
    trained: np.ndarray
    channel: str


@dataclass
class Sample:
    """Sequences drawn from data, and counts.

    Attributes:
        unit: "records" or "rows".
        total: records or rows of the data.
        used: records or rows that were drawn, rejected ones included.
        rejected: records with at least one rejected sequence.
        reasons: rejected sequences and records by reason.
        ignored: records by field without effect.
        max_id: largest token id.
        tokens: tokens of all sequences, prompts included.
    """

    unit: str
    total: int = 0
    used: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    max_id: int = 0
    tokens: int = 0
    sequences: list[TokenSequence] = field(default_factory=list)

    def add(self, sequence: TokenSequence) -> None:
        """Add a sequence."""
        self.sequences.append(sequence)
        self.max_id = max(self.max_id, int(sequence.ids.max()))
        self.tokens += len(sequence.ids)

    def report(self) -> dict[str, Any]:
        """The counts as JSON."""
        return {
            "unit": self.unit,
            "total": self.total,
            "used": self.used,
            "share": self.used / self.total,
            "seed": SEED,
            "tokens": self.tokens,
            "rejected": self.rejected,
            "rejected_for": dict(self.reasons.most_common()),
            "ignored_fields": dict(self.ignored.most_common()),
        }


def of_chat(plan: Plan, tokenizer: ConversationTokenizer, tokens: int) -> Sample:
    """Draw records of chat data with `tokens` tokens, or up to one record more. Prints rejected records to stderr.

    Raises:
        ValueError: for a file that cannot be read to its end, or no usable record.
    """
    sample = Sample("records")
    keys = random.Random(SEED)
    count = tokens // TOKENS_PER_RECORD + 1
    # Sorted by a random key: a sample without replacement, in random order.
    drawn = heapq.nsmallest(count, _counted(plan.files, sample), key=lambda _: keys.random())
    batches = (drawn[first : first + BATCH] for first in range(0, len(drawn), BATCH))
    for outcome in chain.from_iterable(encode_records(batch, plan, tokenizer) for batch in batches):
        _add(sample, outcome)
        if sample.tokens >= tokens:
            break
    if not sample.sequences:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in sample.reasons.most_common(3))
        raise ValueError(f"--data: no usable conversation in {sample.used} of {sample.total} records: {reasons}")
    return sample


def _counted(files: list[str], sample: Sample) -> Iterator[sources.Record]:
    """The records of all files, with a progress bar of the bytes read. Counts them in `sample.total`."""
    from tqdm import tqdm

    sizes = [os.path.getsize(file) for file in files if os.path.isfile(file)]
    total = sum(sizes) if len(sizes) == len(files) else None
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        before, done, current = 0, 0, ""
        for record in sources.records(files):
            if isinstance(record.raw, sources.Unreadable):
                raise ValueError(f"{record.file}:{record.number}: {record.raw}")
            if record.file != current:
                before, done, current = before + done, 0, record.file
            done = record.done
            bar.update(before + done - bar.n)
            sample.total += 1
            yield record


def _add(sample: Sample, outcome: Outcome) -> None:
    sample.used += 1
    sample.rejected += bool(outcome.reasons)
    sample.ignored.update(outcome.ignored)
    for reason in outcome.reasons:
        sample.reasons[reason.partition(":")[0]] += 1
        count = sample.reasons.total()
        if count <= MAX_PRINTED:
            print(f"{outcome.file}:{outcome.number}: {reason}", file=sys.stderr)
        if count == MAX_PRINTED:
            print("further rejected records are counted, not printed", file=sys.stderr)
    for stored in outcome.sequences:
        ids, weights = as_arrays(stored)
        sample.add(TokenSequence(ids.astype(np.int64), weights > 0, outcome.channel))


def of_token_files(files: list[TokenFile], tokens: int) -> Sample:
    """Draw rows of token files with `tokens` tokens, or up to one row more. A row is split into its conversations."""
    places = [(file, i) for file in files for i in range(len(file))]
    random.Random(SEED).shuffle(places)
    sample = Sample("rows", total=len(places), max_id=max(file.header.max_id for file in files))
    for file, i in places:
        sample.used += 1
        for sequence in sequences_of(file[i], file.header):
            sample.add(sequence)
        if sample.tokens >= tokens:
            break
    return sample


def sequences_of(row: Row, header: Header) -> Iterator[TokenSequence]:
    """The conversations of a row of a token file, in order."""
    first = 0
    for length, channel in zip(row.lengths.tolist(), row.channels.tolist(), strict=True):
        part = slice(first, first + length)
        yield TokenSequence(row.input_ids[part].astype(np.int64), row.loss_weights[part] > 0, header.channels[channel])
        first += length
