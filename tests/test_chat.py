"""Conversations to tokens: which of them train, for templates of every manner."""

import pytest

pytest.importorskip("transformers")

from chat_examples import CHATML, HEADERS, INSTRUCT, MARKED, THINKING, talk, tokenizer

from megatron_dft.chat import ChatFormat, Encoded

TALKS = {
    "one turn": talk("what is one and two", "maybe no"),
    "turns": talk("yes", "yes", "no", "yes", "yes yes", "no"),
    "reply said before": talk("say yes and no", "yes and no", "again", "yes and no"),
    "system": talk("one", "two", system="the sum"),
    "other alphabets": talk("naïve 😀 語", "語 😀 ¿ é", "ß", "ß😀"),
    "line breaks": talk("a\n\nb", "c\n\nd\n", "e", "f"),
    "ends with the user": talk("one", "two", "and"),
    "says what the template says": talk("think", "think", "assistant", "im_end", "user", "think"),
}
CLOSING = {CHATML: "<|im_end|>", MARKED: "<|im_end|>", HEADERS: "<|eot|>", THINKING: "<|im_end|>", INSTRUCT: "</s>"}


def encode(template, messages, form="chat", **special):
    (encoded,) = ChatFormat(tokenizer(template, **special), form).encode([messages])
    return encoded


def trained_texts(encoded, tok):
    return [tok.decode(encoded.ids[first:last]) for first, last in encoded.spans]


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("template", CLOSING, ids=["chatml", "marked", "headers", "thinking", "instruct"])
def test_chat_format_trains_only_on_replies_and_closing_tokens(template, name):
    messages = TALKS[name]
    tok = tokenizer(template)
    (encoded,) = ChatFormat(tok, "chat").encode([messages])
    if template == INSTRUCT and name == "system":
        assert isinstance(encoded, ValueError) and "the chat template refuses it: no system messages" in str(encoded)
        return
    assert encoded.ids == tok.apply_chat_template(messages, tokenize=True, return_dict=False)
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    expected = [(text.strip() if template == HEADERS else text) + CLOSING[template] for text in replies]
    if template == THINKING:
        expected = [text + "<|im_end|>" for text in replies]
        if messages[-1]["role"] == "assistant":
            expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    if template == INSTRUCT:
        expected = [" " + text + "</s>" for text in replies]
    assert trained_texts(encoded, tok) == expected
    assert encoded.trained == sum(target != -100 for target in encoded.targets())
    assert all(target in (-100, token) for target, token in zip(encoded.targets(), encoded.ids, strict=True))


def test_chat_format_supports_template_that_closes_last_reply_only():
    last = "{% if loop.last and m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    tok = tokenizer("{% for m in messages %}{{ m['content'] }}" + last + "{{ '\\n' }}{% endfor %}")
    (encoded,) = ChatFormat(tok, "chat").encode([talk("one", "yes", "two", "yes")])
    assert tok.decode(encoded.ids) == "one\nyes\ntwo\nyes</s>\n"
    assert trained_texts(encoded, tok) == ["yes", "yes</s>"]


def test_chat_format_omits_empty_system_message():
    for template in (CHATML, MARKED, INSTRUCT):
        assert encode(template, talk("one", "two", system="")) == encode(template, talk("one", "two"))
    assert encode(CHATML, talk("one", "two", system=" ")) != encode(CHATML, talk("one", "two"))


def test_encode_rejects_one_conversation_without_affecting_others():
    chat = ChatFormat(tokenizer(INSTRUCT), "chat")
    first, refused, last = chat.encode([TALKS["turns"], TALKS["system"], TALKS["one turn"]])
    assert isinstance(refused, ValueError)
    assert [first, last] == chat.encode([TALKS["turns"], TALKS["one turn"]])


def test_chat_format_trains_on_token_across_turn_boundary():
    """The space before a word is part of its token, wherever the prompt ends."""
    tok = tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}{% if add_generation_prompt "
        "%}{{ 'assistant: ' }}{% endif %}"
    )
    (encoded,) = ChatFormat(tok, "chat").encode([talk("one", "two")])
    assert trained_texts(encoded, tok) == [" two"]


def test_chat_format_rejects_template_that_changes_prompt_or_content():
    counts = "{{ messages | length }}" + CHATML
    assert "message 1: the chat template writes what comes before it differently" in str(encode(counts, talk("a", "b")))
    shouts = CHATML.replace("m['content']", "m['content'] | upper")
    assert "message 1: the chat template does not show its content" in str(encode(shouts, talk("a", "b")))


def test_completion_format_trains_on_end_of_text():
    tok = tokenizer(None)
    encoded = encode(None, talk("one and ", "two"), form="completion")
    assert tok.decode(encoded.ids) == "one and two</s>" and trained_texts(encoded, tok) == [" two</s>"]
    open_end = encode(None, talk("one", "two", "three"), form="completion")
    assert tok.decode(open_end.ids) == "onetwothree" and trained_texts(open_end, tok) == ["two"]


def test_completion_format_adds_bos_once():
    from tokenizers import processors

    tok = tokenizer(None)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    (encoded,) = ChatFormat(tok, "completion").encode([talk("one", "two")])
    assert tok.decode(encoded.ids) == "<s>onetwo</s>" and encoded.ids.count(1) == 1


def test_chat_format_ignores_tokenizer_truncation_and_padding():
    tok = tokenizer()
    expected = encode(CHATML, TALKS["turns"])
    tok.backend_tokenizer.enable_truncation(5)
    tok.backend_tokenizer.enable_padding(length=500)
    assert ChatFormat(tok, "chat").encode([TALKS["turns"]]) == [expected]


def test_pad_id_is_never_target():
    assert ChatFormat(tokenizer(), "chat").pad_id == 0
    as_eos = {"pad_token": "<|im_end|>", "eos_token": "<|im_end|>"}
    assert ChatFormat(tokenizer(CHATML, **as_eos), "chat").pad_id == 1  # <s>
    assert ChatFormat(tokenizer(CHATML, pad_token="</s>"), "chat").pad_id == 1  # what ends a text may end a reply
    with pytest.raises(ValueError, match=r"expected a padding token that is never a target, got '<\|im_end\|>'"):
        _ = ChatFormat(tokenizer(CHATML, **as_eos, bos_token=None), "chat").pad_id


def test_chat_format_rejects_invalid_format_template_or_tokenizer():
    with pytest.raises(ValueError, match="format: expected one of chat, completion, got 'alpaca'"):
        ChatFormat(tokenizer(), "alpaca")
    with pytest.raises(ValueError, match="expected a chat template, got none"):
        ChatFormat(tokenizer(None), "chat")
    with pytest.raises(ValueError, match=r"expected a fast one, .* got object"):
        ChatFormat(object(), "chat")


def test_conversation_without_reply_has_no_trained_tokens():
    assert encode(CHATML, talk("one")).trained == 0
    assert Encoded([1, 2, 3], []).targets() == [-100] * 3
