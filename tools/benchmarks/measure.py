"""Time and memory of forward and backward on a GPU or a CPU, and the measurement conditions.

All cases run interleaved in one process, so disturbances of the machine affect all of them alike. On a GPU, a sleep
kernel keeps the device busy until everything is enqueued. The times are therefore device times; the host time to
enqueue is measured separately.
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
# Forward, the tensors to differentiate, and the upstream gradient.
Case = tuple[Callable[[], Tensor], Sequence[Tensor], Tensor]


def interleaved(
    cases: Mapping[str, Callable[[], Case]], device: torch.device, repetitions: int, warm_up: int = 2
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Medians over `repetitions` interleaved runs, after `warm_up` runs for compilation and caches.

    A case is prepared again for each run, outside of the timed region. The second result is the error of each case that
    failed; the others go on.
    """
    timed = on_cuda if device.type == "cuda" else on_cpu
    runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    for repetition in range(repetitions + warm_up):
        for name in [name for name in cases if name not in failed]:
            try:
                result = timed(*cases[name]())
            except Exception as error:  # of any package, out of memory too
                failed[name] = f"failed: {reason(error)}"
                continue
            if repetition >= warm_up:
                runs[name].append(result)
    return {name: summary(results) for name, results in runs.items() if name not in failed}, failed


def reason(error: Exception) -> str:
    """Class and first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


def summary(results: list[tuple[float, ...]]) -> dict[str, float]:
    """Medians, and the interquartile range of the total time."""
    forward, backward, host, memory = zip(*results, strict=True)
    total = [a + b for a, b in zip(forward, backward, strict=True)]
    quarters = statistics.quantiles(total, n=4)
    series = {"forward_ms": forward, "backward_ms": backward, "total_ms": total, "host_ms": host, "extra_mib": memory}
    medians = {name: round(statistics.median(values), 4) for name, values in series.items()}
    return {**medians, "spread_ms": round(quarters[2] - quarters[0], 4)}


def on_cuda(forward: Callable[[], Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> tuple[float, ...]:
    """Device ms of forward and backward, host ms to enqueue both, peak MiB beyond what was allocated before."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(10_000_000)  # about 5 ms, while the host enqueues the rest
    begin = time.perf_counter()
    events[0].record()
    value = forward()
    events[1].record()
    gradients = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
    events[2].record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    del gradients
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return *times, 1e3 * host, (torch.cuda.max_memory_allocated() - before) / MIB


def on_cpu(forward: Callable[[], Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> tuple[float, ...]:
    """The same values on a CPU; the host time is the total time."""
    ctypes.CDLL(None).malloc_trim(0)  # return free memory to the system, so that reuse counts
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = resident("VmRSS")
    times = [time.perf_counter()]
    value = forward()
    times.append(time.perf_counter())
    gradients = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
    times.append(time.perf_counter())
    del gradients
    forward_ms, backward_ms = (1e3 * (b - a) for a, b in itertools.pairwise(times))
    return forward_ms, backward_ms, forward_ms + backward_ms, (resident("VmHWM") - before) / MIB


def resident(name: str) -> int:
    """VmRSS or its peak VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def copy_bandwidth(device: torch.device) -> float:
    """Memory bandwidth of a large copy in bytes per second; reads and writes both count."""
    size = 4 * GIB if device.type == "cuda" else GIB // 2
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(12):
        synchronize()
        begin = time.perf_counter()
        copy.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(seconds[2:])


class Collectives(TorchDispatchMode):
    """Record every collective of this rank in `calls`: (part, group, collective, input bytes).

    For recv, the bytes received. `part` is the return value of the given function at the time of the call. The context
    slows operations down.
    """

    def __init__(self, part: Callable[[], str] = str) -> None:
        super().__init__()
        self.part = part
        self.calls: list[tuple[str, str, str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and (group := _group(args)):
            name = function._opname.strip("_").removesuffix("_base")
            name = re.sub("(_into)?_tensor_coalesced", "", name).replace("allre", "all_re").replace("allga", "all_ga")
            self.calls.append((self.part(), group, name, _input_bytes(args)))
        return function(*args, **(kwargs or {}))


def _group(args: tuple) -> str | None:
    """Name of the process group, the first object among the arguments."""
    objects = (x for x in args if isinstance(x, torch.ScriptObject))
    return next((dist.ProcessGroup.unbox(x).group_name for x in objects), None)


def _input_bytes(args: tuple) -> int:
    """Bytes of the input tensors: the second argument, or the first one if it is overwritten."""
    tensors = ([x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args[1::-1])
    return sum(x.nbytes for x in next(filter(None, tensors), []))


def conditions(device: torch.device) -> dict[str, str | int]:
    """Measurement conditions: device, date, commit, package versions, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    facts: dict[str, str | int] = {"device": name, "date": datetime.date.today().isoformat(), "commit": commit()}
    for package in (
        "torch",
        "triton",
        "megatron-core",
        "liger-kernel",
        "transformer-engine",
        "flash-attn",
        "trl",
        "quack-kernels",
    ):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = ""
    return facts | {"threads": torch.get_num_threads() if device.type == "cpu" else ""}


def cpu_name() -> str:
    """Model name from /proc/cpuinfo."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(": ")[2] if lines else platform.machine()


def commit() -> str:
    """Commit of this checkout, with a + if tracked files are modified; "unknown" in a source archive."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
