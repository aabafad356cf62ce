"""Conversations -> token ids, and which of them train: once, before training.

    chat         the chat template (`template.py`); what an assistant turn generates trains
    completion   contents one after the other, as they are; assistant turns and the end of the text train

A token trains if any of its characters do, as with the space before a word, and so does every token of a character of
several tokens. At the edge of a turn a token does not train if it has only blanks of that turn. The first token of a
sequence never trains, because nothing predicts it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from megatron_dft.data.conversations import Conversation
from megatron_dft.data.template import ChatTemplate, Rendered, Span, many_time_limits

FORMATS = ("chat", "completion")


@dataclass(frozen=True)
class Encoded:
    """One sequence of tokens.

    Attributes:
        ids: token ids.
        spans: ranges of tokens that train, in order, apart from each other.
    """

    ids: list[int]
    spans: list[Span]

    @property
    def trained(self) -> int:
        """How many tokens train."""
        return sum(last - first for first, last in self.spans)


class ConversationTokenizer:
    """Conversations -> sequences of tokens.

    Args:
        tokenizer: a fast one of transformers. Its truncation and padding are switched off.
        form: one of `FORMATS`.
        template: Jinja source of a chat template. Default: the tokenizer's own.
        kwargs: variables of the chat template.

    Raises:
        ValueError: a tokenizer that is not fast; a chat template that cannot be used (`ChatTemplate`).
    """

    def __init__(
        self, tokenizer: Any, form: str = "chat", template: str | None = None, kwargs: dict[str, Any] | None = None
    ) -> None:
        if form not in FORMATS:
            raise ValueError(f"--format: expected one of {', '.join(FORMATS)}, got {form!r}")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"--tokenizer: {type(tokenizer).__name__} does not tell the place of its tokens in the text; use a "
                "tokenizer with a tokenizer.json"
            )
        self.tokenizer, self.form = tokenizer, form
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.template = ChatTemplate(tokenizer, template, kwargs) if form == "chat" else None
        begin = tokenizer.bos_token
        self._begin = begin if begin and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""

    def encode(self, conversations: list[Conversation]) -> list[list[Encoded] | ValueError]:
        """The sequences of each conversation, or why it has none."""
        results: list[list[Rendered] | ValueError] = []
        with many_time_limits():
            for conversation in conversations:
                try:
                    results.append(self._rendered(conversation))
                except ValueError as error:
                    results.append(error)
                except RecursionError:
                    results.append(ValueError("nested too deeply"))
        texts = [sample.text for result in results if isinstance(result, list) for sample in result]
        encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        return [
            result if isinstance(result, ValueError) else [_tokens_of(next(encodings), sample) for sample in result]
            for result in results
        ]

    def _rendered(self, conversation: Conversation) -> list[Rendered]:
        if self.template is not None:
            return self.template.render(conversation.messages, conversation.turns, **conversation.kwargs)
        extra = [name for message in conversation.messages for name in message if name not in ("role", "content")]
        if extra or conversation.kwargs:
            raise ValueError(f"--format completion: no place for {[*extra, *conversation.kwargs][0]!r}")
        text, spans = self._begin, []
        for i, message in enumerate(conversation.messages):
            begin, text = len(text), text + message["content"]
            if i in conversation.turns:
                spans.append((begin, len(text)))
        if conversation.messages[-1]["role"] == "assistant":
            end = self.tokenizer.eos_token or ""
            text += end
            if conversation.turns[-1:] == [len(conversation.messages) - 1]:
                spans[-1] = (spans[-1][0], len(text))
        return [Rendered(text, tuple(spans), tuple(conversation.turns))]

    @property
    def pad_id(self) -> int:
        """A token for padding. Padding is masked by its place, so any token will do."""
        t = self.tokenizer
        return next((i for i in (t.pad_token_id, t.eos_token_id, t.unk_token_id) if i is not None), 0)

    def fingerprint(self) -> dict[str, Any]:
        """What the ids of a text depend on."""
        return {
            "format": self.form,
            "chat_template": _digest(self.template.source) if self.template else None,
            "chat_template_kwargs": self.template.kwargs if self.template else {},
            **tokenizer_fingerprint(self.tokenizer),
        }


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary, digest and padding token of a fast tokenizer."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = {name: backend.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return {
        "tokenizer": _digest(json.dumps(backend, sort_keys=True)),
        "vocab_size": len(tokenizer),
        "pad_token": tokenizer.pad_token,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _tokens_of(encoding: Any, sample: Rendered) -> Encoded:
    """From characters to tokens."""
    spans: list[Span] = []
    for begin, end in sample.spans:
        first, last = _inside(encoding, sample.text, begin, end)
        if first == last:
            continue
        if spans and first <= spans[-1][1]:
            first = spans.pop()[0]
        spans.append((first, last))
    if spans and spans[0][0] == 0:
        spans[0] = (1, spans[0][1])
    return Encoded(encoding.ids, [span for span in spans if span[0] < span[1]])


def _inside(encoding: Any, text: str, begin: int, end: int) -> Span:
    """The tokens of a range of characters. One at its edge is left out if it has only blanks of the range."""
    count = len(encoding)
    first = _token_at(encoding, begin, end)
    if first is None:
        return 0, 0  # characters that the tokenizer removes
    last = _token_at(encoding, end, len(text))
    last = count if last is None else last
    if last < count and encoding.token_to_chars(last)[0] < end:
        last += 1

    def belongs(token: int) -> bool:
        place = encoding.token_to_chars(token)
        if place is None or (begin <= place[0] and place[1] <= end):
            return True
        within = text[max(place[0], begin) : min(place[1], end)]
        beyond = text[place[0] : begin] + text[end : place[1]]
        return bool(within.strip()) or not beyond.strip()

    while first < last and not belongs(first):
        first += 1
    while first < last and not belongs(last - 1):
        last -= 1
    return first, last


def _token_at(encoding: Any, begin: int, end: int) -> int | None:
    """The first of the tokens of the first character that has one."""
    for place in range(begin, end):
        if (token := encoding.char_to_token(place)) is not None:
            return token
    return None
