"""examples/word_problems.py: correct replies, disjoint sets, swapped replies."""

import json
import random
import re
import subprocess
import sys

import pytest
from ranks import ROOT
from word_problems import last_number, swap_replies, word_problems


def test_replies_are_correct_and_problems_differ():
    problems = word_problems(random.Random(1), 300)
    assert len({problem.question for problem in problems}) == 300
    for problem in problems:
        owned, count, each = map(int, re.findall(r"\d+", problem.question))
        assert int(problem.answer) == owned + count * each
        assert last_number(problem.reply) == problem.answer
        assert f"{count} * {each} = {count * each}" in problem.reply


def test_held_out_problems_are_not_trained_on():
    rng = random.Random(2)
    held_out = word_problems(rng, 200)
    train = word_problems(rng, 400, without=held_out)
    assert not {p.question for p in held_out} & {p.question for p in train} and len(train) == 400


def test_swap_replies_changes_the_share_and_keeps_the_answers():
    problems = word_problems(random.Random(3), 100)
    swapped = swap_replies(random.Random(4), problems, 0.4)
    moved = [(a, b) for a, b in zip(problems, swapped, strict=True) if a.reply != b.reply]
    assert len(moved) == 40 and all((a.question, a.answer) == (b.question, b.answer) for a, b in moved)
    assert sorted(p.reply for p in problems) == sorted(p.reply for p in swapped)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 38.", "38"),
        ("1,234 apples", "1234"),
        ("3 or -4.5!", "-4.5"),
        ("$45.00", "45"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_command_writes_conversations(tmp_path):
    command = [sys.executable, ROOT / "examples" / "word_problems.py", tmp_path, "--train", "20", "--held-out", "5"]
    subprocess.run(command, check=True)
    sizes = {"train": 20, "held_out": 5}
    for name, size in sizes.items():
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == size
        assert all([m["role"] for m in line["messages"]] == ["system", "user", "assistant"] for line in lines)
