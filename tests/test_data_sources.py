"""expand, records and parse: file formats and encodings of chat data, and the errors for all others."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from megatron_dft.data import sources
from megatron_dft.data.sources import SUFFIXES, Record, channel_of, expand, parse, records

OBJECTS = [{"a": 1, "text": "日本 é 😀"}, {"b": [1.5, None, {"c": "x"}]}, {"text": "line\u2028separator\rreturn"}]
LINES = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in OBJECTS).encode()
MANY = b"".join(json.dumps({"i": i, "text": os.urandom(20).hex()}).encode() + b"\n" for i in range(5000))


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="chat.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    return to_file


def outcome(record):
    """Record number, and the parsed object or the error message."""
    try:
        return record.number, parse(record)
    except ValueError as error:
        return record.number, str(error)


def outcomes(file):
    return [outcome(record) for record in records([file])]


def reason(text):
    """The error message of parse."""
    with pytest.raises(ValueError) as error:
        parse(Record("f", 1, text if isinstance(text, bytes) else text.encode()))
    return str(error.value)


def numbered(objects):
    return list(enumerate(objects, 1))


def zstd(*parts):
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    return b"".join(map(compress, parts))


def parquet(path, rows, **options):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path, **options)
    return str(path)


CHILD = """
import json, sys
{before}
sys.path.append({folder!r})  # imports sources alone: the package imports torch, which takes seconds
from sources import expand, parse, records
for record in records(expand(sys.argv[1:])):
    try:
        print(json.dumps([record.file, record.number, parse(record)]))
    except ValueError as error:
        print(json.dumps([record.file, record.number, str(error)]))
"""


def in_child(*paths, stdin=b"", before="", shell='"$@"'):
    """File, number and outcome of each record, read by another process under bash."""
    code = CHILD.format(before=before, folder=os.path.dirname(sources.__file__))
    argv = ["bash", "-c", shell, "bash", sys.executable, "-c", code, *paths]
    run = subprocess.run(argv, input=stdin, capture_output=True, check=True)
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


# expand


def test_expand_replaces_a_folder_by_its_sorted_files(write, tmp_path):
    names = [f"data/sub/{i}{suffix}" for i, suffix in enumerate(SUFFIXES)] + ["data/B.JSONL", "data/a.json"]
    for name in (*names, "data/readme.md", "data/.hidden.jsonl", "data/.git/x.jsonl", "data/x.jsonl.bak"):
        write(b"{}", name)
    folder = str(tmp_path / "data")
    assert expand([folder]) == sorted(str(tmp_path / name) for name in names)


def test_expand_keeps_files_of_any_suffix_and_their_order(write, tmp_path):
    b, a = write(b"{}", "b.txt"), write(b"{}", "a")
    assert expand([b, "-", a]) == [b, "-", a]
    assert expand([]) == []


def test_expand_reads_a_hidden_folder_that_is_named(write, tmp_path):
    file = write(b"{}", ".cache/x.jsonl")
    assert expand([str(tmp_path / ".cache")]) == [file]


def test_expand_follows_links_to_folders(write, tmp_path):
    write(b"{}", "elsewhere/x.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert expand([str(tmp_path / "data")]) == [str(tmp_path / "data" / "link" / "x.jsonl")]


def test_expand_rejects_a_missing_path(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file or folder"):
        expand([str(tmp_path / "none.jsonl")])


def test_expand_rejects_a_broken_link_in_a_folder(tmp_path):
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "none")
    with pytest.raises(ValueError, match=r"x\.jsonl: no such file"):
        expand([str(tmp_path)])


def test_expand_rejects_a_folder_without_known_suffixes(write, tmp_path):
    write(b"{}", "data/x.txt")
    with pytest.raises(ValueError, match=r"data: no file in this folder ends in \.jsonl, \.jsonl\.gz, .*\.parquet"):
        expand([str(tmp_path / "data")])


@pytest.mark.parametrize("spelling", ["same", "dots", "link", "folder", "cycle"])
def test_expand_rejects_a_file_given_twice(write, tmp_path, spelling):
    file = write(b"{}", "data/x.jsonl")
    if spelling in ("link", "cycle"):
        (tmp_path / "data" / "y.jsonl").symlink_to(file if spelling == "link" else tmp_path / "data")
    folder = str(tmp_path / "data")
    paths = {
        "same": [file, file],
        "dots": [file, os.path.join(folder, "..", "data", "x.jsonl")],
        "link": [file, os.path.join(folder, "y.jsonl")],
        "folder": [file, folder],
        "cycle": [folder],
    }[spelling]
    with pytest.raises(ValueError, match=r"x\.jsonl: given twice|y\.jsonl: given twice, also as .*x\.jsonl; pass it"):
        expand(paths)


def test_expand_rejects_standard_input_twice():
    with pytest.raises(ValueError, match="-: given twice; pass it once"):
        expand(["-", "-"])


# channel_of


@pytest.mark.parametrize(
    ("file", "channel"),
    [
        ("train.jsonl", "train"),
        ("/a/b.json/train.jsonl.gz", "train"),
        ("code.NDJSON.zst", "code"),
        ("x.parquet", "x"),
        ("v1.5.json", "v1.5"),
        ("a,b.jsonl", "a_b"),
        ("notes.txt", "notes.txt"),
        (".jsonl", ".jsonl"),
        ("/dev/fd/63", "63"),
        ("-", "stdin"),
    ],
)
def test_channel_of_is_the_name_without_suffixes(file, channel):
    assert channel_of(file) == channel


# JSONL


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_records_reads_jsonl_with_each_line_end(write, bom, end, last):
    text = LINES.replace(b"\n", end)
    assert outcomes(write(bom + (text if last else text.removesuffix(end)))) == numbered(OBJECTS)


def test_records_yields_unparsed_lines(write):
    file = write(LINES)
    assert [record.raw for record in records([file])] == LINES.splitlines()
    assert {record.file for record in records([file])} == {file}


def test_records_ends_no_line_at_a_lone_return_or_a_unicode_separator(write):
    assert outcomes(write('{"a":\r1,\x0b"b": "\u2028\u0085"}\n{"a":\r1, "b": "\u2028\u0085"}\n'.encode())) == [
        (1, "not JSON: Expecting property name enclosed in double quotes at character 9"),
        (2, {"a": 1, "b": "\u2028\u0085"}),
    ]


def test_records_skips_blank_lines_and_counts_them(write):
    assert outcomes(write(b'\n \r\n{"a": 1}\n\t\n{"a": 2}\n\n  ')) == [(3, {"a": 1}), (5, {"a": 2})]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"[]", b"[\n]\n", gzip.compress(b"", mtime=0)])
def test_records_reports_a_file_without_records(write, content):
    assert outcomes(write(content)) == [(0, "empty file")]


def test_records_reads_files_in_order_and_continues_after_an_unreadable_one(write):
    files = [write(b'{"a": 1}', "a"), write("{}".encode("utf-16"), "b"), write(b"", "c"), write(b'{"a": 2}', "d")]
    assert [(record.file, record.number) for record in records(files)] == list(zip(files, [1, 1, 0, 1], strict=True))


def test_records_joins_lines_longer_than_a_chunk(write):
    objects = [{"text": "é" * length} for length in (200_000, 1, 65_536, 32_768, 300_000)]
    file = write("\n".join(json.dumps(x, ensure_ascii=False) for x in objects).encode())
    assert outcomes(file) == numbered(objects)


def test_records_rejects_only_the_line_that_is_not_utf8(write):
    file = write(b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": 2}\n')
    reason = "not UTF-8: byte 11 is 0xe9, possibly Windows-1252 or Latin-1; convert it to UTF-8"
    assert outcomes(file) == [(1, {"a": 1}), (2, reason), (3, {"a": 2})]


@pytest.mark.parametrize("name", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("blank", ["", "\n"])
def test_records_rejects_wide_encodings_by_name(write, name, bom, blank):
    content = (bom + blank + LINES.decode()).encode(name)
    expected = [(1, f"{name} text; convert it to UTF-8, e.g. with iconv -f {name} -t UTF-8")]
    assert outcomes(write(content)) == expected
    assert outcomes(write(gzip.compress(content, mtime=0))) == expected


def test_records_of_iconv_output_are_accepted(write):
    file = write(LINES.decode().encode("utf-16"))
    converted = subprocess.run(["iconv", "-f", "UTF-16LE", "-t", "UTF-8", file], capture_output=True, check=True)
    assert outcomes(write(converted.stdout)) == numbered(OBJECTS)


@pytest.mark.parametrize(
    ("content", "kind"), [(b"PK\x03\x04rest", "zip"), (b"BZh9rest", "bzip2"), (b"ARROW1", "Arrow")]
)
def test_records_rejects_other_formats_by_name(write, content, kind):
    assert outcomes(write(content)) == [
        (1, f"{kind} data; expected JSON text, compressed at most once by gzip or zstd, or parquet")
    ]


def test_records_rejects_data_compressed_twice(write):
    assert outcomes(write(gzip.compress(gzip.compress(LINES), mtime=0)))[0][1].startswith(
        "gzip data; expected JSON text"
    )


def test_records_counts_bytes_read(write):
    for content in (MANY, gzip.compress(MANY, mtime=0), b"[" + MANY.strip().replace(b"\n", b",\n") + b"]"):
        done = [record.done for record in records([write(content)])]
        assert len(done) == 5000 and done == sorted(done) and done[-1] == len(content)
    assert next(records([write(MANY)])).done < len(MANY)


def test_records_raises_oserror_for_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        list(records([str(tmp_path / "none")]))


def test_records_can_be_pickled(write):
    for content in (LINES, b"", b"{\n"):
        for record in records([write(content)]):
            assert outcome(pickle.loads(pickle.dumps(record))) == outcome(record)


# JSON arrays


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n\n  ", "\ufeff\r\n\t"])
def test_records_reads_a_json_array(write, indent, before):
    text = before + json.dumps(OBJECTS, indent=indent, ensure_ascii=False) + "\n"
    assert outcomes(write(text.encode(), "chat.jsonl")) == numbered(OBJECTS)


def test_records_reads_a_json_array_with_one_line_per_element(write):
    assert outcomes(write(b"[\n" + b",\n\n".join(LINES.splitlines()) + b"\n]")) == numbered(OBJECTS)


def test_records_rejects_only_the_element_that_is_invalid(write):
    text = b'[{"a": 1},\n{"a": 1, "a": 2},\n{"a": "\xe9"},\n3,\n{"a": NaN},\n{"a": "\\ud800"},\n{"a": 2}]'
    found = outcomes(write(text))
    assert [number for number, _ in found] == list(range(1, 8))
    assert [x for _, x in found if isinstance(x, dict)] == [{"a": 1}, {"a": 2}]
    fragments = ["duplicate key", "not UTF-8", "expected an object, got int", "NaN", "unpaired surrogate"]
    for (_, why), fragment in zip(found[1:6], fragments, strict=True):
        assert fragment in why


def test_records_reads_as_jsonl_what_is_not_one_array_of_objects(write):
    assert outcomes(write(b'[1, 2]\n{"a": 1}\n')) == [(1, "expected an object, got list"), (2, {"a": 1})]
    assert outcomes(write(b'[{"a": 1}]\n[{"a": 2}]\n')) == numbered(["expected an object, got list"] * 2)
    assert outcomes(write(b"[1, 2]")) == [(1, "expected an object, got list")]
    assert outcomes(write(b'[warning]\n\n{"a": 1}')) == [
        (1, "not JSON: Expecting value at character 2"),
        (3, {"a": 1}),
    ]
    assert outcomes(write(b'[{"a": 1}, {"a"')) == [(1, "not JSON: Expecting ':' delimiter at character 16")]
    assert outcomes(write(b"[" * 100_000 + b"1")) == [(1, "nested too deeply")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'[\n{"a": 1},\n\n{"a" 2}\n]', "Expecting ':' delimiter at byte 6 of line 4"),
        (b'[{"a": 1},\n{"a": 2}\n', "Expecting ',' delimiter at byte 9 of line 2"),
        (b'\n[{\n"a": 1}, ]', "Expecting value at byte 10 of line 3"),
        (b'[\n{"a": 1}\n]\n{"a": 2}', "Extra data at byte 1 of line 4"),
        (b"[\n" * 100_000, "Nested too deeply at byte 1 of line 2"),
    ],
)
def test_records_rejects_an_invalid_array_over_several_lines_once(write, text, why):
    assert outcomes(write(text)) == [(1, f"invalid JSON array: {why}")]


@pytest.mark.parametrize("text", [json.dumps(OBJECTS[0], indent=2), "\n  {\r\n", '{\n"a": 1}\n{\n"a": 1}\n'])
def test_records_rejects_an_object_over_several_lines_once(write, text):
    [(number, why)] = outcomes(write(text.encode()))
    assert number == 1
    assert why.startswith("the file is one JSON object over several lines; expected one line per conversation")


# Compression


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.jsonl.zst"])
def test_records_reads_gzip_by_its_first_bytes(write, name):
    assert outcomes(write(gzip.compress(LINES, mtime=0), name)) == numbered(OBJECTS)


def test_records_reads_plain_text_named_gz(write):
    assert outcomes(write(LINES, "chat.jsonl.gz")) == numbered(OBJECTS)


def test_records_reads_gzip_in_several_members(write):
    parts = [gzip.compress(part, mtime=0) for part in (b"", MANY[:7], b"", MANY[7:100_001], MANY[100_001:])]
    plain = outcomes(write(MANY))
    assert outcomes(write(b"".join(parts))) == plain
    assert outcomes(write((b"\0" * 70_000).join([*parts, b""]))) == plain


def test_records_reads_zstd_in_several_frames(write):
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0size"
    frames = zstd(b"", MANY[:7], MANY[7:100_001], MANY[100_001:])
    plain = outcomes(write(MANY))
    assert outcomes(write(frames)) == plain
    assert outcomes(write(skippable + frames + skippable)) == plain


def test_records_reads_zstd_with_a_long_window(write):
    zstandard = pytest.importorskip("zstandard")
    options = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()  # writes no content size
    assert outcomes(write(compressor.compress(LINES) + compressor.flush())) == numbered(OBJECTS)


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_records_reads_a_compressed_array(write, compress):
    assert outcomes(write(compress(json.dumps(OBJECTS, indent=1).encode()))) == numbered(OBJECTS)


@pytest.mark.parametrize(("kind", "compress"), [("gzip", gzip.compress), ("zstd", zstd)])
@pytest.mark.parametrize("share", [0.3, 0.9, 1])
def test_records_before_a_truncation_are_read(write, kind, compress, share):
    content = compress(MANY)
    *before, last = outcomes(write(content[: int(share * len(content)) - 1]))
    assert before == numbered([json.loads(line) for line in MANY.splitlines()])[: len(before)]
    assert share < 0.9 or len(before) > 1000
    assert last == (
        len(before) + 1,
        f"truncated {kind} data: the end of the file is missing; copy or download it again",
    )


@pytest.mark.parametrize(("kind", "compress"), [("gzip", gzip.compress), ("zstd", zstd)])
def test_records_before_invalid_compressed_data_are_read(write, kind, compress):
    *before, last = outcomes(write(compress(LINES) + b"garbage"))
    assert before == numbered(OBJECTS)
    assert last[0] == 4 and last[1].startswith(f"damaged {kind} data: ")


def test_records_reports_the_missing_package(write):
    files = [write(b"\x28\xb5\x2f\xfd rest", "z"), write(b"PAR1 rest", "p")]
    assert in_child(*files, before="sys.modules.update(zstandard=None, pyarrow=None)") == [
        (files[0], 1, "zstd data require the package zstandard; run pip install zstandard"),
        (files[1], 1, "parquet requires the package pyarrow; run pip install pyarrow"),
    ]


# Parquet


def test_records_reads_parquet_rows_without_null_fields(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "f"}],
            "id": 1,
            "meta": None,
        },
        {"messages": [{"role": "user", "content": None}], "meta": {"x": {"y": None, "z": [None, 1]}}},
    ]
    assert outcomes(parquet(tmp_path / "chat.jsonl", rows)) == numbered(
        [{"messages": rows[0]["messages"], "id": 1}, {"messages": [{"role": "user"}], "meta": {"x": {"z": [None, 1]}}}]
    )


def test_records_reads_parquet_in_batches_over_row_groups(tmp_path):
    rows = [{"i": i, "text": "x" * (i % 50)} for i in range(1000)]
    file = parquet(tmp_path / "x.parquet", rows, row_group_size=300)
    found = list(records([file]))
    assert [outcome(record) for record in found] == numbered(rows)
    done = [record.done for record in found]
    assert done == sorted(done) and done[0] > 0 and done[-1] == os.path.getsize(file)


def test_records_reports_parquet_without_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    assert outcomes(parquet(tmp_path / "x.parquet", pa.table({"a": pa.array([], "string")}))) == [(0, "empty file")]


def test_records_rejects_truncated_parquet(write, tmp_path):
    content = Path(parquet(tmp_path / "x.parquet", [{"a": 1}] * 100)).read_bytes()
    [(number, why)] = outcomes(write(content[:-20]))
    assert number == 1 and why.startswith("damaged or truncated parquet: ")


def test_records_before_corrupt_parquet_are_read(write, tmp_path):
    rows = [{"text": os.urandom(50).hex()} for _ in range(1000)]
    file = parquet(tmp_path / "x.parquet", rows, row_group_size=500, use_dictionary=False)
    content = bytearray(Path(file).read_bytes())
    middle = len(content) * 3 // 4
    content[middle - 10_000 : middle] = b"\xff" * 10_000
    *before, last = outcomes(write(bytes(content)))
    assert len(before) >= 256 and before == numbered(rows)[: len(before)]  # whole batches
    assert last[0] == len(before) + 1 and last[1].startswith("damaged or truncated parquet: ")


def test_records_rejects_duplicate_parquet_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert outcomes(parquet(tmp_path / "x.parquet", table)) == [(1, "duplicate column: 'a'; keep one of them")]


# Memory


@pytest.mark.parametrize("form", ["jsonl", "gzip", "zstd", "parquet"])
def test_records_holds_only_a_part_of_the_file(write, tmp_path, form):
    rows = [{"text": os.urandom(500).hex()} for _ in range(8000)]
    if form == "parquet":
        file = parquet(tmp_path / "x.parquet", rows, use_dictionary=False)  # one row group
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = write({"jsonl": bytes, "gzip": gzip.compress, "zstd": zstd}[form](text))
    del rows
    next(records([file]))  # imports
    tracemalloc.start()
    try:
        assert sum(1 for _ in records([file])) == 8000
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# Pipes


@pytest.mark.parametrize("form", ["plain", "array", "gzip", "zstd"])
def test_records_reads_standard_input(form):
    array = json.dumps(OBJECTS).encode()
    content = {"plain": LINES, "array": array, "gzip": gzip.compress(LINES, mtime=0)}.get(form) or zstd(array)
    assert in_child("-", stdin=content) == [("-", *x) for x in numbered(OBJECTS)]


def test_records_rejects_parquet_from_a_pipe():
    assert in_child("-", stdin=b"PAR1 rest") == [
        ("-", 1, "parquet cannot be read from a pipe; pass the path of the file")
    ]


def test_records_reads_process_substitutions(write):
    a, b = write(LINES, "a"), write(gzip.compress(LINES, mtime=0), "b")
    found = in_child(shell=f'"$@" <(cat {a}) <(cat {b})')
    assert [x[1:] for x in found] == numbered(OBJECTS) * 2
    assert all(file.startswith("/dev/fd/") for file, *_ in found)


def test_records_reads_a_named_pipe_in_a_folder(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    writer = threading.Thread(target=(tmp_path / "x.jsonl").write_bytes, args=(LINES,), daemon=True)
    writer.start()
    [file] = expand([str(tmp_path)])
    assert outcomes(file) == numbered(OBJECTS)
    writer.join(10)


# parse


def test_parse_returns_objects_as_they_are():
    row = {"a": 1}
    assert parse(Record("f", 1, row)) is row
    assert parse(Record("f", 1, b' {"a": "\\ud83d\\ude00 \\\\ud800"} ')) == {"a": "😀 \\ud800"}


def test_parse_raises_the_error_of_the_record():
    error = ValueError("a reason")
    with pytest.raises(ValueError, match="a reason"):
        parse(Record("f", 1, error))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty line"),
        ("  ", "empty line"),
        ('{"a": ', "not JSON: Expecting value at character 7"),
        ('{"a": 1} {"b": 1}', "not JSON: Extra data at character 10"),
        ('{"a": 1,}', "not JSON: "),
        ("{'a': 1}", "not JSON: "),
        ('{"a": "tab\t"}', "not JSON: Invalid control character at"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8: byte 8 is 0xed"),
        ("[1]", "expected an object, got list"),
        ("null", "expected an object, got NoneType"),
        ('"a"', "expected an object, got str"),
        ('{"a": 1, "b": 1, "a": 1}', "duplicate key: 'a'; keep one of them"),
        ('{"a": [{"b": 1, "\\u0062": 1}]}', "duplicate key: 'b'; keep one of them"),
        ('{"a": NaN}', "not JSON: NaN is not a JSON number; write null, or leave the field out"),
        ('{"a": [-Infinity]}', "not JSON: -Infinity is not a JSON number"),
        ('{"a": "x\\ud800"}', "unpaired surrogate: \\ud800; write the pair, or remove it"),
        ('{"a": [{"\\uDE00b": 1}]}', "unpaired surrogate: \\ude00"),
        ('{"a": "\\ude00\\ud83d"}', "unpaired surrogate: \\ude00"),
        ('{"a": ' + "[" * 200_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
    ],
)
def test_parse_rejects_invalid_json(text, why):
    assert reason(text).startswith(why)


def test_parse_takes_less_than_15_us():
    text = "the answer of the model is explained here, and so on. " * 4
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    record = Record("f", 1, json.dumps({"messages": messages, "id": 1}).encode())
    assert 450 < len(record.raw) < 600

    def seconds():
        begin = time.perf_counter()
        for _ in range(2000):
            parse(record)
        return (time.perf_counter() - begin) / 2000

    assert min(seconds() for _ in range(10)) < 15e-6
