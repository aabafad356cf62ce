"""Conversations to tokens, and which of them train: one function for preparing data and for training on it.

    chat         the chat template of the tokenizer; assistant turns train
    completion   the contents one after the other, as they are; assistant turns and the end of the text train

Only tokens inside an assistant's turn train: what the model is to write, from behind the generation prompt to the end
of the turn, its closing token included. A template that marks this itself, with {% generation %}, is believed.
Otherwise the turn is found in the rendered text, whose tokens know their place in it:

    begin    where the rendering of all messages before, with the generation prompt, ends
    end      behind the content, and behind what closes the last turn of the text: <|im_end|>, <|eot_id|>, ...

An empty system message separates conversations in Megatron's packed lines; it is not shown to the template. Left out:
tools and images. Needs a fast tokenizer of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Message = dict[str, str]
Conversation = list[Message]
Span = tuple[int, int]

FORMATS = ("chat", "completion")
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Encoded:
    """One conversation: its tokens, and the ranges of those that train."""

    ids: list[int]
    spans: list[Span]

    @property
    def trained(self) -> int:
        """How many tokens train."""
        return sum(last - first for first, last in self.spans)

    def targets(self) -> list[int]:
        """The ids where they train, -100 elsewhere."""
        targets = [IGNORE_INDEX] * len(self.ids)
        for first, last in self.spans:
            targets[first:last] = self.ids[first:last]
        return targets


def spans_of(trains: Iterable[bool | int]) -> list[Span]:
    """From what is true of each token to ranges of tokens."""
    mask = [0, *trains, 0]
    edges = [i - 1 for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


class ChatFormat:
    """A tokenizer and a format: conversations -> `Encoded`.

    Args:
        tokenizer: of transformers, fast; its chat template is used by the format `chat`.
        form: one of `FORMATS`.

    Raises:
        ValueError: for a tokenizer that is not fast, or has no chat template where one is needed.
    """

    def __init__(self, tokenizer: Any, form: str) -> None:
        if form not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: expected a fast one, whose tokens know their place in the text, got "
                f"{type(tokenizer).__name__}; convert it to tokenizer.json"
            )
        if form == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "tokenizer: expected a chat template, got none; add chat_template.jinja to its folder, or use the "
                "format completion"
            )
        self.tokenizer, self.form = tokenizer, form
        self.marked = form == "chat" and re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template))
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()

    def encode(self, conversations: list[Conversation]) -> list[Encoded | ValueError]:
        """Each conversation's tokens, or why it has none."""
        shown = [[m for m in conversation if m["role"] != "system" or m["content"]] for conversation in conversations]
        if self.marked:
            return [self._of_marked(messages) for messages in shown]
        texts: list[str | ValueError] = []
        spans: list[list[Span]] = []
        for messages in shown:
            try:
                text, found = self._spans(messages)
            except ValueError as error:
                texts.append(error)
                spans.append([])
            else:
                texts.append(text)
                spans.append(found)
        good = [text for text in texts if isinstance(text, str)]
        encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(good, add_special_tokens=False))
        return [
            text if isinstance(text, ValueError) else _of_text(next(encodings), found)
            for text, found in zip(texts, spans, strict=True)
        ]

    @cached_property
    def pad_id(self) -> int:
        """A token for padding that no target ever is: Megatron masks every target that equals it."""
        sample = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (encoded,) = self.encode([sample])
        if isinstance(encoded, ValueError):
            raise encoded
        t = self.tokenizer
        trained = {t.eos_token_id, *encoded.targets()}
        candidates = (t.pad_token_id, t.unk_token_id, t.bos_token_id, *t.all_special_ids)
        for token in candidates:
            if token is not None and token not in trained:
                return token
        raise ValueError(
            f"tokenizer: expected a padding token that is never a target, got {t.pad_token!r}, which ends each reply; "
            "give the tokenizer a pad_token of its own"
        )

    def _spans(self, messages: Conversation) -> tuple[str, list[Span]]:
        """The text, and the places of the assistant's turns in it."""
        if self.form == "completion":
            return self._of_contents(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, closing = self._render(messages), ""
        following = len(text)
        spans: list[Span] = []
        for i in reversed(turns):
            prompt = self._render(messages[:i], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ValueError(
                    f"message {i}: the chat template writes what comes before it differently when more follows; mark "
                    "the assistant's part of the template with {% generation %}"
                )
            content = messages[i]["content"].strip()
            if i == turns[-1]:
                whole = text if i == len(messages) - 1 else self._render(messages[: i + 1])
                closing = whole.rpartition(content)[2].strip()
            turn = _find(text, len(prompt), following, content, closing)
            if turn is None:
                raise ValueError(f"message {i}: the chat template does not show its content as it is")
            spans.append((len(prompt), turn))
            following = len(prompt)
        return text, spans[::-1]

    def _of_contents(self, messages: Conversation) -> tuple[str, list[Span]]:
        t = self.tokenizer
        text = t.bos_token if t.bos_token and t("a").input_ids[0] == t.bos_token_id else ""
        spans: list[Span] = []
        for message in messages:
            begin, text = len(text), text + message["content"]
            if message["role"] == "assistant":
                spans.append((begin, len(text)))
        if spans and spans[-1][1] == len(text) and t.eos_token:
            text += t.eos_token
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _render(self, messages: Conversation, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options) if messages else ""
        except Exception as error:  # whatever a template raises is its way of refusing a conversation
            raise ValueError(f"the chat template refuses it: {error}") from None

    def _of_marked(self, messages: Conversation) -> Encoded | ValueError:
        try:
            result = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        except Exception as error:
            return ValueError(f"the chat template refuses it: {error}")
        return Encoded(list(result["input_ids"]), spans_of(result["assistant_masks"]))


def _find(text: str, begin: int, end: int, content: str, closing: str) -> int | None:
    """Where a turn ends: behind its content and its closing; behind its content, if no closing follows anywhere."""
    first, at = None, text.find(content, begin, end)
    while at >= 0:
        behind = at + len(content)
        first = behind if first is None else first
        while behind < end and text[behind].isspace():
            behind += 1
        if closing and text.startswith(closing, behind, end):
            return behind + len(closing)
        at = text.find(content, at + 1, end)
    return first


def _of_text(encoding: Any, places: list[Span]) -> Encoded:
    """From places in the text to tokens. One that is partly inside trains: " yes" for a reply "yes" after a space."""
    spans = []
    for begin, end in places:
        first = next((t for at in range(begin, end) if (t := encoding.char_to_token(at)) is not None), None)
        last = next((t for at in range(end - 1, begin - 1, -1) if (t := encoding.char_to_token(at)) is not None), None)
        if first is not None and last is not None:
            spans.append((first, last + 1))
    return Encoded(encoding.ids, spans)
