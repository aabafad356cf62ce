"""Check a training run before it starts: environment, arguments, files and network.

    torchrun --nnodes 4 --nproc-per-node 8 ... -m megatron_dft.doctor SCRIPT ARGUMENTS    the command of the run
    python -m megatron_dft.doctor [--world-size 64] SCRIPT ARGUMENTS                      without ranks
    python -m megatron_dft.doctor                                                         this machine alone

Use the command line of the training run with `doctor` instead of `launch`. No model is built. Each node prints lines
that start with `ok`, `note` or `error`. All ranks exit with 1 if any rank of any node found an error.

    this machine     versions; GPUs: number, model, free memory
    the arguments    layout against world size, vocabulary, objective, files (preflight.py)
    with ranks       network names and interfaces; missing ranks; the sum, latency and bandwidth of an all-reduce on the
                     backend of the run; differences between nodes

Each check has a time limit. A check that exceeds it is reported and ends the doctor. Not checked: the time that
torchrun waits for nodes, storage speed, and GPU health beyond the all-reduce.
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
from megatron_dft.doctor import preflight
from megatron_dft.doctor.preflight import Finding, failure
from megatron_dft.testing import cpu
from megatron_dft.utils import HelpFormatter, exit_rank
from megatron_dft.version import __version__

HOST_S = 240.0  # time limit for importing Megatron and reading files, on a slow file system
OLDEST = {"Python": (3, 11), "torch": (2, 6)}
MESSAGE_MIB = {"gloo": 4, "nccl": 256}


@dataclass
class Run:
    """The run to check, and the findings."""

    script: str | None
    arguments: list[str]
    on_cpu: bool
    world_size: int
    planned: bool  # --world-size is given: the run takes place on other machines
    timeout_s: float
    launched: bool = field(default_factory=lambda: "RANK" in os.environ)
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", 0)))
    local_rank: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", 0)))
    local_size: int = field(default_factory=lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    store: dist.Store | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # the same on all nodes, if all is well
    findings: list[Finding] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # other nodes with errors


def main(argv: list[str]) -> None:
    """Run the checks, print the findings, and exit with 0 or 1."""
    try:
        run = read(argv)
    except ValueError as error:
        sys.exit(f"megatron_dft.doctor: {error}")
    if run.launched:
        run_check(run, run.timeout_s + 10.0, connect, run)
    if run.local_rank == 0:  # one process of each node
        check_node(run)
    if run.store is not None:
        run_check(run, HOST_S + 2.0 * run.timeout_s, rendezvous, run)
    if dist.is_initialized():
        run_check(run, 2.0 * run.timeout_s, all_reduce, run)
        run_check(run, run.timeout_s, compare_nodes, run)
    exit_rank(finish(run))


def read(argv: list[str]) -> Run:
    """Parse the doctor's options, which come first, and the command of the run."""
    on_cpu, argv = launch.device_of(argv)
    parser = argparse.ArgumentParser(
        "megatron-dft doctor",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--world-size N] [--timeout SECONDS] [--device DEVICE] [SCRIPT ARGUMENTS]",
    )
    parser.add_argument("--world-size", metavar="N", type=int, help="ranks of the run, without torchrun")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="limit of the rendezvous and each network check",
    )
    parser.add_argument("command", metavar="SCRIPT ARGUMENTS", nargs=argparse.REMAINDER, help="the command of the run")
    ours = parser.parse_args(argv)
    script, *arguments = ours.command or [None]
    if script is not None:
        launch.check_script(script)
    if ours.world_size is not None and "RANK" in os.environ:
        raise ValueError("--world-size: expected it without ranks, got it under a launcher, which sets it; drop it")
    world_size = ours.world_size or int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() or 1))
    return Run(script, arguments, on_cpu, world_size, ours.world_size is not None, ours.timeout)


def run_check(run: Run, seconds: float, check: Callable[..., Iterator[Finding]], *args: Any) -> None:
    """Run a check and add its findings. An exception is an error. A check that exceeds its limit ends the doctor."""

    def on_timeout() -> None:
        remedy = "look at the file system, driver or network that this check uses"
        run.findings.append(failure(check.__name__, f"completion within {seconds:.0f} s", "a timeout", remedy))
        show(run)
        os._exit(1)

    watchdog = threading.Timer(seconds, on_timeout)
    watchdog.daemon = True
    watchdog.start()
    try:
        for finding in check(*args):
            run.findings.append(finding)
    except ValueError as error:
        run.findings.append(Finding("error", check.__name__, _line(error)))
    except RuntimeError as error:  # PyTorch raises it for networks and drivers
        remedy = "another rank or a driver failed; look at the findings of the other nodes"
        run.findings.append(failure(check.__name__, "no error", _line(error), remedy))
    except Exception as error:
        text = f"this check of the doctor failed: {type(error).__name__}: {_line(error)}"
        run.findings.append(Finding("error", check.__name__, text))
    finally:
        watchdog.cancel()


def check_node(run: Run) -> None:
    """Check this machine, then the arguments."""
    if run.script is not None:  # a checkout's Megatron precedes a wheel's, as in launch
        sys.path.insert(0, os.path.dirname(os.path.abspath(run.script)))
    for check in (versions, gpus, names) if run.launched else (versions, gpus):
        run_check(run, run.timeout_s, check, run)
    if run.script is None:
        return
    run.facts |= {"script": _digest(Path(run.script)), "arguments": run.arguments}
    parsed: list[Any] = []
    run_check(run, HOST_S, arguments, run, parsed)
    for settings, config in parsed:
        run_check(run, HOST_S, preflight.layout, settings, run.world_size)
        if not any(f.level == "error" and f.subject == "layout" for f in run.findings):  # avoids duplicate findings
            run_check(run, HOST_S, preflight.validation, run.on_cpu)
        run_check(run, HOST_S, preflight.vocabulary, settings, config)
        run_check(run, HOST_S, preflight.objective, settings, config, run.planned and not torch.cuda.is_available())
        run_check(run, HOST_S, preflight.files, settings)


def arguments(run: Run, parsed: list[Any]) -> Iterator[Finding]:
    """Parse the arguments with Megatron's parser; append its settings and our DFTConfig to `parsed`."""
    argv, config = run.arguments, None
    try:
        config, _ = preflight.quietly(launch.config_of, argv)
    except ValueError as error:
        yield Finding("error", "objective", str(error))
    if preflight.megatron_in_use() is not None and run.on_cpu:
        argv = cpu.complete_arguments(argv)
        preflight.quietly(cpu.enable)
    settings, unknown = preflight.settings_of(run.script or "", argv, run.world_size)
    if config is not None:
        run.facts["objective"] = config.loss_type
    parsed.append((settings, config))
    if unknown:
        text = f"Megatron does not define {'; '.join(unknown)}: only valid if the script does"
        yield Finding("note", "arguments", text)
    if not run.launched and not run.planned:
        text = f"checked for {run.world_size}, the number of GPUs of this machine or 1; --world-size N checks for N"
        yield Finding("note", "ranks", text)


def versions(run: Run) -> Iterator[Finding]:
    """Installed versions; error for Python or PyTorch below the minimum."""
    host = preflight.megatron_in_use()
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "triton": _installed("triton"),
        "Transformer Engine": _installed("transformer-engine"),
        "megatron-core": host and host[0],
        "megatron_dft": f"{__version__} ({_digest(*sorted(Path(__file__).parents[1].rglob('*.py')))})",
    }
    run.facts |= found
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield Finding("ok", "versions", text + (f", from {host[1]}" if host else "; no Megatron"))
    for name, oldest in OLDEST.items():
        if tuple(map(int, str(found[name]).split("+")[0].split(".")[:2])) < oldest:
            yield failure("versions", f"{name} {'.'.join(map(str, oldest))} or newer", found[name], "upgrade")


def gpus(run: Run) -> Iterator[Finding]:
    """Check for one GPU per rank of this node, of one model, with free memory."""
    if run.on_cpu:
        yield Finding("ok", "GPUs", "not used (--device cpu)")
        return
    kinds, number = set(), torch.cuda.device_count()
    for index in range(number):
        gpu, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        kinds.add(f"{gpu.name}, {total >> 20} MiB, compute capability {gpu.major}.{gpu.minor}")
        if free < 0.9 * total:
            text = f"GPU {index}: {free >> 20} of {total >> 20} MiB are free; other processes use the rest"
            yield Finding("note", "GPUs", text)
    run.facts["GPUs"] = "; ".join(sorted(kinds))
    if number < run.local_size:
        expected = f"{run.local_size}, one for each rank of this node"
        remedy = "use fewer ranks" if number else "--device cpu runs on CPU ranks"
        yield failure("GPUs", expected, number, remedy)._replace(level="note" if run.planned else "error")
    if len(kinds) > 1:
        yield failure("GPUs", "GPUs of one kind on this node", run.facts["GPUs"], "set CUDA_VISIBLE_DEVICES")
    if number:
        yield Finding("ok", "GPUs", f"{number}: {run.facts['GPUs']}")


def names(run: Run) -> Iterator[Finding]:
    """Check MASTER_ADDR, the address of this host's name, and the configured network interfaces."""
    address, own = os.environ["MASTER_ADDR"], socket.gethostname()
    if _address(address) is None:
        yield failure("network", "MASTER_ADDR to be a name or address that resolves", repr(address), "correct it")
    named, address_of_own = os.environ.get("GLOO_SOCKET_IFNAME"), _address(own)
    if run.world_size > run.local_size and not named and address_of_own and address_of_own.is_loopback:
        expected = f"the name of this host, {own}, to resolve to an address that other nodes can reach"
        remedy = "gloo would use it: set GLOO_SOCKET_IFNAME to the network's interface, or correct /etc/hosts"
        yield failure("network", expected, address_of_own, remedy)
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        exact = variable.startswith("GLOO") or value.startswith("=")  # NCCL matches prefixes; ^ excludes interfaces
        for name in () if value.startswith("^") else filter(None, value.lstrip("=").split(",")):
            if not any(x == name if exact else x.startswith(name) for x in interfaces):
                yield failure("network", f"{variable} to be one of {', '.join(interfaces)}", name, "correct it")


def connect(run: Run) -> Iterator[Finding]:
    """Connect to the TCPStore: the launcher's, or one that rank 0 opens."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = run.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=run.timeout_s)
    try:
        store = dist.TCPStore(address, port, is_master=opens, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        expected = "a free port for rank 0" if opens else f"rank 0 to answer within {run.timeout_s:.0f} s"
        remedy = "look at the first node, MASTER_ADDR, MASTER_PORT and firewalls"
        yield failure("network", f"{expected} at {address}:{port}", _line(error), remedy)
    else:
        run.store = dist.PrefixStore(f"doctor{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def rendezvous(run: Run) -> Iterator[Finding]:
    """Report missing ranks through the store; if there are none, initialize the process group."""
    store, limit = run.store, timedelta(seconds=run.timeout_s)
    assert store is not None
    store.set(f"rank{run.rank}", "")
    if run.rank == 0:
        missing = _wait(range(run.world_size), lambda rank: store.check([f"rank{rank}"]), run.timeout_s)
        store.set("missing", ", ".join(map(str, missing)))
    store.wait(["missing"], timedelta(seconds=HOST_S + run.timeout_s))
    if missing_ranks := store.get("missing").decode():
        store.set(f"read{run.rank}", "")
        if run.rank == 0:  # it may hold the store, so it exits last
            here = [rank for rank in range(run.world_size) if store.check([f"rank{rank}"])]
            _wait(here, lambda rank: store.check([f"read{rank}"]), 5.0)
        got = f"no connection from rank {missing_ranks} within {run.timeout_s:.0f} s"
        yield failure("network", f"all {run.world_size} ranks", got, "look at the nodes that should run them")
        return
    try:
        dist.init_process_group("gloo", store=store, rank=run.rank, world_size=run.world_size, timeout=limit)
        dist.monitored_barrier(timeout=limit, wait_all_ranks=True)
    except RuntimeError as error:
        remedy = "set GLOO_SOCKET_IFNAME to the network's interface, open firewalls"
        yield failure("network", "a connection between all ranks", _line(error), remedy)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if run.rank == 0:
        yield Finding("ok", "network", f"{run.world_size} ranks are connected")


def _wait(ranks: Any, done: Callable[[int], bool], seconds: float) -> list[int]:
    """The ranks that are not done after `seconds`."""
    left, deadline = list(ranks), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        left = [rank for rank in left if not done(rank)]
        time.sleep(0.02)
    return left


def all_reduce(run: Run) -> Iterator[Finding]:
    """Check the sum of an all-reduce over all ranks on the backend of the run; measure latency and bandwidth."""
    backend, device = "gloo", torch.device("cpu")
    group: Any = None
    if not run.on_cpu and torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", run.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        timeout = timedelta(seconds=4.0 * run.timeout_s)  # beyond the limit of this check
        group = dist.new_group(backend="nccl", timeout=timeout)
    sums = []

    def timed(length: int) -> float:
        """Seconds of an all-reduce of `length` floats."""
        x = torch.full((length,), float(run.rank % 100), device=device)
        x[0].item()  # host-device sync
        start = time.perf_counter()
        dist.all_reduce(x, group=group)
        x[0].item()
        duration = time.perf_counter() - start
        sums.extend([x.min().item(), x.max().item()])
        return duration

    mib = MESSAGE_MIB[backend]
    latency_s, bulk_s = (median([timed(length) for _ in range(times)]) for length, times in ((1, 25), (mib << 18, 5)))
    expected = sum(rank % 100 for rank in range(run.world_size))
    if any(x != expected for x in sums):  # after all collectives, which every rank has to join
        yield failure(
            "network", f"sums of {expected} from {backend}", f"{min(sums)} to {max(sums)}", "replace this node"
        )
    if run.rank == 0:
        bus_gb_per_s = 2e-9 * (run.world_size - 1) / run.world_size * (mib << 20) / bulk_s
        text = (
            f"{latency_s * 1e6:.0f} us for 4 bytes, {bulk_s * 1e3:.2f} ms for {mib} MiB ({bus_gb_per_s:.2f} GB/s bus)"
        )
        yield Finding("note", "network", f"{backend} all-reduce over {run.world_size} ranks: {text}")


def compare_nodes(run: Run) -> Iterator[Finding]:
    """Gather the findings of this node's ranks; report nodes whose facts differ from those of the first node."""
    own = run.rank - run.local_rank  # the first rank of a node identifies it
    gathered: list[Any] = [None] * run.world_size
    dist.all_gather_object(gathered, (own, socket.gethostname(), run.facts, run.findings))
    run.findings = list(dict.fromkeys(f for node, _, _, findings in gathered if node == own for f in findings))
    nodes = {node: (host, facts) for node, host, facts, _ in gathered if facts}
    first, (first_host, expected) = next(iter(nodes.items()))
    for node, (host, facts) in nodes.items():
        text = differences(expected, facts)
        if text and own in (first, node):
            start = f"expected all nodes to equal {first_host} (rank {first}), got {host} (rank {node}) with"
            yield Finding("error", "nodes", f"{start} {text}")
        run.elsewhere += [host] if text and node != own else []
    run.elsewhere += [h for node, h, _, fs in gathered if node != own and any(f.level == "error" for f in fs)]
    if len(nodes) > 1 and not run.elsewhere:
        yield Finding("ok", "nodes", f"{len(nodes)} agree")


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str:
    """Facts that differ, by name. Of two argument lists only the differing arguments are listed."""
    found = []
    for name in {**expected, **got}:
        a, b = expected.get(name), got.get(name)
        if a != b:
            if isinstance(a, list) and isinstance(b, list):
                a, b = ([item for item in x if item not in y] or x for x, y in ((a, b), (b, a)))
                a, b = " ".join(a), " ".join(b)
            found.append(f"{name}: {b}, not {a}")
    return "; ".join(found)


def show(run: Run) -> int:
    """Print the findings of this node, and return the number of errors among them."""
    ranks = f", ranks {run.rank} to {run.rank + run.local_size - 1} of {run.world_size}" if run.launched else ""
    lines = [f"  {f.level:8} {f.subject}: {f.text}" for f in run.findings]
    errors = sum(f.level == "error" for f in run.findings)
    end = f"{errors} error{'s' if errors > 1 else ''}" if errors else "no errors"
    elsewhere = f"; errors on {', '.join(dict.fromkeys(run.elsewhere))}" if run.elsewhere else ""
    print("\n".join([f"megatron_dft.doctor: {socket.gethostname()}{ranks}", *lines, f"  {end}{elsewhere}"]), flush=True)
    return errors


def finish(run: Run) -> int:
    """Print the findings, wait for all nodes, and return 1 if any rank found an error."""
    connected = dist.is_initialized()
    shown = run.local_rank == 0 or run.store is None
    errors = show(run) if shown else sum(f.level == "error" for f in run.findings)
    if connected:
        with contextlib.suppress(RuntimeError):  # a rank with errors has exited
            dist.monitored_barrier(timeout=timedelta(seconds=run.timeout_s))
    elif run.local_rank != 0:
        time.sleep(2.0)  # torchrun ends the ranks of a node when one exits; rank 0 may still be printing
    return int(errors > 0 or bool(run.elsewhere))


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
