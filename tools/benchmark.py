"""Time, memory and collectives of the loss on given logits, against every cross entropy of rivals.py.

    python tools/benchmark.py                     on a GPU if there is one; writes a file in tools/results/
    python tools/benchmark.py --tokens 512        smaller, as on a CPU by default

First the correctness gate: the gradient of each implementation against fp64 at each vocabulary size. If ours is wrong,
nothing is timed; a rival that is wrong is not timed and its row says so. Then, for each vocabulary size and
share of masked tokens, all implementations in turn, again and again in one process: bf16 logits that are rebuilt
outside of the timed region, an upstream gradient of its own for each token (0 where masked), forward and backward.
On a GPU the device is kept busy until everything is queued, so that times are those of the device; what the host
needs to queue it is a column of its own.

A row: medians and interquartile range of forward, backward and both, in ms; B/logit, the bytes that a copy would have
moved in that time; the share of the floor, 6 - 4f bytes per logit at the bandwidth of a copy; peak memory beyond the
inputs; collectives and what they send per token, counted on a group of 8 ranks that sends nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rivals import IMPLEMENTATIONS, NEED_A_GPU, Loss
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dft import vocab_parallel_dft_loss

TOOLS = Path(__file__).resolve().parent
VOCABULARIES = [128256, 16032, 151936, 18992]  # Llama 3 and Qwen 2.5: whole, and an eighth
MASKED = [0.0, 0.5, 0.8]
RANKS = 8
OURS = 0.004  # relative error of a gradient: rounding to bf16 is 2^-9 at most
WRONG = 0.05  # a rival above that computes something else
COLUMNS = ["implementation", "vocab", "masked", "forward_ms", "backward_ms", "total_ms", "spread_ms", "host_ms"]
COLUMNS += ["bytes_per_logit", "share_of_floor", "extra_mib", "collectives", "sent_bytes_per_token"]
COLUMNS += ["gradient_error", "note"]
GIB = 1 << 30
MIB = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="default: 8192, on a CPU 512")
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--masked", type=float, nargs="+", default=MASKED, help="shares of masked tokens")
    parser.add_argument("--repetitions", type=int, help="default: 30, on a CPU 9")
    parser.add_argument("--only", nargs="+", default=[""], help="implementations whose name contains one of these")
    parser.add_argument("--out", type=Path, help="default: tools/results/DEVICE-DATE.csv")
    wanted = parser.parse_args(arguments)
    device = torch.device(wanted.device)
    cuda = device.type == "cuda"
    tokens = wanted.tokens or (8192 if cuda else 512)
    repetitions = wanted.repetitions or (30 if cuda else 9)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    alone = dist.new_group([0])

    names = [name for name in IMPLEMENTATIONS if any(part in name for part in wanted.only)]
    losses, notes = available(names, device)
    errors: dict[str, float] = {}
    for vocab in wanted.vocab:
        gate(losses, vocab, device, alone, errors, notes)
    for name, note in notes.items():
        print(f"{name}: {note}")
    if any(name.startswith("ours") for name in notes):
        print("the correctness gate is closed: nothing was timed")
        return 1

    facts = conditions(device, tokens, repetitions)
    path = wanted.out or TOOLS / "results" / f"{facts['device'].replace(' ', '-')}-{facts['date']}.csv"
    fair = {name: loss for name, loss in losses.items() if name not in notes}
    constant = {name: collectives(loss, device) | {"gradient_error": errors[name]} for name, loss in fair.items()}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *COLUMNS])
        writer.writeheader()
        for vocab, masked in itertools.product(wanted.vocab, wanted.masked):
            print(f"\nV = {vocab}, {masked:.0%} masked: forward + backward")
            source = case(tokens, vocab, masked, device)
            for name, measured in measure(fair, source, repetitions, alone).items():
                moved = measured["total_ms"] / 1e3 * 1e9 * float(facts["copy_gb_per_s"]) / (tokens * vocab)
                row = {"implementation": name, "vocab": vocab, "masked": masked, **measured, **constant[name]}
                row |= {"bytes_per_logit": round(moved, 2), "share_of_floor": round((6 - 4 * masked) / moved, 3)}
                writer.writerow(facts | row)
                print(f"  {name:32} {measured['total_ms']:9.3f} ms   {moved:6.1f} B/logit", flush=True)
        writer.writerows(facts | {"implementation": name, "note": note} for name, note in notes.items())
    print(f"\n{path}")
    return 0


def available(names: list[str], device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """The implementations that can be had, and why the others cannot."""
    losses, notes = {}, {}
    for name in names:
        if device.type == "cpu" and name in NEED_A_GPU:
            notes[name] = "needs a GPU"
            continue
        try:
            losses[name] = IMPLEMENTATIONS[name]()
        except ImportError as error:
            notes[name] = f"not installed ({error})"
    return losses, notes


def gate(
    losses: dict[str, Loss],
    vocab: int,
    device: torch.device,
    group: dist.ProcessGroup,
    errors: dict[str, float],
    notes: dict[str, str],
) -> None:
    """Record the relative error of each gradient, the largest so far, and what excludes an implementation."""
    logits, target, upstream = case(64, vocab, 0.5, device)
    for name, loss in losses.items():
        objective = name.removeprefix("ours: ").partition(",")[0] if name.startswith("ours") else "dft"
        leaf = logits.double().requires_grad_()
        truth = vocab_parallel_dft_loss(leaf, target, objective=objective, backend="torch")
        (expected,) = torch.autograd.grad(truth, leaf, upstream.double())
        try:
            gradient = gradient_of(loss, logits, target, upstream, group)
            error = ((gradient.double() - expected).norm() / expected.norm()).item()
            errors[name] = max(round(error, 5), errors.get(name, 0.0))
            if not error < (OURS if name.startswith("ours") else WRONG):
                notes[name] = f"wrong at V = {vocab}: relative error of the gradient {error:.1e}"
        except Exception as problem:
            notes[name] = f"failed at V = {vocab}: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}"


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


def fresh(source: Tensor) -> Tensor:
    """A copy that another operation has computed, as a model's logits are."""
    return source + torch.zeros(1, dtype=source.dtype, device=source.device, requires_grad=True)


def gradient_of(loss: Loss, source: Tensor, target: Tensor, upstream: Tensor, group: dist.ProcessGroup) -> Tensor:
    logits = fresh(source)
    return torch.autograd.grad(loss(logits, target, group), logits, upstream)[0]


def measure(
    losses: dict[str, Loss], inputs: tuple[Tensor, Tensor, Tensor], repetitions: int, group: dist.ProcessGroup
) -> dict[str, dict[str, float]]:
    """Interleaved runs of all implementations: what was measured of each."""
    timed = timed_on_cuda if inputs[0].is_cuda else timed_on_cpu
    runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in losses}
    for repetition in range(repetitions + 2):
        for name, loss in losses.items():
            result = timed(loss, *inputs, group)
            if repetition >= 2:  # compiled, and settled
                runs[name].append(result)
    return {name: summary(results) for name, results in runs.items()}


def summary(results: list[tuple[float, ...]]) -> dict[str, float]:
    """Medians, and the distance between the quartiles of the totals."""
    forward, backward, host, memory = zip(*results, strict=True)
    total = [a + b for a, b in zip(forward, backward, strict=True)]
    quarters = statistics.quantiles(total, n=4)
    series = {"forward_ms": forward, "backward_ms": backward, "total_ms": total, "host_ms": host, "extra_mib": memory}
    medians = {name: round(statistics.median(values), 4) for name, values in series.items()}
    return {**medians, "spread_ms": round(quarters[2] - quarters[0], 4)}


def timed_on_cuda(loss: Loss, source: Tensor, target: Tensor, upstream: Tensor, group) -> tuple:
    """ms of forward and backward on the device, ms of the host to queue both, MiB beyond the inputs."""
    logits = fresh(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(10_000_000)  # about 5 ms, in which the host queues what follows
    begin = time.perf_counter()
    events[0].record()
    value = loss(logits, target, group)
    events[1].record()
    gradient = torch.autograd.grad(value, logits, upstream)
    events[2].record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    del gradient
    forward, backward = (a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return forward, backward, 1e3 * host, (torch.cuda.max_memory_allocated() - before) / MIB


def timed_on_cpu(loss: Loss, source: Tensor, target: Tensor, upstream: Tensor, group) -> tuple:
    """The same on a CPU, where the host is the device."""
    logits = fresh(source)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    times = [time.perf_counter()]
    value = loss(logits, target, group)
    times.append(time.perf_counter())
    torch.autograd.grad(value, logits, upstream)
    times.append(time.perf_counter())
    forward, backward = (1e3 * (b - a) for a, b in itertools.pairwise(times))
    return forward, backward, forward + backward, (resident("VmHWM") - before) / MIB


def resident(name: str) -> int:
    """VmRSS or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    size = 4 * GIB if device.type == "cuda" else GIB // 2
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(12):
        wait()
        begin = time.perf_counter()
        copy.copy_(source)
        wait()
        seconds.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(seconds[2:])


class Collectives(TorchDispatchMode):
    """Records the bytes that each collective sends from this rank."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args[:2]) if isinstance(x, Tensor)]
            self.sent.append(tensors[-1].nbytes)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.sent: list[int] = []
        return super().__enter__()


def collectives(loss: Loss, device: torch.device) -> dict[str, float | str]:
    """How many, and bytes per token, on 8 ranks; the numbers that come out mean nothing, because nothing is sent."""
    source, target, upstream = case(64, 512, 0.0, device)
    try:
        with Collectives() as seen:
            gradient_of(loss, source, target, upstream, dist.group.WORLD)
    except ValueError as error:
        return {"collectives": "", "sent_bytes_per_token": str(error)}
    return {"collectives": len(seen.sent), "sent_bytes_per_token": sum(seen.sent) / len(target)}


def conditions(device: torch.device, tokens: int, repetitions: int) -> dict[str, str | int]:
    """What a number needs beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    facts: dict[str, str | int] = {"device": name, "date": datetime.date.today().isoformat(), "commit": commit()}
    for package in ("torch", "triton", "megatron-core", "liger-kernel", "transformer-engine", "flash-attn"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = ""
    facts["threads"] = torch.get_num_threads() if device.type == "cpu" else ""
    facts |= {"tokens": tokens, "dtype": "bf16", "repetitions": repetitions}
    return facts | {"copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1)}


def cpu_name() -> str:
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(": ")[2] if lines else platform.machine()


def commit() -> str:
    """Of this checkout; with a + if files differ from it."""

    def git(*words: str) -> str:
        out = subprocess.run(["git", *words], cwd=TOOLS, capture_output=True, text=True)
        return out.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


if __name__ == "__main__":
    sys.exit(main())
