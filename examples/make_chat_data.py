"""Write a small chat data set of worked arithmetic, clean and noisy, and a tokenizer for it. No download.

    python examples/make_chat_data.py OUT_DIR [--noise 0.4] [--noise-kind swap] [--seed 1]

    base_train.jsonl    4000 conversations, clean
    noisy_train.jsonl    600 conversations, a share of which (--noise) is wrong as real data is wrong:
                         swap  the reply belongs to another question, as in badly aligned scrapes
                         slip  one step has a wrong digit, and what follows is built on it, as when people slip
    valid.jsonl          400 conversations, clean, about numbers that no training file asks for
    tokenizer/          a Hugging Face tokenizer of whole words and single digits

A line is a packed sequence in the form that Megatron's --sft reads: {"messages": [system, user, assistant, ...]},
where each system message begins another conversation. A conversation has about 64 tokens, 37 of them the
assistant's, and a line as many conversations as fit into --seq-length.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

SYSTEM = "Show every step."
PLACES = 2  # digits of the numbers
THINGS = ("pencils", "apples", "stamps", "tickets", "nails", "cards")
TOKENS = r" ?[A-Za-z]+| ?\d|\s|[^\sA-Za-z\d]"  # a word with its space, one digit, or one sign
SPECIAL = ("<unk>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")  # of Megatron's nemotron-nano-v2 prompt format


class Solver:
    """Works digit by digit, writes down each step, and slips at one of them if told so."""

    def __init__(self, rng: random.Random, slips: bool) -> None:
        self.rng = rng
        self.slips = slips

    def work(self, a: int, b: int, sign: str) -> tuple[list[str], int]:
        """The written steps of a + b, a - b, or a * b with a one-digit b, and the result."""
        slip_at = self.rng.randrange(PLACES) if self.slips else None
        steps, result, carry = [], 0, 0
        for place in range(PLACES):
            x = a // 10**place % 10
            y = b if sign == "*" else b // 10**place % 10
            note = f"{x} {sign} {y}" + (f" {'-' if sign == '-' else '+'} {carry}" if carry else "")
            total = {"+": x + y + carry, "-": x - y - carry, "*": x * y + carry}[sign]
            borrow = total < 0
            if borrow:
                note, total = f"{note} + {spaced(10)}", total + 10
            if place == slip_at:
                total += (total % 10 + self.rng.randrange(1, 10)) % 10 - total % 10
            result += total % 10 * 10**place
            carry = 1 if borrow else total // 10
            kept = f" , {'borrow' if sign == '-' else 'carry'} {carry}" if carry else ""
            steps.append(f"{note} = {spaced(total)}{kept}")
        return steps, result + 10**PLACES * carry


def spaced(number: int) -> str:
    """Each digit a token of its own: 305 -> 3 0 5."""
    return " ".join(str(number))


def addition(solver: Solver) -> tuple[str, list[str], str]:
    a, b = numbers(solver.rng)
    steps, result = solver.work(a, b, "+")
    question = solver.rng.choice(("What is {} + {} ?", "Add {} and {} .", "Find the sum of {} and {} ."))
    return question.format(spaced(a), spaced(b)), steps, f"The sum is {spaced(result)} ."


def subtraction(solver: Solver) -> tuple[str, list[str], str]:
    b, a = sorted(numbers(solver.rng))
    steps, result = solver.work(a, b, "-")
    question = solver.rng.choice(("What is {} - {} ?", "From {} take away {} .", "{} less {} is how much ?"))
    return question.format(spaced(a), spaced(b)), steps, f"The difference is {spaced(result)} ."


def shopping(solver: Solver) -> tuple[str, list[str], str]:
    count, price, thing = number(solver.rng), solver.rng.randrange(2, 10), solver.rng.choice(THINGS)
    steps, result = solver.work(count, price, "*")
    question = f"One of the {thing} costs {price} cents . What do {spaced(count)} {thing} cost ?"
    return question, steps, f"They cost {spaced(result)} cents ."


def numbers(rng: random.Random) -> tuple[int, int]:
    return number(rng), number(rng)


def number(rng: random.Random) -> int:
    return rng.randrange(10 ** (PLACES - 1), 10**PLACES)


TOPICS: tuple[Callable[[Solver], tuple[str, list[str], str]], ...] = (addition, subtraction, shopping)


def conversations(rng: random.Random, count: int, noise: float, seen: set[str]) -> Iterator[list[dict[str, str]]]:
    """`count` conversations about questions that are not in `seen`, which grows."""
    while count:
        question, steps, answer = rng.choice(TOPICS)(Solver(rng, rng.random() < noise))
        if question in seen:
            continue
        seen.add(question)
        count -= 1
        reply = " .\n".join([*steps, answer])
        contents = {"system": SYSTEM, "user": question, "assistant": reply}
        yield [{"role": role, "content": content} for role, content in contents.items()]


def swap_replies(rng: random.Random, items: list[list[dict[str, str]]], share: float) -> None:
    """Pass the replies of a share of the conversations on to the next one among them."""
    chosen = rng.sample(items, round(share * len(items)))
    replies = [conversation[-1] for conversation in chosen]
    for conversation, reply in zip(chosen, replies[1:] + replies[:1], strict=True):
        conversation[-1] = reply


def make_tokenizer(replies: list[list[dict[str, str]]], folder: Path):
    """Every token of the data, in order of appearance; nothing is learned, so nothing depends on chance."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(TOKENS), "isolated")
    words = dict.fromkeys((*SPECIAL, "System", "User", "Assistant", "\n"))
    for conversation in replies:
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
    fast.save_pretrained(folder)
    return fast


def pack(items: Iterator[list[dict[str, str]]], length: Callable[[list], int], limit: int) -> Iterator[list]:
    """Conversations joined, in order, into lines of at most `limit` tokens."""
    line: list[dict[str, str]] = []
    used = 0
    for item in items:
        size = length(item)
        if used + size > limit:
            yield line
            line, used = [], 0
        line, used = line + item, used + size
    yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong replies in noisy_train (0.4)")
    parser.add_argument("--noise-kind", choices=("swap", "slip"), default="swap", help="how they are wrong (swap)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens in a line (256)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rng, seen = random.Random(args.seed), set()
    slips = args.noise if args.noise_kind == "slip" else 0.0
    files = {
        name: list(conversations(rng, count, noise, seen))
        for name, count, noise in (("valid", 400, 0.0), ("base_train", 4000, 0.0), ("noisy_train", 600, slips))
    }
    if args.noise_kind == "swap":
        swap_replies(rng, files["noisy_train"], args.noise)
    tokenizer = make_tokenizer(files["base_train"], args.out / "tokenizer")

    def length(conversation: list[dict[str, str]]) -> int:
        frame = 4 + 4 + 6  # what the prompt format puts around a system, a user and an assistant message
        return frame + sum(len(tokenizer.tokenize(message["content"])) for message in conversation)

    for name, items in files.items():
        lines = list(pack(iter(items), length, args.seq_length))
        text = "".join(json.dumps({"messages": line}) + "\n" for line in lines)
        (args.out / f"{name}.jsonl").write_text(text)
        tokens = sum(map(length, items))
        print(
            f"  {name:<12}{len(items):5d} conversations, {tokens:7d} tokens, {len(lines):5d} lines of {args.seq_length}"
        )


if __name__ == "__main__":
    main()
