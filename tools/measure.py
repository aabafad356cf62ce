"""Time and memory of forward and backward on a GPU or a CPU, and the conditions beside which a number stands.

All candidates take turns, again and again in one process: what a machine does in between hits all of them alike. On a
GPU the device is kept busy until everything is queued, so that times are those of the device; what the host needs to
queue it is a number of its own.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import itertools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 1 << 30
MIB = 1 << 20
# What to time: forward, what to differentiate for, and the upstream gradient.
Case = tuple[Callable[[], Tensor], Sequence[Tensor], Tensor]


def interleaved(
    cases: Mapping[str, Callable[[], Case]], device: torch.device, repetitions: int, warm_up: int = 2
) -> dict[str, dict[str, float]]:
    """Medians over `repetitions` turns, after `warm_up` turns in which things are compiled and settle.

    A case is prepared anew for each turn, outside of what is timed.
    """
    timed = on_cuda if device.type == "cuda" else on_cpu
    runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    for repetition in range(repetitions + warm_up):
        for name, prepare in cases.items():
            result = timed(*prepare())
            if repetition >= warm_up:
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


def on_cuda(forward: Callable[[], Tensor], wanted: Sequence[Tensor], upstream: Tensor) -> tuple[float, ...]:
    """ms of forward and backward on the device, ms of the host to queue both, MiB beyond what was there before."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(10_000_000)  # about 5 ms, in which the host queues what follows
    begin = time.perf_counter()
    events[0].record()
    value = forward()
    events[1].record()
    gradients = torch.autograd.grad(value, wanted, upstream, allow_unused=True)
    events[2].record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    del gradients
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return *times, 1e3 * host, (torch.cuda.max_memory_allocated() - before) / MIB


def on_cpu(forward: Callable[[], Tensor], wanted: Sequence[Tensor], upstream: Tensor) -> tuple[float, ...]:
    """The same on a CPU, where the host is the device."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it counts when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    times = [time.perf_counter()]
    value = forward()
    times.append(time.perf_counter())
    gradients = torch.autograd.grad(value, wanted, upstream, allow_unused=True)
    times.append(time.perf_counter())
    del gradients
    forward_ms, backward_ms = (1e3 * (b - a) for a, b in itertools.pairwise(times))
    return forward_ms, backward_ms, forward_ms + backward_ms, (resident("VmHWM") - before) / MIB


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
    """Within it, `calls` records every collective of this rank: (part, group, collective, bytes put in).

    Of recv, the bytes that come. `part` is what the function given says at that moment. Operations are slower within.
    """

    def __init__(self, part: Callable[[], str] = str) -> None:
        super().__init__()
        self.part = part
        self.calls: list[tuple[str, str, str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and (group := _group(args)):
            name = function._opname.strip("_").removesuffix("_base")
            name = re.sub("(_into)?_tensor_coalesced", "", name).replace("allre", "all_re").replace("allga", "all_ga")
            self.calls.append((self.part(), group, name, _bytes_put_in(args)))
        return function(*args, **(kwargs or {}))


def _group(args: tuple) -> str | None:
    """The name of the process group, which comes before other objects."""
    objects = (x for x in args if isinstance(x, torch.ScriptObject))
    return next((dist.ProcessGroup.unbox(x).group_name for x in objects), None)


def _bytes_put_in(args: tuple) -> int:
    """Input tensors come second, or are overwritten and come first."""
    tensors = ([x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args[1::-1])
    return sum(x.nbytes for x in next(filter(None, tensors), []))


def conditions(device: torch.device) -> dict[str, str | int]:
    """What a number needs beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    facts: dict[str, str | int] = {"device": name, "date": datetime.date.today().isoformat(), "commit": commit()}
    for package in ("torch", "triton", "megatron-core", "liger-kernel", "transformer-engine", "flash-attn"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = ""
    return facts | {"threads": torch.get_num_threads() if device.type == "cpu" else ""}


def cpu_name() -> str:
    """As Linux tells it."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(": ")[2] if lines else platform.machine()


def commit() -> str:
    """Of this checkout, with a + if files differ from it; "unknown" in a source archive."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
