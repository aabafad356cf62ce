"""Write a small chat data set of worked arithmetic, clean and noisy, and its tokenizer. Downloads nothing.

    python examples/make_chat_data.py OUT_DIR [--noise 0.4] [--noise-kind both] [--seed 1] [--packed]

    base_train.jsonl    4000 conversations, clean
    noisy_train.jsonl    600 conversations; a share of them (--noise) has wrong replies of a kind (--noise-kind):
                         swap  the reply belongs to another question, as in misaligned scraped data
                         slip  one step has a wrong digit and later steps build on it, as in human errors
                         both  half of the conversations are of each kind
    valid.jsonl          400 conversations, clean; no training file contains one of its problems in any wording or order
    tokenizer/          a Hugging Face tokenizer of whole words, single digits and signs

A line is one conversation for megatron_dft.data: {"messages": [system, user, assistant], "channel": "addition"}. It has
about 54 tokens; the 29 of the assistant are trained on. With --packed, a line has as many conversations as fit into
--seq-length, in the format of Megatron's own --sft: each system message starts a new conversation, and "channels" lists
their topics.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Conversation = list[dict[str, str]]
Problem = tuple[str, int, int]  # operator and both operands, the smaller one first

SYSTEM = "Show every step."
PLACES = 2  # digits of an operand
THINGS = ("pencils", "apples", "stamps", "tickets", "nails", "cards")
TOKENS = r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s"  # a word, a digit or a sign, with its leading space
# The chat template of Megatron's prompt format nemotron-nano-v2.
TEMPLATE = (
    "{% for m in messages %}{{ '<SPECIAL_10>' if m['role'] == 'system' else '<SPECIAL_11>' }}"
    "{{ m['role'].capitalize() + '\\n' + m['content'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<SPECIAL_12>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\\n' }}{% endif %}"
)
SPECIAL = ("<unk>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")  # of Megatron's nemotron-nano-v2 prompt format


class Solver:
    """Solves a problem digit by digit and writes each step; with `slips`, one step has a wrong digit."""

    problem: Problem

    def __init__(self, rng: random.Random, slips: bool) -> None:
        self.rng = rng
        self.slips = slips

    def work(self, a: int, b: int, sign: str) -> tuple[list[str], int]:
        """Steps and result of a + b, a - b, or a * b with a one-digit b."""
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
    rng: random.Random, count: int, noise: float, used: dict[str, Problem], held_out: set[Problem]
) -> Iterator[Conversation]:
    """Yield `count` conversations without questions in `used` and problems in `held_out`; add them to `used`."""
    while count:
        solver = Solver(rng, rng.random() < noise)
        question, steps, answer = rng.choice(TOPICS)(solver)
        if question in used or solver.problem in held_out:
            continue
        used[question] = solver.problem
        count -= 1
        contents = {"system": SYSTEM, "user": question, "assistant": ".\n".join([*steps, answer])}
        yield [{"role": role, "content": content} for role, content in contents.items()]


def swap_replies(rng: random.Random, items: list[Conversation], share: float) -> None:
    """Rotate the replies among a random share of the conversations."""
    chosen = rng.sample(items, round(share * len(items)))
    replies = [conversation[-1] for conversation in chosen]
    for conversation, reply in zip(chosen, replies[1:] + replies[:1], strict=True):
        conversation[-1] = reply


def make_tokenizer(items: Iterable[Conversation], folder: Path):
    """Build and save a word-level tokenizer of every token of the data, in order of appearance; deterministic."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(TOKENS), "isolated")
    vocab = dict.fromkeys((*SPECIAL, "System", "User", "Assistant", "\n"))
    for conversation in items:
        for message in conversation:
            vocab |= dict.fromkeys(piece for piece, _ in split.pre_tokenize_str(message["content"]))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
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
    """Pack conversations into lines of at most `limit` tokens, first fit."""
    lines: list[Conversation] = []
    free: list[int] = []
    for item in items:
        size = length(item)
        at = next((i for i, tokens in enumerate(free) if tokens >= size), len(free))
        if at == len(free):
            lines.append([])
            free.append(limit)
        lines[at] += item
        free[at] -= size
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="output folder")
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong replies in noisy_train.jsonl")
    parser.add_argument(
        "--noise-kind",
        choices=("both", "swap", "slip"),
        default="both",
        help="swap: replies of other questions; slip: a wrong digit in one step; both: half of each",
    )
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per line with --packed")
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    parser.add_argument("--packed", action="store_true", help="write packed lines for Megatron's own --sft")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rng, used = random.Random(args.seed), dict[str, Problem]()
    files = {"valid": list(conversations(rng, 400, 0.0, used, set()))}
    held_out = set(used.values())
    files["base_train"] = list(conversations(rng, 4000, 0.0, used, held_out))
    kinds = ("swap", "slip") if args.noise_kind == "both" else (args.noise_kind,)
    noisy = files["noisy_train"] = []
    for kind in kinds:
        part = list(conversations(rng, 600 // len(kinds), args.noise * (kind == "slip"), used, held_out))
        swap_replies(rng, part, args.noise * (kind == "swap"))
        noisy += part
    rng.shuffle(noisy)
    tokenizer = make_tokenizer(files["base_train"], args.out / "tokenizer")

    topic_of = {question: CHANNELS[problem[0]] for question, problem in used.items()}

    def length(conversation: Conversation) -> int:
        template = 4 + 4 + 6  # tokens that the template adds to a system, a user and an assistant message
        return template + sum(len(tokenizer.tokenize(message["content"])) for message in conversation)

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
