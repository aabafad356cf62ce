"""Chat templates: conversation -> text, and the span of each assistant turn in it.

    {% generation %}     a template with these marks: the marked text is the span
    otherwise            the span of an assistant turn begins after the generation prompt. It ends where the next turn
                         begins, closing token included. Both positions come from rendering the conversation up to it

If a template renders a turn differently when another one follows (Qwen3 drops thoughts), there is one sample per
assistant turn: the conversation up to this turn, with the span of this turn alone. The text is never searched for the
content of a message.

Cost: one rendering per conversation if its messages have only role and text. The first conversation with a sequence of
roles is analysed, and later ones are compared with it. Other conversations cost three renderings per turn.

transformers renders the templates in its sandbox, for at most `TIME_LIMIT` seconds. A single Python operation, such as
a power of huge numbers, is not interrupted: the limit takes effect after it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Span = tuple[int, int]

TIME_LIMIT = 10.0  # seconds for one conversation
LONG = 12  # messages; of a longer sequence of roles only the beginning and the end are analysed
MARKS = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
BEGIN, END = "\ufdd0", "\ufdd1"  # Unicode noncharacters around marked text
FIELDS = frozenset(("reasoning_content", "tool_calls"))  # fields of messages that a template has to write
LAYOUT = re.compile(r"\s+|</?think>")  # text that a template may add to a reply, or remove from it
OPENED = re.compile(r"\s*(<[^<>]*think[^<>]*>)?\s*")  # end of a generation prompt that a reply may lack


@dataclass(frozen=True)
class Rendered:
    """A rendered text with the spans of its assistant turns, in characters.

    Attributes:
        turns: index of the message of each span; -1 if the marks of a template do not determine it.
    """

    text: str
    spans: tuple[Span, ...]
    turns: tuple[int, ...]


class ChatTemplate:
    """The chat template of a tokenizer, or another template for it.

    Args:
        tokenizer: of transformers.
        template: Jinja source. Default: the tokenizer's own.
        kwargs: variables of the template for all conversations, e.g. `enable_thinking`.

    Raises:
        ValueError: for a missing template, one that cannot be rendered, or one without a closing token of replies.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, kwargs: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        try:
            self.source: str = tokenizer.get_chat_template() if template is None else template
        except ValueError:
            raise ValueError(
                "the tokenizer has no chat template; pass --chat-template FILE, or --format completion for plain text"
            ) from None
        if not self.source.strip():
            raise ValueError("the chat template is empty")
        self.kwargs = kwargs or {}
        self._check_variables(self.kwargs)
        self.marked = _with_marks(self.source)
        self._special_tokens = tokenizer.special_tokens_map
        with _time_limit():  # compiling evaluates constants
            self._compiled = _compiled(self.source)
        self.parts = False  # whether the template expects contents as lists of parts
        self._shape = lru_cache(maxsize=1024)(self._shape_of)
        self._unwritten = lru_cache(maxsize=1024)(self._unwritten_of)
        self._analyse()

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.tokenizer, self.source, self.kwargs)

    def render(self, messages: list[Message], turns: list[int], **kwargs: Any) -> list[Rendered]:
        """The samples of a conversation.

        Args:
            messages: in the form that the template expects.
            turns: indices of the assistant messages in the loss.
            kwargs: tools, and variables of the template, for this conversation.

        Raises:
            ValueError: if the template raises an error, exceeds `TIME_LIMIT`, or does not determine the span of a turn.
        """
        with _time_limit():
            self._check_variables(kwargs)
            self._check_written(messages, turns, kwargs)
            if self.marked:
                return self._by_marks(messages, turns, kwargs)
            if samples := self._like_others(messages, turns, kwargs):
                return samples  # the analysis checked that contents are unchanged
            samples = self._exact(messages, turns, kwargs)
            for sample in samples:
                for span, i in zip(sample.spans, sample.turns, strict=True):
                    _check_reply(self._without_closing(sample.text[slice(*span)]), messages, i, at_end=True)
            return samples

    def _without_closing(self, turn: str) -> str:
        closings = [closing for closing in (self.closing, self.closing_within) if turn.endswith(closing)]
        return turn.removesuffix(max(closings, key=len, default=""))

    def _check_variables(self, kwargs: dict[str, Any]) -> None:
        """Raises ValueError for a variable that does not occur in the template."""
        for name in kwargs.keys() - {"tools"}:
            if name not in self.source:
                raise ValueError(f"chat_template_kwargs: the chat template has no variable {name!r}")

    def _check_written(self, messages: list[Message], turns: list[int], kwargs: dict[str, Any]) -> None:
        """Raises ValueError if the template omits a message, tools, or one of `FIELDS`."""
        if all(len(message) == 2 for message in messages) and not kwargs.get("tools"):
            if missing := self._unwritten(tuple(m["role"] for m in messages), json.dumps(kwargs, sort_keys=True)):
                raise ValueError(missing)
            return
        named = [{**m, "content": _sentinel(i)} if m["content"] else m for i, m in enumerate(messages)]
        text = self._text(named, kwargs)
        for i, message in enumerate(named):
            if message["content"] and message["content"] not in text:
                raise ValueError(f"message {i}: the chat template omits a message of role {message['role']} here")
        if kwargs.get("tools") and text == self._text(named, {**kwargs, "tools": None}):
            raise ValueError("tools: the chat template omits them")
        for i, message in enumerate(messages):
            for field in FIELDS.intersection(message):
                if field == "reasoning_content" and i not in turns:
                    continue  # templates drop the thoughts of earlier turns
                reduced = {name: value for name, value in message.items() if name != field}
                with_field, without_field = ([*messages[:i], variant] for variant in (message, reduced))
                if self._text(with_field, kwargs) == self._text(without_field, kwargs):
                    raise ValueError(f"message {i}: the chat template omits {field}")

    def _unwritten_of(self, roles: tuple[str, ...], kwargs: str) -> str:
        """Why the template does not write messages with these roles; empty if it does."""
        text = self._text([{"role": r, "content": _sentinel(i)} for i, r in enumerate(roles)], json.loads(kwargs))
        for i, role in enumerate(roles):
            if _sentinel(i) not in text:
                return f"message {i}: the chat template omits a message of role {role} here"
        return ""

    def _text(self, messages: list[Message], kwargs: dict[str, Any], source: str = "", prompt: bool = False) -> str:
        options = {"tools": None, **self.kwargs, **kwargs}
        try:
            return self.tokenizer.apply_chat_template(
                [_in_parts(message) for message in messages] if self.parts else messages,
                chat_template=source or self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **options,
            )
        except TimeoutError:
            raise
        except Exception as error:  # templates reject conversations with any exception
            raise ValueError(f"the chat template raised {type(error).__name__}: {error}") from None

    def _plain_text(self, messages: list[Message], kwargs: dict[str, Any]) -> str:
        """Like `_text`, for messages with only role and text. Avoids the copies that transformers makes of them."""
        if self._compiled is None:
            return self._text(messages, kwargs)
        try:
            return self._compiled.render(
                messages=[_in_parts(message) for message in messages] if self.parts else messages,
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **{**self._special_tokens, **self.kwargs, **kwargs},
            )
        except TimeoutError:
            raise
        except Exception as error:
            raise ValueError(f"the chat template raised {type(error).__name__}: {error}") from None

    def _analyse(self) -> None:
        """Find the generation prompt, and the closing of a reply within a conversation and at its end."""
        user, assistant = ({"role": role, "content": _sentinel(i)} for i, role in enumerate(("user", "assistant")))
        with _time_limit():
            try:
                self.parts = _sentinel(0) not in self._text([user], {})
            except ValueError:
                self.parts = True
            question = self._text([user], {})
            if _sentinel(0) not in question or f"'text': '{_sentinel(0)}'" in question:
                raise ValueError("the chat template changes the content of user messages")
            prompt = self._text([user], {}, prompt=True)
            self.header = prompt[self._common_prefix(prompt, question) :]
            self.closing = self._text([user, assistant], {}).rpartition(_sentinel(1))[2]
            try:
                continued = self._text([user, assistant], {}, prompt=True).rpartition(_sentinel(1))[2]
            except ValueError:  # the template allows no reply after a reply
                continued = self.closing + self.header
            if self.marked and self.closing.strip():
                marked = self._marked([user, assistant], [1], {})
                if not marked.text[: marked.spans[-1][1]].rpartition(_sentinel(1))[2].strip():
                    raise ValueError(
                        f"the chat template does not mark {self.closing.strip()!r}, which ends a reply, so the loss "
                        "would not cover the end of replies; move {% endgeneration %} after it"
                    )
        self.closing_within = continued.removesuffix(self.header)
        if not self.marked and not self.closing.strip():
            raise ValueError(
                "the chat template writes nothing after a reply, so the loss would not cover the end of replies; pass "
                "--chat-template FILE with a template that does, or that marks replies with {% generation %}"
                + _training_template(self.source)
            )

    def _common_prefix(self, text: str, other: str) -> int:
        """Length of the common prefix of two texts, reduced to a token boundary of both."""
        pairs = enumerate(zip(text, other, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
        if common == len(other) or common == len(text):
            return common
        for either in (text, other):
            encoding = self.tokenizer.backend_tokenizer.encode(either, add_special_tokens=False)
            token = encoding.char_to_token(common)
            if token is not None:
                common = min(common, encoding.token_to_chars(token)[0])
        return common

    # Spans by rendering the conversation up to each turn

    def _exact(self, messages: list[Message], turns: list[int], kwargs: dict[str, Any]) -> list[Rendered]:
        if not turns:
            return [Rendered(self._text(messages, kwargs), (), ())]

        @cache
        def until(count: int, prompt: bool) -> str:
            return self._text(messages[:count], kwargs, prompt=prompt)

        def begin(text: str, i: int) -> int:
            if not i:
                raise ValueError("message 0: the first message is the assistant's; begin with another message")
            prompt = until(i, True)
            if text.startswith(prompt):
                missing = not prompt.endswith(self.header) and text.startswith(self.header, len(prompt))
                return len(prompt) + len(self.header) * missing  # no generation prompt after a tool result
            before = prompt.removesuffix(self.header)
            common = self._common_prefix(text, prompt)
            if common <= len(before) or not OPENED.fullmatch(prompt[common:]):
                raise ValueError(
                    f"message {i}: the chat template does not begin this reply with its generation prompt "
                    f"{prompt[-40:]!r}; it writes {text[len(before) : len(prompt)][:40]!r}. Set variables of the "
                    "template with --chat-template-kwargs, or mark replies with {% generation %}"
                )
            return common

        def end(text: str, i: int) -> int:
            if i == len(messages) - 1:
                return len(text)
            with contextlib.suppress(ValueError):
                prompt = until(i + 1, True)
                before = prompt.removesuffix(self.header)
                if before + self.header == prompt and text.startswith(before):
                    return len(before)
            if text.startswith(until(i + 1, False)):
                return len(until(i + 1, False))
            raise ValueError(f"message {i}: the chat template does not determine the end of this reply")

        def same(text: str, span: Span, i: int) -> bool:
            """Whether the turn is rendered as if it were the last."""
            last = until(i + 1, False)
            within, alone = text[slice(*span)], last[begin(last, i) :]
            if within == alone:
                return True
            closed = self.closing_within.strip() and within.endswith(self.closing_within)
            return bool(
                closed
                and alone.endswith(self.closing)
                and within.removesuffix(self.closing_within) == alone.removesuffix(self.closing)
            )

        text = until(len(messages), False)
        with contextlib.suppress(ValueError):
            spans = tuple((begin(text, i), end(text, i)) for i in turns)
            if all(same(text, span, i) for span, i in zip(spans, turns, strict=True)):
                return [Rendered(text, spans, tuple(turns))]
        samples = []
        for i in turns:
            text = until(i + 1, False)
            samples.append(Rendered(text, ((begin(text, i), len(text)),), (i,)))
        return samples

    # Spans from the analysis of a conversation with the same roles

    def _like_others(self, messages: list[Message], turns: list[int], kwargs: dict[str, Any]) -> list[Rendered] | None:
        """The samples; None if a message has more than role and text, or the template changes contents."""
        roles = tuple(message["role"] for message in messages)
        plain = all(len(message) == 2 and type(message.get("content")) is str for message in messages)
        if not plain or "tools" in kwargs or turns != _assistants(roles):
            return None
        samples = []
        for shape in self._shape(roles, json.dumps(kwargs, sort_keys=True)):
            parts, places, at = [shape.pieces[0]], [], len(shape.pieces[0])
            for message, strip, piece in zip(messages, shape.strips, shape.pieces[1:], strict=False):
                content = strip(message["content"])
                places.append((at, at + len(content)))
                parts += (content, piece)
                at += len(content) + len(piece)
            text = "".join(parts)
            if text != self._plain_text(messages[: len(places)], kwargs):
                return None
            spans = tuple((places[i][0] - before, places[i][1] + after) for i, before, after, _ in shape.spans)
            for (begin, _), (_, _, _, left_out) in zip(spans, shape.spans, strict=True):
                if left_out and text.startswith(left_out[0], begin):
                    return None  # the reply may begin like the missing end of the generation prompt
            samples.append(Rendered(text, spans, tuple(i for i, _, _, _ in shape.spans)))
        return samples or None

    def _shape_of(self, roles: tuple[str, ...], kwargs: str) -> list[Shape]:
        """One shape per sample; empty if the analysis fails."""
        messages: list[Message] = [{"role": role, "content": _sentinel(i)} for i, role in enumerate(roles)]
        options = json.loads(kwargs)
        with contextlib.suppress(ValueError, LookupError):
            if len(roles) > LONG:
                return [self._long_shape(messages, roles, kwargs)]
            samples = self._exact(messages, _assistants(roles), options)
            shapes = []
            for sample in samples:
                shown = messages if len(samples) == 1 else messages[: sample.turns[0] + 1]
                pieces, strips = self._pieces(shown, options)
                if _filled(pieces, shown) != sample.text:
                    return []
                starts = [sample.text.index(message["content"]) for message in shown]
                spans = [
                    (
                        i,
                        starts[i] - first,
                        last - starts[i] - len(shown[i]["content"]),
                        self._left_out(sample.text[:first]),
                    )
                    for (first, last), i in zip(sample.spans, sample.turns, strict=True)
                ]
                shapes.append(Shape(pieces, strips, spans))
            return shapes
        return []

    def _long_shape(self, messages: list[Message], roles: tuple[str, ...], kwargs: str) -> Shape:
        """The shape from the first and last messages. The text between other messages is that between equal roles."""
        head = LONG // 2
        tail = next(i for i in range(len(roles) - head, len(roles)) if roles[i] == roles[head])
        short = roles[:head] + roles[tail:]
        (known,) = self._shape(short, kwargs)
        before = {(short[i - 1], known.pieces[i]): (n, left_out) for i, n, _, left_out in known.spans}
        after = {(i == len(short) - 1, known.pieces[i + 1]): n for i, _, n, _ in known.spans}
        pieces, strips = self._pieces(messages, json.loads(kwargs))
        spans = []
        for i in _assistants(roles):
            count, left_out = before[roles[i - 1], pieces[i]]
            spans.append((i, count, after[i == len(roles) - 1, pieces[i + 1]], left_out))
        return Shape(pieces, strips, spans)

    def _left_out(self, before: str) -> str:
        """The end of the generation prompt that is missing in the text before a reply."""
        kept = next(n for n in range(len(self.header), -1, -1) if before.endswith(self.header[:n]))
        return self.header[kept:]

    def _pieces(self, messages: list[Message], kwargs: dict[str, Any]) -> tuple[list[str], list[Callable[[str], str]]]:
        """The text around each content, and the function that strips the content."""
        pieces = _around(self._text(messages, kwargs), messages)
        spaced = [{**message, "content": f"\t {message['content']}\t "} for message in messages]
        found = _around(self._text(spaced, kwargs), messages)
        strips: list[Callable[[str], str]] = []
        for i in range(len(messages)):
            left, right = found[i].endswith("\t "), found[i + 1].startswith("\t ")
            strips.append((str if right else str.rstrip) if left else (str.lstrip if right else str.strip))
        return pieces, strips

    # Spans from the marks of the template

    def _by_marks(self, messages: list[Message], turns: list[int], kwargs: dict[str, Any]) -> list[Rendered]:
        """One sample, or one per turn if the template drops the thoughts of earlier turns."""
        sample = self._marked(messages, turns, kwargs)
        try:
            for i in turns:
                _check_reply(sample.text, messages, i)
            return [sample]
        except ValueError:
            samples = [self._marked(messages[: i + 1], [i], kwargs) for i in turns]
            for sample, i in zip(samples, turns, strict=True):
                _check_reply(sample.text, messages, i)
            return samples

    def _marked(self, messages: list[Message], turns: list[int], kwargs: dict[str, Any]) -> Rendered:
        text = self._text(messages, kwargs)
        if BEGIN in text or END in text:
            raise ValueError(f"a message contains the noncharacter U+{ord(BEGIN):X} or U+{ord(END):X}; remove it")
        parts = re.split(f"([{BEGIN}{END}])", self._text(messages, kwargs, self.marked))
        if "".join(part for part in parts if part not in (BEGIN, END)) != text:
            raise ValueError("the chat template changes text after marking it with {% generation %}")
        spans: list[Span] = []
        at = depth = 0
        for part in parts:
            if part == BEGIN:
                spans += [(at, at)] * (depth == 0)
                depth += 1
            elif part == END:
                depth -= 1
                spans[-1] = (spans[-1][0], at)
            else:
                at += len(part)
        spans = [(first, last) for first, last in spans if first < last]
        if turns and not spans:
            raise ValueError("the chat template marks nothing with {% generation %}")
        assistants = _assistants(message["role"] for message in messages)
        if turns == assistants:
            return Rendered(text, tuple(spans), tuple(turns) if len(turns) == len(spans) else (-1,) * len(spans))
        kept: list[tuple[Span, int]] = []
        for i in turns:
            following = next((k for k in assistants if k > i), None)
            begin = self._place(text, messages, i, kwargs)
            end = len(text) if following is None else self._place(text, messages, following, kwargs)
            kept += [(span, i) for span in spans if begin <= span[0] < end]
        return Rendered(text, tuple(span for span, _ in kept), tuple(i for _, i in kept))

    def _place(self, text: str, messages: list[Message], i: int, kwargs: dict[str, Any]) -> int:
        """Position where a message begins, for templates with marks. Marks do not identify their message."""
        before = self._text(messages[:i], kwargs, prompt=True).removesuffix(self.header) if i else ""
        if not text.startswith(before):
            raise ValueError(
                f"message {i}: the chat template renders the messages before it differently when more follow, so its "
                "marks cannot be assigned to turns that are not in the loss"
            )
        return len(before)


@dataclass(frozen=True)
class Shape:
    """The text that a template writes around the contents of a sequence of roles.

    Attributes:
        pieces: text before, between and after the contents.
        strips: function applied to each content: str, str.strip, ...
        spans: for each assistant turn its index, the number of characters of its span before and after the content,
            and the end of the generation prompt that this turn lacks.
    """

    pieces: list[str]
    strips: list[Callable[[str], str]]
    spans: list[tuple[int, int, int, str]]


def _check_reply(text: str, messages: list[Message], i: int, at_end: bool = False) -> None:
    """Raises ValueError if a text lacks a part of the reply, except blanks and think tags.

    Compares the result with the data: templates may drop the text before `</think>`, truncate, or replace characters.
    """
    text, content = LAYOUT.sub("", text), LAYOUT.sub("", messages[i]["content"])
    if not (text.endswith(content) if at_end and "tool_calls" not in messages[i] else content in text):
        raise ValueError(
            f"message {i}: the chat template changes or drops a part of this reply; use another --chat-template, or "
            "change the reply"
        )


def _sentinel(i: int) -> str:
    return f"qz{i}zq"


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _assistants(roles: Iterable[str]) -> list[int]:
    return [i for i, role in enumerate(roles) if role == "assistant"]


def _around(text: str, messages: list[Message]) -> list[str]:
    """The text around the contents, which are sentinels. Raises ValueError if each does not occur once, in order."""
    pieces = []
    for message in messages:
        piece, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            raise ValueError
        pieces.append(piece)
    return [*pieces, text]


def _filled(pieces: list[str], messages: list[Message]) -> str:
    contents = [*(message["content"] for message in messages), ""]
    return "".join(part for pair in zip(pieces, contents, strict=True) for part in pair)


def _with_marks(source: str) -> str:
    """The template with `BEGIN` and `END` around marked text; empty if it has no marks."""

    def tag(match: re.Match[str]) -> str:
        left, closing, right = match.groups()
        return f"{{%{left} {'endcall' if closing else 'call _marked()'} {right}%}}"

    if not MARKS.search(COMMENT.sub("", source)):
        return ""
    return f"{{% macro _marked() %}}{BEGIN}{{{{ caller() }}}}{END}{{% endmacro %}}\n" + MARKS.sub(tag, source)


def _compiled(source: str) -> Any:
    """The template compiled by transformers in its sandbox; None on failure."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(source)
    except TimeoutError:
        raise
    except Exception:  # also for an invalid template: `_text` reports the error
        return None


def _training_template(source: str) -> str:
    """Hint: the path of an installed TRL's template with marks for this model; empty if there is none."""
    spec = importlib.util.find_spec("trl")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder, "chat_templates").glob("*.jinja")):
            marked = file.with_name(f"{file.stem}_training.jinja")
            if file.read_text(encoding="utf-8").strip() == source.strip() and marked.is_file():
                return f", e.g. {marked} of TRL"
    return ""


def _stop(*_: Any) -> None:
    raise TimeoutError


@contextlib.contextmanager
def many_time_limits() -> Iterator[None]:
    """Install the signal handler of `_time_limit` once for many conversations."""
    if not _in_main_thread() or signal.getsignal(signal.SIGALRM) is _stop:
        yield
        return
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    handler = signal.signal(signal.SIGALRM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise ValueError after `TIME_LIMIT` seconds. Without effect outside the main thread."""
    if not _in_main_thread():
        yield
        return
    with many_time_limits():
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
        try:
            yield
        except TimeoutError:
            raise ValueError(f"the chat template did not end within {TIME_LIMIT:.0f} s") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
