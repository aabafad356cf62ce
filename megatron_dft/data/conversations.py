"""Record formats of chat data: record -> conversation.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}        ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                                        Alpaca
    {"prompt": "...", "completion": "..."}         also `response` or `output`; texts, or lists of messages

Optional fields of a record:

    channel                a name: metrics are reported per channel
    system                 the system message; also `system_prompt`
    tools                  JSON schemas of functions, for the chat template
    chat_template_kwargs   variables of the chat template, e.g. {"enable_thinking": false}
    weight, loss, train    0 or false: the conversation is not in the loss. Another number multiplies its gradient, with
                           --dft-weights. Also `training`, `trainable`, `loss_weight`, `loss_scale`

Optional fields of a message, besides role and content (text, or a list of text parts):

    reasoning_content      also `reasoning`, `thinking`, `thought`. The chat template must render it
    tool_calls             the chat template must render them
    tool_call_id, name     for the chat template, which may omit them
    weight, loss, train    0 or false: the turn is context and not in the loss. Another number: as for a record; the
                           two are multiplied

No message in `prompt` is in the loss.

A field that is not listed here raises ValueError if it would change the loss, unless it is empty. All other fields,
such as `id` or `source`, are ignored, and their names are reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
TURNS = ("messages", "conversations", "instruction", "prompt")  # a record has exactly one of them
OF_RECORD = {"channel", "system", "system_prompt", "tools", "chat_template_kwargs"}
ANSWERS = ("completion", "response", "output")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
WEIGHTS = ("weight", "loss", "train", "training", "trainable", "loss_weight", "loss_scale")
LIGHTEST, HEAVIEST = 1e-4, 1e4  # weights, which a token file stores as fp16
ROLE_AND_CONTENT = {"role", "content", "from", "value"}
TEMPLATE_FIELDS = ("tool_calls", "tool_call_id", "name")
# Arguments of apply_chat_template, which chat_template_kwargs cannot set.
RESERVED = ("messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "documents")
# Fields that would change the loss or the text and are not supported. Other fields are ignored.
UNSUPPORTED_OF_RECORD = {
    *("images", "image", "videos", "video", "audios", "audio", "documents", "functions", "function_call"),
    *("chosen", "rejected", "label", "history", "input", "output", "completion", "response", "reasoning_content"),
    *("chat_template", "loss_mask", "labels", "input_ids", "prefix", "suffix", "examples", "context"),
    *("weights", "sample_weight", "mask", "masked", "train_on_inputs", "enable_thinking", "reasoning", "thinking"),
}
UNSUPPORTED_OF_MESSAGE = {
    *("images", "image", "videos", "video", "audios", "audio", "function_call", "refusal", "prefix", "continue"),
    *("tools", "documents", "audio_url", "image_url", "text", "value", "channel", "loss_mask", "recipient"),
    *("label", "mask", "masked", "weights", "train_detail", "thoughts", "reasoning_details", "cot"),
}
SWITCHES = {"label", "mask", "masked", "sample_weight", "train_on_inputs", "enable_thinking"}  # 0 and false are values


@dataclass
class Conversation:
    """Messages of a conversation, and which of them are in the loss.

    Attributes:
        messages: for the chat template: role, content, and those of `TEMPLATE_FIELDS` that are set.
        turns: indices of the assistant messages in the loss.
        channel: channel, if the record names one.
        kwargs: tools and variables of the chat template.
        weights: weight of a turn in the gradient, by its index; 1 if it is not listed.
        ignored: fields of the record and of its messages that have no effect.
    """

    messages: list[dict[str, Any]]
    turns: list[int]
    channel: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """The conversation of a record.

    Raises:
        ValueError: if the record is unusable. The message begins with the kind of the error and a colon.
    """
    context, messages, read = _turns(record)
    for name in sorted(UNSUPPORTED_OF_RECORD.intersection(record)):
        if name not in read and _is_set(record[name], name):
            raise ValueError(f"unsupported field: {name!r}; remove it from the data")
    systems = [name for name in ("system", "system_prompt") if _is_set(record.get(name))]
    if systems:
        context = [{"role": "system", "content": record[systems[0]]}, *context]
    conversation = Conversation([], [], _channel(record), _template_kwargs(record))
    conversation.ignored.update(record.keys() - OF_RECORD - UNSUPPORTED_OF_RECORD - {*WEIGHTS, *TURNS})
    of_record = _weight(record, "the conversation")
    for i, message in enumerate([*context, *messages]):
        shown, weight = _message(message, i, conversation.ignored)
        conversation.messages.append(shown)
        weight *= of_record
        if shown["role"] == "assistant" and weight > 0.0 and i >= len(context):
            if not LIGHTEST <= weight <= HEAVIEST:
                raise ValueError(
                    f"unsupported weight: message {i}: expected 0, or {LIGHTEST:g} to {HEAVIEST:g}, got {weight:g} "
                    "(weight of the message times that of the record)"
                )
            conversation.turns.append(i)
            conversation.weights[i] = weight
    if systems and (len(systems) > 1 or sum(m["role"] == "system" for m in conversation.messages) > 1):
        raise ValueError(f"two system messages: one in {systems[0]!r} and another one; keep one of them")
    _check_order(conversation.messages)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise ValueError("no assistant message: nothing contributes to the loss")
    if not conversation.turns:
        if context and not any(m["role"] == "assistant" for m in conversation.messages[len(context) :]):
            raise ValueError("no assistant message: nothing after the prompt contributes to the loss")
        raise ValueError("no weight: every assistant message has weight 0, so nothing contributes to the loss")
    return conversation


def _turns(record: Mapping[str, Any]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Context messages, the messages after them, and the fields they were read from."""
    given = [name for name in TURNS if _is_set(record.get(name)) or record.get(name) == ""]
    if len(given) > 1:
        raise ValueError(f"ambiguous: the record has {' and '.join(map(repr, given))}; keep one of them")
    for name in () if given else (name for name in TURNS if name in record):
        raise ValueError(f"no messages: {name!r} is {'null' if record[name] is None else 'empty'}")
    if not given:
        names = ", ".join(sorted(record)) or "nothing"
        raise ValueError(f"no messages: expected one of {', '.join(TURNS)}, got {names[:200]}")
    name = given[0]
    if name in ("messages", "conversations"):
        value = record[name]
        if isinstance(value, str):
            value = _from_json(value, name)
        if not isinstance(value, list):
            raise ValueError(f"no messages: expected a list in {name!r}, got {type(value).__name__}")
        return [], value, (name,)
    answers = [key for key in ANSWERS if record.get(key) is not None]
    if len(answers) != 1:
        got = " and ".join(map(repr, answers)) or "none"
        raise ValueError(f"no messages: expected one of {', '.join(ANSWERS)} with {name!r}, got {got}")
    prompt, answer = record[name], record[answers[0]]
    read: tuple[str, ...] = (name, answers[0])
    if name == "instruction" and _is_set(extra := record.get("input")):
        if not isinstance(prompt, str) or not isinstance(extra, str):
            raise ValueError("no messages: expected texts in 'instruction' and 'input'")
        prompt, read = f"{prompt}\n{extra}", (*read, "input")
    return _as_messages(prompt, "user", name), _as_messages(answer, "assistant", answers[0]), read


def _as_messages(value: Any, role: str, name: str) -> list[Any]:
    """A text as a list of one message; a list unchanged."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise ValueError(f"no messages: expected a text or a list of messages in {name!r}, got {type(value).__name__}")


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"bad JSON text: expected a list in {name!r}") from None


def _message(message: Any, i: int, ignored: set[str]) -> tuple[dict[str, Any], float]:
    """The message for the chat template, and its weight in the loss."""
    if not isinstance(message, dict):
        raise ValueError(f"bad message: message {i}: expected an object, got {type(message).__name__}")
    if "role" in message and "from" in message:
        raise ValueError(f"bad message: message {i}: it has 'role' and 'from'; keep one of them")
    given = message.get("role", message.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"bad message: message {i}: expected one of the roles {', '.join(ROLES)}, got {given!r}")
    text_field = "value" if "from" in message and "value" in message else "content"
    if text_field == "value" and _is_set(message.get("content")):
        raise ValueError(f"bad message: message {i}: it has 'value' and 'content'; keep one of them")
    for name in sorted(UNSUPPORTED_OF_MESSAGE.intersection(message)):
        if name != text_field and _is_set(message[name], name):
            raise ValueError(f"unsupported field: message {i}: {name!r}; remove it from the data")
    shown: dict[str, Any] = {"role": role, "content": _content(message.get(text_field), i)}
    if role == "user" and message.get(text_field) is None:
        raise ValueError(f"bad message: message {i}: a user message without {text_field}")
    weight = 1.0
    if not message.keys() <= ROLE_AND_CONTENT:
        _add_template_fields(shown, message, i)
        ignored.update(
            message.keys() - ROLE_AND_CONTENT - UNSUPPORTED_OF_MESSAGE - {*TEMPLATE_FIELDS, *REASONING, *WEIGHTS}
        )
        weight = _weight(message, f"message {i}")
        if role != "assistant" and weight and any(message.get(name) is not None for name in WEIGHTS):
            raise ValueError(
                f"unsupported weight: message {i}: a message of role {role} cannot be in the loss; remove its weight"
            )
    text = shown["content"].replace("<think>", "").replace("</think>", "").strip()
    if role == "assistant" and not text and not {"tool_calls", "reasoning_content"} & shown.keys():
        raise ValueError(f"empty reply: message {i}")
    return shown, weight


def _add_template_fields(shown: dict[str, Any], message: dict[str, Any], i: int) -> None:
    """Copy tool calls, reasoning and other template fields of a message to `shown`."""
    for name in TEMPLATE_FIELDS:
        if _is_set(message.get(name)):
            shown[name] = _tool_calls(message[name], i) if name == "tool_calls" else message[name]
    texts = [value for name in REASONING if _is_set(value := message.get(name))]
    if ("tool_calls" in shown or texts) and shown["role"] != "assistant":
        raise ValueError(f"bad message: message {i}: tool calls or reasoning in a message of role {shown['role']}")
    if texts:
        if not isinstance(texts[0], str) or any(text != texts[0] for text in texts):
            raise ValueError(f"bad reasoning_content: message {i}: expected a single text")
        shown["reasoning_content"] = texts[0]


def _content(value: Any, i: int) -> str:
    """The content as text; a list of text parts is concatenated."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"bad message: message {i}: expected text or a list of text parts, got {type(value).__name__}")
    texts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise ValueError(
                f"unsupported content: message {i}: a part of type {part['type']!r}; only text is trained on"
            )
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"bad message: message {i}: a part without text")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, i: int) -> list[Any]:
    """Tool calls with arguments as objects, which templates expect; the data may have them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"bad message: message {i}: expected a list of objects in tool_calls")
    parsed = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"bad message: message {i}: a tool call without the name of a function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise ValueError(f"bad message: message {i}: arguments of a tool call are not JSON") from None
        function = {**function, "arguments": arguments}
        parsed.append({"type": "function", **call, "function": function} if "function" in call else function)
    return parsed


def _template_kwargs(record: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"bad chat_template_kwargs: expected an object, got {type(kwargs).__name__}")
    for name in kwargs:
        if name in RESERVED:
            raise ValueError(f"bad chat_template_kwargs: {name!r} is reserved; remove it")
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") if tools.strip() else None
    if not tools:
        return dict(kwargs)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("bad tools: expected a list of JSON schemas")
    return {**kwargs, "tools": tools}


def _channel(record: Mapping[str, Any]) -> str | None:
    channel = record.get("channel")
    if channel is None or (isinstance(channel, str) and channel and "," not in channel):
        return channel
    raise ValueError(f"bad channel: expected a name without a comma, got {channel!r}")


def _weight(fields: Mapping[str, Any], where: str) -> float:
    """The weight of a record or message in the loss."""
    given = {name: fields[name] for name in WEIGHTS if fields.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf:
            raise ValueError(
                f"unsupported weight: {where}: {name}: expected a number >= 0, false or true, got {value!r}"
            )
    distinct = {float(value) for value in given.values()}
    factors = distinct - {1.0}  # 1 and true: in the loss
    if len(factors) > 1 or (0.0 in distinct and len(distinct) > 1):
        raise ValueError(f"unsupported weight: {where}: {' and '.join(given)} contradict each other")
    return factors.pop() if factors else 1.0


def _check_order(messages: list[dict[str, Any]]) -> None:
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and all(m["role"] in ("system", "developer") for m in messages[:i]):
            raise ValueError(f"no user message: message {i} is an assistant message without a user message before it")
        if message["role"] == "tool" and not any(m["role"] == "assistant" for m in messages[:i]):
            raise ValueError(f"bad message: message {i}: a tool result before any assistant message")


def _is_set(value: Any, name: str = "") -> bool:
    """Whether a field has another value than an empty default."""
    return value is not None if name in SWITCHES else value not in (None, "", [], {}, False)
