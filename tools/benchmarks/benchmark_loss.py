"""Benchmark time, memory and collectives of the loss against the cross entropies of baselines.py.

    python tools/benchmarks/benchmark_loss.py                  on a GPU if available; writes a file in results/
    python tools/benchmarks/benchmark_loss.py --tokens 512     fewer tokens, the default on a CPU

It has two parts: the loss on given logits, and output layer with loss, from hidden states. Each part starts with a
correctness gate, which compares the gradient of each implementation with that of its objective in fp64: DFT, or NLL if
its name ends with (NLL). If ours is wrong, nothing is timed. A wrong baseline is not timed; its row has a note. Then
all implementations run interleaved in one process (measure.py), for each size and share of masked tokens. One that
fails at a size gets a note for it.

Given logits: bf16, rebuilt outside of the timed region; a different upstream gradient per token, 0 where masked.
From hidden states: one upstream gradient for all valid tokens, as in training and as Liger requires. bf16 on a GPU,
fp32 on a CPU, because most CPUs have no bf16 matrix product. Megatron's output layer and ours add the weight gradient
to `main_grad`; the other implementations return it.

Columns: medians of forward, backward and both, and the interquartile range, in ms; `bytes_per_logit`, time x bandwidth
of a copy per logit; `share_of_floor`, the minimum of 6 - 4f bytes per logit relative to that; peak memory beyond the
inputs; number of collectives and bytes sent per token, counted on a fake process group of 8 ranks.
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
from baselines import HEADS, IMPLEMENTATIONS, NLL, NOT_ON_A_CPU, Head, Loss
from measure import Case, Collectives, conditions, copy_bandwidth, interleaved, reason
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dft import vocab_parallel_dft_loss
from megatron_dft.utils import HelpFormatter

TOOLS = Path(__file__).resolve().parent
VOCABULARIES = [128256, 16032, 151936, 18992]  # Llama 3 and Qwen 2.5: TP 1 and TP 8
MASKED = [0.0, 0.5, 0.8]
RANKS = 8
GATE_TOKENS, GATE_HIDDEN = 64, 256
GATE_GPU_TOKENS = 8448  # from hidden states, half of them masked: more than a chunk of Liger, TRL and quack
GATE_VOCABULARIES = [19200, 19072]  # quack's kernel has tiles of 192 columns, as at 128256, and of 128, as at 151936
MAX_ERROR_RATIO = 2.0  # of ours: relative error of a gradient over that of torch in the same dtype
MAX_BASELINE_ERROR = 0.05  # of a baseline: relative error of its gradient
COLUMNS = ["tokens", "dtype", "repetitions", "implementation", "hidden", "vocab", "masked"]
COLUMNS += ["forward_ms", "backward_ms", "total_ms", "spread_ms", "host_ms"]
COLUMNS += ["bytes_per_logit", "share_of_floor", "extra_mib", "collectives", "sent_bytes_per_token"]
COLUMNS += ["gradient_error", "note"]
Row = dict[str, str | int | float]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="cuda or cpu")
    parser.add_argument(
        "--tokens", type=int, help="number of tokens (default: 8192; on a CPU 512, from hidden states 256)"
    )
    parser.add_argument(
        "--vocab", type=int, nargs="*", default=VOCABULARIES, help="vocabulary sizes of given logits; none skips them"
    )
    parser.add_argument(
        "--hidden", type=int, nargs="*", default=[2048, 4096], help="hidden sizes; none skips output layer with loss"
    )
    parser.add_argument(
        "--hidden-vocab", type=int, nargs="+", default=[128256, 151936], help="vocabulary sizes from hidden states"
    )
    parser.add_argument(
        "--masked", type=float, nargs="+", default=MASKED, help="shares of masked tokens of given logits"
    )
    parser.add_argument(
        "--hidden-masked",
        type=float,
        nargs="+",
        default=[0.0, 0.5, 0.7, 0.8],
        help="shares of masked tokens from hidden states",
    )
    parser.add_argument(
        "--repetitions", type=int, help="interleaved runs (default: 30; on a CPU 9, from hidden states 3)"
    )
    parser.add_argument("--only", nargs="+", help="implementations whose name contains one of these (default: all)")
    parser.add_argument("--out", type=Path, help="CSV file (default: tools/benchmarks/results/DEVICE-DATE.csv)")
    args = parser.parse_args(arguments)
    args.only = args.only or [""]
    device = torch.device(args.device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    alone = dist.new_group([0])

    losses, notes = available(IMPLEMENTATIONS, args.only, device) if args.vocab else ({}, {})
    heads, head_notes = available(HEADS, args.only, device) if args.hidden else ({}, {})
    errors = gate(losses, args.vocab, device, alone, notes)
    errors |= gate_heads(heads, device, alone, head_notes)
    notes |= head_notes
    for name, note in notes.items():
        print(f"{name}: {note}")
    if any(name.startswith("ours") for name in notes):
        print("the correctness gate failed: nothing was timed")
        return 1

    facts: Row = {**conditions(device), "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1)}
    losses, heads = ({n: f for n, f in part.items() if n not in notes} for part in (losses, heads))
    failed = False  # whether one of ours failed while it was timed
    path = args.out or TOOLS / "results" / f"{str(facts['device']).replace(' ', '-')}-{facts['date']}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *COLUMNS])
        writer.writeheader()
        writer.writerows(facts | {"implementation": name, "note": note} for name, note in notes.items())
        for row in itertools.chain(of_logits(losses, args, device, alone), of_hidden(heads, args, device, alone)):
            if "note" in row:
                failed |= row["implementation"].startswith("ours")
                writer.writerow(facts | row)
                print(f"  {row['implementation']:40} {row['note']}", flush=True)
                continue
            moved = row["total_ms"] / 1e3 * 1e9 * facts["copy_gb_per_s"] / (row["tokens"] * row["vocab"])
            row |= {"bytes_per_logit": round(moved, 2), "gradient_error": errors[row["implementation"]]}
            if not row["hidden"]:
                row["share_of_floor"] = round((6 - 4 * row["masked"]) / moved, 3)
            writer.writerow(facts | row)
            file.flush()  # a run may be stopped
            print(f"  {row['implementation']:40} {row['total_ms']:9.3f} ms {row['extra_mib']:9.1f} MiB", flush=True)
    print(f"\n{path}")
    return int(failed)


def available(makes: dict[str, Callable], only: list[str], device: torch.device) -> tuple[dict, dict[str, str]]:
    """The available implementations, and the reason for each that is not available."""
    found, notes = {}, {}
    for name in (name for name in makes if any(part in name for part in only)):
        if device.type == "cpu" and name in NOT_ON_A_CPU:
            notes[name] = NOT_ON_A_CPU[name]
            continue
        try:
            found[name] = makes[name]()
        except ImportError as error:
            notes[name] = f"not installed ({error})"
        except Exception as error:  # of a package that does not fit another one
            notes[name] = f"failed to import: {reason(error)}"
    return found, notes


def of_logits(losses: dict[str, Loss], args, device: torch.device, group: dist.ProcessGroup) -> Iterator[Row]:
    """Rows of the loss on given logits."""
    cuda = device.type == "cuda"
    tokens, repetitions = args.tokens or (8192 if cuda else 512), args.repetitions or (30 if cuda else 9)
    counted = {name: collectives(loss, device) for name, loss in losses.items()}
    for vocab, masked in itertools.product(args.vocab, args.masked):
        print(f"\nlogits: V = {vocab}, {masked:.0%} masked")
        inputs = case(tokens, vocab, masked, device)
        cases = {name: partial(logits_case, loss, *inputs, group) for name, loss in losses.items()}
        measured, failed = interleaved(cases, device, repetitions)
        yield from not_measured(failed, f"V = {vocab}, {masked:.0%} masked")
        common = {"tokens": tokens, "dtype": "bf16", "repetitions": repetitions, "vocab": vocab, "masked": masked}
        for name, values in measured.items():
            yield {"implementation": name, "hidden": "", **common, **values, **counted[name]}


def of_hidden(heads: dict[str, Head], args, device: torch.device, group: dist.ProcessGroup) -> Iterator[Row]:
    """Rows of output layer with loss."""
    cuda = device.type == "cuda"
    tokens, repetitions = args.tokens or (8192 if cuda else 256), args.repetitions or (30 if cuda else 3)
    dtype = torch.bfloat16 if cuda else torch.float32
    for width, vocab in itertools.product(args.hidden, args.hidden_vocab):
        hidden, weight = layer_case(tokens, width, vocab, dtype, device)
        for masked in args.hidden_masked:
            print(f"\noutput layer and loss: H = {width}, V = {vocab}, {masked:.0%} masked")
            inputs = (hidden, weight, *tokens_of(tokens, vocab, masked, device))
            cases = {name: partial(hidden_case, head, *inputs, group) for name, head in heads.items()}
            common = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "repetitions": repetitions}
            common |= {"hidden": width, "vocab": vocab, "masked": masked}
            measured, failed = interleaved(cases, device, repetitions, warm_up=1)
            yield from not_measured(failed, f"H = {width}, V = {vocab}, {masked:.0%} masked")
            for name, values in measured.items():
                yield {"implementation": name, **common, **values}


def not_measured(failed: dict[str, str], size: str) -> Iterator[Row]:
    """Rows of implementations that failed at this size."""
    for name, note in failed.items():
        yield {"implementation": name, "note": f"{size}: {note}"}


def logits_case(loss: Loss, source: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup) -> Case:
    """One run of a loss on its own copy of the logits."""
    logits = fresh(source)
    return partial(loss, logits, target, group), [logits], upstream


def hidden_case(
    head: Head, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup
) -> Case:
    """One run of an output layer with loss."""
    return partial(head, hidden, weight, target, group), [hidden, weight], upstream


def gate(
    losses: dict[str, Loss], vocabularies: list[int], device: torch.device, group: dist.ProcessGroup, notes: dict
) -> dict[str, float]:
    """The largest relative gradient error of each loss; `notes` receives the reason why a loss is excluded."""
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
    """The same for output layer with loss: gradients of hidden states and weight."""
    cuda = device.type == "cuda"
    tokens, dtype = (GATE_GPU_TOKENS, torch.bfloat16) if cuda else (GATE_TOKENS, torch.float32)
    errors: dict[str, float] = {}
    for vocab in GATE_VOCABULARIES:
        inputs = *layer_case(tokens, GATE_HIDDEN, vocab, dtype, device), *tokens_of(tokens, vocab, 0.5, device)
        objectives = {name: "nll" if name.endswith(NLL) else "dft" for name in heads}
        exact = {objective: plain_gradients(objective, *inputs, torch.double) for objective in {*objectives.values()}}
        plain = {objective: plain_gradients(objective, *inputs, dtype) for objective in exact}
        for name, head in heads.items():
            truth = exact[objectives[name]]
            limit = limit_of(name, plain[objectives[name]], truth)
            note, error = compare(partial(head_gradients, head, *inputs, group), truth, limit)
            errors[name] = max(error, errors.get(name, 0.0))
            if note:
                notes[name] = f"V = {vocab}: {note}"
    return errors


def plain_gradients(
    objective: str, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Gradients of hidden states and weight by plain torch in the given dtype, with the loss in fp32 or fp64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    loss = plain_loss(logits, target, objective)
    return torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))


def head_gradients(
    head: Head, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup
) -> list[Tensor]:
    """Gradients of hidden states and weight; that of the weight may have been added to `main_grad`."""
    weight.main_grad.zero_()
    value = head(hidden, weight, target, group)
    first, second = torch.autograd.grad(value, (hidden, weight), upstream, allow_unused=True)
    return [first, weight.main_grad if second is None else second]


def plain_loss(logits: Tensor, target: Tensor, objective: str) -> Tensor:
    """Loss in fp32 from logits of any dtype but fp64; autograd rounds their gradient to that dtype."""
    logits = logits if logits.dtype == torch.double else logits.float()
    return vocab_parallel_dft_loss(logits, target, objective=objective, backend="torch")


def relative_error(gradients: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of the gradients."""
    pairs = zip(gradients, exact, strict=True)
    return max(((ours.double() - right).norm() / right.norm()).item() for ours, right in pairs)


def limit_of(name: str, plain: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Limit of the relative error: for ours, a multiple of the error of plain torch in the same dtype."""
    return MAX_ERROR_RATIO * relative_error(plain, exact) if name.startswith("ours") else MAX_BASELINE_ERROR


def compare(compute: Callable[[], list[Tensor]], exact: Sequence[Tensor], limit: float) -> tuple[str, float]:
    """The reason why an implementation is excluded, or "", and the largest relative error of its gradients."""
    try:
        error = relative_error(compute(), exact)
    except Exception as problem:
        return f"failed: {reason(problem)}", float("nan")
    wrong = f"wrong: relative error of the gradient {error:.1e}, expected less than {limit:.1e}"
    return "" if error < limit else wrong, round(error, 5)


def case(tokens: int, vocab: int, masked: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, 1, V] in bf16, targets [N, 1] and upstream gradients [N, 1].

    Targets have enough probability for a significant gradient. Masked tokens are contiguous, as in prompts.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(tokens, 1, vocab, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    target = torch.randint(vocab, (tokens, 1), generator=generator, device=device)
    logits.scatter_add_(2, target[..., None], torch.full_like(target, 12, dtype=logits.dtype)[..., None])
    upstream = torch.rand(tokens, 1, generator=generator, device=device) / tokens
    prompt = (torch.arange(tokens, device=device) % 64 < round(64 * masked))[:, None]
    return logits, target.masked_fill(prompt, -100), upstream.masked_fill(prompt, 0.0)


def layer_case(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] and weight [V, H], a leaf with an fp32 `main_grad`; logits are approximately normal."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(tokens, width, dtype=dtype, device=device).normal_(generator=generator)
    weight = torch.empty(vocab, width, dtype=dtype, device=device).normal_(0.0, width**-0.5, generator=generator)
    hidden += 12.0 * weight[tokens_of(tokens, vocab, 0.0, device)[0]]
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return hidden.requires_grad_(), weight.requires_grad_()


def tokens_of(tokens: int, vocab: int, masked: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets [N] and upstream gradients [N], equal for all valid tokens."""
    generator = torch.Generator(device).manual_seed(1)
    target = torch.randint(vocab, (tokens,), generator=generator, device=device)
    prompt = torch.arange(tokens, device=device) % 64 < round(64 * masked)
    valid = int((~prompt).sum())
    return target.masked_fill(prompt, -100), torch.full((tokens,), 1.0 / valid, device=device).masked_fill(prompt, 0.0)


def fresh(source: Tensor) -> Tensor:
    """A copy that is the output of another operation, as the logits of a model are."""
    return source + torch.zeros(1, dtype=source.dtype, device=source.device, requires_grad=True)


def gradient_of(loss: Loss, source: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup) -> Tensor:
    logits = fresh(source)
    return torch.autograd.grad(loss(logits, target, group), logits, upstream)[0]


def collectives(loss: Loss, device: torch.device) -> dict[str, float | str]:
    """Number of collectives and bytes sent per token on 8 ranks of a fake group; the loss itself is meaningless."""
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
