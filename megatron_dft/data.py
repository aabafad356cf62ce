"""Turn chat data into what Megatron's --sft reads: packed, checked, with every token's fate known.

    python -m megatron_dft.data chat.jsonl ... --tokenizer FOLDER --seq-length 4096 --out train.jsonl

A line of the input is a conversation:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "channel": "maths"}
    {"prompt": "...", "completion": "..."}        texts, or lists of messages

A line of the output is a sequence: conversations that fit into --seq-length together, each beginning with a system
message (an empty one is no message), and the channel of each. Train on it with

    --sft --tokenizer-type SFTTokenizer --tokenizer-model FOLDER --sft-tokenizer-prompt-format FORMAT

--format FORMAT     chat (default: the tokenizer's own chat template; assistant turns train), completion (contents as
                    they are, and the end of the text; assistant turns train): these two work in runs of
                    megatron_dft.launch. Megatron's own: nemotron-nano-v2, nemotron-h-aligned
--packing NAME      best-fit (default; all lengths are known first), first-fit (one pass; reads a pipe, `-`), none
--too-long NAME     drop (default) or truncate conversations that are longer than a line
--channel NAME      channel of lines that name none; default: the name of their file
--preview N         show the first N conversations, and which parts of them train, and stop
--context-parallel-size, --tensor-model-parallel-size, --sequence-parallel
                    as in the training run: how conversations are padded, and what the length has to be a multiple of
--open-lines N      of first-fit (64)

A line that cannot be used, an empty one too, is named with file, line number and reason, in OUT.rejected.jsonl too, and
nothing else is lost. OUT.report.json holds the numbers that are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from megatron_dft.channels import OTHER
from megatron_dft.chat import FORMATS, Conversation, Encoded
from megatron_dft.hosts.sft import MEGATRON_FORMATS, ROLES, Encode, encoder
from megatron_dft.packing import best_fit, first_fit

BATCH = 512  # conversations that are tokenized together, on all cores
SHOWN = 10  # rejected lines that are printed
KINDS = {json.JSONDecodeError: "not JSON", UnicodeDecodeError: "not UTF-8", UnicodeEncodeError: "not text"}


@dataclass
class Line:
    """A line of the input, where it stands, and what became of it."""

    file: Path
    number: int
    offset: int
    conversation: Conversation = field(default_factory=list)
    channel: str = ""
    length: int = 0  # tokens, of a truncated conversation those that are left
    trained: int = 0
    truncated: bool = False


class Account:
    """What came in, what went out, what was left out and why."""

    def __init__(self, rejected: Path) -> None:
        self.lengths = array("i")
        self.channels: dict[str, list[int]] = {}  # conversations, tokens, tokens that train
        self.reasons: Counter[str] = Counter()
        self.truncated = self.lines = 0
        self._path = rejected
        self._rejected: IO[str] | None = None
        rejected.unlink(missing_ok=True)

    def accept(self, line: Line) -> None:
        """Count a conversation that goes into the output."""
        self.lengths.append(line.length)
        self.truncated += line.truncated
        numbers = self.channels.setdefault(line.channel, [0, 0, 0])
        for i, more in enumerate((1, line.length, line.trained)):
            numbers[i] += more

    def reject(self, line: Line, reason: str) -> None:
        """Name a line that does not; `reason` begins with its kind, up to a colon."""
        self.reasons[reason.partition(":")[0]] += 1
        place = {"file": str(line.file), "line": line.number, "reason": reason}
        if self._rejected is None:
            self._rejected = self._path.open("w")
        self._rejected.write(json.dumps(place) + "\n")
        count = self.reasons.total()
        if count <= SHOWN:
            print(f"{line.file}:{line.number}: {reason}", file=sys.stderr)
        if count == SHOWN:
            print(f"(all others only in {self._path})", file=sys.stderr)

    def close(self) -> None:
        """No more lines."""
        if self._rejected is not None:
            self._rejected.close()

    def report(self, seq_length: int) -> dict[str, Any]:
        """All of it, in tokens and shares."""
        ordered = sorted(self.lengths)
        count, tokens = len(ordered), sum(ordered)

        def at(share: float) -> int:
            return ordered[min(int(share * count), count - 1)] if count else 0

        columns = ("conversations", "tokens", "tokens_that_train")
        return {
            "conversations": count,
            "rejected": self.reasons.total(),
            "rejected_for": dict(self.reasons.most_common()),
            "truncated": self.truncated,
            "tokens": tokens,
            "tokens_that_train": sum(numbers[2] for numbers in self.channels.values()),
            "length": {"mean": tokens / max(count, 1)}
            | {name: at(q) for name, q in {"min": 0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}.items()},
            "channels": {name: dict(zip(columns, n, strict=True)) for name, n in sorted(self.channels.items())},
            "lines": self.lines,
            "seq_length": seq_length,
            "packing_efficiency": tokens / max(self.lines * seq_length, 1),
            "unpacked_efficiency": tokens / max(count * seq_length, 1),
        }


def read(files: list[Path], channel: str | None) -> Iterator[tuple[Line, str | None]]:
    """Each line of the files, and what is wrong with it, if something is."""
    for file in files:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as text:
            offset = 0
            for number, raw in enumerate(text, 1):
                line = Line(file, number, offset)
                offset += len(raw)
                if not raw.strip():
                    yield line, "empty line"
                    continue
                try:
                    line.conversation, named = conversation_of(json.loads(raw))
                except ValueError as error:
                    kind = KINDS.get(type(error))
                    yield line, f"{kind}: {error}" if kind else str(error)
                    continue
                line.channel = named or channel or file.stem
                yield line, None


def conversation_of(record: Any) -> tuple[Conversation, str | None]:
    """The conversation of an input line, beginning with a system message, and its channel.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"not a conversation: expected an object with messages, got {type(record).__name__}")
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "completion" in record:
        sides = {"user": record["prompt"], "assistant": record["completion"]}
        turns = [[{"role": r, "content": x}] if isinstance(x, str) else x for r, x in sides.items()]
        messages = turns[0] + turns[1] if all(isinstance(turn, list) for turn in turns) else None
    else:
        raise ValueError(f"no messages: expected messages, or prompt and completion, got {', '.join(record) or 'none'}")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages: expected a list of them, with at least one")
    channel = record.get("channel")
    if channel is not None and (not isinstance(channel, str) or not channel or "," in channel):
        raise ValueError(f"bad channel: expected a name without a comma, got {channel!r}")
    conversation = [_message(message, i, messages) for i, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in conversation):
        raise ValueError("no assistant: nothing in it would train")
    if conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": ""})
    return conversation, channel


def _message(message: Any, i: int, messages: list[Any]) -> dict[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ROLES:
        raise ValueError(f"bad message: message {i}: expected a role of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"bad message: message {i}: expected content that is text, got {type(content).__name__}")
    content.encode()  # half a surrogate pair is no text
    if message.get("tool_calls"):
        raise ValueError(f"tool calls: message {i}: expected none, Megatron's --sft does not read them")
    if role == "system" and i:
        raise ValueError(f"late system message: message {i}: expected it first, a system message begins another one")
    if role == "assistant" and not content.strip():
        raise ValueError(f"empty reply: message {i}")
    if role == "assistant" and (i == 0 or messages[i - 1]["role"] not in ("user", "tool")):
        raise ValueError(f"reply to nobody: message {i}: expected a message of the user, or a tool's, before it")
    return {"role": role, "content": content}


def tokenized(
    lines: Iterable[tuple[Line, str | None]], encode: Encode, seq_length: int, truncate: bool, account: Account
) -> Iterator[Line]:
    """The lines that can be used, with their lengths; the others go to the account."""
    for batch in _batches(lines):
        good = [line for line, reason in batch if reason is None]
        results = iter(encode([line.conversation for line in good]))
        for line, reason in batch:
            encoded = None if reason else next(results)
            if isinstance(encoded, ValueError):
                reason = f"bad conversation: {encoded}"
            elif encoded is not None:
                reason = _measure(line, encoded, seq_length, truncate)
            if reason:
                account.reject(line, reason)
            else:
                account.accept(line)
                yield line


def _measure(line: Line, encoded: Encoded, seq_length: int, truncate: bool) -> str | None:
    """Note the length; or why the conversation is left out."""
    line.length, line.truncated = min(len(encoded.ids), seq_length), len(encoded.ids) > seq_length
    line.trained = sum(max(min(last, seq_length) - first, 0) for first, last in encoded.spans)
    if line.truncated and not truncate:
        return f"too long: {len(encoded.ids)} tokens, a line has {seq_length}"
    if not line.trained:
        return "nothing trains: its replies have no tokens" + " within the length of a line" * line.truncated
    return None


def _batches(lines: Iterable[Any]) -> Iterator[list[Any]]:
    batch = []
    for line in lines:
        batch.append(line)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def pack_streaming(lines: Iterable[Line], size: Callable[[int], int], limit: int, open_lines: int) -> Iterator[list]:
    """Sequences, of conversations and their channels, in one pass."""
    yield from first_fit(((size(x.length), (x.conversation, x.channel)) for x in lines), limit, open_lines)


def pack_best(
    lines: Iterable[Line], size: Callable[[int], int], limit: int, read_again: Callable[[Path, int], Any]
) -> Iterator[list]:
    """The same when all lengths are known. Of a conversation only place and length are kept; it is read twice."""
    sizes, offsets, numbers = array("i"), array("q"), array("i")
    places: dict[tuple[Path, str], int] = {}
    for line in lines:
        sizes.append(size(line.length))
        offsets.append(line.offset)
        numbers.append(places.setdefault((line.file, line.channel), len(places)))
    where = list(places)
    for chosen in best_fit(sizes.tolist(), limit):
        yield [(read_again(where[numbers[i]][0], offsets[i]), where[numbers[i]][1]) for i in chosen]


class Again:
    """Conversations by file and offset."""

    def __init__(self) -> None:
        self.files: dict[Path, IO[bytes]] = {}

    def __call__(self, file: Path, offset: int) -> Conversation:
        if file not in self.files:
            self.files[file] = file.open("rb")
        self.files[file].seek(offset)
        return conversation_of(json.loads(self.files[file].readline()))[0]


def rendering(tokenizer: Any, encoded: Encoded, coloured: bool) -> str:
    """The text, tokens that train in green, or between [ ] without colours."""
    begin, end = ("\033[1;32m", "\033[0m") if coloured else ("[", "]")
    parts, done = [], 0
    for first, last in encoded.spans:
        parts.append(tokenizer.decode(encoded.ids[done:first]))
        parts.append(begin + tokenizer.decode(encoded.ids[first:last]) + end)
        done = last
    return "".join([*parts, tokenizer.decode(encoded.ids[done:])])


def preview(files: list[Path], channel: str | None, tokenizer: Any, encode: Encode, count: int) -> None:
    """Show the first conversations as they train."""
    for line, reason in read(files, channel):
        if not count:
            return
        count -= 1
        encoded = ValueError(reason) if reason else encode([line.conversation])[0]
        if isinstance(encoded, ValueError):
            print(f"--- {line.file}:{line.number}: {encoded}")
            continue
        print(f"--- {line.file}:{line.number}: {line.channel}, {len(encoded.ids)} tokens, {encoded.trained} train")
        print(rendering(tokenizer, encoded, sys.stdout.isatty()))


def padding(seq_length: int, cp: int, tp: int, sequence_parallel: bool) -> Callable[[int], int]:
    """What a conversation takes of a line: under context parallelism Megatron pads each to a multiple of 2 cp.

    Raises:
        ValueError: for a length of a line that cannot be cut for the ranks.
    """
    multiple = 2 * cp if cp > 1 else 1
    whole = multiple * (tp if sequence_parallel else 1)
    if seq_length % whole:
        raise ValueError(
            f"--seq-length: expected a multiple of {whole} for context parallelism {cp} and tensor parallelism {tp}"
            f"{' with sequence parallelism' * sequence_parallel}, got {seq_length}; use {seq_length // whole * whole}"
        )
    return lambda length: min(math.ceil(length / multiple) * multiple, seq_length)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Read, tokenize, pack, write; returns the report."""
    size = padding(args.seq_length, args.context_parallel_size, args.tensor_model_parallel_size, args.sequence_parallel)
    _, encode = encoder(args.tokenizer, args.format)
    account = Account(args.out.with_suffix(".rejected.jsonl"))
    known = _progress(read(args.files, args.channel), args.files)
    lines = tokenized(known, encode, args.seq_length, args.too_long == "truncate", account)
    if args.packing == "best-fit":
        sequences: Iterable[list] = pack_best(lines, size, args.seq_length, Again())
    elif args.packing == "first-fit":
        sequences = pack_streaming(lines, size, args.seq_length, args.open_lines)
    else:
        sequences = ([(line.conversation, line.channel)] for line in lines)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix(".unfinished")
    with unfinished.open("w") as out:
        for sequence in sequences:
            messages = [message for conversation, _ in sequence for message in conversation]
            out.write(json.dumps({"messages": messages, "channels": [channel for _, channel in sequence]}) + "\n")
            account.lines += 1
    account.close()
    unfinished.replace(args.out)
    report = account.report(args.seq_length)
    args.out.with_suffix(".report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _progress(lines: Iterator[tuple[Line, str | None]], files: list[Path]) -> Iterator[tuple[Line, str | None]]:
    """The lines, with a bar of what is read."""
    from tqdm import tqdm

    sizes = {file: file.stat().st_size for file in files if str(file) != "-"}
    before = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    with tqdm(total=sum(sizes.values()) or None, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for item in lines:
            if item[0].number % BATCH == 1:
                bar.update(before.get(item[0].file, 0) + item[0].offset - bar.n)
            yield item
        bar.update((bar.total or bar.n) - bar.n)


def show(report: dict[str, Any], out: Path) -> None:
    """The report as text."""
    length, share = report["length"], report["tokens_that_train"] / max(report["tokens"], 1)
    print(
        f"{report['conversations']} conversations, {report['tokens']} tokens, of which {share:.1%} train; "
        f"rejected {report['rejected']}, truncated {report['truncated']}"
    )
    for reason, count in report["rejected_for"].items():
        print(f"  rejected: {reason}: {count}")
    print("tokens of a conversation: " + ", ".join(f"{name} {value:.0f}" for name, value in length.items()))
    for name, numbers in report["channels"].items():
        print(
            f"  {name}: {numbers['conversations']} conversations, {numbers['tokens']} tokens, "
            f"{numbers['tokens_that_train']} train"
        )
    print(
        f"{report['lines']} lines of {report['seq_length']}: {report['packing_efficiency']:.1%} of their tokens are "
        f"used; one conversation to a line would use {report['unpacked_efficiency']:.1%}"
    )
    names = [name for name in report["channels"] if name != OTHER]
    print(f"{out}" + (f"; --loss-channels {','.join(names)}" if names else ""))


def main(words: list[str]) -> None:
    """Check what can be checked at once, then show or write."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    args = _parser().parse_args(words)
    try:
        for file in args.files:
            if str(file) == "-" and args.packing == "best-fit":
                raise ValueError("-: expected files, which best-fit reads twice, got a pipe; use --packing first-fit")
            if str(file) != "-" and not file.is_file():
                raise ValueError(f"{file}: expected a JSONL file, found none")
        if args.preview:
            return preview(args.files, args.channel, *encoder(args.tokenizer, args.format), args.preview)
        if args.out is None or args.seq_length is None:
            raise ValueError("expected --seq-length and --out, or --preview N; got none of them")
        show(prepare(args), args.out)
    except ValueError as error:
        sys.exit(f"megatron_dft.data: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("megatron_dft.data", allow_abbrev=False, add_help=False)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seq-length", type=_positive)
    parser.add_argument("--format", choices=(*FORMATS, *MEGATRON_FORMATS), default="chat")
    parser.add_argument("--packing", choices=("best-fit", "first-fit", "none"), default="best-fit")
    parser.add_argument("--too-long", choices=("drop", "truncate"), default="drop")
    parser.add_argument("--channel")
    parser.add_argument("--preview", type=int, default=0)
    parser.add_argument("--context-parallel-size", type=_positive, default=1)
    parser.add_argument("--tensor-model-parallel-size", type=_positive, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--open-lines", type=_positive, default=64)
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


if __name__ == "__main__":
    main(sys.argv[1:])
