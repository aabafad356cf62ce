"""Tokenization of conversations: token ids, and which of them are in the loss.

    chat         the chat template (`template.py`); the loss covers the assistant turns
    completion   concatenated contents without a template; the loss covers assistant turns and the end of the text

A token is in the loss if it overlaps the trained span of a turn, also if it begins before it, such as a token of a word
and the space before. If a character has several tokens, all are in the loss. A token that crosses the boundary of a
turn and shares only whitespace with it is excluded. The first token of a sequence is excluded, because no token
predicts it.
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
        spans: disjoint ranges of trained tokens, in order.
        weights: weight of each span in the loss.
    """

    ids: list[int]
    spans: list[Span]
    weights: list[float]

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return sum(last - first for first, last in self.spans)


class ConversationTokenizer:
    """Conversations -> sequences of tokens.

    Args:
        tokenizer: a fast tokenizer of transformers. Its truncation and padding are disabled.
        form: one of `FORMATS`.
        template: Jinja source of a chat template. Default: the tokenizer's own.
        kwargs: variables of the chat template.

    Raises:
        ValueError: for a tokenizer that is not fast, or an unusable chat template (`ChatTemplate`).
    """

    def __init__(
        self, tokenizer: Any, form: str = "chat", template: str | None = None, kwargs: dict[str, Any] | None = None
    ) -> None:
        if form not in FORMATS:
            raise ValueError(f"--format: expected one of {', '.join(FORMATS)}, got {form!r}")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"--tokenizer: {type(tokenizer).__name__} has no token offsets; use a fast tokenizer, which has a "
                "tokenizer.json"
            )
        self.tokenizer, self.form = tokenizer, form
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.template = ChatTemplate(tokenizer, template, kwargs) if form == "chat" else None
        begin = tokenizer.bos_token
        self._begin = begin if begin and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""

    def encode(self, conversations: list[Conversation]) -> list[list[Encoded] | ValueError]:
        """The sequences of each conversation, or the error."""
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
            result
            if isinstance(result, ValueError)
            else [_tokens_of(next(encodings), sample, _weights_of(sample, conversation)) for sample in result]
            for result, conversation in zip(results, conversations, strict=True)
        ]

    def _rendered(self, conversation: Conversation) -> list[Rendered]:
        if self.template is not None:
            samples = self.template.render(conversation.messages, conversation.turns, **conversation.kwargs)
            if len(set(conversation.weights.values())) > 1 and any(-1 in sample.turns for sample in samples):
                raise ValueError(
                    "the marks {% generation %} of the chat template cannot be assigned to turns of different weights; "
                    "use one weight per conversation"
                )
            return samples
        extra = [name for message in conversation.messages for name in message if name not in ("role", "content")]
        if extra or conversation.kwargs:
            name = [*extra, *conversation.kwargs][0]
            raise ValueError(f"--format completion does not support field {name!r}; remove it, or use --format chat")
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
        """Token id for padding. Padding is masked by position, so any token is valid."""
        t = self.tokenizer
        return next((i for i in (t.pad_token_id, t.eos_token_id, t.unk_token_id) if i is not None), 0)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the token ids of a text depend on: format, chat template, tokenizer."""
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


def check_fingerprint(path: str, stored: dict[str, Any], tokenizer: Any, option: str) -> None:
    """Raises ValueError if a token file was prepared with another tokenizer.

    Args:
        stored: fingerprint of the file.
        option: the setting with the tokenizer and its folder, for the error message.
    """
    for name, value in tokenizer_fingerprint(tokenizer).items():
        if stored[name] != value:
            raise ValueError(
                f"{path}: prepared with another tokenizer: {name} {stored[name]!r}, {option} has {value!r}; prepare "
                "the data again with this tokenizer"
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _weights_of(sample: Rendered, conversation: Conversation) -> list[float]:
    """The weight of each span. All are equal if the marks of the template do not determine their turns."""
    return [conversation.weights.get(conversation.turns[0] if i == -1 else i, 1.0) for i in sample.turns]


def _tokens_of(encoding: Any, sample: Rendered, weights: list[float]) -> Encoded:
    """Convert spans of characters to spans of tokens. A token of two turns has the weight of the first."""
    spans: list[tuple[int, int, float]] = []
    for (begin, end), weight in zip(sample.spans, weights, strict=True):
        first, last = _inside(encoding, sample.text, begin, end)
        if first == last:
            continue
        if spans and first <= spans[-1][1]:
            first = spans[-1][1] if spans[-1][2] != weight else spans.pop()[0]
        spans.append((first, last, weight))
    if spans and spans[0][0] == 0:
        spans[0] = (1, *spans[0][1:])
    spans = [span for span in spans if span[0] < span[1]]
    return Encoded(encoding.ids, [span[:2] for span in spans], [span[2] for span in spans])


def _inside(encoding: Any, text: str, begin: int, end: int) -> Span:
    """The tokens of a range of characters. Excludes a token at its edge that shares only blanks with the range."""
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
    """First token of the first character in the range that has one."""
    for place in range(begin, end):
        if (token := encoding.char_to_token(place)) is not None:
            return token
    return None
