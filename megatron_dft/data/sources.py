r"""Reader of chat data files: files -> raw records.

    JSONL         one JSON object per line; streamed
    JSON array    one array of objects, on one line or pretty-printed; held in memory
    parquet       one object per row; read in batches. Null fields are removed
    "-"           standard input: JSONL or a JSON array

JSONL and JSON arrays may be compressed by gzip or zstd. The format is detected from the first bytes, not from the
suffix.

Text is UTF-8, with or without a byte order mark. Lines end in \n or \r\n. Blank lines are skipped, but count in line
numbers.

`records` splits files into records. `parse` decodes the JSON of a record, for example in a worker process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst")
SUFFIXES = (*(text + packed for text in TEXT_SUFFIXES for packed in ("", *COMPRESSED_SUFFIXES)), ".parquet")
CHUNK = 1 << 16  # bytes per read
ROWS = 256  # parquet rows per batch
HEAD = 6  # bytes that identify a format

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([byte]) + b"\x2a\x4d\x18": "zstd" for byte in range(0x50, 0x60)},  # skippable frames, as pzstd writes
    b"PAR1": "parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
UTF8_BOM = b"\xef\xbb\xbf"
WIDE_ENCODINGS = {  # a byte order mark, or an ASCII character; the first match applies
    "UTF-32LE": re.compile(rb"\xff\xfe\0\0|[^\0]\0\0\0"),
    "UTF-32BE": re.compile(rb"\0\0\xfe\xff|\0\0\0[^\0]"),
    "UTF-16LE": re.compile(rb"\xff\xfe|[^\0]\0"),
    "UTF-16BE": re.compile(rb"\xfe\xff|\0[^\0]"),
}
BLANK = b" \t\r"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
ARRAY_OPENING = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*")
ARRAY_SEPARATOR = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")


class Unreadable(ValueError):
    """A file, or the rest of it, cannot be read. The number of lost records is unknown."""


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        file: path as given, "-" for standard input.
        number: line of JSONL, element of a JSON array or row of parquet, from 1. 0: the file has no record.
        raw: JSON text; an object; or an error: `Unreadable` for the rest of the file.
        done: bytes of the stored file that are read so far. Estimated from the row for parquet.
    """

    file: str
    number: int
    raw: bytes | dict[str, Any] | ValueError
    done: int = 0


def expand(paths: list[str]) -> list[str]:
    """Replace folders by their files.

    A folder is replaced by its files with one of `SUFFIXES`, including subfolders, sorted. Hidden files and folders are
    skipped. Files with another suffix are listed on stderr.

    Raises:
        ValueError: a path does not exist; a folder without such a file; a file that is given twice.
        OSError: a folder that cannot be read.
    """
    files: list[str] = []
    for path in paths:
        files += _files_in(path) if path != "-" and os.path.isdir(path) else [path]
    given: dict[str, str] = {}
    for file in files:
        if file != "-" and not os.path.exists(file):
            raise ValueError(f"{file}: no such file or folder")
        target = file if file == "-" else os.path.realpath(file)
        if target in given:
            also = "" if given[target] == file else f", also as {given[target]}"
            raise ValueError(f"{file}: given twice{also}; pass it once")
        given[target] = file
    return files


def records(files: list[str]) -> Iterator[Record]:
    """Yield the records of files, in order.

    A file that cannot be read to its end yields the records before the error and one with `Unreadable`. Parquet loses
    the whole batch with the error. A file without a record yields one with number 0 and a ValueError.

    Raises:
        OSError: a file cannot be opened or read.
    """
    for file in files:
        number = done = 0
        try:
            for number, raw, done in _read(file):
                yield Record(file, number, raw, done)
        except ValueError as error:
            yield Record(file, number + 1, Unreadable(str(error)), done)
        else:
            if number == 0:
                yield Record(file, 0, ValueError("empty file"), done)


def parse(record: Record) -> dict[str, Any]:
    """The object of a record.

    Stricter than `json.loads`: no duplicate keys, no NaN or Infinity, no unpaired surrogates.

    Raises:
        ValueError: the record is unusable. The message does not name file and number.
    """
    raw = record.raw
    if isinstance(raw, ValueError):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        value = DECODER.decode(raw.decode())
        if SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError for an unpaired surrogate
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}, possibly Windows-1252 or Latin-1; convert "
            "it to UTF-8"
        ) from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"unpaired surrogate: \\u{ord(error.object[error.start]):04x}; write the pair, or remove it"
        ) from None
    except json.JSONDecodeError as error:
        if not raw.strip():
            raise ValueError("empty line") from None
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def channel_of(file: str) -> str:
    """Default channel of a file: its name without folders and suffixes.

    A comma becomes "_", because commas separate channels in flags. Standard input is "stdin".
    """
    if file == "-":
        return "stdin"
    name = os.path.basename(file)
    known = (*TEXT_SUFFIXES, *COMPRESSED_SUFFIXES, ".parquet")
    while (parts := os.path.splitext(name))[1].lower() in known:
        name = parts[0]
    return name.replace(",", "_")


# Folders


def _files_in(folder: str) -> list[str]:
    found: list[str] = []
    for where, folders, names in os.walk(folder, onerror=_reraise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(where, name) for name in names if not name.startswith(".")]
    files = [file for file in found if file.lower().endswith(SUFFIXES)]
    for file in sorted(set(found) - set(files)):
        print(f"{file}: skipped for its suffix; pass the file itself to read it", file=sys.stderr)
    if not files:
        raise ValueError(f"{folder}: no file in this folder ends in {', '.join(SUFFIXES)}; pass the files themselves")
    return sorted(files)


def _reraise(error: OSError) -> None:
    raise error


# Formats


class _Chunks:
    """The bytes of a file in chunks, read once and in order.

    Attributes:
        done: bytes read so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.done = file, 0

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.file.read(CHUNK):
            self.done += len(chunk)
            yield chunk


def _read(file: str) -> Iterator[tuple[int, bytes | dict[str, Any], int]]:
    """Number, raw record and bytes read so far, for each record of a file."""
    with contextlib.nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as opened:
        source = _Chunks(opened)
        head, rest = _peek(source)
        chunks: Iterator[bytes] = chain([head], rest)
        kind = _format_of(head)
        if kind == "parquet":
            yield from _parquet_rows(opened)
            return
        if kind in ("gzip", "zstd"):
            chunks = _decompressed(chunks, kind)
        for number, raw in _json_records(_text(chunks)):
            yield number, raw, source.done


def _peek(chunks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first `HEAD` or more bytes, fewer if the file is shorter, and the remaining chunks."""
    rest = iter(chunks)
    head = b""
    while len(head) < HEAD and (chunk := next(rest, b"")):
        head += chunk
    return head, rest


def _format_of(head: bytes) -> str:
    """Name of a binary format, empty for text."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")


def _decompressed(chunks: Iterable[bytes], kind: str) -> Iterator[bytes]:
    """The contents of all gzip members or zstd frames. Zero bytes between them are skipped.

    Raises:
        ValueError: the data are truncated or damaged. Raised after the contents before the error.
    """
    new, decode_error = _decoder(kind)
    decoder = None
    for chunk in chunks:
        while chunk := chunk if decoder else chunk.lstrip(b"\0"):
            decoder = decoder or new()
            try:
                contents = decoder.decompress(chunk)
            except decode_error as error:
                raise ValueError(f"damaged {kind} data: {error}; the rest of the file is not read") from None
            if contents:
                yield contents
            chunk = decoder.unused_data
            if decoder.eof:
                decoder = None
    if decoder:
        raise ValueError(f"truncated {kind} data: the end of the file is missing; copy or download it again")


def _decoder(kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    """Factory of decompression objects with the interface of zlib, and the exception that they raise."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), zlib.error
    try:
        import zstandard
    except ImportError:
        raise ValueError("zstd data require the package zstandard; run pip install zstandard") from None
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, zstandard.ZstdError


def _parquet_rows(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Number, object and estimated bytes read so far, for each row.

    Raises:
        ValueError: a pipe; a damaged file; duplicate columns; pyarrow is missing.
    """
    if not file.seekable():
        raise ValueError("parquet cannot be read from a pipe; pass the path of the file")
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("parquet requires the package pyarrow; run pip install pyarrow") from None
    size = file.seek(0, os.SEEK_END)
    number = 0
    try:
        table = ParquetFile(file, buffer_size=CHUNK, pre_buffer=False)  # the defaults keep whole row groups in memory
        _unique(table.schema_arrow.names, "column")
        for batch in table.iter_batches(batch_size=ROWS, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_nulls(row), size * number // table.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"damaged or truncated parquet: {reason}; the rest of the file is not read") from None


def _without_nulls(value: Any) -> Any:
    """Remove null fields of objects: parquet does not distinguish them from missing fields."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    return value


# Text


def _text(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks of UTF-8 text, without the byte order mark.

    Raises:
        ValueError: the first bytes are those of another encoding or of a binary format.
    """
    head, rest = _peek(chunks)
    if kind := _format_of(head):
        raise ValueError(f"{kind} data; expected JSON text, compressed at most once by gzip or zstd, or parquet")
    for name, pattern in WIDE_ENCODINGS.items():
        if pattern.match(head):
            raise ValueError(f"{name} text; convert it to UTF-8, e.g. with iconv -f {name} -t UTF-8")
    return chain([head.removeprefix(UTF8_BOM)], rest)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Lines without \n. Only \n ends a line."""
    begun: list[bytes] = []  # pieces of the incomplete line
    for chunk in chunks:
        *ended, part = chunk.split(b"\n")
        if ended:
            ended[0] = b"".join([*begun, ended[0]])
            begun = []
            yield from ended
        begun.append(part)
    yield b"".join(begun)


def _json_records(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number and JSON text of each record of JSONL or of a JSON array."""
    stripped = (line.rstrip(BLANK) for line in _lines(chunks))
    lines = ((number, line) for number, line in enumerate(stripped, 1) if line)
    first = next(lines, None)
    if first is None:
        return
    opening = first[1].lstrip()
    if opening == b"{":
        raise ValueError(
            "the file is one JSON object over several lines; expected one line per conversation (jq -c . writes it) or "
            "one JSON array"
        )
    found = chain([first], lines)
    yield from _array_or_lines(list(found)) if opening.startswith(b"[") else found


def _array_or_lines(lines: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Number and JSON text of each element of a JSON array, or of each line.

    The lines are an array if together they are one JSON array that is empty or has an object as an element.

    Raises:
        ValueError: a JSON array over several lines is invalid.
    """
    text = b"\n".join(line for _, line in lines)
    try:
        places = _elements(text.decode("latin-1"))  # one character per byte, so positions are byte offsets
    except json.JSONDecodeError as error:
        if lines[0][1].endswith((b"[", b"{", b",")):
            number = lines[error.lineno - 1][0]
            raise ValueError(f"invalid JSON array: {error.msg} at byte {error.colno} of line {number}") from None
        return iter(lines)
    if places and not any(text.startswith(b"{", begin) for begin, _ in places):
        return iter(lines)
    return ((number, text[begin:end]) for number, (begin, end) in enumerate(places, 1))


def _elements(text: str) -> list[tuple[int, int]]:
    """Begin and end of each element of a JSON array.

    Raises:
        json.JSONDecodeError: the text is not one JSON array.
    """
    place = ARRAY_OPENING.match(text).end()  # type: ignore[union-attr]
    if place == len(text) - 1 and text.endswith("]"):
        return []
    places: list[tuple[int, int]] = []
    separator = ","
    while separator == ",":
        try:
            _, end = SCANNER.raw_decode(text, place)
        except RecursionError:
            raise json.JSONDecodeError("Nested too deeply", text, place) from None
        places.append((place, end))
        if not (found := ARRAY_SEPARATOR.match(text, end)):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        separator, place = found[1], found.end()
    if place < len(text):
        raise json.JSONDecodeError("Extra data", text, place)
    return places


# JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _unique([name for name, _ in pairs], "key")
    return found


def _unique(names: list[str], what: str) -> None:
    """Raises ValueError if a name occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"duplicate {what}: {name!r}; keep one of them")
        seen.add(name)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name} is not a JSON number; write null, or leave the field out")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)  # only finds the ends of elements
