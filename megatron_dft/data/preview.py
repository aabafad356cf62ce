"""Preview of conversations with their trained tokens marked, as text or HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_dft.data import sources
from megatron_dft.data.conversations import conversation_of
from megatron_dft.data.sources import Record
from megatron_dft.data.tokens import ConversationTokenizer, Encoded

GREEN, PLAIN = "\033[1;32m", "\033[0m"
# Control characters, unusual spaces, bidirectional marks, joiners, private use, unpaired surrogates, noncharacters.
INVISIBLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f"
    "\u205f-\u206f\u3000\u3164\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffd"
    "\U000e0000-\U000e0fff]"
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
pre { background: #f6f6f4; border: 1px solid #ddd; border-radius: 4px; padding: .8rem; white-space: pre-wrap;
      overflow-wrap: anywhere; }
mark { background: #bfe8c5; color: inherit; border-radius: 2px; box-shadow: inset 0 0 0 1px #8ccb97; }
.end { color: #999; }
.reason { color: #a40000; }
"""


@dataclass(frozen=True)
class Shown:
    """A sequence, or the reason why a record is rejected.

    Attributes:
        title: file, number, and counts.
        parts: pieces of text in order, with their weight in the loss.
        reason: why the record is rejected.
    """

    title: str
    parts: list[tuple[str, float]]
    reason: str = ""


def shown(records: Iterable[Record], tokenizer: ConversationTokenizer, channel: str | None) -> Iterator[Shown]:
    """The sequences of each record, or why it is rejected."""
    for record in records:
        where = f"{record.file}:{record.number}"
        try:
            conversation = conversation_of(sources.parse(record))
            (sequences,) = tokenizer.encode([conversation])
            if isinstance(sequences, ValueError):
                raise sequences
        except ValueError as error:
            yield Shown(where, [], str(error))
            continue
        name = conversation.channel or channel or sources.channel_of(record.file)
        for i, sequence in enumerate(sequences):
            place = f" (sequence {i + 1} of {len(sequences)}, one per assistant turn)" if len(sequences) > 1 else ""
            title = f"{where}{place}: {name}, {len(sequence.ids)} tokens, {sequence.trained} in the loss"
            yield Shown(title, list(_parts(tokenizer.tokenizer, sequence)))


def _parts(tokenizer: Any, sequence: Encoded) -> Iterator[tuple[str, float]]:
    done = 0
    for (first, last), weight in zip(sequence.spans, sequence.weights, strict=True):
        yield tokenizer.decode(sequence.ids[done:first]), 0.0
        yield tokenizer.decode(sequence.ids[first:last]), weight
        done = last
    yield tokenizer.decode(sequence.ids[done:]), 0.0


def _factor(weight: float) -> str:
    return "" if weight == 1.0 else f" x {weight:g}"


def visible(text: str) -> str:
    r"""Replace invisible characters, except line breaks, by escapes: \t, \u200b."""
    return INVISIBLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def as_text(item: Shown, coloured: bool) -> str:
    """Text for a terminal: trained text is green, or in brackets without colours. A weight stands behind it."""
    begin, end = (GREEN, PLAIN) if coloured else ("[", "]")
    if item.reason:
        return f"--- {visible(item.title)}: rejected: {visible(item.reason)}"
    text = "".join(begin + visible(part) + end + _factor(w) if w else visible(part) for part, w in item.parts)
    return f"--- {visible(item.title)}\n{text}"


def as_html(items: Iterable[Shown]) -> str:
    """An HTML page without scripts. All text of the data is escaped."""
    body = []
    for item in items:
        body.append(f"<h2>{_escaped(item.title)}</h2>")
        if item.reason:
            body.append(f'<p class="reason">rejected: {_escaped(item.reason)}</p>')
            continue
        parts = (
            f"<mark>{_escaped(part)}</mark>{_factor(w)}" if w else _escaped(part) for part, w in item.parts if part
        )
        body.append(f"<pre>{''.join(parts)}</pre>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>megatron_dft: preview</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>Trained text</h1>\n"
        "<p><mark>Marked text</mark> contributes to the loss. All other text is context.</p>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _escaped(text: str) -> str:
    """Escape text for HTML, with visible line breaks."""
    return html.escape(visible(text)).replace("\n", '<span class="end">↵</span>\n')
