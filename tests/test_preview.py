"""Previews: trained text is marked, invisible characters are escaped, and text of the data is never markup."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from chat_examples import talk, tokenizer

from megatron_dft.data import __main__ as command
from megatron_dft.data.preview import visible


@pytest.fixture
def folder(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def write(folder, *records):
    (folder / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(folder / "x.jsonl"), "--tokenizer", str(folder / "tokenizer")]


def test_preview_marks_trained_text_and_reports_rejected_records(folder, capsys):
    first = talk("one", "two", "what", "no")
    first[1]["weight"], first[3]["weight"] = 0, 0.5
    argv = write(folder, {"messages": first, "channel": "maths"}, {"messages": []}, {"messages": talk("a", "b")})
    command.main([*argv, "--preview", "2"])
    shown = capsys.readouterr().out
    assert f"--- {folder / 'x.jsonl'}:1: maths, " in shown and " tokens, 3 in the loss\n" in shown
    assert (
        "<|im_start|>assistant\ntwo<|im_end|>\n" in shown and "<|im_start|>assistant\n[no<|im_end|>\n] x 0.5" in shown
    )
    assert f"{folder / 'x.jsonl'}:2: rejected: no messages" in shown and ":3" not in shown


def test_visible_escapes_invisible_characters():
    assert visible("a\tb\u200bc\u202ed\xa0e\ufefff\x1b[31m\n") == "a\\tb\\u200bc\\u202ed\\xa0e\\ufefff\\x1b[31m\n"
    assert visible("naïve 語 😀 ok") == "naïve 語 😀 ok"


def test_preview_html_escapes_all_text_of_data(folder):
    attack = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
    argv = write(folder, {"messages": talk(attack, attack), "channel": attack}, {"messages": 3, attack: 1})
    command.main([*argv, "--preview-html", str(folder / "page.html")])
    page = (folder / "page.html").read_text()
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") == 3
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;" in page and "rejected: no messages" in page
