"""Will this run start, and compute what I think? Asked before GPUs are taken.

    torchrun --nnodes 4 --nproc-per-node 8 ... -m megatron_dft.doctor SCRIPT ARGUMENTS    the command of the run
    python -m megatron_dft.doctor [--world-size 64] SCRIPT ARGUMENTS                      without ranks: before queueing
    python -m megatron_dft.doctor                                                         this machine alone

The command line of the training run, with `doctor` for `launch`. Nothing is built or trained. Each node prints a block
of lines, `ok`, `note` or `trouble`, and every rank ends with 1 if any rank of any node has found trouble.

    this machine     versions; GPUs: how many, of which kind, how much of their memory is free
    the arguments    layout against world size, vocabulary, objective, files (`hosts/preflight.py`)
    with ranks       names and interfaces of the network; every rank is there (missing ones are named); an all-reduce on
                     the backend of the run, its sum checked, its latency and bandwidth noted; nodes that differ

Options, before SCRIPT: --timeout SECONDS (60) for the ranks to meet, and for each question to the network or a driver;
--world-size N. No check hangs: one that takes too long is named, and ends the doctor. Left out: the time that torchrun
itself waits for nodes, the speed of storage, and the health of a GPU beyond its part in the all-reduce.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import ipaddress
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_dft import launch
from megatron_dft.hosts import cpu, preflight
from megatron_dft.hosts.preflight import Finding, trouble
from megatron_dft.version import __version__

HOST_S = 240.0  # to import Megatron and to look at files, on a slow file system
OLDEST = {"Python": (3, 11), "torch": (2, 6)}
MESSAGE_MIB = {"gloo": 4, "nccl": 256}


@dataclass
class Run:
    """What is examined, and what has been found."""

    script: str | None
    words: list[str]
    on_cpu: bool
    world_size: int
    planned: bool  # with --world-size: another machine will run it
    timeout_s: float
    launched: bool = field(default_factory=lambda: "RANK" in os.environ)
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    local_rank: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", 0)))
    local_size: int = field(default_factory=lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    store: dist.Store | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # the same on all nodes, if all is well
    findings: list[Finding] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # other nodes with trouble


def main(words: list[str]) -> None:
    """Examine, report, and end with 0 or 1."""
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    try:
        run = read(words)
    except ValueError as error:
        sys.exit(f"megatron_dft.doctor: {error}")
    if run.launched:
        hear(run, run.timeout_s + 10.0, connect, run)
    if run.local_rank == 0:  # one process of each node
        examine(run)
    if run.store is not None:
        hear(run, HOST_S + 2.0 * run.timeout_s, meet, run)
    if dist.is_initialized():
        hear(run, 2.0 * run.timeout_s, all_reduce, run)
        hear(run, run.timeout_s, agree, run)
    sys.exit(leave(run))


def read(words: list[str]) -> Run:
    """Our options, which come first, and the command of the run."""
    on_cpu, words = launch.device_of(words)
    parser = argparse.ArgumentParser("megatron_dft.doctor", allow_abbrev=False)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    ours = parser.parse_args(words)
    script, *arguments = ours.command or [None]
    if script is not None and not os.path.isfile(script):
        raise ValueError(f"expected the path of a Python script, got {script!r}; the script comes first")
    if ours.world_size is not None and "RANK" in os.environ:
        raise ValueError("--world-size: expected it without ranks, got it beside a launcher, which says it; drop it")
    world_size = ours.world_size or int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() or 1))
    return Run(script, arguments, on_cpu, world_size, ours.world_size is not None, ours.timeout)


def hear(run: Run, seconds: float, check: Callable[..., Iterator[Finding]], *args: Any) -> None:
    """Add what a check finds. That it fails by itself is trouble, too; one that hangs is named, and ends the doctor."""

    def too_long() -> None:
        run.findings.append(trouble(check.__name__, f"an answer within {seconds:.0f} s", "none", "see what it asks"))
        show(run)
        os._exit(1)

    watchdog = threading.Timer(seconds, too_long)
    watchdog.daemon = True
    watchdog.start()
    try:
        for finding in check(*args):
            run.findings.append(finding)
    except ValueError as error:
        run.findings.append(Finding("trouble", check.__name__, _line(error)))
    except RuntimeError as error:  # of torch, for networks and drivers
        remedy = "another rank or a driver has failed; look at the other blocks"
        run.findings.append(trouble(check.__name__, "an answer", _line(error), remedy))
    except Exception as error:
        text = f"this check of the doctor has itself failed: {type(error).__name__}: {_line(error)}"
        run.findings.append(Finding("trouble", check.__name__, text))
    finally:
        watchdog.cancel()


def examine(run: Run) -> None:
    """This machine, then the arguments."""
    if run.script is not None:  # a checkout's own Megatron goes before a wheel's, as for launch
        sys.path.insert(0, os.path.dirname(os.path.abspath(run.script)))
    for check in (versions, gpus, names) if run.launched else (versions, gpus):
        hear(run, run.timeout_s, check, run)
    if run.script is None:
        return
    run.facts |= {"script": _digest(Path(run.script)), "arguments": run.words}
    parsed: list[Any] = []
    hear(run, HOST_S, arguments, run, parsed)
    for settings, config in parsed:
        hear(run, HOST_S, preflight.layout, settings, run.world_size)
        if not any(f.level == "trouble" and f.subject == "layout" for f in run.findings):  # it would say the same
            hear(run, HOST_S, preflight.validation, run.on_cpu)
        hear(run, HOST_S, preflight.vocabulary, settings, config)
        hear(run, HOST_S, preflight.objective, settings, config, run.planned and not torch.cuda.is_available())
        hear(run, HOST_S, preflight.files, settings)


def arguments(run: Run, parsed: list[Any]) -> Iterator[Finding]:
    """Put what Megatron's parser makes of the arguments, and the objective, into `parsed`."""
    words, config = run.words, None
    try:
        config, _ = preflight.quietly(launch.config_of, words)
    except ValueError as error:
        yield Finding("trouble", "objective", str(error))
    if preflight.megatron_in_use() is not None and run.on_cpu:
        words = cpu.complete_arguments(words)
        preflight.quietly(cpu.enable)
    settings, unknown = preflight.settings_of(run.script or "", words, run.world_size)
    if config is not None:
        run.facts["objective"] = config.loss_type
    parsed.append((settings, config))
    if unknown:
        yield Finding("note", "arguments", f"Megatron does not know {'; '.join(unknown)}: only the script can")
    if not run.launched and not run.planned:
        text = f"checked for {run.world_size}, the number of GPUs here or 1; --world-size N checks for N"
        yield Finding("note", "ranks", text)


def versions(run: Run) -> Iterator[Finding]:
    """What is installed, and whether it is old enough to be known."""
    host = preflight.megatron_in_use()
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "triton": _installed("triton"),
        "Transformer Engine": _installed("transformer-engine"),
        "megatron-core": host and host[0],
        "megatron_dft": f"{__version__} ({_digest(*sorted(Path(__file__).parent.rglob('*.py')))})",
    }
    run.facts |= found
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield Finding("ok", "versions", text + (f", from {host[1]}" if host else "; no Megatron"))
    for name, oldest in OLDEST.items():
        if tuple(map(int, str(found[name]).split("+")[0].split(".")[:2])) < oldest:
            yield trouble("versions", f"{name} {'.'.join(map(str, oldest))} or newer", found[name], "upgrade")


def gpus(run: Run) -> Iterator[Finding]:
    """One for each rank of this node, all of a kind, and free."""
    if run.on_cpu:
        yield Finding("ok", "GPUs", "none is used (--device cpu)")
        return
    kinds, number = set(), torch.cuda.device_count()
    for index in range(number):
        gpu, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        kinds.add(f"{gpu.name}, {total >> 20} MiB, compute capability {gpu.major}.{gpu.minor}")
        if free < 0.9 * total:
            text = f"GPU {index}: {free >> 20} of {total >> 20} MiB are free; other processes hold the rest"
            yield Finding("note", "GPUs", text)
    run.facts["GPUs"] = "; ".join(sorted(kinds))
    if number < run.local_size:
        expected = f"{run.local_size}, one for each rank of this node"
        remedy = "use fewer ranks" if number else "--device cpu runs on CPU ranks"
        yield trouble("GPUs", expected, number, remedy)._replace(level="note" if run.planned else "trouble")
    if len(kinds) > 1:
        yield trouble("GPUs", "one kind", run.facts["GPUs"], "set CUDA_VISIBLE_DEVICES")
    if number:
        yield Finding("ok", "GPUs", f"{number}: {run.facts['GPUs']}")


def names(run: Run) -> Iterator[Finding]:
    """What ranks use to find each other: the address of the first, this host's own, and network interfaces."""
    address, own = os.environ["MASTER_ADDR"], socket.gethostname()
    if _address(address) is None:
        yield trouble("network", "MASTER_ADDR to be a name or address that resolves", repr(address), "correct it")
    named, address_of_own = os.environ.get("GLOO_SOCKET_IFNAME"), _address(own)
    if run.world_size > run.local_size and not named and address_of_own and address_of_own.is_loopback:
        expected = f"the name of this host, {own}, to resolve to an address that other nodes reach"
        remedy = "gloo would use it: set GLOO_SOCKET_IFNAME to the network's interface, or correct /etc/hosts"
        yield trouble("network", expected, address_of_own, remedy)
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        exact = variable.startswith("GLOO") or value.startswith("=")  # NCCL takes prefixes, and ^ for all others
        for name in () if value.startswith("^") else filter(None, value.lstrip("=").split(",")):
            if not any(x == name if exact else x.startswith(name) for x in interfaces):
                yield trouble("network", f"{variable} to be one of {', '.join(interfaces)}", name, "correct it")


def connect(run: Run) -> Iterator[Finding]:
    """The store through which ranks report: the launcher's, or one that rank 0 opens."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = run.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=run.timeout_s)
    try:
        store = dist.TCPStore(address, port, is_master=opens, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        expected = "a free port for rank 0" if opens else f"rank 0 to answer within {run.timeout_s:.0f} s"
        remedy = "look at the first node, MASTER_ADDR, MASTER_PORT and firewalls"
        yield trouble("network", f"{expected} at {address}:{port}", _line(error), remedy)
    else:
        run.store = dist.PrefixStore(f"doctor{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def meet(run: Run) -> Iterator[Finding]:
    """Every rank reports to the store, so that missing ones can be named; only then do they connect to each other."""
    store, limit = run.store, timedelta(seconds=run.timeout_s)
    assert store is not None
    store.set(f"rank{run.rank}", "")
    if run.rank == 0:
        missing = _wait(range(run.world_size), lambda rank: store.check([f"rank{rank}"]), run.timeout_s)
        store.set("missing", ", ".join(map(str, missing)))
    store.wait(["missing"], timedelta(seconds=HOST_S + run.timeout_s))
    if missing_ranks := store.get("missing").decode():
        store.set(f"read{run.rank}", "")
        if run.rank == 0:  # which may hold the store, and goes last
            here = [rank for rank in range(run.world_size) if store.check([f"rank{rank}"])]
            _wait(here, lambda rank: store.check([f"read{rank}"]), 5.0)
        got = f"no sign of rank {missing_ranks} in {run.timeout_s:.0f} s"
        yield trouble("network", f"all {run.world_size} ranks", got, "look at the nodes that should run them")
        return
    try:
        dist.init_process_group("gloo", store=store, rank=run.rank, world_size=run.world_size, timeout=limit)
        dist.monitored_barrier(timeout=limit, wait_all_ranks=True)
    except RuntimeError as error:
        remedy = "set GLOO_SOCKET_IFNAME to the network's interface, open firewalls"
        yield trouble("network", "every rank to reach every other", _line(error), remedy)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if run.rank == 0:
        yield Finding("ok", "network", f"{run.world_size} ranks are there and reach each other")


def _wait(ranks: Any, done: Callable[[int], bool], seconds: float) -> list[int]:
    """The ranks that are not done in the end."""
    left, deadline = list(ranks), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        left = [rank for rank in left if not done(rank)]
        time.sleep(0.02)
    return left


def all_reduce(run: Run) -> Iterator[Finding]:
    """Over all ranks, on the backend of the run: is the sum right, and how fast is it?"""
    backend, device = "gloo", torch.device("cpu")
    group: Any = None
    if not run.on_cpu and torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", run.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=4.0 * run.timeout_s))  # the watchdog is first
    sums = []

    def timed(length: int) -> float:
        """Seconds of an all-reduce of so many floats."""
        x = torch.full((length,), float(run.rank % 100), device=device)
        x[0].item()  # waits for the GPU
        start = time.perf_counter()
        dist.all_reduce(x, group=group)
        x[0].item()
        duration = time.perf_counter() - start
        sums.extend([x.min().item(), x.max().item()])
        return duration

    mib = MESSAGE_MIB[backend]
    latency_s, bulk_s = (median([timed(length) for _ in range(times)]) for length, times in ((1, 25), (mib << 18, 5)))
    expected = sum(rank % 100 for rank in range(run.world_size))
    if any(x != expected for x in sums):  # only now, because the other ranks have waited for this one
        yield trouble(
            "network", f"sums of {expected} from {backend}", f"{min(sums)} to {max(sums)}", "replace this node"
        )
    if run.rank == 0:
        bus_gb_per_s = 2e-9 * (run.world_size - 1) / run.world_size * (mib << 20) / bulk_s
        text = (
            f"{latency_s * 1e6:.0f} us for 4 bytes, {bulk_s * 1e3:.2f} ms for {mib} MiB ({bus_gb_per_s:.2f} GB/s bus)"
        )
        yield Finding("note", "network", f"{backend} all-reduce over {run.world_size} ranks: {text}")


def agree(run: Run) -> Iterator[Finding]:
    """Exchange findings: those of this node's ranks are shown in its block, and nodes that differ are named."""
    own = run.rank - run.local_rank  # a node is known by its first rank
    gathered: list[Any] = [None] * run.world_size
    dist.all_gather_object(gathered, (own, socket.gethostname(), run.facts, run.findings))
    run.findings = list(dict.fromkeys(f for node, _, _, findings in gathered if node == own for f in findings))
    nodes = {node: (host, facts) for node, host, facts, _ in gathered if facts}
    first, (first_host, expected) = next(iter(nodes.items()))
    for node, (host, facts) in nodes.items():
        text = differences(expected, facts)
        if text and own in (first, node):
            start = f"expected all nodes to be like {first_host} (rank {first}), got {host} (rank {node}) with"
            yield Finding("trouble", "nodes", f"{start} {text}")
        run.elsewhere += [host] if text and node != own else []
    run.elsewhere += [h for node, h, _, fs in gathered if node != own and any(f.level == "trouble" for f in fs)]
    if len(nodes) > 1 and not run.elsewhere:
        yield Finding("ok", "nodes", f"{len(nodes)} agree")


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str:
    """What differs, by name; of lists of words only those that the other does not have."""
    found = []
    for name in {**expected, **got}:
        a, b = expected.get(name), got.get(name)
        if a != b:
            if isinstance(a, list) and isinstance(b, list):
                a, b = ([word for word in x if word not in y] or x for x, y in ((a, b), (b, a)))
                a, b = " ".join(a), " ".join(b)
            found.append(f"{name}: {b}, not {a}")
    return "; ".join(found)


def show(run: Run) -> int:
    """Print the block of this node, and return the number of troubles in it."""
    ranks = f", ranks {run.rank} to {run.rank + run.local_size - 1} of {run.world_size}" if run.launched else ""
    lines = [f"  {f.level:8} {f.subject}: {f.text}" for f in run.findings]
    troubles = sum(f.level == "trouble" for f in run.findings)
    end = f"{troubles} trouble{'s' if troubles > 1 else ''}" if troubles else "no trouble"
    elsewhere = f"; trouble on {', '.join(dict.fromkeys(run.elsewhere))}" if run.elsewhere else ""
    print("\n".join([f"megatron_dft.doctor: {socket.gethostname()}{ranks}", *lines, f"  {end}{elsewhere}"]), flush=True)
    return troubles


def leave(run: Run) -> int:
    """Print, wait until every node has, and return 1 if there is trouble on any rank."""
    together = dist.is_initialized()
    shown = run.local_rank == 0 or run.store is None
    troubles = show(run) if shown else sum(f.level == "trouble" for f in run.findings)
    if together:
        with contextlib.suppress(RuntimeError):  # another has gone: it had trouble
            dist.monitored_barrier(timeout=timedelta(seconds=run.timeout_s))
        dist.destroy_process_group()
    elif run.local_rank != 0:
        time.sleep(2.0)  # when one rank ends, torchrun ends those of its node, which may still be printing
    return int(troubles > 0 or bool(run.elsewhere))


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(socket.getaddrinfo(name, None)[0][4][0])
    except (OSError, UnicodeError):
        return None


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
