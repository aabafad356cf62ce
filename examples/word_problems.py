"""Write chat data of two-step word problems; a share of the training replies belongs to another problem.

    python examples/word_problems.py OUT_DIR [--train 320] [--wrong 0.4] [--held-out 64] [--seed 1]

    train.jsonl      --train problems; --wrong of them have the reply of another problem, as in misaligned scraped data
    held_out.jsonl   --held-out other problems with their own replies

A line is one conversation for `megatron-dft data`: {"messages": [system, user, assistant]}. The reply shows both steps
and ends in "The answer is N.".
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SYSTEM = "Solve the problem."
NAMES = ["Ana", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Sam", "Tom", "Zoe"]
THINGS = ["apples", "books", "buttons", "cards", "coins", "marbles", "pencils", "shells", "stamps", "tickets"]
PACKAGES = ["bags", "boxes", "jars", "packs"]


@dataclass(frozen=True)
class Problem:
    """One problem, its worked reply, and the number that the reply ends in."""

    question: str
    reply: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat messages, with the reply."""
        contents = {"system": SYSTEM, "user": self.question, "assistant": self.reply}
        return [{"role": role, "content": content} for role, content in contents.items()]


def word_problems(rng: random.Random, count: int, without: Sequence[Problem] = ()) -> list[Problem]:
    """`count` different problems, none of which is in `without`."""
    found: dict[str, Problem] = {problem.question: problem for problem in without}
    while len(found) < count + len(without):
        problem = _word_problem(rng)
        found.setdefault(problem.question, problem)
    return list(found.values())[len(without) :]


def _word_problem(rng: random.Random) -> Problem:
    name, thing, package = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PACKAGES)
    owned, count, each = rng.randrange(5, 40), rng.randrange(2, 6), rng.randrange(3, 10)
    bought, total = count * each, owned + count * each
    return Problem(
        f"{name} has {owned} {thing}. {name} buys {count} {package} with {each} {thing} each. "
        f"How many {thing} does {name} have now?",
        f"{count} {package} with {each} {thing} each are {count} * {each} = {bought} {thing}. "
        f"{owned} + {bought} = {total}. The answer is {total}.",
        str(total),
    )


def swap_replies(rng: random.Random, problems: Sequence[Problem], share: float) -> list[Problem]:
    """Rotate the replies among a random share of the problems; `answer` stays that of the question."""
    swapped = list(problems)
    chosen = rng.sample(range(len(swapped)), round(share * len(swapped)))
    for i, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        swapped[i] = replace(problems[i], reply=problems[other].reply)
    return swapped


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators and trailing zeros of its fraction, or None."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return re.sub(r"\.0+$", "", numbers[-1].replace(",", "")) if numbers else None


def write_chat(problems: Sequence[Problem], path: Path) -> None:
    """One conversation per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": problem.messages}) + "\n" for problem in problems))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="output folder")
    parser.add_argument("--train", type=int, default=320, help="problems of the training set")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of training problems with a wrong reply")
    parser.add_argument("--held-out", type=int, default=64, help="problems of the held-out set")
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    args = parser.parse_args()
    if args.train + args.held_out > 100_000 or not 0.0 <= args.wrong <= 1.0:
        parser.error("expected at most 100000 problems, and a share of wrong replies between 0 and 1")
    rng = random.Random(args.seed)
    held_out = word_problems(rng, args.held_out)
    train = word_problems(rng, args.train, without=held_out)
    write_chat(swap_replies(rng, train, args.wrong), args.out / "train.jsonl")
    write_chat(held_out, args.out / "held_out.jsonl")
    print(f"{args.out}: {args.train} training problems, {args.wrong:.0%} wrong replies; {args.held_out} held out")


if __name__ == "__main__":
    main()
