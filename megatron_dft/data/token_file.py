"""Token files: tokenized, packed conversations in an Arrow file that training maps into memory.

A row is one training sequence:

    input_ids     int32    concatenated tokens of its conversations, without padding
    loss_weights  float16  weight of each token as a target; 0: not in the loss, as the first token of a conversation
    lengths       int32    tokens per conversation
    channels      int32    channel of each conversation, an index into `Header.channels`
    reference_nll float16  NLL of each trained token under the reference model, nats; only in files of
                           `megatron-dft reference`

The schema's metadata contains the `Header`: the settings of the file and the statistics of the data.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

VERSION = 1
ROWS = 256  # per record batch
COLUMNS = {"input_ids": pa.int32(), "loss_weights": pa.float16(), "lengths": pa.int32(), "channels": pa.int32()}
REFERENCE = "reference_nll"
KEY = b"megatron_dft"


@dataclass(frozen=True)
class Row:
    """One packed sequence as stored. The arrays may be views of the mapped file."""

    input_ids: np.ndarray
    loss_weights: np.ndarray
    lengths: np.ndarray
    channels: np.ndarray
    reference_nll: np.ndarray | None = None


@dataclass(frozen=True)
class Header:
    """Settings and statistics of a token file.

    Attributes:
        seq_length: tokens per row, padding included.
        multiple: each conversation is padded to a multiple of this: 2 x context-parallel ranks, or 1.
        context_parallel_size, tensor_model_parallel_size, sequence_parallel: layout of the training run.
        pad_id: token id of padding.
        max_id: largest token id in the file, padding included.
        channels: channel names.
        fingerprint: tokenizer and chat template (`ConversationTokenizer.fingerprint`).
        statistics: the report of `megatron-dft data`.
        reference: the reference model, as in `advisor.reference.identity`; None: no reference.
    """

    seq_length: int
    multiple: int
    context_parallel_size: int
    tensor_model_parallel_size: int
    sequence_parallel: bool
    pad_id: int
    max_id: int
    channels: list[str]
    fingerprint: dict[str, Any]
    statistics: dict[str, Any]
    reference: dict[str, Any] | None = None

    @property
    def weighted(self) -> bool:
        """Whether the file contains weights other than 0 and 1."""
        weights = self.statistics.get("weights", {"min": 1.0, "max": 1.0})
        return weights["min"] != 1.0 or weights["max"] != 1.0


def named(header: Header) -> str:
    """The reference model of a file, for messages."""
    reference = header.reference or {}
    return "{} ({})".format(reference.get("model"), ", ".join(str(reference.get(x)) for x in ("weights", "dtype")))


def columns_of(header: Header) -> dict[str, pa.DataType]:
    """The columns of a file, with their types."""
    return COLUMNS if header.reference is None else {**COLUMNS, REFERENCE: pa.float16()}


def write(path: Path, header: Header, rows: Iterable[Row]) -> None:
    """Write a token file. Not atomic: write to a temporary path and rename it."""
    metadata = {KEY: json.dumps({"version": VERSION, **asdict(header)}).encode()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in columns_of(header).items()], metadata)
    batch: list[Row] = []
    with path.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS:
                writer.write_batch(_record_batch(batch, schema))
                batch.clear()
        if batch:
            writer.write_batch(_record_batch(batch, schema))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _record_batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in schema:
        parts = [getattr(row, field.name) for row in rows]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        values = np.concatenate(parts).astype(field.type.value_type.to_pandas_dtype(), copy=False)
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(values)))
    return pa.record_batch(columns, schema=schema)


class TokenFile:
    """A token file, open for reading. Unpickling opens it again, e.g. in data loader workers.

    Args:
        path: path of the token file.

    Raises:
        ValueError: for a file that is no token file, is incomplete, or has another version.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            reader = pa.ipc.open_file(pa.memory_map(path))
            stored = json.loads((reader.schema.metadata or {}).get(KEY, b"{}"))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, ValueError) as error:  # base classes of Arrow's errors
            raise ValueError(f"{path}: expected a token file of megatron-dft data ({error})") from None
        if stored.pop("version", None) != VERSION:
            raise ValueError(
                f"{path}: expected a token file of version {VERSION}; write it again with megatron-dft data"
            )
        self.header = Header(**{field.name: stored[field.name] for field in fields(Header) if field.name in stored})
        self._ends = np.cumsum([batch.num_rows for batch in self._batches]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.path,)

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        place = index - (self._ends[number] - batch.num_rows)
        return Row(*(_values(batch.column(name), place) for name in columns_of(self.header)))


def _values(column: pa.ListArray, place: int) -> np.ndarray:
    first, last = column.offsets[place].as_py(), column.offsets[place + 1].as_py()
    return column.values.slice(first, last - first).to_numpy()


@dataclass(frozen=True)
class Sample:
    """A row as training reads it, padded to `seq_length`.

    Attributes:
        tokens, position_ids: int64 [s]; positions start at 0 in each conversation.
        labels: int64 [s]; the next token, or -100 if it is not in the loss.
        loss_mask: float32 [s]; 1 for a label in the loss, else 0.
        weights: float32 [s]; weight of each label in the loss, 1 for others.
        channels: int64 [s]; channel of each label, an index into `Header.channels`.
        reference_nll: float32 [s]; NLL of each label under the reference model, NaN where there is none; None: no
            reference in the file.
        cu_seqlens: int32 [conversations + 1]; cumulative lengths of the conversations, padding included. The last
            conversation extends to the end of the row.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    weights: np.ndarray
    position_ids: np.ndarray
    channels: np.ndarray
    cu_seqlens: np.ndarray
    reference_nll: np.ndarray | None = None


def sample_of(row: Row, header: Header) -> Sample:
    """Pad a row and shift its tokens to labels."""
    length = header.seq_length
    padded = -(-row.lengths // header.multiple) * header.multiple
    starts = np.cumsum([0, *padded[:-1]])
    cu_seqlens = np.array([*starts, length], dtype=np.int32)
    within = np.arange(len(row.input_ids)) - np.repeat(np.cumsum([0, *row.lengths[:-1]]), row.lengths)
    places = np.repeat(starts, row.lengths) + within
    tokens = np.full(length, header.pad_id, dtype=np.int64)
    tokens[places] = row.input_ids
    trains = within > 0
    targets, given = places[trains] - 1, row.loss_weights[trains].astype(np.float32)
    loss_mask, weights = np.zeros(length, dtype=np.float32), np.ones(length, dtype=np.float32)
    loss_mask[targets] = given > 0
    weights[targets] = np.where(given > 0, given, 1)
    labels = np.full(length, -100, dtype=np.int64)
    labels[targets] = np.where(given > 0, row.input_ids[trains], -100)
    reference_nll = None
    if row.reference_nll is not None:
        reference_nll = np.full(length, np.nan, dtype=np.float32)
        reference_nll[targets] = row.reference_nll[trains]
    sizes = np.diff(cu_seqlens)
    position_ids = np.arange(length) - np.repeat(cu_seqlens[:-1], sizes)
    channels = np.repeat(row.channels.astype(np.int64), sizes)
    return Sample(tokens, labels, loss_mask, weights, position_ids, channels, cu_seqlens, reference_nll)
