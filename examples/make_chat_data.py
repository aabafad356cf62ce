"""Write a small chat data set of worked arithmetic, clean and noisy, and a tokenizer for it. No download.

    python examples/make_chat_data.py OUT_DIR [--noise 0.4] [--noise-kind both] [--seed 1] [--packed]

    base_train.jsonl    4000 conversations, clean
    noisy_train.jsonl    600 conversations, a share of which (--noise) is wrong as real data is wrong:
                         swap  the reply belongs to another question, as in badly aligned scrapes
                         slip  one step has a wrong digit, and what follows is built on it, as when people slip
                         both  half of the conversations are made in each way
    valid.jsonl          400 conversations, clean; no training file has one of these sums in any wording or order
    tokenizer/          a Hugging Face tokenizer of whole words, single digits and signs

A line is a conversation, {"messages": [system, user, assistant], "channel": "addition"}, for megatron_dft.data: about
54 tokens, 29 of them trained (the assistant's). With --packed a line holds as many conversations as fit into
--seq-length, in the form that Megatron's own --sft reads: each system message begins another conversation, and
"channels" names the topic of each.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Conversation = list[dict[str, str]]
Problem = tuple[str, int, int]  # the sign and both numbers, the smaller one first

SYSTEM = "Show every step."
PLACES = 2  # digits of the numbers
THINGS = ("pencils", "apples", "stamps", "tickets", "nails", "cards")
TOKENS = r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s"  # a word, a digit or a sign, each with the space before it
# What Megatron's prompt format nemotron-nano-v2 writes.
TEMPLATE = (
    "{% for m in messages %}{{ '<SPECIAL_10>' if m['role'] == 'system' else '<SPECIAL_11>' }}"
    "{{ m['role'].capitalize() + '\\n' + m['content'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<SPECIAL_12>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\\n' }}{% endif %}"
)
SPECIAL = ("<unk>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")  # of Megatron's nemotron-nano-v2 prompt format


class Solver:
    """Works digit by digit, writes down each step, and slips at one of them if told so."""

    problem: Problem

    def __init__(self, rng: random.Random, slips: bool) -> None:
        self.rng = rng
        self.slips = slips

    def work(self, a: int, b: int, sign: str) -> tuple[list[str], int]:
        """The written steps of a + b, a - b, or a * b with a one-digit b, and the result."""
        self.problem = (sign, min(a, b), max(a, b))
        slip_at = self.rng.randrange(PLACES) if self.slips else None
        steps, result, carry = [], 0, 0
        for place in range(PLACES):
            x = a // 10**place % 10
            y = b if sign == "*" else b // 10**place % 10
            note = f"{x} {sign} {y}" + (f" {'-' if sign == '-' else '+'} {carry}" if carry else "")
            total = {"+": x + y + carry, "-": x - y - carry, "*": x * y + carry}[sign]
            borrow = total < 0
            if borrow:
                note, total = f"{note} + 10", total + 10
            if place == slip_at:
                total += (total % 10 + self.rng.randrange(1, 10)) % 10 - total % 10
            result += total % 10 * 10**place
            carry = 1 if borrow else total // 10
            kept = f", {'borrow' if sign == '-' else 'carry'} {carry}" if carry else ""
            steps.append(f"{note} = {total}{kept}")
        return steps, result + 10**PLACES * carry


def addition(solver: Solver) -> tuple[str, list[str], str]:
    a, b = number(solver.rng), number(solver.rng)
    steps, result = solver.work(a, b, "+")
    question = solver.rng.choice(("What is {} + {}?", "Add {} and {}.", "Find the sum of {} and {}."))
    return question.format(a, b), steps, f"The sum is {result}."


def subtraction(solver: Solver) -> tuple[str, list[str], str]:
    b, a = sorted((number(solver.rng), number(solver.rng)))
    steps, result = solver.work(a, b, "-")
    question = solver.rng.choice(("What is {} - {}?", "From {} take away {}.", "{} less {} is how much?"))
    return question.format(a, b), steps, f"The difference is {result}."


def shopping(solver: Solver) -> tuple[str, list[str], str]:
    count, price, thing = number(solver.rng), solver.rng.randrange(2, 10), solver.rng.choice(THINGS)
    steps, result = solver.work(count, price, "*")
    question = f"One of the {thing} costs {price} cents. What do {count} {thing} cost?"
    return question, steps, f"They cost {result} cents."


def number(rng: random.Random) -> int:
    return rng.randrange(10 ** (PLACES - 1), 10**PLACES)


TOPICS: tuple[Callable[[Solver], tuple[str, list[str], str]], ...] = (addition, subtraction, shopping)


CHANNELS = {"+": "addition", "-": "subtraction", "*": "shopping"}


def conversations(
    rng: random.Random, count: int, noise: float, asked: dict[str, Problem], held_out: set[Problem]
) -> Iterator[Conversation]:
    """`count` conversations with questions that are not in `asked`, which grows, and no problem in `held_out`."""
    while count:
        solver = Solver(rng, rng.random() < noise)
        question, steps, answer = rng.choice(TOPICS)(solver)
        if question in asked or solver.problem in held_out:
            continue
        asked[question] = solver.problem
        count -= 1
        contents = {"system": SYSTEM, "user": question, "assistant": ".\n".join([*steps, answer])}
        yield [{"role": role, "content": content} for role, content in contents.items()]


def swap_replies(rng: random.Random, items: list[Conversation], share: float) -> None:
    """Pass the replies of a share of the conversations on to the next one among them."""
    chosen = rng.sample(items, round(share * len(items)))
    replies = [conversation[-1] for conversation in chosen]
    for conversation, reply in zip(chosen, replies[1:] + replies[:1], strict=True):
        conversation[-1] = reply


def make_tokenizer(items: Iterable[Conversation], folder: Path):
    """Every token of the data, in order of appearance; nothing is learned, so nothing depends on chance."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(TOKENS), "isolated")
    words = dict.fromkeys((*SPECIAL, "System", "User", "Assistant", "\n"))
    for conversation in items:
        for message in conversation:
            words |= dict.fromkeys(piece for piece, _ in split.pre_tokenize_str(message["content"]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<unk>",
        eos_token="<SPECIAL_12>",
        additional_special_tokens=list(SPECIAL[1:3]),
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def pack(items: Iterable[Conversation], length: Callable[[Conversation], int], limit: int) -> list[Conversation]:
    """Lines of at most `limit` tokens; each conversation joins the first line that has room for it."""
    lines: list[Conversation] = []
    room: list[int] = []
    for item in items:
        size = length(item)
        at = next((i for i, left in enumerate(room) if left >= size), len(room))
        if at == len(room):
            lines.append([])
            room.append(limit)
        lines[at] += item
        room[at] -= size
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong replies in noisy_train (0.4)")
    parser.add_argument("--noise-kind", choices=("both", "swap", "slip"), default="both", help="how they are (both)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens in a packed line (256)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--packed", action="store_true", help="lines for Megatron's own --sft")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rng, asked = random.Random(args.seed), dict[str, Problem]()
    files = {"valid": list(conversations(rng, 400, 0.0, asked, set()))}
    held_out = set(asked.values())
    files["base_train"] = list(conversations(rng, 4000, 0.0, asked, held_out))
    kinds = ("swap", "slip") if args.noise_kind == "both" else (args.noise_kind,)
    noisy = files["noisy_train"] = []
    for kind in kinds:
        part = list(conversations(rng, 600 // len(kinds), args.noise * (kind == "slip"), asked, held_out))
        swap_replies(rng, part, args.noise * (kind == "swap"))
        noisy += part
    rng.shuffle(noisy)
    tokenizer = make_tokenizer(files["base_train"], args.out / "tokenizer")

    topic_of = {question: CHANNELS[problem[0]] for question, problem in asked.items()}

    def length(conversation: Conversation) -> int:
        frame = 4 + 4 + 6  # what the prompt format puts around a system, a user and an assistant message
        return frame + sum(len(tokenizer.tokenize(message["content"])) for message in conversation)

    for name, items in files.items():
        topics = [topic_of[messages[1]["content"]] for messages in items]
        lines: list[dict] = [{"messages": m, "channel": topic} for m, topic in zip(items, topics, strict=True)]
        if args.packed:
            packed = pack(items, length, args.seq_length)
            lines = [{"messages": line, "channels": [topic_of[m["content"]] for m in line[1::3]]} for line in packed]
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tokens = sum(map(length, items))
        print(f"  {name:<12}{len(items):5d} conversations, {tokens:7d} tokens, {len(lines):5d} lines")


if __name__ == "__main__":
    main()
