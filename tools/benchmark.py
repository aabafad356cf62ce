"""Time, memory and collectives of the loss, against every cross entropy of rivals.py.

    python tools/benchmark.py                     on a GPU if there is one; writes a file in tools/results/
    python tools/benchmark.py --tokens 512        smaller, as on a CPU by default

Two parts: the loss of given logits, and output layer and loss together, from hidden states. In both first the
correctness gate: the gradient of each implementation against fp64. If ours is wrong, nothing is timed; a rival that is
wrong is not timed and its row says so. Then, for each size and share of masked tokens, all implementations in turn,
again and again in one process (measure.py).

Of given logits: bf16, rebuilt outside of the timed region, an upstream gradient of its own for each token (0 where
masked). From hidden states: one upstream gradient for all valid tokens, as training has and Liger needs; bf16, on a CPU
fp32, as most CPUs multiply no bf16 matrices; the weight's gradient is added to a `main_grad` by Megatron's output layer
and by ours, others return it.

A row: medians and interquartile range of forward, backward and both, in ms; B/logit, the bytes that a copy would have
moved in that time; the share of the floor, 6 - 4f bytes per logit at the bandwidth of a copy; peak memory beyond the
inputs; collectives and what they send per token, counted on a group of 8 ranks that sends nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from measure import Case, Collectives, conditions, copy_bandwidth, interleaved
from rivals import HEADS, IMPLEMENTATIONS, NOT_ON_A_CPU, Head, Loss
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dft import vocab_parallel_dft_loss

TOOLS = Path(__file__).resolve().parent
VOCABULARIES = [128256, 16032, 151936, 18992]  # Llama 3 and Qwen 2.5: whole, and an eighth
MASKED = [0.0, 0.5, 0.8]
RANKS = 8
GATE_TOKENS, GATE_HIDDEN, GATE_VOCABULARY = 64, 256, 18992
OURS = 2.0  # the relative error of a gradient may be so many times that of torch in the same dtype
WRONG = 0.05  # a rival above that relative error computes something else
COLUMNS = ["tokens", "dtype", "repetitions", "implementation", "hidden", "vocab", "masked"]
COLUMNS += ["forward_ms", "backward_ms", "total_ms", "spread_ms", "host_ms"]
COLUMNS += ["bytes_per_logit", "share_of_floor", "extra_mib", "collectives", "sent_bytes_per_token"]
COLUMNS += ["gradient_error", "note"]
Row = dict[str, str | int | float]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="default: 8192; on a CPU 512, from hidden states 256")
    parser.add_argument(
        "--vocab", type=int, nargs="*", default=VOCABULARIES, help="of given logits; none: no such rows"
    )
    parser.add_argument("--hidden", type=int, nargs="*", default=[2048, 4096], help="sizes; none: no such rows")
    parser.add_argument("--hidden-vocab", type=int, nargs="+", default=[128256, 151936], help="their vocabularies")
    parser.add_argument("--masked", type=float, nargs="+", default=MASKED, help="shares of masked tokens")
    parser.add_argument("--hidden-masked", type=float, nargs="+", default=[0.0, 0.5, 0.7, 0.8])
    parser.add_argument("--repetitions", type=int, help="default: 30; on a CPU 9, from hidden states 3")
    parser.add_argument("--only", nargs="+", default=[""], help="implementations whose name contains one of these")
    parser.add_argument("--out", type=Path, help="default: tools/results/DEVICE-DATE.csv")
    wanted = parser.parse_args(arguments)
    device = torch.device(wanted.device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    alone = dist.new_group([0])

    losses, notes = available(IMPLEMENTATIONS, wanted.only, device) if wanted.vocab else ({}, {})
    heads, head_notes = available(HEADS, wanted.only, device) if wanted.hidden else ({}, {})
    errors = gate(losses, wanted.vocab, device, alone, notes)
    errors |= gate_heads(heads, device, alone, head_notes)
    notes |= head_notes
    for name, note in notes.items():
        print(f"{name}: {note}")
    if any(name.startswith("ours") for name in notes):
        print("the correctness gate is closed: nothing was timed")
        return 1

    facts: Row = {**conditions(device), "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1)}
    losses, heads = ({n: f for n, f in part.items() if n not in notes} for part in (losses, heads))
    path = wanted.out or TOOLS / "results" / f"{str(facts['device']).replace(' ', '-')}-{facts['date']}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *COLUMNS])
        writer.writeheader()
        for row in itertools.chain(of_logits(losses, wanted, device, alone), of_hidden(heads, wanted, device, alone)):
            moved = row["total_ms"] / 1e3 * 1e9 * facts["copy_gb_per_s"] / (row["tokens"] * row["vocab"])
            row |= {"bytes_per_logit": round(moved, 2), "gradient_error": errors[row["implementation"]]}
            if not row["hidden"]:
                row["share_of_floor"] = round((6 - 4 * row["masked"]) / moved, 3)
            writer.writerow(facts | row)
            print(f"  {row['implementation']:40} {row['total_ms']:9.3f} ms {row['extra_mib']:9.1f} MiB", flush=True)
        writer.writerows(facts | {"implementation": name, "note": note} for name, note in notes.items())
    print(f"\n{path}")
    return 0


def available(makes: dict[str, Callable], only: list[str], device: torch.device) -> tuple[dict, dict[str, str]]:
    """The implementations that can be had, and why the others cannot."""
    found, notes = {}, {}
    for name in (name for name in makes if any(part in name for part in only)):
        if device.type == "cpu" and name in NOT_ON_A_CPU:
            notes[name] = NOT_ON_A_CPU[name]
            continue
        try:
            found[name] = makes[name]()
        except ImportError as error:
            notes[name] = f"not installed ({error})"
    return found, notes


def of_logits(losses: dict[str, Loss], wanted, device: torch.device, group: dist.ProcessGroup) -> Iterator[Row]:
    """Rows of the loss on given logits."""
    cuda = device.type == "cuda"
    tokens, repetitions = wanted.tokens or (8192 if cuda else 512), wanted.repetitions or (30 if cuda else 9)
    counted = {name: collectives(loss, device) for name, loss in losses.items()}
    for vocab, masked in itertools.product(wanted.vocab, wanted.masked):
        print(f"\nlogits: V = {vocab}, {masked:.0%} masked")
        inputs = case(tokens, vocab, masked, device)
        cases = {name: partial(logits_case, loss, *inputs, group) for name, loss in losses.items()}
        measured = interleaved(cases, device, repetitions)
        common = {"tokens": tokens, "dtype": "bf16", "repetitions": repetitions, "vocab": vocab, "masked": masked}
        for name, values in measured.items():
            yield {"implementation": name, "hidden": "", **common, **values, **counted[name]}


def of_hidden(heads: dict[str, Head], wanted, device: torch.device, group: dist.ProcessGroup) -> Iterator[Row]:
    """Rows of output layer and loss together."""
    cuda = device.type == "cuda"
    tokens, repetitions = wanted.tokens or (8192 if cuda else 256), wanted.repetitions or (30 if cuda else 3)
    dtype = torch.bfloat16 if cuda else torch.float32
    for width, vocab in itertools.product(wanted.hidden, wanted.hidden_vocab):
        hidden, weight = layer_case(tokens, width, vocab, dtype, device)
        for masked in wanted.hidden_masked:
            print(f"\noutput layer and loss: H = {width}, V = {vocab}, {masked:.0%} masked")
            inputs = (hidden, weight, *tokens_of(tokens, vocab, masked, device))
            cases = {name: partial(hidden_case, head, *inputs, group) for name, head in heads.items()}
            common = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "repetitions": repetitions}
            common |= {"hidden": width, "vocab": vocab, "masked": masked}
            for name, values in interleaved(cases, device, repetitions, warm_up=1).items():
                yield {"implementation": name, **common, **values}


def logits_case(loss: Loss, source: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup) -> Case:
    """A turn of one loss; its logits are its own."""
    logits = fresh(source)
    return partial(loss, logits, target, group), [logits], upstream


def hidden_case(
    head: Head, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup
) -> Case:
    """A turn of one output layer and loss."""
    return partial(head, hidden, weight, target, group), [hidden, weight], upstream


def gate(
    losses: dict[str, Loss], vocabularies: list[int], device: torch.device, group: dist.ProcessGroup, notes: dict
) -> dict[str, float]:
    """The relative error of each gradient, the largest; notes get what excludes an implementation."""
    errors: dict[str, float] = {}
    for vocab, (name, loss) in itertools.product(vocabularies, losses.items()):
        logits, target, upstream = case(GATE_TOKENS, vocab, 0.5, device)
        objective = name.removeprefix("ours: ").partition(",")[0] if name.startswith("ours") else "dft"
        leaf = logits.double().requires_grad_()
        truth = vocab_parallel_dft_loss(leaf, target, objective=objective, backend="torch")
        exact = torch.autograd.grad(truth, leaf, upstream.double())
        leaf = logits.clone().requires_grad_()
        limit = limit_of(name, torch.autograd.grad(plain_loss(leaf, target, objective), leaf, upstream), exact)
        note, error = compare(lambda: [gradient_of(loss, logits, target, upstream, group)], exact, limit)  # noqa: B023
        errors[name] = max(error, errors.get(name, 0.0))
        if note:
            notes[name] = f"V = {vocab}: {note}"
    return errors


def gate_heads(heads: dict[str, Head], device: torch.device, group: dist.ProcessGroup, notes: dict) -> dict[str, float]:
    """The same of output layer and loss: gradients of hidden states and weight."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, weight = layer_case(GATE_TOKENS, GATE_HIDDEN, GATE_VOCABULARY, dtype, device)
    target, upstream = tokens_of(GATE_TOKENS, GATE_VOCABULARY, 0.5, device)
    exact_leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = vocab_parallel_dft_loss(exact_leaves[0] @ exact_leaves[1].t(), target, backend="torch")
    exact = torch.autograd.grad(truth, exact_leaves, upstream.double())
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    plain = torch.autograd.grad(plain_loss(leaves[0] @ leaves[1].t(), target, "dft"), leaves, upstream)
    errors = {}
    for name, head in heads.items():

        def gradients(head: Head = head) -> list[Tensor]:
            weight.main_grad.zero_()
            value = head(hidden, weight, target, group)
            ours, theirs = torch.autograd.grad(value, (hidden, weight), upstream, allow_unused=True)
            return [ours, weight.main_grad if theirs is None else theirs]

        note, errors[name] = compare(gradients, exact, limit_of(name, plain, exact))
        if note:
            notes[name] = note
    return errors


def plain_loss(logits: Tensor, target: Tensor, objective: str) -> Tensor:
    """In fp32 from logits of any dtype, with autograd's rounding of their gradient."""
    return vocab_parallel_dft_loss(logits.float(), target, objective=objective, backend="torch")


def relative_error(gradients: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest."""
    pairs = zip(gradients, exact, strict=True)
    return max(((ours.double() - right).norm() / right.norm()).item() for ours, right in pairs)


def limit_of(name: str, plain: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of the relative error: for ours from the plain computation in the same dtype."""
    return OURS * relative_error(plain, exact) if name.startswith("ours") else WRONG


def compare(compute: Callable[[], list[Tensor]], exact: Sequence[Tensor], limit: float) -> tuple[str, float]:
    """What excludes an implementation, or nothing; the largest relative error of its gradients."""
    try:
        error = relative_error(compute(), exact)
    except Exception as problem:
        return f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}", float("nan")
    wrong = f"wrong: relative error of the gradient {error:.1e}, expected less than {limit:.1e}"
    return "" if error < limit else wrong, round(error, 5)


def case(tokens: int, vocab: int, masked: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, 1, V] in bf16, as after the output layer, targets [N, 1] and upstream gradients [N, 1].

    Targets are likely enough for their gradient to matter; masked tokens come in stretches, as prompts do.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(tokens, 1, vocab, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    target = torch.randint(vocab, (tokens, 1), generator=generator, device=device)
    logits.scatter_add_(2, target[..., None], torch.full_like(target, 12, dtype=logits.dtype)[..., None])
    upstream = torch.rand(tokens, 1, generator=generator, device=device) / tokens
    prompt = (torch.arange(tokens, device=device) % 64 < round(64 * masked))[:, None]
    return logits, target.masked_fill(prompt, -100), upstream.masked_fill(prompt, 0.0)


def layer_case(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] and weight [V, H], a leaf with its `main_grad`; logits are about normal."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(tokens, width, dtype=dtype, device=device).normal_(generator=generator)
    weight = torch.empty(vocab, width, dtype=dtype, device=device).normal_(0.0, width**-0.5, generator=generator)
    hidden += 12.0 * weight[tokens_of(tokens, vocab, 0.0, device)[0]]
    weight.main_grad = torch.zeros_like(weight)
    return hidden.requires_grad_(), weight.requires_grad_()


def tokens_of(tokens: int, vocab: int, masked: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets [N] and upstream gradients [N], the same for all that are not masked."""
    generator = torch.Generator(device).manual_seed(1)
    target = torch.randint(vocab, (tokens,), generator=generator, device=device)
    prompt = torch.arange(tokens, device=device) % 64 < round(64 * masked)
    valid = int((~prompt).sum())
    return target.masked_fill(prompt, -100), torch.full((tokens,), 1.0 / valid, device=device).masked_fill(prompt, 0.0)


def fresh(source: Tensor) -> Tensor:
    """A copy that another operation has computed, as a model's logits are."""
    return source + torch.zeros(1, dtype=source.dtype, device=source.device, requires_grad=True)


def gradient_of(loss: Loss, source: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup) -> Tensor:
    logits = fresh(source)
    return torch.autograd.grad(loss(logits, target, group), logits, upstream)[0]


def collectives(loss: Loss, device: torch.device) -> dict[str, float | str]:
    """How many, and bytes per token, on 8 ranks; the numbers that come out mean nothing, because nothing is sent."""
    source, target, upstream = case(64, 512, 0.0, device)
    try:
        with Collectives() as seen:
            gradient_of(loss, source, target, upstream, dist.group.WORLD)
    except ValueError as error:
        return {"collectives": "", "sent_bytes_per_token": str(error)}
    sent = sum(nbytes for *_, nbytes in seen.calls)
    return {"collectives": len(seen.calls), "sent_bytes_per_token": sent / len(target)}


if __name__ == "__main__":
    sys.exit(main())
