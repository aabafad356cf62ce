"""conversation_of: supported formats and fields of chat records, and the errors for all others."""

import pytest

from megatron_dft.data.conversations import conversation_of

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TALK = [USER, REPLY]

READ = {
    "messages": {"messages": TALK},
    "messages as JSON text": {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "ShareGPT with role and content": {"conversations": TALK},
    "Alpaca": {"instruction": "a", "input": "", "output": "b"},
    "prompt and completion": {"prompt": "a", "completion": "b"},
    "prompt and response": {"prompt": "a", "response": "b"},
    "messages in prompt and completion": {"prompt": [USER], "completion": [REPLY]},
    "text parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, REPLY]},
    "texts as parts": {"messages": [{"role": "user", "content": ["a"]}, REPLY]},
    "empty fields": {"messages": [{**USER, "images": []}, {**REPLY, "tool_calls": None, "refusal": None}], "tools": []},
    "metadata fields": {"messages": [USER, {**REPLY, "model": "x"}], "id": 7, "source": "web", "score": 0.5},
    "weight of 1": {"messages": [USER, {**REPLY, "weight": 1, "loss": True}], "weight": 1},
}


@pytest.mark.parametrize("name", READ)
def test_conversation_of_reads_format(name):
    conversation = conversation_of(READ[name])
    assert conversation.messages == TALK and conversation.turns == [1] and conversation.kwargs == {}


def test_conversation_of_joins_alpaca_input_to_instruction():
    conversation = conversation_of({"instruction": "Translate", "input": "Haus", "output": "house"})
    assert [message["content"] for message in conversation.messages] == ["Translate\nHaus", "house"]


@pytest.mark.parametrize("turns", ["messages", "prompt", "instruction", "conversations"])
def test_conversation_of_puts_system_field_first(turns):
    record = {
        "messages": {"messages": TALK},
        "prompt": {"prompt": "a", "completion": "b"},
        "instruction": {"instruction": "a", "output": "b"},
        "conversations": {"conversations": TALK},
    }[turns]
    conversation = conversation_of({**record, "system": "Be brief."})
    assert conversation.messages == [{"role": "system", "content": "Be brief."}, *TALK] and conversation.turns == [2]


@pytest.mark.parametrize("field", ["weight", "loss", "train", "training", "trainable", "loss_weight"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_weight_0_removes_turn(field, value):
    conversation = conversation_of({"messages": [USER, {**REPLY, field: value}, USER, REPLY]})
    assert conversation.turns == [3] and conversation.messages == [USER, REPLY, USER, REPLY]
    with pytest.raises(ValueError, match="no weight: every assistant message has weight 0"):
        conversation_of({"messages": TALK, field: value})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_fields_are_passed_to_template(field):
    conversation = conversation_of({"messages": [USER, {**REPLY, field: "hm"}]})
    assert conversation.messages[1] == {**REPLY, "reasoning_content": "hm"}


def test_tools_are_passed_to_template():
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"x": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        REPLY,
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    conversation = conversation_of({"messages": messages, "tools": tools, "chat_template_kwargs": {"x": 1}})
    assert conversation.kwargs == {"x": 1, "tools": tools} and conversation.turns == [1, 3]
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert conversation.messages[2] == messages[2]


def test_prompt_messages_are_context():
    earlier = {"role": "assistant", "content": "earlier"}
    conversation = conversation_of({"prompt": [USER, earlier, USER], "completion": [REPLY, USER, REPLY]})
    assert conversation.messages == [USER, earlier, USER, REPLY, USER, REPLY] and conversation.turns == [3, 5]
    with_system = conversation_of({"system": "x", "prompt": [USER, earlier, USER], "completion": "b"})
    assert with_system.turns == [4]


def test_fields_without_effect_are_listed():
    record = {
        "messages": [{**USER, "date": 1}, {**REPLY, "model": "x", "weight": 1}],
        "id": 7,
        "images": [],
        "tools": [],
    }
    assert conversation_of(record).ignored == {"date", "model", "id"}


@pytest.mark.parametrize("reply", ["", " \n", "<think>\n\n</think>\n\n", "</think>"])
def test_reply_without_text_is_rejected(reply):
    with pytest.raises(ValueError, match="empty reply: message 1"):
        conversation_of({"messages": [USER, {"role": "assistant", "content": reply}]})


REFUSED = {
    "no messages: expected one of": {"text": "a"},
    "no messages: 'messages' is empty": {"messages": []},
    "no messages: 'prompt' is null": {"prompt": None, "completion": "b"},
    "no messages: expected a list in 'messages', got int": {"messages": 3},
    "no messages: expected one of completion, response, output with 'prompt', got none": {"prompt": "a"},
    "got 'completion' and 'response'": {"prompt": "a", "completion": "b", "response": "c"},
    "ambiguous: the record has 'messages' and 'prompt'": {"messages": TALK, "prompt": "x", "completion": "y"},
    "unsupported field: 'input'": {"prompt": "2+2?", "completion": "4", "input": "context"},
    "unsupported field: 'images'": {"messages": TALK, "images": ["x.png"]},
    "unsupported field: 'chosen'": {"prompt": "a", "chosen": "b", "completion": "c"},
    "unsupported field: message 1: 'function_call'": {"messages": [USER, {**REPLY, "function_call": {"name": "f"}}]},
    "unsupported field: message 1: 'prefix'": {"messages": [USER, {**REPLY, "prefix": True}]},
    "unsupported content: message 0: a part of type 'image_url'": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, REPLY]
    },
    "unsupported field: 'label'": {"prompt": "a", "completion": "b", "label": False},
    "bad message: message 1: expected an object, got str": {"system": "x", "messages": ["a"]},
    "two system messages: one in 'system' and another": {"system": "x", "system_prompt": "y", "messages": TALK},
    "two system messages: one in 'system'": {"messages": [{"role": "system", "content": "x"}, *TALK], "system": "y"},
    "bad message: message 0: expected one of the roles": {"messages": [{"role": "narrator", "content": "a"}, REPLY]},
    "bad message: message 0: expected an object, got str": {"messages": ["a"]},
    "bad message: message 0: a user message without content": {"messages": [{"role": "user", "content": None}, REPLY]},
    "bad message: message 0: a user message without value": {
        "messages": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]
    },
    "bad message: message 0: expected text or a list of text parts, got int": {
        "messages": [{"role": "user", "content": 3}, REPLY]
    },
    "bad message: message 0: it has 'role' and 'from'": {"messages": [{**USER, "from": "human"}, REPLY]},
    "bad message: message 0: a tool result before": {"messages": [{"role": "tool", "content": "a"}, *TALK]},
    "bad message: message 1: arguments of a tool call are not JSON": {
        "messages": [USER, {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    },
    "bad message: message 0: tool calls or reasoning in a message of role user": {
        "messages": [{**USER, "thinking": "hm"}, REPLY]
    },
    "no assistant message": {"messages": [USER]},
    "empty reply: message 1": {"messages": [USER, {"role": "assistant", "content": " \n"}]},
    "no user message: message 0": {"messages": [REPLY, USER, REPLY]},
    "bad message: message 0: it has 'value' and 'content'": {
        "messages": [{"from": "human", "value": "a", "content": "b"}, REPLY]
    },
    "no assistant message: nothing after the prompt": {"prompt": [USER, REPLY, USER], "completion": [USER]},
    "unsupported weight: message 0: a message of role user cannot": {"messages": [{**USER, "train": True}, REPLY]},
    **{
        f"unsupported field: message 1: {name!r}": {"messages": [USER, {**REPLY, name: value}]}
        for name, value in {"label": False, "masked": True, "mask": 0, "thoughts": "hm", "cot": "hm"}.items()
    },
    **{
        f"unsupported field: {name!r}": {"messages": TALK, name: value}
        for name, value in {
            "weights": [0],
            "sample_weight": 0,
            "enable_thinking": False,
            "train_on_inputs": True,
        }.items()
    },
    "bad channel: expected a name without a comma, got 'c,d'": {"messages": TALK, "channel": "c,d"},
    "bad channel: expected a name without a comma, got 3": {"messages": TALK, "channel": 3},
    "unsupported weight: message 1: weight: expected a number >= 0, false or true, got -0.5": {
        "messages": [USER, {**REPLY, "weight": -0.5}]
    },
    "unsupported weight: message 1: weight: expected a number >= 0, false or true, got '0'": {
        "messages": [USER, {**REPLY, "weight": "0"}]
    },
    "weight and train contradict each other": {"messages": [USER, {**REPLY, "weight": 0, "train": True}]},
    "bad chat_template_kwargs: 'tools' is reserved": {"messages": TALK, "chat_template_kwargs": {"tools": []}},
    "bad tools: expected a list of JSON schemas": {"messages": TALK, "tools": ["f"]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_conversation_of_rejects_record_with_reason(reason):
    with pytest.raises(ValueError) as refused:
        conversation_of(REFUSED[reason])
    assert reason in str(refused.value)
