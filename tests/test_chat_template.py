"""ChatTemplate: the text that each assistant turn generates, compared with the training templates of TRL.

A template with the suffix _training marks the generated text with {% generation %}.
"""

import contextlib
import copy
import re
from collections import Counter

import pytest

pytest.importorskip("transformers")

import chat_templates
import jinja2
from chat_examples import CHATML, MARKED, talk
from chat_examples import tokenizer as small_tokenizer
from chat_templates import (
    LONG_ROLES,
    SPECIAL,
    assistants,
    conversations,
    expected_mask,
    families,
    header_length,
    mask_of,
    originals,
    read_marks,
    text_of,
    trl_templates,
)

from megatron_dft.data import template as template_module
from megatron_dft.data.conversations import conversation_of
from megatron_dft.data.template import ChatTemplate

COUNT, NIGHTLY = 150, 2000  # conversations per family, by default and in the nightly tests
# Reason of a rejection -> text of the message. `check_refusal` verifies each reason without ChatTemplate.
REASONS = {
    "template": "the chat template raised ",
    "reply": "the chat template changes or drops a part of this reply",
    "context": "the chat template does not begin this reply with its generation prompt",
}
# Number of rejected conversations by reason, among COUNT and among NIGHTLY. All others are compared.
REFUSED = {
    "cohere": {"template": (33, 514)},  # two assistant turns or two user turns in a row
    "cohere2": {"template": (33, 514)},
    "deepseek_r1_distill": {"reply": (41, 467)},
    "deepseekv3": {"reply": (41, 467)},
    "diffusion_gemma": {"context": (25, 353), "reply": (1, 3)},  # joins two assistant turns in a row; drops <channel|>
    "gemma": {"template": (69, 995)},  # as cohere, and system messages
    "gemma3": {"template": (33, 514)},
    "qwen3": {"context": (24, 305), "reply": (10, 98)},  # thoughts in the last of two turns; drops second thoughts
    "qwen3_5_nothink": {"template": (2, 41), "reply": (12, 106)},  # no user query; drops second thoughts
    "qwen3_5_think": {"template": (2, 41), "reply": (12, 106)},
    "qwen3_6": {"template": (2, 41), "reply": (12, 106)},
    "qwen3_8": {"template": (1, 15)},
}
# Number of conversations whose turns the training template renders differently, among COUNT and among NIGHTLY: Qwen3
# renders no thoughts if all user messages are tool responses.
DIFFERENT = {"qwen3": (2, 28), "qwen3_8": (1, 26)}
# Text after the closing token that the original template assigns to the turn and TRL does not mark.
BEHIND_CLOSING = {"llava_next": " "}
# Chat templates without text after a reply.
WITHOUT_CLOSING = {"glm4moe"}

pytestmark = pytest.mark.skipif(not families(), reason="needs the templates of TRL")
per_family = pytest.mark.parametrize("family", [f for f in families() if f not in WITHOUT_CLOSING])


def chat_template(name):
    return ChatTemplate(chat_templates.tokenizer(), trl_templates()[name])


def generated(samples):
    """Texts of the spans."""
    return [sample.text[begin:end] for sample in samples for begin, end in sample.spans]


def contexts(samples):
    """Index, context and generated text of each turn."""
    spans = [(i, s.text, *span) for s in samples for i, span in zip(s.turns, s.spans, strict=True)]
    return [(i, text[:begin], text[begin:end]) for i, text, begin, end in spans]


# -- compared with TRL


def is_refused_by_template(source, messages):
    """Whether the template raises for the conversation, or for a prefix that a turn is generated from."""
    beginnings = [(messages, False)]
    for i in assistants(messages):
        beginnings += [(messages[:i], True), (messages[: i + 1], False)]
    for beginning, prompt in beginnings:
        try:
            read_marks(source, beginning, prompt)
        except jinja2.TemplateError:
            return True
    return False


def without_layout(text):
    return re.sub(r"\s+|</?think>", "", text)


def check_refusal(family, messages, message):
    """Verify the reason that a message states; returns its key in REASONS."""
    source = trl_templates()[family]
    (reason,) = [name for name, pattern in REASONS.items() if pattern in message]
    if reason == "template":
        assert is_refused_by_template(source, messages), message
        return reason
    i = int(re.match(r"message (\d+): ", message).group(1))
    before, text = messages[:i], text_of(source, messages[: i + 1])
    if reason == "reply":
        history = text_of(source, before)
        same = next((k for k, (a, b) in enumerate(zip(text, history, strict=False)) if a != b), len(history))
        cleans = (without_layout, lambda part: without_layout(SPECIAL.sub("", part)))
        assert any(clean(messages[i]["content"]) not in clean(text[same:]) for clean in cleans), message
        return reason
    # The first of two consecutive assistant turns is rendered differently if the second follows.
    assert messages[i - 1]["role"] == "assistant", message
    assert not text.startswith(text_of(source, before, True))
    return reason


def outcome_of(template, family, messages):
    """Returns "same", "different" or the reason of a rejection. Fails if the trained characters are not as expected."""
    try:
        samples = template.render(messages, assistants(messages))
    except ValueError as error:
        return check_refusal(family, messages, str(error))
    assert [i for sample in samples for i in sample.turns] == assistants(messages)
    outcome = "same"
    for sample in samples:
        expected = expected_mask(family, messages, sample)
        if expected is None:
            outcome = "different"
            continue
        blank = BEHIND_CLOSING.get(family, "")
        for end in [run.end() for run in re.finditer(b"\1+", expected)]:
            if sample.text.startswith(blank, end):
                expected[end : end + len(blank)] = b"\1" * len(blank)
        assert mask_of(sample) == expected, (messages, generated([sample]))
    return outcome


def compare(family, count, column):
    template = chat_template(family)
    outcomes = Counter(outcome_of(template, family, messages) for messages in conversations(count))
    refused = {reason: counts[column] for reason, counts in REFUSED.get(family, {}).items()}
    different = DIFFERENT.get(family, (0, 0))[column]
    print(family, dict(outcomes))
    same = count - sum(refused.values()) - different
    assert outcomes == Counter({"same": same, "different": different, **refused})


@per_family
def test_chat_template_matches_trl_training_template(family):
    """See `expected_mask` for the characters that TRL marks and the generation prompt contains."""
    compare(family, COUNT, 0)


@pytest.mark.nightly
@per_family
def test_chat_template_matches_trl_training_template_in_2000_conversations(family):
    compare(family, NIGHTLY, 1)


def test_chat_template_requires_closing_token_or_marks():
    """The message names the training template of TRL."""
    for name in originals():
        if name not in WITHOUT_CLOSING:
            chat_template(name)
            continue
        with pytest.raises(ValueError, match=r"writes nothing after a reply.*--chat-template FILE") as error:
            chat_template(name)
        assert f"chat_templates/{name}_training.jinja of TRL" in str(error.value)


@pytest.mark.parametrize("count", [40, pytest.param(NIGHTLY, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", [name for name, source in trl_templates().items() if "endgeneration" in source])
def test_chat_template_uses_marks_of_template(name, count):
    """With all turns, the spans are the marks. Without the first turn, they begin at the header of the second turn."""
    source = trl_templates()[name]
    template = chat_template(name)
    compared = removed = 0
    for messages in conversations(count):
        turns = assistants(messages)
        wanted = [turns, turns[1:]] if len(turns) > 1 else [turns]
        for trained in wanted:
            try:
                samples = template.render(messages, trained)
            except ValueError as error:
                if "its marks cannot be assigned to turns" in str(error):
                    text = text_of(source, messages)
                    assert any(not text.startswith(text_of(source, messages[:i])) for i in turns)
                else:
                    check_refusal(name, messages, str(error))
                continue
            text, mask = read_marks(source, messages)
            if len(samples) == 1 and samples[0].text == text:
                (sample,) = samples
                begin = 0
                if trained != turns:
                    before = messages[: turns[1]]
                    prompt = text_of(source, before, True)
                    begin = len(prompt) - header_length(source, before, prompt)
                assert mask_of(sample) == bytes(begin) + mask[begin:], (messages, generated([sample]))
                compared += trained == turns
                removed += trained != turns
                continue
            assert any("</think>" in messages[i]["content"] for i in trained), messages
            for sample, i in zip(samples, trained, strict=True):  # thoughts of earlier turns are dropped
                text, mask = read_marks(source, messages[: i + 1])
                before = messages[:i]
                prompt = text_of(source, before, True)
                begin = len(prompt) - header_length(source, before, prompt)
                assert sample.text == text and mask_of(sample) == bytes(begin) + mask[begin:]
    assert compared > count / 3 and removed > count / 5


@pytest.mark.parametrize("count", [40, pytest.param(NIGHTLY, marks=pytest.mark.nightly)])
@per_family
def test_chat_template_removes_turn_of_weight_zero(family, count):
    """Without the first turn, the other turns keep their contexts."""
    template = chat_template(family)
    removed = 0
    for messages in conversations(count):
        turns = assistants(messages)
        if len(turns) < 2:
            continue
        try:
            samples = template.render(messages, turns)
        except ValueError:
            continue
        assert contexts(template.render(messages, turns[1:])) == contexts(samples)[1:], messages
        removed += 1
    assert removed > count / 5


# -- _like_others, which reuses the analysis of conversations with the same roles


@pytest.mark.parametrize("count", [40, pytest.param(NIGHTLY, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", [name for name in originals() if name not in WITHOUT_CLOSING])
def test_like_others_equals_exact(name, count):
    template = chat_template(name)
    several = [*conversations(count), *conversations(max(4, count // 40), 1, LONG_ROLES, thoughts=0.02)]
    compared = 0
    for messages in several:
        turns = assistants(messages)
        try:
            samples = template._like_others(messages, turns, {})
        except ValueError:
            assert is_refused_by_template(template.source, messages)
            continue
        if samples is None:
            continue
        try:
            exact = template._exact(messages, turns, {})
        except ValueError:
            # The template rejects a prefix of the conversation that `_like_others` does not render.
            assert is_refused_by_template(template.source, messages), (messages, generated(samples))
            continue
        assert samples == exact, messages
        compared += 1
    assert compared > count / 4


@pytest.mark.parametrize("reply", ["<think>never ended", "<think>\nnever ended", "<", "<b>"])
@pytest.mark.parametrize("name", ["deepseekv3", "nemotron_3_nano", "qwen3_5_think"])
def test_like_others_equals_exact_if_reply_begins_like_end_of_generation_prompt(name, reply):
    # The generation prompt of deepseekv3 ends with "<think>\n". Its template does not render this text in replies.
    template = chat_template(name)
    messages = talk("one", reply, "two", reply)
    samples = template._like_others(messages, [1, 3], {})
    assert samples in (None, template._exact(messages, [1, 3], {}))
    for sample in template.render(messages, [1, 3]):
        assert mask_of(sample) == expected_mask(name, messages, sample)


@pytest.fixture
def rendered(monkeypatch):
    """Number of messages in each rendering."""
    counts = []
    tokenizer = chat_templates.tokenizer()
    render = tokenizer.apply_chat_template

    def counting(messages, **options):
        counts.append(len(messages))
        return render(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    return counts


@pytest.mark.parametrize("name", ["gptoss", "lfm2_2_5", "llama3", "llava_next", "nemotron_3_nano", "phi3", "qwen2_5"])
def test_chat_template_renders_long_conversation_in_linear_time(name, rendered, monkeypatch):
    template = chat_template(name)
    monkeypatch.setattr(template, "_compiled", None)  # every rendering goes through apply_chat_template
    costs = []
    for count in (200, 800):
        rendered.clear()
        messages = talk(*(f"text {i}" for i in range(count)))
        (sample,) = template.render(messages, assistants(messages))
        assert len(sample.spans) == count // 2
        costs.append(sum(rendered))
    assert 0 < costs[1] <= 4 * costs[0]
    rendered.clear()
    template.render(messages, assistants(messages))
    assert len(rendered) == (2 if template.marked else 1)  # conversations with these roles are analyzed once


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_chat_template_with_sequence_per_turn_renders_in_linear_calls(name, rendered):
    template = chat_template(name)
    calls = []
    for count in (50, 200):
        rendered.clear()
        messages = talk(*(f"text {i}" for i in range(count)))
        assert len(template.render(messages, assistants(messages))) == count // 2
        calls.append(len(rendered))
    assert 0 < calls[1] <= 4 * calls[0]


# -- thoughts


@pytest.mark.parametrize(
    "reply", ["<think>\n\n</think>\n\n4", "<think></think>4", "</think>4", "\n<think>\n\n</think>\n\n4"]
)
@pytest.mark.parametrize("name", ["deepseekv3", "lfm2_v2", "nemotron_3_nano", "qwen3", "qwen3_5_nothink"])
def test_chat_template_accepts_empty_thoughts(name, reply):
    # Data for the non-thinking mode of Qwen3 has <think>\n\n</think>\n\n in every reply.
    messages = talk("2 + 2?", reply)
    (sample,) = chat_template(name).render(messages, [1])
    assert mask_of(sample) == expected_mask(name, messages, sample)


# Generated text of each turn, for the replies "<think>\nadd\n</think>\n\n4" and "<think>\n5\n</think>\n\n9".
WITH_THOUGHTS = {
    "gptoss": ["<|channel|>final<|message|><think>\nadd\n</think>\n\n4<|end|>"],
    "llama3": ["<think>\nadd\n</think>\n\n4<|eot_id|>"],
    "nemotron_3_nano": ["add\n</think>\n\n4<|im_end|>\n"],
    "qwen2_5": ["<think>\nadd\n</think>\n\n4<|im_end|>\n"],
    "qwen3": ["<think>\nadd\n</think>\n\n4<|im_end|>\n"],
    "qwen3_5_think": ["add\n</think>\n\n4<|im_end|>\n"],
}


@pytest.mark.parametrize("name", WITH_THOUGHTS)
def test_chat_template_trains_thoughts_of_every_turn(name):
    messages = talk("2 + 2?", "<think>\nadd\n</think>\n\n4", "+ 5?", "<think>\nadd\n</think>\n\n4")
    samples = chat_template(name).render(messages, [1, 3])
    texts = [text.replace("<|return|>", "<|end|>") for text in generated(samples)]
    assert texts == WITH_THOUGHTS[name] * 2
    rewrites = name in ("nemotron_3_nano", "qwen3", "qwen3_5_think")  # earlier turns are rewritten
    assert len(samples) == (2 if rewrites else 1)


def test_chat_template_rejects_dropped_thoughts():
    messages = talk("2 + 2?", "4", "+ 1?", "<think>\nadd\n</think>\n\n5")
    with pytest.raises(ValueError, match=r"^message 3: the chat template changes or drops a part of this reply"):
        chat_template("deepseekv3").render(messages, [1, 3])


# -- fields


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Name."}}},
    },
}


def call(city, **fields):
    function = {"name": "get_weather", "arguments": {"city": city}}
    calls = [{"type": "function", "id": "call12345", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls, **fields}


def result(text):
    return {"role": "tool", "content": text, "tool_call_id": "call12345", "name": "get_weather"}


def dialog(*pairs):
    """Messages of a conversation; strings are user messages."""
    return [{"role": "user", "content": m} if isinstance(m, str) else m for m in pairs]


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


WITH_TOOLS = {
    "messages": dialog("Weather in Bern?", call("Bern"), result("hot 17"), assistant("It is 17 degrees."))
    + dialog("In Rome?", call("Rome"), result("hot 18"), assistant("18")),
    "tools": [TOOL],
}
WITH_REASONING = {
    "messages": dialog(
        "2 + 2?", assistant("4", reasoning_content="add"), "+ 1?", assistant("5", reasoning_content="a 😀\n\nb")
    )
}
ALTERNATE = "Conversation roles must alternate"
NO_TOOLS = "^tools: the chat template omits them$"
# Error messages of families that reject WITH_TOOLS. The others train the calls and the replies.
TOOLS_REFUSED = {
    **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma3"), ALTERNATE),
    **dict.fromkeys(("deepseek_r1_distill", "idefics3", "llama3", "qwen2_5_vl", "smolvlm"), NO_TOOLS),
    "deepseekv3": "TypeError: can only concatenate str",  # requires arguments as JSON text
    "lfm2": "^message 1: the chat template omits tool_calls$",
    "llava_next": "Only user and assistant roles are supported",
    **dict.fromkeys(("phi3", "phi3_5"), "^message 2: the chat template omits a message of role tool here$"),
}
CLOSES_CALLS = {"diffusion_gemma": "<|tool_response>"}  # TRL does not mark the end of a call
READS_REASONING = {
    *("diffusion_gemma", "gptoss", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super"),
    *("nemotron_3_ultra", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"),
}


def render_record(template, record):
    conversation = conversation_of(record)
    return conversation, template.render(conversation.messages, conversation.turns, **conversation.kwargs)


@per_family
def test_chat_template_with_tools_matches_trl_training_template(family):
    template = chat_template(family)
    if family in TOOLS_REFUSED:
        with pytest.raises(ValueError, match=TOOLS_REFUSED[family]):
            render_record(template, WITH_TOOLS)
        return
    conversation, samples = render_record(template, WITH_TOOLS)
    assert [i for sample in samples for i in sample.turns] == [1, 3, 5, 7]
    for sample in samples:
        mask, marked = mask_of(sample), expected_mask(family, conversation.messages, sample, **conversation.kwargs)
        assert all(mask[i] for i in range(len(mask)) if marked[i])
        more = "".join(character for i, character in enumerate(sample.text) if mask[i] and not marked[i])
        assert more == CLOSES_CALLS.get(family, "") * 2
    texts = generated(samples)
    assert not any("hot" in text or "?" in text for text in texts)
    assert ["Bern" in texts[0], "17" in texts[1], "Rome" in texts[2], "18" in texts[3]] == [True] * 4


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "lfm2_2_5", "gemma4", "gemma4_v5"])
def test_chat_template_with_tools_trains_calls_and_replies(name):
    """Templates without a training variant in TRL."""
    call_of, closing = {
        "llama3_1": ('{"name": "get_weather", "parameters": {"city": "%s"}}<|eot_id|>', "<|eot_id|>"),
        "lfm2_2_5": ("<|tool_call_start|>[get_weather(city='%s')]<|tool_call_end|><|im_end|>\n", "<|im_end|>\n"),
        "gemma4": ('<|tool_call>call:get_weather{city:<|"|>%s<|"|>}<tool_call|><|tool_response>', "<turn|>\n"),
    }[{"llama3_2": "llama3_1", "gemma4_v5": "gemma4"}.get(name, name)]
    _, (sample,) = render_record(chat_template(name), WITH_TOOLS)
    replies = [f"It is 17 degrees.{closing}", f"18{closing}"]
    assert generated([sample]) == [call_of % "Bern", replies[0], call_of % "Rome", replies[1]]


@per_family
def test_chat_template_with_reasoning_matches_trl_training_template(family):
    template = chat_template(family)
    if family not in READS_REASONING:
        with pytest.raises(ValueError, match=r"^message 1: the chat template omits reasoning_content$"):
            render_record(template, WITH_REASONING)
        return
    conversation, samples = render_record(template, WITH_REASONING)
    assert [i for sample in samples for i in sample.turns] == [1, 3]
    for sample in samples:
        assert mask_of(sample) == expected_mask(family, conversation.messages, sample)
    texts = generated(samples)
    assert "add" in texts[0] and "a 😀\n\nb" in texts[1]


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("llama3", WITH_REASONING, "^message 1: the chat template omits reasoning_content$"),
        (
            "phi3",
            {"messages": dialog("Weather?", call("Bern"))},
            "^message 1: the chat template omits tool_calls$",
        ),
        ("phi3", {**WITH_TOOLS, "messages": dialog("Hi", assistant("yo"))}, NO_TOOLS),
        (
            "phi3",
            {"messages": dialog("Hi", assistant("yo"), result("17"), assistant("17"))},
            "^message 2: .* of role tool here$",
        ),
        (
            "llama3_1",
            {"messages": dialog("Weather?", call("Bern", content="I look."))},
            "^message 1: .* of role assistant here$",
        ),
        (
            "phi3",
            {"messages": dialog("Hi", assistant("yo"), {"role": "tool", "content": "17"}, assistant("17"))},
            r"^message 2: .* of role tool here$",
        ),
        (
            "qwen3",
            {"messages": dialog("Hi", assistant("yo")), "chat_template_kwargs": {"enable_thinkin_g": False}},
            "^chat_template_kwargs: the chat template has no variable 'enable_thinkin_g'$",
        ),
    ],
    ids=["reasoning_content", "tool_calls", "tools", "role", "content", "role without fields", "variable"],
)
def test_chat_template_rejects_fields_that_it_does_not_render(name, record, message):
    with pytest.raises(ValueError, match=message):
        render_record(chat_template(name), record)


def test_chat_template_kwargs_change_rendered_text():
    record = {"messages": dialog("2 + 2?", assistant("4"), "+ 1?", assistant("5"))}
    template = chat_template("nemotron_3_nano")
    (with_thoughts,) = render_record(template, record)[1]
    record["chat_template_kwargs"] = {"enable_thinking": False}
    (without,) = render_record(template, record)[1]
    assert generated([with_thoughts]) == ["</think>4<|im_end|>\n", "</think>5<|im_end|>\n"]
    assert generated([without]) == ["4<|im_end|>\n", "5<|im_end|>\n"]
    fixed = ChatTemplate(chat_templates.tokenizer(), template.source, {"enable_thinking": False})
    del record["chat_template_kwargs"]
    assert render_record(fixed, record)[1] == [without]


# -- marks

TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}REPLY{% else %}<turn>{{ m.content }}</turn>{% endif %}"
    "{% endfor %}"
)


def turns_with(reply):
    return TURNS.replace("REPLY", reply)


MARKS = {
    "as usual": (MARKED, ["yo<|im_end|>", "no <|im_end|>"]),
    "whitespace control": (
        turns_with(" {%- generation -%} {{ m.content }}</s> {%- endgeneration -%} \n"),
        ["yo</s>", "no </s>"],
    ),
    "plus sign": (
        turns_with("\n  {%+ generation +%}\n{{ m.content }}</s>{% endgeneration %}"),
        ["\nyo</s>", "\nno </s>"],
    ),
    "line breaks": (turns_with("{%\ngeneration\n%}{{ m.content }}</s>{%\n endgeneration %}"), ["yo</s>", "no </s>"]),
    "no blanks": (turns_with("{%generation%}{{ m.content }}</s>{%endgeneration%}"), ["yo</s>", "no </s>"]),
    "trimmed block": (
        turns_with("{% generation %}\n{{ m.content }}</s>\n{% endgeneration %}\n"),
        ["yo</s>\n", "no </s>\n"],
    ),
    "macro": (
        "{% macro reply(m) %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endmacro %}"
        + turns_with("{{ reply(m) }}"),
        ["yo</s>", "no </s>"],
    ),
    "several spans": (
        turns_with("{% generation %}{{ m.content }}{% endgeneration %} :: {% generation %}</s>{% endgeneration %}"),
        ["yo", "</s>", "no ", "</s>"],
    ),
    "within a span": (
        turns_with("{% generation %}{{ m.content }}{% generation %}</s>{% endgeneration %}!{% endgeneration %}"),
        ["yo</s>!", "no </s>!"],
    ),
    "variable": (
        turns_with("{% set x %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endset %}{{ x }}"),
        ["yo</s>", "no </s>"],
    ),
    "loop variable": (
        turns_with("{% generation %}{{ m.content }}{{ '</s>' if loop.last else '<|eot|>' }}{% endgeneration %}"),
        ["yo<|eot|>", "no </s>"],
    ),
    "empty span": (
        turns_with("{% generation %}{% endgeneration %}{% generation %}{{ m.content }}</s>{% endgeneration %}"),
        ["yo</s>", "no </s>"],
    ),
    "line break before": (
        "\n" + turns_with("{% generation %}{{ m.content }}</s>{% endgeneration %}"),
        ["yo</s>", "no </s>"],
    ),
    # lstrip_blocks removes the indentation only if the block begins its line.
    "indentation before": (
        "  " + turns_with("{% generation %}{{ m.content }}</s>{% endgeneration %}"),
        ["yo</s>", "no </s>"],
    ),
    "comment": ("{# has no {% generation %} #}" + CHATML, ["yo<|im_end|>\n", "no <|im_end|>\n"]),
}


@pytest.mark.parametrize("name", MARKS)
def test_chat_template_reads_marks(name):
    source, expected = MARKS[name]
    tokenizer = small_tokenizer()
    messages = talk("hi", "yo", "and", "no ")
    (sample,) = ChatTemplate(tokenizer, source).render(messages, [1, 3])
    assert sample.text == tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert generated([sample]) == expected
    if not source.endswith(CHATML):
        text, mask = read_marks(source, messages)
        assert (sample.text, mask_of(sample)) == (text, mask)


def test_chat_template_reads_mark_at_end_of_text():
    source = MARKS["within a span"][0]
    (sample,) = ChatTemplate(small_tokenizer(), source).render(talk("hi", "yo"), [1])
    assert sample.spans == ((len("<turn>hi</turn>"), len(sample.text)),)


@pytest.mark.parametrize("name", ["as usual", "macro", "several spans", "within a span", "loop variable", "variable"])
def test_chat_template_removes_marks_of_turn_of_weight_zero(name):
    source, expected = MARKS[name]
    template = ChatTemplate(small_tokenizer(), source)
    messages = talk("hi", "yo", "and", "no ")
    half = len(expected) // 2
    (every,) = template.render(messages, [1, 3])
    for turns, texts in (([1], expected[:half]), ([3], expected[half:])):
        (sample,) = template.render(messages, turns)
        assert (sample.text, generated([sample])) == (every.text, texts)
        assert set(sample.turns) == set(turns) and set(sample.spans) < set(every.spans)


@pytest.mark.parametrize(
    "reply",
    [
        "{% filter trim %}{% generation %} {{ m.content }}</s> {% endgeneration %}{% endfilter %}",
        "{% set x %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endset %}{{ x[:-3] }}",
        "{% set x %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endset %}{{ x | length }}{{ m.content }}",
    ],
    ids=["trim", "slice", "length"],
)
def test_chat_template_rejects_marked_text_that_is_changed(reply):
    with pytest.raises(ValueError, match=r"^the chat template changes text after marking it with {% generation %}$"):
        ChatTemplate(small_tokenizer(), turns_with(reply)).render(talk("hi", "yo"), [1])


def test_chat_template_requires_mark_of_closing_token():
    reply = "{% generation %}{{ m.content }}{% endgeneration %}</s>"
    with pytest.raises(ValueError, match=r"^the chat template does not mark '</s>', which ends a reply"):
        ChatTemplate(small_tokenizer(), turns_with(reply))


@pytest.mark.parametrize(
    "change",
    ["[:4]", "|truncate(6)", "|replace('e', '3')", "|e", "|title", ".split('</think>')[-1]"],
)
def test_chat_template_rejects_replies_that_it_changes(change):
    source = CHATML.replace("m['content']", f"(m['content']{change})")
    with pytest.raises(ValueError):
        ChatTemplate(small_tokenizer(), source).render(talk("a", "The <em>answer</em>: first. </think> second"), [1])


def test_chat_template_rejects_conversation_without_marked_text():
    source = turns_with("{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ m.content }}</s>")
    with pytest.raises(ValueError, match=r"^the chat template marks nothing with {% generation %}$"):
        ChatTemplate(small_tokenizer(), source).render(talk("hi", "yo"), [1])


@pytest.mark.parametrize("character", ["\ufdd0", "\ufdd1"])
def test_chat_template_rejects_noncharacters_with_marks(character):
    template = ChatTemplate(small_tokenizer(), MARKED)
    with pytest.raises(ValueError, match=r"^a message contains the noncharacter U\+FDD0 or U\+FDD1"):
        template.render(talk(f"hi {character}", "yo"), [1])


# -- the sandbox


COMMANDS = {
    "cycler": "cycler.__init__.__globals__.os",
    "joiner": "joiner.__init__.__globals__.os",
    "namespace": "namespace.__init__.__globals__.os",
    "lipsum": "lipsum.__globals__['os']",
    "attr": "(lipsum | attr('__globals__')).os",
    "self": "self._TemplateReference__context.parent.cycler.__init__.__globals__.os",
    "builtins": "lipsum.__globals__.__builtins__.__import__('os')",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_chat_template_executes_no_command(name, tmp_path):
    expression = "{{ " + COMMANDS[name] + ".system('touch %s') }}"
    outside, inside, later = (tmp_path / n for n in ("outside", "inside", "later"))
    jinja2.Environment().from_string(expression % outside).render()
    assert outside.exists()  # the command works outside the sandbox
    with pytest.raises(ValueError, match=r"^the chat template raised "):
        ChatTemplate(small_tokenizer(), expression % inside + CHATML)
    template = ChatTemplate(
        small_tokenizer(), "{% if messages | length > 2 %}" + expression % later + "{% endif %}" + CHATML
    )
    assert template.render(talk("hi", "yo"), [1])
    with pytest.raises(ValueError, match=r"^the chat template raised "):
        template.render(talk("hi", "yo", "and", "no"), [1, 3])
    assert not inside.exists() and not later.exists()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ dict.__subclasses__() }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ messages.append({'role': 'user', 'content': ''}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ unknown() }}",
        "{{ messages | unknown }}",
        "{{ range(1000000000) | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ raise_exception('no') }}",
        "{% if messages %}",
    ],
)
def test_chat_template_rejects_unsafe_or_broken_template(source):
    with pytest.raises(ValueError, match=r"^the chat template raised "):
        ChatTemplate(small_tokenizer(), source + CHATML)


@pytest.mark.parametrize(
    "expression",
    ["'' | attr('__class__')", "raise_exception.__globals__", "self._TemplateReference__context", "[].__add__"],
)
def test_chat_template_renders_unsafe_attributes_as_empty(expression):
    messages = talk("hi", "yo")
    (sample,) = ChatTemplate(small_tokenizer(), "{{ " + expression + " }}" + CHATML).render(messages, [1])
    assert [sample] == ChatTemplate(small_tokenizer(), CHATML).render(messages, [1])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=100000) }}",
    ],
    ids=["loops", "lipsum"],
)
def test_chat_template_stops_after_time_limit(source, monkeypatch):
    monkeypatch.setattr(template_module, "TIME_LIMIT", 0.5)
    with pytest.raises(ValueError, match=r"^the chat template did not end within "):
        ChatTemplate(small_tokenizer(), source + CHATML)
    template = ChatTemplate(small_tokenizer(), "{% if messages | length > 2 %}" + source + "{% endif %}" + CHATML)
    with pytest.raises(ValueError, match=r"^the chat template did not end within "):
        template.render(talk("hi", "yo", "and", "no"), [1, 3])
    assert template.render(talk("hi", "yo"), [1])  # each conversation has its own time limit


@per_family
def test_chat_template_leaves_messages_unchanged(family):
    template = chat_template(family)
    for messages in conversations(5, seed=3):
        before = copy.deepcopy(messages)
        with contextlib.suppress(ValueError):
            template.render(messages, assistants(messages))
        assert messages == before
